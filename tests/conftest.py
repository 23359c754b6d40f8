"""What the tests share: small runs, real data where it is, and one migrated MLflow store to copy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import clstream.strategies as zoo
import pytest
import torch
from torch import nn
from torch.optim import SGD

from clstream import Strategy, optional

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; the processes of tests are to hear theirs
    signal.signal(signal.SIGINT, signal.default_int_handler)


HAS_AVALANCHE = importlib.util.find_spec("avalanche") is not None
STRATEGIES = [name for name in zoo.__all__ if HAS_AVALANCHE or name != "AvalancheStrategy"]
"""The names of those that can be made here."""


def has_mnist() -> bool:
    return (Path(os.environ.get("CLSTREAM_DATA", "missing")) / "MNIST" / "raw").is_dir()


def make(name: str) -> Callable[[nn.Module], Strategy]:
    """Return what builds a strategy of ours from a model: the class, or one with what it needs."""
    if name == "AvalancheStrategy":
        from clstream.strategies.avalanche import named

        return named("Naive")
    if name == "Refresh":
        return lambda model: zoo.Refresh(zoo.DERpp(model))
    if name == "Regularised":
        return lambda model: zoo.Regularised(zoo.LwF(model), [zoo.EWCPenalty(0.01), zoo.FeatKDPenalty(0.1)])
    if name == "WithDetectedBoundaries":
        return lambda model: zoo.WithDetectedBoundaries(zoo.AGEM(model, per_task=20, sample=10), warmup=4, window=10)
    if name == "TAME":  # the examples are short: with the defaults the selector would take the time, and no expert be added
        short = {"window": 10, "selector_epochs": 20, "retrain_epochs": 10, "selector_sparsity": 0.2}
        return lambda model: zoo.TAME(model, partial(SGD, lr=0.1), **short)  # with momentum, batches of 8 saturate the sigmoid
    if name == "Hypernetwork":  # the defaults are for a network of 478,410 weights; the examples have one of 2,278
        return lambda model: zoo.Hypernetwork(model, chunk=500, task_size=8, chunk_size=8)
    return getattr(zoo, name)


@pytest.fixture(scope="session")
def avalanche() -> Callable[[str], ModuleType]:
    """What returns a module of Avalanche by name; the tests that need it are left out where it is not installed."""
    if not HAS_AVALANCHE:
        pytest.skip("avalanche-lib is not installed: the extra `test` brings it, up to Python 3.12; there is none for newer ones")
    return optional.avalanche


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with all of its tables, made once: that takes seconds."""
    from clstream.store import connect

    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{file}", "made by the tests")
    return file


@pytest.fixture
def store(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty MLflow store in a working folder of the test's own."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{tmp_path}/mlflow.db"
