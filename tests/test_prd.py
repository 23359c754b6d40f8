"""PRD against the numbers and invariants of its definition, and the augmentation that it comes with."""

from __future__ import annotations

import colorsys
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import PRD, Finetune
from clstream.strategies.prd import over_classes, over_samples
from clstream.streams import blobs, from_tensors, recorded, split_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchReady, EpochStarted, Samples, SessionEnded, SessionStarted, Strategy, Stream, TaskStarted, on, run
from clstream.augmentations import CropFlipJitter, crop_and_flip, gray
from clstream.checks import example_model, example_stream
from clstream.metrics import average_accuracy
from clstream.models import ConvNet, Mlp, ResNet18
from clstream.recording import record
from clstream.seeds import isolated
from clstream.serialization import capture
from clstream.serialization.capture import references_of

double = partial(torch.tensor, dtype=torch.float64)

# Features of four views, rows 0 and 1 the first views of two samples, and those that the teacher sees; prototypes of an old task,
# the teacher's, and those of the task that goes on.
H = double([[1, 2, 0.5], [0.5, 0.2, 1.5], [0.8, 1.5, 0.7], [0.3, 0.4, 1.2]])
BEFORE = double([[0.9, 1.8, 0.6], [0.6, 0.1, 1.4], [0.7, 1.6, 0.5], [0.4, 0.3, 1.0]])
OLD = double([[0.2, 0.1, -0.1], [0, 0.3, 0.2]])
OLD_BEFORE = double([[0.1, 0.2, -0.1], [0.1, 0.2, 0.2]])
CURRENT = double([[0.3, 0.4, 0], [0.1, -0.2, 0.5]])
Y = torch.tensor([2, 3, 2, 3])

SC, PROTOTYPE, RELATION = 0.0716318829, 0.1207443834, 0.0086687771
near = partial(pytest.approx, abs=1e-9)


class Given(nn.Module):
    """Its features are the inputs, or what it was given for them."""

    def __init__(self, answers: Tensor | None = None) -> None:
        super().__init__()
        self.head, self.answers = nn.Linear(3, 4), answers

    def features(self, x: Tensor) -> Tensor:
        if self.answers is not None:
            assert torch.equal(x, H)  # the teacher sees the very views that the model sees
        return x if self.answers is None else self.answers

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def worked_example(**options: object) -> PRD:
    strategy = PRD(Given(), **options)
    strategy.projection = nn.Identity()
    strategy.prototypes.grow([0, 1, 2, 3])
    strategy.prototypes.weight.data = torch.cat([OLD, CURRENT])
    strategy.teacher, strategy.old_prototypes = Given(BEFORE), OLD_BEFORE
    strategy.old = torch.tensor([[0, 1]])
    draws = iter([H[:2], H[2:]] * 10)
    strategy.augment = lambda x: next(draws)
    return strategy


def model_for(stream: Stream) -> nn.Module:
    return Mlp(stream.input_shape, stream.classes, hidden=(32,))


# The numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SC + 2 * PROTOTYPE + 4 * RELATION),
        ({"alpha": 0, "beta": 0}, SC),
        ({"alpha": 0, "beta": 0, "base_temperature": None}, 0.0501423180),
        ({"alpha": 1, "beta": 0}, SC + PROTOTYPE),
        ({"alpha": 0, "beta": 1}, SC + RELATION),
        ({"alpha": 0, "beta": 1, "relation": "samples"}, SC + 0.0073274667),
        ({"alpha": 0, "beta": 1, "relation": "samples", "relation_temperature": 0.1}, SC + 0.2280086462),
    ],
)
def test_the_loss_of_the_worked_example(options: dict, expected: float) -> None:
    loss = worked_example(**options).loss(Samples(H[:2], Y[:2]))
    assert loss.item() == near(expected)


def test_the_gradients_of_the_worked_example() -> None:
    strategy = worked_example()
    weight = strategy.prototypes.weight
    strategy.prototype_loss(H, Y).backward()
    expected = double([[0.126398, -0.094799, -0.299484], [-0.111606, -0.471564, -0.166305]])
    assert torch.allclose(weight.grad, torch.cat([torch.zeros_like(OLD), expected]), rtol=0, atol=1e-6)
    weight.grad = None
    features = H.clone().requires_grad_()
    strategy.relation_loss(features, BEFORE).backward()
    assert torch.allclose(features.grad[0], double([-0.010013, 0.005197, 0.011809]), rtol=0, atol=1e-6)
    expected = double([[0.036276, -0.173147, -0.100594], [0.072209, 0.041904, -0.062856]])
    assert torch.allclose(weight.grad, torch.cat([expected, torch.zeros_like(CURRENT)]), rtol=0, atol=1e-6)


