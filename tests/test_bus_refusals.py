"""What can't subscribe, or be emitted, and how it is refused."""

import pytest
from test_bus import START, Base, LargeShiftDetected, Listener, ShiftDetected, Silent

from clstream.bus import Bus, on, subscriptions
from clstream.events import RunEnded, RunStarted


@pytest.mark.parametrize("event", [None, "RunStarted", int, START, lambda self, event: None])
def test_on_takes_the_class_of_an_event(event):
    with pytest.raises(TypeError, match="takes the class of an event"):
        on(event)


@pytest.mark.parametrize(
    "method",
    [
        lambda: None,
        lambda self: None,
        lambda self, event, more: None,
        lambda self, *, event: None,
        lambda self, event, *, key: None,
    ],
)
def test_a_handler_must_take_the_event_and_nothing_else(method):
    with pytest.raises(TypeError, match=r"RunStarted, so it must take the event and nothing else"):
        on(RunStarted)(method)


@pytest.mark.parametrize(
    "wrapped",
    [staticmethod(lambda self, event: None), classmethod(lambda cls, event: None), property(lambda self: None), Silent, 3],
)
def test_only_methods_can_be_marked(wrapped):
    with pytest.raises(TypeError, match="marks a method"):
        on(RunStarted)(wrapped)


@pytest.mark.parametrize("wrap", [staticmethod, classmethod])
def test_a_marked_method_can_not_be_hidden_in_a_wrapper(wrap):
    class Hidden(Base):
        hidden = wrap(on(RunEnded)(lambda self, event: None))

    with pytest.raises(TypeError, match="hidden"):
        Bus(Hidden())


def generator(self, event):
    yield


async def coroutine(self, event):
    pass


async def async_generator(self, event):
    yield


@pytest.mark.parametrize("method", [generator, coroutine, async_generator])
def test_a_handler_whose_body_would_never_run_is_refused(method):
    with pytest.raises(TypeError, match=method.__name__):
        on(RunStarted)(method)
    with pytest.raises(TypeError, match="a_letter"):  # nor may it take the place of one
        Bus(type("Broken", (Base,), {"a_letter": method})())


@pytest.mark.parametrize("override", [lambda self: None, None])
def test_an_override_that_can_not_be_called_with_an_event_is_refused_at_subscription(override):
    with pytest.raises(TypeError, match="a_letter"):
        Bus(type("Broken", (Base,), {"a_letter": override})())


class WrongAnnotation:
    @on(RunStarted)
    def note(self, event: RunEnded):
        pass


class WrongTextAnnotation:
    @on(RunStarted)
    def note(self, event: "RunEnded"):
        pass


class TooNarrowAnnotation:
    @on(ShiftDetected)
    def note(self, event: LargeShiftDetected):
        pass


@pytest.mark.parametrize("cls", [WrongAnnotation, WrongTextAnnotation, TooNarrowAnnotation])
def test_an_annotation_that_names_another_event_is_refused_at_subscription(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__}.note is marked @on\(\w+\), but takes a \w+"):
        Bus(cls())


def test_an_annotation_may_name_a_base_of_the_event():
    class Wide(Listener):
        @on(LargeShiftDetected)
        def note(self, event: ShiftDetected):
            self.sizes.append(event.size)

    wide = Wide()
    Bus(wide).emit(LargeShiftDetected(3.0))
    assert wide.sizes == [3.0]


def test_a_class_in_place_of_an_object_is_refused():
    with pytest.raises(TypeError, match=r"Base is a class: pass an object, Base\(\.\.\.\)"):
        Bus(Base)
    with pytest.raises(TypeError, match="Base is a class"):
        Bus(Base(parts=(Base,)))


@pytest.mark.parametrize("one", [Silent(), print, 3])
def test_what_hears_nothing_is_refused(one):
    with pytest.raises(TypeError, match="would hear nothing"):
        Bus(Base(), one)


def test_parts_in_a_circle_are_refused():
    one, other = Base(), Base()
    one.parts, other.parts = (other,), (one,)
    with pytest.raises(ValueError, match="Base is a part of itself"):
        list(subscriptions(one))


@pytest.mark.parametrize("event", [3, RunStarted, None])
def test_only_events_can_be_emitted(event):
    with pytest.raises(TypeError, match="is not an event"):
        Bus(Base()).emit(event)
