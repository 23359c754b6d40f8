"""Recordings: a replay equals the stream batch for batch, and whatever is not what was recorded is refused in one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import (
    blobs,
    from_dataset,
    from_tensors,
    permuted_mnist,
    recorded,
    rotated_mnist,
    split_cifar10,
    split_digits,
    split_mnist,
    tensors,
)
from conftest import params
from recorded_files import contents, crafted, npy
from torch import Tensor
from torch.utils.data import TensorDataset

from clstream import BatchReady, Samples, Stream, Subset, Task, on, run
from clstream.checks import check_stream
from clstream.cli import main
from clstream.models import Mlp
from clstream.recording import FORMAT, RecordedStream, read, record
from clstream.seeds import isolated
from clstream.stream import Epoch, content_hash

replaying = sys.modules["clstream.streams.recorded"]  # the function of this name hides its module


def pictures(n: int = 60, first: int = 0) -> Samples:
    draw = torch.Generator().manual_seed(first)
    return Samples(torch.randint(0, 256, (n, 1, 6, 6), generator=draw).to(torch.uint8), torch.arange(n) % 6)


def own(**options) -> Stream:
    train, test = pictures(), pictures(24, 1)
    return from_tensors(train.x, train.y, test.x, test.y, **{"name": "pictures", "tasks": 3, "batch_size": 7, **options})


@dataclass(frozen=True)
class Invert:
    highest: int = 255

    def __call__(self, x: Tensor) -> Tensor:
        return self.highest - x


def flip(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)


def by_hand(transform: Callable[[Tensor], Tensor] | None = None, **options) -> Stream:
    """Domains of samples in mixed forms: plain, subsets of all and of some rows, labels that are no function of others."""
    source, tested = pictures(), pictures(24, 1)
    mixed = Samples(source.x, torch.randint(0, 6, (60,), generator=torch.Generator().manual_seed(5)))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(6))
    tasks = [
        Task(0, tuple(range(6)), Subset(source, torch.arange(60)), tested),
        Task(1, tuple(range(6)), Subset(mixed, rows[:40], transform), Subset(tested, torch.arange(24), transform).cache(),
             Subset(mixed, rows[40:], transform)),
        Task(2, tuple(range(6)), pictures(60, 2), Subset(tested, torch.arange(0, 24, 2))),
    ]  # fmt: skip
    return Stream("by hand", tasks, scenario="domain", **{"batch_size": 9, **options})


def digest(stream: Stream, seed: int = 0) -> str:
    """Return a digest of all that a run is given: every batch of every pass, its task, and what is tested."""
    found = hashlib.sha256()
    for session in stream.reseeded(seed):
        for epoch in session:
            found.update(repr((session.index, len(session), epoch.index, len(epoch))).encode() + epoch.order().numpy().tobytes())
            for batch in epoch:
                task = None if batch.task_hidden else (batch.task.id, batch.task.classes)
                found.update(repr((batch.index, task)).encode())
                found.update(content_hash(batch.samples.x) + content_hash(batch.samples.y))
    for task in stream.tasks:
        for part in (task.train, task.test, task.validation):
            found.update(b"none" if part is None else content_hash(part.x) + content_hash(part.y))
    return found.hexdigest()


def recounted(stream: Stream) -> str:
    """Return the fingerprint as it is counted anew from what the stream is made of."""
    return replace(stream).fingerprint


def sizes(stream: Stream) -> dict[str, object]:
    names = (
        "name",
        "schedule",
        "epochs",
        "batch_size",
        "scenario",
        "seed",
        "boundaries",
        "resident",
        "notes",
        "classes",
        "input_shape",
    )
    return {name: getattr(stream, name) for name in names}


STREAMS: dict[str, Callable[[], Stream]] = {
    "blobs": lambda: blobs(epochs=2),
    "blobs, other points": lambda: blobs(tasks=2, classes=5, features=3, train_per_class=30, test_per_class=4, spread=0.3, seed=8),
    "blobs, online, hidden": lambda: blobs(tasks=3, sessions_per_task=3, boundaries=False, batch_size=7, class_order=2),
    "blobs, recurring": lambda: blobs(tasks=3, schedule=[0, 1, 2, 1, 0], epochs=2, train_per_class=20),
    "blobs, task-IL, validation": lambda: blobs(tasks=3, scenario="task", validation=0.2),
    "blobs, domain-IL, validation": lambda: blobs(tasks=4, scenario="domain", class_order=3, validation=0.2),
    "blobs, for tuning": lambda: blobs(tasks=2, validation=0.2).for_tuning(),
    "blobs, reseeded": lambda: blobs(tasks=2).reseeded(11),
    "digits": lambda: split_digits(tasks=3, sessions_per_task=2, epochs=2),
}
REAL: dict[str, Callable[[], Stream]] = {
    "split_mnist": lambda: split_mnist(validation=0.1, batch_size=500),
    "split_mnist, domain-IL": lambda: split_mnist(scenario="domain", batch_size=500),
    "split_mnist, padded": lambda: split_mnist(batch_size=2000, pad=2, validation=0.5),
    "permuted_mnist": lambda: permuted_mnist(tasks=2, batch_size=2000, pad=2),
    "permuted_mnist, class-IL": lambda: permuted_mnist(tasks=2, batch_size=2000, scenario="class", validation=0.5),
    "rotated_mnist": lambda: rotated_mnist(tasks=2, batch_size=2000, sessions_per_task=2, validation=0.9),
}


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
    for each in (stream, recorded(record(stream, tmp_path / "my.clstream"))):
        test = each.tasks[0].test
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
        _, part, parts = self._visits[index]
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
    for each in (stream, recorded(record(stream, tmp_path / "my.clstream"), data=by_hand(), functions={"Invert": Invert})):
        assert isinstance(each.session(0).samples, Subset)
        assert isinstance(each.session(1).samples, Samples)
        made = each.to("meta").tasks[1].test
        assert made.cached.x.is_meta
        assert made.source.x.is_meta
        assert each.tasks[1].test.to("meta").cached.y.is_meta


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


# Other data, other code, another torch -----------------------------------------------------------------------------------


def one_pixel(x: Tensor) -> Tensor:
    x = x.clone()
    x[-1, 0, -1, -1] += 1
    return x


def one_label(y: Tensor) -> Tensor:
    y = y.clone()
    y[-1] = (y[-1] + 1) % 6
    return y


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (lambda part: replace(part, x=one_pixel(part.x)), lambda part: part, "the inputs of its part 'train' have other values"),
        (lambda part: part, lambda part: replace(part, x=one_pixel(part.x)), "the inputs of its part 'test' have other values"),
        (lambda part: replace(part, y=one_label(part.y)), lambda part: part, "the labels of its part 'train' have other values"),
        (lambda part: part, lambda part: replace(part, y=one_label(part.y)), "the labels of its part 'test' have other values"),
        (
            lambda part: part[:54],
            lambda part: part,
            r"part 'train' are \(54, 1, 6, 6\) of uint8, not \(60, 1, 6, 6\)",
        ),
        (lambda part: replace(part, x=part.x.float()), lambda part: replace(part, x=part.x.float()), "of float32, not"),
    ],
)
def test_other_data_is_refused(train, test, message, scenario, tmp_path):
    file = record(own(scenario=scenario), tmp_path / "my.clstream")
    one, two = train(pictures()), test(pictures(24, 1))
    other = from_tensors(one.x, one.y, two.x, two.y, name="others", tasks=3, scenario=scenario)
    with pytest.raises(ValueError, match=rf"the data of others is not the data that .*my\.clstream was recorded from: .*{message}"):
        recorded(file, data=other)


def test_another_data_set_is_refused(tmp_path):
    file = record(own(), tmp_path / "my.clstream")
    with pytest.raises(ValueError, match=r"the data of split_digits is not the data .*: the inputs .* are \(1352, 1, 8, 8\)"):
        recorded(file, data=split_digits())


def mnist_in(root: Path) -> tuple[Path, Path]:
    """Copy MNIST to a folder; return its files of test images and of training labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes((Path(os.environ["CLSTREAM_DATA"]) / "MNIST" / "raw" / name).read_bytes())
    return raw / "t10k-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"


