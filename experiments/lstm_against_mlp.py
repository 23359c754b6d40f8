"""An LSTM against an MLP as generator of weights, at equal numbers of parameters: `python experiments/lstm_against_mlp.py`.

Both learn Split MNIST and Split Fashion-MNIST with the same target network (Mlp of 400 and 400), batches, epochs, seeds, and all
else as the authors of hypernetworks have it for Split MNIST; the LSTM's sizes are ours. Prints each pair as it comes, and for each
stream the mean difference LSTM - MLP with its 95 % confidence interval, by Student's t over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from clstream.experiments.bench_hypernetwork import numbers_held
from clstream.strategies import Hypernetwork
from clstream.streams import split_fashion_mnist, split_mnist
from scipy.stats import t

from clstream import Stream, metrics, run
from clstream.models import Mlp
from clstream.seeds import isolated

STREAMS: dict[str, Callable[..., Stream]] = {"split_mnist": split_mnist, "split_fashion_mnist": split_fashion_mnist}
SIZES: dict[str, dict[str, Any]] = {
    "lstm": {"generator": "lstm", "hidden": (16,), "chunk": 27_000, "task_size": 32, "chunk_size": 32},
    "mlp": {"generator": "mlp", "hidden": (10, 10), "chunk": 42_000, "task_size": 96, "chunk_size": 96},
}
KINDS = ("task-IL", "class-IL")


def learned(stream: Stream, kind: str, seed: int) -> tuple[list[float], int]:
    """Return task-IL and class-IL average accuracy of one run, and the number of parameters of generator and embeddings."""
    with isolated(seed, "model"):
        strategy = Hypernetwork(Mlp(stream.input_shape, stream.classes, hidden=(400, 400)), **SIZES[kind])
    result = run(strategy, stream, seed=seed)
    held = numbers_held(strategy)
    accuracies = [metrics.average_accuracy(result.task_accuracy, result.taught), result.average_accuracy]
    return accuracies, held["generator"] + held["embeddings"]


def interval(differences: list[float]) -> str:
    """Return the mean with its 95 % confidence interval, in words."""
    n, mean = len(differences), statistics.mean(differences)
    if n < 2:
        return f"{mean:+.4f} (one seed has no interval)"
    width = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return f"{mean:+.4f}, from {mean - width:+.4f} to {mean + width:+.4f} with 95 % confidence, {n} seeds"


def main() -> None:
    """Run, and print each pair as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=21, help="about 2000 steps a task")
    parser.add_argument("--streams", default="split_mnist,split_fashion_mnist")
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.streams.split(","):
        stream = STREAMS[name](epochs=options.epochs, batch_size=128, root=options.data_root)
        pairs: list[dict[str, list[float]]] = []
        for seed in map(int, options.seeds.split(",")):
            outcomes = {kind: learned(stream, kind, seed) for kind in SIZES}
            pairs.append({kind: accuracies for kind, (accuracies, _) in outcomes.items()})
            (_, ours), (_, theirs) = outcomes["lstm"], outcomes["mlp"]
            if abs(ours / theirs - 1) > 0.02:
                raise ValueError(f"the comparison is of equal sizes, but the LSTM has {ours} parameters and the MLP {theirs}")
            accuracies = ", ".join(
                f"{kind} lstm {lstm:.4f} mlp {mlp:.4f}" for kind, lstm, mlp in zip(KINDS, *pairs[-1].values(), strict=True)
            )
            print(f"{name}, seed {seed}: {accuracies}; {ours} and {theirs} parameters", flush=True)
        for place, kind in enumerate(KINDS):
            print(
                f"{name}, {kind}: lstm - mlp {interval([pair['lstm'][place] - pair['mlp'][place] for pair in pairs])}", flush=True
            )


if __name__ == "__main__":
    main()
