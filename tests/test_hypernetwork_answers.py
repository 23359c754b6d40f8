"""What hypernetworks answer, and the networks and options that they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clstream.strategies.ewc import EWCPenalty
from clstream.strategies.hypernetwork.hypernetwork import entropy
from hypernetworks import LSTM, Raw, at_second_task, built, learned
from torch import Tensor, nn
from torch.func import functional_call

from clstream import Samples, Stream, metrics, run
from clstream.checks import example_model, example_stream
from clstream.evaluation import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, -1e4, 3.0], [200.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    p = logits[3].softmax(0)
    expected = torch.stack([torch.tensor(4.0).log(), torch.tensor(0.0), torch.tensor(0.0), -(p * p.log()).sum()])
    assert torch.allclose(entropy(logits), expected, atol=1e-6)


@pytest.mark.parametrize("head", ["own", "shared"])
def test_the_surest_task_answers_each_sample(head: str) -> None:
    stream = example_stream(epochs=2)
    strategy = learned(stream, head=head)
    x = torch.cat([task.test.x for task in stream.tasks])
    answers, labels = [], []
    with evaluating(strategy):
        for sample in x.split(1):
            candidates = []
            for number, state in strategy.tasks.items():
                network = strategy.network.unflatten(strategy.weights([state])[0])
                outputs = functional_call(strategy.model, network, (sample,))[0]
                outputs = outputs[[2 * number, 2 * number + 1]] if head == "own" else outputs[:2]
                p = outputs.double().softmax(0)
                candidates.append((-(p * p.log()).sum().item(), number, outputs))
            _, number, outputs = min(candidates, key=lambda candidate: candidate[0])
            row = torch.full((6,), float("-inf"))
            row[[2 * number, 2 * number + 1]] = outputs
            answers.append(row)
            labels.append(int(row.argmax()))
        assert torch.allclose(strategy.scores(x), torch.stack(answers), atol=1e-5)
        assert strategy.predict(x).tolist() == labels
    assert len({label // 2 for label in labels}) > 1


@pytest.mark.slow
def test_one_head_serves_all_tasks() -> None:
    """The network has the outputs of one task; labels are places among its classes, and no task is state beforehand."""
    stream = example_stream(epochs=10, scenario="task")
    with isolated(0, "model"):
        model = Mlp((1, 8, 8), 2, hidden=(32,))
    strategy = built(model, head="shared")
    with pytest.raises(ValueError, match="once a run has started"):
        strategy.scores(stream.tasks[0].test.x)
    result = run(strategy, stream)
    assert result.average_accuracy > 0.9
    with evaluating(strategy):
        assert set(strategy.predict(stream.tasks[1].test.x, stream.tasks[1]).tolist()) == {2, 3}
        assert set(strategy.predict(stream.tasks[1].test.x).tolist()) <= set(range(6))


def test_what_is_made_for_answers_is_not_kept_when_something_is_learned() -> None:
    stream = example_stream()
    strategy, batch = at_second_task(stream)
    task = stream.tasks[0]
    with evaluating(strategy):
        before = strategy.scores(task.test.x, task)
    strategy.learn(batch)
    with evaluating(strategy):
        now = strategy.scores(task.test.x, task)
        network = strategy.network.unflatten(strategy.weights([strategy.tasks[0]])[0])
        assert torch.allclose(now[:, :2], functional_call(strategy.model, network, (task.test.x,))[:, :2], atol=1e-5)
    assert not torch.equal(before, now)


def test_before_a_batch_the_current_task_answers() -> None:
    strategy, batch = at_second_task()
    with evaluating(strategy):
        assert set(strategy.predict_online(batch.samples.x).tolist()) <= {2, 3}
        assert torch.equal(strategy.predict_online(batch.samples.x), strategy.predict(batch.samples.x, batch.task))


@pytest.mark.slow
def test_a_domain_incremental_stream_has_one_head_and_a_network_for_each_domain() -> None:
    """Labels are swapped from domain to domain, and the background tells which it is: only the right network is right."""
    base = example_stream(epochs=10)
    tasks = []
    for number in range(2):

        def shifted(samples: Samples, number: int = number) -> Samples:
            return Samples(samples.x.bitwise_not() if number else samples.x, (samples.y + number) % 2)

        first = base.tasks[0]
        tasks.append(type(first)(number, (0, 1), shifted(first.train), shifted(first.test)))
    result = run(built(example_model()), Stream("swapped", tasks, epochs=10, batch_size=8, scenario="domain"))
    assert metrics.average_accuracy(result.task_accuracy, result.taught) > 0.9


class OutFirst(nn.Module):
    """Its output layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.raw, self.into = nn.Linear(16, 6), Raw(), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(self.raw(x)).relu())


