"""SHARP."""

from clstream.strategies.sharp.events import ActivationsStored as ActivationsStored
from clstream.strategies.sharp.events import PhaseStarted as PhaseStarted
from clstream.strategies.sharp.events import UnitsFrozen as UnitsFrozen
from clstream.strategies.sharp.sharp import SHARP as SHARP
