"""Methods against each other: what is shown, what is marked, and the tables that say so."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from clstream.comparison import (
    Comparison,
    Record,
    compare,
    differences_of,
    differences_to_frame,
    numbers_of,
    print_comparison,
    to_csv,
    to_frame,
    to_latex,
    to_markdown,
)  # fmt: skip
from clstream.comparison.statistics import holm, mean_interval

REPLAY = [0.81, 0.83, 0.80, 0.82, 0.84]
DERPP = [0.82, 0.82, 0.81, 0.83, 0.83]
FINETUNE = [0.19, 0.20, 0.19, 0.21, 0.20]


def runs(label: str, accuracies: Sequence[float], stream: str = "split_mnist", tuned: str = "", **changes: object) -> list[Record]:
    return [
        replace(
            Record(label, label, stream, "class", seed, {"seed": str(seed)}),
            metrics={"average_accuracy": accuracy, "forgetting": 1 - accuracy}, seconds=10.0 + seed, fingerprint=f"of {stream}",
            higher_is_better={"average_accuracy": True, "forgetting": False}, cost={"memory_bytes": 392_000.0}, tuned=tuned,
            **changes,  # type: ignore[arg-type]  # of the attributes of a record
        )
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip


def three(**changes: object) -> list[Record]:
    return [*runs("Replay", REPLAY, **changes), *runs("DERpp", DERPP, **changes), *runs("Finetune", FINETUNE, **changes)]  # type: ignore[arg-type]  # the same


def printed(comparison: Comparison, width: int = 1000) -> str:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width, soft_wrap=True, highlight=False))
    return out.getvalue()


def test_means_and_differences_are_those_of_the_statistics() -> None:
    comparison = compare(three())
    (stream,) = comparison.streams
    assert comparison.methods == ("Replay", "DERpp", "Finetune")
    assert comparison.metrics == ("average_accuracy", "forgetting", "seconds") and comparison.costs == ("seconds",)
    assert comparison.cells[stream, "Replay", "average_accuracy"].mean == mean_interval(REPLAY)
    pairs = [(REPLAY, DERPP), (REPLAY, FINETUNE), (DERPP, FINETUNE)]
    expected = holm([float(stats.ttest_rel(*pair).pvalue) for pair in pairs])
    here = [item for item in comparison.differences if item.metric == "average_accuracy"]
    assert [item.adjusted for item in here] == pytest.approx(expected)
    assert [(item.first, item.second, item.winner) for item in here] == [
        ("Replay", "DERpp", ""), ("Replay", "Finetune", "Replay"), ("DERpp", "Finetune", "DERpp"),
    ]  # fmt: skip
    assert not [item for item in comparison.differences if item.metric == "seconds"]


def test_where_less_is_better_the_lower_one_wins() -> None:
    comparison = compare(three(), ["forgetting"])
    (stream,) = comparison.streams
    assert [item.winner for item in comparison.differences] == ["", "Replay", "DERpp"]
    best = {method: comparison.cells[stream, method, "forgetting"].is_best for method in comparison.methods}
    assert best == {"Replay": False, "DERpp": True, "Finetune": False}


def test_the_best_is_marked_and_what_is_not_shown_to_be_worse() -> None:
    comparison = compare(three())
    (stream,) = comparison.streams
    cells = {method: comparison.cells[stream, method, "average_accuracy"] for method in comparison.methods}
    marks = {method: (cell.is_best, cell.is_near_best) for method, cell in cells.items()}
    assert marks == {"DERpp": (True, False), "Replay": (False, True), "Finetune": (False, False)}
    assert not any(comparison.cells[stream, method, "seconds"].is_best for method in comparison.methods)


def test_fewer_pairs_are_corrected_for_if_one_method_is_asked() -> None:
    comparison = compare(three(), ["average_accuracy"], against="Finetune")
    assert [(item.first, item.second) for item in comparison.differences] == [("Replay", "Finetune"), ("DERpp", "Finetune")]
    with pytest.raises(ValueError, match="there is no method 'Finetun', did you mean 'Finetune'"):
        compare(three(), against="Finetun")


def test_runs_are_paired_by_order_and_seed() -> None:
    """EWC's runs are listed backwards, one is missing, and one is of another order of classes."""
    ewc = runs("EWC", [accuracy - 0.1 for accuracy in REPLAY])[:0:-1]
    ewc[0] = replace(ewc[0], params={"seed": "4", "stream.class_order": "1"})
    comparison = compare([*runs("Replay", REPLAY), *ewc], ["average_accuracy"])
    (difference,) = comparison.differences
    assert difference.pairs == 3 and difference.mean == pytest.approx(0.1)
    assert (difference.low, difference.high) == (pytest.approx(0.1), pytest.approx(0.1)) and difference.p == 0.25
    strange = runs("Joint", REPLAY, stream="split_mnist", seed=9)[:1]
    (unpaired,) = compare([*runs("Replay", REPLAY), *strange], ["average_accuracy"]).differences
    assert unpaired.pairs == 0 and math.isnan(unpaired.p) and unpaired.winner == ""


