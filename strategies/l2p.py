"""L2P: a pool of prompts, of which each image takes those whose keys are nearest to its features.

Wang, Zhang, Lee, Zhang, Sun, Ren, Su, Perot, Dy, Pfister 2022, "Learning to Prompt for Continual Learning". Form implemented, with
a frozen vision transformer, N prompts P_m of p tokens, their keys k_m, and q(x) the transformer's features of an image:

    chosen m_1 ... m_top   the prompts with the greatest cosine of q(x) and k_m
    tokens                 [P_m1; ...; P_mtop; class token; patches], prompts without positions, through all blocks
    features               mean over the prompts' tokens after the last layer norm
    loss                   cross-entropy of head(features) - pull * sum over the chosen of cos(q(x), k_m), means over the batch

The query has no gradient, so keys learn by the second term alone. Read in the authors' code (google-research/l2p @3e102b0): 10
prompts of 10 tokens, of which 4 are chosen; prompts and keys begin uniform (from 0 to 0.01: JAX's default, recalled); logits
outside of the task's classes are -inf in the loss; pull 1; Adam without weight decay, anew for each task, at a rate of 0.03 times
the batch size / 256, for 5 epochs; no use of which prompts past tasks chose.

Deviations: that code has a batch of images choose the prompts that most of them want, in training and in testing, so an answer
depends on what is asked with it; here each image chooses its own, as the paper's equation has it. The code's head begins with
weights of 0, and gradients are clipped at a norm of 1; here the head is the model's, and nothing is clipped.

Measured: see `docs/prompts.md`; no published number was run: there are no ImageNet-21k weights here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream.bus import on
from clstream.events import SessionStarted
from clstream.models.vit_blocks import Vit
from clstream.params import check_integer, check_number
from clstream.strategy import OptimizerFactory
from clstream.strategy.prompting import Prompting


class L2P(Prompting):
    """Learn a pool of prompts and their keys; each image chooses by its features.

    Args:
        model: a vision transformer: see `clstream.models.vit_blocks`. It is frozen, but for its head.
        optimizer: makes the optimizer, anew for each session.
        pool: how many prompts there are.
        length: of a prompt, in tokens.
        chosen: how many prompts an image takes.
        pull: weight of the cosines of queries and chosen keys.
        active_classes: whose outputs compete, "all", "seen" or "task", as published: see `clstream.Strategy`.

    Raises:
        TypeError: for a model that is no vision transformer.
        ValueError: for options out of range, and where a run starts for images of another shape than the model takes.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=0.015),
        pool: int = 10,
        length: int = 10,
        chosen: int = 4,
        pull: float = 1.0,
        active_classes: str = "task",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, pool=pool, length=length)
        check_integer(1, pool, chosen=chosen)
        check_number(0, pull=pull)
        self.chosen, self.pull = chosen, pull
        width = self.vit.width
        self.prompts = nn.ParameterDict({"prompt": 0.01 * torch.rand(pool, length, width), "key": 0.01 * torch.rand(pool, width)})
        self.optimizer = self.new_optimizer()

    @on(SessionStarted)
    def renew_optimizer(self, event: SessionStarted) -> None:
        """Make a new optimizer, so that nothing of the past moves what has no gradient now."""
        self.optimizer = self.new_optimizer()

    def prompted(self, vit: Vit, tokens: Tensor, query: Tensor, learning: bool) -> tuple[Tensor, Tensor | float]:
        """Return the mean of the chosen prompts' tokens, and what pulls their keys to the query."""
        cosines = F.normalize(query, dim=1) @ F.normalize(self.prompts["key"], dim=1).T
        nearest = cosines.topk(self.chosen, dim=1)
        prompts = self.prompts["prompt"][nearest.indices].flatten(1, 2)
        through = vit.norm(vit.run(torch.cat([prompts, tokens], 1)))
        return through[:, : prompts.shape[1]].mean(1), -self.pull * nearest.values.sum(1).mean()
