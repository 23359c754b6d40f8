"""Streams that leave out a last batch that is not full, as torch's DataLoader does with drop_last."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import clstream.streams as ready
import pytest
import torch
from clstream.strategies import Finetune, Joint
from clstream.streams import blobs, drifting, fuzzy_tasks, gaussian_schedule, recorded
from clstream.streams.schedules import Transitions
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from clstream import run
from clstream.bus import on
from clstream.checks import check_stream, example_model, example_stream
from clstream.engine import OtherRunError
from clstream.engine.simulation import Simulation
from clstream.events import BatchLearned
from clstream.recording import read, record
from clstream.stream import Samples, Stream, Task


def of(count: int, batch_size: int, **options: object) -> Stream:
    """Return a stream of one task whose inputs are numbers."""
    samples = Samples(torch.arange(float(count))[:, None], torch.arange(count) % 2)
    return Stream("numbers", [Task(0, (0, 1), samples, samples)], batch_size=batch_size, **options)  # type: ignore[arg-type]


@given(count=st.integers(2, 40), size=st.integers(1, 40), first=st.integers(0, 5), shuffle=st.booleans(), epochs=st.integers(1, 3))
def test_its_batches_are_the_full_ones_of_the_stream_that_drops_none(
    count: int, size: int, first: int, shuffle: bool, epochs: int
) -> None:
    size = min(size, count)
    whole = of(count, size, shuffle=shuffle, epochs=epochs)
    loader = DataLoader(TensorDataset(torch.arange(count)), batch_size=size, drop_last=True)
    for epoch, other in zip(replace(whole, drop_last=True).session(0), whole.session(0), strict=True):
        full = [batch.samples.x for batch in other if len(batch.samples) == size]
        assert len(epoch) == len(full) == len(loader)
        batches = list(epoch)
        assert [batch.index for batch in batches] == list(range(len(full)))
        assert all(torch.equal(batch.samples.x, x) for batch, x in zip(batches, full, strict=True))
        assert all(torch.equal(a.samples.x, b) for a, b in zip(epoch.batches(first), full[first:], strict=True))


def test_each_pass_leaves_out_other_samples() -> None:
    left = []
    for epoch in of(21, 10, epochs=4, drop_last=True).session(0):
        came = torch.cat([batch.samples.x for batch in epoch]).flatten().long()
        left.append((set(range(21)) - set(came.tolist())).pop())
    assert len(set(left)) > 1


def test_classes_and_labels_of_a_session_are_those_of_all_its_samples() -> None:
    samples = Samples(torch.zeros(5, 1), torch.tensor([0, 0, 0, 0, 1]))
    stream = Stream("rare", [Task(0, (0, 1), samples, samples)], batch_size=4, shuffle=False, drop_last=True)
    assert stream.session(0).classes == [0, 1] and stream.labels(0).tolist() == [0, 0, 0, 0, 1] and stream.size_of(0) == 5
    assert [batch.samples.y.tolist() for batch in next(iter(stream.session(0)))] == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "session"),
    [
        (lambda: of(9, 10, drop_last=True), 0),
        (lambda: blobs(classes=5, train_per_class=5, sessions_per_task=2, batch_size=3, drop_last=True), 1),
        (lambda: drifting(of(20, 6, drop_last=True), Transitions(0.0), sessions=4), 0),
        (lambda: gaussian_schedule(session_size=9, batch_size=10, sessions=4, drop_last=True), 0),
        (lambda: replace(drifting(of(20, 6), Transitions(0.0), sessions=4), drop_last=True), 0),
    ],
    ids=["one session", "the second of a task", "drifting", "drawn", "replace"],
)
def test_a_session_without_a_full_batch_is_refused(make, session) -> None:
    with pytest.raises(ValueError, match=rf"session {session} has \d+ samples, too few for a batch of \d+, and drop_last=True"):
        make()


@pytest.mark.parametrize(
    "name", [name for name in ready.__all__ if "batch_size" in inspect.signature(getattr(ready, name)).parameters]
)
def test_whatever_takes_a_batch_size_takes_drop_last(name: str) -> None:
    option = inspect.signature(getattr(ready, name)).parameters["drop_last"]
    assert option.default is False
    assert "drop_last" in inspect.getdoc(getattr(ready, name))  # or the page of options wouldn't have it


DROPPING = {
    "blobs": lambda **options: blobs(tasks=2, classes=4, train_per_class=11, batch_size=10, **options),
    "split_digits": lambda **options: ready.split_digits(epochs=1, **options),
    "blurry_episodes": lambda **options: ready.blurry_episodes("digits", **options),
    "fuzzy_tasks": lambda **options: fuzzy_tasks(sessions=5, **options),
    "recurring_tasks": lambda **options: ready.recurring_tasks(sessions=5, **options),
    "blurry_tasks": lambda **options: ready.blurry_tasks(sessions=5, **options),
    "si_blurry": lambda **options: ready.si_blurry(sessions=5, **options),
    "gaussian_schedule": lambda **options: gaussian_schedule(sessions=5, session_size=37, **options),
    "label_shift": lambda **options: ready.label_shift(sessions=5, session_size=37, **options),
    "feature_drift": lambda **options: ready.feature_drift(sessions=5, **options),
    "imbalanced_tasks": lambda **options: ready.imbalanced_tasks(ratio=2.0, **options),
    "few_shot_tasks": lambda **options: ready.few_shot_tasks(shots=6, **options),
}


@pytest.mark.parametrize("name", DROPPING)
def test_ready_streams_drop_what_they_are_told_to(name: str) -> None:
    whole, dropping = DROPPING[name](), DROPPING[name](drop_last=True)
    assert (whole.drop_last, dropping.drop_last) == (False, True)
    assert whole.fingerprint == dropping.fingerprint  # the data and the schedule are the same, as with another batch_size
    sizes = [len(batch.samples) for session in dropping for epoch in session for batch in epoch]
    assert set(sizes) == {dropping.batch_size}
    assert sum(sizes) < sum(len(session.samples) * len(session) for session in whole)
    assert "the last one dropped if it is not full" in str(dropping) and "dropped" not in str(whole)
    for check in check_stream(dropping):
        check.body()


def test_a_stream_that_hides_its_boundaries_says_it() -> None:
    assert blobs(boundaries=False, drop_last=True).visible.drop_last and not blobs(boundaries=False).visible.drop_last


def test_a_recording_keeps_it_and_is_one_that_older_versions_refuse(tmp_path: Path) -> None:
    for drop_last in (False, True):
        stream = DROPPING["blobs"](drop_last=drop_last)
        file = record(stream, tmp_path / f"{drop_last}.clstream")
        assert read(file).about["format"] == (3 if drop_last else 1)  # what doesn't know it would play other batches
        assert ("drop_last" in read(file).about) == drop_last
        again = recorded(file)
        assert again.drop_last is drop_last and again.fingerprint == stream.fingerprint
        pairs = zip(again, stream, strict=True)
        assert all(
            torch.equal(a.samples.x, b.samples.x)
            for one, two in pairs
            for a, b in zip(next(iter(one)), next(iter(two)), strict=True)
        )


def test_it_belongs_to_the_identity_of_a_run() -> None:
    def going(drop_last: bool) -> Simulation:
        stream = replace(example_stream(batch_size=7), drop_last=drop_last)
        return Simulation(Finetune(example_model()), stream, (), 0, "cpu", None, None)

    started = going(True)
    started.start(None)
    state = started.state()
    going(True).check_same(state)
    with pytest.raises(OtherRunError, match=r"stream\.drop_last was True, now it is None"):
        going(False).check_same(state)
    assert "stream.drop_last" not in going(False).identity  # so that what was kept before there was such an option goes on


def test_joint_takes_full_steps_of_everything_seen() -> None:
    sizes: list[int] = []

    class Counting(Joint):
        def loss(self, samples: Samples) -> torch.Tensor:
            sizes.append(len(samples))
            return super().loss(samples)

    run(Counting(example_model()), replace(example_stream(epochs=2, batch_size=16), drop_last=True))  # 60 samples a session
    assert set(sizes) == {16}
    assert len(sizes) == 2 * (60 // 16 + 120 // 16 + 180 // 16)


def test_a_run_learns_the_full_batches_only() -> None:
    class Counting:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        @on(BatchLearned)
        def count(self, event: BatchLearned) -> None:
            self.sizes.append(len(event.batch.samples))

    counting = Counting()
    run(Finetune(example_model()), replace(example_stream(epochs=2, batch_size=16), drop_last=True), counting)
    assert counting.sizes == [16] * (3 * 2 * 3)
