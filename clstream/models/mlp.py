"""The multilayer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from clstream.models.classifier import Classifier, _shape
from clstream.models.heads import HEADS, CosineHead
from clstream.models.layers import FlatInput, LinearRelu, LinearTanh
from clstream.params import check_choice, check_integer, check_integers


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