def test_one_seed_has_no_interval_and_shows_nothing() -> None:
    comparison = compare([*runs("Replay", REPLAY[:1]), *runs("Finetune", FINETUNE[:1])])
    assert not any(item.is_shown for item in comparison.differences)
    text = printed(comparison)
    assert "one seed each: no interval, and no difference is tested" in text and "±" not in text and "beats" not in text
    assert "0.810 *" in text and "~" not in text
    mixed = printed(compare([*runs("Replay", REPLAY), *runs("Finetune", FINETUNE[:1])]))
    assert "one seed, so no interval, and no difference tested: Finetune on split_mnist" in mixed


def test_failed_runs_are_told_and_left_out() -> None:
    failed = replace(runs("EWC", [0.5])[0], metrics={}, error="the loss is not finite", seed=3)
    comparison = compare([*three(), failed])
    assert comparison.failed == (failed,) and "EWC" not in comparison.methods
    assert "left out: 1 of EWC on split_mnist: the loss is not finite" in printed(comparison)
    with pytest.raises(ValueError, match="no run ended well: EWC on split_mnist, seed 3: the loss is not finite"):
        compare([failed])


def test_training_seconds_are_those_of_learning_and_consolidating() -> None:
    cost = {"learning_seconds": 2.0, "consolidating_seconds": 1.0, "tracking_seconds": 9.0}
    comparison = compare([replace(record, cost=cost) for record in three()])
    (stream,) = comparison.streams
    assert comparison.metrics[2] == "training_seconds" and comparison.costs == ("training_seconds",)
    assert comparison.cells[stream, "Replay", "training_seconds"].mean.mean == 3.0
    with pytest.raises(ValueError, match="no run has a metric 'training_flops'"):
        compare(three(), ["training_flops"])


def test_what_can_not_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no records to compare"):
        compare([])
    with pytest.raises(ValueError, match=r"metrics must be a list of names, as \['forgetting'\]"):
        compare(three(), "forgetting")
    with pytest.raises(ValueError, match="no run has a metric 'forgeting', did you mean 'forgetting'"):
        compare(three(), ["forgeting"])
    with pytest.raises(ValueError, match="Replay on split_mnist, seed 0, is there twice, with other numbers"):
        compare([*three(), replace(three()[0], metrics={"average_accuracy": 0.1})])


def test_streams_are_ranked_together() -> None:
    values: Mapping[str, Sequence[float]] = {"a": (0.9, 0.8, 0.7), "b": (0.9, 0.7, 0.8), "c": (0.5, 0.4, 0.3)}
    records = [
        record
        for stream, means in values.items()
        for label, mean in zip(("Replay", "EWC", "Finetune"), means, strict=True)
        for record in runs(label, [mean, mean + 0.01], stream)
    ]
    comparison = compare([*records, *runs("SLDA", [0.99], "a")], ["average_accuracy"])
    (item,) = comparison.rankings
    assert item.methods == ("Replay", "EWC", "Finetune") and item.left_out == ("SLDA",) and item.streams == ("a", "b", "c")
    assert item.ranking.average == pytest.approx((1.0, 7 / 3, 8 / 3))
    assert item.ranking.p == pytest.approx(stats.friedmanchisquare(*np.array(list(values.values())).T).pvalue)
    text = printed(comparison)
    assert "ranks in average_accuracy over 3 streams (a; b; c)" in text and "1.00  Replay" in text
    assert "not ranked, for they lack a stream: SLDA" in text
    assert compare(three()).rankings == ()


def test_streams_of_one_name_in_two_scenarios_have_titles_that_say_so() -> None:
    records = [*three(), *(replace(record, scenario="task") for record in three())]
    assert list(compare(records).streams.values()) == ["split_mnist, class-IL", "split_mnist, task-IL"]
    mains = [*three(), *(replace(record, main="r2", metrics={"average_r2": 0.5}, scenario="domain") for record in three())]
    assert compare(mains).metrics == ("average", "forgetting", "seconds")


def test_what_is_printed_has_full_width_and_nothing_is_cut() -> None:
    label = "A method with [brackets] and a name that is longer than any terminal is wide " * 3
    text = printed(compare([*three(), *runs(label.strip(), DERPP)], ["average_accuracy", "memory_bytes"]))
    assert label.strip() in text and "…" not in text
    assert "0.820 ± 0.020 ~" in text and "0.822 ± 0.010 *" in text
    assert "392.00\N{NO-BREAK SPACE}k" in text
    assert "mean ± half its 95 % interval (Student's t) over 5 runs; *: the best mean; ~: not shown to be worse" in text


def test_sentences_say_who_beats_whom_only_where_it_is_shown() -> None:
    text = printed(compare(three(), ["average_accuracy"]))
    assert re.search(r"Replay and DERpp are not shown to differ: -0\.002 \[-0\.\d+, \+0\.\d+\], 5 pairs, p = 0\.\d+", text)
    assert re.search(r"Replay beats Finetune: \+0\.622 \[", text) and "Finetune beats" not in text
    assert "mean differences, by paired t-tests with Holm's correction for 3 pairs" in text
    backwards = printed(compare(three()[::-1], ["forgetting"]))  # the winner comes first, whatever the order of the records
    assert re.search(r"Replay beats Finetune: -0\.622 \[-0\.6\d+, -0\.6\d+\]", backwards)


