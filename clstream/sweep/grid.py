"""Grids: what the `sweep:` section of a YAML file stands for, combination by combination.

sweep:
  strategy: [Replay, EWC, Finetune]
  strategy.capacity: [200, 500]     # of the strategies that have it
  EWC.strength: [1, 100]            # of EWC only
  seed: 0-4
  length:                           # named combinations
    short: {stream.epochs: 1}
    long: {stream.epochs: 5, max_sessions: 10}
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from typing import Any

CHOICES = ("stream", "strategy", "model", "adapter")
"""The options that name a class or function; its own options follow after a dot."""

MOST_RUNS = 100_000


class GridError(ValueError):
    """A grid that can't be; the message is one sentence."""


@dataclass(frozen=True)
class Combination:
    """One combination of the values in a grid, for all of its seeds.

    Args:
        settings: values by option, as "strategy.capacity", over those of the base config. Of "config" it is a file of more of them.
        label: the strategy, and what tells it from its neighbours, but for the stream.
        seeds: for each a run.
        method: what tables call its method: the label without what is of the stream alone.
        stream: what tables add to the name of its stream, to tell it from others of that name: "epochs 10". Orders of classes
            are not told apart: methods are compared on several.

    """

    settings: dict[str, Any]
    label: str
    seeds: tuple[int, ...]
    method: str
    stream: str


@dataclass(frozen=True)
class Axis:
    """One key of the section: several settings, of which each combination has one.

    Args:
        key: as it is written.
        values: the settings, with what a label calls each.
        option: which option it sets; "" for named combinations.
        owner: the name of the strategy, stream or model that alone is meant, if the key begins with one.

    """

    key: str
    values: list[tuple[str, dict[str, Any]]]
    option: str = ""
    owner: str = ""


@dataclass(frozen=True)
class Known:
    """What options there are.

    Args:
        names: of the command `clstream run`, without those of strategies, streams and models.
        options_of: returns the options of a strategy, stream or model: the kind and the name go in.
        config: returns what a config file holds, by its path.
        seeds: returns the seeds that a value stands for, as 0-4.

    """

    names: Collection[str]
    options_of: Callable[[str, str], Collection[str]]
    config: Callable[[str], Mapping[str, Any]]
    seeds: Callable[[Any], Sequence[int]]


@dataclass
class Grid:
    """A base config and the axes along which it varies.

    Args:
        base: what all runs share: options as `clstream run --config` takes them.
        axes: in the order of the file.
        seeds: for each combination.

    """

    base: dict[str, Any]
    axes: list[Axis] = field(default_factory=list)
    seeds: tuple[int, ...] = (0,)


def read_grid(loaded: Mapping[str, Any], known: Known) -> Grid:
    """Return the grid in a file.

    Args:
        loaded: what the file holds: options of `clstream run`, and `sweep`.
        known: what options there are.

    Raises GridError for one that is empty, and for keys that are no options.
    """
    base = {key: value for key, value in loaded.items() if key != "sweep"}
    section = loaded.get("sweep")
    if not isinstance(section, Mapping) or not section:
        raise GridError("it has no section `sweep:` with what varies, as `sweep: {strategy: [Replay, EWC], seed: 0-4}`")
    given = [key for place in (base, section) for key in ("seed", "seeds") if key in place]
    if given.count("seed") + given.count("seeds") > 1 and ("seeds" in given or "seed" not in base):
        raise GridError("seeds are given twice: keep `seed` in the section sweep")
    if "seeds" in section:
        raise GridError("in the section sweep the seeds are called seed: write `seed: 0-4`")
    grid = Grid({key: value for key, value in base.items() if key != "seeds"})
    if "seed" in section or "seeds" in base:
        grid.seeds = tuple(known.seeds(section["seed"] if "seed" in section else base["seeds"]))
    elif "seed" in base:
        grid.seeds = tuple(known.seeds(base["seed"]))
    grid.base.pop("seed", None)
    axes = [(str(key), value) for key, value in section.items() if key != "seed"]
    names = _names_in(grid.base, axes, known)
    grid.axes = [_axis(key, value, names, known) for key, value in axes]
    return grid


def _names_in(base: Mapping[str, Any], axes: Sequence[tuple[str, Any]], known: Known) -> dict[str, str]:
    """Return the names of the strategies, streams and models in a grid, each with its kind."""
    settings = [base]
    for key, value in axes:
        settings += [{key: item} for item in (value if isinstance(value, list) else [value])]
        if isinstance(value, Mapping):
            settings += [combination for combination in value.values() if isinstance(combination, Mapping)]
    names = {}
    configs = [known.config(str(setting["config"])) for setting in settings if "config" in setting and setting is not base]
    for setting in [*settings, *configs]:
        for kind in CHOICES:
            if name := name_of(setting.get(kind)):
                names[name] = kind
    return names


