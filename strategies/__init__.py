"""The methods: one file each, readable top to bottom against its paper."""

from clstream.strategies.finetune import Finetune
from clstream.strategies.joint import Joint
from clstream.strategies.replay import Replay

__all__ = ["Finetune", "Joint", "Replay"]
