"""The checkpointer: an observer that writes a run's state to disk, so that a killed run resumes from there, bit for bit.

    run(strategy, stream, Checkpointer("runs/mine"), resume=newest("runs/mine"))

starts a run, or resumes it if it has a checkpoint. A checkpoint is one file, `000042-0123456789abcdef.pt`: its number, and a hash
of its content, so that a torn or altered one is detected, and the one before is used. It is read by
`clstream.serialization.torch_files`, which runs no code. It is written atomically; earlier ones are kept until it is whole. Not in
it: what is rebuilt from the config (the stream, the classes) and what never changes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import clstream
from clstream.bus import on
from clstream.checkpoint.saved_state import OtherRunError
from clstream.checkpoint.store import FORMAT, TORN, files, load, number_of, save
from clstream.events import BatchLearned, Evaluated, NothingArrived, RunControl, RunEnded, RunStarted
from clstream.files import FolderError, check_plain_files, locked
from clstream.params import check_bool, check_integer, check_number, check_positive
from clstream.serialization.source_code import write_sources


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal, after a checkpoint if one could be written."""

    def __init__(self, number: int, folder: Path, message: str) -> None:
        super().__init__(message)
        self.signal, self.folder = number, folder
        self.trust: list[str] = []  # the packages that a resumption has to name, as `clstream resume --trust` does


