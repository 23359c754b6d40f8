"""Capture: a snapshot of all that some objects hold, as plain values and tensors, from which they come back bit for bit.

`capture` numbers each object that it meets, so that what was one object, also a tensor's storage, is one again. An object that
existed when the run began is written with its path at that time: in another process the object at that path stands for it, so
whatever refers to it (a bound handler, a hook, a closure) still does. Later objects are built anew, from the run's own classes.

A snapshot holds no code: classes and functions are written by name, and looked up where `References` allows. What can't come back
exactly is refused here, by the path of its attribute. Not written are the stream's data, which the stream has again, the order of
sets, which is no state, and what a class names in `not_state`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from enum import Enum, Flag
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clstream.attributes import builds_plainly, replaces_method
from clstream.seeds import random_state
from clstream.serialization.callables import is_global, method_of, names_of
from clstream.serialization.class_state import check_class_state, class_state, state_hash
from clstream.serialization.encoding import (
    CODE,
    DICTS,
    MOST_OVERLAPPING,
    NUMPY_BITS,
    SCALAR_TAGS,
    SCALARS,
    CaptureError,
    dtype_to_plain,
    is_no_state,
    overlapping,
    refusal,
    state_of,
)
from clstream.serialization.references import (
    GLOBAL_GENERATORS,
    TABLES,
    References,
    hooks_of,
    qualified_name,
)
from clstream.serialization.storages import Storages, why_not_plain
from clstream.stream import Session, Stream, Task

Snapshot = dict[str, Any]
"""`nodes`: a dict for each object; `roots`: the numbers of those that it began with; `storages`: the bytes of tensors.

