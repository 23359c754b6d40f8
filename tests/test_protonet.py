"""Prototypical networks: similarities by hand, means whatever the order, and episodes drawn from batches."""

from functools import partial

import pytest
import torch
from clstream.strategies import NCM, EpisodicTraining, ProtoNet
from torch import nn
from torch.optim import SGD

from clstream import Samples, run
from clstream.checks import example_model, example_stream
from clstream.losses import prototype_scores, prototypical
from clstream.models import Conv4, Linear, Mlp
from clstream.seeds import isolated
from clstream.stream import Episodes, Stream, Task


def test_similarities_are_those_of_the_spec_s_vectors():
    prototypes, target = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.2]])
    assert prototype_scores(target, prototypes, "dot").tolist() == [[1.0, pytest.approx(0.4)]]
    squared = prototype_scores(target, prototypes, "squared", 2.0)
    assert torch.allclose(squared, -2 * torch.tensor([[1.5**2 + 0.2**2, 0.5**2 + 1.8**2]]))
    cosines = prototype_scores(target, prototypes, "cosine")
    assert torch.allclose(cosines, torch.tensor([[0.5, 0.2]]) / 0.29**0.5)
    many = torch.randn(3, 4, 7, 5), torch.randn(3, 4, 2, 5)
    for name in ("squared", "cosine", "dot"):
        assert torch.allclose(prototype_scores(*many, name)[1, 2], prototype_scores(many[0][1, 2], many[1][1, 2], name), atol=1e-5)


def test_a_prototype_is_the_mean_of_all_samples_of_its_class_and_no_class_is_made_up():
    """Two of four sets, each with one sample of a class: embeddings (2, 0) and (0, 2) have the mean (1, 1), not (.5, .5)."""
    sets = [Samples(torch.tensor([embedding]), torch.tensor([label])) for embedding, label in
            (([2.0, 0.0], 0), ([0.0, 2.0], 0), ([-1.0, -1.0], 1), ([-1.0, -1.0], 1))]  # fmt: skip
    stream = Stream("vectors", [Task(number, (int(own.y),), own, own) for number, own in enumerate(sets)])
    learner = ProtoNet(Linear(2, 2), "dot")
    run(learner, stream)
    asked = torch.tensor([[0.5, 0.2], [-0.1, -3.0]])
    assert torch.allclose(learner.scores(asked), torch.tensor([[0.7, -0.7], [-3.1, 3.1]]))
    assert learner.predict(torch.tensor([[-1.0, 0.9]])).tolist() == [1]  # -0.1 and 0.1: no prototype of 0 to win


@pytest.mark.parametrize("similarity", ["squared", "cosine", "dot"])
def test_what_order_the_support_sets_come_in_does_not_matter(similarity):
    episodes = Episodes("family", pool(), 3, 2, 4, 6, 2)
    stream, model = episodes[0], Linear(8, episodes.outputs)
    learner, other = ProtoNet(model, similarity), ProtoNet(model, similarity)
    run(learner, stream)
    run(other, Stream("turned", stream.tasks, [5, 2, 0, 4, 1, 3]))
    asked = torch.cat([task.test[:].x for task in stream.tasks])
    assert torch.allclose(learner.scores(asked), other.scores(asked), atol=1e-6)
    if similarity != "dot":
        nearest = NCM(model, "euclidean" if similarity == "squared" else "cosine")
        run(nearest, stream)
        assert torch.equal(nearest.predict(asked), learner.predict(asked))


def pool(classes=20, per_class=16):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(classes).repeat_interleave(per_class)
    return Samples(torch.randn(classes, 8, generator=draw)[y] + 0.7 * torch.randn(len(y), 8, generator=draw), y)


def test_an_episode_is_drawn_from_a_batch_class_by_class():
    with isolated(0):
        strategy = EpisodicTraining(Mlp(8, 20), ways=4, shots=2, queries=3)
    samples = pool()
    support, queries = strategy.draw(samples)
    assert support.y.view(4, 2).unique(dim=1).shape == (4, 1) and queries.y.view(4, 3).unique(dim=1).shape == (4, 1)
    assert torch.equal(support.y[::2], queries.y[::3]) and len(support.y.unique()) == 4
    rows = torch.cat([support.x, queries.x])
    assert len(rows.unique(dim=0)) == 20  # no sample is support and query
    assert not torch.equal(strategy.draw(samples)[0].y, support.y)
    few = samples[samples.y < 3]
    assert len(strategy.draw(few)[0].y.unique()) == 3  # all that there are
    assert strategy.draw(samples[samples.y < 1]) == ()
    assert strategy.draw(samples[::4]) == ()  # four of each class


