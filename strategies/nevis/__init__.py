"""NEVIS's learners: each task is a search of its own, from a start that the learner chooses, and its final model is kept."""

from clstream.strategies.nevis.events import StartChosen as StartChosen
from clstream.strategies.nevis.events import TrialEnded as TrialEnded
from clstream.strategies.nevis.learners import DynamicKNN as DynamicKNN
from clstream.strategies.nevis.learners import FrozenLinear as FrozenLinear
from clstream.strategies.nevis.learners import Independent as Independent
from clstream.strategies.nevis.learners import Previous as Previous
