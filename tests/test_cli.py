"""The command line, as a user types it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from clstream.cli import main
from clstream.cli.parser import parse_run
from clstream.cli.ui import relay_errors

OWN = '''
from __future__ import annotations

import torch
from torch import Tensor, nn

from clstream import Batch, Samples, SessionEnded, Strategy, Stream, Task, TaskEnded, on


class Mine(Strategy):
    """A strategy of my own."""

    def __init__(self, model: nn.Module, strength: float = 0.5) -> None:
        super().__init__(model)
        self.strength = strength

    @on(TaskEnded)
    def end(self, event: TaskEnded) -> None:
        pass


class Wrap(Strategy):
    """Wraps any other."""

    def __init__(self, base: Strategy, delta: float = 0.1) -> None:
        super().__init__(base.model)
        self.base, self.delta, self.parts = base, delta, (base,)

    def learn(self, batch: Batch) -> Tensor:
        return self.base.learn(batch)


class Sessions:
    """Counts sessions, and draws them."""

    def __init__(self, by: int = 1) -> None:
        self.by, self.seen = by, 0

    @on(SessionEnded)
    def count(self, event: SessionEnded) -> None:
        self.seen += self.by
        print(f"session {self.seen} of mine")


class Explodes(Strategy):
    """Its loss is not finite."""

    def loss(self, samples: Samples) -> Tensor:
        return super().loss(samples) * float("inf")


class Net(nn.Module):
    """A module of my own."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def points(per_class: int = 20) -> Stream:
    """A stream of my own."""
    def samples() -> Samples:
        y = torch.tensor([0, 1]).repeat(per_class)
        return Samples(torch.randn(len(y), 2) + 5 * y[:, None], y)
    return Stream("points", [Task(0, (0, 1), samples(), samples())])
