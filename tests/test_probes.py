"""Ready probes: what they hold, what their names and notes say, and what is refused."""

from __future__ import annotations

import pytest
import torch
from clstream.streams import blobs, from_tensors, multilabel_canvas, split_digits, split_mnist, split_regression
from clstream.streams.corruptions import KINDS, SEVERITIES, Corrupt, Fit
from clstream.streams.data import source
from clstream.streams.probes import corrupted, held_out_classes, probes_from, unknown

from clstream.pretraining import join_tasks
from clstream.stream import Samples, Stream, Subset, TestSet

DIGITS = split_digits()


def grey(n: int = 40, side: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def pictures(x: torch.Tensor, **options: object) -> Stream:
    y = torch.arange(len(x)) % 4
    return from_tensors(x, y, x, y, **{"tasks": 2, **options})  # type: ignore[arg-type]


@pytest.mark.data
def test_unknown_is_another_test_set_in_the_shape_of_the_stream() -> None:
    fashion = source("FashionMNIST")[1]
    stream = split_mnist()
    probe = unknown(stream, "fashion_mnist", most=500)
    assert probe.name == "unknown/fashion_mnist" and probe.known is False and probe.task is None and len(probe.samples) == 500
    assert isinstance(probe.samples, Subset) and torch.equal(probe.samples.x, fashion.x[probe.samples.index])
    assert len(unknown(stream, "FashionMNIST", most=20_000).samples) == 10_000
    small = unknown(DIGITS, "FashionMNIST", most=50)
    assert small.samples.x.shape == (50, 1, 8, 8) and small.samples.x.dtype == torch.float32
    assert small.samples.x.min() >= 0 and 0.5 < small.samples.x.max() <= 1
    assert small.note == "FashionMNIST, brought from (1, 28, 28) uint8 to (1, 8, 8) float32"
    assert small.note in str(DIGITS.with_probes(small))
    assert torch.equal(small.samples.x, unknown(DIGITS, "FashionMNIST", most=50).samples.x)
    with pytest.raises(ValueError, match="MNIST is the data of split_mnist, so it is not unknown"):
        unknown(stream, "mnist")


def test_images_are_fitted_to_colours_size_and_dtype() -> None:
    coloured = pictures(grey().expand(-1, 3, -1, -1).contiguous())
    probe = unknown(coloured, "digits", most=7)
    assert probe.samples.x.shape == (7, 3, 12, 12) and probe.samples.x.dtype == torch.uint8 and int(probe.samples.x.max()) > 128
    assert torch.equal(probe.samples.x[:, 0], probe.samples.x[:, 2])
    back = Fit(1, 12, 12, "float32")(coloured.tasks[0].test[:].x)
    assert back.shape == (20, 1, 12, 12) and torch.allclose(back, coloured.tasks[0].test[:].x[:, :1] / 255, atol=0.01)


def test_noise_is_as_large_as_its_severity_says() -> None:
    half = torch.full((50, 1, 16, 16), 128, dtype=torch.uint8)
    for severity, deviation in enumerate(SEVERITIES["noise"][:3], 1):
        assert (Corrupt("noise", severity)(half).float() / 255).std() == pytest.approx(deviation, rel=0.05)
        assert Corrupt("noise", severity)(half / 255).std() == pytest.approx(deviation, rel=0.05)
    assert not torch.equal(Corrupt("noise", 1)(half), Corrupt("noise", 1, seed=1)(half))


def test_occlusion_hides_a_square_of_its_own_in_each_image() -> None:
    white = torch.full((50, 3, 20, 10), 255, dtype=torch.uint8)
    hidden = Corrupt("occlusion", 3)(white)[:, 0] == 0
    assert hidden.sum((1, 2)).unique().tolist() == [8 * 4] and len(hidden.unique(dim=0)) > 30
    assert (hidden.any(2).sum(1) == 8).all() and (hidden.any(1).sum(1) == 4).all()


def test_contrast_shrinks_and_blur_smooths() -> None:
    x = grey().float() / 255
    for severity, factor in enumerate(SEVERITIES["contrast"], 1):
        shrunk = Corrupt("contrast", severity)(x)
        centre = x.mean((1, 2, 3), keepdim=True)
        assert torch.allclose(shrunk - centre, factor * (x - centre), atol=1e-5)
    rough = [Corrupt("blur", severity)(x).diff(dim=-1).abs().mean() for severity in range(1, 6)]
    assert rough == sorted(rough, reverse=True) and rough[-1] < 0.5 * x.diff(dim=-1).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [DIGITS, pictures(grey()), multilabel_canvas(train=200, test=40)])
