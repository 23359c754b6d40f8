"""The open world on digits: `python experiments/open_world.py RESULTS [--parts anchors,rejection,labels] [--seeds 5]`.

anchors    Split MNIST, 5 x 2 classes, 3 passes, batches of 128: the accuracy over all classes seen after each session, by what is
           replayed. The authors' code gave .196 (fine-tuning) and .332 (prior replay) in one run of it with these settings.
rejection  MNIST and Fashion-MNIST, eight classes in one session, 3 passes, a tenth held back: what is rejected of the other one, of
           Omniglot, of noise and of the two classes that are left out, by omega, entropy and reconstruction.
labels     a pool of 5,000 MNIST images, a fifth of them noisy, or none: accuracy by labels, 50 and then 50 a round, and how many
           of the labels that were bought are of noisy images. `Joint` learns all of them anew in each session, with 200
           units; `OpenVAE` goes on with them, and has a latent.
core_sets  Split MNIST, one pass, `Replay` of 200 images (`Mlp` of 200 units), as they are or with a fifth of the training images
           noisy: the last accuracy, by how the memory is filled.
orders     the same with herding, over orders of the classes: a seed is an order.

What is finished is in the file RESULTS, a line a run, and not run again. Means have 95 % confidence intervals (t) over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies import Active, CoreSets, Joint, OpenVAE, Replay
from clstream.strategies.openvae import ReplayGenerated
from clstream.streams import label_pool, split_fashion_mnist, split_mnist
from clstream.streams.corruptions import Corrupt
from clstream.streams.label_pool import corrupted_rows
from clstream.streams.probes import held_out_classes, noise, unknown
from torch.optim import SGD

from clstream import Strategy, Stream, on, run
from clstream.engine import LabelsRevealed
from clstream.evaluation import Rejection, RejectionMeasured
from clstream.models import BatchNormMlp, Mlp
from clstream.seeds import isolated
from clstream.strategy.core_sets import CORE_SETS
from clstream.stream import Samples, Subset

REPLAYS = ("none", "prior", "open_set", "real")
DATA: dict[str, tuple[Callable[..., Stream], str]] = {
    "mnist": (split_mnist, "fashion_mnist"),
    "fashion_mnist": (split_fashion_mnist, "mnist"),
}
LEARNED = {"mnist": "MNIST", "fashion_mnist": "Fashion"}
KINDS = ("evt", "entropy", "reconstruction")
QUERIES = ("random", "entropy", "core_set", "evt")
OF_OPENVAE = ("random", "entropy", "evt")
SIZE, ROUND, ROUNDS, NOISY = 5000, 50, 7, 0.2
FILLED = ("reservoir", "class_balanced", *CORE_SETS)
EPOCHS = 3


class Watch:
    """Keeps what a run tells of replay sets and of rejection."""

    def __init__(self) -> None:
        self.replays: list[dict[str, float]] = []
        self.rejected: dict[str, float] = {}
        self.bought: list[torch.Tensor] = []

    @on(LabelsRevealed)
    def revealed(self, event: LabelsRevealed) -> None:
        """Keep which labels were bought."""
        self.bought.append(event.rows)

    @on(ReplayGenerated)
    def generated(self, event: ReplayGenerated) -> None:
        """Keep the numbers of a replay set."""
        self.replays.append(event.curves())

    @on(RejectionMeasured)
    def measured(self, event: RejectionMeasured) -> None:
        """Keep the last numbers of rejection."""
        self.rejected = dict(event.numbers)


def learner(stream: Stream, seed: int, replay: str) -> OpenVAE:
    """Return a fresh strategy, of the authors' sizes."""
    with isolated(seed, "model"):
        return OpenVAE(BatchNormMlp(stream.input_shape, stream.classes), replay=replay)


def anchor(replay: str, seed: int, root: str | None) -> dict[str, Any]:
    """Learn Split MNIST; return the accuracies after each session, and how the replay sets came about."""
    stream, watch = split_mnist(epochs=EPOCHS, batch_size=128, root=root), Watch()
    result = run(learner(stream, seed, replay), stream, watch, seed=seed)
    seen = result.measured["accuracy"][:, -1].tolist()
    return {"seen": seen, "replays": watch.replays, "seconds": result.seconds}


