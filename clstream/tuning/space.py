"""Search spaces: for each option the values that a search may give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DIGITS = 4
"""Significant digits of a number that a search chooses: what a config can show is what was run."""


@dataclass(frozen=True, slots=True)
class Range:
    """All numbers between two, both of them included.

    Args:
        low, high: the least and the greatest one.
        log: whether each power of ten is as likely as another; if not, each number is.
        integer: whether they are whole numbers; others are rounded to four significant digits.

    Raises:
        ValueError: for ends that are no finite numbers, not in this order, not above 0 where `log` asks for that, or not whole.

    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        for end in (self.low, self.high):
            if isinstance(end, bool) or not isinstance(end, (int, float)) or not math.isfinite(end):
                raise ValueError(f"a range goes from one finite number to another, not to or from {end!r}")
        if not self.low < self.high:
            raise ValueError(f"a range goes from a lower number to a higher one, not from {self.low:g} to {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range of powers (log) begins above 0, not at {self.low:g}")
        if self.integer and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"a range of whole numbers has whole ends, not {self.low:g} and {self.high:g}")

    def value(self, suggested: float) -> float | int:
        """Return the number that is run for what a sampler suggests."""
        if self.integer:
            return int(suggested)
        return min(max(float(f"{suggested:.{DIGITS}g}"), float(self.low)), float(self.high))

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (not self.integer or value == int(value))


@dataclass(frozen=True, slots=True)
class Choice:
    """Some values, of which none is nearer to another.

    Args:
        values: plain values: numbers, texts, True and False, None, lists of these.

    Raises:
        ValueError: for fewer than two values, and for one that comes twice.

    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError("a choice is between two values or more: what has one value isn't searched")
        if len({repr(value) for value in self.values}) < len(self.values):
            raise ValueError(f"a choice has each value once, not {list(self.values)}")

    @property
    def labels(self) -> list[str]:
        """What the values are called in a search and in its pictures."""
        return [value if isinstance(value, str) else repr(value) for value in self.values]

    def value(self, suggested: str) -> Any:
        """Return the value that a label stands for."""
        return self.values[self.labels.index(suggested)]

    def __contains__(self, value: object) -> bool:
        return repr(value) in map(repr, self.values)


Space = Mapping[str, "Range | Choice"]
"""For each option what it may be."""


def parse_space(given: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> dict[str, Range | Choice]:
    """Return the space that plain values stand for, as YAML holds them.

    `[0.001, 0.3, log]` and `[0.1, 0.9]` are ranges; of whole numbers if both ends are, and the option has no other number now.
    Three or more values, and two that are no numbers, are a choice; so is `{choices: [200, 500]}`. `auto` is derived from what the
    option is now: a hundredth to the hundredfold of a number, a quarter to the fourfold of a whole number, True or False.

    Args:
        given: for each option its range or choice.
        now: what the options are without a search.

    Raises:
        ValueError: for an empty space, and for what is no range and no choice; it names the option.

    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError("the search space is empty: name options with their ranges, as {optimizer.lr: [0.001, 0.3, log]}")
    space = {}
    for option, values in given.items():
        try:
            space[str(option)] = _parsed(values, (now or {}).get(str(option)))
        except ValueError as error:
            raise ValueError(f"the search space of {option}: {error}") from None
    return space


def _parsed(values: Any, now: Any) -> Range | Choice:
    """Return one range or choice; `now` is what the option is."""
    if isinstance(values, (Range, Choice)):
        return values
    if values == "auto":
        return _around(now)
    if isinstance(values, Mapping) and set(values) == {"choices"} and isinstance(values["choices"], (list, tuple)):
        return Choice(tuple(values["choices"]))
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"it takes [low, high], [low, high, log], a list of values, {{choices: [...]}} or auto, not {values!r}")
    numbers = [value for value in values[:2] if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == 2 and (len(values) == 2 or list(values[2:]) == ["log"]):
        integer = all(isinstance(number, int) for number in numbers) and not isinstance(now, float)
        return Range(numbers[0], numbers[1], len(values) == 3, integer)
    return Choice(tuple(values))


def _around(now: Any) -> Range | Choice:
    """Return what to search around a value, if nothing else is known."""
    if isinstance(now, bool):
        return Choice((False, True))
    if isinstance(now, int) and now > 0:
        return Range(max(1, now // 4), 4 * now, log=True, integer=True)
    if isinstance(now, float) and 0 < now < math.inf:
        return Range(now / 100, now * 100, log=True)
    raise ValueError(f"auto needs a number above 0, true or false to begin from, and it is {now!r}: give a range or values")
