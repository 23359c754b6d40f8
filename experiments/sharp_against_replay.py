"""SHARP against experience replay at equal bytes: `python experiments/sharp_against_replay.py [--seeds 0,1,2]`.

Both learn Split MNIST with the same network, epochs and batches. SHARP's bytes are those of both of its memories when the stream
ends, long-term exemplars of all classes included; replay's are raw images with their labels, as many as fit into so much. What
both keep besides, weights and SHARP's masks and ranks, is not counted. Replay's learning rate was chosen on validation samples:
`--tune` shows that choice.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from clstream.strategies import SHARP, Replay
from clstream.streams import split_mnist
from torch.optim import SGD

from clstream import Result, Stream, metrics, run
from clstream.models import MnistLike
from clstream.seeds import isolated

RATES = (0.01, 0.03, 0.1)
IMAGE = 28 * 28 + 8  # bytes of a raw image and its int64 label


def model(seed: int) -> MnistLike:
    """Return the network, with initial weights from the seed."""
    with isolated(seed, "model"):
        return MnistLike((1, 28, 28), 10, mean=0.1307, std=0.3081)


def both(result: Result) -> tuple[float, float]:
    """Return class-IL and task-IL average accuracy."""
    return result.average_accuracy, metrics.average_accuracy(result.task_accuracy, result.taught)


def stream(epochs: int, root: str | None, validation: float = 0.01) -> Stream:
    """Return Split MNIST as in the anchor of SHARP."""
    return split_mnist(epochs=epochs, batch_size=256, validation=validation, root=root)


def main() -> None:
    """Run, and print each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--phase-epochs", type=int, default=3, help="of SHARP")
    parser.add_argument("--rate", type=float, default=0.1, help="replay's learning rate")
    parser.add_argument("--tune", action="store_true", help="compare replay's learning rates on validation samples, with seed 0")
    parser.add_argument("--data-root")
    parser.add_argument("--bytes", type=int, help="replay alone, with so many bytes: SHARP's were 544504 here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tune:
        for rate in RATES:
            held = stream(options.epochs, options.data_root, validation=0.1).for_tuning()
            class_il, task_il = both(run(Replay(model(0), partial(SGD, lr=rate), capacity=687), held))
            print(f"replay, rate {rate}: class-IL {class_il:.4f}, task-IL {task_il:.4f} on validation samples", flush=True)
        return
    rows: dict[str, list[tuple[float, float]]] = {"SHARP": [], "replay": []}
    for seed in map(int, options.seeds.split(",")):
        size = options.bytes
        if size is None:
            own = SHARP(model(seed), phase_epochs=options.phase_epochs)
            rows["SHARP"].append(both(run(own, stream(options.epochs, options.data_root), seed=seed)))
            size = sum(memory.bytes for memory in (own.short_term, own.long_term) if memory is not None)
            print(f"seed {seed}, SHARP, {size} bytes: class-IL {rows['SHARP'][-1][0]:.4f}, task-IL {rows['SHARP'][-1][1]:.4f}")
        capacity = size // IMAGE
        replay = Replay(model(seed), partial(SGD, lr=options.rate), capacity=capacity)
        rows["replay"].append(both(run(replay, stream(options.epochs, options.data_root), seed=seed)))
        print(f"seed {seed}, replay, {capacity} images: class-IL {rows['replay'][-1][0]:.4f}, task-IL {rows['replay'][-1][1]:.4f}")
    for name, pairs in rows.items():
        for place, kind in enumerate(("class-IL", "task-IL") if pairs else ()):
            values = [pair[place] for pair in pairs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"{name}, {kind}: {statistics.mean(values):.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
