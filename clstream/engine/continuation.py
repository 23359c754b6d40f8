"""Continuation: a run goes on where another one ended, with more sessions, tasks or classes.

What it goes on from is a checkpoint, or the result of a run whose strategy is still there. A stream that begins with the sessions
that were learned goes on after these; of any other one, its sessions come after them, and the
tasks before have no samples any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.attributes import find_all
from clstream.checkpoint.saved_state import OtherRunError, check_state
from clstream.checkpoint.store import newest
from clstream.memory import Memory
from clstream.models import GrowingHead, grow
from clstream.models.heads import grow_state, output_layer, widen
from clstream.results import Evaluation, Result
from clstream.seeds import derive
from clstream.strategy import Strategy
from clstream.stream import History, PoolSchedule, Stream
from clstream.training import Training

_MAY_DIFFER = (
    "stream",
    "data fingerprint",
    "max_sessions",
    "evaluate_",
    "probes",
    "device",
    "precision",
    "deterministic",
    "compile",
)
"""What the names begin with of what a run that continues another one may have otherwise."""

_ENDS = WeakKeyDictionary[Result, "End"]()
"""How runs of this process ended, by their results."""


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended: the strategy, and all else that its state has."""

    strategy: ref[Strategy]
    state: Mapping[str, Any]


def note_end(result: Result, strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Keep how the run ended that a result is of, as long as the result is there."""
    _ENDS[result] = End(ref(strategy), state)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a run comes from that continues another one, as its own state has it.

    Args:
        first: the session that it begins with; the ones before were finished then.
        anew: whether that session begins its task, whatever came before: the run before ended the task.
        gone: how many of the first tasks have no samples any more.
        outputs: how many the strategy must answer with before it grows.
        notes: what was noted of the run before: see `RunControl`.
        past: what the run before had delivered.

    """

    first: int
    anew: bool
    gone: int
    outputs: int
    notes: Mapping[str, str]
    past: History

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; those of `past` are in the history of the run itself."""
        return {
            "first": self.first, "anew": self.anew, "gone": self.gone, "outputs": self.outputs, "notes": dict(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a run goes on from, and the stream that it goes on with.

    Args:
        state: of the run before, at its end; without the strategy's if that is the one that was run.
        history: of the run before.
        stream: with the tasks and sessions of the run before as its first ones.
        lineage: of the run that goes on.

    """

    state: Mapping[str, Any]
    history: History
    stream: Stream
    lineage: Lineage


def continuation_of(source: Result | str | Path | Mapping[str, Any], strategy: Strategy, stream: Stream) -> Continuation:
    """Return what `run(strategy, stream, continues=source)` goes on from. Raises ValueError or TypeError for what can't be."""
    if stream.arrives:
        raise ValueError(
            f"{stream.name} arrives while the run goes on: such a run begins anew, or is resumed, and continues no other"
        )
    state = _state_of(source, strategy)
    if "arrivals" in state:
        raise ValueError("a run on a stream that arrives is resumed, and not continued: what comes later is learned then")
    if "history" not in state and stream.fingerprint == state["identity"].get("data fingerprint"):
        state = {**state, "history": History.of(stream).to_dict()}
    if "history" not in state:
        raise ValueError(
            "the checkpoint is of a version of clstream whose runs could not be continued, since it doesn't say what was learned: "
            "go on with it by resume, on the stream that it is of"
        )
    history = History.from_dict(state["history"])
    finished, *within = state["position"]
    ended, begun = finished == state["sessions"], finished + any(within)
    outputs = state["continued"]["outputs"] if "strategy" in state and "continued" in state else history.outputs
    probes = list(state["evaluation"]["test_sets"])[len(history.tasks) : -1]
    if history.begins(stream, begun):
        if finished >= len(stream):
            raise ValueError(
                f"all {len(stream)} sessions of {stream.name} were learned by the run before: give a stream with more of them"
            )
        whole, gone = history.with_lost_probes(stream, probes), 0
    else:
        history.check_follows(stream, begun)
        if not ended:
            raise ValueError(
                f"the run before was stopped in task {history.visits[finished][0]} of {history.name}: give a stream that begins "
                "with what it had learned, as that one does"
            )
        if isinstance(stream.schedule, PoolSchedule):
            raise ValueError(f"{stream.name} is over a pool, whose first session can't come after another stream: start anew")
        history = replace(history, visits=history.visits[:finished])
        whole, gone = history.with_lost_probes(history.followed_by(stream), probes), len(history.tasks)
        warnings.warn(
            f"the {gone} tasks of {history.name} are not asked about any more, since {stream.name} doesn't begin with them: what "
            "was measured of them stays, and is NaN from here on",
            UserWarning,
            stacklevel=3,
        )
    return Continuation(state, history, whole, Lineage(finished, ended, gone, outputs, dict(state.get("notes", {})), history))


def resumed(stream: Stream, state: Mapping[str, Any]) -> tuple[Stream, Lineage]:
    """Return the whole stream and the lineage of a run that continued another one, and is resumed on the stream it was given."""
    check_state(state)
    note, history = state["continued"], History.from_dict(state["history"])
    first, gone = note["first"], note["gone"]
    past = replace(history, visits=history.visits[:first])
    if gone:
        classes = 1 + max((label for task in history.tasks[:gone] for label in task.classes), default=-1)
        past = replace(past, tasks=history.tasks[:gone], classes=classes, class_names=history.class_names[:classes])
        stream = past.followed_by(stream)
    probes = list(state["evaluation"]["test_sets"])[len(stream.tasks) : -1]
    return history.with_lost_probes(stream, probes), Lineage(first, note["anew"], gone, note["outputs"], note["notes"], past)


def _state_of(source: object, strategy: Strategy) -> Mapping[str, Any]:
    """Return the state that a run ended with."""
    if isinstance(source, Result):
        end = _ENDS.get(source)
        if end is None:
            raise ValueError(
                "continues takes the result that run returned in this process, and this one is a copy, or was read from a file: "
                "give the folder of its checkpoints"
            )
        if end.strategy() is not strategy:
            raise ValueError(
                f"this result is of another strategy than the {type(strategy).__name__} that is to go on: give run the one that it "
                "is of, or continues the folder of its checkpoints"
            )
        return end.state
    if isinstance(source, (str, Path)):
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r} whose run could be continued")
        state = newest(folder)
        if state is None:
            raise ValueError(f"{folder} has no checkpoint to go on from: give the folder that a Checkpointer wrote to")
        return state
    if not isinstance(source, Mapping):
        raise TypeError(f"continues takes a result of run, or a folder of checkpoints, not a {type(source).__name__}")
    check_state(source)
    return source


