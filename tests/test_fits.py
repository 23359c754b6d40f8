"""What a run takes: models, optimizers, augmentations, devices and numbers; the rest is refused in one sentence before any work."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from clstream.strategies import AGEM, L2, TAME, Finetune, Joint, Refresh, Replay, WithDetectedBoundaries
from test_inputs import X, of, sentence
from torch import Tensor, nn
from torch.optim import SGD

from clstream import Strategy, run
from clstream.models import Mlp


def fitting(model: nn.Module | None = None, augment: object = None, x: Tensor = X, **options: object) -> None:
    strategy = options.pop("strategy", None) or Finetune(model or Mlp(3, 6, hidden=(4,)))
    run(strategy, of(x, augment=augment), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("augment", "x", "message"),
    [
        (lambda x: None, X, "gives a NoneType for a batch of inputs, not a tensor"),
        (lambda x: x[1:], X, r"gives \(3, 3\) for \(4, 3\): it must give as many inputs"),
        (lambda x: x.mean(), X, "it must give as many inputs"),
        (lambda x: x.numpy(), X, "gives a ndarray"),
        (lambda x: x.double(), X, "gives torch.float64 for torch.float32: it must keep the dtype"),
        (lambda x: x.float(), (X * 255).byte(), "gives float32 from 4 to 236 for uint8"),
        (lambda x: x.long(), (X * 255).byte(), "gives torch.int64 for torch.uint8"),
        (lambda x: x.float(), (X * 180).long(), "gives torch.float32 for torch.int64"),
        ("flip", X, "augment must be a function of a batch of inputs, or None, not 'flip'"),
    ],
)
def test_augmentations_that_are_refused(augment: object, x: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        fitting(augment=augment, x=x)
    sentence(caught.value)


def test_augmentations_that_give_floats_from_0_to_1_of_bytes_are_taken() -> None:
    fitting(augment=lambda x: x.float() / 255, x=(X * 255).byte())


def test_trying_an_augmentation_draws_nothing_from_the_run() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    def learned(patched: bool) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if patched:
                patch.setattr("clstream.engine.compatibility.check_augment", lambda _: None)
            torch.manual_seed(0)
            strategy = Finetune(Mlp(3, 6, hidden=(4,)))
            run(strategy, of(augment=noisy))
        return list(strategy.model.state_dict().values())

    assert all(torch.equal(one, two) for one, two in zip(learned(True), learned(False), strict=True))


def frozen() -> nn.Module:
    return Mlp(3, 6, hidden=(4,)).requires_grad_(False)


class Wide(nn.Module):
    """Gives outputs of a given shape a sample."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = nn.Linear(3, int(np.prod(shape))), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(-1, *self.shape)


class Failing(nn.Linear):
    """A model whose forward pass fails, with a message or without."""

    def __init__(self, error: Exception) -> None:
        super().__init__(3, 6)
        self.error = error

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        raise self.error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Finetune(frozen()), "no weight that Finetune learns requires a gradient"),
        (lambda: Replay(frozen()), "no weight that Replay learns requires a gradient"),
        *[
            (lambda kind=kind: kind(frozen()), f"no weight that {kind.__name__} learns requires a gradient")
            for kind in (AGEM, Joint, TAME)
        ],
        (lambda: Refresh(Replay(frozen())), "no weight that Replay learns requires a gradient"),
        (lambda: WithDetectedBoundaries(Finetune(frozen())), "no weight that Finetune learns requires a gradient"),
        (lambda: L2(frozen()), "Mlp has no parameter that requires a gradient, so there is nothing to hold: unfreeze some"),
        (lambda: Finetune(nn.Flatten()), "Flatten has no parameters, so there is nothing that Finetune could learn"),
        (lambda: Finetune(Wide(6, 2)), r"answers one sample with \(1, 6, 2\)"),
        (lambda: Finetune(Wide(4)), r"answers one sample with \(1, 4\), but tensors has 6 classes"),
        (lambda: Finetune(nn.Linear(3, 6).double()), r"Linear \(its weights are torch.float64\) can't take the inputs"),
        (lambda: Finetune(nn.Linear(3, 6).bfloat16()), r"Linear \(its weights are torch.bfloat16\) can't take the inputs"),
        (lambda: Finetune(Mlp(3, 6).double()), "its weights are torch.float64"),
        (lambda: Finetune(Mlp(4, 6)), "can't take the inputs"),
        *[
            (lambda error=error: Finetune(Failing(error)), f"Failing can't take the inputs of tensors, .*: {said}$")
            for error, said in (
                (NotImplementedError(), "NotImplementedError"),
                (ValueError(""), "ValueError"),
                (TypeError("n\nm"), "n"),
            )
        ],
        (
            lambda: Finetune(Mlp(3, 6), lambda p: torch.optim.SGD(p, lr=float("nan"))),
            "lr of SGD .* must be a finite number, not nan",
        ),
        (
            lambda: Finetune(Mlp(3, 6), lambda p: torch.optim.SGD(p, lr=float("inf"))),
            "lr of SGD .* must be a finite number, not inf",
        ),
        (lambda: Finetune(Mlp(3, 6), partial(SGD, momentum=math.nan)), "momentum of SGD .* must be a finite number"),
    ],
)
def test_strategies_that_could_not_learn_are_refused(make: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        run(make(), of())  # type: ignore[operator]
    sentence(caught.value)


def test_a_model_that_casts_its_inputs_may_be_of_float64() -> None:
    class Doubles(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear names it
            return super().forward(input.double())

    run(Finetune(Doubles(3, 6).double()), of())


def test_a_strategy_that_steps_by_itself_may_have_a_frozen_model() -> None:
    class Counts(Strategy):
        """Learns without gradients."""

        def learn(self, batch):  # type: ignore[no-untyped-def]
            return torch.zeros(())

    run(Counts(frozen()), of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "meta"}, "on the device meta tensors have no values"),
        ({"device": torch.device("meta")}, "on the device meta"),
        ({"device": 5}, "device must be a name such as cpu"),
        ({"device": "gpu"}, "there is no device 'gpu' here"),
        ({"resume": {"a": 1}}, "resume takes a checkpoint as clstream.checkpoint.newest"),
        ({"resume": {"identity": {}}}, "resume takes a checkpoint"),
        ({"seed": "one"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"evaluate_every": True}, "evaluate_every must be a whole number"),
        ({"evaluate_every": 2.0}, "evaluate_every must be a whole number"),
        ({"max_sessions": "all"}, "max_sessions must be a whole number"),
        ({"max_sessions": 0}, "max_sessions must be a whole number"),
    ],
)
def test_arguments_of_run_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        fitting(**options)  # type: ignore[arg-type]
    sentence(caught.value)
