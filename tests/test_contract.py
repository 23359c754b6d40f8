"""The contract, over every strategy and stream of ours; and that each check fails on what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import clstream.strategies as zoo
import pytest
import torch
from conftest import STRATEGIES, make, params
from torch import Tensor, nn

from clstream import Batch, BatchLearned, Strategy, Stream, TaskEnded, on, streams
from clstream.checks import Check, check_strategy, check_stream, example_model, example_stream
from clstream.stream import TARGETS

STREAMS: dict[str, Callable[[], Stream]] = {
    "blobs": streams.blobs,
    "blobs, online, hidden": lambda: streams.blobs(sessions_per_task=3, boundaries=False, batch_size=7),
    "blobs, recurring": lambda: streams.blobs(tasks=3, schedule=[0, 1, 2, 1, 0], epochs=2),
    "blobs, task-IL, uneven": lambda: streams.blobs(tasks=3, scenario="task", validation=0.2),
    "blobs, domain-IL": lambda: streams.blobs(scenario="domain", class_order=3),
    "split_digits": streams.split_digits,
    "blurry_episodes": lambda: streams.blurry_episodes("digits", epochs=2, validation=0.1),
    "fuzzy_tasks": lambda: streams.fuzzy_tasks(epochs=2, validation=0.1),
    "fuzzy_tasks, sharp, straddling, late labels, not shuffled": lambda: streams.fuzzy_tasks(
        width=0.0, sessions=7, straddle=True, delay=1.5, shuffle=False
    ),
    "recurring_tasks": streams.recurring_tasks,
    "blurry_tasks": streams.blurry_tasks,
    "si_blurry": streams.si_blurry,
    "gaussian_schedule": streams.gaussian_schedule,
    "label_shift": lambda: streams.label_shift(straddle=True, delay=2.0),
    "feature_drift": streams.feature_drift,
    "imbalanced_tasks": streams.imbalanced_tasks,
    "few_shot_tasks": streams.few_shot_tasks,
    "label_pool": streams.label_pool,
    "federated": streams.federated,
    "federated, Dirichlet": lambda: streams.federated(alpha=0.5, rounds=3, epochs=2),
    "episode": lambda: streams.episode(2, "digits", ways=2, shots=3, sets=4, sets_per_group=2, steps=2),
    "multilabel_canvas": lambda: streams.multilabel_canvas(train=300, test=60, epochs=2, validation=0.1),
    "multilabel_canvas, task-IL": lambda: streams.multilabel_canvas(train=300, test=60, epochs=1, scenario="task"),
    "split_regression": lambda: streams.split_regression(epochs=2, validation=0.1),
    "split_regression, synthetic, hidden": lambda: streams.split_regression("synthetic", epochs=2, boundaries=False),
}
REAL: dict[str, Callable[[], Stream]] = {
    "split_mnist": lambda: streams.split_mnist(batch_size=500),
    "split_fashion_mnist": lambda: streams.split_fashion_mnist(batch_size=500),
    "permuted_mnist": lambda: streams.permuted_mnist(tasks=2, batch_size=500),
    "rotated_mnist": lambda: streams.rotated_mnist(tasks=2, batch_size=500, sessions_per_task=2),
}


@lru_cache(maxsize=1)
def checks_of(name: str) -> dict[str, Check]:
    """Return the checks of a strategy by name; those that are run one after the other share a run."""
    return {body.name: body for body in check_strategy(make(name))}


QUICK = {"AGEM", "ClassMeans", "DERpp", "EWC", "Finetune", "ICaRL", "Joint", "LwF", "Replay", "SI", "WithDetectedBoundaries"}
"""The strategies of each kind whose contract `make test` checks too; `make test-all` checks those of all."""


@pytest.mark.filterwarnings("ignore:SHARP. after episode")  # its layers are small here
@pytest.mark.parametrize("check", [check.name for check in check_strategy(Strategy)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in STRATEGIES])
def test_strategy_contract(name: str, check: str) -> None:
    checks = checks_of(name)
    assert check in checks or check in getattr(zoo, name).exempt
    if check in checks:
        checks[check]()


def test_the_quick_ones_are_those_that_the_page_for_contributors_counts() -> None:
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert (
        set(STRATEGIES) > QUICK
        and len(QUICK) == 11
        and "it checks the contract of eleven strategies only" in " ".join(page.split())
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_strategy_contract_of_other_targets(name: str, target: str) -> None:
    if target in make(name)(example_model()).learns_targets:
        for body in checks_of(name).values():
            if body.name.endswith(target):
                body()


@pytest.fixture(scope="module", params=params(STREAMS, REAL))
def stream(request: pytest.FixtureRequest) -> Stream:
    return (STREAMS | REAL)[request.param]()


@pytest.mark.parametrize("check", [check.name for check in check_stream(example_stream())])
def test_stream_contract(stream: Stream, check: str) -> None:
    {body.name: body for body in check_stream(stream)}[check]()


def failing(checks: list[Check]) -> set[str]:
    names = set()
    for check in checks:
        try:
            check()
        except AssertionError:
            names.add(check.name)
    return names


class Unseeded(Strategy):
    """Adds noise to the weights from a generator of the machine's, not of the run's."""

    @on(BatchLearned)
    def shake(self, event: BatchLearned) -> None:
        noise = torch.Generator()
        noise.seed()
        with torch.no_grad():
            next(self.model.parameters()).add_(1e-3 * torch.rand((), generator=noise))


class Vandal(Strategy):
    """Writes into the stream."""

    @on(TaskEnded)
    def smear(self, event: TaskEnded) -> None:
        event.task.train.x.zero_()


class Peeker(Strategy):
    """Learns while it is tested."""

    asked = 0

    def scores(self, x: Tensor, task: object = None) -> Tensor:
        self.asked += 1
        return super().scores(x)


class BatchDependent(Strategy):
    """Answers by comparing the samples asked together."""

    def scores(self, x: Tensor, task: object = None) -> Tensor:
        scores = super().scores(x)
        return scores - 100 * (torch.arange(len(x)) == len(x) - 1)[:, None] * torch.eye(6)[scores.argmax(1)]


class Idle(Strategy):
    """Never steps."""

    def learn(self, batch: Batch) -> Tensor:
        return self.loss(batch.samples).detach()


class IdleWithAll(Idle):
    """Says that it learns all kinds of targets."""

    learns_targets = TARGETS


class Sure(Strategy):
    """Says that its logits are probabilities."""

    scores_are = "probabilities"


class OutOfTask(Strategy):
    """Ignores the task that the question names."""

    def predict(self, x: Tensor, task: object = None) -> Tensor:
        return super().predict(x)


class Forgetful(Strategy):
    """Under training controls, counts steps where no checkpoint looks."""

    takes_controls = Strategy.takes_controls
    not_state = ("steps",)
    steps = 0

    def learn(self, batch: Batch) -> Tensor:
        self.steps += self.train_updates is not None
        loss = self.objective(batch.samples) * (1 + self.steps)
        self.minimise(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Forgetful, {"resumes_with_controls"}),
        (Unseeded, {"is_deterministic", "evaluates_without_trace"}),
        (Vandal, {"leaves_the_data_alone"}),
        (Peeker, {"evaluates_without_trace"}),
        (BatchDependent, {"answers"}),
        (Idle, {"learns", "learns_tasks_with_their_heads", "grows", "minimises_penalties"}),
        (IdleWithAll, {"learns", "learns_multilabel", "learns_value"}),
        (Sure, {"answers"}),
        (OutOfTask, {"answers"}),
    ],
)
def test_checks_catch(make: Callable[[nn.Module], Strategy], expected: set[str]) -> None:
    assert failing([check for check in check_strategy(make) if check.name in expected]) == expected


@pytest.mark.slow
def test_plain_strategy_passes_all() -> None:
    assert failing(list(check_strategy(Strategy))) == set()


def test_stream_checks_catch() -> None:
    leaky = replace(example_stream())
    object.__setattr__(leaky, "session", lambda index: replace(Stream.session(leaky, 0), index=index))
    assert "keeps_labels_within_tasks" in failing(list(check_stream(leaky)))


def test_an_exemption_from_no_check_is_refused() -> None:
    class Misspelled(Strategy):
        exempt = MappingProxyType({"growz": "it doesn't"})

    with pytest.raises(ValueError, match=r"exempt from \['growz'\], which are no checks"):
        list(check_strategy(Misspelled))