class Checkpointer:
    """Writes checkpoints of the run that it observes: at its start and end, by batches and by time, and when a signal stops it.

    The first SIGINT or SIGTERM has the batch under way finished and a checkpoint written, and ends the run with `Stopped`; the
    second one ends it at once. A checkpoint that can't be written is warned of, and the run goes on, unless it is the first.

    Args:
        folder: where; no other run's. One process at a time can use it.
        every_batches: write after every so many batches of the run.
        every_seconds: write when so many seconds have passed; None for never.
        share: the most of the run's time that those by the clock may take: where writing is slow, they come less often.
        keep: how many checkpoints stay, at least 1. With 2, the one before is there should the newest be damaged.
        signals: whether to act on SIGINT and SIGTERM; only a process's main thread can.

    Raises:
        ValueError: for numbers below 1.
        FolderError: when the run starts, if the folder can't be written, is in use, has links in it, or the checkpoints of another
            run.

    """

    def __init__(
        self,
        folder: str | Path,
        every_batches: int | None = None,
        every_seconds: float | None = 30.0,
        keep: int = 2,
        share: float = 0.02,
        signals: bool = True,
    ) -> None:
        check_integer(1, none=True, every_batches=every_batches)
        check_integer(1, keep=keep)
        check_positive(none=True, every_seconds=every_seconds)
        check_positive(share=share)
        check_number(0, 1, share=share)
        check_bool(signals=signals)
        self.folder, self.keep, self.share, self.signals = Path(folder), keep, share, signals
        self.every_batches = every_batches or sys.maxsize
        self.every_seconds = float("inf") if every_seconds is None else every_seconds
        self.run: RunControl | None = None
        self.lock = ExitStack()
        self.handlers: dict[int, Any] = {}
        self.seconds, self.written = 0.0, 0
        """What checkpoints took so far, with two that were tried unwritten, and how many there were."""

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Lock the folder, and request the first checkpoint."""
        assert event.run is not None
        check_plain_files(self.folder)
        self.lock.enter_context(locked(self.folder))
        checkpoints = files(self.folder)
        try:
            self._check_folder(event, checkpoints)
        except BaseException:
            self.lock.close()
            raise
        self.run, self.number, self.stopped = event.run, number_of(checkpoints[0]) if checkpoints else 0, 0
        self.batches, self.failed, self.tried = 0, False, [False, False]
        self.with_code, self.requested = False, False
        self._schedule(0.0)
        if self.signals and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # what is ignored, as in a shell's background, stays so
                    self.handlers[number] = signal.signal(number, self._on_signal)
        if not (event.resumed and checkpoints):
            event.run.defer(self._first)

    def _check_folder(self, event: RunStarted, checkpoints: list[Path]) -> None:
        """Refuse a folder of another run; remove files that were only half written."""
        assert event.run is not None
        if checkpoints and not event.resumed:
            raise FolderError(
                f"{self.folder} has the checkpoints of a run: go on with it by resume=newest({str(self.folder)!r}), or name "
                "another folder"
            )
        for file in list(checkpoints):
            state = load(file)
            if state is None:  # it must not count among those that are kept
                file.rename(file.with_suffix(".damaged"))
                checkpoints.remove(file)
                continue
            try:
                event.run.check_same(state)
            except OtherRunError as error:
                raise FolderError(f"{self.folder} has the checkpoints of another run: {error}") from None
            break
        for torn in self.folder.iterdir():
            if TORN.fullmatch(torn.name):
                torn.unlink()

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        """Request a checkpoint if one is due."""
        assert self.run is not None
        self.batches += 1
        if not self.tried[0]:
            self._defer_trial(0)
        if self.batches >= self.every_batches or time.monotonic() >= self.due:
            self._request()

    @on(Evaluated)
    def look(self, event: Evaluated) -> None:
        """Request a checkpoint if one is due, and the last one after the last session."""
        assert self.run is not None
        if not self.tried[1]:
            self._defer_trial(1)
        over = event.evaluation.sessions_finished == self.run.sessions and not event.evaluation.within_session
        if over or time.monotonic() >= self.due:
            self._request()

    @on(NothingArrived)
    def rest(self, event: NothingArrived) -> None:
        """Request a checkpoint before a run waits for what is to arrive, and when nothing more will."""
        if self.batches or event.ended:
            self._request()

    @on(RunEnded)
    def end(self, event: RunEnded) -> None:
        """Restore the signal handlers and unlock the folder; of a complete run, keep the last checkpoint only."""
        self._restore_signals()
        if self.run is None:
            return
        if event.error is None and not self.failed:
            for old in files(self.folder)[1:]:
                old.unlink(missing_ok=True)
        self.run = None
        self.lock.close()
        if self.stopped and event.error is None:  # the signal came when nothing was left to do: whoever sent it means all
            raise Stopped(self.stopped, self.folder, f"stopped by {signal.Signals(self.stopped).name}, when the run was over")

    def write(self) -> bool:
        """Write a checkpoint now, between events; return whether it could be written, and warn if not."""
        self.requested = False
        try:
            self._write()
        except OSError as error:
            if not self.failed:
                warnings.warn(
                    f"no checkpoint could be written to {self.folder} ({error.strerror or error}): the run goes on, and tries "
                    "again",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.failed = True
            return False
        self.failed = False
        return True

    def _first(self) -> None:
        """Write the first checkpoint: what can't be written, or captured, shows before anything is learned."""
        try:
            self._write()
        except OSError as error:
            raise FolderError(
                f"checkpoints can't be written to {self.folder} ({error.strerror or error}): make room, or name another folder"
            ) from None

    def _defer_trial(self, number: int) -> None:
        """Defer a capture that isn't written: what the first batch or session added, and can't be captured, is refused early."""
        assert self.run is not None
        self.tried[number] = True
        self.run.defer(self._capture_unwritten)

    def _capture_unwritten(self) -> None:
        assert self.run is not None
        begin = time.monotonic()
        self.run.state()
        self.seconds += time.monotonic() - begin

    def _request(self) -> None:
        assert self.run is not None
        if not self.requested:
            self.requested = True
            self.run.defer(self.write)

    def _write(self) -> None:
        assert self.run is not None
        begin = time.monotonic()
        state = {
            "format": FORMAT,
            "clstream": clstream.__version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            **self.run.state(),
        }
        try:
            save(state, self.folder, self.number + 1)
        finally:
            self._schedule(time.monotonic() - begin)
        self.number += 1
        self.written += 1
        if not self.with_code:
            self.with_code = True
            write_sources(self.run.source_files, self.folder)
        for old in files(self.folder)[self.keep :]:
            old.unlink(missing_ok=True)

    def _schedule(self, cost: float) -> None:
        """Schedule the next checkpoint by the clock, given the seconds that the last one took."""
        self.seconds += cost
        self.batches = 0
        self.due = time.monotonic() + max(self.every_seconds, cost / self.share)

    def stop(self, number: int) -> None:
        """Have the run write a checkpoint and stop at the next pause, as a signal of this number does."""
        self.stopped = number
        if self.run is not None:
            self.requested = True
            self.run.defer(self._stop)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop at the next pause; until then, the earlier signal handlers are back."""
        self._restore_signals()
        self.stop(number)
        with suppress(OSError, ValueError, AttributeError):  # there may be no one to tell; and print is not safe in here
            os.write(sys.__stderr__.fileno(), b"\nstopping after this batch; once more ends at once\n")  # type: ignore[union-attr]

    def _restore_signals(self) -> None:
        for number, before in self.handlers.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: it was not Python's
        self.handlers = {}

    def _stop(self) -> None:
        whole = self.write()
        name = signal.Signals(self.stopped).name
        kept = "its checkpoint is" if whole else "its newest checkpoint, of some batches before, is"
        raise Stopped(self.stopped, self.folder, f"stopped by {name}; {kept} in {self.folder}")
