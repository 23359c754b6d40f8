"""Methods on frozen features, side by side: `python experiments/frozen_features.py cifar10-jpeg --root cifar10-jpeg.zip`.

Prints, for each method, the accuracy over class orders 0, 1 and 2 of five tasks, what it keeps beside the network, the FLOPs for
each training sample beside the network's, and the seconds of a run. Features are computed once, and cached.

cifar10-jpeg   a folder or archive of images, train/CLASS/NNNN.jpg and test/CLASS/NNNN.jpg; EfficientNet-Lite0 at 128 pixels
fashion_mnist  Fashion-MNIST of the data folder; EfficientNet-Lite0 at 64 pixels
digits         scikit-learn's digits; EfficientNet-Lite0 at 64 pixels
omniglot       the 106 characters of Omniglot's second small set that the first one lacks; a ConvNet trained on the 136 of the first
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from clstream.strategies import NCM, SLDA, FeCAM, Finetune, LinearProbe, RanPAC
from clstream.streams import features, image_folder, omniglot, split_digits, split_fashion_mnist
from torch import nn
from torch.optim import SGD

from clstream import Strategy, Stream, run
from clstream.models import ConvNet, Linear, Pretrained
from clstream.pretraining import join_tasks
from clstream.seeds import isolated

METHODS: dict[str, Callable[[nn.Module], Strategy]] = {
    "NCM": NCM,
    "NCM, cosine": partial(NCM, distance="cosine"),
    "SLDA": SLDA,
    "RanPAC, 2,000": partial(RanPAC, projection=2000),
    "RanPAC, 10,000": partial(RanPAC, projection=10_000, dtype="float32"),
    "FeCAM": FeCAM,
    "linear probe": partial(LinearProbe, optimizer=partial(SGD, lr=0.01)),
}


def build(name: str, root: str | None, order: int) -> tuple[Stream, Callable[[Stream], nn.Module]]:
    """Return a stream with its classes in the order of a seed, and what builds the backbone."""
    if name == "cifar10-jpeg":
        stream = image_folder(root or "cifar10-jpeg.zip", tasks=5, class_order=order, batch_size=64)
        return stream, lambda own: Pretrained(own.input_shape, 10, size=128)
    if name in ("fashion_mnist", "digits"):
        splitting = split_digits if name == "digits" else partial(split_fashion_mnist, root=root)
        stream = splitting(class_order=order, batch_size=64, epochs=1)
        return stream, lambda own: Pretrained(own.input_shape, 10, size=64)
    names = omniglot(background="small2", tasks=1, root=root).class_names
    new = [name for name in names if name.startswith(("Japanese", "Sanskrit", "Tagalog"))]
    dealt = [new[place] for place in torch.randperm(len(new), generator=torch.Generator().manual_seed(order)).tolist()]
    groups = [dealt[task::5] for task in range(5)]
    return omniglot(background="small2", tasks=groups, batch_size=64, root=root), partial(trained_on_omniglot, root)


def trained_on_omniglot(root: str | None, like: Stream) -> nn.Module:
    """Return a ConvNet trained on the characters of Omniglot's first small set, all together."""
    base = join_tasks(omniglot(background="small1", tasks=1, batch_size=64, root=root), epochs=30)
    with isolated(0, "model"):
        model = ConvNet(like.input_shape, base.classes)  # type: ignore[arg-type]
    run(Finetune(model, partial(SGD, lr=0.05, momentum=0.9)), base)
    return model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=("cifar10-jpeg", "fashion_mnist", "digits", "omniglot"))
    parser.add_argument("--root", help="the archive or folder of images, or the data folder")
    parser.add_argument("--cache", help="the folder for the features")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    first, backbone_of = build(options.stream, options.root, 0)
    backbone = backbone_of(first)
    streams = [
        features(build(options.stream, options.root, order)[0], backbone, cache=options.cache) for order in range(options.orders)
    ]
    print(streams[0])
    for name in options.methods:
        results = []
        for order, stream in enumerate(streams):
            with isolated(order, "model"):
                strategy = METHODS[name](Linear(stream.input_shape, stream.classes))
            results.append(run(strategy, stream, seed=order, evaluate_at="end"))
        accuracies = [result.average for result in results]
        samples = sum(len(task.train) for task in streams[0].tasks)
        cost = results[0].cost
        flops = float(cost.learning_flops.sum() + cost.consolidating_flops.sum()) / samples
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        kept = float(cost.memory_bytes[-1]) / 1e6
        print(
            f"{name:16} accuracy {statistics.mean(accuracies):.4f} ± {spread:.4f}   kept {kept:8.2f} MB   "
            f"{flops / 1e6:8.2f} MFLOP a sample   {results[0].seconds:6.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
