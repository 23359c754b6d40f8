"""A config is data: whatever it names, nothing runs but classes of clstream, torch.nn, torch.optim and the user's own files."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor
from torch.nn import functional as F

from clstream.cli import main
from clstream.cli.build import build_strategy, build_stream
from clstream.cli.errors import UsageError
from clstream.cli.lookup import is_user_module
from clstream.cli.parser import parse_run

OWN = '''
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, Callable

from torch import nn
from torch.optim import SGD, Optimizer

from clstream import SessionEnded, Strategy, on


def clean(path: str = "ran"):
    Path(path).touch()


def sgd(params) -> Optimizer:
    return SGD(params, lr=0.5)


class Loud:
    """Its making leaves a mark."""

    def __init__(self, path: str = "ran") -> None:
        Path(path).touch()

    def __call__(self, *args):
        clean()


class Mine(Strategy):
    """Takes whatever it is given."""

    def __init__(self, model: nn.Module, optimizer: Callable[[Any], Optimizer] = partial(SGD, lr=0.1), anything: Any = None,
                 bare=None, call: Callable = nn.functional.relu, kind: type = nn.ReLU, layers: list[nn.Module] | None = None,
                 table: dict[str, Any] | None = None, width: int | str = 3) -> None:
        super().__init__(model, optimizer)
        self.anything, self.bare, self.call, self.kind, self.layers, self.table = anything, bare, call, kind, layers, table
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of the user's own, and one elsewhere that must not be imported."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "mine_safe.py").write_text(OWN)
    (elsewhere / "others_safe.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + OWN)
    packages = here / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "installed_safe.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + OWN)
    for place in (elsewhere, packages, here):
        monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(here)
    for name in ("mine_safe", "others_safe", "installed_safe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return here


COMMAND = "touch ran"
CALLS: list[object] = [
    {"class_path": "os.system", "init_args": {"command": COMMAND}},
    {"class_path": "posix.system", "init_args": {"command": COMMAND}},
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}},
    {"class_path": "subprocess.check_call", "init_args": {"args": ["touch", "ran"]}},
    {"class_path": "builtins.eval", "init_args": {"source": "__import__('os').system('touch ran')"}},
    {"class_path": "builtins.exec", "init_args": {"source": "open('ran', 'w')"}},
    {"class_path": "builtins.open", "init_args": {"file": "ran", "mode": "w"}},
    {"class_path": "io.FileIO", "init_args": {"file": "ran", "mode": "w"}},
    {"class_path": "pathlib.Path.touch", "init_args": {"self": "ran"}},
    {"class_path": "functools.partial", "init_args": {"func": "os.system", "args": COMMAND}},
    {"class_path": "importlib.import_module", "init_args": {"name": "others_safe"}},
    {"class_path": "runpy.run_path", "init_args": {"path_name": "../elsewhere/others_safe.py"}},
    {"class_path": "logging.FileHandler", "init_args": {"filename": "ran"}},
    {"class_path": "shutil.copyfile", "init_args": {"src": "mine_safe.py", "dst": "ran"}},
    {"class_path": "torch.utils.collect_env.run", "init_args": {"command": COMMAND}},
    {"class_path": "torch.save", "init_args": {"obj": 1, "f": "ran"}},
    {"class_path": "torch.load", "init_args": {"f": "ran", "weights_only": False}},
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "../elsewhere", "model": "clean", "source": "local"}},
    {"class_path": "torch.nn.functional.torch.hub.load", "init_args": {"repo_or_dir": "../elsewhere", "model": "clean"}},
    {"class_path": "torch.optim.optimizer.torch.save", "init_args": {"obj": 1, "f": "ran"}},
    {"class_path": "torch.nn.modules.module.warnings", "init_args": {}},
    {"class_path": "torch.utils.cpp_extension.load_inline", "init_args": {"name": "x", "cpp_sources": ""}},
    {"class_path": "torch.nn.Module.register_module", "init_args": {"name": "x"}},
    {"class_path": "torch.optim.Optimizer.load_state_dict", "init_args": {"state_dict": {}}},
    {"class_path": "torch.nn.functional.relu", "init_args": {}},
    {"class_path": "numpy.save", "init_args": {"file": "ran", "arr": [1]}},
    {"class_path": "numpy.memmap", "init_args": {"filename": "ran", "mode": "w+", "shape": [1]}},
    {"class_path": "mlflow.set_tracking_uri", "init_args": {"uri": "ran"}},
    {"class_path": "jsonargparse.set_parsing_settings", "init_args": {"import_path_allowlist": ["os"]}},
    {"class_path": "clstream.cli.main", "init_args": {"arguments": ["record", "--stream", "blobs", "--out", "ran"]}},
    {"class_path": "clstream.recording.writer.record", "init_args": {"file": "ran"}},
    {"class_path": "clstream.pretraining.load_weights", "init_args": {}},
    {"class_path": "clstream.tracking.mlflow_store.connect", "init_args": {"uri": "sqlite:///ran"}},
    {"class_path": "mine_safe.clean", "init_args": {"path": "ran"}},
    {"class_path": "mine_safe.Loud", "init_args": {"path": "ran"}},
    {"class_path": "mine_safe.os.system", "init_args": {"command": COMMAND}},
    {"class_path": "mine_safe.subprocess.Popen", "init_args": {"args": ["touch", "ran"]}},
    {"class_path": "mine_safe.Path.touch", "init_args": {"self": "ran"}},
    {"class_path": "others_safe.Loud", "init_args": {"path": "ran"}},
    {"class_path": "installed_safe.Loud", "init_args": {"path": "ran"}},
    "os.system", "subprocess.Popen", "builtins.print", "torch.hub.load", "others_safe.sgd", "installed_safe.sgd", "mine_safe.clean",
    "clstream.setup.x", "clstream.experiments.lstm_against_mlp.main",
    "antigravity.x", "this.s", "idlelib.idle.x", "__main__.x", "mine_safe.Loud",
    '{"class_path": "os.system", "init_args": {"command": "touch ran"}}',
    '{"class_path": "others_safe.Loud"}',
]  # fmt: skip


def named(call: object) -> str:
    return call["class_path"] if isinstance(call, dict) else str(call)


def refused(folder: Path, config: object, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Give a config to a command, which is to refuse it in a sentence, with nothing run; return the sentence."""
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    loaded = set(sys.modules)
    status = main(command or ["run", "--config", "c.yaml", "--track", "false", "--checkpoint_every", "0"])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("clstream: error: ")]
    assert status == 2 and len(lines) == 1 and captured.err.strip() == lines[0], captured.err
    assert not (folder / "ran").exists() and not (folder.parent / "elsewhere" / "ran").exists()
    assert not {"antigravity", "this", "idlelib.idle", "others_safe", "installed_safe", "clstream.setup"} & (
        set(sys.modules) - loaded
    )
    assert len(lines[0]) < 500
    return lines[0]


