"""The observer of plasticity, the stream in small that it is shown on, and the table in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clstream.experiments.plasticity import METHODS, NEW, TASKS, read, table
from clstream.strategies import Finetune
from clstream.streams import permuted_digits, split_regression
from clstream.streams.data import digits

from clstream import SessionEnded, on, run
from clstream.bus import ObserverError
from clstream.checks import example_model, example_stream
from clstream.models import Linear, Mlp
from clstream.online_metrics import Plasticity, PlasticityMeasured, effective_rank

ROOT = Path(__file__).resolve().parent.parent


def test_effective_rank_is_that_of_its_definition() -> None:
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert effective_rank(torch.ones(4, 7)).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(4, 7)).item() == 0
    shares = torch.tensor([0.75, 0.25])
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(
        float(torch.exp(-(shares * shares.log()).sum()))
    )


class Check:
    """Works out by hand what the observer before it measured."""

    def __init__(self, plasticity: Plasticity, strategy: Finetune, samples: int) -> None:
        self.plasticity, self.strategy, self.samples, self.heard = plasticity, strategy, samples, list[PlasticityMeasured]()

    @on(SessionEnded)
    def compare(self, event: SessionEnded) -> None:
        model, measured = self.strategy.model, self.plasticity.measured[-1]
        x, test = event.session.samples[: self.samples].x, example_stream().tasks[event.session.index].test[: self.samples]
        with torch.no_grad():
            hidden = model.features(x)
            assert measured.newest == pytest.approx(float((model(test.x).argmax(1) == test.y).double().mean()))
        assert measured.dead == pytest.approx(float((hidden == 0).all(0).double().mean())) and measured.dead > 0
        assert measured.effective_rank == pytest.approx(float(effective_rank(hidden)), rel=1e-5)
        norm = torch.cat([weight.detach().flatten() for weight in model.parameters()]).norm()
        assert measured.weight_norm == pytest.approx(float(norm), rel=1e-5)

    @on(PlasticityMeasured)
    def hear(self, event: PlasticityMeasured) -> None:
        self.heard.append(event)


def test_what_is_measured_after_each_session() -> None:
    strategy, plasticity = Finetune(example_model()), Plasticity(samples=15)
    run(strategy, example_stream(), plasticity, check := Check(plasticity, strategy, 15))
    assert len(plasticity.measured) == 3 and check.heard == plasticity.measured
    assert set(check.heard[0].curves()) == {
        "plasticity/newest", "plasticity/dead", "plasticity/effective_rank", "plasticity/weight_norm",
    }  # fmt: skip
    other = Plasticity()
    other.load_state_dict(plasticity.state_dict())
    assert other.state_dict() == plasticity.state_dict()


def test_it_changes_nothing_and_does_without_hidden_units() -> None:
    plain, watched = Finetune(example_model()), Finetune(example_model())
    run(plain, example_stream())
    run(watched, example_stream(), Plasticity())
    pairs = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    run(Finetune(Linear((1, 8, 8), 6)), example_stream(), plasticity := Plasticity(), max_sessions=1)
    (measured,) = plasticity.measured
    assert measured.dead != measured.dead and measured.newest > 0
    with pytest.raises(ObserverError, match=r"Plasticity is of labels, and .* has value ones"):
        run(Finetune(Mlp(10, 1)), split_regression(), Plasticity())


def test_permuted_digits_are_the_digits_with_other_pixels_in_each_task() -> None:
    stream, (train, test) = permuted_digits(tasks=3, batch_size=16, seed=4), digits()
    assert stream.scenario == "domain" and stream.classes == 10 and [*stream.schedule] == [0, 1, 2]
    assert torch.equal(stream.tasks[0].test[:].x, test.x) and torch.equal(stream.tasks[2].test[:].y, test.y)
    assert torch.equal(stream.tasks[0].train[:].x.sum(0), train.x.sum(0))
    first, second = (stream.tasks[number].test[:].x.flatten(1) for number in (1, 2))
    assert torch.equal(first.sort(1).values, second.sort(1).values) and not torch.equal(first, second)
    assert torch.equal(first, permuted_digits(tasks=2, batch_size=16, seed=4).tasks[1].test[:].x.flatten(1))


def test_the_documented_table_is_that_of_the_results() -> None:
    rows = read(ROOT / "experiments" / "results" / "plasticity.jsonl")
    assert {(row["method"], row["seed"]) for row in rows} == {(method, seed) for method in METHODS for seed in range(3)}
    assert all(len(row["newest"]) == (TASKS // 10 if row["method"] == NEW else TASKS) for row in rows)
    page = (ROOT / "docs" / "plasticity.md").read_text(encoding="utf-8").splitlines()
    lines = table(rows)
    first = page.index(lines[0])
    assert page[first : first + len(lines)] == lines
