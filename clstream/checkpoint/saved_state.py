"""The saved state of a run: its position, its form, and the errors for a state of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clstream.measures.cost import Cost
from clstream.measures.ledger import Ledger
from clstream.results import Evaluation
from clstream.serialization.encoding import check_plain
from clstream.stream import History


class OtherRunError(ValueError):
    """A checkpoint is of another run; the message says what differs."""


class ChangedCodeError(OtherRunError):
    """A checkpoint is of a run with other code of the user's own; the message names the files."""

    def __init__(self, changed: Sequence[str]) -> None:
        self.shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
        super().__init__(
            f"the code of the run has changed since its checkpoint was written: {self.shown}. Go on with the changed code by "
            "--accept-changed-code or run(..., accept_changed_code=True), put the old code back, or start anew"
        )


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is: the batch that comes next. (session, 0, 0) is before the session starts."""

    session: int
    epoch: int = 0
    batch: int = 0


def check_state(state: object) -> None:
    """Refuse what is not the state of a run, in a sentence. Raises ValueError."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "identity": dict, "position": list, "sessions": int, "step": int, "random": dict, "placed": list, "observers": list,
        "strategy": dict, "evaluation": dict, "params": dict, "seconds": (int, float), "code": dict, "clstream code": str,
        "cost": dict, "ledger": dict,
    }  # fmt: skip
    if not isinstance(state, Mapping) or any(name not in state for name in kinds):
        raise ValueError("resume takes a checkpoint as clstream.checkpoint.newest(folder) returns it, and this is none")
    check_plain(dict(state))
    wrong = [name for name, kind in kinds.items() if not isinstance(state[name], kind) or isinstance(state[name], bool)]
    numbers = [state["step"], *state["position"], *state["placed"]] if not wrong else []
    if not wrong and (len(state["position"]) != 3 or any(type(number) is not int or number < 0 for number in numbers)):
        wrong = ["position"]
    if not wrong and not 0 <= state["seconds"] < float("inf"):
        wrong = ["seconds"]
    if not wrong and not all(isinstance(entry, list) and len(entry) == 2 for entry in state["observers"]):
        wrong = ["observers"]
    if not wrong and not _is_code(state["code"]):
        wrong = ["code"]
    if not wrong:
        try:
            Evaluation.from_dict(state["evaluation"])
        except ValueError:
            wrong = ["evaluation"]
    if not wrong:
        try:
            Cost.from_dict(state["cost"])
        except ValueError:
            wrong = ["cost"]
    if not wrong and not Ledger.is_state(state["ledger"]):
        wrong = ["ledger"]
    if not wrong and "history" in state:
        try:
            History.from_dict(state["history"])
        except ValueError:
            wrong = ["history"]
    if not wrong and not _are_texts(state.get("notes", {})):
        wrong = ["notes"]
    if not wrong and "continued" in state and not _is_lineage(state["continued"], state.get("history")):
        wrong = ["continued"]
    if wrong:
        raise ValueError(f"the checkpoint is no good: its {wrong[0]!r} can't be")


def _are_texts(notes: object) -> bool:
    return isinstance(notes, dict) and all(type(text) is str for pair in notes.items() for text in pair)


def _is_lineage(note: object, history: Any) -> bool:
    """Return whether this may be what a state says of the run that its own run continues."""
    if not isinstance(note, dict) or history is None or note.keys() != {"first", "anew", "gone", "outputs", "notes"}:
        return False
    sizes = [note[name] for name in ("first", "gone", "outputs")]
    right = all(type(size) is int and size >= 0 for size in sizes) and type(note["anew"]) is bool and _are_texts(note["notes"])
    return right and note["gone"] < len(history["tasks"]) and note["first"] < len(history["visits"])


def _is_code(code: Mapping[str, Any]) -> bool:
    """Return whether the sources of a checkpoint are texts: see `Run.sources`."""
    if code.keys() != {"run", "observers"} or not all(isinstance(sources, dict) for sources in code.values()):
        return False
    entries = [
        [name, *source] for sources in code.values() for name, source in sources.items() if isinstance(source, (list, tuple))
    ]
    return len(entries) == sum(map(len, code.values())) and all(
        len(entry) == 4 and all(isinstance(text, str) for text in entry) for entry in entries
    )
