"""CPE-CLIP: prompts in both towers of a frozen CLIP, slowed down by a ratio of class counts; and its vision half alone."""

from clstream.strategies.cpe_clip.cpe_clip import CPECLIP as CPECLIP
from clstream.strategies.cpe_clip.vision import CPEVision as CPEVision
