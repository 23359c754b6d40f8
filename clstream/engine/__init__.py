"""The engine: the loop that is the definition of a simulation."""

from clstream.checkpoint.saved_state import ChangedCodeError as ChangedCodeError
from clstream.checkpoint.saved_state import OtherRunError as OtherRunError
from clstream.engine.arrivals import InputsArrived as InputsArrived
from clstream.engine.arrivals import SessionArrived as SessionArrived
from clstream.engine.arrivals import SetAside as SetAside
from clstream.engine.compatibility import check_fits as check_fits
from clstream.engine.labels import LabelsQueried as LabelsQueried
from clstream.engine.labels import LabelsRevealed as LabelsRevealed
from clstream.engine.loop import run as run
from clstream.engine.together import SeedsError as SeedsError
from clstream.engine.together import run_seeds as run_seeds
from clstream.results import Result as Result
