"""PRD against a worked example: its loss, gradients and answers, who is moved by what, and invariants."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import PRD
from clstream.strategies.prd import over_classes, over_samples
from clstream.streams import blobs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Samples, SessionEnded, SessionStarted, TaskStarted, on, run
from clstream.checks import example_model, example_stream

double = partial(torch.tensor, dtype=torch.float64)

# Features of four views, rows 0 and 1 the first views of two samples, and those that the teacher sees; prototypes of an old task,
# the teacher's, and those of the task that goes on.
H = double([[1, 2, 0.5], [0.5, 0.2, 1.5], [0.8, 1.5, 0.7], [0.3, 0.4, 1.2]])

BEFORE = double([[0.9, 1.8, 0.6], [0.6, 0.1, 1.4], [0.7, 1.6, 0.5], [0.4, 0.3, 1.0]])

OLD = double([[0.2, 0.1, -0.1], [0, 0.3, 0.2]])

OLD_BEFORE = double([[0.1, 0.2, -0.1], [0.1, 0.2, 0.2]])

CURRENT = double([[0.3, 0.4, 0], [0.1, -0.2, 0.5]])

Y = torch.tensor([2, 3, 2, 3])

SC, PROTOTYPE, RELATION = 0.0716318829, 0.1207443834, 0.0086687771

near = partial(pytest.approx, abs=1e-9)


class Given(nn.Module):
    """Its features are the inputs, or what it was given for them."""

    def __init__(self, answers: Tensor | None = None) -> None:
        super().__init__()
        self.head, self.answers = nn.Linear(3, 4), answers

    def features(self, x: Tensor) -> Tensor:
        if self.answers is not None:
            assert torch.equal(x, H)  # the teacher sees the very views that the model sees
        return x if self.answers is None else self.answers

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def worked_example(**options: object) -> PRD:
    strategy = PRD(Given(), **options)
    strategy.projection = nn.Identity()
    strategy.prototypes.grow([0, 1, 2, 3])
    strategy.prototypes.weight.data = torch.cat([OLD, CURRENT])
    strategy.teacher, strategy.old_prototypes = Given(BEFORE), OLD_BEFORE
    strategy.old = torch.tensor([[0, 1]])
    draws = iter([H[:2], H[2:]] * 10)
    strategy.augment = lambda x: next(draws)
    return strategy


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SC + 2 * PROTOTYPE + 4 * RELATION),
        ({"alpha": 0, "beta": 0}, SC),
        ({"alpha": 0, "beta": 0, "base_temperature": None}, 0.0501423180),
        ({"alpha": 1, "beta": 0}, SC + PROTOTYPE),
        ({"alpha": 0, "beta": 1}, SC + RELATION),
        ({"alpha": 0, "beta": 1, "relation": "samples"}, SC + 0.0073274667),
        ({"alpha": 0, "beta": 1, "relation": "samples", "relation_temperature": 0.1}, SC + 0.2280086462),
    ],
)
def test_the_loss_of_the_worked_example(options: dict, expected: float) -> None:
    loss = worked_example(**options).loss(Samples(H[:2], Y[:2]))
    assert loss.item() == near(expected)


def test_the_gradients_of_the_worked_example() -> None:
    strategy = worked_example()
    weight = strategy.prototypes.weight
    strategy.prototype_loss(H, Y).backward()
    expected = double([[0.126398, -0.094799, -0.299484], [-0.111606, -0.471564, -0.166305]])
    assert torch.allclose(weight.grad, torch.cat([torch.zeros_like(OLD), expected]), rtol=0, atol=1e-6)
    weight.grad = None
    features = H.clone().requires_grad_()
    strategy.relation_loss(features, BEFORE).backward()
    assert torch.allclose(features.grad[0], double([-0.010013, 0.005197, 0.011809]), rtol=0, atol=1e-6)
    expected = double([[0.036276, -0.173147, -0.100594], [0.072209, 0.041904, -0.062856]])
    assert torch.allclose(weight.grad, torch.cat([expected, torch.zeros_like(CURRENT)]), rtol=0, atol=1e-6)


def test_the_other_readings_of_the_relation_in_the_worked_example() -> None:
    """KL in the other direction, and scores that are no cosines: what the numbers of the other forms are made of."""
    old = torch.tensor([[0, 1]])
    unit = partial(F.normalize, dim=1)
    cosines, cosines_before = unit(H) @ unit(OLD).T, unit(BEFORE) @ unit(OLD_BEFORE).T
    assert over_samples(cosines_before, cosines, old).item() == near(0.0071755277)
    assert over_samples(cosines_before / 0.1, cosines / 0.1, old).item() == near(0.2470100295)
    assert over_samples(BEFORE @ unit(OLD_BEFORE).T, H @ unit(OLD).T, old).item() == near(0.0164382393)


def test_the_answers_of_the_worked_example() -> None:
    strategy = worked_example()
    assert strategy.predict(H).tolist() == [2, 3, 2, 3]
    cosines = F.normalize(H, dim=1) @ F.normalize(torch.cat([OLD, CURRENT]), dim=1).T
    torch.testing.assert_close(strategy.scores(H), cosines)
    tasks = blobs(tasks=2, classes=4).tasks
    assert strategy.predict(H, tasks[0]).tolist() == cosines[:, :2].argmax(1).tolist()
    assert strategy.predict(H, tasks[1]).tolist() == (2 + cosines[:, 2:].argmax(1)).tolist()


def test_tasks_of_any_size_are_summed_each_by_itself() -> None:
    torch.manual_seed(0)
    now, then = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    groups = [[0, 4, 1], [2], [3, 5]]
    old = torch.tensor([[0, 4, 1], [2, -1, -1], [3, 5, -1]])
    for ours, dim, reduction in ((over_classes, 1, "batchmean"), (over_samples, 0, "sum")):
        expected = torch.zeros((), dtype=torch.float64)
        for rows in groups:
            log, target = (now, then) if dim == 1 else (then, now)  # KL(then || now) over classes, KL(now || then) over samples
            expected += F.kl_div(log[:, rows].log_softmax(dim), target[:, rows].softmax(dim), reduction=reduction)
        loss = ours(now, then, old)
        assert loss.item() == near(expected.item())
        (mine,), (theirs,) = torch.autograd.grad(loss, now), torch.autograd.grad(expected, now)
        torch.testing.assert_close(mine, theirs)
        assert not mine[:, 6].any()  # no old task has it; -1 stands for it where rows are filled up


@pytest.mark.parametrize(
    ("weights", "moved"),
    [((1, 0, 0), {"encoder", "projection"}), ((0, 1, 0), {"current"}), ((0, 0, 1), {"encoder", "old"})],
)
@pytest.mark.parametrize("relation", ["classes", "samples"])
def test_each_term_moves_what_it_should(relation: str, weights: tuple[int, int, int], moved: set[str]) -> None:
    strategy, stream = PRD(example_model(), relation=relation), example_stream(epochs=2)
    run(strategy, stream, max_sessions=1)
    strategy.open_task(TaskStarted(stream.tasks[1]))
    strategy.grow_prototypes(SessionStarted(stream.session(1)))
    strategy.old_prototypes += 0.1  # so that there is a difference to the teacher
    strategy.optimizer.zero_grad()
    strategy.scale, strategy.alpha, strategy.beta = weights
    strategy.loss(stream.tasks[1].train[:12]).backward()
    rows = strategy.prototypes.weight.grad
    touched = {
        "encoder": any(weight.grad is not None and weight.grad.any() for weight in strategy.model.stages.parameters()),
        "projection": any(weight.grad is not None and weight.grad.any() for weight in strategy.projection.parameters()),
        "old": rows is not None and rows[:2].any(1).all(),
        "current": rows is not None and rows[2:].any(1).all(),
    }
    assert {name for name, has_moved in touched.items() if has_moved} == moved
    partly = {"old": rows is not None and rows[:2].any(), "current": rows is not None and rows[2:].any()}
    assert {name for name, has_moved in partly.items() if has_moved} == moved & {"old", "current"}
    assert all(weight.grad is None for weight in strategy.teacher.parameters())
    assert all(weight.grad is None for weight in strategy.model.head.parameters())


@pytest.mark.parametrize("relation", ["classes", "samples"])
def test_lengths_of_prototypes_don_t_count(relation: str) -> None:
    plain, scaled = worked_example(relation=relation), worked_example(relation=relation)
    scaled.prototypes.weight.data *= double([[3], [0.2], [7], [0.5]])
    scaled.old_prototypes = scaled.old_prototypes * double([[0.1], [4]])
    batch = Samples(H[:2], Y[:2])
    assert plain.loss(batch).item() == near(scaled.loss(batch).item())
    torch.testing.assert_close(plain.scores(H), scaled.scores(H))


@pytest.mark.parametrize("relation", ["classes", "samples"])
def test_the_order_of_samples_and_of_views_doesn_t_count(relation: str) -> None:
    strategy = worked_example(relation=relation)
    expected = strategy.loss(Samples(H[:2], Y[:2])).item()
    strategy.teacher.answers = None  # its features are those of the model, in whatever order
    plain = strategy.loss(Samples(H[:2], Y[:2])).item()
    assert plain != expected
    for first, second, y in ((H[2:], H[:2], Y[:2]), (H[[1, 0]], H[[3, 2]], Y[[1, 0]])):
        draws = iter([first, second])
        strategy.augment = lambda x, draws=draws: next(draws)
        assert strategy.loss(Samples(first, y)).item() == near(plain)


@pytest.mark.parametrize(("beta", "stays"), [(0.0, True), (4.0, False)])
def test_old_prototypes_are_moved_by_the_distillation_alone(beta: float, stays: bool) -> None:
    rows: list[Tensor] = []

    class Watch:
        @on(SessionEnded)
        def see(self, event: SessionEnded) -> None:
            rows.append(strategy.prototypes.weight.detach().clone())

    strategy = PRD(example_model(), partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1), beta=beta)
    run(strategy, example_stream(epochs=2), Watch())
    assert [len(row) for row in rows] == [2, 4, 6]
    assert torch.equal(rows[1][:2], rows[0]) is stays
    assert torch.equal(rows[2][:4], rows[1]) is stays
    assert (strategy.teacher is None) is stays  # without distillation none is kept
