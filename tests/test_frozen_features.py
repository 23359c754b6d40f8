"""Methods on frozen features: the closed form over all data, in any order, from any number of learners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from clstream.strategies import NCM, SLDA, ClassMeans, FeCAM, Finetune, LinearProbe, RanPAC, Replay
from torch import Tensor, nn

from clstream import Strategy, run
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.models import Mlp
from clstream.stream import Samples, Stream, Task


class Identity(nn.Module):
    """A network whose features are its inputs; its one weight is not used."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.head = nn.Linear(12, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the inputs."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, classes)."""
        answers: Tensor = self.head(x)
        return answers


def gaussian(seed: int = 0, order: tuple[int, ...] = (0, 1, 2), batch_size: int = 7) -> Stream:
    """Return three tasks of two classes: correlated features from 0 up, 12 of them, of 40 training samples a class."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=draw) / 4 + torch.eye(12)
    centres = 2 + 2 * torch.rand(6, 12, generator=draw)

    def samples(classes: tuple[int, int], n: int) -> Samples:
        y = torch.tensor(classes).repeat(n)
        return Samples((centres[y] + 0.5 * torch.randn(len(y), 12, generator=draw) @ mixing).clamp(min=0), y)

    parts = [(samples((2 * task, 2 * task + 1), 40), samples((2 * task, 2 * task + 1), 15)) for task in range(3)]
    tasks = [Task(place, (2 * task, 2 * task + 1), *parts[task]) for place, task in enumerate(order)]
    return Stream("gaussian", tasks, batch_size=batch_size)


def everything(stream: Stream) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Tensor]:
    """Return all training inputs, float64, their labels, and all test inputs."""
    train = [task.train[:] for task in stream.tasks]
    x = torch.cat([part.x for part in train]).double().numpy()
    return x, torch.cat([part.y for part in train]).numpy(), torch.cat([task.test[:].x for task in stream.tasks])


def normalised(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return rows of length 1."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def solved(strategy: Any, x: Tensor) -> np.ndarray[Any, Any]:
    """Return the scores before they are rounded to float32."""
    return strategy.answer(strategy.solve(strategy.with_waiting()), strategy.features(x)).numpy()


def ncm(strategy: Any, x: Any, y: Any, test: Any) -> Any:
    """Return the scores by the definition."""
    means = np.stack([x[y == label].mean(0) for label in range(6)])
    if strategy.distance == "cosine":
        return normalised(test) @ normalised(means).T
    return -np.stack([((test - mean) ** 2).sum(1) for mean in means], 1)


def slda(strategy: Any, x: Any, y: Any, test: Any) -> Any:
    """Return the scores by the definition."""
    means = np.stack([x[y == label].mean(0) for label in range(6)])
    within = (x - means[y]).T @ (x - means[y]) / len(x)
    precision = np.linalg.inv((1 - strategy.shrinkage) * within + strategy.shrinkage * np.eye(12))
    return test @ precision @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, precision, means)


def ranpac(strategy: Any, x: Any, y: Any, test: Any) -> Any:
    """Return the scores by the definition."""
    project = (lambda rows: rows) if strategy.weights is None else lambda rows: np.maximum(rows @ strategy.weights.numpy(), 0)
    h, hot = project(x), np.eye(6)[y]
    return project(test) @ np.linalg.solve(h.T @ h + strategy.chosen_ridge * np.eye(h.shape[1]), h.T @ hot)


def fecam(strategy: Any, x: Any, y: Any, test: Any) -> Any:
    """Return the scores by the definition."""
    if strategy.tukey is None:
        x, test = normalised(x), normalised(test)
    power = (lambda rows: rows) if strategy.tukey is None else lambda rows: rows**strategy.tukey
    scores = []
    for label in range(6):
        own = power(x[y == label])
        covariance = np.cov(own.T)
        off = covariance[~np.eye(12, dtype=bool)].mean()
        covariance = (
            covariance
            + strategy.shrink_diagonal * np.diag(covariance).mean() * np.eye(12)
            + strategy.shrink_off_diagonal * off * (1 - np.eye(12))
        )
        roots = np.sqrt(np.diag(covariance))
        difference = normalised(power(test)) - normalised(power(x[y == label].mean(0)))
        scores.append(-np.einsum("nd,de,ne->n", difference, np.linalg.pinv(covariance / np.outer(roots, roots)), difference))
    return np.stack(scores, 1)


