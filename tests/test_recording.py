"""Recordings: a replay equals the stream batch for batch, whatever it is made of."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import (
    blobs,
    from_dataset,
    recorded,
    rotated_mnist,
    split_digits,
    split_mnist,
    tensors,
)
from conftest import params
from recorded_streams import REAL, STREAMS, Invert, by_hand, digest, flip, own, pictures, recounted, sizes
from torch import Tensor
from torch.utils.data import TensorDataset

from clstream import BatchReady, Samples, Stream, Subset, Task, on, run
from clstream.checks import check_stream
from clstream.models import Mlp
from clstream.recording import record
from clstream.seeds import isolated
from clstream.stream import content_hash


@pytest.mark.parametrize("name", params(STREAMS, REAL))
def test_a_replay_equals_the_stream(name, tmp_path):
    stream = (STREAMS | REAL)[name]()
    file = record(stream, tmp_path / "my.clstream")
    replay = recorded(file)
    assert digest(replay) == digest(stream)
    assert replay.fingerprint == recounted(replay) == stream.fingerprint
    assert str(replay) == str(stream)
    assert sizes(replay) == sizes(stream)
    assert [replay.task_of(number) for number in range(len(replay))] == [stream.task_of(number) for number in range(len(stream))]
    assert record(replay, tmp_path / "again.clstream").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", STREAMS)
def test_a_replay_is_a_stream_like_any(name, tmp_path):
    stream = STREAMS[name]()
    replay = recorded(record(stream, tmp_path / "my.clstream"))
    for check in check_stream(replay):
        check()
    assert digest(replay, seed=4) == digest(stream, seed=4) != digest(stream)
    assert digest(replay.to("cpu")) == digest(stream)
    assert replay.to("cpu").fingerprint == stream.fingerprint
    if stream.tasks[0].validation is not None:
        assert digest(replay.for_tuning()) == digest(stream.for_tuning())
        assert replay.for_tuning().fingerprint == stream.for_tuning().fingerprint != stream.fingerprint


@pytest.mark.data
def test_a_split_mnist_recording_is_small(tmp_path):
    size = record(split_mnist(), tmp_path / "my.clstream").stat().st_size
    print(f"a Split MNIST recording has {size:,} bytes")
    assert size <= 300_000


@pytest.mark.data
def test_test_images_are_turned_once_not_at_each_evaluation(tmp_path):
    stream = rotated_mnist(tasks=1)
    for variant in (stream, recorded(record(stream, tmp_path / "my.clstream"))):
        test = variant.tasks[0].test
        assert isinstance(test, Subset)
        assert test[:100].x.data_ptr() == test[:200].x.data_ptr()  # a view of what was made, not made anew
        assert test.take(slice(5, 9))[:].x.data_ptr() == test[5:6].x.data_ptr()
        assert torch.equal(test.x[:50], test.transform(test.source.x[:50]))


# Two strategies on one recording -----------------------------------------------------------------------------------------


class Seen:
    """An observer that keeps a digest of the batches that a run delivers."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    @on(BatchReady)
    def take(self, event: BatchReady) -> None:
        self.digest.update(content_hash(event.batch.samples.x) + content_hash(event.batch.samples.y))


@pytest.mark.slow
def test_two_strategies_on_one_recording_see_the_same_batches(tmp_path):
    file = record(split_digits(epochs=2), tmp_path / "my.clstream")

    def seen(strategy, seed: int) -> str:
        stream, observer = recorded(file), Seen()
        with isolated(seed, "model"):
            run(strategy(Mlp(stream.input_shape, stream.classes)), stream, observer, seed=seed)
        return observer.digest.hexdigest()

    assert seen(Finetune, 0) == seen(Replay, 0) != seen(Finetune, 1) == seen(Replay, 1)


# Code that has changed since ---------------------------------------------------------------------------------------------