def name_of(value: Any) -> str:
    """Return the name in a value of an option that names a class: the value, or its class_path; "" for anything else."""
    name = value.get("class_path") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else ""


def _axis(key: str, value: Any, names: Mapping[str, str], known: Known) -> Axis:
    root, _, rest = key.partition(".")
    if root in known.names or root in CHOICES or key in known.names:
        if rest and root not in CHOICES and key not in known.names:
            raise GridError(f"sweep: there is no option {key!r}: {root} has no options of its own")
        values = _values(key, value)
        apart = key == "config" and _strategies_tell_apart([known.config(str(item)) for item in values])
        labels = ["" if apart else _label(key, item) for item in values]
        options = [_text(item.get("init_args") or {}) if isinstance(item, Mapping) else "" for item in values]
        if key == "stream":  # two of one name are told apart by their options
            labels = [
                ", ".join(filter(None, [label, own])) if labels.count(label) > 1 else label
                for label, own in zip(labels, options, strict=True)
            ]
        return Axis(key, [(label, {key: item}) for label, item in zip(labels, values, strict=True)], key)
    owner = max((name for name in names if key.startswith(f"{name}.")), key=len, default="")
    if owner:
        option = f"{names[owner]}.{key[len(owner) + 1 :]}"
        return Axis(key, [(_label(option, item), {option: item}) for item in _values(key, value)], option, owner)
    if isinstance(value, Mapping):
        return Axis(key, _named(key, value, known))
    near = get_close_matches(key, [*known.names, *CHOICES, *names], n=1, cutoff=0.5)
    near = [f"strategy.{key}"] if root == "optimizer" else near
    hint = f": did you mean {near[0]}?" if near else ""
    raise GridError(f"sweep: there is no option {key!r}{hint or ', and no strategy, stream or model of that name is in the grid'}")


def _strategies_tell_apart(configs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no two configs of one stream name one strategy, so that its name is label enough."""
    pairs = [(name_of(config.get("strategy")), name_of(config.get("stream"))) for config in configs]
    return len(set(pairs)) == len(pairs) and all(strategy for strategy, _ in pairs)


def _values(key: str, value: Any) -> list[Any]:
    """Return the values of an axis: those of a list, the numbers of a range, or the only one."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", value)):
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + MOST_RUNS:
            raise GridError(f"sweep: {key} goes from {first} to {last}: a range goes from the lower number to the higher one")
        return list(range(first, last + 1))
    values = value if isinstance(value, list) else [value]
    if not values:
        raise GridError(f"sweep: {key} has no values: give some, or leave the key out")
    if any(item is None for item in values):
        raise GridError(f"sweep: {key} has an empty value: give one, or leave it out")
    for place, item in enumerate(values):
        if item in values[:place] and type(item) in [type(earlier) for earlier in values[:place] if earlier == item]:
            raise GridError(f"sweep: {key} has the value {_text(item)} twice: two runs would be the same")
    return values


def _named(key: str, value: Mapping[Any, Any], known: Known) -> list[tuple[str, dict[str, Any]]]:
    """Return named combinations, each with its settings."""
    if not value:
        raise GridError(f"sweep: {key} has no combinations: give some by name, or leave the key out")
    named = []
    for name, settings in value.items():
        if not isinstance(settings, Mapping) or not settings:
            raise GridError(
                f"sweep: {key} is no option, so it has combinations by name, each with options and one value for each; {name} is "
                f"{_text(settings)[:60]}"
            )
        for option in settings:
            root = str(option).partition(".")[0]
            if root in ("seed", "seeds") or (root not in CHOICES and option not in {*known.names, "config"}):
                near = get_close_matches(str(option), [*known.names, *CHOICES], n=1, cutoff=0.5)
                raise GridError(
                    f"sweep: {key}, {name}: "
                    + ("seeds are a key of the section itself" if root[:4] == "seed" else f"there is no option {option!r}")
                    + (f": did you mean {near[0]}?" if near and root[:4] != "seed" else "")
                )
        named.append((str(name), {str(option): item for option, item in settings.items()}))
    return named


def _label(option: str, value: Any) -> str:
    """Return what a label calls a value of an option: "capacity 500", a name alone where the option names a class."""
    if option in CHOICES:
        return name_of(value).rpartition(".")[2] or _text(value)
    return f"{option.removeprefix('strategy.')} {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)


