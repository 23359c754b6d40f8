"""`clstream compare`: configs that are run and records that are read, in one comparison, printed and written."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from test_comparison import three

from clstream.cli import main
from clstream.comparison import append_record, read_records

CONFIG = """\
stream: {{class_path: blobs, init_args: {{train_per_class: 20}}}}
strategy: {}
model: {{class_path: Mlp, init_args: {{hidden: [16]}}}}
"""


@pytest.fixture
def folder(store: str, tmp_path: Path) -> Path:
    """A working folder with an MLflow store, a sweep's folder, and two configs."""
    for record in three():
        (tmp_path / "sweeps" / "mnist").mkdir(parents=True, exist_ok=True)
        append_record(tmp_path / "sweeps" / "mnist" / "records.jsonl", record)
    for name in ("Finetune", "Replay"):
        (tmp_path / f"{name}.yaml").write_text(CONFIG.format(name))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(["compare", *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_a_sweep_is_read_and_tables_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--latex", "t.tex", "--csv", "t.csv", "--markdown", "t.md"]
    text = said(capsys, 0, "sweeps/mnist", "--metrics", "average_accuracy, memory_bytes", *files)
    assert "0.822 ± 0.010 *" in text and "Replay beats Finetune" in text and "forgetting" not in text
    assert text.rstrip().endswith("written: t.tex, t.md, t.csv, t_differences.csv")
    assert r"\mathbf{0.822 \pm 0.010}" in (folder / "t.tex").read_text() and "**0.822 ± 0.010**" in (folder / "t.md").read_text()
    rows = list(csv.DictReader((folder / "t.csv").open()))
    assert [(row["method"], row["metric"], row["runs"]) for row in rows][:2] == [
        ("Replay", "average_accuracy", "5"), ("Replay", "memory_bytes", "5"),
    ]  # fmt: skip
    differences = list(csv.DictReader((folder / "t_differences.csv").open()))
    assert [row["better"] for row in differences] == ["", "Replay", "DERpp"]


def test_one_method_against_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 0, "sweeps/mnist/records.jsonl", "--against", "Finetune")
    assert "Holm's correction for 2 pairs" in text and "not shown to differ" not in text


@pytest.mark.slow
def test_configs_are_run_and_compared_with_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--track", "false", "--threads", "1")
    text = said(capsys, 0, "Finetune.yaml", "Replay.yaml", "--seeds", "0,1,2", *quick)
    assert "mean ± standard deviation over 3 seeds" in text  # as it was
    assert "mean ± half its 95 % interval (Student's t) over 3 runs" in text
    assert "average_accuracy on blobs: mean differences, by paired t-tests with Holm's correction for 1 pair:" in text
    lone = said(capsys, 0, "Finetune.yaml", "Replay.yaml", *quick)
    assert "interval" not in lone and "paired" not in lone
    again = said(capsys, 0, "Replay.yaml", "runs", "--seeds", "1,2", "--metrics", "forgetting", *quick)
    assert "counted once" in again and "over 3 runs" in again  # of the folder's records, which have these two


@pytest.mark.slow
def test_configs_that_differ_in_what_params_do_not_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more.yaml").write_text((folder / "Replay.yaml").read_text().replace("20", "30"))
    text = said(capsys, 0, "Replay.yaml", "more.yaml", "--seeds", "0,1", "--track", "false")
    assert "Replay (Replay) " in text and "Replay (more) " in text and "paired" not in text  # other data: there are no pairs
    assert "blobs came in 2 orders, or versions of its data" in text


@pytest.mark.slow
def test_mlflow_experiments_are_read(store: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "0,1", "--experiment", "mine", "--threads", "1"]
    for name in ("Finetune", "Replay"):
        assert main(["run", "--config", f"{name}.yaml", *options]) == 0
    capsys.readouterr()
    text = said(capsys, 0, "mlflow:mine")
    assert text.count("± ") >= 3 and "Holm's correction for 1 pair" in text
    assert said(capsys, 0, "mlflow:mine", "--tracking-uri", store) == text
    assert said(capsys, 0, "runs").splitlines()[:4] == text.splitlines()[:4]  # the same runs, from their folders
    assert "there is no MLflow experiment 'other'" in said(capsys, 1, "mlflow:other")


@pytest.mark.slow
def test_pictures_are_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "written: " in said(capsys, 0, "sweeps/mnist", "--pictures", "pictures")
    assert [*(folder / "pictures").glob("*.pdf")] and [*(folder / "pictures").glob("*.png")]


@pytest.mark.parametrize(
    ("status", "arguments", "sentence"),
    [
        (2, ["--metrics", "forgeting"], "no run has a metric 'forgeting', did you mean 'forgetting'?"),
        (2, ["--metrics", "acuracy"], "no run has a metric 'acuracy', did you mean 'average_accuracy'?"),
        (2, ["--metrics", ","], "--metrics takes names by comma"),
        (2, ["--against", "EWC"], "there is no method 'EWC'"),
        (2, ["--seeds", "0"], "unknown option --seeds"),
        (2, ["--latex", "none/t.tex"], "--latex none/t.tex can't be written: the folder"),
        (2, ["--latex", "sweeps"], "--latex takes a file, and sweeps is none"),
        (2, ["--pictures", "Replay.yaml"], "--pictures takes a folder, and Replay.yaml is none"),
        (1, ["mlflow:clstream"], "there is no MLflow experiment 'clstream'"),
        (1, ["missing.jsonl"], "there is no missing.jsonl"),
        (1, ["sweeps/missing"], "there is no sweeps/missing: give a sweep's folder"),
        (2, ["--latx", "t.tex"], "unknown option --latx: did you mean --latex?"),
        (1, ["sweeps"], "there are no records in sweeps"),
    ],
)
def test_what_can_not_be_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], status: int, arguments: list[str], sentence: str
) -> None:
    text = said(capsys, status, "sweeps/mnist", *arguments)
    assert sentence in text and len(text.splitlines()) == 1