def check_continues(identity: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a state of a run with another strategy, model or seed; return the identity of the run that goes on.

    Raises OtherRunError, a ValueError, and says what differs.
    """
    before = state["identity"]
    same_object = "strategy" not in state
    own = dict(identity)
    if same_object:
        own |= {name: before[name] for name in before if name.startswith(("strategy", "model", "shapes"))}
    free = {"model.classes"}
    if not any(state["position"][1:]):
        free |= {name for name in (*own, *before) if name.startswith("train.")}
    if repr(before.get("model.classes")) != repr(own.get("model.classes")):
        free.add("shapes of the weights")
    names = [
        name
        for name in {**own, **before}
        if not name.startswith(_MAY_DIFFER) and name not in free and repr(before.get(name)) != repr(own.get(name))
    ]
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, now it is {own.get(name)!r}" for name in names[:3])
        raise OtherRunError(
            f"the run before can't be continued so: {differences}. Build the strategy as it was built then, with the same seed"
        )
    return own


def controls_before(identity: Mapping[str, Any]) -> Training | None:
    """Return the training controls of a run by its identity; None if it had none."""
    given = {name.removeprefix("train."): value for name, value in identity.items() if name.startswith("train.")}
    return Training(**given) if given else None


def check_room(strategy: Strategy) -> None:
    """Refuse a strategy whose network has no way to get more outputs. Raises ValueError."""
    model = getattr(strategy, "model", None)
    if not isinstance(model, nn.Module) or any(isinstance(module, GrowingHead) for module in model.modules()):
        return
    if strategy.takes_new_classes:
        output_layer(model)


def grow_held(strategy: Strategy, outputs: int, before: int, seed: int) -> list[str]:
    """Give what a strategy holds room for more classes; return the layers that got new outputs.

    That is all networks, copies and teachers too, what optimizers know of their last layers, and the outputs that memories keep
    as `extra["logits"]`, which are -inf for classes that came later. Copies get the same new weights, for those of an output
    that has learned nothing are the same in all of them.
    """
    if not strategy.takes_new_classes or outputs <= before:
        return []
    networks = find_all(strategy, nn.Module)
    rows = {weight: len(weight) for _, network in networks for weight in network.parameters() if weight.dim()}
    for _, network in networks:
        widen(network, outputs)
    model, grown = strategy.model, list[str]()
    if not any(isinstance(module, GrowingHead) for module in model.modules()):
        name = output_layer(model)
        width = _width(model, name)
        for path, network in networks:
            if type(network) is type(model) and _width(network, name) == width < outputs:
                grow(network, outputs, torch.Generator().manual_seed(derive(seed, f"outputs {before} {outputs}")))
                grown.append(f"{path}.{name}".rstrip("."))
    changed = {weight: count for weight, count in rows.items() if len(weight) != count}
    for _, optimizer in find_all(strategy, Optimizer):
        grow_state(optimizer, changed)
    for _, memory in find_all(strategy, Memory):
        memory.widen("logits", outputs, float("-inf"))
    return grown


def _width(network: nn.Module, name: str) -> int:
    layer: Any = network.get_submodule(name)
    return int(layer.out_features)


def joined_evaluation(before: Evaluation, history: History, stream: Stream, gone: int) -> Evaluation:
    """Return the evaluation of a run before with the columns of a stream that goes on: NaN of what was not asked then."""
    tasks, own = len(stream.tasks), len(before.targets)
    kept = [task < gone or (task < tasks and history.tasks[task].content == stream.contents[task]) for task in range(own)]
    places = {task: task for task in range(own) if kept[task]}
    names = (*(test_set.name for test_set in stream.test_sets), "seen")
    places |= {column: names.index(before.test_sets[column]) for column in range(own, len(before.test_sets))}
    old, new = torch.tensor(list(places)), torch.tensor(list(places.values()))

    def columns(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.full((len(names),), torch.nan, dtype=torch.float64).index_copy(0, new, row[old])
            for name, row in values.items()
        }

    def marks(row: Tensor) -> Tensor:
        return torch.cat([row[:tasks], row.new_zeros(max(0, tasks - own))])

    rows = tuple(replace(row, values=columns(row.values), taught=marks(row.taught), seen=marks(row.seen)) for row in before.rows)
    since = None if before.taught_since is None else marks(before.taught_since)
    targets = tuple(task.target for task in stream.tasks)
    return replace(before, test_sets=names, targets=targets, start=columns(before.start), rows=rows, taught_since=since)
