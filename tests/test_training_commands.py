"""Training controls on the command line, in YAML and in grids; and the page that says who takes them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import clstream.strategies as strategies
import pytest
import yaml
from clstream.strategies import Replay

from clstream import run
from clstream.checks import example_model, example_stream
from clstream.cli.build import steps_of
from clstream.cli.errors import UsageError
from clstream.cli.experiment import run_experiment
from clstream.cli.parser import as_yaml, parse_run
from clstream.cli.profile import options_of_run
from clstream.cli.sweep_plan import plan_of
from clstream.cli.training_options import OPTIONS, check_no_training, training_of
from clstream.strategy.strategy import CONTROLS
from clstream.tracking import CsvTracker, EventLog
from clstream.tracking.event_log import read
from clstream.training import Training

GIVEN = ["--train.schedule", "cosine", "--train.warmup", "5", "--train.clip", "1.0", "--train.patience=2", "--train.held_out=0.2"]


def test_options_are_those_of_the_class_with_its_defaults() -> None:
    assert OPTIONS.keys() == Training().params.keys()
    assert training_of(parse_run([])[1]) is None
    train = training_of(parse_run(GIVEN)[1])
    assert train is not None and train.params == Training("cosine", warmup=5, clip=1.0, patience=2, held_out=0.2).params


def test_a_config_has_what_was_asked_for_and_nothing_of_what_was_not() -> None:
    assert "train" not in yaml.safe_load(as_yaml(*parse_run([])))
    text = as_yaml(*parse_run(GIVEN))
    kept = {"schedule": "cosine", "warmup": 5, "clip": 1.0, "patience": 2, "held_out": 0.2}
    assert yaml.safe_load(text)["train"] == kept
    for config in (yaml.safe_load(text), {f"train.{name}": value for name, value in kept.items()}):
        parser, options = parse_run(["--config", "a.yaml", "--train.clip", "2.0"], {"a.yaml": config})
        assert yaml.safe_load(as_yaml(parser, options))["train"] == kept | {"clip": 2.0}
        assert steps_of(options)["train"].clip == 2.0


WRONG: list[tuple[list[str], dict[str, Any], str]] = [
    (["--train.shedule", "cosine"], {}, "no training control 'shedule': did you mean schedule"),
    (["--train", "cosine"], {}, "--train takes options after a dot: there are schedule,"),
    (["--train.clip", "-1"], {}, r"--train.clip must be a finite number above 0"),
    (["--train.clip", "wide"], {}, "--train.clip takes a number, not wide"),
    (["--train.held_out", "0.2"], {}, "--train.held_out is of early stopping"),
    ([], {"train": 5}, "a.yaml: train takes training controls with their values"),
    ([], {"train": {"clip": None}}, "a.yaml: train.clip is null"),
    ([], {"train": {"clap": 1.0}}, "a.yaml: there is no training control 'clap': did you mean clip"),
]


@pytest.mark.parametrize(("words", "config", "says"), WRONG)
def test_what_can_not_be_is_refused_in_a_sentence(words: list[str], config: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_run([*words, *["--config", "a.yaml"] * bool(config)], {"a.yaml": config})


def test_commands_that_have_none_refuse_them() -> None:
    with pytest.raises(UsageError, match=r"clstream episodes has no training controls: leave train\.schedule out"):
        check_no_training(parse_run(GIVEN)[1], "episodes")
    assert options_of_run(GIVEN)[: len(GIVEN)] == GIVEN


def test_a_run_of_the_command_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--stream", "blobs", "--stream.epochs", "6", "--stream.train_per_class", "20", "--track", "false"]
    words += ["--checkpoint_every", "0", *GIVEN]
    (result,) = run_experiment(words).results
    assert result.params["train.schedule"] == "cosine" and float(result.cost.epochs_saved.sum()) > 0


def test_a_grid_tries_them(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("stream: blobs\nstrategy: Finetune\nsweep:\n  train.clip: [0.5, 1.0]\n")
    runs = plan_of(str(grid), ["--train.accumulate", "2"]).runs
    assert [yaml.safe_load(planned.config)["train"] for planned in runs] == [{"clip": clip, "accumulate": 2} for clip in (0.5, 1.0)]
    assert len({str(planned.identity) for planned in runs}) == 2


def test_the_page_says_what_the_classes_say() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    said = {}
    for names, takes in re.findall(r"^\| (`[A-Z]\w+`(?:, `\w+`)*) \| (.*) \|$", page, re.MULTILINE):
        listed = tuple(re.findall(r"`(\w+)`", takes))
        controls = listed if "all" not in takes else tuple(control for control in CONTROLS if control not in listed)
        said |= dict.fromkeys(re.findall(r"`(\w+)`", names), controls)
    classes = {name: getattr(strategies, name) for name in strategies.__all__}
    own = {
        name: next(vars(base)["takes_controls"] for base in cls.__mro__ if "takes_controls" in vars(base))
        for name, cls in classes.items()
        if "takes_controls" in {key for base in cls.__mro__[:-1] if base.__name__ != "Strategy" for key in vars(base)}
    }
    assert said == {name: tuple(takes) for name, takes in own.items()}


def test_trackers_and_the_log_have_what_early_stopping_did(tmp_path: Path) -> None:
    stream = example_stream(epochs=8)
    log, points = EventLog(tmp_path), CsvTracker(tmp_path)
    result = run(Replay(example_model(), capacity=50), stream, log, points, train=Training(patience=1, held_out=0.25))
    entries = [entry for entry in read(tmp_path) if entry["event"] == "SessionStoppedEarly"]
    assert sum(entry["fields"]["epochs_saved"] for entry in entries) == result.cost.total["epochs_saved"] > 0
    rows = list(csv.DictReader(points.path.open(encoding="utf-8")))
    last = {row["metric"]: float(row["value"]) for row in rows}
    assert last["train/epochs_saved"] == entries[-1]["fields"]["epochs_saved"]
    assert last["cost/epochs_saved"] == result.cost.total["epochs_saved"] and 0 <= last["train/held_out"] <= 1
    assert "train.patience,1" in (tmp_path / "params.csv").read_text(encoding="utf-8")
