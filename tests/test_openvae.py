"""OpenVAE: its loss and outlier model against worked numbers, the order of a boundary, and what bounds its replay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from clstream.strategies import OpenVAE
from clstream.strategies.openvae import ReplayGenerated
from clstream.strategies.openvae.networks import BatchNorm, kl_divergence
from clstream.strategies.openvae.openvae import quotas, unit
from clstream.strategies.openvae.replay import TOGETHER, draw_latents
from clstream.streams import blobs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream import SessionEnded, SessionStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.models import BatchNormMlp, Mlp
from clstream.seeds import isolated
from clstream.strategy.extreme_values import OutlierModel, Weibull, cosine_distances, fit_weibull
from clstream.stream import Samples

DISTANCES = torch.tensor(
    [0.02, 0.03, 0.05, 0.05, 0.06, 0.08, 0.09, 0.1, 0.12, 0.15, 0.17, 0.2, 0.22, 0.3, 0.34, 0.4, 0.47, 0.55, 0.7, 0.9],
    dtype=torch.float64,
)


def small(**options: object) -> OpenVAE:
    with isolated(0, "strategy"):
        given = {"latent": 8, "decoder": (16,), "proposals": TOGETHER, **options}
        return OpenVAE(example_model(), partial(Adam, lr=0.01), **given)  # type: ignore[arg-type]


# Numbers --------------------------------------------------------------------------------------------------------------


def test_kl_divergence() -> None:
    def of(mean: list[float], deviation: list[float]) -> float:
        return float(kl_divergence(*(torch.tensor([row], dtype=torch.float64) for row in (mean, deviation))))

    assert of([0.0], [1.0]) == pytest.approx(-5e-9, rel=1e-6)
    assert of([0.5, -1.0], [0.5, 2.0]) == pytest.approx(0.87499999, abs=2e-8) == of([0.5, -1.0], [-0.5, 2.0])


def test_outlier_probabilities_of_libmr() -> None:
    probabilities = Weibull(0.4, 1.2836474815, 7.0454352640).outlier_probability(
        torch.tensor([0.0, 0.2, 0.4, 0.5, 0.9], dtype=torch.float64)
    )
    assert probabilities.tolist() == pytest.approx(
        [0.0046979584, 0.0351108173, 0.1581622313, 0.2860645200, 0.9500306531], abs=1e-10
    )


@pytest.mark.parametrize(
    ("size", "start", "scale", "shape"), [(5, 0.4, 1.2836474815, 7.0454352640), (10, 0.17, 1.3517820320, 5.6515033107)]
)
def test_the_fit_is_libmr_s(size: int, start: float, scale: float, shape: float) -> None:
    weibull = fit_weibull(DISTANCES[-size:])
    assert (weibull.start, weibull.scale, weibull.shape) == (start, pytest.approx(scale, rel=5e-6), pytest.approx(shape, rel=5e-6))
    expected = Weibull(start, scale, shape).outlier_probability(DISTANCES)
    assert torch.allclose(weibull.outlier_probability(DISTANCES), expected, rtol=0, atol=2e-6)
    assert bool((weibull.outlier_probability(DISTANCES.unique()).diff() > 0).all())
    assert torch.allclose(weibull.quantile(weibull.outlier_probability(DISTANCES)), DISTANCES)
    assert float(weibull.outlier_probability(torch.tensor(start - 1.5))) == 0


@pytest.mark.parametrize(
    ("tail", "why"),
    [([0.1, 0.2], "at least 3 finite distances, not 2"), ([0.1] * 5, "all equal"), ([0.1, 0.2, float("nan")], "finite")],
)
def test_tails_without_a_model_are_refused(tail: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit_weibull(torch.tensor(tail))


def test_cosine_distances() -> None:
    distances = cosine_distances(torch.tensor([[1.0, 1.0], [-2.0, 0.0], [3.0, 0.0]]), torch.tensor([1.0, 0.0]))
    assert distances.tolist() == pytest.approx([0.2928932188, 2.0, 0.0], abs=1e-7)


def test_the_outlier_model_is_of_those_that_are_classified_right() -> None:
    draw = torch.Generator().manual_seed(0)
    z, y = torch.randn(100, 4, generator=draw) + 2, torch.arange(100) % 2
    predicted = torch.where(torch.arange(100) < 60, y, 1 - y)
    model = OutlierModel()
    assert not model and model.fit(z, y, predicted, 3, 0.2) == [] and model
    own = z[:60][y[:60] == 0]
    mean = own.mean(0)
    weibull = fit_weibull((1 - F.cosine_similarity(own, mean[None])).sort().values[-10:])  # int(100 * .2 / 2)
    assert torch.allclose(model.means[0], mean) and torch.equal(model.means[2], torch.zeros(4))
    assert model.weibulls[0].tolist() == pytest.approx([weibull.start, weibull.scale, weibull.shape])
    assert model.weibulls[2].isnan().all()
    assert model.fit(z, y, torch.ones_like(y), 3, 0.2) == [0]  # none of class 0 is right
    assert bool(model.outlier_probability(z, torch.zeros_like(y)).isnan().all())


def test_quotas() -> None:
    assert quotas(12000, 2).tolist() == [6000, 6000]
    assert quotas(10007, 4).tolist() == [2502, 2502, 2502, 2501]


def test_the_loss_is_that_of_its_parts() -> None:
    strategy, samples = small(beta=0.3, noise=0.1), example_stream().tasks[0].train[:10]
    strategy.network.grow([0, 1])
    x = unit(samples.x)
    torch.manual_seed(5)
    loss = strategy.loss(Samples(x, samples.y))
    torch.manual_seed(5)
    features = strategy.model.features(x + 0.1 * torch.randn_like(x))  # type: ignore[operator]
    mean, deviation = features @ strategy.network.mean.weight.T, features @ strategy.network.deviation.weight.T
    z = mean + deviation * torch.randn_like(mean)
    parts = (
        F.cross_entropy(z @ strategy.network.classifier.weight.T, samples.y),
        F.binary_cross_entropy_with_logits(strategy.network.decoder(z), x.flatten(1)),
        0.3 * kl_divergence(mean, deviation),
    )
    assert torch.allclose(loss, parts[0] + parts[1] + parts[2])


def test_batch_norm_takes_a_single_sample() -> None:
    norm, x = BatchNorm(3), torch.randn(5, 3)
    norm(x)
    assert torch.equal(norm(x[:1]), norm.eval()(x[:1]))
    assert torch.equal(norm.train()(x), nn.BatchNorm1d(3)(x))


# A boundary -----------------------------------------------------------------------------------------------------------


def weights_hash(strategy: OpenVAE) -> str:
    sha = hashlib.sha256()
    for module in (strategy.model, strategy.network):
        for value in module.state_dict().values():
            sha.update(value.numpy().tobytes())
    return sha.hexdigest()


class Boundary:
    """Notes the strategy's state around the generation of what it replays."""

    def __init__(self, strategy: OpenVAE) -> None:
        self.strategy = strategy
        self.events: list[ReplayGenerated] = []
        self.ends: list[tuple[str, Tensor]] = []
        self.starts: list[Tensor] = []

    @on(SessionEnded)
    def end(self, event: SessionEnded) -> None:
        self.ends.append((weights_hash(self.strategy), self.strategy.network.classifier.weight.detach().clone()))

    @on(ReplayGenerated)
    def generated(self, event: ReplayGenerated) -> None:
        assert weights_hash(self.strategy) == self.ends[-1][0]  # before new rows, and nothing was moved by generating
        self.events.append(event)

    @on(SessionStarted)
    def start(self, event: SessionStarted) -> None:
        strategy = self.strategy
        weight = strategy.network.classifier.weight
        if self.ends:
            old = self.ends[-1][1]
            assert torch.equal(weight[: len(old)], old) and len(weight) == len(old) + 2
            assert strategy.replayed is not None
            assert set(strategy.replayed.y.tolist()) <= set(strategy.network.classifier.labels[: len(old)].tolist())
            assert bool(((strategy.replayed.x >= 0) & (strategy.replayed.x <= 1)).all())
        assert not strategy.optimizer.state
        assert sum(len(group["params"]) for group in strategy.optimizer.param_groups) == len(
            [*strategy.model.parameters(), *strategy.network.parameters()]
        )


