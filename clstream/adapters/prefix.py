"""Prefix tuning: keys and values before those of the tokens, in each block of a vision transformer.

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", in the form of He et al. 2022, "Towards a Unified
View of Parameter-Efficient Transfer Learning": each block has (length, width) keys and values, the same for all inputs, which every
token may attend to. There is no network that makes them, as Li & Liang have for training. They begin normal, with a deviation of
0.02: the network does not begin as it was, since prompts take a share of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clstream.adapters.prompted import PromptLayer, Prompts
from clstream.models.vit_blocks import Vit


class Prefix(Prompts):
    """Keys and values of their own before those of the tokens, in each block of a vision transformer (Li & Liang 2021).

    Args:
        length: how many there are in each block.

    """

    def prompts(self, vit: Vit) -> KeysAndValues:
        """Return the keys and values of all blocks."""
        return KeysAndValues(len(vit.blocks), self.length, vit.width)


class KeysAndValues(PromptLayer):
    """What Prefix puts into a model: `keys` and `values`, each (blocks, length, width)."""

    def __init__(self, blocks: int, length: int, width: int) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.empty(blocks, length, width).normal_(std=0.02)) for _ in range(2))

    def through(self, vit: Vit, tokens: Tensor) -> Tensor:
        """Return (n, t, width) tokens after all blocks."""
        return vit.run(tokens, dict(enumerate(zip(self.keys, self.values, strict=True))))
