"""Loaded code: the source of a module, class or function as it was loaded, and where it isn't what is in the file.

The text of a module is read once in a process, when it is first asked for. Where the functions that are loaded are not those of the
text (a file that was edited after it was imported, a notebook without its cells), a hash of their compiled code goes with it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import decode_source
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from clstream.serialization.same_code import Source

Namespace = dict[str, Any]
"""The globals of a module."""

_PLAIN = (bool, int, float, complex, str, bytes)

_first_read: dict[int, tuple[object, Source]] = {}
"""By the id of a module's spec, which is a new one if it is loaded again: what was read first, when it had just been loaded."""


def source_of_module(namespace: Namespace) -> Source:
    """Return the source of a module that is loaded and has a file."""
    key = namespace.get("__spec__") or sys.modules.get(str(namespace.get("__name__"))) or namespace
    _, source = _first_read.get(id(key), (None, None))
    if source is None or (_is_text(source.file) and _unlike(namespace, source.text) != source.compiled):
        source = read_source(str(namespace["__file__"]), namespace.get("__loader__"), module_name(namespace))
        if _is_text(source.file):
            source = source._replace(compiled=_unlike(namespace, source.text))
        _first_read[id(key)] = key, source
    return source


def _is_text(file: str) -> bool:
    return not file.endswith((*EXTENSION_SUFFIXES, *BYTECODE_SUFFIXES))


def read_source(file: str | None, loader: object, name: str) -> Source:
    """Return the source of a module that a file holds, or else its loader."""
    path = os.path.abspath(str(file))
    try:
        content = Path(path).read_bytes()
        if _is_text(path):
            return Source(path, decode_source(content))
        digest = hashlib.sha256(content).hexdigest()
        return Source(path, f"# {os.path.basename(path)} is no text; its SHA-256 is {digest}\n", digest)
    except (OSError, SyntaxError, UnicodeDecodeError):
        pass
    try:
        text = loader.get_source(name)  # type: ignore[attr-defined]  # one that has it elsewhere, as in an archive
    except Exception:  # noqa: BLE001  # whatever a loader of the user's raises
        text = None
    return Source(path, text or f"# {os.path.basename(path)} could not be read\n")


def source_in_no_file(definition: type | FunctionType, namespace: Namespace) -> tuple[str, Source]:
    """Return a name and the source of a class or function that is in no file: that of its functions, where it can be had."""
    name = f"{definition.__module__}.{definition.__qualname__}"
    texts, lost = [], []
    for function in functions_of(definition):
        if function.__globals__ is not namespace:  # a decorator's, from elsewhere
            continue
        try:
            text = textwrap.dedent(inspect.getsource(function))
        except (OSError, TypeError, SyntaxError, IndexError):
            text = ""
        within = f"class {definition.__name__}:\n{textwrap.indent(text, '    ')}" if isinstance(definition, type) else text
        if _shape(function.__code__) in _shapes(within):  # in a class, since `super()` means it
            texts.append(text)
        else:
            plain = [value for value in function.__defaults__ or () if _is_plain(value)]
            lost.append(f"{_shape(function.__code__)}{plain or ''}")
    own = vars(definition) if isinstance(definition, type) else {}
    constants = {key: value for key, value in own.items() if _is_plain(value) and not key.startswith("__")}
    text = "\n".join([*(f"{key} = {value!r}" for key, value in constants.items()), *texts])
    if isinstance(definition, type):
        bases = ", ".join(base.__name__ for base in definition.__bases__)
        text = f"class {definition.__name__}({bases}):\n{textwrap.indent(text or 'pass', '    ')}\n"
    named = {key: value for key, value in named_by(definition, namespace).items() if _is_plain(value)}
    head = ["# Not all of its source could be had."] if lost else []
    text = "\n".join([*head, *(f"{key} = {value!r}" for key, value in sorted(named.items())), text])
    return name, Source(f"<{name}>", text, _hash(lost))


def _is_plain(value: object) -> bool:
    """Return whether a value is one that a text can hold, and that stays as it is."""
    return value is None or isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


def named_by(definition: type | FunctionType, namespace: Namespace) -> dict[str, object]:
    """Return what a function, or those of a class, name among the globals."""
    functions = [function for function in functions_of(definition) if function.__globals__ is namespace]
    names = {name for function in functions for code in _codes(function.__code__) for name in code.co_names}
    return {name: namespace[name] for name in names if name in namespace}


def functions_of(definition: object) -> Iterator[FunctionType]:
    """Yield a function, or those of a class; those inside decorators too."""
    for member in vars(definition).values() if isinstance(definition, type) else [definition]:
        for part in (member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset", "fdel", "func"))):
            while isinstance(part, FunctionType):
                yield part
                part = getattr(part, "__wrapped__", None)


def _unlike(namespace: Namespace, text: str) -> str:
    """Return a hash of the functions of a module that are loaded, and are not in its text; "" if there are none."""
    file = os.path.basename(str(namespace["__file__"]))
    name = namespace.get("__name__")
    values = [value for value in list(namespace.values()) if isinstance(value, (type, FunctionType))]
    functions = [function for value in values if getattr(value, "__module__", None) == name for function in functions_of(value)]
    loaded = [
        function.__code__
        for function in functions
        if function.__globals__ is namespace and os.path.basename(function.__code__.co_filename) == file
    ]
    in_text = _shapes(text)
    return _hash(shape for code in loaded if (shape := _shape(code)) not in in_text)


def _hash(shapes: Iterable[str]) -> str:
    listed = sorted(set(shapes))
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    return f"{python} {hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}" if listed else ""


@lru_cache(maxsize=1024)
def _shapes(text: str) -> frozenset[str]:
    """Return what the pieces of code in a text are made of."""
    try:
        whole = compile(text, "text", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    return frozenset(_shape(code) for code in _codes(whole))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@lru_cache(maxsize=65536)
def _shape(code: CodeType) -> str:
    """Return a hash of what a piece of code does, without where it is written."""
    constants = [
        _shape(const) if isinstance(const, CodeType) else sorted(map(repr, const)) if isinstance(const, frozenset) else repr(const)
        for const in code.co_consts
    ]
    parts = (
        code.co_name, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
        code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0xFFF,  # none of `__future__`'s
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def module_name(namespace: Namespace) -> str:
    """Return the name of a module; a script's, which is `__main__` where it runs, is that of its file."""
    spec, name = namespace.get("__spec__"), namespace.get("__name__")
    if isinstance(spec, ModuleSpec):
        return spec.name
    if name == "__main__" and namespace.get("__file__"):
        return Path(str(namespace["__file__"])).stem
    return name if isinstance(name, str) else "nameless"
