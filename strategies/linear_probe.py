"""Linear probe: only the head learns, by gradient steps, on the features of a frozen network.

The control for methods on frozen features: what they reach in closed form, held against plain fine-tuning of the last layer. Form
implemented: the loss of the targets' kind (`clstream.losses`) on head(features(x)), where the network is in evaluation mode and
only the head has gradients. On a stream of tasks the head forgets as any network that is fine-tuned.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import RunStarted
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import TARGETS, Samples


class LinearProbe(Strategy):
    """Learn the head of a frozen network.

    Args:
        model: has `features`, (n, *input_shape) raw inputs to (n, features), and a `head`, a module from these to the outputs. The
            parameters outside of the head require no gradient any more.
        optimizer: makes the optimizer from the model's parameters.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    rehearsal_free = True
    learns_targets = TARGETS

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory = partial(SGD, lr=0.1), active_classes: str = "all") -> None:
        head = getattr(model, "head", None)
        if isinstance(model, nn.Module) and not (callable(getattr(model, "features", None)) and isinstance(head, nn.Module)):
            raise TypeError(
                f"LinearProbe needs a model with a method `features` and a module `head`, which {type(model).__name__} hasn't"
            )
        super().__init__(model, optimizer, active_classes)
        model.requires_grad_(False)
        self.head.requires_grad_(True)

    @property
    def head(self) -> nn.Module:
        """The model's head."""
        head: nn.Module = self.model.head  # type: ignore[assignment]  # the constructor has asked for it
        return head

    @on(RunStarted)
    def freeze(self, event: RunStarted) -> None:
        """Put the network in evaluation mode, but for its head."""
        self.model.eval()
        self.head.train()

    def outputs(self, samples: Samples) -> Tensor:
        """Return the head's (n, outputs) for samples to learn, augmented; the features have no gradient."""
        with torch.no_grad():
            features = self.model.features(samples.x if self.augment is None else self.augment(samples.x))  # type: ignore[operator]
        outputs: Tensor = self.head(features)
        return outputs
