"""What is asked from outside of learning is answered in evaluation mode, without gradients and without a trace."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from functools import wraps

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune, Refresh, Replay, WithDetectedBoundaries
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import BatchLearned, Event, RunEnded, RunStarted, SessionEnded, Strategy, TaskEnded, on, run
from clstream.checks import example_stream, normed_model
from clstream.checks.recorders import Asking
from clstream.eval_mode import AS_WRITTEN, evaluating
from clstream.events import BatchReady, Evaluated
from clstream.serialization.compare import digest
from clstream.stream import Batch, Samples, Task

STREAM = example_stream()
X, TASK = STREAM.tasks[0].test[:].x, STREAM.tasks[0]


def generators() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def traces(strategy: Strategy) -> list[object]:
    """Return all that an answer could change."""
    modes = [module.training for module in strategy.model.modules()]
    grads = [None if weight.grad is None else weight.grad.tolist() for weight in strategy.model.parameters()]
    return [digest(strategy), modes, grads, generators(), AS_WRITTEN.get()]


def in_evaluation_mode(strategy: Strategy) -> Tensor:
    with evaluating(strategy):
        return strategy.model(X)


class Thoughtful(Strategy):
    """Overrides all three, and says in which mode they ran."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.modes: list[tuple[str, bool, bool]] = []

    not_state = ("modes",)

    def note(self, what: str) -> None:
        self.modes.append((what, self.model.training, torch.is_grad_enabled()))

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Halve them."""
        self.note("scores")
        return super().scores(x, task) / 2

    def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
        self.note("predict")
        return self.scores(x, task).argmax(1)

    def predict_online(self, x: Tensor) -> Tensor:
        self.note("predict_online")
        return self.predict(x)


@pytest.mark.parametrize("make", [Finetune, Thoughtful, Replay, lambda model: Refresh(Replay(model), fisher_weight=0)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_is_that_of_evaluation_mode_and_leaves_no_trace(make: Callable[[nn.Module], Strategy], when: str) -> None:
    strategy = make(normed_model())
    if when == "after":
        result = run(strategy, STREAM)
        strategy.loss(STREAM.tasks[1].train[:4])  # it moves batch norm's statistics, and leaves gradients aside
    expected = in_evaluation_mode(strategy)
    before = traces(strategy)
    for _ in range(3):
        assert torch.equal(strategy.scores(X), expected / (2 if make is Thoughtful else 1))
        for labels in (strategy.predict(X), strategy.predict_online(X)):
            assert torch.equal(labels, expected.argmax(1)) and not labels.requires_grad
        strategy.predict(X, TASK), strategy.scores(X, task=TASK)
    assert traces(strategy) == before and strategy.model.training
    if when == "after":
        fresh = make(normed_model())
        run(fresh, STREAM)
        for task, accuracy in zip(STREAM.tasks, result.accuracy[-1], strict=True):
            assert float((fresh.predict(task.test[:].x) == task.test[:].y).double().mean()) == float(accuracy)


def test_answers_after_a_run_are_its_last_row() -> None:
    strategy = Finetune(normed_model())
    result = run(strategy, example_stream((2, 1, 0), epochs=3))
    hits = [float((strategy.predict(X) == TASK.test[:].y).double().mean()) for _ in range(3)]
    assert hits == [float(result.accuracy[-1, 0])] * 3


@pytest.mark.parametrize("kind", [BatchReady, BatchLearned, SessionEnded, TaskEnded, Evaluated, RunStarted, RunEnded, Event])
@pytest.mark.parametrize("make", [Thoughtful, lambda model: WithDetectedBoundaries(Replay(model), warmup=4, window=10)])
def test_an_observer_that_asks_changes_nothing(make: Callable[[nn.Module], Strategy], kind: type[Event]) -> None:
    class Curious:
        def __init__(self) -> None:
            self.modes: set[tuple[bool, bool]] = set()

        @on(RunStarted)
        def begin(self, event: RunStarted) -> None:
            self.strategy = event.strategy

        @on(kind)
        def ask(self, event: Event) -> None:
            strategy = self.strategy
            handle = strategy.model.register_forward_hook(
                lambda module, args, out: self.modes.add((module.training, torch.is_grad_enabled()))
            )
            strategy.predict(X), strategy.scores(X, TASK), strategy.predict_online(X)
            handle.remove()

    plain, asked, curious = make(normed_model()), make(normed_model()), Curious()
    one, two = run(plain, STREAM), run(asked, STREAM, curious)
    assert torch.equal(one.accuracy, two.accuracy) and digest(plain) == digest(asked)
    assert curious.modes == {(False, False)}


class Shifted(Event):
    """Told in the middle of a step."""


class Reflective(Thoughtful):
    """Asks itself while it learns: in its loss, in a handler; and tells of something between both passes of a step."""

    def loss(self, samples: Samples) -> Tensor:
        outputs = self.scores(samples.x)
        self.emit(Shifted())
        self.note("loss")
        return F.cross_entropy(outputs, samples.y)

    @on(TaskEnded)
    def look_back(self, event: TaskEnded) -> None:
        self.note("handler")
        self.predict(event.task.train[:].x)


class Plain(Strategy):
    """The same without methods of its own that answer."""

    def loss(self, samples: Samples) -> Tensor:
        return F.cross_entropy(self.model(samples.x) / 2, samples.y)

    @on(TaskEnded)
    def look_back(self, event: TaskEnded) -> None:
        self.model(event.task.train[:].x)


def test_what_a_strategy_asks_itself_while_it_learns_is_as_it_is_written() -> None:
    strategy, plain = Reflective(normed_model()), Plain(normed_model())

    class Interrupting:
        @on(Shifted)
        def ask(self, event: Shifted) -> None:
            strategy.modes.append(("asked", strategy.model.training, torch.is_grad_enabled()))
            strategy.predict(X)

    run(strategy, STREAM, Interrupting())
    run(plain, STREAM)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(strategy.model.state_dict()[name], weight), name
    begin = next(n for n, mode in enumerate(strategy.modes) if mode[1])
    assert strategy.modes[begin : begin + 5] == [
        ("scores", True, True), ("asked", True, True), ("predict", False, False), ("scores", False, False), ("loss", True, True),
    ]  # fmt: skip
    ended = strategy.modes.index(("handler", True, True))
    assert strategy.modes[ended : ended + 3] == [("handler", True, True), ("predict", True, True), ("scores", True, True)]


def test_a_step_by_hand_is_a_step() -> None:
    strategy = Reflective(normed_model())
    batch = Batch(TASK.train[:8], TASK, 0, 0)
    strategy.learn(batch)
    loss = strategy.loss(batch.samples)
    loss.backward()
    assert strategy.objective(batch.samples).requires_grad
    assert all(mode == (mode[0], True, True) for mode in strategy.modes) and not AS_WRITTEN.get()


def test_a_wrapper_that_asks_its_base_while_it_learns_gets_what_is_written() -> None:
    class Asked(Refresh):
        def learn(self, batch: Batch) -> Tensor:
            self.mode = self.base.scores(batch.samples.x).requires_grad
            return super().learn(batch)

    strategy = Asked(Finetune(normed_model()), fisher_weight=0)
    run(strategy, STREAM)
    assert strategy.mode and not strategy.base.scores(X).requires_grad and not strategy.scores(X).requires_grad


@pytest.mark.parametrize("method", ["scores", "predict", "predict_online", "learn", "loss"])
def test_an_error_leaves_no_trace_either(method: str) -> None:
    class Broken(Finetune):
        pass

    def broken(self: Strategy, *args: object) -> Tensor:
        torch.rand(1), random.random(), np.random.rand()
        if method not in ("learn", "loss"):
            self.model.train()
        raise KeyError("broken")

    strategy = type("Broken", (Finetune,), {method: broken})(normed_model())
    before = traces(strategy)
    with pytest.raises(KeyError):
        getattr(strategy, method)(X)
    if method in ("learn", "loss"):
        assert not AS_WRITTEN.get()
    else:
        assert traces(strategy) == before


class Drawing(nn.Module):
    """A layer that counts, and draws from every generator, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.more = torch.Generator(), {"draws": [np.random.default_rng(0)]}
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("data", torch.zeros(1))
        self.register_buffer("array", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + 1
        self.data.data += 1
        self.array.numpy()[:] += 1
        return (
            x
            + self.more["draws"][0].random()
            + torch.rand(1)
            + random.random()
            + np.random.rand()
            + torch.rand(1, generator=self.own)
        )


class Noisy(Strategy):
    """Draws when it answers, from generators of its own, and toggles the mode of a frozen part."""

    not_state = ("teachers",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.drawing, self.random, self.numpy, self.python = (
            Drawing(),
            torch.Generator(),
            np.random.default_rng(0),
            random.Random(0),
        )
        self.teachers = {"old": [(normed_model(), 1)]}
        self.frozen = normed_model().eval()

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        noise = torch.rand(1, generator=self.random) + self.numpy.random() + self.python.random()
        self.frozen.train()
        return self.drawing(super().scores(x, task)) + noise + self.teachers["old"][0][0](x)


def test_generators_buffers_and_modes_of_all_modules_are_as_before() -> None:
    strategy = Noisy(normed_model())
    teacher = strategy.teachers["old"][0][0]
    before = (
        traces(strategy),
        strategy.numpy.bit_generator.state,
        strategy.python.getstate(),
        strategy.drawing.own.get_state().tolist(),
    )
    first = strategy.scores(X)
    assert torch.equal(first, strategy.scores(X))
    assert teacher.training and not strategy.frozen.training and not strategy.frozen.stages[1].training
    assert int(teacher.stages[1].num_batches_tracked) == 0
    assert [float(buffer) for buffer in strategy.drawing.buffers()] == [0, 0, 0, 0]
    assert before == (
        traces(strategy), strategy.numpy.bit_generator.state, strategy.python.getstate(), strategy.drawing.own.get_state().tolist()
    )  # fmt: skip


def test_batch_norm_that_rests_stays_at_rest() -> None:
    strategy = Finetune(normed_model())
    strategy.model.stages[1].eval()
    before = traces(strategy)
    strategy.predict(X)
    assert traces(strategy) == before and not strategy.model.stages[1].training and strategy.model.training


def test_methods_keep_their_names_signatures_and_places() -> None:
    assert Finetune.scores is Strategy.scores and Finetune.learn is Strategy.learn
    assert str(inspect.signature(Thoughtful.predict)) == "(self, x: 'Tensor', task: 'Task | None' = None) -> 'Tensor'"
    assert Thoughtful.scores.__qualname__ == "Thoughtful.scores" and Thoughtful.scores.__doc__ == "Halve them."
    assert "super().scores(x, task) / 2" in inspect.getsource(Thoughtful.scores)
    strategy = Thoughtful(normed_model())
    assert torch.equal(strategy.predict(x=X, task=None), strategy.predict(X))


def test_a_mixin_beside_the_strategy_answers_so_too() -> None:
    class Sharpened:
        def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
            return 2 * super().scores(x, task)

    class Mixed(Sharpened, Finetune):
        pass

    strategy = Mixed(normed_model())
    assert torch.equal(strategy.scores(X), 2 * in_evaluation_mode(strategy)) and not strategy.scores_ignore_task


def test_a_decorator_around_a_method_of_ours_is_inside() -> None:
    modes = []

    class Logged(Finetune):
        @wraps(Strategy.predict)
        def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
            modes.append(self.model.training)
            return Strategy.predict(self, x, task)

    Logged(normed_model()).predict(X)
    assert modes == [False]


@pytest.mark.parametrize("attribute", [staticmethod(lambda x: x), classmethod(lambda cls, x: x), property(lambda self: None), 3])
@pytest.mark.parametrize("name", ["scores", "learn"])
def test_what_is_no_plain_method_is_refused(name: str, attribute: object) -> None:
    with pytest.raises(TypeError, match=f"Odd.{name} must be a plain method"):
        type("Odd", (Strategy,), {name: attribute})


def test_asking_asks_at_every_event_that_it_says() -> None:
    run(Finetune(normed_model()), STREAM, asking := Asking())
    assert len(asking.answers) == 4
