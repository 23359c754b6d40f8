"""Labels: records of other options, or of streams that differ, are not counted as one, and no run is counted twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from clstream.comparison.records import Record

Replicate = tuple[str, str, int]
"""What runs of methods are paired by: the fingerprint of the stream's data, the order of its classes, and the seed."""

StreamKey = tuple[str, str, str]
"""What can be compared: the stream's name, the scenario, and the main measure."""

ORDER = "stream.class_order"


def stream_key(record: Record) -> StreamKey:
    """Return what a record can be compared with: the runs of one stream, scenario and main measure."""
    return record.stream, record.scenario, record.main


def replicate(record: Record) -> Replicate:
    """Return what a run shares with those of other methods that it is paired with."""
    return record.fingerprint, record.params.get(ORDER, ""), record.seed


def tell_apart(records: Sequence[Record]) -> list[Record]:
    """Return records whose label and stream tell them apart: those that have both alike differ in seeds and orders of classes only.

    Where two have the same label, but other options, on one stream, the options that differ are added to it, on all streams:
    "Replay, capacity 500". So it is with streams of one name: "split_mnist, batch_size 10". Records of failed runs are left as
    they are if they name no options.
    """
    streams: dict[StreamKey, list[Mapping[str, str]]] = {}
    for record in records:
        streams.setdefault(stream_key(record), []).append(_stream_options(record))
    named = []
    for record in records:
        names = _varying(streams[stream_key(record)])
        named.append(replace(record, stream=_extended(record.stream, names, _stream_options(record), "stream.")))
    options: dict[tuple[str, StreamKey], list[Mapping[str, str]]] = {}
    for record in named:
        if not record.error:
            options.setdefault((record.label, stream_key(record)), []).append(_options(record))
    varying: dict[str, list[str]] = {}
    for (label, _), together in options.items():
        names = _varying(together)
        if len({group.get("tuned") for group in together}) == len({tuple(sorted(group.items())) for group in together}):
            names = [name for name in names if name == "tuned"]  # that alone tells them apart
        varying[label] = list(dict.fromkeys([*varying.get(label, []), *names]))
    return [
        replace(record, label=_extended(record.label, varying.get(record.label, []), _options(record), "strategy."))
        for record in named
    ]


def _stream_options(record: Record) -> Mapping[str, str]:
    return {name: value for name, value in record.params.items() if name.startswith("stream.") and name != ORDER}


def _options(record: Record) -> Mapping[str, str]:
    """Return what a run's method is: its params but the seed, the device and those of the stream, and whether these were tuned."""
    beside = ("seed", "seeds", "device", "stream")
    own = {name: value for name, value in record.params.items() if name not in beside and not name.startswith("stream.")}
    return own | {"tuned": "tuned" if record.tuned else "not tuned"}


def _varying(options: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the names of options that have several values, or that only some have."""
    groups = [group for group in options if group]
    names = dict.fromkeys(name for group in groups for name in group)
    return [name for name in names if len({group.get(name) for group in groups}) > 1]


def _extended(label: str, names: Sequence[str], options: Mapping[str, str], prefix: str) -> str:
    shown = [
        options[name] if name == "tuned" else f"{name.removeprefix(prefix)} {options[name]}" for name in names if name in options
    ]
    return ", ".join([label, *shown])


def without_repeats(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Return each run once, and notes of those that were there several times.

    A run that came from several sources, as a sweep and MLflow, has the same numbers in each. One that was made again by other
    code, as its identity says, has others: the last one counts. A failed run is left out where another one has ended well, unless
    that one was before it, and by other code.

    Raises ValueError if two runs of one label, stream, order and seed have other numbers, and nothing says why.
    """
    kept: dict[tuple[str, StreamKey, Replicate], Record] = {}
    repeated = remade = 0
    for record in (record for record in records if not record.error):
        place = (record.label, stream_key(record), replicate(record))
        before = kept.setdefault(place, record)
        if before is record:
            continue
        if _is_of_other_code(before, record):
            kept[place], remade = record, remade + 1
            continue
        repeated += 1
        shared = before.metrics.keys() & record.metrics.keys()
        if odd := next((name for name in sorted(shared) if str(before.metrics[name]) != str(record.metrics[name])), ""):
            raise ValueError(
                f"{record.label} on {record.stream}, seed {record.seed}, is there twice, with other numbers: {odd} is "
                f"{before.metrics[odd]:g} in {before.source or 'one run'} and {record.metrics[odd]:g} in "
                f"{record.source or 'another'}; compare sources that have only one of the two"
            )
    counted = {id(record): number for number, record in enumerate(records)}
    chosen = {id(record) for record in kept.values()}
    for number, record in enumerate(records):
        good = kept.get((record.label, stream_key(record), replicate(record)))
        if record.error and (good is None or (counted[id(good)] < number and _is_of_other_code(good, record))):
            chosen.add(id(record))
    notes = [f"{_runs(repeated)} came from several sources, with the same numbers, and counted once"] if repeated else []
    notes += (
        [f"{_runs(remade)} {'were' if remade > 1 else 'was'} made again with other code: the last ones count"] if remade else []
    )
    return [record for record in records if id(record) in chosen], notes


def _is_of_other_code(one: Record, other: Record) -> bool:
    """Return whether the identities of two runs, of config, code and data, differ in the code alone."""
    parts = [record.identity.split("-") for record in (one, other)]
    return all(len(part) == 3 for part in parts) and parts[0][::2] == parts[1][::2] and parts[0][1] != parts[1][1]


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count > 1)}"
