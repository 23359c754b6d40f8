"""References: the objects that exist when a run begins, and the classes and functions that a snapshot may name."""

from __future__ import annotations

import random
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clstream.attributes import builds_plainly
from clstream.stream import Samples, Session, Stream, Subset, content_hash

TABLES = ("_modules", "_parameters", "_buffers")

HOOKS = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set", *TABLES} | {"_compiled_call_impl"}

_SORTED_HOOKS = sorted(HOOKS)

GLOBAL_GENERATORS: dict[str, Any] = {
    "python": random._inst,  # of which random.random and others are methods
    "numpy": np.random.mtrand._rand,
    "torch": torch.default_generator,
}

PLAIN_TYPES = {cls.__name__: cls for cls in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

_TORCH_CLASSES: dict[str, Any] = {"torch.nn.modules.": nn.Module, "torch.optim.": (Optimizer, LRScheduler, nn.Module)}

_BLOCKS = ("clstream.fisher.", "clstream.memory.", "clstream.models.", "clstream.stream.")
"""Modules and packages whose classes any run may be built of."""
_NEVER_OWN = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy"}

_INSTALLED = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"),
                    *site.getsitepackages(), site.getusersitepackages()})  # fmt: skip


class References:
    """What a snapshot refers to by name or place: the objects as they are when a run begins, their classes, and the stream.

    Args:
        objects: each object, with its path.
        classes: of these, by name, also of those that are no objects of their own: enums, named tuples.
        replaced: by the id of an object, its attributes that stand in for a method of its class.
        class_state: hashes of what classes keep, by name.
        stream: what is learned; its data is not written, but referred to.

    """

    def __init__(
        self,
        objects: Iterable[tuple[str, object]],
        classes: Mapping[str, type],
        replaced: Mapping[int, set[str]],
        class_state: Mapping[str, str],
        stream: Stream | None = None,
    ) -> None:
        self.stream, self.replaced, self.class_state = stream, dict(replaced), dict(class_state)
        self.data = {} if stream is None else {storage_id(tensor): (place, tensor) for place, tensor in tensors_of(stream)}
        self.contents = {key: _content_hash(tensor, stream) for key, (_, tensor) in self.data.items()}
        self.sessions: dict[int, Session] = {}  # those that were compared with the stream's, by id
        self.classes = dict(classes)
        modules = {cls.__module__ for cls in classes.values()}
        modules |= {name for cls in classes.values() for name in getattr(cls, "checkpoint_modules", ())}
        self.modules = users_modules(modules) | {name for name in modules if name.partition(".")[0] not in _NEVER_OWN}
        self.objects: dict[str, object] = {}  # by the path that they have at the start
        self.paths: dict[int, str] = {}  # the other way round, by id
        self.types: dict[int, type] = {}
        self.hooks: dict[int, list[object]] = {}
        for path, value in objects:
            hooks = hooks_of(value)
            if isinstance(value, (Tensor, np.ndarray)) and not isinstance(value, nn.Parameter) and not hooks:
                continue  # made anew: to keep the old ones would take their memory for the whole run
            self.objects[path], self.paths[id(value)] = value, path
            self.types[id(value)], self.hooks[id(value)] = type(value), hooks

    def find_class(self, name: str) -> type[Any]:
        """Return a class that may be named in a snapshot: the run's own, or of torch's layers; ValueError for any other.

        The run's own are those of what it holds when it begins and of the modules that these are written in, those of the user's
        own modules, and what strategies are built of. Nothing is imported.
        """
        cls = self.classes.get(name) or lookup_loaded(name)
        if not isinstance(cls, type) or qualified_name(cls) != name or not (
            name in self.classes
            or ((cls.__module__ in self.modules or f"{cls.__module__}.".startswith(_BLOCKS)) and not hasattr(cls, "__del__"))
            or any(cls.__module__.startswith(prefix) and issubclass(cls, kinds) for prefix, kinds in _TORCH_CLASSES.items())
        ):  # fmt: skip
            raise ValueError(f"it names {name!r}, which is no class that this run is built of")
        return cls

    def find_buildable(self, name: str) -> type[Any]:
        """Return a class whose objects may be built from their attributes, without calling anything of it."""
        cls = self.find_class(name)
        if not builds_plainly(cls) or vars(object)["__new__"] is not cls.__new__ or issubclass(cls, (Enum, torch.jit.ScriptModule)):
            raise ValueError(f"it has an object of {name}, which can't be built from its attributes")
        return cls

    def find_code(self, name: str) -> Any:
        """Return what may be called: a function of torch.nn.functional, a layer, an optimizer, a plain type; else ValueError.

        What the run itself holds when it begins is there, and needs no name.
        """
        module, _, path = name.partition(":")
        if module == "builtins" and path in PLAIN_TYPES:
            return PLAIN_TYPES[path]
        if module == functional.__name__:
            function = vars(functional).get(path)
            if not path.startswith("_") and (
                isinstance(function, BuiltinFunctionType) or (isinstance(function, FunctionType) and function.__module__ == module)
            ):
                return function
        elif module.startswith(tuple(_TORCH_CLASSES)):
            return self.find_class(name)
        raise ValueError(f"it names {name!r}, which no checkpoint may call")

    def same_session(self, session: Session) -> bool:
        """Return whether a session is the stream's of that number, as it would be again."""
        if self.sessions.get(id(session)) is session:
            return True
        if self.stream is None or not 0 <= session.index < len(self.stream):
            return False
        other = self.stream.session(session.index)
        names = ("task_if_shown", "epochs", "batch_size", "seed", "drop_last")
        if any(getattr(session, name) != getattr(other, name) for name in names):
            return False
        samples, again = session.samples, other.samples
        if isinstance(samples, Subset) and isinstance(again, Subset):
            same = samples.source is again.source and samples.transform is again.transform
            same = same and samples.class_mask is again.class_mask
            return same and torch.equal(samples.index, again.index)
        return type(samples) is type(again) and torch.equal(samples.x, again.x) and torch.equal(samples.y, again.y)

    def changed(self, storage: int) -> bool:
        """Return whether a tensor of the stream's data was changed in place since the run began."""
        return self.contents[storage] != _content_hash(self.data[storage][1], self.stream)


