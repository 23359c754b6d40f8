"""Models: modules whose first layer normalises raw input, and whose stages and head can be reached by name.

Each takes raw samples of `input_shape` (uint8 is divided by 255, floats are taken as they are, then mean and std are
applied) and returns (n, classes) logits. All start from torch's default initialisation.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from clstream.params import Recorded, check_bool, check_choice, check_integer, check_integers, check_number, check_positive

__all__ = ["ConvNet", "LeNet", "MnistLike", "Mlp", "ResNet18", "SlimResNet18", "Timm", "VggSmall", "VitTiny"]


class Normalise(nn.Module):
    """Raw input to float32: uint8 divided by 255, then `(x - mean) / std`, for all channels or for each."""

    shift: Tensor | None
    scale: Tensor | None

    def __init__(self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        for value in mean if isinstance(mean, (list, tuple)) else [mean]:
            check_number(mean=value)
        for value in std if isinstance(std, (list, tuple)) else [std]:
            check_positive(std=value)
        plain = mean == 0.0 and std == 1.0
        for name, value in (("shift", mean), ("scale", std)):
            rows = torch.as_tensor(value, dtype=torch.float32)
            self.register_buffer(name, None if plain else rows.reshape(-1, 1, 1) if rows.dim() else rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, ...) float32; a CPU's images with the channels last in memory: pooling them is eight times as fast."""
        x = self.normalised(x)
        return _channels_last(x) if x.dim() == 4 and x.device.type == "cpu" else x

    def normalised(self, x: Tensor) -> Tensor:
        """Return (n, ...) float32, laid out as x is."""
        x = x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)
        return x if self.shift is None or self.scale is None else (x - self.shift) / self.scale


def _channels_last(x: Tensor) -> Tensor:
    """Return (n, channels, height, width) in torch's channels-last layout, also for one channel, where torch takes any for it."""
    n, channels, height, width = x.shape
    return x.movedim(1, -1).flatten(1).view(n, height, width, channels).movedim(-1, 1)


class FlatInput(Normalise):
    """`Normalise`, then one row a sample: (n, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, width) float32."""
        return self.normalised(x).flatten(1)


class PaddedInput(Normalise):
    """Zeros around raw images up to a least height and width, then `Normalise`."""

    def __init__(self, least: int, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        super().__init__(mean, std)
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channels, at least least, at least least) float32."""
        high, wide = (max(self.least - size, 0) for size in x.shape[2:])
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return super().forward(x)


class LinearRelu(nn.Linear):
    """A fully connected layer and its ReLU: one module, because calling a module costs as much as a small layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear names it
        """Map (n, in_features) to (n, out_features)."""
        return F.relu(super().forward(input))


class LinearTanh(nn.Linear):
    """A fully connected layer and its hyperbolic tangent, in one module too."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear names it
        """Map (n, in_features) to (n, out_features)."""
        return super().forward(input).tanh()


class HalvingPool(nn.MaxPool2d):
    """`nn.MaxPool2d(2)`. On a CPU, answers without gradients take a tenth to four fifths of its time, and are the same."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.MaxPool2d names it
        """Map (n, channels, height, width) to (n, channels, height // 2, width // 2)."""
        if input.device.type != "cpu" or (input.requires_grad and torch.is_grad_enabled()):
            pooled: Tensor = super().forward(input)
            return pooled
        high, wide = (size // 2 * 2 for size in input.shape[-2:])
        rows = torch.maximum(input[..., 0:high:2, :], input[..., 1:high:2, :])
        return torch.maximum(rows[..., 0:wide:2], rows[..., 1:wide:2])


class CosineHead(nn.Linear):
    """A head with an output for each class from the start: `scale` times the cosine of the features and the class's weights.

    There is no bias, and how long the weights are doesn't matter, so that no class is ahead because it came last.
    """

    def __init__(self, in_features: int, classes: int, scale: float = 10.0) -> None:
        super().__init__(in_features, classes, bias=False)
        check_positive(scale=scale)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_features) to (n, classes); features that are all 0 give 0."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class GrowingHead(nn.Module):
    """A linear head with an output for each class seen so far; a class not seen yet scores -inf.

    Rows come in the order in which classes arrive (`grow`), so nothing of the future is in the initial weights.
    """

    labels: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, classes: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.classes = in_features, classes
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(0)) if bias else None)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_features) to (n, classes)."""
        seen = F.linear(features, self.weight, self.bias)
        return seen.new_full((len(features), self.classes), float("-inf")).index_copy(1, self.labels, seen)

    def grow(self, labels: Sequence[int]) -> int:
        """Add an output for each label that has none, and return how many; the parameters stay the same objects.

        Raises ValueError for a label that is not one of the classes.
        """
        known = set(self.labels.tolist())
        new = [label for label in dict.fromkeys(labels) if label not in known]
        if outside := [label for label in new if not 0 <= label < self.classes]:
            raise ValueError(f"a head for {self.classes} classes has no outputs for the labels {outside}")
        if not new:
            return 0
        bound = 1 / math.sqrt(self.in_features)  # as nn.Linear draws its weights and biases
        for parameter in self.parameters():
            more = torch.empty(len(new), *parameter.shape[1:]).uniform_(-bound, bound).to(parameter)
            parameter.data = torch.cat([parameter.data, more])
            parameter.grad = None
        self.labels = torch.cat([self.labels, torch.tensor(new).to(self.labels)])
        return len(new)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take as many rows as the state has, then load them."""
        for name in ("weight", "bias", "labels"):
            kept, here = state.get(prefix + name), getattr(self, name)
            if isinstance(kept, Tensor) and isinstance(here, Tensor) and kept.shape[1:] == here.shape[1:]:
                here.data = kept.detach().to(here, copy=True)
        super()._load_from_state_dict(state, prefix, *rest)


