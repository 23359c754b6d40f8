"""Episodes of one shape computed as one batch, where the learner allows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import handlers_of
from clstream.episodes.outcomes import CLEAN, EpisodeOutcome
from clstream.eval_mode import evaluating
from clstream.strategy import Strategy
from clstream.stream import Episodes


@runtime_checkable
class AnswersTogether(Protocol):
    """A learner that can be taught several episodes at once, and be asked about each."""

    def answer_together(self, support: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
        """Return the scores of each episode's questions, as if it had been learned alone: (episodes, asked, classes).

        Args:
            support: (episodes, sets, n, *input_shape), raw.
            labels: (episodes, sets, n), int64.
            asked: (episodes, asked, *input_shape), raw.
            classes: the number of labels.

        """
        ...


def check_together(strategy: Strategy) -> None:
    """Raise ValueError, in one sentence, for a learner that learns one episode at a time."""
    if isinstance(strategy, AnswersTogether):
        return
    name = type(strategy).__name__
    model, optimizer = getattr(strategy, "model", None), getattr(strategy, "optimizer", None)
    methods = ("learn", "objective", "draw", "loss", "outputs", "logits", "scores", "predict", "mask_answer")
    plain = all(getattr(type(strategy), method) is getattr(Strategy, method) for method in methods)
    plain = plain and list(handlers_of(type(strategy))) == list(handlers_of(Strategy)) and not strategy.parts
    if not plain or strategy.active_classes != "all":
        raise ValueError(f"{name} learns one episode at a time: batch=1")
    fixed = isinstance(optimizer, SGD) and len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0] if isinstance(optimizer, SGD) else {}
    if not fixed or any(group[option] for option in ("momentum", "weight_decay", "nesterov", "maximize")):
        raise ValueError(f"episodes are learned together with plain SGD alone, without momentum and decay, by {name} too: batch=1")
    if (
        not isinstance(model, nn.Module)
        or any(True for _ in model.buffers())
        or any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())
    ):
        raise ValueError(f"{type(model).__name__} has statistics or dropout, so episodes can't be learned together: batch=1")


def outcomes_together(
    snapshot: Strategy, episodes: Episodes, numbers: Sequence[int], device: str | torch.device = "cpu"
) -> list[EpisodeOutcome]:
    """Teach copies of a learner some episodes at once, and return what came of each; the learner itself stays as it is."""
    began = time.perf_counter()
    draws = [episodes.draw(number) for number in numbers]
    rows, labels, targets, expected = (
        torch.stack([getattr(draw, name) for draw in draws]) for name in ("support", "support_labels", "targets", "target_labels")
    )
    sets, inputs = rows.shape[1], episodes.pool.x
    support, clean = inputs[rows], inputs[targets.flatten(1)]
    corrupted = [episodes.corrupt(number, x) for number, x in zip(numbers, clean, strict=True)]
    asked = [clean, *(torch.stack([own[name] for own in corrupted]) for name in episodes.corruptions)]
    questions = torch.cat(asked, 1)
    learner = deepcopy(snapshot)
    for module in [learner.model] if isinstance(getattr(learner, "model", None), nn.Module) else []:
        module.to(device)
    with evaluating(learner):
        answer = answers_of(learner, episodes.steps)
        scores = answer(support.to(device), labels.to(device), questions.to(device), episodes.outputs)
    y = expected.flatten(1).repeat(1, len(asked))
    own = by_kind(scores.argmax(2).cpu() == y, len(asked))
    nearest = by_kind(nearest_together(support.flatten(1, 2), labels.flatten(1), questions) == y, len(asked))
    names, seconds = [CLEAN, *episodes.corruptions], (time.perf_counter() - began) / len(numbers)
    return [
        EpisodeOutcome(
            index=number, accuracy=float(own[place, 0].mean()), by_set=tuple(own[place, 0].view(sets, -1).mean(1).tolist()),
            corrupted=dict(zip(names[1:], own[place, 1:].mean(1).tolist(), strict=True)),
            nearest=dict(zip(names, nearest[place].mean(1).tolist(), strict=True)), steps=sets * episodes.steps,
            memory_bytes=float("nan"), seconds=seconds,
        )
        for place, number in enumerate(numbers)
    ]  # fmt: skip


def answers_of(learner: Strategy, steps: int) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Return what teaches a learner several episodes and asks it, as `AnswersTogether` says."""
    if isinstance(learner, AnswersTogether):
        return learner.answer_together
    return lambda support, labels, asked, _: tune_together(learner, support, labels, asked, steps)


def tune_together(learner: Strategy, support: Tensor, labels: Tensor, asked: Tensor, steps: int) -> Tensor:
    """Take gradient steps on the support sets of several episodes at once, and return the logits of their questions.

    Each episode has weights of its own, and all begin with the learner's: `torch.func.vmap` over them.
    """
    model, rate = learner.model, learner.optimizer.param_groups[0]["lr"]
    weights = {name: weight.detach().expand(len(support), *weight.shape) for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    def answer(weights: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(model, weights, (x,))

    for number in range(support.shape[1]):
        for _ in range(steps):
            slopes = vmap(grad(loss))(weights, support[:, number], labels[:, number])
            weights = {name: weight - rate * slopes[name] for name, weight in weights.items()}
    logits: Tensor = vmap(answer)(weights, asked)
    return logits


def by_kind(right: Tensor, kinds: int) -> Tensor:
    """Return (episodes, kinds of questions, targets), float64, of (episodes, questions), bool."""
    return right.view(len(right), kinds, -1).double()


def nearest_together(support: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Return the labels of the nearest support samples by the squared distance of inputs: (episodes, asked)."""
    return torch.stack(
        [
            own[torch.cdist(x.flatten(1).double(), rows.flatten(1).double()).argmin(1)]
            for rows, own, x in zip(support, labels, asked, strict=True)
        ]
    )