@pytest.mark.data
def test_data_is_found_wherever_it_lies_and_refused_where_it_is_another(tmp_path, monkeypatch):
    stream = split_mnist(scenario="domain")
    file = record(stream, tmp_path / "my.clstream")
    images, labels = mnist_in(tmp_path / "elsewhere")
    monkeypatch.delenv("CLSTREAM_DATA")
    assert recorded(file, root=tmp_path / "elsewhere").session(0).samples[:9].x.equal(stream.session(0).samples[:9].x)
    for damaged, what in ((images, "the inputs of its part 'test'"), (labels, "the labels of its part 'train'")):
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        other = pytest.raises(ValueError, match=f"MNIST in .*elsewhere is not the data .*: {what} have other values")
        with pytest.warns(UserWarning, match=f"{damaged.name} in .* are not the known files of MNIST"), other:
            recorded(file, root=tmp_path / "elsewhere")
        damaged.write_bytes(content)


def test_data_that_is_not_there_is_named_with_its_folder(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    fake = Samples(torch.randint(0, 256, (40, 3, 4, 4), generator=draw).to(torch.uint8), torch.arange(40) % 10)
    monkeypatch.setattr("clstream.streams.splits.load", lambda name, root: (fake, fake))
    file = record(split_cifar10(augment=True), tmp_path / "my.clstream")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 is not in .*missing.*--data-root"):
        recorded(file, root=tmp_path / "missing")
    monkeypatch.setattr(replaying, "load", lambda name, root: (fake, fake))
    assert recorded(file).augment.__name__ == "crop_and_flip"


def test_points_that_another_torch_draws_otherwise_are_refused(tmp_path, monkeypatch):
    file = record(blobs(), tmp_path / "my.clstream")
    monkeypatch.setattr(replaying, "points", lambda **_: (pictures(), pictures()))
    with pytest.raises(ValueError, match="blobs, as this torch draws them, is not the data"):
        recorded(file)


def test_a_torch_that_deals_the_batches_in_another_order_is_refused(tmp_path, monkeypatch):
    file = record(blobs(), tmp_path / "my.clstream")
    order = Epoch.order
    monkeypatch.setattr(Epoch, "order", lambda epoch: order(epoch).flip(0))
    with pytest.raises(ValueError, match=r"torch \S+ deals the batches in another order than torch \d"):
        recorded(file)


def test_a_transform_that_has_changed_is_refused(tmp_path):
    file = record(by_hand(Invert()), tmp_path / "my.clstream")

    @dataclass(frozen=True)
    class Inverted:
        highest: int = 255

        def __call__(self, x: Tensor) -> Tensor:
            return self.highest - 1 - x

    @dataclass(frozen=True)
    class Renamed:
        top: int = 255

    for functions, message in (
        ({"Invert": Inverted}, "its transform Invert gives other values than when it was recorded"),
        ({"Invert": Renamed}, "Invert does not take the recorded .*'highest': 255"),
        ({}, r"uses 'Invert', which does not come with clstream: supply it, recorded\(..., functions=\{'Invert': Invert\}\)"),
    ):
        with pytest.raises(ValueError, match=message):
            recorded(file, data=by_hand(), functions=functions)


def test_a_recording_names_only_what_is_offered(tmp_path):
    """Names in the file are looked up in a table; no import and no attribute is reached by them."""
    file = tmp_path / "my.clstream"
    about, arrays = contents(own(augment=flip))
    for name in ("os.system", "print", "__import__", "clstream.streams.domains.Rotate"):
        file.write_bytes(crafted({**about, "augment": {"name": name}}, arrays))
        with pytest.raises(ValueError, match="which does not come with clstream"):
            recorded(file, data=own())
    file.write_bytes(crafted({**about, "loader": "os.system", "options": {"command": "ls"}}, arrays))
    with pytest.raises(ValueError, match="clstream can't load"):
        recorded(file)


# The file ----------------------------------------------------------------------------------------------------------------


def test_the_same_stream_gives_the_same_bytes(tmp_path):
    for make in (blobs, by_hand):
        one, two = (record(make(), tmp_path / f"{make.__name__} {number}") for number in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_the_file_is_read_with_zip_json_and_numpy_alone(tmp_path):
    stream = STREAMS["blobs, recurring"]()
    file = record(stream, tmp_path / "my.clstream")
    with zipfile.ZipFile(file) as packed:
        assert packed.testzip() is None
        about = json.loads(packed.read("stream.json"))
        arrays = {}
        for name in packed.namelist():
            member = packed.read(name)
            if name != "stream.json":
                arrays[name] = np.load(io.BytesIO(member), allow_pickle=False)
            with pytest.raises((ValueError, AssertionError, AttributeError)):  # it is no pickle
                list(pickletools.genops(member))
        assert {entry.date_time for entry in packed.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert about["format"] == 1
    assert about["fingerprint"] == stream.fingerprint
    assert [task["classes"] for task in about["tasks"]] == [list(task.classes) for task in stream.tasks]
    assert [session["task"] for session in about["sessions"]] == [0, 1, 2, 1, 0]
    for number, session in enumerate(about["sessions"]):  # the rows of every session, as the documentation says
        rows = arrays[about["tasks"][session["task"]]["train"]["rows"]]
        delivered = rows[session["start"] :: session["step"]][: session["count"]]
        assert delivered.tolist() == stream.session(number).samples.index.tolist()
        assert rows.dtype == np.uint8  # 200 points
    assert about["parts"]["train"]["x"] == {
        "shape": [200, 20],
        "dtype": "float32",
        "sha256": content_hash(stream.tasks[0].train.source.x).hex(),
    }


def test_the_hash_of_a_tensor_stays_as_it_is():
    """Recordings hold it: another one would refuse them all."""
    found = content_hash(torch.arange(20_000, dtype=torch.int64).view(10_000, 2)).hex()
    data = np.arange(20_000, dtype="<i8").tobytes()
    assert found == hashlib.sha256(b"torch.int64 (10000, 2)" + data).hexdigest()
    assert content_hash(torch.arange(40).view(20, 2)[::2]) == content_hash(torch.arange(40).view(20, 2)[::2].clone())


def test_every_flipped_bit_and_every_torn_end_is_refused(tmp_path):
    file = record(blobs(tasks=2, classes=4, train_per_class=3, test_per_class=2), tmp_path / "my.clstream")
    whole = file.read_bytes()
    places = range(0, len(whole), 7)
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"my\.clstream is (damaged or was changed|no recording of clstream)"):
            read(file)
        file.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"my\.clstream is (empty|damaged or was changed|no recording of clstream)"):
            read(file)
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="damaged or was changed"):
        read(file)
    file.write_bytes(whole)
    assert read(file).about["name"] == "blobs"