def combinations(grid: Grid, known: Known, defaults: Mapping[str, str]) -> list[Combination]:
    """Return the combinations of a grid; the last axis in the file varies first.

    An option of a strategy, stream or model varies only where that one has it.

    Args:
        grid: from `read_grid`.
        known: what options there are.
        defaults: the strategy, stream and model where the grid names none.

    Raises GridError for an option that no strategy, stream or model of the grid has, one that is set twice, and too many runs.
    """
    choosing = [axis for axis in grid.axes if not axis.option or axis.option in (*CHOICES, "config")]
    varying = [axis for axis in grid.axes if axis not in choosing]
    used: set[str] = set()
    combined: list[Combination] = []
    for picked in product(*(axis.values for axis in choosing)):
        chosen = _joined(zip(choosing, picked, strict=True))
        names = _chosen_names(chosen, grid.base, known, defaults)
        axes = list(_applying(varying, names, known))
        used |= {axis.key for axis in axes}
        if (math.prod(len(axis.values) for axis in axes) + len(combined)) * len(grid.seeds) > MOST_RUNS:
            raise GridError(f"it stands for more than {MOST_RUNS:,} runs: leave some values out")
        for values in product(*(axis.values for axis in axes)):
            settings = _joined([*zip(choosing, picked, strict=True), *zip(axes, values, strict=True)])
            pairs = [*zip(choosing, picked, strict=True), *zip(axes, values, strict=True)]
            own = [pair for pair in pairs if not _is_of_stream(pair[0])]
            label, method = (_label_of(names["strategy"], some) for some in (pairs, own))
            combined.append(Combination(settings, label, grid.seeds, method, _stream_label(pairs)))
    for axis in varying:
        if axis.key not in used:
            kind = axis.option.partition(".")[0]
            names_of_kind = sorted({_chosen_names(item.settings, grid.base, known, defaults)[kind] for item in combined} - {""})
            options = sorted({option for name in names_of_kind for option in known.options_of(kind, name)})
            near = get_close_matches(axis.option.split(".")[1], options, n=1, cutoff=0.5)
            raise GridError(
                f"sweep: no {kind} of the grid ({', '.join(names_of_kind) or 'it names none'}) has the option "
                f"{axis.option.split('.')[1]!r}" + (f": did you mean {near[0]}?" if near else "")
            )
    return combined


def _joined(pairs: Any) -> dict[str, Any]:
    """Return the settings of some axes together. Raises GridError for an option that two of them set."""
    settings: dict[str, Any] = {}
    setter: dict[str, str] = {}
    for axis, (_, own) in pairs:
        for option, value in own.items():
            if option in settings:
                raise GridError(f"sweep: {option} is set by both {setter[option]} and {axis.key}: keep the right one")
            settings[option], setter[option] = value, axis.key
    return settings


def _chosen_names(
    settings: Mapping[str, Any], base: Mapping[str, Any], known: Known, defaults: Mapping[str, str]
) -> dict[str, str]:
    """Return the names of the strategy, the stream, the model and the adapter of a combination; "" where there is none."""
    config = known.config(str(settings["config"])) if "config" in settings else {}
    places = (settings, config, base, defaults)
    return {kind: next((name for place in places if (name := name_of(place.get(kind)))), "") for kind in CHOICES}


def _applying(axes: Sequence[Axis], names: Mapping[str, str], known: Known) -> Iterator[Axis]:
    """Yield the axes of options that what was chosen has; one that begins with its name goes before one of all."""
    own = {axis.option for axis in axes if axis.owner and axis.owner in names.values()}
    for axis in axes:
        kind, _, option = axis.option.partition(".")
        if axis.owner and axis.owner not in names.values():
            continue
        if not axis.owner and axis.option in own:
            continue
        if kind not in CHOICES or (names[kind] and option.partition(".")[0] in known.options_of(kind, names[kind])):
            yield axis


def _is_of_stream(axis: Axis) -> bool:
    """Return whether an axis sets the stream or options of it, and nothing else."""
    return all(option.partition(".")[0] == "stream" for _, own in axis.values for option in own)


def _stream_label(pairs: Sequence[tuple[Axis, tuple[str, dict[str, Any]]]]) -> str:
    """Return what tells the stream of a combination from others of its name."""
    parts = []
    for axis, (name, _) in pairs:
        if axis.option == "stream":  # its name is known
            name = name.partition(", ")[2]
        named = {name_of(own["stream"]) for _, own in axis.values if "stream" in own}
        apart = len(named) == len(axis.values) or axis.option == "stream.class_order"
        if name and _is_of_stream(axis) and len(axis.values) > 1 and not apart:
            parts.append(name.removeprefix("stream."))
    return ", ".join(parts)


def _label_of(strategy: str, pairs: Any) -> str:
    """Return the label of a combination."""
    label, parts = strategy.rpartition(".")[2], []
    for axis, (name, own) in pairs:
        if not axis.option and ("strategy" in own or "config" in own):
            label = name
        elif name and axis.option not in ("strategy", "stream") and len(axis.values) > 1:
            parts.append(name)
    return ", ".join([label, *parts])
