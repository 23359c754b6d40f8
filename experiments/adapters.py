"""Kinds of adapters on a pre-trained vision transformer: `python experiments/adapters.py RESULTS [--seeds 0,1,2]`.

The stream, the backbone and the choice of learning rates are those of `experiments/pretrained_methods.py omniglot`: a small vision
transformer trained on 136 characters, 106 others in ten tasks. Each kind of adapter is tuned on the first task (`APER`), beside all
weights of the network, and none (SimpleCIL). What is finished is in the file RESULTS, a line a run, and not run again; the last
thing printed is the table.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.experiments.pretrained_methods import Method, Setting, chosen_rate, vit
from clstream.strategies import APER, NCM
from torch import nn

from clstream.adapters import Adapter, Bottleneck, InputPrompts, LoRA, Prefix, ScaleShift, adapt

SIMPLECIL = "NCM (SimpleCIL)"

KINDS: dict[str, Adapter] = {
    "LoRA": LoRA(rank=4, modules="*.attention.*"),
    "Bottleneck": Bottleneck(width=16),
    "ScaleShift": ScaleShift(),
    "Prefix": Prefix(length=10),
    "InputPrompts": InputPrompts(length=10),
}


def methods() -> dict[str, Method]:
    """Return the methods by name."""

    def aper(model: nn.Module, optimizer: Any, adapter: Adapter | None) -> APER:
        return APER(model if adapter is None else adapt(model, adapter), optimizer)

    return {
        SIMPLECIL: lambda model, _: NCM(model, distance="cosine"),
        "APER, all weights": partial(aper, adapter=None),
        **{f"APER, {name}": partial(aper, adapter=adapter) for name, adapter in KINDS.items()},
    }


def trained(method: str) -> int:
    """Return how many weights of the network a method trains in the first task, its head left out."""
    if method == SIMPLECIL:
        return 0
    model = vit("omniglot", 1)
    if (kind := method.removeprefix("APER, ")) in KINDS:
        adapt(model, KINDS[kind])
    return sum(weight.numel() for name, weight in model.named_parameters() if weight.requires_grad and not name.startswith("head."))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results, a row for each method."""
    lines = ["| method | weights trained | right after its task | accuracy |", "|---|---|---|---|"]
    for method in methods():
        if own := [row for row in rows if row["method"] == method]:
            scores = " | ".join(interval([row[name] for row in own]) for name in ("right_after", "accuracy"))
            lines.append(f"| {method} | {trained(method):,} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    """Choose learning rates, run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weights", type=Path, default=Path("omniglot-vit.pt"), help="written if it is not there")
    parser.add_argument("--data-root", help="the data folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting("omniglot", options.data_root, options.weights)
    setting.methods = methods()
    rows: list[dict[str, Any]] = list(map(json.loads, options.results.read_text().splitlines() if options.results.exists() else []))
    for method in setting.methods:
        done = {row["seed"] for row in rows if row["method"] == method}
        missing = [seed for seed in map(int, options.seeds.split(",")) if seed not in done]
        rate, tried = chosen_rate(setting, method) if missing else (0.0, {})
        for seed in missing:
            stream = setting.stream(seed, epochs=1 if method == SIMPLECIL else None)
            rows.append(setting.play(method, stream, seed, rate) | {"validation": tried})
            with options.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{method}, seed {seed}, rate {rate:g}: {rows[-1]['accuracy']:.3f}, {rows[-1]['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
