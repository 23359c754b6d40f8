"""Merging: what a strategy exports for others to merge, and what it becomes of what several others exported.

A payload is plain tensors by name. Learners that are merged have networks of the same shapes. Here a payload is the model, and
merging takes its average (FedAvg: McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, "Communication-Efficient Learning of Deep
Networks from Decentralized Data"). What is a sum over samples merges exactly: see `clstream.strategy.frozen_features`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor, nn

Payload = Mapping[str, Tensor]
"""What a learner exports: tensors by name."""


class Merging:
    """Export the model, and merge models by their average: what strategies do that say nothing else."""

    model: nn.Module
    seen_classes: Tensor | None

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers that it answers with, here the model's: what else it holds counts as memory."""
        model = getattr(self, "model", None)
        if isinstance(model, nn.Module):
            yield from (*model.parameters(), *model.buffers())

    @property
    def sent_bytes(self) -> tuple[int, int]:
        """The bytes that went up to a server and down to its clients, so far in the run: none, where there are no clients."""
        return 0, 0

    def export(self, since: Payload | None = None) -> dict[str, Tensor]:
        """Return what others merge: here the parameters and buffers of the model, and which classes came, if that is tracked.

        Args:
            since: what this learner took over before it learned. What adds up is then what came since; a model is whole.

        Raises TypeError for a strategy that answers with more than its model, and has no export of its own.
        """
        self._check_merges()
        payload = {f"model.{name}": tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return payload if self.seen_classes is None else {**payload, "seen_classes": self.seen_classes.clone()}

    def merge(self, payloads: Payload | Iterable[Payload], weights: Sequence[float] | None = None) -> None:
        """Become what others exported, merged: here the weighted mean of their models, computed in float64.

        Args:
            payloads: what `export` of others returned: one, or several.
            weights: of the payloads in an average of models, such as their numbers of samples; None: all the same.

        Raises ValueError, before anything changes, for none, and for what `check_payload` refuses; TypeError as `export` does.
        """
        payloads = as_payloads(payloads)
        shares = shares_of(weights, len(payloads))
        for payload in payloads:
            self.check_payload(payload)
        self._load_model({name: average([payload[f"model.{name}"] for payload in payloads], shares) for name in self._state()})
        if self.seen_classes is not None:
            labels = [payload["seen_classes"].to(self.seen_classes) for payload in payloads]
            self.seen_classes = torch.cat([self.seen_classes, *labels]).unique()

    def take_over(self, payload: Payload) -> None:
        """Become what another learner exported, to go on from there: here `merge` of it alone, by one that has not learned."""
        self.merge([payload])

    def check_payload(self, payload: Payload) -> None:
        """Raise ValueError, in one sentence, for what can't be merged: other names or shapes, numbers that are not finite."""
        self._check_merges()
        expected = {f"model.{name}": tuple(tensor.shape) for name, tensor in self._state().items()}
        check_tensors(payload, type(self).__name__, expected, {} if self.seen_classes is None else {"seen_classes": 1})

    def _state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def _load_model(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({name: state[name].to(now) for name, now in self._state().items()})

    def _check_merges(self) -> None:
        if type(self).answering_weights is not Merging.answering_weights:
            name = type(self).__name__
            raise TypeError(f"{name} answers with more than its model, so an average of models is no {name}: it has no `merge`")


def as_payloads(payloads: Payload | Iterable[Payload]) -> list[Payload]:
    """Return payloads as a list: one by itself is a list of it. Raises ValueError for none, and for what can't be any."""
    if not isinstance(payloads, Iterable):
        raise ValueError(f"merge takes what one learner exported, or several in a list, not {payloads!r:.60}")
    several = [payloads] if isinstance(payloads, Mapping) else list(payloads)
    if not several:
        raise ValueError("there is nothing to merge: give what one learner exported, or several")
    return several


def shares_of(weights: Sequence[float] | None, number: int) -> list[float]:
    """Return the share of each payload in an average; they add up to 1. Raises ValueError for weights that are none."""
    if weights is None:
        return [1 / number] * number
    if len(weights) != number:
        raise ValueError(f"there must be a weight for each of the {number} payloads, not {len(weights)}")
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        raise ValueError(f"weights of payloads must be 0 or more, and not all 0, not {list(weights)}")
    return [float(weight) / sum(weights) for weight in weights]


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the weighted mean of tensors of one shape, in their dtype; of whole numbers it is rounded."""
    mean = torch.stack([tensor.double() * share for tensor, share in zip(tensors, shares, strict=True)]).sum(0)
    return (mean if tensors[0].is_floating_point() else mean.round()).to(tensors[0].dtype)


def check_tensors(
    payload: Payload, whose: str, shapes: Mapping[str, tuple[int, ...]], dimensions: Mapping[str, int] | None = None
) -> None:
    """Raise ValueError for a payload that has not these tensors, of these shapes, all of finite numbers.

    Args:
        payload: what is looked at.
        whose: the name of the strategy, for the sentence.
        shapes: of each tensor, by name.
        dimensions: the number of dimensions of further tensors, whose sizes may be any.

    """
    check_is_payload(payload, whose)
    expected = {**shapes, **(dimensions or {})}
    if payload.keys() != expected.keys():
        lacking, more = sorted(expected.keys() - payload.keys()), sorted(payload.keys() - expected.keys())
        what = f"lacks {', '.join(lacking[:3])}" if lacking else f"has {', '.join(more[:3])} too"
        raise ValueError(f"what {whose} merges has other tensors: this {what}")
    for name, tensor in payload.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{whose} has {name} of the shape {shapes[name]}, and this is of {tuple(tensor.shape)}")
        if name not in shapes and tensor.dim() != expected[name]:
            raise ValueError(f"{name} of {whose} has {expected[name]} dimensions, and this has {tensor.dim()}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has numbers that are not finite")


def check_is_payload(payload: Payload, whose: str) -> None:
    """Raise ValueError for what is no mapping of names to tensors."""
    if not isinstance(payload, Mapping) or not all(isinstance(tensor, Tensor) for tensor in payload.values()):
        raise ValueError(f"what {whose} merges is a mapping of names to tensors, not a {type(payload).__name__}")
