"""Kill test: proof that a run which is killed resumes exactly, once run through and once killed and resumed again and again.

Each part is a process of its own, `clstream run --resume auto`, that is killed by SIGKILL: at random moments, while it writes a
checkpoint, and between the end of a session and the evaluation that follows. At the end all weights, memories, generators and
metrics are compared bit for bit, the event logs line by line, and what MLflow has point by point.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clstream.checkpoint import newest
from clstream.checkpoint.compare import difference
from clstream.checkpoint.store import files
from clstream.cli.errors import Failure
from clstream.cli.seed_runs import FINISHED
from clstream.serialization.compare import hashes
from clstream.tracking.event_log import FILE as EVENTS
from clstream.tracking.event_log import read

CLOCK = ("time", "seconds", "samples_per_second", "error")
"""Fields of log lines and names of metrics that are readings of a clock."""

CLOCK_ENDS = ("_seconds", "peak_bytes")
"""What names of metrics end in that are such readings too, or depend on the process."""

OWN_OPTIONS = ("tracking_uri", "runs", "resume", "checkpoint_every", "checkpoint_share")
"""Options that the kill test sets itself."""

WAYS = ("at random", "in a write", "at random", "at a session's end", "at random")

POLL = 0.0002
"""Seconds between two looks at what a process does, where the moment matters."""

WAIT = 0.01
"""Seconds between two looks where it doesn't: a look costs time that the process could use."""


class Kill(NamedTuple):
    """One kill: how it was meant, what was under way, and how many seconds of the run were kept."""

    way: str
    event: str
    torn: bool
    kept: float


class Proof(NamedTuple):
    """What the kill test measured.

    Args:
        kills: each kill.
        seconds: of the run, once through.
        parts, metrics, lines: how many attributes, tensors and generators, points in MLflow and log lines were compared.
        difference: the first thing that differs; None if no bit does.

    """

    kills: list[Kill]
    seconds: float
    parts: int
    metrics: int
    lines: int
    difference: str | None


def kill_test(arguments: list[str], kills: int, folder: Path, seed: int, report: Callable[[str], None]) -> Proof:
    """Run what the options of `clstream run` say, once through and once with kills, and compare.

    Args:
        arguments: the options; one seed only.
        kills: how often the second run is killed.
        folder: an empty one for both runs.
        seed: of the moments of the kills.
        report: is given a line on each step.

    Raises:
        Failure: if a run fails by itself.

    """
    whole, killed = _ChildRun(arguments, folder / "whole"), _ChildRun(arguments, folder / "killed")
    try:
        return _compare_runs(whole, killed, kills, seed, report)
    finally:
        for child in (whole, killed):
            child.terminate()


def _compare_runs(whole: _ChildRun, killed: _ChildRun, kills: int, seed: int, report: Callable[[str], None]) -> Proof:
    report("once through")
    whole.start(30.0)
    whole.wait()
    seconds = whole.seconds()
    report(f"{seconds:.1f} s")
    draw, done = random.Random(seed), list[Kill]()
    every = max(0.02, seconds / (4 * (kills + 1)))
    for number in range(kills):
        way = WAYS[number % len(WAYS)]
        killed.start(every)
        left = seconds - killed.seconds()
        kill = killed.kill(way, draw.uniform(0, 2 * left / (kills - number + 1)))
        if kill is None:
            report("it ended before it was killed")
            break
        done.append(kill)
        under_way = "a checkpoint half written" if kill.torn else f"after {kill.event}"
        report(f"kill {number + 1:3}  {way:18}  {under_way:28}  {kill.kept:6.1f} s kept")
    if not killed.is_finished():
        killed.start(every)
        killed.wait()
    expected, state = whole.state(), killed.state()
    logs = whole.log(), killed.log()
    tracked = whole.tracked(), killed.tracked()
    first_difference = difference(expected, state) or _first("the event log", *logs) or _first("MLflow", *tracked)
    return Proof(done, seconds, len(hashes(expected["strategy"])), len(tracked[0]), len(logs[0]), first_difference)


