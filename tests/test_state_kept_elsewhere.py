"""State that lies outside the object, or changes what an object is: refused by name; and what resumes though it looks odd."""

from __future__ import annotations

import weakref
from functools import lru_cache, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import StepLR

from clstream import BatchLearned, RunStarted, Strategy, TaskEnded, TaskStarted, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.seeds import isolated
from clstream.serialization import CaptureError

STREAM = example_stream((0, 1), batch_size=20)


def make(cls: type[Strategy], model: nn.Module | None = None) -> Strategy:
    with isolated(0, "strategy"):
        return cls(model or example_model())


def refused(cls: type[Strategy]) -> tuple[str, int]:
    """Return why a strategy's state is refused, and how many checkpoints there were before."""
    seen = Checkpoints()
    with pytest.raises(CaptureError) as why:
        run(make(cls), STREAM, seen)
    return str(why.value), len(seen.written)


def resumes(cls: type[Strategy], model: Any = example_model) -> None:
    whole = Checkpoints()
    run(make(cls, model()), STREAM, whole)
    for cut in range(0, len(whole.written) - 1, 2):
        rest = Checkpoints(every=0)
        run(make(cls, model()), STREAM, rest, resume=whole.load(cut))
        assert difference(whole.load(-1), rest.load(-1)) is None


def counted(function: Any) -> Any:
    calls = 0

    @wraps(function)
    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(*arguments)

    return counting


class Cached(Strategy):
    @lru_cache  # noqa: B019  # that is what is tested
    def scale(self, task: int) -> float:
        return float(torch.rand(()))


class CachedWithoutEnd(Cached):
    not_state = ("scale",)


class OnTheClass(Strategy):
    seen = 0

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        type(self).seen += 1


class InAList(Strategy):
    notes: list[float] = []  # noqa: RUF012

    @on(BatchLearned)
    def note(self, event: BatchLearned) -> None:
        self.notes.append(1.0)


class NewOnTheClass(Strategy):
    @on(BatchLearned)
    def note(self, event: BatchLearned) -> None:
        type(self).total = int(event.batch.index)


class Kept:
    """A descriptor that keeps the values of its objects itself."""

    def __init__(self) -> None:
        self.values: weakref.WeakKeyDictionary[object, float] = weakref.WeakKeyDictionary()

    def __get__(self, owner: object, cls: type) -> Any:
        return self if owner is None else self.values.get(owner, 0.0)

    def __set__(self, owner: object, value: float) -> None:
        self.values[owner] = value


class ByDescriptor(Strategy):
    rate = Kept()

    @on(BatchLearned)
    def change(self, event: BatchLearned) -> None:
        self.rate += 0.5


class InADefault(Strategy):
    @on(BatchLearned)
    def change(self, event: BatchLearned) -> None:
        self.add()

    def add(self, notes: list[int] = []) -> None:  # noqa: B006
        notes.append(1)


class OnAFunction(Strategy):
    @on(BatchLearned)
    def change(self, event: BatchLearned) -> None:
        self.add()

    def add(self) -> None:
        OnAFunction.add.calls = getattr(OnAFunction.add, "calls", 0) + 1


class InADecorator(Strategy):
    @on(BatchLearned)
    def change(self, event: BatchLearned) -> None:
        self.add()

    @counted
    def add(self) -> None:
        pass


def helper(value: Tensor) -> Tensor:
    helper.calls += 1
    return value


helper.calls = 0


class OfAFunction(Strategy):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.helper = helper

    @on(BatchLearned)
    def change(self, event: BatchLearned) -> None:
        self.helper(torch.ones(1))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (OnTheClass, "seen"),
        (InAList, "notes"),
        (NewOnTheClass, "total"),
        (ByDescriptor, "rate"),
        (InADefault, "add"),
        (OnAFunction, "add"),
        (InADecorator, "add"),
    ],
)
def test_what_is_kept_on_a_class_is_refused_once_it_changes(cls: type[Strategy], name: str) -> None:
    text, written = refused(cls)
    assert f"{cls.__name__}.{name} changed since the run began" in text and written == 1  # the one before anything was learned


