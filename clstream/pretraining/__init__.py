"""Pre-training: training on a stream's classes together, and files of weights that runs can start from."""

from clstream.pretraining.joined import join_tasks as join_tasks
from clstream.pretraining.probe import linear_probe as linear_probe
from clstream.pretraining.schedule import LearningRateSchedule as LearningRateSchedule
from clstream.pretraining.training import ValidationLines as ValidationLines
from clstream.pretraining.training import check_pretraining as check_pretraining
from clstream.pretraining.training import pretrain as pretrain
from clstream.pretraining.weights import load_weights as load_weights
from clstream.pretraining.weights import ranges as ranges
from clstream.pretraining.weights import save_weights as save_weights
from clstream.pretraining.weights import weights_header as weights_header
