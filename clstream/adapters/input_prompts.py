"""Input prompts: tokens beside those of the image, in a vision transformer.

Jia et al. 2022, "Visual Prompt Tuning" (VPT). Forms implemented: shallow, `length` tokens that enter before the first block and go
through all of them; deep, each block has `length` tokens of its own in place of those that the block before gave. They stand after
the class token and other tokens that lead, have no position, and are left out of what is pooled at the end. They begin normal, with
a deviation of 0.02 (the authors: uniform, by the size of a patch).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clstream.adapters.prompted import PromptLayer, Prompts
from clstream.models.vit_blocks import Vit
from clstream.params import check_bool


class InputPrompts(Prompts):
    """Tokens of their own beside those of the image, in a vision transformer (VPT, Jia et al. 2022).

    Args:
        length: how many there are.
        deep: whether each block has its own, in place of those that the block before gave.

    """

    def __init__(self, length: int = 10, deep: bool = False) -> None:
        super().__init__(length)
        check_bool(deep=deep)
        self.deep = deep

    def prompts(self, vit: Vit) -> Tokens:
        """Return the tokens."""
        return Tokens(len(vit.blocks) if self.deep else 1, self.length, vit.width)


class Tokens(PromptLayer):
    """What InputPrompts puts into a model: `tokens`, (blocks that have their own, length, width)."""

    def __init__(self, blocks: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(blocks, length, width).normal_(std=0.02))

    def through(self, vit: Vit, tokens: Tensor) -> Tensor:
        """Return (n, t, width) tokens after all blocks."""
        own, lead = self.tokens, vit.prefix
        prompts, rest = tokens[:, :0], tokens[:, lead:]
        first = tokens[:, :lead]
        for number, block in enumerate(vit.blocks):
            if number < len(own):
                prompts = own[number].expand(len(tokens), -1, -1)
            first, prompts, rest = block(torch.cat([first, prompts, rest], 1)).split([lead, prompts.shape[1], rest.shape[1]], 1)
        return torch.cat([first, rest], 1)
