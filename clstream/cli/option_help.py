"""Help texts of the options of streams, strategies and models, from their docstrings.

An entry of a docstring may be of several options, `tasks, epochs: see `from_tensors``, and refer to another docstring: then that
one's text is the help.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from clstream.cli.lookup import PLACES


def help_texts(thing: Any) -> dict[str, str]:
    """Return the help text of each option of a class or function, and of those that a class passes on to its bases."""
    help_of: dict[str, str] = {}
    for owner in inspect.getmro(thing) if isinstance(thing, type) else (thing,):
        for name, text in _entries(owner).items():
            help_of.setdefault(name, _followed(owner, name, text))
    return help_of


def _entries(thing: Any) -> dict[str, str]:
    """Return the entries below `Args:` in a docstring, by option, each in one line."""
    section = (inspect.getdoc(thing) or "").partition("\nArgs:\n")[2]
    entries: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if re.match(r" {4}\S", line):
            entries.append(line.strip())
        elif line.strip() and entries:
            entries[-1] += " " + line.strip()
    matches = [match for entry in entries if (match := re.match(r"(\w+(?:, \w+)*): (.*)", entry))]
    return {name: match[2] for match in matches for name in match[1].split(", ")}


def _followed(owner: Any, name: str, text: str) -> str:
    """Return the text of an option; of another docstring, where it only says where to look."""
    reference = re.match(r"(?:see|as in|as for) `?([A-Za-z_][\w.]*\w)`?[.;,]? ?(.*)", text)
    other = None if reference is None else _named(owner, reference[1])
    if reference is None or other is None or other is owner or name not in (entries := _entries(other)):
        return text
    return f"{_followed(other, name, entries[name])} {reference[2]}".strip()


def _named(owner: Any, name: str) -> Any:
    """Return what a docstring calls by a name: a class that it derives from, something of its module, or of ours."""
    for base in owner.__mro__ if isinstance(owner, type) else ():
        if base.__name__ == name:
            return base
    module, _, attribute = name.rpartition(".")
    places = [module] if module else [owner.__module__, *PLACES.values()]
    for place in places:
        thing = getattr(importlib.import_module(place), attribute, None)
        if thing is not None:
            return thing
    return None
