"""Anchors: known results, each a YAML file with what to run, what to expect, and where the number comes from."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from clstream import metrics
from clstream.cli.errors import UsageError, nearest
from clstream.cli.yaml_files import dump_yaml, parse_yaml, read_yaml
from clstream.measures import measure_named
from clstream.params import check_bool, check_choice, check_integer, check_integers, check_number
from clstream.results import Result

FOLDER = "clstream.experiments"

KINDS = ("published", "reference run", "own")

BOUNDS = ("both", "below")

METRICS: dict[str, Callable[[Tensor, Tensor, bool], float]] = {
    "average": lambda matrix, taught, _: metrics.average_accuracy(matrix, taught),
    "average_accuracy": lambda matrix, taught, _: metrics.average_accuracy(matrix, taught),
    "forgetting": metrics.forgetting,
    "average_incremental": lambda matrix, taught, _: metrics.average_incremental_accuracy(matrix, taught),
    "average_incremental_accuracy": lambda matrix, taught, _: metrics.average_incremental_accuracy(matrix, taught),
}
"""Metrics of a measure: of (evaluations, tasks), which rows taught which tasks, and whether higher is better."""

OTHER_METRICS = ("task_average_accuracy", "seen")
"""Of accuracy with the task given; and the measure of all test samples seen together, after the last session."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A known result.

    Args:
        name: of the anchor.
        about: one line on what it shows.
        config: what to run, as `clstream run --config` takes it.
        seeds: how many runs, with which seeds.
        metric: one of METRICS, or of OTHER_METRICS.
        expected: the mean that the source reports.
        spread: the standard deviation of a run that the source reports.
        runs: how many runs the source's mean is over.
        source: where the number comes from.
        kind: "published", "reference run" (others' code, or a hand-written loop, run by us) or "own" (clstream, earlier).
        minutes: what it takes on one core, about.
        also: what the same runs give by other metrics: for each, [expected, spread].
        spread_assumed: whether the source gives no spread, as one of a single run can't, and the one here is assumed.
        bound: "both", or "below" where the source calls anything good that is not below what it reports.
        seeded: options that take the seed of each run, such as stream.class_order: what the source draws anew for each run.
        measure: what the metrics are of, as `clstream run --measures` names it, of clstream's own. "": the stream's main measure.
        unknown: what the source doesn't say of its protocol. A mean outside the interval is then no failure.

    """

    name: str
    about: str
    config: dict[str, Any]
    seeds: list[int]
    metric: str
    expected: float
    spread: float
    runs: int
    source: str
    kind: str
    minutes: float
    also: dict[str, list[float]] = field(default_factory=dict)
    spread_assumed: bool = False
    bound: str = "both"
    seeded: list[str] = field(default_factory=list)
    unknown: str = ""
    measure: str = ""

    def __iter__(self) -> Iterator[Anchor]:
        """Yield the anchor by each of its metrics, its own first."""
        yield self
        for metric, (expected, spread) in self.also.items():
            yield replace(self, metric=metric, expected=expected, spread=spread, also={})

    def interval(self, n: int) -> tuple[float, float]:
        """Return where the mean of `n` more runs lies with 95 % confidence if they come from the source's distribution.

        The prediction interval of normal runs with unequal numbers: expected ± t spread sqrt(1/n + 1/runs), t with
        runs - 1 degrees of freedom; of a source of one run, normal. Bound from below, it goes from expected - t ..., t of
        one side, to infinity.
        """
        from scipy.stats import norm, t

        quantile = 0.975 if self.bound == "both" else 0.95
        factor = float(t.ppf(quantile, self.runs - 1) if self.runs > 1 else norm.ppf(quantile))
        width = factor * self.spread * math.sqrt(1 / n + 1 / self.runs)
        return self.expected - width, self.expected + width if self.bound == "both" else math.inf

    @property
    def title(self) -> str:
        """The metric, with the measure that it is of, if that is named."""
        return f"{self.measure} {self.metric}".strip()

    def expectation(self) -> str:
        """Return what is expected, in words."""
        assumed = ", spread assumed" if self.spread_assumed else ""
        least = "at least " if self.bound == "below" else ""
        runs = f"{self.runs} run{'s' * (self.runs != 1)}"
        return f"{self.title} {least}{self.expected:g} ± {self.spread:g}{assumed} ({self.kind}, {runs})"

    def verdict(self, mean: float, n: int) -> tuple[bool, str]:
        """Return whether the mean of `n` runs is as it should be, and the sentence that says so."""
        low, high = self.interval(n)
        where = f"the interval {low:.4f} to {high:.4f}" if self.bound == "both" else f"what is above {low:.4f}"
        where += f", for a mean of {n}"
        if low <= mean <= high:
            return True, f"INSIDE {where}"
        if self.unknown:
            return True, f"PROTOCOL UNKNOWN, {self.unknown}: outside {where}"
        return False, f"OUTSIDE {where}"

    def value(self, result: Result) -> float:
        """Return the anchor's metric of a run."""
        if self.metric == "task_average_accuracy":
            return metrics.average_accuracy(result.task_accuracy, result.taught)
        name = measure_named(self.measure).name if self.measure else result.main_names[0]
        if self.metric == "seen":
            return float(result.measured[name][-1, -1])
        matrix = result.measured[name][:, : len(result.targets)] if self.measure else result.main
        return METRICS[self.metric](matrix, result.taught, name not in result.lower_is_better)

    def config_file(self) -> Path:
        """Write the config, with the measure, to a temporary file that `clstream run --config` takes, and return its path."""
        file = Path(tempfile.mkdtemp(prefix="clstream-")) / f"{self.name}.yaml"
        asked = self.config.get("measures", [])
        names = asked if isinstance(asked, list) else str(asked).split(",")
        more = {"measures": [*names, self.measure]} if self.measure and self.measure not in names else {}
        file.write_text(dump_yaml(self.config | more), encoding="utf-8")
        return file


def anchor_names() -> list[str]:
    """Return the names of the anchors that come with clstream."""
    folder = resources.files(FOLDER) / "anchors"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_anchor(name: str) -> Anchor:
    """Return an anchor by its name, or from a YAML file. Raises UsageError for what is not one."""
    if name.endswith((".yaml", ".yml")):
        loaded = read_yaml(name, "anchor file")
    elif name in anchor_names():
        loaded = parse_yaml((resources.files(FOLDER) / "anchors" / f"{name}.yaml").read_bytes(), name)
    else:
        raise UsageError(f"there is no anchor {name!r}{nearest(name, anchor_names())}; `clstream verify` lists them")
    return _anchor(Path(name).stem, loaded)


def _anchor(name: str, loaded: dict[str, Any]) -> Anchor:
    """Return an anchor of what its file holds. Raises UsageError for keys that are missing, unknown or hold something else."""
    given = [entry.name for entry in fields(Anchor) if entry.name != "name"]
    needed = [entry.name for entry in fields(Anchor) if entry.default is MISSING and entry.default_factory is MISSING]
    if unknown := [key for key in loaded if key not in given]:
        raise UsageError(f"the anchor {name} has an unknown key {unknown[0]!r}{nearest(unknown[0], given)}")
    if missing := [key for key in needed if key not in loaded and key != "name"]:
        raise UsageError(f"the anchor {name} lacks {', '.join(missing)}")
    numbers = ("expected", "spread", "minutes")
    also = loaded.get("also", {})
    try:
        check_number(**{key: loaded[key] for key in numbers})
        check_integer(1, runs=loaded["runs"])
        check_integers(0, seeds=loaded["seeds"])
        check_choice(KINDS, kind=loaded["kind"])
        check_choice((*METRICS, *OTHER_METRICS), metric=loaded["metric"])
        measure = loaded.get("measure", "")
        if not isinstance(measure, str):
            raise TypeError(f"measure must be a name, as map, not {measure!r:.60}")
        check_choice(BOUNDS, bound=loaded.get("bound", "both"))
        check_bool(spread_assumed=loaded.get("spread_assumed", False))
        for metric, pair in also.items():
            check_choice((*METRICS, *OTHER_METRICS), also=metric)
            expected, spread = pair
            check_number(**{f"{metric}, expected": expected, f"{metric}, spread": spread})
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"the anchor {name}: {error}") from None
    try:
        asks = measure_named(measure).asks if measure else "class"
    except ValueError as error:
        raise UsageError(f"the anchor {name}: {error}") from None
    if asks == "novelty":
        raise UsageError(f"the anchor {name}: {measure} is of strange samples, and metrics are of the tasks' own")
    if not loaded["seeds"] or len(set(loaded["seeds"])) < len(loaded["seeds"]):
        raise UsageError(f"the anchor {name}: seeds must be distinct, and at least one")
    if not isinstance(loaded["config"], dict):
        raise UsageError(
            f"the anchor {name}: config must hold what `clstream run --config` takes, not {str(loaded['config'])[:60]}"
        )
    if loaded["runs"] == 1 and not loaded.get("spread_assumed"):
        raise UsageError(f"the anchor {name} is of one run, which has no spread: say spread_assumed: true, and where it is from")
    return Anchor(name=name, **loaded)
