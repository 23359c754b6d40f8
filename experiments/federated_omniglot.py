"""Federated reconnaissance on Omniglot's small sets: `python experiments/federated_omniglot.py RESULTS [--seeds 3] [--root data]`.

Encoders are trained on episodes of the 136 characters of the first small set: 2,500 episodes of 5 ways, 5 shots and 5 queries, each
class turned at random, Adam at 1e-3. They are kept in the folder of RESULTS. What is finished is in the file RESULTS, a line a
measurement, and not measured again; `--only alone` or `--only rounds` is one of the parts.

`alone`, one learner: episodes of the 106 characters that only the second set has, each class turned at random; then these
characters one at a time, 15 drawings to learn and 5 to test, the accuracy over all that came, three orders and draws. The recipe of
Hendryx et al. 2021 has a constant rate, and drawings of black and white alone, since PIL takes the nearest pixel of pictures of one
bit: these lines are held against a run of their code. Two things are then changed, one by one and together, with seed 0: the rate
falls along a cosine, and drawings are resized with greys between, as `streams.omniglot` does.

`rounds`: five clients, missions of 5 of the 106 characters and 5 drawings of each, until all 15 for training are used, then the
accuracy on the 136 base characters and on the 106, all 242 competing. The encoder, with greys and a cosine, has seen these 15
drawings of the base characters, and none of the five to test. What trains a network does so by SGD at 0.01, momentum 0.9, weight
decay 1e-3: 20 passes over the base characters, 30 of a client over its mission (iCaRL 2, with 484 exemplars, and 5 after a merge).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.strategies import NCM, EpisodicTraining, Federated, Finetune, ICaRL
from clstream.streams import federated, from_tensors
from clstream.streams.federated import Missions
from clstream.streams.omniglot import DRAWERS, load_omniglot
from torch import Tensor
from torch.optim import SGD

from clstream import Strategy, Stream, run
from clstream.federated import FederatedAccuracy
from clstream.models import Conv4
from clstream.pretraining import LearningRateSchedule, join_tasks, load_weights, save_weights
from clstream.seeds import isolated

BASE, CLASSES, EPISODES = 136, 242, 2500
"""Characters of the first set and of both; episodes of a training."""

RECIPES = {
    "theirs": ("binary", "constant"),
    "greys": ("grey", "constant"),
    "cosine": ("binary", "cosine"),
    "both": ("grey", "cosine"),
}
"""Drawings, and the rate."""

CHANGED = ("greys", "cosine", "both")
"""Recipes that are measured with one seed."""

REFERENCE = {"episodes": (0.9692, 0.02), "20": (0.8900, 0.05), "50": (0.7987, 0.05), "106": (0.7057, 0.05)}
"""Of the authors' code, from one training; and how far another training by the same recipe is expected from it."""


def drawings(kind: str, small: str, root: str | None) -> tuple[tuple[str, ...], Tensor]:
    """Return names of characters, and their drawings by drawer: (characters, 20, 1, 28, 28), uint8, "grey" or "binary"."""
    size = 28 if kind == "grey" else 105
    names, train, test = load_omniglot(small, size=size, root=root)
    x = torch.cat([part.x.view(len(names), -1, 1, size, size) for part in (train, test)], 1)
    if kind == "binary":  # as PIL's NEAREST, which it always takes for pictures of one bit
        nearest = ((torch.arange(28) + 0.5) * size / 28).long()
        x = x[..., nearest, :][..., nearest]
    return names, x.contiguous()


def encoder(folder: Path, recipe: str, drawers: int, seed: int, root: str | None) -> Conv4:
    """Return a network that was trained on episodes of the first drawings of the base characters; it is trained once."""
    kind, rate = RECIPES[recipe]
    file = folder / f"{recipe}_{drawers}_{seed}.pt"
    if not file.exists():
        x = drawings(kind, "small1", root)[1][:, :drawers]
        y = torch.arange(len(x)).repeat_interleave(drawers)
        stream = from_tensors(x.flatten(0, 1), y, x[:, 0], y[::drawers], tasks=1, epochs=EPISODES, batch_size=len(y))
        with isolated(seed, "model"):
            network = Conv4((1, 28, 28), BASE)
        with isolated(seed, "strategy"):
            strategy = EpisodicTraining(network, turn=True)
        if rate == "cosine":
            strategy.parts = (*strategy.parts, LearningRateSchedule(strategy.optimizer))
        run(strategy, stream, seed=seed, evaluate_at="end")
        save_weights(network, file, {"drawings": f"{drawers}, {kind}", "rate": rate, "seed": seed})
    with isolated(seed, "head"):
        network = Conv4((1, 28, 28), CLASSES)
    load_weights(network, file)
    return network.eval()


