"""Small convolutional networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from clstream.models.classifier import Classifier, _image_shape
from clstream.models.layers import HalvingPool, LinearRelu, Normalise, PaddedInput
from clstream.params import check_choice, check_integer, check_integers


class ConvNet(Classifier):
    """Three convolutions (3x3, ReLU), max-pooled after the first two, and a hidden layer: for MNIST-like images.

    Args:
        input_shape: (channels, height, width), at least 4 x 4.
        classes: number of outputs.
        channels: of each convolution.
        hidden: width of the layer before the head.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.
        norm: "none", or "batch" for batch norm before the ReLU of each convolution.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        channels: tuple[int, int, int] = (32, 64, 64),
        hidden: int = 128,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        norm: str = "none",
    ) -> None:
        into, height, width = _image_shape("ConvNet", input_shape, 4)
        check_choice(("none", "batch"), norm=norm)
        check_integers(1, channels=channels)
        check_integer(1, hidden=hidden, classes=classes)
        if len(channels) != 3:
            raise ValueError(f"channels must be three numbers, one for each convolution, not {list(channels)}")
        first, second, third = channels
        flat = third * (height // 4) * (width // 4)

        def convolution(into: int, out: int) -> list[nn.Module]:
            norms = [nn.BatchNorm2d(out)] if norm == "batch" else []
            return [nn.Conv2d(into, out, 3, padding=1), *norms, nn.ReLU()]

        stages = {
            "input": Normalise(mean, std),
            "conv1": nn.Sequential(*convolution(into, first), HalvingPool()),
            "conv2": nn.Sequential(*convolution(first, second), HalvingPool()),
            "conv3": nn.Sequential(*convolution(second, third)),
            "hidden": nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU()),
        }
        super().__init__(stages, hidden, classes, head, cut="conv3")


class Conv4(Classifier):
    """The network of few-shot learning: four blocks of a convolution (3x3), a norm, ReLU and max-pooling (Vinyals et al. 2016).

    For (1, 28, 28) images it has 64 features and, with batch norm, 111,936 parameters below the head.

    Args:
        input_shape: (channels, height, width), at least 2 ** blocks each way.
        classes: number of outputs.
        width: channels of each convolution.
        blocks: how many there are, 1 to 6; they halve height and width, rounded down.
        norm: "batch", "layer" (over all channels and pixels of an image, which does not depend on other images) or "none".
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 64,
        blocks: int = 4,
        norm: str = "batch",
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        check_integer(1, width=width, classes=classes)
        check_integer(1, 6, blocks=blocks)
        norms: dict[str, Callable[[], list[nn.Module]]] = {
            "batch": lambda: [nn.BatchNorm2d(width)],
            "layer": lambda: [nn.GroupNorm(1, width)],
            "none": list,
        }
        check_choice(norms, norm=norm)
        channels, high, wide = _image_shape("Conv4", input_shape, 2**blocks)
        stages: dict[str, nn.Module] = {"input": Normalise(mean, std)}
        for number in range(1, blocks + 1):
            into = channels if number == 1 else width
            stages[f"block{number}"] = nn.Sequential(
                nn.Conv2d(into, width, 3, padding=1), *norms[norm](), nn.ReLU(), nn.MaxPool2d(2)
            )
        stages["flat"] = nn.Flatten()
        super().__init__(stages, width * (high >> blocks) * (wide >> blocks), classes, head, cut=f"block{blocks}")


def _conv(into: int, out: int, pool: bool = False) -> nn.Sequential:
    """Return a 3x3 convolution and its ReLU. Pooled before the ReLU: that commutes with the maximum, and has a quarter to do."""
    layers = [nn.Conv2d(into, out, 3, padding=1), *([HalvingPool()] if pool else []), nn.ReLU()]
    return nn.Sequential(*layers)


class LeNet(Classifier):
    """LeNet-5 as TAME has it for MNIST: convolutions (5x5) of 6 and 16 channels, each pooled, and layers of 120 and 84, with ReLU.

    Images smaller than 32 x 32 are padded with zeros to that, before they are normalised, as TAME's code does (Zhu et al. 2024).
    61,706 parameters for MNIST and 10 classes.

    Args:
        input_shape: (channels, height, width).
        classes: number of outputs.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        into, *sizes = _image_shape("LeNet", input_shape, 1)
        high, wide = (((max(size, 32) - 4) // 2 - 4) // 2 for size in sizes)
        stages: dict[str, nn.Module] = {
            "input": PaddedInput(32, mean, std),
            "conv1": nn.Sequential(nn.Conv2d(into, 6, 5), HalvingPool(), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(6, 16, 5), HalvingPool(), nn.ReLU()),
            "hidden": nn.Sequential(nn.Flatten(), LinearRelu(16 * high * wide, 120)),
            "penultimate": LinearRelu(120, 84),
        }
        super().__init__(stages, 84, classes, head, cut="conv2")


class MnistLike(Classifier):
    """The network of SHARP for MNIST-like images: two convolutions of 16 channels, each pooled, and two layers of 500.

    Its activations are stored and replayed after the second convolution (Gurbuz, Moorman, Dovrolis 2023, the authors' code).

    Args:
        input_shape: (channels, height, width), at least 4 x 4.
        classes: number of outputs.
        channels: of both convolutions.
        hidden: width of both layers before the head.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        channels: int = 16,
        hidden: int = 500,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        check_integer(1, channels=channels, hidden=hidden, classes=classes)
        into, height, width = _image_shape("MnistLike", input_shape, 4)
        stages: dict[str, nn.Module] = {
            "input": Normalise(mean, std),
            "conv1": _conv(into, channels, pool=True),
            "conv2": _conv(channels, channels, pool=True),
            "hidden": nn.Sequential(nn.Flatten(), LinearRelu(channels * (height // 4) * (width // 4), hidden)),
            "penultimate": LinearRelu(hidden, hidden),
        }
        super().__init__(stages, hidden, classes, head, cut="conv2")


class VggSmall(Classifier):
    """The network of SHARP for CIFAR images: seven convolutions, pooled after the second, fourth and last, and two layers of 1024.

    Its activations are stored and replayed after the fourth convolution (Gurbuz, Moorman, Dovrolis 2023, the authors' code).

    Args:
        input_shape: (channels, height, width), at least 8 x 8.
        classes: number of outputs.
        width: channels of the first four convolutions; the others have twice as many.
        hidden: width of both layers before the head.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 64,
        hidden: int = 1024,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        check_integer(1, width=width, hidden=hidden, classes=classes)
        into, high, wide = _image_shape("VggSmall", input_shape, 8)
        stages: dict[str, nn.Module] = {
            "input": Normalise(mean, std),
            "conv1": _conv(into, width),
            "conv2": _conv(width, width, pool=True),
            "conv3": _conv(width, width),
            "conv4": _conv(width, width, pool=True),
            "conv5": _conv(width, 2 * width),
            "conv6": _conv(2 * width, 2 * width),
            "conv7": _conv(2 * width, 2 * width, pool=True),
            "hidden": nn.Sequential(nn.Flatten(), LinearRelu(2 * width * (high // 8) * (wide // 8), hidden)),
            "penultimate": LinearRelu(hidden, hidden),
        }
        super().__init__(stages, hidden, classes, head, cut="conv4")
