"""Hidden means hidden: from all that a strategy is given on a stream without boundaries, no way leads to its tasks."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import clstream.strategies as zoo
import numpy as np
import pytest
import torch
from clstream.streams import blobs, drifting, from_tensors, gaussian_schedule, rotated_mnist
from clstream.streams.schedules import Gaussian, Transitions
from conftest import STRATEGIES, make, params
from torch import Tensor, nn

from clstream import Batch, Event, RunStarted, Samples, SessionStarted, Strategy, Stream, Subset, Task, on, run
from clstream.bus import Bus
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints, Trace
from clstream.checks.strategy_checks import difference
from clstream.engine.simulation import Simulation
from clstream.events import Evaluated
from clstream.models import Mlp
from clstream.online_metrics import Detection, DetectionMeasured, Prequential, PrequentialMeasured
from clstream.recording import RecordedStream, record
from clstream.results import Evaluation
from clstream.serialization import CaptureError
from clstream.strategy import needs
from clstream.stream import DataSource, MixedSchedule, StreamView, own_storage


def by_hand(boundaries: bool = False) -> Stream:
    """Return a stream whose tasks hold samples of their own, which sessions would be views of."""
    return example_stream((0, 1, 0, 2), boundaries=boundaries, batch_size=16)


def of_one_source(boundaries: bool = False) -> Stream:
    """Return a stream whose tasks are rows of one source, sorted by class, with samples held back."""
    return blobs(tasks=3, classes=6, train_per_class=20, validation=0.2, boundaries=boundaries, batch_size=16)


def of_made_rows() -> Stream:
    base = of_one_source()
    return Stream("made", [Task(task.id, task.classes, task.train.cache(), task.test) for task in base.tasks], boundaries=False)


def disk(boundaries: bool = False) -> Stream:
    y = torch.arange(120) % 6
    x = torch.randn(120, 20, generator=torch.Generator().manual_seed(0))
    return from_tensors(x, y, x, y, tasks=3, boundaries=boundaries, resident=False)


HIDDEN: dict[str, Callable[[], Stream]] = {
    "by hand": by_hand,
    "one source": of_one_source,
    "made": of_made_rows,
    "not resident": disk,
    "drifting": lambda: drifting(of_one_source(), Transitions(0.5), 6),
    "drifting, drawn": lambda: drifting(by_hand(), Gaussian(1.0), 6, 32),
    "drifting, not shuffled": lambda: drifting(of_one_source(), Transitions(0.5), 6, shuffle=False),
}
REAL = {"domains": lambda: drifting(rotated_mnist(tasks=2, batch_size=500), Transitions(0.5), 4, 600)}


class Detector:
    """A part that keeps each event that it hears."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    @on(Event)
    def keep(self, event: Event) -> None:
        """Keep it."""
        self.heard.append(event)


