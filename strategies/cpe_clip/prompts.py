"""What CPE-CLIP and its vision half share: prompts in each layer of a transformer, the brake, the optimizer of a session."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from clstream.bus import on
from clstream.events import EpochStarted, RunStarted, SessionStarted
from clstream.params import check_bool, check_choice, check_integer, check_positive
from clstream.strategy import OptimizerFactory, Strategy

MODES = ("replace", "accumulate", "accumulate_same")

SCHEDULES = ("warm_up", "constant")

WARM_UP, CYCLE, LEAST = 50, 200, 0.01
"""Epochs in which the learning rate rises, epochs until it begins anew, and the least share of it."""


class PromptBank(nn.Module):
    """Prompts of each block: `weight` is (depth, prompts, width), and begins as Xavier's uniform numbers of this shape."""

    def __init__(self, depth: int, prompts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, prompts, width))
        nn.init.xavier_uniform_(self.weight)


def run_with_prompts(
    blocks: Iterable[Callable[[Tensor], Tensor]], tokens: Tensor, begin: int, prompts: Tensor, mode: str
) -> Tensor:
    """Return what the blocks of a transformer make of tokens with prompts among them.

    Args:
        blocks: each maps (n, tokens, d) to the same shape.
        tokens: (n, tokens, d), with the prompts of the first block in their place.
        begin: the place of the first prompt.
        prompts: (depth, many, d). Blocks beyond the depth get no more of them.
        mode: what stands in the place of the prompts before a block, from the second one on. "replace": its own prompts.
            "accumulate": what the block before made of those before, and its own. "accumulate_same": those of all blocks so far.

    """
    held = prompts.shape[1]
    for number, block in enumerate(blocks):
        if 0 < number < len(prompts):
            own = prompts[: number + 1].flatten(0, 1) if mode == "accumulate_same" else prompts[number]
            own = own.expand(len(tokens), -1, -1)
            before = [tokens[:, : begin + held]] if mode == "accumulate" else [tokens[:, :begin]]
            tokens = torch.cat([*before, own, tokens[:, begin + held :]], 1)
            held = held + prompts.shape[1] if mode != "replace" else held
        tokens = block(tokens)
    return tokens


def warm_up(epoch: int) -> float:
    """Return the share of the learning rate in an epoch: to 1 by a line in 50, then to 0.01 by a cosine; anew every 200."""
    phase = epoch % CYCLE
    rise = phase / WARM_UP if phase < WARM_UP else (1 + math.cos(math.pi * (phase - WARM_UP) / (CYCLE - WARM_UP))) / 2
    return LEAST + (1 - LEAST) * rise


def braked(weight: Tensor, ratio: Tensor) -> Tensor:
    """Return a weight as it is, whose gradient is multiplied by a ratio."""
    return weight.detach() + ratio * (weight - weight.detach())


class PromptTuning(Strategy, ABC):
    """Learn prompts of a frozen network, with a new optimizer in each session, and gradients times a ratio of class counts.

    In a session of N_t classes, when n have come so far with these, gradients are multiplied by N_t / n: 1 in the first session.

    Args:
        model: it is frozen, and put in evaluation mode.
        optimizer: makes the optimizer of a session from what is learned.
        prompts: of each block.
        depth: how many blocks have prompts, the first ones.
        brake: whether gradients are multiplied by the ratio.
        schedule: of the learning rate within a session, by epoch: "warm_up" or "constant".
        scale: what cosines are multiplied by.

    """

    fixed_classes = "in the loss those of the session, in an answer those that came"
    takes_controls = ("clip", "accumulate")  # it has a schedule, and a new optimizer for each session
    rehearsal_free = True
    needs_images = True
    takes_regularisers = False  # these hold the model's weights, and prompts are none

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        prompts: int,
        depth: int | None,
        brake: bool,
        schedule: str,
        scale: float,
    ) -> None:
        super().__init__(model, optimizer)
        check_integer(1, prompts=prompts)
        check_integer(1, none=True, depth=depth)
        check_bool(brake=brake)
        check_choice(SCHEDULES, schedule=schedule)
        check_positive(scale=scale)
        blocks = self.count_blocks()
        if depth is not None and depth > blocks:
            raise ValueError(f"depth must be at most {blocks}, as many blocks as {type(model).__name__} has, not {depth}")
        self.depth = blocks if depth is None else depth
        self.brake, self.schedule, self.scale, self.make_optimizer = brake, schedule, scale, optimizer
        self.ratio = torch.ones(())
        self.rates: list[float] = []
        self.current = torch.empty(0, dtype=torch.int64)  # labels of the session that goes on, sorted
        model.eval().requires_grad_(False)

    @abstractmethod
    def count_blocks(self) -> int:
        """Return how many blocks of the model can have prompts; TypeError for a model that has none."""

    @abstractmethod
    def learned(self) -> Sequence[nn.Parameter]:
        """Return what is learned."""

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights and buffers of the model, and what is learned."""
        yield from super().answering_weights()
        yield from self.learned()

    def renew_optimizer(self) -> None:
        """Make an optimizer of what is learned."""
        self.optimizer = self.make_optimizer(self.learned())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start with no classes."""
        self.track_classes(event.stream.device or "cpu")

    @on(SessionStarted)
    def begin_session(self, event: SessionStarted) -> None:
        """Start an optimizer, and set the ratio of the session."""
        assert self.seen_classes is not None
        self.current = self.seen_classes.new_tensor(event.session.classes).sort().values
        share = len(self.current) / len(self.seen_classes) if self.brake else 1.0
        self.ratio = torch.tensor(share, device=self.seen_classes.device)
        self.renew_optimizer()

    @on(EpochStarted)
    def set_rates(self, event: EpochStarted) -> None:
        """Set the learning rates of an epoch."""
        share = warm_up(event.epoch.index) if self.schedule == "warm_up" else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return self.predicts_from_scores
