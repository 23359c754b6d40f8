"""A vision transformer block by block: what prompts, lanes and other methods that reach into one are built on.

    vit = vit_of(model)                                   # VitTiny, Timm and Pretrained around a VisionTransformer of timm
    tokens = vit.embed(x)                                 # (n, t, width), with positions
    for block in vit.blocks:
        tokens = block(tokens)                            # or block(tokens, (keys, values)), with prompts
    logits = model.head(vit.features(tokens))             # as model(x)

Nothing is copied: the modules are the model's own, whatever adapters were put into them. A pass through blocks, a block or its
attention is one call of a module for whoever watches these, such as runs in bfloat16, which compute the whole of it so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models.classifier import Classifier
from clstream.models.vit import VitTiny, _Attention, _TransformerBlock

KeysValues = tuple[Tensor, Tensor]
"""Prompts put before a block's keys and values, as they are after their projection: each (p, width) or (n, p, width)."""

P = ParamSpec("P")


class _Call(nn.Module):
    """Calls a function: so it is a module's forward pass."""

    def forward(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)


_CALL = _Call()


def _as_module(method: Callable[P, Tensor]) -> Callable[P, Tensor]:
    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        result: Tensor = _CALL(method, *args, **kwargs)
        return result

    return call


NO_PROMPTS: Mapping[int, KeysValues] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Block:
    """A transformer block, `x + attention(norm1(x))`, then `x + mlp(norm2(x))`, and its parts; n samples of t tokens.

    What is added to the tokens is added as the model does it: after LayerScale and stochastic depth where it has these.
    """

    norm1: nn.Module
    """The layer norm before attention: (n, t, width) to the same."""

    norm2: nn.Module
    """The layer norm before the hidden layer."""

    heads: int
    """How many heads attend."""

    projections: tuple[nn.Module, ...]
    """One layer to queries, keys and values side by side, or a layer for each of the three."""

    head_norms: tuple[nn.Module, nn.Module]
    """What queries and keys go through, by head."""

    dropout: nn.Dropout | None
    """Of attention weights, in training."""

    output: tuple[nn.Module, ...]
    """What mixed values go through, one module after the other; the output projection is among them."""

    hidden: tuple[nn.Module, ...]
    """The hidden layer, and what its output goes through."""

    @_as_module
    def __call__(self, tokens: Tensor, prompts: KeysValues | None = None) -> Tensor:
        """Return (n, t, width) tokens after the block."""
        tokens = tokens + self.attention(self.norm1(tokens), prompts)
        return tokens + self.mlp(self.norm2(tokens))

    @_as_module
    def attention(self, tokens: Tensor, prompts: KeysValues | None = None) -> Tensor:
        """Return what attention adds to tokens, from (n, t, width) after `norm1`."""
        return self.mix(*self.qkv(tokens), prompts)

    def mlp(self, tokens: Tensor) -> Tensor:
        """Return what the hidden layer adds to tokens, from (n, t, width) after `norm2`."""
        return _through(self.hidden, tokens)

    def qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (n, heads, t, width / heads), of tokens after `norm1`."""
        q, k, v = self._project(tokens, (0, 1, 2))
        return self.head_norms[0](q), self.head_norms[1](k), v

    def queries(self, tokens: Tensor) -> Tensor:
        """Return the queries alone."""
        queries: Tensor = self.head_norms[0](self._project(tokens, (0,))[0])
        return queries

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Return the keys and the values alone."""
        k, v = self._project(tokens, (1, 2))
        return self.head_norms[1](k), v

    @_as_module
    def mix(self, q: Tensor, k: Tensor, v: Tensor, prompts: KeysValues | None = None) -> Tensor:
        """Return what attention adds to the tokens that asked: (n, queries, width), after the output projection.

        Args:
            q: (n, heads, queries, width / heads).
            k, v: (n, heads, t, width / heads).
            prompts: put before k and v as they are, cut into heads.

        Raises ValueError for prompts of another shape.

        """
        if prompts is not None:
            k, v = (torch.cat([self._prompt(prompt, part), part], 2) for prompt, part in zip(prompts, (k, v), strict=True))
        rate = self.dropout.p if self.dropout is not None and self.dropout.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return _through(self.output, mixed.transpose(1, 2).flatten(2))

    def _project(self, tokens: Tensor, parts: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the queries (0), keys (1) or values (2) of tokens, by head."""
        if len(self.projections) == 3:
            return tuple(self._by_head(self.projections[part](tokens)) for part in parts)
        layer = self.projections[0]
        if len(parts) == 3 or type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            projected = layer(tokens).chunk(3, 2)
            return tuple(self._by_head(projected[part]) for part in parts)
        width = layer.out_features // 3
        rows = slice(parts[0] * width, (parts[-1] + 1) * width)  # those that are asked for lie side by side
        projected = F.linear(tokens, layer.weight[rows], None if layer.bias is None else layer.bias[rows]).chunk(len(parts), 2)
        return tuple(map(self._by_head, projected))

    def _by_head(self, tokens: Tensor) -> Tensor:
        by_head: Tensor = tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return by_head

    def _prompt(self, prompt: Tensor, like: Tensor) -> Tensor:
        """Return a prompt by head, for each sample."""
        samples, width = len(like), self.heads * like.shape[3]
        if prompt.dim() not in (2, 3) or prompt.shape[-1] != width or prompt.shape[:-2] not in ((), (samples,)):
            raise ValueError(
                f"prompts of keys and values must be (p, {width}), or (n, p, {width}) with n = {samples} samples, not "
                f"{tuple(prompt.shape)}"
            )
        return self._by_head(prompt.expand(samples, -1, -1))


@dataclass(frozen=True, slots=True)
class Vit:
    """A vision transformer's parts, which `vit_of` finds: `model.head(vit.features(vit.run(vit.embed(x))))` is `model(x)`.

    It holds nothing but references, and takes microseconds to build: build it where it is used, rather than keep it.
    """

    model: Classifier
    blocks: tuple[Block, ...]
    width: int
    """Of a token."""

    prefix: int
    """How many tokens stand before the patches: that of the class, if there is one, then registers."""

    class_token: Tensor | None
    """(1, 1, width), what each sample's class token is before its position is added; None where there is none."""

    body: Any
    """timm's VisionTransformer; None for a VitTiny."""

    def embed(self, x: Tensor) -> Tensor:
        """Return (n, prefix + patches, width) tokens with their positions, for raw (n, *input_shape) images."""
        stages: Any = self.model.stages
        x = stages.input(x)
        tokens: Tensor
        if self.body is None:
            tokens = stages.patches(x)
        else:
            tokens = self.body.norm_pre(self.body.patch_drop(self.body._pos_embed(self.body.patch_embed(x))))
        return tokens

    @_as_module
    def run(self, tokens: Tensor, prompts: Mapping[int, KeysValues] = NO_PROMPTS) -> Tensor:
        """Return (n, t, width) tokens after all blocks; `prompts` has keys and values by the number of a block, from 0."""
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, prompts.get(number))
        return tokens

    def norm(self, tokens: Tensor) -> Tensor:
        """Return any (n, t, width) tokens after the last layer norm, all of them, not those alone that are pooled."""
        normed: Tensor
        if self.body is None:
            norm: Any = self.model.stages.norm  # it takes the first token of a sample: here each is the first of its own
            normed = norm(tokens.reshape(-1, 1, self.width)).view_as(tokens)
        else:
            normed = self.body.fc_norm(self.body.norm(tokens))  # one of the two is there, before or after pooling
        return normed

    def features(self, tokens: Tensor) -> Tensor:
        """Return (n, width) features of tokens after all blocks: normed and pooled as the model does it."""
        stages: Any = self.model.stages
        body = self.body
        features: Tensor = stages.norm(tokens) if body is None else body.forward_head(body.norm(tokens), pre_logits=True)
        return features

    def check_input(self, shape: Sequence[int]) -> None:
        """Raise ValueError for images of another (channels, height, width) than the model was built for."""
        own = self.model.params.get("input_shape")
        if own is not None and tuple(own) != tuple(shape):
            raise ValueError(
                f"this {type(self.model).__name__} takes images of the shape {tuple(own)}, and these are of {tuple(shape)}: build "
                "it for these, or resize them"
            )


