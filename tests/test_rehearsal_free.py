"""L2, EWC, SI, LwF and FeatKD against their definitions; and that any strategy can carry the regularisers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clstream.strategies import (
    AGEM,
    EWC,
    L2,
    SI,
    DERpp,
    EWCPenalty,
    FeatKDPenalty,
    Finetune,
    Joint,
    L2Penalty,
    LwF,
    Refresh,
    Regularised,
    Replay,
    SIPenalty,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import Batch, BatchLearned, BatchReady, RunStarted, Samples, SessionEnded, Strategy, TaskEnded, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.config import UsageError, build_strategy, parse_run
from clstream.fisher import batch_fisher
from clstream.models import Mlp
from clstream.regulariser import Quadratic, Regulariser, frozen, matching
from clstream.rehearsal_free import RehearsalFree

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
    strategy.old, strategy.new, strategy.seen = torch.tensor(old).long(), torch.tensor(new), torch.tensor([*old, *new])
    return strategy


def lwf(form: str, first: bool = False, teacher: bool = True, **options: object) -> LwF:
    strategy = LwF(Table(O), form=form, **options)
    in_task(strategy, [] if first else [0, 1, 2], [0, 1, 2, 3, 4] if first else [3, 4])
    if teacher and not first:
        strategy.teacher, strategy.past = frozen(Table(BEFORE)), [strategy.old]
    return strategy


GIVEN = Samples(torch.tensor([[0], [1]]), Y)


@pytest.mark.parametrize(
    ("form", "options", "first", "expected"),
    [
        ("bce_kd", {"bce_scale": 1.0}, False, 0.5731881958),
        ("bce_kd", {}, False, 2.8659409792),
        ("bce_kd", {"bce_scale": None}, False, 2.8659409792),  # five classes
        ("bce_all", {}, False, 2.9045256930),
        ("bce_kd", {}, True, 2.9045256930),
        ("bce_local", {}, False, 2.3016488216),
        ("bce_balanced", {}, False, 0.7069077848),
        ("bce_balanced", {}, True, 1.3298866662),
        ("softmax", {}, False, 0.7899327888),
        ("softmax_all", {}, False, 0.7899327888),
        ("softmax_kd", {}, True, 0.7899327888),
        ("softmax_kd", {}, False, 0.7899327888 + 1.0545833604),
        ("softmax_kd", {"weight": 0.0}, False, 1.0545833604),
        ("softmax_kd", {"alpha": [9.0, 0.5], "weight": 2.0}, False, 2 * 0.7899327888 + 0.5 * 1.0545833604),
        ("masked_ce", {}, False, 0.2620391382),
    ],
)
def test_the_losses_have_the_values_worked_out(form: str, options: dict, first: bool, expected: float) -> None:
    strategy = lwf(form, first, **options)
    strategy.tasks = 0 if first else 1
    assert strategy.loss(GIVEN).item() == pytest.approx(expected, abs=1e-9)


def test_the_parts_of_the_balanced_loss() -> None:
    new = lwf("bce_balanced", teacher=False)
    assert new.loss(GIVEN).item() == pytest.approx(0.7946287367, abs=1e-9)
    old = F.binary_cross_entropy(O[:, :3].sigmoid(), BEFORE[:, :3].sigmoid())
    assert old.item() == pytest.approx(0.6484271502, abs=1e-9)


@pytest.mark.parametrize("form", LwF.forms)
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


@pytest.mark.parametrize("form", ["bce_local", "masked_ce"])
def test_new_task_only_losses_leave_old_outputs_alone(form: str) -> None:
    strategy = lwf(form)
    strategy.loss(GIVEN).backward()
    assert not strategy.model.rows.grad[:, :3].any() and strategy.model.rows.grad[:, 3:].all()


def test_distillation_may_be_among_all_outputs_that_have_come() -> None:
    strategy = lwf("softmax_kd", weight=0.0, distil="seen")
    targets = torch.cat([(BEFORE[:, :3] / 2).softmax(1), torch.zeros(2, 2)], 1)
    expected = -(targets * (O / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(strategy.loss(GIVEN), expected)
    with pytest.raises(ValueError, match="distil must be old or seen"):
        lwf("softmax_kd", distil="new")


def test_a_task_incremental_stream_distils_head_by_head() -> None:
    strategy = lwf("softmax_kd", alpha=1.0)
    strategy.heads = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(2, 2)).bool()
    strategy.past = [torch.tensor([0]), torch.tensor([1, 2])]
    soft, target = (O[:, 1:3] / 2).log_softmax(1), (BEFORE[:, 1:3] / 2).softmax(1)
    expected = F.cross_entropy(O[:, 3:], Y - 3) - (target * soft).sum(1).mean()  # a head of one class adds nothing
    torch.testing.assert_close(strategy.loss(GIVEN), expected)
    run(real := LwF(example_model(), form="softmax_kd"), example_stream((0, 1, 0, 2), scenario="task"))
    assert [labels.tolist() for labels in real.past] == [[0], [2, 3], [1], [4, 5]]  # half of task 0 came at a time


# Fisher and EWC -----------------------------------------------------------------------------------------------------------


class Scalar(nn.Module):
    """One weight w: logits (w x, -w x)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.w * x[:, 0], -self.w * x[:, 0]], 1)


