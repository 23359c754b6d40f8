"""Restoration: a snapshot is put into objects that were freshly built as those that it was taken of.

An object that was there when the run began is the one at that place now, and is filled; all others are built anew, without calling
their constructors. Nothing is imported, and nothing from the file is called.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial, wraps
from itertools import islice
from types import BuiltinMethodType, CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.forms import CODE, DICTS, NUMPY_BITS, SIMPLE, array_type, copied, set_ways
from clstream.origin import Origin, called, data_of, name_of
from clstream.seeds import set_random_state
from clstream.snapshot import Snapshot
from clstream.state import slots


def restore(roots: Sequence[object], snapshot: Snapshot, origin: Origin, device: str | torch.device = "cpu") -> list[object]:
    """Put a snapshot into `roots`, and return the object of each number. The snapshot can be used again.

    Args:
        roots: objects as those were that it was taken of, when the run began.
        snapshot: what `capture` returned, maybe by way of a file.
        origin: of the roots.
        device: where tensors go that were on a GPU.

    Raises:
        ValueError: if it doesn't fit: other classes or functions, or names that may not be followed.

    """
    return _Restore(roots, snapshot, origin, torch.device(device)).made


class _Restore:
    """Puts a snapshot into objects."""

    def __init__(self, roots: Sequence[object], snapshot: Snapshot, origin: Origin, device: torch.device) -> None:
        self.nodes: list[dict[str, Any]] = snapshot["nodes"]
        self.origin, self.device = origin, device
        self.places = {} if origin.stream is None else {tuple(place): tensor for place, tensor in data_of(origin.stream)}
        self.found: dict[int, Any] = {}
        self.begun: set[int] = set()
        self.moved: dict[tuple[int, str], Tensor] = {}
        numbers: list[int] = snapshot["roots"]
        classes = [self.nodes[number].get("class") for number in numbers]
        here = [name_of(type(root)) for root in roots]
        if classes != here:
            raise ValueError(f"the checkpoint is of {', '.join(map(str, classes))}, not of {', '.join(here)}")
        self.found |= dict(zip(numbers, roots, strict=True))
        for number, node in enumerate(self.nodes):
            if number not in self.found and "origin" in node:
                old = origin.objects.get(node["origin"])
                if self._fits(node, old):
                    self.found[number] = old
                elif "hooks" in node or (node["kind"] == "code" and "text" not in node):
                    was = node.get("called") or node.get("class", "a tensor")
                    now = called(old if isinstance(old, CODE) else type(old))
                    raise ValueError(
                        f"the checkpoint expects {was} at {node['origin']} when the run begins, but there is {now}: build the "
                        "strategy as it was built then"
                    )
        self.made = [self._node(number) for number in range(len(self.nodes))]

    def value(self, value: Any) -> Any:
        """Return the value that is written."""
        if not isinstance(value, list):
            return value
        tag, *rest = value
        if tag == "node":
            return self._node(rest[0])
        if tag in SIMPLE:
            return SIMPLE[tag][2](rest[0])
        if tag == "array type":
            return array_type(rest[0])
        if tag == "name":
            return self.origin.find_code(rest[0])
        if tag == "enum":
            cls = self.origin.find_class(rest[0])
            if not issubclass(cls, Enum):
                raise ValueError(f"the checkpoint is no good: {rest[0]} is no enum")
            return cls(self.value(rest[1]))
        if tag == "number":
            return np.frombuffer(bytes.fromhex(rest[1]), dtype=array_type(rest[0]))[0]
        if tag == "tuple":
            items = [self.value(each) for each in rest[1]]
            if not rest[0]:
                return tuple(items)
            cls = self.origin.find_class(rest[0])
            if not (issubclass(cls, tuple) and hasattr(cls, "_fields")):
                raise ValueError(f"the checkpoint is no good: {rest[0]} is no named tuple")
            return tuple.__new__(cls, items)
        if tag == "frozenset":
            return frozenset(self.value(each) for each in rest[0])
        if tag == "partial":
            function, arguments, keywords = (self.value(each) for each in rest)
            return partial(function, *arguments, **keywords)
        if tag == "method":
            return self._method(self.value(rest[0]), rest[1])
        assert self.origin.stream is not None
        if tag == "task":
            return self.origin.stream.tasks[rest[0]]
        return self.origin.stream.session(rest[0]) if tag == "session" else self.origin.stream.told

    def _method(self, owner: object, name: str) -> Any:
        """Return a bound method; only of what is written in the class, or is a method of Python's own containers."""
        method = getattr(type(owner), name, None)
        if isinstance(method, FunctionType):
            return MethodType(method, owner)
        bound = getattr(owner, name, None)
        if type(owner) not in (list, dict, set, deque, *DICTS.values(), Tensor, nn.Parameter) or not isinstance(
            bound, BuiltinMethodType
        ):
            raise ValueError(f"the checkpoint names the method {name!r} of a {type(owner).__name__}, which is not there")
        return bound

    def _node(self, number: int) -> Any:
        if number not in self.begun:
            self.begun.add(number)
            node = self.nodes[number]
            if node["kind"] == "tensor":
                self._tensor(number, node)
            elif node["kind"] == "code":
                self._function(number, node)
            elif node["kind"] == "array":
                data = node["data"].cpu().numpy().tobytes()
                self.found[number] = np.ndarray(node["size"], self.value(node["type"]), data, order=node["order"]).copy(order="K")
            elif node["kind"] == "set":  # made as it was, since that decides its order
                ways = set_ways([self.value(each) for each in node["items"]])
                self.found[number] = next(islice(ways, node["way"], None))
            else:
                if number not in self.found:
                    self.found[number] = self._new(node)
                self._fill(node, self.found[number])
            for hook in node.get("hooks", ()):
                self.value(hook)  # what it closes over; the hook itself is there
        return self.found[number]

    def _fits(self, node: Mapping[str, Any], old: object) -> bool:
        """Return whether an object can be filled with a node."""
        kind = node["kind"]
        if kind == "object":
            return bool(name_of(type(old)) == node["class"])
        if kind == "tensor":
            same = isinstance(old, Tensor) and isinstance(old, nn.Parameter) == node["parameter"]
            return same and isinstance(old, Tensor) and old.dtype == self._data(node).dtype
        if kind == "code":
            return isinstance(old, CODE) and called(old) == node["called"]
        if kind == "generator":
            return isinstance(old, torch.Generator) and old.device.type == torch.device(node["device"]).type
        if kind == "deque":
            return isinstance(old, deque) and old.maxlen == node["maxlen"]
        if kind in ("array", "set", "Generator"):
            return False  # these are made anew
        return bool(type(old).__name__ == {"namespace": "SimpleNamespace"}.get(kind, node.get("class", kind)))

    def _new(self, node: Mapping[str, Any]) -> object:
        """Return an object to be filled with a node."""
        kind = node["kind"]
        if kind == "object":
            cls: Any = self.origin.find_class(node["class"])
            if cls.__new__ is not object.__new__ or issubclass(cls, Enum):
                raise ValueError(f"the checkpoint has {node['path']} of {node['class']}, which can't be built from its attributes")
            return object.__new__(cls)
        if kind == "Generator":
            if node["bits"] not in NUMPY_BITS:
                raise ValueError(f"the checkpoint is no good: numpy has no bit generator {node['bits']}")
            seeds = {name: self.value(each) for name, each in node.get("seeds", {"entropy": 0}).items()}
            return np.random.Generator(getattr(np.random, node["bits"])(np.random.SeedSequence(**seeds)))
        made: dict[str, Callable[[], object]] = {
            "list": list, "namespace": SimpleNamespace, "RandomState": np.random.RandomState, "Random": random.Random,
            "generator": lambda: torch.Generator(self._device(node["device"])),
            "deque": lambda: deque[Any](maxlen=node["maxlen"]), "dict": lambda: DICTS[node["class"]](),
        }  # fmt: skip
        return made[kind]()

    def _fill(self, node: dict[str, Any], made: Any) -> None:
        """Give an object the content of its node."""
        kind = node["kind"]
        if kind == "generator":
            made.set_state(node["state"].cpu())
        elif kind in ("Generator", "RandomState", "Random"):
            set_random_state(made, node["state"])
        elif kind in ("list", "deque"):
            items = [self.value(each) for each in node["items"]]
            made.clear()
            made.extend(items)
        elif kind == "dict":
            pairs = [(self.value(key), self.value(item)) for key, item in node["items"]]
            made.clear()
            for key, item in pairs:
                made[key] = item
            if isinstance(made, defaultdict):
                made.default_factory = self.value(node["factory"])
        elif kind == "namespace":
            vars(made).clear()
            vars(made).update({name: self.value(item) for name, item in node["attributes"].items()})
        else:
            self._fill_object(node, made)

    def _fill_object(self, node: dict[str, Any], made: Any) -> None:
        new = not vars(made) if hasattr(made, "__dict__") else False
        after = {name: self.value(item) for name, item in node["attributes"].items()}
        if new and isinstance(made, nn.Module):
            nn.Module.__init__(made)  # its tables of hooks
            if type(made).__module__.startswith("torch.nn.modules."):
                made.__setstate__(after)  # a recurrent layer's weak references to its weights
        elif new and isinstance(made, Optimizer):
            Optimizer.__setstate__(made, after)
            if "scheduled" in node:
                _count_steps(made)
        own = slots(type(made))
        for name in copied(made):  # in their order too: it decides by which path what is shared is met first
            object.__delattr__(made, name)
        for name, item in after.items():
            if name in own:
                object.__setattr__(made, name, item)  # also where the class is frozen
            else:
                vars(made)[name] = item

    def _function(self, number: int, node: dict[str, Any]) -> None:
        cells = node.get("cells", [])
        if number not in self.found:
            code = self.origin.find_text(node["text"])
            if len(cells) != len(code.co_freevars):
                raise ValueError(f"the checkpoint has another {node['called']}: build the strategy as it was built then")
            scope = vars(sys.modules[node["text"][0]])
            made = FunctionType(code, scope, code.co_name, None, tuple(CellType() for _ in cells))
            made.__qualname__ = node["called"].partition(":")[2]
            self.found[number] = made
            made.__defaults__, made.__kwdefaults__ = (self.value(each) for each in node["defaults"])
        function = self.found[number]
        for cell, content in zip(getattr(function, "__closure__", None) or (), cells, strict=False):
            if content:
                cell.cell_contents = self.value(content[0])
        if "attributes" in node:
            vars(function).update({name: self.value(item) for name, item in node["attributes"].items()})

    def _tensor(self, number: int, node: dict[str, Any]) -> None:
        data = self._data(node)
        made = self.found.get(number)
        if made is None:
            made = nn.Parameter(data, requires_grad=False) if node["parameter"] else data
            self.found[number] = made
        else:
            made.data = data
        made.requires_grad_(node["gradient"])
        made.grad = self.value(node["grad"]) if "grad" in node else None
        if "attributes" in node:
            vars(made).update({name: self.value(item) for name, item in node["attributes"].items()})

    def _data(self, node: Mapping[str, Any]) -> Tensor:
        if "place" in node:
            whole = self.places.get(tuple(node["place"]))
            if whole is None:
                raise ValueError(
                    f"the checkpoint refers to {node['place']} of the stream, which is not there: build the stream as it was"
                )
            seen = whole.new_empty(0, dtype=self.value(node["dtype"]))
            return seen.set_(whole.untyped_storage(), node["offset"], node["size"], node["stride"])
        data: Tensor = node["data"]
        device = self._device(node["device"])
        if data.layout != torch.strided:
            return data.clone().to(device)
        storage = data.untyped_storage()
        key = (storage.data_ptr(), str(device))
        if key not in self.moved:  # a copy, of each storage once: the snapshot stays as it is, and what was shared is
            self.moved[key] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device, copy=True)
        moved = torch.empty(0, dtype=data.dtype, device=device)
        return moved.set_(self.moved[key].untyped_storage(), data.storage_offset(), data.shape, data.stride())

    def _device(self, written: str) -> torch.device:
        """Return where something goes: what was on the CPU stays there, what was on another device goes to the run's."""
        device = torch.device(written)
        return device if device.type in ("cpu", "meta") else self.device


def _count_steps(optimizer: Any) -> None:
    """Wrap an optimizer's `step` as its scheduler did, who else would warn that it is not called."""
    step = type(optimizer).step

    @wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(optimizer, *args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # the mark by which the scheduler knows it
    optimizer.step = counted
