"""The benchmarks: functions that return a Stream, and data loading."""

from clstream.streams.arriving import arriving
from clstream.streams.avalanche import from_avalanche
from clstream.streams.avalanche.streams import with_test
from clstream.streams.blobs import blobs
from clstream.streams.blurry import blurry_episodes
from clstream.streams.domains import permuted_digits, permuted_mnist, rotated_mnist
from clstream.streams.drifting import at_moments, drifting, few_shot, long_tailed
from clstream.streams.episodes import episode
from clstream.streams.episodes import episodes as episodes
from clstream.streams.features import features
from clstream.streams.federated import federated
from clstream.streams.few_shots import few_shot_tasks
from clstream.streams.image_folder import image_folder
from clstream.streams.imbalanced import imbalanced_tasks
from clstream.streams.label_pool import label_pool
from clstream.streams.multilabel_canvas import multilabel_canvas
from clstream.streams.multilabel_folder import multilabel_folder
from clstream.streams.nevis import mini_nevis, nevis_list
from clstream.streams.omniglot import omniglot
from clstream.streams.recorded import recorded
from clstream.streams.split_regression import split_regression
from clstream.streams.splits import split_cifar10, split_cifar100, split_digits, split_fashion_mnist, split_mnist
from clstream.streams.task_free import (
    blurry_tasks,
    feature_drift,
    fuzzy_tasks,
    gaussian_schedule,
    label_shift,
    recurring_tasks,
    si_blurry,
    sorted_by,
)
from clstream.streams.tensors import from_dataset, from_tensors

__all__ = [
    "arriving",
    "at_moments",
    "blobs",
    "blurry_episodes",
    "blurry_tasks",
    "drifting",
    "episode",
    "feature_drift",
    "features",
    "federated",
    "few_shot",
    "few_shot_tasks",
    "from_avalanche",
    "from_dataset",
    "from_tensors",
    "fuzzy_tasks",
    "gaussian_schedule",
    "image_folder",
    "imbalanced_tasks",
    "label_pool",
    "label_shift",
    "long_tailed",
    "mini_nevis",
    "multilabel_canvas",
    "multilabel_folder",
    "nevis_list",
    "omniglot",
    "permuted_digits",
    "permuted_mnist",
    "recorded",
    "recurring_tasks",
    "rotated_mnist",
    "si_blurry",
    "sorted_by",
    "split_cifar10",
    "split_cifar100",
    "split_digits",
    "split_fashion_mnist",
    "split_mnist",
    "split_regression",
    "with_test",
]
