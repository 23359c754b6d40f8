"""CPE-CLIP as a mechanism: `python experiments/cpe_clip.py RESULTS --weights vit.pt [--seeds 3]`.

Vision prompts with the brake of class counts: the transformer of `pretrained_methods.trained_vit`, trained on 136 characters of
Omniglot, meets the 106 others: 56 with all 15 drawings, then five sessions of ten characters and five drawings. Prompts of
`CPEVision` are held against the nearest class mean of the frozen network.

CPE prompting on a toy dual encoder: two small towers are trained here on the drawings and names of the same 136 characters
("Greek/character01", byte by byte), and `CPECLIP` learns the same sessions. A name says nothing of the shape, so new classes are
guessed before a session has shown them: the accuracy on all 106 by the towers alone is printed beside chance.

What is finished is in the file RESULTS, a line a run, and not run again. The table has means over seeds: the accuracy after the
first session, after the last one over all classes seen, and then over the first classes and over later ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.coact import sessions
from clstream.experiments.pretrained_methods import trained_vit, vit
from clstream.strategies import CPECLIP, NCM, CPEVision
from clstream.streams import omniglot
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from clstream import Strategy, Stream, metrics, run
from clstream.models import Clip
from clstream.pretraining import join_tasks, load_weights
from clstream.seeds import isolated

TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 28, "layers": 4, "width": 64, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 48, "vocab_size": 258, "width": 32, "heads": 2, "layers": 3},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "CPEVision": {},
    "CPEVision, ten times the rate": {"rate": 1.0},
    "CPEVision, ten times the rate, no brake": {"rate": 1.0, "brake": False},
}
METHODS = ("NCM, cosine", *PROMPTS, "CPECLIP, toy towers", "CPECLIP, toy towers, no brake")
PASSES = 12
"""Over the 136 characters, to train the towers."""


def towers(folder: Path, classes: int, root: str | None) -> Clip:
    """Return towers that know the 136 characters and their names, trained if their file is not in the folder."""
    config, weights = folder / "towers.json", folder / "towers.pt"
    config.write_text(json.dumps(TOWERS))
    if not weights.exists():
        stream = join_tasks(omniglot("small1", batch_size=64, root=root), epochs=PASSES)
        with isolated(0, "towers"):
            model = Clip((1, 28, 28), stream.classes, str(config), "random")
            tokens = model.tokens([f"{name}." for name in stream.class_names])
            tokens = F.pad(tokens, (0, model.clip.context_length - tokens.shape[1]))
            optimizer = AdamW(model.clip.parameters(), lr=0.002, weight_decay=0.05)
            for epoch in stream.session(0):
                for batch in epoch:
                    names = model.clip.encode_text(tokens, normalize=True)
                    loss = F.cross_entropy(20 * model.features(batch.samples.x) @ names.T, batch.samples.y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            test = stream.tasks[0].test[:]
            with torch.no_grad():
                known = (model.features(test.x) @ model.clip.encode_text(tokens, normalize=True).T).argmax(1) == test.y
        print(f"towers: {float(known.double().mean()):.3f} of the test drawings of 136 characters by their names", flush=True)
        torch.save(model.clip.state_dict(), weights)
    return Clip((1, 28, 28), classes, str(config), str(weights))


def guesses(model: Clip, stream: Stream) -> float:
    """Return the accuracy on all test drawings of a stream by names alone."""
    tokens = model.tokens([f"{name}." for name in stream.class_names])
    x, y = (torch.cat([getattr(task.test[:], name) for task in stream.tasks]) for name in ("x", "y"))
    with torch.no_grad():
        names = model.clip.encode_text(F.pad(tokens, (0, model.clip.context_length - tokens.shape[1])), normalize=True)
        return float(((model.features(x) @ names.T).argmax(1) == y).double().mean())


def play(method: str, seed: int, weights: Path, folder: Path, root: str | None) -> dict[str, Any]:
    """Run a method; return what a line of the results has."""
    stream, row = replace(sessions("fscil", seed, 0, root), epochs=5), dict[str, Any]()
    strategy: Strategy
    with isolated(seed, "model"):
        if "towers" in method:
            model = towers(folder, stream.classes, root)
            row["by names alone"] = guesses(model, stream)
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
    if alone := [row["by names alone"] for row in rows if "by names alone" in row]:
        lines.append(f"\nall 106 by the names alone, before any session: {statistics.mean(alone):.3f}; chance is {1 / 106:.3f}")
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
