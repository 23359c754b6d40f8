"""The tables of methods in the README and the docs are what the records say, and these are of the grid that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from clstream.experiments import headline_table

from clstream.comparison import read_records
from clstream.comparison.comparisons import compare

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def records():
    return read_records(ROOT / headline_table.RECORDS)


@pytest.mark.slow
def test_both_pages_are_what_the_records_say():
    for path, text in headline_table.pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"python experiments/headline_table.py writes {path.name} anew"


def test_a_cell_is_the_mean_over_the_seeds(records):
    runs = [record for record in records if (record.strategy, record.stream, record.scenario) == ("DER", "split_mnist", "class")]
    average = sum(record.metrics["average_accuracy"] for record in runs) / 5
    row = next(line for line in headline_table.readme_table(records, ROOT).splitlines() if line.startswith("| `DER` |"))
    assert row.split("|")[2].strip().startswith(f"{average:.3f}"[1:])


def test_each_row_is_five_seeds_with_the_options_chosen_for_it(records):
    seeds = {}
    for record in records:
        assert record.tuned.startswith("12 trials") and not record.error
        seeds.setdefault((record.strategy, record.stream, record.scenario), []).append(record.seed)
    assert all(sorted(numbers) == [0, 1, 2, 3, 4] for numbers in seeds.values())


def test_what_the_text_says_of_the_differences_is_shown(records):
    runs = [record for record in records if (record.stream, record.scenario) == ("split_mnist", "class")]
    same = {"DER", "DERpp", "ERACE", "Refresh", "Replay"}
    comparison = compare(runs, ["average_accuracy"])
    pairs = [pair for pair in comparison.differences if {pair.first, pair.second} <= same]
    assert len(pairs) == 10 and not any(pair.is_shown for pair in pairs)
    (stream,) = comparison.streams
    accuracy = {method: comparison.cells[stream, method, "average_accuracy"].mean.mean for method in comparison.methods}
    assert accuracy["EWC"] < accuracy["Finetune"] > accuracy["SI"]


def test_the_grid_has_the_configs_of_what_was_run(records):
    grid = yaml.safe_load((ROOT / "experiments" / "headline.yaml").read_text())
    configs = [yaml.safe_load((ROOT / "experiments" / config).read_text()) for config in grid["sweep"]["config"]]
    assert all(config["tuned"].startswith("12 trials") for config in configs)
    assert len(configs) * 5 >= len(records)
    assert {config["strategy"]["class_path"].rpartition(".")[2] for config in configs} >= {record.strategy for record in records}


def test_what_the_searches_chose_is_as_far_apart_as_the_page_on_tuning_says():
    page = " ".join((ROOT / "docs" / "tuning.md").read_text(encoding="utf-8").split())
    said = {("EWC", "strength"): "from 1 to 5,120", ("SI", "strength"): "from 0.14 to 892", ("Replay", "lr"): "from 0.05 to 0.29"}
    for (method, option), span in (said | {("Finetune", "lr"): "from 0.005 to 0.29"}).items():
        files = (ROOT / "experiments" / "tuned").glob(f"{method}-*")
        options = [yaml.safe_load(file.read_text(encoding="utf-8"))["strategy"]["init_args"] for file in files]
        chosen = [own["optimizer"]["init_args"]["lr"] if option == "lr" else own[option] for own in options]
        least, most = (float(end.replace(",", "")) for end in span.removeprefix("from ").split(" to "))
        assert len(chosen) == 6 and (min(chosen), max(chosen)) == pytest.approx((least, most), rel=0.05) and span in page


def test_rows_that_are_left_out_are_those_whose_loss_the_page_calls_not_finite(records):
    suffixes = {"class": "", "task": "-task", "domain": "-domain"}
    ran = {f"{record.strategy}-{record.stream}{suffixes[record.scenario]}" for record in records}
    ran |= {name.removesuffix("-domain") for name in ran if "rotated_mnist" in name}
    tuned = {file.stem for file in (ROOT / "experiments" / "tuned").glob("*.yaml")}
    names = ["EWC-cifar10-jpeg", "EWC-rotated_mnist", "EWC-split_mnist-task", "ICaRL-split_fashion_mnist", "LwFMC-split_mnist-task"]
    assert tuned - ran == {*names, "MAS-split_mnist", "SI-split_mnist-domain", "SI-split_mnist-task"}
    (told,) = (part for part in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n\n") if "not finite" in part)
    assert all(f"`{name.partition('-')[0]}`" in told for name in tuned - ran)