def test_the_batch_gradient_fisher_and_its_penalty_have_the_values_worked_out() -> None:
    given = Samples(torch.tensor([[1.0], [2.0], [-1.0], [0.5]], dtype=DOUBLE), torch.tensor([0, 1, 1, 0]))
    paired = next(
        seed
        for seed in range(100)
        if {*torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:2].tolist()} in ({0, 1}, {2, 3})
    )
    strategy = EWC(Scalar(), strength=5.0, fisher="empirical", fisher_batch=2, form="bce_local")  # 1/2 of the code's 10
    in_task(strategy, [], [0, 1])
    (penalty,) = strategy.regularisers
    assert [
        strategy.sample_losses(strategy.model(part.x), part.y).mean().item() for part in (given[:2], given[2:])
    ] == pytest.approx([4.4683466793, 2.6250410101], abs=1e-9)
    found = batch_fisher(strategy.model, given, 2, "empirical", None, torch.Generator().manual_seed(paired), strategy.sample_losses)
    assert found["w"].item() == pytest.approx(9.5753852918, abs=1e-8)
    penalty.add(found)
    strategy.model.w.data.fill_(0.7)
    assert penalty.penalty(given).item() == pytest.approx(1.9150770584, abs=1e-8)


def test_the_batch_gradient_fisher_drops_what_is_left_over() -> None:
    given = Samples(torch.rand(7, 1, dtype=DOUBLE), torch.zeros(7, dtype=torch.int64))
    model = Scalar()
    draw = torch.Generator().manual_seed(3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))[:6].split(3)
    expected = sum(
        3 / 2 * torch.autograd.grad(F.cross_entropy(model(given.x[rows]), given.y[rows]), model.w)[0].square() for rows in order
    )
    torch.testing.assert_close(batch_fisher(model, given, 3, generator=draw)["w"], expected)
    whole = torch.autograd.grad(F.cross_entropy(model(given.x), given.y), model.w)[0].square() * 7
    torch.testing.assert_close(batch_fisher(model, given, 100)["w"], whole)  # a session smaller than a batch is one


class FisherByHand(Strategy):
    """EWC as its equation has it: a Fisher by a loop over samples, and a list of terms."""

    def __init__(self, model: nn.Module, kind: str, scenario: str) -> None:
        super().__init__(model)
        self.kind, self.scenario, self.seen = kind, scenario, set()
        self.terms: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    @on(TaskEnded)
    def end(self, event: TaskEnded) -> None:
        samples = event.task.train[:]
        self.seen |= set(event.task.classes)
        competing = list(event.task.classes) if self.scenario == "task" else sorted(self.seen)
        fisher = {name: torch.zeros_like(weight) for name, weight in self.model.named_parameters()}
        for x, y in zip(samples.x, samples.y, strict=True):
            logits = self.model(x[None])[:, competing]
            label = logits.argmax(1) if self.kind == "predicted" else torch.tensor([competing.index(int(y))])
            slopes = torch.autograd.grad(F.cross_entropy(logits, label), list(self.model.parameters()))
            for total, slope in zip(fisher.values(), slopes, strict=True):
                total += slope.square() / len(samples)
        self.terms.append((fisher, {name: weight.detach().clone() for name, weight in self.model.named_parameters()}))

    def penalty(self, decay: float | None) -> Tensor:
        weights = dict(self.model.named_parameters())
        if decay is None:
            return sum((f[n] * (weights[n][: len(a[n])] - a[n]).square()).sum() for f, a in self.terms for n in weights)
        total: dict[str, Tensor] = {}
        for fisher, _ in self.terms:
            for name, value in fisher.items():
                before = total.get(name, value[:0])
                total[name] = torch.cat([decay * before + value[: len(before)], value[len(before) :]])
        anchor = self.terms[-1][1]
        return sum((total[n] * (weights[n] - anchor[n]).square()).sum() for n in weights)


