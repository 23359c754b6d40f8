"""Resuming on the command line: real processes that die, and what goes on afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from forked import Command
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from clstream.checkpoint import newest
from clstream.checkpoint.compare import difference
from clstream.checkpoint.store import files
from clstream.cli import kill_test, main
from clstream.files import locked
from clstream.serialization.compare import first_difference
from clstream.tracking.event_log import read

pytestmark = pytest.mark.slow

OWN = '''
from __future__ import annotations

import os, signal, time
from pathlib import Path

from torch import nn

from clstream import BatchLearned, TaskEnded, on
from clstream.strategies import Replay

SEEN = []


class Dies(Replay):
    """Dies once, where the file `die` says: seconds to wait after each batch, batches to live, and the signal."""

    def __init__(self, model: nn.Module, capacity: int = 40) -> None:
        super().__init__(model, capacity=capacity)
        self.batches = 0

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.batches += 1
        if Path("die").exists():
            pause, batches, number = Path("die").read_text().split()
            time.sleep(float(pause))
            if self.batches == int(batches):
                Path("die").unlink()
                os.kill(os.getpid(), int(number))


class Forgets(Dies):
    """Keeps something where no checkpoint looks."""

    @on(BatchLearned)
    def see(self, event: BatchLearned) -> None:
        SEEN.append(0)
        self.replay_batch = 10 + len(SEEN) // 8
'''
OPTIONS = [
    "--stream", "blobs", "--stream.train_per_class", "40", "--stream.batch_size", "8",
    "--strategy", "mine.Dies", "--model.hidden", "[16]",
]  # fmt: skip


@pytest.fixture
def own(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an MLflow store and the user's own strategies."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def die(pause: float, batches: int, number: int = signal.SIGKILL) -> None:
    Path("die").write_text(f"{pause} {batches} {int(number)}", encoding="utf-8")


def command(*arguments: str) -> int:
    """Run a command in a process of its own; return its exit code."""
    with Path("printed.txt").open("a") as output:
        return Command([sys.executable, "-m", "clstream.cli", *arguments, "--threads", "1"], stdout=output).wait()


def runs(experiment: str) -> list[Run]:
    client = MlflowClient()
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    names = [name for name in run.data.metrics if "second" not in name and "peak" not in name]  # these are readings of a clock
    history = {name: MlflowClient().get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(point.step, point.value) for point in points] for name, points in history.items()}


def logged(folder: Path) -> list[dict]:
    entries = [entry for entry in read(folder) if entry["event"] != "Resumed"]
    return [{name: value for name, value in entry.items() if name not in ("time", "seconds")} for entry in entries]


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def seed_folder(folder: str, seed: int = 0) -> Path:
    return next(Path(folder).glob("*")) / f"seed_{seed}"


@pytest.fixture(scope="module")
def undisturbed_once(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an MLflow store and a run that nothing happens to, for two seeds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(migrated, folder / "mlflow.db")
    (folder / "mine.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.delitem(sys.modules, "mine", raising=False)
        assert main(["run", *OPTIONS, "--seeds", "0,1", "--experiment", "undisturbed", "--runs", "undisturbed"]) == 0
    return folder


@pytest.fixture
def undisturbed(undisturbed_once: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of that run, copied to the test's own working folder and MLflow store."""
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    shutil.copy(undisturbed_once / "mlflow.db", "mlflow.db")
    shutil.copytree(undisturbed_once / "undisturbed", "undisturbed")
    return next(Path("undisturbed").glob("*"))


