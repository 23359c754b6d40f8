"""TAME."""

from clstream.strategies.tame.events import ExpertAdded as ExpertAdded
from clstream.strategies.tame.events import ExpertReactivated as ExpertReactivated
from clstream.strategies.tame.routing import Routing as Routing
from clstream.strategies.tame.routing import RoutingMeasured as RoutingMeasured
from clstream.strategies.tame.tame import TAME as TAME

from clstream.drift_detection import ShiftDetected as ShiftDetected
