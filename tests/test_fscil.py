"""FSCIL: the baseline against plain cosine training and means by hand, and each trick against its vectors and by itself."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from clstream.strategies import FSCIL
from clstream.strategies.fscil.tricks import dot_regression, etf_columns, last_block, ranked, simplex, turned
from clstream.streams import blobs, few_shot_tasks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import EpochStarted, Samples, Stream, Task, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream, normed_model
from clstream.checks.recorders import Checkpoints
from clstream.checks.retention import InputSearch
from clstream.eval_mode import evaluating
from clstream.losses import nt_xent, supervised_contrastive
from clstream.models import Mlp
from clstream.seeds import isolated

OPTIMIZER = partial(SGD, lr=0.1, momentum=0.9)


TRICKS = [
    {"contrast": 1.0, "self_supervised": 1, "copies": "half_turn", "rotation": 0.5},
    {"etf": "columns", "neck_steps": 3, "subnet": 0.2},
]
"""All of them, in two runs."""


def play(model: nn.Module | None = None, sessions: int | None = None, **options: object) -> FSCIL:
    """Run it on the example stream."""
    with isolated(0, "strategy"):
        strategy = FSCIL(example_model() if model is None else model, OPTIMIZER, **options)  # type: ignore[arg-type]
    run(strategy, example_stream(epochs=3), max_sessions=sessions)
    return strategy


def test_the_baseline_is_plain_cosine_training_and_then_class_means() -> None:
    stream, model = example_stream(epochs=2), example_model()
    with isolated(0, "strategy"):
        strategy = FSCIL(example_model(), OPTIMIZER, schedule="constant")
    result = run(strategy, stream, seed=0)

    class Rows:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            self.rows = getattr(self, "rows", again.head.weight.detach().clone())

    again, seen = FSCIL(example_model(), OPTIMIZER, schedule="constant"), Rows()
    run(again, stream, seen, seed=0, max_sessions=1)  # the rows as the run's seed draws them
    head = nn.Parameter(seen.rows)
    optimizer = OPTIMIZER(list(model.parameters()))
    optimizer.add_param_group({"params": [head]})
    for epoch in stream.session(0):
        for batch in epoch.batches():
            cosines = F.normalize(model.features(batch.samples.x), dim=1) @ F.normalize(head, dim=1).T
            optimizer.zero_grad()
            F.cross_entropy(16 * cosines, batch.samples.y).backward()
            optimizer.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(strategy.model.state_dict()[name], weight)
    with torch.no_grad():
        parts = [task.train[:] for task in stream.tasks]
        means = torch.stack([model.features(part.x[part.y == y]).mean(0) for part in parts for y in part.y.unique()])
        x = torch.cat([task.test.x for task in stream.tasks])
        cosines = F.normalize(model.features(x), dim=1) @ F.normalize(means, dim=1).T
    torch.testing.assert_close(strategy.scores(x), 16 * cosines)
    assert float(result.accuracy.diagonal().min()) > 0.8


def test_only_the_first_session_trains_and_leaves_the_encoder_in_evaluation_mode() -> None:
    model = normed_model()
    first, whole = play(normed_model(), 1), play(model)
    assert all(torch.equal(first.model.state_dict()[name], value) for name, value in model.state_dict().items())
    assert not model.training and (whole.counts == 30).all() and first.counts.tolist() == [30, 30, 0, 0, 0, 0]
    assert torch.equal(first.sums[:2], whole.sums[:2]) and not first.sums[2:].any()  # type: ignore[index]  # they are there
    assert (first.scores(example_stream().tasks[1].test.x)[:, 2:] == float("-inf")).all()


def test_the_learning_rate_falls_by_a_cosine_in_the_first_session() -> None:
    rates: list[float] = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            rates.append(strategy.optimizer.param_groups[1]["lr"])

    strategy = FSCIL(example_model(), OPTIMIZER)
    run(strategy, example_stream(epochs=2), Watch())
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.05, 0.05, 0.05])


def test_supervised_contrast_of_four_rows_by_hand() -> None:
    rows, y = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]], dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    for row, expected in ((0, 0.0024765146), (1, 2.1272234419)):  # of the two with a positive, each by the other's sum
        others = [column for column in range(4) if column != row]
        similar = rows @ rows[row] / 0.1
        assert float(similar[others].logsumexp(0) - similar[1 - row]) == pytest.approx(expected, abs=1e-9)
    assert float(supervised_contrastive(rows, y, 0.1)) == pytest.approx(1.0648499783, abs=1e-9)  # others are left out


def test_contrast_adds_its_loss_and_leaves_the_rest_alone() -> None:
    samples = example_stream().tasks[0].train[:8]
    with isolated(0, "strategy"):
        strategy = FSCIL(example_model(), OPTIMIZER, contrast=0.5, temperature=0.2)
    run(strategy, example_stream(), max_sessions=1)
    with isolated(1, "views"):
        whole = strategy.loss(samples)
    with isolated(1, "views"):
        z = strategy.projection(strategy.model.features(strategy.views(torch.cat([samples.x, samples.x]))))  # type: ignore[misc]
    strategy.contrast = 0.0
    added = 0.5 * supervised_contrastive(z, torch.cat([samples.y, samples.y]), 0.2)
    torch.testing.assert_close(whole - strategy.loss(samples), added)


def test_a_self_supervised_start_learns_without_labels() -> None:
    rates: list[float] = []
    losses: list[Tensor] = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            rates.append(strategy.optimizer.param_groups[0]["lr"])

    with isolated(0, "strategy"):
        strategy = FSCIL(example_model(), OPTIMIZER, self_supervised=2)
    run(strategy, example_stream(epochs=4), Watch(), max_sessions=1)
    assert rates == pytest.approx([0.1, 0.05, 0.1, 0.05])
    samples = example_stream().tasks[0].train[:8]
    for epoch in (1, 2):
        strategy.epoch = epoch
        for y in (samples.y, 1 - samples.y):
            with isolated(1, "views"):
                losses.append(strategy.loss(Samples(samples.x, y)))
    with isolated(1, "views"):
        z = strategy.projection(strategy.model.features(strategy.views(torch.cat([samples.x, samples.x]))))  # type: ignore[misc]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], nt_xent(z, 0.1)) and losses[2] != losses[3]
    with pytest.raises(ValueError, match="FSCIL learns without labels in the first 3 passes, and example has 3: give it more"):
        play(self_supervised=3)


def test_turns_are_told_of_all_four_of_each_image() -> None:
    x = example_stream().tasks[0].train[:8].x
    once = turned(x, 1)
    for _ in range(3):
        once = turned(once, 1)
    assert torch.equal(once, x) and torch.equal(turned(turned(x, 1), 1), turned(x, 2))
    strategy = play(sessions=1, rotation=0.5)
    samples = Samples(x, example_stream().tasks[0].train[:8].y)
    whole, strategy.turn_head, head = strategy.loss(samples), None, strategy.turn_head
    turns = head(strategy.model.features(torch.cat([turned(x, turn) for turn in range(4)])))  # type: ignore[misc]
    expected = 0.5 * F.cross_entropy(turns, torch.tensor([0] * 8 + [1] * 8 + [2] * 8 + [3] * 8))
    torch.testing.assert_close(whole - strategy.loss(samples), expected)
    wide = Samples(torch.zeros(6, 1, 4, 8), torch.arange(6) % 2)
    with pytest.raises(ValueError, match="FSCIL turns images by quarters, which must be square, and those of wide are 4 x 8"):
        run(FSCIL(Mlp((1, 4, 8), 2), rotation=1.0), Stream("wide", [Task(0, (0, 1), wide, wide)]))


def test_copies_have_labels_and_means_of_their_own() -> None:
    strategy = play(copies="half_turn")
    assert strategy.copied_labels(torch.tensor([0, 2])).tolist() == [0, 4, 1, 5]
    assert strategy.counts.tolist() == [30.0] * 12 and sorted(strategy.head.labels.tolist()) == [0, 1, 2, 3]
    stream, model = example_stream(), strategy.model
    x = torch.cat([task.test.x for task in stream.tasks])
    with evaluating(strategy):
        expected = torch.zeros(len(x), 6)
        for task in stream.tasks:
            for y in task.classes:
                own = task.train[:].x[task.train[:].y == y]
                for turns in (0, 2):
                    mean = model.features(own.rot90(turns, (2, 3))).mean(0)
                    expected[:, y] += 8 * F.cosine_similarity(model.features(x.rot90(turns, (2, 3))), mean[None])
    torch.testing.assert_close(strategy.scores(x), expected)


def test_copies_compete_in_one_loss_over_the_labels_of_the_first_session() -> None:
    samples = example_stream().tasks[0].train[:8]
    with isolated(0, "strategy"):
        strategy = FSCIL(example_model(), OPTIMIZER, copies="half_turn")
    run(strategy, example_stream(), max_sessions=1)
    strategy.sums = None  # as it was when the session went on
    features = torch.cat([strategy.model.features(x) for x in (samples.x, turned(samples.x, 2))])
    cosines = F.normalize(features, dim=1) @ F.normalize(strategy.head.weight, dim=1).T
    assert strategy.head.labels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(strategy.loss(samples), F.cross_entropy(16 * cosines, torch.cat([2 * samples.y, 2 * samples.y + 1])))


def test_twelve_copies_are_turns_in_orders_of_channels_and_gray_has_none() -> None:
    with isolated(0, "strategy"):
        strategy = FSCIL(Mlp((3, 4, 4), 2), OPTIMIZER, copies="turns_and_channels")
    x = torch.rand(2, 3, 4, 4)
    copies = strategy.copied(x).unflatten(0, (12, 2))
    assert torch.equal(copies[0], x) and torch.equal(copies[1], x[:, [2, 0, 1]]) and torch.equal(copies[6], turned(x, 2))
    assert len({copy.numpy().tobytes() for copy in copies}) == 12
    with pytest.raises(ValueError, match="needs images of three channels, and those of example have 1: take 'half_turn'"):
        play(copies="turns_and_channels")


def test_an_equiangular_tight_frame_of_four_columns_by_hand() -> None:
    columns = simplex(torch.eye(5, dtype=torch.float64)[:, :4])
    values = {round(value, 9) for value in columns[:4].flatten().tolist()}
    assert values == {0.866025404, -0.288675135} and not columns[4].any()
    gram = columns.T @ columns
    torch.testing.assert_close(gram, torch.full_like(gram, -1 / 3).fill_diagonal_(1))
    h = torch.tensor([[0.8, 0, 0, 0, 0.6]], dtype=torch.float64)
    cosines = h @ columns
    assert cosines[0].tolist() == pytest.approx([0.6928203230] + 3 * [-0.2309401077])
    assert float(dot_regression(h, columns.T[:1])) == pytest.approx(0.0471796770)
    assert float(F.cross_entropy(cosines / 0.1, torch.tensor([0]))) == pytest.approx(2.9188870773e-4, rel=1e-8)
    drawn = etf_columns(8, 6)
    torch.testing.assert_close(drawn @ drawn.T, torch.full((6, 6), -0.2).fill_diagonal_(1), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"frame of 12 labels .* as many features, and the model has 10"):
        FSCIL(Mlp(4, 6, hidden=(10,)), etf="means", copies="half_turn")


@pytest.mark.slow
def test_columns_without_tuning_are_guesses_and_means_beat_both_over_all_classes() -> None:
    stream = few_shot_tasks("digits", base=5, tasks=2, way=5, shots=5, epochs=5, batch_size=32)

    def accuracies(seed: int, **options: object) -> list[float]:
        """Of the new classes when only these five compete, and of all classes."""
        with isolated(seed, "strategy"):
            strategy = FSCIL(Mlp((1, 8, 8), 10, hidden=(64, 32)), partial(SGD, lr=0.03, momentum=0.9), **options)  # type: ignore[arg-type]
        result = run(strategy, stream, seed=seed, evaluate_at="end")
        return [float(result.task_accuracy[0, 1]), float(result.measured["accuracy"][0, -1])]

    untuned: dict[str, object] = {"etf": "columns", "neck_steps": 0}
    guessed, tuned, learned, means = (
        torch.tensor([accuracies(seed, **options) for seed in range(6)])
        for options in (untuned, {"etf": "columns"}, untuned | {"subnet": 0.5, "subnet_lr": 0.1, "subnet_steps": 100}, {})
    )
    error = float(guessed[:, 0].std()) / math.sqrt(6)
    assert abs(float(guessed[:, 0].mean()) - 0.2) < 3 * error and error < 0.1
    assert min(float(tuned[:, 0].mean()), float(learned[:, 0].mean())) > 0.2 + 3 * error
    assert float(tuned[:, 0].mean()) > float(means[:, 0].mean()) > 0.2 + 3 * error  # a neck is fitted to the new samples
    assert float(means[:, 1].mean()) > max(float(accuracies[:, 1].mean()) for accuracies in (guessed, tuned, learned))


@pytest.mark.slow
def test_columns_are_what_the_first_session_learns_and_what_answers() -> None:
    samples, x = example_stream().tasks[0].train[:8], torch.cat([task.test.x for task in example_stream().tasks])
    for etf in ("means", "columns"):
        strategy = play(etf=etf)
        neck = nn.Identity() if strategy.neck is None else strategy.neck

        def directions(x: Tensor, whole: FSCIL = strategy, neck: nn.Module = neck) -> Tensor:
            return F.normalize(neck(whole.model.features(x)), dim=1)  # type: ignore[operator]

        cosines = (directions(samples.x) * strategy.columns[samples.y]).sum(1)
        torch.testing.assert_close(strategy.loss(samples), (cosines - 1).square().mean() / 2)
        rows = F.normalize(strategy.sums, dim=1) if etf == "means" else strategy.columns  # type: ignore[arg-type]  # they are there
        torch.testing.assert_close(strategy.scores(x), 16 * directions(x) @ rows.T)
    first, whole, untouched = play(sessions=1, etf="columns"), play(etf="columns"), play(etf="columns", neck_steps=0)
    assert all(torch.equal(first.model.state_dict()[name], value) for name, value in whole.model.state_dict().items())
    assert torch.equal(first.neck.weight, untouched.neck.weight) and not torch.equal(first.neck.weight, whole.neck.weight)  # type: ignore[union-attr]


def test_which_weights_learn_by_hand() -> None:
    weight = torch.tensor([0.1, -0.5, 0.3, 0.05, -0.2, 0.4, -0.35, 0.01, 0.25, -0.15])
    for share, which, expected in (
        (0.1, "smallest", [7]),
        (0.1, "largest", [1]),
        (0.3, "smallest", [0, 3, 7]),
        (0.3, "largest", [1, 5, 6]),
    ):
        assert ranked(weight, share, which).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("etf", ["none", "columns"])
def test_a_subnet_learns_later_sessions_and_all_else_stays(etf: str) -> None:
    first, whole = (play(normed_model(), sessions, subnet=0.1, subnet_lr=0.1, etf=etf) for sessions in (1, None))
    (before,), (after,), (mask,) = last_block(first.model), last_block(whole.model), whole.masks
    assert torch.equal(mask, ranked(before, 0.1, "smallest")) and torch.equal(mask, first.masks[0]) and int(mask.sum()) == 4
    assert (before[mask] != after[mask]).all() and torch.equal(before[~mask], after[~mask])
    rest = whole.model.state_dict()  # biases and batch norm, its statistics too
    assert all(torch.equal(value, rest[name]) for name, value in first.model.state_dict().items() if name != "stages.0.weight")
    assert torch.equal(first.sums[:2], whole.sums[:2])  # type: ignore[index]  # old means are not taken anew
    task = example_stream().tasks[2]
    with evaluating(whole):
        new = whole.model.features(task.train.x[task.train.y == 4]).sum(0)  # type: ignore[operator]
    torch.testing.assert_close(whole.sums[4], new)  # type: ignore[index]  # and new ones with the encoder as it is then


def test_steps_of_a_subnet_lower_the_loss_of_the_session() -> None:
    plain, tuned = play(sessions=2), play(sessions=2, subnet=1.0, subnet_lr=0.01, subnet_steps=20)
    task = example_stream().tasks[1]
    losses = [strategy.label_loss(strategy.features(task.train.x), task.train.y).item() for strategy in (plain, tuned)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scale": 0.0}, "scale must be a finite number above 0, not 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant"),
        ({"contrast": -1}, "contrast must be a finite number of at least 0, not -1"),
        ({"self_supervised": -1}, "self_supervised must be a whole number of at least 0, not -1"),
        ({"rotation": -1}, "rotation must be a finite number of at least 0, not -1"),
        ({"copies": "twice"}, "copies must be one of none, half_turn, turns_and_channels, not 'twice'"),
        ({"etf": "rows"}, "etf must be one of none, means, columns, not 'rows'"),
        ({"neck_steps": -1}, "neck_steps must be a whole number of at least 0, not -1"),
        ({"neck_lr": 0}, "neck_lr must be a finite number above 0, not 0"),
        ({"subnet": 1.5}, "subnet must be a finite number from 0 to 1, not 1.5"),
        ({"subnet_of": "all"}, "subnet_of must be one of smallest, largest, not 'all'"),
        ({"subnet_steps": -1}, "subnet_steps must be a whole number of at least 0, not -1"),
        ({"subnet_lr": 0}, "subnet_lr must be a finite number above 0, not 0"),
        ({"temperature": 0}, "temperature must be a finite number above 0, not 0"),
        ({"projection": 0}, "projection must be a whole number of at least 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FSCIL(example_model(), **options)  # type: ignore[arg-type]


def test_models_without_features_are_refused() -> None:
    with pytest.raises(TypeError, match=r"FSCIL needs a model with a method `features` and a linear `head`, .* not Linear"):
        FSCIL(nn.Linear(3, 2))
    model = Mlp(3, 2)
    model.stages = nn.Sequential(nn.Flatten())
    with pytest.raises(TypeError, match=r"subnet of FSCIL needs a model with `stages`, .* which Mlp hasn't"):
        FSCIL(model, subnet=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("tricks", TRICKS, ids=str)
def test_with_tricks_it_resumes_to_the_bit_and_keeps_no_samples(tricks: dict[str, object]) -> None:
    stream, expected = example_stream((0, 1, 0, 2), epochs=2, batch_size=20), Checkpoints()

    def build() -> FSCIL:
        with isolated(0, "strategy"):
            return FSCIL(example_model(), OPTIMIZER, **tricks)  # type: ignore[arg-type]

    whole = run(build(), stream, expected, search := InputSearch(), seed=0)
    assert search.path is None
    for number in range(0, len(expected.written) - 1, 4):
        rest = Checkpoints(every=0)
        resumed = run(build(), stream, rest, seed=0, resume=expected.load(number))
        assert difference(expected.load(-1), rest.load(-1)) is None and torch.equal(whole.main, resumed.main)


@pytest.mark.parametrize("trick", [{"contrast": 1.0}, {"self_supervised": 1}, {"rotation": 1.0}, {"copies": "half_turn"}])
def test_tricks_on_images_refuse_what_is_none(trick: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(trick))} of FSCIL needs images .*, and blobs has inputs of shape \(20,\)"):
        run(FSCIL(Mlp(20, 10), **trick), blobs())  # type: ignore[arg-type]
