"""Subscription and dispatch: who hears which event, in what order.

The order is: base class first, then as defined in the class, then the handlers of `parts`; the strategy before the observers.
There are no priorities. An exception in a handler ends the run.

In handlers of a strategy and its parts, its `scores` and `predict` run as they are written: in training mode, with gradients. All
others are answered in evaluation mode: see `clstream.eval_mode`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter
from typing import Any, TypeVar

from clstream.eval_mode import AS_WRITTEN, as_written


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """Anything that happens in a run; subscribe to it to hear everything."""

    def curves(self) -> Mapping[str, float]:
        """Return numbers for the tracker, by the name of their curve; the newest ones are written at each evaluation."""
        return {}


E = TypeVar("E", bound=Event)
S = TypeVar("S")
Handler = Callable[[Any], None]
_MARK = "__clstream_events__"


class ObserverError(ValueError):
    """An observer can't watch this run; the message says why, and is all that the command line shows."""


def on(event: type[E]) -> Callable[[Callable[[S, E], None]], Callable[[S, E], None]]:
    """Mark a method as a handler of `event` and of the events derived from it.

    The method takes the event and returns nothing. A subclass that overrides it is called in its place.

    Raises:
        TypeError: if `event` is not an Event class, or the method can't be called with one event.

    """
    if not (isinstance(event, type) and issubclass(event, Event)):
        raise TypeError(f"@on takes the class of an event, such as @on(BatchLearned), not {event!r}")

    def mark(method: Callable[[S, E], None]) -> Callable[[S, E], None]:
        name = getattr(method, "__qualname__", repr(method))
        if not inspect.isfunction(method):
            raise TypeError(f"@on({event.__name__}) marks a method, not {name}")
        if not _takes_event(method):
            raise TypeError(
                f"{name} handles {event.__name__}, so it must take the event and nothing else, plainly: "
                f"def {method.__name__}(self, event)"
            )
        setattr(method, _MARK, (*getattr(method, _MARK, ()), event))
        return method

    return mark


