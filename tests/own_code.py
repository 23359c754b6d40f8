"""A module of the user's own, that is edited, imported and run."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from clstream.streams import blobs

from clstream import BatchLearned, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.models import Mlp
from clstream.serialization.source_code import definitions, user_sources

MINE = '''
"""A method of my own."""

import signal
from pathlib import Path

from torch import Tensor, nn

from clstream import BatchLearned, Samples, on
from clstream.strategies import Finetune

FACTOR = 1.0


class Mine(Finetune):
    """Scales its loss."""

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss."""
        return super().loss(samples) * FACTOR

    @on(BatchLearned)
    def stop(self, event: BatchLearned) -> None:
        if event.batch.index == 2 and Path("stop").exists():
            Path("stop").unlink()
            signal.raise_signal(signal.SIGINT)


class Counts:
    """An observer."""

    def __init__(self) -> None:
        self.batches = 0

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.batches += 1
'''


def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a working folder from which modules are imported, and leave no trace."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second of the last one is seen
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path
    places = {
        name: f"{vars(sys.modules[name]).get('__file__')} {vars(sys.modules[name]).get('__path__')}"
        for name in set(sys.modules) - before
    }
    forget(*(name for name, place in places.items() if str(tmp_path) in place))


def forget(*names: str) -> None:
    for name in names:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    linecache.clearcache()


def load(name: str = "mine") -> ModuleType:
    """Import a module as a new process would."""
    forget(*[loaded for loaded in sys.modules if loaded.partition(".")[0] == name.partition(".")[0]])
    return importlib.import_module(name)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def sources(*values: object) -> dict[str, str]:
    return {name: source.text for name, source in user_sources(definitions(*values)).items()}


class Stop:
    """Ends a run after some batches."""

    def __init__(self, batches: int = 3) -> None:
        self.left = batches

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def strategy(module: ModuleType, **options: object):
    torch.manual_seed(0)
    return module.Mine(Mlp(20, 4, hidden=(8,)), **options)


def stream(**options):
    return blobs(tasks=2, classes=4, train_per_class=20, **options)


def start(*observers: object, built=None, over=None, **options) -> None:
    """Run what is in mine.py for some batches."""
    with pytest.raises(KeyboardInterrupt):
        run(built or strategy(load()), over or stream(), Checkpointer("run", every_batches=1), *observers, Stop(), **options)


def go_on(*observers: object, built=None, over=None, **options):
    return run(built or strategy(load()), over or stream(), Checkpointer("run"), *observers, resume=newest("run"), **options)
