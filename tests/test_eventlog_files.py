"""The event log on disk: cut off at a checkpoint, torn, damaged, on a full disk."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune
from clstream.streams import blobs
from logged_runs import Plain, play
from torch import Tensor

from clstream import BatchLearned, Event, RunStarted, SessionEnded, on, run
from clstream.bus import Bus
from clstream.models import Mlp
from clstream.tracking import EventLog
from clstream.tracking.event_log import CHUNK, FILE, read


def content(log: Iterator[dict]) -> list[dict]:
    """Return what a log says, without times, and without the lines that say that the run was resumed."""
    return [{**entry, "time": 0, "seconds": 0} for entry in log if entry["event"] != "Resumed"]


class Saves:
    """Keeps the state after the n-th event, as a checkpoint does, and dies a few events later."""

    def __init__(self, log: EventLog, after: int, file: Path, dies: int = 0) -> None:
        self.log, self.after, self.file, self.dies, self.heard = log, after, file, dies, 0

    @on(Event)
    def count(self, event: Event) -> None:
        self.heard += 1
        if self.heard == self.after:
            torch.save(self.log.state_dict(), self.file)
        if self.heard == self.dies:
            raise Died


class Died(Exception):
    """A process is killed."""


class Killed(EventLog):
    """What a killed process leaves behind: it never hears the end."""

    def log(self, event: Event) -> None:
        if type(event).__name__ != "RunEnded":
            super().log(event)


class Resumes:
    """Plays to a log what it would hear in a run that goes on after the n-th event of an earlier one."""

    def __init__(self, log: EventLog, after: int, file: Path) -> None:
        self.log, self.after, self.file, self.heard = log, after, file, 0
        self.bus = Bus(log)

    @on(Event)
    def hear(self, event: Event) -> None:
        self.heard += 1
        if isinstance(event, RunStarted):
            self.bus.emit(Plain())  # the strategy emits it again
            self.bus.emit(RunStarted(event.stream, event.strategy, event.seed, True))
            self.bus.emit(Plain())
            self.log.load_state_dict(torch.load(self.file, weights_only=True))
        if self.heard > self.after:
            self.bus.emit(event)


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(("after", "dies"), [(2, 9), (9, 30), (38, 39), (39, 100), (77, 90)])
def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path, batches: bool, after: int, dies: int) -> None:
    play(EventLog(tmp_path / "whole", batches))
    log = Killed(tmp_path / "run", batches)
    with pytest.raises(Died):
        play(log, Saves(log, after, tmp_path / "state", dies))
    with (tmp_path / "run" / FILE).open("ab") as file:
        file.write(b'{"event": "Sess')  # it was killed as it wrote
    before = list(read(tmp_path / "run"))
    result = play(Resumes(EventLog(tmp_path / "run", batches), after, tmp_path / "state"))
    log = list(read(tmp_path / "run"))
    assert content(log) == content(read(tmp_path / "whole"))
    (resumed,) = [entry for entry in log if entry["event"] == "Resumed"]
    assert resumed["again"] == len(before) - log.index(resumed)
    assert b'"Sess{' not in (tmp_path / "run" / FILE).read_bytes()
    assert log[-1]["seconds"] < before[-1]["seconds"] + result.seconds


def test_a_resumed_run_that_was_not_logged_before_is_logged_from_there(tmp_path: Path) -> None:
    log = EventLog(tmp_path)

    class Late:
        bus = Bus(log)

        @on(Event)
        def hear(self, event: Event) -> None:
            if isinstance(event, RunStarted):
                event = RunStarted(event.stream, event.strategy, event.seed, True)
            self.bus.emit(event)

    play(Late())
    names = [entry["event"] for entry in read(tmp_path)]
    assert names[:3] == ["Resumed", "TaskStarted", "SessionStarted"] and names[-1] == "RunEnded"


def test_torn_and_damaged_lines_are_skipped(tmp_path: Path) -> None:
    play(EventLog(tmp_path))
    whole = list(read(tmp_path))
    text = (tmp_path / FILE).read_bytes()
    for size in (len(text) - 1, len(text) - 20, text.rstrip().rfind(b"\n") + 1):
        (tmp_path / FILE).write_bytes(text[:size])
        assert list(read(tmp_path / FILE)) == whole[:-1]
    (tmp_path / FILE).write_bytes(b"\x00\xff\n[1]\n{}\n" + text)
    with pytest.warns(RuntimeWarning, match="3 lines are damaged: 1, 2, 3, and left out"):
        assert list(read(tmp_path / FILE)) == whole
    damaged: list[int] = []
    assert (list(read(tmp_path / FILE, damaged)), damaged) == (whole, [1, 2, 3])


@contextmanager
def full_disk(file: Path, more: int) -> Iterator[None]:
    """Let no file of this process grow beyond `more` bytes than this one has, as on a disk with so much room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Fills:
    """The disk is full from the start of the second session to its end."""

    def __init__(self, file: Path) -> None:
        self.file, self.ended, self.disk, self.size = file, 0, None, 0

    @on(SessionEnded)
    def fill(self, event: SessionEnded) -> None:
        if event.session.index == 0:
            self.size = self.file.stat().st_size + 100
            self.disk = full_disk(self.file, 100)
            self.disk.__enter__()
        elif event.session.index == 1:
            assert self.file.stat().st_size <= self.size
            self.disk.__exit__(None, None, None)


def test_a_full_disk_loses_nothing_if_it_has_room_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match=r"events.jsonl can't be written \(File too large\): the run goes on") as said:
        play(log, Fills(tmp_path / "run" / FILE))
    assert len(said) == 1
    play(EventLog(tmp_path / "whole"))
    assert content(read(tmp_path / "run")) == content(read(tmp_path / "whole"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_stays_full_does_not_end_the_run(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.file = Path("/dev/full")
    log.resuming = True  # so that the file is not set aside
    with pytest.warns(RuntimeWarning, match="No space left on device") as said:
        result = play(Skips(log))
    assert len(said) == 1 and len(result.accuracy) == 3


class Skips:
    """Passes on all but the start."""

    def __init__(self, log: EventLog) -> None:
        self.bus = Bus(log)

    @on(Event)
    def hear(self, event: Event) -> None:
        if not isinstance(event, RunStarted):
            self.bus.emit(event)


def test_losses_are_written_some_at_a_time(tmp_path: Path) -> None:
    """A batch costs no look at the device and no write; what is held comes before the next line of another kind."""
    stream = blobs(tasks=1, classes=2, train_per_class=1000, batch_size=4)

    class Looks:
        most = 0

        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            self.most = max(self.most, len(log.losses))
            assert all(isinstance(loss, Tensor) for loss in log.losses)

    log, looks = EventLog(tmp_path, batches=True), Looks()
    run(Finetune(Mlp(stream.input_shape, stream.classes, hidden=(4,))), stream, log, looks)
    learned = [entry for entry in read(tmp_path) if entry["event"] == "BatchLearned"]
    assert [entry["batch"] for entry in learned] == list(range(500)) and looks.most == CHUNK - 1
