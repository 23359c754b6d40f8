"""Restoration: a snapshot is put into objects that were freshly built as those that it was taken of.

An object of the same class at the same place is filled, so whoever knows it (a bound handler, a hook, an optimizer) still does.
What came to be later is built anew, without calling its constructor. Frozen dataclasses, plain tensors and arrays are made anew
too, since others may hold the very same ones, as constants.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clstream.seeds import set_random_state
from clstream.snapshot import CODE, DICTS, SIMPLE, Origin, Snapshot, called, copied, data_of, name_of
from clstream.state import slots


def restore(roots: Sequence[object], snapshot: Snapshot, origin: Origin) -> list[object]:
    """Put a snapshot into `roots`, and return the object of each number.

    Raises ValueError if it doesn't fit: another number of roots, other classes or functions.
    """
    return _Restore(roots, snapshot, origin).made


class _Restore:
    """Puts a snapshot into objects."""

    def __init__(self, roots: Sequence[object], snapshot: Snapshot, origin: Origin) -> None:
        self.nodes: list[dict[str, Any]] = snapshot["nodes"]
        self.origin = origin
        self.places = {} if origin.stream is None else {tuple(place): tensor for place, tensor in data_of(origin.stream)}
        self.found: dict[int, object] = {}
        self.used: set[int] = set()
        self.moved: dict[tuple[int, str], Tensor] = {}
        numbers: list[int] = snapshot["roots"]
        classes = [self.nodes[number].get("class") for number in numbers]
        if classes != [name_of(type(root)) for root in roots]:
            raise ValueError(
                f"the checkpoint is of {', '.join(map(str, classes))}, not of {', '.join(name_of(type(each)) for each in roots)}"
            )
        for number, root in zip(numbers, roots, strict=True):
            self.found[number] = root
            self.used.add(id(root))
        for number in numbers:
            self._fill(self.nodes[number], self.found[number], True, self.found[number])
        self.made = [self.found[number] for number in range(len(self.nodes))]

    def value(self, value: Any, old: Any = None, fill: bool = True) -> Any:
        """Return the value that is written; `old` is what is in its place, which may be filled if `fill`."""
        if not isinstance(value, list):
            return value
        tag, *rest = value
        if tag == "node":
            return self._node(rest[0], old, fill)
        if tag in SIMPLE:
            return SIMPLE[tag][2](rest[0])
        if tag == "kept":
            if not isinstance(old, CODE) or called(old) != rest[0]:
                raise ValueError(
                    f"the checkpoint expects {rest[0]} where there is {called(old)}: build the strategy as it was built then"
                )
            return old
        if tag == "name":
            return self.origin.find(rest[0])
        if tag == "enum":
            return self.origin.find(rest[0])(self.value(rest[1]))
        if tag == "number":
            return np.frombuffer(bytes.fromhex(rest[1]), dtype=rest[0])[0]
        if tag == "tuple":
            items = [self.value(each, _at(old, n), fill) for n, each in enumerate(rest[1])]
            return tuple.__new__(self.origin.find(rest[0]), items) if rest[0] else tuple(items)
        if tag == "frozenset":
            return frozenset(self.value(each) for each in rest[0])
        if tag == "partial":
            function, arguments, keywords = (self.value(each) for each in rest)
            return partial(function, *arguments, **keywords)
        if tag == "method":
            return MethodType(getattr(type(owner := self.value(rest[0])), rest[1]), owner)
        assert self.origin.stream is not None
        if tag == "task":
            return self.origin.stream.tasks[rest[0]]
        return self.origin.stream.session(rest[0]) if tag == "session" else self.origin.stream

    def _node(self, number: int, old: Any, fill: bool) -> object:
        if number in self.found:
            return self.found[number]
        node = self.nodes[number]
        if node["kind"] == "tensor":
            made: object = self._tensor(node, old)
        elif node["kind"] == "array":
            data = node["data"].cpu().numpy().copy()
            made = data.view(np.dtype(node["type"])).reshape(node["size"])
        else:
            same = fill and id(old) not in self.used and self._fits(node, old)
            made = old if same else self._new(node)
            fill = fill and not _frozen(made)
        self.found[number] = made
        self.used.add(id(made))
        if node["kind"] not in ("tensor", "array"):
            self._fill(node, made, fill, old)
        elif "attributes" in node:
            vars(made).update({name: self.value(item) for name, item in node["attributes"].items()})
        return made

    def _fits(self, node: Mapping[str, Any], old: object) -> bool:
        """Return whether an object can be filled with a node."""
        if node["kind"] == "object":
            return name_of(type(old)) == node["class"] and not _frozen(old)
        if node["kind"] == "generator":
            return isinstance(old, torch.Generator) and str(old.device) == node["device"]
        if node["kind"] == "deque":
            return isinstance(old, deque) and old.maxlen == node["maxlen"]
        return bool(type(old).__name__ == node.get("class", node["kind"]))

    def _new(self, node: Mapping[str, Any]) -> object:
        """Return an object to be filled with a node."""
        kind = node["kind"]
        if kind == "object":
            cls = self.origin.find(node["class"])
            if not isinstance(cls, type) or getattr(cls, "__new__") is not object.__new__:  # noqa: B009  # mypy knows better
                raise ValueError(f"the checkpoint has {node['path']} of {node['class']}, which can't be built from its attributes")
            return object.__new__(cls)
        if kind == "generator":
            return torch.Generator(node["device"])
        if kind == "Generator":
            return np.random.Generator(getattr(np.random, node["bits"])())
        if kind in ("RandomState", "Random"):
            return np.random.RandomState() if kind == "RandomState" else random.Random()
        if kind == "deque":
            return deque(maxlen=node["maxlen"])
        return {"list": list, "set": set}[kind]() if kind != "dict" else DICTS[node["class"]]()

    def _fill(self, node: dict[str, Any], made: Any, fill: bool, old: Any) -> None:
        """Give an object the content of its node; `old`, the object itself or another, is what its content is built beside."""
        kind = node["kind"]
        if kind == "generator":
            made.set_state(node["state"].cpu())
        elif kind in ("Generator", "RandomState", "Random"):
            set_random_state(made, node["state"])
        elif kind in ("list", "deque"):
            items = [self.value(each, _at(old, n), fill) for n, each in enumerate(node["items"])]
            made.clear()
            made.extend(items)
        elif kind == "set":
            items = [self.value(each) for each in node["items"]]
            made.clear()
            made.update(items)
        elif kind == "dict":
            pairs = []
            for key, item in node["items"]:
                name = self.value(key)
                pairs.append((name, self.value(item, old.get(name) if isinstance(old, dict) else None, fill)))
            made.clear()
            dict.update(made, pairs)  # a Counter's own would count them
            if isinstance(made, defaultdict):
                made.default_factory = self.value(node["factory"], getattr(old, "default_factory", None))
        else:
            self._fill_object(node, made, fill, old)

    def _fill_object(self, node: dict[str, Any], made: Any, fill: bool, old: Any) -> None:
        before = copied(old) if type(old) is type(made) else {}
        after = {name: self.value(item, before.get(name), fill) for name, item in node["attributes"].items()}
        if made is not old and isinstance(made, (nn.Module, torch.optim.Optimizer)):
            if isinstance(made, nn.Module):
                nn.Module.__init__(made)
            made.__setstate__(after)  # it makes tables of hooks, and a recurrent layer's weak references to its weights
            return
        if made is old:  # in their order too: it decides by which path what is shared is met first
            for name in before:
                object.__delattr__(made, name)
        own = slots(type(made))
        for name, item in after.items():
            if name in own:
                object.__setattr__(made, name, item)  # also where the class is frozen
            else:
                vars(made)[name] = item

    def _tensor(self, node: dict[str, Any], old: object) -> Tensor:
        if "place" in node:
            whole = self.places.get(tuple(node["place"]))
            if whole is None:
                raise ValueError(
                    f"the checkpoint refers to {node['place']} of the stream, which is not there: build the stream as it was"
                )
            data = whole.new_empty(0, dtype=self.value(node["dtype"]))
            data.set_(whole.untyped_storage(), node["offset"], node["size"], node["stride"])
        else:
            data = self._placed(node["data"], torch.device(node["device"]))
        made = data
        if node["parameter"]:
            fits = type(old) is nn.Parameter and id(old) not in self.used and (old.dtype, old.device) == (data.dtype, data.device)
            made = old if fits else nn.Parameter(data, requires_grad=False)  # type: ignore[assignment]  # a parameter, as just seen
            made.data = data
        made.requires_grad_(node["gradient"])
        made.grad = self.value(node["grad"]) if "grad" in node else None
        return made

    def _placed(self, data: Tensor, device: torch.device) -> Tensor:
        """Return a tensor on its device; those that share a storage still do."""
        if data.device == device or data.layout != torch.strided:
            return data.to(device)
        storage = data.untyped_storage()
        key = (storage.data_ptr(), str(device))
        if key not in self.moved:
            self.moved[key] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device)
        moved = torch.empty(0, dtype=data.dtype, device=device)
        return moved.set_(self.moved[key].untyped_storage(), data.storage_offset(), data.shape, data.stride())


def _at(container: object, position: int) -> object:
    return container[position] if isinstance(container, (list, tuple, deque)) and position < len(container) else None


def _frozen(value: object) -> bool:
    """Return whether an object is a frozen dataclass: others may hold the very same one."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)
