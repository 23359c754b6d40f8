"""Snapshots: all that some objects hold as plain values and tensors, and back again, every bit of it.

`capture` numbers each object that it meets, so that what was one object, also a tensor's storage, is one again. `restore` puts
a snapshot into the same objects freshly built: an object of the same class at the same place is filled, so whoever knows it (a
bound handler, a hook) still does; what came to be later is built anew. A snapshot holds no code: classes and functions are
written by name, and looked up among what is loaded already, in torch, numpy and the packages that the objects come from.

What can't be written is refused by the path of its attribute. What needn't be: data of the stream, which is there again;
functions that were there from the start; and what a class names in `not_state`.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clstream.seeds import random_state
from clstream.state import attributes
from clstream.stream import Samples, Session, Stream, Subset, Task

Snapshot = dict[str, Any]
"""`nodes`: a dict for each object; `roots`: the numbers of those that it began with. Only plain values, lists, dicts, tensors."""

CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial, type)
DICTS: dict[str, type[Any]] = {each.__name__: each for each in (dict, OrderedDict, defaultdict, Counter)}
SIMPLE: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "complex": (complex, lambda value: [value.real, value.imag], lambda pair: complex(*pair)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda ends: range(*ends)),
    "size": (torch.Size, list, torch.Size),
    "dtype": (torch.dtype, lambda value: str(value).removeprefix("torch."), lambda name: getattr(torch, name)),
    "device": (torch.device, str, torch.device),
    "path": (type(Path()), str, Path),
    "array type": (np.dtype, lambda value: value.str, np.dtype),
}
_TAGS = {kind: name for name, (kind, _, _) in SIMPLE.items()}
_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}
_TORCH_FUNCTIONS = ("torch", "torch.nn.functional", "torch._C._nn")
_PACKAGES = frozenset({"torch", "numpy", "collections", "clstream"})


class CaptureError(TypeError):
    """An attribute that a snapshot can't hold; the message names it."""


class Origin:
    """What is there before a snapshot is restored: the objects as they are built, at the start of a run, and its stream.

    Args:
        roots: the objects.
        stream: what they learn; its data is not written, but referred to.

    """

    def __init__(self, roots: Sequence[object], stream: Stream | None = None) -> None:
        self.stream = stream
        self.data = {} if stream is None else {_storage(tensor): place for place, tensor in data_of(stream)}
        self.code: dict[str, object] = {}  # by path
        self.hooks: dict[int, list[object]] = {}  # by the id of whose they are
        self.classes: dict[str, type] = {}
        found = _Capture(None)
        found.add(roots)
        for path, value in found.code:
            self.code[path] = value
        for value in found.kept:
            self.hooks[id(value)] = _hooks(value)
            for cls in type(value).__mro__:
                self.classes[name_of(cls)] = cls
        self.kept = found.kept  # so that no other object gets the id of one of these

    def find(self, name: str) -> Any:
        """Return a loaded class or function by its name, or refuse it: a file must not choose what is run."""
        if name in self.classes:
            return self.classes[name]
        module, _, path = name.partition(":")
        package = module.partition(".")[0]
        found: Any = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        ours = _PACKAGES | {cls.__module__.partition(".")[0] for cls in self.classes.values()} - sys.stdlib_module_names
        home = (getattr(found, "__module__", None) or module).partition(".")[0]  # where it is from, not who imported it
        if isinstance(found, type):
            known = {package, home} <= ours | {"builtins"}
        elif module in _TORCH_FUNCTIONS:  # only the functions that layers are made of: not its loaders, not its compilers
            known = isinstance(found, (FunctionType, BuiltinFunctionType)) and getattr(found, "__module__", None) in (module, None)
        else:
            known = isinstance(found, FunctionType) and {package, home} <= ours - {"torch"}
        if not known:
            raise ValueError(f"the checkpoint names {name}, which is not loaded here: build the strategy as it was built then")
        return found

    def knows(self, name: str) -> bool:
        """Return whether `find` will find it."""
        try:
            self.find(name)
        except ValueError:
            return False
        return True


def capture(roots: Sequence[object], origin: Origin | None = None) -> tuple[Snapshot, dict[int, int]]:
    """Return a snapshot of what `roots` hold, and the number of each object in it by its id.

    The tensors are the objects' own, not copies. Without an `origin`, functions are taken as they come, and nothing can be
    restored from it: for comparing.

    Raises:
        CaptureError: for an attribute that can't be written; it names it, its class and type.

    """
    found = _Capture(origin)
    numbers = found.add(roots)
    found.trim()
    return {"nodes": found.nodes, "roots": numbers}, found.numbers


