"""Retention: whether a strategy keeps training inputs, as they came or normalised.

All that can be reached is searched: attributes (also those in `not_state`), containers, modules, optimizers, parts, arrays, what
functions close over, attributes of classes. Gradients left from the last step are not: of a batch of one they are inputs, scaled,
until the next step. Inputs in disguise (averaged, cut, encoded), and what lies in a module's globals, are not found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from clstream import events
from clstream.attributes import CONTAINERS, attributes, code_contents, contents
from clstream.bus import Emitter, on
from clstream.strategy import Strategy

_PLAIN = (str, bytes, int, float, complex, bool, type(None), ModuleType, torch.Generator, torch.device, torch.dtype)

_NEAR = 0.01  # of the inputs' standard deviation: bfloat16 keeps as much


def reachable(root: object) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor and array of numbers that can be reached from an object, with its path."""
    met: dict[int, object] = {}  # the objects themselves, as long as their ids count
    waiting = deque([(type(root).__name__, root)])
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, _PLAIN) or id(value) in met:
            continue
        met[id(value)] = value
        if isinstance(value, Tensor):
            yield path, value.detach()
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            yield path, torch.from_numpy(np.ascontiguousarray(value))
        waiting += [(f"{path}{name}", inner) for name, inner in _inside(value)]


def _inside(value: object) -> Iterator[tuple[str, object]]:
    """Yield what an object holds: with what is no state, keys of dicts, and what is kept on its class."""
    if isinstance(value, type):
        if value.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"):
            yield from ((f".{name}", item) for name, item in vars(value).items() if not isinstance(item, type))
        return
    yield from code_contents(value)
    if isinstance(value, Mapping):
        yield from ((f" key {number}", key) for number, key in enumerate(value))
    if isinstance(value, (Mapping, *CONTAINERS)):
        yield from contents(value)
    for name, item in attributes(value, hidden=True).items():
        if not (name in ("bus", "about") and isinstance(value, Emitter)):  # the run's, which know the stream
            yield f".{name}", item
    for cls in type(value).__mro__ if isinstance(value, Strategy) else ():
        yield f" class {cls.__name__}", cls


def find_inputs(root: object, inputs: Tensor, model: nn.Module | None = None) -> str | None:
    """Return the path of the first tensor that an object holds and that contains one of (n, *input_shape) raw inputs, or None.

    A tensor is read in rows of the size of an input: one as it came, divided by 255, normalised by the inputs' mean and deviation,
    or as the model's stage `input` gives it.
    """
    raw = inputs.flatten(1).double().cpu()
    forms = [raw, raw / 255, (raw - raw.mean()) / raw.std()]
    first = getattr(getattr(model, "stages", None), "input", None)
    if isinstance(first, nn.Module):
        with torch.no_grad():
            normal = first(inputs.to(next(model.parameters()).device)).flatten(1).double().cpu()  # type: ignore[union-attr]
        forms += [normal] if normal.shape == raw.shape else []
    size = raw.shape[1]
    for path, tensor in reachable(root):
        if not tensor.numel() or tensor.numel() % size or tensor.is_complex() or tensor.layout != torch.strided:
            continue
        rows = tensor.double().cpu().reshape(-1, size).nan_to_num()
        for form in forms:
            nearest = torch.cat([torch.cdist(part, form).amin(1) for part in rows.split(4096)])
            if bool((nearest < _NEAR * float(form.std()) * size**0.5).any()):
                return path
    return None


class InputSearch:
    """An observer that searches the strategy for training inputs after each session: `path` says where they are, or is None."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.inputs: list[Tensor] = []

    @on(events.RunStarted)
    def begin(self, event: events.RunStarted) -> None:
        """Remember the strategy, to search it."""
        self.strategy = event.strategy

    @on(events.SessionStarted)
    def note(self, event: events.SessionStarted) -> None:
        """Remember the session's inputs."""
        self.inputs.append(event.session.samples[:].x)

    @on(events.Evaluated)
    def search(self, event: events.Evaluated) -> None:
        """Search the strategy for them, unless the session goes on."""
        if self.path is None and not event.evaluation.within_session:
            self.path = find_inputs(self.strategy, torch.cat(self.inputs), getattr(self.strategy, "model", None))
