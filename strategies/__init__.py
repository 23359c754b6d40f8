"""The methods: one file each, readable top to bottom against its paper."""

from clstream.strategies.agem import AGEM
from clstream.strategies.der import DER, DERpp
from clstream.strategies.er_ace import ERACE
from clstream.strategies.finetune import Finetune
from clstream.strategies.joint import Joint
from clstream.strategies.refresh import Refresh
from clstream.strategies.replay import Replay
from clstream.strategies.sharp import SHARP
from clstream.strategies.tame import TAME
from clstream.strategies.with_detected_boundaries import WithDetectedBoundaries

__all__ = ["AGEM", "DER", "DERpp", "ERACE", "Finetune", "Joint", "Refresh", "Replay", "SHARP", "TAME", "WithDetectedBoundaries"]
