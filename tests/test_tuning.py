"""Searches: spaces, streams without test samples, trials, and that a search is the same however often it was stopped."""

from __future__ import annotations

import gc
import inspect
import math
from collections import deque
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import clstream.strategies as zoo
import pytest
import torch
from clstream.streams import blurry_tasks, from_tensors, permuted_mnist, split_digits
from torch import Tensor
from torch.optim import SGD

from clstream import metrics, run
from clstream.attributes import contents
from clstream.cli.yaml_files import parse_yaml
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.stream import Stream, Subset, TestSet
from clstream.tuning import Choice, Job, Outcome, Range, Search, parse_space, run_trial, trial_stream

pytest.importorskip("optuna")

MARK = 7.0
"""What an input of a test sample begins with, and no other number of these tests is."""


def marked(validation: float = 0.2, **options: Any) -> Stream:
    """Return a stream whose test samples can be told: training and test samples are rows of one tensor."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(40)
    x = torch.randn(240, 5, generator=draw).clamp(-3, 3) + 3 * torch.eye(6, 5)[y]
    x[200:, 0] = MARK  # the last 40 rows are the test
    return from_tensors(x[:200], y[:200], x[200:], y[200:], tasks=3, validation=validation, name="marked", **options)


def reachable(*roots: object) -> list[object]:
    """Return all that can be reached from some objects, by attributes and by the garbage collector's references.

    Modules, classes, frames and the names that functions see in their modules are left out: they lead to all that there is.
    """
    met, stack, everything = set[int](), deque(roots), []
    while stack:
        value = stack.pop()
        if id(value) in met or isinstance(value, (ModuleType, type, FrameType)):
            continue
        met.add(id(value))
        everything.append(value)
        hidden = [item for _, item in contents(value, hidden=True)] if not isinstance(value, (str, bytes, Tensor)) else []
        stack += [*hidden, *(() if inspect.isfunction(value) else gc.get_referents(value))]
    return everything


def has_test_sample(value: object) -> bool:
    """Return whether a tensor, or what lies in its storage, has a test sample of the marked stream."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.numel():
        return False
    storage = torch.empty(0).set_(value.untyped_storage())  # type: ignore[call-overload]  # torch says nothing of its kinds
    return bool((storage == MARK).any())


def test_the_streams_own_test_samples_are_found_by_the_walk() -> None:
    """So the tests below would see them."""
    assert any(map(has_test_sample, reachable(marked())))
    assert any(map(has_test_sample, reachable(marked().for_tuning())))  # it keeps the data that it was made of


@pytest.mark.parametrize("options", [{}, {"tasks": 2}, {"tasks": 3}])
def test_nothing_that_a_trial_holds_leads_to_a_test_sample(options: dict[str, int]) -> None:
    stream = trial_stream(marked(), **options)
    strategy = zoo.Replay(Mlp(stream.input_shape, stream.outputs, (8,)))
    assert not [value for value in reachable(stream, strategy) if has_test_sample(value)]
    run_trial(strategy, stream)
    assert not [value for value in reachable(stream, strategy) if has_test_sample(value)]


def test_samples_that_were_gathered_beforehand_and_probes_are_left_behind() -> None:
    whole = marked()
    cached = [replace(task, test=task.test.cache()) for task in whole.tasks if isinstance(task.test, Subset)]
    whole = replace(whole, tasks=cached).with_probes(TestSet("more", whole.tasks[0].test))
    assert not [value for value in reachable(trial_stream(whole, 2)) if has_test_sample(value)]


def test_it_is_tested_on_its_validation_samples_and_teaches_the_same_batches() -> None:
    whole = split_digits(validation=0.2, batch_size=16, epochs=1)
    stream, first = trial_stream(whole), trial_stream(whole, 2)
    for task, other in zip(stream.tasks, whole.tasks, strict=True):
        assert other.validation is not None
        assert torch.equal(task.test[:].x, other.validation[:].x) and torch.equal(task.train[:].y, other.train[:].y)
    for session, other_session in zip(stream, whole, strict=True):
        for batch, other_batch in zip(next(iter(session)), next(iter(other_session)), strict=True):
            assert torch.equal(batch.samples.x, other_batch.samples.x)
    assert (len(first.tasks), len(first), first.classes) == (2, 2, 4)
    assert torch.equal(first.session(1).samples[:].x, whole.session(1).samples[:].x)
    assert first.tasks[0].train.source.x is first.tasks[1].train.source.x  # type: ignore[union-attr]  # what was of one source is


