"""FeatKD: features of new samples are held near those of a frozen copy of the network.

Smith, Tian, Halbe, Hsu, Kira 2023, "A Closer Look at Rehearsal-Free Continual Learning". It is a regulariser for any strategy whose
model has `features`: `Regularised(LwFMC(model), [FeatKDPenalty()])` is the paper's PredKD + FeatKD, and
`Regularised(LwFMC(model, form="bce", active_classes="task"), [FeatKDPenalty()])` its FeatKD (BCE). Form implemented, as research
code of the group:

    loss + strength * mean over samples and features of (f(x) - f'(x))^2

f the penultimate features, f' those of the network as the last task left it; in the first task of the initial network, so random
features are held there (`from_start=False`: from the second task on). Paper, as summarised: a squared norm at a layer, no mean. The
code has strength 5 on CIFAR-100, 1 on TinyImageNet.

Deviation: inputs are augmented once more, the same for both networks, and go through the network once more; with dropout, or batch
norm in training mode, that draws and counts again. Where neither is there it is the code's loss and gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clstream.bus import on
from clstream.events import RunStarted, TaskEnded
from clstream.params import check_bool, check_number
from clstream.strategy import Regulariser, Strategy
from clstream.strategy.regulariser import frozen
from clstream.stream import Samples


class FeatKDPenalty(Regulariser):
    """Hold the features of new samples near those of the network as the last task left it.

    Args:
        strength: a number.
        from_start: whether the first task has the initial network as its teacher; if not, it has none.

    """

    def __init__(self, strength: float = 5.0, from_start: bool = True) -> None:
        check_number(0, strength=strength)
        check_bool(from_start=from_start)
        self.strength, self.from_start = strength, from_start
        self.teacher: nn.Module | None = None

    def attach(self, strategy: Strategy) -> None:
        """Refuse a model without features."""
        super().attach(strategy)
        if not callable(getattr(strategy.model, "features", None)):
            raise TypeError(f"FeatKDPenalty needs a model with a method `features`, which {type(strategy.model).__name__} hasn't")

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Make the initial network the teacher, or none."""
        self.teacher = frozen(self.strategy.model) if self.from_start else None

    @on(TaskEnded)
    def freeze(self, event: TaskEnded) -> None:
        """Make the network as it is the teacher."""
        self.teacher = frozen(self.strategy.model)

    def penalty(self, samples: Samples) -> Tensor:
        """Return the mean squared difference of the features, times the strength."""
        if self.teacher is None or self.strength == 0:
            return torch.zeros((), device=samples.y.device)
        model: nn.Module = self.strategy.model
        x = samples.x if self.strategy.augment is None else self.strategy.augment(samples.x)
        with torch.no_grad():
            kept = self.teacher.features(x)  # type: ignore[operator]  # attach has seen that there is one
        return self.strength * (model.features(x) - kept).square().mean()  # type: ignore[operator,no-any-return]
