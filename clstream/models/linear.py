"""A linear model: no more than a head, for inputs that are features already."""

from __future__ import annotations

import math

from clstream.models.classifier import Classifier, _shape
from clstream.models.heads import HEADS
from clstream.models.layers import FlatInput
from clstream.params import check_choice, check_integer


class Linear(Classifier):
    """A head on the inputs, which are its `features`.

    Args:
        input_shape: of one raw sample: a size or a tuple of sizes; it is flattened.
        classes: number of outputs.
        head: "fixed", "growing" or "cosine".

    """

    def __init__(self, input_shape: int | tuple[int, ...], classes: int, head: str = "fixed") -> None:
        check_choice(HEADS, head=head)
        check_integer(1, classes=classes)
        super().__init__({"input": FlatInput()}, math.prod(_shape(input_shape)), classes, head, cut="input")
