"""Compiled steps: what they draw and minimise, that they equal those that are not compiled, and what is taken as it is written."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clstream.strategies import AGEM, ERACE, EWC, L2, DERpp, Finetune, L2Penalty, LwF, Regularised, Replay
from clstream.streams import blobs
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from clstream import BatchLearned, EpochStarted, Result, Samples, Strategy, Stream, on, run
from clstream.checks.recorders import Checkpoints
from clstream.cli import main
from clstream.engine import OtherRunError, compiled_step
from clstream.memory import Reservoir
from clstream.models import Mlp
from clstream.training import Training

pytestmark = pytest.mark.slow

Make = Callable[[nn.Module], Strategy]


@pytest.fixture(autouse=True)
def compiled_in_a_hurry() -> Iterator[None]:
    """Have the C++ compiler optimize nothing, which halves its time."""
    from torch._inductor import config

    with config.patch({"aot_inductor.debug_compile": True}):
        yield


def stream(tasks: int = 2, **options: Any) -> Stream:
    """Return a small stream with a last batch that is not full."""
    return blobs(tasks=tasks, classes=2 * tasks, train_per_class=47, batch_size=10, **options)


def played(make: Make, *observers: object, head: str = "fixed", source: Stream | None = None, **options: Any) -> tuple[Result, Any]:
    """Return the result of a run, and the strategy."""
    source = source or stream()
    torch.manual_seed(0)
    strategy = make(Mlp(source.input_shape, source.classes, hidden=(8,), head=head))
    return run(strategy, source, *observers, **options), strategy


def assert_same(make: Make, compiles: int | None = None, rtol: float = 1e-4, **options: Any) -> Any:
    """Assert that a compiled run equals one that is not, and return its strategy."""
    (exact, there), (result, here) = played(make, **options), played(make, compile=True, **options)
    for ours, theirs in zip(here.model.parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5)
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    assert not all(torch.equal(*pair) for pair in zip(here.model.parameters(), there.model.parameters(), strict=True))
    assert torch.equal(result.accuracy, exact.accuracy) and torch.equal(result.cost.flops, exact.cost.flops)
    assert result.cost.total["compiling_seconds"] > 0 and "compiling_seconds" not in exact.cost.total
    assert result.params["compile"] is True and "compile" not in exact.params
    return here


def test_training_controls_are_the_same_compiled() -> None:
    assert_same(Replay, train=Training("cosine", warmup=2, clip=0.5, accumulate=2, class_weights="balanced"))


DRAWING: dict[str, Make] = {
    "Finetune": Finetune,
    "Replay": Replay,
    "mir": lambda model: Replay(model, retrieval="mir", candidates=20),
    "DERpp": DERpp,
    "one draw": lambda model: DERpp(model, draws=1),
    "ERACE": ERACE,
    "EWC": EWC,
    "Regularised": lambda model: Regularised(Replay(model), [L2Penalty()]),
}


@pytest.mark.parametrize("name", DRAWING)
def test_an_objective_with_what_was_drawn_for_it_is_the_same_and_draws_nothing(name: str) -> None:
    source = stream()
    _, strategy = played(DRAWING[name], source=source)
    samples = source.tasks[1].train[:10]
    memory = getattr(getattr(strategy, "base", strategy), "memory", None)
    before = None if memory is None else memory.random.get_state()
    whole = strategy.objective(samples)
    if memory is None:
        assert strategy.draw(samples) == ()
    else:
        memory.random.set_state(before)
    drawn = strategy.draw(samples)
    for _ in range(2):
        assert torch.equal(strategy.objective_with(samples, drawn), whole)
    assert strategy.drawn_before is None


MADE: dict[str, Make] = {
    "Finetune": partial(Finetune, optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)),
    "Replay": partial(Replay, optimizer=partial(Adam, lr=0.01), replay_batch=30),
    "DERpp": partial(DERpp, replay_batch=20, capacity=60),
    "L2": L2,
    "EWC": partial(EWC, strength=10.0),
    "LwF": LwF,
}


@pytest.mark.parametrize("name", MADE)
def test_compiled_steps_equal_those_that_are_not(name: str) -> None:
    assert_same(MADE[name])


class Switches(Finetune):
    """Its loss is its own; its learning rate and the dropout of its network change from pass to pass."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Optimizer] = partial(SGD, lr=0.1)) -> None:
        super().__init__(nn.Sequential(model, nn.Dropout(0.1)), optimizer)
        self.random = torch.Generator()

    @on(EpochStarted)
    def slow_down(self, event: EpochStarted) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + event.epoch.index)

    def loss(self, samples: Samples) -> Tensor:
        return super().loss(samples) + 0.01 * sum(weight.square().sum() for weight in self.model.parameters())


