"""BiC: the split, the loss with a corrected teacher, and the correction, against what is worked by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import BiC
from clstream.strategies.bic import corrected, fit_correction
from clstream.streams import split_digits
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import BatchLearned, SessionEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.eval_mode import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated


def test_the_correction_is_alpha_times_plus_beta_for_its_classes_alone() -> None:
    outputs = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    assert corrected(outputs, torch.tensor([0.5, -1.0]), torch.tensor([1, 3])).tolist() == [[1.0, 0.0, 3.0, -3.0]]
    assert corrected(outputs, torch.tensor([0.5, -1.0]), torch.tensor([], dtype=torch.int64)) is outputs


def of_the_code(outputs: Tensor, y: Tensor, new: Tensor, steps: int, lr: float, penalty: float) -> Tensor:
    """The same steps by torch's SGD, its schedule and its gradients."""
    correction = torch.tensor([1.0, 0.0], dtype=outputs.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([correction], lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * steps) for share in (0.3, 0.6, 0.8, 0.9)])
    for _ in range(steps):
        loss = F.cross_entropy(corrected(outputs, correction, new), y) + penalty / 2 * correction[1] ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return correction.detach()


def biased(n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are 2 q + 3 for the new classes 2 and 3, and q for others, with labels drawn from softmax(q)."""
    draw = torch.Generator().manual_seed(0)
    q = 1.5 * torch.randn(n, 5, generator=draw, dtype=torch.float64)
    q[:, 4] = float("-inf")
    y = torch.multinomial(q.softmax(1), 1, generator=draw).flatten()
    return corrected(q, torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([2, 3])), y, torch.tensor([2, 3])


def test_the_correction_takes_the_steps_of_sgd() -> None:
    outputs, y, new = biased()
    for steps, penalty in ((7, 0.1), (50, 0.0)):
        ours, theirs = (fit(outputs, y, new, steps, 0.1, penalty) for fit in (fit_correction, of_the_code))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_correction_undoes_a_linear_bias() -> None:
    """The likeliest is (o - 3) / 2; and where the steps end, the gradient is 0."""
    outputs, y, new = biased(4000)
    correction = fit_correction(outputs, y, new, 1000, 0.1, 0.0)
    torch.testing.assert_close(correction, torch.tensor([0.5, -1.5], dtype=torch.float64), rtol=0, atol=0.1)
    correction.requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(corrected(outputs, correction, new), y), correction)
    assert float(slope.abs().max()) < 1e-5


class Watch:
    """Takes down which inputs are learned, and what is held out."""

    def __init__(self, strategy: BiC) -> None:
        self.strategy = strategy
        self.counts = list[tuple[dict[int, int], dict[int, int]]]()
        self.held: Tensor | None = None

    @on(SessionEnded)
    def look(self, event: SessionEnded) -> None:
        sizes = {label: len(x) for label, x in self.strategy.validating.items()}
        self.counts.append((sizes, dict(self.strategy.counts)))


class Learned(BiC):
    """Takes down which inputs its loss sees."""

    def loss(self, samples: object) -> Tensor:
        x, _ = self.joined(samples)
        self.seen_inputs = [*getattr(self, "seen_inputs", []), x.flatten(1)]
        return super().loss(samples)


def test_the_memory_is_split_and_what_validates_is_never_learned() -> None:
    strategy = built(partial(Learned, capacity=72, validation=0.2))
    run(strategy, example_stream(epochs=2), watch := Watch(strategy))
    # 36 a class, of which 8 for validation but 6 of 30 samples at most; then 18 (4), then 12 (3)
    assert watch.counts == [
        (dict.fromkeys(range(2), 6), dict.fromkeys(range(2), 24)),
        (dict.fromkeys(range(4), 4), dict.fromkeys(range(4), 14)),
        (dict.fromkeys(range(6), 3), dict.fromkeys(range(6), 9)),
    ]
    rows = torch.cat(strategy.seen_inputs).unique(dim=0)
    for x in strategy.validating.values():
        assert not (rows[:, None] == x.flatten(1)[None]).all(2).any()
    assert len(rows) == 3 * 60 - 2 * (6 + 4 + 3)  # all others are, also those that were held out in a session that is over: none


def test_stage_1_distils_what_was_corrected() -> None:
    stream = example_stream()
    strategy = built(partial(BiC, capacity=60, temperature=2.0))
    result = run(strategy, stream, max_sessions=2)
    assert strategy.corrected.tolist() == [2, 3] and strategy.correction.tolist() != [1.0, 0.0]
    alpha, beta = strategy.correction.tolist()

    class Look:
        @on(BatchLearned)
        def compare(self, event: BatchLearned) -> None:
            if event.batch.index:
                return
            samples = event.batch.samples
            x, y = strategy.joined(samples)
            outputs, teacher = strategy.model(x), strategy.teacher(x)
            teacher = torch.cat([teacher[:, :2], alpha * teacher[:, 2:4] + beta], 1)
            kept = -((teacher / 2).softmax(1) * (outputs[:, :4] / 2).log_softmax(1)).sum(1).mean()
            expected = 4 / 6 * kept + 2 / 6 * F.cross_entropy(outputs, y)
            torch.testing.assert_close(strategy.loss(samples), expected)
            torch.testing.assert_close(strategy.scores(x), outputs)  # while a session is learned nothing is corrected
            self.looked = True

    run(strategy, stream, look := Look(), continues=result)
    assert look.looked


def test_answers_are_corrected_for_the_newest_classes() -> None:
    stream = example_stream()
    strategy = built(partial(BiC, capacity=60))
    run(strategy, stream, max_sessions=2)
    x = torch.cat([task.test.x for task in stream.tasks])
    alpha, beta = strategy.correction.tolist()
    with evaluating(strategy):
        outputs = strategy.model(x)
    expected = torch.cat([outputs[:, :2], alpha * outputs[:, 2:4] + beta, torch.full((len(x), 2), float("-inf"))], 1)
    torch.testing.assert_close(strategy.scores(x), expected)


@pytest.mark.slow
def test_the_correction_helps_where_the_newest_classes_are_ahead() -> None:
    stream = split_digits(epochs=3)
    with isolated(0, "model"):
        strategy = BiC(Mlp(stream.input_shape, stream.classes, hidden=(64,)), capacity=100)
    accuracy = run(strategy, stream).average_accuracy
    strategy.corrected = strategy.corrected[:0]
    tests = [task.test[:] for task in stream.tasks]
    plain = sum(float((strategy.predict(test.x) == test.y).float().mean()) for test in tests) / len(tests)
    assert accuracy > plain + 0.2


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="session 2 makes it 6 classes, and capacity=11 exemplars are fewer than 2 of each: take"):
        run(built(partial(BiC, capacity=11)), example_stream())
    with pytest.raises(TypeError, match="BiC needs a model with a method `features`, which Linear hasn't"):
        BiC(nn.Linear(3, 2))
    for wrong in ({"validation": 0.0}, {"validation": 1.0}, {"bias_steps": 0}, {"bias_lr": 0}, {"beta_penalty": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BiC(Mlp(4, 2), **wrong)
    with pytest.raises(TypeError, match="BiC answers with more than its model"):
        BiC(example_model()).export()
