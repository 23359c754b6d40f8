"""Snapshots: all that some objects hold as plain values and tensors, and back again, every bit of it.

`capture` numbers each object that it meets, so that what was one object, also a tensor's storage, is one again. What was there
when the run began is written with its place at that time: in another process the object at that place stands for it, so whoever
knows it (a bound handler, a hook, a closure) still does. What came to be later is built anew, from classes that are loaded.

A snapshot holds no code: classes and functions are written by name, and looked up among what is loaded. What can't be restored is
refused here, by the path of its attribute. Not written are the data of the stream, which is there again, and what a class names in
`not_state`.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from enum import Enum
from functools import partial
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.forms import CODE, DICTS, NUMPY_BITS, SIMPLE, TAGS, CaptureError, copied, set_ways
from clstream.origin import TABLES, TORCH_FUNCTIONS, Origin, called, hooks_of, loaded, name_of, storage_of, text_of
from clstream.seeds import random_state
from clstream.stream import Session, Stream, Task

Snapshot = dict[str, Any]
"""`nodes`: a dict for each object; `roots`: the numbers of those that it began with. Only plain values, lists, dicts, tensors."""


def origin_of(roots: Sequence[object], stream: Stream | None = None) -> Origin:
    """Return the origin of snapshots of objects, as they are now, and of what they learn."""
    found = _Capture(None)
    found.add(roots)
    paths = [node["path"] for node in found.nodes]
    return Origin(zip(paths, found.kept, strict=True), found.classes, stream)


def capture(roots: Sequence[object], origin: Origin | None = None) -> tuple[Snapshot, dict[int, int]]:
    """Return a snapshot of what `roots` hold, and the number of each object in it by its id.

    The tensors are the objects' own, not copies. Without an `origin`, functions are taken as they come, and nothing can be
    restored from it: for comparing.

    Raises:
        CaptureError: for an attribute that can't be written or restored; it names it, its class and type.

    """
    found = _Capture(origin)
    try:
        numbers = found.add(roots)
    except RecursionError:
        raise CaptureError(
            f"{found.nodes[-1]['path'][:200]} ... is nested too deeply for a checkpoint: keep long chains of objects as a list"
        ) from None
    found.check_memory()
    found.trim()
    if origin is not None:
        origin.sessions = found.sessions
    return {"nodes": found.nodes, "roots": numbers}, found.numbers


def _key(key: object, number: int) -> str:
    """Return how a key of a dict is named in paths: an object by its number, since its text may differ from process to process."""
    return repr(key) if isinstance(key, (str, int, float, bool, bytes, type(None))) else f"key {number}"


class _Capture:
    """Writes objects down."""

    def __init__(self, origin: Origin | None) -> None:
        self.origin = origin
        self.nodes: list[dict[str, Any]] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[object] = []  # as long as their ids count
        self.taken: Counter[str] = Counter()  # paths
        self.classes: dict[str, type] = {}
        self.memory: list[tuple[int, int, bool, str]] = []  # of arrays and storages: from, to, whether an array, whose
        self.sessions: dict[int, Session] = {}

    def add(self, roots: Sequence[object]) -> list[int]:
        """Write the roots: they are numbered before what they hold."""
        numbers = [self._number(root, type(root).__name__) for root in roots]
        for number, root in zip(numbers, roots, strict=True):
            self._write(number, root)
        return numbers

    def _number(self, value: object, path: str) -> int:
        self.taken[path] += 1
        self.numbers[id(value)] = len(self.nodes)
        self.kept.append(value)
        self.nodes.append({"path": path if self.taken[path] == 1 else f"{path}#{self.taken[path]}"})
        return len(self.nodes) - 1

    def _write(self, number: int, value: object, owner: str = "") -> None:
        node = self.nodes[number]
        path = node["path"]
        if self.origin is not None and id(value) in self.origin.paths:
            node["origin"] = self.origin.paths[id(value)]
        self._see(type(value))
        node |= self._content(value, path, owner)
        hooks = hooks_of(value)
        if self.origin is not None and [*map(id, self.origin.hooks.get(id(value), []))] != [*map(id, hooks)]:
            raise CaptureError(f"{path} got or lost hooks since the run began, which no checkpoint can hold: register them before")
        if hooks:
            node["hooks"] = [self.value(hook, f"{path} hook {number}") for number, hook in enumerate(hooks)]

    def _see(self, cls: type) -> None:
        for each in cls.__mro__:
            self.classes[name_of(each)] = each

    def value(self, value: Any, path: str, owner: str = "") -> Any:
        """Return what stands for a value in a snapshot."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in TAGS:
            return [TAGS[kind], SIMPLE[TAGS[kind]][1](value)]
        if isinstance(value, np.dtype):
            return ["array type", repr(np.lib.format.dtype_to_descr(value))]
        if isinstance(value, Enum):
            return ["enum", self._class(kind, value, path), self.value(value.value, path)]
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            return ["number", repr(np.lib.format.dtype_to_descr(value.dtype)), value.tobytes().hex()]
        if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            items = [self.value(each, f"{path}[{n}]") for n, each in enumerate(value)]
            return ["tuple", "" if kind is tuple else self._class(kind, value, path), items]
        if kind is frozenset:
            return ["frozenset", [self.value(each, f"{path}[{n}]") for n, each in enumerate(sorted(value, key=repr))]]
        if isinstance(value, CODE):
            return self._code(value, path)
        if self.origin is not None and (stream := self.origin.stream) is not None:
            if value is stream or value is stream.told:
                return ["stream"]
            if isinstance(value, Task) and value.id < len(stream.tasks) and stream.tasks[value.id] is value:
                return ["task", value.id]
            if isinstance(value, Session) and self.origin.same_session(value):
                self.sessions[id(value)] = value
                return ["session", value.index]
        if id(value) in self.numbers:
            return ["node", self.numbers[id(value)]]
        number = self._number(value, path)
        self._write(number, value, owner)
        return ["node", number]

    def _class(self, cls: type, value: object, path: str) -> str:
        """Return the name of a class of which an object may have to be built."""
        self._see(cls)
        if self.origin is not None:
            try:
                if self.origin.find_class(name_of(cls)) is not cls:
                    raise self._refusal(value, path)
            except ValueError:
                raise self._refusal(value, path) from None
        return name_of(cls)

    def _code(self, value: Any, path: str) -> Any:
        """Return what stands for a function or class."""
        if isinstance(value, partial):
            return ["partial", *(self.value(each, f"{path}.{name}") for name, each in
                                 (("func", value.func), ("args", value.args), ("keywords", value.keywords)))]  # fmt: skip
        owner = getattr(value, "__self__", None)
        if isinstance(value, (MethodType, BuiltinFunctionType)) and not isinstance(owner, (type(None), ModuleType, type)):
            if hasattr(type(owner), value.__name__):
                return ["method", self.value(owner, f"{path}.__self__"), value.__name__]
            raise self._refusal(value, path)
        if self.origin is not None and not isinstance(value, ModuleType):
            for module, name in _names(value):
                if loaded(f"{module}:{name}") is value:
                    try:
                        self.origin.find_code(f"{module}:{name}")
                    except ValueError:
                        continue
                    return ["name", f"{module}:{name}"]
        if id(value) in self.numbers:
            return ["node", self.numbers[id(value)]]
        number = self._number(value, path)
        self._write(number, value)
        return ["node", number]

    def _function(self, value: Any, node: dict[str, Any], path: str) -> dict[str, Any]:
        """Return the content of a function, class or module that has no name to find it by: what it closes over."""
        content: dict[str, Any] = {"kind": "code", "called": called(value)}
        if not isinstance(value, FunctionType):
            if self.origin is not None and "origin" not in node:
                raise self._refusal(value, path)
            return content
        if self.origin is not None and "origin" not in node:
            try:
                content["text"] = text_of(value.__module__, value.__code__)
                self.origin.find_text(content["text"])
            except ValueError:
                raise self._refusal(value, path) from None
            content["defaults"] = [
                self.value(value.__defaults__, f"{path} defaults"),
                self.value(value.__kwdefaults__, f"{path} defaults"),
            ]
        if loaded(name_of(value)) is not value:  # what the whole module shares is no state of this function
            content["cells"] = [self._cell(cell, f"{path} {name}") for name, cell in
                                zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)]  # fmt: skip
            if vars(value):
                content["attributes"] = {name: self.value(item, f"{path}.{name}") for name, item in vars(value).items()}
        return content

    def _cell(self, cell: Any, path: str) -> Any:
        try:
            return [self.value(cell.cell_contents, path)]
        except ValueError:  # nothing was bound to it yet
            return []

    def _refusal(self, value: object, path: str) -> CaptureError:
        owner, _, name = path.rpartition(".")
        return CaptureError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint can't hold: keep it out of "
            f"the strategy, or name {name!r} in the `not_state` of the class of {owner} if nothing is learned by it, or run "
            "without checkpoints (--checkpoint_every 0)"
        )

    def _content(self, value: Any, path: str, owner: str) -> dict[str, Any]:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        if isinstance(value, CODE):
            return self._function(value, self.nodes[self.numbers[id(value)]], path)
        if kind is torch.Generator:
            return {"kind": "generator", "device": str(value.device), "state": value.get_state()}
        if kind is np.random.Generator:
            bits, seeds = value.bit_generator, value.bit_generator.seed_seq
            if type(bits).__name__ not in NUMPY_BITS:
                raise self._refusal(value, path)
            node: dict[str, Any] = {"kind": "Generator", "bits": type(bits).__name__, "state": random_state(value)}
            names = ("entropy", "spawn_key", "pool_size", "n_children_spawned")
            if isinstance(seeds, np.random.SeedSequence):
                node["seeds"] = {name: self.value(getattr(seeds, name), path) for name in names}
            return node
        if kind in (np.random.RandomState, random.Random):
            return {"kind": kind.__name__, "state": random_state(value)}
        if kind in (list, deque):
            items = [self.value(each, f"{path}[{n}]") for n, each in enumerate(value)]
            return {"kind": kind.__name__, "items": items} | ({"maxlen": value.maxlen} if kind is deque else {})
        if kind is set:
            items = [self.value(each, f"{path}[{n}]") for n, each in enumerate(value)]
            return {"kind": "set", "items": items, "way": 0 if self.origin is None else _way(value, path)}
        if DICTS.get(kind.__name__) is kind:
            base = path.rpartition(".")[0] if owner in TABLES else path  # a module's tables of children stay unnamed
            pairs = []
            for n, (key, each) in enumerate(value.items()):
                inner = f"{base}.{key}" if owner in TABLES else f"{path}[{_key(key, n)}]"
                pairs.append([self.value(key, f"{path} key {n}"), self.value(each, inner)])
            factory = {"factory": self.value(value.default_factory, f"{path} factory")} if kind is defaultdict else {}
            return {"kind": "dict", "class": kind.__name__, "items": pairs} | factory
        if kind is SimpleNamespace:
            return {
                "kind": "namespace",
                "attributes": {name: self.value(each, f"{path}.{name}") for name, each in vars(value).items()},
            }
        return self._object(value, path)

    def _object(self, value: object, path: str) -> dict[str, Any]:
        cls = type(value)
        plainly = cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
        if not isinstance(value, (nn.Module, Optimizer)):
            try:  # Python's own test of whether an object is more than its attributes
                parts: Any = object.__reduce_ex__(value, 2) if plainly else (None, None)
            except Exception as error:  # noqa: BLE001  # whatever a class raises that won't be copied
                if "cannot pickle" in str(error) or not hasattr(value, "__dict__"):
                    raise self._refusal(value, path) from None
                parts = (None, (cls,))  # its own __getstate__ fails, which isn't asked for
            if parts[1] != (cls,) or any(part is not None for part in parts[3:]):
                raise self._refusal(value, path)
        if self.origin is not None and "origin" not in self.nodes[self.numbers[id(value)]]:
            self._class(cls, value, path)
            if cls.__new__ is not object.__new__:
                raise self._refusal(value, path)
        held = {name: self.value(item, f"{path}.{name}", name) for name, item in copied(value).items()}
        scheduled = {"scheduled": True} if isinstance(value, Optimizer) and "step" in vars(value) else {}
        return {"kind": "object", "class": name_of(cls), "attributes": held} | scheduled

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if type(value) not in (Tensor, nn.Parameter):
            raise self._refusal(value, path)
        if value.requires_grad and not value.is_leaf:
            raise CaptureError(
                f"{path} is a tensor with the graph that it was computed by, which no checkpoint can hold: .detach() it"
            )
        node: dict[str, Any] = {"kind": "tensor", "parameter": isinstance(value, nn.Parameter), "gradient": value.requires_grad}
        place = None if self.origin is None else self.origin.data.get(storage_of(value))
        if place is not None and value.numel():
            node |= {"place": place, "dtype": self.value(value.dtype, path)}
            node |= {"offset": value.storage_offset(), "size": list(value.shape), "stride": list(value.stride())}
        else:
            node |= {"data": value.detach(), "device": str(value.device)}
            if value.layout == torch.strided and value.device.type == "cpu" and value.numel():
                begin = storage_of(value)
                self.memory.append((begin, begin + value.untyped_storage().nbytes(), False, path))
        if value.is_leaf and value.grad is not None:
            node["grad"] = self.value(value.grad, f"{path}.grad")
        if extra := {name: item for name, item in vars(value).items() if name not in ("grad", "data")}:
            node["attributes"] = {name: self.value(item, f"{path}.{name}") for name, item in extra.items()}
        return node

    def _array(self, value: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        if value.dtype.hasobject:
            raise self._refusal(value, path)
        order = "C" if value.flags.c_contiguous else "F" if value.flags.f_contiguous else ""
        if not order:
            raise CaptureError(f"{path} is a view with gaps, which a checkpoint would close: keep np.ascontiguousarray(...) of it")
        if value.size:
            begin = value.__array_interface__["data"][0]
            self.memory.append((begin, begin + value.nbytes, True, path))
        data = torch.from_numpy(np.frombuffer(value.tobytes(order="A"), np.uint8).copy())
        return {"kind": "array", "type": self.value(value.dtype, path), "size": list(value.shape), "order": order, "data": data}

    def check_memory(self) -> None:
        """Refuse an array that shares its memory with another one or with a tensor: they would be parted."""
        if self.origin is None:
            return
        end, before = 0, ""
        any_array = False
        for begin, until, array, path in sorted(self.memory):
            if begin < end and (array or any_array):
                raise CaptureError(f"{path} shares its memory with {before}, and a checkpoint would part them: keep one of them")
            if until > end:
                end, before, any_array = until, path, array

    def trim(self) -> None:
        """Say which tensors share a storage; have one that is alone in it, and small, written without the rest of it."""
        views: dict[int, list[dict[str, Any]]] = {}
        for node in self.nodes:
            if node.get("kind") == "tensor" and "data" in node and node["data"].layout == torch.strided and node["data"].numel():
                views.setdefault(storage_of(node["data"]), []).append(node)
        for nodes in views.values():
            data: Tensor = nodes[0]["data"]
            for node in nodes[1:]:
                node["shares"] = nodes[0]["path"]
            extent = 1 + sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
            if len(nodes) == 1 and extent * data.element_size() < data.untyped_storage().nbytes():
                nodes[0]["data"] = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=data.device).copy_(data)


def _names(value: Any) -> list[tuple[str, str]]:
    """Return the module and name under which a function or class may be found."""
    if isinstance(value, type):
        return [(value.__module__, value.__qualname__)]
    name = getattr(value, "__name__", "")
    own = [(value.__module__, value.__qualname__)] if getattr(value, "__module__", None) and hasattr(value, "__qualname__") else []
    return [*own, *((module, name) for module in TORCH_FUNCTIONS)]


def _way(items: set[Any], path: str) -> int:
    """Return which of the ways to make a set gives this one's order; 0 where the order differs from process to process anyway."""
    if not all(isinstance(item, int) for item in items):
        return 0
    order = list(items)
    for number, made in enumerate(islice(set_ways(order), None if len(order) < 5000 else 8)):  # many take their time
        if list(made) == order and sys.getsizeof(made) == sys.getsizeof(items):  # with the same room, it also grows the same way
            return number
    warnings.warn(
        f"the set {path} may come in another order after the run was resumed: where its order matters, go through it sorted",
        RuntimeWarning,
        stacklevel=2,
    )
    return 0