Only plain values, lists, dicts and tensors of bytes; no list or dict comes twice.
"""


def references_of(roots: Sequence[object], stream: Stream | None = None) -> References:
    """Return what snapshots of objects may refer to: the objects as they are now, their classes, and the stream they learn."""
    writer = _Capture(None)
    writer.add(roots)
    paths = [node["path"] for node in writer.nodes]
    return References(
        zip(paths, writer.kept, strict=True),
        writer.classes,
        writer.replaced,
        class_state(writer.classes.values(), writer.global_functions, writer.numbers),
        stream,
    )


def capture(roots: Sequence[object], references: References | None = None) -> tuple[Snapshot, dict[int, int]]:
    """Return a snapshot of what `roots` hold, and the number of each object in it by its id.

    The tensors are the objects' own, not copies. Without `references`, functions are taken as they come, and nothing can be
    restored from it: for comparing.

    Raises:
        CaptureError: for an attribute that can't be written or restored; it names it, its class and type.

    """
    writer = _Capture(references)
    try:
        numbers = writer.add(roots)
    except RecursionError:
        raise CaptureError(
            f"{writer.nodes[-1]['path'][:200]} ... is nested too deeply for a checkpoint: keep long chains of objects as a list"
        ) from None
    writer.storages.check_sharing()
    writer.storages.trim(writer.nodes)
    if references is not None:
        check_class_state(references, writer.classes.values(), writer.global_functions, writer.numbers)
        references.sessions = writer.sessions
    return {"nodes": writer.nodes, "roots": numbers, "storages": writer.storages.tensors}, writer.numbers


def _key(key: object, number: int) -> str:
    """Return how a key of a dict is named in paths: an object by its number, since its text may differ from process to process."""
    return repr(key) if isinstance(key, (str, int, float, bool, bytes, type(None))) else f"key {number}"


class _Capture:
    """Writes objects down."""

    def __init__(self, references: References | None) -> None:
        self.references = references
        self.nodes: list[dict[str, Any]] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[object] = []  # as long as their ids count
        self.taken: Counter[str] = Counter()  # paths
        self.seen: set[type] = set()
        self.classes: dict[str, type] = {}  # and those that they derive from, by name
        self.replaced: dict[int, set[str]] = {}
        self.storages = Storages(references)
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
        if self.references is not None and id(value) in self.references.paths:
            node["origin"] = self.references.paths[id(value)]
            if self.references.types[id(value)] is not type(value):
                raise CaptureError(
                    f"{path} was a {self.references.types[id(value)].__qualname__} when the run began, and is a "
                    f"{type(value).__qualname__} now: no checkpoint can hold that (a parametrization, say, must be put on before)"
                )
        self._see(type(value))
        node |= self._content(value, path, owner)
        hooks = hooks_of(value)
        if self.references is not None and [*map(id, self.references.hooks.get(id(value), []))] != [*map(id, hooks)]:
            raise CaptureError(f"{path} got or lost hooks since the run began, which no checkpoint can hold: register them before")
        if hooks:
            node["hooks"] = [self.value(hook, f"{path} hook {number}") for number, hook in enumerate(hooks)]

    def _see(self, cls: type) -> None:
        if cls not in self.seen:
            self.seen.add(cls)
            self.classes |= {qualified_name(base): base for base in cls.__mro__}

    def value(self, value: Any, path: str, owner: str = "") -> Any:
        """Return what stands for a value in a snapshot."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if id(value) in self.numbers:
            return ["node", self.numbers[id(value)]]
        if (written := self._plain(value, path)) is not None:
            return written
        if isinstance(value, CODE):
            return self._code(value, path)
        if self.references is not None and (stream := self.references.stream) is not None:
            if value is stream or value is stream.visible:
                return ["stream"]
            if isinstance(value, Task) and value.id < len(stream.tasks) and stream.tasks[value.id] is value:
                return ["task", value.id]
            if isinstance(value, Session) and self.references.same_session(value):
                self.sessions[id(value)] = value
                return ["session", value.index]
        number = self._number(value, path)
        self._write(number, value, owner)
        return ["node", number]

    def _plain(self, value: Any, path: str) -> list[Any] | None:
        """Return what stands for a value that is no object of its own; None for one that is."""
        kind = type(value)
        try:
            if kind in SCALAR_TAGS:
                written = [SCALAR_TAGS[kind], SCALARS[SCALAR_TAGS[kind]][1](value)]
                if repr(SCALARS[SCALAR_TAGS[kind]][2](written[1])) != repr(value):  # a time zone, say
                    raise refusal(value, path)
                return written
            if isinstance(value, np.dtype):
                return ["array type", dtype_to_plain(value)]
            if isinstance(value, np.generic) and kind is value.dtype.type and kind is not np.void and not value.dtype.hasobject:
                return ["number", dtype_to_plain(value.dtype), value.tobytes().hex()]
        except (TypeError, ValueError):
            raise refusal(value, path) from None
        if isinstance(value, Enum):
            cls = self._class(kind, value, path)
            if kind.__members__.get(str(value._name_)) is value:
                return ["enum", cls, value._name_]
            if isinstance(value, Flag) and type(value._value_) is int:  # several at once have no name
                return ["flag", cls, value._value_]
            raise refusal(value, path)
        if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields") and not getattr(value, "__dict__", None)):
            items = [self.value(item, f"{path}[{n}]") for n, item in enumerate(value)]
            return ["tuple", "" if kind is tuple else self._class(kind, value, path), items]
        if kind is frozenset:
            return ["frozenset", self._set(value, path)]
        for name, generator in GLOBAL_GENERATORS.items():
            if value is generator:
                return ["global", name]
        return None

    def _set(self, items: Iterable[Any], path: str) -> list[Any]:
        """Return the items of a set in an order that their content decides."""

        def content(item: Any) -> str:
            if id(item) in self.numbers:
                return f"node {self.numbers[id(item)]:09d}"
            return state_hash(item, self.numbers)

        return [self.value(item, f"{path}[{n}]") for n, item in enumerate(sorted(items, key=content))]

    def _class(self, cls: type, value: object, path: str) -> str:
        """Return the name of a class of which a value may have to be made."""
        self._see(cls)
        if self.references is not None:
            try:
                if self.references.find_class(qualified_name(cls)) is not cls:
                    raise refusal(value, path)
            except ValueError:
                raise refusal(value, path) from None
        return qualified_name(cls)

    def _code(self, value: Any, path: str) -> Any:
        """Return what stands for a function or class."""
        if isinstance(value, partial):
            if type(value) is not partial or vars(value):
                raise refusal(value, path)
            keywords = [[name, self.value(item, f"{path}.{name}")] for name, item in value.keywords.items()]
            return ["partial", self.value(value.func, f"{path}.func"), self.value(value.args, f"{path}.args"), keywords]
        owner = getattr(value, "__self__", None)
        if isinstance(value, (MethodType, BuiltinFunctionType)) and not isinstance(owner, (type(None), ModuleType, type)):
            written = ["method", self.value(owner, f"{path}.__self__"), value.__name__]
            if self.references is not None:
                try:
                    if method_of(owner, value.__name__, self.references) != value:
                        raise refusal(value, path)
                except ValueError:
                    raise refusal(value, path) from None
            elif isinstance(value, MethodType) and id(value.__func__) not in self.numbers:
                self._number(value.__func__, f"{path}.__func__")  # a run holds it when it begins
                self.nodes[-1] |= {"kind": "code", "called": qualified_name(value.__func__)}
            return written
        if self.references is not None and id(value) not in self.references.paths:
            for name in names_of(value):
                try:
                    if self.references.find_code(name) is value:
                        return ["name", name]
                except ValueError:
                    continue
        number = self._number(value, path)
        self._write(number, value)
        return ["node", number]

    def _function(self, value: Any, node: dict[str, Any], path: str) -> dict[str, Any]:
        """Return the content of a function, class or module that the run holds since it began: what it closes over."""
        if self.references is not None and "origin" not in node:
            raise refusal(value, path)
        content: dict[str, Any] = {"kind": "code", "called": qualified_name(value)}
        if isinstance(value, FunctionType) and not is_global(value):  # a global one's is no state of one strategy
            content["cells"] = [self._cell(cell, f"{path} {name}") for name, cell in
                                zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)]  # fmt: skip
            content["defaults"] = [
                self.value(item, f"{path} defaults") for item in (value.__defaults__, value.__kwdefaults__)
            ]  # fmt: skip
            content["attributes"] = self._attributes(value, vars(value), path)
        return content

    def _cell(self, cell: Any, path: str) -> Any:
        try:
            return [self.value(cell.cell_contents, path)]
        except ValueError:  # nothing was bound to it yet
            return []

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
            return {"kind": "Generator", "bits": self.value(value.bit_generator, f"{path}.bit_generator")}
        if kind is np.random.RandomState and type(value._bit_generator) is np.random.MT19937:
            bits = self.value(value._bit_generator, f"{path}.bit_generator")  # others may draw from it
            return {"kind": "RandomState", "bits": bits, "state": random_state(value)}
        if kind is random.Random:
            return {"kind": "Random", "state": random_state(value)}
        if NUMPY_BITS.get(kind.__name__) is kind:
            return {
                "kind": "bits", "class": kind.__name__, "state": random_state(value),
                "seeds": self.value(value.seed_seq, f"{path}.seed_seq"),
            }  # fmt: skip
        if kind is np.random.SeedSequence:
            names = ("entropy", "spawn_key", "pool_size", "n_children_spawned")
            return {"kind": "seeds", "attributes": {name: self.value(getattr(value, name), f"{path}.{name}") for name in names}}
        if kind in (list, deque):
            items = [self.value(item, f"{path}[{n}]") for n, item in enumerate(value)]
            return {"kind": kind.__name__, "items": items} | ({"maxlen": value.maxlen} if kind is deque else {})
        if kind is set:
            return {"kind": "set", "items": self._set(value, path)}
        if DICTS.get(kind.__name__) is kind and not {*getattr(value, "__dict__", ())} - {"__orig_class__"}:
            base = path.rpartition(".")[0] if owner in TABLES else path  # a module's tables of children stay unnamed
            pairs = []
            for n, (key, item) in enumerate(value.items()):
                inner = f"{base}.{key}" if owner in TABLES else f"{path}[{_key(key, n)}]"
                pairs.append([self.value(key, f"{path} key {n}"), self.value(item, inner)])
            factory = {"factory": self.value(value.default_factory, f"{path} factory")} if kind is defaultdict else {}
            return {"kind": "dict", "class": kind.__name__, "items": pairs} | factory
        if kind is SimpleNamespace:
            return {"kind": "namespace", "attributes": self._attributes(value, vars(value), path)}
        if kind is RemovableHandle and (self.references is None or "origin" in self.nodes[self.numbers[id(value)]]):
            return {"kind": "handle"}  # of a hook, and those are the same as when the run began
        return self._object(value, path)

    def _object(self, value: object, path: str) -> dict[str, Any]:
        cls = type(value)
        if not builds_plainly(cls) or isinstance(value, torch.jit.ScriptModule):
            raise refusal(value, path)
        if self.references is not None and "origin" not in self.nodes[self.numbers[id(value)]]:
            try:
                if self.references.find_buildable(qualified_name(cls)) is not cls:
                    raise refusal(value, path)
            except ValueError:
                raise refusal(value, path) from None
        scheduled = {"scheduled": True} if isinstance(value, Optimizer) and "step" in vars(value) else {}
        return {
            "kind": "object",
            "class": qualified_name(cls),
            "attributes": self._attributes(value, state_of(value), path),
        } | scheduled

    def _attributes(self, value: object, held: dict[str, object], path: str) -> dict[str, Any]:
        """Return what stands for the attributes of an object; refuse those by which it would be another class's."""
        for name in held:
            if replaces_method(type(value), name):
                self.replaced.setdefault(id(value), set()).add(name)
                if self.references is not None and name not in self.references.replaced.get(id(value), ()):
                    raise CaptureError(
                        f"{path}.{name} stands in for what {type(value).__qualname__} defines by that name, and did not when the "
                        "run began: no checkpoint can hold that. Give it another name, or set it in the constructor"
                    )
        return {name: self.value(item, f"{path}.{name}", name) for name, item in held.items()}

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if value.requires_grad and not value.is_leaf:
            raise CaptureError(
                f"{path} is a tensor with the graph that it was computed by, which no checkpoint can hold: .detach() it (or is it "
                "of torch.nn.utils.weight_norm, spectral_norm or prune? torch.nn.utils.parametrizations can be held)"
            )
        odd = why_not_plain(value)
        if odd is not None:
            raise CaptureError(f"{path} is a tensor {odd}, which a checkpoint can't hold: keep a plain one")
        node: dict[str, Any] = {"kind": "tensor", "parameter": isinstance(value, nn.Parameter), "gradient": value.requires_grad}
        if value.layout == torch.strided:
            node |= {"dtype": str(value.dtype).removeprefix("torch."), "device": str(value.device)}
            node |= {"offset": value.storage_offset(), "size": list(value.shape), "stride": list(value.stride())}
            node |= self.storages.locate(value, path)
            if overlapping(node) * value.element_size() > MOST_OVERLAPPING:
                raise CaptureError(f"{path} is a tensor expanded to more than 1 GiB: keep it as it was before .expand()")
        else:
            values = {"indices": value._indices(), "values": value._values()}
            node |= {"kind": "sparse", "size": list(value.shape), "coalesced": value.is_coalesced()}
            node |= {name: self.value(part.detach(), f"{path}.{name}") for name, part in values.items()}
        if value.is_leaf and value.grad is not None:
            node["grad"] = self.value(value.grad, f"{path}.grad")
        if held := {name: item for name, item in vars(value).items() if not is_no_state(type(value), name)}:
            node["attributes"] = self._attributes(value, held, path)
        return node

    def _array(self, value: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        if value.dtype.hasobject:
            raise refusal(value, path)
        order = "C" if value.flags.c_contiguous else "F" if value.flags.f_contiguous else ""
        if not order:
            raise CaptureError(f"{path} is a view with gaps, which a checkpoint would close: keep np.ascontiguousarray(...) of it")
        try:
            kind = dtype_to_plain(value.dtype)
        except ValueError:
            raise refusal(value, path) from None
        self.storages.add_array(value, path)
        data = torch.from_numpy(np.frombuffer(value.tobytes(order="A"), np.uint8).copy())
        return {
            "kind": "array", "type": kind, "size": list(value.shape), "order": order, "data": data,
            "writeable": value.flags.writeable,
        }  # fmt: skip

    @property
    def global_functions(self) -> list[FunctionType]:
        """The functions of modules that the objects hold."""
        return [value for value in self.kept if isinstance(value, FunctionType) and is_global(value)]
