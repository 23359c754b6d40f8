"""What the engine costs apart from methods: `python experiments/bench_engine.py`.

Prints, with the budget beside each: the cost of an event, unheard and with eight listeners; what checkpoints cost in a replay run
at batch 10 + 10; what tracking a run of 200 tasks costs; and the time that `import clstream` adds to `import torch`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import from_tensors
from torch.optim import SGD

from clstream import BatchReady, Result, Stream, on, run
from clstream.bus import Bus
from clstream.checkpoint import Checkpointer
from clstream.checkpoint.store import files
from clstream.models import Mlp


def images(samples: int, tasks: int, classes: int, batch: int) -> Stream:
    """Return a stream of random images of MNIST's size, a hundredth as many of them to test on as to train."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (samples, 1, 28, 28), dtype=torch.uint8, generator=draw)
    y = torch.arange(samples) % classes
    tested = max(samples // 100, classes)
    return from_tensors(x, y, x[:tested], y[:tested], tasks=tasks, batch_size=batch)


class Listener:
    """Hears one event and does nothing."""

    @on(BatchReady)
    def hear(self, event: BatchReady) -> None:
        """Do nothing."""


def events(stream: Stream) -> None:
    """Print what building and dispatching one event costs, unheard and with eight listeners."""
    batch = next(iter(next(iter(stream.session(0)))))
    for listeners, budget in ((0, 0.5), (8, 1.0)):
        emit = Bus(*(Listener() for _ in range(listeners))).emit
        costs = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(100_000):
                emit(BatchReady(batch))
            costs.append((time.perf_counter() - begin) * 10)
        median, least = statistics.median(costs), min(costs)
        print(f"event, {listeners} listeners          {median:6.2f} us, least {least:.2f} us (budget {budget:.1f} us)", flush=True)


def replay(stream: Stream, *observers: object) -> Result:
    """Play replay to a stream."""
    model = Mlp(stream.input_shape, stream.classes, (100, 100))
    return run(Replay(model, partial(SGD, lr=0.03), capacity=500), stream, *observers)


def checkpoints(stream: Stream, repeats: int) -> None:
    """Print what checkpoints cost: of the time at one in 30 s, and what a run with them takes against one without."""
    ratios, costs = [], []
    for _ in range(repeats):
        alone = replay(stream).seconds
        with tempfile.TemporaryDirectory() as folder:
            checkpointer = Checkpointer(folder, every_seconds=30)
            seconds = replay(stream, checkpointer).seconds
            size = sum(file.stat().st_size for file in files(Path(folder)))
        costs.append(checkpointer.seconds / checkpointer.written)
        ratios.append((seconds - checkpointer.seconds) / alone)
    cost = statistics.median(costs)
    print(
        f"checkpoint, replay 10 + 10     {1000 * cost:6.1f} ms for {size / 1e6:.1f} MB: {cost / 30:.2%} of the time at one in 30 s "
        f"(budget 2%); between them a run takes {statistics.median(ratios):.3f} times as long",
        flush=True,
    )


def tracking(tasks: int, repeats: int) -> None:
    """Print what MLflow costs a run of many tasks, in a store on this disk, with the pictures at its end."""
    from clstream.tracking import MlflowTracker

    stream, costs = images(100 * tasks, tasks, tasks, batch=10), []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):  # the first makes the store
            seconds = []
            for observers in ((), (MlflowTracker("bench", f"sqlite:///{folder}/mlflow.db"),)):
                model = Mlp(stream.input_shape, stream.classes, (100, 100))
                begin = time.perf_counter()
                run(Finetune(model, partial(SGD, lr=0.03)), stream, *observers)
                seconds.append(time.perf_counter() - begin)
            if turn:
                costs.append((seconds[1] - seconds[0]) / tasks)
    cost, alone = statistics.median(costs), seconds[0] / tasks
    print(
        f"tracking, {tasks} tasks            {1000 * cost:6.1f} ms a session of {1000 * alone:.1f} ms: a tenth, which is the "
        f"budget, of sessions of {10 * cost:.2f} s",
        flush=True,
    )


def imports() -> None:
    """Print the time that `import clstream` adds to `import torch`."""
    code = "import time, torch; begin = time.perf_counter(); import clstream; print(time.perf_counter() - begin)"
    costs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    ]
    print(f"import clstream after torch  {statistics.median(costs):6.3f} s (budget 0.300 s)", flush=True)


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=200, help="of the run that is tracked")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.threads} threads, median of {options.repeats}")
    stream = images(10_000, 5, 10, batch=10)
    events(stream)
    checkpoints(stream, options.repeats)
    tracking(options.tasks, 2)
    imports()


if __name__ == "__main__":
    main()
