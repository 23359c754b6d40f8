"""PRD over a run: what is distilled and when, prototypes task by task, learning rates, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import PRD, Finetune
from clstream.streams import blobs, from_tensors, split_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam

from clstream import BatchReady, EpochStarted, Samples, Strategy, Stream, TaskStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.metrics import average_accuracy
from clstream.models import Mlp, ResNet18
from clstream.seeds import isolated
from clstream.serialization import capture
from clstream.serialization.capture import references_of


def model_for(stream: Stream) -> nn.Module:
    return Mlp(stream.input_shape, stream.classes, hidden=(32,))


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
        weights = [weight for weight in strategy.model.stages.parameters() if weight.requires_grad]
        slopes = torch.autograd.grad(loss, [*weights, strategy.prototypes.weight])
        self.slopes.append(max(float(slope.abs().max()) for slope in slopes))


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


@pytest.mark.slow
def test_a_teacher_in_evaluation_mode_differs_with_batch_norm_only() -> None:
    for model, differs in ((ResNet18((1, 8, 8), 6, width=2), True), (example_model(), False)):
        strategy = PRD(model, teacher_mode="eval")
        watch = AtFirstBatch(strategy)
        run(strategy, example_stream(), watch)
        assert (min(watch.first) > 0) is differs
        assert not strategy.teacher.training and strategy.model.training
    before, after = [buffer.clone() for buffer in strategy.teacher.buffers()], list(strategy.teacher.buffers())
    assert all(map(torch.equal, before, after))


def test_nothing_of_the_data_is_kept() -> None:
    """What is held after a run is as large for twice as many samples, and none of it lies in the stream's memory."""

    def held(per_class: int) -> int:
        stream = blobs(tasks=3, classes=6, train_per_class=per_class)
        torch.manual_seed(0)
        strategy = PRD(model_for(stream))
        references = references_of([strategy], stream)
        run(strategy, stream)
        nodes = capture([strategy], references)[0]["nodes"]
        assert not [node["path"] for node in nodes if "place" in node]
        return sum(torch.Size(node["size"]).numel() for node in nodes if node["kind"] == "tensor")

    assert held(40) == held(80)


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
    assert strategy.rows_by_task == {0: [0, 2], 1: [1, 5], 2: [3, 4]}


@pytest.mark.slow
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
            calls.append(len(self.rows_by_task))
            return super().loss(samples)

    stream = example_stream(batch_size=20)
    draws: list[Tensor] = []
    object.__setattr__(stream, "augment", lambda x: draws.append(torch.rand(1)) or x)
    run(Counting(example_model(), first_task_steps=3), stream)
    assert calls == [1] * 9 + [2] * 3 + [3] * 3
    assert len(draws) == 1 + 2 * len(calls)  # once before anything is learned, to see that it gives inputs
    assert len(torch.cat(draws).unique()) == len(draws)


@pytest.mark.slow
def test_distillation_keeps_tasks_apart_and_prototypes_keep_classes() -> None:
    """On digits: without distillation the old tasks are lost, and fine-tuning knows the last two classes only."""
    stream = split_digits(batch_size=32)

    def play(strategy: type[Strategy], **options: object) -> tuple[float, float]:
        with isolated(0, "model"):
            learner = strategy(Mlp(stream.input_shape, stream.classes, hidden=(100,)), **options)
        result = run(learner, stream)
        return result.average_accuracy, average_accuracy(result.task_accuracy, result.taught)

    assert play(PRD)[1] > play(PRD, beta=0)[1] + 0.1
    assert play(PRD, optimizer=partial(SGD, lr=0.003, momentum=0.9), prototype_lr=0.03)[0] > play(Finetune)[0] + 0.1


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
