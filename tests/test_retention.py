"""That nothing of past samples is kept is checked in earnest: whoever keeps some is caught, wherever."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clstream.strategies import AGEM, EWC, L2, SI, DERpp, Finetune, Joint, L2Penalty, LwF, LwFMC, Refresh, Regularised, Replay
from torch import Tensor, nn
from torch.optim import SGD, Adam

from clstream import BatchLearned, SessionEnded, SessionStarted, Strategy, on
from clstream.checks import check_strategy
from clstream.checks.retention import find_inputs, reachable
from clstream.strategy import Regulariser


class Hoarder(Strategy):
    """Keeps some of each session, in a place that a subclass chooses."""

    rehearsal_free = True

    @on(SessionEnded)
    def hoard(self, event: SessionEnded) -> None:
        self.keep(event.session.samples[:3].x)

    def keep(self, x: Tensor) -> None:
        self.kept = x.clone()


class Normalised(Hoarder):
    def keep(self, x: Tensor) -> None:
        self.notes = {"deep": [SimpleNamespace(rows=(x.flatten(1) / 255).to(torch.bfloat16))]}


class Standardised(Hoarder):
    @on(SessionEnded)
    def hoard(self, event: SessionEnded) -> None:
        x = torch.cat([task.train[:].x.float() for task in [event.session.task]])
        self.kept = (x[:2] - 127) / 73
        self.model.stages.input.shift, self.model.stages.input.scale = torch.tensor(127 / 255), torch.tensor(73 / 255)


class InABuffer(Hoarder):
    def keep(self, x: Tensor) -> None:
        self.model.register_buffer("running", x.float(), persistent=False)


class OutOfState(Hoarder):
    not_state = ("cache",)

    def keep(self, x: Tensor) -> None:
        self.cache = x.numpy().copy()


class InAClosure(Hoarder):
    def keep(self, x: Tensor) -> None:
        self.recall = partial(lambda rows=x.flatten(): rows)


class InTheClass(Hoarder):
    shelf: list = []  # noqa: RUF012

    def keep(self, x: Tensor) -> None:
        self.shelf.append(np.float32(x.numpy()))


class InTheOptimizer(Hoarder):
    def keep(self, x: Tensor) -> None:
        self.optimizer.state[self.model.head.weight]["momentum_buffer_too"] = x[0]


class OnATensor(Hoarder):
    def keep(self, x: Tensor) -> None:
        self.model.head.weight.notes = x[:1]


class TheSession(Hoarder):
    @on(SessionStarted)
    def see(self, event: SessionStarted) -> None:
        self.session = event.session

    def keep(self, x: Tensor) -> None:
        pass


class Pack(Regulariser):
    @on(BatchLearned)
    def see(self, event: BatchLearned) -> None:
        self.last = event.batch

    def penalty(self, samples: object) -> Tensor:
        return torch.zeros(())


class InAPart(Strategy):
    rehearsal_free = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.add_regularisers(Pack())


def claiming(kind: type[Strategy]) -> type[Strategy]:
    return type(f"Claiming{kind.__name__}", (kind,), {"rehearsal_free": True})  # the command line finds classes by name


CHEATS: list[Callable[[nn.Module], Strategy]] = [
    Hoarder, Normalised, Standardised, InABuffer, OutOfState, InAClosure, InTheClass, InTheOptimizer, OnATensor, TheSession,
    InAPart,
    *(claiming(kind) for kind in (Replay, DERpp, AGEM, Joint)),
]  # fmt: skip


def keeps_no_samples(make: Callable[[nn.Module], Strategy]) -> None:
    next(check for check in check_strategy(make) if check.name == "keeps_no_samples")()


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_strategy_that_keeps_samples_is_caught(cheat: Callable[[nn.Module], Strategy]) -> None:
    with pytest.raises(AssertionError, match=r"says that it is rehearsal-free, but .* holds inputs of a past"):
        keeps_no_samples(cheat)


@pytest.mark.parametrize(
    "make",
    [
        L2, EWC, SI, LwF, LwFMC, Finetune,
        lambda model: EWC(model, partial(Adam, lr=1e-3), fisher_batch=4),
        lambda model: L2(model, partial(SGD, lr=0.05, momentum=0.9), renew_optimizer=True),
        lambda model: Regularised(LwFMC(model), [L2Penalty()]),
    ],
)  # fmt: skip
def test_honest_ones_are_not(make: Callable[[nn.Module], Strategy]) -> None:
    keeps_no_samples(make)


def test_it_is_declared_by_the_ones_that_keep_nothing() -> None:
    def built(make: Callable[[nn.Module], Strategy]) -> Strategy:
        from clstream.checks import example_model

        return make(example_model())

    assert all(built(make).rehearsal_free for make in (L2, EWC, SI, LwF, LwFMC, Finetune))
    assert not any(built(make).rehearsal_free for make in (Replay, DERpp, AGEM, Joint, lambda model: Refresh(Replay(model))))
    assert built(lambda model: Regularised(LwF(model), [L2Penalty()])).rehearsal_free
    assert not built(lambda model: Regularised(Replay(model), [L2Penalty()])).rehearsal_free


def test_what_is_found_is_named_by_its_path() -> None:
    x = torch.randint(0, 255, (5, 1, 4, 4), dtype=torch.uint8)
    holder = SimpleNamespace(a=[{"rows": x[2].clone()}], other=torch.rand(16))
    assert find_inputs(holder, x) == "SimpleNamespace.a[0]['rows']"
    assert find_inputs(SimpleNamespace(other=torch.rand(10, 16), mean=x.double().mean(0)), x) is None
    assert [path for path, _ in reachable(holder)] == ["SimpleNamespace.other", "SimpleNamespace.a[0]['rows']"]
