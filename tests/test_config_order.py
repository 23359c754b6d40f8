"""Config files and options: what comes later wins, and nothing is dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clstream.cli import main
from clstream.cli.errors import UsageError
from clstream.cli.parser import as_yaml, parse_run

REPLAY = """\
stream: {class_path: blobs, init_args: {tasks: 2, train_per_class: 20}}
strategy:
  class_path: Replay
  init_args:
    capacity: 33
    optimizer: {class_path: SGD, init_args: {lr: 0.03, momentum: 0.5}}
model: {class_path: Mlp, init_args: {hidden: [8]}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(REPLAY)
    return tmp_path


def asked(*arguments: str) -> dict[str, Any]:
    """What a run of these arguments is, as its config says it."""
    return yaml.safe_load(as_yaml(*parse_run(list(arguments))))


def name(of: dict[str, Any]) -> str:
    return of["class_path"].rpartition(".")[2]


CHOICES = [
    ("--strategy", "Finetune", "strategy", "Replay"),
    ("--stream", "split_digits", "stream", "blobs"),
    ("--model", "torch.nn.Flatten", "model", "Mlp"),
]


@pytest.mark.parametrize(("option", "value", "kind", "of_config"), CHOICES)
def test_an_option_after_a_config_wins_and_one_before_it_loses(
    folder: Path, option: str, value: str, kind: str, of_config: str
) -> None:
    after, before = asked("--config", "c.yaml", option, value), asked(option, value, "--config", "c.yaml")
    assert name(after[kind]) == value.rpartition(".")[2] and name(before[kind]) == of_config
    assert before == asked("--config", "c.yaml")
    assert after == asked("--config", "c.yaml", f"{option}={value}")
    others = {"stream", "strategy", "model"} - {kind}
    assert all(after[other] == before[other] for other in others)


def test_the_options_of_another_class_are_dropped_and_that_is_said(folder: Path) -> None:
    parser, options = parse_run(["--config", "c.yaml", "--strategy", "ERACE"])
    assert options.strategy.init_args.capacity == parse_run(["--strategy", "ERACE"])[1].strategy.init_args.capacity
    assert options.strategy.init_args.optimizer.init_args.lr == 0.1  # ERACE's own, not Replay's
    assert parser.notes == [
        "strategy is ERACE, so the options of Replay are dropped: capacity, optimizer, optimizer.lr, optimizer.momentum"
    ]
    assert parse_run(["--config", "c.yaml"])[0].notes == []


def test_it_is_said_where_a_run_begins_and_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", "c.yaml", "--strategy", "Finetune", "--track", "false", "--checkpoint_every", "0"]) == 0
    said = capsys.readouterr()
    assert "Finetune on blobs" in said.out and said.err.count("the options of Replay are dropped") == 1


def test_the_same_class_again_keeps_its_options(folder: Path) -> None:
    plain = asked("--config", "c.yaml")
    for again in ("Replay", "clstream.strategies.Replay"):
        assert asked("--config", "c.yaml", "--strategy", again) == plain
    assert asked("--config", "c.yaml", "--strategy.optimizer", "torch.optim.SGD") == plain


def test_an_optimizer_after_a_config_drops_the_other_ones_options(folder: Path) -> None:
    optimizer = asked("--config", "c.yaml", "--strategy.optimizer", "Adam")["strategy"]["init_args"]["optimizer"]
    assert name(optimizer) == "Adam" and optimizer["init_args"]["lr"] == 0.001 and "momentum" not in optimizer["init_args"]
    changed = asked("--config", "c.yaml", "--strategy.optimizer.lr", "0.2")["strategy"]["init_args"]["optimizer"]
    assert changed["init_args"]["lr"] == 0.2 and changed["init_args"]["momentum"] == 0.5
    assert asked("--config", "c.yaml", "--strategy.capacity", "5")["strategy"]["init_args"]["capacity"] == 5
    assert asked("--strategy.capacity", "5", "--config", "c.yaml")["strategy"]["init_args"]["capacity"] == 33


def test_a_wrapped_strategy_after_a_config(folder: Path) -> None:
    (folder / "w.yaml").write_text(
        "strategy: {class_path: Refresh, init_args: {base: {class_path: DERpp, init_args: {capacity: 7, alpha: 0.25}}}}\n"
    )
    parser, options = parse_run(["--config", "w.yaml", "--strategy.base", "Replay"])
    assert options.strategy.init_args.base.class_path.endswith(".Replay")
    assert options.strategy.init_args.base.init_args.capacity == parse_run([])[1].strategy.init_args.capacity
    assert parser.notes == ["strategy.base is Replay, so the options of DERpp are dropped: alpha, capacity"]
    kept = asked("--config", "w.yaml", "--strategy.base.capacity", "9")["strategy"]["init_args"]["base"]
    assert kept["init_args"]["capacity"] == 9 and kept["init_args"]["alpha"] == 0.25
    rate = asked("--config", "w.yaml", "--strategy.base.optimizer.lr", "0.07")["strategy"]["init_args"]["base"]["init_args"]
    assert rate["optimizer"]["init_args"]["lr"] == 0.07 and rate["alpha"] == 0.25


@pytest.mark.slow
def test_later_configs_win_over_earlier_ones(folder: Path) -> None:
    (folder / "more.yaml").write_text("strategy: {init_args: {capacity: 4}}\nseed: 9\n")
    (folder / "other.yaml").write_text("strategy: Finetune\n")
    both = asked("--config", "c.yaml", "--config", "more.yaml")
    assert both["strategy"]["init_args"]["capacity"] == 4 and both["seed"] == 9
    assert both["strategy"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.5
    assert asked("--config", "more.yaml", "--config", "c.yaml")["strategy"]["init_args"]["capacity"] == 33
    assert name(asked("--config", "c.yaml", "--config", "other.yaml")["strategy"]) == "Finetune"
    assert asked("--config", "more.yaml", "--seed", "2")["seed"] == 2 and asked("--seed", "2", "--config", "more.yaml")["seed"] == 9


def test_between_configs_the_order_of_options_is_free(folder: Path) -> None:
    free = asked("--strategy.optimizer.lr", "0.5", "--strategy.optimizer", "Adam", "--strategy.alpha", "0.3", "--strategy", "DER")
    assert free == asked(
        "--strategy", "DER", "--strategy.alpha", "0.3", "--strategy.optimizer", "Adam", "--strategy.optimizer.lr", "0.5"
    )
    assert free["strategy"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    with pytest.raises(ValueError, match="split_digits has no option 'train_per_class'"):
        parse_run(["--stream.train_per_class", "5", "--stream", "split_digits"])
    with pytest.raises(ValueError, match="Finetune has no option 'capacity'"):  # it was typed, so it isn't dropped
        parse_run(["--strategy.capacity", "5", "--config", str(finetune(folder))])


def finetune(folder: Path) -> Path:
    (folder / "f.yaml").write_text("strategy: Finetune\n")
    return folder / "f.yaml"


def test_seeds_of_a_config_give_way_to_a_seed(folder: Path) -> None:
    (folder / "s.yaml").write_text("seeds: [0, 1]\n")
    assert "seeds" not in asked("--config", "s.yaml", "--seed", "4") and asked("--config", "s.yaml", "--seed", "4")["seed"] == 4
    assert asked("--seed", "4", "--config", "s.yaml")["seeds"] == [0, 1]


def test_compare_takes_an_option_for_all_configs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "d.yaml").write_text("stream: split_digits\nstrategy: Finetune\n")
    assert main(["compare", "c.yaml", "d.yaml", "--stream", "blobs", "--stream.tasks", "5", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("class_path: clstream.streams.blobs") == printed.count("tasks: 5") == 2
    assert printed.count("class_path: clstream.strategies.Replay") == printed.count("class_path: clstream.strategies.Finetune") == 1


@pytest.mark.parametrize("command", ["show", "record"])
def test_commands_on_a_stream_take_an_option_over_a_config(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = ["--out", "x.clstream"] if command == "record" else []
    assert main([command, "--config", "c.yaml", "--stream", "split_digits", *out]) == 0
    assert "split_digits" in capsys.readouterr().out
    assert main([command, "--stream", "split_digits", "--config", "c.yaml", *out, *(["--force"] if out else [])]) == 0
    assert "blobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seed", "1", "--seed", "2"], "--seed is given twice, as 1 and as 2"),
        (["--evaluate_every", "1", "--evaluate-every", "2"], "--evaluate_every is given twice"),
        (["--strategy", "Replay", "--strategy", "Finetune"], "--strategy is given twice, as Replay and as Finetune"),
        (["--stream.epochs", "1", "--stream.epochs", "2"], "--stream.epochs is given twice"),
        (["--seed", "1", "--seeds", "0,1"], "--seed and --seeds are both given"),
        (["--strat", "Replay"], "unknown option --strat: did you mean --strategy?"),
        (["--evaluate_ever", "3"], "unknown option --evaluate_ever: did you mean --evaluate_every?"),
        (["--prequentia"], "unknown option --prequentia: did you mean --prequential?"),
        (["--strategy.capacit", "3"], "Replay has no option 'capacit': did you mean capacity?"),
        (["--seed.x", "3"], "unknown option --seed.x"),
        (["-s", "3"], "unknown option -s"),
        (["--tune=false"], "--tune takes no value"),
        (["--seed"], "--seed needs a value"),
        (["--strategy", "--seed", "1"], "--strategy needs the name of a strategy; --seed is an option"),
        (["--config"], "--config needs a value"),
    ],
)
def test_options_that_would_be_another_run(folder: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence.replace("?", r"\?")):
        parse_run(arguments)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("strategy: {class_path: Replay, init_args: {capacity: many}}", "--strategy.capacity takes int, not many"),
        ("strategy: {init_args: {optimizer: {class_path: SGDD}}}", "--strategy.optimizer: there is no 'SGDD': did you mean SGD?"),
        ("seed: x", "--seed takes int, not x"),
    ],
)
def test_a_wrong_value_is_said_with_the_config_that_it_is_from(folder: Path, written: str, sentence: str) -> None:
    (folder / "wrong.yaml").write_text(written)
    with pytest.raises(UsageError) as caught:
        parse_run(["--config", "c.yaml", "--config", "wrong.yaml"])
    assert str(caught.value) == f"wrong.yaml: {sentence}"
    with pytest.raises(UsageError, match=r"^--strategy\.capacity takes int, not lots"):
        parse_run(["--config", "c.yaml", "--strategy.capacity", "lots"])


def test_the_environment_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for variable in ("SEED", "CLSTREAM_SEED", "CLSTREAM_RUN_SEED", "CLI_SEED"):
        monkeypatch.setenv(variable, "7")
    assert parse_run([])[1].seed == 0
