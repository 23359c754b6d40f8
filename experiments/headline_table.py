"""The tables of the README and of docs/results.md, from the records of `clstream sweep experiments/headline.yaml`.

`python experiments/headline_table.py` writes both pages anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill

from clstream.comparison import compare, read_records, to_markdown
from clstream.comparison.records import Record
from clstream.comparison.statistics import mean_interval

RECORDS = Path("experiments", "results", "headline.jsonl")
TUNED = Path("experiments", "tuned")
STREAMS = {"split_mnist": "Split MNIST", "split_fashion_mnist": "Split Fashion-MNIST", "cifar10-jpeg": "Split CIFAR-10"}
WRAPPERS = {"ClassMeans": "`ClassMeans` around `Replay`", "Refresh": "`Refresh` around `DERpp`"}


def readme_table(records: Sequence[Record], root: Path) -> str:
    """Return the class-incremental results of the methods that were tuned for all streams, best first on the first one.

    "nan": with the options chosen for it, the loss of some seed is not finite.
    """
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.scenario == "class" and not record.error:
            runs.setdefault((record.strategy, record.stream), []).append(record)

    def accuracy(method: str) -> float:
        return mean(record.metrics["average_accuracy"] for record in runs[method, next(iter(STREAMS))])

    tuned = {method for method, stream in runs if all((root / TUNED / f"{method}-{name}.yaml").exists() for name in STREAMS)}
    methods = sorted((method for method in tuned if (method, next(iter(STREAMS))) in runs), key=accuracy, reverse=True)
    lines = [
        f"| | {' | '.join(f'{title}: accuracy | forgetting' for title in STREAMS.values())} | kept | TFLOP |",
        "|---" * (2 * len(STREAMS) + 3) + "|",
    ]
    for method in methods:
        cells = []
        for stream in STREAMS:
            if (method, stream) not in runs:
                cells += ["nan", "nan"]
                continue
            metrics = [record.metrics for record in runs[method, stream]]
            interval = mean_interval([values["average_accuracy"] for values in metrics])
            cells += [f"{short(interval.mean)} ± {short(interval.half_width)}", short(mean(v["forgetting"] for v in metrics))]
        costs = [record.cost for record in runs[method, next(iter(STREAMS))]]
        cells += [
            f"{mean(cost['memory_bytes'] for cost in costs) / 1e6:.1f} MB",
            f"{mean(cost['flops'] for cost in costs) / 1e12:.2f}",
        ]
        lines.append(f"| {WRAPPERS.get(method, f'`{method}`')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short(number: float) -> str:
    """Return a number of three digits, as .912, or -.003."""
    return f"{number:.3f}".replace("0.", ".", 1)


def all_tables(records: Sequence[Record]) -> str:
    """Return a table for each stream, with the costs; lines of the notes below them are wrapped."""
    text = to_markdown(compare(records, ["average_accuracy", "forgetting", "memory_bytes", "training_flops"]))
    return (
        "\n".join(fill(line, 120, subsequent_indent="  ") if line.startswith("- ") else line for line in text.splitlines()) + "\n"
    )


def replaced(page: str, table: str, before: str) -> str:
    """Return a page with the first table after a heading replaced."""
    head, heading, rest = page.partition(before)
    return head + heading + re.sub(r"(?:^\|.*\n)+", lambda _: table + "\n", rest, count=1, flags=re.MULTILINE)


def pages(root: Path) -> dict[Path, str]:
    """Return both pages of the project in a folder, as they should be."""
    records = read_records(root / RECORDS)
    readme, results = root / "README.md", root / "docs" / "results.md"
    head, _, _ = results.read_text(encoding="utf-8").partition("\n### ")
    return {
        readme: replaced(readme.read_text(encoding="utf-8"), readme_table(records, root), "## How the methods compare"),
        results: head + "\n" + all_tables(records),
    }


if __name__ == "__main__":
    for path, text in pages(Path(__file__).parent.parent).items():
        path.write_text(text, encoding="utf-8")
