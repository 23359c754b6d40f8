"""Streams that arrive from iterators: growing matrices, what is set aside, late labels, resumption, memory."""

from __future__ import annotations

import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
from arrivals import CENTRES, late, learner, session, sessions
from clstream.strategies import EWC, Finetune
from clstream.streams import arriving, blobs, drifting
from clstream.streams.schedules import Transitions
from torch import Tensor

from clstream import BatchLearned, Event, RunStarted, SessionEnded, SessionStarted, TaskEnded, TaskStarted, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.engine import InputsArrived, SessionArrived, SetAside
from clstream.evaluation import evaluate
from clstream.events import NothingArrived
from clstream.models import Mlp
from clstream.recording import record
from clstream.stream import Arrival, Samples


class Heard:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @on(Event)
    def keep(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list:
        return [event for event in self.events if type(event) is kind]


class Stop:
    """Ends a run after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.batches -= 1
        if not self.batches:
            raise KeyboardInterrupt


def stream(source=None, **options):
    return arriving(sessions() if source is None else source, **{"classes": 6, "batch_size": 8} | options)


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))


def test_each_session_is_a_task_and_the_matrix_grows():
    heard = Heard()
    result = run(learner(), stream(), heard)
    assert result.test_sets == ("task_00", "task_01", "task_02", "seen")
    assert result.accuracy.isnan().tolist() == [[False, True, True], [False, False, True], [False] * 3]
    assert torch.equal(result.taught, torch.eye(3, dtype=torch.bool))
    assert result.sessions == (1, 2, 3)
    assert not math.isnan(result.forgetting)
    assert result.params["stream.sessions"] == "unknown"
    arrived = heard.of(SessionArrived)
    assert [(event.name, event.samples, event.test_samples) for event in arrived] == [(f"session_{n:05d}", 19, 5) for n in range(3)]
    assert [(event.sessions, event.ended) for event in heard.of(NothingArrived)] == [(3, True)]
    assert not heard.of(TaskStarted)  # boundaries are hidden


def test_the_last_row_is_what_a_strategy_answers_about_the_held_out_samples():
    given = stream()
    strategy = learner()
    heard = Heard()
    result = run(strategy, given, heard)
    grown = heard.of(RunStarted)[0].stream
    assert torch.equal(evaluate(strategy, grown)[0], result.accuracy[-1])
    for number, task in enumerate(grown.tasks):
        x, y = session(number)
        rows = (task.test.x[:, None] == x[None]).all(2).int().argmax(1)
        assert torch.equal(task.test.x, x[rows])
        assert torch.equal(task.test.y, y[rows])


def test_a_run_leaves_the_stream_as_it_was():
    given = stream()
    first, second = run(learner(), given), run(learner(), given)
    assert len(given.tasks) == 1
    assert same(first.accuracy, second.accuracy)
    assert not same(first.accuracy, run(learner(), given, seed=1).accuracy)


def test_each_session_may_be_a_task_that_strategies_hear_of():
    heard = Heard()
    torch.manual_seed(0)
    run(EWC(Mlp(3, 6, hidden=(8,)), active_classes="task"), stream(boundaries=True), heard)
    assert [event.task.id for event in heard.of(TaskEnded)] == [0, 1, 2]
    with pytest.raises(ValueError, match="EWC needs boundaries, which arriving hides"):
        run(EWC(Mlp(3, 6)), stream())


def test_a_strategy_can_not_know_what_arrives():
    class Asks(Finetune):
        @on(RunStarted)
        def look(self, event: RunStarted) -> None:
            self.count = len(event.stream.tasks)

    with pytest.raises(ValueError, match="arriving arrives while it is learned, so no strategy can be told its 'tasks'"):
        run(Asks(Mlp(3, 6)), stream(boundaries=True))


def test_one_session_is_in_memory_at_a_time():
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def source():
        for number in range(4):
            gc.collect()
            counts.append(sum(held() is not None for held in alive))
            yield session(number)

    class Watch:
        @on(SessionStarted)
        def look(self, event: SessionStarted) -> None:
            alive.append(weakref.ref(event.session.samples.x))
            self.session = event.session

        @on(SessionEnded)
        def ended(self, event: SessionEnded) -> None:
            assert len(event.session.samples) == 19

    watch = Watch()
    run(Finetune(Mlp(3, 6)), stream(source), watch)
    assert counts[-4:] == [0, 0, 0, 0]
    assert len(watch.session.samples) == 0


BAD = [
    ((torch.zeros(4, 2), torch.arange(4)), r"inputs of \(2,\) torch.float32, and those of arriving are \(3,\)"),
    ((torch.zeros(4, 3, dtype=torch.uint8), torch.arange(4)), "torch.uint8"),
    ((torch.zeros(4, 3), torch.arange(4) + 5), "it has the label 8, and there is room for 6 classes: give classes=9"),
    ((torch.full((4, 3), torch.nan), torch.arange(4)), "NaN or infinite"),
    ((torch.zeros(4, 3), torch.arange(5)), "its inputs are 4, and its targets 5"),
    ((torch.zeros(4, 3), torch.rand(4)), "labels must be one whole number each"),
    ((torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)), "one sample"),
    ((torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), "empty"),
    ("nonsense", "delivers pairs of inputs and targets, Samples or Arrival objects, not a str"),
    (session(0), "the very samples of session_00000"),
    (Arrival(*session(2), name="session_00000"), "was learned before"),
    (Arrival(None, torch.arange(4), name="x"), "labels of inputs that did not come"),
    (Arrival(torch.zeros(4, 3), torch.arange(4), x_test=torch.zeros(4, 3)), "test inputs without targets"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_what_can_not_be_learned_is_set_aside_and_named(bad, reason):
    heard = Heard()
    result = run(learner(), stream(lambda: iter([session(0), bad, session(1)])), heard)
    [aside] = heard.of(SetAside)
    assert aside.name
    assert re.search(reason, aside.reason), aside.reason
    assert "\n" not in aside.reason
    assert result.sessions == (1, 2)
    assert [event.name for event in heard.of(SessionArrived)] == ["session_00000", "session_00002"]


def test_labels_may_come_late():
    first, labels = late(1)
    heard = Heard()
    result = run(learner(), stream(lambda: iter([session(0), first, session(2), labels])), heard)
    [inputs] = heard.of(InputsArrived)
    assert inputs.name == "late 1"
    assert torch.equal(inputs.x, session(1)[0])
    assert [event.name for event in heard.of(SessionArrived)] == ["session_00000", "session_00002", "late 1"]
    assert result.sessions == (1, 2, 3)


def test_classes_may_be_called_by_strings():
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])

    def source():
        for number in (2, 0, 1):
            x, y = session(number)
            yield x, names[y.numpy()]

    heard = Heard()
    given = stream(source)
    run(learner(), given, heard)
    grown = heard.of(RunStarted)[0].stream
    assert [grown.class_name(label) for label in range(6)] == ["eel", "fox", "ant", "bee", "cat", "dog"]
    heard = Heard()
    run(learner(), stream(source, classes=4), heard)
    assert [event.reason for event in heard.of(SetAside)] == [
        "it has the class 'cat', and there is room for 4 classes: give classes=5 or more"
    ]


@pytest.mark.parametrize("batches", [1, 3, 4, 8])
def test_it_resumes_bit_for_bit(tmp_path, batches):
    def source():
        first, labels = late(1)
        return iter([session(0), first, "nonsense", session(2), labels, session(4)])

    whole = learner()
    expected = run(whole, stream(source))
    with pytest.raises(KeyboardInterrupt):
        run(learner(), stream(source), Checkpointer(tmp_path, every_batches=1), Stop(batches))
    state = newest(tmp_path)
    strategy = learner()
    result = run(strategy, stream(source), Checkpointer(tmp_path), resume=state)
    assert same(result.accuracy, expected.accuracy)
    assert result.test_sets == expected.test_sets
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(strategy.model.parameters(), whole.model.parameters(), strict=True)
    )
    end = newest(tmp_path)
    assert end["position"][0] == end["sessions"] == 4
    assert same(run(learner(), stream(source), resume=end).accuracy, expected.accuracy)


def test_a_resumed_run_plays_its_source_from_the_begin_and_learns_nothing_twice(tmp_path):
    asked: list[int] = []

    def source():
        for number in range(4):
            asked.append(number)
            yield session(number)

    with pytest.raises(KeyboardInterrupt):
        run(learner(), stream(source), Checkpointer(tmp_path, every_batches=1), Stop(8))
    assert newest(tmp_path)["position"][0] == 2
    heard, given = Heard(), stream(source)  # which looks at the first session
    asked.clear()
    run(learner(), given, heard, resume=newest(tmp_path))
    assert asked == [0, 1, 2, 3] and [event.session.index for event in heard.of(SessionStarted)] == [3]
    assert [event.session for event in heard.of(SessionArrived)] == [3]
    rest = stream(iter([session(2), session(3)]))  # an iterator that is past its begin is another source
    with pytest.raises(ValueError, match="is not what it was when it was learned"):
        run(learner(), rest, resume=newest(tmp_path))


def test_a_run_on_what_arrives_is_resumed_and_not_continued(tmp_path):
    first = run(strategy := learner(), stream(), Checkpointer(tmp_path))
    for source in (first, tmp_path):
        with pytest.raises(ValueError, match="such a run begins anew, or is resumed, and continues no other"):
            run(strategy if source is first else learner(), stream(), continues=source)
    with pytest.raises(ValueError, match="a run on a stream that arrives is resumed, and not continued"):
        run(learner(), blobs(tasks=2, classes=6, features=3), continues=tmp_path)
    more = run(learner(), stream(lambda: iter([*map(session, range(3)), session(7)])), resume=newest(tmp_path))
    assert more.sessions == (1, 2, 3, 4)


def test_a_source_that_says_something_else_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(learner(), stream(), Checkpointer(tmp_path, every_batches=1), Stop(6))
    for other, reason in (
        (lambda: iter([session(0), session(3)]), "the session session_00001 is not what it was when it was learned"),
        (lambda: iter([session(0)]), "no longer has the session session_00001"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(learner(), stream(other), resume=newest(tmp_path))
    with pytest.raises(ValueError, match="another run"):
        run(learner(), stream(test=0.5), resume=newest(tmp_path))
    state = newest(tmp_path)
    for crafted in (None, {}, state["arrivals"] | {"sessions": []}, state["arrivals"] | {"sizes": [1, "2"]}):
        with pytest.raises(ValueError, match="the checkpoint is no good"):
            run(learner(), stream(), resume=state | {"arrivals": crafted})


def test_a_generator_may_have_nothing_yet(tmp_path):
    heard = Heard()
    items = [session(0), None, None, session(1)]
    result = run(learner(), stream(lambda: iter(items), poll=0.001), heard, Checkpointer(tmp_path, every_seconds=None))
    assert result.sessions == (1, 2)
    assert [(event.sessions, event.ended) for event in heard.of(NothingArrived)] == [(1, False), (2, True)]
    assert newest(tmp_path)["position"] == [2, 0, 0]


def test_an_iterator_is_played_once():
    given = stream(sessions()())
    assert run(learner(), given).sessions == (1, 2, 3)
    with pytest.raises(ValueError, match="an iterator that was played already: pass a function"):
        run(learner(), given)


def test_a_run_may_stop_after_some_sessions():
    def endless():
        number = 0
        while True:
            yield session(number)
            number += 1

    assert run(learner(), stream(endless), max_sessions=4).sessions == (1, 2, 3, 4)


def test_sessions_may_bring_their_own_test_samples_and_other_targets():
    def values():
        for number in range(2):
            x, _ = session(number)
            yield x, x[:, :2] - 1, x[:5] + 1, x[:5, :2]

    given = arriving(values, target="value")
    result = run(Finetune(Mlp(3, 2)), given)
    assert result.main_name == "r2"
    assert result.main.shape == (2, 2)

    def several():
        for number in range(2):
            x, y = session(number)
            yield Samples(x, torch.nn.functional.one_hot(y, 6).float(), target="multilabel")

    assert run(Finetune(Mlp(3, 6)), arriving(several, target="multilabel")).main_name == "map"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: arriving([]), "nothing has arrived in arriving yet"),
        (lambda: arriving(["x"]), "nothing has arrived in arriving yet that can be learned: session_00000: a source delivers"),
        (lambda: arriving("no/such/folder"), "there is no folder no/such/folder"),
        (lambda: arriving(3), "source must be a folder, an iterator or a function"),
        (lambda: arriving(blobs()), "at_moments"),
        (lambda: stream(test=0.0), "above 0"),
        (lambda: stream(test=1.0), "below 1"),
        (lambda: stream(watch=True), "watch=True is for a folder"),
        (lambda: stream(poll=0), "poll must be"),
        (lambda: stream(scenario="task"), "scenario must be one of class, domain"),
        (lambda: stream(label=["a", "b"]), "label must be one name"),
        (lambda: stream(class_names="abc"), "class_names must be a list of strings"),
        (lambda: stream(class_names=list("abcdefg")), "7 classes are named, and there is room for 6"),
        (lambda: drifting(stream(), Transitions(0.5), sessions=2), "no other stream can be made of it"),
        (lambda: record(stream(), "file"), "no recording can say"),
        (lambda: run(learner(), stream(), evaluate_at="end"), "take evaluate_at='sessions'"),
        (lambda: stream().for_tuning(), "holds back no validation"),
    ],
)
def test_refusals(make, reason):
    with pytest.raises((ValueError, TypeError, OSError), match=reason) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_the_sessions_are_what_the_source_delivers():
    seen: list[Tensor] = []

    class Collect:
        @on(BatchLearned)
        def add(self, event: BatchLearned) -> None:
            seen.append(event.batch.samples.x)

    run(Finetune(Mlp(3, 6)), stream(test=0.25, epochs=1), Collect())
    assert sum(map(len, seen)) == 3 * 18
    assert CENTRES.shape == (6, 3)
