"""Tuning: a search for options, on samples that are held back from training, never on test samples."""

from clstream.tuning.search import Job as Job
from clstream.tuning.search import Search as Search
from clstream.tuning.search import check_installed as check_installed
from clstream.tuning.space import Choice as Choice
from clstream.tuning.space import Range as Range
from clstream.tuning.space import parse_space as parse_space
from clstream.tuning.trial import Outcome as Outcome
from clstream.tuning.trial import run_trial as run_trial
from clstream.tuning.trial_stream import trial_stream as trial_stream
