"""What L2, EWC, SI, LwF and LwFMC share: the quadratic penalty, the loss forms, batch norm at rest, optimizers, answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clstream.strategies import (
    EWC,
    L2,
    SI,
    EWCPenalty,
    FeatKDPenalty,
    Finetune,
    L2Penalty,
    LwF,
    LwFMC,
    MASPenalty,
    Regularised,
    RWalkPenalty,
    SIPenalty,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchReady, Samples, SessionEnded, Strategy, on, run
from clstream.checks import example_model, example_stream
from clstream.strategy import Quadratic, Regulariser, RehearsalFree
from clstream.strategy.regulariser import matching

GIVEN = Samples(torch.tensor([[0], [1]]), torch.tensor([3, 4]))


def drifted(penalty: Quadratic) -> Strategy:
    strategy = Strategy(example_model())
    strategy.add_regularisers(penalty)
    penalty.set_anchor()
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
    for strategy in (whole, number):
        run(strategy, example_stream())
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
    with pytest.raises(ValueError, match="has no parameter that requires a gradient, so there is nothing to hold"):
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


@pytest.mark.slow
def test_held_as_hard_as_can_be_only_the_head_moves() -> None:
    drift = {}
    for strength in (0.0, 1e3):
        strategy = L2(example_model(), partial(SGD, lr=5e-4), strength=strength, parameters="stages.*")
        start = [weight.detach().clone() for weight in strategy.model.parameters()]
        run(strategy, example_stream(epochs=20))
        drift[strength] = [(a - b).norm().item() for a, b in zip(start, strategy.model.parameters(), strict=True)]
    assert max(drift[1e3][:2]) < 0.05 * max(drift[0.0][:2])
    assert drift[1e3][2] > 0.8 * drift[0.0][2]


REGULARISERS: dict[str, Callable[..., Regulariser]] = {
    "L2": L2Penalty,
    "L2 from the second task": partial(L2Penalty, from_start=False),
    "EWC": EWCPenalty,
    "EWC, batch gradients": partial(EWCPenalty, fisher_batch=8, fisher="sampled"),
    "SI": SIPenalty,
    "MAS": MASPenalty,
    "RWalk": RWalkPenalty,
    "FeatKD": FeatKDPenalty,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REGULARISERS)
@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_without_strength_it_is_the_base_bit_for_bit(name: str, head: str) -> None:
    """Also with an augmentation that draws from the run's random numbers, and dropout: the Fisher pass takes none of them."""

    def jitter(x: Tensor) -> Tensor:
        return x.roll(int(torch.randint(3, ())), -1)

    weights = []
    for regularisers in ([], [REGULARISERS[name](strength=0.0)]):
        stream = example_stream((0, 1, 0, 2), epochs=2)
        object.__setattr__(stream, "augment", jitter)
        strategy = LwF(example_model(head=head), partial(Adam, lr=1e-2))
        run(Regularised(strategy, regularisers) if regularisers else strategy, stream, seed=4)
        weights.append(torch.cat([weight.detach().flatten() for weight in strategy.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["L2", "EWC", "SI", "MAS", "RWalk", "FeatKD", "EWC online"])
def test_the_penalty_is_exactly_zero_at_the_first_step_after_a_boundary(name: str) -> None:
    penalty = EWCPenalty(online=True) if name == "EWC online" else REGULARISERS[name]()
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
        (lambda: L2(example_model(), strength=-1.0), "strength must be a finite number of at least 0, not -1"),
        (lambda: EWC(example_model(), strength=float("nan")), "strength must be a finite number"),
        (lambda: EWC(example_model(), fisher="weighted"), "fisher must be one of predicted, sampled, empirical"),
        (lambda: EWC(example_model(), decay=1.5), "decay must be a finite number from 0 to 1"),
        (lambda: EWC(example_model(), fisher_batch=0), "fisher_batch must be a whole number of at least 1"),
        (lambda: SI(example_model(), damping=0.0), "damping must be a finite number above 0"),
        (lambda: SI(example_model(), gradient="all"), "gradient must be one of loss, objective"),
        (lambda: SI(example_model(), most=0.0), "most must be a finite number above 0 or None"),
        (lambda: LwFMC(example_model(), form="softmax_kd"), "form must be one of bce_kd, bce_balanced, bce, not 'softmax_kd'"),
        (lambda: L2(example_model(), form="bce_kd"), "form must be one of softmax, bce, not 'bce_kd'"),
        (lambda: LwF(example_model(), alpha=[1.0, -1.0]), "alpha must be a finite number of at least 0"),
        (lambda: LwF(example_model(), weight=[]), "weight must be a number from 0 up, or a list"),
        (lambda: LwF(example_model(), temperature=0.0), "temperature must be a finite number above 0"),
        (lambda: LwFMC(example_model(), bce_scale=0.0), "bce_scale must be a finite number above 0 or None"),
        (lambda: LwF(example_model(), bn_mode="frozen"), "bn_mode must be one of train, eval"),
        (lambda: L2(example_model(), active_classes="some"), "active_classes must be one of all, seen, task, not 'some'"),
        (lambda: FeatKDPenalty(-1.0), "strength must be a finite number of at least 0"),
    ],
)
def test_odd_options_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 6)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x.float() / 255))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [L2, EWC, SI, LwF, LwFMC])
def test_batch_norm_rests_unless_it_is_to_learn(kind: type, bn_mode: str) -> None:
    strategy = kind(Normed(), bn_mode=bn_mode)
    before = [buffer.clone() for buffer in strategy.model.buffers()]
    run(strategy, example_stream(), max_sessions=2)
    same = [torch.equal(one, two) for one, two in zip(before, strategy.model.buffers(), strict=True)]
    assert all(same) if bn_mode == "eval" else not any(same)
    assert strategy.model.norm.training == (bn_mode == "train")
    assert int(strategy.model.norm.num_batches_tracked) == (0 if bn_mode == "eval" else 16)  # not those of a Fisher pass
    if kind not in (LwF, LwFMC):
        assert "norm.weight" in strategy.regularisers[0].anchor


