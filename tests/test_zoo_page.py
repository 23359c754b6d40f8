"""The page of all strategies is what the code, the records and the measured costs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clstream.experiments import zoo_page

ROOT = Path(__file__).resolve().parent.parent
"""The tree of the source: the package that is tested lies elsewhere."""


@pytest.fixture(scope="module")
def costs():
    return json.loads((ROOT / zoo_page.COSTS).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_page_is_what_the_code_says():
    page = (ROOT / zoo_page.PAGE).read_text(encoding="utf-8")
    assert page == zoo_page.page(ROOT), "python experiments/zoo_page.py writes it anew"


def test_every_strategy_has_its_costs(costs):
    assert set(costs) == set(zoo_page.STRATEGIES) - set(zoo_page.APART)


@pytest.mark.parametrize("name", ["Finetune", "EWC", "Replay", "NCM"])
def test_the_costs_are_those_of_a_run(name, costs):
    assert zoo_page.cost(name) == costs[name]


def test_papers_are_cited_by_author_and_year():
    cited = {name: zoo_page.short(zoo_page.paper(name)) for name in ("AGEM", "EWC", "Lifelong", "Federated")}
    assert cited == {
        "AGEM": "Chaudhry et al. 2019",
        "EWC": "Kirkpatrick et al. 2017",
        "Lifelong": "Ling & Bohn 2021",
        "Federated": "Hendryx et al. 2021",
    }
