"""Comparisons: what records say of methods against each other, as numbers that tables are written of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import combinations

from clstream.comparison.labels import Replicate, StreamKey, replicate, stream_key, tell_apart, without_repeats
from clstream.comparison.records import Record
from clstream.comparison.statistics import Mean, Ranking, holm, mean_interval, paired_difference, ranking

ALPHA = 0.05
"""The chance of a false finding that tests are made for."""


SUMS = {
    "training_seconds": ("learning_seconds", "consolidating_seconds"),
    "training_flops": ("learning_flops", "consolidating_flops"),
}
"""Costs that are sums of those in records."""


def value_of(record: Record, metric: str) -> float:
    """Return a metric or a cost of a record by name; "average" is that of its main measure; NaN: it has none."""
    if metric in SUMS:
        return sum(record.cost.get(name, math.nan) for name in SUMS[metric])
    name = f"average_{record.main.replace('/', '_')}" if metric == "average" else metric
    if name == "seconds":
        return record.seconds
    return record.metrics.get(name, record.cost.get(name, math.nan))


@dataclass(frozen=True)
class Cell:
    """A metric of a method on a stream.

    Args:
        mean: over its seeds, with the interval.
        values: by what runs are paired by.
        is_best: whether no other method on the stream has a better mean; never of a cost, or where it isn't known what is better.
        is_near_best: whether it was tested against the best one, and isn't shown to be worse.

    """

    mean: Mean
    values: dict[Replicate, float]
    is_best: bool = False
    is_near_best: bool = False


@dataclass(frozen=True)
class Difference:
    """Two methods on one stream in one metric, by the runs that share stream, order of classes, and seed.

    Args:
        stream: its name, as tables have it.
        metric: its name.
        first, second: the labels of the methods.
        mean, low, high: first minus second, and the bootstrap interval; NaN: see `paired_difference`.
        p, adjusted: of the paired t-test, as it is and corrected by Holm for all pairs that were asked of the stream and metric.
        pairs: how many runs were paired.
        higher_is_better: of the metric; None: it isn't known.

    """

    stream: str
    metric: str
    first: str
    second: str
    mean: float
    low: float
    high: float
    p: float
    adjusted: float
    pairs: int
    higher_is_better: bool | None

    @property
    def is_shown(self) -> bool:
        """Whether the methods are shown to differ: the corrected p-value is below 5 %."""
        return self.adjusted < ALPHA

    @property
    def winner(self) -> str:
        """The method that is shown to be better; "" if none is."""
        if not self.is_shown or self.higher_is_better is None:
            return ""
        return self.first if (self.mean > 0) == self.higher_is_better else self.second


@dataclass(frozen=True)
class MetricRanking:
    """The ranks of methods over several streams in one metric; methods that lack a stream are not ranked."""

    metric: str
    methods: tuple[str, ...]
    streams: tuple[str, ...]
    ranking: Ranking
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What records say of methods against each other.

    Args:
        records: those that ended well, each once, with labels that tell them apart.
        failed: those that didn't.
        streams: what methods can be compared on, by key: the name that tables have.
        methods: the labels, in the order of the records.
        metrics: their names, in the order of the columns.
        cells: by stream, method and metric.
        differences: of the pairs that were asked, for the metrics that are no costs.
        rankings: where there are several streams, of the metrics that are no costs and of which it is known what is better.
        tuned: by stream and method, "" or how its options were chosen.
        higher_is_better: by metric; None: it isn't known.
        notes: sentences that belong below a table.

    """

    records: tuple[Record, ...]
    failed: tuple[Record, ...]
    streams: dict[StreamKey, str]
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[tuple[StreamKey, str, str], Cell]
    differences: tuple[Difference, ...]
    rankings: tuple[MetricRanking, ...]
    tuned: dict[tuple[StreamKey, str], str]
    higher_is_better: dict[str, bool | None]
    notes: tuple[str, ...]

    @property
    def costs(self) -> tuple[str, ...]:
        """The metrics that are costs: these are shown, not tested."""
        return tuple(name for name in self.metrics if all(_is_cost(record, name) for record in self.records))

    def methods_on(self, stream: StreamKey) -> list[str]:
        """Return the methods that ran on a stream, in order."""
        return [method for method in self.methods if (stream, method) in self.tuned]

    @property
    def runs(self) -> str:
        """How many runs most means are over, in words."""
        usual = Counter(cell.mean.size for cell in self.cells.values()).most_common(1)[0][0]
        return f"{usual} run{'s' * (usual > 1)}"


