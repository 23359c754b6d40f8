"""Subscription and dispatch: who hears what, in which order."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clstream.bus import Bus, Emitter, Event, on
from clstream.events import BatchReady, EpochEnded, EpochStarted, RunEnded, RunStarted, TaskStarted

START, END = RunStarted(None, None), RunEnded(None)


class Base:
    """Writes each call into a list, which others may share."""

    def __init__(self, calls=None, parts=()):
        self.calls = [] if calls is None else calls
        self.parts = parts

    def note(self, what):
        self.calls.append(f"{type(self).__name__}.{what}")

    @on(RunStarted)
    def second_letter(self, event):
        self.note("second_letter")

    @on(RunStarted)
    def a_letter(self, event):
        self.note("a_letter")


class Derived(Base):
    @on(RunStarted)
    def aa_letter(self, event):
        self.note("aa_letter")


class Silent:
    pass


# Order -------------------------------------------------------------------------------------------------------------------


def test_base_class_first_then_definition_order():
    derived = Derived()
    Bus(derived).emit(START)
    assert derived.calls == ["Derived.second_letter", "Derived.a_letter", "Derived.aa_letter"]


def test_parts_come_after_their_owner_and_before_the_next_observer():
    calls = []

    class Inner(Base): ...

    class Detector(Base): ...

    class Observer(Base): ...

    strategy = Derived(calls, parts=(Base(calls, parts=(Inner(calls),)), Detector(calls)))
    Bus(strategy, Observer(calls)).emit(START)
    heard = [call.split(".")[0] for call in calls]
    assert heard == 3 * ["Derived"] + 2 * ["Base"] + 2 * ["Inner"] + 2 * ["Detector"] + 2 * ["Observer"]


def test_multiple_bases_follow_the_method_resolution_order():
    calls = []

    class Left:
        @on(RunStarted)
        def left(self, event):
            calls.append("left")

    class Right:
        @on(RunStarted)
        def right(self, event):
            calls.append("right")

    class Both(Left, Right):
        @on(RunStarted)
        def both(self, event):
            calls.append("both")

    Bus(Both()).emit(START)
    assert calls == ["right", "left", "both"]


def test_an_override_is_called_in_place_of_the_method_it_overrides():
    class Other(Base):
        def second_letter(self, event):
            self.note("mine")

    other = Other()
    Bus(other).emit(START)
    assert other.calls == ["Other.mine", "Other.a_letter"]


def test_an_override_marked_anew_hears_the_new_event_only():
    class Other(Base):
        @on(RunEnded)
        def second_letter(self, event):
            self.note("end")

    other = Other()
    bus = Bus(other)
    bus.emit(START)
    assert other.calls == ["Other.a_letter"]
    bus.emit(END)
    assert other.calls == ["Other.a_letter", "Other.end"]


LEVELS = st.lists(st.dictionaries(st.sampled_from("abcde"), st.booleans(), max_size=5), min_size=1, max_size=4)


def build(levels, calls, number, parts):
    """Return an object of a chain of classes, and the calls to expect; a level is name -> whether it is marked."""

    def method(name, depth):
        return lambda self, event: calls.append((number, depth, name))

    cls, heard = object, {}
    for depth, level in enumerate(levels):
        body = {}
        for name, marked in level.items():
            body[name] = on(RunStarted)(method(name, depth)) if marked else method(name, depth)
            if marked or name in heard:
                heard[name] = depth  # a name keeps its place: assignment doesn't move a key of a dict
        cls = type(f"Level{depth}", (cls,), body)
    one = cls()
    one.parts = parts
    return one, [(number, depth, name) for name, depth in heard.items()]


@pytest.mark.slow
@given(st.lists(LEVELS, min_size=1, max_size=4), st.randoms())
def test_order_of_any_classes_and_parts(families, random):
    calls, made = [], []
    for number, levels in enumerate(families):
        owned = random.sample(made, random.randint(0, len(made)))  # each object is part of at most one other
        made = [pair for pair in made if pair not in owned]
        one, expected = build(levels, calls, number, tuple(part for part, _ in owned))
        made.append((one, expected + [call for _, later in owned for call in later]))
    heard = [(one, expected) for one, expected in made if expected]
    Bus(*(one for one, _ in heard)).emit(START)
    assert calls == [call for _, expected in heard for call in expected]


# Who hears what ----------------------------------------------------------------------------------------------------------


def test_a_subscription_to_event_hears_everything_and_others_only_their_own():
    class Everything:
        def __init__(self):
            self.heard = []

        @on(Event)
        def note(self, event):
            self.heard.append(event)

    every, base = Everything(), Base()
    bus = Bus(base, every)
    events = [START, EpochStarted(None), BatchReady(None), EpochEnded(None), END]
    for event in events:
        bus.emit(event)
    assert every.heard == events
    assert base.calls == ["Base.second_letter", "Base.a_letter"]


@dataclass(frozen=True)
class ShiftDetected(Event):
    size: float


@dataclass(frozen=True)
class LargeShiftDetected(ShiftDetected):
    pass


class Listener:
    def __init__(self):
        self.sizes = []

    @on(ShiftDetected)
    def note(self, event: ShiftDetected):
        self.sizes.append(event.size)


def test_custom_events_reach_their_listeners_as_do_those_derived_from_them():
    listener = Listener()
    bus = Bus(listener)
    bus.emit(ShiftDetected(0.5))
    bus.emit(LargeShiftDetected(2.0))
    bus.emit(START)
    assert listener.sizes == [0.5, 2.0]


def test_an_emitter_emits_within_a_run_and_is_mute_outside():
    class Detector(Emitter):
        @on(RunStarted)
        def detect(self, event):
            self.emit(ShiftDetected(1.5))

    detector, listener = Detector(), Listener()
    bus = Bus(detector, listener)
    bus.emit(START)
    assert listener.sizes == []
    detector.bus = bus
    bus.emit(START)
    assert listener.sizes == [1.5]


def test_one_method_may_handle_several_events():
    class Both:
        def __init__(self):
            self.heard = []

        @on(RunStarted)
        @on(RunEnded)
        def note(self, event):
            self.heard.append(event)

    both = Both()
    bus = Bus(both)
    for event in (START, TaskStarted(None), END):
        bus.emit(event)
    assert both.heard == [START, END]


# Failures ----------------------------------------------------------------------------------------------------------------


class Failing:
    def __init__(self, calls, error):
        self.calls, self.error = calls, error

    @on(RunStarted)
    @on(RunEnded)
    def fail(self, event):
        self.calls.append(self.error)
        raise self.error


def test_an_exception_ends_an_emit():
    calls = []
    first, second = ValueError("first"), ValueError("second")
    with pytest.raises(ValueError, match="first"):
        Bus(Failing(calls, first), Failing(calls, second)).emit(START)
    assert calls == [first]


def test_close_tells_everyone_and_raises_the_first_failure():
    calls = []
    first, second = KeyboardInterrupt("first"), ValueError("second")

    class Last:
        @on(RunEnded)
        def note(self, event):
            calls.append(event)

    with pytest.raises(KeyboardInterrupt, match="first"):
        Bus(Failing(calls, first), Failing(calls, second), Last()).close(END)
    assert calls == [first, second, END]
