"""What a pre-trained start changes: `python experiments/pretrained_start.py [--tune] [--seeds 0,1,2] [--data-root FOLDER]`.

Findings 3 and 4 of Smith et al. 2023, "A Closer Look at Rehearsal-Free Continual Learning", in kind: a small vision transformer is
trained on four classes of Fashion-MNIST, and continues on the other six, two a task, class-incremental, without past samples. Held
are the queries, keys and values, from the pre-trained weights on; "q, k, v" rows train these and the head alone, the others all
weights. Strengths were chosen on validation samples, with seed 0 (`--tune` shows that); tests saw no choice. Each row is the mean
of the seeds with its 95 % confidence interval (t); a seed draws the head, the order of batches and of classes. `--start random`
leaves the pre-training out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from clstream.strategies import L2, EWCPenalty, Finetune, L2Penalty, LwFMC, Regularised
from clstream.streams import from_tensors
from clstream.streams.data import load
from scipy.stats import t as student
from torch import Tensor
from torch.optim import Adam

from clstream import Strategy, Stream, metrics, run
from clstream.models import VitTiny
from clstream.seeds import isolated

QKV = ["*.attention.q.*", "*.attention.k.*", "*.attention.v.*"]
BASE, REST = [0, 1, 2, 3], [4, 5, 6, 7, 8, 9]
L2_STRENGTHS, EWC_STRENGTHS = (0.01, 0.1, 1.0, 10.0), (1.0, 10.0, 100.0, 1000.0)


def samples(classes: list[int], train_per_class: int, root: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test inputs and labels of some classes, numbered from 0; of each, so many to train."""
    parts: list[Tensor] = []
    for part, most in zip(load("FashionMNIST", root), (train_per_class, 10_000), strict=True):
        rows = torch.cat([(part.y == label).nonzero().flatten()[:most] for label in classes])
        place = torch.full((10,), -1)
        place[classes] = torch.arange(len(classes))
        parts += [part.x[rows], place[part.y[rows]]]
    x, y, x_test, y_test = parts
    return x, y, x_test, y_test


def model(classes: int) -> VitTiny:
    """Return the transformer, from the global generator."""
    return VitTiny((1, 28, 28), classes, patch=7, width=48, depth=4, mean=0.286, std=0.353)


def pretrained(root: str | None, epochs: int) -> dict[str, Tensor]:
    """Return the weights, but for the head, after training on the base classes."""
    stream = from_tensors(*samples(BASE, 6000, root), name="base", tasks=1, epochs=epochs, batch_size=64)
    with isolated(0, "base"):
        net = model(len(BASE))
    result = run(Finetune(net, partial(Adam, lr=1e-3)), stream)
    print(f"pre-trained on the classes {BASE}: accuracy {result.average_accuracy:.4f}", flush=True)
    return {name: weight for name, weight in net.state_dict().items() if not name.startswith("head.")}


def row(kind: str, net: VitTiny, l2: float, ewc: float, rate: float) -> Strategy:
    """Return the strategy of a row of the table."""
    if kind.endswith("q, k, v"):
        held = [name for name, _ in net.named_parameters() if any(f".attention.{part}." in name for part in "qkv")]
        for name, weight in net.named_parameters():
            weight.requires_grad_(name in held or name.startswith("head."))
    optimizer = partial(Adam, lr=rate)
    plain = partial(L2, strength=0.0, active_classes="task")
    base: Strategy = (LwFMC if kind.startswith("PredKD") else plain)(net, optimizer, renew_optimizer=True)
    if "L2" in kind:
        return Regularised(base, [L2Penalty(l2, QKV)])
    return Regularised(base, [EWCPenalty(ewc, QKV)]) if "EWC" in kind else base


ROWS = (
    "fine-tuning", "fine-tuning, q, k, v", "L2, q, k, v", "EWC, q, k, v", "PredKD", "PredKD, q, k, v", "PredKD + L2",
    "PredKD + EWC",
)  # fmt: skip


def main() -> None:
    """Pre-train, then run each row, and print it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=3, help="of each task")
    parser.add_argument("--base-epochs", type=int, default=5)
    parser.add_argument("--each", type=int, default=1000, help="training samples of each class that is continued on")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--l2", type=float, default=0.01)
    parser.add_argument("--ewc", type=float, default=1000.0)
    parser.add_argument("--kd-l2", type=float, default=10.0, help="with PredKD")
    parser.add_argument("--kd-ewc", type=float, default=10.0, help="with PredKD")
    parser.add_argument("--start", choices=("pretrained", "random"), default="pretrained")
    parser.add_argument("--tune", action="store_true", help="try strengths on validation samples, with seed 0")
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = pretrained(options.data_root, options.base_epochs) if options.start == "pretrained" else None
    data = samples(REST, options.each, options.data_root)

    def stream(seed: int, validation: float = 0.0) -> Stream:
        return from_tensors(
            *data, name="rest", tasks=3, epochs=options.epochs, batch_size=32, class_order=seed, validation=validation
        )

    def play(kind: str, seed: int, on: Stream, l2: float, ewc: float) -> tuple[float, float, float]:
        with isolated(seed, "model"):
            net = model(len(REST))
            if start is not None:
                net.load_state_dict(start, strict=False)
            strategy = row(kind, net, l2, ewc, options.rate)
        result = run(strategy, on, seed=seed)
        return result.average_accuracy, metrics.average_accuracy(result.task_accuracy, result.taught), result.forgetting

    if options.tune:
        held = stream(0, validation=0.2).for_tuning()
        choices: list[tuple[str, tuple[float, ...], Callable[[float], tuple[float, float]]]] = [
            ("L2, q, k, v", L2_STRENGTHS, lambda value: (value, 0.0)),
            ("PredKD + L2", L2_STRENGTHS, lambda value: (value, 0.0)),
            ("EWC, q, k, v", EWC_STRENGTHS, lambda value: (0.0, value)),
            ("PredKD + EWC", EWC_STRENGTHS, lambda value: (0.0, value)),
        ]
        for kind, values, given in choices:
            for value in values:
                class_il, task_il, *_ = play(kind, 0, held, *given(value))
                print(f"{kind:22} strength {value:7g}: class-IL {class_il:.4f}, task-IL {task_il:.4f} (validation)", flush=True)
        return
    seeds = [int(seed) for seed in options.seeds.split(",")]
    print(f"start: {options.start}; class-IL, task-IL, forgetting; seeds {options.seeds}")
    for kind in ROWS:
        l2, ewc = (options.kd_l2, options.kd_ewc) if kind.startswith("PredKD") else (options.l2, options.ewc)
        table = [play(kind, seed, stream(seed), l2, ewc) for seed in seeds]
        cells = []
        for values in zip(*table, strict=True):
            wide = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(values) / len(seeds) ** 0.5
            cells.append(f"{statistics.mean(values):.3f} ± {wide:.3f}")
        print(f"{kind:22} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
