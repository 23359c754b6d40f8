"""MULTI-LANE beside other methods on one backbone: `python experiments/multilane.py RESULTS [--weights vit.pt] [--seeds 3]`.

Canvases of one to four MNIST digits and Fashion-MNIST garments, twenty classes in five tasks of four. The backbone is a small
vision transformer, trained on canvases of sixty characters of Omniglot, with several labels too; that is done first, if the file of
its weights is not there. Every method starts from it. A seed draws the order of classes, the head, what a method adds, and batches.

`--tune` tries four learning rates for MULTI-LANE and the masked linear probe, and three for fine-tuning, on validation samples of
seed 0, and prints what they give. The best ones are in METHODS; the other methods take those of the method that is most like them.
What is finished is in the file RESULTS, a line a run, and not run again; the last thing printed is the table.

`--cost` prints, in place of all that, the FLOPs of an image at the shapes of ViT-B/16, by the number of lanes: as the paper's code
computes them, and as `MultiLane` does. `--speed` prints how long a step takes in a run, and in a loop by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies import Finetune, LinearProbe, LwFMC, MultiLane, Replay
from clstream.strategies.multilane import Lanes
from clstream.streams import from_tensors, multilabel_canvas
from clstream.streams.multilabel_canvas import draw_canvases
from clstream.streams.omniglot import load_omniglot
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, AdamW

from clstream import Strategy, run
from clstream.measures.flops import FlopMode
from clstream.models import Timm, VitTiny
from clstream.models.vit_blocks import Vit, vit_of
from clstream.pretraining import load_weights, save_weights
from clstream.pretraining.schedule import LearningRateSchedule
from clstream.seeds import isolated
from clstream.stream import Samples

MEASURES = ("cf1:0.8", "cf1_of_means:0.8", "of1:0.8", "cf1", "of1")

SLOW, FAST = (3e-4, 1e-3, 3e-3), (0.01, 0.03, 0.1, 0.3)
"""Learning rates of Adam that `--tune` tries: of whole networks, and of heads and lanes alone."""

Method = tuple[Callable[..., Strategy], tuple[float, ...], float]
"""What builds the strategy, the learning rates that are tried, and the best one."""

METHODS: dict[str, Method] = {
    "MULTI-LANE": (partial(MultiLane, selectors=8, prompts=8), FAST, 0.1),
    "without selectors": (partial(MultiLane, selectors=0, prompts=8), (), 0.1),
    "masked probe": (partial(LinearProbe, active_classes="task"), FAST, 0.03),
    "fine-tuning": (partial(Finetune, active_classes="task"), SLOW, 0.001),
    "LwF with sigmoids": (partial(LwFMC, bce_scale=1.0), (), 0.001),
    "replay of 200": (partial(Replay, capacity=200, active_classes="task"), (), 0.001),
    "joint": (Finetune, (), 0.001),
}
"""All on the same backbone; "joint" has all classes in one task, with no label hidden."""

CHARACTERS, CANVASES, PASSES = 60, 16_000, 14
"""Of Omniglot, that the backbone is trained on."""


def network(classes: int) -> VitTiny:
    """Return the vision transformer: 17 tokens, 64 wide, 6 blocks; from the global generator."""
    return VitTiny((1, 56, 56), classes, patch=14, fused=True, mean=0.1, std=0.28)


def trained(file: Path, root: str | None) -> Path:
    """Train the backbone, if the file is not there, and return the file: some minutes on one core."""
    if not file.exists():
        parts = [Samples(255 - part.x, part.y)[part.y < CHARACTERS] for part in load_omniglot("small1", root=root)[1:]]
        train, test = (
            draw_canvases(part, n, CHARACTERS, seed) for part, n, seed in zip(parts, (CANVASES, 500), (1, 2), strict=True)
        )
        options: dict[str, Any] = {"tasks": 1, "epochs": PASSES, "batch_size": 64, "target": "multilabel"}
        stream = from_tensors(train.x, train.y, test.x, test.y, "omniglot_canvas", **options)
        with isolated(0, "model"):
            net = network(CHARACTERS)
        strategy = Finetune(net, partial(AdamW, lr=2e-3, weight_decay=0.05))
        strategy.parts = (LearningRateSchedule(strategy.optimizer, warmup=1),)
        result = run(strategy, stream)
        print(f"{file}: mAP {float(result.main[-1, 0]):.3f} on {CHARACTERS} characters, {result.seconds:.0f} s", flush=True)
        save_weights(net, file, {"stream": stream.name, "epochs": PASSES, "map": float(result.main[-1, 0])})
    return file


def play(method: str, seed: int, weights: Path, epochs: int, root: str | None, rate: float | None = None) -> dict[str, Any]:
    """Run a method, and return what a line of the results has; with a rate, on validation samples."""
    build, _, own_rate = METHODS[method]
    options: dict[str, Any] = {"train": 2000, "test": 1000, "epochs": epochs, "batch_size": 50, "class_order": seed, "root": root}
    tasks = 1 if method == "joint" else 5
    stream = multilabel_canvas("mnist+fashion_mnist", tasks, validation=0.2 if rate else 0.0, **options)
    stream = stream.for_tuning() if rate else stream
    with isolated(seed, "model"):
        net = network(stream.classes)
        load_weights(net, weights)
        strategy = build(net, partial(Adam, lr=rate or own_rate))
    result = run(strategy, stream, seed=seed, measures=[*MEASURES], evaluate_at="tasks")
    seen = {name: result.measured[name][:, -1].tolist() for name in ("map", *MEASURES)}
    cost = result.cost.total
    return {
        "method": method, "seed": seed, "epochs": epochs, "seconds": result.seconds, "rate": rate or own_rate,
        "forgetting": result.forgetting if tasks > 1 else math.nan, "seen": seen, "own": result.measured["map"].tolist(),
        "cost": {name: cost[name] for name in ("trainable_parameters", "learning_flops", "evaluating_flops", "memory_bytes")},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results, a row for each method."""
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "mean mAP": lambda row: statistics.mean(row["seen"]["map"]),
        "last mAP": lambda row: row["seen"]["map"][-1],
        "forgetting": lambda row: row["forgetting"],
        "CF1": lambda row: row["seen"]["cf1"][-1],
        "OF1": lambda row: row["seen"]["of1"][-1],
    }
    lines = [f"| method | {' | '.join(columns)} | trained | GFLOPs |", "|---|" + "---|" * (len(columns) + 2)]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            cells = [interval([value(row) for row in own]) for value in columns.values()]
            cost = own[0]["cost"]
            cells += [f"{cost['trainable_parameters'] / 1e3:.1f} k", f"{cost['learning_flops'] / 1e9:,.0f}"]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("nan ± nan", "-").replace("| nan |", "| - |")