@pytest.mark.parametrize("call", CALLS, ids=named)
def test_an_optimizer_is_an_optimizer(folder: Path, capsys: pytest.CaptureFixture[str], call: object) -> None:
    refused(folder, {"stream": "blobs", "strategy": {"class_path": "Finetune", "init_args": {"optimizer": call}}}, capsys)


@pytest.mark.parametrize("call", CALLS, ids=named)
def test_streams_strategies_and_models_are_of_their_kind(folder: Path, capsys: pytest.CaptureFixture[str], call: object) -> None:
    for kind in ("stream", "strategy", "model"):
        refused(folder, {kind: call}, capsys)


SLOTS = ("anything", "bare", "call", "kind", "layers", "table", "width")


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=named)
def test_a_strategy_of_ones_own_is_given_nothing_that_runs(folder: Path, call: object) -> None:
    """Whatever its options are annotated with: what is not refused comes as the plain value that it is."""
    for slot in SLOTS:
        value = [call] if slot == "layers" else {"x": call} if slot == "table" else call
        config = {"stream": "blobs", "strategy": {"class_path": "mine_safe.Mine", "init_args": {slot: value}}}
        (folder / "c.yaml").write_text(yaml.safe_dump(config))
        try:
            parser, options = parse_run(["--config", "c.yaml"])
            strategy = build_strategy(parser, options, build_stream(parser, options), 0)
        except (UsageError, ValueError, TypeError):
            assert not (folder / "ran").exists()
            continue
        ran = (folder / "ran").exists()
        assert not ran or (slot == "call" and named(call) == "mine_safe.Loud")  # a callable of the user's own, where any will do
        (folder / "ran").unlink(missing_ok=True)
        if slot in ("anything", "bare", "table", "width"):
            held = getattr(strategy, slot, None)
            assert not callable(held) or isinstance(held, str)


@pytest.mark.parametrize("call", CALLS[:12], ids=named)
def test_nested_at_any_depth(folder: Path, capsys: pytest.CaptureFixture[str], call: object) -> None:
    inner = {"class_path": "Replay", "init_args": {"optimizer": call}}
    refused(folder, {"strategy": {"class_path": "Refresh", "init_args": {"base": inner}}}, capsys)
    refused(folder, {"strategy": {"class_path": "Refresh", "init_args": {"base": call}}}, capsys)
    penalty = {"class_path": "Regularised", "init_args": {"base": "Replay", "regularisers": [call]}}
    refused(folder, {"strategy": penalty}, capsys)
    refused(folder, {"observers": [named(call)]}, capsys)


def test_resume_compare_verify_and_show_take_no_other_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"class_path": "os.system", "init_args": {"command": COMMAND}}
    config = {"stream": "blobs", "strategy": {"class_path": "Finetune", "init_args": {"optimizer": call}}}
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "os.system can't be named by a config" in refused(folder, config, capsys, "resume", "runs/a")
    refused(folder, config, capsys, "compare", "c.yaml")
    refused(folder, {"stream": call}, capsys, "show", "--config", "c.yaml")
    refused(folder, {"stream": call}, capsys, "record", "--config", "c.yaml", "--out", "ran")
    anchor = {"about": "a", "config": config, "seeds": [0], "metric": "forgetting", "expected": 0, "spread": 1, "runs": 2}
    anchor |= {"source": "here", "kind": "own", "minutes": 1}
    (folder / "a.yaml").write_text(yaml.safe_dump(anchor))
    refused(folder, config, capsys, "verify", "a.yaml")


