"""A sweep on a Dask cluster, one of whose workers is killed while it goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clstream.cli import main

pytest.importorskip("distributed")
pytest.importorskip("psutil")
sys.path.append(str(Path(__file__).parent))
from cluster_sweeps import KillInMidSweep, measured, serial_sweep


@pytest.fixture
def workers() -> Iterator[Any]:
    """A real cluster on loopback: a scheduler, and two workers in processes of their own."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def test_a_worker_that_is_killed_takes_no_run_along(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_replay", raising=False)
    serial = serial_sweep(tmp_path)
    numbers = {worker.pid for worker in workers.workers.values()}
    killer = KillInMidSweep(
        tmp_path / "sweeps" / "grid" / "records.jsonl", numbers.__contains__, lambda number: os.kill(number, signal.SIGKILL)
    )
    killer.start()
    address = workers.scheduler_address.removeprefix("tcp://")
    assert main(["sweep", "grid.yaml", "--engine", "dask", "--address", address]) == 0
    assert killer.killed in numbers
    assert measured(tmp_path / "sweeps" / "grid") == serial


def test_workers_with_several_threads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distributed import LocalCluster

    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("stream: blobs\ntrack: false\nsweep: {seed: 0-1}\n")
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None) as cluster:
        assert main(["sweep", "grid.yaml", "--engine", "dask", "--address", cluster.scheduler_address]) == 1
    assert "start workers with --nthreads 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "sentence"),
    [("127.0.0.1:1", "no Dask cluster answers at 127.0.0.1:1"), ("somewhere", "HOST:PORT"), ("nowhere.invalid:80", "answers")],
)
def test_a_cluster_that_does_not_answer_is_said_in_a_sentence(
    address: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("stream: blobs\ntrack: false\nsweep: {seed: 0-1}\n")
    assert main(["sweep", "grid.yaml", "--engine", "dask", "--address", address]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
