"""Measures by name, and which ones a stream is asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from copy import copy
from difflib import get_close_matches
from importlib.util import find_spec

from clstream.measures.labels import Accuracy, BalancedAccuracy, Brier, CalibrationError, NegativeLogLikelihood, TopK
from clstream.measures.measure import ASKS, SCORES, Measure
from clstream.measures.multilabel import ClassF1, F1OfMeans, MeanAveragePrecision, OverallF1
from clstream.measures.novelty import Auroc, Fpr95
from clstream.measures.values import R2, MeanSquaredError
from clstream.params import check_bool, check_choices
from clstream.stream import TARGETS

MEASURES: dict[str, Callable[..., Measure]] = {
    "accuracy": Accuracy, "top5": TopK, "balanced_accuracy": BalancedAccuracy, "nll": NegativeLogLikelihood, "brier": Brier,
    "ece": CalibrationError, "map": MeanAveragePrecision, "cf1": ClassF1, "cf1_of_means": F1OfMeans, "of1": OverallF1,
    "auroc": Auroc, "fpr95": Fpr95, "mse": MeanSquaredError, "r2": R2,
}  # fmt: skip
"""All measures that have a name."""

MAIN = {"label": "accuracy", "multilabel": "map", "value": "r2"}
"""The main measure, that tables and curves are of, by the kind of targets; on task-incremental streams with task_ before it."""

WITH_THRESHOLD = ("cf1", "cf1_of_means", "of1")

WITH_TORCHMETRICS = ("ece", "map", "cf1", "of1", "auroc", "fpr95", "mse")
"""Those that torchmetrics computes."""

OTHER_CURVES = ("anytime", "cost", "events", "final", "forgetting", "transfer")
"""What else MLflow's curves are called, up to a slash: no measure of the user's own is."""


def measure_named(name: str) -> Measure:
    """Return a measure by name: "accuracy", "cf1", "cf1:0.8" (with its threshold), "task_top5" (with the task given).

    Raises ValueError for a name that there isn't, and ImportError for one that needs torchmetrics where that is not installed.
    """
    plain = name.removeprefix("task_")
    base, colon, threshold = plain.partition(":")
    if base not in MEASURES or (colon and base not in WITH_THRESHOLD):
        near = get_close_matches(base, MEASURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != base else ""
        raise ValueError(f"there is no measure {name!r}: {hint}measures are {', '.join(MEASURES)}, and task_ before any of them")
    if base in WITH_TORCHMETRICS and find_spec("torchmetrics") is None:
        raise ImportError(f"the measure {base} needs the package torchmetrics, which is not installed: pip install torchmetrics")
    try:
        measure = MEASURES[base](float(threshold)) if colon else MEASURES[base]()
    except ValueError:
        raise ValueError(f"{name!r} has no threshold from 0 to 1 after the colon: write {base}:0.8, say") from None
    return measure if plain == name else with_task(measure)


def with_task(measure: Measure) -> Measure:
    """Return a measure that asks with the task given; its name begins with task_. Raises ValueError for one of novelty."""
    if measure.asks == "novelty":
        raise ValueError(f"{measure.name} is about strange samples, which have no task: leave task_ away")
    other = copy(measure)
    other.name, other.asks = f"task_{measure.name}", "task"
    return other


def chosen(
    measures: Sequence[str | Measure | type[Measure]] | None, targets: Sequence[str], scenario: str, owner: str = "the stream"
) -> tuple[Measure, ...]:
    """Return the measures to take of a stream: the main ones of its kinds of targets, then those asked for.

    Args:
        measures: names, measures, or classes of measures. None: the main ones alone.
        targets: the kinds of targets of the stream.
        scenario: of the stream.
        owner: what errors call it.

    Raises:
        ValueError, TypeError: for what is no measure, two of one name, and one that none of the targets has.

    """
    if isinstance(measures, str) or not isinstance(measures, (Sequence, type(None))):
        raise TypeError(f"measures must be a list of names or measures, as ['top5', 'nll'], not {measures!r}")
    asked = {measure.name: measure for measure in (measure_named(name) for name in main_names(targets, scenario))}
    own: set[str] = set()
    for wanted in measures or ():
        measure = as_measure(wanted)
        if measure.name in own:
            raise ValueError(f"two measures are called {measure.name!r}: give one of them another name")
        own.add(measure.name)
        if not set(measure.targets) & set(targets):
            names = [
                name for name, make in MEASURES.items() if set(make().targets) & set(targets) and name not in ("auroc", "fpr95")
            ]
            raise ValueError(
                f"{measure.name} is of {' and '.join(measure.targets)} targets, and {owner} has {' and '.join(targets)} ones: "
                f"take {', '.join(names)}"
            )
        asked[measure.name] = measure
    return tuple(asked.values())


def main_names(targets: Sequence[str], scenario: str) -> list[str]:
    """Return the names of the measures that are always taken; of labels accuracy without and with the task given."""
    names = []
    for target in dict.fromkeys(targets):
        names.append(MAIN[target])
        if target == "label" or scenario == "task":
            names.append(f"task_{MAIN[target]}")
    return names


def as_measure(wanted: str | Measure | type[Measure]) -> Measure:
    """Return a measure that was named, or is there. Raises TypeError, ValueError for what is none."""
    if isinstance(wanted, str):
        return measure_named(wanted)
    if isinstance(wanted, type) and issubclass(wanted, Measure) and not inspect.isabstract(wanted):
        name = wanted.__name__
        try:
            wanted = wanted()
        except TypeError as error:
            raise TypeError(f"{name} can't be made without arguments ({error}): give an object of it") from error
    if not isinstance(wanted, Measure):
        raise TypeError(f"a measure is a name, or an object of a class that derives from clstream.measures.Measure, not {wanted!r}")
    check_measure(wanted)
    return wanted


def check_measure(measure: Measure) -> None:
    """Refuse a measure whose class says what can't be of its name, its question, its targets or its scores."""
    kind, name = type(measure).__name__, getattr(measure, "name", None)
    if not isinstance(name, str) or not name or name.startswith("task_") != (measure.asks == "task"):
        raise ValueError(f"{kind} needs a name, as 'worst_class', which begins with task_ if asks is 'task', and only then")
    if not re.fullmatch(r"\w[\w.:-]*", name, re.ASCII) or name in OTHER_CURVES:
        raise ValueError(
            f"{kind} is called {name!r}: files and curves are called so, so a name has letters, digits, and . : _ - alone, and is "
            f"none of {', '.join(OTHER_CURVES)}"
        )
    own = MEASURES.get(name.removeprefix("task_").partition(":")[0])
    if own is not None and type(measure) is not own:
        raise ValueError(f"{kind} is called {name!r}, as a measure of clstream's is: give it another name")
    if measure.asks not in ASKS:
        raise ValueError(f"{kind}.asks must be one of {', '.join(ASKS)}, not {measure.asks!r}")
    check_choices(TARGETS, **{f"{kind}.targets": measure.targets})
    check_choices(SCORES, **{f"{kind}.scores_are": measure.scores_are})
    check_bool(**{f"{kind}.higher_is_better": measure.higher_is_better})
