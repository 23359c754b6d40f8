"""How long methods take beside what they can be held against: `python experiments/bench_methods.py [--only NAME] [--out FOLDER]`.

Five methods are held against the same arithmetic in a loop by hand (`experiments/loops_by_hand.py`), the others against their
host: the strategy that they wrap, or a plain one on the same network. Data has the shapes of MNIST and is random, since speed
doesn't depend on it. Both sides run in this process, in turns; a ratio is the median over turns of one side's time over the
other's, beside the least and the greatest. CPU seconds beside wall seconds show whether the machine was busy. Budgets: 1.05 at
batches of 128 and more, 1.10 at batches of 10.

`--out bench` writes bench.json, bench.csv and bench.png there; `--track` logs them to MLflow.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from clstream.experiments import loops_by_hand as by_hand
from clstream.strategies import EWC, NCM, SHARP, DERpp, Finetune, Hypernetwork, LwF, Refresh, Replay
from clstream.streams import from_tensors
from torch import nn
from torch.optim import SGD, Adam

from clstream import Strategy, Stream, run
from clstream.models import ConvNet, Linear, Mlp, MnistLike, SlimResNet18
from clstream.seeds import isolated

SIDE = 28
CLASSES = 10


@dataclass(frozen=True)
class Cell:
    """What is measured: a strategy of ours, and what it is held against."""

    name: str
    batch: int
    samples: int
    network: Callable[[], nn.Module]
    strategy: Callable[[nn.Module], Strategy]
    against: str
    other: Callable[[nn.Module], Strategy] | Callable[[nn.Module, by_hand.Data], by_hand.Spent]
    budget: float | None = None
    epochs: int = 1
    scenario: str = "class"

    @property
    def is_by_hand(self) -> bool:
        """Whether it is held against a loop by hand."""
        return self.against == "by hand"


@dataclass
class Side:
    """The seconds of one side, turn by turn."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    learning: list[float] = field(default_factory=list)
    consolidating: list[float] = field(default_factory=list)
    evaluating: list[float] = field(default_factory=list)

    def add(self, begin: tuple[float, float], parts: tuple[float, float, float]) -> None:
        """Add a turn that began at (wall, CPU) seconds."""
        self.wall.append(perf_counter() - begin[0])
        self.cpu.append(process_time() - begin[1])
        for name, seconds in zip(("learning", "consolidating", "evaluating"), parts, strict=True):
            getattr(self, name).append(seconds)


def mlp() -> nn.Module:
    """Return the network of most cells."""
    return Mlp((1, SIDE, SIDE), CLASSES, hidden=(100, 100))


def wide() -> nn.Module:
    """Return a wider one."""
    return Mlp((1, SIDE, SIDE), CLASSES, hidden=(400, 400))


def convnet() -> nn.Module:
    """Return a convolutional network."""
    return ConvNet((1, SIDE, SIDE), CLASSES)


def slim() -> nn.Module:
    """Return a small ResNet."""
    return SlimResNet18((1, SIDE, SIDE), CLASSES)


def mnist_like() -> nn.Module:
    """Return SHARP's network."""
    return MnistLike((1, SIDE, SIDE), CLASSES)


def frozen() -> nn.Module:
    """Return a network of features as they are."""
    return Linear((SIDE * SIDE,), CLASSES)


LR = partial(SGD, lr=0.03)
FINETUNE, REPLAY = partial(Finetune, optimizer=LR), partial(Replay, optimizer=LR, capacity=500)
HAND_FINETUNE, HAND_REPLAY = partial(by_hand.finetune, lr=0.03), partial(by_hand.replay, lr=0.03, capacity=500)
HYPERNETWORK = partial(Hypernetwork, optimizer=partial(Adam, lr=1e-3))

