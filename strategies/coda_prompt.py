"""CODA-Prompt: prompts that are weighted sums of components; each task brings more of these, and old ones stay as they are.

Smith, Karlinsky, Gutta, Cascante-Bonilla, Kim, Arbelle, Panda, Feris, Kira 2023, "CODA-Prompt: COntinual Decomposed
Attention-based Prompting for Rehearsal-Free Continual Learning". Form implemented, with a frozen vision transformer and q(x) its
features of an image; in each of `blocks` there are components P_m of `length` keys and as many values, each with a key K_m and an
attention vector A_m:

    weights    a_m = cos(q(x) * A_m, K_m), * by element
    prompt     sum over m of a_m P_m: keys and values, put before those of each head
    loss       cross-entropy of head(features) + orthogonality * sum over blocks and over B = K, A, P of mean((B B' - 1)^2)
    task       M new components; those of past tasks keep their weight in the sum, and learn nothing

There is no choice, so keys and attention vectors learn from the cross-entropy. New components begin as random unit vectors that are
orthogonal to each other and to the past ones, P_m as one long vector, where there is room: in a space of no more dimensions than
there are vectors they are orthogonal to each other alone, or not even that. They come when their task does, so nothing has to be
known of how many tasks there will be. A task that comes again gets further ones. Weights are computed as two matrix products,
q (A K)' and the norms from q^2 (A^2)': the same numbers without a tensor of n x M x width.

Read in the authors' code (GT-RIPL/CODA-Prompt @605ac87): 100 components for 10 tasks, of 4 keys and 4 values, in the blocks 0 to 4;
logits outside of the task's classes are -inf in the loss; Adam, rate 0.001 and anew for each task, batches of 128, 20 epochs on
CIFAR-100 and a cosine schedule, which is not part of this class. The weight of the orthogonality is 0.1 in the script for CIFAR-100
of @22948d2, where the mean is also multiplied by 1e-6 (so 1e-7 here), and 0 in that for ImageNet-R of @605ac87, where it isn't;
the default here is 0.1, with the mean as it is in the newer code.

Measured: see `docs/prompts.md`; no published number was run: there are no ImageNet weights of a vision transformer here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream.bus import on
from clstream.events import TaskStarted
from clstream.models.vit_blocks import Vit
from clstream.params import check_integer, check_number
from clstream.strategy import OptimizerFactory
from clstream.strategy.prompting import Prompting

PARTS = ("key", "attention", "prompt")
"""What a component has: K_m, A_m and P_m."""


class CODAPrompt(Prompting):
    """Learn components that prompts are sums of, with weights that depend on the image.

    Args:
        model: a vision transformer: see `clstream.models.vit_blocks`. It is frozen, but for its head.
        optimizer: makes the optimizer, anew for each task.
        components: how many a task brings, in each block.
        length: how many keys, and values, a prompt has.
        blocks: numbers of the blocks that have prompts, from 0.
        orthogonality: weight of the penalty on components that are not orthogonal.
        active_classes: whose outputs compete, "all", "seen" or "task", as published: see `clstream.Strategy`.

    Raises:
        TypeError: for a model that is no vision transformer.
        ValueError: for options out of range, blocks that the model hasn't, and where a run starts for images of another shape than
            the model takes.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=0.001),
        components: int = 10,
        length: int = 4,
        blocks: tuple[int, ...] = (0, 1, 2, 3, 4),
        orthogonality: float = 0.1,
        active_classes: str = "task",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, components=components, length=length)
        check_number(0, orthogonality=orthogonality)
        self.check_blocks(blocks=blocks)
        if not blocks:
            raise ValueError("blocks must name at least one block that has prompts")
        self.blocks, self.orthogonality = tuple(blocks), orthogonality
        width = self.vit.width
        shapes = {"key": (width,), "attention": (width,), "prompt": (2, length, width)}
        self.past = {part: torch.empty(len(blocks), 0, *shapes[part]) for part in PARTS}  # blocks, components so far, ...
        self.prompts = nn.ParameterDict({part: orthonormal(past, components) for part, past in self.past.items()})
        self.optimizer = self.new_optimizer()
        self.random = torch.Generator()
        self.begun = False  # whether a task has

    @on(TaskStarted)
    @torch.no_grad()
    def begin_task(self, event: TaskStarted) -> None:
        """Leave the last task's components as they are, draw new ones, and make a new optimizer."""
        if self.begun:
            self.past = {part: torch.cat([past, self.prompts[part]], 1) for part, past in self.past.items()}
            for part, past in self.past.items():
                self.prompts[part].copy_(orthonormal(past, self.prompts[part].shape[1], self.random))
        self.begun = True
        self.optimizer = self.new_optimizer()

    def prompted(self, vit: Vit, tokens: Tensor, query: Tensor, learning: bool) -> tuple[Tensor, Tensor | float]:
        """Return features with prompts that are sums of all components, and the penalty on their orthogonality."""
        prompts = mixed(query, dict(self.prompts.items())) + mixed(query, self.past)  # there is no gradient in the second
        through = vit.run(tokens, {block: (keys, values) for block, (keys, values) in zip(self.blocks, prompts, strict=True)})
        return vit.features(through), self.penalty() if learning and self.orthogonality else 0.0

    def penalty(self) -> Tensor:
        """Return the weighted mean square of what B B' - 1 has, summed over blocks and over B = K, A, P.

        Of B the past rows have no gradient, so what they are to each other is left out of the backward pass.
        """
        penalties = []
        for part, past in self.past.items():
            old, new = past.flatten(2), self.prompts[part].flatten(2)
            squares = excess(old) + 2 * (new @ old.mT).square().sum() + excess(new)
            penalties.append(squares / (old.shape[1] + new.shape[1]) ** 2)
        return self.orthogonality * torch.stack(penalties).sum()


def excess(rows: Tensor) -> Tensor:
    """Return the sum of squares of B B' - 1, over blocks, for (blocks, m, width) rows."""
    return (rows @ rows.mT - torch.eye(rows.shape[1], device=rows.device)).square().sum()


def mixed(query: Tensor, components: Mapping[str, Tensor]) -> Tensor:
    """Return sums of components, weighted for each query: (blocks, keys or values, n, length, width) for (n, width) queries."""
    keys, attention, prompts = (components[part] for part in PARTS)
    products = torch.einsum("nd,bmd->bnm", query, attention * F.normalize(keys, dim=2))
    norms = torch.einsum("nd,bmd->bnm", query.square(), attention.square()).clamp(min=1e-24).sqrt()
    sums = (products / norms) @ prompts.flatten(2)
    by_part: Tensor = sums.unflatten(2, prompts.shape[2:]).transpose(1, 2)
    return by_part


def orthonormal(past: Tensor, count: int, random: torch.Generator | None = None) -> Tensor:
    """Draw (blocks, count, ...) vectors of length 1, orthogonal to each other and to (blocks, m, ...) past ones, if there is room.

    In a space of fewer dimensions than both together they are orthogonal to each other; of fewer than `count`, of length 1 alone.
    """
    drawn = []
    for old in past.flatten(2).cpu().double():  # past ones may be nearly dependent
        rows = torch.randn(count, old.shape[1], generator=random).double()
        if len(old) + count <= old.shape[1]:
            span = torch.linalg.qr(old.T)[0]
            rows = rows - (rows @ span) @ span.T
        drawn.append(torch.linalg.qr(rows.T)[0].T if count <= old.shape[1] else F.normalize(rows, dim=1))
    return torch.stack(drawn).view(len(past), count, *past.shape[2:]).to(past)
