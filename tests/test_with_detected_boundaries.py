"""The wrapper that detects boundaries: what the wrapped strategy hears, what it is given, and what no one else hears."""

from __future__ import annotations

import math

import pytest
import torch
from clstream.strategies import AGEM, Finetune, L2Penalty, Refresh, WithDetectedBoundaries
from torch import Tensor, nn

from clstream import Batch, Event, Samples, Session, Strategy, Stream, Task, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import example_model
from clstream.checks.recorders import HIDDEN, LETTERS, SHOWN, Checkpoints, Trace
from clstream.drift_detection import ShiftDetected, ShiftDetector
from clstream.events import BatchReady, EpochStarted, Evaluated, RunStarted, SessionEnded, SessionStarted, TaskEnded, TaskStarted
from clstream.models import Mlp
from clstream.online_metrics import Detection
from clstream.strategy import needs
from clstream.stream import StreamView


def swapping(schedule: list[int], epochs: int = 4, boundaries: bool = False) -> Stream:
    """Two tasks of the same inputs with the labels in another order: 16 batches of 10 an epoch."""
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 10, generator=draw)

    def samples(task: int, n: int) -> Samples:
        y = torch.arange(4).repeat_interleave(n)
        return Samples(centres[y] + 0.3 * torch.randn(len(y), 10, generator=draw), (y + task) % 4)

    tasks = [Task(number, tuple(range(4)), samples(number, 40), samples(number, 10)) for number in range(2)]
    return Stream("swapping", tasks, schedule, epochs, 10, "domain", boundaries=boundaries)


def hidden(delivered: Batch | Session) -> bool:
    return delivered.task_hidden


class Needy(Strategy):
    """Writes down what it hears, and needs boundaries."""

    room = 100

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.word, self.tasks, self.sizes, self.sessions, self.epochs = "", [], [], [], []
        self.learned, self.since = 0, 0

    @on(Event)
    def write(self, event: Event) -> None:
        self.word += LETTERS.get(type(event), "")

    @on(TaskStarted)
    def open(self, event: TaskStarted) -> None:
        self.tasks.append([event.task.id, self.learned])
        self.since = 0
        assert len(event.task.train) == 10 and len(event.task.test) == 0 and event.task.classes

    @on(SessionStarted)
    def enter(self, event: SessionStarted) -> None:
        assert hidden(event.session)
        self.inside = 0

    @on(EpochStarted)
    def count(self, event: EpochStarted) -> None:
        self.epochs.append(event.epoch.index)

    @on(BatchReady)
    def look(self, event: BatchReady) -> None:
        assert hidden(event.batch) and event.batch.epoch == self.epochs[-1]

    def learn(self, batch: Batch) -> Tensor:
        assert hidden(batch) and batch.epoch == self.epochs[-1]
        self.learned += 1
        self.since += batch.epoch == 0  # in later ones its samples come again
        self.inside += 1
        return super().learn(batch)

    @on(SessionEnded)
    def leave(self, event: SessionEnded) -> None:
        self.sessions.append([len(event.session.samples), self.inside])

    @on(TaskEnded)
    def close(self, event: TaskEnded) -> None:
        self.sizes.append(len(event.task.train))
        assert event.task.id == self.tasks[-1][0] and self.sizes[-1] == min(10 * self.since, self.room)


