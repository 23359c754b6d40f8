"""Around the commands: help, lists, seeds, exit codes, what answers without torch, and one sentence for what is wrong."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clstream.cli import main
from clstream.cli.build import seeds_of
from clstream.cli.errors import UsageError
from clstream.cli.lookup import PLACES, import_object, known_names, resolve
from clstream.cli.option_help import help_texts
from clstream.cli.option_parser import option_help, options_of
from clstream.cli.parser import parse_run
from clstream.cli.settings import parse_seeds

OWN = '''
from functools import partial

from torch import nn
from torch.optim import SGD

from clstream import Strategy
from clstream.strategies import Replay


class Bare(Strategy):
    """No annotations at all."""

    def __init__(self, model, optimizer=partial(SGD, lr=0.1), strength=0.5, names=None):
        super().__init__(model, optimizer)
        self.strength, self.names = strength, names


class Passes(Replay):
    """Passes on what it does not know."""

    def __init__(self, model, strength=0.5, **kwargs):
        super().__init__(model, **kwargs)
        self.strength = strength


class Fails(Strategy):
    """Its loss is not finite."""

    def loss(self, samples):
        return super().loss(samples) * float("nan")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_line.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_line", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ("0-4", [0, 1, 2, 3, 4]), ("0-2,7", [0, 1, 2, 7]), ("7, 0-2", [7, 0, 1, 2]), ("3", [3]), ("[0,1]", [0, 1]), ("2-2", [2]),
        ([0, "3-4"], [0, 3, 4]), (5, [5]),
    ],
)  # fmt: skip
def test_seeds_are_numbers_and_ranges(given: object, seeds: list[int]) -> None:
    assert parse_seeds(given) == seeds


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("4-0", "from the lower seed to the higher one: 0-4, not 4-0"), ("-1", "whole numbers from 0 up"), ("0-", "whole numbers"),
        ("1,1", "names one seed twice"), ("0-3,2", "names one seed twice"), ("0-1-2", "whole numbers"), ("1.5", "whole numbers"),
        ("", "whole numbers"), ("0,", "whole numbers"), ("0-1000000000", "at most 1,000 seeds"), ([True], "whole numbers"),
        ("9" * 30, "whole numbers"),
    ],
)  # fmt: skip
def test_what_are_no_seeds(given: object, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_seeds(given)


@pytest.mark.slow
def test_every_command_takes_ranges_of_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--stream", "blobs", "--stream.train_per_class", "10", "--model.hidden", "[4]", "--track", "false"]
    assert seeds_of(parse_run([*options, "--seeds", "0-4,7"])[1]) == [0, 1, 2, 3, 4, 7]
    (folder / "c.yaml").write_text("seeds: 0-2\n")
    assert seeds_of(parse_run(["--config", "c.yaml"])[1]) == [0, 1, 2]
    assert main(["run", *options, "--checkpoint_every", "0", "--seeds", "0-1"]) == 0
    assert "over 2 seeds" in capsys.readouterr().out
    assert main(["run", *options, "--checkpoint_every", "0", "--seeds", "0-1", "--max_sessions", "1"]) == 0
    assert re.search(r"│ +- │", capsys.readouterr().out)  # what a single task forgets is no number, for several seeds too
    assert main(["run", *options, "--seeds", "0-1", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["seeds"] == [0, 1] and "seed" not in config
    for command in (["run", "--seeds", "4-0"], ["parity", "--seeds", "4-0"], ["verify", "er-split-mnist", "--seeds", "4-0"]):
        assert main(command) == 2
        assert "0-4, not 4-0" in capsys.readouterr().err


def test_lists_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for kind in ("strategies", "streams", "models", "anchors"):
        assert main(["list", kind]) == 0
        shown[kind] = capsys.readouterr().out
    assert "Replay" in shown["strategies"] and "needs" in shown["strategies"] and "split_mnist" not in shown["strategies"]
    assert "split_mnist" in shown["streams"] and "Mlp" not in shown["streams"]
    assert "Mlp" in shown["models"] and "Replay" not in shown["models"]
    assert "er-split-mnist" in shown["anchors"] and "Mlp" not in shown["anchors"]
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    assert all(text.splitlines()[2].split()[0] in everything for text in shown.values())
    assert main(["list", "strategis"]) == 2
    assert "clstream list has no 'strategis': did you mean strategies?" in capsys.readouterr().err


ALL = [(kind, name) for kind in PLACES for name in known_names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[name for _, name in ALL])
def test_every_option_has_a_help_text(kind: str, name: str) -> None:
    path = resolve(kind, name)[0]
    thing, shown = import_object(path, kind), " ".join(option_help(kind, name).split())
    helps, options = help_texts(thing), options_of(path)
    assert set(options) >= set(inspect.signature(thing).parameters) - {"model", "input_shape", "classes"}
    for option in options:
        text = helps[option]
        assert len(text.split()) >= 2 and not text.startswith(("see ", "as in ", "as for ")), (option, text)
        assert f"--{kind}.{option}" in shown and " ".join(text.split()[:2]) in shown


def test_help_says_the_choices_and_the_default_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--stream.help", "split_mnist"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert '"class", "task" or "domain"' in text and "default: class" in text
    assert "SGD(lr=0.1)" in " ".join(option_help("strategy", "Replay").split())


LIGHT = [
    (["--help"], 0), (["--version"], 0), ([], 2), (["rnu"], 2), (["list", "--help"], 0), (["list", "strategis"], 2),
    (["resume", "--help"], 0), (["resume"], 2), (["verify", "--sedes", "1"], 2), (["ui", "--port", "x"], 2), (["log"], 2),
    (["record", "--stream", "blobs"], 2), (["parity", "--seeds", "4-0"], 2), (["prove-resume", "--kills", "0"], 2),
]  # fmt: skip


def test_help_and_wrong_commands_answer_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from clstream.cli import main\n"
        f"print([main(arguments) for arguments, _ in {LIGHT!r}], file=sys.stderr)\n"
        "print(sorted({'torch', 'numpy', 'jsonargparse', 'mlflow', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    *errors, statuses, loaded = done.stderr.splitlines()
    assert statuses == str([status for _, status in LIGHT]) and loaded == "[]"
    assert all(line.startswith("clstream: error: ") for line in errors)
    assert "usage: clstream COMMAND" in done.stdout and "clstream 0." in done.stdout


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (0, ["run", "--stream", "blobs", "--track", "false", "--checkpoint_every", "0"]),
        (0, ["run", "--help"]),
        (0, ["run", "--strategy.help", "Replay"]),
        (0, ["compare", "--help"]),
        (0, ["verify"]),
        (1, ["run", "--stream", "blobs", "--strategy", "mine_line.Fails", "--track", "false"]),
        (1, ["run", "--stream", "blobs", "--tracking_uri", "sqlite:////nowhere/at/all.db"]),
        (1, ["run", "--stream", "blobs", "--tracking_uri", "postgresql+nowhere://u:secret@localhost/db"]),
        (1, ["log", "nothing"]),
        (1, ["ui"]),
        (2, []),
        (2, ["compare"]),
        (2, ["list", "nothing"]),
        (2, ["run", "--sed", "1"]),
        (2, ["run", "--config", "nothing.yaml"]),
        (2, ["run", "--stream", "blobs", "--device", "meta"]),
        (2, ["run", "--strategy.optimizer.lr", ".nan"]),
        (2, ["run", "--strategy.optimizer.lr", "inf"]),
        (2, ["run", "--strategy.optimizer", "LBFGS"]),
        (2, ["run", "--seed", "-1"]),
        (2, ["run", "--stream", "blobs", "--resume", "auto", "--checkpoint_every", "0"]),
        (2, ["run", "--stream", "blobs", "--log_batches", "--checkpoint_every", "0"]),
        (2, ["run", "--observers", "clstream.online_metrics.Detection,clstream.online_metrics.Detection"]),
        (2, ["resume", "nothing"]),
        (2, ["resume"]),
        (2, ["show"]),
        (2, ["log", "--nothing"]),
        (2, ["sync", "--track"]),
        (2, ["record", "--stream", "blobs", "--out"]),
        (2, ["verify", "--see", "0"]),
        (2, ["verify", "--seeds", "0", "--seeds", "1"]),
        (2, ["pretrain", "--out", "x.pt", "--capacity", "3"]),
        (2, ["ui", "--hots", "x"]),
    ],
)
def test_exit_codes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, arguments: list[str]
) -> None:
    """0: done; 1: it failed; 2: it was asked wrongly. 130 and 143, after signals, are tested with real ones elsewhere."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(arguments) == status
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("clstream: error: ")]
    assert "Traceback" not in captured.err and "secret" not in captured.err
    assert len(errors) == int(status != 0 and arguments not in ([], ["compare"]))
    assert not errors or captured.err.strip().endswith(errors[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--strategy", "--seed", "1"], "--strategy needs the name of a strategy; --seed is an option"),
        (["--model"], "--model needs the name of a model"),
        (["--strategy.optimiser.lr", "0.1"], "Replay has no option 'optimiser': did you mean optimizer?"),
        (["--strategy.optimizer.lrr", "0.1"], "SGD has no option 'lrr': did you mean lr?"),
        (["--strategy.optimizer.lr", "fast"], "--strategy.optimizer.lr takes a number, not fast"),
        (["--model.hidden", "10,10"], "--model.hidden takes a list, as '[10,10]', not 10,10"),
        (["--stream.class_order", "a"], "--stream.class_order takes int, list[int] or null, not a"),
        (["--stream.class_order", "[0,a]"], "--stream.class_order takes int, not a"),
        (["--resume", "now"], "--resume takes one of never, auto, not now"),
        (["--track", "maybe"], "--track takes bool, not maybe"),
        (["--strategy.optimizer", "mine_line.Nothing"], "--strategy.optimizer: mine_line has no 'Nothing'"),
        (
            ["--strategy.optimizer", "nowhere_at_all.Nothing"],
            "--strategy.optimizer: there is no file or package 'nowhere_at_all' here",
        ),
        (
            ["--strategy.optimizer", "mine_line.Bare"],
            "--strategy.optimizer: mine_line.Bare is no Optimizer: it must be a class derived from Optimizer",
        ),
        (
            ["--strategy", "Refresh", "--strategy.base", "torch.nn.ReLU"],
            "--strategy.base: torch.nn.ReLU is not of the kind that it takes",
        ),
        (["--device", "meta"], "--device meta holds no numbers"),
        (["--seed", "1.5"], "--seed takes int, not 1.5"),
        (["--trust", "a b"], "--trust takes names of packages"),
        (["--strategy", "mine_line"], "--strategy takes the name of a class, and mine_line.py is a file: the class Mine in it is"),
        (["--model", "mine_line.py"], "--model takes the name of a class, and mine_line.py is a file: the class Mine in it is"),
        (
            ["--stream", "mine_line"],
            "--stream takes the name of a function, and mine_line.py is a file: the function Mine in it is",
        ),
    ],
)
def test_each_mistake_has_its_sentence(folder: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_run(arguments)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["code", "numpy", "yaml"])
def test_a_file_that_another_module_hides_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / "c.yaml").write_text(f"strategy: {name}.Mine\n")
    with pytest.raises(UsageError, match=rf"{name}.Mine is not what is in {name}.py here: .* goes first: rename {name}.py$"):
        parse_run(["--config", "c.yaml"])
    if name == "code":  # a module of Python's own is nothing that could be meant
        with pytest.raises(UsageError, match=r"goes first: rename code\.py$"):
            parse_run(["--strategy", "code.Mine"])


