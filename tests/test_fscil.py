"""FSCIL: the baseline against plain cosine training and means by hand, and each trick against its vectors and by itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import FSCIL
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import EpochStarted, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.seeds import isolated

OPTIMIZER = partial(SGD, lr=0.1, momentum=0.9)


def play(model: nn.Module | None = None, sessions: int | None = None, **options: object) -> FSCIL:
    """Run it on the example stream."""
    with isolated(0, "strategy"):
        strategy = FSCIL(example_model() if model is None else model, OPTIMIZER, **options)  # type: ignore[arg-type]
    run(strategy, example_stream(epochs=3), max_sessions=sessions)
    return strategy


def test_the_baseline_is_plain_cosine_training_and_then_class_means() -> None:
    stream, model = example_stream(epochs=2), example_model()
    with isolated(0, "strategy"):
        strategy = FSCIL(example_model(), OPTIMIZER, schedule="constant")
    result = run(strategy, stream, seed=0)

    class Rows:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            self.rows = getattr(self, "rows", again.head.weight.detach().clone())

    again, seen = FSCIL(example_model(), OPTIMIZER, schedule="constant"), Rows()
    run(again, stream, seen, seed=0, max_sessions=1)  # the rows as the run's seed draws them
    head = nn.Parameter(seen.rows)
    optimizer = OPTIMIZER(list(model.parameters()))
    optimizer.add_param_group({"params": [head]})
    for epoch in stream.session(0):
        for batch in epoch.batches():
            cosines = F.normalize(model.features(batch.samples.x), dim=1) @ F.normalize(head, dim=1).T
            optimizer.zero_grad()
            F.cross_entropy(16 * cosines, batch.samples.y).backward()
            optimizer.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(strategy.model.state_dict()[name], weight)
    with torch.no_grad():
        parts = [task.train[:] for task in stream.tasks]
        means = torch.stack([model.features(part.x[part.y == y]).mean(0) for part in parts for y in part.y.unique()])
        x = torch.cat([task.test.x for task in stream.tasks])
        cosines = F.normalize(model.features(x), dim=1) @ F.normalize(means, dim=1).T
    torch.testing.assert_close(strategy.scores(x), 16 * cosines)
    assert float(result.accuracy.diagonal().min()) > 0.8


def test_only_the_first_session_trains_and_leaves_the_encoder_in_evaluation_mode() -> None:
    model = normed_model()
    first, whole = play(normed_model(), 1), play(model)
    assert all(torch.equal(first.model.state_dict()[name], value) for name, value in model.state_dict().items())
    assert not model.training and (whole.counts == 30).all() and first.counts.tolist() == [30, 30, 0, 0, 0, 0]
    assert torch.equal(first.sums[:2], whole.sums[:2]) and not first.sums[2:].any()  # type: ignore[index]  # they are there
    assert (first.scores(example_stream().tasks[1].test.x)[:, 2:] == float("-inf")).all()


def test_the_learning_rate_falls_by_a_cosine_in_the_first_session() -> None:
    rates: list[float] = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            rates.append(strategy.optimizer.param_groups[1]["lr"])

    strategy = FSCIL(example_model(), OPTIMIZER)
    run(strategy, example_stream(epochs=2), Watch())
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.05, 0.05, 0.05])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scale": 0.0}, "scale must be a finite number above 0, not 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FSCIL(example_model(), **options)  # type: ignore[arg-type]


def test_models_without_features_are_refused() -> None:
    with pytest.raises(TypeError, match=r"FSCIL needs a model with a method `features` and a linear `head`, .* not Linear"):
        FSCIL(nn.Linear(3, 2))
