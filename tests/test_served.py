"""A strategy as an MLflow model: what is logged, registered and served is what the strategy answers."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from clstream.strategies import EWC, Finetune, Replay
from forked import fork_server
from mlflow.tracking import MlflowClient
from saved_module import MyNet, MyStrategy
from torch import Tensor, nn
from tracked_runs import Stops

from clstream import Strategy, run
from clstream.bus import ObserverError
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.models import Mlp
from clstream.strategy.served import ServedStrategy
from clstream.tracking import MlflowTracker
from clstream.tracking.mlflow_store import Sender
from clstream.tracking.outbox import Outbox

pytestmark = pytest.mark.slow

STREAM = replace(example_stream(), class_names=("ant", "bee", "cat", "dog", "eel", "fox"))
X = STREAM.tasks[1].test[:].x


def logged(store: str, strategy: Strategy, when: str = "end", **options: Any) -> str:
    run(strategy, STREAM, tracker := MlflowTracker("served", store, folder="run", log_model=when, **options))
    assert tracker.run_id is not None
    return tracker.run_id


def model_folder(store: str, name: str, version: int = 1) -> Path:
    """Return the folder of a registered model: where a file of SQLite keeps artifacts, they are files."""
    uri = MlflowClient(store).get_model_version_download_uri(name, str(version))
    return Path(uri.removeprefix("file://"))


def same(answer: dict[str, Any], strategy: Strategy, x: Tensor = X) -> None:
    """Check that an answer is the strategy's, to the last bit."""
    assert answer["prediction"] == strategy.predict(x).tolist()
    scores = [[-torch.inf if value is None else value for value in row] for row in answer["scores"]]
    assert torch.equal(torch.tensor(scores), strategy.scores(x))
    assert torch.equal(torch.tensor(answer["novelty"]), strategy.novelty(x))


def test_a_run_logs_its_strategy_and_registers_it(store: str) -> None:
    strategy = Replay(example_model(), active_classes="seen")
    run_id = logged(store, strategy)
    client = MlflowClient(store)
    (version,) = client.search_model_versions("name = 'Replay-example'")
    assert (int(version.version), version.run_id, dict(version.tags)) == (1, run_id, {"sessions": "3", "seed": "0"})
    folder = model_folder(store, "Replay-example")
    card = yaml.safe_load((folder / "MLmodel").read_text())
    assert card["flavors"]["python_function"]["loader_module"] == "clstream.strategy.served"
    assert card["metadata"]["known_classes"] == [0, 1, 2, 3, 4, 5] and card["metadata"]["class_names"][2] == "cat"
    packages = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert packages == {"clstream", "mlflow", "numpy", "torch"}
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pickle")]
    assert (folder / "input_example.json").exists()
    model = mlflow.pyfunc.load_model(str(folder))
    answer = model.predict(X.numpy())
    same(answer, strategy)
    assert answer["known_classes"] == [0, 1, 2, 3, 4, 5] and answer["known_names"] == list(STREAM.class_names)
    assert answer["names"] == [STREAM.class_names[label] for label in answer["prediction"]]
    outputs = model.metadata.signature.outputs.to_dict()
    assert [column["name"] for column in outputs] == list(answer)
    assert [column["type"] for column in outputs] == ["array"] * 6 and outputs[0]["items"]["type"] == "long"
    with_task = model.predict(X.numpy(), params={"task": 1})
    assert with_task["prediction"] == strategy.predict(X, STREAM.tasks[1]).tolist()
    with pytest.raises(Exception, match="there is no task 9: the strategy has the tasks 0, 1, 2"):
        model.predict(X.numpy(), params={"task": 9})
    with pytest.raises(Exception, match=r"(?i)shape|type"):
        model.predict(X.numpy().astype(np.float32)[:, :, :5])
    assert not (Path("run") / "model").exists()  # it was sent


def test_each_session_is_a_version(store: str) -> None:
    strategy = EWC(example_model(), strength=1.0, active_classes="seen")
    run_id = logged(store, strategy, "sessions", model_name="mine")
    again = {"name": "mine", "path": "model_002", "tags": {"sessions": "2", "seed": "0"}}  # as of a run that was resumed before it
    Sender(Outbox({"uri": store, "experiment": "served", "key": "resumed"}), store).register(run_id, again)
    versions = MlflowClient(store).search_model_versions("name = 'mine'")
    assert {int(version.version): version.tags["sessions"] for version in versions} == {1: "1", 2: "2", 3: "3"}
    answers = [ServedStrategy(model_folder(store, "mine", n) / "data" / "strategy").predict(X.numpy()) for n in (1, 2, 3)]
    assert [answer["known_classes"] for answer in answers] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert set(answers[0]["prediction"]) <= {0, 1} and answers[0]["scores"][0][2:] == [None] * 4
    same(answers[2], strategy)


