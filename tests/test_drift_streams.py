"""Drifting streams over any source: what they deliver, fingerprints, recordings, runs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from clstream.streams import (
    at_moments,
    blobs,
    drifting,
    few_shot,
    long_tailed,
    recorded,
    sorted_by,
)
from clstream.streams.data import table
from clstream.streams.schedules import Blurry, Both, Gaussian, LabelShift, Transitions
from clstream.streams.task_free import source
from drifts import Given, Nameless, Numbers, numbered, rows
from torch import Tensor

from clstream import Samples, Stream, Subset, Task, run, streams
from clstream.checks import check_stream
from clstream.recording import record
from clstream.strategy import Strategy
from clstream.stream import MixedSchedule


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
    values = [torch.cat([session.samples.x[:, 1] for session in stream]) for stream in (strict, soft, none)]
    ranks = [feature.argsort().argsort().double() for feature in values]
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
    left, other, same = (long_tailed(base, 4.0, seed=seed).tasks[0].train.x.flatten() for seed in (0, 1, 0))
    assert torch.equal(left, same) and not torch.equal(left, other)
    whole = base.tasks[0].train.x.flatten().tolist()
    places = [whole.index(x) for x in left.tolist()]
    assert places == sorted(places) and places != list(range(len(places)))
    assert min(len(task.train) for task in long_tailed(numbered(2), 1e6, shuffled=False).tasks) >= 2  # one of each class, at least


def test_fingerprints_tell_streams_apart() -> None:
    base = numbered()
    drifted = [
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
    assert len({stream.fingerprint for stream in drifted} | {base.fingerprint}) == len(drifted) + 1
    for stream in drifted:
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
    for session, replayed in zip(stream, again, strict=True):
        for batch, same in zip(next(iter(session)), next(iter(replayed)), strict=True):
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
    rest = Checkpoints(every=0)
    run(Strategy(example_model()), stream, rest, resume=whole.load(len(whole.written) // 2))
    assert difference(whole.load(-1), rest.load(-1)) is None


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
        (lambda: at_moments(numbered(), torch.zeros(3), "mine"), "each of the 159 training samples"),
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
