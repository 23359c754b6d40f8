"""Streams of a backbone's features: the same as if they were computed on the way, once, and of no other backbone."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from clstream.strategies import NCM, Finetune
from clstream.streams import features, fuzzy_tasks, multilabel_canvas, split_digits
from torch import Tensor, nn

from clstream import run
from clstream.checks import check_stream, example_model, example_stream, normed_model
from clstream.cli import main
from clstream.models import Linear
from clstream.stream import Samples, TestSet


@dataclass(frozen=True)
class Flip:
    """Flips half of the images."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return a batch, some of it flipped."""
        return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


class Counting(nn.Module):
    """A backbone that counts the samples that it is asked about, and can be made to stop."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 5)
        self.asked, self.most = 0, most

    def features(self, x: Tensor) -> Tensor:
        """Return (n, 5)."""
        self.asked += len(x)
        if self.asked > self.most:
            raise KeyboardInterrupt
        answers: Tensor = self.layer(x.flatten(1).float() / 255)
        return answers


def test_every_part_has_the_features_of_its_samples(tmp_path: Path) -> None:
    stream = split_digits(validation=0.2)
    stream = stream.with_probes(TestSet("noise", Samples(torch.rand(20, 1, 8, 8), torch.zeros(20).long()), known=False))
    backbone = normed_model().train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    made = features(stream, backbone, cache=tmp_path, chunk_size=64)
    assert all(module.training for module in backbone.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())  # batch norm's too
    backbone.eval()
    for task, old in zip(made.tasks, stream.tasks, strict=True):
        for part, before in ((task.train, old.train), (task.test, old.test), (task.validation, old.validation)):
            assert part is not None and before is not None
            assert torch.allclose(part[:].x, backbone.features(before[:].x), atol=1e-6)  # type: ignore[operator]
            assert torch.equal(part.y, before.y)
    assert torch.allclose(made.probes[0].samples[:].x, backbone.features(stream.probes[0].samples[:].x), atol=1e-6)  # type: ignore[operator]
    assert made.input_shape == (144,) and made.classes == 10 and "features of NormedNet (weights " in str(made)
    for check in check_stream(made):
        check()


def test_what_is_computed_once_is_not_computed_again(tmp_path: Path) -> None:
    stream, first, again = example_stream(), Counting(), Counting()
    made = features(stream, first, cache=tmp_path)
    same = features(stream, again, cache=tmp_path)
    assert first.asked > 240 and again.asked < 40 and same.fingerprint == made.fingerprint
    other = Counting()
    with torch.no_grad():
        other.layer.weight += 0.01
    moved = features(stream, other, cache=tmp_path)
    assert other.asked > 240 and moved.fingerprint != made.fingerprint
    features(replace(stream, tasks=[replace(task, test=task.test[:5]) for task in stream.tasks]), again, cache=tmp_path)


def test_a_cache_that_is_cut_or_of_other_code_is_made_anew(tmp_path: Path) -> None:
    stream = example_stream()
    made = features(stream, Counting(), cache=tmp_path)
    expected, files = made.fingerprint, sorted(tmp_path.glob("*.f32"))
    files[0].write_bytes(files[0].read_bytes()[:-4])
    files[1].write_bytes(bytes(files[1].stat().st_size))
    assert features(stream, Counting(), cache=tmp_path).fingerprint == expected


def test_a_computation_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["clstream.streams.features"], "SAVE_EVERY", -1.0)
    stream = example_stream()
    stream = replace(stream, tasks=[replace(task, test=stream.tasks[0].test) for task in stream.tasks[:1]], schedule=None)
    expected = features(stream, Counting(), cache=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        features(stream, Counting(most=45), cache=tmp_path, chunk_size=10)
    (note,) = tmp_path.glob("*.json")
    assert json.loads(note.read_text())["done"] == 40
    rest = Counting()
    assert features(stream, rest, cache=tmp_path, chunk_size=10).fingerprint == expected.fingerprint
    assert rest.asked < 60 and not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("note", ['{"done": 40}', '{"done": 61}', '{"done": -1}', '{"done": true}', "[]", "{"])
@pytest.mark.parametrize("chunk_size", [7, 256])
def test_whatever_a_note_says_every_row_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str, chunk_size: int
) -> None:
    """Of a computation that was cut off in chunks of another size, and of notes that are damaged."""
    monkeypatch.setattr(sys.modules["clstream.streams.features"], "SAVE_EVERY", -1.0)
    stream = example_stream()
    stream = replace(stream, tasks=[replace(task, test=task.train) for task in stream.tasks[:1]], schedule=None)
    expected = features(stream, Counting(), cache=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        features(stream, Counting(most=45), cache=tmp_path, chunk_size=10)
    (file,) = tmp_path.glob("*.json")
    file.write_text(note)
    again = features(stream, Counting(), cache=tmp_path, chunk_size=chunk_size)
    assert torch.allclose(again.tasks[0].train[:].x, expected.tasks[0].train[:].x, atol=1e-6)


def test_a_method_on_them_gives_what_it_gives_on_the_backbone(tmp_path: Path) -> None:
    stream, backbone = example_stream(), example_model()
    made = features(stream, backbone, cache=tmp_path)
    assert torch.equal(run(NCM(Linear(32, 6)), made).accuracy, run(NCM(backbone), stream).accuracy)
    assert run(Finetune(Linear(made.input_shape, 6)), made).average > 0.2


def test_views_come_as_samples_beside_their_own(tmp_path: Path) -> None:
    stream = replace(example_stream(), augment=Flip())
    backbone = Counting()
    made = features(stream, backbone, views=3, cache=tmp_path)
    plain, flipped = (backbone.features(x) for x in (stream.tasks[1].train[:].x, stream.tasks[1].train[:].x.flip(-1)))
    part = made.tasks[1].train[:]
    assert len(part) == 240 and torch.equal(part.y, stream.tasks[1].train[:].y.repeat(4)) and made.augment is None
    assert torch.allclose(part.x[:60], plain, atol=1e-6)
    views = part.x[60:].view(3, 60, 5)
    either = [((views - side).abs().amax(2) < 1e-5) for side in (plain, flipped)]
    assert (either[0] | either[1]).all() and 0.2 < float(either[1].float().mean()) < 0.8 and not torch.equal(views[0], views[1])
    assert len(made.tasks[1].test) == 20 and "each training sample with 3 augmented views" in str(made)
    assert features(stream, backbone, views=3, cache=tmp_path).fingerprint == made.fingerprint


def test_drifting_hidden_and_multi_label_streams_keep_what_they_are(tmp_path: Path) -> None:
    for stream in (fuzzy_tasks(), multilabel_canvas(train=60, test=30)):
        with torch.no_grad():
            backbone = nn.Sequential(nn.Flatten(), nn.Linear(stream.tasks[0].test[:1].x.numel(), 7))
        backbone.features = backbone.forward  # type: ignore[assignment]
        made = features(stream, backbone, cache=tmp_path)
        assert (made.boundaries, made.targets, len(made), made.classes) == (
            stream.boundaries, stream.targets, len(stream), stream.classes,
        )  # fmt: skip
        assert torch.equal(made.session(1).samples.y, stream.session(1).samples.y)
        assert torch.allclose(made.session(1).samples[:].x, backbone(stream.session(1).samples[:].x), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda stream, folder: features(stream, nn.Linear(3, 2), cache=folder), TypeError, "features needs a model with a method"),
        (
            lambda stream, folder: features(stream, Counting(), views=2, cache=folder),
            ValueError,
            "has no augmentation that could make",
        ),
        (lambda stream, folder: features(stream, Counting(), views=-1, cache=folder), ValueError, "views must be"),
        (lambda stream, folder: features(stream, Counting(), chunk_size=0, cache=folder), ValueError, "chunk_size must be"),
        (
            lambda _, folder: features(replace(fuzzy_tasks(), augment=Flip()), Counting(), views=1, cache=folder),
            ValueError,
            "have no places for views",
        ),
    ],
)
def test_what_can_not_be_is_refused(tmp_path: Path, call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        call(example_stream(), tmp_path)  # type: ignore[operator]
    assert words in str(raised.value) and not list(tmp_path.glob("*.f32"))


def test_a_disk_too_small_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["clstream.streams.features"], "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    backbone = Counting()
    with pytest.raises(OSError, match=r"the features take 0\.00 GB, and .* has 0\.00 GB left: name another one, cache="):
        features(example_stream(), backbone, cache=tmp_path)
    assert backbone.asked == 1


def test_features_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    class Maps(Counting):
        def features(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"Maps.features must return \(n, features\), not \(1, 1, 8, 8\)"):
        features(example_stream(), Maps(), cache=tmp_path)


@pytest.mark.slow
def test_the_command_line_freezes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["run", "--strategy", "NCM", "--track", "false", "--checkpoint_every", "0", "--threads", "1", "--stream.epochs", "1"]
    assert main([*command, "--features"]) == 0
    frozen = capsys.readouterr()
    assert "features of Mlp (weights " in frozen.err and len(list((tmp_path / "cache/clstream/features").glob("*.f32"))) == 2
    assert main(command) == 0
    plain = capsys.readouterr()
    accuracy = [next(line.split()[-5] for line in out.splitlines() if "│ NCM on " in line) for out in (frozen.out, plain.out)]
    assert accuracy[0] == accuracy[1] != ""
    assert main(["run", "--strategy", "PRD", "--features", "--model", "torch.nn.Flatten", "--track", "false"]) != 0
    assert "features needs a model with a method `features`, not Flatten" in capsys.readouterr().err