def test_a_run_that_fails_logs_no_model_at_its_end(store: str) -> None:
    tracker = MlflowTracker("served", store, log_model="end")
    with pytest.raises(RuntimeError):
        run(Finetune(example_model()), STREAM, tracker, Stops(RuntimeError("out")))
    assert not MlflowClient(store).search_registered_models()


def test_what_is_not_to_be_logged_is_refused_before_anything_is_learned(store: str) -> None:
    with pytest.raises(ValueError, match="log_model must be one of"):
        MlflowTracker("served", store, log_model="always")
    strategy: Any = Finetune(example_model())
    strategy.model.register_forward_hook(lambda module, given, result: result)
    with pytest.raises(ObserverError, match=r"the strategy can't be logged as a model: Finetune.model has hooks"):
        logged(store, strategy)

    class Script(Mlp):
        """As if a script had defined it."""

    Script.__module__, Script.__qualname__ = "__main__", "Script"
    with pytest.raises(ObserverError, match="Script is written in a script, which would run where it is served"):
        logged(store, Finetune(Script((1, 8, 8), 6)))
    assert not MlflowClient(store).search_registered_models()


def test_values_and_several_labels_are_answered() -> None:
    for target, names in (("value", []), ("multilabel", [])):
        stream = example_stream(target=target)
        strategy = Finetune(example_model())
        run(strategy, stream)
        served = ServedStrategy(strategy.save(Path("saved") / target))
        x = stream.tasks[0].test[:].x
        answer = served.predict(x.numpy(), {"threshold": 0.9})
        expected = strategy.predict(x, None, 0.9) if target == "multilabel" else strategy.predict(x)
        assert torch.equal(torch.tensor(answer["prediction"]), expected) and answer["names"] == names
        assert (answer["novelty"] is None) == (target == "value")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def serve(folder: str, port: int) -> None:
    """Be the server that `mlflow models serve --env-manager local` starts, in a process without the tests' folder on its path."""
    import uvicorn

    sys.path[:] = [place for place in sys.path if not place.endswith("tests")]
    sys.modules.pop("saved_module", None)
    os.environ["__pyfunc_model_path__"] = folder  # noqa: SIM112  # as MLflow calls it
    from mlflow.pyfunc.scoring_server.app import app

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


@pytest.fixture
def mine(store: str) -> Iterator[tuple[Strategy, str]]:
    """A strategy of the user's own on the user's own network, and the address where it is served."""
    from clstream.seeds import isolated

    with isolated(0, "model"):
        model: nn.Module = MyNet()
    strategy = MyStrategy(model)
    logged(store, strategy)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = fork_server().Process(target=serve, args=(str(model_folder(store, "MyStrategy-example")), port))
    process.start()
    yield strategy, f"http://127.0.0.1:{port}"
    process.kill()
    process.join()


def test_a_server_answers_as_the_strategy_does(mine: tuple[Strategy, str]) -> None:
    strategy, address = mine
    until = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/ping", timeout=5).close()
            break
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < until, "the server doesn't answer"
            time.sleep(0.1)
    body = json.dumps({"inputs": X.tolist()}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)["predictions"]
    same(answer, strategy)
    assert answer["known_classes"] == [0, 1, 2, 3, 4, 5]


def test_the_command_line_logs_a_model(store: str) -> None:
    options = ["--stream", "blobs", "--max_sessions", "1", "--strategy", "Finetune", "--threads", "1", "--tracking_uri", store]
    assert main(["run", *options, "--log_model", "true"]) == 0
    (version,) = MlflowClient(store).search_model_versions("name = 'Finetune-blobs'")
    served = ServedStrategy(model_folder(store, "Finetune-blobs") / "data" / "strategy")
    assert len(served.predict(np.zeros((2, 20), np.float32))["prediction"]) == 2
    assert main(["run", *options, "--log_model", "true", "--track", "false"]) == 2
    assert version.tags["sessions"] == "1"