def test_what_a_user_may_name(folder: Path) -> None:
    """The other side: files of the working folder in a config, and any package by the command line's own word."""

    def asked(strategy: object, *arguments: str) -> object:
        (folder / "c.yaml").write_text(yaml.safe_dump({"stream": "blobs", "strategy": strategy}))
        parser, options = parse_run(["--config", "c.yaml", *arguments])
        return build_strategy(parser, options, build_stream(parser, options), 0)

    given = {"optimizer": "mine_safe.sgd", "call": "torch.nn.functional.gelu", "layers": [{"class_path": "torch.nn.ReLU"}]}
    mine = asked({"class_path": "mine_safe.Mine", "init_args": given})
    assert type(mine).__name__ == "Mine" and mine.optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(UsageError, match=r"others_safe.Mine can't be named by a config.*if others_safe is yours, give --trust"):
        asked("others_safe.Mine")
    assert type(asked("others_safe.Mine", "--trust", "others_safe")).__module__ == "others_safe"
    assert type(asked("Finetune", "--strategy", "others_safe.Mine")).__module__ == "others_safe"
    (folder / "ran").unlink()
    (folder / "t.yaml").write_text("trust: others_safe\n")
    with pytest.raises(UsageError, match="a config can't say what to trust"):
        parse_run(["--config", "t.yaml"])


def test_an_optimizer_of_ones_own_needs_no_annotations_but_of_its_options(folder: Path) -> None:
    (folder / "own_sgd.py").write_text(
        "from torch.optim import SGD\n\n"
        "class Mine(SGD):\n    def __init__(self, params, lr=0.5):\n        super().__init__(params, lr=lr)\n\n"
        "class Odd(Mine):\n    def __init__(self, params, power):\n        super().__init__(params)\n"
    )
    chosen = ["--stream", "blobs", "--strategy", "Finetune", "--strategy.optimizer"]
    parser, options = parse_run([*chosen, "own_sgd.Mine", "--strategy.optimizer.lr", "0.25"])
    strategy = build_strategy(parser, options, build_stream(parser, options), 0)
    assert type(strategy.optimizer).__name__ == "Mine" and strategy.optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(UsageError, match=r"own_sgd\.Odd doesn't say of what type its power is: annotate it, as power: float"):
        parse_run([*chosen, "own_sgd.Odd"])


def test_what_one_command_trusts_the_next_does_not(folder: Path) -> None:
    (folder / "c.yaml").write_text("strategy: {class_path: Finetune, init_args: {optimizer: others_safe.sgd}}\n")
    for _ in range(2):
        parse_run(["--config", "c.yaml", "--trust", "others_safe"])
        with pytest.raises(UsageError, match=r"--strategy.optimizer: others_safe.sgd can't be named by a config"):
            parse_run(["--config", "c.yaml"])


def test_a_run_of_what_the_command_line_named_is_resumed_by_its_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder may be from somebody else: what its config names elsewhere is trusted by whoever resumes it."""
    options = ["--stream", "blobs", "--stream.train_per_class", "10", "--track", "false"]
    assert main(["run", *options, "--strategy", "others_safe.Mine"]) == 0
    run = next((folder / "runs").iterdir())
    (folder / "ran").unlink()
    sys.modules.pop("others_safe")
    capsys.readouterr()
    assert main(["resume", str(run)]) == 2
    assert "if others_safe is yours, give --trust others_safe" in capsys.readouterr().err and not (folder / "ran").exists()
    assert main(["resume", str(run), "--trust", "others_safe"]) == 0


@pytest.mark.slow
def test_the_hint_after_an_interruption_says_what_to_trust(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = F.cross_entropy

    def interrupted(*given: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(F, "cross_entropy", plain)
        return plain(*given)

    options = ["--stream", "blobs", "--stream.train_per_class", "10", "--track", "false"]
    for name, hint in (("others_safe.Mine", " --trust others_safe"), ("mine_safe.Mine", ""), ("Replay", "")):
        monkeypatch.setattr(F, "cross_entropy", interrupted)
        assert main(["run", *options, "--strategy", name]) == 143
        given = re.search(r"to go on: clstream (resume \S+)(.*)", capsys.readouterr().err)
        assert given is not None and given[2] == hint
        assert main([*given[1].split(), *hint.split()]) == 0


def test_ones_own_modules_are_those_of_the_working_folder(folder: Path) -> None:
    assert is_user_module("mine_safe")
    others = ("others_safe", "installed_safe", "os", "sys", "torch", "numpy", "yaml", "__main__", "antigravity", "nowhere_at_all")
    assert not any(is_user_module(module) for module in others)