@pytest.mark.parametrize("head", ["fixed", "growing"])
@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize(("kind", "decay"), [("predicted", None), ("empirical", None), ("predicted", 1.0), ("empirical", 0.5)])
def test_ewc_is_its_equation(kind: str, decay: float | None, scenario: str, head: str) -> None:
    """After three tasks, and a move from there, value and gradient are those of the sum over the terms."""
    strategy = EWC(example_model(head=head), strength=3.0, fisher=kind, online=decay is not None, decay=decay or 1.0)
    hand = FisherByHand(strategy.model, kind, scenario)

    class Watch:
        @on(TaskEnded)
        def end(self, event: TaskEnded) -> None:
            hand.end(event)

    run(strategy, example_stream(scenario=scenario), Watch())
    (penalty,) = strategy.regularisers
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in strategy.model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    weights = list(strategy.model.parameters())
    given = example_stream().session(0).samples[:1]
    ours, theirs = penalty.penalty(given), 3 * hand.penalty(decay)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)
    for one, two in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_the_fisher_of_a_task_in_several_sessions_is_the_mean_over_its_samples() -> None:
    strategy = EWC(example_model(), partial(SGD, lr=0.0))
    run(strategy, example_stream((0, 0, 0)))
    whole = EWC(example_model(), partial(SGD, lr=0.0))
    stream = example_stream()
    run(whole, stream, max_sessions=1)
    # the first sessions see one class each in turn, so the outputs that compete differ: the number of terms does not
    assert strategy.regularisers[0].importance.keys() == whole.regularisers[0].importance.keys()
    same = EWC(example_model(), partial(SGD, lr=0.0), form="softmax_all")
    run(same, example_stream((0, 0, 0)))
    all_at_once = EWC(example_model(), partial(SGD, lr=0.0), form="softmax_all")
    run(all_at_once, example_stream(), max_sessions=1)
    for name, value in all_at_once.regularisers[0].importance.items():
        torch.testing.assert_close(same.regularisers[0].importance[name], value)


# What all quadratic penalties share ---------------------------------------------------------------------------------------


def drifted(penalty: Quadratic) -> Strategy:
    strategy = Strategy(example_model())
    strategy.carry(penalty)
    penalty.hold()
    with torch.no_grad():
        for number, weight in enumerate(strategy.model.parameters(), 1):
            weight += 0.1 * number
    return strategy


def test_it_is_a_sum_over_all_numbers_without_a_half() -> None:
    strategy = drifted(penalty := L2Penalty(strength=0.5))
    sizes = [weight.numel() for weight in strategy.model.parameters()]
    value = penalty.penalty(GIVEN)
    assert value.item() == pytest.approx(0.5 * sum(n * (0.1 * i) ** 2 for i, n in enumerate(sizes, 1)), rel=1e-5)
    value.backward()
    for number, weight in enumerate(strategy.model.parameters(), 1):
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 2 * 0.5 * 0.1 * number), rtol=1e-4, atol=1e-6)


