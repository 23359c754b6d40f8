"""`clstream tune`, as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from clstream.cli import main
from clstream.cli import searched as commands

pytestmark = pytest.mark.slow

pytest.importorskip("optuna")

OWN = '''
import gc
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream import Batch, BatchLearned, Strategy, Stream, on
from clstream.streams import from_tensors


def marked(validation: float = 0.0) -> Stream:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(40)
    x = torch.randn(240, 5, generator=draw).clamp(-3, 3) + 3 * torch.eye(6, 5)[y]
    x[200:, 0] = 5.8984375  # exactly, and no other tensor has it
    return from_tensors(x[:200], y[:200], x[200:], y[200:], tasks=3, batch_size=20, name="marked", validation=validation)


class Looks(Strategy):
    """Looks at each tensor that there is in the process, whoever holds it."""

    def __init__(self, model: nn.Module, optimizer=partial(SGD, lr=0.1), scale: float = 1.0) -> None:
        super().__init__(model, optimizer)
        self.scale = scale

    @on(BatchLearned)
    def look(self, event: BatchLearned) -> None:
        if event.batch.index:
            return
        tested = 0
        for value in gc.get_objects():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype == torch.float32
            real = plain and value.untyped_storage().device.type == "cpu"  # a compiler makes some without numbers
            if real and value.numel() >= 5:
                tested += int((torch.empty(0).set_(value.untyped_storage()) == 5.8984375).any())
        with Path("seen.txt").open("a") as file:
            file.write(f"{tested}\\n")


class Diverges(Strategy):
    """Its loss is not finite, if its scale is above 1; and it can't be built with one of 1 exactly."""

    def __init__(self, model: nn.Module, optimizer=partial(SGD, lr=0.1), scale: float = 0.5) -> None:
        super().__init__(model, optimizer)
        self.scale = scale

    def learn(self, batch: Batch) -> Tensor:
        loss = super().learn(batch)
        return loss * math.inf if self.scale > 1 else loss
