"""Sequences of data sets: how they are cut, what a development stream and a learning strategy don't see, the user's own lists."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.strategies import Previous, Replay
from clstream.streams import mini_nevis, nevis_list
from clstream.streams.task_sequence import DataSet, TaskKey, TaskSequence, WithheldError, cut, splits_of, task_sequence
from PIL import Image
from test_tuning import reachable
from torch import Tensor

from clstream import Strategy, run
from clstream.bus import on
from clstream.checks import check_stream
from clstream.cli.lookup import import_path
from clstream.events import RunStarted, SessionStarted, TaskEnded, TaskStarted
from clstream.models import Mlp
from clstream.stream import Samples
from clstream.tuning import trial_stream

TEST, DEV_TEST, TAIL = 255, 254, 253
"""The one value of the pixels of images that are to stay unseen; no other image has it."""


def picture(file: Path, value: int | None, draw: np.random.Generator) -> None:
    """Write an image of 8 x 8 pixels of one value, or of random ones below these."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = draw.integers(0, 200, (8, 8, 3)) if value is None else np.full((8, 8, 3), value)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A list of data sets: one with a validation set, one without, one with several labels, and one for the tail."""
    draw = np.random.default_rng(0)
    for name, sizes in {
        "digits": {"train": 10, "val": 4, "test": 4},
        "clothes": {"train": 20, "test": 4},
        "late": {"train": 20, "test": 4},
    }.items():
        for part, size in sizes.items():
            for number in range(2 * size):
                value = {"test": TEST, "val": DEV_TEST}.get(part)
                picture(tmp_path / name / part / f"c{number % 2}" / f"{number}.png", TAIL if name == "late" else value, draw)
    lines = ["file,labels"]
    for part, size in {"train": 40, "test": 8}.items():
        for number in range(size):
            picture(tmp_path / "scenes" / part / f"{number}.png", TEST if part == "test" else None, draw)
            lines.append(f"{part}/{number}.png,{' '.join(['red', 'blue'][number % 2 : 1 + number % 3])}")
    (tmp_path / "scenes" / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "list.yaml").write_text(
        "- {folder: late, year: 2021}\n- {folder: scenes, year: 2009, kind: multilabel}\n- {folder: digits, year: 1998}\n"
        "- {folder: clothes, year: 2017}\n- {folder: digits, year: 2018}\n"
    )
    return tmp_path


def listed(folder: Path, final_from: int = 2020, **options: str) -> TaskSequence:
    return nevis_list(
        folder / "list.yaml", size=8, cache=folder / "cache", progress=False, epochs=2, final_from=final_from, **options
    )  # type: ignore[arg-type]  # of strings


def values(*roots: object) -> set[int]:
    """Return which of the marks any tensor has that can be reached, or what lies in its storage."""
    seen = set[int]()
    for value in reachable(*roots):
        if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.numel():
            storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())  # type: ignore[call-overload]
            seen |= {mark for mark in (TEST, DEV_TEST, TAIL) if bool((storage == mark).any())}
    return seen


# What is not seen -----------------------------------------------------------------------------------------------------


def test_a_development_stream_leads_to_no_test_set_and_to_no_task_of_the_tail(folder: Path) -> None:
    stream = listed(folder)
    strategy = Previous(Mlp(stream.input_shape, stream.outputs, (8,)))
    assert values(stream, strategy) == {DEV_TEST}  # the walk finds what it is tested on
    run(strategy, stream)
    assert values(stream, strategy) == {DEV_TEST} and values(strategy) == set()
    assert values(stream.visible) == set()
    assert values(listed(folder, part="all")) == {DEV_TEST, TAIL} and values(listed(folder, split="test")) == {TEST}
    assert [key.name for key in listed(folder, part="all").keys] == ["digits", "scenes", "clothes", "digits", "late"]


