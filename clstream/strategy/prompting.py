"""Prompting: what L2P, DualPrompt and CODA-Prompt share. A vision transformer stays as it is; prompts and its head learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.bus import on
from clstream.eval_mode import learns
from clstream.events import RunStarted
from clstream.models.vit_blocks import Vit, vit_of
from clstream.params import check_integers
from clstream.strategy.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples, Task


class Prompting(Strategy):
    """Learn prompts of a frozen vision transformer, and its head.

    A subclass makes its `prompts`, then its optimizer (`new_optimizer`), and says what they do (`prompted`). An image goes through
    the transformer twice: without prompts and without gradients, which gives the query that prompts are chosen by, and with them.
    Both passes begin with the same tokens.

    Args:
        model: a vision transformer that `vit_of` takes. It is in evaluation mode but for its head, and its parameters outside of
            the head require no gradient any more.
        optimizer: makes the optimizer from the prompts' and the head's parameters.
        active_classes: whose outputs compete: see `clstream.Strategy`.

    Raises TypeError for a model that is no such transformer.

    """

    rehearsal_free = True
    needs_images = True
    active_classes = "task"

    prompts: nn.ParameterDict
    """What learns beside the head."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, active_classes: str) -> None:
        super().__init__(model, optimizer, active_classes)
        self.make_optimizer = optimizer
        head = vit_of(model, type(self).__name__).model.head
        model.requires_grad_(False)
        head.requires_grad_(True)

    @property
    def vit(self) -> Vit:
        """The model's parts."""
        return vit_of(self.model, type(self).__name__)

    def new_optimizer(self) -> Optimizer:
        """Return a new optimizer of all that learns."""
        return self.make_optimizer([*self.prompts.parameters(), *self.vit.model.head.parameters()])

    @on(RunStarted)
    def freeze(self, event: RunStarted) -> None:
        """Put the transformer in evaluation mode. Raises ValueError for images of another shape than it takes."""
        self.vit.check_input(event.stream.input_shape)
        self.model.eval()
        self.vit.model.head.train()

    @abstractmethod
    def prompted(self, vit: Vit, tokens: Tensor, query: Tensor, learning: bool) -> tuple[Tensor, Tensor | float]:
        """Return (n, width) features with prompts, and what is added to the loss.

        Args:
            vit: the transformer.
            tokens: (n, t, width), what its first block takes.
            query: (n, width), its features without prompts.
            learning: whether they are learned, not asked about.

        """

    def prompted_outputs(self, x: Tensor, learning: bool) -> tuple[Tensor, Tensor | float]:
        """Return (n, outputs) for raw inputs, and what is added to the loss."""
        vit = self.vit
        with torch.no_grad():
            tokens = vit.embed(x)
            query = vit.features(vit.run(tokens))
        features, penalty = self.prompted(vit, tokens, query, learning)
        return vit.model.head(features), penalty

    @learns
    def loss(self, samples: Samples) -> Tensor:
        """Return the mean cross-entropy over the outputs that compete, and what the prompts add to it."""
        outputs, penalty = self.prompted_outputs(self.augmented(samples), learning=True)
        return self.loss_of_outputs(outputs, samples) + penalty

    def outputs(self, samples: Samples) -> Tensor:
        """Return (n, outputs) for samples to learn, augmented."""
        return self.prompted_outputs(self.augmented(samples), learning=True)[0]

    def augmented(self, samples: Samples) -> Tensor:
        """Return the samples' inputs, augmented."""
        return samples.x if self.augment is None else self.augment(samples.x)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes) logits."""
        return self.mask_answer(self.prompted_outputs(x, learning=False)[0])

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return self.predicts_from_scores

    def answering_weights(self) -> list[Tensor]:  # type: ignore[override]  # an iterable is what is asked
        """Return the model's weights, and the prompts."""
        return [*super().answering_weights(), *self.prompts.parameters()]

    def check_blocks(self, **blocks: Sequence[int]) -> None:
        """Raise ValueError for options that are no lists of different numbers of blocks, from 0."""
        check_integers(0, **blocks)
        depth = len(self.vit.blocks)
        for name, numbers in blocks.items():
            if len({*numbers}) < len(numbers) or max(numbers, default=0) >= depth:
                raise ValueError(
                    f"{name} must be different numbers of blocks, from 0, and {type(self.model).__name__} has {depth} blocks, so "
                    f"{list(numbers)} can't be: name others"
                )
