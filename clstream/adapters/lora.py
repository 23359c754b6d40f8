"""LoRA: a product of two thin matrices beside a frozen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Form implemented, of a layer that gives W x + b:

    W x + b + (alpha / rank) B A x

A (rank, inputs) begins as torch draws a linear layer, as the authors' code has it (the paper says normal), B (outputs, rank) as 0:
the network begins as it was. A convolution has A of its own kernel, stride and padding, and B of 1 x 1, as `peft` has it. A layer
that gives queries, keys and values at once may have a product for each of some of them (`parts="qv"`), as if each had a layer of
its own. The product is not merged into the weight: it is computed beside it, 2 rank (inputs + outputs) FLOPs a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clstream.adapters.adapter import AdapterLayer, ModuleAdapter
from clstream.params import check_integer, check_positive, check_share

PARTS = "qkv"


class LoRA(ModuleAdapter):
    """A product of two thin matrices beside the weights of linear layers and convolutions (Hu et al. 2021).

    Args:
        rank: of the product.
        alpha: the product is multiplied by alpha / rank. None: by 1.
        dropout: the share of what the product takes that is set to 0 while it learns.
        parts: for layers that give queries, keys and values at once, such as timm's `qkv`: which of these have a product of their
            own, as "qv" or "qkv". None: there is one product for all that a layer gives.
        modules: patterns of module names. Linear layers and convolutions of one group are meant; others are passed over.

    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        dropout: float = 0.0,
        parts: str | None = None,
        modules: str | list[str] = "*",
    ) -> None:
        super().__init__(modules)
        check_integer(1, rank=rank)
        check_positive(none=True, alpha=alpha)
        check_share(dropout=dropout)
        if parts is not None and (not isinstance(parts, str) or parts not in ("q", "k", "v", "qk", "qv", "kv", "qkv")):
            raise ValueError(f"parts must be some of q, k and v in this order, as 'qv', or None, not {parts!r}")
        self.rank, self.dropout, self.parts = rank, dropout, parts
        self.scale = 1.0 if alpha is None else alpha / rank

    takes = "linear layers, and convolutions in one group"

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module computes what nn.Linear does, or nn.Conv2d in one group."""
        computes = type(module).forward
        return computes is nn.Linear.forward or (computes is nn.Conv2d.forward and getattr(module, "groups", 0) == 1)

    def layer(self, name: str, host: nn.Module) -> LowRank:
        """Return the two matrices for a host. Raises ValueError for one that `parts` doesn't fit."""
        if self.parts is not None and not (isinstance(host, nn.Linear) and host.out_features == 3 * host.in_features):
            raise ValueError(
                f"parts={self.parts!r} is for layers that give queries, keys and values at once, and {name} is none: name these by "
                "modules, as '*.qkv', or leave parts out"
            )
        return LowRank(host, self.rank, self.scale, self.dropout, self.parts)


class LowRank(AdapterLayer):
    """What LoRA puts on a linear layer or convolution: `A`, then `B`, which is a list of layers where there are parts."""

    def __init__(self, host: nn.Module, rank: int, scale: float, dropout: float, parts: str | None) -> None:
        super().__init__()
        self.scale, self.parts = scale, parts
        self.dropout = nn.Dropout(dropout) if dropout else None
        if isinstance(host, nn.Conv2d):
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            shape: dict[str, Any] = {name: getattr(host, name) for name in names}
            self.A: nn.Module = nn.Conv2d(host.in_channels, rank, bias=False, **shape)
            self.B: nn.Module = nn.Conv2d(rank, host.out_channels, 1, bias=False)
        elif isinstance(host, nn.Linear) and parts is not None:
            self.A = nn.Linear(host.in_features, rank * len(parts), bias=False)
            self.B = nn.ModuleList(nn.Linear(rank, host.out_features // 3, bias=False) for _ in parts)
        elif isinstance(host, nn.Linear):
            self.A, self.B = nn.Linear(host.in_features, rank, bias=False), nn.Linear(rank, host.out_features, bias=False)
        for weight in self.B.parameters():
            nn.init.zeros_(weight)

    def forward(self, taken: Tensor, given: Tensor) -> Tensor:
        """Return what the host gave, and the scaled product."""
        inner = self.A(taken if self.dropout is None else self.dropout(taken))
        if self.scale != 1:
            inner = self.scale * inner  # the smallest of the tensors
        if not isinstance(self.B, nn.ModuleList):
            product: Tensor = self.B(inner)
            return given + product
        whole = dict(zip(PARTS, given.chunk(3, -1), strict=True))
        for part, low, up in zip(self.parts or "", inner.chunk(len(self.B), -1), self.B, strict=True):
            whole[part] = whole[part] + up(low)
        return torch.cat([whole[part] for part in PARTS], -1)
