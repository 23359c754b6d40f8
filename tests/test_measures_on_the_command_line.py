"""Measures that are named on the command line and in configs: what is taken, what is refused, and when."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from clstream.cli import main
from clstream.cli.experiment import run_experiment

OWN = '''
from clstream.measures import Measure


class Ones(Measure):
    """The share of samples that are answered with 1."""

    name = "ones"

    def __init__(self):
        self.ones, self.samples = 0, 0

    def update(self, answers, y):
        self.ones += int((answers.predicted == 1).sum())
        self.samples += len(y)

    def compute(self):
        return self.ones / self.samples if self.samples else float("nan")


class Needs(Ones):
    name = "needs"

    def __init__(self, what):
        super().__init__()


class Bare(Measure):
    name = "bare"


function = len
'''

SHORT = ["--strategy", "Finetune", "--stream", "blobs", "--stream.train_per_class", "20", "--model.hidden", "[8]"]
SHORT += ["--track", "false", "--checkpoint_every", "0", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_measured.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_measured", raising=False)
    return tmp_path


def test_measures_by_name_and_of_the_users_own(folder: Path) -> None:
    outcome = run_experiment([*SHORT, "--measures", "top5, brier,task_top5,mine_measured.Ones"])
    result = outcome.results[0]
    assert list(result.measured) == ["accuracy", "task_accuracy", "top5", "brier", "task_top5", "ones"]
    assert result.measured["ones"][-1].isfinite().all()
    (folder / "asked.yaml").write_text("measures: [top5, mine_measured.Ones]\n")
    by_config = run_experiment(["--config", "asked.yaml", *SHORT]).results[0]
    assert by_config.measured["ones"].equal(result.measured["ones"]) and "brier" not in by_config.measured


def test_configs_keep_the_measures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SHORT, "--measures", "top5,nll", "--print_config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["measures"] == "top5,nll"
    (folder / "kept.yaml").write_text(text)
    assert list(run_experiment(["--config", "kept.yaml"]).results[0].measured)[2:] == ["top5", "nll"]


@pytest.mark.parametrize(
    ("measures", "status", "sentence"),
    [
        ("top6", 2, "--measures: there is no measure 'top6': did you mean 'top5'?"),
        ("cf1:2", 2, "'cf1:2' has no threshold from 0 to 1 after the colon"),
        ("task_auroc", 2, "auroc is about strange samples, which have no task: leave task_ away"),
        ("top5,top5", 2, "--measures names top5 twice"),
        ("mine_measured.Tens", 2, "has no 'Tens'"),
        ("mine_measured.function", 2, "mine_measured.function is no measure: it must be a class derived from"),
        ("mine_measured.Bare", 2, "mine_measured.Bare is no measure"),
        ("mine_measured.Needs", 2, "mine_measured.Needs can't be made from the command line: its what has no default"),
        ("subprocess.Popen", 2, "subprocess.Popen can't be named by a config"),
        ("map", 1, "map is of multilabel targets, and blobs has label ones: take accuracy, top5,"),
    ],
)
def test_what_is_no_measure_is_said_before_anything_is_learned(
    folder: Path, capsys: pytest.CaptureFixture[str], measures: str, status: int, sentence: str
) -> None:
    assert main(["run", *SHORT, "--measures", measures]) == status
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error and error.count("clstream: error") == 1
    (folder / "refused.yaml").write_text(yaml.safe_dump({"measures": measures.split(",")}))
    assert main(["run", "--config", "refused.yaml", *SHORT]) == status
    assert sentence in " ".join(capsys.readouterr().err.split())


DIGITS = ["--strategy", "Finetune", "--stream", "split_digits", "--stream.tasks", "2", "--stream.epochs", "1", *SHORT[6:]]


def test_probes_are_asked_about_beside_the_tasks(folder: Path) -> None:
    wanted = ["--probes", "held_out_classes:1+9,corrupted:blur:3", "--measures", "auroc"]
    result = run_experiment([*DIGITS, "--stream.validation", "0.2", "--tune", *wanted]).results[0]
    copies = ("corrupted/blur_3/task_00", "corrupted/blur_3/task_01")
    assert result.test_sets == ("task_00", "task_01", "held_out_classes/1_9", *copies, "seen")
    assert result.measured["auroc"][0, 2].isfinite() and result.measured["accuracy"][-1].isfinite().all()
    (folder / "probed.yaml").write_text("probes: [held_out_classes:1+9, corrupted:blur:3]\nmeasures: [auroc]\n")
    again = run_experiment(["--config", "probed.yaml", *DIGITS, "--stream.validation", "0.2", "--tune"]).results[0]
    assert again.measured["auroc"].nan_to_num(-1).equal(result.measured["auroc"].nan_to_num(-1))


@pytest.mark.parametrize(
    ("probes", "sentence"),
    [
        ("strange:mnist", "--probes must be one of unknown, corrupted, held_out_classes, noise, not 'strange'"),
        ("corrupted:blurr", "--probes: corrupted:blurr: kind must be one of noise, blur, occlusion, contrast, not 'blurr'"),
        ("corrupted:blur:3,corrupted:blur:3", "corrupted/blur_3/task_00"),
        ("held_out_classes:77", "has no classes [77]"),
    ],
)
def test_what_is_no_probe_is_said_before_anything_is_learned(
    folder: Path, capsys: pytest.CaptureFixture[str], probes: str, sentence: str
) -> None:
    assert main(["run", *DIGITS, "--probes", probes]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error and error.count("clstream: error") == 1


@pytest.mark.slow
def test_a_run_is_resumed_with_its_own_measures_and_probes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--probes", "corrupted:blur:1", "--measures", "top5", "--checkpoint_every", "1e-9", "--checkpoint_share", "1"]
    options = ["run", *(word for word in DIGITS if word not in ("--checkpoint_every", "0")), *kept]
    assert main([*options, "--max_sessions", "1"]) == 0
    (config,) = folder.glob("runs/*/config.yaml")
    loaded = yaml.safe_load(config.read_text())
    assert (loaded["probes"], loaded["measures"]) == ("corrupted:blur:1", "top5")
    capsys.readouterr()
    assert main(["resume", str(config.parent)]) == 0 and "was measured then" in capsys.readouterr().err
    for changed, sentence in (
        ({"measures": "nll"}, "measures was 'accuracy, task_accuracy, top5'"),
        ({"probes": []}, "probes was"),
    ):
        config.write_text(yaml.safe_dump(loaded | changed))
        assert main(["resume", str(config.parent)]) == 1
        assert sentence in " ".join(capsys.readouterr().err.split())
