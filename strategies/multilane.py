"""MULTI-LANE: a frozen vision transformer, and beside it a lane for each task, which reads a few summaries of the patches.

De Min, Mancini, Lathuiliere, Roy, Ricci 2024, "Less is more: Summarizing patch tokens for efficient multi-label class-incremental
learning" (CoLLAs). The paper's tables could not be read; the form is that of its authors' code (tdemin16/multi-lane, facts alone).

Lane t has a class token c, begun as the transformer's without its position; selectors S, (selectors, width); and in the first
blocks prompts P for keys and values. With x the tokens of the frozen transformer, a block does

    x', c', S' = LN1(x), LN1(c), LN1(S)
    A  = softmax(S' x'^T / sqrt(width))                      M = A x': what the selectors choose of the image
    c <- c + Attn(c' asks; keys and values of [P, c', M])    by the block's own projections and heads
    S <- S + S'                                              what attention gives for M is dropped
    c <- c + MLP(LN2(c)),  S <- S + MLP(LN2(S)),  x <- x + Attn(x'), x <- x + MLP(LN2(x))

and c after the last layer norm, at unit length, goes to one linear head for all classes.

Learning task t: lane t starts as a copy of lane t - 1 and is trained alone, with the head and a new optimizer. Outputs of other
tasks' classes are left out of the loss (`clstream.losses`), so their rows have no gradient: what old lanes say of old classes never
changes, and on fixed images nothing is forgotten. The learning rate falls by a cosine to 0 over the epochs of a session. An answer
adds up the lanes, each for the classes of its own task.

Computed otherwise, with the same numbers:

- S never sees the image, since its attention is dropped: it goes through the blocks once for a batch, not once for each image.
- Only c asks; the rows that are dropped are not computed. The last block of the frozen transformer ends with its keys and values.
- The rows of A add up to 1, so keys and values of M are A K and A V, with the K and V that the frozen transformer has for x'. So
  c's scores are A (K q), and what it takes is V^T (A^T weights): a lane costs little more than one token in place of selectors + 1.

Lanes are run one after the other: how many there are changes no bit of any of them.

Deviations: classes that have not come score -inf, where the code has 0 with several labels. The code draws prompts for all tasks
together, with a deviation of 1/sqrt(tasks p width); here the number of tasks is not known, and it is 1/sqrt(p width); all but the
first lane are copies in both. LayerScale, where a transformer has it, scales what attention and MLP add, to c and x alike. A task
that comes again goes on with its lane. Where tasks share classes, the lanes of a class add up, unless the task is given. Images are
normalised as the model does it.

Measured: see `docs/multilane.md`. No number of the paper is reproduced: its weights and data were not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream.bus import on
from clstream.events import EpochStarted, RunStarted, TaskStarted
from clstream.models.vit_blocks import Block, Vit, vit_of
from clstream.params import check_integer
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.answers import mask_logits
from clstream.stream import Samples, Task


class Lanes(nn.Module):
    """The selectors and prompts of all lanes, and how they read images.

    Args:
        selectors: S of each lane.
        prompts: P of each lane and block, keys and values.
        blocks: the first blocks, which have prompts.
        width: of a token.

    """

    def __init__(self, selectors: int, prompts: int, blocks: int, width: int) -> None:
        super().__init__()
        self.shape, self.prompt_shape = (selectors, width), (2, blocks, prompts, width)
        self.selectors, self.prompts = nn.ParameterList(), nn.ParameterList()

    def __len__(self) -> int:
        return len(self.selectors)

    def open(self, random: torch.Generator, like: Tensor) -> None:
        """Add a lane: a copy of the newest one, or the first one, drawn at random."""
        for lanes, shape in ((self.selectors, self.shape), (self.prompts, self.prompt_shape)):
            if len(lanes):
                start = lanes[-1].detach().clone()
            else:
                start = torch.randn(shape, generator=random).to(like) / math.sqrt(max(1, shape[-2] * shape[-1]))
            lanes.append(nn.Parameter(start))

    def train_only(self, lane: int) -> list[nn.Parameter]:
        """Freeze all lanes but one, and return the parameters of that."""
        own = [self.selectors[lane], self.prompts[lane]]
        for parameter in self.parameters():
            parameter.requires_grad_(any(parameter is learned for learned in own)).grad = None
        return own

    def forward(self, vit: Vit, x: Tensor, lanes: list[int]) -> list[Tensor]:
        """Return the class token of each lane, (n, width), of unit length; one lane's does not depend on which others are asked."""
        assert vit.class_token is not None
        tokens, start = vit.embed(x), vit.class_token.expand(len(x), 1, -1)
        states = [(start, self.selectors[lane]) for lane in lanes]
        for number, block in enumerate(vit.blocks):
            frozen = block.norm1(tokens)
            queries, keys, values = block.qkv(frozen)
            for place, (token, selectors) in enumerate(states):
                prompts = self.prompts[lanes[place]]
                own = prompts[:, number] if number < prompts.shape[1] else prompts.new_empty(2, 0, vit.width)
                chosen = block.norm1(selectors)
                token = token + attend(block, block.norm1(token), selection(chosen, frozen), keys, values, own)
                selectors = selectors + chosen
                states[place] = token + block.mlp(block.norm2(token)), selectors + block.mlp(block.norm2(selectors))
            if number + 1 < len(vit.blocks):
                tokens = tokens + block.mix(queries, keys, values)
                tokens = tokens + block.mlp(block.norm2(tokens))
        return [F.normalize(vit.norm(token)[:, 0], dim=1) for token, _ in states]