@pytest.mark.parametrize("kind", ["open_set", "prior"])
def test_the_order_of_a_boundary(kind: str) -> None:
    strategy = small(replay=kind)
    boundary = Boundary(strategy)
    result = run(strategy, example_stream(epochs=4), boundary)
    assert [event.size + event.missing for event in boundary.events] == [60, 120]  # as many as were learned before
    assert strategy.learned == 60 + boundary.events[-1].size and strategy.session is None
    curves = boundary.events[0].curves()
    assert set(curves) == {"replay/size", "replay/acceptance_rate", "replay/unfiltered", "replay/missing"}
    if kind == "open_set":
        assert boundary.events[0].proposals % TOGETHER == 0
        counts = strategy.replayed.y.bincount()[:4] if strategy.replayed is not None else torch.zeros(0)
        assert boundary.events[-1].missing or counts.tolist() == [30, 30, 30, 30]
    assert float(result.accuracy[2, 2]) > 0.5


def test_each_pass_learns_the_session_and_the_replay_set_once() -> None:
    class Steps(OpenVAE):
        sizes: tuple[int, ...] = ()

        def loss(self, samples: Samples) -> Tensor:
            self.sizes = (*self.sizes, len(samples))
            return super().loss(samples)

    with isolated(0, "strategy"):
        strategy = Steps(example_model(), replay="prior", decoder=(16,))
    run(strategy, example_stream(), max_sessions=2)
    assert strategy.sizes == (*[8] * 7, 4, *[8] * 15)  # 60 samples, then 60 and 60


