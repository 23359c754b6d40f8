"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models.classifier import Classifier, _image_shape
from clstream.models.layers import Normalise
from clstream.params import check_bool, check_integer


class _Patches(nn.Module):
    """An image to tokens: one for each patch, after one for the class, with learned positions."""

    def __init__(self, into: int, width: int, patch: int, count: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(into, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + count, width))
        for parameter in (self.token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        return torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions


class _Attention(nn.Module):
    """Self-attention of several heads, with a layer each for queries, keys and values, or one for all three."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, 2) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _TransformerBlock(nn.Module):
    """Attention, then a hidden layer of four times the width with GELU: each after a layer norm, and added to its input."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x  # noqa: RET504  # in two lines, as it is drawn everywhere


class _ClassToken(nn.LayerNorm):
    """The token of the class, normed: what a vision transformer answers by."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.LayerNorm names it
        return super().forward(input[:, 0])


class VitTiny(Classifier):
    """A vision transformer (Dosovitskiy et al. 2021) for small images; smaller than ViT-Ti, which is width 192, depth 12, heads 3.

    Queries, keys and values have a layer each, named so that they can be found: `stages.block1.attention.q.weight`.

    Args:
        input_shape: (channels, height, width), a whole number of patches each way.
        classes: number of outputs.
        patch: height and width of a patch.
        width: of a token.
        depth: number of blocks.
        heads: of each attention.
        fused: one layer for queries, keys and values: `stages.block1.attention.qkv.weight`.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        patch: int = 4,
        width: int = 64,
        depth: int = 6,
        heads: int = 4,
        fused: bool = False,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        check_integer(1, patch=patch, width=width, depth=depth, heads=heads, classes=classes)
        check_bool(fused=fused)
        into, height, breadth = _image_shape("VitTiny", input_shape, patch)
        if height % patch or breadth % patch:
            raise ValueError(
                f"VitTiny cuts images into {patch} x {patch} patches, and {height} x {breadth} is no whole number of them"
            )
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, which {width} of {heads} is not")
        stages: dict[str, nn.Module] = {
            "input": Normalise(mean, std),
            "patches": _Patches(into, width, patch, (height // patch) * (breadth // patch)),
        }
        for number in range(1, depth + 1):
            stages[f"block{number}"] = _TransformerBlock(width, heads, fused)
        stages["norm"] = _ClassToken(width)
        super().__init__(stages, width, classes, head, cut=f"block{depth}")