def test_files_that_are_no_recordings_are_refused(tmp_path):
    file = tmp_path / "my.clstream"
    torch.save({"a": 1}, tmp_path / "a torch file")  # a zip too
    for content in (b"x", b"stream: blobs\n", b"\x80\x04K\x01.", (tmp_path / "a torch file").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"my\.clstream is no recording of clstream"):
            recorded(file)
    with pytest.raises(FileNotFoundError, match=r"there is no recording .*nowhere: clstream record --stream"):
        recorded(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"the recording .* can't be read: Is a directory"):
        recorded(tmp_path)


def test_a_newer_format_and_a_file_of_other_make_are_refused(tmp_path):
    file = tmp_path / "my.clstream"
    about, arrays = contents(blobs())
    file.write_bytes(crafted({**about, "format": FORMAT + 1, "clstream": "9.0"}, {}))
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, of clstream 9\.0; clstream \S+ reads up to format {FORMAT}"):
        recorded(file)
    del about["format"]
    file.write_bytes(crafted(about, arrays))
    with pytest.raises(ValueError, match=r"is no recording that clstream .* can read"):
        recorded(file)


def test_an_array_of_objects_is_not_read(tmp_path):
    about, arrays = contents(blobs())
    pickled = npy(np.array([print], dtype=object), allow_pickle=True)
    (tmp_path / "my.clstream").write_bytes(crafted(about, {**arrays, "task_0_train.npy": pickled}))
    with pytest.raises(ValueError, match=r"is no recording that clstream .* can read: task_0_train.npy is no row of whole numbers"):
        recorded(tmp_path / "my.clstream")