def compare(records: Sequence[Record], metrics: Sequence[str] | None = None, against: str | None = None) -> Comparison:
    """Return what records say of methods against each other.

    Args:
        records: of the runs; those of failed runs count as failed.
        metrics: metrics and costs by their names in records, as "average_accuracy", "forgetting", "memory_bytes", "seconds";
            "average" is that of the main measure, "training_seconds" those of learning and consolidating. None: the average,
            forgetting, and training_seconds, or seconds if they are not known apart.
        against: the label of the method that each of the others is held against. None: all pairs are.

    Raises:
        ValueError: if there are no records, none ended well, a metric or method is unknown, or two runs that should be the same
            have other numbers; the message says so in a sentence.

    """
    if not records:
        raise ValueError("there are no records to compare")
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, as [{metrics!r}], not {metrics!r}")
    kept, notes = without_repeats(tell_apart(records))
    good = [record for record in kept if not record.error]
    failed = [record for record in kept if record.error]
    if not good:
        raise ValueError(f"no run ended well: {failed[0].label} on {failed[0].stream}, seed {failed[0].seed}: {failed[0].error}")
    names = _checked_metrics(metrics, good)
    methods = tuple(dict.fromkeys(record.label for record in good))
    if against is not None and against not in methods:
        raise ValueError(f"there is no method {against!r}{_meant(against, methods)}: there are {'; '.join(methods)}")
    streams = _titles(good)
    cells = _cells(good, names)
    better = {name: _higher_is_better(good, name) for name in names}
    costs = [name for name in names if all(_is_cost(record, name) for record in good)]
    tested = [name for name in names if name not in costs]
    differences = [
        difference
        for stream in streams
        for name in tested
        for difference in _differences(cells, stream, streams[stream], name, methods, against, better[name])
    ]
    for stream in streams:
        for name in tested:
            here = [item for item in differences if (item.stream, item.metric) == (streams[stream], name)]
            _mark_best(cells, stream, name, better[name], here)
    rankings = [ranks for name in tested if (ranks := _ranking(cells, streams, methods, name, better[name])) is not None]
    tuned = {(stream_key(record), record.label): record.tuned for record in good}
    notes = [*_notes(good, failed, streams), *notes]
    return Comparison(
        tuple(good), tuple(failed), streams, methods, names, cells, tuple(differences), tuple(rankings), tuned, better, tuple(notes)
    )


def _checked_metrics(metrics: Sequence[str] | None, records: Sequence[Record]) -> tuple[str, ...]:
    mains = {record.main for record in records}
    average = f"average_{records[0].main.replace('/', '_')}" if len(mains) == 1 else "average"
    known = {name for record in records for name in (*record.metrics, *record.cost)} | {"average", "seconds"}
    known |= {name for name, parts in SUMS.items() if {*parts} <= known}
    seconds = "training_seconds" if "training_seconds" in known else "seconds"
    names = tuple(dict.fromkeys(metrics or (average, "forgetting", seconds)))
    if unknown := next((name for name in names if name not in known), None):
        raise ValueError(f"no run has a metric {unknown!r}{_meant(unknown, known)}: there are {', '.join(sorted(known))}")
    return names


def _meant(name: str, known: Sequence[str] | set[str]) -> str:
    names = {whole.removeprefix("average_"): whole for whole in known} | {whole: whole for whole in known}
    near = get_close_matches(name, list(names), n=1)
    return f", did you mean {names[near[0]]!r}?" if near else ""


def _titles(records: Sequence[Record]) -> dict[StreamKey, str]:
    """Return the name of each stream in tables: with the scenario, or the main measure, where two have one name."""
    keys = list(dict.fromkeys(stream_key(record) for record in records))
    titles = {}
    for stream, scenario, main in keys:
        alike = [key for key in keys if key[0] == stream]
        more = [f"{scenario}-IL"] if len({key[1] for key in alike}) > 1 else []
        more += [main] if len([key for key in alike if key[1] == scenario]) > 1 else []
        titles[stream, scenario, main] = ", ".join([stream, *more])
    return titles


def _cells(records: Sequence[Record], metrics: Sequence[str]) -> dict[tuple[StreamKey, str, str], Cell]:
    values: dict[tuple[StreamKey, str, str], dict[Replicate, float]] = {}
    for record in records:
        for name in metrics:
            place = (stream_key(record), record.label, name)
            values.setdefault(place, {})[replicate(record)] = value_of(record, name)
    return {place: Cell(mean_interval(list(runs.values())), runs) for place, runs in values.items()}


def _is_cost(record: Record, metric: str) -> bool:
    return metric in ("seconds", *SUMS) or (metric in record.cost and metric not in record.metrics)


def _higher_is_better(records: Sequence[Record], metric: str) -> bool | None:
    """Return what the records say of a metric, if they agree; of costs less is better, of main measures more."""
    if metric == "average":
        return True
    said = {record.higher_is_better[metric] for record in records if metric in record.higher_is_better}
    if not said and all(_is_cost(record, metric) for record in records):
        return False
    return said.pop() if len(said) == 1 else None