def test_parameters_without_annotations_take_yaml_values_and_optimizers(folder: Path) -> None:
    _, options = parse_run(["--strategy", "mine_line.Bare", "--strategy.strength", "2", "--strategy.names", "[a, 1]"])
    given = options.strategy.init_args
    assert given.strength == 2 and given.names == ["a", 1] and given.optimizer.init_args.lr == 0.1
    _, options = parse_run(
        ["--strategy", "mine_line.Bare", "--strategy.optimizer.lr", "0.05", "--strategy.optimizer.momentum", "0.9"]
    )
    assert options.strategy.init_args.optimizer.init_args.lr == 0.05
    assert options.strategy.init_args.optimizer.init_args.momentum == 0.9
    _, options = parse_run(["--strategy", "mine_line.Bare", "--strategy.optimizer", "Adam"])
    assert options.strategy.init_args.optimizer.class_path == "torch.optim.Adam"


def test_parameters_that_are_passed_on_are_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--strategy", "mine_line.Passes", "--strategy.capacity", "7", "--strategy.optimizer.lr", "0.05"]
    _, options = parse_run(given)
    assert options.strategy.init_args.capacity == 7 and options.strategy.init_args.optimizer.init_args.lr == 0.05
    assert main(["run", "--stream", "blobs", "--track", "false", "--checkpoint_every", "0", *given]) == 0
    assert "Passes on blobs" in capsys.readouterr().out
    with pytest.raises(UsageError, match="Passes has no option 'capacty': did you mean capacity"):
        parse_run(["--strategy", "mine_line.Passes", "--strategy.capacty", "7"])
    assert main(["run", "--strategy.help", "mine_line.Passes"]) == 0
    assert "--strategy.capacity" in capsys.readouterr().out