CELLS = (
    Cell("fine-tune, Mlp 100-100", 10, 20_000, mlp, FINETUNE, "by hand", HAND_FINETUNE, 1.10),
    Cell("fine-tune, Mlp 400-400", 128, 60_000, wide, FINETUNE, "by hand", HAND_FINETUNE, 1.05),
    Cell("fine-tune, Mlp 400-400", 1024, 60_000, wide, FINETUNE, "by hand", HAND_FINETUNE, 1.05),
    Cell("fine-tune, ConvNet", 128, 5_000, convnet, FINETUNE, "by hand", HAND_FINETUNE, 1.05),
    Cell("replay, Mlp 100-100", 10, 20_000, mlp, REPLAY, "by hand", HAND_REPLAY, 1.10),
    Cell("replay, Mlp 400-400", 128, 30_000, wide, REPLAY, "by hand", HAND_REPLAY, 1.05),
    Cell("replay, Mlp 400-400", 1024, 30_000, wide, REPLAY, "by hand", HAND_REPLAY, 1.05),
    Cell("replay, ConvNet", 10, 1_000, convnet, REPLAY, "by hand", HAND_REPLAY, 1.10),
    Cell("replay, SlimResNet18", 128, 640, slim, REPLAY, "by hand", HAND_REPLAY, 1.05),
    Cell(
        "DER++, Mlp 100-100", 10, 10_000, mlp, partial(DERpp, optimizer=LR, capacity=500), "by hand",
        partial(by_hand.derpp, lr=0.03, capacity=500, alpha=0.5, beta=0.5), 1.10,
    ),
    Cell(
        "EWC, Mlp 100-100", 128, 20_000, mlp, partial(EWC, optimizer=LR, strength=10.0), "by hand",
        partial(by_hand.ewc, lr=0.03, strength=10.0), 1.05,
    ),
    Cell("LwF, Mlp 400-400", 128, 30_000, wide, partial(LwF, optimizer=LR), "by hand",
         partial(by_hand.lwf, lr=0.03, temperature=2.0), 1.05),
    Cell("Refresh around replay, Mlp 100-100", 10, 5_000, mlp, lambda model: Refresh(REPLAY(model)), "replay", REPLAY),
    Cell("Refresh around DER++, Mlp 100-100", 10, 5_000, mlp, lambda model: Refresh(DERpp(model, LR)), "DER++",
         partial(DERpp, optimizer=LR)),
    Cell("Hypernetwork, Mlp 100-100", 128, 5_000, mlp, HYPERNETWORK, "fine-tune",
         partial(Finetune, optimizer=partial(Adam, lr=1e-3)), scenario="task"),
    Cell("SHARP, MnistLike", 128, 5_000, mnist_like, SHARP, "replay", REPLAY, epochs=3),
    Cell("NCM on features", 128, 60_000, frozen, NCM, "fine-tune", FINETUNE),
)  # fmt: skip


def data(cell: Cell) -> Stream:
    """Return a class-incremental stream of random images, or of features for NCM, in five tasks."""
    draw = torch.Generator().manual_seed(0)
    shape = (SIDE * SIDE,) if cell.network is frozen else (1, SIDE, SIDE)

    def images(n: int) -> torch.Tensor:
        drawn = torch.randint(256, (n, *shape), generator=draw, dtype=torch.uint8)
        return drawn.float() / 255 if cell.network is frozen else drawn

    labels, test_labels = torch.arange(cell.samples) % CLASSES, torch.arange(cell.samples // 6 + CLASSES) % CLASSES
    return from_tensors(
        images(len(labels)),
        labels,
        images(len(test_labels)),
        test_labels,
        tasks=5,
        batch_size=cell.batch,
        epochs=cell.epochs,
        scenario=cell.scenario,
    )


def ours(stream: Stream, network: nn.Module, strategy: Callable[[nn.Module], Strategy], side: Side) -> None:
    """Run a strategy, and add its seconds."""
    with isolated(0, "strategy"):
        built = strategy(network)
    begin = perf_counter(), process_time()
    cost = run(built, stream).cost
    side.add(
        begin,
        (float(cost.learning_seconds.sum()), float(cost.consolidating_seconds.sum()), float(cost.evaluating_seconds.sum())),
    )


def plain(network: nn.Module) -> nn.Module:
    """Return a network as it is written by hand: an Mlp flat, without the layer that makes floats of bytes; others as they are."""
    if not isinstance(network, Mlp):
        return network
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    layers: list[nn.Module] = [nn.Flatten()]
    for layer in linear[:-1]:
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, linear[-1])


def measure(cell: Cell, turns: int) -> tuple[Side, Side]:
    """Run both sides in turns, after one that isn't counted."""
    stream = data(cell)
    rows = by_hand.data_of(stream, cell.batch) if cell.is_by_hand else None
    mine, other = Side(), Side()
    for turn in range(turns + 1):
        sides = (Side(), Side()) if not turn else (mine, other)
        torch.manual_seed(turn)
        ours(stream, cell.network(), cell.strategy, sides[0])
        if rows is None:
            ours(stream, cell.network(), cell.other, sides[1])  # type: ignore[arg-type]  # a strategy, where nothing is by hand
        else:
            network = plain(cell.network())
            begin = perf_counter(), process_time()
            spent = cell.other(network, rows)  # type: ignore[call-arg]  # a loop
            sides[1].add(begin, (spent.learning, spent.consolidating, spent.evaluating))  # type: ignore[union-attr]
    return mine, other


