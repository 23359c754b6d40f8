"""Continual few-shot episodes on Omniglot small: the tables of docs/episodes.md, which has the commands that train the weights.

    python experiments/episodes.py run --root data --weights weights --out episodes --count 100 --tuned 10
    python experiments/episodes.py tables --out episodes

Each learner goes through `count` episodes of 106 characters that no weights were trained on, for each seed; one that takes gradient
steps goes through `tuned`. What is there already is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.strategies import Finetune, ProtoNet, SupportReplay
from clstream.streams import episodes
from clstream.streams.episodes import episode_features
from torch import nn
from torch.optim import SGD

from clstream.comparison.statistics import mean_interval
from clstream.episodes import run_episodes
from clstream.episodes.outcomes import shown
from clstream.episodes.record import FILE, read_record
from clstream.models import Conv4, Linear
from clstream.pretraining import load_weights
from clstream.strategy import Strategy
from clstream.stream import Episodes

STEPS = 30
"""Gradient steps on each support set."""

SHAPES: dict[str, dict[str, Any]] = {
    "base1": {"ways": 5, "sets": 4, "sets_per_group": 2},
    "longA": {"ways": 5, "sets": 8, "sets_per_group": 2},
    "new longA": {"ways": 2, "sets": 20, "sets_per_group": 2},
    "wideA": {"ways": 10, "sets": 4, "sets_per_group": 2},
    "long, 105 classes": {"ways": 5, "sets": 42, "sets_per_group": 2},
    "wide, 106 classes": {"ways": 53, "sets": 4, "sets_per_group": 2},
    "instances": {"instances": True, "sets": 4, "shots": 5, "noise": [0.1, 0.4], "occlusion": [0.1, 0.3]},
}
REPLAYED = ("base1", "new longA", "instances")
"""The shapes that replay is run on."""

LEARNERS: dict[str, tuple[str, Callable[[nn.Module], Strategy]]] = {
    "ProtoNet": ("episodes", ProtoNet),
    "ProtoNet, cosine": ("episodes", partial(ProtoNet, similarity="cosine")),
    "ProtoNet, dot": ("episodes", partial(ProtoNet, similarity="dot")),
    "ProtoNet, trained on labels": ("labels", ProtoNet),
    "tune": ("labels", partial(Finetune, optimizer=partial(SGD, lr=0.01))),
    "tune with replay (2, 10)": ("labels", partial(SupportReplay, optimizer=partial(SGD, lr=0.01), sets=2, k=10)),
}
"""What each starts from, FILE-SEED.pt, and how it is built."""


def learner(make: Callable[[nn.Module], Strategy], family: Episodes) -> Strategy:
    """Return a learner around a network, or a head where the inputs are its features."""
    shape = family[0].input_shape
    return make(network(family.outputs) if len(shape) == 3 else Linear(shape, family.outputs))


def network(classes: int) -> Conv4:
    """Return the network: three blocks of 32 channels, with a norm that does not depend on other images."""
    return Conv4((1, 28, 28), classes, width=32, blocks=3, norm="layer")


def play(options: argparse.Namespace, seed: int, shape: str) -> None:
    """Run the learners that were asked for through the episodes of a shape."""
    for name in options.learners:
        weights, make = LEARNERS[name]
        tuned = name.startswith("tune")
        if "replay" in name and shape not in REPLAYED:
            continue
        count, steps = (options.tuned, STEPS) if tuned else (options.count, 1)
        family = episodes(**SHAPES[shape], root=options.root, cache=options.cache, seed=seed, count=count, steps=steps)
        start: Path | None = options.weights / f"{weights}-{seed}.pt"
        assert start is not None
        if not tuned and not family.corruptions:  # the features of all drawings are computed once
            load_weights(backbone := network(family.outputs), start)
            family, start = episode_features(family, backbone, cache=options.out / "features"), None
        result = run_episodes(
            partial(learner, make, family), family, start=start, seed=seed, folder=options.out / shape / name / str(seed),
            resume=True, batch=1 if tuned else 20,
        )  # fmt: skip
        print(f"{name}, {shape}, seed {seed}\n{result}\n", flush=True)


def tables(out: Path) -> None:
    """Print what was run: means over seeds, each the mean over its episodes, with the 95 % interval over seeds."""
    kinds = ["accuracy", *(f"noise_{share:g}" for share in SHAPES["instances"]["noise"])]
    kinds += [f"occlusion_{share:g}" for share in SHAPES["instances"]["occlusion"]]
    for columns in ([(shape, "accuracy") for shape in SHAPES if shape != "instances"], [("instances", kind) for kind in kinds]):
        print("| | " + " | ".join(kind if shape == "instances" else shape for shape, kind in columns) + " |")
        print("|---|" + "---|" * len(columns))
        for name in (*LEARNERS, "1-NN on pixels"):
            print(f"| {name} | " + " | ".join(cell(out, name, shape, kind) for shape, kind in columns) + " |")
        print()


def cell(out: Path, name: str, shape: str, kind: str) -> str:
    """Return an accuracy as a table shows it; nothing if it was not run."""
    own = name in LEARNERS
    means = []
    for file in sorted((out / shape / (name if own else "tune")).glob(f"*/{FILE}")):
        outcomes = read_record(file)[1]
        values = [outcome.corrupted.get(kind, outcome.accuracy) if own else outcome.nearest[kind] for outcome in outcomes]
        means += [sum(values) / len(values)] if values else []
    return shown(mean_interval(means)) if means else ""


def main() -> None:
    """Do what was asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--root", default="data")
    parser.add_argument("--cache", help="the folder for decoded images")
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--out", type=Path, default=Path("episodes"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--learners", nargs="*", default=list(LEARNERS))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tuned", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "tables":
        tables(options.out)
        return
    for shape in options.shapes:
        for seed in options.seeds:
            play(options, seed, shape)


if __name__ == "__main__":
    main()
