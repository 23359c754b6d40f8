"""Evaluation: a strategy is asked about test sets, and measured."""

from clstream.eval_mode import evaluating as evaluating
from clstream.evaluation.answers import check_labels as check_labels
from clstream.evaluation.evaluate import evaluate as evaluate
from clstream.evaluation.evaluate import measure as measure
from clstream.evaluation.questions import CHUNK as CHUNK
from clstream.evaluation.questions import Questions as Questions
from clstream.evaluation.rejection import Rejection as Rejection
from clstream.evaluation.rejection import RejectionMeasured as RejectionMeasured
from clstream.evaluation.tally import Listener as Listener
