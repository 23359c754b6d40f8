"""The tables of methods on a pre-trained backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clstream.experiments import pretrained_methods

ROOT = Path(__file__).parent.parent
METHODS = {"cifar10-jpeg": pretrained_methods.of_any_backbone([], 0)} | dict.fromkeys(
    ("omniglot", "fashion_mnist"), pretrained_methods.of_vits([], 0)
)


@pytest.mark.parametrize("data", METHODS)
def test_the_table_of_the_docs_is_what_the_results_say(data: str) -> None:
    lines = (ROOT / "experiments" / "results" / "pretrained_methods.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["data"] == data]
    assert pretrained_methods.table(rows, METHODS[data]) in (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
    seeds = {method: sorted(row["seed"] for row in rows if row["method"] == method) for method in METHODS[data]}
    assert {method: own for method, own in seeds.items() if own} == {method: [0, 1, 2] for method, own in seeds.items() if own}
    assert {row["method"] for row in rows} <= set(METHODS[data])