def _takes_event(method: object) -> bool:
    """Return whether a function can be called with an object and one event, and then does what it says."""
    if not inspect.isfunction(method) or any(
        lazy(method) for lazy in (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    ):
        return False
    try:
        inspect.signature(method).bind(None, None)
    except TypeError:
        return False
    return True


def handlers_of(cls: type) -> Iterator[tuple[str, type[Event]]]:
    """Yield the name of each handler of a class, with the event that it handles, in the order of calls.

    Raises TypeError for a handler whose annotation names another event than its mark, that is a static or class method, or
    whose override can't be called with an event.
    """
    marked: dict[str, tuple[type[Event], ...]] = {}
    for base in reversed(cls.__mro__):
        for name, attribute in vars(base).items():
            if isinstance(attribute, (staticmethod, classmethod)) and hasattr(attribute.__func__, _MARK):
                raise TypeError(f"{base.__name__}.{name} handles an event, so it must be a plain method")
            if hasattr(attribute, _MARK):
                marked[name] = getattr(attribute, _MARK)
                _check_annotation(attribute, marked[name])
    for name, events in marked.items():
        if not _takes_event(getattr(cls, name)):
            raise TypeError(f"{cls.__name__}.{name} overrides a handler, so it must take the event: def {name}(self, event)")
        for event in events:
            yield name, event


def _check_annotation(method: Callable[..., None], events: tuple[type[Event], ...]) -> None:
    parameters = list(inspect.signature(method).parameters.values())
    expected = parameters[1].annotation if len(parameters) > 1 else None
    if isinstance(expected, str):
        first, *rest = expected.split(".")
        expected = getattr(method, "__globals__", {}).get(first)
        for name in rest:
            expected = getattr(expected, name, None)
    if isinstance(expected, type) and issubclass(expected, Event):
        for event in events:
            if not issubclass(event, expected):
                raise TypeError(f"{method.__qualname__} is marked @on({event.__name__}), but takes a {expected.__name__}")


def subscriptions(subscriber: object, _whole: frozenset[int] = frozenset()) -> Iterator[tuple[type[Event], Handler]]:
    """Yield each event that `subscriber` handles, with its bound method: base class first, parts last."""
    if isinstance(subscriber, type):
        raise TypeError(f"{subscriber.__name__} is a class: pass an object, {subscriber.__name__}(...)")
    if id(subscriber) in _whole:
        raise ValueError(f"{type(subscriber).__name__} is a part of itself")
    for name, event in handlers_of(type(subscriber)):
        yield event, getattr(subscriber, name)
    parts = getattr(subscriber, "parts", ())
    if not isinstance(parts, (tuple, list)):
        raise TypeError(f"{type(subscriber).__name__}.parts must be a tuple of objects, not a {type(parts).__name__}")
    for part in parts:
        yield from subscriptions(part, _whole | {id(subscriber)})


def with_parts(subscriber: object) -> Iterator[object]:
    """Yield an object and its parts, theirs too."""
    yield subscriber
    for part in getattr(subscriber, "parts", ()):
        yield from with_parts(part)


class Stopwatch:
    """Measures what observers take: `seconds`, and whether one of them is called now (`depth` above 0)."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.began = 0.0, 0, 0.0

    @property
    def total(self) -> float:
        """The seconds so far, with those since it was started."""
        return self.seconds + (perf_counter() - self.began if self.depth else 0.0)

    def __enter__(self) -> None:
        """Start it, unless it goes."""
        if not self.depth:
            self.began = perf_counter()
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        """Stop it, where it was started."""
        self.depth -= 1
        if not self.depth:
            self.seconds += perf_counter() - self.began


class Bus:
    """Calls the handlers of an event, in the order in which they subscribed.

    Args:
        subscribers: objects with methods marked by `on`.
        learner: the one of them that learns, if any: the strategy.
        stopwatch: measures what the others take.

    Raises:
        TypeError: for a class in place of an object, and for an object that handles nothing.
        ValueError: for an object that would hear everything twice.

    """

    def __init__(self, *subscribers: object, learner: object = None, stopwatch: Stopwatch | None = None) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self.on_own_event: Callable[[], object] = _nothing  # called when what learns has emitted an event of its own
        self._subscriptions: list[tuple[type[Event], Handler, bool]] = []  # with whether what hears learns
        for subscriber in subscribers:
            handlers = [(event, call, subscriber is learner) for event, call in subscriptions(subscriber)]
            if not handlers:
                if isinstance(subscriber, (bool, int, float, str, Mapping)):  # an option of `run` that was not named
                    raise TypeError(f"{subscriber!r} is no observer, and would hear nothing: options are given by name, as seed=0")
                raise TypeError(f"{type(subscriber).__name__} would hear nothing: mark its methods with @on(some event)")
            self._subscriptions += handlers
        ids: set[int] = set()
        for part in (part for subscriber in subscribers for part in with_parts(subscriber)):
            if id(part) in ids:
                raise ValueError(f"{type(part).__name__} would hear every event twice: pass it once")
            ids.add(id(part))
        self._table: dict[type[Event], tuple[tuple[bool, tuple[Handler, ...]], ...]] = {}

    def _groups(self, kind: type[Event]) -> tuple[tuple[bool, tuple[Handler, ...]], ...]:
        """Return the handlers of an event in their order, those of what learns apart from those of others."""
        if not issubclass(kind, Event):
            raise TypeError(f"{kind.__name__} is not an event: derive it from clstream.Event, and emit an object of it")
        hearing = [(learns, call) for event, call, learns in self._subscriptions if issubclass(kind, event)]
        groups = tuple((learns, tuple(call for _, call in calls)) for learns, calls in groupby(hearing, lambda pair: pair[0]))
        self._table[kind] = groups
        return groups

    def hears(self, kind: type[Event]) -> bool:
        """Return whether a handler is for this very kind of event; those of all events don't count."""
        return any(event is kind for event, _, _ in self._subscriptions)

    def emit(self, event: Event) -> None:
        """Call every handler of this type of event; an exception in one ends the run."""
        kind = type(event)
        try:
            groups = self._table[kind]
        except KeyError:
            groups = self._groups(kind)
        for learns, handlers in groups:
            if AS_WRITTEN.get() is learns:
                for handler in handlers:
                    handler(event)
            elif learns:
                with as_written():
                    for handler in handlers:
                        handler(event)
            else:
                with self.stopwatch, as_written(False):
                    for handler in handlers:
                        handler(event)

    def close(self, event: Event) -> None:
        """Call every handler, even after one has failed; then raise the first failure."""
        failure: BaseException | None = None
        for learns, handlers in self._groups(type(event)):
            with as_written(learns), nullcontext() if learns else self.stopwatch:
                for handler in handlers:
                    try:
                        handler(event)
                    except BaseException as error:  # noqa: BLE001  # the others have files and runs to close, whatever this was
                        failure = failure or error
        if failure is not None:
            raise failure


class Emitter:
    """The base of what emits events of its own in a run: strategies, and detectors among their parts."""

    bus: Bus | None = None
    not_state: tuple[str, ...] = ("bus",)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run's bus out of copies: they are not in the run."""
        return {name: value for name, value in vars(self).items() if name != "bus"}

    def emit(self, event: Event) -> None:
        """Have every handler in the run called; outside of a run nothing happens."""
        if self.bus is not None:
            self.bus.emit(event)
            self.bus.on_own_event()


def _nothing() -> None:
    """Do nothing."""
