"""The checks of options: what they take, what they refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from clstream.params import check_bool, check_choice, check_integer, check_number, check_positive


@pytest.mark.parametrize(
    ("check", "taken"),
    [
        (partial(check_integer, 1), [1, 2**70, np.int64(3), torch.tensor(2)]),
        (partial(check_integer, 0, 5), [0, 5, np.uint8(5)]),
        (partial(check_integer, 1, none=True), [None, 1]),
        (check_number, [0, -1.5, np.float32(2), 10**20]),
        (partial(check_number, 0, 1), [0, 1, 0.5, np.float64(1)]),
        (partial(check_number, 0, none=True), [None, 0]),
        (check_positive, [1e-300, 3]),
        (partial(check_choice, ("a", "b")), ["a", "b"]),
        (partial(check_choice, ("a", "b"), none=True), [None, "a"]),
        (check_bool, [True, False, np.bool_(True)]),
    ],
)
def test_what_is_taken(check: Callable[..., None], taken: list[Any]) -> None:
    for value in taken:
        check(option=value)


@pytest.mark.parametrize(
    ("check", "refused", "says"),
    [
        (partial(check_integer, 1), [0, 2.0, True, "3", None, float("nan"), [1], torch.tensor(2.0), torch.ones(2), np.bool_(1)],
         "option must be a whole number of at least 1, not "),
        (partial(check_integer, 0, 5), [-1, 6, 2**70], "option must be a whole number from 0 to 5, not "),
        (partial(check_number, 0, 1), [-0.1, 1.1, True, "0.5", None, float("nan"), float("inf"), torch.ones(2)],
         "option must be a finite number from 0 to 1, not "),
        (check_number, [float("-inf"), "x", 1j], "option must be a finite number, not "),
        (check_positive, [0, -1, True, None, float("inf")], "option must be a finite number above 0, not "),
        (partial(check_choice, ("first", "every")), ["", True, 1, None, ["first"]], "option must be one of first, every, not "),
        (check_bool, ["no", "True", 0, 1, None, torch.tensor(True)], "option must be True or False, not "),
        (partial(check_bool, none=True), ["no", 0], "option must be True or False or None, not "),
    ],
)  # fmt: skip
def test_what_is_refused(check: Callable[..., None], refused: list[Any], says: str) -> None:
    for value in refused:
        with pytest.raises(ValueError, match=says):
            check(option=value)


def test_the_nearest_choice_is_named_and_long_values_are_cut() -> None:
    with pytest.raises(ValueError, match=r"not 'frist': did you mean first\?"):
        check_choice(("first", "every"), option="frist")
    with pytest.raises(ValueError, match=r"^.{,180}$"):
        check_integer(0, option="9" * 10_000)
