"""What the engine costs, against a hand-written loop: `python experiments/bench_engine.py [--data-root FOLDER]`.

Prints, with the budget beside each: the cost of an event; whole runs of fine-tuning and replay (Split Fashion-MNIST at batch
128, Split MNIST at batch 10, evaluation after every task included) as a ratio to the loop below, both in this process, in
turns, median of the repeats' ratios; what checkpoints cost in the replay of Split MNIST; the time that `import clstream` adds to
`import torch`; the peak memory of replay on Split MNIST; and, where avalanche-lib is installed, how much longer Avalanche takes
for the same replay.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import split_fashion_mnist, split_mnist
from clstream.streams.data import data_root
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import BatchReady, Stream, on, run
from clstream.bus import Bus
from clstream.checkpoint import Checkpointer
from clstream.checkpoint.store import files
from clstream.models import Mlp


class Work(NamedTuple):
    """The same work for the loop and for clstream."""

    name: str
    stream: Stream
    hidden: tuple[int, int]
    lr: float
    batch: int
    memory: int | None
    budget: float


class Flat(NamedTuple):
    """A data set as the loop wants it: normalised floats, flattened."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def flat(stream: Stream) -> Flat:
    """Return all samples of a stream."""
    x, x_test = (
        torch.cat([part.x for part in parts]).flatten(1) / 255
        for parts in ([t.train for t in stream.tasks], [t.test for t in stream.tasks])
    )
    y, y_test = (
        torch.cat([part.y for part in parts]) for parts in ([t.train for t in stream.tasks], [t.test for t in stream.tasks])
    )
    return Flat(x, y, x_test, y_test)