def test_nothing_is_run_before_all_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none/t.csv can't be written" in said(capsys, 2, "Replay.yaml", "--csv", "none/t.csv")
    assert "there is no missing.jsonl" in said(capsys, 1, "Replay.yaml", "missing.jsonl")
    assert not (folder / "runs").exists()


def test_names_in_records_steer_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "odd.jsonl"
    file.write_text((folder / "sweeps/mnist/records.jsonl").read_text().replace('"DERpp"', '"\\u001b[31mDE\\nR[bold]pp"'))
    assert read_records(file)[5].label == "\x1b[31mDE\nR[bold]pp"
    text = said(capsys, 0, "odd.jsonl", "--latex", "t.tex")
    assert "\x1b" not in text and "\\x1b[31mDE R[bold]pp" in text
    assert r"\textbackslash{}x1b[31mDE R[bold]pp & " in (folder / "t.tex").read_text()


def test_no_name_in_a_record_is_more_than_text_in_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "sweeps/mnist/records.jsonl").read_text()
    odd = "=1+\\u001b[1m<b>|[a](b)\\\\input{x}`"
    for name in ('"DERpp"', '"split_mnist"', '"class"', "accuracy"):
        text = text.replace(name, name.replace(name.strip('"'), odd))
    (folder / "odd.jsonl").write_text(text)
    written = said(capsys, 0, "odd.jsonl", "--latex", "t.tex", "--csv", "t.csv", "--markdown", "t.md")
    tables = [(folder / name).read_text() for name in ("t.tex", "t.csv", "t.md")]
    assert "\x1b" not in "".join([written, *tables])
    with (folder / "t.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=1+" in " ".join(cells) and not any(cell.startswith("=") for cell in cells)
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(", tables[2])
    shown = [line for line in tables[0].splitlines() if not line.startswith("%")]
    assert "\\input" not in "".join(shown) and "textbackslash{}input" in "".join(shown)


@pytest.mark.slow
def test_a_tuned_config_is_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "Replay.yaml").write_text((folder / "Replay.yaml").read_text() + "tuned: '12 trials on ''blobs'''\n")
    quick = ("--seeds", "0,1", "--track", "false", "--threads", "1", "--metrics", "average")
    assert "│ Replay   │ 12 trials │" in said(capsys, 0, "Replay.yaml", "Finetune.yaml", *quick)
    text = said(capsys, 0, "runs")  # from the folders
    assert "│ Replay   │ 12 trials │" in text and "\ntuned on 'blobs'\n" in text and "│ Finetune │ no " in text
