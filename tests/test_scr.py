"""SCR: the contrastive loss of both views, what is drawn and kept, and the nearest class mean of the memory as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import SCR
from clstream.streams import blobs
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, Samples, on, run
from clstream.augmentations import ContrastiveViews
from clstream.checks import example_model, example_stream
from clstream.eval_mode import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated

SMALL = {"capacity": 60, "replay_batch": 20, "temperature": 0.2, "smallest": 1.0, "jitter": 0.0, "width": 16}


def small(**options: object) -> SCR:
    return built(partial(SCR, **{**SMALL, **options}))


def contrast_by_hand(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The equation of the paper, one anchor and one positive at a time."""
    z = z / z.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        every = sum((z[i] @ z[a] / temperature).exp() for a in others)
        total = total - sum(((z[i] @ z[p] / temperature).exp() / every).log() for p in positives) / len(positives)
    return total / len(z)


@pytest.mark.parametrize("projection", ["mlp", "linear", "none"])
def test_the_loss_is_the_contrast_of_the_samples_and_of_a_view_of_each(projection: str) -> None:
    stream = example_stream()
    strategy = small(projection=projection, base_temperature=0.1)
    run(strategy, stream, max_sessions=1)
    batch = stream.tasks[1].train[:5]
    drawn = strategy.memory.all()[torch.tensor([0, 7, 30])]
    both = batch + drawn
    with isolated(3):
        loss = strategy.objective_with(batch, (drawn,))
    with isolated(3):
        view = ContrastiveViews(1.0, None, 0.0, blur=0.0)(both.x)
    x = torch.cat([both.x / 255, view])
    model = strategy.model
    features = torch.relu(F.linear(x.flatten(1), model.stages.layer1.weight, model.stages.layer1.bias))
    layers = list(strategy.projection)
    if projection == "mlp":
        features = torch.relu(F.linear(features, layers[0].weight, layers[0].bias))
    if projection != "none":
        features = F.linear(features, layers[-1].weight, layers[-1].bias)
        assert features.shape[1] == 16
    expected = 0.2 / 0.1 * contrast_by_hand(features.double(), both.y.repeat(2), 0.2)
    torch.testing.assert_close(loss.double(), expected)


