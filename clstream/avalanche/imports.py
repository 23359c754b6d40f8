"""How Avalanche, which clstream can do without, is imported: where it is used, quietly, or refused with what to do."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

AVALANCHE = "0.6.0"
"""The version of avalanche-lib that the bridge is written and tested against."""


def import_avalanche(part: str) -> ModuleType:
    """Return a module of Avalanche by its name within the package, as "benchmarks" or "training.supervised".

    What its many dependencies warn of when they are imported is not shown. Raises ImportError, with what to do, where Avalanche
    is not installed, can't be, or is of another version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module("avalanche")
            module = importlib.import_module(f"avalanche.{part}")
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != "avalanche":
            raise ImportError(f"Avalanche can't be imported: {error}. Install it anew: pip install 'clstream[avalanche]'") from None
        if sys.version_info >= (3, 13):
            here = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise ImportError(
                f"avalanche-lib {AVALANCHE} supports Python up to 3.12, and this is {here}: use its bridge from an older Python"
            ) from None
        raise ImportError("the bridge needs Avalanche, which is not installed: pip install 'clstream[avalanche]'") from None
    if package.__version__ != AVALANCHE:
        raise ImportError(
            f"the bridge knows avalanche-lib {AVALANCHE}, and {package.__version__} is installed: pip install 'clstream[avalanche]'"
        )
    return module