def hashes(snapshot: Snapshot, gradients: bool = True) -> dict[str, str]:
    """Return a hash of each attribute, tensor and container by its path; equal ones are equal bit for bit."""
    nodes = snapshot["nodes"]
    left_out = set() if gradients else {node["grad"][1] for node in nodes if "grad" in node}

    def feed(into: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            whole = value.detach().cpu() if value.layout == torch.strided else value.detach().cpu().to_dense()
            whole = whole.contiguous()
            into.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
            into.update(whole.flatten().view(torch.uint8).numpy() if whole.numel() else b"")
        elif isinstance(value, list):
            into.update(f"[{len(value)}".encode())
            if value[:1] == ["node"]:
                into.update(repr(nodes[value[1]]["path"]).encode())
            else:
                for item in value:
                    feed(into, item)
        elif isinstance(value, dict):
            into.update(f"{{{len(value)}".encode())
            for name, item in value.items():
                feed(into, name)
                feed(into, item)
        else:
            into.update(repr(value).encode() + b";")

    def of(*values: Any) -> str:
        into = hashlib.blake2b(digest_size=16)
        for value in values:
            feed(into, value)
        return into.hexdigest()

    found = {}
    for number, node in enumerate(nodes):
        if number in left_out:
            continue
        if node["kind"] == "set":  # its order differs from process to process
            node = node | {"items": sorted(node["items"], key=repr)}
        rest = {name: value for name, value in node.items() if name not in ("attributes", "path", "" if gradients else "grad")}
        found[node["path"]] = of(rest, list(node.get("attributes", ())))
        for name, value in node.get("attributes", {}).items():
            found[_within(node["path"], name)] = of(value)
    return found


def differing(one: Snapshot, other: Snapshot) -> str | None:
    """Return the path of the first attribute, tensor or container in which two snapshots differ; None if none does."""
    ours, theirs = hashes(one), hashes(other)
    return next((path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)), None)


def plain(value: Any, what: str) -> Any:
    """Return a value as a file may hold it: what derives from a plain type is made one; CaptureError for what is none."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.detach()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key, what): plain(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{what}[{number}]") for number, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CaptureError(f"{what} is a {type(value).__name__}: a checkpoint holds None, numbers, strings, tensors, lists and dicts")


def digest(root: object) -> str:
    """Return a hash of all that `root` holds, but for gradients left from the last step: equal digests, equal states."""
    return hashlib.sha256(repr(sorted(hashes(capture([root])[0], gradients=False).items())).encode()).hexdigest()


def data_of(stream: Stream) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield each tensor of a stream's data with its place: task, part, whose field."""
    for task in stream.tasks:
        for kind in ("train", "test", "validation"):
            part: Samples | Subset | None = getattr(task, kind)
            whole = part.source if isinstance(part, Subset) else part
            named = (
                {} if whole is None else {"x": whole.x, "y": whole.y, **{f"extra {key}": each for key, each in whole.extra.items()}}
            )
            for name, tensor in ({"index": part.index} if isinstance(part, Subset) else {}).items() | named.items():
                yield [task.id, kind, name], tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def name_of(thing: Any) -> str:
    """Return the module and name of a class or function."""
    return f"{thing.__module__}:{thing.__qualname__}"


def _within(path: str, name: str) -> str:
    """Return the path of an attribute; a module's own tables of children stay unnamed."""
    return path if name in ("_modules", "_parameters", "_buffers") else f"{path}.{name}"


def _item(path: str, key: object, owner: str) -> str:
    return f"{path}.{key}" if owner in ("_modules", "_parameters", "_buffers") else f"{path}[{key!r}]"


def _hooks(value: object) -> list[object]:
    """Return the hooks of a module or tensor."""
    if isinstance(value, nn.Module):
        tables = [vars(value).get(name) for name in sorted(_HOOKS)]
    elif isinstance(value, Tensor):
        tables = [value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)]
    else:
        tables = []
    return [hook for table in tables if isinstance(table, dict) for hook in table.values()]


def _sorted(items: frozenset[Any]) -> list[Any]:
    """Return the items of a set in an order that is the same in every process, as far as there is one."""
    return sorted(items, key=repr)


def called(code: object) -> str:
    """Return what a function, class or module is called."""
    if isinstance(code, partial):
        return f"partial {called(code.func)}"
    return f"{getattr(code, '__module__', None)}:{getattr(code, '__qualname__', None) or getattr(code, '__name__', code)}"


