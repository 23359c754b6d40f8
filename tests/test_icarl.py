"""iCaRL: herding, exemplars, the loss with a teacher, and the answer, against what is worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from clstream.experiments.parity.measuring import Labelled
from clstream.strategies import ICaRL
from clstream.streams import split_digits
from conftest import built
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Samples, SessionEnded, SessionStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.eval_mode import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.strategy.core_sets import herding


def by_definition(features: Tensor, most: int) -> list[int]:
    """The paper's algorithm 4, one candidate at a time."""
    mean, chosen = features.mean(0), list[int]()
    while len(chosen) < min(most, len(features)):
        left = [number for number in range(len(features)) if number not in chosen]
        means = {number: features[[*chosen, number]].mean(0) for number in left}
        chosen.append(min(left, key=lambda number: float((mean - means[number]).norm())))
    return chosen


def test_herding_is_that_of_its_definition() -> None:
    features = F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=1)
    assert herding(features, 12).tolist() == by_definition(features, 12)
    assert sorted(herding(features, 99).tolist()) == list(range(30))
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [9.0]])  # mean 3
    assert herding(line, 3).tolist() == [3, 2, 1]  # means 3, then 2.5, then 2 rather than 14 / 3


def test_the_first_exemplars_come_nearer_to_the_mean_than_as_many_drawn_ones() -> None:
    features = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    herded = float((features[herding(features, 10)].mean(0) - features.mean(0)).norm())
    drawn = [float((features[rows].mean(0) - features.mean(0)).norm()) for rows in torch.arange(200).split(10)]
    assert herded < min(drawn) / 3


class Watch:
    """Takes down the exemplars when each session starts."""

    def __init__(self, strategy: ICaRL) -> None:
        self.strategy, self.before = strategy, list[dict[int, Tensor]]()

    @on(SessionStarted)
    def look(self, event: SessionStarted) -> None:
        self.before.append({label: own.x.clone() for label, own in self.strategy.exemplars_by_class().items()})


def test_classes_share_the_capacity_and_keep_their_first_exemplars() -> None:
    strategy = built(partial(ICaRL, capacity=25))
    run(strategy, example_stream(), watch := Watch(strategy))
    sizes = [{label: len(x) for label, x in before.items()} for before in watch.before]
    assert sizes == [{}, {0: 12, 1: 12}, {0: 6, 1: 6, 2: 6, 3: 6}]
    assert strategy.counts == dict.fromkeys(range(6), 4)
    after = strategy.exemplars_by_class()
    for label, x in watch.before[2].items():
        assert torch.equal(x[:4], after[label].x)
    assert torch.equal(watch.before[1][0][:6], watch.before[2][0])


def test_exemplars_are_herded_and_the_nearest_mean_answers() -> None:
    stream = example_stream()
    strategy = built(partial(ICaRL, capacity=30))
    run(strategy, stream)
    with evaluating(strategy):
        means = torch.zeros(6, 32)
        for label, own in strategy.exemplars_by_class().items():
            means[label] = F.normalize(F.normalize(strategy.model.features(own.x), dim=1).mean(0), dim=0)
        newest = stream.tasks[2].train[:]
        for label in (4, 5):
            x = newest.x[newest.y == label]
            features = F.normalize(strategy.model.features(x), dim=1)
            assert torch.equal(strategy.exemplars_by_class()[label].x, x[by_definition(features, 5)])
        x = torch.cat([task.test.x for task in stream.tasks])
        cosines = F.normalize(strategy.model.features(x), dim=1) @ means.T
        torch.testing.assert_close(strategy.scores(x), cosines)
        assert torch.equal(strategy.predict(x), cosines.argmax(1))


@pytest.mark.parametrize(("form", "temperature"), [("sum", 1.0), ("sum", 2.0), ("mean", 1.0)])
def test_the_loss_is_that_of_labels_and_of_the_network_before(form: str, temperature: float) -> None:
    stream = example_stream()
    strategy = built(partial(ICaRL, form=form, temperature=temperature))
    run(strategy, stream, max_sessions=1)
    strategy.open(SessionStarted(stream.session(1)))
    before = example_model(seed=7)
    strategy.teacher, strategy.order = before, torch.arange(20)
    strategy.batches, strategy.turn = 5, 2
    samples = stream.tasks[1].train[:10]
    exemplars = strategy.exemplars[8:12]
    x, y = torch.cat([samples.x, exemplars.x]), torch.cat([samples.y, exemplars.y])
    targets = F.one_hot(y, 6).float()
    targets[:, [0, 1]] = (before(x)[:, [0, 1]] / temperature).sigmoid()
    likelihood = strategy.model(x).sigmoid()
    errors = -(targets * likelihood.log() + (1 - targets) * (1 - likelihood).log())
    expected = errors[:, :4].sum(1).mean() if form == "sum" else errors.mean()  # the classes 4 and 5 did not come
    torch.testing.assert_close(strategy.loss(samples), expected)