def test_a_replay_survives_other_stream_code(tmp_path, monkeypatch):
    make = STREAMS["blobs, recurring"]
    stream = blobs(tasks=3, schedule=[0, 1, 2, 1, 0], validation=0.2)
    before, file = digest(stream), record(stream, tmp_path / "my.clstream")
    dealt = Stream.session

    def in_one_piece(self: Stream, index: int):
        session = dealt(self, index)
        task = self.tasks[self.task_of(index)]
        half = len(task.train) // 2
        part = slice(None, half) if index < 3 else slice(half, None)
        return replace(session, samples=task.train.take(part) if isinstance(task.train, Subset) else task.train[part])

    monkeypatch.setattr(Stream, "session", in_one_piece)
    monkeypatch.setattr(tensors, "hold_back", lambda rows, share, seed, what: (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    monkeypatch.setattr(tensors, "split_classes", lambda *_: ([[9, 8, 7], [6, 5, 4], [3, 2, 1, 0]], ()))
    counted_otherwise = cached_property(lambda self: "0" * 16)
    counted_otherwise.__set_name__(Stream, "fingerprint")
    monkeypatch.setattr(Stream, "fingerprint", counted_otherwise)
    assert digest(blobs(tasks=3, schedule=[0, 1, 2, 1, 0], validation=0.2)) != before
    assert digest(make()) != before
    replay = recorded(file)
    assert digest(replay) == before
    assert replay.fingerprint == stream.fingerprint


class Halves(Stream):
    """A stream of the user's own class: a task comes in blocks, the later ones in an order that is no slice."""

    def session(self, index):
        session, task = super().session(index), self.tasks[self.task_of(index)]
        _, part, parts = self.visits[index]
        rows = torch.arange(len(task.train)).chunk(parts)[part]
        rows = rows.roll(3) if part else rows
        return replace(session, samples=task.train.take(rows) if isinstance(task.train, Subset) else task.train[rows])


class Brighter(Stream):
    def session(self, index):
        session = super().session(index)
        return replace(session, samples=replace(session.samples[:], x=session.samples[:].x + 1))


class Longer(Stream):
    def session(self, index):
        return replace(super().session(index), epochs=1 + index)


def of_class(cls: type[Stream]) -> Stream:
    stream = own(schedule=[0, 1, 0, 2])
    return cls(stream.name, stream.tasks, stream.schedule, data=stream.data)


def test_sessions_are_recorded_as_they_are_dealt(tmp_path):
    stream = of_class(Halves)
    replay = recorded(record(stream, tmp_path / "my.clstream"), data=own())
    assert digest(replay) == digest(stream) != digest(own(schedule=[0, 1, 0, 2], batch_size=32))


@pytest.mark.parametrize("cls", [Brighter, Longer])
def test_sessions_that_are_no_rows_of_their_task_are_refused(cls, tmp_path):
    with pytest.raises(ValueError, match=f"{cls.__name__}.session gives in session [01] something other"):
        record(of_class(cls), tmp_path / "my.clstream")
    assert not list(tmp_path.iterdir())


# Samples of the user's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        own,
        lambda: own(scenario="domain", class_order=4),
        lambda: own(augment=flip),
        lambda: own(augment=Invert(9)),
        by_hand,
        lambda: by_hand(Invert()),
        lambda: by_hand(Invert(200), schedule=[0, 1, 2, 1, 1, 0]),
    ],
)
def test_samples_of_the_users_own(make, tmp_path):
    stream = make()
    file = record(stream, tmp_path / "my.clstream")
    functions = {"Invert": Invert, "flip": flip}
    replay = recorded(file, data=make(), functions=functions)
    assert digest(replay) == digest(stream)
    assert replay.fingerprint == recounted(replay) == stream.fingerprint
    assert (replay.augment is flip) == (stream.augment is flip)
    assert replay.augment == stream.augment
    assert [type(task.test) for task in replay.tasks] == [type(task.test) for task in stream.tasks]
    assert record(replay, tmp_path / "again.clstream").read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match=r"samples that clstream can't load: give a stream over them, recorded\(.*data=my_stream"):
        recorded(file)


def test_the_stream_over_the_data_may_be_any_other_over_it(tmp_path):
    stream = own(scenario="domain", validation=0.2)
    replay = recorded(record(stream, tmp_path / "my.clstream"), data=own(tasks=2, class_order=1, schedule=[1, 0]))
    assert digest(replay) == digest(stream)


