"""Stiffness of weights: the step towards the reference, what is pruned, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from clstream.params import check_choice


def pull_share(stiffness: Tensor, lr: float) -> Tensor:
    """Return 2 lr b / (1 + 2 lr b), how much of the way to its reference a weight goes; exactly 1 where b is infinite."""
    pull = 2 * lr * stiffness
    return torch.where(stiffness.isinf(), 1.0, pull / (1 + pull))


def proximal(weight: Tensor, reference: Tensor, stiffness: Tensor, lr: float) -> Tensor:
    """Return (weight + 2 lr b reference) / (1 + 2 lr b): the minimum of b (w - reference)^2 + (w - weight)^2 / (2 lr).

    Where b is 0 that is the weight, where it is infinite the reference, exactly. All are of one shape, and finite but for b.
    """
    return torch.lerp(weight, reference, pull_share(stiffness, lr))


def penalty(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], stiffness: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of b (w - reference)^2 over all weights, a scalar; those of infinite stiffness give 0."""
    total = torch.zeros((), device=next(iter(weights.values())).device)
    for name, b in stiffness.items():
        total = total + (b.masked_fill(b.isinf(), 0) * (weights[name] - reference[name]).square()).sum()
    return total


def smallest(weights: Mapping[str, Tensor], stiffness: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return for each tensor which of its weights, bool, are among the ceil(share n) of all n with the smallest b w^2.

    Of those that are equal the first ones are.
    """
    scores = torch.cat([(stiffness[name] * weight.detach().square()).flatten() for name, weight in weights.items()])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.sort(stable=True).indices[: math.ceil(round(share * len(scores), 6))]] = True
    parts = chosen.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def quantiles(stiffness: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return for each layer three quantiles of its finite stiffnesses, 0 without any, and the share of those that are infinite."""
    layers: dict[str, list[Tensor]] = {}
    for name, b in stiffness.items():
        layers.setdefault(name.rpartition(".")[0].removeprefix("stages.") or name, []).append(b.flatten())
    rows = {}
    for layer, parts in layers.items():
        b = torch.cat(parts)
        finite = b[b.isfinite()].sort().values
        row = {f"q{percent}": float(finite[(len(finite) - 1) * percent // 100]) if len(finite) else 0.0 for percent in (10, 50, 90)}
        rows[layer] = row | {"held": 1 - len(finite) / max(1, len(b))}
    return rows


def check_groups(policy: object, groups: tuple[str, ...]) -> None:
    """Refuse what is no stiffness for each of some groups. Raises ValueError."""
    if not isinstance(policy, Mapping) or not policy:
        raise ValueError(f"a policy of groups must name at least one of {', '.join(groups)}, with its stiffness, not {policy!r}")
    for name, b in policy.items():
        check_choice(groups, **{"a group of the policy": name})
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not b >= 0:
            raise ValueError(f"the policy's stiffness of {name} must be a number of at least 0, or infinity, not {b!r}")
