"""Checkpoints: a run goes on from its folder and ends as if it had not been interrupted; when they are written."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import Joint, Replay
from conftest import StopAt, built, interrupted
from torch import Tensor, nn
from torch.optim import Adam

from clstream import Batch, BatchLearned, RunEnded, Strategy, TaskEnded, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.checkpoint.compare import difference
from clstream.checkpoint.store import files, load
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints, Trace
from clstream.seeds import isolated


def test_a_run_goes_on_from_its_folder(tmp_path: Path) -> None:
    whole, rest = Checkpoints(every=0), Checkpoints(every=0)
    expected = run(built(), example_stream(), whole)
    interrupted(tmp_path)
    assert newest(tmp_path)["step"] == 12
    result = run(built(), example_stream(), rest, Checkpointer(tmp_path), resume=newest(tmp_path))
    assert torch.equal(result.accuracy, expected.accuracy) and result.params == expected.params
    assert difference(whole.load(-1), rest.load(-1)) is None
    again = run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))  # it was over: nothing is learned
    assert torch.equal(again.accuracy, expected.accuracy) and torch.equal(again.probes, expected.probes)


def test_without_checkpoints_it_begins(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))
    assert len(files(tmp_path)) == 1


@pytest.mark.slow
def test_events_go_on_where_they_stopped() -> None:
    stream, whole, marks = partial(example_stream, (0, 1, 0, 2), 2, 16), Trace(), list[int]()

    class Marking(Checkpoints):
        def keep(self) -> None:
            super().keep()
            marks.append(len(whole.word))

    kept = Marking()
    run(built(), stream(), whole, kept, evaluate_every=3)
    assert len(marks) == 1 + 24 + 4  # the start, each batch, each session
    for number, mark in enumerate(marks):
        rest = Trace()
        run(built(), stream(), rest, evaluate_every=3, resume=kept.load(number))
        assert whole.word[:mark] + rest.word[1:] == whole.word and rest.word[0] == "R"


def test_resuming_leaves_the_callers_generators_alone(tmp_path: Path) -> None:
    interrupted(tmp_path)
    before = torch.get_rng_state(), random.getstate()
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_time_and_evaluations_within_sessions_go_on(tmp_path: Path) -> None:
    expected = run(built(), example_stream(), evaluate_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(built(), example_stream(), StopAt(11), Checkpointer(tmp_path, every_batches=1), evaluate_every=3)
    state = newest(tmp_path)
    begin = time.perf_counter()
    result = run(built(), example_stream(), resume=state, evaluate_every=3)
    assert torch.equal(result.probes, expected.probes) and result.probe_steps == expected.probe_steps
    assert state["seconds"] < result.seconds < state["seconds"] + time.perf_counter() - begin


def test_observers_with_a_state_go_on_too(tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.batches, self.restored = 0, 0

        def state_dict(self) -> dict[str, int]:
            return {"batches": self.batches}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.batches, self.restored = state["batches"], self.restored + 1

        @on(BatchLearned)
        def count(self, event: BatchLearned) -> None:
            self.batches += 1

    before, after = Counter(), Counter()
    with pytest.raises(KeyboardInterrupt):  # the first one hears the batch before the checkpointer, the second one after it
        run(built(), example_stream(), before, Checkpointer(tmp_path, every_batches=5), after, StopAt(13))
    before, after = Counter(), Counter()
    run(built(), example_stream(), before, after, resume=newest(tmp_path))
    assert (before.batches, after.batches, before.restored, after.restored) == (24, 24, 1, 1)


def test_how_many_are_kept(tmp_path: Path) -> None:
    interrupted(tmp_path / "two", every=2)
    assert [load(file)["step"] for file in files(tmp_path / "two")] == [12, 10]
    interrupted(tmp_path / "three", every=2, keep=3)
    assert [load(file)["step"] for file in files(tmp_path / "three")] == [12, 10, 8]
    run(built(), example_stream(), Checkpointer(tmp_path / "two", keep=5), resume=newest(tmp_path / "two"))
    assert [load(file)["position"] for file in files(tmp_path / "two")] == [[3, 0, 0]]  # it is over: the last one is enough


@pytest.mark.slow
def test_when_they_are_written(tmp_path: Path) -> None:
    often = Checkpointer(tmp_path / "often", every_seconds=1e-9)
    often._schedule = lambda cost: setattr(often, "due", 0.0)  # whatever it costs
    run(built(), example_stream(), often)
    assert often.written == 1 + 24 + 3
    quick = Checkpointer(tmp_path / "quick", every_seconds=1e-9, share=1)
    run(built(), example_stream(epochs=20), quick)
    assert quick.written > 3
    never = Checkpointer(tmp_path / "never", every_seconds=None)
    run(built(), example_stream(), never)
    assert never.written == 2  # the first and the last


def test_slow_writes_come_less_often(tmp_path: Path) -> None:
    slow = Checkpointer(tmp_path, every_seconds=1.0)
    for cost, rest in ((3.0, 150.0), (0.001, 1.0)):  # 2 % of the time at most
        before = time.monotonic()
        slow._schedule(cost)
        assert before + rest <= slow.due <= time.monotonic() + rest


def test_no_checkpoint_follows_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Explodes(Strategy):
        batches = 0

        def learn(self, batch: Batch) -> Tensor:
            self.batches += 1
            return super().learn(batch) * (float("inf") if self.batches >= 10 else 1)

    with pytest.raises(FloatingPointError, match="session 1, epoch 0, batch 1"):
        run(Explodes(example_model()), example_stream(), Checkpointer(tmp_path, every_batches=1))
    assert newest(tmp_path)["step"] == 9


@pytest.mark.slow
def test_joint_with_adam_and_task_heads_goes_on(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Strategy:
        return Joint(model, partial(Adam, lr=0.01), restart=False)

    whole, stream = Checkpoints(), partial(example_stream, (0, 1, 2, 0), 2, 16, "task")
    expected = run(built(make), stream(), whole)
    for number in range(0, len(whole.written), 5):
        result = run(built(make), stream(), resume=whole.load(number))
        assert torch.equal(result.task_accuracy, expected.task_accuracy)


def test_a_failing_handler_at_the_end_of_a_task_costs_only_that(tmp_path: Path) -> None:
    class Fragile(Replay):
        @on(TaskEnded)
        def consolidate(self, event: TaskEnded) -> None:
            if event.task.id == 1 and not (tmp_path / "mended").exists():
                raise RuntimeError("a bug in the user's code")

    def make() -> Strategy:
        with isolated(0, "strategy"):
            return Fragile(example_model())

    folder, ended = tmp_path / "run", []

    class Ends:
        @on(RunEnded)
        def end(self, event: RunEnded) -> None:
            ended.append(event.error)

    with pytest.raises(RuntimeError, match="a bug"):
        run(make(), example_stream(), Ends(), Checkpointer(folder, every_batches=1))
    assert newest(folder)["position"] == [1, 0, 8]
    (tmp_path / "mended").touch()
    result = run(make(), example_stream(), Ends(), Checkpointer(folder), resume=newest(folder))
    assert torch.equal(result.accuracy, run(make(), example_stream()).accuracy)
    assert isinstance(ended[0], RuntimeError) and ended[1] is None