def selection(selectors: Tensor, tokens: Tensor) -> Tensor:
    """Return A, (n, selectors, t): how much of each of (n, t, width) tokens the (selectors, width) selectors take."""
    return (selectors @ tokens.mT / math.sqrt(tokens.shape[2])).softmax(2)


def attend(block: Block, token: Tensor, shares: Tensor, keys: Tensor, values: Tensor, prompts: Tensor) -> Tensor:
    """Return what attention adds to a lane's class token: (n, 1, width).

    Args:
        block: of the frozen transformer.
        token: (n, 1, width), after its first layer norm.
        shares: A, (n, selectors, t).
        keys, values: of the frozen tokens, (n, heads, t, width / heads).
        prompts: keys and values, (2, p, width).

    """
    q, k, v = (part.squeeze(2) for part in block.qkv(token))  # (n, heads, width / heads)
    prompt_keys, prompt_values = prompts.unflatten(2, (block.heads, -1))
    scores = [
        torch.einsum("nhw,phw->nhp", q, prompt_keys),
        (q * k).sum(2, keepdim=True),
        (keys @ q[..., None]).squeeze(3) @ shares.mT,
    ]
    weights = torch.cat(scores, 2).div(math.sqrt(q.shape[2])).softmax(2)
    of_prompts, of_itself, of_chosen = weights.split([part.shape[2] for part in scores], 2)
    mixed = torch.einsum("nhp,phw->nhw", of_prompts, prompt_values) + of_itself * v
    mixed = mixed + ((of_chosen @ shares)[:, :, None] @ values).squeeze(2)
    added: Tensor = mixed.flatten(1)[:, None]
    for module in block.output:
        added = module(added)
    return added