def _content_hash(tensor: Tensor, stream: Stream | None) -> bytes | int:
    """Return what changes with a tensor of the data; of data that is too large to be resident, only whether torch wrote to it."""
    return content_hash(tensor) if stream is not None and stream.resident and tensor.dim() else tensor._version


def tensors_of(stream: Stream) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield each tensor of a stream's data with its place: task, part, whose field."""
    for task in stream.tasks:
        for kind in ("train", "test", "validation"):
            part: Samples | Subset | None = getattr(task, kind)
            whole = part.source if isinstance(part, Subset) else part
            if whole is None:
                continue
            tensors = {"x": whole.x, "y": whole.y} | {f"extra {name}": rows for name, rows in whole.extra.items()}
            if isinstance(part, Subset):
                tensors["index"] = part.index
                if part.class_mask is not None:
                    tensors["class_mask"] = part.class_mask
            for name, tensor in tensors.items():
                yield [task.id, kind, name], tensor


def users_modules(names: Iterable[str]) -> set[str]:
    """Return which of some loaded modules are the user's own, and the user's own modules that these import."""
    own, seen, waiting = set[str](), set[str](), [*names]
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or module is None:
            continue
        seen.add(name)
        if not _is_own(module):
            continue
        own.add(name)
        for value in list(vars(module).values()):
            other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(other, str):
                waiting.append(other)
    return own


def _is_own(module: ModuleType) -> bool:
    """Return whether a module is neither Python's, nor installed, nor ours: a file of the user's, a script or a notebook."""
    if module.__name__ == "__main__":
        return True
    file = getattr(module, "__file__", None)
    top = module.__name__.partition(".")[0]
    if not isinstance(file, str) or top in {"clstream", *_NEVER_OWN}:
        return False
    return not _is_installed(file)


@cache
def _is_installed(file: str) -> bool:
    """Return whether a file is in one of Python's own folders; there are thousands, and each run asks for all."""
    return any(Path(file).is_relative_to(folder) for folder in _INSTALLED)


def qualified_name(code: object) -> str:
    """Return the module and the qualified name of a function or class, "module:Class.method"; of a module its name."""
    return f"{getattr(code, '__module__', None)}:{getattr(code, '__qualname__', None) or getattr(code, '__name__', code)}"


def lookup_loaded(name: str) -> Any:
    """Return what a qualified name stands for among the loaded modules, or None; nothing is imported."""
    module, _, path = name.partition(":")
    value: Any = sys.modules.get(module)
    for part in path.split("."):
        value = vars(value).get(part) if isinstance(value, (ModuleType, type)) else None
    return value


def storage_id(tensor: Tensor) -> int:
    """Return what tensors that share their memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def hooks_of(value: object) -> list[object]:
    """Return the hooks of a module, an optimizer or a tensor."""
    if isinstance(value, nn.Module):
        tables = [value.__dict__.get(name) for name in _SORTED_HOOKS]
    elif isinstance(value, Optimizer):
        tables = [table for name, table in sorted(vars(value).items()) if name.endswith("_hooks")]
    elif isinstance(value, Tensor):
        tables = [value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)]
    else:
        tables = []
    return [hook for table in tables if isinstance(table, dict) for hook in table.values()]
