"""The header of a recording: its fields, and the bounds of its size."""

from __future__ import annotations

from typing import Any

FORMAT = 4
"""Number of the newest format; files of a greater one are refused. What an older one can say is written in that."""

STREAM = "stream.json"

MAX_RATIO = 16
"""How many times as large as in the file a member may be once unpacked; what would be more is stored as it is."""

ALWAYS_ALLOWED = 1 << 16
"""Bytes that a member may have in any case."""

MAX_TEXT = 1 << 23
"""Bytes of `stream.json` at most."""

MAX_MEMBERS = 65_000

PROBE_ROWS = 8  # rows of a transform that are compared at replay

HASH_LENGTH = 64  # hexadecimal digits of a SHA-256

_SCALAR = (int, float, bool, str, None)

_NAMED = {"name": str, "fields?": {str: _SCALAR}}

_SAMPLES = {"source": int, "rows": (str, None), "transform?": _NAMED, "probe?": str, "made?": bool, "columns?": [int]}

HEADER: dict[Any, Any] = {
    "format": int, "clstream": str, "torch": str, "name": str, "scenario": str, "epochs": int, "batch_size": int, "seed": int,
    "boundaries": bool, "resident": bool, "shuffle?": bool, "drop_last?": bool, "class_names?": [str],
    "drift?": {"what": str, "once": bool},
    "notes": [str], "fingerprint": str, "order": str, "augment": (_NAMED, None), "loader": (str, None),
    "options": {str: _SCALAR}, "parts": {str: {str: {"shape": [int], "dtype": str, "sha256": str}}},
    "sources": [{"part": str, "labels": ([[int]], str, None)}],
    "tasks": [{"classes": [int], "target?": str, "train": _SAMPLES, "test": _SAMPLES, "validation": (_SAMPLES, None)}],
    "probes?": [{"name": str, "task": (int, None), "known": (bool, str), "target?": str, "note": str, "samples": _SAMPLES}],
    "sessions": [{"task": int, "start?": int, "step?": int, "count?": int, "positions?": str}],
}  # fmt: skip
"""What stands in `stream.json`: a type for a value, a list or dict for what is in one, a tuple for a choice, ? for an option."""


def check_form(value: object, form: Any, place: str) -> None:
    """Raise ValueError for what is not of a form, as `HEADER` writes it."""
    if isinstance(form, tuple):
        for choice in form:
            try:
                return check_form(value, choice, place)
            except ValueError:
                continue
        raise ValueError(f"{place} is not what it should be")
    if isinstance(form, list) and isinstance(value, list):
        for item in value:
            check_form(item, form[0], place)
    elif isinstance(form, dict) and isinstance(value, dict) and str in form:
        for key, item in value.items():
            check_form(item, form[str], f"{place}: {key[:50]}")
    elif isinstance(form, dict) and isinstance(value, dict):
        forms = {name.removesuffix("?"): part for name, part in form.items()}
        if strange := [name for name in value if name not in forms]:
            raise ValueError(f"{place} has {strange[0][:50]!r}, which doesn't belong there")
        for name in form:
            if not name.endswith("?") and name not in value:
                raise ValueError(f"{place} lacks {name!r}")
        for name, item in value.items():
            check_form(item, forms[name], f"{place}: {name}")
    elif not (value is None if form is None else isinstance(form, type) and type(value) is form):
        raise ValueError(f"{place} is not what it should be")
    return None


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's JSON reader would take."""
    raise ValueError(f"stream.json has {name}, which is no number")


def is_possible_size(size: int, packed: int) -> bool:
    """Return whether a member may be so large, given its size in the file."""
    return size <= max(ALWAYS_ALLOWED, MAX_RATIO * packed)
