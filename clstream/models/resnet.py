"""Residual networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models.classifier import Classifier, _image_shape
from clstream.models.layers import Normalise
from clstream.params import check_bool, check_integer


class _NarrowInput(Normalise):
    """For shortcuts of few channels: torch 2.14's strided 1x1 convolution of fewer than 8 channels, in the channels-last layout,
    writes beyond its memory on CPUs without AVX-512, which ends the process.
    """

    channels_last = False


class _Block(nn.Module):
    """The residual block of ResNet-18 (He et al. 2016): two 3x3 convolutions, each with batch norm."""

    def __init__(self, into: int, out: int, stride: int, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        both = inner + self.shortcut(x)
        return F.relu(both) if self.relu else both


class ResNet18(Classifier):
    """ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool (He et al. 2016).

    Args:
        input_shape: (channels, height, width), at least 8 x 8.
        classes: number of outputs.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.
        last_relu: whether the last block ends in a ReLU. If not, features have both signs, as LUCIR and PODNet have it.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 64,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        last_relu: bool = True,
    ) -> None:
        into, _, _ = _image_shape(type(self).__name__, input_shape, 8)
        check_integer(1, width=width, classes=classes)
        check_bool(last_relu=last_relu)
        stages: dict[str, nn.Module] = {
            "input": (Normalise if width >= 8 else _NarrowInput)(mean, std),
            "stem": nn.Sequential(nn.Conv2d(into, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        }
        before = width
        for number, stride in enumerate((1, 2, 2, 2)):
            after = width * 2**number
            stages[f"layer{number + 1}"] = nn.Sequential(
                _Block(before, after, stride), _Block(after, after, 1, relu=last_relu or number < 3)
            )
            before = after
        stages["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(stages, before, classes, head, cut="layer4")


class SlimResNet18(ResNet18):
    """The reduced ResNet-18 of Lopez-Paz & Ranzato (2017) for 32 x 32 images: 20 channels in the first stage in place of 64.

    Args:
        input_shape: (channels, height, width), at least 8 x 8.
        classes: number of outputs.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.
        last_relu: whether the last block ends in a ReLU. If not, features have both signs, as LUCIR and PODNet have it.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        last_relu: bool = True,
    ) -> None:
        super().__init__(input_shape, classes, 20, head, mean, std, last_relu)
