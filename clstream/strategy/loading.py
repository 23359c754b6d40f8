"""Loading: a strategy from the folder that it was saved in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch

import clstream
from clstream.adapters.adapter import _host_class
from clstream.files import FolderError
from clstream.params import reason_of
from clstream.serialization import torch_files
from clstream.serialization.callables import LAYERS
from clstream.serialization.encoding import check_plain
from clstream.serialization.same_code import changed_parts
from clstream.serialization.whole import NamedCode, build_whole, classes_of
from clstream.strategy.saving import CARD, FORMAT, STATE, hash_of, sources_of
from clstream.strategy.strategy import Strategy

_COLLECTIONS = ("clstream.adapters", "clstream.models", "clstream.strategies", "clstream.streams")
"""Ours, which need not be imported before, whatever the file names."""


def load(folder: str | Path, classes: Iterable[type | Callable[..., Any]] = (), device: str | torch.device = "cpu") -> Strategy:
    """Return a strategy as it was saved by `Strategy.save`: it answers the same, and goes on from where it was.

    Nothing from the folder runs, and no name in it imports anything: classes are looked up among `classes`, the modules that these
    are written in and the user's own modules that those import, what strategies are built of in clstream, and torch's layers and
    optimizers. Objects are built from their attributes, without calling their constructors.

    Args:
        folder: that `Strategy.save` wrote.
        classes: the classes of your own that the strategy is built of, and functions of your own that it holds; clstream's and
            torch's need not be named.
        device: where tensors go that were on a GPU.

    Raises:
        FolderError: an OSError, if there is no saved strategy, its file is damaged, or can't be read.
        ValueError: if it names classes that aren't there, or is of a newer version of clstream.
        TypeError: for `classes` that are neither classes nor functions.

    """
    classes = list(classes)
    for part in classes:
        if not callable(part):
            raise TypeError(f"classes takes classes and functions of your own, not {part!r}")
    card = read_card(folder)
    snapshot = _read_state(Path(folder) / card["state"])
    for name in _COLLECTIONS:
        import_module(name)
    for name in LAYERS:
        if any(named.startswith(f"{name}.") for named in card["code"]) and util.find_spec(name) is not None:
            import_module(name)
    code = _Code(classes)
    missing = [name for name in classes_of(snapshot) if not _is_there(code, name)]
    if missing:
        names = [name.rpartition(":")[2] for name in missing]
        raise ValueError(
            f"{folder} has objects of {', '.join(missing[:5])}, which are none that clstream and torch build strategies of: "
            f"if they are yours, import them and name them, clstream.load(..., classes=[{', '.join(names[:5])}])"
        )
    try:
        strategy: Strategy = build_whole(snapshot, code, Strategy, torch.device(device))
    except ValueError as error:
        raise ValueError(f"the strategy in {folder}: {error}") from error
    strategy.about = partial(dict, card["run"])
    met = [code.classes[name] for name in classes_of(snapshot) if name in code.classes]
    if changed := changed_parts(card.get("sources", {}), sources_of(met)):
        warnings.warn(
            f"the code of the strategy in {folder} has changed since it was saved: {'; '.join(changed)}. It may answer otherwise "
            "than it did: load it with the code that it was saved with, or save it anew",
            UserWarning,
            stacklevel=2,
        )
    return strategy


class _Code(NamedCode):
    """What a saved strategy may name: also the classes that `adapt` made of such classes."""

    def find_class(self, name: str) -> type[Any]:
        """Return a class that may be named; ValueError for any other."""
        try:
            return super().find_class(name)
        except ValueError:
            module, _, host = name.partition(":Adapted")
            if not host:
                raise
            return _host_class(super().find_class(f"{module}:{host}"))  # type: ignore[arg-type]  # classes are hashable


def read_card(folder: str | Path) -> dict[str, Any]:
    """Return the card of a saved strategy: see `Strategy.save`. Raises as `load` does."""
    file = Path(folder) / CARD
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FolderError(f"{folder} holds no saved strategy: it has no {CARD}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{file} can't be read: {reason_of(error)}") from None
    try:
        card: dict[str, Any] = json.loads(text)
        version, made_by = card["format"], card["clstream"]
        newer = type(version) is int and version > FORMAT
        kinds = {"format": int, "clstream": str, "strategy": str, "state": str, "code": list, "run": dict}
        sources = card.get("sources", {})
        right = newer or (all(type(card[name]) is kind for name, kind in kinds.items()) and version > 0)
        right = right and (newer or (bool(STATE.fullmatch(card["state"])) and all(type(name) is str for name in card["code"])))
        right = right and (newer or (type(sources) is dict and all(type(parts) is dict for parts in sources.values())))
    except (ValueError, KeyError, TypeError, RecursionError):
        right = newer = False
    if not right:
        raise ValueError(f"{file} is no card of a strategy that clstream saved")
    if newer:
        raise ValueError(
            f"{folder} was saved by clstream {made_by} (format {version}), and this is {clstream.__version__} (format {FORMAT}): "
            "install that version, or a newer one"
        )
    return card


def _read_state(file: Path) -> dict[str, Any]:
    """Return the snapshot in a file of state. Raises as `load` does."""
    try:
        if hash_of(file) != file.stem.partition("-")[2]:
            raise FolderError(f"{file} is damaged: save the strategy again, or take a copy of it")
        state = torch_files.load(file)
        snapshot: dict[str, Any] = state["strategy"]
        check_plain(snapshot)
        torch_files.check_no_larger(snapshot, file)
        classes_of(snapshot)
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(f"{file} can't be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001  # a file may hold anything
        raise ValueError(f"{file} is no state that clstream saved ({reason_of(error)})") from None
    return snapshot


def _is_there(code: NamedCode, name: object) -> bool:
    try:
        code.find_class(str(name))
    except ValueError:
        return False
    return True
