"""Streams that drift: what their schedules promise, and that nothing grows with their length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from clstream.streams import (
    arriving,
    blobs,
    drifting,
    few_shot,
    from_tensors,
    long_tailed,
    recorded,
    si_blurry,
    sorted_by,
)
from clstream.streams.data import table
from clstream.streams.drifting import parts_of
from clstream.streams.schedules import Blurry, Both, Gaussian, LabelShift, Parts, Schedule, Transitions
from clstream.streams.task_free import source
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clstream import Samples, Stream, Subset, Task, run, streams
from clstream.checks import check_stream
from clstream.recording import record
from clstream.strategy import Strategy
from clstream.stream import MixedSchedule

SCHEDULES: dict[str, Schedule] = {
    "sharp": Transitions(),
    "fuzzy": Transitions(0.6),
    "recurring": Transitions(0.0, (0, 1, 2, 1)),
    "gaussian": Gaussian(0.8),
    "label shift": LabelShift(9.0),
    "blurry": Blurry((1, 2, 5), 0.3),
    "both": Both(Transitions(0.5), LabelShift(4.0)),
}


@dataclass(frozen=True)
class Given:
    """The weights that a function gives for moments and a number of parts."""

    make: Callable[[Tensor, int], Any]
    jumps: int = 1

    def __repr__(self) -> str:
        return "given"

    def segments(self, parts: Parts) -> int:
        return self.jumps

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        return self.make(at, len(parts))


class Nameless(Transitions):
    """A schedule that doesn't say what it is."""

    __repr__ = object.__repr__


@dataclass(frozen=True)
class Numbers:
    """A mixture of one session that draws what it is given."""

    drawn: list[int]
    once: bool = True

    def __len__(self) -> int:
        return 1

    def draw(self, session: int) -> Tensor:
        return torch.tensor(self.drawn, dtype=torch.int64)


