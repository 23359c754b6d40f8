"""PRD, prototype-sample relation distillation: a contrastive encoder, a prototype for each class, and no sample kept.

Asadi, Davari, Mudur, Aljundi, Belilovsky 2023, "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning"
(ICML). The paper's body could not be read: its equations are known from what others quote, the rest from the authors' pre-release
code, which says that it gives the paper's Figure 2. For two augmented views of a batch, h the encoder's features of a view, p_k the
prototype of class k, and cos the cosine, one step minimises

    SC + alpha * mean(1 - cos(p_y, stop(h))) + beta * D

SC is the supervised contrastive loss of a projection of h, times T / 0.07 as in the code. The middle term moves the prototypes of
the task's own classes, and nothing else. D holds the encoder and the old prototypes to the relation between old prototypes and the
batch that a teacher sees, the model as it was when the last task ended. Two forms, which are different losses:

"classes" (the default), as the code: scores h p_k / |p_k|, softmax over the classes of one old task, KL(teacher || model), the mean
over the views, the sum over old tasks. A task of one class adds nothing.
"samples", as the paper's equations are quoted: scores cos(p_k, h), softmax over the views of the batch, KL(model || teacher), the
sum over old prototypes. A batch of other size weighs differently.

An answer is the nearest prototype by cosine, among all seen classes or those of the task that the question names. The model's own
head is not used. `novelty` is 1 minus the cosine with the nearest prototype, from 0 to 2: own choice, not measured. Nothing depends
on the number of tasks: a prototype is made when its class first arrives, as a row of a matrix that grows, in a parameter group
without momentum and weight decay. The optimizer goes on over all tasks.

Of the code: the teacher stays in training mode, so that teacher and model agree at the first step of a task also with batch norm
(`teacher_mode="eval"` for the other); a step decay of the learning rate by the epoch of the session (`milestones`). Deviations: the
code passes over the first task 120 times more than over the others; epochs are the stream's, so here a step of the first task may
be taken `first_task_steps` times, each with fresh views. The code has all prototypes from the start, and untrained ones compete.
The code always crops, flips, jitters and grays; by default a view here is the
stream's augmentation, and where it has none both views are the same. Images are scaled as the model does it (code: from -1 to 1).
Colour jitter is drawn in one order (see `CropFlipJitter`); its clamping quirk is off unless asked for. A zero feature has cosine 0.

A task that comes again: its classes are current, whatever they were before. The middle term moves their prototypes, and D leaves
them out of the tasks that they came with. Where every task brings all classes nothing would be held, so a domain-incremental stream
is refused. With several sessions a task, the teacher is renewed when the task ends.

Measured, own numbers (anchors `prd-split-fashion-mnist` and `-task`: 5 tasks, one epoch, batch 128, five steps a batch in the first
task, ConvNet): class-IL 0.547 ± 0.004, task-IL 0.991 ± 0.001 over 3 seeds; without distillation 0.244 ± 0.043 and 0.855 ± 0.058;
replay of 500 samples 0.770 ± 0.004 and 0.983 ± 0.001. Nothing published is for this stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD

from clstream.augmentations import CropFlipJitter
from clstream.bus import on
from clstream.events import EpochStarted, RunStarted, SessionStarted, TaskEnded, TaskStarted
from clstream.losses import supervised_contrastive
from clstream.models import GrowingHead
from clstream.models.heads import grow_heads
from clstream.params import check_bool, check_choice, check_integer, check_integers, check_number, check_positive
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Samples, Task


class PRD(Strategy):
    """Learn features by contrast and a prototype for each class, and hold how old prototypes relate to new samples.

    Args:
        model: raw inputs to logits, with `features` that feed a linear `head`, as those of `clstream.models`.
        optimizer: makes the optimizer from the model's parameters; those of the projection join it.
        alpha: weight of the prototypes' pull to the features of their class.
        beta: weight of the relation distillation.
        relation: "classes" or "samples": what the softmax of a relation runs over.
        temperature: of the contrastive loss.
        base_temperature: the contrastive loss is multiplied by temperature / base_temperature. None: by 1.
        relation_temperature: of the relation distillation.
        projection: widths of the projection's two hidden layers and of its output.
        prototype_lr: learning rate of the prototypes. None: that of the optimizer.
        milestones: epochs of a session from which on the learning rates are a tenth of what they were before.
        first_task_steps: steps for each batch of the first task, in place of more epochs.
        views: "stream": two draws of the stream's augmentation. "jitter": crops, flips, colour jitter and grayscale in its place.
        clamp_quirk: the colour jitter as the authors' code has it, see `CropFlipJitter`.
        teacher_mode: "train" or "eval".

    """

    takes_controls = ("clip", "renew_optimizer")  # it has a schedule of its own
    fixed_classes = "none in the loss; classes with a prototype in an answer"
    rehearsal_free = True
    scores_are = "ranks"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-4),
        alpha: float = 2.0,
        beta: float = 4.0,
        relation: str = "classes",
        temperature: float = 0.1,
        base_temperature: float | None = 0.07,
        relation_temperature: float = 1.0,
        projection: tuple[int, int] = (512, 128),
        prototype_lr: float | None = None,
        milestones: tuple[int, ...] = (121, 161),
        first_task_steps: int = 1,
        views: str = "stream",
        clamp_quirk: bool = False,
        teacher_mode: str = "train",
    ) -> None:
        super().__init__(model, optimizer)
        check_number(0, alpha=alpha, beta=beta)
        check_choice(("classes", "samples"), relation=relation)
        check_choice(("stream", "jitter"), views=views)
        check_choice(("train", "eval"), teacher_mode=teacher_mode)
        check_bool(clamp_quirk=clamp_quirk)
        if clamp_quirk and views != "jitter":
            raise ValueError("clamp_quirk is of the colour jitter: it needs views='jitter'")
        check_positive(temperature=temperature, relation_temperature=relation_temperature)
        check_positive(none=True, base_temperature=base_temperature, prototype_lr=prototype_lr)
        hidden, out = projection
        check_integer(1, first_task_steps=first_task_steps, hidden=hidden, out=out)
        check_integers(0, milestones=milestones)
        width, classes = widths(model)
        self.projection = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
        )
        self.prototypes = GrowingHead(width, classes, bias=False)
        self.optimizer.add_param_group({"params": list(self.projection.parameters())})
        own: dict[str, Any] = {name: 0.0 for name in ("momentum", "weight_decay") if name in self.optimizer.defaults}
        own |= {} if prototype_lr is None else {"lr": prototype_lr}
        self.optimizer.add_param_group({"params": [self.prototypes.weight], **own})
        self.rates: list[float] = [group["lr"] for group in self.optimizer.param_groups]
        self.alpha, self.beta, self.relation, self.relation_temperature = alpha, beta, relation, relation_temperature
        self.temperature, self.scale = temperature, 1.0 if base_temperature is None else temperature / base_temperature
        self.milestones, self.first_task_steps, self.teacher_mode = milestones, first_task_steps, teacher_mode
        self.views = CropFlipJitter(clamp_quirk=clamp_quirk) if views == "jitter" else None
        self.teacher: nn.Module | None = None
        self.old_prototypes = torch.empty(0)  # the teacher's
        self.rows_by_task: dict[int, list[int]] = {}  # of prototypes that each task brought, in the order of tasks
        self.current: list[int] = []  # those of the task that goes on
        self.old = torch.empty(0, 0, dtype=torch.int64)  # of each task, but for the classes of this one; filled up with -1

    def learn(self, batch: Batch) -> Tensor:
        """Take a step, or in the first task some, each with fresh views; return the last one's loss."""
        for _ in range(1, self.first_task_steps if len(self.rows_by_task) == 1 else 1):
            super().learn(batch)
        return super().learn(batch)

    def loss(self, samples: Samples) -> Tensor:
        """Return the sum of the three terms for two views of a batch."""
        augment = self.views or self.augment
        x = torch.cat([samples.x, samples.x] if augment is None else [augment(samples.x), augment(samples.x)])
        y = torch.cat([samples.y, samples.y])
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # it has been looked at
        loss = self.scale * supervised_contrastive(self.projection(features), y, self.temperature)
        loss = loss + self.alpha * self.prototype_loss(features, y)
        if self.teacher is None or not self.old.numel():
            return loss
        with torch.no_grad():
            before: Tensor = self.teacher.features(x)  # type: ignore[operator]  # as above
        return loss + self.beta * self.relation_loss(features, before)

    def prototype_loss(self, features: Tensor, y: Tensor) -> Tensor:
        """Return 1 minus the mean cosine of (n, width) features, taken as they are, and the prototypes of their classes."""
        cosines = F.normalize(features.detach(), dim=1) @ F.normalize(self.prototypes.weight, dim=1).T
        return 1 - (cosines * (self.prototypes.labels == y[:, None])).sum(1).mean()

    def relation_loss(self, features: Tensor, before: Tensor) -> Tensor:
        """Return how far the relations of old prototypes to (n, width) features are from those that the teacher sees."""
        if self.relation == "samples":
            features, before = F.normalize(features, dim=1), F.normalize(before, dim=1)
        prototypes = self.prototypes.weight[: len(self.old_prototypes)]  # those the teacher has: both sides are rounded alike
        now = features @ F.normalize(prototypes, dim=1).T / self.relation_temperature
        then = before @ F.normalize(self.old_prototypes, dim=1).T / self.relation_temperature
        return (over_samples if self.relation == "samples" else over_classes)(now, then, self.old)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return the cosines of features and prototypes: (n, classes), -inf for a class without one."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # it has been looked at
        cosines = F.normalize(features, dim=1) @ F.normalize(self.prototypes.weight, dim=1).T
        return cosines.new_full((len(x), self.prototypes.classes), float("-inf")).index_copy(1, self.prototypes.labels, cosines)

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,): 1 minus the cosine with the nearest prototype; 2, the most there is, before there is any."""
        return 1 - scores.amax(1).clamp(min=-1)

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights and buffers of the model and of the prototypes."""
        yield from super().answering_weights()
        yield from (*self.prototypes.parameters(), *self.prototypes.buffers())

    @property
    def scores_ignore_task(self) -> bool:
        """Whether one answer serves both questions: the cosines are the same."""
        return type(self).scores is PRD.scores and type(self).predict is Strategy.predict

    @on(RunStarted)
    def check_stream(self, event: RunStarted) -> None:
        """Refuse a stream that can't be learned, before anything is."""
        stream = event.stream
        if stream.scenario == "domain":
            raise ValueError(f"PRD is for tasks that bring new classes, and {stream.name} is domain-incremental")
        if self.views is not None and len(stream.input_shape) != 3:
            raise ValueError(f"views='jitter' is for images (channels, height, width), not {stream.name}'s {stream.input_shape}")

    @on(TaskStarted)
    def open_task(self, event: TaskStarted) -> None:
        """Take the prototypes of classes that the task doesn't have as old."""
        current = set(event.task.classes)
        labels = self.prototypes.labels.tolist()
        old = [[row for row in rows if labels[row] not in current] for rows in self.rows_by_task.values()]
        rows = [torch.tensor(columns) for columns in old if columns]
        self.old = pad_sequence(rows, batch_first=True, padding_value=-1) if rows else torch.empty(0, 0, dtype=torch.int64)
        self.old = self.old.to(self.prototypes.weight.device)
        self.current = self.rows_by_task.setdefault(event.task.id, [])

    @on(SessionStarted)
    def grow_prototypes(self, event: SessionStarted) -> None:
        """Make a prototype for each class that is new."""
        before = len(self.prototypes.labels)
        grow_heads(self.prototypes, [self.optimizer], lambda: event.session.classes)
        self.current += range(before, len(self.prototypes.labels))

    @on(EpochStarted)
    def decay(self, event: EpochStarted) -> None:
        """Set the learning rates by the epoch of the session; without milestones they are left alone."""
        if self.milestones:
            passes = event.epoch.index * (self.first_task_steps if len(self.rows_by_task) == 1 else 1)
            factor = 0.1 ** sum(passes >= milestone for milestone in self.milestones)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor

    @on(TaskEnded)
    def keep_teacher(self, event: TaskEnded) -> None:
        """Make the model as it is now the teacher."""
        if self.beta:
            self.teacher = deepcopy(self.model).requires_grad_(False).train(self.teacher_mode == "train")
            self.old_prototypes = self.prototypes.weight.detach().clone()


