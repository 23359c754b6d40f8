"""Rejection: thresholds from held-out samples alone, and what is measured by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clstream.experiments import open_world
from clstream.strategies import OpenVAE, Replay
from clstream.streams import blobs, split_digits, split_mnist
from clstream.streams.probes import corrupted, held_out_classes, noise, probes_from, unknown
from torch import Tensor

from clstream import RunStarted, Stream, on, run
from clstream.bus import ObserverError
from clstream.checks import example_model, example_stream
from clstream.evaluation import Rejection, RejectionMeasured
from clstream.evaluation.rejection import threshold_of
from clstream.measures import MEASURES
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.stream import Samples, TestSet


class Heard:
    def __init__(self) -> None:
        self.events: list[RejectionMeasured] = []

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        self.strategy = event.strategy

    @on(RejectionMeasured)
    def hear(self, event: RejectionMeasured) -> None:
        self.events.append(event)


def stream(validation: float = 0.25, **options: object) -> Stream:
    """Return digits in two tasks of two classes, and digits that no task has."""
    whole = split_digits(tasks=[2, 2], validation=validation, epochs=10, **options)  # type: ignore[arg-type]
    future = held_out_classes(whole, [2, 3])
    return whole.with_probes(held_out_classes(whole), future, corrupted(whole, "occlusion", 1), noise(whole))


def play(of: Stream, share: float = 0.05) -> Heard:
    heard = Heard()
    with isolated(0, "strategy"):
        strategy = Replay(Mlp(of.input_shape, of.classes, hidden=(32,)), active_classes="seen")
    run(strategy, of, Rejection(share), heard)
    return heard


@pytest.mark.parametrize(("share", "threshold"), [(0.05, 0.95), (0.0, 1.0), (0.5, 0.5), (0.049, 0.96), (0.999, 0.01)])
def test_the_threshold_is_the_least_that_rejects_no_more_than_the_share(share: float, threshold: float) -> None:
    novelty = torch.arange(1, 101).double()[torch.randperm(100, generator=torch.Generator().manual_seed(0))] / 100
    assert threshold_of(novelty, share) == threshold
    assert threshold_of(torch.tensor([1.0, 1.0, 1.0]), share) == 1.0
    with pytest.raises(ValueError, match="a threshold needs held-out samples, and there are none"):
        threshold_of(torch.zeros(0), share)


def test_what_is_measured_is_as_counted_by_hand() -> None:
    whole = stream()
    heard = play(whole)
    first, last = (event.numbers for event in heard.events)
    strategy = heard.strategy
    held = [task.validation for task in whole.tasks]
    assert all(part is not None for part in held)
    calibration, other = (torch.cat([strategy.novelty(part[begin::2].x) for part in held if part is not None]) for begin in (0, 1))
    threshold = last["novelty/threshold"]
    assert threshold == threshold_of(calibration.double(), 0.05)
    assert last["novelty/rejected/calibration"] == pytest.approx(float((calibration > threshold).double().mean()))
    assert last["novelty/rejected/calibration"] <= 0.05
    assert last["novelty/rejected/held_out"] == pytest.approx(float((other > threshold).double().mean()))
    x, y = (torch.cat([getattr(task.test, name) for task in whole.tasks]) for name in ("x", "y"))
    accepted = strategy.novelty(x) <= threshold
    assert last["novelty/rejected/known"] == pytest.approx(float((~accepted).double().mean()))
    right = (strategy.predict(x) == y)[accepted]
    assert last["novelty/accepted_accuracy/known"] == pytest.approx(float(right.double().mean()))
    strange = strategy.novelty(whole.probes[0].samples.x)
    assert last["novelty/rejected/held_out_classes"] == pytest.approx(float((strange > threshold).double().mean()))
    together = torch.cat([strategy.novelty(x), strange]).double()
    marks = torch.cat([torch.zeros(len(x)), torch.ones(len(strange))]).long()
    for name in ("auroc", "fpr95"):
        by_hand = float(MEASURES[name]().value(together, marks))  # type: ignore[attr-defined]
        assert last[f"novelty/{name}/held_out_classes"] == pytest.approx(by_hand)
    assert "novelty/auroc/held_out_classes/2_3" in first and "novelty/rejected/held_out_classes/2_3" not in last  # taught by then
    assert "novelty/accepted_accuracy/corrupted/occlusion_1/task_00" in last and "novelty/auroc/noise" in last
    assert set(heard.events[0].curves()) <= {f"open_set/{name}" for name in first}


def test_thresholds_never_see_test_samples() -> None:
    whole = stream()
    other = [replace(task, test=Samples(1 - task.test.x, task.test.y)) for task in whole.tasks]
    thresholds = [
        [event.numbers["novelty/threshold"] for event in play(of).events]
        for of in (whole, replace(whole, tasks=other, probes=(), data=None))
    ]
    assert thresholds[0] == thresholds[1]


def test_it_changes_nothing_and_runs_where_boundaries_are_hidden() -> None:
    whole = stream(boundaries=False)
    with isolated(0, "strategy"):
        plain = Replay(Mlp(whole.input_shape, whole.classes, hidden=(32,)), active_classes="seen")
    result = run(plain, whole)
    heard = play(whole)
    assert len(heard.events) == 2 and torch.equal(heard.strategy.model.head.weight, plain.model.head.weight)  # type: ignore[union-attr]
    assert result.accuracy.shape == (2, 2)


def test_each_kind_of_novelty_of_a_strategy_has_its_curves() -> None:
    whole = example_stream(epochs=2)
    tasks = [replace(task, validation=task.test) for task in whole.tasks]
    with isolated(0, "strategy"):
        strategy = OpenVAE(example_model(), latent=8, decoder=(16,), proposals=1)
    run(strategy, replace(whole, tasks=tasks), Rejection(), heard := Heard(), max_sessions=1)
    kinds = {name.split("/")[0] for name in heard.events[0].numbers}
    assert kinds == {"evt", "entropy", "reconstruction"}


def test_streams_without_held_out_samples_and_strategies_without_novelty_are_refused() -> None:
    with pytest.raises(ObserverError, match=r"Rejection takes its thresholds from held-out samples, and .* build it with"):
        play(stream(validation=0.0))

    class Silent(Replay):
        scores_are = "ranks"

    held = blobs(validation=0.2)
    with pytest.raises(ObserverError, match="Silent can't tell how strange inputs are: leave Rejection out"):
        run(Silent(Mlp(held.input_shape, held.classes)), held, Rejection())


def test_noise_is_a_probe() -> None:
    whole = split_digits()
    probe = noise(whole, most=20)
    assert probe.name == "noise" and probe.known is False and probe.samples.x.shape == (20, 1, 8, 8)
    x: Tensor = probe.samples.x
    assert 0.45 < float(x.mean()) < 0.55 and torch.equal(x, noise(whole, most=20).samples.x)
    assert [probe.name for probe in probes_from(whole, "noise:5,held_out_classes:1")] == ["noise", "held_out_classes/1"]
    with pytest.raises(ValueError, match="'noise:x' is not written as noise or noise:MOST"):
        probes_from(whole, "noise:x")
    with pytest.raises(ValueError, match="noise is for images"):
        noise(blobs())
    assert isinstance(probe, TestSet)


@pytest.mark.data
def test_omniglot_is_white_on_black_as_the_digits_are() -> None:
    probe = unknown(split_mnist(), "omniglot", most=50)
    assert probe.name == "unknown/omniglot" and probe.samples.x.shape == (50, 1, 28, 28)
    assert float(probe.samples.x.float().mean()) < 64


def test_the_tables_of_the_docs_are_what_the_results_say() -> None:
    root = Path(__file__).parents[1]
    lines = (root / "experiments" / "results" / "open_world.jsonl").read_text(encoding="utf-8").splitlines()
    rows, page = [json.loads(line) for line in lines], (root / "docs" / "open-world.md").read_text(encoding="utf-8")
    for part, table in open_world.TABLES.items():
        assert table(rows) in page, part
    assert {row["part"] for row in rows} == set(open_world.PARTS)