def copied(value: object) -> dict[str, Any]:
    """Return the attributes of an object as it would have them copied: without those in `not_state`, and torch's hooks."""
    held = attributes(value)
    own = getattr(type(value), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        try:
            state = own(value)
        except RuntimeError:  # torch's parametrized modules refuse to be pickled; their attributes are plain all the same
            state = None
        if isinstance(state, dict):  # a recurrent layer leaves out its weak references so
            held = {name: item for name, item in held.items() if name in state}
    if isinstance(value, nn.Module):
        return {name: item for name, item in held.items() if name not in _HOOKS}
    if isinstance(value, torch.optim.Optimizer):  # a scheduler puts a wrapper around `step`, which only counts
        return {name: item for name, item in held.items() if name != "step" and not name.endswith("_hooks")}
    return held


class _Capture:
    """Writes objects down."""

    def __init__(self, origin: Origin | None) -> None:
        self.origin = origin
        self.nodes: list[dict[str, Any]] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[object] = []  # as long as their ids count
        self.code: list[tuple[str, object]] = []
        self.buffers: dict[int, str] = {}  # of arrays and tensors, by address: who has it

    def add(self, roots: Sequence[object]) -> list[int]:
        """Write the roots: they are numbered before what they hold."""
        numbers = [self._number(root, type(root).__name__) for root in roots]
        for number, root in zip(numbers, roots, strict=True):
            self._write(number, root)
        return numbers

    def _number(self, value: object, path: str) -> int:
        self.numbers[id(value)] = len(self.nodes)
        self.kept.append(value)
        self.nodes.append({"path": path})
        return len(self.nodes) - 1

    def _write(self, number: int, value: object, owner: str = "") -> None:
        node = self.nodes[number]
        node |= self._content(value, node["path"], owner)
        hooks = _hooks(value)
        if hooks and self.origin is not None and [*map(id, self.origin.hooks.get(id(value), []))] != [*map(id, hooks)]:
            raise CaptureError(f"{node['path']} got hooks since the run began, which no checkpoint can hold: register them before")

    def value(self, value: Any, path: str, owner: str = "") -> Any:
        """Return what stands for a value in a snapshot."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in _TAGS or isinstance(value, (torch.dtype, np.dtype)):
            name = _TAGS.get(kind) or ("dtype" if isinstance(value, torch.dtype) else "array type")
            return [name, SIMPLE[name][1](value)]
        if isinstance(value, Enum):
            return ["enum", name_of(kind), self.value(value.value, path)]
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            return ["number", value.dtype.str, value.tobytes().hex()]
        if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            return [
                "tuple",
                "" if kind is tuple else name_of(kind),
                [self.value(each, f"{path}[{n}]") for n, each in enumerate(value)],
            ]
        if kind is frozenset:
            return ["frozenset", [self.value(each, f"{path}[{n}]") for n, each in enumerate(_sorted(value))]]
        if isinstance(value, CODE):
            return self._code(value, path)
        if self.origin is not None and self.origin.stream is not None:
            stream = self.origin.stream
            if isinstance(value, Stream):
                return ["stream"]
            if isinstance(value, Task) and value.id < len(stream.tasks) and stream.tasks[value.id] is value:
                return ["task", value.id]
            if isinstance(value, Session):
                return ["session", value.index]
        if id(value) in self.numbers:
            return ["node", self.numbers[id(value)]]
        number = self._number(value, path)
        self._write(number, value, owner)
        return ["node", number]

    def _code(self, value: Any, path: str) -> Any:
        """Return what stands for a function or class: left as it is if it was there from the start, else its name."""
        self.code.append((path, value))
        if self.origin is None or self.origin.code.get(path) is value:
            return ["kept", called(value)]
        if isinstance(value, partial):
            return ["partial", *(self.value(each, path) for each in (value.func, value.args, value.keywords))]
        if isinstance(value, MethodType) and getattr(type(value.__self__), value.__name__, None) is value.__func__:
            return ["method", self.value(value.__self__, f"{path}.__self__"), value.__name__]
        if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
            if name_of(value) in self.origin.classes:
                return ["name", name_of(value)]
            places = [(value.__module__, value.__qualname__), *((module, value.__name__) for module in _TORCH_FUNCTIONS)]
            for module, name in places:
                found: Any = sys.modules.get(module or "")
                for part in name.split("."):
                    found = getattr(found, part, None)
                if found is value and self.origin.knows(f"{module}:{name}"):
                    return ["name", f"{module}:{name}"]
        raise self._refusal(value, path)

    def _refusal(self, value: object, path: str) -> CaptureError:
        owner, _, name = path.rpartition(".")
        return CaptureError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint can't hold: keep it out of "
            f"the strategy, or name {name!r} in the `not_state` of the class of {owner} if nothing is learned by it"
        )

    def _content(self, value: Any, path: str, owner: str) -> dict[str, Any]:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        if kind is torch.Generator:
            return {"kind": "generator", "device": str(value.device), "state": value.get_state()}
        if kind in (np.random.Generator, np.random.RandomState, random.Random):
            bits = type(value.bit_generator).__name__ if kind is np.random.Generator else ""
            return {"kind": kind.__name__, "bits": bits, "state": random_state(value)}
        if kind in (list, deque):
            items = [self.value(each, f"{path}[{n}]") for n, each in enumerate(value)]
            return {"kind": kind.__name__, "items": items} | ({"maxlen": value.maxlen} if kind is deque else {})
        if kind is set:
            return {"kind": "set", "items": [self.value(each, f"{path}[{n}]") for n, each in enumerate(value)]}
        if DICTS.get(kind.__name__) is kind:
            pairs = [[self.value(key, f"{path} key"), self.value(each, _item(path, key, owner))] for key, each in value.items()]
            factory = {"factory": self.value(value.default_factory, f"{path} factory")} if kind is defaultdict else {}
            return {"kind": "dict", "class": kind.__name__, "items": pairs} | factory
        return self._object(value, path)

    def _object(self, value: object, path: str) -> dict[str, Any]:
        cls = type(value)
        plain = cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
        try:  # Python's own test of whether an object is more than its attributes
            parts: Any = value.__reduce_ex__(2) if plain else (None, None)
        except Exception:  # noqa: BLE001  # whatever a class raises that won't be copied
            parts = (None, None)
        known = isinstance(value, (nn.Module, torch.optim.Optimizer))
        if not known and (parts[1] != (cls,) or any(part is not None for part in parts[3:])):
            raise self._refusal(value, path)
        if self.origin is not None and "<locals>" in cls.__qualname__ and name_of(cls) not in self.origin.classes:
            raise CaptureError(f"{path} is of the class {name_of(cls)}, which is made within a function: no other process has it")
        held = {name: self.value(item, _within(path, name), name) for name, item in copied(value).items()}
        return {"kind": "object", "class": name_of(cls), "attributes": held}

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if type(value) not in (Tensor, nn.Parameter):
            raise self._refusal(value, path)
        if value.requires_grad and not value.is_leaf:
            raise CaptureError(
                f"{path} is a tensor with the graph that it was computed by, which no checkpoint can hold: .detach() it"
            )
        node: dict[str, Any] = {"kind": "tensor", "parameter": isinstance(value, nn.Parameter), "gradient": value.requires_grad}
        place = None if self.origin is None else self.origin.data.get(_storage(value))
        if place is not None and value.numel():
            node |= {"place": place, "dtype": self.value(value.dtype, path)}
            node |= {"offset": value.storage_offset(), "size": list(value.shape), "stride": list(value.stride())}
        else:
            node |= {"data": value.detach(), "device": str(value.device)}
            self.buffers.setdefault(_storage(value), path)
        if value.is_leaf and value.grad is not None:
            node["grad"] = self.value(value.grad, f"{path}.grad")
        if extra := {name: item for name, item in vars(value).items() if name not in ("grad", "data")}:
            node["attributes"] = {name: self.value(item, f"{path}.{name}") for name, item in extra.items()}
        return node

    def _array(self, value: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        whole: Any = value
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        address = whole.__array_interface__["data"][0]
        if value.size and self.origin is not None and self.buffers.setdefault(address, path) != path:
            raise CaptureError(f"{path} shares its memory with {self.buffers[address]}, and a checkpoint would part them: keep one")
        if value.dtype.hasobject:
            raise self._refusal(value, path)
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return {"kind": "array", "type": value.dtype.str, "size": list(value.shape), "data": torch.from_numpy(data.copy())}

    def trim(self) -> None:
        """Have a tensor that is a small part of a storage, and alone in it, written without the rest of it."""
        views: dict[int, list[dict[str, Any]]] = {}
        for node in self.nodes:
            if node.get("kind") == "tensor" and "data" in node and node["data"].layout == torch.strided:
                views.setdefault(_storage(node["data"]), []).append(node)
        for nodes in views.values():
            data = nodes[0]["data"]
            if len(nodes) == 1 and data.numel() * data.element_size() < data.untyped_storage().nbytes():
                nodes[0]["data"] = data.clone()
