"""The vision half of CPE-CLIP alone: prompts in a frozen vision transformer, class means that answer, the brake of class counts.

After D'Alessandro, Alonso, Calabrés, Galar 2023: see `CPECLIP`. There is no text tower, so a class is the mean of its images:

    G         (depth, prompts, width) is learned, all else is frozen. Before block i < depth what came of the prompts stays, and G_i
              is appended to the tokens
    a session a new optimizer; in epoch e the learning rate is 0.001 + 0.099 e / 50. When an epoch begins a row is taken for each of
              the session's classes: the mean of the features of its images, not augmented, with the prompts as they are. The loss
              is the cross-entropy of scale * cosine of the features and these rows, which are no parameters. Gradients are
              multiplied by N_t / (N_1 + ... + N_t)
    its end   means of its classes are taken with the prompts that were learned. Those of other classes are not taken anew, as there
              are no images: what the moving prompts cost them is the price that the brake keeps down
    an answer scale * cosine of the features and the mean of each class that came

A session of one class has a loss of 0, and teaches nothing. Own choices: the rows, and the scale of 16. It is no published method,
and no published number is for it.

Measured: `docs/cpe-clip.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from clstream.strategies.cpe_clip.prompts import MODES, PromptBank, PromptTuning, braked, run_with_prompts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import EpochStarted, RunStarted, SessionEnded
from clstream.models.vit_blocks import vit_of
from clstream.params import check_choice
from clstream.strategy import OptimizerFactory
from clstream.strategy.frozen_features import add_by_class
from clstream.stream import Samples, Subset, Task

TOGETHER = 1024
"""Images whose features are computed together."""


class CPEVision(PromptTuning):
    """Learn prompts of a frozen vision transformer, slower the more classes came; answer with the nearest class mean.

    Args:
        model: a vision transformer, as `vit_of` takes it. It is frozen, and its head is not used.
        optimizer: makes the optimizer of a session from the prompts.
        prompts: of each block.
        depth: how many blocks have prompts. None: all.
        mode: how prompts go from block to block: "replace", "accumulate" or "accumulate_same".
        brake: whether gradients are multiplied by the share that the session's classes have of all that came.
        schedule: of the learning rate: "warm_up", which begins with a hundredth of it in each session, or "constant".
        scale: what cosines are multiplied by.

    """

    takes_new_classes = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-5),
        prompts: int = 2,
        depth: int | None = None,
        mode: str = "accumulate",
        brake: bool = True,
        schedule: str = "warm_up",
        scale: float = 16.0,
    ) -> None:
        check_choice(MODES, mode=mode)
        super().__init__(model, optimizer, prompts, depth, brake, schedule, scale)
        self.mode = mode
        self.bank = PromptBank(self.depth, prompts, vit_of(model).width)
        self.rows = torch.empty(0, 0)  # (classes of the session, features), the means of this epoch at unit length
        self.means: Tensor | None = None  # (classes, features), at unit length; 0 of classes that did not come
        self.renew_optimizer()

    def count_blocks(self) -> int:
        """Return the number of blocks of the transformer."""
        return len(vit_of(self.model, "CPEVision").blocks)

    def learned(self) -> Sequence[nn.Parameter]:
        """Return the bank."""
        return list(self.bank.parameters())

    @on(RunStarted)
    def forget_means(self, event: RunStarted) -> None:
        """Start without means. Raises ValueError for images of another size than the transformer's."""
        vit_of(self.model).check_input(event.stream.input_shape)
        self.means = None

    def features(self, x: Tensor) -> Tensor:
        """Return (n, features) of (n, *input_shape) raw images, with the prompts."""
        vit, bank = vit_of(self.model), braked(self.bank.weight, self.ratio)
        tokens = vit.embed(x)
        many = tokens.shape[1]
        tokens = torch.cat([tokens, bank[0].expand(len(x), -1, -1)], 1)
        return vit.features(run_with_prompts(vit.blocks, tokens, many, bank, self.mode)[:, :many])

    def means_of(self, samples: Samples | Subset, classes: int) -> Tensor:
        """Return the mean features of samples by class, (classes, features), at unit length; 0 of classes that have none."""
        sums = torch.empty(0)
        with evaluating(self):
            for start in range(0, len(samples), TOGETHER):
                part = samples[start : start + TOGETHER].to(self.bank.weight.device)
                features = self.features(part.x)
                sums = sums if len(sums) else features.new_zeros(classes, features.shape[1])
                add_by_class(sums, part.y, features)
        return F.normalize(sums, dim=1)

    @on(EpochStarted)
    def take_rows(self, event: EpochStarted) -> None:
        """Take the means of the session's classes, with the prompts as they are."""
        self.rows = self.means_of(event.epoch.session.samples, self.target_columns)[self.current]

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy of cosines with the means of the session's classes."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        cosines = F.normalize(self.features(x), dim=1) @ self.rows.T
        return F.cross_entropy(self.scale * cosines, torch.searchsorted(self.current, samples.y))

    @on(SessionEnded)
    def take_means(self, event: SessionEnded) -> None:
        """Take the means of the session's classes for good, with the prompts that were learned."""
        means = self.means_of(event.session.samples, self.target_columns)
        self.means = means if self.means is None else self.means.index_copy(0, self.current, means[self.current])

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): scaled cosines with the means of the classes that came, -inf for others."""
        if self.means is None:
            return torch.full_like(self.model(x), float("-inf"))
        assert self.seen_classes is not None
        absent = torch.ones(len(self.means), dtype=torch.bool, device=x.device).index_fill(0, self.seen_classes, False)
        cosines = F.normalize(self.features(x), dim=1) @ self.means.T
        return (self.scale * cosines).masked_fill(absent, float("-inf"))