def test_a_search_over_trials_is_sealed_too(folder: Path) -> None:
    stream = trial_stream(listed(folder), 3)
    assert values(stream) == set() and isinstance(stream, TaskSequence) and len(stream.keys) == 3
    run(Previous(Mlp(stream.input_shape, stream.outputs, (8,))), stream)


class Peeker(Strategy):
    """Asks what it learns for test samples, by way of one event."""

    where = ""

    @on(RunStarted)
    def at_start(self, event: RunStarted) -> None:
        if self.where == "run":
            print(event.stream.tasks[1].test.x)

    @on(TaskStarted)
    def at_task(self, event: TaskStarted) -> None:
        if self.where == "task":
            print(event.task.test[:])

    @on(SessionStarted)
    def at_session(self, event: SessionStarted) -> None:
        if self.where == "session":
            print(event.session.task.test.y)

    @on(TaskEnded)
    def at_end(self, event: TaskEnded) -> None:
        if self.where == "end":
            print(event.task.test.source)  # type: ignore[union-attr]
        assert len(event.task.test) and event.task.validation is not None  # these may be known


SMALL = DataSet(
    TaskKey("s", classes=("a", "b")),
    Samples(torch.rand(40, 3), torch.arange(40) % 2),
    Samples(torch.rand(4, 3), torch.arange(4) % 2),
)


@pytest.mark.parametrize("where", ["run", "task", "session", "end"])
def test_a_strategy_that_asks_for_a_test_key_while_it_learns_gets_an_error(where: str) -> None:
    stream = task_sequence("small", [SMALL, SMALL], epochs=1)
    peeker = Peeker(Mlp(3, 2))
    peeker.where = where
    with pytest.raises(WithheldError, match="is not shown what it will be tested on: it asked the test samples of task"):
        run(peeker, stream)


@pytest.mark.parametrize("name", ["mini_nevis", "nevis_list"])
def test_a_config_may_name_it(name: str) -> None:
    assert import_path("stream", f"clstream.streams.{name}") == f"clstream.streams.{name}"


def test_it_meets_the_contract_and_other_strategies_run_on_it() -> None:
    stream = task_sequence("small", [SMALL, SMALL], epochs=2)
    for check in check_stream(stream):
        check()
    assert run(Replay(Mlp(3, 2)), stream).average > 0
    withheld = next(session.task.test for session in stream)
    assert withheld is stream.visible.tasks[0].test and len(deepcopy(withheld)) == len(stream.tasks[0].test)


# How data sets are cut ------------------------------------------------------------------------------------------------


def test_the_shares_of_the_splits() -> None:
    samples = Samples(torch.arange(100.0)[:, None], torch.arange(100) % 1)
    parts = splits_of(DataSet(TaskKey("n", classes=("a",)), samples, samples[:5]), 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "dev": 15, "dev_test": 15, "test": 5}
    whole = torch.cat([parts[name].x for name in ("train", "dev", "dev_test")]).flatten().sort().values
    assert torch.equal(whole, samples.x.flatten())  # each once
    given = splits_of(DataSet(TaskKey("n", classes=("a",)), samples, samples[:5], samples[:9]), 0)
    assert {name: len(part) for name, part in given.items()} == {"train": 80, "dev": 20, "dev_test": 9, "test": 5}
    assert torch.equal(splits_of(DataSet(TaskKey("n", classes=("a",)), samples, samples), 0)["dev"].x, parts["dev"].x)


def test_labels_are_cut_class_by_class() -> None:
    y = torch.arange(60) % 4
    train, dev, held = cut(Samples(torch.rand(60, 1), y), (0.7, 0.85, 1.0), 0)
    assert [part.y.bincount().tolist() for part in (train, dev, held)] == [[11] * 4, [2] * 4, [2] * 4]


