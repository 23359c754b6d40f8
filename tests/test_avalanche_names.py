"""Our results by Avalanche's names, against Avalanche's own evaluation of the same run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from clstream.experiments.parity.measuring import Labelled
from clstream.strategies import AvalancheStrategy
from clstream.streams import blobs, from_avalanche
from clstream.streams.data import digits
from torch import nn
from torch.optim import SGD

from clstream import Strategy, run
from clstream.avalanche.results import as_avalanche
from clstream.models import Mlp
from clstream.seeds import isolated

Import = Callable[[str], ModuleType]


def naive(avalanche: Import, evaluator: Any) -> Any:
    torch.manual_seed(0)
    net = Mlp((1, 8, 8), 10, hidden=(20,))
    return avalanche("training.supervised").Naive(
        model=net, optimizer=SGD(net.parameters(), 0.05), criterion=nn.CrossEntropyLoss(), train_mb_size=10, train_epochs=3,
        eval_mb_size=500, evaluator=evaluator,
    )  # fmt: skip


def test_the_curves_are_those_that_avalanche_measures(avalanche: Import) -> None:
    train, test = digits()
    given = avalanche("benchmarks").nc_benchmark(Labelled(train.x, train.y), Labelled(test.x, test.y), 5, task_labels=False, seed=3)
    metrics = avalanche("evaluation.metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = avalanche("training.plugins").EvaluationPlugin(
            metrics.accuracy_metrics(experience=True, stream=True),
            metrics.forgetting_metrics(experience=True, stream=True),
            metrics.bwt_metrics(experience=True, stream=True),
        )
        alone, ours = naive(avalanche, evaluator), naive(avalanche, None)
    with isolated(0, "run"):
        for experience in given.train_stream:
            alone.train(experience, shuffle=False)
            alone.eval(given.test_stream)
    stream = from_avalanche(given, epochs=3, batch_size=10, shuffle=False)
    result = run(AvalancheStrategy(ours), stream, seed=0)
    found = as_avalanche(result, stream)
    expected = {name: curve for name, curve in evaluator.get_all_metrics().items() if "eval_phase" in name}
    assert found.keys() == expected.keys()
    assert {"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000", "StreamForgetting/eval_phase/test_stream"} <= found.keys()
    for name, (x, values) in expected.items():
        assert found[name][0] == x, name
        assert found[name][1] == pytest.approx(values, abs=1e-6), name


def test_tasks_have_labels_of_their_own_where_they_are_given() -> None:
    stream = blobs(tasks=3, scenario="task")
    found = as_avalanche(run(Strategy(Mlp(stream.input_shape, stream.classes)), stream), stream)
    assert "Top1_Acc_Stream/eval_phase/test_stream/Task002" in found
    assert len(found["ExperienceForgetting/eval_phase/test_stream/Task001/Exp001"][1]) == 1
    again = blobs(tasks=3, schedule=[0, 1, 0, 2])
    result = replace(run(Strategy(Mlp(again.input_shape, again.classes)), again), accuracy=torch.rand(4, 3, dtype=torch.float64))
    since = as_avalanche(result, again)["ExperienceForgetting/eval_phase/test_stream/Task000/Exp000"][1]
    assert since == pytest.approx((result.accuracy[0, 0] - result.accuracy[1:, 0]).tolist())  # since it was *first* trained
    with pytest.raises(ValueError, match="the result is on 3 tasks, and blobs has 2"):
        as_avalanche(run(Strategy(Mlp(stream.input_shape, stream.classes)), stream), blobs(tasks=2))