def test_each_weight_may_have_a_strength_of_its_own() -> None:
    names = [name for name, _ in example_model().named_parameters()]
    drifted(plain := L2Penalty(0.5))
    alike = {name: torch.tensor(0.5) for name in names}
    drifted(same := L2Penalty(alike))
    drifted(numbers := L2Penalty(dict.fromkeys(names, 0.5)))
    torch.testing.assert_close(plain.penalty(GIVEN), numbers.penalty(GIVEN))
    torch.testing.assert_close(plain.penalty(GIVEN), same.penalty(GIVEN))
    rows = alike | {"head.weight": torch.tensor([[0.0]] * 5 + [[1.0]]), "head.bias": torch.zeros(6)}
    strategy = drifted(own := L2Penalty(rows))
    own.penalty(GIVEN).backward()
    assert not strategy.model.head.weight.grad[:5].any() and strategy.model.head.weight.grad[5].all()
    assert not strategy.model.head.bias.grad.any() and strategy.model.stages.layer1.weight.grad.all()
    with pytest.raises(ValueError, match=r"one tensor for each held weight, and no other: see head\.bias"):
        L2(example_model(), strength={name: torch.tensor(1.0) for name in names if name != "head.bias"})
    for odd in (torch.ones(3, 32), torch.ones(2, 2), torch.ones(1, 6, 32)):
        with pytest.raises(ValueError, match=r"the strength of head\.weight is \(.*\), which doesn't broadcast to \(6, 32\)"):
            L2(example_model(), strength=alike | {"head.weight": odd})
    growing = L2(example_model(head="growing"), partial(SGD, lr=0.05), strength=alike | {"head.weight": torch.rand(6, 1)})
    run(growing, example_stream())
    assert growing.regularisers[0].penalty(GIVEN).isfinite()
    whole = EWC(example_model(), strength={name: torch.tensor(2.0) for name in names})
    number = EWC(example_model(), strength=2.0)
    for each in (whole, number):
        run(each, example_stream())
    for one, two in zip(whole.model.parameters(), number.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(whole.regularisers[0].penalty(GIVEN), number.regularisers[0].penalty(GIVEN))


class Attention(nn.Module):
    """Has the names of a ViT of timm's."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)}), "mlp": nn.Linear(4, 4)})
        self.blocks = nn.ModuleList([block, nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})])
        self.head = nn.Linear(4, 2)


def test_weights_are_chosen_by_their_names() -> None:
    model = Attention()
    assert list(matching(model, "*.attn.qkv.*")) == [f"blocks.{n}.attn.qkv.{kind}" for n in (0, 1) for kind in ("weight", "bias")]
    assert list(matching(model, ["head.*", "*.mlp.*"])) == ["blocks.0.mlp.weight", "blocks.0.mlp.bias", "head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"no parameter of Attention matches '\*\.attn\.qvk\.\*'; near it: .*attn\.qkv\."):
        matching(model, ["head.*", "*.attn.qvk.*"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="near it: no parameter that requires a gradient"):
        matching(model, "*")
    with pytest.raises(ValueError, match="at least one pattern"):
        L2(example_model(), parameters=[])


@pytest.mark.parametrize("kind", [L2, EWC, SI])
def test_only_what_is_named_is_held(kind: type) -> None:
    strategy = kind(example_model(), parameters="stages.*")
    run(strategy, example_stream())
    (penalty,) = strategy.regularisers
    assert list(penalty.anchor) == ["stages.layer1.weight", "stages.layer1.bias"]
    assert {*penalty.importance} <= {*penalty.anchor}
    with torch.no_grad():
        strategy.model.stages.layer1.bias += 1
    strategy.model.zero_grad()
    penalty.penalty(GIVEN).backward()
    assert strategy.model.stages.layer1.bias.grad.any()
    assert all(weight.grad is None for weight in strategy.model.head.parameters())


def test_held_as_hard_as_can_be_only_the_head_moves() -> None:
    drift = {}
    for strength in (0.0, 1e3):
        strategy = L2(example_model(), partial(SGD, lr=5e-4), strength=strength, parameters="stages.*")
        start = [weight.detach().clone() for weight in strategy.model.parameters()]
        run(strategy, example_stream(epochs=20))
        drift[strength] = [(a - b).norm().item() for a, b in zip(start, strategy.model.parameters(), strict=True)]
    assert max(drift[1e3][:2]) < 0.05 * max(drift[0.0][:2])
    assert drift[1e3][2] > 0.8 * drift[0.0][2]


CARRIED: dict[str, Callable[..., Regulariser]] = {
    "L2": L2Penalty,
    "L2 from the second task": partial(L2Penalty, from_start=False),
    "EWC": EWCPenalty,
    "EWC, batch gradients": partial(EWCPenalty, fisher_batch=8, fisher="sampled"),
    "SI": SIPenalty,
    "FeatKD": FeatKDPenalty,
}


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_without_strength_it_is_the_base_bit_for_bit(name: str, head: str) -> None:
    """Also with an augmentation that draws from the run's random numbers, and dropout: the Fisher pass takes none of them."""

    def jitter(x: Tensor) -> Tensor:
        return x.roll(int(torch.randint(3, ())), -1)

    weights = []
    for carried in ([], [CARRIED[name](strength=0.0)]):
        stream = example_stream((0, 1, 0, 2), epochs=2)
        object.__setattr__(stream, "augment", jitter)
        strategy = LwF(example_model(head=head), partial(Adam, lr=1e-2), form="softmax_kd")
        run(Regularised(strategy, carried) if carried else strategy, stream, seed=4)
        weights.append(torch.cat([weight.detach().flatten() for weight in strategy.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["L2", "EWC", "SI", "FeatKD", "EWC online"])
def test_the_penalty_is_exactly_zero_at_the_first_step_after_a_boundary(name: str) -> None:
    penalty = EWCPenalty(online=True) if name == "EWC online" else CARRIED[name]()
    found: list[list[float]] = []

    class Watch:
        @on(BatchReady)
        def see(self, event: BatchReady) -> None:
            if event.batch.index == event.batch.epoch == 0:
                found.append([])
            found[-1].append(penalty.penalty(event.batch.samples).item())

    run(Regularised(Finetune(example_model()), [penalty]), example_stream(epochs=2), Watch())
    first = 2 if name == "EWC" else 3  # its anchors disagree from the third task on
    assert [values[0] for values in found][:first] == [0.0] * first
    assert all(value > 0 for values in found[1:] for value in values[1:])
    assert all((value > 0) == (name in ("L2", "FeatKD")) for value in found[0][1:])  # those have an anchor from the start


def test_l2_has_no_anchor_in_the_first_task_if_it_is_to_have_none() -> None:
    strategy = L2(example_model(), from_start=False)
    run(strategy, example_stream(), max_sessions=1)
    plain = RehearsalFree(example_model())
    run(plain, example_stream(), max_sessions=1)
    assert all(torch.equal(one, two) for one, two in zip(strategy.model.parameters(), plain.model.parameters(), strict=True))
    (penalty,) = strategy.regularisers
    assert all(torch.equal(penalty.anchor[name], weight) for name, weight in strategy.model.named_parameters())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: L2(example_model(), strength=-1.0), "strength must be finite and not below 0, not -1"),
        (lambda: EWC(example_model(), strength=float("nan")), "strength must be finite"),
        (lambda: EWC(example_model(), fisher="weighted"), "fisher must be predicted, sampled or empirical"),
        (lambda: EWC(example_model(), decay=1.5), "decay must be from 0 to 1"),
        (lambda: EWC(example_model(), fisher_batch=0), "fisher_batch must be a whole number of at least 1"),
        (lambda: SI(example_model(), damping=0.0), "damping must be a number above 0"),
        (lambda: SI(example_model(), gradient="all"), "gradient must be loss or objective"),
        (lambda: SI(example_model(), most=0.0), "most must be above 0"),
        (lambda: LwF(example_model(), form="kd"), r"form must be one of softmax, .*, softmax_all_kd, not 'kd'"),
        (lambda: L2(example_model(), form="bce_kd"), "form must be one of softmax, softmax_all"),
        (lambda: LwF(example_model(), alpha=[1.0, -1.0]), "alpha must be a number from 0 up, or a list"),
        (lambda: LwF(example_model(), weight=[]), "weight must be a number from 0 up, or a list"),
        (lambda: LwF(example_model(), temperature=0.0), "temperature must be a number above 0"),
        (lambda: LwF(example_model(), bce_scale=0.0), "bce_scale must be a number above 0, or None"),
        (lambda: LwF(example_model(), bn_mode="frozen"), "bn_mode must be eval or train"),
        (lambda: FeatKDPenalty(-1.0), "strength must be finite"),
    ],
)
def test_odd_options_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


