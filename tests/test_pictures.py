"""Pictures of methods against each other: what they draw, that nothing is cut off, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from clstream.comparison.methods import panels_of, rank_methods
from clstream.comparison.pictures import (
    against_costs,
    critical_difference,
    draw,
    figures_of,
    final_values,
    forgetting_by_method,
    matrices,
    mean_curves,
)
from clstream.comparison.records import Record, RowOfMatrix
from clstream.figures import method_style

FIGURES = ("final_accuracy", "mean_curves", "forgetting_curves", "matrices", "cost")
LONG = "Hypernetwork, generator lstm, growth True, chunk 27000, hidden (400, 400), $x_1$"


def record(label: str, seed: int, last: Sequence[float], stream: str = "split_digits", **other: object) -> Record:
    """Return the record of a run on as many tasks as `last` has values; each was learned to 0.9 and has these in the end."""
    tasks = len(last)
    rows = [[0.9 if task == row else None if task > row else last[task] for task in range(tasks)] for row in range(tasks)]
    rows[-1] = list(last)
    cost = {"memory_bytes": 1000.0 * seed, "learning_flops": 1e9, "consolidating_flops": 2e9, "learning_seconds": 3.0}
    return Record(
        strategy=label.partition(",")[0], label=label, stream=stream, scenario="class", seed=seed, source=f"runs/{label}/{seed}",
        matrix=rows, rows=[RowOfMatrix(row + 1, 10 * row + 10, [row]) for row in range(tasks)],
        metrics={"average_accuracy": sum(last) / tasks}, cost=cost | {"consolidating_seconds": 1.0}, **other,  # type: ignore[arg-type]
    )  # fmt: skip


RECORDS = [
    *(record("Finetune", seed, (0.1 + 0.1 * seed, 0.9)) for seed in range(3)),
    *(record("Replay, capacity 200", seed, (0.7, 0.9)) for seed in range(3)),
]


def curves(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}  # type: ignore[arg-type]


def half(values: Sequence[float]) -> float:
    """Return half the 95 % interval by scipy's Student t."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return float(t.interval(0.95, len(values) - 1, 0, deviation / math.sqrt(len(values)))[1])