# What a lane costs ------------------------------------------------------------------------------------------------------


def as_written(vit: Vit, x: Tensor, selectors: Tensor, prompts: Tensor) -> Tensor:
    """Return (n, width): a lane's class token as the paper's code computes it, with what it drops, and the frozen transformer.

    Args:
        vit: the frozen transformer.
        x: raw images.
        selectors: (selectors, width).
        prompts: (2, blocks, prompts, width).

    """
    assert vit.class_token is not None
    tokens = vit.embed(x)
    lane = torch.cat([vit.class_token.expand(len(x), 1, -1), selectors.expand(len(x), -1, -1)], 1)
    for number, block in enumerate(vit.blocks):
        frozen, own = block.norm1(tokens), block.norm1(lane)
        chosen = torch.softmax(own[:, 1:] @ frozen.mT / math.sqrt(vit.width), 2) @ frozen
        put = (prompts[0, number], prompts[1, number]) if number < prompts.shape[1] else None
        mixed = block.attention(torch.cat([own[:, :1], chosen], 1), put)
        lane = lane + torch.cat([mixed[:, :1], own[:, 1:]], 1)
        lane = lane + block.mlp(block.norm2(lane))
        tokens = block(tokens)
    return F.normalize(vit.norm(lane[:, :1])[:, 0], dim=1)