def test_the_other_readings_of_the_relation_in_the_worked_example() -> None:
    """KL in the other direction, and scores that are no cosines: what the numbers of the other forms are made of."""
    old = torch.tensor([[0, 1]])
    unit = partial(F.normalize, dim=1)
    cosines, cosines_before = unit(H) @ unit(OLD).T, unit(BEFORE) @ unit(OLD_BEFORE).T
    assert over_samples(cosines_before, cosines, old).item() == near(0.0071755277)
    assert over_samples(cosines_before / 0.1, cosines / 0.1, old).item() == near(0.2470100295)
    assert over_samples(BEFORE @ unit(OLD_BEFORE).T, H @ unit(OLD).T, old).item() == near(0.0164382393)


def test_the_answers_of_the_worked_example() -> None:
    strategy = worked_example()
    assert strategy.predict(H).tolist() == [2, 3, 2, 3]
    cosines = F.normalize(H, dim=1) @ F.normalize(torch.cat([OLD, CURRENT]), dim=1).T
    torch.testing.assert_close(strategy.scores(H), cosines)
    tasks = blobs(tasks=2, classes=4).tasks
    assert strategy.predict(H, tasks[0]).tolist() == cosines[:, :2].argmax(1).tolist()
    assert strategy.predict(H, tasks[1]).tolist() == (2 + cosines[:, 2:].argmax(1)).tolist()


def test_tasks_of_any_size_are_summed_each_by_itself() -> None:
    torch.manual_seed(0)
    now, then = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    groups = [[0, 4, 1], [2], [3, 5]]
    old = torch.tensor([[0, 4, 1], [2, -1, -1], [3, 5, -1]])
    for ours, dim, reduction in ((over_classes, 1, "batchmean"), (over_samples, 0, "sum")):
        expected = torch.zeros((), dtype=torch.float64)
        for rows in groups:
            one, two = (now, then) if dim == 1 else (then, now)  # KL(then || now) over classes, KL(now || then) over samples
            expected += F.kl_div(one[:, rows].log_softmax(dim), two[:, rows].softmax(dim), reduction=reduction)
        loss = ours(now, then, old)
        assert loss.item() == near(expected.item())
        (mine,), (theirs,) = torch.autograd.grad(loss, now), torch.autograd.grad(expected, now)
        torch.testing.assert_close(mine, theirs)
        assert not mine[:, 6].any()  # no old task has it; -1 stands for it where rows are filled up


# Who is moved by what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "moved"),
    [((1, 0, 0), {"encoder", "projection"}), ((0, 1, 0), {"current"}), ((0, 0, 1), {"encoder", "old"})],
)
@pytest.mark.parametrize("relation", ["classes", "samples"])
def test_each_term_moves_what_it_should(relation: str, weights: tuple[int, int, int], moved: set[str]) -> None:
    strategy, stream = PRD(example_model(), relation=relation), example_stream(epochs=2)
    run(strategy, stream, max_sessions=1)
    strategy.open_task(TaskStarted(stream.tasks[1]))
    strategy.grow_prototypes(SessionStarted(stream.session(1)))
    strategy.old_prototypes += 0.1  # so that there is a difference to the teacher
    strategy.optimizer.zero_grad()
    strategy.scale, strategy.alpha, strategy.beta = weights
    strategy.loss(stream.tasks[1].train[:12]).backward()
    rows = strategy.prototypes.weight.grad
    touched = {
        "encoder": any(each.grad is not None and each.grad.any() for each in strategy.model.stages.parameters()),
        "projection": any(each.grad is not None and each.grad.any() for each in strategy.projection.parameters()),
        "old": rows is not None and rows[:2].any(1).all(),
        "current": rows is not None and rows[2:].any(1).all(),
    }
    assert {name for name, each in touched.items() if each} == moved
    partly = {"old": rows is not None and rows[:2].any(), "current": rows is not None and rows[2:].any()}
    assert {name for name, each in partly.items() if each} == moved & {"old", "current"}
    assert all(each.grad is None for each in strategy.teacher.parameters())
    assert all(each.grad is None for each in strategy.model.head.parameters())