METHODS: dict[str, tuple[Callable[[nn.Module], Strategy], Any]] = {
    "NCM": (NCM, ncm),
    "NCM, cosine": (lambda model: NCM(model, "cosine"), ncm),
    "SLDA": (SLDA, slda),
    "SLDA, much shrinkage": (lambda model: SLDA(model, 0.3), slda),
    "RanPAC": (lambda model: RanPAC(model, 50, ridge=10.0), ranpac),
    "RanPAC, no projection": (lambda model: RanPAC(model, 0, ridge=0.1), ranpac),
    "RanPAC, ridge chosen": (lambda model: RanPAC(model, 50), ranpac),
    "FeCAM": (FeCAM, fecam),
    "FeCAM, of length 1": (lambda model: FeCAM(model, None, 1.0, 0.0), fecam),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_answers_as_the_closed_form_over_all_data(name: str) -> None:
    make, by_hand = METHODS[name]
    stream = gaussian()
    result = run(strategy := make(Identity()), stream, seed=3)
    x, y, test = everything(stream)
    expected = by_hand(strategy, x, y, test.double().numpy())
    assert np.abs(solved(strategy, test) - expected).max() < 1e-8 * max(1, np.abs(expected).max())
    assert result.average > 0.85 and torch.equal(strategy.predict(test), torch.from_numpy(expected.argmax(1)))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "RanPAC, ridge chosen"])
def test_what_comes_when_does_not_matter(name: str) -> None:
    make, _ = METHODS[name]
    answers = []
    for order, batch_size, epochs in (((0, 1, 2), 7, 1), ((2, 0, 1), 64, 1), ((1, 2, 0), 3, 3)):
        run(strategy := make(Identity()), replace(gaussian(order=order, batch_size=batch_size), epochs=epochs), seed=3)
        answers.append(solved(strategy, everything(gaussian())[2]))
    for scores in answers[1:]:
        assert np.abs(scores - answers[0]).max() < 1e-8 * max(1, np.abs(answers[0]).max())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "RanPAC, ridge chosen"])
def test_learners_that_are_merged_answer_as_one_that_saw_everything(name: str) -> None:
    make, _ = METHODS[name]
    stream = gaussian()
    run(whole := make(Identity()), stream, seed=3)
    learners = []
    for share in range(3):
        parts = [replace(task, train=task.train[torch.arange(share, len(task.train), 3)]) for task in stream.tasks]
        run(learner := make(Identity()), replace(stream, tasks=parts), seed=3)
        learners.append(learner)
    first, *others = learners
    for learner in others:
        first.merge(learner.export())  # type: ignore[attr-defined]  # all of these have it
    test = everything(stream)[2]
    assert np.abs(solved(first, test) - solved(whole, test)).max() < 1e-10 * max(1, np.abs(solved(whole, test)).max())


def test_the_streaming_covariance_is_the_recursion_sample_by_sample() -> None:
    stream = gaussian(batch_size=5)
    run(strategy := SLDA(Identity(), covariance="streaming"), stream)
    means, counts, covariance, updates = np.zeros((6, 12)), np.zeros(6), np.zeros((12, 12)), 0
    for session in stream:
        for batch in next(iter(session)):
            for feature, label in zip(batch.samples.x.double().numpy(), batch.samples.y.tolist(), strict=True):
                difference = feature - means[label]
                covariance = (updates * covariance + updates / (updates + 1) * np.outer(difference, difference)) / (updates + 1)
                means[label] += difference / (counts[label] + 1)
                counts[label] += 1
                updates += 1
    precision = np.linalg.inv((1 - 1e-4) * covariance + 1e-4 * np.eye(12))
    test = everything(stream)[2]
    expected = test.double().numpy() @ precision @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, precision, means)
    assert np.abs(solved(strategy, test) - expected).max() < 1e-8 * np.abs(expected).max()
    with pytest.raises(ValueError, match="depend on the order of samples: merge learners of 'within'"):
        strategy.merge(strategy.export())


