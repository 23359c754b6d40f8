"""Restore: a snapshot is put into objects that were freshly built in the same way as those that it was taken of.

An object that existed when the run began is filled in place; all others are built anew, without calling their constructors.
Nothing is imported, and nothing from the file is called. First all objects exist, empty; then each gets its content; last come
dicts and sets whose keys are objects, which may be asked for their hash.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, Flag
from functools import partial, wraps
from types import CellType, SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clstream.attributes import replaces_method, slots
from clstream.seeds import set_random_state
from clstream.serialization.callables import is_global, method_of
from clstream.serialization.capture import Snapshot
from clstream.serialization.encoding import (
    CODE,
    DICTS,
    NUMPY_BITS,
    SCALARS,
    check_plain,
    dtype_from_plain,
    is_no_state,
    state_of,
    view_of,
)
from clstream.serialization.references import GLOBAL_GENERATORS, TABLES, References, qualified_name, tensors_of

_ANEW = ("array", "Generator", "RandomState", "bits", "seeds", "sparse")


def restore(
    roots: Sequence[object], snapshot: Snapshot, references: References, device: str | torch.device = "cpu"
) -> list[object]:
    """Put a snapshot into `roots`, and return the object of each number. The snapshot can be used again.

    Args:
        roots: objects as those were that it was taken of, when the run began.
        snapshot: what `capture` returned, maybe by way of a file.
        references: of the roots.
        device: where tensors go that were on a GPU.

    Raises:
        ValueError: if it doesn't fit: other classes or functions, names that may not be followed, or what is no snapshot at all.

    """
    try:
        return _Restore(roots, snapshot, references, torch.device(device)).objects
    except Exception as error:  # a file may hold anything, and whatever comes of it is the file's fault
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the checkpoint can't be restored: {reason[:300]}") from error


class _Restore:
    """Puts a snapshot into objects."""

    def __init__(self, roots: Sequence[object], snapshot: Snapshot, references: References, device: torch.device) -> None:
        check_plain(snapshot)
        self.nodes: list[dict[str, Any]] = snapshot["nodes"]
        self.storages: list[Tensor] = snapshot["storages"]
        self.references, self.device = references, device
        self.places = {} if references.stream is None else {tuple(place): tensor for place, tensor in tensors_of(references.stream)}
        self.moved: dict[tuple[int, str], Tensor] = {}
        for storage in self.storages:
            if storage.dtype != torch.uint8 or storage.dim() != 1 or storage.numel() != storage.untyped_storage().nbytes():
                raise ValueError("it has a storage that is not plain bytes")
        numbers: list[int] = snapshot["roots"]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"it begins with the objects {numbers}")
        classes = [self.nodes[number].get("class") for number in numbers]
        expected = [qualified_name(type(root)) for root in roots]
        if classes != expected:
            raise ValueError(f"it is of {', '.join(map(str, classes))}, not of {', '.join(expected)}")
        self.objects_by_number: dict[int, Any] = dict(zip(numbers, roots, strict=True))
        self.new: set[int] = set()
        self.objects = [self._object(number) for number in range(len(self.nodes))]
        if len({*map(id, self.objects)}) != len(self.objects):
            raise ValueError("two of its objects have the same place")
        for number in sorted(range(len(self.nodes)), key=lambda number: _late(self.nodes[number])):
            self._fill(self.nodes[number], self.objects[number])
        for module in self.objects:
            if isinstance(module, nn.Module):
                _check_module(module)

    def value(self, value: Any) -> Any:
        """Return the value that is written."""
        if not isinstance(value, list):
            return value
        tag, *rest = value
        if tag == "node":
            return self._object(rest[0])
        if tag in SCALARS:
            return SCALARS[tag][2](rest[0])
        if tag == "array type":
            return dtype_from_plain(rest[0])
        if tag == "name":
            return self.references.find_code(rest[0])
        if tag in ("enum", "flag"):
            kind = self.references.find_class(rest[0])
            if not issubclass(kind, Flag if tag == "flag" else Enum):
                raise ValueError(f"{rest[0]} is no {tag}")
            return kind(int(rest[1])) if tag == "flag" else kind.__members__[rest[1]]
        if tag == "number":
            return np.ndarray((), dtype_from_plain(rest[0]), bytes.fromhex(rest[1]) or b"\0")[()]
        if tag == "tuple":
            items = [self.value(item) for item in rest[1]]
            if not rest[0]:
                return tuple(items)
            cls = self.references.find_class(rest[0])
            if not issubclass(cls, tuple) or len(getattr(cls, "_fields", (None, *items))) != len(items):
                raise ValueError(f"{rest[0]} is no named tuple of {len(items)}")
            return tuple.__new__(cls, items)
        if tag == "frozenset":
            return frozenset(self.value(item) for item in rest[0])
        if tag == "partial":
            keywords = {name: self.value(item) for name, item in rest[2]}
            return partial(self.value(rest[0]), *self.value(rest[1]), **keywords)
        if tag == "method":
            return method_of(self.value(rest[0]), rest[1], self.references)
        if tag == "global":
            return GLOBAL_GENERATORS[rest[0]]
        if self.references.stream is None or tag not in ("task", "session", "stream"):
            raise ValueError(f"nothing is written as {tag!r}")
        if tag == "task":
            return self.references.stream.tasks[_position(rest[0])]
        return self.references.stream.session(rest[0]) if tag == "session" else self.references.stream.visible

    def _object(self, number: int) -> Any:
        """Return the object of a number: the one that was there when the run began, or a new one that is to be filled."""
        if _position(number) not in self.objects_by_number:
            node = self.nodes[number]
            old = self.references.objects.get(node["origin"]) if "origin" in node else None
            if old is not None and self._fits(node, old):
                self.objects_by_number[number] = old
            elif "hooks" in node or node["kind"] in ("code", "handle"):
                was, now = (
                    node.get("called") or node.get("class", "a tensor"),
                    qualified_name(old if isinstance(old, CODE) else type(old)),
                )
                raise ValueError(
                    f"it expects {was} at {node.get('origin')} when the run begins, but there is {now}: build the strategy as it "
                    "was built then"
                )
            else:
                self.new.add(number)
                self.objects_by_number[number] = self._new(node)
            if node["kind"] == "tensor":
                self._set_data(node, self.objects_by_number[number], number in self.new)
        return self.objects_by_number[number]

    def _fits(self, node: Mapping[str, Any], old: object) -> bool:
        """Return whether an object can be filled with a node."""
        kind = node["kind"]
        if kind in _ANEW:
            return False
        if kind == "object":
            return bool(qualified_name(type(old)) == node["class"])
        if kind == "tensor":
            return isinstance(old, Tensor) and old.layout == torch.strided and isinstance(old, nn.Parameter) == node["parameter"]
        if kind == "code":
            return isinstance(old, CODE) and qualified_name(old) == node["called"]
        if kind == "generator":
            return isinstance(old, torch.Generator) and old.device.type == torch.device(node["device"]).type
        if kind == "deque":
            return isinstance(old, deque) and old.maxlen == node["maxlen"]
        if kind == "handle":
            return isinstance(old, RemovableHandle)
        return bool(type(old).__name__ == {"namespace": "SimpleNamespace"}.get(kind, node.get("class", kind)))

    def _new(self, node: Mapping[str, Any]) -> object:
        """Return an object to be filled with a node."""
        build: dict[str, Callable[[], object]] = {
            "list": list, "set": set, "namespace": SimpleNamespace, "Random": random.Random,
            "deque": lambda: deque[Any](maxlen=node["maxlen"]), "dict": lambda: DICTS[node["class"]](),
            "generator": lambda: torch.Generator(self._device(node["device"])),
            "object": lambda: self._new_object(node), "array": lambda: self._array(node),
            "tensor": lambda: self._tensor(node), "sparse": lambda: self._sparse(node),
            "seeds": lambda: self._seeds(node), "bits": lambda: self._bits(node),
            "Generator": lambda: np.random.Generator(self._of_kind(node["bits"], "bits")),
            "RandomState": lambda: np.random.RandomState(self._of_kind(node["bits"], "bits")),
        }  # fmt: skip
        return build[node["kind"]]()

    def _of_kind(self, value: Any, kind: str) -> Any:
        """Return the object that another one is made of; it must be of some kind, so that there is no circle."""
        tag, number = value
        if tag != "node" or self.nodes[number]["kind"] != kind:
            raise ValueError(f"what has to be {kind} is not")
        return self._object(number)

    def _new_object(self, node: Mapping[str, Any]) -> object:
        cls = self.references.find_buildable(node["class"])
        new: Any = object.__new__(cls)
        if isinstance(new, nn.Module):
            nn.Module.__init__(new)  # its tables of hooks
        elif isinstance(new, Optimizer):
            new.defaults = {}
            Optimizer.__setstate__(new, {})  # likewise
        return new

    def _seeds(self, node: Mapping[str, Any]) -> np.random.SeedSequence:
        given = {name: self.value(item) for name, item in node["attributes"].items()}
        if not 4 <= given["pool_size"] <= 64:
            raise ValueError(f"numpy has no seeds with a pool of {given['pool_size']}")
        return np.random.SeedSequence(**given)

    def _bits(self, node: Mapping[str, Any]) -> Any:
        seeds = self._of_kind(node["seeds"], "seeds") if node["seeds"] is not None else None
        bits = NUMPY_BITS[node["class"]](0 if seeds is None else seeds)
        if seeds is None:
            bits._legacy_seeding(0)  # it has no sequence of seeds then, as that of a RandomState
        return bits

    def _array(self, node: Mapping[str, Any]) -> Any:
        data = node["data"].cpu().numpy().tobytes()
        array = np.ndarray(node["size"], dtype_from_plain(node["type"]), data, order=node["order"]).copy(order="K")
        array.setflags(write=bool(node["writeable"]))
        return array

    def _tensor(self, node: Mapping[str, Any]) -> Tensor:
        data = self._data(node)
        return nn.Parameter(data, requires_grad=False) if node["parameter"] else data

    def _sparse(self, node: Mapping[str, Any]) -> Tensor:
        indices, values = (self._of_kind(node[name], "tensor") for name in ("indices", "values"))
        data = torch.sparse_coo_tensor(
            indices.clone(), values, node["size"], check_invariants=True, is_coalesced=bool(node["coalesced"])
        )
        return nn.Parameter(data, requires_grad=False) if node["parameter"] else data

    def _set_data(self, node: Mapping[str, Any], tensor: Tensor, new: bool) -> None:
        if not new:
            tensor.grad = None
            tensor.requires_grad_(False)
            tensor.data = self._data(node)

    def _fill(self, node: dict[str, Any], target: Any) -> None:
        """Give an object the content of its node."""
        kind = node["kind"]
        if kind == "generator":
            target.set_state(node["state"].cpu())
        elif kind in ("RandomState", "Random", "bits"):
            set_random_state(target, node["state"])
        elif kind in ("list", "deque"):
            items = [self.value(item) for item in node["items"]]
            target.clear()
            target.extend(items)
        elif kind == "set":
            target.clear()
            target.update([self.value(item) for item in node["items"]])
        elif kind == "dict":
            pairs = [(self.value(key), self.value(item)) for key, item in node["items"]]
            target.clear()
            for key, item in pairs:
                target[key] = item
            if "factory" in node:
                target.default_factory = self.value(node["factory"])
        elif kind in ("tensor", "sparse"):
            target.requires_grad_(bool(node["gradient"]))
            target.grad = self.value(node["grad"]) if "grad" in node else None
            self._fill_attributes(target, node.get("attributes", {}), list(vars(target)))
        elif kind == "code":
            self._fill_function(target, node)
        elif kind in ("object", "namespace"):
            self._fill_attributes(target, node["attributes"], list(state_of(target)))
            if isinstance(target, Optimizer) and "scheduled" in node and "step" not in vars(target):
                _count_steps(target)

    def _fill_attributes(self, target: Any, attributes: Mapping[str, Any], before: list[str]) -> None:
        """Set the attributes of an object in place of those that it had; none that would stand in for a method of its class."""
        cls = type(target)
        own, replaced = slots(cls), self.references.replaced.get(id(target), set())
        for name in attributes:
            if is_no_state(cls, name) or (replaces_method(cls, name) and name not in replaced):
                raise ValueError(f"it sets {name!r} of a {cls.__qualname__}, which is no state")
        values = {name: self.value(item) for name, item in attributes.items()}
        for name in before:
            if name in own:
                own[name].__delete__(target)
            else:
                del vars(target)[name]
        for name, item in values.items():
            if name in own:
                own[name].__set__(target, item)  # also where the class is frozen
            else:
                vars(target)[name] = item  # in their order: it decides by which path what is shared is met first

    def _fill_function(self, function: Any, node: Mapping[str, Any]) -> None:
        """Give a function that the run holds since it began what it closes over."""
        if "cells" not in node:
            return
        if is_global(function):
            raise ValueError(f"it would change {node['called']}, which is not this run's alone")
        cells = function.__closure__ or ()
        if len(cells) != len(node["cells"]):
            raise ValueError(f"it has another {node['called']}: build the strategy as it was built then")
        for cell, content in zip(cells, node["cells"], strict=True):
            if content:
                cell.cell_contents = self.value(content[0])
            elif cell != CellType():
                del cell.cell_contents
        function.__defaults__, function.__kwdefaults__ = (self.value(item) for item in node["defaults"])
        self._fill_attributes(function, node["attributes"], list(vars(function)))

    def _data(self, node: Mapping[str, Any]) -> Tensor:
        if "place" in node:
            whole = self.places.get(tuple(node["place"]))
            if whole is None:
                raise ValueError(f"it refers to {node['place']} of the stream, which is not there: build the stream as it was")
            storage = torch.empty(0, dtype=torch.uint8, device=whole.device)
            return view_of(node, storage.set_(whole.untyped_storage()))
        device = self._device(node["device"])
        key = (node["storage"], str(device))
        if key not in self.moved:  # a copy, of each storage once: the snapshot stays as it is, and what was shared is
            self.moved[key] = self.storages[_position(node["storage"])].to(device, copy=True)
        return view_of(node, self.moved[key])

    def _device(self, written: str) -> torch.device:
        """Return where something goes: what was on the CPU stays there, what was on another device goes to the run's."""
        device = torch.device(written)
        return device if device.type == "cpu" else self.device