@torch.no_grad()
def features_of(network: Conv4, x: Tensor) -> Tensor:
    """Return the features of (..., 1, 28, 28) images: (..., features)."""
    return torch.cat([network.features(part) for part in x.flatten(0, -4).split(500)]).view(*x.shape[:-3], -1)


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """Return the number of the nearest mean for each of (n, features)."""
    return torch.cdist(features.double(), means.double()).argmin(1)


def episodes(network: Conv4, x: Tensor, number: int = 1000, ways: int = 5, shots: int = 5, queries: int = 5) -> float:
    """Return the mean accuracy of episodes of characters."""
    turned = torch.stack([features_of(network, x.rot90(turn, (3, 4))) for turn in range(4)])
    draw = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(number):
        labels = torch.randperm(len(x), generator=draw)[:ways]
        turns = torch.randint(4, (ways,), generator=draw)
        rows = torch.stack([torch.randperm(DRAWERS, generator=draw)[: shots + queries] for _ in range(ways)])
        chosen = turned[turns[:, None], labels[:, None], rows]
        answers = nearest_mean(chosen[:, shots:].flatten(0, 1), chosen[:, :shots].mean(1))
        hits.append((answers == torch.arange(ways).repeat_interleave(queries)).double().mean())
    return float(torch.stack(hits).mean())


def one_at_a_time(network: Conv4, x: Tensor, seed: int, shots: int = 15) -> list[float]:
    """Return the accuracy over all characters so far after each, in an order and with drawings that the seed draws."""
    draw = torch.Generator().manual_seed(seed)
    features = features_of(network, x)[torch.randperm(len(x), generator=draw)]
    rows = torch.stack([torch.randperm(DRAWERS, generator=draw) for _ in features])
    features = features.gather(1, rows[..., None].expand_as(features))
    means, tests = features[:, :shots].mean(1), features[:, shots:]
    accuracies = []
    for count in range(1, len(x) + 1):
        answers = nearest_mean(tests[:count].flatten(0, 1), means[:count])
        accuracies.append(float((answers == torch.arange(count).repeat_interleave(tests.shape[1])).double().mean()))
    return accuracies


def measure_alone(folder: Path, recipe: str, seed: int, root: str | None) -> dict[str, Any]:
    """Return the accuracies of one encoder on characters that it never saw."""
    network = encoder(folder, recipe, DRAWERS, seed, root)
    names, x = drawings(RECIPES[recipe][0], "small", root)
    base = set(drawings("grey", "small1", root)[0])
    x = x[[label for label, name in enumerate(names) if name not in base]]
    runs = torch.tensor([one_at_a_time(network, x, order) for order in range(3)])
    means = {str(count): float(runs[:, count - 1].mean()) for count in (20, 50, len(x))}
    return {"episodes": episodes(network, x), **means, "mean": float(runs.mean())}


SGD_OF_ALL = partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-3)
METHODS: dict[str, Callable[[Conv4], Strategy]] = {
    "prototypes, exact merge": lambda network: Federated(NCM(network, dtype="float32")),
    "prototypes, published merge": lambda network: Federated(NCM(network, dtype="float32"), merging="published"),
    "prototypes of one client": lambda network: NCM(network, dtype="float32"),
    "FedAvg": lambda network: Federated(Finetune(network, SGD_OF_ALL), epochs=30, batch_size=64),
    "FedAvg, Dirichlet(0.1)": lambda network: Federated(Finetune(network, SGD_OF_ALL), epochs=30, batch_size=64),
    "iCaRL": lambda network: Federated(
        ICaRL(network, SGD_OF_ALL, capacity=2 * CLASSES, temperature=2.0, merge_epochs=5), epochs=2, batch_size=64
    ),
    "iCaRL, mean over outputs": lambda network: Federated(
        ICaRL(network, SGD_OF_ALL, capacity=2 * CLASSES, form="mean", temperature=2.0, merge_epochs=5), epochs=2, batch_size=64
    ),
    "sequential training": lambda network: Finetune(network, SGD_OF_ALL),
    "training on everything": lambda network: Finetune(network, SGD_OF_ALL),
}
"""What learns; the first row is also what prototypes of everything at once are, to rounding."""


