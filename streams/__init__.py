"""The benchmarks: functions that return a Stream, and data loading."""

from clstream.streams.blobs import blobs
from clstream.streams.blurry import blurry_episodes
from clstream.streams.domains import permuted_mnist, rotated_mnist
from clstream.streams.recorded import recorded
from clstream.streams.splits import split_cifar10, split_cifar100, split_digits, split_fashion_mnist, split_mnist
from clstream.streams.tensors import from_dataset, from_tensors

__all__ = [
    "blobs",
    "blurry_episodes",
    "from_dataset",
    "from_tensors",
    "permuted_mnist",
    "recorded",
    "rotated_mnist",
    "split_cifar10",
    "split_cifar100",
    "split_digits",
    "split_fashion_mnist",
    "split_mnist",
]