def test_memory_mapped_samples_stay_on_the_disk(tmp_path):
    train, test = (TensorDataset(part.x, part.y) for part in (pictures(), pictures(24, 1)))

    def mapped(folder: str) -> Stream:
        return from_dataset(train, test, tasks=3, progress=False, memory_map=tmp_path / folder)

    stream = mapped("one")
    file, elsewhere = record(stream, tmp_path / "my.clstream"), mapped("other place")
    replay = recorded(file, data=elsewhere)
    assert not replay.resident
    assert replay.tasks[0].train.source.x.data_ptr() == elsewhere.tasks[0].train.source.x.data_ptr()
    assert digest(replay) == digest(stream)
    assert replay.to("meta").session(0).device == torch.device("meta")


def test_a_domain_is_made_once_a_session_and_moves_with_its_stream(tmp_path):
    stream = by_hand(Invert())
    for variant in (stream, recorded(record(stream, tmp_path / "my.clstream"), data=by_hand(), functions={"Invert": Invert})):
        assert isinstance(variant.session(0).samples, Subset)
        assert isinstance(variant.session(1).samples, Samples)
        made = variant.to("meta").tasks[1].test
        assert made.cached.x.is_meta
        assert made.source.x.is_meta
        assert variant.tasks[1].test.to("meta").cached.y.is_meta


def test_samples_keep_their_extra_fields(tmp_path):
    x, y = pictures().x, pictures().y
    one, two = (Samples(x, y, {"weight": torch.arange(60.0) + n}) for n in (0, 1))
    stream = Stream("extra", [Task(n, tuple(range(6)), part, part) for n, part in enumerate((one, two))], scenario="domain")
    file = record(stream, tmp_path / "my.clstream")
    replay = recorded(file, data=stream)
    assert [float(task.train.extra["weight"][0]) for task in replay.tasks] == [0, 1]
    plain = Stream("extra", [Task(0, tuple(range(6)), Samples(x, y), Samples(x, y))])
    with pytest.raises(ValueError, match=r"it lacks extra\.weight of its part 'source_0'"):
        recorded(file, data=plain)


# What can't be recorded --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted:
    weights: object

    def __call__(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: own(augment=lambda x: x), "the augmentation must be a frozen dataclass of .*, or a function defined in a module"),
        (lambda: own(augment=torch.nn.Identity()), "the augmentation must be"),
        (lambda: own(augment=Weighted(torch.ones(2))), r"the augmentation must be .*not Weighted\(weights=tensor"),
        (lambda: by_hand(flip), "the transform of the training samples of task 1 must be a frozen dataclass"),
        (lambda: by_hand(Weighted((1, 2))), "the transform of the training"),
        (lambda: by_hand(Weighted(float("nan"))), "the transform of the training"),
    ],
)
def test_what_cannot_be_named_is_refused_before_anything_is_written(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        record(make(), tmp_path / "my.clstream")
    assert not list(tmp_path.iterdir())


def test_only_a_stream_can_be_recorded(tmp_path):
    with pytest.raises(TypeError, match="record takes a Stream, not a str"):
        record("blobs", tmp_path / "my.clstream")


def test_a_file_that_holds_something_else_is_kept(tmp_path):
    file = record(blobs(tasks=2), tmp_path / "my.clstream")
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert record(blobs(tasks=2), file) == file
    with pytest.raises(FileExistsError, match=r"my\.clstream holds something else: choose another file, or overwrite it"):
        record(blobs(tasks=5), file)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    record(blobs(tasks=5), file, force=True)
    assert len(recorded(file).tasks) == 5
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["no folder/my.clstream", "."])
def test_a_place_that_cannot_be_written_is_one_sentence(place, tmp_path):
    with pytest.raises(OSError, match=r"can't be written: (No such|Is a) "):
        record(blobs(), tmp_path / place)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = record(blobs(), tmp_path / "my.clstream")
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"my\.clstream can't be written: No space left on device"):
        record(split_digits(), file, force=True)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
