"""clstream: play a stream of tasks to a strategy, and see what it forgets."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clstream.bus import Event as Event
    from clstream.bus import on as on
    from clstream.engine import run as run
    from clstream.engine import run_seeds as run_seeds
    from clstream.events import BatchLearned as BatchLearned
    from clstream.events import BatchReady as BatchReady
    from clstream.events import EpochEnded as EpochEnded
    from clstream.events import EpochStarted as EpochStarted
    from clstream.events import Evaluated as Evaluated
    from clstream.events import RunContinued as RunContinued
    from clstream.events import RunEnded as RunEnded
    from clstream.events import RunStarted as RunStarted
    from clstream.events import SessionEnded as SessionEnded
    from clstream.events import SessionStarted as SessionStarted
    from clstream.events import TaskEnded as TaskEnded
    from clstream.events import TaskStarted as TaskStarted
    from clstream.results import Result as Result
    from clstream.strategy import Strategy as Strategy
    from clstream.strategy import load as load
    from clstream.stream import Batch as Batch
    from clstream.stream import Epoch as Epoch
    from clstream.stream import Samples as Samples
    from clstream.stream import Session as Session
    from clstream.stream import Stream as Stream
    from clstream.stream import Subset as Subset
    from clstream.stream import Task as Task

__version__ = "0.1.0"

_here = _Path(__file__).parent
if not (_here / "strategies").is_dir():  # a source tree, where strategies/ and streams/ lie beside clstream/
    __path__.append(str(_here.parent))

_MODULES = {
    "bus": ("Event", "on"),
    "engine": ("run", "run_seeds"),
    "events": (
        "BatchLearned",
        "BatchReady",
        "EpochEnded",
        "EpochStarted",
        "Evaluated",
        "RunContinued",
        "RunEnded",
        "RunStarted",
        "SessionEnded",
        "SessionStarted",
        "TaskEnded",
        "TaskStarted",
    ),
    "results": ("Result",),
    "strategy": ("Strategy", "load"),
    "stream": ("Batch", "Epoch", "Samples", "Session", "Stream", "Subset", "Task"),
}
"""Where the public names are: each is imported when it is asked for, so that `clstream --help` needs no torch."""


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            thing: object = getattr(_import_module(f"clstream.{module}"), name)
            globals()[name] = thing
            return thing
    raise AttributeError(f"module 'clstream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(name for names in _MODULES.values() for name in names)])
