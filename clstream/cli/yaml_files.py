"""YAML as data: configs and anchors, bounded in size and depth, with no key twice and nothing that refers to something else.

Anchors and aliases (&, *, <<) are refused, because a few lines of them stand for gigabytes; so are tags (!!). Numbers are read
as by YAML 1.2: 1e-3 is a number, 010 is ten and 1:30 is text.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from clstream.cli.errors import UsageError

LARGEST = 2**20
"""Bytes of a file; the configs of long runs have some thousands."""

DEEPEST = 50
"""Levels of lists and mappings in each other."""

TAG = "tag:yaml.org,2002:"

FLOAT = (
    r"[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)

INTEGER = r"[-+]?(?:0|[1-9][\d_]*)|0x[\da-fA-F]+"


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return how plain scalars are told apart, by first letter: true, null and numbers; there are no dates and no merge keys."""
    kept = {
        letter: [(tag, pattern) for tag, pattern in pairs if tag in (f"{TAG}bool", f"{TAG}null")]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for letter in "-+0123456789.":
        kept[letter] = [(f"{TAG}float", re.compile(f"^(?:{FLOAT})$")), (f"{TAG}int", re.compile(f"^(?:{INTEGER})$"))]
    return kept


class _Loader(yaml.SafeLoader):
    """Composes nodes that hold nothing but themselves, and each key of a mapping once."""

    yaml_implicit_resolvers = _resolvers()
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. Raises YAMLError for an anchor, an alias or a tag, and below DEEPEST levels."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases (& and *) are not taken: write it out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, f"tags are not taken: leave out {event.tag}", event.start_mark)
        if self.depth >= DEEPEST:
            raise yaml.MarkedYAMLError(None, None, f"it is nested deeper than {DEEPEST} levels", event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping. Raises YAMLError for a key that it has twice, with both lines, or that is no plain word or number."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a word or a number", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines:
                before = lines[key.value]
                raise yaml.YAMLError(f"{key.value!r} is given twice, in line {before} and in line {line}: keep the right one")
            lines[key.value] = line
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a dict. Raises YAMLError for a key that is written in two ways, as 1 and 0x1."""
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.MarkedYAMLError(None, None, "one key is given twice, in two spellings: keep the right one", node.start_mark)
        return values

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number. Raises ValueError for one that could not be printed, as 0xff... can be."""
        value: int = super().construct_yaml_int(node)
        str(value)
        return value


_Loader.add_constructor(f"{TAG}int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        """Write a list that is in two places twice."""
        return True


def load_yaml(text: str) -> Any:
    """Return what a text of YAML holds. Raises yaml.YAMLError, its message one sentence, for what is not taken."""
    try:
        return yaml.load(text, Loader=_Loader)  # it derives from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise yaml.YAMLError(f"{error.problem or error.context}{where}") from None
    except yaml.reader.ReaderError as error:
        raise yaml.YAMLError(f"it holds what no text does, {error.reason} (character {error.position})") from None
    except ValueError:  # the limit of int()
        raise yaml.YAMLError("it holds a number of thousands of digits") from None


def dump_yaml(value: Any, *, flow: bool = False) -> str:
    """Return plain values as YAML that `load_yaml` reads; `flow` puts it all in a line."""
    return str(yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, allow_unicode=True, sort_keys=False, width=2**31))


def read_yaml(file: str | Path, what: str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises UsageError, which names it as `what`, for anything else."""
    path = Path(str(file).replace("\0", "?"))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"the {what} {file} is a folder: give a YAML file")
        if not stat.S_ISREG(mode):
            raise UsageError(f"the {what} {file} is no regular file")
        with path.open("rb") as opened:
            content = opened.read(LARGEST + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no {what} {file}") from None
    except OSError as error:
        raise UsageError(f"the {what} {str(file)[:100]} can't be read: {error.strerror}") from None
    if len(content) > LARGEST:
        raise UsageError(f"the {what} {file} is larger than {LARGEST:,} bytes: that is no {what}")
    return parse_yaml(content, f"the {what} {file}")


def parse_yaml(content: bytes, name: str) -> dict[str, Any]:
    """Return the mapping that the content of a YAML file holds. Raises UsageError, beginning with `name`, for anything else."""
    try:
        loaded = load_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not text in UTF-8 (byte {error.start + 1}): save it as such") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name} can't be read: {error}") from None
    if loaded is None:
        raise UsageError(f"{name} is empty")
    if not isinstance(loaded, dict):
        kind = "a list" if isinstance(loaded, list) else f"only {str(loaded)[:40]!r}"
        raise UsageError(f"{name} holds {kind}: it takes keys with values, such as `seed: 3`")
    if odd := [key for key in loaded if not isinstance(key, str)]:
        raise UsageError(f"{name} has the key {odd[0]!r}, which is no word")
    return loaded