class AtFirstBatch:
    """Looks at the relation distillation on each batch, before it is learned."""

    def __init__(self, strategy: PRD) -> None:
        self.strategy = strategy
        self.first: list[float] = []
        self.slopes: list[float] = []
        self.later: list[float] = []

    @on(BatchReady)
    def look(self, event: BatchReady) -> None:
        strategy, x = self.strategy, event.batch.samples.x
        if strategy.teacher is None:
            return
        features = strategy.model.features(x)
        loss = strategy.relation_loss(features, strategy.teacher.features(x))
        if (event.batch.index, event.batch.epoch) != (0, 0):
            self.later.append(loss.item())
            return
        self.first.append(loss.item())
        weights = [each for each in strategy.model.stages.parameters() if each.requires_grad]
        slopes = torch.autograd.grad(loss, [*weights, strategy.prototypes.weight])
        self.slopes.append(max(float(each.abs().max()) for each in slopes))


@pytest.mark.parametrize("relation", ["classes", "samples"])
@pytest.mark.parametrize("normed", [False, True])
def test_nothing_is_distilled_at_the_first_step_of_a_task(relation: str, normed: bool) -> None:
    model = ResNet18((1, 8, 8), 6, width=2) if normed else example_model()
    strategy = PRD(model, partial(SGD, lr=0.05, momentum=0.9), relation=relation)
    watch = AtFirstBatch(strategy)
    run(strategy, example_stream(batch_size=20), watch)
    assert watch.first == [0, 0]
    assert max(watch.slopes) < 1e-6
    assert min(watch.later) > 1e-7


def test_a_teacher_in_evaluation_mode_differs_with_batch_norm_only() -> None:
    for model, differs in ((ResNet18((1, 8, 8), 6, width=2), True), (example_model(), False)):
        strategy = PRD(model, teacher_mode="eval")
        watch = AtFirstBatch(strategy)
        run(strategy, example_stream(), watch)
        assert (min(watch.first) > 0) is differs
        assert not strategy.teacher.training and strategy.model.training
    before, after = [each.clone() for each in strategy.teacher.buffers()], list(strategy.teacher.buffers())
    assert all(map(torch.equal, before, after))


# Invariants ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["classes", "samples"])
def test_lengths_of_prototypes_don_t_count(relation: str) -> None:
    one, two = worked_example(relation=relation), worked_example(relation=relation)
    two.prototypes.weight.data *= double([[3], [0.2], [7], [0.5]])
    two.old_prototypes = two.old_prototypes * double([[0.1], [4]])
    batch = Samples(H[:2], Y[:2])
    assert one.loss(batch).item() == near(two.loss(batch).item())
    torch.testing.assert_close(one.scores(H), two.scores(H))


@pytest.mark.parametrize("relation", ["classes", "samples"])
def test_the_order_of_samples_and_of_views_doesn_t_count(relation: str) -> None:
    strategy = worked_example(relation=relation)
    expected = strategy.loss(Samples(H[:2], Y[:2])).item()
    strategy.teacher.answers = None  # its features are those of the model, in whatever order
    plain = strategy.loss(Samples(H[:2], Y[:2])).item()
    assert plain != expected
    for first, second, y in ((H[2:], H[:2], Y[:2]), (H[[1, 0]], H[[3, 2]], Y[[1, 0]])):
        draws = iter([first, second])
        strategy.augment = lambda x, draws=draws: next(draws)
        assert strategy.loss(Samples(first, y)).item() == near(plain)


@pytest.mark.parametrize(("beta", "stays"), [(0.0, True), (4.0, False)])
def test_old_prototypes_are_moved_by_the_distillation_alone(beta: float, stays: bool) -> None:
    rows: list[Tensor] = []

    class Watch:
        @on(SessionEnded)
        def see(self, event: SessionEnded) -> None:
            rows.append(strategy.prototypes.weight.detach().clone())

    strategy = PRD(example_model(), partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1), beta=beta)
    run(strategy, example_stream(epochs=2), Watch())
    assert [len(each) for each in rows] == [2, 4, 6]
    assert torch.equal(rows[1][:2], rows[0]) is stays
    assert torch.equal(rows[2][:4], rows[1]) is stays
    assert (strategy.teacher is None) is stays  # without distillation none is kept


