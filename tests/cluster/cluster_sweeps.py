"""Sweeps for the tests on clusters: a grid of slow runs, and who is at work on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from clstream.cli import main
from clstream.comparison import read_records

GRID = """\
stream: {class_path: blobs, init_args: {train_per_class: 60, epochs: 4}}
strategy: slow_replay.SlowReplay
model: {class_path: Mlp, init_args: {hidden: [8]}}
track: false
checkpoint_every: 0.5
checkpoint_share: 1
sweep:
  strategy.capacity: [20, 40]
  seed: 0-3
"""
SLOW = """\
import os
import time
from pathlib import Path
import clstream.strategies as zoo


class SlowReplay(zoo.Replay):
    '''Replay at its leisure, once there is a folder `workers`, in which it leaves the number of its process.'''

    def learn(self, batch):
        if Path("workers").exists():
            Path("workers", str(os.getpid())).touch()
            time.sleep(0.03)
        return super().learn(batch)
"""


def serial_sweep(place: Path) -> dict[str, list[list[float | None]]]:
    """Write the grid and its strategy, and return what a sweep in this process measures; later ones are slow."""
    (place / "grid.yaml").write_text(GRID)
    (place / "slow_replay.py").write_text(SLOW)
    assert main(["sweep", "grid.yaml", "--workers", "1", "--sweeps", "serial"]) == 0
    (place / "workers").mkdir()
    return measured(place / "serial" / "grid")


def measured(folder: Path) -> dict[str, list[list[float | None]]]:
    """Return the matrices of a sweep by identity; each has ended once, and well."""
    records = read_records(folder)
    assert len({record.identity for record in records}) == len(records) == 8
    assert [record.error for record in records] == [""] * 8
    assert len(list(folder.glob("runs/*/seed_*/finished"))) == 8
    return {record.identity: record.matrix for record in records}


class KillInMidSweep(threading.Thread):
    """Kills when a record of the sweep is there, and a process that it picks is at work on a run.

    Args:
        records: the file of the sweep.
        picks: whether a process, by its number, is one to kill for.
        kill: kills it, or what it is on.

    """

    def __init__(self, records: Path, picks: Callable[[int], bool], kill: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self.records, self.picks, self.kill = records, picks, kill
        self.killed: int | None = None

    def run(self) -> None:
        """Watch, and kill once."""
        while not (self.records.exists() and self.records.read_text().count("\n") >= 2):
            time.sleep(0.05)
        for file in self.records.parent.parent.parent.glob("workers/*"):
            file.unlink()
        while self.killed is None:
            time.sleep(0.05)
            for file in self.records.parent.parent.parent.glob("workers/*"):
                if self.killed is None and psutil.pid_exists(int(file.name)) and self.picks(int(file.name)):
                    self.killed = int(file.name)
        time.sleep(0.3)
        self.kill(self.killed)


def is_below(number: int, ancestor: int) -> bool:
    """Return whether a process was started by another one, or by one that was."""
    try:
        return ancestor in [parent.pid for parent in psutil.Process(number).parents()]
    except psutil.Error:
        return False
