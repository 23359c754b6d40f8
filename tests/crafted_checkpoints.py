"""What crafted checkpoints are made for: a strategy that calls what it holds, and things that must not be called."""

from __future__ import annotations

import subprocess  # noqa: F401  # what a checkpoint may try to find here
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clstream
from clstream import Batch, BatchLearned, Samples, Strategy, on, run
from clstream.checkpoint import newest
from clstream.checkpoint.store import FORMAT, files, save
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import Reservoir
from clstream.seeds import isolated

MARKER = Path("code-was-run")
STREAM = example_stream((0, 1))


def shell(*arguments: object, **options: object) -> str:
    """What an attacker would like to have called: it is the user's own function, which no run holds."""
    MARKER.touch()
    return ""


class Tool:
    """A class of the user's own module whose making and ending does something."""

    def __init__(self, *arguments: object) -> None:
        MARKER.touch()

    def __new__(cls, *arguments: object) -> Tool:
        MARKER.touch()
        return object.__new__(cls)

    def __call__(self, *arguments: object) -> Tensor:
        MARKER.touch()
        return torch.zeros(())

    def __setstate__(self, state: object) -> None:
        MARKER.touch()

    def __reduce__(self) -> Any:
        MARKER.touch()


class Ends:
    """Another one, whose end does something."""

    def __del__(self) -> None:
        if vars(self):
            MARKER.touch()


class Victim(Strategy):
    """Calls what it holds, as many strategies do: an activation, a step, a method of its own, a memory's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.memory, self.activation, self.notes, self.scale = Reservoir(20), F.relu, [1.0], torch.ones(6)
        self.step = self.plainly
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def plainly(self, value: Tensor) -> Tensor:
        return value

    def rate(self, step: int) -> float:
        return 1.0

    def loss(self, samples: Samples) -> Tensor:
        outputs = self.activation(self.logits(samples) * self.scale)
        return self.step(F.cross_entropy(outputs, samples.y))

    def learn(self, batch: Batch) -> Tensor:
        loss = super().learn(batch)
        self.schedule.step()
        return loss

    @on(BatchLearned)
    def keep(self, event: BatchLearned) -> None:
        self.memory.add(event.batch.samples)
        self.memory.sample(2)


def victim() -> Victim:
    with isolated(0, "strategy"):
        return Victim(example_model())


def written() -> dict[str, Any]:
    """The state of a run that was cut after a few batches, as its file has it."""
    recorder = Checkpoints()
    run(victim(), STREAM, recorder)
    versions = {"clstream": clstream.__version__, "torch": str(torch.__version__)}
    return dict(recorder.load(4)) | versions | {"format": FORMAT, "threads": 1}


Edit = Callable[[dict[str, Any]], object]


def node(state: dict[str, Any], path: str) -> dict[str, Any]:
    return next(entry for entry in state["strategy"]["nodes"] if entry["path"] == path)


def append(state: dict[str, Any], /, **content: Any) -> list[Any]:
    """Add an object to a checkpoint, and return what refers to it."""
    nodes = state["strategy"]["nodes"]
    nodes.append({"path": f"Victim.evil{len(nodes)}", **content})
    return ["node", len(nodes) - 1]


def put(state: dict[str, Any], name: str, value: Any) -> None:
    node(state, "Victim")["attributes"][name] = value


def resumer(checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return what edits a checkpoint, writes it with a right hash, goes on from it, and returns the sentence that refused it."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def resume(edit: Edit, *observers: object) -> str:
        state = deepcopy(checkpoint) | {"threads": threads}
        edit(state)
        for old in files(tmp_path):
            old.unlink()
        save(state, tmp_path, 1)
        strategy = victim()
        with pytest.raises(ValueError) as refused:  # noqa: PT011  # its text is looked at by each test
            run(strategy, STREAM, *observers, resume=newest(tmp_path))
        assert not MARKER.exists(), "a checkpoint ran code"
        text = str(refused.value)
        assert 20 < len(text) < 500 and "\n" not in text
        return text

    return resume