def test_corrupted_is_a_copy_of_each_task_s_test_samples(kind: str, stream: Stream) -> None:
    probes = corrupted(stream, kind, 4)
    assert [probe.name for probe in probes] == [f"corrupted/{kind}_4/task_{task.id:02d}" for task in stream.tasks]
    for probe, task in zip(probes, stream.tasks, strict=True):
        assert probe.task == task.id and probe.known is True and torch.equal(probe.samples.y, task.test.y)
        assert probe.samples.x.dtype == task.test.x.dtype and not torch.equal(probe.samples.x, task.test.x)
        assert torch.equal(probe.samples[torch.tensor([3])].x, probe.samples.x[3:4]), "made once, as a whole"
    again = stream.with_probes(corrupted(stream, kind, 4))
    assert again.fingerprint == stream.with_probes(probes).fingerprint != stream.with_probes(corrupted(stream, kind, 3)).fingerprint
    assert f"corrupted/{kind}_4/task_00: {len(probes[0].samples)} to test, of task 0; {kind} of severity 4 of 5" in str(again)


def test_a_table_can_have_noise_and_a_part_of_the_samples_is_enough() -> None:
    stream = split_regression()
    probes = corrupted(stream, "noise", 2, most=10)
    assert [len(probe.samples) for probe in probes] == [10, 10, 10] and stream.with_probes(probes).probes == probes
    assert isinstance(probes[0].samples, Subset)
    assert (probes[0].samples.x - stream.data.parts["test"].x[probes[0].samples.index]).std() == pytest.approx(0.12, rel=0.3)  # type: ignore[union-attr]


def test_held_out_classes_are_those_of_the_data_that_no_task_has() -> None:
    stream = split_digits(tasks=[5, 1])
    probe = held_out_classes(stream)
    assert (
        probe.known is False
        and set(probe.samples.y.tolist()) == {6, 7, 8, 9}
        and probe.note == "classes 6, 7, 8, 9, which no task has"
    )
    assert len(probe.samples) + sum(len(task.test) for task in stream.tasks) == len(source("digits")[1])
    assert stream.with_probes(probe).test_sets[-1] is probe
    tuned = held_out_classes(split_digits(tasks=[5, 1], validation=0.2).for_tuning())
    assert set(tuned.samples.y.tolist()) == {6, 7, 8, 9} and len(tuned.samples) > len(probe.samples), "of the training set"
    canvas = multilabel_canvas(tasks=[4, 4], train=300, test=200)
    left = held_out_classes(canvas).samples.y
    assert left[:, 8:].any(1).all() and not left[:, :8].any()
    words = from_tensors(torch.rand(9, 2), list("abcabcabc"), torch.rand(9, 2), list("abcabcabc"), tasks=[["c", "a"]], relabel=True)
    assert len(held_out_classes(words).samples) == 3


def test_held_out_classes_of_the_stream_are_strange_until_taught() -> None:
    probe = held_out_classes(DIGITS, [8, 3])
    assert probe.known == "taught" and probe.name == "held_out_classes/3_8" and set(probe.samples.y.tolist()) == {3, 8}
    assert len(probe.samples) == int(torch.isin(source("digits")[1].y, torch.tensor([3, 8])).sum())
    assert DIGITS.with_probes(probe).probes == (probe,)


