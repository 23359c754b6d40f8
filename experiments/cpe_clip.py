"""CPE-CLIP as a mechanism: `python experiments/cpe_clip.py RESULTS --weights vit.pt [--seeds 3]`.

Vision prompts with the brake of class counts: the transformer of `pretrained_methods.trained_vit`, trained on 136 characters of
Omniglot, meets the 106 others: 56 with all 15 drawings, then five sessions of ten characters and five drawings. Prompts of
`CPEVision` are held against the nearest class mean of the frozen network.

CPE prompting on a toy dual encoder: two small towers are trained here on scikit-learn's digits 0 to 5 and their names ("zero", byte
by byte), and `CPECLIP` learns few-shot sessions: these six, then twice two others, five images of each. A name that no
training told says nothing of the shape, so new digits are guessed before a session has shown them: the accuracy on them by the
towers alone, among the four, is printed beside chance.

What is finished is in the file RESULTS, a line a run, and not run again. The table has means over seeds: the accuracy after the
first session, after the last one over all classes seen, and then over the first classes and over later ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.coact import sessions
from clstream.experiments.pretrained_methods import trained_vit, vit
from clstream.strategies import CPECLIP, NCM, CPEVision
from clstream.streams import few_shot_tasks
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from clstream import Strategy, Stream, metrics, run
from clstream.models import Clip
from clstream.pretraining import load_weights
from clstream.seeds import isolated

TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 8, "layers": 3, "width": 32, "head_width": 8, "patch_size": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 258, "width": 32, "heads": 2, "layers": 2},
}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN = 6
"""Digits that the towers are trained on."""
PROMPTS: dict[str, dict[str, Any]] = {
    "CPEVision": {},
    "CPEVision, ten times the rate": {"rate": 1.0},
    "CPEVision, ten times the rate, no brake": {"rate": 1.0, "brake": False},
}
METHODS = ("NCM, cosine", *PROMPTS, "CPECLIP, toy towers", "CPECLIP, toy towers, no brake")
PASSES = 30
"""Over the six digits, to train the towers."""


def digits(seed: int) -> Stream:
    """Return six digits, then two sessions of two; a seed draws the five images of each of these."""
    stream = few_shot_tasks("digits", base=KNOWN, tasks=3, way=2, shots=5, support=seed, epochs=5, batch_size=32)
    return replace(stream, class_names=NAMES)


def towers(folder: Path) -> Clip:
    """Return towers that know six digits and their names, trained if their file is not in the folder."""
    config, weights = folder / "towers.json", folder / "towers.pt"
    config.write_text(json.dumps(TOWERS))
    if not weights.exists():
        train = digits(0).tasks[0].train[:]
        with isolated(0, "towers"):
            model = Clip((1, 8, 8), len(NAMES), str(config), "random")
            optimizer = AdamW(model.clip.parameters(), lr=0.001, weight_decay=0.05)
            for rows in torch.cat([torch.randperm(len(train))[: len(train) // 64 * 64] for _ in range(PASSES)]).split(64):
                loss = F.cross_entropy(20 * cosines(model, train.x[rows], range(KNOWN)), train.y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.save(model.clip.state_dict(), weights)
    return Clip((1, 8, 8), len(NAMES), str(config), str(weights))


def cosines(model: Clip, x: Tensor, labels: Sequence[int]) -> Tensor:
    """Return (n, labels) cosines of images and names, without prompts."""
    tokens = model.tokens([f"{NAMES[label]}." for label in labels])
    tokens = F.pad(tokens, (0, model.clip.context_length - tokens.shape[1]))
    similar: Tensor = model.features(x) @ model.clip.encode_text(tokens, normalize=True).T
    return similar


@torch.no_grad()
def guesses(model: Clip, stream: Stream, labels: Sequence[int]) -> float:
    """Return the accuracy on the test images of some digits by their names alone, among these."""
    x, y = (torch.cat([getattr(task.test[:], name) for task in stream.tasks]) for name in ("x", "y"))
    asked = torch.isin(y, torch.tensor(labels))
    return float((cosines(model, x[asked], labels).argmax(1) + labels[0] == y[asked]).double().mean())


def play(method: str, seed: int, weights: Path, folder: Path, root: str | None) -> dict[str, Any]:
    """Run a method; return what a line of the results has."""
    row: dict[str, Any] = {}
    stream = digits(seed) if "towers" in method else replace(sessions("fscil", seed, 0, root), epochs=5)
    strategy: Strategy
    with isolated(seed, "model"):
        if "towers" in method:
            model = towers(folder)
            row |= {"known": guesses(model, stream, range(KNOWN)), "new": guesses(model, stream, range(KNOWN, len(NAMES)))}
            strategy = CPECLIP(model, partial(SGD, lr=1.0, momentum=0.9, weight_decay=1e-5), scale=20.0, brake="no" not in method)
        else:
            net = vit("omniglot", stream.classes)
            load_weights(net, weights)
            if method in PROMPTS:
                options = dict(PROMPTS[method])
                optimizer = partial(SGD, lr=options.pop("rate", 0.1), momentum=0.9, weight_decay=1e-5)
                strategy = CPEVision(net, optimizer, **options)
            else:
                strategy = NCM(net, distance="cosine")
    result = run(strategy, stream, seed=seed, evaluate_on="seen")
    curves, seen = metrics.few_shot_curves(result.accuracy, result.taught), result.measured["accuracy"][:, -1]
    return {
        "method": method, "seed": seed, "seen": seen.tolist(), "base": float(curves["base"][-1]),
        "novel": float(curves["novel"][-1]), "seconds": result.seconds, **row,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results, a row for each method."""
    lines = ["| method | first | last | first classes | later classes |", "|---|---|---|---|---|"]
    for method in METHODS:
        if own := [row for row in rows if row["method"] == method]:
            numbers = [(row["seen"][0], row["seen"][-1], row["base"], row["novel"]) for row in own]
            means = [statistics.mean(values) for values in zip(*numbers, strict=True)]
            lines.append(f"| {method} | {' | '.join(f'{value:.3f}' for value in means)} |")
    if alone := [row for row in rows if "new" in row]:
        lines.append(
            f"\nby the names alone, before any session: {alone[0]['known']:.3f} of the six digits that the towers know, and"
        )
        lines.append(f"{alone[0]['new']:.3f} of the four that they don't, where chance is 0.250")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run what is not in the file of results yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("omniglot_vit.pt"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-root", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained_vit("omniglot", options.weights, options.data_root)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for method in METHODS:
            if (method, seed) not in done:
                rows.append(play(method, seed, options.weights, options.results.parent, options.data_root))
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
