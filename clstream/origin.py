"""The origin of a snapshot: what is there when a run begins, and where names in a snapshot may lead."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from inspect import unwrap
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clstream.stream import Samples, Session, Stream, Subset

TABLES = ("_modules", "_parameters", "_buffers")
HOOKS = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set", *TABLES}
TORCH_FUNCTIONS = ("torch", "torch.nn.functional", "torch._C._nn")
_NOT_THEIRS = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "clstream"}


class Origin:
    """What is there before a snapshot is restored: the objects as they are when a run begins, and its stream.

    Args:
        objects: each object, with its path.
        classes: of these, by name, also of those that are no objects of their own: enums, named tuples.
        stream: what is learned; its data is not written, but referred to.

    """

    def __init__(self, objects: Iterable[tuple[str, object]], classes: Mapping[str, type], stream: Stream | None = None) -> None:
        self.stream = stream
        self.data = {} if stream is None else {storage_of(tensor): place for place, tensor in data_of(stream)}
        self.sessions: dict[int, Session] = {}  # those that were compared with the stream's, by id
        self.classes = dict(classes)
        outside = {"torch", "numpy", *sys.stdlib_module_names}
        self.modules = {cls.__module__ for cls in classes.values() if cls.__module__.partition(".")[0] not in outside}
        self.objects: dict[str, object] = {}  # by the path that they have at the start
        self.paths: dict[int, str] = {}  # the other way round, by id
        self.hooks: dict[int, list[object]] = {}
        for path, value in objects:
            hooks = hooks_of(value)
            if isinstance(value, (Tensor, np.ndarray)) and not isinstance(value, nn.Parameter) and not hooks:
                continue  # made anew: to keep the old ones would take their memory for the whole run
            self.objects[path], self.paths[id(value)], self.hooks[id(value)] = value, path, hooks

    def find_class(self, name: str) -> type:
        """Return a loaded class whose objects may be built from their attributes; ValueError for any other."""
        found = self.classes.get(name) or loaded(name)
        if not isinstance(found, type) or not (
            name in self.classes
            or issubclass(found, (Enum, nn.Module, Optimizer, LRScheduler))
            or (issubclass(found, tuple) and hasattr(found, "_fields"))
            or ((_theirs(found) or found.__module__.startswith("clstream.")) and not hasattr(found, "__del__"))
        ):
            raise ValueError(f"the checkpoint names {name}, which is not loaded here: build the strategy as it was built then")
        return found

    def find_code(self, name: str) -> Any:
        """Return a loaded function or class that may be called: one of the user's, or of torch's layers; else ValueError.

        Not more of torch, nor of others: a file must not lead to loaders and compilers.
        """
        found, module = loaded(name), name.partition(":")[0]
        if isinstance(found, type):
            known = found.__module__ == "builtins" or name in self.classes or (found.__module__ == module and _theirs(found))
        elif module in TORCH_FUNCTIONS:
            kinds = BuiltinFunctionType if module == "torch" else (FunctionType, BuiltinFunctionType)
            known = isinstance(found, kinds) and getattr(found, "__module__", None) in (module, None)
        else:
            known = isinstance(found, FunctionType) and found.__module__ == module and (_theirs(found) or module in self.modules)
        if not known:
            raise ValueError(f"the checkpoint names {name}, which is not loaded here: build the strategy as it was built then")
        return found

    def find_text(self, key: Sequence[Any]) -> CodeType:
        """Return the code of a function that is written within another one, in a loaded module of the user's; else ValueError."""
        module = sys.modules.get(key[0])
        if module is not None and (key[0].partition(".")[0] not in _NOT_THEIRS or key[0] in self.modules):
            for code in _codes(module):
                if text_of(key[0], code) == list(key):
                    return code
        raise ValueError(
            f"the checkpoint has a function written in {key[0]}, line {key[2]}, which is not there: is it another version?"
        )

    def same_session(self, session: Session) -> bool:
        """Return whether a session is the stream's of that number, as it would be again."""
        if self.sessions.get(id(session)) is session:
            return True
        if self.stream is None or not 0 <= session.index < len(self.stream):
            return False
        other = self.stream.session(session.index)
        one, two = session.samples, other.samples
        same = (session.task, session.epochs, session.batch_size, session.seed, session.drop_last) == (
            other.task,
            other.epochs,
            other.batch_size,
            other.seed,
            other.drop_last,
        )
        if isinstance(one, Subset) and isinstance(two, Subset):
            return same and one.source is two.source and torch.equal(one.index, two.index) and one.transform is two.transform
        return same and type(one) is type(two) and torch.equal(one.x, two.x) and torch.equal(one.y, two.y)


def data_of(stream: Stream) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield each tensor of a stream's data with its place: task, part, whose field."""
    for task in stream.tasks:
        for kind in ("train", "test", "validation"):
            part: Samples | Subset | None = getattr(task, kind)
            whole = part.source if isinstance(part, Subset) else part
            named = (
                {}
                if whole is None
                else {"x": whole.x, "y": whole.y} | {f"extra {name}": rows for name, rows in whole.extra.items()}
            )
            if isinstance(part, Subset):
                named["index"] = part.index
            for name, tensor in named.items():
                yield [task.id, kind, name], tensor


def name_of(thing: Any) -> str:
    """Return the module and name of a class or function."""
    return f"{thing.__module__}:{thing.__qualname__}"


def called(code: object) -> str:
    """Return what a function, class or module is called."""
    return f"{getattr(code, '__module__', None)}:{getattr(code, '__qualname__', None) or getattr(code, '__name__', code)}"


def text_of(module: str, code: CodeType) -> list[Any]:
    """Return what tells one piece of code of a module from all others."""
    return [module, code.co_name, code.co_firstlineno, hashlib.sha256(code.co_code).hexdigest()[:16]]


def loaded(name: str) -> Any:
    """Return what is loaded under a name, or None; nothing is imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _theirs(thing: Any) -> bool:
    """Return whether a class or function is the user's own, or of a package of theirs: not Python's, torch's, numpy's, or ours."""
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] not in _NOT_THEIRS


def _codes(module: ModuleType) -> Iterator[CodeType]:
    """Yield the code of each function that is written in a module, also within others."""

    def within(code: CodeType) -> Iterator[CodeType]:
        for each in code.co_consts:
            if isinstance(each, CodeType):
                yield each
                yield from within(each)

    classes = [thing for thing in vars(module).values() if isinstance(thing, type) and thing.__module__ == module.__name__]
    for thing in [*vars(module).values(), *(each for cls in classes for each in vars(cls).values())]:
        inner = getattr(unwrap(thing) if callable(thing) else thing, "__code__", None) or getattr(
            getattr(thing, "fget", None) or getattr(thing, "__func__", None), "__code__", None
        )
        if isinstance(inner, CodeType):
            yield from within(inner)


def storage_of(tensor: Tensor) -> int:
    """Return what tensors that share their memory have in common."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def hooks_of(value: object) -> list[object]:
    """Return the hooks of a module or tensor."""
    if isinstance(value, nn.Module):
        tables = [vars(value).get(name) for name in sorted(HOOKS)]
    elif isinstance(value, Tensor):
        tables = [value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)]
    else:
        tables = []
    return [hook for table in tables if isinstance(table, dict) for hook in table.values()]