def flops_of(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call."""
    with torch.no_grad(), FlopMode(lambda: False) as mode:
        call()
    flops: int = mode.flops
    return flops


def cost_table(selectors: int = 20, prompted: int = 5) -> str:
    """Return a Markdown table: GFLOPs of an image at ViT-B/16's shapes, in batches of two, by the number of lanes."""
    with isolated(0, "model"):
        net = Timm((3, 224, 224), 10, "vit_base_patch16_224").eval()
    vit, x, lanes = vit_of(net), torch.zeros(2, 3, 224, 224), Lanes(selectors, selectors, prompted, 768)
    for _ in range(8):
        lanes.open(torch.Generator().manual_seed(0), torch.zeros(1))
    alone = flops_of(lambda: vit.run(vit.embed(x)))
    published = flops_of(lambda: as_written(vit, x, lanes.selectors[0], lanes.prompts[0])) - alone
    once = flops_of(lambda: lanes(vit, x[:1], [0])) * 2 - flops_of(lambda: lanes(vit, x, [0]))  # selectors, for the whole batch
    lines = [
        f"the transformer alone {alone / 2e9:.2f}; selectors {once / 1e9:.2f} a lane and batch, taken off below",
        "| lanes | as published | here |",
        "|---|---|---|",
    ]
    for many in (1, 2, 4, 8):
        here = (flops_of(lambda many=many: lanes(vit, x, list(range(many)))) - many * once) / 2  # type: ignore[misc]
        lines.append(f"| {many} | {(alone + many * published) / 2e9:.2f} | {here / 1e9:.2f} |")
    return "\n".join(lines)


def speed(turns: int = 3) -> str:
    """Return how long steps take in a run and in a loop by hand that does the same, in ms: the fastest of some turns."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(2000, 1, 56, 56, generator=draw), (torch.rand(2000, 20, generator=draw) < 0.2).float()
    stream = from_tensors(x, y, x[:50], y[:50], "random", tasks=1, batch_size=50, target="multilabel")
    seconds: dict[str, list[float]] = {"run": [], "by hand": []}
    for _ in range(turns):
        with isolated(0, "model"):
            net = network(20)
        learner = MultiLane(net, partial(Adam, lr=0.01), selectors=8, prompts=8)
        seconds["run"].append(float(run(learner, stream, evaluate_at="end").cost.learning_seconds.sum()))
        vit, lanes = vit_of(net), Lanes(8, 8, 5, 64)
        lanes.open(draw, x)
        optimizer = Adam([*lanes.parameters(), *net.head.parameters()], lr=0.01)
        begin = perf_counter()
        for rows in torch.randperm(2000, generator=draw).split(50):
            loss = F.binary_cross_entropy_with_logits(net.head(lanes(vit, x[rows], [0])[0]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds["by hand"].append(perf_counter() - begin)
    steps = 40
    return ", ".join(f"{name} {1e3 * min(times) / steps:.2f} ms a step" for name, times in seconds.items())


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("multilane.jsonl"))
    parser.add_argument("--weights", type=Path, default=Path("omniglot_canvas.pt"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--data-root")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost or options.speed:
        print(cost_table() if options.cost else speed())
        return
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"there is no method {sorted(unknown)[0]!r}: take {', '.join(METHODS)}")
    weights = trained(options.weights, options.data_root)
    if options.tune:
        for name in methods:
            for rate in METHODS[name][1]:
                row = play(name, 0, weights, options.epochs, options.data_root, rate)
                print(f"{name}, rate {rate:g}: {row['seen']['map'][-1]:.3f}, {row['seconds']:.0f} s", flush=True)
        return
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["epochs"] == options.epochs]
    done = {(row["method"], row["seed"]) for row in rows}
    for seed, method in product(range(options.seeds), methods):
        if (method, seed) not in done:
            row = play(method, seed, weights, options.epochs, options.data_root)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(f"{method}, seed {seed}: mAP {row['seen']['map'][-1]:.3f}, {row['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
