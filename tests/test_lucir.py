"""LUCIR: similarities, losses and imprinting by hand, what learns and what is fixed, and the finetuning."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from clstream.strategies import LUCIR
from clstream.strategies.lucir import margin_ranking
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, SessionEnded, SessionStarted, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.eval_mode import evaluating
from clstream.models import Mlp
from clstream.strategy.cosine_rehearsal import CosineClassifier, feature_distance, similarities


def test_similarities_are_cosines_that_proxies_share_by_their_softmax() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    proxies = torch.tensor([[[2.0, 0.0], [0.0, 7.0]], [[-1.0, 0.0], [0.0, 1.0]]])
    one = similarities(features, proxies[:, :1])
    torch.testing.assert_close(one, torch.tensor([[0.6, -0.6], [0.0, 0.0]]))
    a, b = math.exp(0.6), math.exp(0.8)
    c, d = math.exp(-0.6), math.exp(-1.0)
    expected = [[(a * 0.6 + b * 0.8) / (a + b), (-c * 0.6 + b * 0.8) / (c + b)], [-d / (1 + d), -d / (1 + d)]]
    torch.testing.assert_close(similarities(features, proxies), torch.tensor(expected))


def test_features_that_turn_by_an_angle_lose_its_cosine() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    now = torch.tensor([[5.0, 0.0], [0.0, -0.1], [2.0, 0.0]])
    assert float(feature_distance(now, before)) == pytest.approx((0 + 2 + 1 - math.sqrt(0.5)) / 3)


def test_margin_ranking_by_hand() -> None:
    cosines = torch.tensor([[0.9, 0.0, 0.5, 0.1, 0.3], [0.2, 0.1, 0.4, -0.9, 0.0], [0.0, 0.0, 0.9, 0.9, 0.9]])
    places = torch.tensor([0, 1, 3])  # the last one is of a new class, and doesn't count
    # row 0: new 0.5, 0.3: 0.1 and 0; row 1: new 0.4, 0.0: 0.8 and 0.4
    assert float(margin_ranking(cosines, places, 2, 0.5, 2)) == pytest.approx((0.05 + 0.6) / 2)
    assert float(margin_ranking(cosines, places, 2, 0.5, 1)) == pytest.approx((0.1 + 0.8) / 2)
    assert float(margin_ranking(cosines, places, 2, 0.5, 9)) == pytest.approx((0.1 / 3 + 1.2 / 3) / 2)  # as many as there are
    assert float(margin_ranking(cosines[2:], places[2:], 2, 0.5, 2)) == 0
    cosines.requires_grad_(True)
    margin_ranking(cosines, places, 2, 0.5, 2).backward()
    expected = torch.tensor([[-1.0, 0, 1, 0, 0], [0, -2, 1, 0, 1], [0, 0, 0, 0, 0]]) / 4
    assert torch.equal(cosines.grad, expected)


def test_old_proxies_are_fixed_and_a_class_that_comes_again_learns_on() -> None:
    classifier = CosineClassifier(2, 1)
    proxies = torch.arange(6.0).view(3, 1, 2)
    classifier.replace(torch.tensor([4, 0, 2]), proxies, torch.tensor([2, 0]))
    assert classifier.labels.tolist() == [4, 0, 2] and torch.equal(classifier.old, proxies[:1])
    assert not classifier.old.requires_grad and classifier.new.requires_grad
    assert classifier.places(torch.tensor([2, 4, 0])).tolist() == [2, 0, 1]
    classifier.replace(classifier.labels, torch.cat([classifier.old, classifier.new]), torch.tensor([4]))
    assert classifier.labels.tolist() == [0, 2, 4] and torch.equal(classifier.new, proxies[:1])


def of_the_code(strategy: LUCIR, x: Tensor, y: Tensor) -> Tensor:
    """The loss by torch's own, in the order of the authors' code; labels come in their order."""
    features, before = strategy.model.features(x), strategy.teacher.features(x)
    weights = torch.cat([strategy.classifier.old, strategy.classifier.new]).flatten(1)
    cosines = F.cosine_similarity(features[:, None], weights[None], dim=2)
    old = len(strategy.old_classes)
    loss = F.cross_entropy(strategy.classifier.eta * cosines, y)
    loss = loss + 5 * math.sqrt(old / 2) * F.cosine_embedding_loss(features, before, torch.ones(len(x)))
    hard = y < old
    if hard.any():
        own = cosines.gather(1, y[:, None])[hard].repeat(1, 2)
        hardest = cosines[hard, old:].topk(2, dim=1)[0]
        loss = loss + F.margin_ranking_loss(own.flatten(), hardest.flatten(), torch.ones(2 * int(hard.sum())), margin=0.5)
    return loss


class Watch:
    """Compares losses, and takes down what changes in a session."""

    def __init__(self, strategy: LUCIR) -> None:
        self.strategy, self.looked, self.imprinted = strategy, 0, 0
        self.lengths = list[float]()

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        classifier, samples = self.strategy.classifier, event.session.samples[:]
        self.old, self.new, self.eta = classifier.old.clone(), classifier.new.detach().clone(), float(classifier.eta.detach())
        self.head = self.strategy.model.head.weight.detach().clone()
        if not len(self.old):
            return
        with torch.no_grad():
            for label, proxy in zip(classifier.new_labels, self.new, strict=True):
                own = F.normalize(self.strategy.model.features(samples.x[samples.y == label]), dim=1).mean(0)
                expected = own / own.norm() * classifier.old.norm(dim=2).mean()
                torch.testing.assert_close(proxy[0], expected)
                self.imprinted += 1

    @on(BatchLearned)
    def compare(self, event: BatchLearned) -> None:
        strategy, samples = self.strategy, event.batch.samples
        if strategy.teacher is None:
            return
        x, y = strategy.joined(samples)
        torch.testing.assert_close(strategy.loss(samples), of_the_code(strategy, x, y))
        self.looked += 1

    @on(SessionEnded)
    def end(self, event: SessionEnded) -> None:
        classifier = self.strategy.classifier
        assert torch.equal(classifier.old, self.old) and torch.equal(self.strategy.model.head.weight, self.head)
        assert bool((classifier.new != self.new).any(2).all()) and float(classifier.eta.detach()) != self.eta


def test_a_run_takes_the_steps_of_the_code() -> None:
    strategy = built(partial(LUCIR, optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01), capacity=60))
    run(strategy, example_stream(), watch := Watch(strategy))
    assert watch.looked == 16 and watch.imprinted == 4
    assert strategy.counts == dict.fromkeys(range(6), 10) and strategy.classifier.labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_answers_are_scaled_cosines_of_the_classes_that_came() -> None:
    strategy = built(partial(LUCIR, capacity=60))
    run(strategy, stream := example_stream(), max_sessions=2)
    x = stream.tasks[0].test[:].x
    with torch.no_grad():
        weights = torch.cat([strategy.classifier.old, strategy.classifier.new]).flatten(1)
        cosines = F.normalize(strategy.model.features(x), dim=1) @ F.normalize(weights, dim=1).T
    scores = strategy.scores(x)
    torch.testing.assert_close(scores[:, :4], strategy.classifier.eta.detach() * cosines)
    assert bool((scores[:, 4:] == float("-inf")).all())


@pytest.mark.parametrize("model", [example_model, normed_model])
def test_finetuning_moves_all_proxies_and_nothing_else(model: partial[nn.Module]) -> None:
    """One pass over the exemplars in one batch is a step of gradient descent on their loss."""
    stream = example_stream()
    strategy = LUCIR(model(), capacity=60, finetune_epochs=1, finetune_lr=0.2, finetune_batch=100)
    plain = LUCIR(model(), capacity=60)
    run(strategy, stream, max_sessions=2)
    run(plain, stream, max_sessions=2)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, strategy.model.state_dict()[name])
    assert torch.equal(strategy.exemplars.x, plain.exemplars.x) and torch.equal(strategy.classifier.eta, plain.classifier.eta)
    proxies = torch.cat([plain.classifier.old, plain.classifier.new]).detach().requires_grad_(True)
    with evaluating(plain):
        features = plain.model.features(plain.exemplars.x)
    cosines, y = similarities(features, proxies), plain.exemplars.y
    loss = F.cross_entropy(plain.classifier.eta.detach() * cosines, y) + margin_ranking(cosines, y, 2, 0.5, 2)
    loss.backward()
    rate = 0.2  # the first half of one pass is all of it
    expected = proxies.detach() - rate * (proxies.grad + 1e-4 * proxies.detach())
    now = torch.cat([strategy.classifier.old, strategy.classifier.new]).detach()
    torch.testing.assert_close(now, expected)
    assert bool((now != proxies).any(2).all())


def test_less_forget_holds_features_where_they_were() -> None:
    """With it, features of old samples turn less; the first session is learned in the same way."""
    stream = example_stream(epochs=4)
    x = stream.tasks[0].test[:].x
    turned, first = [], []
    for weight in (0.0, 5.0):
        strategy = built(partial(LUCIR, optimizer=partial(SGD, lr=0.01), capacity=20, lambda_base=weight, lambda_mr=0.0))
        result = run(strategy, stream, max_sessions=1)
        with torch.no_grad():
            before = strategy.model.features(x)
        first.append(before)
        run(strategy, stream, continues=result)
        with torch.no_grad():
            turned.append(float(feature_distance(strategy.model.features(x), before)))
    assert torch.equal(*first) and turned[1] < 0.5 * turned[0]


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="session 2 makes it 6 classes, and capacity=5 exemplars are fewer: take"):
        run(built(partial(LUCIR, capacity=5)), example_stream())
    with pytest.raises(TypeError, match="LUCIR needs a model with a method `features`, which Linear hasn't"):
        LUCIR(nn.Linear(3, 2))
    headless = Mlp(4, 2)
    del headless.head
    with pytest.raises(TypeError, match="LUCIR needs a model whose `head` tells the width of its features, and Mlp has none"):
        LUCIR(headless)
    for wrong in ({"lambda_base": -1}, {"lambda_mr": -1}, {"margin": -1}, {"K": 0}, {"finetune_epochs": -1}, {"finetune_lr": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LUCIR(example_model(), **wrong)
    with pytest.raises(TypeError, match="LUCIR answers with more than its model"):
        LUCIR(example_model()).export()