def loop(work: Work, data: Flat) -> float:
    """Fine-tune or replay by hand, as a careful user would; return the final average accuracy."""
    first, second = work.hidden
    net = nn.Sequential(nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10))
    optimizer = torch.optim.SGD(net.parameters(), work.lr)
    capacity = work.memory or 1
    kept_x, kept_y, seen = torch.empty(capacity, 784), torch.empty(capacity, dtype=torch.long), 0
    row: list[float] = []
    for task in range(5):
        own = (data.y // 2) == task
        x, y = data.x[own], data.y[own]
        for index in torch.randperm(len(x)).split(work.batch):
            new_x, new_y = x[index], y[index]
            a, b = new_x, new_y
            if work.memory and seen:
                draw = torch.randint(min(seen, capacity), (work.batch,))
                a, b = torch.cat([a, kept_x[draw]]), torch.cat([b, kept_y[draw]])
            optimizer.zero_grad()
            F.cross_entropy(net(a), b).backward()
            optimizer.step()
            if work.memory:
                order = torch.arange(seen, seen + len(new_x))
                slot = torch.where(order < capacity, order, (torch.rand(len(order)) * (order + 1)).long())
                chosen = slot < capacity
                kept_x[slot[chosen]], kept_y[slot[chosen]] = new_x[chosen], new_y[chosen]
                seen += len(new_x)
        with torch.inference_mode():
            tested = [(data.y_test // 2) == task for task in range(5)]
            row = [float((net(data.x_test[rows]).argmax(1) == data.y_test[rows]).float().mean()) for rows in tested]
    return sum(row) / 5


def ours(work: Work) -> float:
    """Do the same with clstream; return the final average accuracy."""
    model, optimizer = Mlp(work.stream.input_shape, 10, work.hidden), partial(torch.optim.SGD, lr=work.lr)
    strategy = Replay(model, optimizer, work.memory) if work.memory else Finetune(model, optimizer)
    return run(strategy, work.stream).average_accuracy


def compare(work: Work, repeats: int) -> None:
    """Run both in turns, and print the median ratio and the accuracies of the last turn."""
    data = flat(work.stream)
    seconds: dict[str, list[float]] = {"loop": [], "clstream": []}
    accuracy = {}
    sides: dict[str, Callable[[], float]] = {"loop": partial(loop, work, data), "clstream": partial(ours, work)}
    for _ in range(repeats):
        for name, go in sides.items():
            begin = time.perf_counter()
            accuracy[name] = go()
            seconds[name].append(time.perf_counter() - begin)
    by_hand, by_us = (statistics.median(seconds[name]) for name in ("loop", "clstream"))
    ratio = statistics.median(us / hand for hand, us in zip(seconds["loop"], seconds["clstream"], strict=True))
    print(
        f"{work.name:28} loop {by_hand:6.2f} s  clstream {by_us:6.2f} s  ratio {ratio:5.3f} (budget {work.budget:.2f})  "
        f"accuracy {accuracy['loop']:.3f} {accuracy['clstream']:.3f}",
        flush=True,
    )


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
        print(f"event, {listeners} listeners          {statistics.median(costs):6.2f} us (budget {budget:.1f} us)", flush=True)


def checkpoints(work: Work, repeats: int) -> None:
    """Print what checkpoints cost: of the time at one in 30 s, and what a run with them takes against one without."""
    ratios, costs = [], []
    for _ in range(repeats):
        seconds = []
        for observed in (False, True):
            model, optimizer = Mlp(work.stream.input_shape, 10, work.hidden), partial(torch.optim.SGD, lr=work.lr)
            with tempfile.TemporaryDirectory() as folder:
                checkpointer = Checkpointer(folder, every_seconds=30)
                result = run(Replay(model, optimizer, work.memory or 1), work.stream, *([checkpointer] if observed else []))
                size = sum(file.stat().st_size for file in files(Path(folder)))
            seconds.append(result.seconds)
        costs.append(checkpointer.seconds / checkpointer.written)
        ratios.append((seconds[1] - checkpointer.seconds) / seconds[0])
    cost = statistics.median(costs)
    print(
        f"checkpoint, replay 10 + 10     {1000 * cost:6.1f} ms for {size / 1e6:.1f} MB: {cost / 30:.2%} of the time at one in 30 s "
        f"(budget 2%); between them a run takes {statistics.median(ratios):.3f} times as long",
        flush=True,
    )


def imports() -> None:
    """Print the time that `import clstream` adds to `import torch`."""
    code = "import time, torch; begin = time.perf_counter(); import clstream; print(time.perf_counter() - begin)"
    costs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    ]
    print(f"import clstream after torch  {statistics.median(costs):6.3f} s (budget 0.300 s)", flush=True)


def memory() -> None:
    """Print the peak memory of a process that plays replay on Split MNIST."""
    code = (
        "import re, torch; torch.set_num_threads(1); torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "alone = peak()\n"
        "from clstream import run; from clstream.models import Mlp; from clstream.strategies import Replay\n"
        "from clstream.streams import split_mnist; stream = split_mnist(batch_size=128)\n"
        "run(Replay(Mlp(stream.input_shape, 10), capacity=2000), stream)\n"
        "print(alone, peak())"
    )  # the peak of the process itself, which rusage mixes with that of the process it was forked from
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, peak = map(float, done.stdout.split())
    print(
        f"peak memory, replay          {peak:6.0f} MiB (budget 700 MiB; torch and an optimizer alone {alone:.0f} MiB)", flush=True
    )


def avalanche(work: Work, repeats: int) -> None:
    """Print how much longer Avalanche takes for the same replay, where it is installed."""
    try:
        from avalanche.benchmarks import nc_benchmark
        from avalanche.benchmarks.classic import SplitFMNIST
        from avalanche.benchmarks.utils import as_classification_dataset
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import Replay as TheirReplay
    except ImportError:
        print("avalanche-lib is not installed here: pip install 'clstream[avalanche]' to compare with it")
        return
    data = flat(work.stream)
    train, test = (as_classification_dataset(_Targets(x, y)) for x, y in ((data.x, data.y), (data.x_test, data.y_test)))
    benchmarks = {
        "its own SplitFMNIST": SplitFMNIST(5, shuffle=False, dataset_root=data_root()),
        "tensors made ready for it": nc_benchmark(train, test, 5, task_labels=False, shuffle=False),
    }
    for name, benchmark in benchmarks.items():
        ratios = []
        for _ in range(repeats):
            first, second = work.hidden
            net = nn.Sequential(
                nn.Flatten(), nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
            )
            theirs = TheirReplay(
                model=net, optimizer=torch.optim.SGD(net.parameters(), work.lr), criterion=nn.CrossEntropyLoss(),
                mem_size=work.memory or 0, train_mb_size=work.batch, train_epochs=1, eval_mb_size=2048,
                evaluator=EvaluationPlugin(),
            )  # fmt: skip
            begin = time.perf_counter()
            for experience in benchmark.train_stream:
                theirs.train(experience)
                theirs.eval(benchmark.test_stream)
            middle = time.perf_counter()
            ours(work)
            ratios.append((middle - begin) / (time.perf_counter() - middle))
        print(
            f"{work.name}: Avalanche on {name} takes {statistics.median(ratios):.2f} times as long (budget: at least 4)", flush=True
        )


class _Targets(torch.utils.data.TensorDataset):
    """A TensorDataset with the `targets` that Avalanche asks for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.targets = y.tolist()


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder with MNIST and FashionMNIST, in torchvision's layout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.data_root:
        os.environ["CLSTREAM_DATA"] = options.data_root
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.threads} threads, median of {options.repeats}")
    large, small = split_fashion_mnist(batch_size=128), split_mnist(batch_size=10)
    events(small)
    replay = Work("replay, batch 128 + 128", large, (400, 400), 0.05, 128, 2000, 1.05)
    compare(Work("fine-tuning, batch 128", large, (400, 400), 0.05, 128, None, 1.05), options.repeats)
    compare(replay, options.repeats)
    compare(Work("fine-tuning, batch 10", small, (100, 100), 0.1, 10, None, 1.10), options.repeats)
    online = Work("replay, batch 10 + 10", small, (100, 100), 0.1, 10, 500, 1.10)
    compare(online, options.repeats)
    checkpoints(online, options.repeats)
    imports()
    memory()
    avalanche(replay, min(options.repeats, 3))


if __name__ == "__main__":
    main()