def test_the_ridge_is_the_best_of_the_powers_of_ten_on_the_last_fifth() -> None:
    for width in (30, 400):  # fewer, and more than the samples that it is fitted on
        draw = torch.Generator().manual_seed(width)
        features, y = torch.randn(200, 12, generator=draw, dtype=torch.float64), torch.randint(6, (200,), generator=draw)
        strategy = RanPAC(Identity(), width)
        run(strategy, gaussian())
        h, hot = strategy.project(features), torch.eye(6, dtype=torch.float64)[y]
        errors = {}
        for power in range(-8, 9):
            regular = h[:160].T @ h[:160] + 10.0**power * torch.eye(width, dtype=torch.float64)
            errors[10.0**power] = float((h[160:] @ torch.linalg.solve(regular, h[:160].T @ hot[:160]) - hot[160:]).square().mean())
        assert strategy.best_ridge(features, y) == min(errors, key=lambda ridge: errors[ridge])


@pytest.mark.parametrize("name", ["SLDA", "RanPAC", "FeCAM", "FeCAM, of length 1"])
def test_a_covariance_of_fewer_samples_than_features_is_no_obstacle(name: str) -> None:
    make, by_hand = METHODS[name]
    stream = gaussian()
    few = replace(stream, tasks=[replace(task, train=task.train[:6]) for task in stream.tasks])  # three of each class
    run(strategy := make(Identity()), few, seed=3)
    x, y, test = everything(few)
    expected = by_hand(strategy, x, y, test.double().numpy())
    assert np.abs(solved(strategy, test) - expected).max() < 1e-8 * np.abs(expected).max()
    run(strategy := make(Identity()), replace(stream, tasks=[replace(task, train=task.train[:1]) for task in stream.tasks]))
    assert strategy.scores(test)[:, [0, 2, 4]].isfinite().all() and strategy.scores(test)[:, [1, 3, 5]].max() == -torch.inf


def test_fecam_s_distances_are_never_below_zero_where_most_features_are_zero() -> None:
    stream = gaussian()
    silent = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.7  # of each class

    def hush(part: Samples) -> Samples:
        return Samples(part.x.masked_fill(silent[part.y], 0), part.y)

    tasks = [replace(task, train=hush(task.train[:]), test=hush(task.test[:])) for task in stream.tasks]
    result = run(strategy := FeCAM(Identity()), replace(stream, tasks=tasks))
    assert strategy.scores(torch.cat([task.test[:].x for task in tasks])).max() <= 0 and result.average > 0.9


def test_within_a_session_answers_have_what_came_and_nothing_is_moved_by_them() -> None:
    stream = replace(gaussian(), tasks=gaussian().tasks[:1], schedule=None)
    whole = Checkpoints()
    result = run(NCM(Identity()), stream, whole, evaluate_every=2)
    assert result.probes[0, 0] > 0.8 and len(result.probes) == 6  # after 14 of 80 samples
    again = run(NCM(Identity()), stream, evaluate_every=2, resume=whole.load(5))
    assert torch.equal(again.probes, result.probes)


def test_the_network_is_frozen_and_no_pass_counts_twice() -> None:
    model = example_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    once = run(NCM(model), example_stream())
    assert all(torch.equal(before[name], weight) and not weight.requires_grad for name, weight in model.named_parameters())
    thrice = run(NCM(example_model()), example_stream(epochs=3))
    assert torch.equal(once.accuracy, thrice.accuracy)


def test_a_linear_probe_moves_the_head_alone() -> None:
    model = example_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    run(LinearProbe(model), example_stream())
    moved = {name for name, weight in model.named_parameters() if not torch.equal(before[name], weight)}
    assert moved == {"head.weight", "head.bias"}


