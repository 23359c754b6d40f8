"""Methods on a pre-trained backbone, side by side: `python experiments/pretrained_methods.py omniglot RESULTS [--seeds 0,1,2]`.

omniglot       a small vision transformer trained on 136 characters of Omniglot; the 106 others come in ten tasks
fashion_mnist  the same on four classes of Fashion-MNIST; the six others come in three tasks
cifar10-jpeg   EfficientNet-Lite0 with its ImageNet weights at 64 pixels; ten classes of photographs in five tasks

Within a table the backbone, its weights and, for a seed, the stream are the same for all methods: a seed draws the order of
classes, the head, what a method adds, and batches. The learning rate of a method that takes steps is the one that answered
validation samples best, a fifth of the training samples of seed 0, and 0.001 on photographs, where a run takes long; tests saw no
choice, and the other options are the defaults.
What is finished is in the file RESULTS, a line a run, and not run again; the last thing printed is the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies import (
    APER,
    L2,
    L2P,
    NCM,
    SLDA,
    CODAPrompt,
    DualPrompt,
    Finetune,
    LinearProbe,
    LwF,
    MultiLane,
    RanPAC,
    Replay,
)
from clstream.streams import image_folder, omniglot, split_fashion_mnist
from torch import nn
from torch.optim import Adam, AdamW

from clstream import Strategy, Stream, run
from clstream.adapters import LoRA, adapt
from clstream.augmentations import ContrastiveViews
from clstream.models import Pretrained, VitTiny
from clstream.pretraining import join_tasks, load_weights, pretrain, save_weights
from clstream.seeds import isolated
from clstream.stream import Samples, Subset

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3)
"""Learning rates of Adam that are tried."""

Optimizer = Callable[..., torch.optim.Optimizer]
Method = Callable[[nn.Module, Optimizer], Strategy]

VIT: dict[str, Any] = {"patch": 7, "width": 64, "depth": 6, "fused": True}
NORMAL: dict[str, dict[str, Any]] = {"omniglot": {"mean": 0.92, "std": 0.27}, "fashion_mnist": {"mean": 0.286, "std": 0.353}}
BASE = [0, 1, 2, 3]
"""The classes of Fashion-MNIST that the transformer is trained on."""


def vit(data: str, classes: int) -> VitTiny:
    """Return the vision transformer for a data set, from the global generator: 17 tokens, 64 wide, 6 blocks."""
    return VitTiny((1, 28, 28), classes, **VIT, **NORMAL[data])


def trained_vit(data: str, file: Path, root: str | None = None) -> Path:
    """Train the transformer on characters or clothes that no table asks about, if the file is not there; return the file.

    40 passes over 136 characters, each in four orientations that are a class each, or 15 over four classes of Fashion-MNIST, with
    random crops of half of the image or more: some minutes on one core.
    """
    if not file.exists():
        if data == "omniglot":
            stream, classes, epochs = omniglot("small1", rotations=True, batch_size=64, root=root), None, 40
        else:
            stream, classes, epochs = split_fashion_mnist(batch_size=64, root=root), BASE, 15
        whole = join_tasks(stream, classes, epochs)
        crops = ContrastiveViews(smallest=0.5, flip=False, jitter=0.0, grayscale=0.0, blur=0.0)
        with isolated(0, "model"):
            net = vit(data, whole.classes)
        strategy = Finetune(net, partial(AdamW, lr=0.002, weight_decay=0.05))
        card = pretrain(strategy, replace(whole, augment=crops), warmup=1)
        save_weights(net, file, card)
        print(f"{file}: accuracy of a linear probe {card['linear_probe']:.3f}, {card['seconds']:.0f} s", flush=True)
    return file


POINTWISE = ["*.conv_pw", "*.conv_pwl", "*.conv_head"]
"""The 1 x 1 convolutions of EfficientNet, which are most of its weights."""


WITHOUT_STEPS = ("NCM (SimpleCIL)", "SLDA", "RanPAC")
"""Methods on frozen features that have no learning rate."""


def of_any_backbone(modules: list[str], capacity: int) -> dict[str, Method]:
    """Return what needs no vision transformer; LoRA is put on some modules, and Replay keeps so many samples."""

    def low_rank(model: nn.Module) -> nn.Module:
        return adapt(model, LoRA(rank=4, modules=modules))

    return {
        "NCM (SimpleCIL)": lambda model, _: NCM(model, distance="cosine"),
        "SLDA": lambda model, _: SLDA(model),
        "RanPAC": lambda model, _: RanPAC(model, projection=2000),
        "APER, LoRA": lambda model, optimizer: APER(low_rank(model), optimizer),
        "LinearProbe": lambda model, optimizer: LinearProbe(model, optimizer, active_classes="task"),
        "Finetune": lambda model, optimizer: Finetune(model, optimizer, active_classes="task"),
        "Finetune, LoRA": lambda model, optimizer: Finetune(low_rank(model), optimizer, active_classes="task"),
        "LwF, LoRA": lambda model, optimizer: LwF(low_rank(model), optimizer, active_classes="seen"),
        "Replay, LoRA": lambda model, optimizer: Replay(low_rank(model), optimizer, capacity, active_classes="seen"),
        "Joint, LoRA": lambda model, optimizer: Finetune(low_rank(model), optimizer, active_classes="seen"),
        "Joint": lambda model, optimizer: Finetune(model, optimizer, active_classes="seen"),
    }


def of_vits(modules: list[str], capacity: int) -> dict[str, Method]:
    """Return what needs a vision transformer, after the rest; `modules` are queries, keys and values, which L2 holds too."""

    def projections(model: nn.Module) -> nn.Module:
        for name, weight in model.named_parameters():
            weight.requires_grad_(".attention.qkv." in name or name.startswith("head."))
        return model

    return {
        **of_any_backbone(modules, capacity),
        "L2, q, k, v": lambda model, optimizer: L2(projections(model), optimizer, strength=0.1, active_classes="task"),
        "L2P": L2P,
        "DualPrompt": DualPrompt,
        "CODAPrompt": CODAPrompt,
        "MultiLane": MultiLane,
    }


class Setting:
    """A data set, its backbone, and the methods that are held against each other on it.

    Args:
        data: "omniglot", "fashion_mnist" or "cifar10-jpeg".
        root: the data folder, or the archive of photographs.
        weights: the file of the transformer's weights, which is written if it is not there.

    """

    def __init__(self, data: str, root: str | None, weights: Path) -> None:
        self.data, self.root, self.weights = data, root, weights
        self.epochs = {"omniglot": 10, "fashion_mnist": 4, "cifar10-jpeg": 2}[data]
        self.vit = data != "cifar10-jpeg"
        if self.vit:
            trained_vit(data, weights, root)
        # five samples of each class
        self.methods = (
            of_vits(["*.attention.qkv"], 530 if data == "omniglot" else 30) if self.vit else of_any_backbone(POINTWISE, 50)
        )

    def stream(self, seed: int, epochs: int | None = None, validation: float = 0.0) -> Stream:
        """Return the tasks, with their classes in the order of a seed."""
        options: dict[str, Any] = {
            "epochs": epochs or self.epochs,
            "batch_size": 32 if self.vit else 10,
            "validation": validation,
            "root": self.root,
        }
        draw = torch.Generator().manual_seed(seed)
        if self.data == "omniglot":
            first = omniglot("small1", root=self.root).class_names
            rest = [name for name in omniglot("small", root=self.root).class_names if name not in first]
            dealt = [rest[place] for place in torch.randperm(len(rest), generator=draw).tolist()]
            return omniglot("small", [dealt[place::10] for place in range(10)], **options)
        if self.data == "fashion_mnist":
            dealt = [label for label in torch.randperm(10, generator=draw).tolist() if label not in BASE]
            return fewer(split_fashion_mnist([dealt[:2], dealt[2:4], dealt[4:]], **options), 300, 1000)
        root = options.pop("root")
        return fewer(image_folder(root or "cifar10-jpeg.zip", tasks=5, class_order=seed, **options), 100, 100)

    def model(self, stream: Stream) -> nn.Module:
        """Return the backbone with its weights, and a new head from the global generator."""
        if not self.vit:
            return Pretrained((3, 32, 32), stream.classes, size=64)
        net = vit(self.data, stream.classes)
        load_weights(net, self.weights)
        return net

    def play(self, method: str, stream: Stream, seed: int, rate: float) -> dict[str, Any]:
        """Run a method; return what a line of the results has. What learns all tasks jointly has them as one."""
        if method.startswith("Joint"):
            stream = join_tasks(stream)
        with isolated(seed, "model"):
            strategy = self.methods[method](self.model(stream), partial(Adam, lr=rate))
        result = run(strategy, stream, seed=seed)
        total, samples = result.cost.total, sum(len(task.train) for task in stream.tasks) * stream.epochs
        return {
            "method": method, "data": self.data, "seed": seed, "rate": rate,
            "accuracy": result.average_accuracy, "right_after": float(result.accuracy.diagonal().mean()),
            "trained": int(total["trainable_parameters"]), "stored_bytes": int(total["memory_bytes"]),
            "flops": float(result.cost.learning_flops.sum() + result.cost.consolidating_flops.sum()) / samples,
            "seconds": result.seconds,
        }  # fmt: skip


def fewer(stream: Stream, learned: int, asked: int) -> Stream:
    """Return a stream with the first so many samples of each class, to learn and to test on; validation samples stay all."""

    def first(part: Samples | Subset, many: int) -> Samples | Subset:
        return part[torch.cat([(part.y == label).nonzero().flatten()[:many] for label in part.y.unique()]).sort().values]

    tasks = [replace(task, train=first(task.train, learned), test=first(task.test, asked)) for task in stream.tasks]
    return replace(stream, tasks=tasks, data=None)


def chosen_rate(setting: Setting, method: str) -> tuple[float, dict[float, float]]:
    """Return the learning rate that answers validation samples best with seed 0, and the accuracy of each that was tried.

    Of `RATES` the middle two are tried; while the best is the lowest or highest of those tried, the next one is too.
    """
    if method in WITHOUT_STEPS or not setting.vit:
        return 0.0 if method in WITHOUT_STEPS else 1e-3, {}
    stream = setting.stream(0, validation=0.2).for_tuning()
    low, high = len(RATES) // 2 - 1, len(RATES) // 2
    tried: dict[float, float] = {}
    while True:
        for rate in RATES[low : high + 1]:
            if rate not in tried:
                tried[rate] = setting.play(method, stream, 0, rate)["accuracy"]
        best = RATES.index(max(tried, key=tried.__getitem__))
        if best == low > 0:
            low -= 1
        elif best == high < len(RATES) - 1:
            high += 1
        else:
            return RATES[best], tried


def table(rows: list[dict[str, Any]], methods: Iterable[str]) -> str:
    """Return a Markdown table of the results, a row for each method."""
    lines = ["| method | trained | KB kept | MFLOP a sample | right after its task | accuracy |", "|---|---|---|---|---|---|"]
    for method in methods:
        if own := [row for row in rows if row["method"] == method]:
            trained, kept, flops = (own[0][name] for name in ("trained", "stored_bytes", "flops"))
            scores = " | ".join(interval([row[name] for row in own]) for name in ("right_after", "accuracy"))
            lines.append(f"| {method} | {trained:,} | {kept / 1000:,.0f} | {flops / 1e6:.1f} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    """Choose learning rates, run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("omniglot", "fashion_mnist", "cifar10-jpeg"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", help="some of them, with ; between; by default all")
    parser.add_argument("--weights", type=Path, help="of the transformer; by default DATA-vit.pt, written if it is not there")
    parser.add_argument("--data-root", help="the data folder, or the archive of photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(options.data, options.data_root, options.weights or Path(f"{options.data}-vit.pt"))
    methods = options.methods.split(";") if options.methods else list(setting.methods)
    if unknown := [method for method in methods if method not in setting.methods]:
        parser.error(f"there is no method {unknown[0]!r}: take some of {', '.join(setting.methods)}")
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows: list[dict[str, Any]] = [row for line in lines if (row := json.loads(line))["data"] == options.data]
    for method in methods:
        missing = [
            seed for seed in map(int, options.seeds.split(",")) if (method, seed) not in {(r["method"], r["seed"]) for r in rows}
        ]
        if not missing:
            continue
        rate, tried = chosen_rate(setting, method)
        for seed in missing:
            stream = setting.stream(seed, epochs=1 if method in WITHOUT_STEPS else None)
            row = setting.play(method, stream, seed, rate) | {"validation": tried}
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(f"{method}, seed {seed}, rate {rate:g}: {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True)
    print(table(rows, setting.methods))


if __name__ == "__main__":
    main()