def _position(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"nothing is at {number!r}")
    return number


def _late(node: Mapping[str, Any]) -> int:
    """Return when to fill an object: those that ask others for their hash come after these."""

    def objects(value: Any) -> bool:
        return isinstance(value, list) and (value[:1] == ["node"] or any(map(objects, value)))

    def frozen(value: Any) -> bool:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (isinstance(value, list) and value[:1] == ["frozenset"] and objects(value)) or any(map(frozen, parts))

    if node["kind"] == "set" or node["kind"] == "dict":
        keys = node["items"] if node["kind"] == "set" else [key for key, _ in node["items"]]
        if any(map(objects, keys)):
            return 2
    return int(frozen(node))


def _check_module(module: nn.Module) -> None:
    """Refuse tables of a module that hold what torch doesn't expect there."""
    for name, kind in zip(TABLES, (nn.Module, nn.Parameter, Tensor), strict=True):
        table = vars(module)[name]
        if not isinstance(table, dict) or not all(isinstance(part, (kind, type(None))) for part in table.values()):
            raise ValueError(f"{name} of a {type(module).__qualname__} holds what it can't")
    if isinstance(module, nn.RNNBase):
        module._flat_weight_refs = [None if weight is None else ref(weight) for weight in module._flat_weights]


def _count_steps(optimizer: Any) -> None:
    """Wrap an optimizer's `step` as its scheduler did, who else would warn that it is not called."""
    step = type(optimizer).step

    @wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(optimizer, *args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # the mark by which the scheduler knows it
    optimizer.step = counted
