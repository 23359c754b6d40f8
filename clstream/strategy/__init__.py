"""What strategies derive from."""

from clstream.strategy.loading import load as load
from clstream.strategy.loading import read_card as read_card
from clstream.strategy.needs import needs as needs
from clstream.strategy.regulariser import Quadratic as Quadratic
from clstream.strategy.rehearsal_free import RehearsalFree as RehearsalFree
from clstream.strategy.strategy import CONTROLS as CONTROLS
from clstream.strategy.strategy import OptimizerFactory as OptimizerFactory
from clstream.strategy.strategy import Regulariser as Regulariser
from clstream.strategy.strategy import Strategy as Strategy
from clstream.strategy.wrapper import Wrapper as Wrapper