def test_the_head_is_the_layer_that_gives_the_outputs() -> None:
    strategy = built(OutFirst(), held_heads="own")
    run(strategy, example_stream())
    assert strategy.network.head == "out"
    own = strategy.network.unflatten(strategy.network.head_mask(torch.tensor([0, 1])))
    assert own["out.weight"].sum(1).tolist() == [16, 16, 0, 0, 0, 0] and own["out.bias"].tolist() == [1, 1, 0, 0, 0, 0]
    assert own["into.weight"].all() and own["into.bias"].all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"generator": "gru"}, "generator must be one of mlp, lstm, not 'gru'"),
        ({"chunks": "none"}, "chunks must be one of shared, own"),
        ({"old_embeddings": "moving"}, "old_embeddings must be one of frozen, learned"),
        ({"held_heads": "none"}, "held_heads must be one of all, own"),
        ({"importance": "si"}, "importance must be one of none, fisher, normalised"),
        ({"head": "growing"}, "head must be one of own, shared"),
        ({"activation": "gelu"}, "activation must be one of relu, elu"),
        ({"old_tasks": 0}, "old_tasks must be a whole number of at least 1"),
        ({"fisher_samples": 0.5}, "fisher_samples must be a whole number"),
        ({"chunk": 0}, "chunk must be a whole number"),
        ({"task_size": 0}, "task_size must be a whole number"),
        ({"hidden": (10, 0)}, r"hidden\[1\] must be a whole number"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0"),
        ({"beta": float("nan")}, "beta must be a finite number of at least 0"),
        ({"chunk_std": float("inf")}, "chunk_std must be a finite number of at least 0"),
        ({"clip": 0.0}, "clip must be a finite number above 0"),
        ({"generator": "lstm"}, "hidden must be one width"),
        ({"growth": True}, "growth stores what is around an LSTM"),
        (LSTM | {"growth": True, "importance": "fisher"}, "importance='none'"),
    ],
)
def test_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        built(**options)


def test_models_are_refused() -> None:
    with pytest.raises(ValueError, match="its head can't grow"):
        built(example_model(head="growing"))
    with pytest.raises(ValueError, match="no weights that require a gradient"):
        built(example_model().requires_grad_(False))
    flat = nn.Sequential(Raw(), nn.Unflatten(1, (64, 1)), nn.Conv1d(64, 6, 1), nn.Flatten())
    with pytest.raises(ValueError, match="is about the rows of a linear layer, and none gives the outputs of Sequential"):
        run(built(flat, held_heads="own"), example_stream())
    with pytest.raises(ValueError, match="Mlp has 1 outputs, too few for a task of 2 classes"):
        run(built(Mlp((1, 8, 8), 1), head="shared"), example_stream())
    model = Mlp((1, 8, 8), 6)
    model.head.double()
    with pytest.raises(ValueError, match=r"head\.weight is torch\.float64: call model\.float"):
        built(model)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: ask the model once"):
        built(nn.Sequential(nn.LazyLinear(6)))
    with pytest.raises(TypeError, match="takes no regularisers"):
        built().add_regularisers(EWCPenalty(1.0))
