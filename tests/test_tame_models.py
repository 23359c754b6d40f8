"""TAME: the models and options that it takes and refuses, and what `Routing` measures."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies import AGEM, TAME, Refresh
from clstream.strategies.tame import Routing, RoutingMeasured
from tame_runs import Ear, moving, tame
from torch import Tensor, nn
from torch.optim import SGD

from clstream import Event, on, run
from clstream.bus import ObserverError
from clstream.models import GrowingHead, Mlp
from clstream.online_metrics import Detection, Prequential
from clstream.params import HasParams
from clstream.seeds import isolated


def test_where_samples_were_sent_is_not_told_to_the_strategy() -> None:
    class Curious(TAME):
        @on(Event)
        def hear(self, event: Event) -> None:
            assert not isinstance(event, RoutingMeasured)

    with isolated(0, "model"):
        strategy = Curious(Mlp(14, 4, hidden=(32,)), partial(SGD, lr=0.1), window=20, selector_epochs=5, retrain_epochs=2)
    run(strategy, moving([0, 1]), routing := Routing(), ear := Ear())
    assert ear.of(RoutingMeasured) == routing.measured and len(routing.measured) == 2


@pytest.mark.slow
def test_what_is_measured_is_tracked(store: str) -> None:
    from mlflow.tracking import MlflowClient

    from clstream.tracking import MlflowTracker

    tracker, prequential, routing = MlflowTracker(uri=store), Prequential(), Routing()
    run(tame(), moving([0, 1, 2, 1, 3]), tracker, Detection(), routing, prequential)

    def curve(name: str) -> list[float]:
        return [point.value for point in MlflowClient(store).get_metric_history(tracker.run_id, name)]

    assert curve("experts/number") == [2, 3, 3, 4] and curve("experts/active") == [1, 2, 1, 3]
    assert curve("detection/recall") == [1, 1, 1, 1] and curve("detection/false_alarms") == [0] * 5
    assert curve("prequential/mean")[-1] == prequential.accuracy
    assert curve("routing/strict_accuracy") == [event.strict for event in routing.measured]
    assert curve("parameters/dense")[-1] == 5 * 14 * 32 + 5 * 32 + 4 * (32 * 4 + 4) + 32 * 4 + 4  # selector: four outputs too


def test_routing_watches_tame_alone() -> None:
    with pytest.raises(ObserverError, match="Routing watches TAME, not Refresh"):
        run(Refresh(AGEM(Mlp(14, 4))), moving([0]).__class__("shown", moving([0]).tasks, [0], scenario="domain"), Routing())


def test_a_model_that_no_selector_can_be_made_of_is_refused_before_anything_is_learned() -> None:
    class HeadFirst(nn.Module):
        """Its head is not the last of its linear layers."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(8, 4), nn.Linear(14, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    with pytest.raises(ValueError, match="can't make a selector of HeadFirst: with two outputs it answers one sample with mat1"):
        run(TAME(HeadFirst()), moving([0, 1]))
    run(TAME(HeadFirst(), selector="mlp"), moving([0]), max_sessions=1)

    class Sized(HasParams, nn.Module):
        """Knows how it was built, by other names than the models of clstream."""

        def __init__(self, width: int = 8, outputs: int = 4) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(14, width), nn.ReLU(), nn.Linear(width, outputs))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with isolated(0, "model"):
        strategy = TAME(Sized(), partial(SGD, lr=0.1, momentum=0.9), window=20, selector_epochs=30, retrain_epochs=8)
    run(strategy, moving([0, 1]))
    assert len(strategy.experts) == 2 and strategy.trained_selector()[0].net[2].out_features == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"alpha": 0}, "alpha is the weight of a new loss"),
        ({"sparsity": 1.0}, "sparsity must be a share, from 0 to below 1"),
        ({"selector_sparsity": -0.1}, "selector_sparsity must be a share"),
        ({"pruning": "late"}, "pruning must be one of none, online, posthoc, not 'late'"),
        ({"selector": "lenet"}, "selector must be one of expert, mlp"),
        ({"initial": "old"}, "initial must be one of new, given"),
        ({"selector_capacity": 0}, "capacity must be a whole number of at least 1"),
        ({"selector_epochs": 0}, "selector_epochs must be a whole number"),
        ({"selector_retrain_lr": 0.0}, "selector_retrain_lr must be a finite number above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tame(**options)


@pytest.mark.slow
def test_models_that_experts_cannot_be_made_of_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(14, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.raises(ValueError, match="build the model with head='fixed'"):
        TAME(Mlp(10, 4, head="growing"))
    with pytest.raises(ValueError, match="TAME can't draw the weights of Own anew"):
        TAME(Own())
    with pytest.raises(ValueError, match="has no parameters"):
        TAME(nn.Flatten(), optimizer=lambda _: SGD([torch.zeros(1)], lr=0.1))
    assert isinstance(GrowingHead(3, 2), nn.Module)
    strategy = TAME(Own(), partial(SGD, lr=0.1), window=20, initial="given", selector="mlp", selector_epochs=5)
    run(strategy, moving([0, 1]))
    assert len(strategy.experts) > 1


@pytest.mark.slow
def test_a_network_of_ones_own_gets_experts_and_a_selector() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(14, 32), nn.ReLU(), nn.Linear(32, 4))
    strategy = TAME(net, partial(SGD, lr=0.1), window=20, selector_epochs=20)
    result = run(strategy, moving([0, 1, 2], epochs=10))
    assert len(strategy.experts) >= 3 and strategy.trained_selector()[0][2].out_features == len(strategy.experts)
    assert result.average_accuracy > 0.9