class MultiLane(Strategy):
    """Learn each task in a lane of its own beside a frozen vision transformer.

    Args:
        model: a vision transformer with a class token: see `clstream.models.vit_blocks.vit_of`. It is frozen, but for its head.
        optimizer: makes the optimizer of a task's lane and the head, anew for each task; without weight decay.
        selectors: how many summaries of the tokens a lane reads; the authors have 10 to 20. 0: the class token and prompts alone.
        prompts: keys and values that a lane adds in each of the first blocks; the authors have as many as selectors.
        prompted_blocks: how many first blocks have prompts; the authors have 5, or 12, of 12. More than there are: all.

    Raises:
        TypeError: for a model that is no such vision transformer.
        ValueError: for an optimizer with weight decay, which would move old rows of the head.

    """

    takes_controls = ("clip", "accumulate")  # it has a schedule, and a new optimizer for each task
    needs_images = True
    rehearsal_free = True
    takes_regularisers = False
    learns_targets = ("label", "multilabel")
    fixed_classes = "those of the task in the loss, those that came in an answer"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=0.015),
        selectors: int = 20,
        prompts: int = 20,
        prompted_blocks: int = 5,
    ) -> None:
        super().__init__(model, optimizer)
        check_integer(0, selectors=selectors, prompts=prompts, prompted_blocks=prompted_blocks)
        vit = vit_of(model, "MultiLane")
        if vit.class_token is None:
            raise TypeError("MultiLane needs a vision transformer with a class token, which this one hasn't: it pools its patches")
        if not all(isinstance(norm, nn.Identity) for block in vit.blocks for norm in block.head_norms):
            raise TypeError("MultiLane needs a vision transformer whose queries and keys are linear, and this one norms them")
        self.model.requires_grad_(False)
        self.head.requires_grad_(True)
        self.make_optimizer, self.optimizer = optimizer, optimizer(self.head.parameters())
        if any(group.get("weight_decay") for group in self.optimizer.param_groups):
            raise ValueError(
                "MultiLane keeps the rows of the head that old classes have as they are, and weight decay would move them: give an "
                "optimizer without, weight_decay=0"
            )
        self.random = torch.Generator()
        self.sizes = selectors, prompts, min(prompted_blocks, len(vit.blocks)), vit.width
        self.shares_classes = False  # whether tasks do, so that a question with the task given is one to its lane alone
        self.start()

    def start(self) -> None:
        """Start without lanes."""
        self.lanes = Lanes(*self.sizes)
        self.tasks: list[int] = []  # the task of each lane
        self.classes: list[Tensor] = []  # and its labels
        self.current = -1  # the lane that learns
        self.rates: list[float] = []  # the learning rates that an epoch begins with, by group

    @property
    def head(self) -> nn.Module:
        """The model's head."""
        head: nn.Module = self.model.head  # type: ignore[assignment]  # a Classifier's, as `vit_of` has asked for
        return head

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Put the transformer in evaluation mode, and start without lanes."""
        self.model.eval()
        self.head.train()
        self.start()
        self.shares_classes = event.stream.shares_classes

    @on(TaskStarted)
    def open_lane(self, event: TaskStarted) -> None:
        """Give the task its lane, the one that it had before or a new one, and that and the head a new optimizer."""
        weight = next(self.model.parameters())
        if event.task.id not in self.tasks:
            self.lanes.open(self.random, weight)
            self.tasks.append(event.task.id)
            self.classes.append(torch.tensor(event.task.classes, device=weight.device))
        self.current = self.tasks.index(event.task.id)
        self.optimizer = self.make_optimizer([*self.lanes.train_only(self.current), *self.head.parameters()])
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    @on(EpochStarted)
    def anneal(self, event: EpochStarted) -> None:
        """Set the learning rate of the epoch."""
        share = (1 + math.cos(math.pi * event.epoch.index / len(event.epoch.session))) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def outputs(self, samples: Samples) -> Tensor:
        """Return the head's (n, outputs) for what the task's lane makes of samples to learn, augmented."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        (token,) = self.lanes(vit_of(self.model), x, [self.current])
        outputs: Tensor = self.head(token)
        return outputs

    def mask_other_heads(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n, outputs) with those of other tasks' classes masked with -inf."""
        return mask_logits(outputs, self.classes[self.current])

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: unless tasks share classes."""
        return self.predicts_from_scores and not self.shares_classes

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, outputs): each class's output in the lane of its task; -inf for classes that have not come.

        Where tasks share classes, lanes add up, or the lane of the task answers alone, if it is given.
        """
        if not self.tasks:
            return torch.full_like(self.model(x), float("-inf"))
        lanes = list(range(len(self.tasks)))
        if self.shares_classes and task is not None and task.id in self.tasks:
            lanes = [self.tasks.index(task.id)]
        scores = torch.zeros((), device=x.device)
        for lane, token in zip(lanes, self.lanes(vit_of(self.model), x, lanes), strict=True):
            outputs: Tensor = self.head(token)
            others = torch.ones_like(outputs[0], dtype=torch.bool).index_fill_(0, self.classes[lane], False)
            scores = scores + outputs.masked_fill(others, 0)
        return mask_logits(scores, torch.cat([self.classes[lane] for lane in lanes]))

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: the model's, and those of all lanes."""
        yield from super().answering_weights()
        yield from self.lanes.parameters()