def test_the_loss_is_the_cross_entropy_over_prototypes_and_the_head_passes_no_gradient():
    with isolated(0):
        strategy = EpisodicTraining(Mlp(8, 20), ways=4, shots=2, queries=3, scale=0.5)
    samples = pool()
    drawn = support, queries = strategy.draw(samples)
    features, asked = strategy.model.features(support.x), strategy.model.features(queries.x)
    means = torch.stack([features[support.y == label].mean(0) for label in support.y[::2]])
    distances = torch.cdist(asked, means).square()
    by_hand = nn.functional.cross_entropy(-0.5 * distances, torch.arange(4).repeat_interleave(3))
    assert torch.allclose(prototypical(features, asked, 4, scale=0.5), by_hand, atol=1e-5)
    head = nn.functional.cross_entropy(strategy.model.head(torch.cat([features, asked])), torch.cat([support.y, queries.y]))
    loss = strategy.objective_with(samples, drawn)
    assert torch.allclose(loss, by_hand + head, atol=1e-5)
    weights = [weight for name, weight in strategy.model.named_parameters() if not name.startswith("head.")]
    grads = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(by_hand, weights), strict=True)
    assert all(torch.allclose(whole, own, atol=1e-5) for whole, own in grads)


def test_each_class_of_an_episode_is_turned_as_a_whole():
    corner = torch.zeros(40, 1, 6, 6, dtype=torch.uint8)
    corner[:, 0, 0, 1] = 255
    samples = Samples(corner, torch.arange(40) // 5)
    strategy = EpisodicTraining(Conv4((1, 6, 6), 8, blocks=1), ways=8, shots=2, queries=3, turn=True)
    support, queries = strategy.draw(samples)
    places = torch.cat([support.x.view(8, 2, -1), queries.x.view(8, 3, -1)], 1).argmax(2)
    assert (places == places[:, :1]).all() and len(places.unique()) > 1
    assert {*places.flatten().tolist()} <= {1, 6 * 1 + 5, 6 * 5 + 4, 6 * 4 + 0}
    with pytest.raises(ValueError, match=r"turn=True is for images \(channels, height, width\)"):
        EpisodicTraining(Mlp(8, 20), turn=True).draw(pool())


@pytest.mark.slow
def test_features_trained_on_episodes_tell_other_classes_apart_better():
    draw = torch.Generator().manual_seed(1)
    means, noise = torch.randn(60, 4, generator=draw), torch.randn(60, 12, 28, generator=draw)
    x = torch.cat([means[:, None] + 0.3 * torch.randn(60, 12, 4, generator=draw), noise], 2)  # 4 dimensions of 32 tell a class
    y = torch.arange(60).repeat_interleave(12)
    base = Samples(x[:40].flatten(0, 1), y[:480])
    with isolated(0):
        model = Mlp(32, 40, hidden=(64, 32))
    episodes = Episodes("others", Samples(x[40:].flatten(0, 1), y[480:] - 40), 5, 1, 5, 2, 1, count=30)

    def accuracy():
        return sum(run(ProtoNet(model), stream, evaluate_at="end").average for stream in episodes) / 30

    before = accuracy()
    model.requires_grad_(True)
    stream = Stream("base", [Task(0, tuple(range(40)), base, base[::7])], batch_size=480, epochs=150)
    run(EpisodicTraining(model), stream)
    assert accuracy() > before + 0.25


def test_of_batches_too_small_for_any_episode_a_warning_says_so():
    with pytest.warns(UserWarning, match="no batch of session 0 has two classes with 5 shots and 5 queries each"):
        run(EpisodicTraining(example_model(), partial(SGD, lr=0.1)), example_stream(), max_sessions=1)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ProtoNet(example_model(), "euclid"), ValueError, "similarity must be one of squared, cosine, dot, not 'euclid'"),
        (lambda: ProtoNet(example_model(), scale=0), ValueError, "scale must be a finite number above 0, not 0"),
        (lambda: EpisodicTraining(example_model(), ways=1), ValueError, "ways must be a whole number of at least 2, not 1"),
        (lambda: EpisodicTraining(nn.Linear(3, 2)), TypeError, "EpisodicTraining needs a model with a method `features`"),
    ],
)
def test_what_is_refused(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_conv4_is_the_network_of_the_papers():
    model = Conv4((1, 28, 28), 5)
    assert model.features(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 64)
    assert sum(weight.numel() for weight in model.stages.parameters()) == 111_936
    assert Conv4((3, 84, 84), 5).features(torch.zeros(2, 3, 84, 84)).shape == (2, 1600)
    with pytest.raises(ValueError, match=r"Conv4 takes images .* of at least 16 x 16, not"):
        Conv4((1, 8, 8), 5)
    one, two = torch.rand(2, 1, 28, 28), Conv4((1, 28, 28), 5, width=8, blocks=3, norm="layer").train()
    assert torch.allclose(two(one)[:1], two(one[:1]), atol=1e-6)
