"""Prompts in a vision transformer from outside: what `Prefix` and `InputPrompts` share.

The model's stages are run block by block (`clstream.models.vit_blocks`), with what their child `adapter` adds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from clstream.adapters.adapter import Adapter, AdapterLayer
from clstream.models.vit_blocks import Vit, vit_of
from clstream.params import check_integer


class Prompts(Adapter):
    """Tokens that are no part of an image, the same for each; they learn.

    Args:
        length: how many there are in a block.

    """

    def __init__(self, length: int = 10) -> None:
        check_integer(1, length=length)
        self.length = length

    def hosts(self, model: nn.Module, passed_over: set[str]) -> list[str]:
        """Return the name of the stages. Raises TypeError for what is no vision transformer, or has prompts already."""
        vit_of(model, type(self).__name__, adapted=True)
        return ["stages"]

    def prepare(self, model: nn.Module, hosts: Sequence[str]) -> Callable[[], None]:
        """Build the prompts, and return a function that puts them into the model."""
        vit = vit_of(model, type(self).__name__)
        layer = self.prompts(vit)
        stages: Any = vit.model.stages

        def put() -> None:
            layer.origin = self
            device, children = next(model.parameters()).device, dict(stages._modules)
            stages._modules.clear()
            stages.adapter = layer.to(device)  # it comes first, so that no way through the stages leads around it
            stages._modules.update(children)
            stages.whole = (model,)  # in a tuple, so that it is no child
            stages.__class__ = PromptedStages

        return put

    @abstractmethod
    def prompts(self, vit: Vit) -> PromptLayer:
        """Return the prompts for a vision transformer."""


class PromptLayer(AdapterLayer):
    """Prompts, and the way through the blocks with them."""

    @abstractmethod
    def through(self, vit: Vit, tokens: Tensor) -> Tensor:
        """Return (n, t, width) tokens after all blocks, for tokens before the first: as many, without prompts."""

    def forward(self, *_: Any) -> Tensor:
        """Refuse to be one of the stages. Raises TypeError."""
        raise TypeError(
            "prompts reach into all blocks, so a method that goes through the stages one by one can't have them: use LoRA"
        )


class PromptedStages(nn.Sequential):
    """The stages of a vision transformer, run block by block with prompts."""

    adapter: PromptLayer
    whole: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Sequential names it
        """Map raw (n, *input_shape) images to (n, width) features."""
        vit = vit_of(self.whole[0], adapted=True)
        return vit.features(self.adapter.through(vit, vit.embed(input)))
