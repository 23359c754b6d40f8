"""CoACT: few-shot tuning of a pre-trained network, held by contrast with a slow teacher and by what the network was before.

Roy, Dolatabadi, Afkanpour, Etemad 2025, "Consistency-guided Asynchronous Contrastive Tuning" (TMLR; arXiv 2405.16625). Of the paper
the abstract and a figure could be read; the form is that of the authors' code (ShuvenduRoy/CoACT-FSCIL). Student q is the model
with its adapters and a head W without bias, teacher k the same model without adapters.

First session, of E epochs, whose learning rate falls to 0 by a cosine, epoch by epoch:

    W_c = mean of q(x) over the images of class c, not augmented, not normalised; rows of other classes are random
    asynchronous contrastive tuning: in each step
        k <- 0.999 k + 0.001 q, for the weights that both have
        loss = cross-entropy of W q(view 1), all columns + contrast * SupCon{q(view 1), k(view 2)}, no gradient through k
    controlled fine-tuning: adapters and W learn from the start, what `unfreeze` names from epoch `unfreeze_epoch` on, at the
        learning rate times `encoder_factor`
    the state of the epoch that does best on a development split is kept, if there is one (`development`), else the last

Then copies are taken: the base student q_b and its teacher k_b; and k_p is the network as it came. A new optimizer, at the learning
rate times `later_factor`, serves all later sessions. Each:

    W_c = mean of q(x) over the images of a new class
    consistency-guided incremental tuning, `later_epochs` epochs of what `later` says: in each step
        k_b <- 0.999 k_b + 0.001 q_b
        loss = cross-entropy + contrast * SupCon{q(view 1), k_b(view 2), k_p(view 2)} + consistency * mean (W q - W_b q_b)^2

SupCon is over all rows, of all networks, with the temperature 0.07. An answer is the greatest W q(x), over all columns.

Deviations. The code takes the epoch with the best accuracy on the test set, and reports the greatest over epochs: here no test
sample is seen. Learning rates, blocks and epochs are by the data set there, without a development set; the defaults here are own
choices. The pooling is the model's own (there dense and tanh). In FSCIL the authors' commands take no step in later sessions, nor
in eight of their sixteen sets: `later_epochs=0`. A class that comes again has the mean of its newest images. Trained rows and means
differ in length; `similarity="cosine"` answers by cosines, which is not the code's.

Measured: `docs/coact.md`. No published number has been reproduced; the pre-trained weights are not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.adapters import without_adapters
from clstream.adapters.adapter import patterns_of
from clstream.augmentations import ContrastiveViews
from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import EpochEnded, EpochStarted, RunStarted, SessionEnded, SessionStarted
from clstream.losses import supervised_contrastive
from clstream.measures.flops import same_flops
from clstream.models import GrowingHead
from clstream.params import check_choice, check_integer, check_number, check_positive, check_share
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.frozen_features import add_by_class
from clstream.stream import Batch, Samples, Subset, Task

TOGETHER = 1024
"""Images whose features are computed together."""


class CoACT(Strategy):
    """Tune a pre-trained network on few shots, beside slow copies of it; class means begin each row of the head.

    Args:
        model: has `features`, raw images to (n, features), and a linear `head`, which is not used. Put adapters into it before:
            `adapt(model, LoRA(rank=16))`. All else is frozen; without adapters only the head and what `unfreeze` names learn.
        optimizer: makes the optimizers, from what learns. There are two: of the first session, and of all later ones.
        base_epochs: epochs of the first session in which steps are taken. None: all of them. 0: class means answer.
        later_epochs: epochs of each later session in which steps are taken.
        contrast: weight of the contrastive loss. 0: there is none, and no teacher.
        consistency: weight of the squared difference from the base student's logits.
        unfreeze: patterns of the names of the model's own parameters that learn too: one, or several.
        unfreeze_epoch: of the first session, from which they do. None: never.
        encoder_factor: what their learning rate is multiplied by.
        later: what learns in later sessions: "classifier", "adapters" or "both".
        later_factor: what the learning rate is multiplied by in later sessions.
        development: share of each class's images in the first session that no step learns from, and that choose the epoch. 0: none.
        similarity: of an answer, "dot" or "cosine".
        temperature: of the contrast.
        slowness: of the teachers.
        smallest, flip, jitter, grayscale: of the views, see `ContrastiveViews`; they are not blurred.
        active_classes: whose columns compete, see `clstream.Strategy`.

    """

    rehearsal_free = True
    needs_images = True
    takes_regularisers = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        base_epochs: int | None = None,
        later_epochs: int = 1,
        contrast: float = 1.0,
        consistency: float = 1.0,
        unfreeze: str | list[str] = "*",
        unfreeze_epoch: int | None = 0,
        encoder_factor: float = 0.01,
        later: str = "classifier",
        later_factor: float = 0.001,
        development: float = 0.0,
        similarity: str = "dot",
        temperature: float = 0.07,
        slowness: float = 0.999,
        smallest: float = 0.2,
        flip: bool | None = None,
        jitter: float = 0.5,
        grayscale: float = 0.2,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(0, none=True, base_epochs=base_epochs, unfreeze_epoch=unfreeze_epoch)
        check_integer(0, later_epochs=later_epochs)
        check_number(0, contrast=contrast, consistency=consistency, encoder_factor=encoder_factor, later_factor=later_factor)
        check_choice(("classifier", "adapters", "both"), later=later)
        check_choice(("dot", "cosine"), similarity=similarity)
        check_share(development=development)
        check_positive(temperature=temperature)
        check_number(0, 1, slowness=slowness)
        self.base_epochs, self.later_epochs, self.contrast, self.consistency = base_epochs, later_epochs, contrast, consistency
        self.encoder_factor, self.later, self.later_factor, self.development = encoder_factor, later, later_factor, development
        self.similarity, self.temperature, self.slowness = similarity, temperature, slowness
        self.views = ContrastiveViews(smallest, flip, jitter, grayscale=grayscale, blur=0.0)
        self.make_optimizer, self.unfreeze_epoch = optimizer, unfreeze_epoch
        self.width, classes = widths(model)
        self.head = nn.Linear(self.width, classes, bias=False)
        self.own = [name for name, _ in model.named_parameters() if ".adapter." not in name and not name.startswith("head.")]
        patterns = patterns_of(unfreeze, "unfreeze")
        self.unfrozen = [name for name in self.own if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if unfreeze_epoch is not None and not self.unfrozen:
            raise ValueError(
                f"unfreeze names no parameter of {type(model).__name__}: {unfreeze!r}; take unfreeze_epoch=None for none"
            )
        self.teacher = without_adapters(model).requires_grad_(False).eval()
        self.pristine = deepcopy(self.teacher)
        self.base, self.base_head = deepcopy(model).requires_grad_(False).eval(), deepcopy(self.head).requires_grad_(False)
        self.set_learning(adapters=True, head=True)
        self.start_optimizer(1.0, encoder_factor)
        self.session, self.steps_until = -1, 0  # the number of the session, and of its epochs in which steps are taken
        self.steps = self.opened = False  # whether steps are taken in this epoch, and whether the model's own weights learn
        self.held = torch.empty(0, dtype=torch.int64)  # positions of the development images in the first session
        self.marks = torch.empty(0, dtype=torch.int64)  # and what tells them in a batch
        self.best, self.best_hits = (
            list[dict[str, Tensor]](),
            -1,
        )  # the state of the best epoch, and its development images answered
        self.random = torch.Generator()

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights and buffers of the model, and the head's: the copies count as memory."""
        yield from super().answering_weights()
        yield from self.head.parameters()

    def adapters(self) -> list[nn.Parameter]:
        """Return the weights of the adapters."""
        return [weight for name, weight in self.model.named_parameters() if ".adapter." in name]

    def set_learning(self, adapters: bool, head: bool) -> None:
        """Say what learns; the model's own weights don't."""
        self.model.requires_grad_(False)
        for weight in self.adapters():
            weight.requires_grad_(adapters)
        self.head.requires_grad_(head)

    def start_optimizer(self, factor: float, encoder_factor: float) -> None:
        """Make an optimizer of adapters and head at a share of the learning rate, and of the model's own weights at another."""
        self.optimizer = self.make_optimizer([*self.adapters(), *self.head.parameters()])
        weights = dict(self.model.named_parameters())
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.param_groups[0]["lr"] = rate * factor
        self.optimizer.add_param_group({"params": [weights[name] for name in self.own], "lr": rate * encoder_factor})
        self.rates: list[float] = [group["lr"] for group in self.optimizer.param_groups]

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Refuse, by ValueError, a stream with fewer epochs than steps are taken in."""
        epochs = event.stream.epochs
        for name, many in (("base_epochs", self.base_epochs or 0), ("later_epochs", self.later_epochs)):
            if many > epochs:
                raise ValueError(f"{name} of CoACT is {many}, and {event.stream.name} has {epochs} epochs: give it more")
        self.model.eval()  # but for what drops out in the first session
        self.session, self.steps = -1, False

    @on(SessionStarted)
    def begin_session(self, event: SessionStarted) -> None:
        """Begin the rows of the session's classes with their means; in the first session, hold back the development images."""
        self.session, samples = event.session.index, event.session.samples
        self.steps_until = self.later_epochs
        if self.session == 0:
            self.steps_until = event.session.epochs if self.base_epochs is None else self.base_epochs
            self.hold_back(samples)
            if len(self.held):  # the development images are to have no part in the rows either
                kept = torch.ones(len(samples), dtype=torch.bool).index_fill(0, self.held.cpu(), False)
                samples = samples[kept.nonzero().flatten()]
        elif self.later_epochs:
            self.set_learning(adapters=self.later in ("adapters", "both"), head=self.later in ("classifier", "both"))
        self.begin_rows(samples)

    def begin_rows(self, samples: Samples | Subset) -> None:
        """Set the rows of the session's classes to the mean features of their images."""
        weight = self.head.weight.detach()
        sums, counts = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
        with evaluating(self), torch.no_grad():
            for start in range(0, len(samples), TOGETHER):
                part = samples[start : start + TOGETHER].to(weight.device)
                add_by_class(sums, part.y, self.features(part.x).to(sums.dtype))
                add_by_class(counts, part.y, torch.ones_like(part.y, dtype=counts.dtype))
            weight.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], weight))

    def hold_back(self, samples: Samples | Subset) -> None:
        """Choose the development images, a share of each class's."""
        self.best, self.best_hits = [], -1
        self.held = self.marks = self.held[:0]
        if not self.development:
            return
        y = samples.y.cpu()
        order = torch.randperm(len(y), generator=self.random)
        order = order[y[order].argsort(stable=True)]
        counts = y.bincount()
        rank = torch.arange(len(y)) - (counts.cumsum(0) - counts)[y[order]]  # of each image within its class
        held = order[rank < (self.development * counts.to(torch.float64)).round()[y[order]]]
        if not len(held):
            raise ValueError(f"development={self.development} of {len(y)} images holds back none of any class: take a larger share")
        self.held = held.sort().values
        self.marks = marks(samples[self.held].x).to(self.head.weight.device)

    @on(EpochStarted)
    def begin_epoch(self, event: EpochStarted) -> None:
        """Set the learning rates, and unfreeze; where no steps are taken any more, nothing drops out."""
        epoch = event.epoch.index
        self.model.train(epoch < self.steps_until)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        self.steps = epoch < self.steps_until
        if self.session == 0 and self.steps:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * epoch / self.steps_until)) / 2
            if epoch == self.unfreeze_epoch:
                weights, self.opened = dict(self.model.named_parameters()), True
                for name in self.unfrozen:
                    weights[name].requires_grad_(True)

    def learn(self, batch: Batch) -> Tensor:
        """Move the teacher, and take a step; a loss of 0 in epochs without."""
        if not self.steps:
            return torch.zeros((), device=batch.samples.y.device)
        with same_flops((len(batch.samples), self.session > 0, self.opened)):
            self.move_teacher()
            return super().learn(batch)

    @torch.no_grad()
    def move_teacher(self) -> None:
        """Move the student's teacher a little towards the student, in later sessions that of the base student towards it."""
        if not self.contrast:
            return
        fast = dict((self.model if self.session == 0 else self.base).named_parameters())
        slow = {name: weight for name, weight in self.teacher.named_parameters() if not name.startswith("head.")}
        move(list(slow.values()), [fast[name] for name in slow], self.slowness)

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy of a view, the contrast of it with what teachers say of another, and the consistency."""
        view = self.views(samples.x)
        features = self.features(view)
        logits, counted = self.head(features), torch.ones(len(view), dtype=torch.bool, device=view.device)
        if len(self.marks) and self.session == 0:
            counted = ~torch.isin(marks(samples.x), self.marks)
        losses = F.cross_entropy(self.mask_other_heads(logits, samples.y, samples.extra.get("task")), samples.y, reduction="none")
        loss = (losses * counted).sum() / counted.sum().clamp(min=1)
        if self.contrast:
            teachers = [self.teacher] if self.session == 0 else [self.teacher, self.pristine]
            with torch.no_grad():
                other = self.views(samples.x)
                rows = [teacher.features(other) for teacher in teachers]  # type: ignore[operator]  # as the model
            many = 1 + len(rows)
            contrast = supervised_contrastive(
                torch.cat([features, *rows]), samples.y.repeat(many), self.temperature, counted.repeat(many)
            )
            loss = loss + self.contrast * contrast
        if self.session > 0 and self.consistency:
            with torch.no_grad():
                base = self.base_head(self.base.features(view))  # type: ignore[operator]
            loss = loss + self.consistency * F.mse_loss(logits, base)
        return loss

    @on(EpochEnded)
    def keep_best(self, event: EpochEnded) -> None:
        """Keep the state of the first session's epoch that does best on the development images."""
        if not len(self.held) or self.session or not self.steps:
            return
        samples, hits = event.epoch.session.samples, 0
        with evaluating(self), torch.no_grad():
            for held in self.held.split(TOGETHER):
                part = samples[held].to(self.head.weight.device)
                hits += int((self.answer(part.x).argmax(1) == part.y).sum())
        if hits > self.best_hits:
            self.best_hits = hits
            self.best = [
                {name: value.detach().clone() for name, value in module.state_dict().items()}
                for module in (self.model, self.head, self.teacher)
            ]

    @on(SessionEnded)
    def end_session(self, event: SessionEnded) -> None:
        """After the first session, take the best state and the copies, and freeze all; from then on nothing drops out."""
        self.model.eval()
        self.steps = self.opened = False
        if self.session:
            return
        if self.best:
            for module, state in zip((self.model, self.head, self.teacher), self.best, strict=True):
                module.load_state_dict(state)
            self.best = []
        self.base.load_state_dict(self.model.state_dict())
        self.base_head.load_state_dict(self.head.state_dict())
        self.set_learning(adapters=False, head=False)
        self.start_optimizer(self.later_factor, self.later_factor)

    def features(self, x: Tensor) -> Tensor:
        """Return the student's (n, features) for raw images."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        return features

    def answer(self, x: Tensor) -> Tensor:
        """Return (n, classes) scores of all columns."""
        features, rows = self.features(x), self.head.weight
        if self.similarity == "cosine":
            features, rows = F.normalize(features, dim=1), F.normalize(rows, dim=1)
        return features @ rows.T

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes) scores."""
        return self.mask_answer(self.answer(x))

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return self.predicts_from_scores


