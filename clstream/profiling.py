"""Profiles: where the time of a run goes, by part and by operation of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from clstream.bus import on
from clstream.events import BatchLearned, BatchReady, RunEnded, RunStarted
from clstream.figures import COLOURS
from clstream.files import write_atomically
from clstream.params import check_integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12
"""Operations that the table and the picture have."""


@dataclass(frozen=True)
class Operation:
    """What an operation of torch took in the steps that were recorded.

    Args:
        name: as torch calls it, "aten::addmm".
        calls: how often it was called.
        seconds: in itself, without the operations that it calls: on a GPU the kernels', else the CPU's.

    """

    name: str
    calls: int
    seconds: float


class Profile:
    """Times the parts of a run, and records the operations of some of its steps: give it to `run` as the first observer.

    Parts are the strategy's steps (from `BatchReady` to `BatchLearned`, its handlers of the latter included), what it consolidates,
    evaluations, observers, and the engine: all the rest, such as gathering batches and emitting events. On a GPU each step is
    waited for, so that what it takes is its own; without a profile nothing waits.

    Args:
        skip: steps before those whose operations are recorded.
        steps: how many are recorded. They are left out of the seconds of the parts.

    Raises:
        ValueError: for numbers that can't be.

    """

    def __init__(self, skip: int = 10, steps: int = 20) -> None:
        check_integer(0, skip=skip)
        check_integer(1, steps=steps)
        self.skip, self.steps = skip, steps
        self.title, self.batches, self.recorded = "", 0, 0
        self.seconds: dict[str, float] = {}
        self.operations: list[Operation] = []
        self.recorder: profile | None = None
        self.recording = ExitStack()
        self.own = self.left_out = self.in_steps = 0.0  # seconds: of this observer; of the steps recorded; of the others
        self.began = self.window = 0.0

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Note what is run."""
        self.run, self.device = event.run, event.stream.device or torch.device("cpu")
        self.name = type(event.strategy).__name__
        self.title = f"{self.name} on {event.stream.name}"

    @on(BatchReady)
    def begin(self, event: BatchReady) -> None:
        """Begin to time a step; at the first one that is recorded, begin to record."""
        entered = perf_counter()
        if self.batches == self.skip and self.recorder is None:
            cuda = self.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            self.recorder = self.recording.enter_context(profile(activities=activities))
            self.window = perf_counter()
        if self.is_recording:
            self.step = self.recording.enter_context(record_function(f"{self.name}.learn"))
        self._wait()
        self.began = perf_counter()
        self.own += self.began - entered

    @on(BatchLearned)
    def end(self, event: BatchLearned) -> None:
        """Add what the step took; after the last one that is recorded, stop recording."""
        self._wait()
        now = perf_counter()
        self.batches += 1
        if not self.is_recording:
            self.in_steps += now - self.began
            return
        self.recorded += 1
        if self.recorded == self.steps:
            self._stop()
        self.own += perf_counter() - now

    @on(RunEnded)
    def finish(self, event: RunEnded) -> None:
        """Read the seconds of the parts."""
        if self.is_recording:
            self._stop()
        if self.run is None:
            return
        totals = self.run.cost.total
        observers = max(0.0, totals["tracking_seconds"] - self.own)
        compiling = totals.get("compiling_seconds", 0.0)  # within steps, and not among the seconds of learning
        steps = max(0.0, self.in_steps - compiling)
        engine = max(0.0, totals["learning_seconds"] - steps - self.left_out)
        self.seconds = {
            f"steps of {self.name}": steps,
            **({"compiling": compiling} if compiling else {}),
            f"{self.name} at the end of sessions": totals["consolidating_seconds"],
            "evaluation": totals["evaluating_seconds"],
            "tracking": observers,
            "engine": engine,
        }

    @property
    def is_recording(self) -> bool:
        """Whether operations are recorded now."""
        return self.recorder is not None and not self.left_out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop(self) -> None:
        """Stop recording, and read what operations took."""
        self.left_out = perf_counter() - self.window
        self.recording.close()
        assert self.recorder is not None
        taken = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        prefix = "autograd::engine::evaluate_function: "
        self.operations = sorted(
            (
                Operation(row.key.removeprefix(prefix), row.count, getattr(row, taken) / 1e6)
                for row in self.recorder.key_averages()
                if not row.key.startswith((f"{self.name}.learn", "ProfilerStep"))
            ),
            key=lambda operation: -operation.seconds,
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines of two tables: the parts, and the slowest operations."""
        whole = sum(self.seconds.values())
        width = max((len(name) for name in self.seconds), default=0)
        yield f"{self.title}: {whole:.2f} s, {self.batches:,} batches"
        for name, seconds in self.seconds.items():
            yield f"  {name:{width}} {seconds:9.3f} s {100 * seconds / whole if whole else 0:5.1f} %"
        if not self.operations:
            yield f"no operations were recorded: there were no more than {self.skip} batches"
            return
        all_operations = sum(operation.seconds for operation in self.operations)
        yield f"operations of {self.recorded} steps, {1e3 * all_operations / self.recorded:.3f} ms each"
        for row in self.operations[:SHOWN]:
            calls, micros = row.calls / self.recorded, 1e6 * row.seconds / self.recorded
            share = 100 * row.seconds / all_operations if all_operations else 0
            yield f"  {row.name[:44]:44} {calls:7.1f} a step {micros:9.1f} us {share:5.1f} %"

    def __str__(self) -> str:
        """Return the tables."""
        return "\n".join(self.lines())

    def draw(self) -> Figure:
        """Return a picture: the parts, and the slowest operations."""
        from matplotlib.figure import Figure

        rows = self.operations[:SHOWN]
        figure = Figure(figsize=(8, 2.6 + 0.24 * len(rows)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[1, 1 + 0.35 * len(rows)])
        left = 0.0
        for number, (name, seconds) in enumerate(self.seconds.items()):
            above.barh(0, seconds, left=left, color=COLOURS[number], label=name)
            left += seconds
        above.set(yticks=[], xlabel="seconds", title=self.title)
        above.legend(ncols=3, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.5), frameon=False)
        micros = [1e6 * row.seconds / max(1, self.recorded) for row in reversed(rows)]
        below.barh(range(len(rows)), micros, color=COLOURS[0])
        below.set_yticks(range(len(rows)), [row.name[:44] for row in reversed(rows)], fontsize="small")
        below.set_xlabel("microseconds of a step")
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write profile.json, profile.png and trace.json, in place of earlier ones; return the folder.

        The last one is for chrome://tracing or Perfetto. Raises OSError if they can't be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"title": self.title, "batches": self.batches, "seconds": self.seconds}
        about |= {"recorded_steps": self.recorded, "operations": [asdict(operation) for operation in self.operations]}
        write_atomically(folder / "profile.json", lambda out: out.write((json.dumps(about, indent=1) + "\n").encode()))
        write_atomically(folder / "profile.png", lambda out: self.draw().savefig(out, format="png", dpi=150))
        if self.recorder is not None:
            self.recorder.export_chrome_trace(str(folder / "trace.json"))
        return folder