def reject(data: str, seed: int, root: str | None) -> dict[str, Any]:
    """Learn eight classes; return what is rejected of others."""
    make, other = DATA[data]
    stream = make(tasks=[8], epochs=EPOCHS, batch_size=128, validation=0.1, root=root)
    probes = (unknown(stream, other, root=root), unknown(stream, "omniglot", root=root), noise(stream), held_out_classes(stream))
    watch = Watch()
    result = run(learner(stream, seed, "none"), stream.with_probes(*probes), Rejection(), watch, seed=seed)
    return {"accuracy": float(result.accuracy[-1, 0]), "rejected": watch.rejected, "seconds": result.seconds}


def buy(case: str, seed: int, root: str | None) -> dict[str, Any]:
    """Buy labels of a pool; return the accuracy by session, and the share of the bought images that are noisy."""
    query, _, noisy = case.partition("+")
    ask = query.removeprefix("OpenVAE ")
    share = NOISY if noisy else 0.0
    stream = label_pool(
        "MNIST", start=ROUND, budget=ROUND, rounds=ROUNDS, size=SIZE, corrupted=share, epochs=40, seed=seed, root=root
    )
    watch = Watch()
    with isolated(seed, "model"):
        if query == ask:
            base: Strategy = Joint(Mlp(stream.input_shape, stream.classes, hidden=(200,)))
        else:
            base = OpenVAE(BatchNormMlp(stream.input_shape, stream.classes, hidden=(200,)), replay="real", decoder=(200,))
        strategy = Active(base, ask)
    result = run(strategy, stream, watch, seed=seed)
    bought = torch.isin(torch.cat(watch.bought), corrupted_rows(SIZE, share, seed))
    return {"curve": result.accuracy[:, 0].tolist(), "noisy": float(bought.double().mean()), "seconds": result.seconds}


def spoiled(part: Samples | Subset, seed: int) -> Samples:
    """Return samples of which a fifth has noise of severity 5."""
    whole = part[:]
    rows, x = corrupted_rows(len(whole), NOISY, seed), whole.x.clone()
    x[rows] = Corrupt("noise", 5, seed)(x[rows])
    return Samples(x, whole.y)


def fill(case: str, seed: int, root: str | None, order: int | None = None) -> dict[str, Any]:
    """Learn Split MNIST with a memory that is filled in some way; return the last accuracy over all classes."""
    filled, _, noisy = case.partition("+")
    stream = split_mnist(batch_size=32, class_order=order, root=root)
    if noisy:
        stream = replace(stream, tasks=[replace(task, train=spoiled(task.train, seed)) for task in stream.tasks])
    with isolated(seed, "model"):
        model = Mlp(stream.input_shape, stream.classes, hidden=(200,))
        memory = "reservoir" if filled in CORE_SETS else filled
        replay = Replay(model, partial(SGD, lr=0.05), capacity=200, memory=memory)
        strategy = CoreSets(replay, filled) if filled in CORE_SETS else replay
    result = run(strategy, stream, seed=seed, evaluate_at="end")
    return {"accuracy": float(result.measured["accuracy"][-1, -1]), "seconds": result.seconds}


def order(case: str, seed: int, root: str | None) -> dict[str, Any]:
    """Learn Split MNIST in an order of the classes; the trainings are the same but for that."""
    return fill(case, 0, root, order=seed)


PARTS: dict[str, tuple[tuple[str, ...], Callable[[str, int, str | None], dict[str, Any]]]] = {
    "anchors": (REPLAYS, anchor),
    "rejection": (tuple(DATA), reject),
    "labels": ((*(f"{ask}+noise" for ask in QUERIES), *QUERIES, *(f"OpenVAE {ask}+noise" for ask in OF_OPENVAE)), buy),
    "core_sets": ((*FILLED, *(f"{filled}+noise" for filled in FILLED)), fill),
    "orders": (("herding",), order),
}
"""For each part its cases, and what runs one with a seed."""


def of(rows: list[dict[str, Any]], part: str, case: str) -> list[dict[str, Any]]:
    """Return the results of a case of a part."""
    return [row for row in rows if (row["part"], row["case"]) == (part, case)]


