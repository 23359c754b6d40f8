"""The multilayer perceptron with batch norm."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from clstream.models.classifier import Classifier, _shape
from clstream.models.heads import HEADS
from clstream.models.layers import FlatInput
from clstream.params import check_choice, check_integer, check_integers


class BatchNormMlp(Classifier):
    """Fully connected layers without bias, each with batch norm and a ReLU; Kaiming-normal weights.

    The encoder of OpenVAE's code (Mundt et al. 2022) for small grey images.

    Args:
        input_shape: of one raw sample: a size or a tuple of sizes; it is flattened.
        classes: number of outputs.
        hidden: width of each hidden layer.
        head: "fixed", "growing" or "cosine".
        mean, std: of the inputs, after uint8 was divided by 255.

    """

    def __init__(
        self,
        input_shape: int | tuple[int, ...],
        classes: int,
        hidden: tuple[int, ...] = (400, 400),
        head: str = "fixed",
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        check_choice(HEADS, head=head)
        check_integers(1, hidden=hidden)
        check_integer(1, classes=classes)
        widths = [math.prod(_shape(input_shape)), *hidden]
        stages: dict[str, nn.Module] = {"input": FlatInput(mean, std)}
        for number, (into, out) in enumerate(pairwise(widths), 1):
            linear = nn.Linear(into, out, bias=False)
            nn.init.kaiming_normal_(linear.weight)
            stages[f"layer{number}"] = nn.Sequential(linear, nn.BatchNorm1d(out), nn.ReLU())
        super().__init__(stages, widths[-1], classes, head, cut=list(stages)[-1])