def over_classes(now: Tensor, then: Tensor, old: Tensor) -> Tensor:
    """Return the distance of (n, prototypes) scores now and then by form "classes".

    `old` is (tasks, prototypes of one), int64: the columns of each old task, filled up with -1.
    """
    lowest = torch.finfo(now.dtype).min  # and not -inf: 0 times a difference of those is no number
    ours, teachers = (scores[:, old].masked_fill(old < 0, lowest).log_softmax(2) for scores in (now, then))
    return F.kl_div(ours, teachers, reduction="batchmean", log_target=True)


def over_samples(now: Tensor, then: Tensor, old: Tensor) -> Tensor:
    """Return the same by form "samples"."""
    ours, teachers = (scores[:, old].log_softmax(0) for scores in (now, then))
    return ((ours.exp() * (ours - teachers)).sum(0) * (old >= 0)).sum()


def widths(model: nn.Module) -> tuple[int, int]:
    """Return the width of a model's features, and its number of classes; TypeError for a model that doesn't show them."""
    head = getattr(model, "head", None)
    if not callable(getattr(model, "features", None)) or not isinstance(head, (nn.Linear, GrowingHead)):
        raise TypeError(f"PRD needs a model with `features` and a linear `head`, as those of clstream, not {type(model).__name__}")
    return head.in_features, head.out_features if isinstance(head, nn.Linear) else head.classes