class Greedy(Strategy):
    """Keeps whatever it is given, in events, batches and questions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.given: list[object] = []
        self.asked: list[object] = []  # test inputs, without labels
        self.parts = (Detector(),)

    @on(Event)
    def keep(self, event: Event) -> None:
        """Keep an event."""
        self.given.append(event)

    def learn(self, batch: Batch) -> Tensor:
        """Keep a batch."""
        self.given.append(batch)
        return super().learn(batch)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Keep a question."""
        self.asked.append((x, task))
        return super().scores(x, task)

    def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Keep a question."""
        self.asked.append((x, task))
        return super().predict(x, task)


def reach(root: object) -> Iterator[tuple[str, object]]:
    """Yield (path, thing) for each thing that can be reached from one: attributes, properties, items, closures, bound objects.

    What is not followed: modules, classes, and the bus, by whose private list everyone in the run could be found.
    """
    ahead, met = deque([(type(root).__name__, root)]), list[object]()
    known: set[int] = set()
    while ahead:
        path, thing = ahead.popleft()
        if id(thing) in known or isinstance(thing, (str, bytes, int, float, bool, type(None), type, ModuleType, Bus)):
            continue
        known.add(id(thing))
        met.append(thing)  # so that no id comes again
        yield path, thing
        inner: dict[str, Any] = {}
        if isinstance(thing, Tensor):
            inner = {"._base": thing._base}
        elif isinstance(thing, Mapping):
            inner = {f"[{key!r}]": item for key, item in thing.items()} | {f" key {n}": key for n, key in enumerate(thing)}
        elif isinstance(thing, (list, tuple, set, frozenset, deque)):
            inner = {f"[{n}]": item for n, item in enumerate(thing)}
        elif isinstance(thing, (FunctionType, MethodType, BuiltinFunctionType)):
            inner = {"self": getattr(thing, "__self__", None), "wrapped": getattr(thing, "__wrapped__", None)}
            cells = getattr(getattr(thing, "__func__", thing), "__closure__", None) or ()
            inner |= {f"closure {n}": cell.cell_contents for n, cell in enumerate(cells)}
        elif not isinstance(thing, (nn.Module, torch.optim.Optimizer, torch.Generator, torch.device, torch.dtype, np.ndarray)):
            names = {name for cls in type(thing).__mro__ for name in [*getattr(cls, "__slots__", ()), *vars(cls)]}
            for name in [*names, *getattr(thing, "__dict__", {})]:
                if not name.startswith("__") and not (isinstance(thing, Strategy) and name in vars(Strategy)):
                    with suppress(AssertionError, CaptureError):  # a property that refuses to be asked just now
                        inner[f".{name}"] = getattr(thing, name, None)
        ahead.extend((path + name, item) for name, item in inner.items())


def leaks(strategy: Strategy, stream: Stream) -> list[str]:
    """Return the paths to what would tell of tasks."""
    forbidden = (Task, Stream, MixedSchedule, Simulation, DataSource, Subset, Evaluation, Transitions, Gaussian)
    data = set()
    for task in stream.tasks:
        for part in (task.train, task.test, task.validation):
            whole = part.source if isinstance(part, Subset) else part
            data |= set() if whole is None else {rows.untyped_storage().data_ptr() for rows in (whole.x, whole.y)}
    found = []
    for path, thing in reach(strategy):
        shares = isinstance(thing, Tensor) and thing.untyped_storage().data_ptr() in data
        if isinstance(thing, forbidden) or shares:
            found.append(f"{path}: {type(thing).__name__}")
    return found


def model_for(stream: Stream) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mlp(stream.input_shape, stream.classes, hidden=(8,))


@pytest.mark.parametrize("name", params(HIDDEN, REAL))
def test_nothing_that_a_strategy_is_given_leads_to_the_tasks(name: str) -> None:
    stream = (HIDDEN | REAL)[name]()
    strategy = Greedy(model_for(stream))
    run(strategy, stream, Detection(), Prequential())  # observers measure against the truth, and tell observers
    kinds = {type(thing) for thing in strategy.given}
    assert not {DetectionMeasured, PrequentialMeasured} & kinds
    assert {RunStarted, SessionStarted, Batch} <= kinds and Evaluated not in kinds and strategy.asked  # it was given what there is
    assert isinstance(strategy.given[0], RunStarted) and isinstance(strategy.given[0].stream, StreamView)
    assert strategy.given[0].run is None
    assert len(strategy.parts[0].heard) > len(stream)
    assert leaks(strategy, stream) == []


def test_samples_apart_hold_nothing_but_themselves() -> None:
    with torch.inference_mode():
        whole = torch.arange(40.0).view(10, 4)
        views = Samples(whole[2:4], torch.arange(10)[2:4], {"more": whole[2:4, 0]})
    for one, two in ((own_storage(views), views), (own_storage(own_storage(views)), views)):
        for own, given in ((one.x, two.x), (one.y, two.y), (one.extra["more"], two.extra["more"])):
            assert torch.equal(own, given) and own.untyped_storage().nbytes() == own.nbytes


def test_questions_are_mixed_over_tasks_and_answered_as_they_would_be_one_by_one() -> None:
    class Asked(Strategy):
        """Answers in a way of its own, and keeps what it is asked."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.questions: list[Tensor] = []

        def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
            assert task is None
            self.questions.append(x)
            return super().scores(x)

    y = torch.arange(6).repeat(700)
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0)) + 3 * y[:, None]
    stream = from_tensors(x, y, x, y, tasks=3, boundaries=False)
    strategy = Asked(model_for(stream))
    result = run(strategy, stream)
    task_of = {tuple(row): task.id for task in stream.tasks for row in task.test.x.tolist()}
    for asked in strategy.questions[1:]:  # the first is a single sample, of which only the shape of the answer counts
        tasks = [task_of[tuple(row)] for row in asked.tolist()]
        counts = torch.tensor(tasks).bincount(minlength=3)
        assert int(counts.max() - counts.min()) <= 1 and tasks != sorted(tasks)
    with torch.no_grad():
        for task in stream.tasks:
            answers = strategy.model(task.test.x)
            inside = torch.full((6,), float("-inf")).index_fill(0, torch.tensor(task.classes), 0.0)
            right = [float((logits.argmax(1) == task.test.y).double().mean()) for logits in (answers, answers + inside)]
            assert [result.accuracy[-1, task.id].item(), result.task_accuracy[-1, task.id].item()] == right


