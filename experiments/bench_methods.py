"""How long methods take beside what they can be held against: `python experiments/bench_methods.py [--only NAME] [--out FOLDER]`.

Five methods are held against the same arithmetic in a loop by hand (`experiments/loops_by_hand.py`), some against Avalanche where
that is installed, others against their host: the strategy that they wrap, or a plain one on the same network. The cells are in
`experiments/bench_cells.py`.

Both sides run in this process, in turns, the one that begins a turn ends the next. A ratio is the median over turns of one side's
seconds over the other's, with the least and the greatest. CPU seconds beside wall seconds show whether the machine was busy.
`--busy` measures what has a budget once more, beside a process that multiplies matrices all the time. The peak memory of each side
is what a fresh process takes for data and run, above what it has after a small run of the same kind: so without torch's own. On a
GPU it is what torch's allocator holds there, without the samples.

`--compiled` measures compiled steps instead; the seconds of compiling are no part of their learning. `--out bench` writes
bench.json, bench.csv and bench.png there; `--track` logs them to MLflow. `--full` takes four times as many samples: what a run
costs once counts less then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.bench_cells import CELLS, COMPILED, PARTS, Cell, Times
from clstream.experiments.bench_table import heading, line, save, track
from clstream.experiments.loops_in_avalanche import is_installed

from clstream.measures.memory import peak_bytes


def measure(cell: Cell, turns: int, warm: bool = False) -> tuple[Times, Times]:
    """Run both sides in turns, unless this process is warm after one that isn't counted."""
    stream = cell.stream()
    ways, counted = [cell.ours(stream), cell.other(stream)], [Times(), Times()]
    for turn in range(int(warm), turns + 1):
        times = counted if turn else [Times(), Times()]
        for side in (0, 1) if turn % 2 else (1, 0):
            torch.manual_seed(turn)
            ways[side](cell.network(), times[side])
    return counted[0], counted[1]


@contextmanager
def stopped_process() -> Iterator[subprocess.Popen[bytes]]:
    """Have another process that could keep a core busy, and is stopped: it is started once, since torch takes seconds to come."""
    code = "import torch; torch.set_num_threads(1); x = torch.rand(512, 512); print(flush=True)\nwhile True: x @ x"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # now it computes
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


@contextmanager
def beside(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process go on meanwhile."""
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


def peaks(cell: Cell, device: str) -> list[float]:
    """Return the peak memory of both sides of a cell, in MiB; on the CPU each is measured in a process of its own."""
    if device != "cpu":
        return [peak_there(replace(cell, device=device, samples=20 * cell.batch), side) for side in (0, 1)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clstream.experiments.bench_cells"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        return pool.starmap(peak, [((*CELLS, *COMPILED).index(cell), side) for side in (0, 1)], chunksize=1)


def peak(number: int, side: int) -> float:
    """Return what one side of a cell takes at its peak, data included, above what a small run has taken, in MiB."""
    torch.set_num_threads(1)
    cell = (*CELLS, *COMPILED)[number]
    taken = []
    for some in (replace(cell, samples=100), cell):
        stream = some.stream()
        (some.other if side else some.ours)(stream)(some.network(), Times())
        taken.append(peak_bytes(torch.device("cpu")))
    return (taken[1] - taken[0]) / 2**20


def peak_there(cell: Cell, side: int) -> float:
    """Return what one side of a cell takes on its GPU at its peak, the samples left out, in MiB."""
    stream = cell.stream()
    play, network, device = (cell.other if side else cell.ours)(stream), cell.network(), torch.device(cell.device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    play(network, Times())
    return (peak_bytes(device) - before) / 2**20


def row_of(cell: Cell, ours: Times, other: Times) -> dict[str, Any]:
    """Return what the table has of a cell."""
    row: dict[str, Any] = {"cell": cell.name, "batch": cell.batch, "against": cell.against, "of": cell.of, "budget": cell.budget}
    for name in ("wall", "cpu", *PARTS):
        mine, theirs = getattr(ours, name), getattr(other, name)
        row[f"{name}_seconds"], row[f"{name}_seconds_other"] = statistics.median(mine), statistics.median(theirs)
        ratios = [a / b for a, b in zip(mine, theirs, strict=True) if b > 1e-3]
        row[f"{name}_ratio"] = statistics.median(ratios) if ratios else None
        row[f"{name}_least"], row[f"{name}_greatest"] = (min(ratios), max(ratios)) if ratios else (None, None)
    return row


def environment(threads: int, turns: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "torch": torch.__version__, "python": sys.version.split()[0], "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": threads, "turns": turns, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cells whose names, batches and other sides have this text")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--busy", action="store_true", help="measure once more beside a busy process")
    parser.add_argument("--full", action="store_true", help="four times as many samples")
    parser.add_argument("--device", default="cpu", help="where runs and loops by hand are, as torch names it")
    parser.add_argument("--out", help="a folder for bench.json, bench.csv and bench.png")
    parser.add_argument("--track", action="store_true", help="log them to MLflow; needs --out")
    parser.add_argument("--compiled", action="store_true", help="measure compiled steps, in place of those that are not")
    options = parser.parse_args()
    cells = [
        cell
        for cell in (COMPILED if options.compiled else CELLS)
        if not options.only or options.only in f"{cell.name} {cell.batch} {cell.against}"
    ]
    if not cells or options.turns < 1 or options.threads < 1 or (options.track and not options.out):
        parser.error("--only must be in some cell's name, --turns and --threads at least 1, and --track needs --out")
    torch.set_num_threads(options.threads)
    about = environment(options.threads, options.turns) | {"device": options.device}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    if not is_installed():
        print("avalanche-lib is not installed here, so nothing is held against it: pip install 'clstream[avalanche]'", flush=True)
    if not is_installed() or options.device != "cpu":  # theirs are loops on the CPU
        cells = [cell for cell in cells if cell.against != "Avalanche"]
    print(heading(options.busy), flush=True)
    rows = []
    with stopped_process() if options.busy else nullcontext() as other:
        for cell in cells:
            run = cell.on(options.device)
            run = replace(run, samples=(4 if options.full else 1) * run.samples)
            row = row_of(run, *measure(run, options.turns))
            if other is not None and cell.budget is not None:
                with beside(other):
                    busy = row_of(run, *measure(run, options.turns, warm=True))
                row |= {f"busy_{name}": busy[f"{cell.of}_{name}"] for name in ("ratio", "least", "greatest")}
            row |= dict(zip(("peak_mib", "peak_mib_other"), peaks(cell, options.device), strict=True))
            rows.append(row)
            print(line(row, options.busy), flush=True)
    if options.out:
        save(rows, about, Path(options.out))
        if options.track:
            track(rows, about, Path(options.out))


if __name__ == "__main__":
    main()
