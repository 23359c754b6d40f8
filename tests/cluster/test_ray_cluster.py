"""A sweep on a Ray cluster of two nodes, one of which is lost while it goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clstream.cli import main

pytest.importorskip("ray")
pytest.importorskip("psutil")
sys.path.append(str(Path(__file__).parent))
from cluster_sweeps import KillInMidSweep, is_below, measured, serial_sweep


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A real cluster on loopback, with processes of its own for each node: its head, and a second node of one core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine leaves them no time
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    yield cluster, second
    cluster.shutdown()


def test_a_node_that_is_lost_takes_no_run_along(
    nodes: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, second = nodes
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_replay", raising=False)
    serial = serial_sweep(tmp_path)
    (raylet,) = second.all_processes["raylet"]
    killer = KillInMidSweep(
        tmp_path / "sweeps" / "grid" / "records.jsonl",
        lambda number: is_below(number, raylet.process.pid),
        lambda _: cluster.remove_node(second, allow_graceful=False),
    )
    killer.start()
    assert main(["sweep", "grid.yaml", "--engine", "ray", "--address", cluster.address]) == 0
    assert killer.killed is not None and raylet.process.poll() is not None
    assert "8 runs, as many as the cluster has cores at a time" in capsys.readouterr().out
    assert measured(tmp_path / "sweeps" / "grid") == serial
