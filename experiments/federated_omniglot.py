r"""Federated reconnaissance on the small sets of Omniglot: a prototypical network, and rivals of it.

The encoder is one of `clstream pretrain --objective episodes` on the 136 characters of the first set:

    clstream pretrain --stream omniglot --stream.background small1 --stream.test_drawers 1 --stream.batch_size 3000 --model Conv4 \
        --objective episodes --objective.turn true --epochs 2500 --out conv4.pt
    python experiments/federated_omniglot.py conv4.pt --root data --picture federated.png

1. `unseen`: accuracy of 5-way 5-shot episodes of the 106 characters that only the second set has, each turned at random.
2. `incremental`: these characters one at a time, 15 drawings to learn and 5 to test, the accuracy over all that came; three runs.
3. `rounds`: five clients, missions of 5 characters and 5 drawings, until all are used; accuracies of the server after each merge.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from clstream.strategies import NCM, Federated, Finetune
from clstream.streams import federated
from clstream.streams.omniglot import load_omniglot
from torch import Tensor

from clstream import run
from clstream.federated import FederatedAccuracy
from clstream.models import Conv4
from clstream.pretraining import load_weights
from clstream.seeds import isolated

BASE, CLASSES = 136, 242
"""Characters of the first set, and of both."""

SHOWN = (20, 50, 106)
"""Numbers of characters whose accuracy is printed."""


def encoder(file: str) -> Conv4:
    """Return the network with the weights of a file, in evaluation mode."""
    with isolated(0, "model"):
        network = Conv4((1, 28, 28), CLASSES)
    load_weights(network, file)
    return network.eval()


def drawings(root: str | None) -> tuple[Tensor, Tensor]:
    """Return the drawings of the 106 new characters, (106, 20, 1, 28, 28), and numbers of their classes."""
    names, train, test = load_omniglot("small", root=root)
    known = set(load_omniglot("small1", root=root)[0])
    new = [label for label, name in enumerate(names) if name not in known]
    x = torch.stack([torch.cat([train.x[train.y == label], test.x[test.y == label]]) for label in new])
    return x, torch.tensor(new)


@torch.no_grad()
def features_of(network: Conv4, x: Tensor) -> Tensor:
    """Return the features of (..., 1, 28, 28) images: (..., features)."""
    return torch.cat([network.features(part) for part in x.flatten(0, -4).split(500)]).view(*x.shape[:-3], -1)


def nearest(features: Tensor, means: Tensor) -> Tensor:
    """Return the number of the nearest mean for each of (n, features)."""
    return torch.cdist(features.double(), means.double()).argmin(1)


def unseen(network: Conv4, x: Tensor, episodes: int = 1000, ways: int = 5, shots: int = 5, queries: int = 5) -> tuple[float, float]:
    """Return the mean accuracy of episodes of characters that the network never saw, and its 95 % interval over episodes."""
    turned = torch.stack([features_of(network, x.rot90(turn, (3, 4))) for turn in range(4)])
    draw = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(episodes):
        labels = torch.randperm(len(x), generator=draw)[:ways]
        turns = torch.randint(4, (ways,), generator=draw)
        rows = torch.stack([torch.randperm(20, generator=draw)[: shots + queries] for _ in range(ways)])
        chosen = turned[turns[:, None], labels[:, None], rows]
        answers = nearest(chosen[:, shots:].flatten(0, 1), chosen[:, :shots].mean(1))
        hits.append((answers == torch.arange(ways).repeat_interleave(queries)).double().mean())
    accuracies = torch.stack(hits)
    return float(accuracies.mean()), float(1.96 * accuracies.std() / episodes**0.5)


def incremental(network: Conv4, x: Tensor, seed: int, shots: int = 15) -> list[float]:
    """Return the accuracy over all characters so far after each, in an order and with drawings that the seed draws."""
    draw = torch.Generator().manual_seed(seed)
    features = features_of(network, x)[torch.randperm(len(x), generator=draw)]
    rows = torch.stack([torch.randperm(20, generator=draw) for _ in features])
    features = features.gather(1, rows[..., None].expand_as(features))
    means, tests = features[:, :shots].mean(1), features[:, shots:]
    accuracies = []
    for count in range(1, len(x) + 1):
        answers = nearest(tests[:count].flatten(0, 1), means[:count])
        accuracies.append(float((answers == torch.arange(count).repeat_interleave(tests.shape[1])).double().mean()))
    return accuracies


def rounds(file: str, root: str | None, seed: int) -> dict[str, list[list[float]]]:
    """Return for each method the server's (base, field) accuracy after the base session and after each merge."""
    stream = federated("omniglot", base=BASE, clients=5, way=5, shots=5, seed=seed, root=root, batch_size=64)
    methods = {
        "prototypes, exact merge": Federated(NCM(encoder(file))),
        "prototypes, published merge": Federated(NCM(encoder(file)), merging="published"),
        "FedAvg of the network": Federated(Finetune(encoder(file)), epochs=5, batch_size=25),
    }
    measured = {}
    for name, strategy in methods.items():
        run(strategy, stream, accuracy := FederatedAccuracy(), seed=seed, evaluate_at="end")
        measured[name] = [[row.base, row.field] for row in accuracy.server()]
        last = accuracy.server()[-1]
        print(f"{name}: base {last.base:.4f}, field {last.field:.4f} after {last.round} rounds; {strategy.bytes_up:,} bytes up")
    return measured


def draw_rounds(measured: dict[str, list[list[float]]], file: str) -> None:
    """Draw the server's accuracies, round by round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for place, (panel, title) in enumerate(zip(axes, ("136 base characters", "field characters merged so far"), strict=True)):
        for name, values in measured.items():
            panel.plot(range(len(values)), [row[place] for row in values], marker="o", markersize=3, label=name)
        panel.set(title=title, xlabel="rounds merged", ylim=(0, 1))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy of the server")
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure one file of weights, and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", help="a file of clstream pretrain")
    parser.add_argument("--root", help="the folder of the data")
    parser.add_argument("--seed", type=int, default=0, help="of the missions")
    parser.add_argument("--out", help="a file for all numbers, as JSON")
    parser.add_argument("--picture", help="a file for the picture of the rounds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    network, (x, _) = encoder(given.weights), drawings(given.root)
    mean, half_width = unseen(network, x)
    print(f"5-way 5-shot, unseen characters: {mean:.4f} +- {half_width:.4f} over episodes")
    runs = [incremental(network, x, seed) for seed in range(3)]
    for count in SHOWN:
        values = [accuracies[count - 1] for accuracies in runs]
        print(f"{count} characters, 15 drawings each: {sum(values) / 3:.4f} ({', '.join(f'{value:.4f}' for value in values)})")
    measured = rounds(given.weights, given.root, given.seed)
    numbers: dict[str, Any] = {"unseen": [mean, half_width], "incremental": runs, "rounds": measured}
    if given.out:
        Path(given.out).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    if given.picture:
        draw_rounds(measured, given.picture)


if __name__ == "__main__":
    main()
