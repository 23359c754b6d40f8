"""Whole: a snapshot that needs no objects to be put into: all that an object holds is built anew, and nothing of a run or a stream.

As everywhere here, classes and functions are written by name, and looked up in the process that reads: `NamedCode` says which may
be named. What a class names in `not_state` is written too, where it can be: there is no constructor to make it anew. Of `params`
what can't be written is left as the text that tables show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass, replace
from enum import Enum
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from clstream.attributes import attributes
from clstream.params import describe
from clstream.serialization.callables import LAYERS
from clstream.serialization.capture import Snapshot, _Capture
from clstream.serialization.encoding import CaptureError, is_no_state
from clstream.serialization.references import References, hooks_of, lookup_loaded, qualified_name
from clstream.serialization.restore import _Restore
from clstream.stream import Session, Stream, StreamView, Subset, Task, own_storage

_OURS = tuple(
    f"clstream.{name}."
    for name in ("adapters", "augmentations", "drift_detection", "fisher", "losses", "memory", "models", "strategies", "strategy",
                 "stream", "streams", "events")
)  # fmt: skip
"""Modules and packages of ours whose classes may be named: what strategies are built of, and nothing that writes or runs."""

_LAYERS = tuple(f"{package}." for package in LAYERS)
"""What begins the names of layers, and of their configurations, dataclasses and enums, which may be named if they were imported."""

_FUNCTIONS = {f"torch:{name}": getattr(torch, name) for name in (
    "abs", "celu", "cos", "exp", "flatten", "log_softmax", "relu", "selu", "sigmoid", "sin", "softmax", "square", "tanh"
)}  # fmt: skip
"""Functions of torch beside those of torch.nn.functional that may be named."""

_OF_A_RUN = {"bus", "about", "drawn_before", "train_updates", "train_class_weights", "train_weighed"}
"""Attributes in `not_state` that are left out: a run sets them. So is what a class names in `not_saved`."""


class NamedCode(References):
    """The classes and functions that a whole snapshot may name: given ones, those of their modules, ours, and torch's layers.

    Args:
        code: classes and functions of the user's own.

    """

    def __init__(self, code: Iterable[Any] = ()) -> None:
        code = list(code)
        given = [part for part in code if isinstance(part, type)]
        super().__init__((), {qualified_name(base): base for cls in given for base in cls.__mro__}, {}, {})
        self.functions = {qualified_name(part): part for part in code if not isinstance(part, type)}

    def find_class(self, name: str) -> type[Any]:
        """Return a class that may be named; ValueError for any other. What was written in a script is found in its module too."""
        places = [name]
        if name.startswith("__main__:"):
            places += [f"{cls.__module__}:{name.partition(':')[2]}" for cls in self.classes.values()]
        for place in places:
            cls = lookup_loaded(place)
            module = f"{getattr(cls, '__module__', '')}."
            if isinstance(cls, type) and qualified_name(cls) == place and not hasattr(cls, "__del__"):
                if module.startswith(_OURS):
                    self.classes |= {qualified_name(base): base for base in cls.__mro__}  # whose methods may be bound
                    return cls
                if module.startswith(_LAYERS) and (issubclass(cls, (nn.Module, Enum)) or is_dataclass(cls)):
                    return cls
            try:
                return super().find_class(place)
            except ValueError:
                continue
        raise ValueError(f"it names {name!r}, which is no class of clstream's or torch's layers, nor one that was given")

    def find_code(self, name: str) -> Any:
        """Return what may be called: what was given, functions, layers and optimizers of torch's, plain types; else ValueError."""
        if name in self.functions or name in _FUNCTIONS:
            return self.functions.get(name) or _FUNCTIONS[name]
        if name.replace(":", ".", 1).startswith(_OURS):
            return self.find_class(name)
        try:
            return super().find_code(name)
        except ValueError:
            raise ValueError(f"it names the function {name}, which was not given: if it is yours, give it too") from None


class _Written(NamedCode):
    """What may be named while a snapshot is written: all that the reader can be given."""

    def find_class(self, name: str) -> type[Any]:
        """Return a class that was met."""
        return self.classes[name]


