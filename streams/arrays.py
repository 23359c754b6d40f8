"""The user's own arrays and tensors as samples, or refused in one sentence that says what to do."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from clstream.streams.class_splits import Array
from torch import Tensor

from clstream.stream import Samples

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes of inputs that are kept as they are; of these, models divide uint8 by 255."""

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
"""Dtypes that torch can do little with, and those that hold the same numbers."""


def as_samples(x: Array, y: Array, what: str) -> Samples:
    """Return inputs and labels as Samples, or refuse them in one sentence."""
    labels = as_labels(y, what)
    inputs = as_tensor(x, f"{what} inputs")
    if not inputs.dim():
        raise ValueError(f"{what} inputs must be (samples, ...), not a single number")
    if len(inputs) != len(labels):
        raise ValueError(f"{what} inputs are {len(inputs)}, labels {len(labels)}: there must be one label for each")
    return Samples(as_inputs(inputs, f"{what} inputs"), labels)


def as_inputs(inputs: Tensor, what: str) -> Tensor:
    """Return inputs in a dtype that streams have: integers as they are, all other numbers as float32."""
    inputs = inputs.to(WIDER.get(inputs.dtype, inputs.dtype))
    if inputs.dtype in INTEGERS:
        return inputs
    if not inputs.is_floating_point():
        numbers = ": .float() makes zeros and ones" if inputs.dtype == torch.bool else ""
        raise TypeError(f"{what} must be integers or real numbers, not {inputs.dtype}{numbers}")
    return inputs.to(torch.float32)


def as_labels(y: object, what: str) -> Tensor:
    """Return labels as (n,) int64, or refuse them in one sentence that says what to do."""
    if _are_strings(y):
        raise TypeError(f"{what} labels are strings: relabel=True numbers them, and reports call them what they were")
    labels = as_tensor(y, f"{what} labels")
    if labels.dim() == 2 and len(labels):
        zeros_and_ones = bool(((labels == 0) | (labels == 1)).all())
        one_hot = zeros_and_ones and bool((labels.sum(1) == 1).all())
        instead = "several labels of a sample need target='multilabel', real numbers target='value'"
        instead = "y.flatten() are the labels" if labels.shape[1] == 1 else instead
        instead = f"y.argmax(1) are the labels, or {instead}" if one_hot and labels.shape[1] > 1 else instead
        raise TypeError(f"{what} labels must be one whole number each, not a row of {labels.shape[1]} numbers: {instead}")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex() or labels.dim() != 1:
        hint = (
            ": y.long() makes whole numbers, and real ones need target='value'"
            if labels.dim() == 1 and not labels.is_complex()
            else ""
        )
        raise TypeError(f"{what} labels must be one whole number each, not {tuple(labels.shape)} of {labels.dtype}{hint}")
    if not len(labels):
        raise ValueError(f"{what} set is empty")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"{what} labels must be from 0 up, not {int(labels.min())}: relabel=True numbers any labels")
    return labels


def as_tensor(value: object, what: str) -> Tensor:
    """Return a tensor of numbers from a tensor, an array or nested lists, or refuse what is none of them in one sentence."""
    if hasattr(value, "to_numpy"):
        raise TypeError(f"{what} must be a tensor or an array, not a {type(value).__name__}: its .to_numpy() makes one")
    if hasattr(value, "toarray"):
        raise TypeError(f"{what} must be dense, not a sparse {type(value).__name__}: its .toarray() makes them so")
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
        raise TypeError(f"{what} must be a tensor, an array or a list of numbers, not a {type(value).__name__}")
    try:
        with warnings.catch_warnings():  # a read-only memory map is fine: nothing here writes
            warnings.filterwarnings("ignore", message=".*not writable.*")
            tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{what} must be a tensor, an array or a list of numbers: {' '.join(str(error).split())}") from None
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} must be dense, not sparse: .to_dense() makes them so")
    if tensor.requires_grad:
        raise ValueError(f"{what} require a gradient, which would be kept from batch to batch: .detach() them")
    return tensor


def _are_strings(y: object) -> bool:
    if isinstance(y, np.ndarray):
        return y.dtype.kind in "US" or (y.dtype == object and bool(y.size) and isinstance(y.flat[0], str))
    return isinstance(y, (list, tuple)) and bool(y) and isinstance(y[0], str)


def as_targets(y: object, target: str, what: str) -> Tensor:
    """Return multi-label targets as (n, classes), or values as (n, outputs), float32; or refuse them in one sentence."""
    if _are_strings(y):
        raise TypeError(f"{what} targets are strings, and {target} targets are numbers: {_NUMBERS[target]}")
    rows = as_tensor(y, f"{what} targets")
    if rows.dim() == 1 and target == "value":
        rows = rows[:, None]
    if rows.dim() != 2 or rows.is_complex() or not rows.numel():
        raise TypeError(f"{what} targets must be {_NUMBERS[target]}, not {tuple(rows.shape)} of {rows.dtype}")
    exact = rows if rows.dtype == torch.bool or rows.is_floating_point() else rows.double()  # a large whole number stays what it is
    if target == "multilabel":
        if len(wrong := ((exact != 0) & (exact != 1)).nonzero()):
            row, column = wrong[0].tolist()
            raise ValueError(
                f"{what} targets must be 0 or 1 for each class, and row {row} has {exact[row, column]:g} for class {column}"
            )
        return rows.to(torch.float32)
    rows = rows.to(torch.float32)
    if not rows.isfinite().all():
        row = int((~rows.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{what} targets must be finite, and row {row} is not: clean it, or leave it out")
    return rows


_NUMBERS = {
    "multilabel": "(samples, classes), 0 or 1 for each class",
    "value": "(samples,) or (samples, outputs), real numbers",
}


def with_targets(x: Array, y: object, target: str, what: str) -> Samples:
    """Return inputs and multi-label targets or values as Samples, or refuse them in one sentence."""
    targets = as_targets(y, target, what)
    inputs = as_tensor(x, f"{what} inputs")
    if not inputs.dim() or len(inputs) != len(targets):
        raise ValueError(
            f"{what} inputs are {len(inputs) if inputs.dim() else 'one'}, targets {len(targets)}: there must be one row for each"
        )
    return Samples(as_inputs(inputs, f"{what} inputs"), targets, target=target)