# The command line --------------------------------------------------------------------------------------------------------

SHORT = ["--strategy", "Replay", "--strategy.capacity", "50", "--model.hidden", "[16]", "--track", "false", "--seed", "3"]


def accuracies(printed: str) -> list[str]:
    """Return what is printed of a run but its seconds: accuracy and forgetting, and the accuracies session by session."""
    row, *curves = (line for line in printed.splitlines() if "Replay on split_digits" in line or "task " in line)
    return [*row.split("│")[1:4], *curves]


def test_record_and_replay_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--stream.epochs", "1", "--stream.class_order", "2"]
    assert main(["record", "--stream", "split_digits", *options, "--out", "my.clstream"]) == 0
    said = capsys.readouterr().out
    stream = split_digits(epochs=1, class_order=2)
    size = (tmp_path / "my.clstream").stat().st_size
    assert str(stream) in said
    assert f"recorded in my.clstream: {size:,} bytes, fingerprint {stream.fingerprint}" in said
    results = []
    (tmp_path / "my.yaml").write_text("stream: recorded:my.clstream\n")
    for chosen in (
        ["--stream", "split_digits", *options], ["--stream", "recorded:my.clstream"], ["--stream=recorded:my.clstream"],
        ["--stream", "recorded", "--stream.file", "my.clstream"], ["--config", "my.yaml"],
    ):  # fmt: skip
        assert main(["run", *chosen, *SHORT]) == 0
        results.append(accuracies(capsys.readouterr().out))
    assert all(result == results[0] for result in results)
    assert len(results[0]) > 5
    assert main(["run", "--stream", "recorded:my.clstream", *SHORT, "--print_config"]) == 0
    (tmp_path / "whole.yaml").write_text(capsys.readouterr().out)
    assert main(["record", "--config", "whole.yaml", "--out", "again.clstream"]) == 0
    assert (tmp_path / "again.clstream").read_bytes() == (tmp_path / "my.clstream").read_bytes()


