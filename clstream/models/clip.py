"""CLIP: an image tower and a text tower with one space for both, by open_clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models.classifier import Classifier, _image_shape
from clstream.models.heads import HEADS
from clstream.models.pretrained import ResizedInput, load_backbone
from clstream.params import check_choice, check_integer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP's published weights were trained with."""

BYTES = 258
"""A text tower with so many tokens reads the bytes of a text, after 256 and before 257."""


class Clip(Classifier):
    """A model of open_clip (`pip install clstream[clip]`): images to the space that texts have too, with a head of ours.

    The features are those of the image tower at unit length, so it is a frozen backbone as any other. `clip` is the model itself,
    with both towers, and `tokens` turns texts into what its text tower reads. Images are resized to the size of the image tower.

    Args:
        input_shape: (channels, height, width), of 3 channels, or 1.
        classes: number of outputs of the head.
        name: a model of open_clip with plain transformers for both towers, as `open_clip.list_models()` has it, or a JSON file in
            the form of open_clip's own, with embed_dim, vision_cfg and text_cfg. OpenAI's weights are for names with `-quickgelu`:
            with the others they load, and answer worse. A text tower of 258 tokens reads bytes, any other one open_clip's tokens.
        weights: a file of a state dict, .pth, .pt or .safetensors, or "random" for none. Nothing is ever fetched.
        head: "fixed", "growing" or "cosine".

    Raises:
        ImportError, FileNotFoundError, OSError: if what it needs isn't there; the sentence says what to do.
        ValueError: for a name that there isn't, towers of another kind, and weights that don't fit.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        name: str = "ViT-B-16-quickgelu",
        weights: str | None = None,
        head: str = "fixed",
    ) -> None:
        shape = _image_shape("Clip", input_shape, 1)
        if shape[0] not in (1, 3):
            raise ValueError(f"Clip takes images of 3 channels, or grey ones, not of {shape[0]} channels")
        check_choice(HEADS, head=head)
        check_integer(1, classes=classes)
        if weights is None:
            raise FileNotFoundError(
                f"there are no weights of {name} here, and none are fetched: give a file, weights='...', or weights='random' for "
                "none"
            )
        clip = _towers(name)
        (size, _), width = clip.visual.image_size, clip.visual.output_dim
        super().__init__({"input": ResizedInput(size, MEAN, STD), "body": _ImageFeatures(clip)}, width, classes, head, cut="body")
        if weights != "random":
            self.params["pretrained"] = str(load_backbone(clip, Path(weights), name))

    @property
    def clip(self) -> Any:
        """The model of open_clip."""
        return self.stages.get_submodule("body.clip")

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return (n, m) int64 tokens of n texts, on the CPU: one begins a text, the greatest one ends it, and 0 fills up the rest.

        m is the length of the longest. Raises ValueError for texts that are longer than the text tower's positions.
        """
        if self.clip.vocab_size == BYTES:
            rows = [[BYTES - 2, *text.encode(), BYTES - 1] for text in texts]
        else:
            from open_clip.tokenizer import SimpleTokenizer  # type: ignore[import-untyped]

            tokenizer: Any = SimpleTokenizer()
            rows = [[tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id] for text in texts]
        longest = max(rows, key=len)
        if len(longest) > self.clip.context_length:
            raise ValueError(
                f"{texts[rows.index(longest)]!r} has {len(longest)} tokens, and the text tower reads {self.clip.context_length}"
            )
        return torch.tensor([row + [0] * (len(longest) - len(row)) for row in rows])


class _ImageFeatures(nn.Module):
    """Both towers; it answers with the features of images, at unit length."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.clip.visual(x), dim=1)  # type: ignore[operator]  # of open_clip, without types


def _towers(name: str) -> Any:
    """Return a model of open_clip with random weights."""
    try:
        import open_clip  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("the model Clip needs the package open_clip_torch: pip install 'clstream[clip]'") from None
    if name.endswith(".json"):
        try:
            config: Any = json.loads(Path(name).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {name} that says what the towers are") from None
        except ValueError as error:
            raise ValueError(f"{name} is no JSON: {error}") from None
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            near = (
                ", ".join([model for model in open_clip.list_models() if model[:5] == name[:5]][:5])
                or "see open_clip.list_models()"
            )
            raise ValueError(f"open_clip has no model {name!r}; near it: {near}")
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ValueError(f"{name} must say embed_dim, vision_cfg and text_cfg, as open_clip's own files do")
    plain = not config.pop("custom_text", False) and not any("_model_name" in key for key in config["text_cfg"])
    try:
        clip: Any = open_clip.CLIP(**config) if plain else None
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"open_clip can't build {name}: {error}") from None
    visual = clip and clip.visual
    if not (
        plain
        and isinstance(visual, open_clip.transformer.VisionTransformer)
        and (visual.attn_pool, visual.pool_type, clip.text_pool_type) == (None, "tok", "argmax")
        and visual.proj is not None
        and isinstance(clip.text_projection, Tensor)
        and clip.attn_mask is not None
        and len(set(visual.image_size)) == 1
    ):
        raise ValueError(f"{name} has other towers than CLIP's plain transformers for square images: take ViT-B-16, say")
    return clip
