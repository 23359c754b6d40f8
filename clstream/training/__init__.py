"""Training controls: how the steps of any strategy are taken, whatever it minimises."""

from clstream.training.class_weights import ClassWeights as ClassWeights
from clstream.training.early_stopping import BestWeightsRestored as BestWeightsRestored
from clstream.training.early_stopping import EarlyStopping as EarlyStopping
from clstream.training.early_stopping import EpochMeasured as EpochMeasured
from clstream.training.early_stopping import SessionStoppedEarly as SessionStoppedEarly
from clstream.training.renewal import OptimizerRenewal as OptimizerRenewal
from clstream.training.schedule import SCHEDULES as SCHEDULES
from clstream.training.schedule import RateSchedule as RateSchedule
from clstream.training.schedule import rate_factor as rate_factor
from clstream.training.taken import check_taken as check_taken
from clstream.training.taken import learner_within as learner_within
from clstream.training.taken import taken as taken
from clstream.training.training import Training as Training
from clstream.training.updates import Updates as Updates
