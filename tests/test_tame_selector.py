"""TAME's memories, its selector, pruning, and that answers leave no trace."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies import TAME
from clstream.strategies.tame import Routing
from clstream.strategies.tame.pruning import magnitude_masks, parameter_counts, prunable
from tame_runs import moving, tame
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Batch, RunStarted, Samples, run
from clstream.models import LeNet, Mlp
from clstream.seeds import isolated
from clstream.serialization.compare import digest


def test_a_batch_across_a_boundary_is_stored_for_the_expert_that_learned_it() -> None:
    strategy = tame()
    run(strategy, moving([0, 1], epochs=6), max_sessions=1)
    mixed = moving([0, 1]).tasks[1].train[:10]
    held = len(strategy.memory)
    strategy.learn(Batch(mixed, None, 0, 0))
    assert strategy.active == 1  # here the loss rises at once
    owners = strategy.memory.all().y // 4
    assert Counter(owners.tolist()) == {0: held, 1: 10}
    calm = tame(floor=10.0)  # never a switch: the other task's samples are the first expert's
    run(calm, moving([0, 1], epochs=1))
    assert set((calm.memory.all().y // 4).tolist()) == {0}


@pytest.mark.slow
def test_the_selectors_memory_is_balanced_over_experts_and_labels_and_takes_each_sample_once() -> None:
    strategy = tame(selector_capacity=80)
    run(strategy, moving([0, 1, 2, 3]))
    kept = Counter(strategy.memory.all().y.tolist())
    assert strategy.memory.seen == 4 * 160  # one epoch of each session
    assert sum(kept.values()) == 80
    counts = [n for label, n in sorted(kept.items()) if n > 2]  # a batch that came before the switch has few samples
    assert max(counts) - min(counts) <= 2


def test_a_switch_within_later_epochs_is_remembered() -> None:
    """The expert that takes over has samples in its memories at once, not from the next session on."""
    strategy = tame(window=20, pruning="posthoc")
    run(strategy, moving([0]))
    strategy.begin_run(RunStarted(moving([1]), strategy, 0, False))
    familiar, samples = (moving([1]).tasks[task].train for task in range(2))
    strategy.learn(Batch(familiar[:10], None, 0, 3))
    for index in range(8):
        strategy.learn(Batch(samples[10 * index : 10 * index + 10], None, index, 3))
    assert strategy.active == 1 and len(strategy.experts[1].memory) >= 50
    assert int((strategy.memory.all().y // 4 == 1).sum()) == len(strategy.experts[1].memory)


# Answers, and no trace of them
@pytest.mark.slow
@pytest.mark.parametrize("pruning", ["none", "online", "posthoc"])
def test_evaluations_leave_no_trace(pruning: str) -> None:
    states, results = [], []
    for every in (None, 7):
        strategy = tame(pruning=pruning, selector="mlp")
        results.append(run(strategy, moving([0, 1, 2], epochs=3), evaluate_every=every).accuracy)
        states.append(digest(strategy))
    assert len(strategy.experts) == 3
    assert states[0] == states[1] and torch.equal(*results)


def test_the_selector_is_trained_once_for_what_the_memory_has() -> None:
    strategy = tame()
    run(strategy, moving([0, 1]))
    first = strategy.trained_selector()[0]
    assert strategy.trained_selector()[0] is first and not first.training and first(torch.zeros(1, 14)).shape == (1, 2)
    weights = [weight.clone() for weight in first.parameters()]
    strategy.cached_selector = None
    assert all(map(torch.equal, weights, strategy.trained_selector()[0].parameters()))
    strategy.learn(Batch(moving([0]).tasks[0].train[:10], None, 0, 0))
    assert strategy.trained_selector()[0] is not first


def test_a_selector_that_collapsed_is_trained_anew() -> None:
    class Collapsing(TAME):
        not_state = ("trained",)
        trained = 0

        def train_selector(self, samples: Samples) -> tuple[nn.Module, Any]:
            self.trained += 1
            model, masks = super().train_selector(samples)
            if self.trained <= 2:
                with torch.no_grad():
                    model.head.weight.zero_()
                    model.head.bias.copy_(torch.tensor([0.0, 9.0]))
            return model, masks

    strategy = Collapsing(Mlp(14, 4, hidden=(32,)), window=20, selector_epochs=30, retrain_epochs=8)
    assert run(strategy, moving([0, 1])).average_accuracy > 0.97
    assert strategy.trained == 3


@pytest.mark.slow
def test_a_selector_that_tells_nothing_apart_is_said() -> None:
    with pytest.warns(UserWarning, match="selector sends all that it was trained on to one expert, after 5 trainings"):
        run(tame(selector_retrain_lr=1e38), moving([0, 1]))  # infinite weights at the second step, whatever the machine


@pytest.mark.slow
def test_scores_are_those_of_the_expert_that_a_sample_is_sent_to() -> None:
    strategy = tame()
    run(strategy, moving([0, 1, 2]))
    x = torch.cat([task.test.x for task in moving([0]).tasks[:3]])
    with torch.no_grad():
        sent, scores = strategy.route(x), strategy.scores(x)
        for row in range(0, len(x), 17):
            expert = strategy.experts[int(sent[row])].model
            torch.testing.assert_close(scores[row], expert(x[row : row + 1])[0])
    assert strategy.scores_ignore_task
    assert torch.equal(strategy.predict_online(x), strategy.experts[2].model(x).argmax(1))


# Pruning
def test_masks_cut_the_smallest_weights_of_all_layers_together() -> None:
    torch.manual_seed(0)
    model = LeNet((1, 28, 28), 10)
    assert sum(weight.numel() for weight in model.parameters()) == 61_706
    masks = magnitude_masks(model, 0.98)
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights.values())
    cut = sum(int((~mask).sum()) for mask in masks.values())
    assert cut == round(0.98 * total) and masks.keys() == weights.keys() and not any("bias" in name for name in masks)
    stay = torch.cat([weights[name].detach()[mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name].detach()[~mask].abs() for name, mask in masks.items()])
    assert float(stay.min()) >= float(gone.max())
    assert parameter_counts(model, masks) == (61_706, 61_706 - cut)


def zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in prunable(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("pruning", ["none", "online", "posthoc"])
def test_pruning_leaves_exactly_as_many_weights(pruning: str) -> None:
    strategy, routing = tame(pruning=pruning, sparsity=0.6, selector_sparsity=0.5, retrain_epochs=20), Routing()
    result = run(strategy, moving([0, 1, 0, 2]), routing)
    total = sum(weight.numel() for weight in prunable(strategy.model).values())
    gone = round(0.6 * total)
    own = [zeros(expert.model) for expert in strategy.experts]
    answering = [zeros(model) for model, _ in strategy.answering_models()]
    assert own == {"none": [0, 0, 0], "online": [gone, gone, 0], "posthoc": [0, 0, 0]}[pruning]  # the first learned on, pruned
    assert answering == {"none": [0, 0, 0], "online": [gone, gone, 0], "posthoc": [gone] * 3}[pruning]
    selector = strategy.trained_selector()[0]
    assert zeros(selector) == round(0.5 * sum(weight.numel() for weight in prunable(selector).values()))
    dense, sparse = strategy.parameter_counts()
    assert dense - sparse == sum(answering) + zeros(selector)
    assert (routing.measured[-1].parameters, routing.measured[-1].parameters_left) == (dense, sparse)
    assert result.average_accuracy > 0.9


def test_an_expert_is_pruned_for_good_once_with_an_optimizer_of_its_own_after_that() -> None:
    class Noting(TAME):
        not_state = ("notes",)
        notes: list[tuple[int, bool]]

        def prune_for_good(self, number: int) -> None:
            before = self.experts[number].optimizer
            super().prune_for_good(number)
            self.notes.append((number, self.experts[number].optimizer is before))
            samples = moving([0]).tasks[0].train[:20]
            losses = self.losses(samples)
            for index, expert in enumerate(self.experts):
                with torch.no_grad():
                    loss = F.cross_entropy(expert.model(samples.x).sigmoid(), samples.y)
                assert losses[index] == pytest.approx(float(loss), abs=1e-6)  # also of what was pruned since the last batch

    with isolated(0, "model"):
        strategy = Noting(
            Mlp(14, 4, hidden=(32,)), partial(SGD, lr=0.1, momentum=0.9), window=20, selector_epochs=5, retrain_epochs=8,
            pruning="online", sparsity=0.6,
        )  # fmt: skip
    strategy.notes = []
    run(strategy, moving([0, 1, 0, 1]))
    assert strategy.notes == [(0, False), (1, False)]


@pytest.mark.parametrize("sigmoid", [True, False])
def test_training_from_a_memory_is_the_loop_by_hand(sigmoid: bool) -> None:
    """A falling learning rate, augmented inputs, outputs that pass the sigmoid, and pruned weights at zero."""
    strategy = tame(sigmoid=sigmoid, retrain_epochs=8, sparsity=0.5)
    strategy.augment = lambda x: x + 0.5 * torch.rand(len(x), 1)
    samples = moving([0]).tasks[0].train[:]
    with isolated(1, "start"):
        model, other = (Mlp(14, 4, hidden=(16,)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with isolated(2, "draws"):
        masks = strategy.prune(model, samples)
    assert masks.keys() == magnitude_masks(other, 0.5).keys()
    optimizer = SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def cut_by_hand() -> None:
        for name, weight in other.named_parameters():
            if name in masks:
                weight.data[~masks[name]] = 0

    cut_by_hand()
    with isolated(2, "draws"):
        for epoch in range(8):
            optimizer.param_groups[0]["lr"] = 0.1 if epoch < 4 else 0.01 if epoch < 6 else 0.001
            for rows in torch.randperm(160).split(128):
                x = samples.x[rows] + 0.5 * torch.rand(len(rows), 1)
                outputs = other(x).sigmoid() if sigmoid else other(x)
                optimizer.zero_grad()
                F.cross_entropy(outputs, samples.y[rows]).backward()
                optimizer.step()
                cut_by_hand()
    for (name, weight), by_hand in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, by_hand)
        assert not torch.equal(weight, before[name])
