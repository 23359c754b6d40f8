"""Records of other options or streams are told apart, and no run is counted twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clstream.comparison import Record
from clstream.comparison.labels import tell_apart, without_repeats


def record(label: str = "Replay", seed: int = 0, stream: str = "split_mnist", tuned: str = "", **params: object) -> Record:
    options = {name.replace("__", "."): str(value) for name, value in params.items()}
    own = {"strategy": label, "stream": stream, "seed": str(seed), **options}
    return Record(label, label, stream, "class", seed, own, metrics={"average_accuracy": 0.5}, tuned=tuned)


def labels(records: list[Record]) -> list[str]:
    return [told.label for told in tell_apart(records)]


def test_options_that_differ_are_in_the_label() -> None:
    runs = [record(seed=seed, strategy__capacity=size, strategy__rate=0.1) for size in (200, 500) for seed in (0, 1)]
    assert labels(runs) == ["Replay, capacity 200"] * 2 + ["Replay, capacity 500"] * 2
    assert labels(runs[:2]) == ["Replay"] * 2
    assert labels([*runs, record("EWC")])[-1] == "EWC"
    assert labels([record(model__hidden=1), record(model__hidden=2)]) == ["Replay, model.hidden 1", "Replay, model.hidden 2"]
    assert labels([record(), record(strategy__old=1)]) == ["Replay", "Replay, old 1"]


def test_labels_are_the_same_on_all_streams() -> None:
    runs = [record(strategy__capacity=200), record(strategy__capacity=500), record(stream="blobs", strategy__capacity=500)]
    assert labels(runs) == ["Replay, capacity 200", "Replay, capacity 500", "Replay, capacity 500"]
    tuned_apart = [record(strategy__rate=0.1), record(stream="blobs", strategy__rate=0.3)]
    assert labels(tuned_apart) == ["Replay", "Replay"]


def test_seeds_devices_and_orders_of_classes_are_no_options() -> None:
    runs = [record(device="cpu", stream__class_order="0"), record(seed=1, device="cuda", stream__class_order="1")]
    assert labels(runs) == ["Replay", "Replay"] and {told.stream for told in tell_apart(runs)} == {"split_mnist"}


def test_tuned_runs_are_told_apart_by_that_alone() -> None:
    runs = [record(strategy__rate=0.1), record(strategy__rate=0.3, tuned="12 trials on digits")]
    assert labels(runs) == ["Replay, not tuned", "Replay, tuned"]
    assert labels([*runs, record(strategy__rate=0.2)])[0] == "Replay, rate 0.1, not tuned"


def test_streams_that_differ_are_told_apart() -> None:
    runs = [record(stream__batch_size=10), record(stream__batch_size=32), record(stream="blobs", stream__batch_size=32)]
    assert [told.stream for told in tell_apart(runs)] == ["split_mnist, batch_size 10", "split_mnist, batch_size 32", "blobs"]


def test_a_failed_run_is_left_as_it_is() -> None:
    failed = Record("Replay", "Replay", "split_mnist", "class", 3, error="no memory")
    assert tell_apart([record(strategy__capacity=2), record(strategy__capacity=3), failed])[-1] == failed


def test_runs_that_came_twice_are_counted_once() -> None:
    run, other = record(), replace(record(seed=1), source="runs/b")
    kept, notes = without_repeats([run, other, replace(run, source="mlflow", metrics=run.metrics | {"forgetting": 0.1})])
    assert kept == [run, other] and notes == ["1 run came from several sources, with the same numbers, and counted once"]
    assert without_repeats([run, other]) == ([run, other], [])
    with pytest.raises(ValueError, match=r"Replay on split_mnist, seed 1, is there twice, .*: average_accuracy is 0\.5 in runs/b"):
        without_repeats([run, other, replace(other, metrics={"average_accuracy": 0.6})])
    orders = [replace(run, fingerprint=name) for name in "ab"]
    assert without_repeats(orders) == (orders, [])


def test_a_failed_run_gives_way_to_one_that_ended_well() -> None:
    failed = replace(record(), metrics={}, error="no memory")
    assert without_repeats([failed, record(), record(seed=1)]) == ([record(), record(seed=1)], [])
    assert without_repeats([failed, record(seed=1)])[0] == [failed, record(seed=1)]


def test_of_runs_by_several_versions_of_the_code_the_last_one_counts() -> None:
    old = [replace(record(seed=seed), identity=f"c{seed}-old-d") for seed in (0, 1)]
    new = [replace(run, identity=run.identity.replace("old", "new"), metrics={"average_accuracy": 0.7}) for run in old]
    kept, notes = without_repeats([*old, *new])
    assert kept == new and notes == ["2 runs were made again with other code: the last ones count"]
    failed = replace(new[1], metrics={}, error="no memory")
    assert without_repeats([*old, new[0], failed])[0] == [old[1], new[0], failed]  # the failure of the new code is told
    assert without_repeats([failed, *old])[0] == old
    with pytest.raises(ValueError, match="is there twice"):  # the same code, and other numbers
        without_repeats([old[0], replace(old[0], metrics={"average_accuracy": 0.7})])