def vit_of(model: nn.Module, asker: str = "this method", adapted: bool = False) -> Vit:
    """Return a model's parts, to run it block by block.

    Args:
        model: a VitTiny, or a Timm or Pretrained around a VisionTransformer of timm whose blocks are timm's `Block`.
        asker: who needs it, for the error.
        adapted: whether its stages may be run in a way of their own, as with prompts put in from outside: for these themselves.

    Raises:
        TypeError: for any other model, and for one whose stages, blocks or attention are of another kind, as some adapters make
            them, or have hooks: both would be left out here.

    """
    if not adapted and isinstance(model, Classifier) and type(model.stages) is not nn.Sequential:
        raise TypeError(
            f"{asker} runs a vision transformer block by block, and this one's stages are {type(model.stages).__name__}, which "
            "would be left out: take a model without prompts or other adapters of the whole; LoRA in its linear layers is kept"
        )
    if isinstance(model, VitTiny):
        vit = _of_vit_tiny(model)
    else:
        body = getattr(getattr(model, "stages", None), "body", None)
        timm = sys.modules.get("timm.models.vision_transformer")  # there, if the model is of it
        if not isinstance(model, Classifier) or timm is None or type(body) is not timm.VisionTransformer:
            what = type(model).__name__ if body is None else f"{type(model).__name__} around a {type(body).__name__}"
            raise TypeError(
                f"{asker} needs a vision transformer: VitTiny, or a Timm or Pretrained whose name is of timm's VisionTransformer, "
                f"as vit_base_patch16_224; {what} is none"
            )
        vit = _of_timm(model, body, timm, asker)
    return vit


