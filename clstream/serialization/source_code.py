"""Source code: which modules of the user's own a run is built from, and whether they still are what they were.

The user's own is what is neither installed (Python's library, site-packages) nor clstream's. From the classes and functions that
a run is built from, the import statements of their modules are followed, also those inside functions, whether or not they were
executed yet. What is not seen: imports by a name that is computed, code made by `exec`, data files.

Two texts are the same code if they differ in comments, layout and docstrings only, and in what is under
`if __name__ == "__main__":`, but for the functions and classes that are defined there, and what functions read of it. The text of
a module is read once in a process, when it is first asked for. Where the functions that are loaded are not those of the text (a
file that was edited after it was imported, a notebook without its cells), a hash of their compiled code goes with it: that is
compared then.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import decode_source, resolve_name
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from clstream.serialization.same_code import Source, _where, same_code

Namespace = dict[str, Any]
"""The globals of a module."""


_CALLABLES = (FunctionType, MethodType, partial, type)


_PLAIN = (bool, int, float, complex, str, bytes)


def definitions(*values: object) -> Iterator[object]:
    """Yield the classes and functions that values are built from: those of partials and closures, of a module and its children."""
    stack, seen, listed = list(values), set[int](), set[type]()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, ModuleType):
            yield value
        elif isinstance(value, partial):
            stack += [value.func, *filter(callable, (*value.args, *value.keywords.values()))]
        elif isinstance(value, MethodType):
            stack += [value.__func__, value.__self__]
        elif isinstance(value, FunctionType):
            yield value
            stack += [part for part in _closed_over(value) if isinstance(part, _CALLABLES)]
        elif isinstance(value, type):
            bases = [base for base in value.__mro__ if base not in listed]
            listed.update(bases)
            yield from bases
            members = ((cls, member) for cls in bases for member in vars(cls).values() if isinstance(member, FunctionType))
            yield from (member for cls, member in members if member.__module__ != cls.__module__)  # put in from elsewhere
        elif isinstance(value, nn.Module):
            for module in value.modules():
                stack += [type(module), *(part for part in vars(module).values() if isinstance(part, _CALLABLES))]
        else:
            stack.append(type(value))


def _closed_over(function: FunctionType) -> Iterator[object]:
    yield getattr(function, "__wrapped__", None)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def user_sources(built_from: Iterable[object]) -> dict[str, Source]:
    """Return the sources of the user's own modules that classes, functions and modules are in, or import, by module name.

    A class or function in no file has an entry of its own, by its module and name.
    """
    sources: dict[str, Source] = {}
    seen: set[int | str] = set()
    queue: deque[object] = deque(built_from)

    def is_new(key: int | str) -> bool:
        new = key not in seen
        seen.add(key)
        return new

    def add(name: str, source: Source) -> None:
        number, key = 1, name
        while key in sources and sources[key].file != source.file:  # another module of that name
            number += 1
            key = f"{name} ({number})"
        sources[key] = source

    while queue:
        definition = queue.popleft()
        if isinstance(definition, ModuleSpec):
            if not is_new(f"{definition.name} in {definition.origin}"):
                continue
            name, package, source = (
                definition.name,
                definition.parent or "",
                _read(definition.origin, definition.loader, definition.name),
            )
        else:
            namespace = _namespace(definition) if is_new(id(definition)) else None
            if namespace is None or not _is_users(namespace):
                continue
            if not namespace.get("__file__"):
                if isinstance(definition, (type, FunctionType)):
                    add(*_in_no_file(definition, namespace))
                    queue.extend(definitions(*_named_by(definition, namespace).values()))
                continue
            if not is_new(id(namespace)):
                continue
            name, package, source = _name(namespace), _package(namespace), _source_of_module(namespace)
        add(name, source)
        for module in [*_parents(name), *_imported(source.text, package)]:
            if (imported := _find(module)) is not None:
                queue.append(imported)
    return sources


def changes(then: Mapping[str, Sequence[str]], now: Mapping[str, Source], only_common: bool = False) -> list[str]:
    """Return what differs between the sources of two runs: each file, and the classes and functions in it, in a few words.

    Args:
        then: by module name, (file, text, compiled).
        now: by module name.
        only_common: leave out what is in one of them alone.

    """
    differing = []
    for name in sorted({*then, *now}):
        old, new = (Source(*lot[name]) if name in lot else None for lot in (then, now))
        if old is not None and new is not None:
            if old.compiled != new.compiled or not same_code(old.text, new.text):
                differing.append(f"{_shown(new.file)}{_where(old, new)}")
        elif not only_common:
            differing += [f"{_shown(new.file)} (it was no part of the run)"] if new else []
            differing += [f"{_shown(old.file)} (it is no part of the run any more)"] if old else []
    return differing


def write_sources(files: Mapping[str, str], folder: Path) -> Path | None:
    """Write source files, texts by name, to the folder `code` in a folder; None if there are none.

    If other ones are there, they go to `code.2`, `code.3`, ... beside. Raises OSError if they can't be written.
    """
    if not files:
        return None
    number, place = 1, folder / "code"
    while place.exists():
        if all((place / name).is_file() and (place / name).read_bytes() == text.encode() for name, text in files.items()):
            return place
        number += 1
        place = folder / f"code.{number}"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(text.encode())
    return place


def as_files(sources: Mapping[str, Source]) -> dict[str, str]:
    """Return the texts of sources by the names of files that they would be imported from: pkg/part.py."""
    packages = {name.rpartition(".")[0] for name in sources} | {
        name for name, source in sources.items() if os.path.basename(source.file) == "__init__.py"
    }
    files = {}
    for name, source in sources.items():
        path = name.replace("<", "").replace(">", "").replace(".", "/")
        files[f"{path}/__init__.py" if name in packages else f"{path}.py"] = source.text
    return files


def checkout_hash(built_from: Iterable[object]) -> str:
    """Return a hash of the code of clstream if it is a checkout, which may be edited; "" if it is installed: it has a version.

    It is of the package itself, and of those of its strategies, streams and models that a run is built from.
    """
    package = str(sys.modules["clstream"].__file__)
    if _is_installed(package):
        return ""
    files = {str(file) for file in Path(package).parent.glob("*.py")}
    for definition in built_from:
        namespace = _namespace(definition)
        if namespace is not None and _name(namespace).partition(".")[0] == "clstream" and namespace.get("__file__"):
            files.add(str(namespace["__file__"]))
    return hashlib.sha256(repr([_file_hash(file) for file in sorted(files, key=os.path.basename)]).encode()).hexdigest()[:16]


@cache
def _file_hash(file: str) -> str:  # once in a process: later, it may be other than what was loaded
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _namespace(definition: object) -> Namespace | None:
    """Return the globals of the module that a class, function or module is in: the very ones, if two have one name."""
    if isinstance(definition, ModuleType):
        return vars(definition)
    if isinstance(definition, FunctionType):
        return definition.__globals__
    name = getattr(definition, "__module__", None)
    if isinstance(definition, type) and name != "builtins":
        members = (member for member in vars(definition).values() if isinstance(member, FunctionType))
        for function in chain(members, _functions_of(definition)):  # nearly always one of the first
            if function.__globals__.get("__name__") == name:
                return function.__globals__
    module = sys.modules.get(name) if isinstance(name, str) else None
    return None if module is None else vars(module)


def _is_users(namespace: Namespace) -> bool:
    """Return whether a module is the user's own."""
    name, file = _name(namespace), namespace.get("__file__")
    top = name.partition(".")[0]
    if top in ("clstream", "builtins"):
        return False
    if isinstance(file, str):
        return not _is_installed(file)
    if namespace.get("__spec__") is not None:  # built in, or a package without a file
        return False
    whole = sys.modules.get(top)  # else of a notebook, or of `exec`
    return whole is None or name == "__main__" or vars(whole) is namespace or _is_users(vars(whole))


@lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    """Return whether a file is in Python's library or in site-packages."""
    path = Path(os.path.realpath(file))
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    library = [os.path.realpath(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib")]
    return any(path.is_relative_to(place) for place in library) or file.startswith("<frozen")


def _name(namespace: Namespace) -> str:
    """Return the name of a module; a script's, which is `__main__` where it runs, is that of its file."""
    spec, name = namespace.get("__spec__"), namespace.get("__name__")
    if isinstance(spec, ModuleSpec):
        return spec.name
    if name == "__main__" and namespace.get("__file__"):
        return Path(str(namespace["__file__"])).stem
    return name if isinstance(name, str) else "nameless"


def _package(namespace: Namespace) -> str:
    """Return the package from which a module's relative imports go."""
    spec, package = namespace.get("__spec__"), namespace.get("__package__")
    if isinstance(spec, ModuleSpec):
        return spec.parent or ""
    return package if isinstance(package, str) else ""


def _parents(name: str) -> list[str]:
    """Return the packages that a module lies in: they run when it is imported."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: number + 1]) for number in range(len(parts))]


def _find(name: str) -> ModuleType | ModuleSpec | None:
    """Return a module by name, or, if it is not loaded yet, where it would be loaded from; nothing is imported."""
    if name.partition(".")[0] == "clstream":
        return None
    if name in sys.modules:
        module = sys.modules[name]
        return module if isinstance(module, ModuleType) else None
    package, path = name.rpartition(".")[0], None
    if package:
        parent = _find(package)
        places = parent.submodule_search_locations if isinstance(parent, ModuleSpec) else getattr(parent, "__path__", None)
        if places is None:
            return None
        path = list(places)
    elif name in sys.builtin_module_names or name in sys.stdlib_module_names:
        return None
    try:
        spec = PathFinder.find_spec(name, path)
    except (ImportError, ValueError, OSError):
        return None
    return spec if spec is not None and spec.has_location and spec.origin and not _is_installed(spec.origin) else None


@lru_cache(maxsize=1024)
def _imported(text: str, package: str) -> tuple[str, ...]:
    """Return the names of the modules that a text imports, anywhere but for type checkers; some may be other than modules."""
    names: list[str] = []
    queue: deque[ast.AST] = deque([_tree(text)])
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.Import):
            names += [name for alias in node.names for name in (*_parents(alias.name), alias.name)]
        elif isinstance(node, ast.ImportFrom):
            try:
                source = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            except ImportError:  # relative beyond its package: it would fail too
                continue
            names += [*_parents(source), source, *(f"{source}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            queue.extend(node.orelse)
        else:
            queue.extend(ast.iter_child_nodes(node))
    return tuple(dict.fromkeys(names))


def _tree(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


_first_read: dict[int, tuple[object, Source]] = {}
"""By the id of a module's spec, which is a new one if it is loaded again: what was read first, when it had just been loaded."""


def _source_of_module(namespace: Namespace) -> Source:
    """Return the source of a module that is loaded and has a file."""
    key = namespace.get("__spec__") or sys.modules.get(str(namespace.get("__name__"))) or namespace
    _, source = _first_read.get(id(key), (None, None))
    if source is None or (_is_text(source.file) and _unlike(namespace, source.text) != source.compiled):
        source = _read(str(namespace["__file__"]), namespace.get("__loader__"), _name(namespace))
        if _is_text(source.file):
            source = source._replace(compiled=_unlike(namespace, source.text))
        _first_read[id(key)] = key, source
    return source


def _is_text(file: str) -> bool:
    return not file.endswith((*EXTENSION_SUFFIXES, *BYTECODE_SUFFIXES))


def _read(file: str | None, loader: object, name: str) -> Source:
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


def _in_no_file(definition: type | FunctionType, namespace: Namespace) -> tuple[str, Source]:
    """Return a name and the source of a class or function that is in no file: that of its functions, where it can be had."""
    name = f"{definition.__module__}.{definition.__qualname__}"
    texts, lost = [], []
    for function in _functions_of(definition):
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
    named = {key: value for key, value in _named_by(definition, namespace).items() if _is_plain(value)}
    head = ["# Not all of its source could be had."] if lost else []
    text = "\n".join([*head, *(f"{key} = {value!r}" for key, value in sorted(named.items())), text])
    return name, Source(f"<{name}>", text, _hash(lost))


def _is_plain(value: object) -> bool:
    """Return whether a value is one that a text can hold, and that stays as it is."""
    return value is None or isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


def _named_by(definition: type | FunctionType, namespace: Namespace) -> dict[str, object]:
    """Return what a function, or those of a class, name among the globals."""
    functions = [function for function in _functions_of(definition) if function.__globals__ is namespace]
    names = {name for function in functions for code in _codes(function.__code__) for name in code.co_names}
    return {name: namespace[name] for name in names if name in namespace}


def _functions_of(definition: object) -> Iterator[FunctionType]:
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
    functions = [function for value in values if getattr(value, "__module__", None) == name for function in _functions_of(value)]
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


def _shown(file: str) -> str:
    """Return a path as errors show it: from the working folder on, if it lies there."""
    here = os.path.join(os.getcwd(), "")
    return file.removeprefix(here)
