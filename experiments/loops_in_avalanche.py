"""The same methods in Avalanche, where it is installed: `experiments/bench_methods.py` holds clstream against them.

Avalanche is given the tensors as floats, ready for its networks, and evaluates all tasks after each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

from clstream.experiments.loops_by_hand import Data, Spent
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset


class _Targets(TensorDataset):
    """A TensorDataset with the `targets` that Avalanche asks for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.targets = y.tolist()


def play(net: nn.Module, data: Data, make: Callable[..., Any], lr: float) -> Spent:
    """Learn task after task with what `make` makes; of labels that come task by task, in their order."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    train, test = (as_classification_dataset(_Targets(x, y)) for x, y in ((data.x, data.y), (data.x_test, data.y_test)))
    benchmark = nc_benchmark(train, test, len(data.tasks), task_labels=False, shuffle=False)
    theirs = make(
        model=net,
        optimizer=SGD(net.parameters(), lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=data.batch,
        train_epochs=1,
        eval_mb_size=1024,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True)),
    )
    learning = evaluating = 0.0
    with warnings.catch_warnings(record=True):  # its own methods call what is deprecated, and no filter keeps that quiet
        for experience in benchmark.train_stream:
            begin = perf_counter()
            theirs.train(experience)
            learned = perf_counter()
            measured = theirs.eval(benchmark.test_stream)
            learning, evaluating = learning + learned - begin, evaluating + perf_counter() - learned
    return Spent(learning, 0.0, evaluating, next(iter(measured.values())))


def finetune(net: nn.Module, data: Data, lr: float) -> Spent:
    """Fine-tuning."""
    from avalanche.training.supervised import Naive

    return play(net, data, Naive, lr)


def replay(net: nn.Module, data: Data, lr: float, capacity: int) -> Spent:
    """Experience replay: as many past samples as the batch holds."""
    from avalanche.training.supervised import Replay

    return play(net, data, lambda **options: Replay(mem_size=capacity, **options), lr)


def is_installed() -> bool:
    """Return whether Avalanche can be imported."""
    try:
        import avalanche.training.supervised  # noqa: F401
    except ImportError:
        return False
    return True
