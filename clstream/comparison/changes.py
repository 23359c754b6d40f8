"""Changes: what the runs of two sweeps say differently of the same methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clstream.comparison.comparisons import ALPHA, value_of
from clstream.comparison.labels import Replicate, replicate
from clstream.comparison.methods import Method, panels_of
from clstream.comparison.records import Record
from clstream.comparison.statistics import Mean, PairedDifference, holm, mean_interval, paired_difference

BESIDE = ("seed", "seeds", "device")
"""Params that are not what a method is."""


@dataclass(frozen=True)
class Change:
    """A method on a stream, in two sweeps.

    Args:
        stream, method: the stream, with its scenario, and the method's label.
        before, after: the mean of its main measure over the seeds; None: it isn't there.
        difference: after minus before, of the runs that share stream, order of classes and seed; None: there are none.
        p: of the paired test, corrected by Holm for all methods that are in both; NaN: not tested.
        options: what differs, "strategy.capacity: 200, now 500".
        code_before, code_after: the versions of the code that made the runs.

    """

    stream: str
    method: str
    before: Mean | None
    after: Mean | None
    difference: PairedDifference | None
    p: float
    options: tuple[str, ...]
    code_before: str
    code_after: str

    @property
    def verdict(self) -> str:
        """What is to be said of it: "new", "gone", "higher", "lower", "the same numbers", "no difference shown", "not tested"."""
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        if self.difference is None or math.isnan(self.p):
            return "not tested"
        if self.difference.mean == self.difference.low == self.difference.high == 0:
            return "the same numbers"
        return "no difference shown" if self.p >= ALPHA else "higher" if self.difference.mean > 0 else "lower"


def changes_between(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Return what became of each method on each stream: those that are in both first, then what is new, then what is gone.

    Methods are the same if their labels, streams and scenarios are; runs are paired by stream, order of classes and seed.
    Raises ValueError if in one of the two no run ended well.
    """
    old, new = (
        {(panel.title, method.label): method for panel in panels_of(records) for method in panel.methods}
        for records in (before, after)
    )
    tests = {place: _paired(old[place], new[place]) for place in new if place in old}
    adjusted = holm([math.nan if test is None else test.p for test in tests.values()])
    corrected = dict(zip(tests, adjusted, strict=True))
    places = [*tests, *(place for place in new if place not in old), *(place for place in old if place not in new)]
    return [_change(place, old.get(place), new.get(place), tests.get(place), corrected.get(place, math.nan)) for place in places]


def _change(place: tuple[str, str], old: Method | None, new: Method | None, test: PairedDifference | None, p: float) -> Change:
    before, after = (None if method is None else mean_interval(method.finals.tolist()) for method in (old, new))
    options = () if old is None or new is None else _options(old, new)
    codes = tuple("" if method is None else _code(method) for method in (old, new))
    return Change(*place, before, after, test, p, options, codes[0], codes[1])


def _paired(old: Method, new: Method) -> PairedDifference | None:
    """Return new minus old, paired; None if no run has a partner."""
    earlier, later = (_by_replicate(method) for method in (old, new))
    shared = [place for place in later if place in earlier]
    return paired_difference([later[place] for place in shared], [earlier[place] for place in shared]) if shared else None


def _by_replicate(method: Method) -> dict[Replicate, float]:
    return {replicate(record): value_of(record, "average") for record in method.records}


def _options(old: Method, new: Method) -> tuple[str, ...]:
    """Return the params that differ, of the first runs."""
    earlier, later = old.records[0].params, new.records[0].params
    names = [name for name in dict.fromkeys([*earlier, *later]) if name not in BESIDE and earlier.get(name) != later.get(name)]
    return tuple(f"{name}: {earlier.get(name, 'not there')}, now {later.get(name, 'not there')}" for name in names)


def _code(method: Method) -> str:
    return ", ".join(dict.fromkeys(record.code for record in method.records if record.code))
