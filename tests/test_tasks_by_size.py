"""`tasks` as the number of classes of each task, or as the labels of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.streams import blobs, few_shot_tasks, from_dataset, from_tensors, permuted_mnist, recorded, si_blurry, split_digits
from torch.utils.data import TensorDataset

from clstream.checks import check_stream
from clstream.cli import main
from clstream.recording import record
from clstream.stream import Stream

Y = torch.arange(60) % 6
WORDS = ["ape", "bee", "cat", "dog", "elk", "fox"]


def of(tasks: object, y: object = Y, **options: object) -> Stream:
    x = torch.arange(60.0)[:, None] + torch.zeros(60, 3)
    return from_tensors(x, y, x, y, tasks=tasks, batch_size=7, **options)  # type: ignore[arg-type]


def classes(stream: Stream) -> list[tuple[int, ...]]:
    return [task.classes for task in stream.tasks]


@pytest.mark.parametrize(
    ("tasks", "options", "dealt"),
    [
        ([4, 1, 1], {}, [(0, 1, 2, 3), (4,), (5,)]),
        ((2, 1), {}, [(0, 1), (2,)]),
        ([np.int64(3), 3], {}, [(0, 1, 2), (3, 4, 5)]),
        ([1, 2], {"class_order": [5, 0, 4, 1, 2, 3]}, [(5,), (0, 4)]),
        ([[0, 3], [1]], {}, [(0, 3), (1,)]),
        (([5, 4], (2, 0, 1)), {}, [(5, 4), (2, 0, 1)]),
        ([[5, 0, 2], [5, 1]], {"scenario": "task"}, [(5, 0, 2), (5, 1)]),
        ([[3, 1], [4, 0]], {"scenario": "domain"}, [(0, 1), (0, 1)]),
    ],
)
def test_classes_go_where_they_are_told(tasks: object, options: dict[str, object], dealt: list[tuple[int, ...]]) -> None:
    stream = of(tasks, **options)
    assert classes(stream) == dealt and len(stream) == len(dealt)
    for check in check_stream(stream):
        check()


@pytest.mark.parametrize("options", [{}, {"class_order": 3}, {"scenario": "domain"}, {"sessions_per_task": 2, "validation": 0.2}])
def test_sizes_that_say_the_same_as_a_number_give_the_same_stream(options: dict[str, object]) -> None:
    by_size, by_number = of([2, 2, 2], **options), of(3, **options)
    assert by_size.fingerprint == by_number.fingerprint and str(by_size) == str(by_number)


def test_a_seed_shuffles_what_sizes_cut() -> None:
    shuffled = [label for group in classes(of(6, class_order=1)) for label in group]
    assert classes(of([3, 1], class_order=1)) == [tuple(shuffled[:3]), (shuffled[3],)]


def test_groups_have_their_own_samples_and_domains_their_own_places() -> None:
    task = of([[3, 1], [4, 0]], scenario="domain").tasks[0]
    rows = task.train.x[:, 0].long()
    assert set((rows % 6).tolist()) == {1, 3} and torch.equal(task.train.y, (rows % 6 == 1).long())


def test_the_card_says_what_is_left_out() -> None:
    assert "note: 2 of 6 classes are left out, they are in no task: 4, 5" in str(of([3, 1]))
    assert "note: 3 of 6 classes are left out, they are in no task: 2, 4, 5" in str(of([[0, 3], [1]]))
    assert "left out" not in str(of([4, 2])) and "evenly" not in str(of([4, 2]))


def test_names_are_taken_and_left_out_ones_leave_no_gap() -> None:
    words = [WORDS[label] for label in Y.tolist()]
    stream = of([["fox", "ape"], ["cat"]], words, relabel=True)
    assert stream.class_names == ("ape", "cat", "fox") and classes(stream) == [(2, 0), (1,)] and stream.gaps == ""
    assert set((stream.tasks[0].train.x[:, 0].long() % 6).tolist()) == {0, 5}
    assert "left out, they are in no task: bee, dog, elk" in str(stream)
    sized = of([1, 2], words, relabel=True, class_order=WORDS[::-1])
    assert [[sized.class_name(label) for label in task.classes] for task in sized.tasks] == [["fox"], ["elk", "dog"]]
    with pytest.raises(ValueError, match=r"tasks\[1\] names 'gnu', which is not one of the labels"):
        of([["fox"], ["gnu"]], words, relabel=True)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "tasks must be a number, a list of sizes such as .* not an empty list"),
        ([0, 6], {}, r"tasks\[0\] must be a whole number of at least 1, not 0"),
        ([2.5, 1], {}, r"tasks\[0\] must be a whole number of at least 1, not 2.5"),
        ([True, 1], {}, r"tasks\[0\] must be a whole number of at least 1, not True"),
        ([5, 2], {}, "there are 6 classes, and the sizes in tasks add up to 7"),
        ([[0, 1], 2], {}, r"tasks\[1\] must be a list of labels, as the other groups are, not 2"),
        ([[0, 1], []], {}, r"tasks\[1\] must be a list of labels, as the other groups are, not \[\]"),
        ([[0, 1.5]], {}, r"tasks\[0\] must be a list of labels, as the other groups are, not \[0, 1.5\]"),
        ([[0, 0]], {}, r"tasks\[0\] must name distinct labels, not \[0, 0\]"),
        ([[0, 1], [6]], {}, r"tasks\[1\] names 6, which is not one of the labels"),
        ([[0, -1]], {}, r"tasks\[0\] names -1, which is not one of the labels"),
        ([["0"]], {}, r"tasks\[0\] names '0', which is not one of the labels"),
        ([[0, 1], [1, 2]], {}, 'tasks 0 and 1 both have the label 1: tasks share classes only where the scenario is "task"'),
        ([[0, 1], [1, 2]], {"scenario": "domain"}, "tasks 0 and 1 both have the label 1"),
        ([[0, 1], [2]], {"class_order": 1}, "class_order goes with numbers, not with groups"),
        ([2, 2], {"class_order": [0, 1]}, "class_order must name each of the classes"),
    ],
)
def test_what_can_not_be_dealt_is_refused(tasks: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(tasks, **options)


@pytest.mark.parametrize("make", [si_blurry, permuted_mnist])
@pytest.mark.parametrize("tasks", [[2, 1], [[0], [1]]])
def test_streams_that_deal_no_classes_take_a_number_only(make: object, tasks: object) -> None:
    with pytest.raises(ValueError, match="tasks must be a whole number of at least 1"):
        make(tasks=tasks)  # type: ignore[operator]


def test_all_that_deal_classes_take_them() -> None:
    data = TensorDataset(torch.zeros(60, 3), Y)
    for stream in (split_digits(tasks=[6, 2, 2]), few_shot_tasks(tasks=[6, 2, 2]), blobs(tasks=[6, 2, 2])):
        assert [len(task.classes) for task in stream.tasks] == [6, 2, 2]
    assert classes(from_dataset(data, data, tasks=[[5, 1], [0]], progress=False)) == [(5, 1), (0,)]
    assert [len(task.train) for task in few_shot_tasks(tasks=[6, 4]).tasks][1] == 4 * 5


@pytest.mark.parametrize("tasks", [[6, 2], [[9, 0], [4]]])
def test_it_is_recorded(tasks: object, tmp_path: Path) -> None:
    stream = split_digits(tasks=tasks)  # type: ignore[arg-type]
    again = recorded(record(stream, tmp_path / "digits.clstream"))
    assert again.fingerprint == stream.fingerprint and str(again) == str(stream)


@pytest.mark.parametrize("tasks", ["[6,3,1]", "[[0,3],[1]]", "[[9,8,7,6,5,4],[3,2,1,0]]"])
def test_the_command_line_and_a_config_take_lists(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = split_digits(tasks=json.loads(tasks))
    Path("digits.yaml").write_text(f"stream:\n  class_path: split_digits\n  init_args:\n    tasks: {tasks}\n")
    for arguments in (["--stream", "split_digits", "--stream.tasks", tasks], ["--config", "digits.yaml"]):
        assert main(["record", *arguments, "--out", "digits.clstream", "--force"]) == 0, capsys.readouterr().err
        assert recorded("digits.clstream").fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [("many", "--stream.tasks takes int, list"), ("[[0,a]]", "--stream.tasks takes"), ("[0,2]", "tasks[0] must be a whole number")],
)
def test_the_command_line_refuses_other_things(tasks: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--stream", "blobs", "--strategy", "Finetune", "--stream.tasks", tasks, "--track", "false"]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1, printed