def ratios(mine: list[float], other: list[float]) -> list[float]:
    """Return the ratio of each turn."""
    return [a / b for a, b in zip(mine, other, strict=True) if b > 0]


def row_of(cell: Cell, mine: Side, other: Side) -> dict[str, Any]:
    """Return what the table has of a cell."""
    wall, cpu = ratios(mine.wall, other.wall), ratios(mine.cpu, other.cpu)
    median = statistics.median
    row: dict[str, Any] = {"cell": cell.name, "batch": cell.batch, "against": cell.against}
    row |= {"ratio": median(wall), "least": min(wall), "greatest": max(wall), "cpu_ratio": median(cpu), "budget": cell.budget}
    row |= {"seconds": median(mine.wall), "cpu_seconds": median(mine.cpu), "other_seconds": median(other.wall)}
    for part in ("learning", "consolidating", "evaluating"):
        row[f"{part}_seconds"] = median(getattr(mine, part))
        part_ratios = ratios(getattr(mine, part), getattr(other, part))
        row[f"{part}_ratio"] = median(part_ratios) if part_ratios and median(getattr(other, part)) > 1e-3 else None
    return row


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""

    def number(name: str) -> str:
        value = row[name]
        return f"{value:6.3f}" if isinstance(value, float) else "     -"

    budget = "" if row["budget"] is None else f" (budget {row['budget']:.2f})"
    return (
        f"{row['cell']!s:36} {row['batch']:5}  {row['against']!s:9} {number('ratio')} [{number('least')} {number('greatest')}] "
        f"CPU {number('cpu_ratio')}  learning {number('learning_ratio')} evaluating {number('evaluating_ratio')} "
        f"{row['seconds']:6.2f} s{budget}"
    )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the ratios with their budgets."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    hand = [row for row in rows if row["against"] == "by hand"]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(hand) + 1.2), layout="constrained")
    for place, row in enumerate(reversed(hand)):
        axes.plot([row["least"], row["greatest"]], [place, place], color="0.7", linewidth=4, solid_capstyle="butt")
        axes.plot(row["ratio"], place, "o", color="C0")
        axes.plot(row["budget"], place, "|", color="C3", markersize=14)
    axes.set_yticks(range(len(hand)), [f"{row['cell']}, batch {row['batch']}" for row in reversed(hand)])
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xlabel("time of clstream / time by hand: median, least and greatest; budget in red")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def environment(threads: int, turns: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "torch": torch.__version__, "python": sys.version.split()[0], "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": threads, "turns": turns, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def save(rows: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """Write the table as JSON, CSV and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    with (folder / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if any(row["against"] == "by hand" for row in rows):
        draw(rows, folder / "bench.png")


def track(rows: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """Log the table and its files to MLflow, in the experiment `bench`."""
    import mlflow

    mlflow.set_experiment("bench")
    with mlflow.start_run(run_name="bench"):
        mlflow.log_params(about)
        for row in rows:
            name = f"{row['cell']} {row['batch']}".replace(",", "").replace("+", "p")
            mlflow.log_metrics({f"{name}/ratio": row["ratio"], f"{name}/seconds": row["seconds"]})
        mlflow.log_artifacts(str(folder))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cells whose names have this text")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="a folder for bench.json, bench.csv and bench.png")
    parser.add_argument("--track", action="store_true", help="log them to MLflow; needs --out")
    options = parser.parse_args()
    cells = [cell for cell in CELLS if not options.only or options.only in f"{cell.name} {cell.batch}"]
    if not cells or options.turns < 1 or options.threads < 1 or (options.track and not options.out):
        parser.error("--only must be in some cell's name, --turns and --threads at least 1, and --track needs --out")
    torch.set_num_threads(options.threads)
    about = environment(options.threads, options.turns)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows = []
    for cell in cells:
        rows.append(row_of(cell, *measure(cell, options.turns)))
        print(line(rows[-1]), flush=True)
    if options.out:
        save(rows, about, Path(options.out))
        if options.track:
            track(rows, about, Path(options.out))


if __name__ == "__main__":
    main()