def missions_of(method: str, seed: int, root: str | None) -> Stream:
    """Return the base session and the rounds."""
    alpha = 0.1 if "Dirichlet" in method else None
    passes = 1 if "prototypes" in method else 20
    return federated(
        "omniglot", base=BASE, clients=5, way=5, shots=5, alpha=alpha, seed=seed, root=root, epochs=passes, batch_size=64
    )


def stream_of(method: str, stream: Stream) -> Stream:
    """Return what a method learns of a base session and rounds: these, or those of a client in one, or everything at once."""
    missions = stream.schedule
    assert isinstance(missions, Missions)
    if method == "prototypes of one client":
        session = missions.session.clamp(max=1).masked_fill(missions.client > 0, -1)
        return replace(stream, schedule=replace(missions, session=session))
    return join_tasks(stream) if method == "training on everything" else stream


def measure_rounds(folder: Path, method: str, seed: int, root: str | None) -> dict[str, Any]:
    """Return the accuracies on base and field characters after the last round, and the bytes that were sent; NaN if it diverges."""
    missions = missions_of(method, seed, root)
    stream = stream_of(method, missions)
    strategy = METHODS[method](encoder(folder, "both", 15, seed, root))
    observers = [FederatedAccuracy()] if method == "prototypes, exact merge" else []
    try:
        result = run(strategy, stream, *observers, seed=seed, evaluate_at="end")
    except FloatingPointError as error:
        print(f"{method}, seed {seed}: {error}", flush=True)
        return dict.fromkeys(("base", "field", "bytes_up", "bytes_down"), math.nan)
    line: dict[str, Any] = {}
    for name, task in zip(("base", "field"), missions.tasks, strict=True):
        line[name] = float((strategy.predict(task.test.x) == task.test.y).double().mean())
    line |= {name: int(result.cost.total.get(name, 0)) for name in ("bytes_up", "bytes_down")}
    for accuracy in observers:
        clients = [row for row in accuracy.rows if row.client >= 0]
        line |= {"base before": accuracy.rows[0].base, "rounds": accuracy.rows[-1].round}
        for name in ("base", "field", "mission"):  # in round 1 there is no field class yet
            line[f"clients, {name}"] = statistics.mean(getattr(row, name) for row in clients if row.round > 1)
    return line


def spread(values: list[float]) -> str:
    """Return a mean, and the standard deviation of several; nan if a training diverged."""
    mean = f"{statistics.mean(values):.3f}"
    return mean + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and mean != "nan" else "")


def tables(lines: list[dict[str, Any]]) -> str:
    """Return the tables of what is measured, and what is outside of what is expected."""
    rows = []
    for part, names in (("alone", RECIPES), ("rounds", METHODS)):
        for name in names:
            own = [line for line in lines if (line["part"], line["name"]) == (part, name)]
            if own:
                columns = [key for key in own[0] if key not in ("part", "name", "seed")]
                values = [f"{key} {spread([line[key] for line in own])}" for key in columns if not key.startswith("bytes")]
                sent = [f"{key} {statistics.mean(line[key] for line in own):,.0f}" for key in columns if key.startswith("bytes")]
                rows.append(f"{part}, {name} ({len(own)} seeds): " + ", ".join(values + sent))
    theirs = [line for line in lines if line["name"] == "theirs"]
    for key, (expected, band) in REFERENCE.items() if theirs else ():
        mean = statistics.mean(line[key] for line in theirs)
        verdict = "INSIDE" if abs(mean - expected) <= band else "OUTSIDE"
        rows.append(f"{key}: {mean:.4f} is {verdict} {expected:.4f} ± {band:.2f}")
    return "\n".join(rows)


def main() -> None:
    """Measure what RESULTS lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a file of lines of JSON")
    parser.add_argument("--seeds", type=int, default=3, help="of encoders, missions and everything else: 0, 1, ...")
    parser.add_argument("--root", help="the folder of the data")
    parser.add_argument("--only", choices=("alone", "rounds"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    finished = {(line["part"], line["name"], line["seed"]) for line in lines}
    folder = given.results.absolute().parent
    for seed in range(given.seeds):
        for part, names, measure in (("alone", RECIPES, measure_alone), ("rounds", METHODS, measure_rounds)):
            for name in names if given.only in (None, part) else ():
                if (part, name, seed) not in finished and (seed == 0 or name not in CHANGED):
                    line = {"part": part, "name": name, "seed": seed, **measure(folder, name, seed, given.root)}
                    with given.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    lines.append(line)
                    print(tables([line]), flush=True)
    print(tables(lines))


if __name__ == "__main__":
    main()
