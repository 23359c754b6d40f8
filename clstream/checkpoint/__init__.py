"""Checkpoints: a run that is killed goes on to the same bits."""

from clstream.checkpoint.checkpointer import Checkpointer as Checkpointer
from clstream.checkpoint.checkpointer import Stopped as Stopped
from clstream.checkpoint.store import newest as newest