def test_nothing_of_the_data_is_kept() -> None:
    """What is held after a run is as large for twice as many samples, and none of it lies in the stream's memory."""

    def held(each: int) -> int:
        stream = blobs(tasks=3, classes=6, train_per_class=each)
        torch.manual_seed(0)
        strategy = PRD(model_for(stream))
        references = references_of([strategy], stream)
        run(strategy, stream)
        nodes = capture([strategy], references)[0]["nodes"]
        assert not [node["path"] for node in nodes if "place" in node]
        return sum(torch.Size(node["size"]).numel() for node in nodes if node["kind"] == "tensor")

    assert held(40) == held(80)


# Tasks --------------------------------------------------------------------------------------------------------------------


class Old:
    """Writes down the labels that are old in each task, by the task that they came with."""

    def __init__(self, strategy: PRD) -> None:
        self.strategy, self.seen = strategy, []

    @on(TaskStarted)
    def see(self, event: TaskStarted) -> None:
        labels = self.strategy.prototypes.labels
        self.seen.append([labels[rows[rows >= 0]].tolist() for rows in self.strategy.old])


def test_classes_of_a_task_that_comes_again_are_current() -> None:
    strategy = PRD(example_model())
    watch = Old(strategy)
    run(strategy, example_stream((0, 1, 0, 2, 1)), watch)
    # of a task that comes twice, the first half of the example has one class, and the second half the other
    assert watch.seen == [[], [[0]], [[2]], [[0, 1], [2]], [[0, 1], [4, 5]]]
    assert strategy.prototypes.labels.tolist() == [0, 2, 1, 4, 5, 3]
    assert strategy.arrived == {0: [0, 2], 1: [1, 5], 2: [3, 4]}


def test_tasks_of_unequal_size_in_any_order() -> None:
    strategy = PRD(model_for(stream := blobs(tasks=3, classes=7, class_order=[6, 2, 4, 0, 5, 1, 3], epochs=3)))
    watch = Old(strategy)
    result = run(strategy, stream, watch)
    assert watch.seen == [[], [[2, 4, 6]], [[2, 4, 6], [0, 5]]]
    assert float(result.accuracy.diagonal().min()) > 0.5


def test_a_prototype_is_made_when_its_class_first_arrives() -> None:
    """Here each session of a task has one of its two classes."""
    x, y = torch.rand(4, 64), torch.arange(4)
    stream = from_tensors(x, y, x, y, tasks=2, sessions_per_task=2)
    strategy = PRD(model_for(stream))
    run(strategy, stream, max_sessions=1)
    first = stream.session(0).classes
    assert len(first) == 1 and strategy.prototypes.labels.tolist() == first
    assert strategy.scores(x).isfinite().sum(0).tolist() == [4 * (label in first) for label in range(4)]
    strategy = PRD(model_for(stream))
    watch = Old(strategy)
    run(strategy, stream, watch)
    assert sorted(strategy.prototypes.labels.tolist()) == [0, 1, 2, 3]
    assert [[sorted(task) for task in old] for old in watch.seen] == [[], [[0, 1]]]


def test_the_optimizer_goes_on_and_prototypes_have_no_momentum_or_decay() -> None:
    strategy = PRD(example_model(), prototype_lr=0.3)
    optimizer = strategy.optimizer
    run(strategy, example_stream())
    assert strategy.optimizer is optimizer
    assert [(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.01, 0.9, 1e-4), (0.01, 0.9, 1e-4), (0.3, 0.0, 0.0),
    ]  # fmt: skip
    assert optimizer.param_groups[2]["params"] == [strategy.prototypes.weight]
    run(PRD(example_model(), partial(Adam, lr=1e-3)), example_stream(epochs=2))  # it has no momentum to be set


def test_learning_rates_fall_at_the_milestones_and_begin_anew_with_each_session() -> None:
    rates: list[list[float]] = []

    class Watch:
        @on(EpochStarted)
        def see(self, event: EpochStarted) -> None:
            rates.append([group["lr"] for group in strategy.optimizer.param_groups])

    strategy = PRD(example_model(), partial(SGD, lr=0.1), prototype_lr=1.0, milestones=(1, 3), first_task_steps=2)
    run(strategy, example_stream(epochs=3), Watch())
    factors = [1, 0.1, 0.01, 1, 0.1, 0.1, 1, 0.1, 0.1]  # the first task's epochs count twice
    assert rates == [[pytest.approx(rate * factor) for rate in (0.1, 0.1, 1.0)] for factor in factors]


