"""Details: what was answered about each test sample, from the pass that is measured, the same however often the run was killed."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import multilabel_canvas
from mlflow.tracking import MlflowClient
from own_code import Stop
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from clstream import SessionStarted, Strategy, on, run
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.cli import main
from clstream.models import Mlp
from clstream.results import Result
from clstream.stream import Samples, Stream, TestSet
from clstream.tracking import Details

FILES = {"classes.csv", "confusion.csv", "confusion.png", "predictions.npz"}


def detailed(folder: Path, stream: Stream, which: str = "last", strategy: Strategy | None = None, **options: Any) -> Result:
    return run(strategy or Replay(example_model()), stream, Details(folder, which), **options)


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def column(file: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_probe(**options: Any) -> Stream:
    noise = torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    stream = replace(example_stream(**options), class_names=("a", "b,c", "$d", "=e", "é", "true"))
    return stream.with_probes(TestSet("unknown/noise", Samples(noise, torch.arange(30)), known=False))


@pytest.mark.parametrize("boundaries", [True, False])
def test_labels_have_predictions_rows_by_class_and_a_confusion_matrix(tmp_path: Path, boundaries: bool) -> None:
    stream, strategy = with_probe(epochs=2, boundaries=boundaries), Replay(example_model())
    result = detailed(tmp_path, stream, strategy=strategy, measures=["auroc"], max_sessions=2, evaluate_every=5)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    kept = np.load(tmp_path / "predictions.npz", allow_pickle=False)
    assert kept["test_sets"].tolist() == list(result.test_sets[:-1]) and tuple(kept["class_names"]) == stream.class_names
    for number, test_set in enumerate(stream.test_sets):
        own = kept["test_set"] == number
        samples = test_set.samples[:]
        assert kept["row"][own].tolist() == list(range(len(samples))) and kept["y"][own].tolist() == samples.y.tolist()
        assert kept["prediction"][own].tolist() == strategy.predict(samples.x).tolist()
        assert torch.from_numpy(kept["scores"][own]).allclose(strategy.scores(samples.x))
    with (tmp_path / "confusion.csv").open() as file:
        table = list(csv.reader(file))
    names = table[0][1:]
    counts = np.array([row[1:] for row in table[1:]], dtype=int)
    assert [row[0] for row in table[1:]] == names and set(stream.class_names[:4]) <= set(names)
    assert counts.sum() == 40 and counts.trace() / 40 == float(result.measured["accuracy"][-1, -1])
    y, answers = (kept[name][kept["test_set"] < 2] for name in ("y", "prediction"))
    assert [row["name"] for row in rows(tmp_path / "classes.csv")] == list(stream.class_names[:4])
    scored = sklearn_metrics.precision_recall_fscore_support(y, answers, labels=range(4), zero_division=np.nan)
    for name, expected in zip(("precision", "recall", "f1", "samples"), scored, strict=True):
        if name == "f1":
            expected = np.nan_to_num(expected)  # scikit-learn's is NaN where precision is
        assert np.nan_to_num(column(tmp_path / "classes.csv", name)).tolist() == pytest.approx(np.nan_to_num(expected).tolist())


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_several_labels_have_rows_by_class(tmp_path: Path, scenario: str) -> None:
    stream = multilabel_canvas(tasks=2, train=200, test=60, epochs=4, scenario=scenario)
    strategy = Finetune(Mlp(stream.input_shape, stream.outputs, hidden=(32,)))
    result = detailed(tmp_path, stream, strategy=strategy, measures=["of1"])
    assert {path.name for path in tmp_path.iterdir()} == {"classes.csv", "predictions.npz"}
    kept = np.load(tmp_path / "predictions.npz", allow_pickle=False)
    assert len(kept["row"]) > 60  # a canvas may be in the test sets of both tasks
    assert set(column(tmp_path / "classes.csv", "samples")) == {60}
    if scenario == "class":
        average = np.mean(column(tmp_path / "classes.csv", "average_precision"))
        assert average == pytest.approx(float(result.measured["map"][-1, -1]), abs=1e-6)
        positives = column(tmp_path / "classes.csv", "positives")
        right = sum(np.nan_to_num(column(tmp_path / "classes.csv", "recall")) * positives)
        overall = 2 * right / (sum(positives) + sum(column(tmp_path / "classes.csv", "answered")))
        assert overall == pytest.approx(float(result.measured["of1"][-1, -1]), abs=1e-6)


def test_values_have_rows_by_output(tmp_path: Path) -> None:
    result = detailed(tmp_path, example_stream(target="value", epochs=3), measures=["mse"])
    assert {path.name for path in tmp_path.iterdir()} == {"outputs.csv", "predictions.npz"}
    assert np.mean(column(tmp_path / "outputs.csv", "mse")) == pytest.approx(float(result.measured["mse"][-1, -1]))
    assert np.mean(column(tmp_path / "outputs.csv", "r2")) == pytest.approx(float(result.measured["r2"][-1, -1]))


def test_tasks_of_several_kinds_have_files_of_their_own(tmp_path: Path) -> None:
    kinds = ("label", "multilabel", "value")
    tasks = [replace(example_stream(target=kind).tasks[number], id=number) for number, kind in enumerate(kinds)]
    detailed(tmp_path, Stream("mixed", tasks, batch_size=8), strategy=Finetune(example_model()))
    assert {path.name for path in tmp_path.iterdir()} == {
        "classes_label.csv", "classes_multilabel.csv", "outputs_value.csv", "confusion_label.csv", "confusion.png",
        *(f"predictions_{kind}.npz" for kind in kinds),
    }  # fmt: skip


@pytest.mark.parametrize("target", ["label", "multilabel"])
def test_strange_samples_with_targets_of_another_kind_have_a_file_of_their_own(tmp_path: Path, target: str) -> None:
    other = {"label": "multilabel", "multilabel": "label"}[target]
    strange = TestSet("strange", example_stream(target=other).tasks[0].test, known=False)
    detailed(tmp_path / "plain", example_stream(target=target))
    detailed(tmp_path / "probed", example_stream(target=target).with_probes(strange), measures=["auroc"])
    plain, probed = contents(tmp_path / "plain"), contents(tmp_path / "probed")
    assert probed.keys() - plain.keys() == {f"predictions_{other}.npz"} and plain["classes.csv"] == probed["classes.csv"]
    kept = np.load(tmp_path / "probed" / f"predictions_{other}.npz")
    assert set(kept["test_sets"][kept["test_set"]]) == {"strange"} and len(kept["scores"]) == len(strange.samples)


def test_files_are_called_by_the_streams_kinds_however_few_were_asked_about(tmp_path: Path) -> None:
    tasks = [replace(example_stream(target=kind).tasks[number], id=number) for number, kind in enumerate(("label", "value"))]
    stream = Stream("mixed", tasks, batch_size=8)
    detailed(tmp_path, stream, "all", Finetune(example_model()), evaluate_on="seen")
    first, second = (set(contents(tmp_path / f"sessions_000{number}")) for number in (1, 2))
    assert first == {"predictions_label.npz", "classes_label.csv", "confusion_label.csv"} < second


@pytest.mark.parametrize(
    "options",
    [
        {}, {"boundaries": False}, {"target": "multilabel"}, {"target": "multilabel", "scenario": "task"},
        {"target": "multilabel", "boundaries": False}, {"target": "value"},
    ],
)  # fmt: skip
def test_details_cost_no_forward_pass(tmp_path: Path, options: dict[str, Any]) -> None:
    calls = []

    class Counts(Finetune):
        def scores(self, x: Tensor, task: Any = None) -> Tensor:
            calls.append(len(x))
            return super().scores(x, task)

    plain = run(Counts(example_model()), example_stream(**options))
    without, calls = list(calls), []
    with_details = detailed(tmp_path, example_stream(**options), strategy=Counts(example_model()))
    assert calls == without and torch.equal(plain.main, with_details.main) and with_details.cost.evaluating_flops.min() > 0
    assert torch.equal(plain.cost.evaluating_flops, with_details.cost.evaluating_flops)


class Killed(Checkpoints):
    """Keeps checkpoints, and what was in the folder when each was written: what a run that is killed then leaves."""

    def __init__(self, folder: Path) -> None:
        super().__init__(every=7)
        self.folder, self.left = folder, list[dict[str, bytes]]()

    def keep(self) -> None:
        super().keep()
        self.left.append(contents(self.folder))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["last", "all"])
def test_a_resumed_run_has_the_same_files(tmp_path: Path, which: str) -> None:
    """Also from the checkpoint after the last evaluation, which no other one follows."""
    stream, whole = with_probe(epochs=2), tmp_path / "whole"
    killed = Killed(whole)
    run(Replay(example_model()), stream, Details(whole, which), killed)
    expected = contents(whole)
    assert len(expected) == (4 if which == "last" else 10)
    for number in (len(killed.left) // 2, len(killed.left) - 1):
        folder = tmp_path / str(number)
        for name, content in killed.left[number].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        assert contents(folder) != expected
        run(Replay(example_model()), stream, Details(folder, which), resume=killed.load(number))
        assert contents(folder) == expected


def test_all_evaluations_have_a_folder_and_a_new_run_takes_those_of_an_old_one_away(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("kept")
    detailed(tmp_path, example_stream(), "all", evaluate_every=4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "sessions_0001", "sessions_0002", "sessions_0003", "confusion.png", "mine.csv",
    }  # fmt: skip
    assert [len(rows(tmp_path / f"sessions_000{number}" / "classes.csv")) for number in (1, 2, 3)] == [2, 4, 6]
    detailed(tmp_path, example_stream(), "last", max_sessions=1)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "mine.csv"} and len(rows(tmp_path / "classes.csv")) == 2


def test_a_run_that_fails_has_those_of_its_newest_evaluation(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Replay(example_model()), example_stream(), Details(tmp_path), Stop(20))
    assert {path.name for path in tmp_path.iterdir()} == FILES and len(rows(tmp_path / "classes.csv")) == 4


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    class Breaks:
        @on(SessionStarted)
        def away(self, event: SessionStarted) -> None:
            if event.session.index == 1:
                (tmp_path / "sessions_0002").write_text("in the way")

    with pytest.warns(RuntimeWarning, match="details can't be written to .*: the run goes on without"):
        result = run(Replay(example_model()), example_stream(), Breaks(), Details(tmp_path, "all"))
    assert len(result.accuracy) == 3 and (tmp_path / "sessions_0003" / "predictions.npz").is_file()


@pytest.mark.parametrize("state", [{"counts": torch.zeros(2, 3), "labels": [0, 1]}, {"counts": torch.zeros(1, 1), "labels": ["x"]}])
def test_a_state_that_is_none_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the state of Details has no confusion matrix with its labels"):
        Details(tmp_path).load_state_dict(state)


@pytest.mark.slow
def test_the_command_line_has_them_in_the_run_folder_and_in_mlflow(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["run", "--stream", "blobs", "--stream.train_per_class", "20", "--strategy", "Finetune", "--threads", "1"]
    assert main([*options, "--details", "all", "--max_sessions", "2", "--checkpoint_every", "1e-6"]) == 0
    (folder,) = Path("runs").glob("*/seed_0/details")
    assert {path.name for path in folder.iterdir()} == {"sessions_0001", "sessions_0002", "confusion.png"}
    client = MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    paths = {artifact.path for artifact in client.list_artifacts(found.info.run_id, "details")}
    assert paths == {"details/sessions_0001", "details/sessions_0002", "details/confusion.png"}
    inner = {artifact.path for artifact in client.list_artifacts(found.info.run_id, "details/sessions_0002")}
    assert inner == {f"details/sessions_0002/{name}" for name in FILES - {"confusion.png"}}
    capsys.readouterr()
    assert main([*options, "--details", "all", "--checkpoint_every", "0"]) == 2
    assert "--details needs a run folder, and --checkpoint_every 0 makes none" in capsys.readouterr().err
    assert main([*options, "--details", "some"]) == 2
    assert "--details takes one of last, all" in " ".join(capsys.readouterr().err.split())
