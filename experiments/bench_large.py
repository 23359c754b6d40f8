"""What long and large runs take: `python experiments/bench_large.py [--only NAME] [--full]`.

Prints, for 10, 100 and 1,000 tasks, sessions and classes, and for 10,000 up to a million samples, the CPU seconds of a run of
`Finetune` and its peak memory above that of an empty process; beside it the time of each sample that is asked about (of tasks), of
each session, or of each sample that is learned: it should not rise. Then data in a memory-mapped file; adds to memories of 100,000
samples; data sets up to their first batch; and `clstream list` beside `import torch`. `--full`: 10,000 sessions, and 8 GiB of data.

Of memory-mapped data the pages that were read count as resident, as long as nothing else needs the memory: what the process holds
itself, and can't give back, stands beside.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from clstream.strategies import Finetune
from clstream.streams import from_tensors

from clstream import BatchLearned, Samples, Stream, on, run, streams
from clstream.memory import ClassBalanced, Memory, Reservoir, Ring
from clstream.models import Mlp

MIB = 2**20
WIDTH = 8
CAPACITY = 100_000


def memory(name: str) -> float:
    """Return a size of this process in MiB: VmRSS (resident), RssAnon (its own) or VmHWM (the most that was resident)."""
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
    return float("nan") if match is None else int(match[1]) / 1024


class Looks:
    """Looks at the process's own memory now and then: the most of it is kept."""

    def __init__(self) -> None:
        self.begin = self.most = memory("RssAnon")
        self.batches = 0

    @on(BatchLearned)
    def look(self, event: BatchLearned) -> None:
        """Look at each fiftieth batch."""
        self.batches += 1
        if self.batches % 50 == 0:
            self.most = max(self.most, memory("RssAnon"))