def test_the_search_finds_what_is_there() -> None:
    """On a stream that shows its boundaries, it finds the tasks by every way that it must close on one that hides them."""
    stream = of_one_source(boundaries=True)
    strategy = Greedy(model_for(stream))
    run(strategy, stream)
    found = leaks(strategy, stream)
    for way in (".stream: Stream", ".run: Simulation", ".samples: Subset", ".evaluation: Evaluation"):
        assert any(way in path for path in found), way
    for given in (strategy.asked, [thing for thing in strategy.given if isinstance(thing, Batch)]):
        assert any(isinstance(thing, Task) for _, thing in reach(given))

    class Sly(Strategy):
        pass

    sly, task = Sly(model_for(stream)), stream.tasks[0]
    sly.ask = lambda: task
    assert any("closure" in path for path in leaks(sly, stream))
    views = Samples(by_hand().tasks[0].train.x[2:], torch.zeros(0))
    assert any(path.endswith("._base") for path, thing in reach(views) if isinstance(thing, Tensor))


@pytest.mark.parametrize("name", ["by hand", "one source", "drifting"])
def test_it_holds_through_a_resumption(name: str) -> None:
    stream, observer = HIDDEN[name](), Checkpoints()
    run(Keeping(model_for(stream)), stream, observer)
    for number in (1, len(observer.written) // 2, len(observer.written) - 2):
        rest, strategy = Checkpoints(every=0), Keeping(model_for(stream))
        run(strategy, stream, rest, resume=observer.load(number))
        assert isinstance(strategy.stream, StreamView) and strategy.sessions
        assert leaks(strategy, stream) == []
        assert difference(observer.load(-1), rest.load(-1)) is None


class Keeping(Strategy):
    """Keeps the stream, each session and the last batch, which checkpoints write by reference."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sessions: list[Any] = []

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Keep the stream."""
        self.stream = event.stream

    @on(SessionStarted)
    def keep(self, event: SessionStarted) -> None:
        """Keep a session."""
        self.sessions.append(event.session)

    def learn(self, batch: Batch) -> Tensor:
        """Keep a batch."""
        self.batch = batch
        return super().learn(batch)


def test_a_view_has_what_strategies_read() -> None:
    stream = of_one_source().to("cpu")
    view = stream.visible
    for name in (
        "name",
        "classes",
        "input_shape",
        "scenario",
        "epochs",
        "batch_size",
        "augment",
        "resident",
        "device",
        "boundaries",
    ):
        assert getattr(view, name) == getattr(stream, name)
    assert of_one_source(boundaries=True).visible.boundaries
    with pytest.raises(AttributeError, match="a strategy is not told 'tasks' of a stream that hides its boundaries"):
        view.tasks  # noqa: B018
    assert copy.copy(view).classes == copy.deepcopy(view).classes == 6
    assert stream.to("cpu").visible is not view and stream.visible is view  # where the stream lies, the view says


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SHARP")  # its units are used up sooner or later
@pytest.mark.parametrize("name", [name for name in STRATEGIES if not needs(make(name)(example_model()))])
def test_our_strategies_learn_from_hidden_and_mixed_streams(name: str) -> None:
    for stream in (by_hand(), drifting(by_hand(), Transitions(0.5), 4)):
        strategy = make(name)(example_model())
        result = run(strategy, stream)
        assert result.accuracy.shape == (4, 3) and result.accuracy.isfinite().all()
        assert leaks(strategy, stream) == []


def test_batches_are_the_same_as_where_boundaries_show() -> None:
    for build in (by_hand, of_one_source, disk):
        for shown, hidden in zip(build(boundaries=True), build(), strict=True):
            for one, two in zip(next(iter(shown)), next(iter(hidden)), strict=True):
                assert torch.equal(one.samples.x, two.samples.x) and torch.equal(one.samples.y, two.samples.y)


def test_observers_are_told_everything() -> None:
    class Watch:
        events: list[Event]

        def __init__(self) -> None:
            self.events = []

        @on(Event)
        def keep(self, event: Event) -> None:
            """Keep it."""
            self.events.append(event)

    stream, watch, trace = by_hand(), Watch(), Trace()
    run(Strategy(example_model()), stream, watch, trace)
    assert isinstance(watch.events[0], RunStarted)
    assert watch.events[0].stream.tasks[2] is stream.tasks[2] and isinstance(watch.events[0].run, Simulation)
    assert trace.word.count("R") == 1 and trace.word.count("V") == 4
    assert sum(isinstance(event, Evaluated) for event in watch.events) == 4


def test_who_listens_to_evaluations_needs_boundaries() -> None:
    class Peeking(Strategy):
        @on(Evaluated)
        def peek(self, event: Evaluated) -> None:
            """Look at what was taught."""

    with pytest.raises(ValueError, match=r"Peeking needs boundaries, which example hides \(Peeking.peek handles Evaluated\)"):
        run(Peeking(example_model()), by_hand())
    run(Peeking(example_model()), by_hand(boundaries=True))


def test_a_task_incremental_stream_cannot_hide_its_tasks() -> None:
    with pytest.raises(ValueError, match="tells the task of each sample, so it can't hide its boundaries"):
        example_stream(scenario="task", boundaries=False)


def test_questions_with_the_task_are_answered_by_scores_where_it_is_hidden() -> None:
    class Own(Strategy):
        """Answers by rules of its own, as the base does."""

        def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
            assert task is None
            return super().scores(x)

        def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
            assert task is None
            return super().predict(x)

    plain, own = (run(kind(example_model()), by_hand()) for kind in (Strategy, Own))
    assert torch.equal(plain.accuracy, own.accuracy) and torch.equal(plain.task_accuracy, own.task_accuracy)


def test_recorded_streams_hide_too(tmp_path: Any) -> None:
    from clstream.streams import recorded

    stream = by_hand()
    again = recorded(record(stream, tmp_path / "hand.clstream"), data=stream)
    assert isinstance(again, RecordedStream)
    strategy = Greedy(model_for(again))
    run(strategy, again)
    assert leaks(strategy, again) == []


def test_a_checkpoint_of_joint_holds_no_data() -> None:
    observer, stream = Checkpoints(every=0), gaussian_schedule(sessions=3)
    run(zoo.Joint(model_for(stream)), stream, observer)
    state = observer.load(-1)
    largest = max(storage.nbytes for storage in state["strategy"]["storages"])
    assert 0 < largest < 4 * 64 * 300 / 2