def numbered(each: int = 24, classes: int = 6, tasks: int = 3, **options: Any) -> Stream:
    """Return a stream whose inputs are their own row numbers; classes have from `each` samples on, each one more than the last."""
    y = torch.cat([torch.full((each + label,), label) for label in range(classes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    x = torch.arange(len(y)).float()[:, None]
    return from_tensors(x, y, x[-classes:], torch.arange(classes), tasks=tasks, **options)


def rows(session: Any) -> list[int]:
    return session.samples.x.flatten().long().tolist()


def shares(stream: Stream) -> Tensor:
    """Return (sessions, classes): how the samples of each session are spread over the classes."""
    counts = torch.stack([session.samples.y.bincount(minlength=stream.classes) for session in stream])
    return counts / counts.sum(1, keepdim=True)


# Each sample once --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(list(SCHEDULES)),
    sessions=st.integers(1, 3),
    straddle=st.booleans(),
    delay=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_each_sample_comes_once(kind: str, sessions: int, straddle: bool, delay: float, seed: int, shuffle: bool) -> None:
    base, schedule = numbered(), SCHEDULES[kind]
    count = sessions * schedule.segments(parts_of(base)[0])
    stream = drifting(base, schedule, count, None, straddle, delay, shuffle, seed)
    delivered = [rows(session) for session in stream]
    assert sorted(row for each in delivered for row in each) == list(range(len(base.data.parts["train"])))
    for number in reversed(range(count)):  # any of them directly, in any order
        assert rows(stream.session(number)) == delivered[number]
        assert int(stream.mix(number).sum()) == len(delivered[number])
        assert stream.task_of(number) == int(stream.mix(number).argmax())
    assert [rows(session) for session in drifting(base, schedule, count, None, straddle, delay, shuffle, seed)] == delivered
    if straddle:
        assert max(map(len, delivered)) - min(map(len, delivered)) <= 1


def test_labels_stay_with_their_inputs() -> None:
    for size in (None, 40):
        stream = drifting(numbered(), Transitions(0.5), 12, size)
        truth = stream.data.parts["train"].y
        for session in stream:
            for epoch in session:
                for batch in epoch:
                    assert torch.equal(truth[batch.samples.x.flatten().long()], batch.samples.y)


def test_sharp_sessions_are_of_one_task_and_straddling_ones_are_not() -> None:
    sharp = drifting(numbered(), Transitions(), 6)
    assert [stream_mix.count_nonzero().item() for stream_mix in map(sharp.mix, range(6))] == [1] * 6
    assert [sharp.task_of(number) for number in range(6)] == [0, 0, 1, 1, 2, 2]
    cut = drifting(numbered(), Transitions(), 5, straddle=True)
    assert [int(cut.mix(number).count_nonzero()) for number in range(5)] == [1, 2, 1, 2, 1]


def test_recurring_tasks_are_dealt_out_over_their_visits() -> None:
    stream = drifting(numbered(), Transitions(order=(0, 1, 2, 1)), 4)
    assert [stream.task_of(number) for number in range(4)] == [0, 1, 2, 1]
    first, again = set(rows(stream.session(1))), set(rows(stream.session(3)))
    assert not first & again and abs(len(first) - len(again)) <= 2


@pytest.mark.parametrize("width", [0.2, 0.5, 1.0])
def test_a_transition_is_a_linear_overlap_of_its_width(width: float) -> None:
    parts = Parts(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), 3)
    at = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    weights = Transitions(width).weights(at, parts)
    assert torch.allclose(weights.sum(1), torch.ones(1000, dtype=torch.float64))
    for boundary in (1, 2):
        near = (at * 3 - boundary).abs() <= width / 2
        expected = (at[near] * 3 - boundary) / width + 0.5
        assert torch.allclose(weights[near, boundary], expected) and torch.allclose(weights[near, boundary - 1], 1 - expected)
    alone = ((at * 3 - 1).abs() > width / 2) & ((at * 3 - 2).abs() > width / 2)
    assert set(weights[alone].flatten().tolist()) <= {0.0, 1.0}
    stream = drifting(numbered(each=300), Transitions(width), 30)
    for number in range(30):  # what comes is what the schedule says, but for the sizes of the classes
        wanted = Transitions(width).weights(torch.tensor([(number + 0.5) / 30], dtype=torch.float64), parts)[0]
        mix = stream.mix(number)
        assert torch.allclose(mix.double() / mix.sum(), wanted, atol=0.07)


def test_blurry_spreads_the_share_that_it_says_and_only_of_the_classes_that_it_names() -> None:
    base = numbered(each=200)
    stream = drifting(base, Blurry((1, 2, 5), 0.3), 3)
    counts = torch.stack([session.samples.y.bincount(minlength=6) for session in stream])
    totals = counts.sum(0)
    for label in range(6):
        home = label // 2
        spread = 0.3 * totals[label] / 3 if label in (1, 2, 5) else torch.tensor(0.0)
        for number in range(3):
            wanted = spread + (totals[label] - 3 * spread) * (number == home)
            assert abs(float(counts[number, label] - wanted)) <= 1, (label, number)


def test_si_blurry_leaves_disjoint_classes_whole_and_spreads_the_rest_by_chance() -> None:
    sizes = set()
    for seed in range(6):
        stream = si_blurry(tasks=4, disjoint=0.5, blur=0.2, sessions=4, seed=seed)
        schedule = stream.schedule.rule
        assert len(schedule.blurry) == 5 and sum(schedule.shares) == pytest.approx(1, abs=1e-3)
        assert sorted(label for task in stream.tasks for label in task.classes) == list(range(10))
        sizes.add(tuple(len(task.classes) for task in stream.tasks))
        counts = torch.stack([session.samples.y.bincount(minlength=10) for session in stream])
        for task in stream.tasks:
            for label in task.classes:
                at_home = int(counts[task.id, label])
                total = int(counts[:, label].sum())
                wanted = total * (0.8 + 0.2 * schedule.shares[task.id]) if label in schedule.blurry else total
                assert abs(at_home - wanted) <= 1
    assert len(sizes) > 2


def test_late_labels_come_later_by_the_mean_delay() -> None:
    base = numbered(each=400)
    on_time, late = (drifting(base, Transitions(), 30, delay=delay) for delay in (0.0, 3.0))
    when = [torch.empty(len(base.data.parts["train"])) for _ in range(2)]
    for stream, into in zip((on_time, late), when, strict=True):
        for session in stream:
            into[rows(session)] = float(session.index)
    early = when[0] < 10  # few of these are still awaited at the end
    assert float((when[1] - when[0])[early].mean()) == pytest.approx(3.0, abs=0.3)
    assert bool((when[1] >= when[0]).all())


def test_late_labels_of_drawn_samples_are_of_earlier_moments() -> None:
    base = numbered(each=50)
    stream = drifting(base, Transitions(), 30, session_size=500, delay=3.0)
    assert set(stream.session(0).classes) == {0, 1}  # nothing came before the begin
    share = stream.mix(10)[0] / 500  # of samples that came before the boundary at session 10, half a session ago
    assert float(share) == pytest.approx(2.718281828 ** (-0.5 / 3), abs=0.06)


# Drawn with replacement --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(kind=st.sampled_from(list(SCHEDULES)), number=st.integers(0, 11), seed=st.integers(0, 5))
def test_drawn_sessions_match_the_weights(kind: str, number: int, seed: int) -> None:
    base, schedule, size = numbered(), SCHEDULES[kind], 4000
    stream = drifting(base, schedule, 12, size, seed=seed)
    parts, _, _ = parts_of(base)
    weights = schedule.weights(torch.tensor([(number + 0.5) / 12], dtype=torch.float64), parts)[0]
    wanted = torch.zeros(6, dtype=torch.float64).index_add_(0, parts.labels, weights / weights.sum())
    found = stream.session(number).samples.y.bincount(minlength=6) / size
    assert bool((found[wanted == 0] == 0).all())
    assert bool(((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / size).sqrt() + 1e-9).all())


def test_within_a_part_every_sample_is_as_likely() -> None:
    stream = drifting(numbered(each=10), LabelShift(1.0), 50, 1000)
    counts = torch.stack([session.samples.x.flatten().long().bincount(minlength=75) for session in stream]).sum(0)
    truth = stream.data.parts["train"].y
    for label in range(6):
        own = counts[truth == label].double()
        assert float(own.std() / own.mean().sqrt()) == pytest.approx(1.0, abs=0.6)


def test_weights_change_within_a_session_only_if_it_may_straddle() -> None:
    steady, moving = (
        drifting(numbered(), Transitions(1.0), 3, 3000, straddle=straddle, shuffle=False) for straddle in (False, True)
    )
    for stream, drifts in ((steady, False), (moving, True)):
        labels = next(iter(stream.session(1))).session.samples.y
        begin, end = (float((part == 0).double().mean()) for part in (labels[:1000], labels[-1000:]))
        assert (begin - end > 0.05) == drifts


def test_a_drawn_stream_may_be_longer_than_its_data_and_holds_nothing_of_its_sessions() -> None:
    def held(stream: Stream) -> int:
        """Return the bytes of all tensors that are reachable from a stream."""
        met: dict[int, int] = {}

        def visit(thing: object, depth: int = 0) -> None:
            if isinstance(thing, Tensor):
                met[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            elif isinstance(thing, (tuple, list)):
                for each in thing:
                    visit(each, depth + 1)
            elif depth < 8:
                slots = [getattr(thing, name) for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
                visit([*slots, *getattr(thing, "__dict__", {}).values()], depth + 1)

        visit(stream)
        return sum(met.values())

    sizes = {}
    for sessions in (100, 10_000):
        for size in (None, 32):
            stream = drifting(numbered(each=4000), Gaussian(1.0), sessions, size, straddle=True)
            stream.session(sessions - 1)  # whatever is found out once
            before = held(stream)
            for number in range(0, sessions, max(1, sessions // 500)):
                stream.session(number)
            assert held(stream) == before
            sizes[sessions, size] = before
    assert sizes[100, 32] == sizes[10_000, 32] and sizes[100, None] == sizes[10_000, None]


# Any source --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """Moves each input."""

    by: float

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.by


def domains(apart: bool) -> Stream:
    """Return three domains of one source, shifted; or of a source each."""
    y = torch.arange(60) % 2
    whole = Samples(torch.arange(60.0)[:, None], y)
    index = torch.arange(60)
    tasks = []
    for number in range(3):
        moved = Samples(whole.x + 1000 * number, y)
        part = moved if apart else Subset(whole, index, Shift(1000.0 * number))
        tasks.append(Task(number, (0, 1), part, part))
    return Stream("domains", tasks, scenario="domain", batch_size=7)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("size", [None, 30])
def test_domains_mix_too(apart: bool, size: int | None) -> None:
    stream = drifting(domains(apart), Transitions(0.8), 9, size, shuffle=False)
    for session in stream:
        values = session.samples.x.flatten()
        assert torch.equal((values // 1000).long().bincount(minlength=3), stream.mix(session.index))
        assert torch.equal((values % 1000).long() % 2, session.samples.y)
    if size is None:
        assert sorted(value for session in stream for value in session.samples.x.flatten().tolist()) == sorted(
            number + 1000.0 * task for task in range(3) for number in range(60)
        )
    assert any(int(stream.mix(number).count_nonzero()) > 1 for number in range(9))
    for check in check_stream(stream):
        check()


def test_a_feature_sorts_softly() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 3, generator=draw), torch.arange(400) % 2
    train, test = Samples(x[:300], y[:300]), Samples(x[300:], y[300:])
    strict, soft, none = (sorted_by(train, test, feature=1, softness=softness, shuffle=False) for softness in (0.0, 0.3, 1.0))
    order = torch.cat([session.samples.x[:, 1] for session in strict])
    assert torch.equal(order, train.x[:, 1].sort().values)
    ranks = [torch.cat([session.samples.x[:, 1] for session in each]).argsort().argsort().double() for each in (strict, soft, none)]
    along = [float(torch.corrcoef(torch.stack([rank, torch.arange(300.0).double()]))[0, 1]) for rank in ranks]
    assert along[0] == pytest.approx(1) and 0.8 < along[1] < 0.99 and abs(along[2]) < 0.2
    bounds = [float(task.train.x[:, 1].max()) for task in strict.tasks]
    for task, low, high in zip(strict.tasks, [-torch.inf, *bounds], [*bounds[:-1], torch.inf], strict=False):
        assert bool(((task.test.x[:, 1] > low) & (task.test.x[:, 1] <= high)).all())
    assert sum(len(task.test) for task in strict.tasks) == len(test)


def test_tables_are_whole_and_standardised() -> None:
    for name, features, classes in (("breast_cancer", 30, 2), ("wine", 13, 3)):
        train, test = table(name)
        assert train.x.shape[1:] == test.x.shape[1:] == (features,) and train.x.dtype == test.x.dtype == torch.float32
        assert train.y.unique().tolist() == test.y.unique().tolist() == list(range(classes))
        assert torch.allclose(train.x.mean(0), torch.zeros(features), atol=1e-5)
        assert torch.allclose(train.x.std(0, correction=0), torch.ones(features), atol=1e-5)
        assert abs(len(train) - 3 * len(test)) <= 3 * classes


def test_long_tails_and_few_shots_leave_what_they_say() -> None:
    base = blobs(tasks=5, train_per_class=100)
    counts = [int((long_tailed(base, 20.0, shuffled=False).tasks[label // 2].train.y == label).sum()) for label in range(10)]
    assert counts == [round(100 * 20 ** (-label / 9)) for label in range(10)]
    shuffled = long_tailed(base, 20.0, seed=3)
    assert sorted((int((task.train.y == label).sum()) for task in shuffled.tasks for label in task.classes), reverse=True) == counts
    few = few_shot(base, shots=4, after=2)
    assert [len(task.train) for task in few.tasks] == [200, 200, 8, 8, 8]
    everything = set(map(tuple, base.tasks[3].train.x.tolist()))
    assert set(map(tuple, few.tasks[3].train.x.tolist())) <= everything
    assert [len(task.test) for task in few.tasks] == [len(task.test) for task in base.tasks]
    both = drifting(long_tailed(base, 20.0), Transitions(0.5), 10)  # kinds go together
    assert sum(len(session.samples) for session in both) == sum(counts)


def test_what_is_left_out_is_a_matter_of_the_seed_and_the_rest_keeps_its_order() -> None:
    base = numbered(60)
    one, two, same = (long_tailed(base, 4.0, seed=seed).tasks[0].train.x.flatten() for seed in (0, 1, 0))
    assert torch.equal(one, same) and not torch.equal(one, two)
    whole = base.tasks[0].train.x.flatten().tolist()
    places = [whole.index(x) for x in one.tolist()]
    assert places == sorted(places) and places != list(range(len(places)))
    assert min(len(task.train) for task in long_tailed(numbered(2), 1e6, shuffled=False).tasks) >= 2  # one of each class, at least


# The weights, in closed form -----------------------------------------------------------------------------------------------


def test_weights_of_each_schedule_by_hand() -> None:
    parts = Parts(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 2]), 2)  # label 0 comes in both tasks
    at = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    likely = LabelShift(16.0).weights(at, parts)
    by_label = torch.stack([likely[:, 0] + likely[:, 2], likely[:, 1], likely[:, 3]], 1)
    expected = torch.tensor([[4, 1, 1 / 4], [2, 1, 1 / 2], [1, 1, 1], [1 / 4, 1, 4]], dtype=torch.float64)
    torch.testing.assert_close(by_label, expected)
    peaks = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    comes = Gaussian(1.0).weights(peaks, parts)
    assert comes.argmax(1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(comes[1] / comes[1, 1], torch.tensor([-0.5, 0, -0.5, -2], dtype=torch.float64).exp())
    torch.testing.assert_close(
        Transitions(0.5).weights(at, parts), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0.5] * 4, [0, 0, 1, 1]]).double() / 2
    )
    blurred = Blurry((0,), 0.5, (0.25, 0.75)).weights(torch.tensor([0.1, 0.9], dtype=torch.float64), parts)
    torch.testing.assert_close(blurred, torch.tensor([[0.625, 1, 0.125, 0], [0.375, 0, 0.875, 1]], dtype=torch.float64))
    both = Both(Transitions(order=(0, 1, 0, 1)), Transitions(order=(0, 1, 1, 0, 1, 0)))
    assert both.segments(parts) == 12


def test_no_sample_crosses_a_jump() -> None:
    y = torch.arange(3).repeat_interleave(40_000)
    stream = drifting(from_tensors(y.float()[:, None], y, y[::40_000].float()[:, None], torch.arange(3), tasks=3), Transitions(), 3)
    assert [session.samples.y.unique().tolist() for session in stream] == [[0], [1], [2]]


def test_a_stream_has_four_sessions_for_each_segment_unless_told() -> None:
    assert len(drifting(numbered(), Transitions())) == 12 and len(drifting(numbered(), Transitions(0.5))) == 20
    assert len(drifting(numbered(), Transitions(0.5), 6, delay=6.0, straddle=True)) == 6
    with pytest.raises(ValueError, match=r"delay must be from 0 to the number of sessions, 6, not 6\.1"):
        drifting(numbered(), Transitions(0.5), 6, delay=6.1)


# What a stream is --------------------------------------------------------------------------------------------------------


def test_fingerprints_tell_streams_apart() -> None:
    base = numbered()
    made = [
        drifting(base, Transitions(0.5), 6),
        drifting(base, Transitions(0.5), 12),
        drifting(base, Transitions(0.5), 6, straddle=True),
        drifting(base, Transitions(0.4), 6),
        drifting(base, Transitions(0.5), 6, seed=1),
        drifting(base, Transitions(0.5), 6, delay=1.0),
        *(drifting(base, Gaussian(width), sessions, size, seed=seed, delay=delay, straddle=straddle)
          for width, sessions, size, seed, delay, straddle in (
              (1.0, 6, 30, 0, 0.0, False), (1.1, 6, 30, 0, 0.0, False), (1.0, 7, 30, 0, 0.0, False), (1.0, 6, 31, 0, 0.0, False),
              (1.0, 6, 30, 1, 0.0, False), (1.0, 6, 30, 0, 1.0, False), (1.0, 6, 30, 0, 0.0, True))),
    ]  # fmt: skip
    assert len({stream.fingerprint for stream in made} | {base.fingerprint}) == len(made) + 1
    for stream in made:
        assert stream.reseeded(5).fingerprint == stream.fingerprint
        assert rows(stream.reseeded(5).session(2)) == rows(stream.session(2))
        assert "boundaries hidden" in str(stream) and repr(stream.schedule) in str(stream)


@pytest.mark.parametrize("size", [None, 25])
@pytest.mark.parametrize("make", [numbered, lambda **_: domains(True)])
def test_recordings_replay_them(size: int | None, make: Callable[..., Stream], tmp_path: Any) -> None:
    stream = drifting(make(batch_size=8), Transitions(0.5), 6, size, shuffle=False)
    file = record(stream, tmp_path / "drift.clstream")
    again = recorded(file, data=make())
    assert again.fingerprint == stream.fingerprint and str(again) == str(stream)
    for one, two in zip(stream, again, strict=True):
        for batch, same in zip(next(iter(one)), next(iter(two)), strict=True):
            assert torch.equal(batch.samples.x, same.samples.x) and torch.equal(batch.samples.y, same.samples.y)
    for check in check_stream(again):
        check()
    assert record(again, tmp_path / "again.clstream").read_bytes() == file.read_bytes()


def test_a_session_of_a_class_of_ones_own_is_refused_by_the_recorder(tmp_path: Any) -> None:
    class Own(Stream):
        def session(self, index: int) -> Any:
            return replace(super().session(index), index=index)

    base = drifting(numbered(), Transitions(0.5), 6)
    own = Own(base.name, base.tasks, base.schedule, boundaries=False)
    with pytest.raises(ValueError, match=r"can't be recorded: Own.session gives in session 0 something other than rows"):
        record(own, tmp_path / "own.clstream")


def test_a_pass_that_is_not_shuffled_has_the_order_of_the_drift() -> None:
    stream = drifting(numbered(epochs=2), Transitions(0.5), 6, shuffle=False)
    assert isinstance(stream.schedule, MixedSchedule)
    for session in stream:
        assert not session.shuffle
        for epoch in session:
            drawn = stream.schedule.draw(session.index)
            assert torch.equal(torch.cat([batch.samples.x for batch in epoch]), session.samples.x)
            assert len(drawn) == len(session.samples)
    plain = numbered(boundaries=False)
    unshuffled = replace(plain, shuffle=False)
    assert torch.equal(torch.cat([batch.samples.x for batch in next(iter(unshuffled.session(0)))]), plain.session(0).samples.x)
    assert "not shuffled" in str(unshuffled) and "not shuffled" not in str(plain)
    assert unshuffled.fingerprint == plain.fingerprint


def test_a_run_learns_from_it_and_resumes() -> None:
    from clstream.checks import example_model, example_stream
    from clstream.checks.recorders import Checkpoints
    from clstream.checks.strategy_checks import difference

    stream = drifting(example_stream(batch_size=16), Transitions(0.5), 6)
    whole = Checkpoints()
    result = run(Strategy(example_model()), stream, whole)
    assert result.accuracy.shape == (6, 3)
    assert result.taught.int().argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    rest = Checkpoints(every=False)
    run(Strategy(example_model()), stream, rest, resume=whole.load(len(whole.written) // 2))
    assert difference(whole.load(-1), rest.load(-1)) is None


# Refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transitions(1.5), r"width must be a finite number from 0 to 1, not 1\.5"),
        (lambda: Gaussian(0.0), "width must be a finite number above 0"),
        (lambda: LabelShift(0.5), "ratio must be a finite number of at least 1"),
        (lambda: Blurry((1,), 2.0), "blur must be a finite number from 0 to 1"),
        (lambda: drifting(numbered(), Transitions(order=(0, 1))), r"name each of the tasks 0 to 2, not \[0, 1\]"),
        (lambda: drifting(numbered(), Transitions(), 20), "don't divide evenly into the 3 segments of the schedule: take 18"),
        (lambda: drifting(numbered(), Transitions(), 0), "sessions must be a whole number of at least 1"),
        (lambda: drifting(numbered(), Transitions(), 2.5), "sessions must be a whole number"),
        (lambda: drifting(numbered(), Transitions(0.5), 10**12), "1000000000000 sessions can't share 159 samples"),
        (lambda: drifting(numbered(), Given(lambda at, n: torch.ones(len(at), 2))), r"must be a tensor of \(moments, parts\), "),
        (lambda: drifting(numbered(), Given(lambda at, n: None), 6, 20), "not but a NoneType"),
        (lambda: drifting(numbered(), Given(lambda at, n: at[:, None].expand(-1, n) - 0.5), 6, 20), "finite numbers from 0 up"),
        (lambda: drifting(numbered(), Given(lambda at, n: (at[:, None] / 0).expand(-1, n)), 6), "finite numbers from 0 up"),
        (
            lambda: drifting(numbered(), Given(lambda at, n: (at < 0.7)[:, None].expand(-1, n) * 1.0), 10, 20),
            "all 0 at the moment 0.75",
        ),
        (lambda: drifting(numbered(), Given(lambda at, n: torch.ones(len(at), n), 0)), "segments of Given must be a whole number"),
        (lambda: drifting(numbered(), Nameless()), "make Nameless a dataclass"),
        (
            lambda: drifting(numbered(), Both(Transitions(order=(0, 1, 2)), Transitions(order=(1, 2, 0))), 3, 20),
            "all 0 at the moment",
        ),
        (lambda: drifting(numbered(), Blurry((1,), 0.1, (0.5, 0.5))), "a share for each of the 3 tasks, not 2"),
        (lambda: Blurry((1,), 0.1, (-1.0, 1.0, 1.0)), "shares are parts of a whole"),
        (lambda: drifting(numbered(), Blurry((77,))), r"labels that the stream hasn't: \[77\]"),
        (lambda: Stream("own", numbered().tasks, Numbers([-1]), boundaries=False).session(0), "numbered from 0 to 158"),
        (
            lambda: Stream("own", numbered().tasks, Numbers([]), boundaries=False).session(0),
            "session 0 must draw a tensor of one or more",
        ),
        (lambda: drifting(numbered(), Transitions(0.5), 150), "would get none of the 159 samples: take fewer"),
        (lambda: drifting(numbered(), Transitions(0.5), 6, 0), "session_size must be a whole number of at least 1"),
        (lambda: drifting(numbered(), Transitions(0.5), 6, delay=-1.0), "delay must be a finite number of at least 0"),
        (lambda: drifting(numbered(), Both(Gaussian(), Blurry((), 0.0)), 3) and None, ""),
        (lambda: drifting(numbered(scenario="task"), Transitions(0.5), 6), "can't hide its boundaries"),
        (lambda: replace(drifting(numbered(), Transitions(0.5), 6), boundaries=True), "it has no boundaries to show"),
        (lambda: long_tailed(numbered(), 0.5), "ratio must be a finite number of at least 1"),
        (lambda: long_tailed(drifting(numbered(), Transitions(0.5), 6)), "drifts already"),
        (lambda: few_shot(numbered(), 0), "shots must be a whole number of at least 1"),
        (lambda: arriving(numbered(), torch.zeros(3), "mine"), "each of the 159 training samples"),
        (lambda: streams.fuzzy_tasks("EMNIST"), "data must be one of digits, breast_cancer"),
        (lambda: streams.feature_drift(feature=30), "an input from 0 to 29"),
        (lambda: streams.feature_drift(softness=2), "softness must be a finite number from 0 to 1"),
        (lambda: streams.blurry_tasks(disjoint=-1), "disjoint must be a finite number from 0 to 1"),
        (lambda: streams.si_blurry(tasks=6), "must be enough for one in each of 6 tasks"),
        (lambda: streams.recurring_tasks(order=(0, 2)), r"name each of the tasks 0 to 2, not \[0, 2\]"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(make: Callable[[], object], message: str) -> None:
    if not message:
        make()
        return
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_data_is_found_by_name() -> None:
    train, test = source("wine")
    assert len(train) + len(test) == 178
