"""`clstream parity`: what it compares is run on the same stream from the same weights, and what it says of it is so."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from clstream.experiments.parity.measuring import (
    KINDS,
    Labelled,
    Measured,
    make_model,
    make_stream,
    measure,
    select_methods,
    sort_by_class,
    table_row,
    welch,
)
from clstream.experiments.parity.methods import METHODS, Method, copies, their
from clstream.strategies import Finetune
from torch import nn

from clstream.cli import main

Import = Callable[[str], ModuleType]


def test_each_comparison_has_a_row_on_the_page_and_each_method_one_that_is_to_agree() -> None:
    page = (Path(__file__).parent.parent / "docs" / "avalanche.md").read_text(encoding="utf-8")
    for method in METHODS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {method.name} |"))
        differs = any(p == "<.01" for p in row.split("|")[6].replace(",", " ").split())
        assert differs <= method.apart
    names = {method.name.partition(",")[0] for method in METHODS}
    assert {method.name.partition(",")[0] for method in METHODS if not method.apart} == names and len(names) == 19


def test_fine_tuning_is_the_same_to_the_last_sample(avalanche: Import) -> None:
    """On our engine theirs learns our batches from the same weights: nothing is left that could differ."""
    stream = make_stream("digits", None)
    ours, theirs, loop = measure(select_methods("Fine-tuning")[0], stream, 3)
    assert (ours.kind, theirs.kind, loop.kind) == KINDS
    assert (ours.accuracy, ours.task_accuracy, ours.forgetting) == (theirs.accuracy, theirs.task_accuracy, theirs.forgetting)
    assert loop.accuracy == pytest.approx(ours.accuracy, abs=0.1) and min(ours.seconds, theirs.seconds, loop.seconds) > 0


def test_nets_differ_by_seed_only() -> None:
    stream = make_stream("digits", 20)
    first, again, other = (next(make_model(stream, seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_samples_class_by_class() -> None:
    stream = make_stream("digits", 30)
    for task, laid in zip(stream.tasks, sort_by_class(stream).tasks, strict=True):
        y = laid.train[:].y
        assert torch.equal(y, y.sort().values)
        assert torch.equal(task.train[:].x.sum(0), laid.train[:].x.sum(0)) or torch.allclose(
            task.train.x.sum(0), laid.train.x.sum(0)
        )


@pytest.mark.slow
def test_their_si_does_nothing_on_the_cpu_but_with_copies_it_does(avalanche: Import) -> None:
    """The finding in the documentation: without copies its results are those of fine-tuning, to the bit."""
    stream, si = make_stream("digits", None), their("SynapticIntelligence", si_lambda=2000.0, eps=0.1)
    asis, copied = Method("as it is", Finetune, si), Method("with copies", Finetune, si, within=copies)
    plain = Method("plain", Finetune, their("Naive"))
    results = [
        next(measured for measured in measure(method, stream, 0) if measured.kind == "theirs") for method in (plain, asis, copied)
    ]
    same = [(measured.accuracy, measured.task_accuracy, measured.forgetting) for measured in results]
    assert same[0] == same[1] != same[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PackNet", "PNN"])
def test_methods_that_need_the_task_are_told_it_and_forget_nothing(avalanche: Import, name: str) -> None:
    method, told = select_methods(name)[0], set[int]()

    def theirs(net: nn.Module) -> Any:
        strategy = method.theirs(net)
        strategy.model.register_forward_pre_hook(lambda model, given: told.update(given[1].tolist()))
        return strategy

    for measured in measure(replace(method, theirs=theirs), make_stream("digits", 150), 0):
        assert measured.accuracy > 0.5 and measured.forgetting == 0.0
    assert told == {0, 1, 2, 3, 4}


@pytest.mark.filterwarnings("ignore:No loggers")
def test_their_bic_stops_in_the_second_experience_where_torch_has_no_verbose_schedules(avalanche: Import) -> None:
    if "verbose" in inspect.signature(torch.optim.lr_scheduler.MultiStepLR).parameters:
        pytest.skip("this torch has schedules that take `verbose`")
    stream, data = make_stream("digits", 20), avalanche("benchmarks")
    samples = [task.train[:] for task in stream.tasks]
    labelled = Labelled(torch.cat([part.x for part in samples]), torch.cat([part.y for part in samples]))
    first, second, *_ = data.nc_benchmark(labelled, labelled, 5, task_labels=False).train_stream
    theirs = their("Naive", plugins=[avalanche("training.plugins").BiCPlugin(mem_size=50)])(make_model(stream, 0))
    theirs.train(first)
    with pytest.raises(TypeError, match="verbose"):
        theirs.train(second)


def test_welch_is_scipy_s() -> None:
    from scipy.stats import ttest_ind

    a, b = [0.81, 0.84, 0.79, 0.86, 0.83], [0.88, 0.87, 0.91, 0.85, 0.9]
    test = ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    difference, half, p = welch(a, b)
    assert p == pytest.approx(test.pvalue) and difference - half == pytest.approx(low) and difference + half == pytest.approx(high)
    assert welch([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0, 1.0)
    assert welch([0.5, 0.5], [0.6, 0.6])[2] == 0.0


def of(kind: str, values: list[float], seconds: float) -> list[Measured]:
    return [Measured("m", kind, seed, value, value, value, seconds) for seed, value in enumerate(values)]


def test_a_row_says_whether_they_agree() -> None:
    near, far = [0.50, 0.51, 0.52], [0.80, 0.81, 0.82]
    plain = Method("m", Finetune, their("Naive"))
    same = of("ours", near, 2.0) + of("theirs", [0.51, 0.52, 0.50], 9.0) + of("their loop", far, 5.0)
    assert table_row(plain, same).endswith("| 2.00 | 5.00 | 2.5 | agree |")
    other = of("ours", near, 2.0) + of("theirs", far, 9.0) + of("their loop", near, 5.0)
    assert table_row(plain, other).endswith("| DIFFER |")
    assert table_row(Method("m", Finetune, their("Naive"), apart=True), other).endswith("| differ, as known |")
    diverged = of("ours", near, 2.0) + of("theirs", [float("nan")] * 3, 9.0) + of("their loop", near, 5.0)
    assert table_row(plain, diverged).endswith("| DIFFER |")


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_each_run(
    avalanche: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        "parity",
        "--data",
        "digits",
        "--per_task",
        "60",
        "--seeds",
        "0,1",
        "--methods",
        "Fine-tuning,LwF",
        "--out",
        "runs.csv",
    ]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "| LwF |" in text and "| Fine-tuning |" in text and "| EWC |" not in text and "fingerprint" in text
    with (tmp_path / "runs.csv").open(encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert [(run["method"], run["kind"], run["seed"]) for run in runs] == [
        (method, kind, seed) for method in ("LwF", "Fine-tuning") for seed in "01" for kind in KINDS
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "EWCC"], "there is no method 'EWCC': there are Replay"),
        (["--seeds", "3"], "give at least two --seeds"),
        (["--seeds", "a,b"], "--seeds takes whole numbers"),
        (["--per_task", "-1"], "--per_task takes a whole number from 0 up"),
        (["--out", "no/where.csv"], "there is no folder for no/where.csv"),
    ],
)
def test_what_is_asked_wrongly(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert main(["parity", *arguments]) == 2
    assert sentence in capsys.readouterr().err
