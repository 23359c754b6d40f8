"""Reports follow the main measure: tables, curves, logs, charts and anchors of runs whose main measure is no accuracy."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clstream.strategies import Finetune
from mlflow.tracking import MlflowClient
from rich.console import Console

from clstream import metrics, run
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.cli.anchors import load_anchor
from clstream.cli.errors import UsageError
from clstream.cli.tables import show_measured
from clstream.figures import accuracy_against_cost, accuracy_matrix, forgetting_curves, sparklines
from clstream.progress import ProgressBar
from clstream.results import Evaluation, Result
from clstream.stream import Stream, TestSet
from clstream.tracking import EventLog, event_log, event_log_text
from clstream.tracking.mlflow_store import charts_view
from clstream.tracking.run_metrics import session_metrics, tasks_with_curves

CANVAS = {"class_path": "multilabel_canvas", "init_args": {"train": 100, "test": 40, "tasks": 2, "epochs": 1}}
VALUES = {"class_path": "split_regression", "init_args": {"epochs": 1}}
MLP = {"class_path": "Mlp", "init_args": {"hidden": [8]}}


def config(folder: Path, name: str, **options: Any) -> str:
    whole = {"strategy": "Finetune", "model": MLP, "checkpoint_every": 0, "threads": 1} | options
    (folder / name).write_text(yaml.safe_dump(whole))
    return name


def mixed() -> Stream:
    kinds = ("label", "multilabel", "value")
    tasks = [replace(example_stream(target=kind).tasks[number], id=number) for number, kind in enumerate(kinds)]
    return Stream("mixed", tasks, batch_size=8, schedule=(0, 1, 2, 0, 1, 2))


def test_bars_take_values_below_0_above_1_and_none() -> None:
    nan = torch.nan
    lines = sparklines(torch.tensor([[-3.0, nan], [1.0, nan], [-1.0, -1.0]], dtype=torch.float64), torch.eye(3, 2).bool())
    assert [line.split()[2][:3] for line in lines] == ["▁█▅", "?▅"] and lines[0].endswith("-3.00 -> -1.00")
    assert lines[1].endswith("nan -> -1.00")
    above = sparklines(torch.tensor([[2.0], [1.0]], dtype=torch.float64), torch.tensor([[True], [False]]))
    assert above[0].split()[2] == "█▅"
    assert sparklines(torch.full((2, 2), nan, dtype=torch.float64))[0].split()[2] == "??"


@pytest.mark.parametrize("measure", ["r2", "map", "accuracy/map", "accuracy/r2"])
def test_pictures_have_the_scale_of_their_measure(measure: str) -> None:
    matrix = torch.tensor([[0.5, -2.0], [0.1, 0.4]], dtype=torch.float64)
    bounded = "r2" not in measure
    axes = forgetting_curves(matrix, measure=measure).axes[0]
    assert axes.get_ylabel() == measure and (axes.get_ylim() == (-0.02, 1.02)) == bounded
    picture = accuracy_matrix(matrix, measure=measure).axes[0].images[0]
    assert (picture.get_clim() == (0.0, 1.0)) == bounded
    against = accuracy_against_cost({"a": (matrix[0], matrix[1])}, measure=measure).axes[0]
    assert against.get_ylabel() == f"average {measure}" and (against.get_ylim() == (-0.02, 1.02)) == bounded


@pytest.mark.parametrize(("target", "name"), [("label", "accuracy"), ("multilabel", "map"), ("value", "r2")])
def test_the_log_and_the_bar_say_the_main_measure(tmp_path: Path, target: str, name: str) -> None:
    bar = ProgressBar(console=Console(file=io.StringIO()))
    log = EventLog(tmp_path)
    result = run(Finetune(example_model()), example_stream(target=target, epochs=2), log, bar, evaluate_every=10)
    assert f": {name} {result.average:.3f}, forgetting" in bar.console.file.getvalue()  # type: ignore[union-attr]  # it is one
    lines = [line for line in event_log_text.format_log(event_log.read(tmp_path)) if f" {name} " in line]
    assert len(lines) == len(result.probes)
    row = " ".join(f"{value:.3f}" for value in result.main[-1].tolist())
    assert lines[-1].endswith(f"{name} {result.average:.3f}, forgetting {result.forgetting:.3f}: {row}")
    within = next(line for line in lines if "batches" in line)
    assert within.endswith(" ".join(f"{value:.3f}" for value in result.probes[0].tolist()))


@pytest.mark.slow
def test_runs_of_other_main_measures_have_tables_of_their_own(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [config(tmp_path, "canvas.yaml", stream=CANVAS, seeds=[0, 1]), config(tmp_path, "values.yaml", stream=VALUES)]
    files += [config(tmp_path, "again.yaml", stream=VALUES, strategy="Replay")]
    assert main(["compare", *files]) == 0
    text = capsys.readouterr().out
    headings = [line.split() for line in text.splitlines() if "forgetting" in line]
    assert [words[3] for words in headings] == ["map", "r2"] and text.count("Replay on split_regression") == 2
    assert "The main measures, map and r2, can't be compared: each has a table of its own." in text
    assert "map on each task, session by session" in text and text.count("r2 on each task, session by session") == 2
    client = MlflowClient(store)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("clstream").experiment_id])}
    (comparison,) = [name for name in runs if name.startswith("comparison")]
    assert "split_regression" not in comparison and "canvas" not in comparison
    names = {artifact.path for artifact in client.list_artifacts(runs[comparison].info.run_id)}
    assert {"comparison.png", "r2_against_cost.png"} <= names
    parent = next(run for name, run in runs.items() if name.startswith("Finetune on multilabel_canvas") and "2 seeds" in name)
    assert {"map/mean", "map/task_00", "map/seen", "forgetting/mean", "std/map/mean", "final/average_map"} <= set(
        parent.data.metrics
    )


def measured(text: io.StringIO, result: Result) -> list[list[str]]:
    show_measured(Console(file=text, width=200), "run", [result, result])
    return [[cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")] for line in text.getvalue().splitlines()]


def test_what_else_was_measured_has_a_table() -> None:
    stream = example_stream()
    copies = [
        TestSet(f"dark/task_{task.id:02d}", replace(task.test[:], x=task.test[:].x // 2), task=task.id) for task in stream.tasks
    ]
    strange = TestSet("unknown/noise", replace(stream.tasks[0].test[:], x=255 - stream.tasks[0].test[:].x), known=False)
    stream = stream.with_probes(copies, strange)
    result = run(Finetune(example_model()), stream, measures=["nll", "auroc"], max_sessions=2)
    table = measured(io.StringIO(), result)
    assert table[2] == ["measure", "mean of tasks", "all seen", "dark, mean", "unknown/noise"]
    cells = {line[0]: line[1:] for line in table[4:-1]}
    assert set(cells) == {"accuracy", "task_accuracy", "nll (lower is better)", "auroc"}
    assert cells["auroc"][:3] == ["-", "-", "-"] and cells["accuracy"][3] == "-"
    last = result.measured["nll"][-1]
    expected = [float(last[:2].mean()), float(last[-1]), float(last[3:5].mean())]
    assert cells["nll (lower is better)"][:3] == [f"{value:.3f} ± 0.000" for value in expected]
    text = io.StringIO()
    show_measured(Console(file=text), "run", [run(Finetune(example_model()), example_stream(target="multilabel"))])
    assert text.getvalue() == ""


def test_charts_begin_with_the_main_measures() -> None:
    names = ["map/task_00", "map/mean", "task_il/map/mean", "r2/mean", "anytime/task_00", "loss", "top5/mean", "accuracy/dark/a"]
    view = charts_view(names, "a first look/curves")
    assert [section["name"] for section in view["compareRunSections"][1:-2]] == ["map", "r2", "task_il/map", "anytime"]
    assert view["isAccordionReordered"]
    charts = {chart["metricKey"]: chart.get("range") for chart in view["compareRunCharts"][1:]}
    assert charts["map/mean"] == charts["task_il/map/mean"] == {"yMin": -0.02, "yMax": 1.02}
    assert charts["r2/mean"] is None and charts["anytime/task_00"] is None and "top5/mean" not in charts
    plain = charts_view(["accuracy/mean", "anytime/task_00"], "a first look/curves")
    assert all("range" in chart for chart in plain["compareRunCharts"][1:]) and "isAccordionReordered" not in plain


def test_metrics_of_tasks_of_several_kinds_are_of_the_main_matrix() -> None:
    result = run(Finetune(example_model()), mixed())
    values = session_metrics(result, torch.ones(3, dtype=torch.bool))
    assert values["forgetting/mean"] == metrics.forgetting(result.main, result.taught) == result.forgetting
    assert values["transfer/backward"] == metrics.backward_transfer(result.main, result.taught)
    for task, name in enumerate(("accuracy", "map", "r2")):
        assert values[f"{name}/task_0{task}"] == values[f"{name}/mean"] == float(result.main[-1, task])


@pytest.mark.parametrize("tasks", [3, 150])
def test_copies_of_a_tasks_test_set_have_curves_as_the_task_has(tasks: int) -> None:
    own = [f"task_{task:03d}" for task in range(tasks)]
    names = (*own, "dark", *(f"dark/{name}" for name in own), "seen")
    values = {"accuracy": torch.arange(len(names)).double()}
    evaluation = Evaluation(names, ("label",) * tasks, "class", values).after(values, 0, 10, False, 1)
    metrics_of = session_metrics(evaluation, torch.arange(tasks) < 2)
    shown = [0, 1, 2] if tasks == 3 else tasks_with_curves(150)
    for prefix, first in (("accuracy", 0), ("accuracy/dark", tasks + 1)):
        expected = {f"{prefix}/{own[task]}": float(first + task) if task < 2 else math.nan for task in shown}
        found = {name: metrics_of[name] for name in metrics_of if name.rpartition("/")[0] == prefix and "task" in name}
        assert found == pytest.approx(expected, nan_ok=True)
    assert metrics_of["accuracy/dark"] == tasks


ANCHOR: dict[str, Any] = {
    "about": "several labels", "config": {"strategy": "Finetune", "stream": CANVAS, "model": MLP}, "seeds": [0],
    "metric": "average", "expected": 0.4, "spread": 0.2, "runs": 10, "source": "here", "kind": "own", "minutes": 0.1,
}  # fmt: skip


def test_an_anchor_names_its_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "named.yaml"
    file.write_text(yaml.safe_dump(ANCHOR | {"measure": "of1", "expected": 0.1, "spread": 0.2, "also": {"seen": [0.1, 0.2]}}))
    assert main(["verify", str(file)]) == 0
    text = capsys.readouterr().out
    assert "named: of1 average " in text and "named: of1 seen " in text and text.count("INSIDE") == 2
    anchor = load_anchor(str(file))
    result = run(Finetune(example_model()), example_stream(target="multilabel", epochs=2), measures=["of1", "cf1:0.5"])
    assert anchor.value(result) == pytest.approx(float(result.measured["of1"][-1, :3].mean()))
    assert replace(anchor, metric="seen").value(result) == float(result.measured["of1"][-1, -1])
    assert replace(anchor, measure="cf1:0.5").value(result) == pytest.approx(float(result.measured["cf1"][-1, :3].mean()))
    assert replace(anchor, measure="").value(result) == result.average
    lower = run(Finetune(example_model()), example_stream(epochs=2), measures=["nll"])
    forgotten = metrics.forgetting(lower.measured["nll"][:, :3], lower.taught, higher_is_better=False)
    assert replace(anchor, measure="nll", metric="forgetting").value(lower) == forgotten > 0
    for measure, sentence in (
        ("mapp", "there is no measure 'mapp'"),
        ("auroc", "auroc is of strange samples"),
        (3, "must be a name"),
    ):
        file.write_text(yaml.safe_dump(ANCHOR | {"measure": measure}))
        with pytest.raises(UsageError, match=sentence):
            load_anchor(str(file))


def test_a_probe_is_not_called_as_a_column_of_tables() -> None:
    stream = example_stream()
    with pytest.raises(ValueError, match="the probe mean is called as a column of tables is"):
        stream.with_probes(TestSet("mean", stream.tasks[0].test))
