"""The run: its grammar on any stream, its end in any failure, and its seeds."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune, Joint, Replay
from clstream.streams import blobs, split_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import (
    BatchLearned,
    Evaluated,
    Event,
    RunEnded,
    RunStarted,
    SessionStarted,
    Strategy,
    Task,
    TaskEnded,
    on,
    run,
)
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import HIDDEN, SHOWN, Trace
from clstream.memory import Reservoir
from clstream.models import Mlp
from clstream.seeds import isolated

schedules = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    schedule=schedules,
    epochs=st.integers(1, 2),
    batch_size=st.integers(5, 60),
    boundaries=st.booleans(),
    stop=st.none() | st.integers(1, 8),
)
def test_trace_matches_grammar(schedule: tuple[int, ...], epochs: int, batch_size: int, boundaries: bool, stop: int | None) -> None:
    trace = Trace()
    stream = example_stream(schedule, epochs, batch_size, boundaries=boundaries)
    result = run(Strategy(example_model()), stream, trace, max_sessions=stop)
    assert (SHOWN if boundaries else HIDDEN).fullmatch(trace.word)
    sessions = min(len(schedule), stop or len(schedule))
    assert trace.word.count("S") == trace.word.count("V") == sessions == len(result.accuracy)
    assert trace.word.count("E") == sessions * epochs


class Boom(Exception):
    pass


class Bomb:
    """Raises at the n-th event."""

    def __init__(self, fuse: int, kind: type[BaseException] = Boom) -> None:
        self.fuse, self.kind = fuse, kind

    @on(Event)
    def tick(self, event: Event) -> None:
        self.fuse -= 1
        if self.fuse == 0:
            raise self.kind


@settings(max_examples=25, deadline=None)
@given(fuse=st.integers(1, 60), kind=st.sampled_from([Boom, KeyboardInterrupt]))
def test_any_exception_ends_in_run_ended(fuse: int, kind: type[BaseException]) -> None:
    trace, seen = Trace(), []

    class Last:
        @on(RunEnded)
        def end(self, event: RunEnded) -> None:
            seen.append(event.error)

    with pytest.raises(kind):
        run(Strategy(example_model()), example_stream(), trace, Bomb(fuse, kind), Last())
    assert trace.word.endswith("r") and trace.word.count("r") == 1
    assert isinstance(seen[0], kind)


def test_run_ended_reaches_all_when_one_fails() -> None:
    trace = Trace()
    with pytest.raises(Boom):
        run(Strategy(example_model()), example_stream(), Bomb(10**9), _FailsAtTheEnd(), trace)
    assert trace.word.endswith("r")


class _FailsAtTheEnd:
    @on(RunEnded)
    def end(self, event: RunEnded) -> None:
        raise Boom


def test_finetune_equals_a_loop_by_hand() -> None:
    """The same batches, the same arithmetic: the weights are the same bits."""
    stream = example_stream(epochs=2)
    model, twin = example_model(), example_model()
    result = run(Finetune(model, partial(SGD, lr=0.1, momentum=0.9)), stream, seed=3)
    optimizer = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    rows = []
    for session in stream.reseeded(3):
        for epoch in session:
            for batch in epoch:
                optimizer.zero_grad()
                F.cross_entropy(twin(batch.samples.x), batch.samples.y).backward()
                optimizer.step()
        with torch.no_grad():
            rows.append([float((twin(t.test.x).argmax(1) == t.test.y).double().mean()) for t in stream.tasks])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(result.accuracy, torch.tensor(rows, dtype=torch.float64))


def test_task_il_row_lets_only_the_tasks_classes_compete() -> None:
    stream = example_stream()
    strategy = Finetune(example_model())
    result = run(strategy, stream)
    strategy.model.eval()
    for task in stream.tasks:
        scores = strategy.scores(task.test.x).detach()[:, list(task.classes)]
        expected = (torch.tensor(task.classes)[scores.argmax(1)] == task.test.y).double().mean()
        assert result.task_accuracy[-1, task.id] == expected
    assert (result.task_accuracy >= result.accuracy).all()


def test_order_of_accuracies_on_real_data() -> None:
    stream = split_digits()
    accuracies = {}
    for kind in (Finetune, Replay, Joint):
        with isolated(0):
            accuracies[kind] = run(kind(Mlp(stream.input_shape, stream.classes, (100,))), stream).average_accuracy
    assert accuracies[Finetune] < 0.3 < 0.8 < accuracies[Replay] < accuracies[Joint]
    assert accuracies[Joint] > 0.93


def test_seeds_give_the_same_run_and_other_seeds_another() -> None:
    def once(seed: int) -> Tensor:
        strategy = Replay(example_model(), capacity=10)
        run(strategy, example_stream(), seed=seed)
        return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_dropout_follows_the_runs_seed_not_the_callers() -> None:
    def once(before: int) -> Tensor:
        torch.manual_seed(before)
        with isolated(0):
            model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 6))

        class Raw(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = model

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x.float() / 255)

        run(Finetune(Raw()), example_stream())
        return model[2].weight.detach().clone()

    assert torch.equal(once(1), once(2))


def test_caller_generators_are_left_alone_even_when_the_run_fails() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with pytest.raises(Boom):
        run(Strategy(example_model()), example_stream(), Bomb(20))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_evaluate_every_adds_probes_at_the_right_steps() -> None:
    within: list[bool] = []

    class Watch:
        @on(Evaluated)
        def see(self, event: Evaluated) -> None:
            within.append(event.evaluation.within_session)

    stream = example_stream(batch_size=10)  # 6 batches a session
    result = run(Finetune(example_model()), stream, Watch(), evaluate_every=4)
    assert result.probe_steps == (4, 6, 8, 12, 16, 18)  # each 4th batch, and the ends of sessions; 12 is both
    assert within == [True, False, True, True, False, True, False]
    assert torch.equal(result.probes[[1, 3, 5]], result.accuracy)
    assert result.probe_taught.int().argmax(1).tolist() == [0, 0, 1, 1, 2, 2]


def test_max_sessions_cuts_the_run_and_metrics_count_the_tasks_seen() -> None:
    result = run(Finetune(example_model()), example_stream(epochs=5), max_sessions=2)
    assert result.accuracy.shape == (2, 3)
    assert result.average_accuracy == pytest.approx(float(result.accuracy[1, :2].mean()))
    assert result.forgetting == pytest.approx(float(result.accuracy[0, 0] - result.accuracy[1, 0]))


def test_main_matrix_follows_the_scenario() -> None:
    result = run(Finetune(example_model()), example_stream(epochs=5, scenario="task"))
    assert result.average_accuracy == pytest.approx(float(result.task_accuracy[-1].mean()))
    assert result.average_accuracy > float(result.accuracy[-1].mean())


def test_augmentation_is_applied_to_the_batch_and_to_what_is_replayed() -> None:
    sizes: list[int] = []

    def darken(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x // 2

    stream = replace(example_stream(batch_size=20), augment=darken)
    strategy = Replay(example_model(), capacity=50)
    run(strategy, stream)
    assert sizes[:2] == [4, 20] and set(sizes[2:]) == {40}  # the trial before the run; the first batch had nothing to be joined to
    assert strategy.memory.all().x.max() > 128  # what is kept is raw


def test_baseline_is_the_untrained_strategy() -> None:
    from clstream.evaluation import evaluate

    result = run(Finetune(example_model()), example_stream())
    row, task_row = evaluate(Finetune(example_model()), example_stream())
    assert torch.equal(result.baseline, row) and torch.equal(result.task_baseline, task_row)


class Asked(Strategy):
    """Knows the task when it is told, and only then."""

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        scores = torch.zeros(len(x), 6)
        if task is not None:
            scores[:, task.classes[0]] = 1.0
        return scores


def test_a_strategy_that_overrides_scores_is_asked_with_and_without_the_task() -> None:
    result = run(Asked(example_model()), example_stream())
    assert result.accuracy[-1].tolist() == [0.5, 0, 0]  # always label 0
    assert result.task_accuracy[-1].tolist() == [0.5, 0.5, 0.5]


class Shift(Event):
    pass


def test_strategies_emit_events_of_their_own() -> None:
    class Noticing(Strategy):
        @on(TaskEnded)
        def notice(self, event: TaskEnded) -> None:
            self.emit(Shift())

    heard: list[Event] = []

    class Listener:
        @on(Shift)
        def hear(self, event: Shift) -> None:
            heard.append(event)

    strategy = Noticing(example_model())
    run(strategy, example_stream(), Listener())
    assert len(heard) == 3
    strategy.emit(Shift())  # after the run nobody listens
    assert len(heard) == 3


def test_events_say_what_happens() -> None:
    """Each event has the stream's own objects, and the run's stream has its seed."""
    seen: dict[str, object] = {}

    class Watch:
        @on(RunStarted)
        def start(self, event: RunStarted) -> None:
            seen["strategy"], seen["seed"], seen["stream seed"] = event.strategy, event.seed, event.stream.seed

        @on(BatchLearned)
        def learned(self, event: BatchLearned) -> None:
            seen["detached"] = not event.loss.requires_grad
            seen["task"] = event.batch.task

    strategy, stream = Finetune(example_model()), example_stream()
    run(strategy, stream, Watch(), seed=7)
    assert seen == {"strategy": strategy, "seed": 7, "stream seed": 7, "detached": True, "task": stream.tasks[2]}


def test_each_evaluation_keeps_its_own_rows() -> None:
    kept = []

    class Watch:
        @on(Evaluated)
        def see(self, event: Evaluated) -> None:
            kept.append(event.evaluation)

    result = run(Finetune(example_model()), example_stream(), Watch(), evaluate_every=4)
    ends = [evaluation for evaluation in kept if not evaluation.within_session]
    assert [len(evaluation.accuracy) for evaluation in ends] == [1, 2, 3]
    assert torch.equal(ends[-1].accuracy, result.accuracy)


def test_generators_and_memories_made_in_the_run_follow_its_seed_each_in_its_own_way() -> None:
    def drawn(seed: int) -> list[int]:
        class PerSession(Strategy):
            def __init__(self, model: nn.Module) -> None:
                super().__init__(model)
                self.memories: list[Reservoir] = []

            @on(SessionStarted)
            def start(self, event: SessionStarted) -> None:
                self.memories.append(Reservoir(5))

        strategy = PerSession(example_model())
        run(strategy, example_stream(), seed=seed)
        return [memory.random.initial_seed() for memory in strategy.memories]

    assert drawn(0) == drawn(0)
    assert len({*drawn(0), *drawn(1)}) == 6


def test_many_small_tasks_are_tested_together_as_one_by_one() -> None:
    """The union pass gives what a question about each task alone gives."""

    class OneByOne(Finetune):
        def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
            return super().predict(x, task)

    stream = blobs(tasks=50, classes=100, train_per_class=10, test_per_class=30)
    results = []
    for kind in (Finetune, OneByOne):
        with isolated(0):
            results.append(run(kind(Mlp(20, 100, (32,))), stream, max_sessions=3))
    assert torch.equal(results[0].accuracy, results[1].accuracy)
    assert torch.equal(results[0].task_accuracy, results[1].task_accuracy)
