"""The simulation: a run under way, with its position, its results so far, and its state between any two events."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clstream import events
from clstream.bus import Bus, Stopwatch, with_parts
from clstream.checkpoint.saved_state import ChangedCodeError, OtherRunError, Position, check_state
from clstream.engine.about import RunFacts
from clstream.engine.arrivals import ENDLESS, arrivals
from clstream.engine.compiled_step import CompiledStep
from clstream.engine.continuation import Continuation, Lineage, check_continues, controls_before, grow_held, joined_evaluation
from clstream.engine.controls import Controls
from clstream.engine.labels import buy_labels
from clstream.engine.numerics import Numerics
from clstream.engine.placement import Placement
from clstream.engine.run_params import built_from, run_params, weight_shapes_hash
from clstream.eval_mode import as_written
from clstream.evaluation import Listener, Questions, measure
from clstream.measures import Measure, chosen
from clstream.measures.cost import Cost
from clstream.measures.ledger import Ledger
from clstream.params import describe
from clstream.results import Evaluation, result_of
from clstream.seeds import random_state, set_random_state
from clstream.serialization import capture, restore
from clstream.serialization.capture import references_of
from clstream.serialization.encoding import to_plain
from clstream.serialization.references import References
from clstream.serialization.same_code import Source, changes
from clstream.serialization.source_code import as_files, checkout_hash, definitions, user_sources
from clstream.strategy import Strategy
from clstream.stream import ArrivingStream, Delivery, History, PoolSchedule, Stream, Task
from clstream.training import Training


class Simulation:
    """One strategy on one stream with one seed, while it goes on: what takes part, where it is, and what it measured so far.

    Args:
        strategy, stream, observers, seed, device, evaluate_every, evaluate_at, evaluate_on, max_sessions, code,
        accept_changed_code: see `run`.
        measures: that are taken.
        numerics: how it computes.
        train: its training controls.
        lineage: of a run that continues another one, also if it is resumed.
        continues: what it goes on from, if it begins so.

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
        evaluate_at: str = "sessions",
        evaluate_on: str = "all",
        measures: Sequence[Measure] | None = None,
        numerics: Numerics = Numerics(),
        train: Training | None = None,
        lineage: Lineage | None = None,
        continues: Continuation | None = None,
    ) -> None:
        self.strategy, self.observers, self.seed, self.device = strategy, observers, seed, torch.device(device)
        self.evaluate_every, self.max_sessions = evaluate_every, max_sessions
        self.evaluate_at, self.evaluate_on = evaluate_at, evaluate_on
        self.measures = chosen(None, stream.targets, stream.scenario) if measures is None else tuple(measures)
        self.numerics = numerics
        self.options: dict[str, str | int | float | bool] = {**numerics.options, **({} if train is None else train.options)}
        self.questions: Questions | None = None
        self.began = time.perf_counter()
        self.accept_changed_code, self.changed_code = accept_changed_code, list[str]()
        self.built_from = list(definitions(*built_from(strategy, stream), *self.measures, *code))
        self.stream = stream.reseeded(seed).to(device)
        self.controls = Controls(train, strategy, self.stream, max_sessions)
        self.tracking = Stopwatch()
        learning = self.controls.learning
        self.bus = Bus(learning, *observers, learner=learning, stopwatch=self.tracking)
        self.controls.connect(self.bus)
        # its halves: some events are for one of them only
        self.strategy_bus, self.observer_bus = Bus(learning, learner=learning), Bus(*observers, stopwatch=self.tracking)
        self.lineage, self.continuation = lineage, continues
        was_run = continues is not None and "strategy" not in continues.state
        self.placement = Placement(strategy, device, seed, self.bus, seeded=was_run)
        self.ledger = Ledger(strategy, self.stream, self.device, lambda: self.seconds, self.tracking)
        self.bus.on_own_event = self.ledger.meter.on_own_event
        self.compiled = CompiledStep(strategy, stream.batch_size, self.device, self.ledger) if numerics.compile else None
        self.learn = numerics.lowered((self.compiled or strategy).learn, self.device)
        length, first = ENDLESS if stream.arrives else len(stream), 0 if lineage is None else lineage.first
        self.sessions = min(length, first + (max_sessions or length))
        self.position, self.step, self.begun = Position(0), 0, 0
        self.losses = list[Tensor]()  # of the newest batches, not looked at yet
        self.deferred: list[Callable[[], object]] = []
        self.parts = [*with_parts(strategy), *self.controls.parts]  # those that the bus calls, whatever becomes of `strategy.parts`
        self.identity = run_params(strategy, self.stream, seed, self.device.type) | {
            "stream.seed": self.stream.seed,
            "stream.augment": describe(self.stream.augment),
            "shapes of the weights": weight_shapes_hash(strategy),
            "evaluate_every": evaluate_every,
            "evaluate_at": evaluate_at,
            "evaluate_on": evaluate_on,
            "measures": ", ".join(measure.name for measure in self.measures),
            "probes": ", ".join(probe.name for probe in stream.probes),
            "max_sessions": max_sessions,
            **({} if stream.shuffle else {"stream.shuffle": False}),
            **self.options,
        }
        if continues is not None:
            self.identity = check_continues(self.identity, continues.state)
        self.notes = dict[str, str]()

    @property
    def continues(self) -> Mapping[str, str] | None:
        """See `RunControl`."""
        return None if self.lineage is None else self.lineage.notes

    @cached_property
    def history(self) -> History:
        """What the stream delivers, for a run that continues this one."""
        return History.of(self.stream) if self.lineage is None else History.of(self.stream, self.lineage.past, self.lineage.gone)

    @property
    def seconds(self) -> float:
        """How long it took so far, without the breaks between a kill and the resumption."""
        return time.perf_counter() - self.began

    @cached_property
    def references(self) -> References:
        """The objects of the run when it began, or when its state was first asked for: what a state may refer to."""
        return references_of(self.parts, self.stream)

    @cached_property
    def sources(self) -> dict[str, dict[str, Source]]:
        """The user's own source code: "run" of what learns and is learned, "observers" of what only observers are built from."""
        run = user_sources(self.built_from)
        observers = user_sources(definitions(*(part for observer in self.observers for part in with_parts(observer))))
        return {"run": run, "observers": {name: source for name, source in observers.items() if name not in run}}

    @cached_property
    def checkout(self) -> str:
        """See `checkout_hash`."""
        return checkout_hash(self.built_from)

    @cached_property
    def listener(self) -> Listener | None:
        """What is told of answers: the observers, if one handles `Answered`."""
        if not self.observer_bus.hears(events.Answered):
            return None
        return lambda *answered: self.observer_bus.emit(events.Answered(*answered))

    def ask(self, seen: Tensor) -> dict[str, Tensor]:
        """Return the values of the measures now, as `Row` has them. `seen` is (tasks,), bool: the tasks taught so far."""
        asked = seen if self.evaluate_on == "seen" else torch.ones_like(seen)
        if self.questions is None or not torch.equal(self.questions.asked, asked):
            self.questions = Questions(self.strategy, self.stream, asked, self.measures)
        with self.ledger.evaluating(), self.numerics.lowering(self.device):
            return measure(self.strategy, self.questions, seen, self.listener)

    @property
    def cost(self) -> Cost:
        """See `RunControl`."""
        return self.ledger.cost()

    @property
    def source_files(self) -> dict[str, str]:
        """See `RunControl`."""
        return as_files({**self.sources["observers"], **self.sources["run"]})

    def deliveries(self) -> Iterator[Delivery]:
        """Return the sessions that are left, with their tasks; the first one may be under way."""
        if self.stream.arrives:
            yield from arrivals(self)
            return
        first = self.lineage.first if self.lineage is not None and self.lineage.anew else -1
        if not isinstance(self.stream.schedule, PoolSchedule):
            for delivery in self.stream.deliveries(self.position.session, self.sessions):
                self.begun = delivery.session.index + 1
                anew = delivery.session.index == first and self.stream.boundaries
                yield delivery._replace(begins_task=True) if anew else delivery
            return
        for index in range(self.position.session, self.sessions):
            if index and self.position == Position(index):  # else it goes on within the session
                with self.ledger.meter.counting("learning"):
                    self.take_labels(buy_labels(self.stream, index, self.strategy, self.bus.emit))
            self.begun = index + 1
            yield from self.stream.deliveries(index, index + 1)

    def defer(self, call: Callable[[], object]) -> None:
        """See `RunControl`."""
        self.deferred.append(call)

    def run_deferred(self) -> None:
        """Make the deferred calls; no event is under way."""
        deferred, self.deferred = self.deferred, []
        with self.tracking, as_written(False):
            for call in deferred:
                call()

    def emit_to_observers(self, event: events.Event) -> None:
        """See `RunControl`."""
        self.observer_bus.emit(event)

    def start(self, resume: Mapping[str, Any] | None) -> None:
        """Emit `RunStarted`, then evaluate the untrained strategy, or restore a checkpoint."""
        started = events.RunStarted(self.stream, self.strategy, self.seed, resume is not None, self)
        visible: Any = self.stream.visible
        with self.ledger.meter.counting("learning"):
            self.strategy_bus.emit(started if visible is self.stream else replace(started, stream=visible, run=None))
        self.observer_bus.emit(started)
        self.placement.update()
        if self.deferred or resume is not None:
            self.references  # noqa: B018  # before the first question to the untrained strategy, which a resumed run leaves out
        if resume is None:
            start = self.ask(torch.zeros(len(self.stream.tasks), dtype=torch.bool))
            names = (*(test_set.name for test_set in self.stream.test_sets), "seen")
            lower = tuple(measure.name for measure in self.measures if not measure.higher_is_better)
            targets = tuple(task.target for task in self.stream.tasks)
            self.evaluation = Evaluation(names, targets, self.stream.scenario, start, lower_is_better=lower)
        else:
            self.restore(resume)
        self.strategy.about = self.about
        self.run_deferred()

    def go_on(self) -> None:
        """Emit `RunStarted`, take up the state that the run before ended with, grow with the classes, and emit `RunContinued`."""
        assert self.continuation is not None
        state, history, stream = self.continuation.state, self.continuation.history, self.stream
        started = events.RunStarted(stream, self.strategy, self.seed, False, self)
        visible: Any = stream.visible
        if "strategy" in state:
            with self.ledger.meter.counting("learning"):
                self.strategy_bus.emit(started if visible is stream else replace(started, stream=visible, run=None))
        self.observer_bus.emit(started)
        self.placement.update()
        train = controls_before(state["identity"])
        then = {} if train is None else train.options
        if "strategy" in state and then != {name: self.options[name] for name in self.options if name.startswith("train.")}:
            self.references  # noqa: B018  # as they are when the run begins
            self.take_up(state, [*with_parts(self.strategy), *Controls(train, self.strategy, stream, None).parts])
        else:
            self.take_up(state)
        if not any(state["position"][1:]):
            self.controls.go_on(history.visits[self.position.session - 1][0], stream)
        self.evaluation = joined_evaluation(self.evaluation, history, stream, self.continuation.lineage.gone)
        grown = grow_held(self.strategy, stream.outputs, history.outputs, self.seed)
        if grown:
            warnings.warn(
                f"the outputs of {', '.join(grown[:3])} for new classes are drawn now: one that grows, head='growing', draws them "
                "when the classes come, as in one run over the whole stream",
                UserWarning,
                stacklevel=4,
            )
        continued = events.RunContinued(stream, self.continuation.lineage.first, len(history.tasks), history.classes)
        with self.ledger.meter.counting("learning"):
            self.strategy_bus.emit(continued if visible is stream else replace(continued, stream=visible, tasks=0))
        self.observer_bus.emit(continued)
        self.placement.update()
        self.references  # noqa: B018  # before a checkpoint refers to what there is
        self.strategy.about = self.about
        self.run_deferred()

    def evaluate(self, task: Task, within_session: bool) -> None:
        """Evaluate, keep the rows, and emit `Evaluated`; `task` is what is being taught."""
        values = self.ask(self.evaluation.seen(task.id))
        finished = self.position.session + (not within_session)
        self.evaluation = self.evaluation.after(values, task.id, self.step, within_session, finished)
        bus = self.bus if self.stream.boundaries else self.observer_bus  # it says what was taught
        bus.emit(events.Evaluated(self.evaluation))

    def after_session(self, delivery: Delivery) -> None:
        """Evaluate if the run evaluates after this session; if not, keep in mind what it taught."""
        last = delivery.session.index + 1 == self.sessions
        if {"sessions": True, "tasks": delivery.ends_task, "end": last}[self.evaluate_at]:
            self.evaluate(delivery.task, within_session=False)
        else:
            self.evaluation = self.evaluation.after_session(delivery.task.id, self.step)

    def about(self) -> dict[str, Any]:
        """Return what a card says of the run so far: see `RunFacts`."""
        return RunFacts(self.stream, self.begun, result_of(self.measured())).about()

    def leave(self) -> None:
        """Leave the strategy: it emits nothing more, has no training controls, and keeps what there is to say of the run."""
        self.placement.leave()
        self.controls.leave()
        if self.strategy.about == self.about:
            self.strategy.about = partial(dict, self.about())  # plain values: what holds the stream would lead to its test sets

    def measured(self) -> dict[str, Any]:
        """Return the results so far, and the parameters of the run."""
        return {
            "evaluation": self.evaluation.to_dict(),
            "params": run_params(self.strategy, self.stream, self.seed, self.device) | self.options,
            "seconds": self.seconds,
            "cost": self.cost.to_dict(),
        }

    def progress(self) -> dict[str, Any]:
        """Return the state of the run without those of the strategy and the observers."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            **self.measured(),
            "identity": self.identity,
            "position": list(astuple(self.position)),
            "sessions": self.sessions,
            "step": self.step,
            "ledger": self.ledger.state_dict(),
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": cuda,
                "numpy": random_state(np.random),
                "python": random_state(random),
            },
            **({} if self.stream.arrives else {"history": self.history.to_dict()}),
            "notes": self.notes,
            **({"labels": self.bought()} if isinstance(self.stream.schedule, PoolSchedule) else {}),
        }

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain values and tensors: the objects' own, not copies.

        Raises CaptureError for what the strategy holds that can't be written.
        """
        held, numbers = capture(self.parts, self.references)
        observers = [
            [type(observer).__qualname__, observer.state_dict()] for observer in self.observers if hasattr(observer, "state_dict")
        ]
        rest = {
            **self.progress(),
            "identity": self.identity | {"data fingerprint": self.stream.fingerprint},
            "code": self.sources,
            "clstream code": self.checkout,
            "placed": sorted(numbers[key] for key in self.placement.placed if key in numbers),
            "observers": observers,
            **({"arrivals": self.stream.state_dict()} if isinstance(self.stream, ArrivingStream) else {}),
            **({} if self.lineage is None else {"continued": self.lineage.to_dict()}),
        }
        return {name: to_plain(value, f"the state of {name}") for name, value in rest.items()} | {"strategy": held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put everything into the state of a checkpoint. Raises ValueError for one that doesn't fit."""
        self.take_up(state)
        self.notes = dict(state.get("notes", {}))
        self.restore_observers(state["observers"])

    def take_up(self, state: Mapping[str, Any], parts: Sequence[object] | None = None) -> None:
        """Put all but the observers into a state; the strategy too, unless it is the one that has it. Raises ValueError.

        `parts` are those that the state is of; None: those of the run.
        """
        if isinstance(self.stream.schedule, PoolSchedule):
            session, *within = state["position"]
            asked = session if any(within) else max(0, session - 1)
            self.take_labels(self.stream.scheduled(self.stream.schedule.restored(state.get("labels"), asked)))
        if isinstance(self.stream, ArrivingStream):
            session, *within = state["position"]
            self.stream.load_state_dict(state.get("arrivals"), session, any(within))
            if gone := self.stream.progress.gone:
                warnings.warn(
                    f"{len(gone)} sessions of {self.stream.name} can't be read again, {gone[0]} for one: they are asked about no "
                    "more",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if "strategy" in state:
            roots = self.parts if parts is None else parts
            references = self.references if parts is None else references_of(parts, self.stream)
            objects = restore(roots, state["strategy"], references, self.device)
            self.controls.enter()
            self.placement.take_over(objects[number] for number in state["placed"] if number < len(objects))
        self.position, self.step = Position(*state["position"]), state["step"]
        self.begun = self.position.session + any((self.position.epoch, self.position.batch))
        self.began = time.perf_counter() - state["seconds"]
        self.evaluation = Evaluation.from_dict(state["evaluation"])
        self.ledger.load_state_dict(state["ledger"])
        generators = state["random"]
        try:
            torch.set_rng_state(generators["torch"])
            if generators["cuda"] is not None:
                torch.cuda.set_rng_state(generators["cuda"], self.device)
            set_random_state(np.random, generators["numpy"])
            set_random_state(random, generators["python"])
        except (TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint is no good: the state of a random generator is none ({error})") from error

    def restore_observers(self, states: Sequence[list[Any]]) -> None:
        """Give each observer the state of the first one of its class that is left. Raises ValueError for one that doesn't fit."""
        left = list(states)
        for observer in self.observers:
            state = next((state for state in left if state[0] == type(observer).__qualname__), None)
            if state is not None and hasattr(observer, "load_state_dict"):
                left.remove(state)
                try:
                    observer.load_state_dict(state[1])
                except (TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
                    raise ValueError(f"{state[0]} can't take up its state in the checkpoint ({error!r})") from error
            elif hasattr(observer, "load_state_dict") and not getattr(observer, "joins_late", False):
                warnings.warn(
                    f"{type(observer).__name__} was not among the observers when the checkpoint was written: it sees only what "
                    "comes from there on",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def add_task(self, task: Task) -> None:
        """Go on with one more task, of a session that has arrived, which the stream has by now."""
        self.questions = None
        vars(self.ledger).pop("of_stream", None)
        if task.id:  # the first one was there from the start
            self.evaluation = self.evaluation.with_task(self.stream.test_sets[task.id].name, task.target)

    def take_labels(self, stream: Stream) -> None:
        """Go on with a stream that has more labels of its pool."""
        self.stream = stream
        if self.controls.stopping is not None:
            self.controls.stopping.stream = stream
        if "references" in vars(self):
            self.references.stream = stream

    def bought(self) -> dict[str, list[int]]:
        """Return the rows of the pool that were bought, by session."""
        assert isinstance(self.stream.schedule, PoolSchedule)
        return {str(session): rows.tolist() for session, rows in self.stream.schedule.bought.items()}

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
        self.check_code(state)

    def check_code(self, state: Mapping[str, Any], may_grow: bool = False) -> None:
        """Refuse a checkpoint of other code, unless that is accepted; the result of a run in this process is of the same.

        With `may_grow`, for runs on two streams, what one of them has alone is no matter, nor what a module has got beside.
        """
        if "code" not in state:
            return
        now, then = self.sources, state["code"]
        both = {**now["run"], **now["observers"]}
        ours = {name: both[name] for name in both if name in {*now["run"], *then["run"]}}
        self.changed_code = changes(then["run"], ours, may_grow, may_grow)
        self.changed_code += changes(then["observers"], both, True, may_grow)
        if self.changed_code and not self.accept_changed_code:
            raise ChangedCodeError(self.changed_code)
        if state["clstream code"] and self.checkout not in ("", state["clstream code"]):
            warnings.warn(
                "this is a checkout of clstream, and its code is not what it was when the checkpoint was written: the run may end "
                "otherwise than without the break",
                RuntimeWarning,
                stacklevel=3,
            )
