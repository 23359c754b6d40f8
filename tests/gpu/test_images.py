"""On a GPU: photographs, with small networks, for two epochs of each task: what is learned, and how long it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import PRD, SHARP, DERpp, Replay
from clstream.streams import image_folder
from torch import nn
from torch.optim import SGD

from clstream import Result, Strategy, Stream, run
from clstream.models import SlimResNet18, VggSmall
from clstream.seeds import isolated

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [Path(os.environ.get("CLSTREAM_DATA", "missing")) / "cifar10-jpeg.zip", ROOT / "shared" / "data" / "cifar10-jpeg.zip"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

METHODS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], Strategy]]] = {
    "ER": (SlimResNet18, partial(Replay, optimizer=partial(SGD, lr=0.1), capacity=500)),
    "DERpp": (SlimResNet18, partial(DERpp, optimizer=partial(SGD, lr=0.03), capacity=500)),
    "SHARP": (VggSmall, partial(SHARP, phase_epochs=1)),
    "PRD": (SlimResNet18, PRD),
}


def photographs(cache: Path, train_per_class: int = 1000) -> Stream:
    """Return Split cifar10-jpeg, of its first file that is here; else have the test skipped."""
    file = next((file for file in FILES if file.exists()), None)
    if file is None:
        pytest.skip("cifar10-jpeg.zip is neither in CLSTREAM_DATA nor in shared/data")
    return image_folder(
        file, tasks=5, epochs=2, batch_size=64, train_per_class=train_per_class, cache=cache, augment=True, drop_last=True
    )  # fmt: skip


def played(name: str, stream: Stream, device: str, precision: str = "fp32") -> Result:
    """Run a method by its name here."""
    network, strategy = METHODS[name]
    with isolated(0, "strategy"):
        built = strategy(network(stream.input_shape, stream.classes))
    return run(built, stream, device=device, precision=precision)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.mark.filterwarnings("ignore:SHARP. after episode")
@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in METHODS), ("ER", "bf16")])
def test_photographs_are_learned(name: str, precision: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream, began = photographs(cache), time.monotonic()
    result = played(name, stream, "cuda", precision)
    with capsys.disabled():
        of = f"class-IL {result.average_accuracy:.3f}, newest task {float(result.accuracy.diagonal().mean()):.3f}"
        print(f"\n{name} {precision}: {time.monotonic() - began:.1f} s, {of}")
    assert float(result.task_accuracy.diagonal().mean()) > 0.5  # of two classes, right after they were learned
