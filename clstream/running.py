"""A run while it goes on: what takes part, where it is, what it measured, and its state at any pause between two events."""

from __future__ import annotations

import hashlib
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from clstream import events
from clstream.answering import as_written
from clstream.bus import Bus, Emitter, members
from clstream.evaluation import Evaluation, evaluate
from clstream.forms import check_plain, plain
from clstream.origin import Origin
from clstream.params import Recorded, describe, flat
from clstream.restoration import restore
from clstream.seeds import derive, random_state, set_random_state
from clstream.snapshot import capture, origin_of
from clstream.source_code import Source, changes, checkout_hash, definitions, user_sources
from clstream.state import held, walk
from clstream.strategy import Strategy
from clstream.stream import Stream, Subset


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


class Run:
    """One strategy on one stream with one seed, while it goes on: what takes part, where it is, and what it measured so far.

    Args:
        strategy, stream, observers, seed, device, evaluate_every, max_sessions, code, accept_changed_code: see `run`.

    """

    def __init__(
        self,
        strategy: Strategy,
        stream: Stream,
        observers: tuple[object, ...],
        seed: int,
        device: str | torch.device,
        evaluate_every: int | None,
        max_sessions: int | None,
        code: Sequence[object] = (),
        accept_changed_code: bool = False,
    ) -> None:
        self.strategy, self.observers, self.seed, self.device = strategy, observers, seed, torch.device(device)
        self.evaluate_every, self.max_sessions = evaluate_every, max_sessions
        self.began = time.perf_counter()
        self.accept_changed_code, self.changed_code = accept_changed_code, list[str]()
        self.built_from = list(definitions(*_values(strategy, stream), *code))
        self.bus = Bus(strategy, *observers, learner=strategy)
        self.learning, self.watching = (
            Bus(strategy, learner=strategy),
            Bus(*observers),
        )  # its halves: they are not always told the same
        self.placed = Placed(strategy, device, seed, self.bus)
        self.stream = stream.reseeded(seed).to(device)
        self.sessions = min(len(stream), max_sessions or len(stream))
        self.position, self.step = Position(0), 0
        self.asked: list[Callable[[], object]] = []
        self.members = list(members(strategy))  # those that the bus calls, whatever becomes of `parts`
        self.identity = described(strategy, self.stream, seed, self.device.type) | {
            "stream.seed": self.stream.seed,
            "stream.augment": describe(self.stream.augment),
            "shapes of the weights": shapes(strategy),
            "evaluate_every": evaluate_every,
            "max_sessions": max_sessions,
            **({} if stream.shuffle else {"stream.shuffle": False}),
        }

    @property
    def seconds(self) -> float:
        """How long it took so far, without the breaks between a kill and the resumption."""
        return time.perf_counter() - self.began

    @cached_property
    def origin(self) -> Origin:
        """What was there when the run began, or when it was first asked for its state."""
        return origin_of(self.members, self.stream)

    @cached_property
    def sources(self) -> dict[str, dict[str, Source]]:
        """The user's own source code: "run" of what learns and is learned, "observers" of what only observers are built from."""
        run = user_sources(self.built_from)
        observers = user_sources(definitions(*(part for each in self.observers for part in members(each))))
        return {"run": run, "observers": {name: source for name, source in observers.items() if name not in run}}

    @cached_property
    def checkout(self) -> str:
        """See `checkout_hash`."""
        return checkout_hash(self.built_from)

    def ask(self, call: Callable[[], object]) -> None:
        """Have something done as soon as no event is under way: between two batches, or after an evaluation."""
        self.asked.append(call)

    def pause(self) -> None:
        """Do what was asked for."""
        asked, self.asked = self.asked, []
        with as_written(False):
            for call in asked:
                call()

    def start(self, resume: Mapping[str, Any] | None) -> None:
        """Tell everyone, then ask the untrained strategy, or restore what a checkpoint holds."""
        started = events.RunStarted(self.stream, self.strategy, self.seed, resume is not None, self)
        told: Any = self.stream.told
        self.learning.emit(started if told is self.stream else replace(started, stream=told, run=None))
        self.watching.emit(started)
        self.placed.update()
        if self.asked or resume is not None:
            self.origin  # noqa: B018  # before the first question to the untrained strategy, which a resumed run leaves out
        if resume is None:
            self.evaluation = Evaluation.of_untrained(*evaluate(self.strategy, self.stream), self.stream.scenario)
        else:
            self.restore(resume)
        self.pause()

    def evaluate(self, task: int, within_session: bool) -> None:
        """Evaluate, keep the rows, and tell; `task` is what is being taught."""
        self.evaluation = self.evaluation.after(*evaluate(self.strategy, self.stream), task, self.step, within_session)
        (self.bus if self.stream.boundaries else self.watching).emit(events.Evaluated(self.evaluation))  # it says what was taught

    def measured(self) -> dict[str, Any]:
        """Return what was measured so far, and of what."""
        return {
            "evaluation": {each.name: getattr(self.evaluation, each.name) for each in fields(Evaluation)},
            "params": described(self.strategy, self.stream, self.seed, self.device),
            "seconds": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain values and tensors: the objects' own, not copies.

        Raises CaptureError for what the strategy holds that can't be written.
        """
        held, numbers = capture(self.members, self.origin)
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        observers = [[type(each).__qualname__, each.state_dict()] for each in self.observers if hasattr(each, "state_dict")]
        rest = {
            **self.measured(),
            "identity": self.identity | {"data fingerprint": self.stream.fingerprint},
            "code": self.sources,
            "clstream code": self.checkout,
            "position": list(astuple(self.position)),
            "sessions": self.sessions,
            "step": self.step,
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": cuda,
                "numpy": random_state(np.random),
                "python": random_state(random),
            },
            "placed": sorted(numbers[each] for each in self.placed.known if each in numbers),
            "observers": observers,
        }
        return {name: plain(value, f"the state of {name}") for name, value in rest.items()} | {"strategy": held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put everything into the state of a checkpoint. Raises ValueError for one that doesn't fit."""
        made = restore(self.members, state["strategy"], self.origin, self.device)
        self.placed.know(made[number] for number in state["placed"] if number < len(made))
        self.position, self.step = Position(*state["position"]), state["step"]
        self.began = time.perf_counter() - state["seconds"]
        self.evaluation = Evaluation(**state["evaluation"])
        kept = list(state["observers"])
        for each in self.observers:
            mine = next((one for one in kept if one[0] == type(each).__qualname__), None)
            if mine is not None and hasattr(each, "load_state_dict"):
                kept.remove(mine)
                try:
                    each.load_state_dict(mine[1])
                except (TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
                    raise ValueError(f"{mine[0]} can't take up its state in the checkpoint ({error!r})") from error
            elif hasattr(each, "load_state_dict") and not getattr(each, "joins_late", False):
                warnings.warn(
                    f"{type(each).__name__} was not among the observers when the checkpoint was written: it sees only what comes "
                    "from there on",
                    RuntimeWarning,
                    stacklevel=2,
                )
        chance = state["random"]
        try:
            torch.set_rng_state(chance["torch"])
            if chance["cuda"] is not None:
                torch.cuda.set_rng_state(chance["cuda"], self.device)
            set_random_state(np.random, chance["numpy"])
            set_random_state(random, chance["python"])
        except (TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint is no good: the state of a random generator is none ({error})") from error

    def check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another run, and say what differs; ValueError for what is no checkpoint.

        Changed code that is accepted is kept as `changed_code`.
        """
        check_state(state)
        theirs, ours = state["identity"], self.identity | {"data fingerprint": self.stream.fingerprint}
        names = [name for name in {**ours, **theirs} if repr(theirs.get(name)) != repr(ours.get(name))]  # NaN is NaN
        if names:
            differences = "; ".join(f"{name} was {theirs.get(name)!r}, now it is {ours.get(name)!r}" for name in names[:3])
            more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
            raise OtherRunError(f"the checkpoint is of another run: {differences}{more}. Run what it was made by, or start anew")
        session, epoch, batch = state["position"]
        if session > self.sessions or epoch >= self.stream.epochs or (session == self.sessions and (epoch or batch)):
            raise ValueError(f"the checkpoint is no good: this run has no session, epoch and batch {session}, {epoch}, {batch}")
        now, then = self.sources, state["code"]
        both = {**now["run"], **now["observers"]}
        self.changed_code = changes(then["run"], {name: both[name] for name in both if name in {*now["run"], *then["run"]}})
        self.changed_code += changes(then["observers"], both, only_common=True)
        if self.changed_code and not self.accept_changed_code:
            raise ChangedCodeError(self.changed_code)
        if state["clstream code"] and self.checkout not in ("", state["clstream code"]):
            warnings.warn(
                "this is a checkout of clstream, and its code is not what it was when the checkpoint was written: the run may end "
                "otherwise than without the break",
                RuntimeWarning,
                stacklevel=3,
            )


def check_state(state: object) -> None:
    """Refuse what is not the state of a run, in a sentence. Raises ValueError."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "identity": dict, "position": list, "sessions": int, "step": int, "random": dict, "placed": list, "observers": list,
        "strategy": dict, "evaluation": dict, "params": dict, "seconds": (int, float), "code": dict, "clstream code": str,
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
    if not wrong and not all(isinstance(each, list) and len(each) == 2 for each in state["observers"]):
        wrong = ["observers"]
    if not wrong and not _is_code(state["code"]):
        wrong = ["code"]
    if not wrong and not _is_evaluation(state["evaluation"]):
        wrong = ["evaluation"]
    if wrong:
        raise ValueError(f"the checkpoint is no good: its {wrong[0]!r} can't be")


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


def _is_evaluation(found: Mapping[str, Any]) -> bool:
    """Return whether fields are those of an Evaluation: of its types, with as many columns as tasks."""
    if found.keys() != {each.name for each in fields(Evaluation)}:
        return False
    kinds: dict[str, type] = {"probe_steps": tuple, "scenario": str, "within_session": bool}
    if not all(isinstance(value, kinds.get(name, torch.Tensor)) for name, value in found.items()):
        return False
    tasks, rows, probes = len(found["baseline"]), len(found["accuracy"]), len(found["probes"])
    shapes = {"accuracy": (rows, tasks), "task_accuracy": (rows, tasks), "taught": (rows, tasks), "probes": (probes, tasks),
              "probe_taught": (probes, tasks), "baseline": (tasks,), "task_baseline": (tasks,)}  # fmt: skip
    return all(found[name].shape == shape for name, shape in shapes.items()) and len(found["probe_steps"]) == probes


class Placed:
    """What a strategy holds, in the run: modules on its device, generators seeded from its seed and their place, emitters heard.

    `update` takes in what came to be since: experts, heads, a memory for a new task.
    """

    def __init__(self, strategy: Strategy, device: str | torch.device, seed: int, bus: Bus) -> None:
        self.strategy, self.device, self.seed, self.bus = strategy, device, seed, bus
        self.known: dict[int, object] = {}  # the objects themselves, so that no new one gets the id of an old one
        self.update()

    def update(self) -> None:
        """Place what is new."""
        for path, value in self.walk():
            if not isinstance(value, (nn.Module, torch.Generator, Emitter)) or id(value) in self.known:
                continue
            self.known[id(value)] = value
            if isinstance(value, nn.Module):
                value.to(self.device)
            elif isinstance(value, torch.Generator):
                value.manual_seed(derive(self.seed, path))
            else:
                value.bus = self.bus

    def walk(self) -> Iterator[tuple[str, object]]:
        """Yield what the strategy holds with its place; what a wrapped one holds has the place that it has unwrapped.

        So a wrapper's host draws the same random numbers as it does alone.
        """
        wrapped = [each for each in members(self.strategy) if isinstance(each, Strategy)]
        names = Counter[str]()
        for strategy in reversed(wrapped):
            name = type(strategy).__name__
            names[name] += 1
            mark = f"{name}#{names[name]}" if names[name] > 1 else name
            for path, value in walk(strategy):
                yield mark + path.removeprefix(name), value

    def know(self, objects: Iterable[object]) -> None:
        """Take objects as placed before: their generators are under way."""
        self.known = {id(value): value for value in objects}
        for value in self.known.values():
            if isinstance(value, Emitter):
                value.bus = self.bus

    def leave(self) -> None:
        """Take the emitters out of the run."""
        for value in self.known.values():
            if isinstance(value, Emitter):
                value.bus = None


def described(
    strategy: Strategy, stream: Stream, seed: int, device: str | torch.device
) -> dict[str, str | int | float | bool | None]:
    """Return what is run, by name, in plain values."""
    model = getattr(strategy, "model", None)
    return {
        **flat(strategy, "strategy"),
        **(flat(model, "model") if isinstance(model, Recorded) else {"model": type(model).__name__}),
        "stream": stream.name,
        "stream.tasks": len(stream.tasks),
        "stream.sessions": len(stream),
        "stream.scenario": stream.scenario,
        "stream.epochs": stream.epochs,
        "stream.batch_size": stream.batch_size,
        "stream.boundaries": stream.boundaries,
        **({"stream.drop_last": True} if stream.drop_last else {}),
        "seed": seed,
        "device": str(device),
    }


def _values(strategy: Strategy, stream: Stream) -> Iterator[object]:
    """Yield what a strategy and a stream hold that code of the user's own may belong to."""
    for _, value in walk(strategy):
        yield value
        if isinstance(value, Recorded):
            yield from (param for _, param in walk(dict(getattr(value, "params", {}))))
    parts = [part for task in stream.tasks for part in (task.train, task.test, task.validation) if isinstance(part, Subset)]
    yield stream
    for held_by_stream in (stream.augment, stream.schedule, *(part.transform for part in parts)):
        yield from (value for _, value in walk(held_by_stream))


def shapes(strategy: Strategy) -> str:
    """Return a hash of the names, shapes and types of all weights."""
    found = [
        f"{path}.{name} {tuple(each.shape)} {each.dtype}"
        for path, module in held(strategy, nn.Module)
        for name, each in [*module.named_parameters(), *module.named_buffers()]
    ]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