def anchors_table(rows: list[dict[str, Any]]) -> str:
    """Return a table of accuracies after each session, and of what the filter let pass."""
    lines = ["| replay | runs | 2 | 4 | 6 | 8 | 10 classes | least, greatest | acceptance | unfiltered |", "|---|" + "---|" * 9]
    for case in REPLAYS:
        own = of(rows, "anchors", case)
        if not own:
            continue
        ends = [row["seen"][-1] for row in own]
        means = [f"{sum(row['seen'][place] for row in own) / len(own):.3f}" for place in range(4)]
        shares = [
            [replay[f"replay/{name}"] for row in own for replay in row["replays"]] for name in ("acceptance_rate", "unfiltered")
        ]
        filtered = [f"{min(share):.0e} to {max(share):.0e}" if case == "open_set" else "" for share in shares]
        spread = f"{min(ends):.3f}, {max(ends):.3f}"
        lines.append(f"| {case} | {len(own)} | {' | '.join(means)} | {interval(ends)} | {spread} | {' | '.join(filtered)} |")
    return "\n".join(lines)


def rejection_table(rows: list[dict[str, Any]]) -> str:
    """Return two tables, by what was learned and the kind of novelty: AUROC of each probe, then what is rejected."""
    probes = ("other", "unknown/omniglot", "noise", "held_out_classes")
    heads = "the other data set | Omniglot | noise | left-out classes |"
    tables = [
        [f"| learned | AUROC of | {heads}", "|---|" + "---|" * 5],
        [f"| learned | rejected by | {heads} known | accuracy, accepted |", "|---|" + "---|" * 7],
    ]
    for case in DATA:
        own = of(rows, "rejection", case)
        names = [f"unknown/{DATA[case][1]}" if probe == "other" else probe for probe in probes]
        for kind in KINDS if own else ():
            for table, columns in zip(
                tables,
                (
                    [f"auroc/{name}" for name in names],
                    [*(f"rejected/{name}" for name in names), "rejected/known", "accepted_accuracy/known"],
                ),
                strict=True,
            ):
                cells = [interval([row["rejected"][f"{kind}/{column}"] for row in own]) for column in columns]
                table.append(f"| {LEARNED[case]} | {kind} | {' | '.join(cells)} |".replace("0.", "."))
    return "\n\n".join("\n".join(table) for table in tables)


def labels_table(rows: list[dict[str, Any]]) -> str:
    """Return a table of accuracies by the number of labels."""
    sizes = [ROUND * (number + 1) for number in range(ROUNDS + 1)]
    shown = " | ".join(f"{size} labels" for size in (*sizes[::2], sizes[-1]))
    lines = [f"| pool and query | {shown} | noisy |", "|---|" + "---|" * 6]
    for case in PARTS["labels"][0]:
        own = of(rows, "labels", case)
        places = [*range(0, len(sizes), 2), len(sizes) - 1]
        if own:
            cells = [interval([row["curve"][place] for row in own]) for place in places]
            lines.append(f"| {case} | {' | '.join(cells)} | {interval([row['noisy'] for row in own])} |".replace(" 0.", " ."))
    return "\n".join(lines)


def core_sets_table(rows: list[dict[str, Any]]) -> str:
    """Return a table of last accuracies by how the memory is filled."""
    lines = ["| memory | as they are | a fifth noisy |", "|---|---|---|"]
    for filled in FILLED:
        cells = [[row["accuracy"] for row in of(rows, "core_sets", case)] for case in (filled, f"{filled}+noise")]
        lines.append(f"| {filled} | {' | '.join(interval(cell) if cell else '' for cell in cells)} |")
    return "\n".join(lines)


def orders_table(rows: list[dict[str, Any]]) -> str:
    """Return the spread over orders."""
    ends = [row["accuracy"] for row in of(rows, "orders", "herding")]
    return f"{len(ends)} orders: {interval(ends)}, from {min(ends):.3f} to {max(ends):.3f}" if ends else "no orders"


TABLES = {
    "anchors": anchors_table,
    "rejection": rejection_table,
    "labels": labels_table,
    "core_sets": core_sets_table,
    "orders": orders_table,
}


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cases", help="those of the parts that are run; by default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = options.parts.split(",")
    if unknown_parts := set(parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown_parts)[0]!r}: take {', '.join(PARTS)}")
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(row["part"], row["case"], row["seed"]) for row in rows}
    for part in parts:
        cases, play = PARTS[part]
        for seed in range(options.seeds):
            for case in cases if options.cases is None else options.cases.split(","):
                if (part, case, seed) in done:
                    continue
                row = {"part": part, "case": case, "seed": seed, **play(case, seed, options.data_root)}
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                print(f"{part}, {case}, seed {seed}: {row['seconds']:.0f} s", flush=True)
    for part in parts:
        print(TABLES[part](rows), end="\n\n")


if __name__ == "__main__":
    main()
