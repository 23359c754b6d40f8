"""The base of the models: named stages, of which the first normalises raw input, and a head.

Each takes raw samples of `input_shape` (uint8 is divided by 255, floats are taken as they are, then mean and std are
applied) and returns (n, classes) logits. All start from torch's default initialisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from clstream.models.heads import HEADS
from clstream.params import HasParams, check_choice, check_integer, check_integers


class Classifier(HasParams, nn.Module):
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
