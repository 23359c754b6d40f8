"""What pre-training on other classes is worth: `python experiments/pretrained_features.py [--seeds 0,1,2] [--data-root FOLDER]`.

A small convolutional network is trained on the 136 characters of Omniglot's first small background set, with their labels or by
SimCLR without them, and then stays as it is: NCM, SLDA and a linear probe learn the 106 characters of the second set that the first
hasn't, in ten tasks, class-incremental, one pass. The control is the same network with random weights. Each row is the mean of the
seeds with its 95 % confidence interval (t); a seed draws the weights, the order of batches, and the order of classes. The second
column is the linear probe of the card: drawings of the 136 characters that were held out.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial

import torch
from clstream.strategies import NCM, SLDA, Finetune, LinearProbe, SimCLR
from clstream.streams import omniglot
from scipy.stats import t as student
from torch.optim import Adam

from clstream import run
from clstream.models import ConvNet
from clstream.pretraining import join_tasks, linear_probe, pretrain
from clstream.seeds import isolated


def interval(values: list[float]) -> str:
    """Return the mean of some values, with its 95 % confidence interval if there are several."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    wide = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {wide:.3f}"


def backbone(start: str, seed: int, root: str | None, epochs: int) -> tuple[ConvNet, float]:
    """Return a network, pre-trained or not, and the accuracy of a linear probe on held-out drawings of the first characters."""
    with isolated(seed, "model"):
        net = ConvNet((1, 28, 28), 136, mean=0.92, std=0.27)
        contrast = partial(SimCLR, temperature=0.2, smallest=0.4, jitter=0.0, blur=0.0)
        strategy = (contrast if start == "SimCLR" else Finetune)(net, partial(Adam, lr=1e-3))
    base = omniglot("small1", batch_size=128 if start == "SimCLR" else 32, root=root)
    if start == "random":
        task = join_tasks(base).tasks[0]
        return net, linear_probe(net, task.train, task.test)
    card = pretrain(strategy, join_tasks(base, epochs=2 * epochs if start == "SimCLR" else epochs), warmup=1, seed=seed)
    return net, card["linear_probe"]


def main() -> None:
    """Pre-train, run the methods, and print a row for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20, help="of supervised pre-training; SimCLR has twice as many")
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first = set(omniglot("small1", root=options.data_root).class_names)
    rest = [name for name in omniglot("small", root=options.data_root).class_names if name not in first]
    print(f"start       linear probe    NCM             SLDA            LinearProbe     (seeds {options.seeds})")
    for start in ("random", "supervised", "SimCLR"):
        rows = []
        for seed in map(int, options.seeds.split(",")):
            net, probed = backbone(start, seed, options.data_root, options.epochs)
            names = random.Random(seed).sample(rest, len(rest))
            tasks: list[list[int | str]] = [[*names[place::10]] for place in range(10)]
            stream = omniglot("small", tasks, root=options.data_root)
            rows.append([probed, *(run(method(net), stream, seed=seed).average_accuracy for method in (NCM, SLDA, LinearProbe))])
        print(f"{start:12}" + "   ".join(interval(list(column)) for column in zip(*rows, strict=True)), flush=True)


if __name__ == "__main__":
    main()
