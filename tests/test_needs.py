"""Needs: what a strategy needs a stream to show."""

from torch import nn

from clstream.bus import on
from clstream.events import TaskStarted
from clstream.strategy import Strategy, needs


class Boundary:
    @on(TaskStarted)
    def note(self, event):
        pass


def test_needs_are_read_from_parts_too_also_from_one_that_has_no_parts_of_its_own():
    strategy = Strategy(nn.Linear(2, 2))
    assert needs(strategy) == {}
    strategy.parts = (Boundary(),)
    assert needs(strategy) == {"boundaries": "Boundary.note handles TaskStarted"}