'''


@pytest.fixture
def own(store: str, tmp_path: Path) -> Path:
    (tmp_path / "tuned_files.py").write_text(OWN)
    return tmp_path


def searched(folder: Path) -> Path:
    (search,) = (folder / "tunings").iterdir()
    return search


def test_no_trial_sees_a_test_sample_and_the_winner_is_run_on_them(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The strategy counts the tensors of the whole process that hold one: none in a search, some in the runs after it."""
    (own / "looks.yaml").write_text(
        "stream: tuned_files.marked\nstrategy: {class_path: tuned_files.Looks, init_args: {scale: 2.0}}\nmodel: Mlp\n"
        "model_hidden: 1\n".replace("model_hidden: 1\n", "")
        + "threads: 1\ntune: {optimizer.lr: [0.001, 0.5, log]}\n"
    )
    command = ["tune", "looks.yaml", "--model.hidden", "[8]", "--trials", "4", "--tasks", "2", "--held_out", "0.25"]
    assert main(command) == 0
    seen = (own / "seen.txt").read_text().split()
    assert len(seen) >= 4 and set(seen) == {"0"}
    (own / "seen.txt").unlink()
    capsys.readouterr()
    assert main([*command, "--seeds", "0,1", "--out", "winner.yaml"]) == 0  # the search is over: nothing is searched again
    printed = capsys.readouterr()
    assert "going on after 4 trials" in printed.out and "trial 4" not in printed.out and "over 2 seeds" in printed.out
    assert int((own / "seen.txt").read_text().split()[0]) > 0
    winner = yaml.safe_load((own / "winner.yaml").read_text())
    assert winner["tuned"] == "4 trials on 33 held-out training samples of the first 2 tasks of marked"
    assert winner["strategy"]["init_args"]["scale"] == 2.0 and winner["stream"]["init_args"] == {"validation": 0.0}
    assert 0.001 <= winner["strategy"]["init_args"]["optimizer"]["init_args"]["lr"] <= 0.5

    client = MlflowClient(f"sqlite:///{own}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    of_seeds = [run for run in runs if run.data.tags.get("tuned")]
    assert len(of_seeds) == 3 and {run.data.tags["tuned"] for run in of_seeds} == {winner["tuned"]}
    search = next(run for run in runs if run.info.run_name.startswith("tuning "))
    trials = sorted(
        (run for run in runs if run.data.tags.get("mlflow.parentRunId") == search.info.run_id), key=lambda run: run.info.run_name
    )
    assert [run.info.run_name for run in trials] == [f"trial {number}" for number in range(4)]
    best = max(run.data.metrics["held_out/average"] for run in trials if run.info.status == "FINISHED")
    assert search.data.metrics["held_out/best"] == best and search.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(search.info.run_id, "held_out/best")] == [1, 2, 3, 4]
    assert trials[0].data.params == {"optimizer.lr": "0.1"}  # what the strategy is by default
    assert {"history.png", "slices.png", "anytime.png"} <= {file.path for file in client.list_artifacts(search.info.run_id)}
    first = client.get_metric_history(trials[0].info.run_id, "anytime/mean")
    assert len(first) >= 4 and [point.step for point in first] == list(range(1, len(first) + 1))


def test_a_trial_that_diverges_is_the_worst_and_the_search_goes_on(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--strategy", "tuned_files.Diverges", "--stream", "tuned_files.marked", "--model.hidden", "[8]", "--track", "false"]
    (own / "space.yaml").write_text("strategy.scale: [0.1, 2.0]\n")
    assert main(["tune", *given, "--space", "space.yaml", "--trials", "6", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "diverged (the loss is inf in task 0" in printed
    winner = yaml.safe_load((searched(own) / "tuned.yaml").read_text())
    assert winner["strategy"]["init_args"]["scale"] <= 1
    (own / "space.yaml").write_text("strategy.scale: [1.5, 2.0]\n")
    assert main(["tune", *given, "--space", "space.yaml", "--trials", "2", "--folder", "none"]) == 1
    assert "no trial of 2 came to a good end; the last one: the loss is inf" in capsys.readouterr().err


def test_a_search_that_was_interrupted_goes_on(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["tune", "--stream", "split_digits", "--stream.epochs", "1", "--strategy", "DERpp", "--model.hidden", "[8]"]
    given += ["--tasks", "2", "--track", "false", "--threads", "1"]
    assert main([*given, "--trials", "4", "--folder", "whole"]) == 0
    play, played = commands.play, list[object]()

    def interrupted(*arguments: Any) -> object:
        played.append(arguments)
        if len(played) == 3:
            raise KeyboardInterrupt
        return play(*arguments)

    capsys.readouterr()
    monkeypatch.setattr(commands, "play", interrupted)
    assert main([*given, "--trials", "4"]) == 130
    assert "stopped after 2 trials: the same command goes on" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(own)
    assert main([*given, "--trials", "4"]) == 0
    whole, stopped = (
        [line for line in (folder / "tuned.yaml").read_text().splitlines() if line[0] != "#"]
        for folder in (own / "whole", searched(own))
    )
    assert whole == stopped and "tuned: 4 trials on 54 held-out training samples of the first 2 tasks of split_digits" in whole
    assert [line.strip() for line in whole if line.strip().startswith(("alpha", "beta", "lr"))]


SPACES = {
    "empty": "",
    "stream": "stream.epochs: [1, 5]",
    "typo": "strategy.capaciti: [10, 50]",
    "range": "strategy.capacity: [50, 10]",
    "kind": "strategy.capacity: [0.5, 10.5]",
    "place": "seed: [0, 5]",
    "package": "strategy.optimizer: [torch.optim.Adam, pytest.Item]",
}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--trials", "0"], 2, "--trials must be at least 1, not 0"),
        (["--seconds", "-1"], 2, "--seconds must be above 0, not -1"),
        (["--workers", "0"], 2, "--workers must be at least 1, not 0"),
        (["--held_out", "1"], 2, "--held_out must be a share between 0 and 1, not 1"),
        (["--tasks", "9"], 1, "tasks must be a whole number from 1 to 5 or None, not 9"),
        (["--space", "absent.yaml"], 2, "there is no space absent.yaml"),
        (["--space", "empty.yaml"], 2, "the space empty.yaml is empty"),
        (["--space", "stream.yaml"], 2, "stream.epochs can't be searched: the stream is what is tuned on"),
        (["--space", "typo.yaml"], 2, "strategy.capaciti, and Replay has no option 'capaciti': did you mean capacity?"),
        (["--space", "range.yaml"], 2, "the search space of strategy.capacity: a range goes from a lower number to a higher one"),
        (["--space", "kind.yaml"], 2, "--strategy.capacity takes int, not 0.5"),
        (["--space", "package.yaml"], 2, "--strategy.optimizer: pytest.Item can't be named by a config"),
        (["--space", "place.yaml"], 2, "seed can't be searched: options of the strategy, the optimizer and the model can"),
        (["--out", "missing/x.yaml"], 1, "there is no folder for missing/x.yaml"),
        (["--engine", "slurm"], 2, "--engine must be one of loky, ray, dask, not 'slurm'"),
    ],
)
def test_what_cannot_be_searched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in SPACES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    base = ["--stream", "split_digits"] * ("--stream" not in arguments) + ["--trials", "1"] * ("--trials" not in arguments)
    assert main(["tune", *base, "--model.hidden", "[4]", "--track", "false", *arguments]) == code
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list(tmp_path.glob("tunings/*/tuned.yaml"))


def test_a_wrapper_is_tuned_by_the_learning_rate_of_what_it_wraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrapped.yaml").write_text(
        "tune: [optimizer.lr]\ntrack: false\nmodel: {class_path: Mlp, init_args: {hidden: [4]}}\n"
    )
    given = ["--strategy", "ClassMeans", "--strategy.base", "Replay", "--stream.epochs", "1", "--trials", "2"]
    assert main(["tune", "wrapped.yaml", *given]) == 0
    winner = yaml.safe_load((searched(tmp_path) / "tuned.yaml").read_text())
    assert 0.001 <= winner["strategy"]["init_args"]["base"]["init_args"]["optimizer"]["init_args"]["lr"] <= 10
    assert "optimizer.lr 0.1" in capsys.readouterr().out


def test_without_optuna_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)  # it can't be imported then
    assert main(["tune", "--stream", "split_digits", "--strategy", "EWC"]) == 1
    error = capsys.readouterr().err
    assert error == "clstream: error: a search needs Optuna, which is not installed: pip install 'clstream[tune]'\n"
    assert not list(tmp_path.iterdir())
