"""Expert Gate: autoencoders and relatedness by hand, which expert begins from which and answers, and that old ones stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import ExpertGate
from clstream.strategies.expert_gate import Autoencoder
from clstream.streams import blobs
from conftest import built
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import Samples, Stream, Task, TaskEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.eval_mode import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated

SMALL = {"code": 16, "gate_batch": 20, "gate_lr": 0.05}


def small(**options: object) -> ExpertGate:
    return built(partial(ExpertGate, **{**SMALL, **options}))


def test_an_autoencoder_is_one_layer_and_its_error_is_squared() -> None:
    with isolated(0):
        gate, t = Autoencoder(6, 3), torch.rand(4, 6)
    hidden = (t @ gate.encoder.weight.T + gate.encoder.bias).relu()
    again = 1 / (1 + (-(hidden @ gate.decoder.weight.T + gate.decoder.bias)).exp())
    torch.testing.assert_close(gate.errors(t), ((again - t) ** 2).sum(1))


class Fixed(Autoencoder):
    """One whose reconstruction is always the same."""

    def __init__(self, reconstruction: Tensor) -> None:
        super().__init__(len(reconstruction), 1)
        with torch.no_grad():
            self.decoder.weight.zero_()
            self.decoder.bias.copy_(reconstruction.logit())


def gated(*levels: float, **options: object) -> ExpertGate:
    """Return one with a gate for each level of gray, which reconstructs that, and an expert for each but the last."""
    strategy = small(**options)
    strategy.gates = [Fixed(torch.full((64,), level)) for level in levels]
    strategy.experts = [example_model(seed) for seed in range(len(levels) - 1)]
    strategy.tasks = [*range(len(levels))]
    strategy.classes_of = [torch.tensor([2 * place, 2 * place + 1]) for place in strategy.tasks]
    return strategy


def gray(*levels: int) -> Samples:
    return Samples(
        torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8), torch.zeros(len(levels)).long()
    )


@pytest.mark.parametrize(("threshold", "unforgetting"), [(0.74, True), (0.76, False)])
def test_the_expert_of_the_most_related_task_is_copied(threshold: float, unforgetting: bool) -> None:
    """Samples of gray 0 (204 / 255 = 0.8), gates at 0.2, 0.55 and 0.6: errors 0.36, 0.0625, 0.04, so Rel = -7 and 0.4375."""
    strategy = gated(0.2, 0.55, 0.6, threshold=threshold - 0.3125)
    strategy.begin_expert(gray(204, 204), torch.tensor([0, 1]))
    assert strategy.relatedness == [pytest.approx([1 - (0.36 - 0.04) / 0.04, 1 - (0.0625 - 0.04) / 0.04], rel=1e-4)]
    assert strategy.started_from == [1]
    assert strategy.unforgetting is unforgetting
    for name, value in strategy.experts[1].state_dict().items():
        assert torch.equal(strategy.experts[2].state_dict()[name], value)
    assert {id(weight) for weight in strategy.optimizer.param_groups[0]["params"]} == {
        id(weight) for weight in strategy.experts[2].parameters()
    }


def test_against_avalanche_s_relatedness(avalanche: Callable[[str], ModuleType]) -> None:
    """Of the mean errors of all autoencoders over the same samples."""
    strategy, samples = gated(0.3, 0.9, 0.55, 0.6), gray(150, 204, 99)
    strategy.begin_expert(samples, torch.tensor([2, 0, 1]))
    errors = dict(zip("0123", strategy.gate_errors(samples.x).mean(0).tolist(), strict=True))
    theirs = avalanche("training.supervised.expert_gate")._ExpertGatePlugin()._task_relatedness(None, errors, "3")
    assert strategy.relatedness == [pytest.approx([*theirs.values()], rel=1e-5)]
    assert str(strategy.started_from[-1]) == max(theirs, key=theirs.get)


def test_the_gate_asks_the_expert_whose_autoencoder_errs_least() -> None:
    strategy = gated(0.2, 0.6, 0.9)
    strategy.experts.append(example_model(2))
    x = gray(51, 230, 153, 60).x
    scores = strategy.scores(x)
    for row, place in enumerate([0, 2, 1, 0]):
        own = [2 * place, 2 * place + 1]
        expected = strategy.experts[place](x[row : row + 1])[0, own].log_softmax(0)
        torch.testing.assert_close(scores[row, own], expected)
        assert (scores[row, [label for label in range(6) if label not in own]] == float("-inf")).all()
    errors = torch.stack([64 * (x[:, 0, 0, 0] / 255 - level) ** 2 for level in (0.2, 0.6, 0.9)], 1)
    weights = (-errors / 2).exp()
    torch.testing.assert_close(strategy.gate_probabilities(x), weights / weights.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    given = strategy.scores(x, replace(example_stream().tasks[1]))
    torch.testing.assert_close(given[:, 2:4], strategy.experts[1](x)[:, 2:4].log_softmax(1))


def test_related_tasks_are_learned_without_forgetting() -> None:
    strategy, stream = small(lwf_weight=0.3), example_stream()
    strategy.threshold = -1e9
    run(strategy, stream, max_sessions=2)
    assert strategy.started_from == [None, 0] and strategy.unforgetting
    batch = stream.tasks[1].train[:8]
    outputs, before = strategy.experts[1](batch.x), strategy.experts[0](batch.x)
    old = -((before[:, :2] / 2).softmax(1) * (outputs[:, :2] / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(strategy.loss(batch), F.cross_entropy(outputs[:, 2:4], batch.y - 2) + 0.3 * old)
    strategy.unforgetting = False
    torch.testing.assert_close(strategy.loss(batch), F.cross_entropy(outputs[:, 2:4], batch.y - 2))


class Remember:
    """Takes down what expert and autoencoder answer when their task ends."""

    def __init__(self, strategy: ExpertGate, x: Tensor) -> None:
        self.strategy, self.x, self.answers = strategy, x, list[tuple[Tensor, Tensor]]()

    @on(TaskEnded)
    def look(self, event: TaskEnded) -> None:
        place = len(self.strategy.experts) - 1
        with evaluating(self.strategy):
            self.answers.append((self.strategy.outputs_of(self.x, place), self.strategy.gate_errors(self.x)[:, place]))


def test_old_answers_are_the_same_bits() -> None:
    stream = example_stream((0, 1, 0, 2), epochs=2)
    x = torch.cat([task.test[:].x for task in stream.tasks])
    strategy = built(partial(ExpertGate, optimizer=partial(Adam, lr=0.01, weight_decay=0.01), **SMALL))
    run(strategy, stream, remember := Remember(strategy, x))
    errors = strategy.gate_errors(x)
    for place, (answer, own) in enumerate(remember.answers):
        assert torch.equal(strategy.outputs_of(x, place), answer) and torch.equal(errors[:, place], own)
    assert strategy.tasks == [0, 1, 0, 2] and strategy.newest() == [1, 2, 3]
    assert [len(related) for related in strategy.relatedness] == [0, 1, 2, 3]
    assert not strategy.gate_probabilities(x)[:, 0].any()
    start = example_model().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in strategy.model.state_dict().items())


def test_gates_know_their_tasks() -> None:
    stream = example_stream()
    strategy = small(gate_epochs=20)
    run(strategy, stream)
    for place, task in enumerate(stream.tasks):
        assert (strategy.gate_probabilities(task.test[:].x).argmax(1) == place).float().mean() > 0.9


def test_what_looks_the_same_is_related() -> None:
    """A task of the first one's images begins from its expert, and without forgetting."""
    first, second, _ = example_stream().tasks
    stream = Stream("again", [first, second, replace(first, id=2)], batch_size=8)
    strategy = small(gate_epochs=20)
    run(strategy, stream)
    same, other = strategy.relatedness[2]
    assert same == pytest.approx(1.0, abs=0.15) and other < 0 and strategy.started_from == [None, 0, 0] and strategy.unforgetting


def test_other_numbers_are_standardised_and_squashed() -> None:
    stream = blobs(tasks=2, classes=4)
    strategy = ExpertGate(Mlp(stream.input_shape, 4, hidden=(16,)), partial(SGD, lr=0.05), code=4)
    run(strategy, stream)
    x = stream.tasks[0].train[:].x
    expected = ((x - x.mean(0)) / x.std(0, correction=0)).sigmoid()
    torch.testing.assert_close(strategy.gate_inputs(x), expected)


def test_several_sessions_of_a_task_have_one_expert() -> None:
    tasks = [Task(task.id, task.classes, task.train, task.test) for task in example_stream().tasks]
    strategy = small()
    run(strategy, Stream("twice", tasks, (0, 0, 1, 2), batch_size=8))
    assert strategy.tasks == [0, 1, 2] and len(strategy.experts) == len(strategy.gates) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"code": 0}, "code must be a whole number of at least 1"),
        ({"held_out": 1.0}, "held_out must be a share, from 0 to below 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"lwf_weight": -1.0}, "lwf_weight must be a finite number of at least 0"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**options)