def test_a_killed_run_goes_on_in_its_mlflow_run(own: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    die(0.02, 37)
    code = command("run", *OPTIONS, "--experiment", "killed", "--checkpoint_every", "0.1")
    assert code == -signal.SIGKILL, Path("printed.txt").read_text()
    folder = next(Path("runs").glob("*"))
    assert newest(folder / "seed_0")["step"] < 37
    before = runs("killed")[0]
    assert before.info.status == "RUNNING"
    text = said(capsys, 0, "resume", before.info.run_id)
    assert "going on in runs/Dies-blobs-" in text and "Dies on blobs" in text
    (after,) = runs("killed")
    assert after.info.run_id == before.info.run_id and after.info.status == "FINISHED"
    whole = next(run for run in runs("undisturbed") if run.info.run_name.endswith("seed 0"))
    assert curves(after) == curves(whole)
    assert after.data.params == whole.data.params
    assert difference(newest(undisturbed / "seed_0"), newest(folder / "seed_0")) is None
    assert logged(folder / "seed_0") == logged(undisturbed / "seed_0")
    artifacts = {artifact.path for artifact in MlflowClient().list_artifacts(after.info.run_id)}
    assert {"events.jsonl", "accuracy.csv", "forgetting_curves.png"} <= artifacts


def test_auto_begins_goes_on_and_then_has_nothing_to_do(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ("run", *OPTIONS, "--resume", "auto", "--track", "false", "--checkpoint_every", "0.05")
    for batches in (12, 30):
        die(0.01, batches)
        assert command(*again) == -signal.SIGKILL
    text = said(capsys, 0, *again)
    assert "going on in runs/Dies" in text
    (folder,) = Path("runs").iterdir()
    assert len([entry for entry in read(folder / "seed_0") if entry["event"] == "Resumed"]) == 2
    log = (folder / "seed_0" / "events.jsonl").read_bytes()
    assert "the run in runs/Dies" in (text := said(capsys, 0, *again)) and "is finished: nothing is run now" in text
    assert (folder / "seed_0" / "events.jsonl").read_bytes() == log  # it was over
    assert "Dies on blobs" in said(capsys, 0, "resume", str(folder / "seed_0"))
    assert "checkpoints in runs/Dies" in said(capsys, 0, "run", *OPTIONS, "--track", "false")  # without it, another try
    assert sorted(path.name for path in Path("runs").iterdir()) == [folder.name, f"{folder.name}.2"]
    assert f"the run in runs/{folder.name}.2 is finished" in said(capsys, 0, *again)
    assert "checkpoints in" in said(capsys, 0, *again, "--seed", "5")  # other options, another run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_several_seeds_go_on_together(
    own: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    die(0, 20, number)
    later = OWN.replace('if Path("die").exists():', 'SEEN.append(0)\n        if Path("die").exists() and len(SEEN) > 50:')
    (own / "mine.py").write_text(later)  # the first seed, of 50 batches, lives
    text = said(capsys, 128 + number, "run", *OPTIONS, "--seeds", "0,1", "--experiment", "stopped")
    folder = next(Path("runs").glob("*"))
    assert f"stopped by {number.name}; its checkpoint is in {folder}/seed_1" in text
    assert f"to go on: clstream resume {folder}" in text
    assert {run.info.run_name: run.info.status for run in runs("stopped")} == {
        "Dies on blobs, 2 seeds": "KILLED", "Dies on blobs, seed 0": "FINISHED", "Dies on blobs, seed 1": "KILLED",
    }  # fmt: skip
    (own / "mine.py").write_text(OWN)
    del sys.modules["mine"]
    first = (folder / "seed_0" / "events.jsonl").read_bytes()
    assert "± " in said(capsys, 0, "resume", str(folder), "--accept-changed-code")
    assert (folder / "seed_0" / "events.jsonl").read_bytes() == first  # the first seed was over
    after, whole = ({run.info.run_name: run for run in runs(name)} for name in ("stopped", "undisturbed"))
    assert {name: run.info.status for name, run in after.items()} == dict.fromkeys(whole, "FINISHED")
    for name in ("Dies on blobs, seed 0", "Dies on blobs, seed 1"):
        assert curves(after[name]) == curves(whole[name])
        assert after[name].data.tags["mlflow.parentRunId"] == after["Dies on blobs, 2 seeds"].info.run_id
    name = "Dies on blobs, 2 seeds"
    assert curves(after[name]) == curves(whole[name])
    assert "error" not in after["Dies on blobs, seed 1"].data.tags


def test_a_run_that_is_under_way_is_not_run_twice(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    die(5, 60)
    command = [sys.executable, "-m", "clstream.cli", "run", *OPTIONS, "--track", "false", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (folders := list(Path("runs").glob("*/seed_0"))) or not files(folders[0]):
        assert process.poll() is None
        time.sleep(0.01)
    text = said(capsys, 1, "run", *OPTIONS, "--track", "false", "--resume", "auto")
    assert "is in use by another process: wait for it to end" in text
    process.kill()
    process.communicate()
    with locked(folders[0].parent):
        pass


def test_what_cannot_be_resumed_is_said(own: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no run 'nowhere': give its folder below runs, or the id" in said(capsys, 2, "resume", "nowhere")
    assert "--resume takes" in said(capsys, 2, "run", "--resume", "sometimes")
    assert "--checkpoint_every must be seconds, or 0 for no checkpoints, not -1" in said(
        capsys, 2, "run", "--checkpoint_every", "-1"
    )
    (undisturbed / "seed_0" / "finished").unlink()
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    config["strategy"]["init_args"]["capacity"] = 77
    (undisturbed / "config.yaml").write_text(yaml.safe_dump(config))
    assert "the checkpoint is of another run: strategy.capacity was 40, now it is 77" in said(capsys, 1, "resume", str(undisturbed))


def test_without_checkpoints_there_is_no_folder(own: Path) -> None:
    assert main(["run", *OPTIONS, "--checkpoint_every", "0", "--track", "false"]) == 0
    assert not Path("runs").exists()


def test_a_read_only_place_is_a_sentence(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("a file is in the way", encoding="utf-8")
    assert "can't be made (Not a directory): name another place with --runs" in said(capsys, 1, "run", *OPTIONS, "--track", "false")


# The proof ----------------------------------------------------------------------------------------------------------------


def test_prove_resume(own: Path, migrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start = kill_test._ChildRun.start

    def start_with_tables(child: kill_test._ChildRun, every: float) -> None:
        """Start the process where MLflow's store has its tables already: making them takes seconds."""
        if not child.store.exists():
            shutil.copy(migrated, child.store)
        start(child, every)

    monkeypatch.setattr(kill_test._ChildRun, "start", start_with_tables)
    die(0.01, 1000)
    options = [*OPTIONS, "--stream.epochs", "4", "--threads", "1", "--out", "proof"]
    text = said(capsys, 0, "prove-resume", *options, "--kills", "2", "--kill-seed", "30")  # both in the first half of the time
    assert "2 kills" in text and "0 bits differ" in text
    assert int(text.partition("compared: ")[2].split()[0]) > 30


def test_too_short_a_run_proves_nothing(own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_test, "subprocess", SimpleNamespace(Popen=Command))
    monkeypatch.setattr(kill_test._ChildRun, "log_size", lambda self: 0)  # it sees no progress until the run is over
    options = ["--stream", "blobs", "--stream.train_per_class", "2", "--track", "false", "--model.hidden", "[4]", "--threads", "2"]
    text = said(capsys, 1, "prove-resume", *options, "--kills", "1")
    assert "it ended before it was killed" in text and "NOT PROVED: it was to be killed 1 times" in text


def test_prove_resume_finds_what_is_lost(own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_test, "subprocess", SimpleNamespace(Popen=Command))
    die(0.02, 1000)
    options = [*(option.replace("Dies", "Forgets") for option in OPTIONS), "--stream.epochs", "2", "--threads", "1"]
    options += ["--track", "false", "--out", "proof", "--kills", "1", "--kill-seed", "5"]  # after three fifths of the time
    text = said(capsys, 1, "prove-resume", *options)
    assert "DIFFERENT: Forgets." in text
    whole, killed = (newest(seed_folder(f"proof/{name}/runs"))["strategy"] for name in ("whole", "killed"))
    assert first_difference(whole, killed) is not None


def test_prove_resume_refuses(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--kills must be at least 1" in said(capsys, 2, "prove-resume", "--kills", "0")
    assert "runs one seed" in said(capsys, 2, "prove-resume", "--seeds", "0,1")
    assert "prove-resume sets --runs itself" in said(capsys, 2, "prove-resume", "--runs", "elsewhere")
    assert "unknown option --strategi" in said(capsys, 2, "prove-resume", "--strategi", "Replay")
    assert f"{os.curdir} is not empty" in said(capsys, 1, "prove-resume", "--out", ".")
    text = said(capsys, 1, "prove-resume", "--stream", "blobs", "--stream.tasks", "99", "--out", "proof")
    assert "the run itself failed: clstream: error: blobs: 10 classes make 1 to 10 tasks, not 99" in text