def grow_heads(model: nn.Module, optimizers: Sequence[Optimizer], labels: Callable[[], Sequence[int]]) -> None:
    """Grow each GrowingHead of a model by what is new in `labels()`; what optimizers know of the old rows is kept."""
    for head in [module for module in model.modules() if isinstance(module, GrowingHead)]:
        before = len(head.weight)
        if not head.grow(labels()):
            continue
        for optimizer in optimizers:
            for parameter in head.parameters():
                for name, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.shape == (before, *parameter.shape[1:]):
                        optimizer.state[parameter][name] = _padded(value, parameter)


def _padded(value: Tensor, like: Tensor) -> Tensor:
    return torch.cat([value, value.new_zeros(len(like) - len(value), *value.shape[1:])])


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"fixed": nn.Linear, "growing": GrowingHead, "cosine": CosineHead}


class Classifier(Recorded, nn.Module):
    """Named stages, then a head: `head(features(x))`.

    Args:
        stages: modules by name, from raw input to (n, features).
        features: width of what the stages return.
        classes: number of outputs.
        head: "fixed" (an output for each class from the start), "growing" (see GrowingHead) or "cosine" (see CosineHead).
        cut: the stage after which activations are stored and replayed by methods that do so.

    """

    def __init__(self, stages: dict[str, nn.Module], features: int, classes: int, head: str, cut: str) -> None:
        super().__init__()
        check_choice(HEADS, head=head)
        if cut not in stages:
            raise ValueError(f"cut must be one of the stages {', '.join(stages)}, not {cut!r}")
        check_integer(1, classes=classes)
        self.stages = nn.Sequential(OrderedDict(stages))
        self.head = HEADS[head](features, classes)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        """Map raw (n, *input_shape) inputs to (n, classes) logits."""
        logits: Tensor = self.head(self.stages(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate layer: (n, features)."""
        features: Tensor = self.stages(x)
        return features

    def activations(self, x: Tensor) -> Tensor:
        """Return what the stage `cut` gives for raw inputs."""
        for name, stage in self.stages.named_children():
            x = stage(x)
            if name == self.cut:
                break
        return x

    def from_activations(self, activations: Tensor) -> Tensor:
        """Map what `activations` returned to (n, classes) logits: the rest of the way through the network."""
        names = list(dict(self.stages.named_children()))
        for name in names[names.index(self.cut) + 1 :]:
            activations = self.stages.get_submodule(name)(activations)
        logits: Tensor = self.head(activations)
        return logits


def _shape(input_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else (input_shape,)
    try:
        check_integers(1, input_shape=shape)
    except ValueError:
        shape = ()
    if not shape:
        raise ValueError(f"input_shape must be a size or some sizes of at least 1, not {input_shape!r}")
    return shape


def _image_shape(model: str, input_shape: int | Sequence[int], smallest: int) -> tuple[int, int, int]:
    shape = _shape(input_shape)
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"{model} takes images (channels, height, width) of at least {smallest} x {smallest}, not {shape}: try Mlp"
        )
    return shape[0], shape[1], shape[2]


class Mlp(Classifier):
    """Fully connected layers with a nonlinearity after each but the last.

    Args:
        input_shape: of one raw sample: a size or a tuple of sizes; it is flattened.
        classes: number of outputs.
        hidden: width of each hidden layer.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255.
        init: "torch" (its default) or "xavier": uniform weights after Glorot & Bengio 2010, biases of zero.
        activation: "relu" or "tanh".

    """

    def __init__(
        self,
        input_shape: int | tuple[int, ...],
        classes: int,
        hidden: tuple[int, ...] = (400, 400),
        head: str = "fixed",
        mean: float = 0.0,
        std: float = 1.0,
        init: str = "torch",
        activation: str = "relu",
    ) -> None:
        check_choice(("torch", "xavier"), init=init)
        check_choice(("relu", "tanh"), activation=activation)
        check_choice(HEADS, head=head)
        check_integers(1, hidden=hidden)
        check_integer(1, classes=classes)
        layer = LinearRelu if activation == "relu" else LinearTanh
        widths = [math.prod(_shape(input_shape)), *hidden]
        stages: dict[str, nn.Module] = {"input": FlatInput(mean, std)}
        for number, (into, out) in enumerate(pairwise(widths), 1):
            stages[f"layer{number}"] = layer(into, out)
        super().__init__(stages, widths[-1], classes, head, cut=list(stages)[-1])
        if init == "xavier":
            for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
                if not isinstance(linear, CosineHead):  # whose step is the longer, the shorter its weights are
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.zeros_(linear.bias)


class ConvNet(Classifier):
    """Three convolutions (3x3, ReLU), max-pooled after the first two, and a hidden layer: for MNIST-like images.

    Args:
        input_shape: (channels, height, width), at least 4 x 4.
        classes: number of outputs.
        channels: of each convolution.
        hidden: width of the layer before the head.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

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
    ) -> None:
        into, height, width = _image_shape("ConvNet", input_shape, 4)
        check_integers(1, channels=channels)
        check_integer(1, hidden=hidden, classes=classes)
        if len(channels) != 3:
            raise ValueError(f"channels must be three numbers, one for each convolution, not {list(channels)}")
        first, second, third = channels
        flat = third * (height // 4) * (width // 4)
        stages = {
            "input": Normalise(mean, std),
            "conv1": nn.Sequential(nn.Conv2d(into, first, 3, padding=1), nn.ReLU(), HalvingPool()),
            "conv2": nn.Sequential(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), HalvingPool()),
            "conv3": nn.Sequential(nn.Conv2d(second, third, 3, padding=1), nn.ReLU()),
            "hidden": nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU()),
        }
        super().__init__(stages, hidden, classes, head, cut="conv3")


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