def test_final_values_have_intervals_and_the_best_is_at_the_top() -> None:
    (panel,) = panels_of(RECORDS)
    axes = final_values(panel).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["Finetune", "Replay, capacity 200"]
    finetune, replay = axes.containers
    assert finetune[0].get_xydata().tolist() == [[pytest.approx(0.55), 0]]
    (bar,) = finetune[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([0.55 - half([0.5, 0.55, 0.6]), 0.55 + half([0.5, 0.55, 0.6])])
    assert replay[0].get_xydata().tolist() == [[pytest.approx(0.8), 1]]


def test_curves_are_means_over_seeds_in_bands_of_intervals() -> None:
    (panel,) = panels_of(RECORDS)
    axes = mean_curves(panel).axes[0]
    assert curves(axes) == {"Replay, capacity 200": pytest.approx([0.9, 0.8]), "Finetune": pytest.approx([0.9, 0.55])}
    band = axes.collections[1].get_paths()[0].vertices
    assert max(y for x, y in band if x == 2) == pytest.approx(0.55 + half([0.5, 0.55, 0.6]))
    replay, finetune = forgetting_by_method(panel).axes
    assert (replay.get_title(), finetune.get_title()) == ("Replay, capacity 200", "Finetune")
    assert curves(finetune)["task 0"] == pytest.approx([0.9, 0.2]) and curves(finetune)["task 1"] == pytest.approx([0.9])
    band = finetune.collections[0].get_paths()[0].vertices
    assert max(y for x, y in band if x == 2) == pytest.approx(0.2 + half([0.1, 0.2, 0.3]))


def test_matrices_are_means_on_one_scale_and_blank_where_nothing_was_asked() -> None:
    (panel,) = panels_of(RECORDS)
    figure = matrices(panel)
    image = figure.axes[1].images[0]
    assert image.get_array().tolist() == [[pytest.approx(0.9), None], [pytest.approx(0.2), pytest.approx(0.9)]]
    assert {axes.images[0].get_clim() for axes in figure.axes[:2]} == {(0.0, 1.0)}
    assert [text.get_text() for text in figure.axes[1].texts] == [".90", ".20", ".90"]


def test_costs_are_sums_and_the_front_leaves_out_what_is_beaten() -> None:
    (panel,) = panels_of(
        [*RECORDS, replace(record("Slow", 0, (0.6, 0.9)), cost={"learning_flops": 9e9, "consolidating_flops": 0.0})]
    )
    memory, flops, seconds = against_costs(panel).axes
    assert [axes.get_xlabel() for axes in (memory, flops, seconds)] == ["memory kept, bytes", "training FLOPs", "training seconds"]
    points = {str(container.get_label()): container[0].get_xydata()[0].tolist() for container in flops.containers}
    assert points["Slow"] == [9e9, pytest.approx(0.75)] and points["Finetune"] == [3e9, pytest.approx(0.55)]
    assert curves(flops)["Pareto front"] == pytest.approx([0.8])
    assert [str(container.get_label()) for container in memory.containers] == ["Replay, capacity 200", "Finetune"]  # unknown of one
    assert seconds.containers[0][0].get_xydata()[0][0] == pytest.approx(4.0)


def cut_off(figure: Figure) -> list[float]:
    """Return by how many inches what is drawn goes beyond each edge of the paper."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return [over for over in (-box.x0, -box.y0, box.x1 - width, box.y1 - height) if over > 0.02]


@pytest.mark.slow
@pytest.mark.parametrize("methods", [1, 12])
def test_nothing_is_cut_off(methods: int) -> None:
    labels = ["Finetune", *(f"{LONG}, {number}" for number in range(1, methods))]
    records = [record(label, seed, (0.2, 0.5, 0.9)) for label in labels for seed in range(2)]
    figures = dict(figures_of(records))
    assert len(figures) == 5 and {name: cut_off(figure) for name, figure in figures.items()} == {name: [] for name in figures}


def test_styles_tell_methods_apart() -> None:
    assert len({(style["color"], style["marker"]) for style in map(method_style, range(56))}) == 56
    assert len({(style["color"], style["linestyle"]) for style in map(method_style, range(28))}) == 28


def test_ranks_over_streams_have_bars_that_join_what_is_not_shown_to_differ() -> None:
    means = {"Finetune": 0.1, f"{LONG}": 0.2, "Replay": 0.7, "ER-ACE": 0.7, "DER++": 0.9}
    streams = [f"stream {number}" for number in range(9)]
    records = [record(label, 0, (mean, mean), stream) for stream in streams for label, mean in means.items()]
    ranks = rank_methods(panels_of(records))
    assert ranks is not None and rank_methods(panels_of(records[:5])) is None  # of one stream there are no ranks
    figure = critical_difference(*ranks, 9)
    axes = figure.axes[0]
    bars = [[float(x) for x in line.get_xdata()] for line in axes.lines if line.get_linewidth() == 3.5]
    joined = [["1.00", "2.50", "2.50"], ["2.50", "2.50", "4.00"], ["4.00", "5.00"]]  # the critical difference is 2.033
    assert bars == [[float(group[0]) - 0.04, float(group[-1]) + 0.04] for group in joined]
    texts = [text.get_text() for text in axes.texts]
    assert {"DER++ (1.00)", "ER-ACE (2.50)", "Finetune (5.00)", "critical difference 2.03"} <= {*texts}
    assert not cut_off(figure)


@pytest.mark.slow
def test_files_of_all_formats_are_written_and_the_same_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    files = draw(RECORDS[:1], folder)
    names = [f"split_digits-class-accuracy-{name}" for name in FIGURES]
    assert [file.name for file in files] == [f"{name}.{ending}" for name in names for ending in ("pdf", "png")]
    documents, pictures = ([file.read_bytes() for file in files[start::2]] for start in (0, 1))
    assert all(text.startswith(b"%PDF") and b"CreationDate" not in text for text in documents)
    assert [file.read_bytes() for file in draw(RECORDS[:1], folder, ("png",))] == pictures


def test_a_run_that_failed_is_left_out_and_one_that_was_cut_short_has_no_part_in_means() -> None:
    short = replace(RECORDS[0], seed=7, matrix=RECORDS[0].matrix[:1], rows=RECORDS[0].rows[:1])
    (panel,) = panels_of([*RECORDS, short, replace(RECORDS[0], error="the loss is not finite")])
    finetune = panel.methods[0]
    assert (len(finetune.records), len(finetune.curves), panel.seeds) == (4, 3, "3 to 4 seeds")


def test_a_method_without_a_mean_is_not_drawn_with_the_mean_of_some_of_its_runs() -> None:
    unknown = replace(RECORDS[0], metrics={"average_accuracy": math.nan})
    (panel,) = panels_of([unknown, *RECORDS[1:]])
    assert [method.label for method in panel.methods] == ["Replay, capacity 200"]


def test_of_many_tasks_some_are_drawn() -> None:
    (panel,) = panels_of([record("Finetune", 0, [0.5] * 60)])
    lines = forgetting_by_method(panel).axes[0].lines
    assert len(lines) == 20 + 1 and panel.methods[0].tasks_shown(4) == [0, 20, 39, 59]
    assert panel.methods[0].tasks_shown(60) == list(range(60))


def test_what_cannot_be_drawn_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures in the format 'bmp': choose among pdf, png, svg"):
        draw(RECORDS, tmp_path / "pictures", ("png", "bmp"))
    with pytest.raises(ValueError, match="nothing to draw: no run ended well"):
        draw([replace(RECORDS[0], error="it failed", metrics={})], tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