def test_the_upper_bound_keeps_all_samples_and_says_so() -> None:
    strategy = small(replay="real")
    run(strategy, example_stream())
    assert strategy.replayed is not None and strategy.replayed.x.dtype == torch.uint8
    assert len(strategy.replayed) == 180 and not strategy.rehearsal_free and small().rehearsal_free


def test_fine_tuning_replays_nothing() -> None:
    strategy = small(replay="none")
    boundary = Boundary(strategy)
    run(strategy, example_stream(), max_sessions=1)
    run_again = small(replay="none")
    run(run_again, example_stream())
    assert not boundary.events and run_again.replayed is None


# What bounds the replay -----------------------------------------------------------------------------------------------


def drawn(accept: Callable[[Tensor, Tensor], Tensor], quota: list[int], proposals: int) -> tuple[list[int], int, int, list[int]]:
    latents = draw_latents(
        lambda z: (z[:, 0] > 0).long(), accept, torch.tensor(quota), 3, proposals, torch.Generator().manual_seed(0)
    )
    return latents.y.bincount(minlength=2).tolist(), latents.proposals, latents.accepted, latents.room.tolist()


def test_drawing_ends_with_the_quota_or_the_bound() -> None:
    def everything(z: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(y, dtype=torch.bool)

    assert drawn(everything, [6000, 100], 10**9) == ([6000, 100], 2 * TOGETHER, 2 * TOGETHER, [0, 0])
    assert drawn(lambda z, y: y < 0, [5, 5], 3 * TOGETHER) == ([0, 0], 3 * TOGETHER, 0, [5, 5])
    counts, proposals, _, room = drawn(lambda z, y: y == 1, [7, 9], 2 * TOGETHER)
    assert (counts, proposals, room) == ([0, 9], 2 * TOGETHER, [7, 0])
    assert drawn(everything, [0, 0], 10**9) == ([0, 0], 0, 0, [0, 0])


def test_a_starved_class_is_filled_from_the_prior_and_it_is_said() -> None:
    strategy = small(replay_omega=0.0)  # nothing passes: no probability is below 0
    boundary = Boundary(strategy)
    run(strategy, example_stream(epochs=4), boundary, max_sessions=2)
    event = boundary.events[0]
    assert event.accepted == 0 and event.unfiltered == event.size > 0 and event.proposals == TOGETHER
    assert event.scale == pytest.approx(event.scale) != 1.0  # it was started over
    assert event.curves()["replay/acceptance_rate"] == 0


def test_a_class_without_a_right_answer_is_told_and_not_filtered() -> None:
    class Wrong(OpenVAE):
        def classify(self, z: Tensor) -> Tensor:
            return torch.ones(len(z), dtype=torch.int64)

    with isolated(0, "strategy"):
        strategy = Wrong(example_model(), latent=8, decoder=(16,), proposals=TOGETHER)
    with pytest.warns(UserWarning, match=r"OpenVAE has no outlier model of the classes \[0\]: of their training"):
        run(strategy, example_stream(), max_sessions=1)
    z = torch.randn(5, 8)
    assert bool(strategy.outliers.outlier_probability(z, torch.zeros(5, dtype=torch.int64)).isnan().all())
    assert strategy.novelty(example_stream().tasks[0].test.x[:3]).shape == (3,)


# Answers and refusals -------------------------------------------------------------------------------------------------


def test_novelties() -> None:
    strategy, x = small(), example_stream().tasks[0].test.x
    assert bool((strategy.novelty(x) == 1).all())  # nothing is known
    run(strategy, example_stream(epochs=4), max_sessions=1)
    kinds = strategy.novelties(x)
    mean = strategy.latents(x)[0].detach()
    scores = strategy.scores(x)
    assert torch.equal(strategy.novelty(x), kinds["evt"])
    assert torch.allclose(kinds["evt"], strategy.outliers.outlier_probability(mean, scores.argmax(1)))
    two = scores[:, :2].softmax(1)
    assert torch.allclose(kinds["entropy"], -(two * two.log()).sum(1), atol=1e-6)
    assert bool((kinds["reconstruction"] > 0).all())
    noise = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    strange = strategy.novelties(noise)["reconstruction"]
    assert bool(strange.mean() > kinds["reconstruction"].mean())
    assert torch.equal(small(told_by="entropy").novelty(x), small().novelties(x)["entropy"])


def test_refusals() -> None:
    with pytest.raises(TypeError, match="a linear `head` and an argument `input_shape`, as those of clstream, not Linear"):
        OpenVAE(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"OpenVAE decodes images of \(64,\), .* and those of example are \(1, 8, 8\)"):
        run(OpenVAE(Mlp(64, 6)), example_stream())
    stream = example_stream()
    tasks = [
        replace(task, train=Samples(task.train.x.float(), task.train.y), test=Samples(task.test.x.float(), task.test.y))
        for task in stream.tasks
    ]
    with pytest.raises(ValueError, match=r"of numbers from 0 to 1, not of numbers from [0-9.]+ to 2"):
        run(small(), replace(stream, tasks=tasks))
    with pytest.raises(ValueError, match="OpenVAE learns from images"):
        run(OpenVAE(Mlp(20, 10)), blobs())


def test_the_code_s_encoder() -> None:
    model = BatchNormMlp((1, 8, 8), 6, hidden=(32, 16))
    assert [tuple(weight.shape) for weight in model.parameters()][:4] == [(32, 64), (32,), (32,), (16, 32)]
    run(OpenVAE(model, latent=8, decoder=(16,), proposals=TOGETHER), example_stream())