def _of_vit_tiny(model: VitTiny) -> Vit:
    stages: Any = model.stages
    blocks = tuple(_block_of_vit_tiny(stage) for name, stage in stages.named_children() if name.startswith("block"))
    token: Tensor = stages.patches.token
    _check_plain(model, model.stages)
    return Vit(model, blocks, token.shape[2], 1, token, None)


def _block_of_vit_tiny(block: Any) -> Block:
    _check_type(block, _TransformerBlock)
    attention = block.attention
    _check_type(attention, _Attention)
    return Block(
        norm1=block.norm1,
        norm2=block.norm2,
        heads=attention.heads,
        projections=(attention.qkv,) if attention.fused else (attention.q, attention.k, attention.v),
        head_norms=(_SAME, _SAME),
        dropout=None,
        output=(attention.out,),
        hidden=(block.mlp,),
    )


def _of_timm(model: Classifier, body: Any, timm: Any, asker: str) -> Vit:
    _check_plain(model, model.stages, body, body.blocks)
    token = None if body.cls_token is None else body.norm_pre(body.cls_token)
    blocks = tuple(_block_of_timm(block, timm, asker) for block in body.blocks)
    return Vit(model, blocks, body.embed_dim, body.num_prefix_tokens, token, body)


def _block_of_timm(block: Any, timm: Any, asker: str) -> Block:
    _check_type(block, timm.Block)
    attention = block.attn
    _check_type(attention, timm.Attention)
    if getattr(attention, "gate", None) is not None:
        raise TypeError(f"{asker} needs a vision transformer with plain attention, and this one's is gated")
    norm = getattr(attention, "norm", _SAME)
    return Block(
        norm1=block.norm1,
        norm2=block.norm2,
        heads=attention.num_heads,
        projections=(attention.qkv,),
        head_norms=(attention.q_norm, attention.k_norm),
        dropout=attention.attn_drop,
        output=(norm, attention.proj, attention.proj_drop, block.ls1, block.drop_path1),
        hidden=(block.mlp, block.ls2, block.drop_path2),
    )


def _check_type(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        raise TypeError(
            f"a vision transformer can be run block by block if its blocks and their attention are plain, and here is a "
            f"{type(module).__name__} in place of its {kind.__name__.strip('_')}: put adapters into the linear layers in them"
        )
    _check_plain(module)


def _check_plain(*modules: nn.Module) -> None:
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(
                f"a hook on {type(module).__name__} would be left out where a vision transformer is run block by block: put it on "
                "a layer norm, a linear layer or the hidden layer of a block"
            )


def _through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


_SAME = nn.Identity()
