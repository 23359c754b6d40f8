"""Source code: which modules of the user's own a run is built from, and whether they still are what they were.

The user's own is what is neither installed (Python's library, site-packages) nor clstream's. From the classes and functions that
a run is built from, the import statements of their modules are followed, also those inside functions, whether or not they were
executed yet. What is not seen: imports by a name that is computed, code made by `exec`, data files.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

from torch import nn

from clstream.serialization.loaded_code import (
    Namespace,
    functions_of,
    module_name,
    named_by,
    read_source,
    source_in_no_file,
    source_of_module,
)
from clstream.serialization.same_code import Source

_CALLABLES = (FunctionType, MethodType, partial, type)


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
                read_source(definition.origin, definition.loader, definition.name),
            )
        else:
            namespace = _namespace(definition) if is_new(id(definition)) else None
            if namespace is None or not _is_users(namespace):
                continue
            if not namespace.get("__file__"):
                if isinstance(definition, (type, FunctionType)):
                    add(*source_in_no_file(definition, namespace))
                    queue.extend(definitions(*named_by(definition, namespace).values()))
                continue
            if not is_new(id(namespace)):
                continue
            name, package, source = module_name(namespace), _package(namespace), source_of_module(namespace)
        add(name, source)
        for module in [*_parents(name), *_imported(source.text, package)]:
            if (imported := _find(module)) is not None:
                queue.append(imported)
    return sources


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
    files = set(_files_in(Path(package).parent))
    for definition in built_from:
        namespace = _namespace(definition)
        if namespace is not None and module_name(namespace).partition(".")[0] == "clstream" and namespace.get("__file__"):
            files.add(str(namespace["__file__"]))
    hashes = [_file_hash(file) for file in sorted(files, key=lambda file: (os.path.basename(file), file))]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


@cache
def _files_in(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*.py")]


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
        for function in chain(members, functions_of(definition)):  # nearly always one of the first
            if function.__globals__.get("__name__") == name:
                return function.__globals__
    module = sys.modules.get(name) if isinstance(name, str) else None
    return None if module is None else vars(module)


def _is_users(namespace: Namespace) -> bool:
    """Return whether a module is the user's own."""
    name, file = module_name(namespace), namespace.get("__file__")
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
    spec = _find_spec(name)
    return spec if spec is not None and spec.has_location and spec.origin else None


def _find_spec(name: str) -> ModuleSpec | None:
    """Return where a module that is not loaded yet would be loaded from; None if it is an installed one, or there is none."""
    package, _, last = name.rpartition(".")
    folders: list[str] | None = None
    if package in sys.modules:
        if not hasattr(sys.modules[package], "__path__"):
            return None
        folders = list(sys.modules[package].__path__)
    elif package:
        parent = _find_spec(package)
        if parent is None or parent.submodule_search_locations is None:
            return None
        folders = list(parent.submodule_search_locations)
    elif name in sys.builtin_module_names or name in sys.stdlib_module_names:
        return None
    try:
        spec = PathFinder.find_spec(name, folders)
    except (ImportError, ValueError, OSError):
        return None
    except KeyError:  # newer Pythons raise it for a folder without __init__.py in a package that is not loaded
        spec = ModuleSpec(name, None, is_package=True)
    if spec is None or (spec.origin and _is_installed(spec.origin)):
        return None
    if folders is not None and spec.origin is None:  # such a folder: its own list of places asks the loaded package
        spec.submodule_search_locations = [str(inner) for inner in (Path(folder, last) for folder in folders) if inner.is_dir()]
    return spec


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
