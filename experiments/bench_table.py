"""The table of `experiments/bench_methods.py`: as text, in files, as a picture, and in MLflow."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def heading(busy: bool) -> str:
    """Return the heading of the rows as text."""
    beside = f" {'beside a busy process':23}" if busy else ""
    return (
        f"{'':34} {'batch':>5}  {'against':17} {'ratio':>6} {'least to greatest':17} {'CPU':>6}{beside} {'learn':>6} {'cons.':>6} "
        f"{'eval.':>6} {'budget':>6} {'seconds':>7} {'CPU s':>6} {'MiB':>5} {'other':>5}"
    )


def line(row: Row, busy: bool) -> str:
    """Return a row as text; a ratio over its budget has an exclamation mark."""

    def number(name: str) -> str:
        return f"{row[name]:6.3f}" if row.get(name) is not None else "     -"

    of, budget = row["of"], row["budget"]
    over = "!" if budget is not None and row[f"{of}_ratio"] > budget else " "
    beside = f" {number('busy_ratio')} [{number('busy_least')} {number('busy_greatest')}]" if busy else ""
    return (
        f"{row['cell']:34} {row['batch']:5}  {row['against']:17} {number(f'{of}_ratio')}{over}"
        f"[{number(f'{of}_least')} {number(f'{of}_greatest')}]  {number('cpu_ratio')}{beside} {number('learning_ratio')} "
        f"{number('consolidating_ratio')} {number('evaluating_ratio')} {number('budget')} {row['wall_seconds']:7.2f} "
        f"{row['cpu_seconds']:6.2f} {row['peak_mib']:5.0f} {row['peak_mib_other']:5.0f}"
    )


def draw(rows: list[Row], file: Path) -> None:
    """Draw the ratios of those that are held against loops by hand."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in reversed(rows) if row["against"] == "by hand"]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(shown) + 1.2), layout="constrained")
    for place, row in enumerate(shown):
        for prefix, height, color in ((f"{row['of']}_", 0.1, "C0"), ("busy_", -0.2, "C1")):
            if row.get(f"{prefix}ratio") is not None:
                ends = [row[f"{prefix}least"], row[f"{prefix}greatest"]]
                axes.plot(ends, [place + height] * 2, color="0.8", linewidth=4, solid_capstyle="butt")
                axes.plot(row[f"{prefix}ratio"], place + height, "o", color=color)
        axes.plot(row["budget"], place, "|", color="C3", markersize=16)
    axes.set_yticks(range(len(shown)), [f"{row['cell']}, batch {row['batch']}" for row in shown])
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xlabel("time of clstream / by hand: median, least and greatest\nred: budget; orange: beside a busy process")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save(rows: list[Row], about: Row, folder: Path) -> None:
    """Write the table as JSON, CSV and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    with (folder / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    if any(row["against"] == "by hand" for row in rows):
        draw(rows, folder / "bench.png")


def track(rows: list[Row], about: Row, folder: Path) -> None:
    """Log the table and its files to MLflow, in the experiment `bench`."""
    import mlflow

    mlflow.set_experiment("bench")
    with mlflow.start_run(run_name="bench"):
        mlflow.log_params(about)
        for row in rows:
            name = f"{row['cell']} {row['batch']} to {row['against']}"
            for old, new in ((",", ""), ("++", "pp"), ("=", " "), ("'", ""), ("(", " "), (")", "")):
                name = name.replace(old, new)
            metrics = {"ratio": row[f"{row['of']}_ratio"], "seconds": row["wall_seconds"], "cpu_seconds": row["cpu_seconds"]}
            metrics |= {"peak_mib": row["peak_mib"]}
            mlflow.log_metrics({f"{name}/{metric}": value for metric, value in metrics.items()})
        mlflow.log_artifacts(str(folder))