MINE = '''
import torch
from clstream import Stream
from clstream.streams import from_tensors

def half(x: torch.Tensor) -> torch.Tensor:
    return x / 2

def points(tasks: int = 2, shift: float = 0.0) -> Stream:
    """Points of my own."""
    x, y = torch.arange(80.0).view(40, 2) + shift, torch.arange(40) % 4
    return from_tensors(x, y, x, y, name="points", tasks=tasks, augment=half)
'''


def test_samples_of_the_users_own_by_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "recorded_points.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["record", "--stream", "recorded_points.points", "--out", "my.clstream"]) == 0
    replay = ["run", "--stream", "recorded:my.clstream", *SHORT]
    assert main(replay) == 1
    assert "--stream.data my_file.my_stream" in capsys.readouterr().err
    given = ["--stream.data", "recorded_points.points", "--stream.functions", '{"half": recorded_points.half}']
    assert main([*replay, *given]) == 0
    assert main([*replay, *given, "--stream.data.shift", "0.5"]) == 1
    assert "the data of points is not the data that my.clstream was recorded from" in capsys.readouterr().err


@pytest.mark.data
def test_data_root_reaches_the_recording(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = os.environ["CLSTREAM_DATA"]
    monkeypatch.delenv("CLSTREAM_DATA")
    small = ["--strategy", "Finetune", "--model.hidden", "[4]", "--track", "false", "--max_sessions", "1"]
    given = ["--stream", "split_mnist", "--stream.batch_size", "2000", "--data_root", root, "--stream.validation", "0.5"]
    assert main(["record", *given, "--out", "my.clstream"]) == 0
    assert main(["run", "--stream", "recorded:my.clstream", "--data_root", root, "--tune", *small]) == 0
    assert "Finetune on split_mnist (validation)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--stream", "blobs"], 2, "required: --out"),
        (["--out", "x"], 2, "clstream record needs the stream: --stream NAME"),
        (["--stream", "blobs", "--out", "x", "--strategy", "Replay"], 2, "clstream record has no option --strategy: it takes"),
        (["--stream", "blobs", "--out", "x", "--seed=1"], 2, "clstream record has no option --seed"),
        (["--stream", "blob", "--out", "x"], 2, "did you mean blobs?"),
        (["--stream", "blobs", "--stream.tusks", "2", "--out", "x"], 2, "did you mean tasks?"),
        (["--stream", "blobs", "--stream.tasks", "20", "--out", "x"], 2, "10 classes make 1 to 10 tasks"),
        (["--stream", "blobs", "--tune", "--out", "x"], 1, "holds back no validation samples"),
        (["--stream", "blobs", "--out", "missing/x"], 1, "missing/x can't be written"),
        (["--stream", "blobs", "--out", "there"], 1, "there holds something else: choose another file, or overwrite it"),
        (["--stream", "recorded:missing", "--out", "x"], 1, "there is no recording missing"),
        (["--stream", "recorded:there", "--out", "x"], 1, "there is no recording of clstream"),
        (["--stream", "recorded", "--out", "x"], 2, "--stream.file"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("my notes")
    try:
        found = main(["record", *arguments])
    except SystemExit as stop:
        found = stop.code
    assert found == status
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_force_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("my notes")
    assert main(["record", "--stream", "blobs", "--out", "there", "--force"]) == 0
    assert isinstance(recorded("there"), RecordedStream)