class _Whole(_Capture):
    """Writes an object down, with what a constructor would have made of it."""

    def __init__(self) -> None:
        references = _Written()
        super().__init__(references)
        references.classes = self.classes  # as they are met

    def _write(self, number: int, value: object, owner: str = "") -> None:
        if hooks_of(value):
            raise CaptureError(
                f"{self.nodes[number]['path']} has hooks, which can't be saved: do in forward() what they do, or remove them before"
            )
        super()._write(number, value, owner)

    def value(self, value: Any, path: str, owner: str = "") -> Any:
        """Return what stands for a value in a snapshot; of a stream's data what is needed, in tensors of its own."""
        if isinstance(value, (Stream, StreamView)):
            raise CaptureError(f"{path} is a {type(value).__name__}, which is not saved: keep what is needed of it")
        if id(value) in self.numbers or not isinstance(value, (Task, Session, Subset)):
            return super().value(value, path, owner)
        written = super().value(_apart(value), path, owner)
        self.numbers[id(value)] = written[1]
        self.kept.append(value)
        return written

    def _code(self, value: Any, path: str) -> Any:
        """Return what stands for a function or class: its name."""
        owner = getattr(value, "__self__", None)
        if isinstance(value, (partial, ModuleType)) or not isinstance(owner, (type(None), ModuleType, type)):
            return super()._code(value, path)
        short = getattr(value, "__name__", "")
        if _FUNCTIONS.get(f"torch:{short}") is value:
            return ["name", f"torch:{short}"]
        if vars(functional).get(short) is value:
            return ["name", f"{functional.__name__}:{short}"]
        if lookup_loaded(qualified_name(value)) is value or isinstance(value, type):
            return ["name", qualified_name(value)]
        raise CaptureError(
            f"{path} is a function that no module has by its name ({qualified_name(value)}), so it can't be saved: write it as a "
            "method or as a function of a module"
        )

    def _object(self, value: object, path: str) -> dict[str, Any]:
        content = super()._object(value, path)
        written = content["attributes"]
        left_out = _OF_A_RUN.union(*(vars(cls).get("not_saved", ()) for cls in type(value).__mro__))
        for name, item in attributes(value, hidden=True).items():
            if name in written or name in left_out or is_no_state(type(value), name):
                continue
            if name == "params" and isinstance(item, dict):
                written[name] = self._params(item, f"{path}.{name}")
            elif stand_in := self._if_possible(item, f"{path}.{name}"):
                written[name] = stand_in[0]
        return content

    def _params(self, params: dict[str, Any], path: str) -> Any:
        """Write what an object was built with; of modules those that it holds."""
        shown = dict[str, Any]()
        for name, item in params.items():
            left_out = isinstance(item, nn.Module) and id(item) not in self.numbers
            written = [] if left_out else self._if_possible(item, f"{path}[{name!r}]")
            shown[name] = written[0] if written else describe(item)
        number = self._number(params, path)
        self.nodes[number] |= {"kind": "dict", "class": "dict", "items": [[name, item] for name, item in shown.items()]}
        return ["node", number]

    def _if_possible(self, value: Any, path: str) -> list[Any]:
        """Return what stands for a value; nothing where it can't be written, and then nothing of it stays."""
        nodes, storages, memory = len(self.nodes), len(self.storages.tensors), len(self.storages.memory)
        try:
            return [self.value(value, path)]
        except CaptureError:
            del self.nodes[nodes:], self.storages.tensors[storages:], self.storages.memory[memory:]
            self.numbers = {key: number for key, number in self.numbers.items() if number < nodes}
            self.storages.numbers = {key: number for key, number in self.storages.numbers.items() if number < storages}
            return []


def _apart(value: Task | Session | Subset) -> Task | Session | Subset:
    """Return a task without its samples, or samples of a stream apart from the whole data that they are of."""
    if isinstance(value, Task):
        held = None if value.validation is None else own_storage(value.validation[:0])
        return replace(value, train=own_storage(value.train[:0]), test=own_storage(value.test[:0]), validation=held)
    if isinstance(value, Session):
        return replace(value, samples=own_storage(value.samples[:]))
    return Subset(own_storage(value[:]), torch.arange(len(value), device=value.index.device))


def capture_whole(root: object) -> Snapshot:
    """Return a snapshot of all that an object holds, from which `build_whole` makes one like it; its tensors are no copies.

    Raises CaptureError for an attribute that can't be written; it names it.
    """
    writer = _Whole()
    try:
        numbers = writer.add([root])
    except RecursionError:
        raise CaptureError(
            f"{writer.nodes[-1]['path'][:200]} ... is nested too deeply to be saved: keep long chains of objects as a list"
        ) from None
    except CaptureError as error:
        text = str(error).replace("a checkpoint", "a saved strategy").replace("no checkpoint", "no saved strategy")
        raise CaptureError(text.partition(", or run without")[0]) from None
    writer.storages.check_sharing()
    writer.storages.trim(writer.nodes)
    return {"nodes": writer.nodes, "roots": numbers, "storages": writer.storages.tensors}


def classes_of(snapshot: Snapshot) -> list[str]:
    """Return the names of the classes of the objects in a whole snapshot, each once."""
    return list(dict.fromkeys(node["class"] for node in snapshot["nodes"] if node["kind"] == "object"))


def build_whole(snapshot: Snapshot, code: NamedCode, kind: type[Any], device: torch.device) -> Any:
    """Return a new object as the one that a snapshot was taken of.

    Args:
        snapshot: what `capture_whole` returned, maybe by way of a file.
        code: what it may name.
        kind: a class that the object's derives from.
        device: where tensors, and objects that name a device, go that were on a GPU.

    Raises:
        ValueError: for names that may not be followed, another kind of object, and what is no snapshot at all.

    """
    try:
        cls = code.find_buildable(snapshot["nodes"][snapshot["roots"][0]]["class"])
        if not issubclass(cls, kind):
            raise ValueError(f"it is a {cls.__name__}, and no {kind.__name__}")
        root: Any = object.__new__(cls)
        if isinstance(root, nn.Module):
            nn.Module.__init__(root)
        snapshot["nodes"][snapshot["roots"][0]]["class"] = qualified_name(cls)  # where it was written in a script
        _Built([root], snapshot, code, device)
    except Exception as error:  # a file may hold anything, and whatever comes of it is the file's fault
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"it can't be built: {reason[:300]}") from error
    return root


class _Built(_Restore):
    """Builds an object."""

    def value(self, value: Any) -> Any:
        """Return the value that is written; a device, as tensors on it, is the one that is built for."""
        written = super().value(value)
        return self._device(str(written)) if isinstance(written, torch.device) else written
