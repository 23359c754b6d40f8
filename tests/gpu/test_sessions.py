"""On a GPU: nothing waits for it within a session; precision, determinism, and what a checkpoint holds that the CPU's does too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from clstream.strategies import Replay
from clstream.streams import from_tensors
from conftest import make

from clstream import EpochEnded, RunEnded, SessionStarted, Strategy, Stream, on, run
from clstream.checkpoint.compare import difference
from clstream.checks.recorders import Checkpoints
from clstream.engine import OtherRunError
from clstream.engine.numerics import NotDeterministicError
from clstream.models import ConvNet, Mlp
from clstream.seeds import isolated

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

METHODS = ("Finetune", "Replay", "DERpp", "EWC", "LwF", "L2")


def images(resident: bool = True, epochs: int = 2, batch_size: int = 4) -> Stream:
    """Return three tasks of two classes of noise around a picture of their own, in batches enough to be looked at on the way."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(1200) % 6
    x = (torch.rand(6, 1, 8, 8, generator=draw)[y] * 200 + torch.rand(1200, 1, 8, 8, generator=draw) * 55).to(torch.uint8)
    return from_tensors(
        x[:900], y[:900], x[900:], y[900:], tasks=3, epochs=epochs, batch_size=batch_size, resident=resident
    )  # fmt: skip


def built(name: str, convolutional: bool = False) -> Strategy:
    with isolated(0, "strategy"):
        return make(name)(ConvNet((1, 8, 8), 6) if convolutional else Mlp((1, 8, 8), 6, hidden=(32,)))


class RefusesToWait:
    """Has torch raise RuntimeError for what waits for the GPU, from the begin of a session until its last pass is over."""

    def __init__(self) -> None:
        self.sessions = 0

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        """Refuse."""
        torch.cuda.set_sync_debug_mode("error")

    @on(EpochEnded)
    def end(self, event: EpochEnded) -> None:
        """Allow it again: what a strategy consolidates may wait."""
        if event.epoch.index + 1 == event.epoch.session.epochs:
            torch.cuda.set_sync_debug_mode("default")
            self.sessions += 1

    @on(RunEnded)
    def stop(self, event: RunEnded) -> None:
        """Leave torch as it was."""
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_within_a_session(name: str, resident: bool, precision: str) -> None:
    observer = RefusesToWait()
    run(built(name), images(resident), observer, device=DEVICE, precision=precision)
    assert observer.sessions == 3


def test_what_waits_is_noticed() -> None:
    class Waits(Strategy):
        def learn(self, batch):
            float(batch.samples.x.sum())
            return super().learn(batch)

    with pytest.raises(RuntimeError, match="synchroniz"):
        run(Waits(Mlp((1, 8, 8), 6, hidden=(32,))), images(), RefusesToWait(), device=DEVICE)


@pytest.mark.parametrize("resident", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run(resident: bool) -> None:
    class Diverges(Strategy):
        steps = 0

        def learn(self, batch):
            loss = super().learn(batch)
            self.steps += 1
            return loss * torch.nan if self.steps == 70 else loss

    with pytest.raises(FloatingPointError, match="the loss is nan in task 0, session 0, epoch 0, batch 69: try"):
        run(Diverges(Mlp((1, 8, 8), 6, hidden=(32,))), images(resident, epochs=1), device=DEVICE)


@pytest.mark.parametrize("name", METHODS)
def test_batches_sent_one_by_one_are_those_of_resident_data(name: str) -> None:
    kept, strategies = [], []
    for resident in (True, False):
        strategy = built(name)
        kept.append(run(strategy, images(resident, epochs=1), device=DEVICE, deterministic=True).accuracy)
        strategies.append(strategy.model.state_dict())
    assert torch.equal(*kept)
    assert all(torch.equal(strategies[0][key], strategies[1][key]) for key in strategies[0])


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_near_float32(name: str) -> None:
    results, weights = [], []
    for precision in ("fp32", "bf16"):
        strategy = built(name, convolutional=True)
        results.append(run(strategy, images(epochs=1, batch_size=32), device=DEVICE, precision=precision))
        weights.append(list(strategy.model.parameters()))
    assert {weight.dtype for weight in weights[1]} == {torch.float32}
    assert float((results[0].accuracy - results[1].accuracy).abs().mean()) <= 0.15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*METHODS, "PRD", "SHARP"])
def test_a_deterministic_run_gives_the_same_bits_again(name: str, precision: str) -> None:
    checkpoints = [Checkpoints(every=0) for _ in range(2)]
    for observer in checkpoints:
        options = {"device": DEVICE, "deterministic": True, "precision": precision}
        try:
            run(built(name, convolutional=True), images(batch_size=32), observer, **options)
        except NotDeterministicError as error:
            if name in METHODS or "has no deterministic form" not in str(error):
                raise
            return  # refused in a sentence, which is as good as the same bits
    assert difference(*(observer.load(-1) for observer in checkpoints)) is None


def test_a_checkpoint_holds_the_memory_of_the_cpu_and_goes_on_there_alone() -> None:
    """Weights differ by the order of additions; positions, and which samples are kept, are decided on the CPU."""
    states = []
    for device in ("cpu", DEVICE):
        checkpoints = Checkpoints()
        run(built("Replay"), images(epochs=1), checkpoints, device=device)
        states.append([checkpoints.load(number) for number in (1, -1)])
    for here, there in zip(*states, strict=True):
        assert here["position"] == there["position"] and here["step"] == there["step"]
        assert torch.equal(here["random"]["torch"], there["random"]["torch"])
    memories = []
    for device in ("cpu", DEVICE):
        strategy = built("Replay")
        assert isinstance(strategy, Replay)
        run(strategy, images(epochs=1), device=device)
        memories.append(strategy.memory.all())
    assert torch.equal(memories[0].x, memories[1].x.cpu()) and torch.equal(memories[0].y, memories[1].y.cpu())
    with pytest.raises(OtherRunError, match="device was 'cuda', now it is 'cpu'"):
        run(built("Replay"), images(epochs=1), resume=states[1][0])
