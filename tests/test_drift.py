"""Schedules of drift: what sessions draw, against what the schedule says, each sample once or with replacement."""

from __future__ import annotations

import pytest
import torch
from clstream.streams import (
    drifting,
    from_tensors,
    si_blurry,
)
from clstream.streams.drifting import parts_of
from clstream.streams.schedules import Blurry, Both, Gaussian, LabelShift, Parts, Transitions
from drifts import SCHEDULES, numbered, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clstream import Stream


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
    assert sorted(row for session in delivered for row in session) == list(range(len(base.data.parts["train"])))
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
    stream = drifting(numbered(first=300), Transitions(width), 30)
    for number in range(30):  # what comes is what the schedule says, but for the sizes of the classes
        wanted = Transitions(width).weights(torch.tensor([(number + 0.5) / 30], dtype=torch.float64), parts)[0]
        mix = stream.mix(number)
        assert torch.allclose(mix.double() / mix.sum(), wanted, atol=0.07)


def test_blurry_spreads_the_share_that_it_says_and_only_of_the_classes_that_it_names() -> None:
    base = numbered(first=200)
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
    base = numbered(first=400)
    on_time, late = (drifting(base, Transitions(), 30, delay=delay) for delay in (0.0, 3.0))
    when = [torch.empty(len(base.data.parts["train"])) for _ in range(2)]
    for stream, into in zip((on_time, late), when, strict=True):
        for session in stream:
            into[rows(session)] = float(session.index)
    early = when[0] < 10  # few of these are still awaited at the end
    assert float((when[1] - when[0])[early].mean()) == pytest.approx(3.0, abs=0.3)
    assert bool((when[1] >= when[0]).all())


def test_late_labels_of_drawn_samples_are_of_earlier_moments() -> None:
    base = numbered(first=50)
    stream = drifting(base, Transitions(), 30, session_size=500, delay=3.0)
    assert set(stream.session(0).classes) == {0, 1}  # nothing came before the begin
    share = stream.mix(10)[0] / 500  # of samples that came before the boundary at session 10, half a session ago
    assert float(share) == pytest.approx(2.718281828 ** (-0.5 / 3), abs=0.06)


@settings(deadline=None, max_examples=25)
@given(kind=st.sampled_from(list(SCHEDULES)), number=st.integers(0, 11), seed=st.integers(0, 5))
def test_drawn_sessions_match_the_weights(kind: str, number: int, seed: int) -> None:
    base, schedule, size = numbered(), SCHEDULES[kind], 4000
    stream = drifting(base, schedule, 12, size, seed=seed)
    parts, _, _ = parts_of(base)
    weights = schedule.weights(torch.tensor([(number + 0.5) / 12], dtype=torch.float64), parts)[0]
    wanted = torch.zeros(6, dtype=torch.float64).index_add_(0, parts.labels, weights / weights.sum())
    drawn = stream.session(number).samples.y.bincount(minlength=6) / size
    assert bool((drawn[wanted == 0] == 0).all())
    assert bool(((drawn - wanted).abs() <= 5 * (wanted * (1 - wanted) / size).sqrt() + 1e-9).all())


def test_within_a_part_every_sample_is_as_likely() -> None:
    stream = drifting(numbered(first=10), LabelShift(1.0), 50, 1000)
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
                for item in thing:
                    visit(item, depth + 1)
            elif depth < 8:
                slots = [getattr(thing, name) for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
                visit([*slots, *getattr(thing, "__dict__", {}).values()], depth + 1)

        visit(stream)
        return sum(met.values())

    sizes = {}
    for sessions in (100, 10_000):
        for size in (None, 32):
            stream = drifting(numbered(first=4000), Gaussian(1.0), sessions, size, straddle=True)
            stream.session(sessions - 1)  # whatever is found out once
            before = held(stream)
            for number in range(0, sessions, max(1, sessions // 500)):
                stream.session(number)
            assert held(stream) == before
            sizes[sessions, size] = before
    assert sizes[100, 32] == sizes[10_000, 32] and sizes[100, None] == sizes[10_000, None]


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