def test_the_fisher_pass_leaves_no_trace_in_the_model() -> None:
    strategy = EWC(Normed(), bn_mode="train")
    run(strategy, example_stream(), max_sessions=1)
    before = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    grads = [weight.grad.clone() for weight in strategy.model.parameters()]
    from clstream import SessionEnded as Ended

    strategy.regularisers[0].estimate_fisher(Ended(example_stream().session(0)))
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
    strategy, answers = L2(example_model(), active_classes="seen"), []

    class Watch:
        @on(SessionEnded)
        def see(self, event: SessionEnded) -> None:
            answers.append(set(strategy.predict(torch.randint(0, 255, (500, 1, 8, 8), dtype=torch.uint8)).tolist()))
            finite.append(strategy.scores(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).isfinite().sum().item())

    finite: list[int] = []
    run(strategy, example_stream(), Watch())
    assert finite == [2, 4, 6] and answers[0] <= {0, 1} and answers[1] <= {0, 1, 2, 3}
    assert strategy.scores_ignore_task


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("form", ["softmax", "softmax_kd", *LwFMC.forms])
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
    given: dict[str, str] = {} if form == "softmax_kd" else {"form": form}
    kind = LwF if form == "softmax_kd" else LwFMC if form in LwFMC.forms else RehearsalFree
    result = run(kind(example_model(), partial(SGD, lr=0.05), **given), stream)
    least = 0.45 if scenario == "class" and form == "bce_balanced" else 0.7  # where old outputs can win
    assert min(float(result.main[task, task]) for task in range(3)) > least


@pytest.mark.slow
def test_distillation_keeps_what_fine_tuning_forgets() -> None:
    stream = example_stream(epochs=10)
    lost, kept = (run(make(example_model()), stream).average_accuracy for make in (Finetune, LwFMC))
    assert lost < 0.4 and kept > lost + 0.2
    by_task = example_stream(epochs=10, scenario="task")
    plain = run(Finetune(example_model()), by_task)
    for make in (partial(EWC, strength=100.0), partial(SI, strength=10.0), partial(L2, from_start=False)):
        assert run(make(example_model(), partial(SGD, lr=0.02)), by_task).forgetting <= plain.forgetting + 1e-9
