"""Replay of generated samples: what DGR and brain-inspired replay share. Who labels them, and what old and new ones weigh."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.bus import on
from clstream.events import RunStarted, SessionStarted, TaskEnded
from clstream.models import GrowingHead
from clstream.params import check_bool, check_integer, check_number, check_positive
from clstream.strategy.regulariser import frozen
from clstream.strategy.rehearsal_free import RehearsalFree
from clstream.strategy.strategy import OptimizerFactory
from clstream.stream import Samples, Subset


class GenerativeReplay(RehearsalFree):
    """Learn each batch beside as many samples as the last task's generator draws, which the last task's network labels.

    A subclass has a generator, and says what one step minimises for new and for generated samples.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters; those of the generator join it.
        importance: what the loss of new samples weighs from the second task on, the others having the rest. None: 1 / tasks so far.
        replay_batch: how many samples are generated for each batch. None: as many as it has.
        distill: whether generated samples have the network's outputs as targets, softened by `temperature`, or one label each.
        temperature: T, by which outputs are divided before the softmax of distillation.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    learns_targets = ("label",)
    generator: nn.Module

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        importance: float | None,
        replay_batch: int | None,
        distill: bool,
        temperature: float,
        active_classes: str,
    ) -> None:
        super().__init__(model, optimizer, active_classes=active_classes)
        check_number(0, 1, none=True, importance=importance)
        check_integer(1, none=True, replay_batch=replay_batch)
        check_bool(distill=distill)
        check_positive(temperature=temperature)
        self.importance, self.replay_batch, self.distill, self.temperature = importance, replay_batch, distill, temperature
        self.random = torch.Generator()
        self.forget()

    def forget(self) -> None:
        """Have nothing to replay."""
        self.teacher: nn.Module | None = None  # network and generator as the last task left them, in evaluation mode
        self.teacher_generator: nn.Module | None = None
        self.past: list[Tensor] = []  # labels that compete with each other in the teacher's answer: of all tasks, or of each
        self.tasks = 0  # that are over

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start with nothing to replay. Raises ValueError for inputs of another shape than are generated."""
        shape, own = tuple(event.stream.input_shape), input_shape_of(self.model, type(self).__name__)
        if shape != own:
            raise ValueError(
                f"{type(self).__name__} generates inputs of {own}, as its model takes, and those of {event.stream.name} are {shape}"
            )
        self.forget()

    @on(SessionStarted)
    def check_inputs(self, event: SessionStarted) -> None:
        """Raise ValueError, in one sentence, for inputs that what is generated can't be like: see `check_unit`."""
        if self.reconstruction == "bce":
            check_unit(event.session.samples, f"{type(self).__name__} with reconstruction='bce'", ": take reconstruction='mse'")

    @on(TaskEnded)
    def freeze(self, event: TaskEnded) -> None:
        """Keep network and generator as they are, to generate and to label."""
        self.tasks += 1
        self.teacher, self.teacher_generator = frozen(self.model), frozen(self.generator)
        if not self.task_given and self.active_classes != "task":
            self.past = [self.old_classes]
        elif not any(torch.equal(self.new_classes, labels) for labels in self.past):
            self.past = [*self.past, self.new_classes]

    @property
    @abstractmethod
    def reconstruction(self) -> str:
        """The loss of decoded inputs: see `clstream.models.vae`."""

    @abstractmethod
    def generate(self, n: int) -> Samples:
        """Return n generated samples, with the outputs of the network before as `extra["before"]`: (n, classes)."""

    @abstractmethod
    def loss_of_new(self, x: Tensor, samples: Samples) -> Tensor:
        """Return the loss of a batch, of which `x` are the augmented inputs: a scalar."""

    @abstractmethod
    def loss_of_generated(self, samples: Samples) -> Tensor:
        """Return the loss of generated samples: a scalar."""

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return what is generated for a batch, once a task is over."""
        if self.teacher is None:
            return ()
        with torch.no_grad():
            return (self.generate(self.replay_batch or len(samples)),)

    def loss(self, samples: Samples) -> Tensor:
        """Return the weighted losses of new and of generated samples."""
        loss = self.loss_of_new(samples.x if self.augment is None else self.augment(samples.x), samples)
        for generated in self.drawn_for(samples):
            share = 1 / (self.tasks + 1) if self.importance is None else self.importance
            loss = share * loss + (1 - share) * self.loss_of_generated(generated)
        return loss

    def labelled_loss(self, outputs: Tensor, before: Tensor, old: Tensor) -> Tensor:
        """Return the cross-entropy of (n, classes) outputs to `targets`: the mean over samples, with `distill` times T^2.

        Args:
            outputs: (n, classes), for generated samples.
            before: (n, classes), those of the network before.
            old: (classes,) or (n, classes), bool: what competes in them.

        """
        competing, temperature = old, self.temperature if self.distill else 1.0
        if not self.task_given and self.active_classes != "task":
            competing = self.mask_of(self.known_classes, outputs) if self.active_classes == "seen" else torch.ones_like(old)
        logs = (outputs.masked_fill(~competing, float("-inf")) / temperature).log_softmax(1).masked_fill(~old, 0)
        return -(temperature**2) * (self.targets(before, old) * logs).sum(1).mean()

    def targets(self, before: Tensor, old: Tensor) -> Tensor:
        """Return (n, classes) probabilities: what the network before answers, softened; without `distill` 1 for its label."""
        before = before.masked_fill(~old, float("-inf"))
        if self.distill:
            return (before / self.temperature).softmax(1)
        return F.one_hot(before.argmax(1), before.shape[1]).to(before)

    def mask_of(self, labels: Tensor, outputs: Tensor) -> Tensor:
        """Return (classes,), bool: which of (n, classes) outputs are those of some labels."""
        return torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device).index_fill_(0, labels, True)


def unit(x: Tensor) -> Tensor:
    """Return inputs as floats: bytes from 0 to 1, others as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def check_unit(samples: Samples | Subset, what: str, instead: str = "") -> None:
    """Raise ValueError, in one sentence, for inputs that are neither bytes nor numbers from 0 to 1.

    Args:
        samples: of a session.
        what: decodes them, for the sentence.
        instead: what to do, for the sentence.

    """
    if samples[:1].x.dtype != torch.uint8:
        low, high = (float(end) for end in samples.x.aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"{what} decodes images of bytes, or of numbers from 0 to 1, not of numbers from {low:g} to {high:g}{instead}"
            )


def input_shape_of(model: nn.Module, method: str) -> tuple[int, ...]:
    """Return the shape of a model's inputs, as it was built with. Raises TypeError for one that doesn't say it."""
    shape = getattr(model, "params", {}).get("input_shape")
    if shape is None:
        raise TypeError(
            f"{method} needs a model with an argument `input_shape`, as those of clstream, to generate such inputs, not "
            f"{type(model).__name__}"
        )
    return (shape,) if isinstance(shape, int) else tuple(shape)


def sizes_of(model: nn.Module, name: str) -> tuple[int, int, tuple[int, ...]]:
    """Return the width of a model's features, its number of classes, and the shape of its inputs. Raises TypeError without them."""
    head, shape = getattr(model, "head", None), getattr(model, "params", {}).get("input_shape")
    if not callable(getattr(model, "features", None)) or not isinstance(head, (nn.Linear, GrowingHead)) or shape is None:
        raise TypeError(
            f"{name} needs a model with a method `features`, a linear `head` and an argument `input_shape`, as those of clstream, "
            f"not {type(model).__name__}"
        )
    return head.in_features, head.out_features if isinstance(head, nn.Linear) else head.classes, input_shape_of(model, name)
