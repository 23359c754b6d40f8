"""The README's table of methods is what the records of its sweep say, and these are of the grid that makes it."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest
import yaml

from clstream.comparison import read_records
from clstream.comparison.comparisons import compare

ROOT = Path(__file__).parent.parent
STREAMS = ("split_mnist", "split_fashion_mnist")


def rows() -> dict[str, list[str]]:
    """Return the cells of the README's table by method."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How the methods compare")[2].partition("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {re.findall(r"`(\w+)`", cells[0])[0]: cells[1:] for cells in table}


def test_the_table_is_what_the_records_say() -> None:
    records = read_records(ROOT / "experiments" / "results" / "headline.jsonl")
    shown = rows()
    assert set(shown) == {record.strategy for record in records}
    for method, cells in shown.items():
        for place, stream in enumerate(STREAMS):
            runs = [record for record in records if (record.strategy, record.stream) == (method, stream)]
            for cell, metric in zip(cells[2 * place :], ("average_accuracy", "forgetting"), strict=False):
                if not runs:
                    assert cell == "open"
                    continue
                assert sorted(record.seed for record in runs) == [0, 1, 2, 3, 4] and all(record.tuned for record in runs)
                assert float(cell.split()[0]) == pytest.approx(mean(record.metrics[metric] for record in runs), abs=5e-4)


def test_what_the_text_says_of_the_differences_is_shown() -> None:
    records = [
        record for record in read_records(ROOT / "experiments" / "results" / "headline.jsonl") if record.stream == "split_mnist"
    ]
    same = {"DER", "DERpp", "ERACE", "Refresh", "Replay"}
    pairs = [pair for pair in compare(records, ["average_accuracy"]).differences if {pair.first, pair.second} <= same]
    assert len(pairs) == 10 and not any(pair.is_shown for pair in pairs)
    accuracy = {method: float(cells[0].split()[0]) for method, cells in rows().items()}
    assert accuracy["EWC"] < accuracy["Finetune"] > accuracy["SI"]


def test_the_grid_has_each_method_with_the_options_chosen_for_it() -> None:
    grid = yaml.safe_load((ROOT / "experiments" / "headline.yaml").read_text())
    configs = [ROOT / "experiments" / config for config in grid["sweep"]["config"]]
    assert all(yaml.safe_load(config.read_text())["tuned"].startswith("12 trials") for config in configs)
    pairs = {(record.strategy, record.stream) for record in read_records(ROOT / "experiments" / "results" / "headline.jsonl")}
    assert {tuple(config.stem.split("-")) for config in configs} >= pairs
