"""Recordings of multi-label targets, values and probes: what stands in them, what they are replayed over, and crafted ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.streams import blobs, drifting, from_tensors, multilabel_canvas, recorded, split_digits, split_mnist, split_regression
from clstream.streams.probes import corrupted, held_out_classes, unknown
from clstream.streams.schedules import Transitions
from recorded_files import contents, crafted
from recorded_streams import digest

from clstream.recording import read, record
from clstream.stream import Samples, Stream, Subset, Task, TestSet


def canvases() -> Stream:
    return multilabel_canvas(train=60, test=40, epochs=1)


def probed() -> Stream:
    stream = split_digits(tasks=[4, 4])
    return stream.with_probes(corrupted(stream, "noise", 1, 5), held_out_classes(stream))


def test_what_was_there_before_is_written_as_before(tmp_path: Path) -> None:
    for number, stream in ((1, blobs()), (2, drifting(blobs(), Transitions(0.5))), (3, blobs(drop_last=True))):
        assert contents(stream)[0]["format"] == number
    assert {contents(stream)[0]["format"] for stream in (canvases(), split_regression(), probed())} == {4}


def test_multi_label_tasks_are_columns_of_the_data_s_own_targets() -> None:
    about, _ = contents(canvases())
    assert set(about["parts"]) == {"train", "test"} and [source["labels"] for source in about["sources"]] == [None, None]
    assert [task["train"]["columns"] for task in about["tasks"]] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert all("columns" not in task["test"] and task["target"] == "multilabel" for task in about["tasks"])


def test_targets_that_are_no_columns_of_the_data_are_a_source_of_their_own(tmp_path: Path) -> None:
    x, y = torch.rand(20, 3), torch.randint(0, 2, (20, 2), generator=torch.Generator().manual_seed(0)).float()
    whole, first = Samples(x, y, target="multilabel"), Samples(x, y * torch.tensor([1.0, 0.0]), target="multilabel")
    stream = Stream("mine", [Task(0, (0,), first, whole), Task(1, (1,), Samples(x, y - first.y, target="multilabel"), whole)])
    about, _ = contents(stream)
    assert len(about["parts"]) == 3 and all("columns" not in task["train"] for task in about["tasks"])
    assert digest(recorded(record(stream, tmp_path / "my.clstream"), data=stream)) == digest(stream)


def test_a_mixture_of_multi_label_tasks_comes_back(tmp_path: Path) -> None:
    stream = drifting(canvases(), Transitions(0.5), 6)
    assert digest(recorded(record(stream, tmp_path / "my.clstream"))) == digest(stream)


def test_samples_of_the_user_s_own_come_back_over_the_same_data(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    x, several, values = torch.rand(40, 4, generator=draw), torch.rand(40, 5, generator=draw) < 0.4, torch.randn(40, generator=draw)
    for y, target in ((several, "multilabel"), (values, "value")):
        data = from_tensors(x, y, x, y, tasks=2, target=target)
        stream = data.with_probes(TestSet("shifted", Samples(x + 1, data.data.parts["test"].y, target=target), note="by 1"))  # type: ignore[union-attr]
        file = record(stream, tmp_path / f"{target}.clstream")
        replay = recorded(file, data=stream)
        assert digest(replay) == digest(stream) and str(replay) == str(stream)
        with pytest.raises(ValueError, match="is not the data that"):
            recorded(file, data=data)


@pytest.mark.data
def test_another_data_set_is_found_by_its_name(tmp_path: Path) -> None:
    stream = split_mnist(batch_size=3000)
    stream = stream.with_probes(unknown(stream, "fashion_mnist", 30))
    file = record(stream, tmp_path / "my.clstream")
    about = read(file).about
    assert about["loader"] == "MNIST" and list(about["parts"]) == ["train", "test", "unknown/fashion_mnist"]
    assert digest(recorded(file)) == digest(recorded(file, data=split_mnist())) == digest(stream)


HUGE = {"name": "Fit", "fields": {"channels": 3, "height": 4096, "width": 4096, "dtype": "uint8"}}


def change(about: dict[str, Any], path: str, value: object) -> None:
    *outer, last = path.split(".")
    place: Any = about
    for name in outer:
        place = place[int(name) if name.isdecimal() else name]
    place[int(last) if last.isdecimal() else last] = value


@pytest.mark.parametrize(
    ("make", "path", "value", "message"),
    [
        (canvases, "tasks.0.train.columns", [10], "columns that are not distinct ones from 0 to 9"),
        (canvases, "tasks.0.train.columns", [-1], "columns that are not distinct ones"),
        (canvases, "tasks.0.train.columns", [1, 1], "columns that are not distinct ones"),
        (canvases, "tasks.0.train.columns", [1 << 70], "columns that are not distinct ones"),
        (canvases, "tasks.0.train.columns", [0.5], "is not what it should be"),
        (canvases, "tasks.0.train.columns", [0, 1, 2], r"have positives of the classes \[2\]"),
        (canvases, "tasks.0.classes", [12], "which are not among its classes"),
        (canvases, "tasks.0.target", "labels", "it has targets of the kind 'labels'"),
        (canvases, "tasks.0.target", "label", "have multilabel targets, and the task label targets"),
        (canvases, "tasks.0.target", "value", "have multilabel targets, and the task value targets"),
        (canvases, "options.train", 1 << 40, "are more than 131,072: give a stream over them"),
        (canvases, "options.train", "many", "asks for canvases that can't be: train must be a whole number"),
        (canvases, "options.data", "../secret", "asks for canvases that can't be: data must be one of"),
        (canvases, "options", {}, "asks for canvases that can't be"),
        (split_regression, "tasks.0.train.columns", [0], "it names columns of targets that have none"),
        (split_regression, "tasks.0.target", "label", "have value targets, and the task label targets"),
        (split_regression, "options", {"data": "boston"}, "asks for rows that can't be"),
        (split_regression, "options", {"data": "synthetic"}, "asks for rows that can't be"),
        (lambda: split_regression("synthetic"), "options.features", 1 << 40, "asks for rows that can't be: .*features"),
        (lambda: split_regression("synthetic"), "options.tasks", 1 << 40, "asks for rows that can't be: .*too few"),
        (lambda: split_regression("synthetic"), "options.drift", "all", "asks for rows that can't be: drift must be one of"),
        (probed, "tasks.0.target", "multilabel", "need multilabel targets as a"),
        (probed, "probes.0.task", 2, "is of task 2, but the tasks are 0 to 1"),
        (probed, "probes.0.task", -1, "task must be a whole number of at least 0"),
        (probed, "probes.0.task", "0", "is not what it should be"),
        (probed, "probes.0.known", "perhaps", "known must be True, False or 'taught'"),
        (probed, "probes.0.known", 1, "is not what it should be"),
        (probed, "probes.2.known", True, "have labels .* which are not among its classes"),
        (probed, "probes.0.name", "../../passwd", "a test set's name is made of letters"),
        (probed, "probes.0.name", "task_01", "has the name of another test set"),
        (probed, "probes.1.name", "corrupted/noise_1/task_00", "has the name of another test set"),
        (probed, "probes.0.target", "values", "it has targets of the kind 'values'"),
        (probed, "probes.0.target", "value", "need value targets as a"),
        (probed, "probes.0.samples.source", 7, "it has no source 7"),
        (probed, "probes.0.samples.rows", "other.npy", "other.npy"),
        (probed, "probes.0.samples.columns", [0], "it names columns of targets that have none"),
        (probed, "probes.0.samples.transform.name", "eval", "uses 'eval', which does not come with clstream"),
        (probed, "probes.0.samples.transform.fields.severity", 9, "Corrupt does not take the recorded"),
        (probed, "probes.0.samples.transform.fields.seed", 1, "gives other values than when it was recorded"),
        (probed, "probes.0.samples.transform", HUGE, "Fit does not take the recorded .* from 1 to 1024"),
        (probed, "probes.0.more", 1, "doesn't belong there"),
        (probed, "probes", [{}], "lacks 'name'"),
    ],
)  # fmt: skip
def test_crafted_targets_and_probes_are_refused(
    make: Callable[[], Stream], path: str, value: object, message: str, tmp_path: Path
) -> None:
    about, arrays = contents(make())
    change(about, path, value)
    file = tmp_path / "my.clstream"
    file.write_bytes(crafted(about, arrays))
    with pytest.raises(ValueError, match=message) as refused:
        recorded(file)
    assert "\n" not in str(refused.value)


def test_what_the_crafted_ones_start_from_is_taken(tmp_path: Path) -> None:
    for number, make in enumerate((canvases, split_regression, probed)):
        file = tmp_path / f"{number}.clstream"
        file.write_bytes(crafted(*contents(make())))
        replay = recorded(file)
        assert replay.fingerprint == make().fingerprint
        train = replay.tasks[0].train
        assert isinstance(train, Subset) and (train.class_mask is None) == (make is not canvases)