def widths(model: nn.Module) -> tuple[int, int]:
    """Return the width of a model's features, and its number of classes; TypeError for a model that doesn't show them."""
    head = getattr(model, "head", None)
    if not callable(getattr(model, "features", None)) or not isinstance(head, (nn.Linear, GrowingHead)):
        raise TypeError(
            f"CoACT needs a model with a method `features` and a linear `head`, as those of clstream, not {type(model).__name__}"
        )
    return head.in_features, head.out_features if isinstance(head, nn.Linear) else head.classes


def move(slow: list[Tensor], fast: list[Tensor], slowness: float) -> None:
    """Move slow weights towards fast ones, in place: slow <- slowness slow + (1 - slowness) fast. Equal ones stay to the bit."""
    torch._foreach_lerp_(slow, fast, 1 - slowness)


def marks(x: Tensor) -> Tensor:
    """Return (n,) int64 that tell inputs apart: a random sum of their bytes, the same whatever they come with."""
    flat = x.flatten(1).contiguous()
    whole = (flat if flat.dtype == torch.uint8 else flat.float().view(torch.int32)).to(torch.int64)
    factors = torch.randint(-(2**62), 2**62, whole.shape[1:], generator=torch.Generator().manual_seed(0))
    return (whole * factors.to(whole.device)).sum(1)