# SI -----------------------------------------------------------------------------------------------------------------------


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 6)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double() / 255)


@pytest.mark.parametrize("gradient", ["loss", "objective"])
def test_si_is_the_loop_by_hand(gradient: str) -> None:
    stream, twin = example_stream(batch_size=10, epochs=2), Double()
    strategy = SI(Double(), partial(Adam, lr=1e-2), strength=7.0, gradient=gradient, damping=0.05)
    run(strategy, stream, seed=1)
    optimizer = Adam(twin.parameters(), lr=1e-2)
    weights = list(twin.parameters())
    importance, anchors = [torch.zeros_like(w) for w in weights], [w.detach().clone() for w in weights]
    for number, session in enumerate(stream.reseeded(1)):
        path, start = [torch.zeros_like(w) for w in weights], [w.detach().clone() for w in weights]
        for epoch in session:
            for batch in epoch:
                loss = F.cross_entropy(twin(batch.samples.x)[:, : 2 * number + 2], batch.samples.y)
                held = sum((o * (w - a).square()).sum() for o, w, a in zip(importance, weights, anchors, strict=True))
                whole = loss + 7.0 * held
                slopes = torch.autograd.grad(loss if gradient == "loss" else whole, weights, retain_graph=True)
                before = [w.detach().clone() for w in weights]
                optimizer.zero_grad()
                whole.backward()
                optimizer.step()
                for total, slope, weight, was in zip(path, slopes, weights, before, strict=True):
                    total -= slope * (weight.detach() - was)
        importance = [
            o + p / ((w.detach() - s).square() + 0.05) for o, p, w, s in zip(importance, path, weights, start, strict=True)
        ]
        anchors = [w.detach().clone() for w in weights]
    (penalty,) = strategy.regularisers
    for ours, theirs, omega in zip(strategy.model.parameters(), weights, importance, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        name = next(name for name, weight in strategy.model.named_parameters() if weight is ours)
        torch.testing.assert_close(penalty.importance[name], omega, rtol=1e-6, atol=1e-8)


def test_si_cuts_importance_off_where_it_is_used_not_where_it_is_summed() -> None:
    free, cut = SIPenalty(0.0), SIPenalty(0.0, most=1e-3)
    for penalty in (free, cut):
        run(Regularised(Finetune(example_model()), [penalty]), example_stream())
    for name, value in free.importance.items():
        assert torch.equal(cut.whole[name], value)
        assert torch.equal(cut.importance[name], value.clamp(max=1e-3))
    assert max(float(value.max()) for value in free.importance.values()) > 1e-3


# Batch norm, optimizers, answers ------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 6)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x.float() / 255))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [L2, EWC, SI, LwF])
def test_batch_norm_rests_unless_it_is_to_learn(kind: type, bn_mode: str) -> None:
    strategy = kind(Normed(), bn_mode=bn_mode)
    before = [buffer.clone() for buffer in strategy.model.buffers()]
    run(strategy, example_stream(), max_sessions=2)
    same = [torch.equal(one, two) for one, two in zip(before, strategy.model.buffers(), strict=True)]
    assert all(same) if bn_mode == "eval" else not any(same)
    assert strategy.model.norm.training == (bn_mode == "train")
    assert int(strategy.model.norm.num_batches_tracked) == (0 if bn_mode == "eval" else 16)  # not those of a Fisher pass
    if kind is not LwF:
        assert "norm.weight" in strategy.regularisers[0].anchor


def test_the_fisher_pass_leaves_no_trace_in_the_model() -> None:
    strategy = EWC(Normed(), bn_mode="train")
    run(strategy, example_stream(), max_sessions=1)
    before = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    grads = [weight.grad.clone() for weight in strategy.model.parameters()]
    from clstream import SessionEnded as Ended

    strategy.regularisers[0].gather(Ended(example_stream().session(0)))
    assert all(torch.equal(value, strategy.model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(weight.grad, grad) for weight, grad in zip(strategy.model.parameters(), grads, strict=True))


@pytest.mark.parametrize(("renew", "steps"), [(False, [1, 2, 3]), (True, [1, 1, 1])])
def test_optimizers_are_kept_or_made_anew(renew: bool, steps: list[int]) -> None:
    strategy, found = L2(example_model(), partial(Adam, lr=1e-3), renew_optimizer=renew), []

    class Watch:
        @on(SessionEnded)
        def see(self, event: SessionEnded) -> None:
            found.append(int(next(iter(strategy.optimizer.state.values()))["step"]))

    run(strategy, example_stream(batch_size=60), Watch())
    assert found == steps


def test_an_answer_is_a_class_that_came() -> None:
    strategy, answers = L2(example_model()), []

    class Watch:
        @on(SessionEnded)
        def see(self, event: SessionEnded) -> None:
            answers.append(set(strategy.predict(torch.randint(0, 255, (500, 1, 8, 8), dtype=torch.uint8)).tolist()))
            finite.append(strategy.scores(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).isfinite().sum().item())

    finite: list[int] = []
    run(strategy, example_stream(), Watch())
    assert finite == [2, 4, 6] and answers[0] <= {0, 1} and answers[1] <= {0, 1, 2, 3}
    assert strategy.answers_once


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("form", LwF.forms)
def test_each_form_learns_in_each_scenario(form: str, scenario: str) -> None:
    stream = example_stream(epochs=10)
    if scenario == "domain":
        from clstream.streams import from_tensors

        train, test = (
            [torch.cat([getattr(getattr(task, part), of) for task in stream.tasks]) for of in "xy"] for part in ("train", "test")
        )
        stream = from_tensors(*train, *test, tasks=3, scenario="domain", epochs=10, batch_size=8)
    elif scenario == "task":
        stream = example_stream(epochs=10, scenario="task")
    result = run(LwF(example_model(), partial(SGD, lr=0.05), form=form), stream)
    least = 0.45 if scenario == "class" and form in ("masked_ce", "bce_balanced") else 0.7  # where old outputs can win
    assert min(float(result.main[task, task]) for task in range(3)) > least


def test_distillation_keeps_what_fine_tuning_forgets() -> None:
    stream = example_stream(epochs=10)
    lost, kept = (run(make(example_model()), stream).average_accuracy for make in (Finetune, LwF))
    assert lost < 0.4 and kept > lost + 0.2
    by_task = example_stream(epochs=10, scenario="task")
    plain = run(Finetune(example_model()), by_task)
    for make in (partial(EWC, strength=100.0), partial(SI, strength=10.0), partial(L2, from_start=False)):
        assert run(make(example_model(), partial(SGD, lr=0.02)), by_task).forgetting <= plain.forgetting + 1e-9


# Carrying -----------------------------------------------------------------------------------------------------------------


HOSTS: dict[str, Callable[[nn.Module], Strategy]] = {
    "Finetune": Finetune,
    "Replay": Replay,
    "MIR": partial(Replay, retrieval="mir"),
    "DERpp": DERpp,
    "AGEM": AGEM,
    "Joint": Joint,
    "LwF": LwF,
    "Refresh": lambda model: Refresh(DERpp(model)),
    "Refresh, paper": lambda model: Refresh(DERpp(model), form="paper"),
    "Regularised": lambda model: Regularised(LwF(model), [FeatKDPenalty()]),
}


@pytest.mark.parametrize("name", HOSTS)
def test_any_strategy_can_carry_regularisers(name: str) -> None:
    """What a step minimises is the host's own loss and the penalties; all of them hear the run."""
    host = HOSTS[name](example_model())
    penalties: list[Regulariser] = [L2Penalty(), EWCPenalty(), SIPenalty(), FeatKDPenalty()]
    asked = [0] * 4
    for number, each in enumerate(penalties):

        def counting(samples: Samples, number: int = number, own: Callable[[Samples], Tensor] = each.penalty) -> Tensor:
            asked[number] += 1
            return own(samples)

        each.penalty = counting  # type: ignore[method-assign]
    run(Regularised(host, penalties), example_stream())
    assert min(asked) >= 24 - 1 and len(set(asked)) == 1
    assert all(each.host.model is host.model for each in penalties)
    assert penalties[0].anchor and penalties[1].importance and penalties[2].importance and penalties[3].teacher is not None


def test_the_loss_that_is_reported_holds_the_penalty() -> None:
    strategy, losses = L2(example_model(), strength=2.0), []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            self.expected = strategy.loss(event.batch.samples) + strategy.regularisers[0].penalty(event.batch.samples)

        @on(BatchLearned)
        def after(self, event: BatchLearned) -> None:
            losses.append((self.expected.item(), event.loss.item()))

    run(strategy, example_stream(), Watch())
    assert all(one == two for one, two in losses) and len(losses) == 24


def test_composed_strategies_meet_the_contract() -> None:
    makes: list[Callable[[nn.Module], Strategy]] = [
        lambda model: Regularised(Replay(model), [EWCPenalty(10.0)]),
        lambda model: Regularised(Refresh(Replay(model)), [SIPenalty()]),
        lambda model: Regularised(LwF(model, partial(SGD, lr=0.05), renew_optimizer=True), [L2Penalty(0.01), FeatKDPenalty(0.5)]),
        lambda model: LwF(model, form="softmax_kd", alpha=[0.0, 1.0]),
        lambda model: EWC(model, online=True, fisher="sampled", fisher_batch=8, decay=0.5),
    ]
    for make in makes:
        for check in check_strategy(make):
            check()


class OwnStep(Strategy):
    """Steps on its loss alone."""

    def learn(self, batch: Batch) -> Tensor:
        loss = self.loss(batch.samples)
        loss.backward()
        return loss.detach()


class LosesParts(L2):
    """Forgets that it carries something."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.parts = ()


def test_what_cannot_carry_is_refused_before_any_work() -> None:
    with pytest.raises(TypeError, match=r"OwnStep\.learn doesn't minimise self\.objective, so it can't carry regularisers"):
        Regularised(OwnStep(example_model()), [L2Penalty()])
    with pytest.raises(ValueError, match=r"LosesParts carries what is not among its parts"):
        run(LosesParts(example_model()), example_stream())
    with pytest.raises(TypeError, match="abstract class Regulariser"):
        Regulariser()
    penalty = L2Penalty()
    Finetune(example_model()).carry(penalty)
    with pytest.raises(ValueError, match="L2Penalty is carried by a Finetune already"):
        Finetune(example_model()).carry(penalty)
    with pytest.raises(TypeError, match="needs a model with a method `features`, which Linear hasn't"):
        Finetune(nn.Linear(2, 2)).carry(FeatKDPenalty())
    with pytest.raises(TypeError, match="Regularised wraps a strategy object"):
        Regularised(Finetune, [L2Penalty()])
    with pytest.raises(TypeError, match="regularisers must be a list of at least one Regulariser"):
        Regularised(Finetune(example_model()), [])
    with pytest.raises(ValueError, match=r"Regularised needs boundaries, which example hides \(L2Penalty\.hold_last handles"):
        run(Regularised(Replay(example_model()), [L2Penalty()]), example_stream(boundaries=False))


def test_featkd_is_the_value_worked_out() -> None:
    strategy = Strategy(Table(torch.tensor([[1.0, 2], [3, 4]], dtype=DOUBLE)))
    strategy.carry(penalty := FeatKDPenalty(5.0))
    penalty.teacher = frozen(Table(torch.tensor([[1.5, 2], [2, 4.5]], dtype=DOUBLE)))
    assert penalty.penalty(GIVEN).item() == pytest.approx(1.875)
    penalty.penalty(GIVEN).backward()
    expected = 5 * 2 / 4 * torch.tensor([[-0.5, 0], [1, -0.5]], dtype=DOUBLE)
    torch.testing.assert_close(strategy.model.rows.grad, expected)


def test_a_teacher_learns_nothing_and_is_renewed_at_each_boundary() -> None:
    strategy, seen = LwF(example_model()), []

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


def test_the_command_line_knows_regularisers_by_name() -> None:
    carried = ["--strategy", "Regularised", "--strategy.base", "Replay"]
    with pytest.raises(UsageError, match="there is no 'EWCPenalti': did you mean EWCPenalty"):
        parse_run([*carried, "--strategy.regularisers+=EWCPenalti"])
    with pytest.raises(UsageError, match="EWCPenalty has no option 'strenght': did you mean strength"):
        parse_run([*carried, "--strategy.regularisers+=EWCPenalty", "--strategy.regularisers.strenght", "3"])


def test_the_command_line_builds_any_of_it() -> None:
    stream = example_stream()
    given = (
        "--strategy Regularised --strategy.base LwF --strategy.base.form softmax_kd --strategy.base.alpha [0,1,2] "
        "--strategy.regularisers+=L2Penalty --strategy.regularisers.parameters stages.* "
        "--strategy.regularisers+=EWCPenalty --strategy.regularisers.strength 100 --strategy.regularisers.online true"
    )
    parser, options = parse_run(given.split())
    strategy = build_strategy(parser, options, stream, 0)
    assert isinstance(strategy, Regularised) and isinstance(strategy.base, LwF) and strategy.base.alpha == [0, 1, 2]
    held, consolidated = strategy.base.regularisers
    assert list(held.weights) == ["stages.layer1.weight", "stages.layer1.bias", "stages.layer2.weight", "stages.layer2.bias"]
    assert consolidated.strength == 100 and consolidated.online and isinstance(strategy.model, Mlp)