'''


@pytest.fixture
def own(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an MLflow store and a file of the user's own."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("x = (")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return " ".join((captured.err if status else captured.out).split())


BLOBS = ("run", "--stream", "blobs", "--stream.train_per_class", "20", "--model.hidden", "[16]")


def test_run_prints_a_table_and_tracks(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 0, *BLOBS, "--strategy", "Replay", "--strategy.capacity", "30", "--seeds", "0,1")
    assert "Replay on blobs" in text and "standard deviation over 2 seeds" in text
    assert "task 4" in text and "clstream ui" in text
    client = MlflowClient(f"sqlite:///{own}/mlflow.db")
    experiment = client.get_experiment_by_name("clstream")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [
        "Replay on blobs, 2 seeds",
        "Replay on blobs, seed 0",
        "Replay on blobs, seed 1",
    ]
    child = next(run for run in runs if run.info.run_name.endswith("seed 1"))
    assert child.data.params["strategy.capacity"] == "30" and child.data.params["model.hidden"] == "[16]"
    parent = next(run for run in runs if run.info.run_name.endswith("seeds"))
    for name in ("accuracy/mean", "final/forgetting"):
        accuracies = [run.data.metrics[name] for run in runs if run is not parent]
        assert parent.data.metrics[name] == pytest.approx(sum(accuracies) / 2)


@pytest.mark.slow
def test_compare_draws_the_strategies_against_each_other(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in {"a": "Replay, capacity: 10", "b": "Replay, capacity: 20", "c": "Finetune"}.items():
        method, _, rest = options.partition(", ")
        (own / f"{name}.yaml").write_text(f"strategy: {{class_path: {method}, init_args: {{{rest}}}}}\n")
    text = said(capsys, 0, "compare", "a.yaml", "b.yaml", "c.yaml", "--seeds", "0,1", *BLOBS[1:])
    assert "Replay on blobs (a)" in text and "Replay on blobs (b)" in text and "Finetune on blobs " in text
    client = MlflowClient(f"sqlite:///{own}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("clstream").experiment_id], "attributes.run_name LIKE 'comparison%'")
    assert [run.info.run_name for run in runs] == ["comparison of Replay (a), Replay (b), Finetune"]


def test_a_table_that_goes_to_a_file_is_not_cut(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    name = "AStrategyWhoseNameIsLongerThanThirtyColumns"
    (own / "long.py").write_text(f"from clstream.strategies import Finetune\n\n\nclass {name}(Finetune):\n    pass\n")
    assert main([*BLOBS, "--track", "false", "--checkpoint_every", "0", "--strategy", f"long.{name}"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 1 and f"{name} on blobs" in rows[0] and "…" not in rows[0]


@pytest.mark.slow
def test_the_ui_says_what_it_cannot_do(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is nothing at sqlite:///" in said(capsys, 1, "ui", "--tracking_uri", "sqlite:///missing.db")
    assert "there is no run in the store" in said(capsys, 1, "ui")
    assert "--port must be from 1 to 65535, not 70000" in said(capsys, 2, "ui", "--port", "70000")
    assert main([*BLOBS, "--checkpoint_every", "0", "--max_sessions", "1"]) == 0
    capsys.readouterr()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"can't use port {port} of 127.0.0.1 (Address already in use): choose another with --port" in said(
            capsys, 1, "ui", "--port", str(port)
        )
    assert "there is no run in nothing" in said(capsys, 1, "ui", "--experiment", "nothing")


def test_of_the_servers_log_the_errors_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    log = (
        "Registry store URI not provided. Using backend store URI.\n"
        "[MLflow] Security middleware enabled with default settings (localhost-only).\n"
        "/x/fastapi_app.py:23: StarletteDeprecationWarning: starlette.middleware.wsgi is deprecated\n"
        "  from starlette.middleware.wsgi import WSGIResponder\n"
        "2026/11/27 00:09:56 INFO:     Started server process [12920]\n"
        "2026/11/27 00:09:57 ERROR:    Exception in ASGI application\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\n'
        "OSError: no space left\n"
        '2026/11/27 00:09:58 INFO:     127.0.0.1:1 - "GET / HTTP/1.1" 200 OK\n'
    )
    relay_errors(log.splitlines(keepends=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].endswith("Exception in ASGI application") and lines[-1] == "OSError: no space left"


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers_and_seeds_differ(own: Path) -> None:
    client = MlflowClient(f"sqlite:///{own}/mlflow.db")
    for experiment, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main([*BLOBS, "--seed", seed, "--experiment", experiment]) == 0
    a, b, c = (client.search_runs([client.get_experiment_by_name(name).experiment_id])[0].data.metrics for name in ("a", "b", "c"))
    timed = {name for name in a if "second" in name or "peak" in name}
    assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    assert a["loss"] != c["loss"]


def test_own_strategy_stream_and_model(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--strategy", "mine.Mine", "--strategy.strength", "0.25", "--stream", "mine.points", "--model", "mine.Net")
    assert "Mine on points" in said(capsys, 0, "run", *given, "--stream.per_class", "30", "--model.width", "4", "--track", "false")
    assert not (own / "mlruns").exists()


@pytest.mark.slow
def test_own_observers_watch_each_run(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "seen.yaml").write_text("observers: [mine.Sessions, clstream.online_metrics.Detection]\nseeds: [0, 1]\ntrack: false\n")
    text = said(capsys, 0, *BLOBS, "--config", "seen.yaml")
    assert text.count("session 1 of mine") == text.count("session 5 of mine") == 2 and "session 6 of mine" not in text
    assert "session 1 of mine" in said(capsys, 0, *BLOBS, "--observers", "mine.Sessions", "--track", "false")


@pytest.mark.slow
def test_a_wrapper_takes_any_strategy(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = ("--strategy.base", "Replay", "--strategy.base.capacity", "7", "--strategy.base.optimizer.lr", "0.05")
    assert "Wrap on blobs" in said(capsys, 0, *BLOBS, "--strategy", "mine.Wrap", *inner, "--stream.boundaries", "false")
    client = MlflowClient(f"sqlite:///{own}/mlflow.db")
    params = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])[0].data.params
    assert params["strategy.base"] == "Replay" and params["strategy.base.capacity"] == "7"
    assert params["strategy.base.optimizer"] == "SGD(lr=0.05)"
    hidden = said(capsys, 1, *BLOBS, "--strategy", "mine.Wrap", "--strategy.base", "mine.Mine", "--stream.boundaries", "false")
    assert "Wrap needs boundaries, which blobs hides (Mine.end handles TaskEnded)" in hidden


def test_config_file_and_command_line_mix(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "run.yaml").write_text("stream: {class_path: blobs, init_args: {tasks: 2}}\nstrategy: Finetune\nseed: 5\n")
    assert main(["run", "--config", "run.yaml", "--stream.epochs", "3", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["stream"]["class_path"] == "clstream.streams.blobs"
    assert config["stream"]["init_args"]["tasks"] == 2 and config["stream"]["init_args"]["epochs"] == 3
    assert config["strategy"]["class_path"] == "clstream.strategies.Finetune" and config["seed"] == 5
    (own / "again.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", "--config", "again.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == config


def test_defaults_of_one_stream_do_not_leak_into_another() -> None:
    _, options = parse_run(["--stream", "blobs"])
    assert options.stream.init_args.epochs == 1  # split_digits, the default stream, has 10
    _, options = parse_run([])
    assert options.stream.init_args.epochs == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--sed", "3"], "unknown option --sed: did you mean --seed?"),
        (["run", "--stream", "split_mnits"], "there is no stream 'split_mnits': did you mean split_mnist?"),
        (["run", "--strategy", "Repaly"], "there is no strategy 'Repaly': did you mean Replay?"),
        (["run", "--model", "Mpl"], "there is no model 'Mpl': did you mean Mlp?"),
        (["run", "--strategy.capacty", "3"], "Replay has no option 'capacty': did you mean capacity?"),
        (["run", "--stream", "blobs", "--stream.tsks", "3"], "blobs has no option 'tsks': did you mean tasks?"),
        (["run", "--stream.tasks", "many"], "--stream.tasks takes int, list[int] or list[list[int]], not many"),
        (["run", "--strategy.optimizer", "Adem"], "--strategy.optimizer: there is no 'Adem': did you mean Adam?"),
        (["run", "--strategy", "nowhere.Mine"], "there is no file or package 'nowhere' here"),
        (["run", "--strategy", "mine.Mime"], "mine.py has no 'Mime': did you mean Mine?"),
        (["run", "--strategy", "mine.Wrap", "--strategy.base", "Repla"], "there is no 'Repla': did you mean Replay?"),
        (["run", "--strategy.capacity", "abc"], "--strategy.capacity takes int, not abc"),
        (["run", "--strategy", "mine.Wrap"], "--strategy needs base: give --strategy.base"),
        (["run", "--strategy", "mine.points"], "mine.points is no strategy: it must be a class derived from clstream's Strategy"),
        (["run", "--stream", "mine.Mine"], "mine.Mine is no stream: it must be a function annotated to return one"),
        (["run", "--strategy", "./mine.Mine"], "is no name of a strategy"),
        (["run", "--strategy", "broken.Mine"], "broken can't be imported: SyntaxError"),
        (["run", "--seeds", "0", "1", "2"], "'1 2' belongs to no option"),
        (["run", "--seeds", "0,one"], "--seeds takes whole numbers"),
        (["run", "--seeds", "1,1"], "names one seed twice"),
        (["run", "--config", "missing.yaml"], "missing.yaml"),
        (["run", "--threads", "0"], "--threads must be at least 1"),
        (["run", "--observers", "mine.Sesions"], "mine.py has no 'Sesions': did you mean Sessions?"),
        (["run", "--observers", "mine.Net"], "mine.Net is no observer: it must be a class with methods marked @on(...)"),
        (["run", "--observers", "Sessions"], "--observers takes observers by their files, as my_file.Watch, not 'Sessions'"),
        (["run", "--observers", "mine.Mine"], "mine.Mine can't be made from the command line: its model has no default"),
        (["run", "--device", "gpu"], "--device takes cpu, cuda, cuda:1 or mps, not 'gpu': a GPU is called cuda"),
        (["run", "--epochs", "3"], "unknown option --epochs: did you mean --stream.epochs?"),
        (["run", "--lr", "0.1"], "unknown option --lr: did you mean --strategy.optimizer.lr?"),
        (["run", "--strategy", "Refresh", "--strategy.base", "[x]"], "--strategy.base takes the name of a Strategy, not ['x']"),
        (["run", "--evaluate_every", "0"], "--evaluate_every takes a whole number from 1 up, not 0"),
        (["ui", "--port", "abc"], "--port takes a whole number, not 'abc'"),
        (["rnu"], "there is no command 'rnu': did you mean run?"),
        (["compare", "missing.yaml"], "there is no config file missing.yaml"),
        (["verify", "er-split-mnits"], "there is no anchor 'er-split-mnits': did you mean er-split-mnist?"),
    ],
)
def test_what_is_asked_wrongly(own: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    text = said(capsys, 2, *arguments)
    assert text.startswith("clstream: error: ") and sentence in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--strategy", "PRD", "--stream.scenario", "domain"], "PRD is for tasks that bring new classes, and split_digits is"),
        (["--stream", "split_regression", "--strategy", "EWC", "--strategy.fisher", "predicted"], "fisher='predicted' squares the"),
        (
            ["--stream", "split_regression", "--strategy", "Replay", "--strategy.memory", "class_balanced"],
            "a class-balanced memory has shares of classes, and split_regression",
        ),
    ],
)
def test_what_a_strategy_refuses_when_the_run_starts_is_a_sentence(
    own: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["run", *arguments, "--track", "false", "--checkpoint_every", "0"]) == 1
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert last.startswith(f"clstream: error: {sentence}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stream", "blobs", "--stream.tasks", "30"], "10 classes make 1 to 10 tasks, not 30"),
        (["--stream", "blobs", "--stream.batch_size", "0"], "batch_size must be a whole number of at least 1"),
        (["--stream", "blobs", "--model", "ConvNet"], "ConvNet takes images"),
        (["--strategy.capacity", "0"], "capacity must be a whole number of at least 1"),
        (["--model.hidden", "[-5]"], "hidden[0] must be a whole number of at least 1, not -5"),
        (["--model.hidden", "[8,0]"], "hidden[1] must be a whole number of at least 1, not 0"),
    ],
)
def test_a_value_that_a_constructor_refuses_is_asked_wrongly(
    own: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert sentence in said(capsys, 2, "run", *arguments) and not (own / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cuda:77"], "there is no device 'cuda:77'"),
        (["--stream", "blobs", "--tune"], "holds back no validation samples"),
        (["--stream", "split_cifar10", "--data_root", "here"], "CIFAR10 is not in here, and could not be downloaded"),
        (["--stream", "blobs", "--tracking_uri", "http://127.0.0.1:9"], "does not answer"),
        (["--stream", "blobs", "--tracking_uri", "sqlite:////nowhere/at/all.db"], "missing or read-only"),
        (["--observers", "clstream.strategies.tame.routing.Routing"], "Routing watches TAME, not Replay"),
        (["--stream", "blobs", "--strategy", "mine.Explodes"], "the loss is inf in task 0, session 0, epoch 0, batch 0"),
    ],
)
def test_what_cannot_be_done(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    text = said(capsys, 1, "run", *arguments)
    assert text.splitlines()[-1].count("clstream: error: ") == 1 and sentence in text
    assert (own / "runs").exists() == ("mine.Explodes" in arguments or "--observers" in arguments)  # no folder for what can't run


def test_seeds_and_order_of_options_are_free(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "two.yaml").write_text("seeds: [0, 1]\nstream: {class_path: blobs, init_args: {train_per_class: 20}}\ntrack: false\n")
    text = said(capsys, 0, "run", "--config", "two.yaml", "--strategy.strength", "0.3", "--strategy", "mine.Mine")
    assert "Mine on blobs" in text and "over 2 seeds" in text
    assert "MLflow" not in text  # nothing was tracked, so nothing is to be seen there


@pytest.mark.slow
def test_compare_takes_options_of_the_configs_own_strategies(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "c.yaml").write_text("stream: {class_path: blobs, init_args: {train_per_class: 20}}\nstrategy: mine.Mine\n")
    assert "clstream ui" in said(capsys, 0, "compare", "c.yaml", "--strategy.strength", "0.3")
    assert "strength: 0.3" in said(capsys, 0, "compare", "c.yaml", "--strategy.strength", "0.3", "--print_config")
    assert "usage: clstream compare" in said(capsys, 0, "compare", "c.yaml", "--help")


def test_tune_asks_the_validation_samples(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Replay on blobs (validation)" in said(capsys, 0, *BLOBS, "--stream.validation", "0.25", "--tune", "--track", "false")


def test_list_names_everything_with_its_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 0, "list")
    for name in ("Replay", "Finetune", "Joint", "split_mnist", "blobs", "SlimResNet18", "er-split-mnist", "needs"):
        assert name in text
    assert "from_tensors" not in text  # it takes tensors, which no command line can give


def test_list_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert "clstream 0." in capsys.readouterr().out


@pytest.mark.slow
def test_compare_runs_each_config_with_the_same_options(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Finetune", "Replay"):
        (own / f"{name}.yaml").write_text(f"stream: {{class_path: blobs, init_args: {{train_per_class: 20}}}}\nstrategy: {name}\n")
    text = said(capsys, 0, "compare", "Finetune.yaml", "Replay.yaml", "--seeds", "0,1", "--track", "false")
    assert "Finetune on blobs" in text and "Replay on blobs" in text and "over 2 seeds" in text


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_keeps_what_was_measured(own: Path) -> None:
    """A real process, a real signal, in the middle of a run."""
    long = ("--stream.epochs", "100000", "--stream.sessions_per_task", "40")
    command = [sys.executable, "-m", "clstream.cli", *BLOBS, *long, "--threads", "1"]
    with subprocess.Popen(command, cwd=own, stderr=subprocess.PIPE, text=True) as process:
        try:
            client = MlflowClient(f"sqlite:///{own}/mlflow.db")
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                experiment = client.get_experiment_by_name("clstream")
                runs = client.search_runs([experiment.experiment_id]) if experiment else []
                if runs:
                    break
                time.sleep(0.2)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=300)
        finally:
            process.kill()  # if it has not ended by itself
    assert process.returncode == 130
    assert "Traceback" not in error and "stopped" in error
    assert client.get_run(runs[0].info.run_id).info.status == "KILLED"


def test_threads_are_set(own: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert main([*BLOBS, "--threads", "2", "--track", "false"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