def labelled(samples: int, classes: int, **options: object) -> Stream:
    """Return samples of a few numbers, of so many classes in turns; a tenth of them is for the test."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(samples) % classes
    x = torch.randn(samples, WIDTH, generator=draw)
    tested = max(classes, samples // 10)
    return from_tensors(x, y, x[:tested], y[:tested], **options)  # type: ignore[arg-type]  # by name


def tasks(count: int) -> tuple[Stream, int]:
    """Return a stream of so many tasks of one class each, and how many samples are asked about in its run."""
    stream = labelled(20 * count, count, tasks=count, batch_size=20)
    asked = sum(len(test_set.samples) for test_set in stream.test_sets)
    return stream, asked * (len(stream) + 1)


def sessions(count: int) -> tuple[Stream, int]:
    """Return ten tasks in so many sessions of ten samples, and how many there are."""
    return labelled(10 * count, 10, tasks=10, sessions_per_task=count // 10, batch_size=10), count


def classes(count: int) -> tuple[Stream, int]:
    """Return ten tasks of so many classes in all, and how many samples are learned."""
    stream = labelled(20 * count, count, tasks=10)
    return stream, 20 * count


def samples(count: int) -> tuple[Stream, int]:
    """Return so many samples in ten tasks, and how many are learned."""
    return labelled(count, 10, tasks=10, batch_size=256), count


KINDS: dict[str, tuple[Callable[[int], tuple[Stream, int]], str, tuple[int, ...], dict[str, str]]] = {
    "tasks": (tasks, "sample asked about", (10, 100, 1000), {}),
    "sessions": (sessions, "session", (10, 100, 1000), {"evaluate_at": "end"}),
    "classes": (classes, "sample", (10, 100, 1000), {}),
    "samples": (samples, "sample", (10_000, 100_000, 1_000_000), {}),
}
"""What grows: how its stream is made, what its time is divided by, its sizes, and the options of its runs."""


def played(kind: str, count: int) -> tuple[float, float, float]:
    """Return the CPU seconds of a run, those for each unit, and its peak memory in MiB, above what the process had before."""
    torch.set_num_threads(1)
    make, _, _, options = KINDS[kind]
    before = memory("VmRSS")
    stream, units = make(count)
    strategy = Finetune(Mlp(stream.input_shape, stream.classes, hidden=(32,)))
    begin = time.process_time()
    run(strategy, stream, **options)  # type: ignore[arg-type]  # by name
    seconds = time.process_time() - begin
    return seconds, seconds / units, memory("VmHWM") - before


def mapped(mib: int, folder: str) -> tuple[float, float, float]:
    """Return the seconds of a run on a memory-mapped file of so many MiB, and the MiB resident at its peak: all, and its own."""
    torch.set_num_threads(1)
    image = 3 * 64 * 64
    count = mib * MIB // image
    file = Path(folder) / "images.raw"
    with file.open("wb") as out:
        out.truncate(count * image)  # of zeros, which take no disk
    x = np.memmap(file, np.uint8, "r", shape=(count, 3, 64, 64))
    y = torch.arange(count) % 10
    stream = from_tensors(x, y, x[:1000], y[:1000], tasks=5, batch_size=256, resident=False)
    strategy, looks, before = Finetune(Mlp((3, 64, 64), 10, hidden=(16,))), Looks(), memory("VmRSS")
    begin = time.process_time()
    run(strategy, stream, looks, evaluate_at="end")
    return time.process_time() - begin, memory("VmHWM") - before, looks.most - looks.begin


def adds(make: Callable[[], Memory], batch: int = 128, repeats: int = 100) -> tuple[float, float]:
    """Return the median of the seconds of an add to a memory that is full, and of a draw from it."""
    torch.set_num_threads(1)
    kept = make()
    x, y = torch.randn(CAPACITY, WIDTH), torch.arange(CAPACITY) % 100
    kept.add(Samples(x, y))
    own = Samples(x[:batch], y[:batch])
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        moments = [time.process_time()]
        kept.add(own)
        moments.append(time.process_time())
        kept.sample(batch)
        moments.append(time.process_time())
        for number in range(2):
            times[number].append(moments[number + 1] - moments[number])
    return statistics.median(times[0]), statistics.median(times[1])


MEMORIES: dict[str, Callable[[], Memory]] = {
    "reservoir": partial(Reservoir, CAPACITY), "ring": partial(Ring, CAPACITY), "ring by class": partial(Ring, CAPACITY, 100),
    "class-balanced": partial(ClassBalanced, CAPACITY),
}  # fmt: skip

DATA: dict[str, Callable[[], Stream]] = {
    "digits": streams.split_digits, "MNIST": streams.split_mnist, "Fashion-MNIST": streams.split_fashion_mnist,
    "CIFAR-10": streams.split_cifar10, "cifar10-jpeg.zip": partial(streams.image_folder, "cifar10-jpeg.zip"),
    "Omniglot, small": partial(streams.omniglot, background="small", tasks=[136, 53, 53]), "blobs": streams.blobs,
}  # fmt: skip


def loaded(name: str) -> tuple[float, float]:
    """Return the CPU seconds to a data set's first batch, and from there to its fingerprint; NaN if it isn't here."""
    torch.set_num_threads(1)
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = DATA[name]()
    except (FileNotFoundError, OSError):
        return float("nan"), float("nan")
    for batch in next(iter(next(iter(stream)))):
        batch.samples.x.sum()
        break
    first = time.process_time()
    stream.fingerprint  # noqa: B018  # it is computed
    return first - begin, time.process_time() - first


def started(words: list[str]) -> float:
    """Return the CPU seconds of a process of Python: the least of three."""
    least = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = os.times()
        least = min(least, after.children_user + after.children_system - before.children_user - before.children_system)
    return least


def lines(only: str, full: bool) -> Iterator[str]:
    """Yield the lines of the table; each measurement has a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clstream.experiments.bench_large"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for kind, (_, unit, counts, _) in KINDS.items():
            for count in (*counts, *([10_000] if full and kind == "sessions" else [])) if only in kind else ():
                seconds, each, mib = pool.apply(played, (kind, count))
                yield f"{count:9,} {kind:9} {seconds:8.2f} s of CPU, {1e6 * each:9.1f} us a {unit}, {mib:7,.0f} MiB"
        for mib in ((256, 1024, 8192) if full else (64, 256)) if only in "memory-mapped" else ():
            with tempfile.TemporaryDirectory() as folder:
                seconds, resident, own = pool.apply(mapped, (mib, folder))
            yield f"{mib:9,} MiB memory-mapped {seconds:8.2f} s, {resident:,.0f} MiB resident, of these {own:,.0f} MiB its own"
        for name, make in MEMORIES.items() if only in "memories" else ():
            add, drawn = pool.apply(adds, (make,))
            yield f"{name:15} of {CAPACITY:,}: {1e6 * add:9.1f} us to add 128, {1e6 * drawn:7.1f} us to draw 128"
        for name in DATA if only in "data" else ():
            loaded_first = pool.apply(loaded, (name,)) if name.endswith(".zip") else None
            first, rest = pool.apply(loaded, (name,))
            if loaded_first is not None and loaded_first[0] > 2 * first:
                yield f"{name:17} {loaded_first[0]:6.2f} s, for it is decoded, once; then"
            yield f"{name:17} {first:6.2f} s to the first batch, {rest:6.2f} s more for the fingerprint"
    if only in "starts":
        bare = started(["-c", "import torch"])
        yield f"import torch      {bare:6.2f} s of CPU"
        for words in (["list"], ["--help"], ["run", "--help"]):
            own = started(["-m", "clstream.cli", *words])
            yield f"clstream {' '.join(words):9}{own:6.2f} s of CPU, {own / bare:.2f} times that"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*KINDS, "memory-mapped", "memories", "data", "starts"]
    parser.add_argument("--only", default="", choices=["", *names], help=f"one of {', '.join(names)}")
    parser.add_argument("--full", action="store_true", help="also 10,000 sessions, and 8 GiB of memory-mapped data")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores, 1 thread", flush=True)
    for line in lines(options.only, options.full):
        print(line, flush=True)


if __name__ == "__main__":
    main()
