"""The engine: the loop that is the definition of a simulation."""

from clstream.engine.compatibility import check_fits as check_fits
from clstream.engine.loop import run as run
from clstream.engine.saved_state import ChangedCodeError as ChangedCodeError
from clstream.engine.saved_state import OtherRunError as OtherRunError
from clstream.results import Result as Result