@pytest.mark.data
def test_domains_keep_their_transforms() -> None:
    whole = permuted_mnist(tasks=3, validation=0.1)
    stream = trial_stream(whole, 2)
    assert torch.equal(stream.tasks[1].test[:50].x, whole.tasks[1].validation[:50].x)  # type: ignore[index]  # it holds some back


def test_a_stream_of_mixed_sessions_is_tuned_on_whole() -> None:
    whole = blurry_tasks(data="digits", tasks=3, validation=0.2)
    stream = trial_stream(whole)
    assert torch.equal(stream.session(1).samples[:].y, whole.session(1).samples[:].y)
    with pytest.raises(ValueError, match="mix tasks, so it has no first ones"):
        trial_stream(whole, 2)


def test_recurring_tasks_keep_all_of_their_sessions() -> None:
    whole = marked(schedule=[0, 1, 2, 0, 1])
    stream = trial_stream(whole, 2)
    assert stream.schedule == (0, 1, 0, 1)
    assert torch.equal(stream.session(2).samples[:].x, whole.session(3).samples[:].x)


@pytest.mark.parametrize(
    ("stream", "tasks", "sentence"),
    [
        (marked(validation=0.0), None, "holds back no validation samples"),
        (marked(), 4, "tasks must be a whole number from 1 to 3 or None, not 4"),
        (marked(schedule=[1, 2]), 1, "has no session of its first 1 tasks"),
    ],
)
def test_streams_that_cannot_be_tuned_on(stream: Stream, tasks: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trial_stream(stream, tasks)


@pytest.mark.parametrize(
    ("values", "now", "expected"),
    [
        ([0.001, 0.3, "log"], 0.1, Range(0.001, 0.3, log=True)),
        ([0, 1], 0.5, Range(0, 1)),
        ([10, 500], 100, Range(10, 500, integer=True)),
        ([1, 100, "log"], None, Range(1, 100, log=True, integer=True)),
        ([1, 2, 3], 2, Choice((1, 2, 3))),
        (["all", "seen"], "all", Choice(("all", "seen"))),
        ([True, False], True, Choice((True, False))),
        ({"choices": [200, 500]}, 200, Choice((200, 500))),
        ([[10], [20, 20]], [10], Choice(([10], [20, 20]))),
        ("auto", 0.5, Range(0.005, 50.0, log=True)),
        ("auto", 500, Range(125, 2000, log=True, integer=True)),
        ("auto", False, Choice((False, True))),
    ],
)
def test_what_a_space_may_be(values: Any, now: Any, expected: Range | Choice) -> None:
    assert parse_space({"an.option": values}, {"an.option": now}) == {"an.option": expected}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0.3, 0.001], "from a lower number to a higher one, not from 0.3 to 0.001"),
        ([0, 1, "log"], "begins above 0"),
        ([0.1, math.inf], "one finite number to another"),
        ([0.1], "between two values or more"),
        (["a", "a"], "has each value once"),
        ("lots", "it takes .low, high."),
        ("auto", "auto needs a number above 0"),
        (3, "it takes .low, high."),
    ],
)
def test_what_is_no_space_names_the_option(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^the search space of an.option: .*{sentence}"):
        parse_space({"an.option": values})
    with pytest.raises(ValueError, match="the search space is empty"):
        parse_space({})


def test_numbers_are_rounded_to_what_a_config_can_show_and_stay_within() -> None:
    assert Range(0.001, 0.3, log=True).value(0.0123456789) == 0.01235
    assert Range(0.12341, 0.3).value(0.123411) == 0.12341 and Range(1, 9, integer=True).value(3) == 3
    assert Choice(([1], None)).labels == ["[1]", "None"] and Choice(([1], None)).value("None") is None


def test_our_table_of_spaces_names_options_that_there_are() -> None:
    table = parse_yaml(resources.files("clstream.experiments").joinpath("spaces.yaml").read_bytes(), "spaces.yaml")
    for name, space in table.items():
        parse_space(space)
        options = inspect.signature(zoo.Finetune if name == "every strategy" else getattr(zoo, name)).parameters
        for option in space:
            root, _, rest = option.partition(".")
            assert (root, rest) == ("optimizer", "lr") or (root == "strategy" and rest in options), f"{name}: {option}"
    others = {"Finetune", "Joint", "Replay", "AGEM", "ERACE", "LinearProbe", "Lifelong", "ICaRL", "GSS"}  # the learning rate alone
    others |= {"AGEMR", "GEM", "Independent", "Previous", "DynamicKNN", "FrozenLinear"}
    wrappers = {"ClassMeans", "Regularised", "AvalancheStrategy", "Federated"}  # what they wrap
    assert {*zoo.__all__} == {*table} - {"every strategy"} | others | wrappers


SPACE = {"x": Range(-2.0, 2.0), "kind": Choice(("good", "bad"))}


def parabola(job: Job | None, stop_at: int = -1) -> Outcome | None:
    """Return what a trial is worth by a formula: best at x = 1, of the good kind."""
    if job is None:
        return None
    if job.number == stop_at:
        raise KeyboardInterrupt
    value = -((job.values["x"] - 1) ** 2) - (job.values["kind"] == "bad")
    return Outcome("complete", value, (value - 0.1, value), 0.01)


def trials(search: Search) -> list[tuple[int, dict[str, Any], float | None, dict[int, float]]]:
    return [(trial.number, search.values(trial), trial.value, trial.intermediate_values) for trial in search.over]


@pytest.mark.slow
def test_a_search_finds_what_is_best_and_begins_with_what_there_is(tmp_path: Path) -> None:
    search = Search(tmp_path, SPACE, start={"x": -1.5, "kind": "bad"})
    search.run(parabola, 20)
    assert trials(search)[0][1:3] == ({"x": -1.5, "kind": "bad"}, -7.25)
    assert search.best is not None and search.best.value is not None and search.best.value > -0.2
    assert search.values(search.best)["kind"] == "good"
    values = [value for *_, value, _ in trials(search)]
    assert search.best.value == max(value for value in values if value is not None)


@pytest.mark.slow
def test_a_search_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = Search(tmp_path / "whole", SPACE, seed=3)
    whole.run(parabola, 12)
    Search(tmp_path / "stopped", SPACE, seed=3).run(parabola, 4)
    with pytest.raises(KeyboardInterrupt):
        Search(tmp_path / "stopped", SPACE, seed=3).run(partial(parabola, stop_at=7), 12)
    stopped = Search(tmp_path / "stopped", SPACE, seed=3)
    assert len(stopped.over) == 7
    stopped.run(parabola, 12)
    assert trials(stopped) == trials(whole)
    other = Search(tmp_path / "other", SPACE, seed=4)
    other.run(parabola, 3)
    assert trials(other) != trials(whole)[:3]


@pytest.mark.slow
def test_a_trial_that_diverged_is_the_worst_and_one_that_failed_is_none(tmp_path: Path) -> None:
    def play(job: Job | None) -> Outcome | None:
        if job is not None and job.number == 1:
            return Outcome("diverged", -math.inf, (0.5,), note="the loss is nan")
        if job is not None and job.number == 2:
            raise ValueError("capacity must be at least 1")
        if job is not None and job.number == 3:
            return Outcome("pruned", math.nan, (-9.0,))
        return parabola(job)

    search, seen = Search(tmp_path, SPACE), list[tuple[str, str]]()
    search.run(play, 6, watch=lambda trial, outcome: seen.append((trial.state.name, outcome.note)))
    assert [state for state, _ in seen] == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert seen[1][1] == "the loss is nan" and seen[2][1] == "ValueError: capacity must be at least 1"
    assert search.over[1].value == -math.inf and search.best is not None and search.best.number not in (1, 2, 3)
    none = Search(tmp_path / "none", SPACE)
    none.run(lambda job: job and Outcome("diverged", -math.inf), 2)
    assert none.best is None


def test_time_is_a_budget_over_all_calls(tmp_path: Path) -> None:
    search = Search(tmp_path, SPACE)
    search.run(parabola, seconds=1)
    count = len(search.over)
    assert count and search.seconds > 0.9
    Search(tmp_path, SPACE).run(parabola, seconds=1)
    assert len(search.over) == count
    with pytest.raises(ValueError, match="needs a budget"):
        search.run(parabola)
    with pytest.raises(ValueError, match="trials must be a whole number of at least 1"):
        search.run(parabola, 0)


@pytest.mark.slow
def test_two_workers_run_each_trial_once_and_stop_in_time(tmp_path: Path) -> None:
    search = Search(tmp_path, SPACE)
    search.run(parabola, 500, seconds=2, workers=2)
    assert [number for number, *_ in trials(search)] == list(range(len(search.over)))
    assert 2 <= len(search.over) < 500 and {trial.state.name for trial in search.study.trials} == {"COMPLETE"}
    assert all(value == parabola(Job(0, values, ())).value for _, values, value, _ in trials(search))  # type: ignore[union-attr]  # of a job


def test_a_search_goes_on_that_was_stopped_while_it_kept_a_trial(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    import optuna

    search = Search(tmp_path, parse_space({"x": [0.0, 1.0]}))
    job = search._next([])
    optuna.trial.Trial(search.study, search.study.trials[job.number]._trial_id).report(0.5, 1)
    recwarn.clear()
    search.run(lambda job: Outcome("complete", 0.6, (0.5, 0.6)) if job else None, trials=1)
    assert search.over[0].intermediate_values == {1: 0.5, 2: 0.6} and not recwarn


def test_a_folder_has_one_search(tmp_path: Path) -> None:
    Search(tmp_path, SPACE, about={"data": "abc"})
    with pytest.raises(ValueError, match=r"is a search of something else .data was abc, now it is abd.: name another folder"):
        Search(tmp_path, SPACE, about={"data": "abd"})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.db").write_bytes(b"no data base at all, but some text" * 100)
    with pytest.raises(ValueError, match="can't be read as the file of a search"):
        Search(tmp_path / "damaged", SPACE)


def finetune(lr: float, stream: Stream) -> zoo.Finetune:
    with isolated(0, "model"):
        return zoo.Finetune(Mlp(stream.input_shape, stream.outputs, (8,)), partial(SGD, lr=lr))


def test_a_trial_measures_the_anytime_average_on_held_out_samples() -> None:
    stream = trial_stream(marked(batch_size=8))
    outcome = run_trial(finetune(0.1, stream), stream)
    same = run(finetune(0.1, stream), stream, evaluate_every=1)
    assert outcome.state == "complete" and outcome.value == same.average and len(outcome.curve) == len(same.probes)
    averages = metrics.seen_averages(same.probes, same.probe_taught)
    session = len(same.probes) // 3
    assert outcome.curve[session - 1] == pytest.approx(float(averages[:session].mean()))
    assert outcome.curve[-1] == pytest.approx(float(averages[session:].mean()))  # nothing of the first session counts


@pytest.mark.slow
def test_a_trial_diverges_or_is_pruned_without_an_error(tmp_path: Path) -> None:
    stream = trial_stream(marked(batch_size=8))
    diverged = run_trial(finetune(1e30, stream), stream)
    assert (diverged.state, diverged.value) == ("diverged", -math.inf) and "not finite" in diverged.note
    search = Search(tmp_path, {"lr": Range(1e-9, 0.3, log=True)})
    states = []

    def play(job: Job | None) -> Outcome | None:
        if job is None:
            return None
        outcome = run_trial(finetune(0.1 if job.number < 5 else 1e-9, stream), stream, job.earlier)
        states.append((outcome.state, len(outcome.curve)))
        return outcome

    search.run(play, 6)
    whole = states[0][1]
    assert states[:5] == [("complete", whole)] * 5
    assert states[5][0] == "pruned" and whole // 3 < states[5][1] < whole  # not in the first of three sessions