def test_the_loss_is_that_of_avalanche_and_so_is_its_gradient(avalanche: Callable[[str], ModuleType]) -> None:
    theirs = avalanche("training.losses").SCRLoss(temperature=0.1)
    strategy = small(projection="none", temperature=0.1, base_temperature=0.07, views="stream")
    samples = example_stream().tasks[0].train[:12]
    loss = strategy.objective_with(samples, ())
    loss.backward()
    ours = [weight.grad.clone() for weight in strategy.model.stages.parameters()]
    strategy.model.zero_grad()
    z = F.normalize(strategy.model.features(samples.x), dim=1)
    expected = theirs(torch.stack([z, z], 1), samples.y)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, weight in zip(ours, strategy.model.stages.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_the_first_view_is_the_sample_itself_and_both_have_its_label() -> None:
    """With a view that tells nothing, a sample is still its own positive: alone with its label, its loss is that of the pair."""
    strategy = small(projection="none", views="stream")
    stream = example_stream()
    strategy.augment = torch.zeros_like
    samples = stream.tasks[0].train[:2]
    features = strategy.model.features(torch.cat([samples.x, torch.zeros_like(samples.x)]))
    expected = contrast_by_hand(features.double(), samples.y.repeat(2), 0.2)
    assert samples.y.tolist() == [0, 1]
    torch.testing.assert_close(strategy.objective_with(samples, ()).double(), expected)


def test_the_projection_learns_and_the_head_does_not() -> None:
    strategy = small()
    before = [weight.clone() for weight in (*strategy.projection.parameters(), *strategy.model.head.parameters())]
    run(strategy, example_stream(), max_sessions=1)
    after = (*strategy.projection.parameters(), *strategy.model.head.parameters())
    same = [torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert same == [False] * 4 + [True] * 2


class Watch:
    """Takes down how many samples the memory holds after each batch, and what is answered then."""

    def __init__(self, strategy: SCR, x: Tensor) -> None:
        self.strategy, self.x, self.sizes, self.answers = strategy, x, list[int](), list[Tensor]()

    @on(BatchLearned)
    def look(self, event: BatchLearned) -> None:
        self.sizes.append(len(self.strategy.memory))
        self.answers.append(self.strategy.scores(self.x))


def mean_by_hand(strategy: SCR, x: Tensor) -> Tensor:
    kept, scores = strategy.memory.all(), torch.full((len(x), 6), float("-inf"))
    with evaluating(strategy):
        of_x = F.normalize(strategy.model.features(x), dim=1)
        for label in kept.y.unique().tolist():
            own = F.normalize(strategy.model.features(kept.x[kept.y == label]), dim=1).mean(0)
            scores[:, label] = of_x @ (own / own.norm())
    return scores


@pytest.mark.parametrize("memory", ["reservoir", "class_balanced"])
def test_it_answers_with_the_nearest_mean_of_the_memory_as_it_is(memory: str) -> None:
    stream = example_stream(epochs=2)
    x = torch.cat([task.test.x for task in stream.tasks])
    strategy = small(memory=memory)
    watch = Watch(strategy, x)
    run(strategy, stream, watch, max_sessions=2)
    assert watch.sizes[:9] == [8, 16, 24, 32, 40, 48, 56, 60, 60] and watch.sizes[-1] == 60  # of the first pass alone
    torch.testing.assert_close(strategy.scores(x), mean_by_hand(strategy, x))
    torch.testing.assert_close(watch.answers[-1], strategy.scores(x))
    moved = [float((one - two)[:, :2].abs().max()) for one, two in zip(watch.answers, watch.answers[1:], strict=False)]
    assert min(moved) > 0  # each step moves the means
    assert torch.isinf(strategy.scores(x)[:, 4:]).all()


def test_a_change_of_weights_is_seen_also_without_a_step() -> None:
    strategy, stream = small(), example_stream()
    run(strategy, stream)
    x = stream.tasks[0].test[:].x
    before = strategy.scores(x)
    strategy.model.load_state_dict(example_model(seed=5).state_dict())
    torch.testing.assert_close(strategy.scores(x), mean_by_hand(strategy, x))
    assert not torch.allclose(strategy.scores(x), before)


@pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")
def test_its_answers_are_those_of_avalanche(avalanche: Callable[[str], ModuleType]) -> None:
    """Their SCR takes means over what its memory holds: given ours, it finds our means and answers."""
    stream = example_stream()
    strategy = small(memory="class_balanced")
    run(strategy, stream)
    kept = strategy.memory.all()
    model = avalanche("models").SCRModel(strategy.model.stages, nn.Linear(32, 8))
    theirs = avalanche("training.supervised").SCR(
        model=model, optimizer=SGD(model.parameters(), 0.1), evaluator=None, eval_mb_size=4
    )
    wrap = avalanche("benchmarks.utils")._make_taskaware_classification_dataset
    theirs.replay_plugin.storage_policy.update_from_dataset(
        wrap(torch.utils.data.TensorDataset(kept.x, kept.y), targets=kept.y.tolist(), task_labels=0)
    )
    model.eval()
    theirs.compute_class_means()
    x = torch.cat([task.test.x for task in stream.tasks])
    torch.testing.assert_close(model.ncm.class_means, strategy.means(), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x).argmax(1), strategy.predict(x))


def test_all_that_is_kept_is_drawn_once_where_it_is_less_than_asked() -> None:
    strategy = small(replay_batch=100)
    run(strategy, example_stream(), max_sessions=1)
    (drawn,) = strategy.draw(Samples(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)))
    assert len(drawn) == 60
    assert torch.equal(drawn.x.flatten(1).unique(dim=0), strategy.memory.all().x.flatten(1).unique(dim=0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"SCR needs a model with a method `features` and a linear `head`.*Linear hasn't"):
        SCR(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"views='contrastive' is for images .*not blobs's \(16,\): take views='stream'"):
        run(SCR(Mlp(16, 10)), blobs(features=16))
    run(SCR(Mlp(16, 10), views="stream"), blobs(features=16), max_sessions=1)
