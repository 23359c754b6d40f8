"""Eight runs at a time that write to an MLflow server on PostgreSQL: all that they wrote is there."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from clstream.cli import main

psycopg2 = pytest.importorskip("psycopg2")
sys.path.append(str(Path(__file__).parent.parent))
from outages import Server  # noqa: E402

WRITERS = 8
GRID = f"""\
stream: {{class_path: blobs, init_args: {{train_per_class: 60}}}}
strategy: Replay
model: {{class_path: Mlp, init_args: {{hidden: [8]}}}}
evaluate_every: 2
sweep: {{seed: 0-{WRITERS - 1}}}
"""


def program(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs; Debian has them beside each other, by version."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(places[-1]) if places else None)


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URI of an empty database of a server of the test's own, on loopback; as root it runs as nobody, since it must."""
    initdb, postgres = program("initdb"), program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed")
    root = getpass.getuser() == "root"
    as_nobody = {"user": "nobody", "group": "nogroup"} if root else {}
    folder = Path(tempfile.mkdtemp(prefix="clstream-postgresql-"))  # pytest's own are not open to others
    if root:
        shutil.chown(folder, "nobody", "nogroup")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(folder / "data")
    subprocess.run([initdb, "-D", data, "-U", "clstream", "-A", "trust"], check=True, capture_output=True, cwd=folder, **as_nobody)
    settings = ("fsync=off", "listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={folder}")
    with (folder / "log").open("ab") as log:
        command = [postgres, "-D", data, *(word for setting in settings for word in ("-c", setting))]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_nobody)  # type: ignore[call-overload]
    try:
        until = time.monotonic() + 60
        while True:
            try:
                connection = psycopg2.connect(host="127.0.0.1", port=port, user="clstream", dbname="postgres")
                break
            except psycopg2.OperationalError:
                assert time.monotonic() < until and process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE mlflow")
        connection.close()
        yield f"postgresql+psycopg2://clstream@127.0.0.1:{port}/mlflow"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_eight_writers_at_a_time_lose_nothing(postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server", postgresql)
    server.start()
    try:
        assert main(["sweep", "grid.yaml", "--workers", str(WRITERS), "--tracking_uri", server.uri]) == 0
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("clstream")
        (parent,) = client.search_runs([experiment.experiment_id], "tags.sweep = 'grid'")
        children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * (WRITERS + 1)
        assert sorted(int(run.data.params["seed"]) for run in children) == list(range(WRITERS))
        journals = {seed: next(tmp_path.glob(f"sweeps/grid/runs/*/seed_{seed}/tracking.jsonl")) for seed in range(WRITERS)}
        points = 0
        for run in children:
            entries = [json.loads(line) for line in journals[int(run.data.params["seed"])].read_text().splitlines()]
            written = {
                (name, step): value for entry in entries if entry.get("do") == "metrics" for name, step, value in entry["points"]
            }
            histories = {name: client.get_metric_history(run.info.run_id, name) for name in {name for name, _ in written}}
            there = [(name, point.step, point.value) for name, history in histories.items() for point in history]
            assert len(there) == len(written) and {(name, step): value for name, step, value in there} == written
            assert histories.keys() == run.data.metrics.keys()
            points += len(written)
        assert points > 100 * WRITERS
        print(f"{points} points of {WRITERS} runs read back")
    finally:
        server.kill()
