"""What the parts of CoACT are worth: `python experiments/coact.py RESULTS --weights vit.pt [--protocol fscit] [--draws 3]`.

A small vision transformer that was trained on 136 characters of Omniglot (`pretrained_methods.trained_vit`, whose file is WEIGHTS,
written if it is not there) is tuned on the 106 others. fscit: ten sessions of ten or eleven characters, ten drawings of each, the
first session too. fscil: a first session of 56 characters with all 15 drawings, then five sessions of ten characters and five
drawings. A seed is a training, with an order of classes of its own; a draw says which drawings there are.

Each row adds a part. The learning rate of a row, unless `--rate` says it, is the one with which, after the last session, most
validation drawings are answered: a fifth of all training drawings, of seed 0 and draw 0; a session has as many shots as that
leaves. The epoch of the first session is chosen by a fifth of its own drawings. No test drawing has a part in either. What is
finished is in the file RESULTS, a line a run, and not run again.

The table has the accuracy after the first and after the last session, over all classes seen, by dot products as the authors' code
has it, the last one by cosines too, and over the classes of the first session and of later ones: means of all runs, and standard
deviations of the last accuracy over seeds in one draw and over draws with one seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_methods import trained_vit, vit
from clstream.strategies import CoACT
from clstream.streams import few_shot, omniglot
from torch.nn import functional as F

from clstream import Stream, metrics, run
from clstream.adapters import LoRA, adapt
from clstream.eval_mode import evaluating
from clstream.pretraining import load_weights
from clstream.seeds import isolated

LAST = ["stages.block4.*", "stages.block5.*", "stages.block6.*", "stages.norm.*"]
"""The last three blocks of six, and what follows them."""

LORA: dict[str, Any] = {"contrast": 0.0, "unfreeze_epoch": None, "later_epochs": 0, "development": 0.2}
ACT = {**LORA, "contrast": 1.0}
CFT = {**ACT, "unfreeze": LAST, "unfreeze_epoch": 0, "encoder_factor": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "prototypes": {"base_epochs": 0, "later_epochs": 0},
    "+ LoRA": LORA,
    "+ ACT": ACT,
    "+ CFT": CFT,
    "+ CIT": {**CFT, "later_epochs": 1},
    "+ CIT, 5 epochs at the whole rate": {**CFT, "later_epochs": 5, "later_factor": 1.0},
}
RATES = (0.003, 0.01, 0.03, 0.1)
EPOCHS = {"fscit": 20, "fscil": 5}


def sessions(protocol: str, seed: int, draw: int, root: str | None, tuning: bool = False) -> Stream:
    """Return the sessions of a seed and a draw; for tuning those whose tests are a fifth of the training drawings."""
    first = omniglot("small1", root=root).class_names
    rest = [name for name in omniglot("small", root=root).class_names if name not in first]
    dealt = [rest[place] for place in torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()]
    if protocol == "fscit":
        groups, shots, after = [dealt[place::10] for place in range(10)], 10, 0
    else:
        groups, shots, after = [dealt[:56], *(dealt[begin : begin + 10] for begin in range(56, 106, 10))], 5, 1
    stream = omniglot("small", groups, epochs=EPOCHS[protocol], batch_size=64, validation=0.2 if tuning else 0.0, root=root)
    if tuning:
        stream = stream.for_tuning()
        shots = min(shots, *(int(count) for task in stream.tasks for count in task.train.y.unique(return_counts=True)[1]))
    return few_shot(stream, shots, after, seed=draw)


def tuned(method: str, stream: Stream, seed: int, weights: Path, rate: float) -> CoACT:
    """Return a strategy around the trained transformer with LoRA."""
    with isolated(seed, "model"):
        net = vit("omniglot", stream.classes)
        load_weights(net, weights)
        if method != "prototypes":
            adapt(net, LoRA(rank=16, alpha=16, dropout=0.1, parts="qv", modules="*.attention.qkv"), trained=[])
        optimizer = CoACT(net).params["optimizer"]  # the default, with another rate
        optimizer = type(optimizer)(optimizer.func, **{**optimizer.keywords, "lr": rate})
        return CoACT(net, optimizer, smallest=0.5, jitter=0.0, grayscale=0.0, **METHODS[method])


def by_cosine(strategy: CoACT, stream: Stream) -> float:
    """Return the accuracy over all test drawings by cosines."""
    x, y = (torch.cat([getattr(task.test[:], name) for task in stream.tasks]) for name in ("x", "y"))
    with evaluating(strategy), torch.no_grad():
        cosines = F.normalize(strategy.features(x), dim=1) @ F.normalize(strategy.head.weight, dim=1).T
    return float((cosines.argmax(1) == y).double().mean())


def play(
    method: str, protocol: str, seed: int, draw: int, weights: Path, rate: float, root: str | None, tuning: bool = False
) -> dict[str, Any]:
    """Run a method; return what a line of the results has."""
    stream = sessions(protocol, seed, draw, root, tuning)
    strategy = tuned(method, stream, seed, weights, rate)
    result = run(strategy, stream, seed=seed, evaluate_at="end" if tuning else "sessions", evaluate_on="seen")
    curves = metrics.few_shot_curves(result.accuracy, result.taught)
    seen = result.measured["accuracy"][:, -1]
    return {
        "method": method, "protocol": protocol, "seed": seed, "draw": draw, "rate": rate, "seen": seen.tolist(),
        "base": float(curves["base"][-1]), "novel": float(curves["novel"][-1]), "cosine": by_cosine(strategy, stream),
        "seconds": result.seconds,
    }  # fmt: skip


def chosen_rate(method: str, protocol: str, weights: Path, root: str | None) -> tuple[float, list[float]]:
    """Return the learning rate that answers most validation drawings of seed 0, and the accuracy of each."""
    answered = [play(method, protocol, 0, 0, weights, rate, root, tuning=True)["seen"][-1] for rate in RATES]
    return RATES[answered.index(max(answered))], answered


def spread(rows: list[dict[str, Any]], within: str) -> str:
    """Return the standard deviation of the last accuracy of runs with one seed, or in one draw; the mean of them."""
    groups = [[row["seen"][-1] for row in rows if row[within] == value] for value in sorted({row[within] for row in rows})]
    return f"{statistics.mean(map(statistics.stdev, groups)):.3f}" if groups and min(map(len, groups)) > 1 else "-"


def table(rows: list[dict[str, Any]], protocol: str) -> str:
    """Return a Markdown table of the results, a row for each method."""
    heads = ("method", "runs", "rate", "first", "last", "by cosine", "first classes", "later classes", "over seeds", "over draws")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in METHODS:
        if own := [row for row in rows if row["method"] == method and row["protocol"] == protocol and "seed" in row]:
            numbers = [(row["seen"][0], row["seen"][-1], row["cosine"], row["base"], row["novel"]) for row in own]
            means = [statistics.mean(values) for values in zip(*numbers, strict=True)]
            shown = " | ".join(f"{value:.3f}" for value in means)
            rate = f"{own[0]['rate']:g}" if own[0]["rate"] else "-"
            lines.append(f"| {method} | {len(own)} | {rate} | {shown} | {spread(own, 'draw')} | {spread(own, 'seed')} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run what is not in the file of results yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("omniglot_vit.pt"))
    parser.add_argument("--protocol", choices=("fscit", "fscil"), default="fscit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--rate", type=float, help="the learning rate of all rows, in place of the chosen ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.data_root
    trained_vit("omniglot", options.weights, root)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    own = [row for row in rows if row["protocol"] == options.protocol]
    rates = {row["method"]: row["rate"] for row in own if "validation" in row} | {"prototypes": 0.0}
    for method in ("+ LoRA", "+ ACT", "+ CFT"):
        if options.rate is None and method not in rates:
            rates[method], answered = chosen_rate(method, options.protocol, options.weights, root)
            keep({"method": method, "protocol": options.protocol, "rate": rates[method], "validation": answered})
    done = {(row["seed"], row["draw"], row["method"]) for row in own if "seed" in row}
    for seed, draw, method in product(range(options.seeds), range(options.draws), METHODS):
        if (seed, draw, method) not in done:
            rate = rates.get(method, rates.get("+ CFT", options.rate))  # the first session of those with CIT is that of CFT
            keep(play(method, options.protocol, seed, draw, options.weights, rate, root))
    print(table(rows, options.protocol))


if __name__ == "__main__":
    main()
