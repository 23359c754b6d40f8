"""Anchors: known results, each a YAML file with what to run, what to expect, and where the number comes from."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from clstream import metrics
from clstream.config import UsageError, nearest
from clstream.engine import Result

FOLDER = "clstream.experiments"
KINDS = ("published", "reference run", "own")


@dataclass(frozen=True, slots=True)
class Anchor:
    """A known result.

    Args:
        name: of the anchor.
        about: one line on what it shows.
        config: what to run, as `clstream run --config` takes it.
        seeds: how many runs, with which seeds.
        metric: "average_accuracy", "forgetting", "task_average_accuracy" or "average_incremental_accuracy".
        expected: the mean that the source reports.
        spread: the standard deviation of a run that the source reports.
        runs: how many runs the source's mean is over.
        source: where the number comes from.
        kind: "published", "reference run" (others' code, or a hand-written loop, run by us) or "own" (clstream, earlier).
        minutes: what it takes on one core, about.

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

    def interval(self, n: int) -> tuple[float, float]:
        """Return where the mean of `n` more runs lies with 95 % confidence if they come from the source's distribution.

        The prediction interval of normal runs with unequal numbers: expected ± t spread sqrt(1/n + 1/runs), t with
        runs - 1 degrees of freedom. For a source of one run, `spread` must be stated by the anchor, and t is taken as 1.96.
        """
        from scipy.stats import t

        factor = float(t.ppf(0.975, self.runs - 1)) if self.runs > 1 else 1.96
        width = factor * self.spread * math.sqrt(1 / n + 1 / self.runs)
        return self.expected - width, self.expected + width

    def expectation(self) -> str:
        """Return what is expected, in words."""
        return f"{self.metric} {self.expected:g} ± {self.spread:g} ({self.kind}, {self.runs} run{'s' * (self.runs != 1)})"

    def measure(self, result: Result) -> float:
        """Return the anchor's metric of a run."""
        if self.metric == "task_average_accuracy":
            return metrics.average_accuracy(result.task_accuracy, result.taught)
        if self.metric == "average_incremental_accuracy":
            return metrics.average_incremental_accuracy(result.main, result.taught)
        return result.forgetting if self.metric == "forgetting" else result.average_accuracy

    def config_file(self) -> Path:
        """Write the config to a temporary file that `clstream run --config` takes, and return its path."""
        file = Path(tempfile.mkdtemp(prefix="clstream-")) / f"{self.name}.yaml"
        file.write_text(yaml.safe_dump(self.config))
        return file


def anchor_names() -> list[str]:
    """Return the names of the anchors that come with clstream."""
    folder = resources.files(FOLDER) / "anchors"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_anchor(name: str) -> Anchor:
    """Return an anchor by its name, or from a YAML file. Raises UsageError for what is not one."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"there is no anchor file {name}")
        text = Path(name).read_text()
    elif name in anchor_names():
        text = (resources.files(FOLDER) / "anchors" / f"{name}.yaml").read_text()
    else:
        raise UsageError(f"there is no anchor {name!r}{nearest(name, anchor_names())}; `clstream verify` lists them")
    try:
        anchor = Anchor(name=Path(name).stem, **yaml.safe_load(text))
    except (TypeError, yaml.YAMLError) as error:
        raise UsageError(f"the anchor {name} can't be read: {error}") from None
    if anchor.kind not in KINDS or anchor.metric not in (
        "average_accuracy",
        "forgetting",
        "task_average_accuracy",
        "average_incremental_accuracy",
    ):
        raise UsageError(f"the anchor {name} has an unknown kind or metric: {anchor.kind!r}, {anchor.metric!r}")
    return anchor
