"""Few-shot class-incremental learning: an encoder is trained in the first session, and then class means answer.

Roy, Park, Fahrezi, Etemad 2024, "A Bag of Tricks for Few-Shot Class-Incremental Learning" (arXiv 2403.14392). Of the paper only the
abstract could be read, and there is no public code of it. So this is its pipeline with each trick, as others name them, in the form
of the reference code of the technique itself: after the paper, not as in it. No published number is for this.

The baseline, f the encoder's features and cos the cosine:

    first session    cross-entropy of scale * cos(f(x), w_c), over the classes of this session alone
    when it ends     the encoder is frozen, in evaluation mode; each row is replaced by the mean of f over the class's images, which
                     are not augmented
    later sessions   nothing is trained; a new class has the mean of f over its images, taken when the session ends
    an answer        scale * cos(f(x), mean_c), all classes with a mean compete

The learning rate of the first session falls by a cosine, epoch by epoch (SAVC's command has it so).

Tricks of the first session, each a switch:

    contrast         + contrast * the supervised contrastive loss (Khosla et al. 2020) of a projection of f, in the batch, over two
                     views of each image (`ContrastiveViews`); the cross-entropy goes on over the plain images
    self_supervised  so many of the session's passes come first, without labels: NT-Xent (Chen et al. 2020) of a projection of f,
                     over two views; the learning rate falls by a cosine in these, and by another in the others
    rotation         + rotation * the cross-entropy of a head on f that tells by how many quarters an image was turned; each image
                     of the batch is there in all four turns (Gidaris et al. 2018)
    copies           pseudo-classes (SAVC): each image comes in M copies, copy m of class y has the label y M + m, and all labels
                     of the session compete, also in the contrast. A class has M means, those of its copies; an answer is
                     score(y) = mean over m of scale * cos(f(copy m of x), mean of label y M + m). "half_turn": as it is, and upside
                     down. "turns_and_channels": four turns, each in three cyclic orders of red, green and blue
    etf              classes have fixed places from the start (NC-FSCIL, Yang et al. 2023): the columns e of a simplex equiangular
                     tight frame for all outputs of the model, so how many classes will ever come is known beforehand. The loss of
                     the first session is (cos(f, e_y) - 1)^2 / 2, in which no other class appears, in place of the cross-entropy.
                     "means": means answer, as in the baseline. "columns": the score is scale * cos(g(f), e), where g is a neck, a
                     linear map that begins as the identity and learns in the first session. In each later one it takes
                     `neck_steps` steps of plain SGD on the same loss, on the session's features and the means of old classes

and one of the later sessions:

    subnet           a share of the last block's weights, chosen in each of its matrices when the first session ends, takes
                     `subnet_steps` steps of plain SGD in each later session, in evaluation mode, on all of its images at once, and
                     by the loss of the first session, where means of old and new classes stand for rows and stay as they are.
                     Then the new means are taken anew, and the old ones are not. "smallest" weights learn, after SoftNet (Kang et
                     al. 2023), which holds the important ones; "largest" is the other reading. All other weights, and the
                     statistics of batch norm, stay as they are to the bit. The price is what old classes lose

Deviations: a class that comes again has the mean over all of its images. The model's own head is not used. The neck is linear, and
its later steps are on all features at once: own choice. Without these steps the column of a new class is a place that the frozen
encoder knows nothing of, and what is answered is a guess: `neck_steps=0` shows it.

Defaults: the scale of 16, the cosine of the learning rate and the weight decay are those of SAVC's code and command for CIFAR-100
(Song et al. 2023). All others are own choices, the learning rate too (there it is 0.1, for a network with batch norm). It is to be
chosen for a stream: see `experiments/spaces.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from clstream.strategies.fscil.tricks import (
    COPIES,
    check_images,
    check_square,
    dot_regression,
    etf_columns,
    last_block,
    ranked,
    turned,
    widths,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.augmentations import ContrastiveViews
from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import EpochStarted, RunContinued, RunStarted, SessionEnded, SessionStarted
from clstream.losses import nt_xent, supervised_contrastive
from clstream.models import GrowingHead
from clstream.models.heads import grow_heads
from clstream.params import check_choice, check_integer, check_number, check_positive
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.frozen_features import add_by_class
from clstream.stream import Batch, Samples, Subset, Task

TOGETHER = 1024
"""Inputs whose features are computed together."""


class FSCIL(Strategy):
    """Train an encoder in the first session, and answer with class means from then on.

    Args:
        model: has `features`, raw inputs to (n, features), and a linear `head`, as those of `clstream.models`, which is not used.
        optimizer: makes the optimizer of the first session from the model's parameters; those of the cosine head join it.
        scale: what cosines are multiplied by.
        schedule: of the learning rate in the first session: "cosine" or "constant".
        contrast: weight of the supervised contrastive loss. 0: there is none.
        self_supervised: passes over the first session without labels, before the others. The stream must have more.
        rotation: weight of the loss of telling quarter turns. 0: there is none. Images must be square. With `copies` two losses ask
            for opposite things: one tells turned images apart by class too, the other by turn alone.
        copies: "none", "half_turn" (two) or "turns_and_channels" (twelve; images must be square, and of three channels).
        etf: "none", "means" or "columns". There must be as many features as labels.
        neck_steps, neck_lr: steps of the neck in a later session, and their learning rate, with etf="columns".
        subnet: share of the last block's weights that learn in later sessions. 0: none. The model must have `stages`.
        subnet_of: "smallest" or "largest" weights.
        subnet_steps, subnet_lr: steps in a later session, and their learning rate.
        temperature: of both contrastive losses.
        projection: width of the projection's output; its hidden layer is as wide as the features.
        smallest, flip, jitter: of the views, see `ContrastiveViews`; they are not blurred.

    """

    fixed_classes = "in the loss those of the first session, in an answer those with a mean"
    takes_controls = ("clip", "accumulate")  # it has a schedule of its own, and learns in the first session alone
    rehearsal_free = True
    takes_regularisers = False
    takes_new_classes = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
        scale: float = 16.0,
        schedule: str = "cosine",
        contrast: float = 0.0,
        self_supervised: int = 0,
        rotation: float = 0.0,
        copies: str = "none",
        etf: str = "none",
        neck_steps: int = 100,
        neck_lr: float = 0.25,
        subnet: float = 0.0,
        subnet_of: str = "smallest",
        subnet_steps: int = 10,
        subnet_lr: float = 0.001,
        temperature: float = 0.1,
        projection: int = 128,
        smallest: float = 0.2,
        flip: bool | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer)
        check_positive(scale=scale)
        check_choice(("cosine", "constant"), schedule=schedule)
        check_number(0, contrast=contrast, rotation=rotation)
        check_choice(COPIES, copies=copies)
        check_choice(("none", "means", "columns"), etf=etf)
        check_number(0, 1, subnet=subnet)
        check_choice(("smallest", "largest"), subnet_of=subnet_of)
        check_positive(temperature=temperature, neck_lr=neck_lr, subnet_lr=subnet_lr)
        check_integer(1, projection=projection)
        check_integer(0, self_supervised=self_supervised, neck_steps=neck_steps, subnet_steps=subnet_steps)
        self.scale, self.schedule = scale, schedule
        self.width, self.classes = widths(model)
        self.copies = COPIES[copies]
        self.labels = self.classes * len(self.copies)
        self.head = GrowingHead(self.width, self.labels, bias=False)
        self.contrast, self.self_supervised, self.rotation, self.temperature = contrast, self_supervised, rotation, temperature
        self.views = ContrastiveViews(smallest, flip, jitter, grayscale=0.2 if jitter else 0.0, blur=0.0)
        self.projection: nn.Sequential | None = None
        if contrast or self_supervised:
            self.projection = nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, projection))
        self.etf, self.neck_steps, self.neck_lr = etf, neck_steps, neck_lr
        self.columns = torch.empty(0, 0) if etf == "none" else etf_columns(self.width, self.labels)  # (labels, width)
        self.neck = nn.Linear(self.width, self.width, bias=False) if etf == "columns" else None
        if self.neck is not None:
            nn.init.eye_(self.neck.weight)
        self.subnet, self.subnet_of, self.subnet_steps, self.subnet_lr = subnet, subnet_of, subnet_steps, subnet_lr
        if subnet:
            last_block(model)  # refuses a model that has none
        self.masks: list[Tensor] = []  # which of the last block's weights learn, of each of its matrices
        self.turn_head = nn.Linear(self.width, 4) if rotation else None
        beside = [
            weight for part in (self.projection, self.neck, self.turn_head) if part is not None for weight in part.parameters()
        ]
        self.optimizer.add_param_group({"params": [self.head.weight, *beside]})
        self.rates: list[float] = [group["lr"] for group in self.optimizer.param_groups]
        self.session, self.epoch = -1, 0  # the numbers of those that go on
        self.sums: Tensor | None = None  # (labels, width), of the features of each label's images
        self.counts = torch.zeros(0)  # (labels,), of these images

    def read_more(self, event: RunContinued) -> None:
        """Go on with the classes that there is a place for. Raises ValueError for more."""
        if event.stream.classes > self.classes:
            raise ValueError(
                f"FSCIL keeps a place for each of the {self.classes} classes of its model, and {event.stream.name} has "
                f"{event.stream.classes}: build it with outputs for all of them"
            )
        super().read_more(event)

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start with a network that learns, and no means. Raises ValueError for a stream that a trick can't learn from."""
        stream = event.stream
        check_images(
            stream,
            contrast=bool(self.contrast),
            self_supervised=bool(self.self_supervised),
            rotation=bool(self.rotation),
            copies=len(self.copies) > 1,
        )
        if self.rotation or len(self.copies) > 2:
            check_square(stream)
        if len(self.copies) > 2 and stream.input_shape[0] != 3:
            raise ValueError(
                f"copies='turns_and_channels' of FSCIL needs images of three channels, and those of {stream.name} have "
                f"{stream.input_shape[0]}: take 'half_turn'"
            )
        if self.self_supervised >= stream.epochs:
            raise ValueError(
                f"FSCIL learns without labels in the first {self.self_supervised} passes, and {stream.name} has {stream.epochs}: "
                "give it more epochs"
            )
        self.model.train()
        self.session, self.sums, self.masks = -1, None, []

    @on(SessionStarted)
    def begin_session(self, event: SessionStarted) -> None:
        """Count the session; in the first one, make a row for each of its classes."""
        self.session = event.session.index
        if self.session == 0:
            many = len(self.copies)
            labels = [label * many + copy for label in event.session.classes for copy in range(many)]
            grow_heads(self.head, [self.optimizer], lambda: labels)

    @on(EpochStarted)
    def begin_epoch(self, event: EpochStarted) -> None:
        """Count the pass, and set its learning rates in the first session."""
        self.epoch = event.epoch.index
        if self.schedule == "constant" or self.session:
            return
        first, end = (self.self_supervised, event.epoch.session.epochs) if self.labelled else (0, self.self_supervised)
        factor = (1 + math.cos(math.pi * (self.epoch - first) / (end - first))) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    @property
    def labelled(self) -> bool:
        """Whether the pass that goes on learns from labels."""
        return self.epoch >= self.self_supervised

    def learn(self, batch: Batch) -> Tensor:
        """Take a step in the first session; later ones have none, and a loss of 0."""
        return super().learn(batch) if self.session == 0 else torch.zeros((), device=batch.samples.y.device)

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy of the cosine head, over the classes of the first session, and the losses of the tricks."""
        if not self.labelled:
            return nt_xent(self.projected_views(samples.x), self.temperature)
        x = samples.x if self.augment is None else self.augment(samples.x)
        loss = self.label_loss(self.features(self.copied(x)), self.copied_labels(samples.y))
        if self.contrast:
            views, y = self.projected_views(samples.x), self.copied_labels(samples.y.repeat(2))
            loss = loss + self.contrast * supervised_contrastive(views, y, self.temperature)
        if self.turn_head is not None:
            turns = self.turn_head(self.features(torch.cat([turned(x, turn) for turn in range(4)])))
            loss = loss + self.rotation * F.cross_entropy(turns, torch.arange(4, device=x.device).repeat_interleave(len(x)))
        return loss

    def projected_views(self, x: Tensor) -> Tensor:
        """Return the projections of two views of each image, first the first ones, of each copy: (copies * 2n, projection)."""
        assert self.projection is not None
        projected: Tensor = self.projection(self.features(self.copied(self.views(torch.cat([x, x])))))
        return projected

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder's (n, features) for raw inputs."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        return features

    def copied(self, x: Tensor) -> Tensor:
        """Return the copies of (n, ...) inputs, first all of the first kind: (copies * n, ...)."""
        return torch.cat([turned(x, turns).roll(shift, 1) for turns, shift in self.copies]) if len(self.copies) > 1 else x

    def copied_labels(self, y: Tensor) -> Tensor:
        """Return the (copies * n,) labels of the copies of inputs with (n,) labels."""
        many = len(self.copies)
        return torch.cat([y * many + copy for copy in range(many)])

    def label_loss(self, features: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of (n, features) and their (n,) labels: the cross-entropy, or the regression to columns."""
        if self.etf == "none":
            return F.cross_entropy(self.label_scores(features), y)
        return dot_regression(self.directed(features), self.columns[y])

    def directed(self, features: Tensor) -> Tensor:
        """Return what the neck makes of (n, features), at unit length."""
        return F.normalize(features if self.neck is None else self.neck(features), dim=1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return what features are compared with, (labels, width) at unit length, and (labels,) whether a label has it.

        These are the rows of the head in the first session, then the means; or columns, until there are means or always.
        """
        weight, labels = self.head.weight, self.head.labels
        if self.sums is not None:
            return self.columns if self.etf == "columns" else F.normalize(self.sums, dim=1), self.counts > 0
        present = torch.zeros(self.labels, dtype=torch.bool, device=weight.device).index_fill(0, labels, True)
        if self.etf != "none":
            return self.columns, present
        return weight.new_zeros(self.labels, self.width).index_copy(0, labels, F.normalize(weight, dim=1)), present

    def label_scores(self, features: Tensor) -> Tensor:
        """Return scaled cosines of (n, features) for each label: (n, labels), -inf for those that nothing is there for."""
        rows, present = self.rows()
        return (self.scale * self.directed(features) @ rows.T).masked_fill(~present, float("-inf"))

    @on(SessionEnded)
    def end_session(self, event: SessionEnded) -> None:
        """Take up the images of the session's classes; after the first session the encoder is frozen."""
        self.model.eval()
        if self.sums is None:
            device = self.head.weight.device
            self.sums, self.counts = torch.zeros(self.labels, self.width, device=device), torch.zeros(self.labels, device=device)
        if self.session == 0:
            self.masks = [ranked(weight, self.subnet, self.subnet_of) for weight in last_block(self.model)] if self.subnet else []
        samples, before = event.session.samples, (self.sums.clone(), self.counts.clone())
        taken = [self.take_up(part) for part in self.parts_of(samples)]
        if self.masks and self.session > 0:
            self.tune_subnet(samples)
            self.sums, self.counts = before
            taken = [self.take_up(part) for part in self.parts_of(samples)]
        if self.neck is not None and self.session > 0:
            features, y = (torch.cat(parts) for parts in zip(*taken, strict=True))
            kept = ((before[1] > 0) & ~torch.isin(torch.arange(self.labels, device=y.device), y)).nonzero().flatten()
            self.tune_neck(self.neck, torch.cat([(self.sums / self.counts[:, None])[kept], features]), torch.cat([kept, y]))

    def take_up(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Add the features of samples and their copies to the means; return these (n, features) and their labels."""
        assert self.sums is not None
        with evaluating(self):
            features, y = self.features(self.copied(samples.x)), self.copied_labels(samples.y)
            add_by_class(self.sums, y, features)
            add_by_class(self.counts, y, torch.ones_like(features[:, 0]))
        return features, y

    def tune_subnet(self, samples: Samples | Subset) -> None:
        """Take steps with the masked weights, on samples all at once."""
        weights = last_block(self.model)
        for _ in range(self.subnet_steps):
            gradients = [torch.zeros_like(weight) for weight in weights]
            for part in self.parts_of(samples):
                loss = self.label_loss(self.features(self.copied(part.x)), self.copied_labels(part.y)) * (len(part) / len(samples))
                for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                    total += gradient
            with torch.no_grad():
                for weight, gradient, mask in zip(weights, gradients, self.masks, strict=True):
                    weight[mask] -= self.subnet_lr * gradient[mask]

    def tune_neck(self, neck: nn.Linear, features: Tensor, y: Tensor) -> None:
        """Turn the neck so that (n, features) come nearer to the columns of their labels."""
        for _ in range(self.neck_steps):
            loss = dot_regression(self.directed(features), self.columns[y])
            (gradient,) = torch.autograd.grad(loss, neck.weight)
            with torch.no_grad():
                neck.weight -= self.neck_lr * gradient

    def parts_of(self, samples: Samples | Subset) -> Iterator[Samples]:
        """Yield samples, so many that they and their copies go through the network together, on its device."""
        step = max(1, TOGETHER // len(self.copies))
        for start in range(0, len(samples), step):
            yield samples[start : start + step].to(self.head.weight.device)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): scaled cosines, means over copies; -inf for classes that nothing is there for."""
        rows, present = self.rows()
        many = len(self.copies)
        features = self.directed(self.features(self.copied(x))).unflatten(0, (many, len(x)))
        scores = self.scale * torch.einsum("mnd,cmd->nc", features, rows.unflatten(0, (self.classes, many))) / many
        return scores.masked_fill(~present[::many], float("-inf"))

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return type(self).scores is FSCIL.scores and self.predicts_from_scores
