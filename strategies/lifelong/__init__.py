"""Lifelong learning by the stiffness of weights."""

from clstream.strategies.lifelong.events import Consolidated as Consolidated
from clstream.strategies.lifelong.events import Pruned as Pruned
from clstream.strategies.lifelong.events import Relaxed as Relaxed
from clstream.strategies.lifelong.lifelong import Lifelong as Lifelong