def _differences(
    cells: dict[tuple[StreamKey, str, str], Cell], stream: StreamKey, title: str, metric: str, methods: Sequence[str],
    against: str | None, higher_is_better: bool | None,
) -> list[Difference]:  # fmt: skip
    """Return the paired differences of the pairs that were asked, corrected for being so many."""
    present = [method for method in methods if (stream, method, metric) in cells]
    pairs = [pair for pair in combinations(present, 2) if against is None or against in pair]
    differences = []
    for first, second in pairs:
        one, other = cells[stream, first, metric].values, cells[stream, second, metric].values
        shared = [key for key in one if key in other]
        if not shared:
            nothing = (math.nan,) * 5
            differences.append(Difference(title, metric, first, second, *nothing, pairs=0, higher_is_better=higher_is_better))
            continue
        test = paired_difference([one[key] for key in shared], [other[key] for key in shared])
        numbers = (test.mean, test.low, test.high, test.p, math.nan)
        differences.append(Difference(title, metric, first, second, *numbers, test.pairs, higher_is_better))
    adjusted = holm([difference.p for difference in differences])
    return [replace(difference, adjusted=p) for difference, p in zip(differences, adjusted, strict=True)]


def _mark_best(
    cells: dict[tuple[StreamKey, str, str], Cell], stream: StreamKey, metric: str, higher_is_better: bool | None,
    differences: Sequence[Difference],
) -> None:  # fmt: skip
    """Mark the best mean on a stream, and those that were tested against it and aren't shown to be worse."""
    here = {method: cell for (place, method, name), cell in cells.items() if (place, name) == (stream, metric)}
    means = {method: cell.mean.mean for method, cell in here.items() if math.isfinite(cell.mean.mean)}
    if higher_is_better is None or len(means) < 2:
        return
    top = max(means.values()) if higher_is_better else min(means.values())
    best = {method for method, mean in means.items() if mean == top}
    near = {
        name
        for difference in differences
        for name, other in ((difference.first, difference.second), (difference.second, difference.first))
        if other in best and name not in best and not math.isnan(difference.p) and not difference.is_shown
    }
    for method, cell in here.items():
        cells[stream, method, metric] = replace(cell, is_best=method in best, is_near_best=method in near)


def _ranking(
    cells: dict[tuple[StreamKey, str, str], Cell], streams: dict[StreamKey, str], methods: Sequence[str], metric: str,
    higher_is_better: bool | None,
) -> MetricRanking | None:  # fmt: skip
    """Return the ranks of the methods that have a mean on all streams that the metric is known of; None if they can't be ranked."""
    means = {(stream, method): cell.mean.mean for (stream, method, name), cell in cells.items() if name == metric}
    measured = [stream for stream in streams if any(math.isfinite(mean) for (place, _), mean in means.items() if place == stream)]
    whole = [method for method in methods if all(math.isfinite(means.get((stream, method), math.nan)) for stream in measured)]
    if higher_is_better is None or len(measured) < 2 or len(whole) < 2:
        return None
    ranks = ranking([[means[stream, method] for method in whole] for stream in measured], higher_is_better, ALPHA)
    left_out = tuple(method for method in methods if method not in whole)
    return MetricRanking(metric, tuple(whole), tuple(streams[stream] for stream in measured), ranks, left_out)


def _notes(good: Sequence[Record], failed: Sequence[Record], streams: dict[StreamKey, str]) -> list[str]:
    """Return what a reader of the tables must know of the runs."""
    notes = []
    counts = Counter((record.label, stream_key(record)) for record in good)
    usual = Counter(counts.values()).most_common(1)[0][0]
    fewer = [f"{label} on {streams[key]}: {count}" for (label, key), count in counts.items() if count not in (1, usual)]
    if fewer:
        notes.append(f"not of {usual} runs, but of another number: {'; '.join(fewer)}")
    lone = [f"{label} on {streams[key]}" for (label, key), count in counts.items() if count == 1]
    if len(lone) == len(counts):
        notes.append("one seed each: no interval, and no difference is tested")
    elif lone:
        notes.append(f"one seed, so no interval, and no difference tested: {'; '.join(lone)}")
    reasons: dict[tuple[str, str, str], int] = {}
    for record in failed:
        place = (record.label, streams.get(stream_key(record), record.stream), record.error)
        reasons[place] = reasons.get(place, 0) + 1
    notes += [f"left out: {count} of {label} on {stream}: {error}" for (label, stream, error), count in reasons.items()]
    for key, title in streams.items():
        prints = sorted({record.fingerprint for record in good if stream_key(record) == key and record.fingerprint})
        if len(prints) > 1:
            notes.append(f"{title} came in {len(prints)} orders, or versions of its data: {', '.join(prints)}")
    tuned_on = dict.fromkeys(record.tuned.partition(" on ")[2] for record in good)
    notes += [f"tuned on {samples}" for samples in tuned_on if samples]
    codes = sorted({record.code for record in good if record.code})
    if len(codes) > 1:
        notes.append(f"the runs were made by {len(codes)} versions of the code: {', '.join(codes)}")
    return notes