class _Block(nn.Module):
    """The residual block of ResNet-18 (He et al. 2016): two 3x3 convolutions, each with batch norm."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet18(Classifier):
    """ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool (He et al. 2016).

    Args:
        input_shape: (channels, height, width), at least 8 x 8.
        classes: number of outputs.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255; a number, or one for each channel.

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 64,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        into, _, _ = _image_shape(type(self).__name__, input_shape, 8)
        check_integer(1, width=width, classes=classes)
        stages: dict[str, nn.Module] = {
            "input": Normalise(mean, std),
            "stem": nn.Sequential(nn.Conv2d(into, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        }
        before = width
        for number, stride in enumerate((1, 2, 2, 2)):
            after = width * 2**number
            stages[f"layer{number + 1}"] = nn.Sequential(_Block(before, after, stride), _Block(after, after, 1))
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

    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        head: str = "fixed",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
    ) -> None:
        super().__init__(input_shape, classes, 20, head, mean, std)


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


class Timm(Classifier):
    """Any model of timm by name (`pip install clstream[timm]`); its classifier is replaced by our head.

    Args:
        input_shape: (channels, height, width).
        classes: number of outputs.
        name: as `timm.list_models()` has it.
        weights: a file of weights for `timm.load_checkpoint`, or "download" for timm's own, or None for random ones.
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
        super().__init__(stages, body.num_features, classes, head, cut="body")


def _timm_body(name: str, weights: str | None, shape: tuple[int, int, int]) -> Any:
    try:
        import timm
    except ImportError:
        raise ImportError("the model Timm needs the package timm: pip install 'clstream[timm]'") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; near it: {near}")
    options: dict[str, Any] = {"img_size": shape[1:]} if "vit" in name or "swin" in name else {}
    if weights not in (None, "download"):
        options["checkpoint_path"] = weights
    try:
        return timm.create_model(name, weights == "download", in_chans=shape[0], num_classes=0, **options)
    except OSError as error:
        raise OSError(
            f"the weights of timm's {name} can't be had ({error}): download them where there is a network, "
            "and pass the file as weights=..."
        ) from error
