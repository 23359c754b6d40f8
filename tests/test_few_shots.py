"""Few-shot sessions: who comes when, which samples are left, what is refused, and how such runs are measured."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from clstream.experiments import few_shots
from clstream.strategies import NCM, Finetune
from clstream.streams import few_shot, few_shot_tasks, recorded
from picture_folders import in_parts

from clstream import Stream, metrics, on, run
from clstream.bus import ObserverError
from clstream.checks import example_model, example_stream
from clstream.online_metrics import FewShot, FewShotMeasured
from clstream.recording import record
from clstream.stream import Subset


def counts(stream: Stream) -> list[set[int]]:
    return [set(Counter(task.train.y.tolist()).values()) for task in stream.tasks]


def rows(stream: Stream) -> list[list[int]]:
    return [task.train.index.tolist() for task in stream.tasks if isinstance(task.train, Subset)]


def test_a_base_session_then_ways_and_shots() -> None:
    stream = few_shot_tasks(base=6, tasks=3, way=2, shots=3)
    assert [len(task.classes) for task in stream.tasks] == [6, 2, 2] and counts(stream)[1:] == [{3}, {3}]
    whole = few_shot_tasks(tasks=[6, 2, 2], shots=3)
    assert stream.fingerprint == whole.fingerprint
    assert [len(task.test) for task in stream.tasks] == [len(task.test) for task in whole.tasks]
    assert [len(task.classes) for task in few_shot_tasks(base=3, tasks=4).tasks] == [3, 3, 2, 2]  # what is left is dealt out
    assert [task.classes for task in few_shot_tasks(base=2, tasks=3, way=1, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]).tasks] == [
        (9, 8),
        (7,),
        (6,),
    ]


def test_support_draws_the_later_samples_and_nothing_else() -> None:
    first, again, other = (few_shot_tasks(base=6, way=1, support=support) for support in (0, 0, 1))
    assert rows(first) == rows(again) and rows(first)[0] == rows(other)[0]
    assert all(before != after for before, after in zip(rows(first)[1:], rows(other)[1:], strict=True))
    retrained = few_shot_tasks(base=6, way=1, support=0, seed=5)
    assert (first.seed, other.seed, retrained.seed) == (0, 0, 5) and rows(retrained)[1:] == rows(first)[1:]


def test_lists_say_which_samples_the_later_sessions_have() -> None:
    drawn = few_shot_tasks(base=6, tasks=3, way=2, shots=3, support=4)
    lists = rows(drawn)[1:]
    fixed = few_shot_tasks(base=6, tasks=3, way=2, shots=3, support=[list(reversed(part)) for part in lists])
    assert rows(fixed) == rows(drawn)
    for support, problem in (
        (lists[:1], "support must have a list of positions for each of 2 later tasks, not 1"),
        ([lists[1], lists[1]], r"support\[0\] has the position \d+, which is no training sample of task 1"),
        ([lists[0][:-1] + lists[0][:1], lists[1]], r"support\[0\] names a sample twice"),
        ([lists[0][:-1], lists[1]], r"support\[0\] must have 3 samples of each of the 2 classes of task 1, not \[.*\]"),
        ([[-1], lists[1]], r"support\[0\]\[0\] must be a whole number of at least 0, not -1"),
        (-1, "support must be a whole number of at least 0 or None, not -1"),
    ):
        with pytest.raises(ValueError, match=problem):
            few_shot_tasks(base=6, tasks=3, way=2, shots=3, support=support)  # type: ignore[arg-type]  # some are wrong


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"way": 2}, "way is the number of new classes after a base session: say base too"),
        ({"base": 6, "way": 2}, "4 later sessions need 8 new classes, and 4 of 10 are left after 6 in the base session"),
        ({"base": 10, "tasks": 2}, "1 later sessions need 1 new classes, and 0 of 10 are left after 10"),
        ({"base": 6, "tasks": [6, 4]}, r"with base, tasks must be a number of sessions of at least 2, .* not \[6, 4\]"),
        ({"base": 6, "tasks": 1}, "with base, tasks must be a number of sessions of at least 2, .* not 1"),
        ({"base": 0}, "base must be a whole number of at least 1 or None, not 0"),
        ({"shots": 500}, r"few_shot_digits has \d+ training samples of class 2: that is too few for 500 shots"),
        ({"data": "digit"}, "data must be one of digits, .*: did you mean digits.*; or a folder or zip archive of images"),
        ({"augment": 1}, "augment must be True or False, not 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        few_shot_tasks(**options)  # type: ignore[arg-type]


def test_few_shot_refuses_more_shots_than_there_are() -> None:
    with pytest.raises(ValueError, match="that is too few for 1000 shots"):
        few_shot(few_shot_tasks(tasks=2, shots=2), shots=1000)


def test_images_of_ones_own(tmp_path: Path) -> None:
    in_parts(tmp_path / "pictures")
    stream = few_shot_tasks(str(tmp_path / "pictures"), base=2, tasks=2, way=1, shots=1, augment=True)
    assert [len(task.classes) for task in stream.tasks] == [2, 1] and counts(stream)[1] == {1}
    assert stream.name == "few_shot_pictures" and stream.augment is not None and len(stream.class_names) >= 3
    record(stream, tmp_path / "few.clstream")
    assert recorded(tmp_path / "few.clstream", root=tmp_path / "pictures").fingerprint == stream.fingerprint


@pytest.mark.data
def test_omniglot_has_the_characters_of_the_first_set_first() -> None:
    stream = few_shot_tasks("omniglot", base=136, tasks=11, way=10)
    assert [len(task.classes) for task in stream.tasks] == [136] + 10 * [10] and counts(stream) == [{15}] + 10 * [{5}]
    alphabets = [{stream.class_names[label].split("/")[0] for label in task.classes} for task in stream.tasks]
    assert len(alphabets[0]) == 5 and not alphabets[0] & set.union(*alphabets[1:]) and len(set.union(*alphabets)) == 8
    shuffled = few_shot_tasks("omniglot", base=136, tasks=11, way=10, class_order=1)
    assert shuffled.tasks[0].classes != stream.tasks[0].classes


def test_curves_and_drop_by_hand() -> None:
    matrix = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.0], [0.75, 0.25, 0.25]])
    curves = metrics.few_shot_curves(matrix)
    assert curves["base"].tolist() == pytest.approx([0.9, 0.8, 0.75]) and curves["novel"].tolist()[1:] == pytest.approx([0.5, 0.25])
    assert math.isnan(curves["novel"][0]) and math.isnan(curves["harmonic"][0])
    assert curves["harmonic"].tolist()[1:] == pytest.approx([0.6153846154, 0.375])
    assert metrics.performance_drop(torch.tensor([0.9, 0.8, 0.75])) == pytest.approx(0.15)
    assert metrics.performance_drop(torch.tensor([1.0, 3.0]), higher_is_better=False) == 2
    for seen in (torch.empty(0), torch.eye(2)):
        with pytest.raises(ValueError, match=r"seen must be a value for each evaluation, \(rows,\)"):
            metrics.performance_drop(seen)


@pytest.mark.parametrize("results", ["few_shots.jsonl", "few_shots_cifar10.jsonl"])
def test_the_table_of_the_docs_is_what_the_results_say(results: str) -> None:
    root = Path(__file__).parent.parent
    lines = (root / "experiments" / "results" / results).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert few_shots.table(rows) in (root / "docs" / "few-shots.md").read_text(encoding="utf-8")
    assert {row["method"] for row in rows} <= set(few_shots.METHODS)


@pytest.mark.slow
def test_another_draw_goes_on_from_the_base_session_to_the_same_bits() -> None:
    first, base = few_shots.play("contrast", "digits", None, seed=0, draw=0, epochs=1)
    goes_on, _ = few_shots.play("contrast", "digits", None, seed=0, draw=1, epochs=1, base=base)
    alone, _ = few_shots.play("contrast", "digits", None, seed=0, draw=1, epochs=1)
    facts = [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in (first, goes_on, alone)]
    assert facts[1] == facts[2] and facts[0]["novel"] != facts[1]["novel"]


def test_spreads_over_trainings_and_over_draws_are_apart() -> None:
    rows = [
        {"method": "baseline", "seed": seed, "draw": draw, "seen": [0.9, 0.7], "base": [1.0], "novel": [0.5], "harmonic": [value]}
        for seed, draw, value in ((0, 0, 0.4), (0, 1, 0.6), (1, 0, 0.4), (1, 1, 0.6))
    ]
    row = few_shots.table(rows).splitlines()[-1]
    assert row == "| baseline | 0.700 ± 0.000 | 0.200 ± 0.000 | 1.000 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.000 | 0.141 |"


class Ear:
    def __init__(self) -> None:
        self.heard: list[FewShotMeasured] = []

    @on(FewShotMeasured)
    def hear(self, event: FewShotMeasured) -> None:
        self.heard.append(event)


def test_the_observer_measures_after_each_session() -> None:
    ear = Ear()
    result = run(NCM(example_model()), example_stream(), FewShot(), ear, evaluate_every=5)
    curves = metrics.few_shot_curves(result.accuracy, result.taught)
    assert [event.base for event in ear.heard] == curves["base"].tolist() and len(ear.heard) == 3
    assert [event.harmonic for event in ear.heard[1:]] == curves["harmonic"].tolist()[1:]
    seen = result.measured["accuracy"][:, result.test_sets.index("seen")]
    assert [event.seen for event in ear.heard] == seen.tolist() and ear.heard[-1].drop == float(seen[0] - seen[-1])
    assert set(ear.heard[0].curves()) == {"few_shot/base", "few_shot/seen", "few_shot/drop"}
    assert set(ear.heard[1].curves()) == set(ear.heard[0].curves()) | {"few_shot/novel", "few_shot/harmonic"}


def test_the_observer_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ObserverError, match="few-shot accuracies are of labels, and example has value ones"):
        run(Finetune(example_model()), example_stream(target="value"), FewShot())
    with pytest.raises(ObserverError, match="example has 3 tasks, so no 4 of them are the base of FewShot"):
        run(NCM(example_model()), example_stream(), FewShot(4))
    with pytest.raises(ValueError, match="tasks must be a whole number of at least 1, not 0"):
        FewShot(0)
