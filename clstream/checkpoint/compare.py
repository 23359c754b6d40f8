"""Comparison of two checkpoints: whether they are equal bit for bit, and what differs first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clstream.serialization.compare import first_difference


def difference(checkpoint: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the first of what two checkpoints differ in: an attribute, a metric, a generator; None if no bit differs.

    Clock readings, the memory of the process and what observers keep are left out.
    """
    for name in ("position", "step"):
        if checkpoint[name] != other[name]:
            return f"{name}: {checkpoint[name]} and {other[name]}"
    if path := first_difference(checkpoint["strategy"], other["strategy"]):
        return path
    for name in ("random", "evaluation", "cost"):
        ours, theirs = (
            {key: repr(_bits(value)) for key, value in state[name].items() if not key.endswith(("_seconds", "peak_bytes"))}
            for state in (checkpoint, other)
        )
        if keys := [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]:
            return f"{name}.{keys[0]}"
    return None


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.cpu().contiguous().numpy().tobytes()
    return value
