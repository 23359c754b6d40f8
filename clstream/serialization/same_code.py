"""Same code: whether two sources of a module are, and where they differ.

Two texts are the same code if they differ in comments, layout and docstrings only, and in what is under
`if __name__ == "__main__":`, but for the functions and classes that are defined there, and what functions read of it. Where a hash
of compiled code goes with a text, that is compared too.
"""

from __future__ import annotations

import ast
import hashlib
import os
import symtable
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_NAMELESS = ("lambda", "listcomp", "setcomp", "dictcomp", "genexpr")

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Source(NamedTuple):
    """The source of a module, or of a class or function that is in no file.

    Args:
        file: its path; a name in angle brackets where there is none.
        text: what is in it; a comment for what is no text, such as an extension module.
        compiled: a hash of the code that is loaded, where that is not the text's; of the file, where it is no text; else "".

    """

    file: str
    text: str
    compiled: str = ""


def changes(
    then: Mapping[str, Sequence[str]], now: Mapping[str, Source], only_common: bool = False, may_grow: bool = False
) -> list[str]:
    """Return what differs between the sources of two runs: each file, and the classes and functions in it, in a few words.

    Args:
        then: by module name, (file, text, compiled).
        now: by module name.
        only_common: leave out what is in one of them alone.
        may_grow: leave out modules that have all they had, and more beside.

    """
    differences = []
    for name in sorted({*then, *now}):
        old, new = (Source(*lot[name]) if name in lot else None for lot in (then, now))
        if old is not None and new is not None:
            if may_grow and old.compiled == new.compiled and only_grew(old.text, new.text):
                continue
            if old.compiled != new.compiled or not same_code(old.text, new.text):
                differences.append(f"{_shown(new.file)}{_where(old, new)}")
        elif not only_common:
            differences += [f"{_shown(new.file)} (it was no part of the run)"] if new else []
            differences += [f"{_shown(old.file)} (it is no part of the run any more)"] if old else []
    return differences


def hashed_parts(text: str) -> dict[str, str]:
    """Return hashes of the functions of a text, of the rest of each of its classes, and of its own ("") by qualified name."""
    try:
        parts = _parts(stripped(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return {name: hashlib.blake2b(code.encode(), digest_size=8).hexdigest() for name, code in parts.items()}


def changed_parts(then: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return what differs between `hashed_parts` of modules that are in both, by their names: each module, and parts of it."""
    differences = []
    for module in sorted(then.keys() & now.keys()):
        old, new = then[module], now[module]
        names = [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            differences.append(f"{module} ({', '.join(name or 'what it sets' for name in names[:3])}{more})")
    return differences


def same_code(text: str, other: str) -> bool:
    """Return whether two texts differ in comments, layout, docstrings and `if __name__ == "__main__":` at most."""
    if text == other:
        return True
    try:
        return ast.dump(stripped(text)) == ast.dump(stripped(other))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def only_grew(text: str, later: str) -> bool:
    """Return whether all that a text says is in a later one, which may define and set what it didn't."""
    try:
        before, after = ({ast.dump(node): node for node in stripped(part).body} for part in (text, later))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    added = {name for code in after.keys() - before.keys() for name in _named(after[code])}
    return before.keys() <= after.keys() and added.isdisjoint(name for node in before.values() for name in _named(node))


def _named(statement: ast.stmt) -> set[str]:
    """Return the names that a statement of a module defines, sets or imports."""
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and _sets(node)}
    return names | {node.asname or node.name.partition(".")[0] for node in ast.walk(statement) if isinstance(node, ast.alias)}


def stripped(text: str) -> ast.Module:
    """Return the tree of a text without docstrings, and without what is only run in a script and defines nothing that is used."""
    tree = ast.parse(text)
    read, body = _read_by_functions(text), list[ast.stmt]()
    for statement in tree.body:
        if isinstance(statement, ast.If) and _is_script(statement.test):
            body += [*(part for part in statement.body if _defines(part, read)), *statement.orelse]
        else:
            body.append(statement)
    tree.body = body
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and node.body and _is_docstring(node.body[0]):
            node.body = node.body[1:]
    return tree


def _read_by_functions(text: str) -> set[str]:
    """Return the names of globals in the functions and classes of a text."""
    names, tables = set[str](), [table for table in symtable.symtable(text, "text", "exec").get_children()
                                 if table.get_name() not in _NAMELESS]  # fmt: skip
    while tables:
        table = tables.pop()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return names


def _defines(statement: ast.stmt, read: set[str]) -> bool:
    """Return whether a statement holds a function or class, or sets one of some names."""
    for node in ast.walk(statement):
        if isinstance(node, (*_DEFINITIONS, ast.Lambda)) or (isinstance(node, ast.Name) and node.id in read and _sets(node)):
            return True
        if isinstance(node, ast.alias) and (node.asname or node.name.partition(".")[0]) in read:
            return True
    return False


def _sets(name: ast.Name) -> bool:
    return not isinstance(name.ctx, ast.Load)


def _is_script(test: ast.expr) -> bool:
    return ast.unparse(test) in ("__name__ == '__main__'", "'__main__' == __name__")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _where(old: Source, new: Source) -> str:
    """Return in which classes and functions two sources differ, in brackets; nothing if that can't be said."""
    if f"{old.compiled}{new.compiled}".startswith("python") and same_code(old.text, new.text):
        return " (it was edited after it was imported, and the code that ran is not what is in the file)"
    try:
        before, after = _parts(stripped(old.text)), _parts(stripped(new.text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    names = [name for name in dict.fromkeys([*after, *before]) if before.get(name) != after.get(name) and name]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ""


def _parts(tree: ast.AST, prefix: str = "") -> dict[str, str]:
    """Return the functions of a tree, and the rest of each of its classes, by qualified name."""
    parts: dict[str, str] = {}
    body: list[ast.stmt] = getattr(tree, "body", [])
    for node in body:
        if isinstance(node, ast.ClassDef):
            parts |= _parts(node, f"{prefix}{node.name}.")
        elif isinstance(node, _DEFINITIONS):
            parts[f"{prefix}{node.name}"] = parts.get(f"{prefix}{node.name}", "") + ast.dump(node)
    rest = [node for node in body if not isinstance(node, _DEFINITIONS)]
    head = [ast.dump(node) for node in (*getattr(tree, "bases", ()), *getattr(tree, "decorator_list", ()))]
    return {prefix.removesuffix("."): repr([head, *map(ast.dump, rest)]), **parts}


def _shown(file: str) -> str:
    """Return a path as errors show it: from the working folder on, if it lies there."""
    here = os.path.join(os.getcwd(), "")
    return file.removeprefix(here)