def test_the_first_task_may_take_several_steps_a_batch_each_with_fresh_views() -> None:
    calls: list[int] = []

    class Counting(PRD):
        def loss(self, samples: Samples) -> Tensor:
            calls.append(len(self.arrived))
            return super().loss(samples)

    stream = example_stream(batch_size=20)
    draws: list[Tensor] = []
    object.__setattr__(stream, "augment", lambda x: draws.append(torch.rand(1)) or x)
    run(Counting(example_model(), first_task_steps=3), stream)
    assert calls == [1] * 9 + [2] * 3 + [3] * 3
    assert len(draws) == 1 + 2 * len(calls)  # once before anything is learned, to see that it gives inputs
    assert len(torch.cat(draws).unique()) == len(draws)


def test_distillation_keeps_tasks_apart_and_prototypes_keep_classes() -> None:
    """On digits: without distillation the old tasks are lost, and fine-tuning knows the last two classes only."""
    stream = split_digits(batch_size=32)

    def play(strategy: type[Strategy], **options: object) -> tuple[float, float]:
        with isolated(0, "model"):
            made = strategy(Mlp(stream.input_shape, stream.classes, hidden=(100,)), **options)
        result = run(made, stream)
        return result.average_accuracy, average_accuracy(result.task_accuracy, result.taught)

    assert play(PRD)[1] > play(PRD, beta=0)[1] + 0.1
    assert play(PRD, optimizer=partial(SGD, lr=0.003, momentum=0.9), prototype_lr=0.03)[0] > play(Finetune)[0] + 0.1