def test_what_a_function_keeps_is_refused_once_it_changes() -> None:
    text, written = refused(OfAFunction)
    assert f"{__name__}.helper changed since the run began" in text and written == 1


def test_a_cache_of_a_method_is_refused_unless_it_is_no_state() -> None:
    text, written = refused(Cached)
    assert "Cached.scale is a functools.lru_cache" in text and written == 0


class View(Strategy):
    @on(RunStarted)
    def meet(self, event: RunStarted) -> None:
        self.rows = event.stream.tasks[0].train.x[3:9]

    @on(TaskEnded)
    def brighten(self, event: TaskEnded) -> None:
        self.rows //= 2


def test_a_view_of_the_data_that_is_changed_in_place_is_refused() -> None:
    seen = Checkpoints()
    with pytest.raises(CaptureError, match=r"^View\.rows is a view of the stream's data \(train x of task 0\), which was changed"):
        run(make(View), example_stream((0, 1), batch_size=20), seen)
    assert len(seen.written) == 4  # the start, and three batches


class LateParametrization(Strategy):
    @on(TaskEnded)
    def normalise(self, event: TaskEnded) -> None:
        if event.task.id == 0:
            parametrizations.weight_norm(self.model.head)


class Replaced(Strategy):
    @on(TaskEnded)
    def swap(self, event: TaskEnded) -> None:
        self.loss = super().loss


class LateLambda(Strategy):
    @on(TaskEnded)
    def swap(self, event: TaskEnded) -> None:
        self.rate = lambda: event.task.id


class LateHook(Strategy):
    @on(TaskEnded)
    def swap(self, event: TaskEnded) -> None:
        self.optimizer.register_step_post_hook(lambda *arguments: None)


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (LateParametrization, "LateParametrization.model.head was a Linear when the run began, and is a ParametrizedLinear now"),
        (Replaced, "Replaced.loss stands in for what Replaced defines by that name"),
        (LateLambda, "LateLambda.rate is a function"),
        (LateHook, "LateHook.optimizer got or lost hooks since the run began"),
    ],
)
def test_what_no_other_process_could_build_is_refused_when_it_comes(cls: type[Strategy], text: str) -> None:
    why, written = refused(cls)
    assert text in why and "\n" not in why and written == 4


class SchedulerOfEachTask(Strategy):
    @on(TaskStarted)
    def schedule(self, event: TaskStarted) -> None:
        self.scheduler = StepLR(self.optimizer, 2, gamma=0.5)

    @on(BatchLearned)
    def slow(self, event: BatchLearned) -> None:
        self.scheduler.step()


class Handle(Strategy):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.norms: list[float] = []
        self.handle = model.register_forward_hook(lambda module, inputs, output: self.norms.append(float(output.detach().norm())))


class OfSets(Strategy):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.frozen, self.tasks = frozenset({(1, "a"), (2, "b")}), set[Any]()

    @on(BatchLearned)
    def collect(self, event: BatchLearned) -> None:
        self.tasks |= {(event.batch.index, "x"), float(event.batch.index) / 3, f"{event.batch.index}"}


@pytest.mark.parametrize("cls", [SchedulerOfEachTask, Handle, OfSets, CachedWithoutEnd])
def test_these_resume(cls: type[Strategy]) -> None:
    resumes(cls)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(6))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.float() / 255)
        return logits


def test_lazy_layers_get_their_shapes_from_the_stream_and_their_weights_from_the_seed() -> None:
    resumes(Strategy, Lazy)
    weights = []
    for seed in (0, 0, 1):
        kept = Checkpoints(every=0)
        strategy = make(Strategy, Lazy())
        run(strategy, STREAM, kept, seed=seed, max_sessions=1)
        weights.append(strategy.model.layers[3].weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_lazy_layer_that_is_never_asked_is_refused_before_the_run() -> None:
    model = example_model()
    model.spare = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"Strategy\.model\.spare\.weight has no shape yet"):
        run(make(Strategy, model), STREAM)