def test_a_loss_of_ones_own_is_compiled_once_for_all_learning_rates() -> None:
    before = graphs()
    assert_same(Switches, source=stream(epochs=3))
    assert graphs() - before == 1


def graphs() -> int:
    """Return how many graphs were compiled in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def test_a_resumed_run_ends_as_one_without_a_break() -> None:
    make = MADE["DERpp"]
    plain, whole = Checkpoints(every=4), Checkpoints(every=4)
    played(make, plain)
    result, strategy = played(make, whole, compile=True)
    then, now = plain.load(5), whole.load(5)
    assert now["identity"].pop("compile") is True and now["ledger"]["spent"].pop("compiling") > 0
    assert now["params"].pop("compile") is True and now["cost"].pop("compiling_seconds") > 0
    assert _shape_of(then) == _shape_of(now)
    for number in (2, 5):
        again, resumed = played(make, resume=whole.load(number), compile=True)
        assert torch.equal(again.accuracy, result.accuracy)
        for ours, theirs in zip(resumed.model.parameters(), strategy.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(OtherRunError, match="compile was True, now it is None"):
        played(make, resume=whole.load(3))


def _shape_of(state: Any) -> Any:
    """Return what kinds of values a state holds where."""
    if isinstance(state, dict):
        return {name: _shape_of(value) for name, value in state.items()}
    return [_shape_of(value) for value in state] if isinstance(state, list) else type(state)


class Drawing(Strategy):
    """Draws from its memory in its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.memory = Reservoir(50)

    def loss(self, samples: Samples) -> Tensor:
        return super().loss(samples + self.memory.sample(len(samples)) if len(self.memory) else samples)

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        self.memory.add(event.batch.samples)


class Numpy(Strategy):
    """Draws from numpy's generator in its loss."""

    def loss(self, samples: Samples) -> Tensor:
        return super().loss(samples) * (1 + 0.1 * float(np.random.random()))


REFUSED: dict[str, tuple[Make, str]] = {
    "AGEM": (AGEM, "AGEM takes its steps by a `learn` of its own"),
    "Drawing": (Drawing, ""),
    "Numpy": (Numpy, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_compiled_is_taken_as_it_is_written_and_told_once(name: str) -> None:
    make, why = REFUSED[name]
    _, there = played(make)
    with pytest.warns(RuntimeWarning) as told:
        _, here = played(make, compile=True)
    assert len(told) == 1
    assert f"the steps of {name} are not compiled, but taken as they are written: {why}" in str(told[0].message)
    assert all(torch.equal(*pair) for pair in zip(here.model.parameters(), there.model.parameters(), strict=True))


class Counting(Finetune):
    """Its loss changes from step to step, by a number of its own."""

    steps = 0

    def loss(self, samples: Samples) -> Tensor:
        self.steps += 1
        return super().loss(samples) / self.steps


def test_a_step_that_changes_from_batch_to_batch_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    before = graphs()
    monkeypatch.setattr(compiled_step, "MOST_COMPILES", 2)
    with pytest.warns(RuntimeWarning, match="compiled 2 times within a session, as it changes from batch to batch"):
        _, here = played(Counting, compile=True)
    assert graphs() - before == 2
    _, there = played(Counting)
    assert here.steps == there.steps
    for ours, theirs in zip(here.model.parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_is_not_compiled_takes_its_own_step_and_nothing_is_kept_of_a_strategy_that_ran() -> None:
    gone = weakref.ref(assert_same(lambda model: Finetune(model, partial(RMSprop, lr=0.01)), head="growing", source=stream(1)))
    gc.collect()
    assert gone() is None
    from torch._dynamo import config

    assert not config.trace_autograd_ops


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compile must be True or False, not 1"):
        played(Finetune, compile=1)
    with pytest.raises(ValueError, match="compile=True computes in float32: leave it out, or precision='bf16'"):
        played(Finetune, compile=True, precision="bf16")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{__file__}/cache")
        with pytest.raises(ValueError, match="compile=True keeps what it compiled in a folder that can't be written"):
            played(Finetune, compile=True)
    from torch._inductor import config

    no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(ValueError, match="compiler, and there is none: install g"):
        played(Finetune, compile=True)


def test_the_command_line_and_configs_take_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "--stream", "blobs", "--strategy", "AGEM", "--track", "false", "--print_config"]
    assert main(given) == 0 and "compile" not in capsys.readouterr().out
    assert main([*given, "--compile"]) == 0
    (tmp_path / "config.yaml").write_text(printed := capsys.readouterr().out)
    assert "compile: true" in printed
    assert main(["run", "--config", str(tmp_path / "config.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