class _ChildRun:
    """One run in a folder of its own, as a process that is started, killed and started again."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.started: subprocess.Popen[bytes] | None = None
        self.store = folder / "mlflow.db"
        self.runs, self.output = folder / "runs", folder / "output.txt"
        self.command = [
            sys.executable, "-m", "clstream.cli", "run", *arguments, "--tracking_uri", f"sqlite:///{self.store}",
            "--runs", str(self.runs), "--resume", "auto",
        ]  # fmt: skip

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self.started is not None
        return self.started

    def start(self, every: float) -> None:
        """Start the process, and wait until it has logged something new, or has ended."""
        before = self.log_size()
        with self.output.open("a") as output:
            self.started = subprocess.Popen(
                [*self.command, "--checkpoint_every", f"{every:.3f}", "--checkpoint_share", "0.5"],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while self.process.poll() is None and self.log_size() == before:
            time.sleep(WAIT)

    def kill(self, way: str, after: float) -> Kill | None:
        """Kill the process after some seconds, where `way` says; return None if it ended by itself before."""
        end = time.monotonic() + after
        while self.process.poll() is None:
            if (left := end - time.monotonic()) > 0:
                time.sleep(min(left, WAIT))
                continue
            if way == "at random" or self.under_way(way):
                os.kill(self.process.pid, signal.SIGSTOP)  # so that what is seen now is what it is killed in
                if way == "at random" or self.under_way(way):
                    torn = any(self.seed_folder().glob("*.writing"))
                    event = self.last_event()
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait()
                    return Kill(way, event, torn, self.seconds())
                os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(POLL)
        self.wait()
        return None

    def under_way(self, way: str) -> bool:
        """Return whether the process does now what a way to be killed asks for."""
        if way == "in a write":
            return any(self.seed_folder().glob("*.writing"))
        return self.last_event() in ("SessionEnded", "TaskEnded")

    def terminate(self) -> None:
        """Kill the process, if it still runs: also when this process is interrupted."""
        if self.started is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self) -> None:
        """Wait until the process ends. Raises Failure if it failed."""
        if self.process.wait():
            lines = self.output.read_text().splitlines()
            raise Failure(
                f"the run itself failed: {lines[-1] if lines else 'it printed nothing'} (all that it printed is in {self.output})"
            )

    def seed_folder(self) -> Path:
        """Return the folder of the seed; before it is made, one that doesn't exist."""
        return next(self.runs.glob("*/seed_*"), self.runs / "none")

    def log_size(self) -> tuple[int, int]:
        """Return the size and time of the event log: they change whenever the process logs something."""
        try:
            status = (self.seed_folder() / EVENTS).stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    def last_event(self) -> str:
        """Return the kind of the last event in the log."""
        try:
            with (self.seed_folder() / EVENTS).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                lines = file.read().split(b"\n")
            return str(json.loads(lines[-2])["event"])
        except (OSError, IndexError, ValueError):
            return "nothing"

    def is_finished(self) -> bool:
        """Return whether the run is finished."""
        return (self.seed_folder() / FINISHED).exists()

    def seconds(self) -> float:
        """Return how many seconds of the run its newest checkpoint has."""
        state = self.state() if files(self.seed_folder()) else None
        return float(state["seconds"]) if state else 0.0

    def state(self) -> Any:
        """Return the last checkpoint."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* was made with threads")  # it is only compared in this process
            return newest(self.seed_folder())

    def log(self) -> list[str]:
        """Return the event log without clock readings and resumptions."""
        kept = [entry for entry in read(self.seed_folder() / EVENTS) if entry["event"] != "Resumed"]
        return [json.dumps({name: value for name, value in entry.items() if name not in CLOCK}) for entry in kept]

    def tracked(self) -> list[str]:
        """Return the points that MLflow has, each curve in the order of its steps, without clock readings."""
        if not self.store.exists():
            return []
        from clstream.tracking.mlflow_store import read_curves

        return list(_points(read_curves(f"sqlite:///{self.store}")))


def _points(curves: dict[str, list[tuple[int, float]]]) -> Iterator[str]:
    for name, curve in sorted(curves.items()):
        if name not in CLOCK and not name.endswith(CLOCK_ENDS):
            yield from (f"{name} {step} {value!r}" for step, value in sorted(curve))


def _first(what: str, expected: list[str], actual: list[str]) -> str | None:
    """Return the first of two lists' lines that differ."""
    if expected == actual:
        return None
    number = next(
        (n for n, (left, right) in enumerate(zip(expected, actual, strict=False)) if left != right), min(len(expected), len(actual))
    )
    left, right = (lines[number] if number < len(lines) else "nothing" for lines in (expected, actual))
    return f"{what}, line {number + 1}: {left[:200]} and {right[:200]}"
