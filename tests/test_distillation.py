"""LwF, LwFMC in its loss forms, and FeatKD, against values worked out from their definitions."""

from __future__ import annotations

import pytest
import torch
from clstream.strategies import (
    FeatKDPenalty,
    LwF,
    LwFMC,
)
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import RunStarted, Samples, Strategy, TaskEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.strategy import RehearsalFree
from clstream.strategy.regulariser import frozen
from clstream.strategy.rehearsal_free import Distilling

DOUBLE = torch.float64
O = torch.tensor([[0.5, -1, 0.2, 1.5, -0.3], [-0.2, 0.4, -0.8, 0.1, 0.9]], dtype=DOUBLE)  # noqa: E741
BEFORE = torch.tensor([[0.7, -0.8, 0.1, 9.0, 9.0], [-0.1, 0.6, -1, 9.0, 9.0]], dtype=DOUBLE)  # of the new classes it knows nothing
Y = torch.tensor([3, 4])


class Table(nn.Module):
    """Answers the sample number i with row i of a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x.flatten().long()]

    def features(self, x: Tensor) -> Tensor:
        return self(x)


def in_task(strategy: RehearsalFree, old: list[int], new: list[int]) -> RehearsalFree:
    strategy.old_classes, strategy.task_classes = torch.tensor(old).long(), torch.tensor(new)
    strategy.seen_classes = torch.tensor([*old, *new])
    if strategy.active_classes == "task":
        strategy.heads = torch.zeros(5, 5, dtype=torch.bool)
        strategy.heads[torch.tensor(new)[:, None], torch.tensor(new)] = True
    return strategy


FORMS = {form: kind for kind in (RehearsalFree, LwFMC, LwF) for form in kind.forms}  # and which strategy has it


def lwf(form: str, first: bool = False, teacher: bool = True, **options: object) -> RehearsalFree:
    strategy = LwF(Table(O), **options) if form == "softmax_kd" else FORMS[form](Table(O), form=form, **options)
    in_task(strategy, [] if first else [0, 1, 2], [0, 1, 2, 3, 4] if first else [3, 4])
    if teacher and not first and isinstance(strategy, Distilling):
        strategy.teacher, strategy.past = frozen(Table(BEFORE)), [strategy.old_classes]
    return strategy


GIVEN = Samples(torch.tensor([[0], [1]]), Y)


@pytest.mark.parametrize(
    ("form", "options", "first", "expected"),
    [
        ("bce_kd", {"bce_scale": 1.0}, False, 0.5731881958),
        ("bce_kd", {}, False, 2.8659409792),
        ("bce_kd", {"bce_scale": None}, False, 2.8659409792),  # five classes
        ("bce", {}, False, 2.9045256930),
        ("bce", {"active_classes": "seen"}, False, 2.9045256930),
        ("bce_kd", {}, True, 2.9045256930),
        ("bce", {"active_classes": "task"}, False, 2.3016488216),
        ("bce_balanced", {}, False, 0.7069077848),
        ("bce_balanced", {}, True, 1.3298866662),
        ("softmax", {}, False, 0.7899327888),
        ("softmax", {"active_classes": "seen"}, False, 0.7899327888),
        ("softmax_kd", {}, True, 0.7899327888),
        ("softmax_kd", {}, False, 0.7899327888 + 1.0545833604),
        ("softmax_kd", {"weight": 0.0}, False, 1.0545833604),
        ("softmax_kd", {"alpha": [9.0, 0.5], "weight": 2.0}, False, 2 * 0.7899327888 + 0.5 * 1.0545833604),
        ("softmax", {"active_classes": "task"}, False, 0.2620391382),
    ],
)
def test_the_losses_have_the_values_worked_out(form: str, options: dict, first: bool, expected: float) -> None:
    strategy = lwf(form, first, **options)
    if isinstance(strategy, Distilling):
        strategy.tasks = 0 if first else 1
    assert strategy.loss(GIVEN).item() == pytest.approx(expected, abs=1e-9)


def test_the_parts_of_the_balanced_loss() -> None:
    new = lwf("bce_balanced", teacher=False)
    assert new.loss(GIVEN).item() == pytest.approx(0.7946287367, abs=1e-9)
    old = F.binary_cross_entropy(O[:, :3].sigmoid(), BEFORE[:, :3].sigmoid())
    assert old.item() == pytest.approx(0.6484271502, abs=1e-9)


def test_their_defaults_are_the_papers() -> None:
    """Li & Hoiem: softmax, T = 2, alpha = 1, no T^2; Rebuffi et al.: sigmoids. Neither has a form of the other."""
    assert lwf("softmax_kd").loss(GIVEN).item() == pytest.approx(0.7899327888 + 1.0545833604, abs=1e-9)
    assert LwFMC(Table(O)).form == "bce_kd" and not set(LwF.forms) & set(LwFMC.forms)
    with pytest.raises(TypeError, match="form"):
        LwF(Table(O), form="bce_kd")


@pytest.mark.parametrize("form", FORMS)
def test_the_gradients_are_those_of_the_value(form: str) -> None:
    strategy = lwf(form)

    def loss(rows: Tensor) -> Tensor:
        strategy.model.rows.data = rows.detach()
        return torch.func.functional_call(strategy.model, {"rows": rows}, (GIVEN.x,))

    class Fed(nn.Module):
        def __init__(self, rows: Tensor) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, x: Tensor) -> Tensor:
            return self.rows[x.flatten()]

    def value(rows: Tensor) -> Tensor:
        strategy.model = Fed(rows)
        return strategy.loss(GIVEN)

    assert torch.autograd.gradcheck(value, (O.clone().requires_grad_(),))


def test_predkd_pulls_at_old_rows_only_once_they_have_moved() -> None:
    strategy = lwf("bce_kd")
    strategy.teacher = frozen(Table(O))  # the first step after a boundary
    strategy.loss(GIVEN).backward()
    assert not strategy.model.rows.grad[:, :3].any() and strategy.model.rows.grad[:, 3:].all()
    moved = lwf("bce_kd")
    moved.loss(GIVEN).backward()
    expected = 5 / 10 * (O[:, :3].sigmoid() - BEFORE[:, :3].sigmoid())
    torch.testing.assert_close(moved.model.rows.grad[:, :3], expected)


@pytest.mark.parametrize("form", ["bce", "softmax"])
def test_new_task_only_losses_leave_old_outputs_alone(form: str) -> None:
    strategy = lwf(form, active_classes="task")
    strategy.loss(GIVEN).backward()
    assert not strategy.model.rows.grad[:, :3].any() and strategy.model.rows.grad[:, 3:].all()


def test_distillation_may_be_among_all_outputs_that_have_come() -> None:
    strategy = lwf("softmax_kd", weight=0.0, distil="seen")
    targets = torch.cat([(BEFORE[:, :3] / 2).softmax(1), torch.zeros(2, 2)], 1)
    expected = -(targets * (O / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(strategy.loss(GIVEN), expected)
    with pytest.raises(ValueError, match="distil must be one of old, seen, not 'new'"):
        lwf("softmax_kd", distil="new")


def test_a_task_incremental_stream_distils_head_by_head() -> None:
    strategy = lwf("softmax_kd", alpha=1.0)
    strategy.task_given = True
    strategy.heads = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(2, 2)).bool()
    strategy.past = [torch.tensor([0]), torch.tensor([1, 2])]
    soft, target = (O[:, 1:3] / 2).log_softmax(1), (BEFORE[:, 1:3] / 2).softmax(1)
    expected = F.cross_entropy(O[:, 3:], Y - 3) - (target * soft).sum(1).mean()  # a head of one class adds nothing
    torch.testing.assert_close(strategy.loss(GIVEN), expected)
    run(real := LwF(example_model()), example_stream((0, 1, 0, 2), scenario="task"))
    assert [labels.tolist() for labels in real.past] == [[0], [2, 3], [1], [4, 5]]  # half of task 0 came at a time


def test_featkd_is_the_value_worked_out() -> None:
    strategy = Strategy(Table(torch.tensor([[1.0, 2], [3, 4]], dtype=DOUBLE)))
    strategy.add_regularisers(penalty := FeatKDPenalty(5.0))
    penalty.teacher = frozen(Table(torch.tensor([[1.5, 2], [2, 4.5]], dtype=DOUBLE)))
    assert penalty.penalty(GIVEN).item() == pytest.approx(1.875)
    penalty.penalty(GIVEN).backward()
    expected = 5 * 2 / 4 * torch.tensor([[-0.5, 0], [1, -0.5]], dtype=DOUBLE)
    torch.testing.assert_close(strategy.model.rows.grad, expected)


@pytest.mark.parametrize("kind", [LwF, LwFMC])
def test_a_teacher_learns_nothing_and_is_renewed_at_each_boundary(kind: type[Distilling]) -> None:
    strategy, seen = kind(example_model()), []

    class Watch:
        @on(RunStarted)
        def begin(self, event: RunStarted) -> None:
            assert strategy.teacher is None

        @on(TaskEnded)
        def end(self, event: TaskEnded) -> None:
            teacher = strategy.teacher
            assert not teacher.training and not any(weight.requires_grad for weight in teacher.parameters())
            pairs = zip(teacher.parameters(), strategy.model.parameters(), strict=True)
            assert all(torch.equal(one, two) and one is not two for one, two in pairs)
            seen.append(teacher)

    run(strategy, example_stream(), Watch())
    assert len({id(teacher) for teacher in seen}) == 3
