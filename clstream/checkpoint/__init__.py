"""Checkpoints: a run that was killed resumes from its newest one, and ends with the same bits."""

from clstream.checkpoint.checkpointer import Checkpointer as Checkpointer
from clstream.checkpoint.checkpointer import Stopped as Stopped
from clstream.checkpoint.store import newest as newest