# What is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": -1}, "alpha must be a finite number of at least 0"),
        ({"beta": float("nan")}, "beta must be a finite number of at least 0"),
        ({"relation": "tasks"}, "relation must be one of classes, samples, not 'tasks'"),
        ({"views": "crop"}, "views must be one of stream, jitter, not 'crop'"),
        ({"teacher_mode": "off"}, "teacher_mode must be one of train, eval, not 'off'"),
        ({"clamp_quirk": True}, "clamp_quirk is of the colour jitter: it needs views='jitter'"),
        ({"temperature": 0}, "temperature must be a finite number above 0, not 0"),
        ({"base_temperature": -1.0}, "base_temperature must be a finite number above 0"),
        ({"relation_temperature": float("nan")}, "relation_temperature must be a finite number above 0"),
        ({"prototype_lr": 0.0}, "prototype_lr must be a finite number above 0"),
        ({"first_task_steps": 0}, "first_task_steps must be a whole number of at least 1"),
        ({"projection": (8, 0)}, "out must be a whole number of at least 1"),
        ({"milestones": (1.5,)}, "must be a whole number of at least 0, not 1.5"),
    ],
)
def test_bad_options_are_refused(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        PRD(example_model(), **options)


def test_models_and_streams_that_can_t_be_are_refused_before_anything_is_learned() -> None:
    with pytest.raises(TypeError, match="PRD needs a model with `features` and a linear `head`, as those of clstream, not Linear"):
        PRD(nn.Linear(3, 4))
    stream = blobs(scenario="domain")
    with pytest.raises(ValueError, match="PRD is for tasks that bring new classes, and blobs is domain-incremental"):
        run(PRD(model_for(stream)), stream)
    with pytest.raises(ValueError, match="views='jitter' is for images"):
        run(PRD(model_for(blobs()), views="jitter"), blobs())
    with pytest.raises(ValueError, match="PRD needs boundaries, which blobs hides"):
        run(PRD(model_for(blobs())), blobs(boundaries=False))


# Views --------------------------------------------------------------------------------------------------------------------


def pictures(n: int = 64, channels: int = 3) -> Tensor:
    return torch.randint(256, (n, channels, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("clamp_quirk", [False, True])
def test_jittered_views_are_images_from_0_to_1_of_the_same_shape(channels: int, clamp_quirk: bool) -> None:
    views, x = CropFlipJitter(clamp_quirk=clamp_quirk), pictures(channels=channels)
    kept = x.clone()
    torch.manual_seed(0)
    one = views(x)
    assert one.shape == x.shape and one.dtype == torch.float32
    assert float(one.min()) >= 0 and float(one.max()) <= 1
    assert torch.equal(x, kept) and not torch.equal(one, views(x))
    torch.manual_seed(0)
    torch.testing.assert_close(views(x.float() / 255), one)
    assert len(views(x[:1].expand(32, -1, -1, -1)).flatten(1).unique(dim=0)) > 29  # each image in a way of its own


def test_without_jitter_and_grayscale_the_views_are_crops_and_flips() -> None:
    torch.manual_seed(3)
    plain = crop_and_flip(pictures()).float() / 255
    torch.manual_seed(3)
    assert torch.equal(CropFlipJitter(jitter=0, grayscale=0)(pictures()), plain)


def test_each_part_of_the_jitter_does_its_own() -> None:
    x = pictures() / 255
    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    torch.testing.assert_close(CropFlipJitter(**nothing).jittered(x), x)

    brighter = CropFlipJitter(**nothing | {"brightness": 0.4}).jittered(x)
    inside = (brighter > 0) & (brighter < 1)
    for before, after, seen in zip(x, brighter, inside, strict=True):
        added = (after - before)[seen]
        assert float(added.max() - added.min()) < 1e-6 and abs(float(added[0])) <= 0.4
    contrast = CropFlipJitter(**nothing | {"contrast": 0.4}).jittered(x)
    for before, after in zip(x, contrast, strict=True):
        factor = (after / before)[(after < 1) & (before > 0)]
        assert float(factor.max() - factor.min()) < 1e-5 and 0.6 <= float(factor[0]) <= 1.4
    coloured = CropFlipJitter(**nothing | {"saturation": 0.4}).jittered(x)
    for before, after in zip(x[:8], coloured[:8], strict=True):
        pairs = [
            (colorsys.rgb_to_hsv(*one.tolist()), colorsys.rgb_to_hsv(*two.tolist()))
            for one, two in zip(before.flatten(1).T, after.flatten(1).T, strict=True)
        ]
        factors = [two[1] / one[1] for one, two in pairs if one[1] > 0.05 and two[1] < 0.999]
        assert max(factors) - min(factors) < 1e-3 and 0.6 <= factors[0] <= 1.4
        assert all(one[2] == pytest.approx(two[2], abs=1e-6) for one, two in pairs)  # the value stays
        assert all(abs(one[0] - two[0]) < 1e-3 for one, two in pairs if one[1] > 0.05)  # and the hue


def test_the_clamping_quirk_makes_dark_pixels_mid_grey_in_four_of_five_views() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4000, 1, 8, 8)
    quirky = CropFlipJitter(clamp_quirk=True, grayscale=0)(x)
    share = float((quirky.flatten(1).amin(1) >= 0.5).float().mean())
    assert share == pytest.approx(0.8, abs=0.03)
    assert float((CropFlipJitter(grayscale=0)(x).flatten(1).amin(1) >= 0.5).float().mean()) < 0.01


def test_gray_images_have_one_value_in_all_channels() -> None:
    assert gray(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).flatten().tolist() == pytest.approx([0.299] * 3)
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(gray(x), x)
    views = CropFlipJitter(jitter=0)(pictures(2000))
    share = (views == views[:, :1]).flatten(1).all(1).float().mean()
    assert float(share) == pytest.approx(0.2, abs=0.03)


def test_views_of_its_own_stand_in_for_the_stream_s() -> None:
    stream, drawn = example_stream(), []
    object.__setattr__(stream, "augment", lambda x: drawn.append(len(x)) or x)
    run(PRD(ConvNet((1, 8, 8), 6, channels=(2, 2, 2), hidden=8), views="jitter", clamp_quirk=True), stream, max_sessions=1)
    assert len(drawn) == 1  # tried before anything is learned, and not drawn then


def test_a_recording_of_a_stream_names_its_jitter(tmp_path: Path) -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    stream = from_tensors(x, y, x, y, tasks=1, augment=CropFlipJitter(brightness=0.1))
    assert recorded(record(stream, tmp_path / "jittered.clstream"), data=stream).augment == CropFlipJitter(brightness=0.1)
    run(PRD(ConvNet((1, 8, 8), 2, channels=(2, 2, 2), hidden=8)), stream)
