"""OpenVAE on the digits it was written for: `python experiments/open_world.py RESULTS [--parts anchors,rejection] [--seeds 5]`.

anchors    Split MNIST, 5 x 2 classes, 3 passes, batches of 128: the accuracy over all classes seen after each session, by what is
           replayed. The authors' code gave .196 (fine-tuning) and .332 (prior replay) in one run of it with these settings.
rejection  MNIST and Fashion-MNIST, eight classes in one session, 3 passes, a tenth held back: what is rejected of the other one, of
           Omniglot, of noise and of the two classes that are left out, by omega, entropy and reconstruction.

What is finished is in the file RESULTS, a line a run, and not run again. Means have 95 % confidence intervals (t) over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies import OpenVAE
from clstream.strategies.openvae import ReplayGenerated
from clstream.streams import split_fashion_mnist, split_mnist
from clstream.streams.probes import held_out_classes, noise, unknown

from clstream import Stream, on, run
from clstream.evaluation import Rejection, RejectionMeasured
from clstream.models import BatchNormMlp
from clstream.seeds import isolated

REPLAYS = ("none", "prior", "open_set", "real")
DATA: dict[str, tuple[Callable[..., Stream], str]] = {
    "mnist": (split_mnist, "fashion_mnist"),
    "fashion_mnist": (split_fashion_mnist, "mnist"),
}
KINDS = ("evt", "entropy", "reconstruction")
EPOCHS = 3


class Watch:
    """Keeps what a run tells of replay sets and of rejection."""

    def __init__(self) -> None:
        self.replays: list[dict[str, float]] = []
        self.rejected: dict[str, float] = {}

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


PARTS: dict[str, tuple[tuple[str, ...], Callable[[str, int, str | None], dict[str, Any]]]] = {
    "anchors": (REPLAYS, anchor),
    "rejection": (tuple(DATA), reject),
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
        filtered = [f"{min(share):.1e} to {max(share):.1e}" if case == "open_set" else "" for share in shares]
        spread = f"{min(ends):.3f}, {max(ends):.3f}"
        lines.append(f"| {case} | {len(own)} | {' | '.join(means)} | {interval(ends)} | {spread} | {' | '.join(filtered)} |")
    return "\n".join(lines)


def rejection_table(rows: list[dict[str, Any]]) -> str:
    """Return a table of AUROC and rejected share by probe and kind, and of what is rejected of known samples."""
    lines = ["| learned | by | known rejected | accuracy, accepted | probe | AUROC | FPR95 | rejected |", "|---|" + "---|" * 7]
    for case in DATA:
        own = of(rows, "rejection", case)
        for kind in KINDS if own else ():

            def mean(name: str, own: list[dict[str, Any]] = own, kind: str = kind) -> str:
                return interval([row["rejected"][f"{kind}/{name}"] for row in own])

            known = f"{mean('rejected/known')} | {mean('accepted_accuracy/known')}"
            probes = [name.removeprefix(f"{kind}/auroc/") for name in own[0]["rejected"] if name.startswith(f"{kind}/auroc/")]
            for probe in probes:
                numbers = " | ".join(mean(f"{name}/{probe}") for name in ("auroc", "fpr95", "rejected"))
                lines.append(f"| {case} | {kind} | {known} | {probe} | {numbers} |")
    return "\n".join(lines)


TABLES = {"anchors": anchors_table, "rejection": rejection_table}


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