def test_of_many_pairs_there_is_a_line_for_each_method() -> None:
    many = [record for number in range(6) for record in runs(f"M{number}", [value - 0.1 * number for value in REPLAY])]
    noise = np.random.default_rng(0).normal(0, 0.001, len(many))
    many = [
        replace(run, metrics={"average_accuracy": run.metrics["average_accuracy"] + odd})
        for run, odd in zip(many, noise, strict=True)
    ]
    text = printed(compare(many, ["average_accuracy"]))
    assert "M0 beats 5: M1; M2; M3; M4; M5" in text and "of the 15 pairs 0 are not shown to differ" in text


def test_latex_has_a_column_for_each_stream_and_metric() -> None:
    records = [*three(), *three(stream="50%_blobs"), *runs("A & B_{x}", REPLAY, "50%_blobs")]
    text = to_latex(compare(records, ["average_accuracy", "forgetting", "memory_bytes"]))
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{lrrrrrr}" and body[1] == r"\toprule" and body[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert body[2] == r" & \multicolumn{3}{c}{split\_mnist} & \multicolumn{3}{c}{50\%\_blobs} \\"
    assert body[3] == r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}"
    assert body[4].startswith(r"method & average accuracy $\uparrow$ & forgetting $\downarrow$ & memory bytes $\downarrow$ & ")
    rows = [line for line in body if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count(" & ") for line in rows} == {6}
    assert r"DERpp & $\mathbf{0.822 \pm 0.010}$" in text and r"Replay & $\underline{0.820 \pm 0.020}$" in text
    assert r"A \& B\_\{x\} & -- & -- & -- & " in text and r"$392.00$~k" in text
    assert r"% needs \usepackage{booktabs}" in text and "bold: the best mean; underlined: not shown to be worse" in text


def test_tuned_rows_are_marked() -> None:
    records = [*runs("Replay", REPLAY, tuned="12 trials on two tasks"), *runs("Finetune", FINETUNE)]
    comparison = compare(records, ["average_accuracy"])
    assert "method & tuned & average accuracy" in to_latex(comparison) and "Replay & 12 trials & " in to_latex(comparison)
    assert "| Finetune | no |" in to_markdown(comparison) and "12 trials" in printed(comparison)
    assert [row["tuned"] for row in numbers_of(comparison)] == ["12 trials on two tasks", "no"]
    assert comparison.notes == ("tuned on two tasks",)
    assert "tuned" not in to_markdown(compare(three()))


def test_markdown() -> None:
    lines = to_markdown(compare([*three(), *runs("a|b", FINETUNE)], ["average_accuracy"])).splitlines()
    assert lines[:5] == [
        "### split_mnist", "", "| method | average_accuracy ↑ |", "|---|--:|", "| Replay | 0.820 ± 0.020 ~ |",
    ]  # fmt: skip
    assert lines[5] == "| DERpp | **0.822 ± 0.010** |" and lines[7].startswith("| a\\|b | ")
    assert lines[9].startswith("- mean ± half its 95 % interval (Student's t) over 5 runs; bold: the best mean; ~: not shown")


def test_csv_and_frames_have_all_digits() -> None:
    comparison = compare([*three(), *runs("Joint", [0.987654321])])
    rows = list(csv.DictReader(io.StringIO(to_csv(numbers_of(comparison)))))
    assert len(rows) == 4 * 3 and {row["stream"] for row in rows} == {"split_mnist"}
    assert float(rows[0]["mean"]) == comparison.cells[next(iter(comparison.streams)), "Replay", "average_accuracy"].mean.mean
    assert rows[9]["mean"] == "0.987654321" and rows[9]["low"] == "" and rows[9]["runs"] == "1"
    frame = to_frame(comparison)
    assert frame["mean"].tolist() == [row["mean"] for row in numbers_of(comparison)]
    pivot = frame.pivot_table(index="method", columns="metric", values="mean", sort=False)
    assert pivot.loc["Replay", "seconds"] == 12.0
    pairs = list(csv.DictReader(io.StringIO(to_csv(differences_of(comparison)))))
    assert len(pairs) == len(differences_to_frame(comparison)) == 2 * 6
    assert {row["better"] for row in pairs} == {"", "Replay", "DERpp"} and to_csv([]) == ""


def test_runs_of_several_orders_and_versions_of_the_code_are_told() -> None:
    records = [replace(record, code=f"c{record.seed % 2}", fingerprint=f"f{record.seed % 2}") for record in three()]
    notes = compare(records).notes
    assert "split_mnist came in 2 orders, or versions of its data: f0, f1" in notes
    assert "the runs were made by 2 versions of the code: c0, c1" in notes
    assert compare([*three(), *runs("EWC", REPLAY[:3])]).notes == ("not of 5 runs, but of another number: EWC on split_mnist: 3",)
