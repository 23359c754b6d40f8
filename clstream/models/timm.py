"""Models of timm, by name, for images as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from clstream.models.classifier import Classifier, _image_shape
from clstream.models.heads import HEADS
from clstream.models.layers import Normalise
from clstream.models.pretrained import is_of_patches, load_backbone
from clstream.params import check_choice, check_integer


class Timm(Classifier):
    """Any model of timm by name (`pip install clstream[timm]`), for images of their own size and channels, with our head.

    `Pretrained` is for what was trained elsewhere: it resizes and normalises images as the weights want them.

    Args:
        input_shape: (channels, height, width).
        classes: number of outputs.
        name: as `timm.list_models()` has it.
        weights: a file of a state dict (.pth, .pt, .safetensors), or "download" for timm's own, or None for random ones.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    Raises:
        ImportError, ValueError, OSError: if timm is not installed, has no such model, or its weights can't be had.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        name: str = "resnet18",
        weights: str | None = None,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        shape, first = _image_shape("Timm", input_shape, 1), Normalise(mean, std)
        check_choice(HEADS, head=head)
        check_integer(1, classes=classes)
        body = _timm_body(name, weights, shape)
        stages: dict[str, nn.Module] = {"input": first, "body": body}
        super().__init__(stages, body.head_hidden_size, classes, head, cut="body")
        if weights not in (None, "download"):
            self.params["pretrained"] = str(load_backbone(body, Path(weights), name))


def _timm_body(name: str, weights: str | None, shape: tuple[int, int, int]) -> Any:
    try:
        import timm
    except ImportError:
        raise ImportError("the model Timm needs the package timm: pip install 'clstream[timm]'") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; near it: {near}")
    options: dict[str, Any] = {"img_size": shape[1:]} if is_of_patches(name) else {}
    try:
        return timm.create_model(name, weights == "download", in_chans=shape[0], num_classes=0, **options)
    except OSError as error:
        raise OSError(
            f"the weights of timm's {name} can't be had ({error}): download them where there is a network, "
            "and pass the file as weights=..."
        ) from error