class At(ShiftDetector):
    """Sees a shift at one batch, whatever the loss is."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.when = when

    def detect(self, loss: float) -> bool:
        self.step += 1
        if self.step - 1 == self.when:
            self.emit(ShiftDetected(self.when, loss, loss))
        return self.step - 1 == self.when


def wrapped(base: Strategy | None = None, **options: float) -> WithDetectedBoundaries:
    torch.manual_seed(0)
    return WithDetectedBoundaries(base or Needy(Mlp(10, 4, hidden=(32,))), **{"window": 20, "keep": 100} | options)


@pytest.mark.parametrize("boundaries", [False, True])
def test_the_wrapped_strategy_hears_a_stream_with_boundaries_and_no_one_else_does(boundaries: bool) -> None:
    strategy, trace, detection = wrapped(), Trace(), Detection()
    run(strategy, swapping([0, 1, 0], boundaries=boundaries), trace, detection)
    base = strategy.base
    assert (SHOWN if boundaries else HIDDEN).fullmatch(trace.word)
    assert SHOWN.fullmatch(base.word.replace("V", "").replace("s", "sV").replace("Vt", "tV")), base.word
    assert base.word.count("T") == base.word.count("t") == 3
    assert detection.measured.precision == detection.measured.recall == 1
    assert [first for _, first in base.tasks[1:]] == detection.alarms and [number for number, _ in base.tasks] == [0, 1, 2]
    assert base.word.count("b") == base.word.count("l") == trace.word.count("b")


def test_a_session_is_cut_where_the_shift_is_and_its_epochs_count_from_there() -> None:
    strategy, detection, delay = wrapped(), Detection(), 6
    strategy.detector = At(64 + delay)
    run(strategy, swapping([0, 1]), detection)
    base = strategy.base
    assert detection.delays == [delay]
    whole, before, after = base.sessions
    assert whole == [160, 64]  # the session as it is
    assert before == [10 * delay, delay]
    assert after == [100, 64 - delay]  # what was seen since the cut, as much as is kept
    assert base.epochs == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    assert base.sizes == [100, 100]


def test_the_session_after_one_that_was_cut_is_whole_again() -> None:
    class Roomy(Needy):
        room = 500

    strategy = wrapped(Roomy(Mlp(10, 4, hidden=(32,))), keep=500)
    strategy.detector = At(32 + 54)  # in the last epoch of the second session
    run(strategy, swapping([0, 1, 0]))
    base = strategy.base
    assert base.sessions == [[80, 32], [160, 54], [100, 10], [80, 32]]  # each sample once, however many epochs there were
    assert base.epochs == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2, 3]
    assert base.sizes == [240, 180]


@pytest.mark.filterwarnings("ignore:this WithDetectedBoundaries was run before:UserWarning")
def test_what_ended_a_run_ends_no_task_and_another_run_starts_anew() -> None:
    class Failing(Needy):
        fails = True

        def learn(self, batch: Batch) -> Tensor:
            if self.fails and self.learned == 40:
                raise RuntimeError("enough")
            return super().learn(batch)

    strategy, shifts = wrapped(Failing(Mlp(10, 4, hidden=(32,)))), []

    class Ear:
        @on(ShiftDetected)
        def hear(self, event: ShiftDetected) -> None:
            shifts.append(event.step)

    with pytest.raises(RuntimeError, match="enough"):
        run(strategy, swapping([0, 1]))
    assert "t" not in strategy.base.word and strategy.base.tasks == [[0, 0]]
    strategy.base.fails, strategy.base.tasks = False, []
    detection = Detection()
    run(strategy, swapping([0, 1]), Ear(), detection)
    assert [number for number, _ in strategy.base.tasks] == list(range(len(shifts) + 1)) and shifts == detection.alarms
    run(strategy, swapping([0, 1]), again := Detection())
    assert len(again.alarms) >= 1


def test_a_head_grows_after_the_task_that_ends_there() -> None:
    draw = torch.Generator().manual_seed(0)

    def samples(task: int) -> Samples:
        y = 2 * task + torch.arange(2).repeat_interleave(40)
        return Samples(2.0 * y[:, None] + 0.3 * torch.randn(80, 10, generator=draw), y)

    tasks = [Task(number, (2 * number, 2 * number + 1), samples(number), samples(number)) for number in range(2)]
    stream, outputs, losses = Stream("growing", tasks, [0, 1], 4, 10, boundaries=False), [], []

    class Growing(Needy):
        @on(TaskEnded)
        def look(self, event: TaskEnded) -> None:
            outputs.append(len(self.model.head.weight))

    class Listening(At):
        def detect(self, loss: float) -> bool:
            losses.append(loss)
            return super().detect(loss)

    strategy = wrapped(Growing(Mlp(10, 4, hidden=(32,), head="growing")))
    strategy.detector = Listening(32)
    run(strategy, stream)
    assert outputs == [2, 4]
    assert losses[0] == losses[32] == pytest.approx(math.log(4))  # no output is of a label of these batches yet


def test_true_boundaries_are_kept_from_the_wrapped_strategy() -> None:
    class Curious(Needy):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.told: list[RunStarted] = []
            self.asked: set[Task | None] = set()

        @on(RunStarted)
        def meet(self, event: RunStarted) -> None:
            self.told.append(event)

        def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
            self.asked.add(task)
            return super().scores(x, task)

    strategy = wrapped(Curious(Mlp(10, 4, hidden=(32,))))
    result = run(strategy, swapping([0, 1], boundaries=True))
    (told,) = strategy.base.told
    assert isinstance(told.stream, StreamView) and told.run is None and strategy.base.asked == {None}
    assert "V" not in strategy.base.word and result.task_accuracy.shape == (2, 2)

    class Evaluating(Needy):
        @on(Evaluated)
        def look(self, event: Evaluated) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match=r"evaluations, which say what was taught.*\(.*Evaluating.look handles Evaluated\)"):
        wrapped(Evaluating(Mlp(10, 4)))

    class Asking(L2Penalty):
        needs_task = True

    with pytest.raises(ValueError, match="finds boundaries, not which task it is"):
        wrapped(Finetune(Mlp(10, 4))).add_regularisers(Asking())


def test_a_shift_at_the_first_batch_of_a_session_cuts_nothing() -> None:
    strategy, detection = wrapped(), Detection()
    run(strategy, swapping([0, 1]), detection)
    assert detection.delays == [0]
    assert strategy.base.sessions == [[160, 64], [160, 64]]
    assert strategy.base.epochs == [0, 1, 2, 3] * 2
    assert strategy.base.word.count("e") == 8 and "blestTSEb" in strategy.base.word.replace("V", "")


def test_boundaries_are_no_need_of_the_wrapper_and_task_ids_are_refused() -> None:
    assert "boundaries" in needs(AGEM(example_model())) and not needs(wrapped(AGEM(Mlp(10, 4))))
    assert not needs(Refresh(wrapped(AGEM(Mlp(10, 4)))))

    class Asking(Strategy):
        needs_task = True

    with pytest.raises(ValueError, match=r"finds boundaries, not which task it is, and Asking needs that \(Asking.needs_task"):
        wrapped(Asking(Mlp(10, 4)))
    with pytest.raises(TypeError, match="wraps a strategy object that has a model"):
        WithDetectedBoundaries(AGEM)
    with pytest.raises(ValueError, match="warmup must be a whole number"):
        wrapped(warmup=-1)
    with pytest.raises(ValueError, match="keep must be a whole number"):
        wrapped(keep=0)


def test_agem_takes_in_what_detected_tasks_leave() -> None:
    strategy = wrapped(AGEM(Mlp(10, 4, hidden=(32,)), per_task=30))
    with pytest.raises(ValueError, match="AGEM needs boundaries"):
        run(AGEM(Mlp(10, 4)), swapping([0, 1]))
    run(strategy, swapping([0, 1]))
    assert sorted(strategy.base.kept) == [0, 1] and len(strategy.base.past) == 60
    first = strategy.base.kept[0].all()
    expected = swapping([0]).tasks[0].train
    assert all(any(torch.equal(x, row) for row in expected.x) for x in first.x)  # of the first task alone


def test_a_strategy_that_needs_no_boundaries_learns_as_it_does_alone() -> None:
    def play(wrap: bool) -> Tensor:
        torch.manual_seed(0)
        strategy = Finetune(Mlp(10, 4, hidden=(16,)))
        return run(WithDetectedBoundaries(strategy) if wrap else strategy, swapping([0, 1])).accuracy

    assert torch.equal(play(True), play(False))


@pytest.mark.slow
def test_a_run_with_cut_sessions_resumes_exactly() -> None:
    def go_on(observer: Checkpoints, state: object = None) -> None:
        strategy = wrapped(AGEM(Mlp(10, 4, hidden=(16,)), per_task=30))
        strategy.detector = At(40)
        run(strategy, swapping([0, 1, 0], 2), observer, resume=state)

    whole = Checkpoints(every=13)
    go_on(whole)
    for number in range(len(whole.written) - 1):
        rest = Checkpoints(every=0)
        go_on(rest, whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None, f"from checkpoint {number}"


def test_samples_are_those_seen() -> None:
    class Keeping(Needy):
        @on(TaskEnded)
        def keep(self, event: TaskEnded) -> None:
            self.last = event.task.train

    strategy = wrapped(Keeping(Mlp(10, 4, hidden=(32,))))
    stream = swapping([0, 1])
    run(strategy, stream)
    own = stream.tasks[1].train
    rows = [[index for index in range(len(own)) if torch.equal(own.x[index], x)] for x in strategy.base.last.x]
    assert all(found and int(own.y[found[0]]) == int(y) for found, y in zip(rows, strategy.base.last.y, strict=True))


def test_what_it_is_given_to_carry_the_wrapped_strategy_carries_and_it_hears_the_run() -> None:
    def moved(*penalties: L2Penalty) -> float:
        torch.manual_seed(0)
        strategy = WithDetectedBoundaries(Finetune(Mlp(10, 4, hidden=(16,))), window=20, keep=100)
        weight = strategy.model.stages.layer1.weight
        before = weight.detach().clone()
        strategy.add_regularisers(*penalties)
        run(strategy, swapping([0, 1]))
        assert strategy.base.regularisers == penalties and not strategy.rehearsal_free
        return (weight.detach() - before).norm().item()

    penalty = L2Penalty(strength=1.0)
    assert moved(penalty) < 0.5 * moved() and penalty.anchor