def test_the_loss_is_that_of_avalanche_and_so_is_its_gradient(avalanche: Callable[[str], ModuleType]) -> None:
    stream = example_stream()
    strategy = built(partial(ICaRL, form="mean"))
    run(strategy, stream, max_sessions=1)
    strategy.open(SessionStarted(stream.session(1)))
    strategy.teacher = example_model(seed=7)
    samples, weights = stream.tasks[1].train[:10], [*strategy.model.parameters()]
    theirs = avalanche("training.losses").ICaRLLossPlugin()
    theirs.old_model, theirs.old_classes = strategy.teacher, [0, 1]
    theirs.before_forward(SimpleNamespace(mb_x=samples.x))
    expected, actual = theirs(strategy.model(samples.x), samples.y), strategy.loss(samples)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, weights), torch.autograd.grad(expected, weights))


def test_exemplars_and_means_are_those_of_avalanche(avalanche: Callable[[str], ModuleType]) -> None:
    """Its plugin is driven beside ours, session by session; its inputs are flat, since it mirrors images for its means.

    It counts a sample that it would choose again once more, so the choices part where most samples are chosen: not here.
    """
    stream = split_digits(epochs=1)
    with isolated(0, "model"):
        strategy = ICaRL(Mlp(stream.input_shape, stream.classes, hidden=(128,)), capacity=12)
    theirs = avalanche("training.supervised.icarl")._ICaRLPlugin(12)
    wrap = avalanche("benchmarks.utils")._make_taskaware_classification_dataset
    classifier = avalanche("models").NCMClassifier(normalize=True)
    benchmark = SimpleNamespace(n_classes_per_exp=[2] * 5, classes_order=[*range(10)])
    model = SimpleNamespace(
        feature_extractor=lambda x: strategy.model.features(x.view(-1, *stream.input_shape)), eval_classifier=classifier
    )
    theirs.embedding_size = 128

    class Beside:
        @on(SessionEnded)
        def close(self, event: SessionEnded) -> None:
            samples = event.session.samples[:]
            dataset = wrap(Labelled(samples.x.flatten(1), samples.y), task_labels=0)
            theirs.observed_classes.extend(event.session.classes)
            played = SimpleNamespace(
                experience=SimpleNamespace(benchmark=benchmark, dataset=dataset), eval_mb_size=100, device="cpu", model=model,
                clock=SimpleNamespace(train_exp_counter=event.session.index),
            )  # fmt: skip
            with evaluating(strategy):
                theirs.construct_exemplar_set(played)
                theirs.reduce_exemplar_set(played)
                theirs.compute_class_means(played)
            for label, own in strategy.exemplars_by_class().items():
                place = [labels[0] for labels in theirs.y_memory].index(label)
                herded = theirs.x_memory[place][theirs.order[place].argsort()]
                assert torch.equal(own.x.flatten(1), herded)
            assert strategy.means is not None
            torch.testing.assert_close(strategy.means, classifier.class_means)

    run(strategy, stream, Beside(), max_sessions=3)
    x = torch.cat([task.test.x for task in stream.tasks[:3]])
    with evaluating(strategy):
        assert torch.equal(strategy.predict(x), classifier(strategy.model.features(x))[:, :6].argmax(1))


def test_a_pass_goes_over_all_exemplars_once() -> None:
    stream = example_stream(batch_size=7)
    strategy = built(partial(ICaRL, capacity=22))
    drawn: list[Samples] = []

    class Drawing(ICaRL):
        def draw(self, samples: Samples) -> tuple[Samples, ...]:
            parts = super().draw(samples)
            drawn.extend(parts)
            return parts

    strategy = built(partial(Drawing, capacity=22))
    run(strategy, stream, max_sessions=2)
    x = torch.cat([part.x for part in drawn]).flatten(1)
    assert len(x) == 22 and len(drawn) == 9  # of the 11 + 11 exemplars, over 9 batches
    assert len(x.unique(dim=0)) == 22


def test_old_classes_are_kept_better_than_without_exemplars_and_teacher() -> None:
    stream = example_stream(epochs=10)
    accuracy = run(built(partial(ICaRL, capacity=60)), stream).average_accuracy
    outputs = run(built(partial(ICaRL, capacity=60, answer="outputs")), stream).average_accuracy
    assert accuracy > 0.9
    assert outputs > 0.6


def test_a_class_that_comes_again_is_new_again_and_chooses_among_old_exemplars_too() -> None:
    strategy = built(partial(ICaRL, capacity=60))
    stream = example_stream((0, 1, 0, 0))
    run(strategy, stream, watch := Watch(strategy), max_sessions=3)
    assert strategy.old_classes.tolist() == [2, 3]
    x = strategy.exemplars_by_class()[0].x
    rows = torch.cat([watch.before[2][0], stream.session(2).samples.x[stream.session(2).samples.y == 0]]).flatten(1)
    assert len(x) == 15
    assert all(bool((rows == row).all(1).any()) for row in x.flatten(1))


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="session 2 makes it 6 classes, and capacity=5 exemplars are fewer"):
        run(built(partial(ICaRL, capacity=5)), example_stream())
    with pytest.raises(TypeError, match="ICaRL needs a model with a method `features`, which Linear hasn't"):
        ICaRL(torch.nn.Linear(3, 2))
    for wrong in ({"form": "half"}, {"answer": "head"}, {"temperature": 0}, {"capacity": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ICaRL(Mlp(4, 2), partial(SGD, lr=0.1), **wrong)