def test_probes_are_read_from_text() -> None:
    stream = split_digits(tasks=[4, 4])
    probes = probes_from(stream, "corrupted:blur, corrupted:noise:5,held_out_classes,held_out_classes:1+7")
    assert [probe.name for probe in probes] == [
        "corrupted/blur_3/task_00", "corrupted/blur_3/task_01", "corrupted/noise_5/task_00", "corrupted/noise_5/task_01",
        "held_out_classes", "held_out_classes/1_7",
    ]  # fmt: skip
    assert len(stream.with_probes(probes).test_sets) == 8
    assert [probe.name for probe in probes_from(stream, ["held_out_classes"])] == ["held_out_classes"]
    coloured = pictures(grey().expand(-1, 3, -1, -1).contiguous())
    assert [len(probe.samples) for probe in probes_from(coloured, "unknown:digits:20")] == [20]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unknwn:mnist", "probes must be one of unknown, corrupted, held_out_classes, noise, not 'unknwn': did you mean unknown?"),
        ("", "probes must be one of"),
        ("unknown", "probes: 'unknown' is not written as unknown:DATA or unknown:DATA:MOST"),
        ("unknown:", "probes: 'unknown:' is not written as"),
        ("unknown:wine:many", "probes: 'unknown:wine:many' is not written as"),
        ("unknown:fashion_mnst", "probes: unknown:fashion_mnst: data must be one of digits, breast_cancer, wine, MNIST"),
        ("unknown:digits", "digits is the data of split_digits, so it is not unknown"),
        ("unknown:wine", r"wine has inputs of \(13,\) torch.float32, which can't be brought to those of split_digits, \(1, 8, 8\)"),
        ("corrupted:fog", "probes: corrupted:fog: kind must be one of noise, blur, occlusion, contrast, not 'fog'"),
        ("corrupted:blur:6", "probes: corrupted:blur:6: severity must be a whole number from 1 to 5, not 6"),
        ("corrupted:blur:3:1", "is not written as corrupted:KIND or corrupted:KIND:SEVERITY"),
        ("corrupted:blur:³", "is not written as corrupted:KIND"),
        ("held_out_classes", "its tasks have all classes of its data"),
        ("held_out_classes:12", r"has no classes \[12\]: it has 0, 1, 2"),
        ("held_out_classes:a", "is not written as held_out_classes or held_out_classes:7"),
        ([3], "probes must be named by text"),
    ],
)
def test_text_that_names_no_probe_is_one_sentence(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        probes_from(DIGITS, text)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: corrupted(blobs(), "blur"), r"blobs: blur is for images, .* not for inputs of \(20,\) torch.float32"),
        (lambda: corrupted(pictures(grey().float()), "noise"), "images, and those of floats must be from 0 to 1, not 0 to 255"),
        (lambda: corrupted(pictures(grey().expand(-1, 2, -1, -1)), "contrast"), "grey images and those of three colours"),
        (lambda: corrupted(DIGITS, "blur", most=0), "most must be a whole number of at least 1 or None"),
        (lambda: held_out_classes(split_regression()), "its tasks have all classes of its data"),
        (lambda: held_out_classes(split_regression(), [0]), "only classes of labels are strange until taught"),
        (lambda: held_out_classes(DIGITS, []), "has no classes"),
        (lambda: held_out_classes(Stream("mine", DIGITS.tasks)), "doesn't say which data its test samples are rows of"),
        (lambda: Corrupt("blur", True), "severity must be a whole number"),
        (lambda: Fit(2, 8, 8, "uint8"), "channels must be 1 or 3"),
        (lambda: Fit(1, 10**6, 8, "uint8"), "height must be a whole number from 1 to 1024"),
        (lambda: Fit(3, 1024, 1024, "uint8")(grey(100)), "100 images of 1024 x 1024 are more than 268,435,456 numbers"),
        (lambda: Fit(1, 8, 8, "float64"), "dtype must be one of uint8, float32"),
    ],
)
def test_what_can_not_be_is_one_sentence(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stream_with_probes_can_be_joined_for_training_and_tuned() -> None:
    stream = split_digits(validation=0.2).with_probes(corrupted(DIGITS, "noise", 1, 5))
    assert join_tasks(stream).probes == stream.for_tuning().probes == ()


def test_probes_of_other_makes_go_with_them() -> None:
    mine = TestSet("mine/shifted", Samples(DIGITS.tasks[0].test.x + 0.1, DIGITS.tasks[0].test.y), task=0)
    stream = DIGITS.with_probes(mine, corrupted(DIGITS, "contrast", 1))
    assert [probe.name for probe in stream.probes][:2] == ["mine/shifted", "corrupted/contrast_1/task_00"]
    with pytest.raises(ValueError, match="the probe mine/shifted has the name of another test set"):
        stream.with_probes(mine)