def test_class_means_follow_the_memory_or_stay_what_the_session_left() -> None:
    stream = example_stream(epochs=3)
    base = Replay(example_model(), capacity=60)
    run(strategy := ClassMeans(base), stream)
    kept = base.memory.all()
    features = nn.functional.normalize(base.model.features(kept.x), dim=1)  # type: ignore[operator]
    means = nn.functional.normalize(torch.stack([features[kept.y == label].mean(0) for label in range(6)]), dim=1)
    assert torch.allclose(strategy.means, means, atol=1e-6)  # type: ignore[arg-type]  # there are some
    run(by_session := ClassMeans(Finetune(example_model()), of="session"), stream, max_sessions=1)
    assert by_session.means is not None and (by_session.means[2:] == 0).all()
    x = stream.tasks[0].train[:].x
    own = nn.functional.normalize(by_session.model.features(x), dim=1)  # type: ignore[operator]
    assert (
        torch.allclose(by_session.scores(x)[:, :2], own @ by_session.means[:2].T)
        and by_session.scores(x)[:, 2:].max() == -torch.inf
    )


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: NCM(nn.Linear(3, 2)), TypeError, "NCM needs a model with a method `features`"),
        (lambda: NCM(3), TypeError, "NCM takes a torch module as its model, not 3"),
        (lambda: NCM(Identity(), dtype="float16"), ValueError, "dtype must be"),
        (lambda: NCM(Identity(), distance="manhattan"), ValueError, "distance must be"),
        (lambda: SLDA(Identity(), shrinkage=0), ValueError, "shrinkage must be above 0"),
        (lambda: RanPAC(Identity(), ridge=0), ValueError, "ridge must be"),
        (lambda: FeCAM(Identity(), tukey=0), ValueError, "tukey must be above 0"),
        (lambda: LinearProbe(nn.Linear(3, 2)), TypeError, "LinearProbe needs a model with a method `features` and a module `head`"),
        (lambda: ClassMeans(Finetune(example_model())), ValueError, "Finetune has no memory to take means over: take of='session'"),
        (
            lambda: ClassMeans(Finetune(nn.Linear(3, 2)), of="session"),
            TypeError,
            "ClassMeans needs a model with a method `features`",
        ),
    ],
)
def test_what_can_not_be_is_refused(build: Callable[[], Strategy], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        build()
    assert words in str(raised.value)


def test_features_below_zero_have_no_power_and_flat_ones_are_asked_for() -> None:
    stream = gaussian()
    below = replace(stream, tasks=[replace(task, train=Samples(task.train[:].x - 3, task.train[:].y)) for task in stream.tasks])
    with pytest.raises(ValueError, match=r"features of Identity are below 0, which have no power of 0\.5: take tukey=None"):
        run(FeCAM(Identity()), below)

    class Maps(Identity):
        def features(self, x: Tensor) -> Tensor:
            return x.view(len(x), 3, 4)

    with pytest.raises(ValueError, match=r"Maps.features must return \(n, features\), not"):
        run(NCM(Maps()), stream)


def test_statistics_that_do_not_fit_are_not_merged() -> None:
    run(first := NCM(Identity()), gaussian())
    run(other := NCM(Mlp((1, 8, 8), 6)), example_stream())
    with pytest.raises(ValueError, match="NCM has statistics of the shapes"):
        first.merge(other.export())
    run(one := RanPAC(Identity(), 20, ridge=1.0), gaussian(), seed=0)
    run(two := RanPAC(Identity(), 20, ridge=1.0), gaussian(), seed=1)
    with pytest.raises(ValueError, match="of another random projection: run learners that are merged with one seed"):
        one.merge(two.export())
    fresh = RanPAC(Identity(), 20, ridge=1.0)
    fresh.classes = 6
    fresh.merge(one.export())
    test = everything(gaussian())[2]
    assert torch.equal(fresh.scores(test), one.scores(test))