def test_classes_are_numbered_by_key_and_test_sets_are_as_published(folder: Path) -> None:
    stream = listed(folder, split="test")
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert [task.target for task in stream.tasks] == ["label", "multilabel", "label", "label"]
    assert stream.class_names == ("digits/c0", "digits/c1", "scenes/blue", "scenes/red", "clothes/c0", "clothes/c1")
    assert [len(task.test) for task in stream.tasks] == [8, 8, 8, 8] and stream.batch_size == 16
    assert [len(task.train) for task in stream.tasks] == [16, 28, 28, 16] and len(listed(folder).tasks[0].test) == 8
    assert stream.keys[0] == stream.keys[3] and hash(stream.keys[0]) == hash(stream.keys[3])
    assert torch.equal(stream.tasks[0].train[:].x, stream.tasks[3].train[:].x)
    assert set(stream.tasks[1].train.y[:, :2].unique().tolist()) == {0.0}


@pytest.mark.data
def test_mini_nevis_is_fourteen_tasks_of_real_images() -> None:
    stream, whole = mini_nevis(images=400, progress=False), mini_nevis("all", "test", images=400, mode="L", progress=False)
    assert [len(task.classes) for task in stream.tasks] == [10, 6, 4, 24, 22, 24, 40, 26, 10, 10, 10]
    assert [key.year for key in whole.keys] == [1998, 2009, 2009, 2015, 2015, 2015, 2015, 2015, 2017, 1998, 2017, 2015, 2015, 2015]
    assert (stream.input_shape, whole.input_shape, len(whole.tasks)) == ((3, 32, 32), (1, 32, 32), 14)
    assert stream.classes == 176 and whole.classes == 282 and whole.targets == ("label", "multilabel")
    assert stream.keys[0] == stream.keys[9] and stream.tasks[0].classes == stream.tasks[9].classes
    assert all(len(task.test) and task.validation is not None for task in whole.tasks)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("- {folder: nowhere, year: 1999}", FileNotFoundError, "data set 0: there is no folder or zip archive .*nowhere"),
        (
            "- {folder: digits, year: soon}",
            ValueError,
            "data set 0, digits: year must be a whole number from 0 to 9999",
        ),
        ("- {folder: digits}", ValueError, "data set 0, digits: year must be a whole number"),
        ("- {folder: digits, year: 1, kind: values}", ValueError, "digits: kind must be one of label, multilabel, not 'values'"),
        ("- {folder: digits, yaer: 1}", ValueError, "data set 0 has 'yaer', and takes folder, year, kind and name"),
        ("- {year: 1}", ValueError, "data set 0 must have a folder"),
        ("folder: digits", ValueError, "must be a list of data sets"),
        ("[", ValueError, "is no YAML"),
        ("- !!python/object/apply:os.system ['true']", ValueError, "is no YAML"),
        ("- {folder: digits, year: 1}\n- {folder: late, name: digits, year: 2}", ValueError, "two data sets are named 'digits'"),
        (
            "- {folder: clothes, year: 1, kind: multilabel}",
            FileNotFoundError,
            "there is no .*labels.csv: a multilabel data set",
        ),
        ("- {folder: late, year: 2021}", ValueError, "all of its data sets are of 2020 or later"),
    ],
)
def test_lists_that_are_refused(folder: Path, text: str, error: type[Exception], sentence: str) -> None:
    (folder / "list.yaml").write_text(text)
    with pytest.raises(error, match=sentence):
        listed(folder)


def test_data_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no list of data sets .*none\.yaml"):
        nevis_list(folder / "none.yaml")
    (folder / "scenes" / "labels.csv").write_text("file,labels\ntrain/0.png,red\n")
    with pytest.raises(ValueError, match=r"labels\.csv has no line for train/1\.png"):
        listed(folder)


@pytest.mark.data
def test_mini_nevis_names_what_it_lacks(tmp_path: Path) -> None:
    import os

    for name in ("MNIST", "FashionMNIST", "omniglot-py"):
        (tmp_path / name).symlink_to(Path(os.environ["CLSTREAM_DATA"]) / name)
    with pytest.raises(FileNotFoundError, match=r"there is no .*cifar10-jpeg\.zip, nor a folder of that name: mini_nevis takes"):
        mini_nevis(root=tmp_path, progress=False)
