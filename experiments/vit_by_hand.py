"""A small vision transformer with LoRA as a careful user writes it: `VitTiny` with `LoRA` is held against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankLinear(nn.Module):
    """W x + b + B A x."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.A, self.B = layer.adapter.A.weight, layer.adapter.B.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B)


class Block(nn.Module):
    """A transformer block whose projections have LoRA."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attention
        self.heads = attention.heads
        self.q, self.k, self.v, self.out = (
            LowRankLinear(layer) for layer in (attention.q, attention.k, attention.v, attention.out)
        )
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, tokens, width) to the same."""
        n, tokens, width = x.shape
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).view(n, tokens, self.heads, width // self.heads).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        added: Tensor = self.mlp(self.norm2(x))
        return x + added


class LowRankVit(nn.Module):
    """A vision transformer whose attention has LoRA; its weights are those of an adapted VitTiny."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        stages = model.stages
        self.patches, self.token, self.positions = stages.patches.embed, stages.patches.token, stages.patches.positions
        self.blocks = nn.Sequential(*(Block(stage) for name, stage in stages.named_children() if name.startswith("block")))
        self.norm = nn.LayerNorm(len(stages.norm.weight)).requires_grad_(False)
        self.head = model.head

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, height, width) floats to (n, classes)."""
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits
