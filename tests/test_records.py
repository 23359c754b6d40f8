"""Records of runs: one line of JSON each, read back as they were; a damaged line is refused."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from clstream.strategies import Finetune
from hypothesis import given
from hypothesis import strategies as st

from clstream import run
from clstream.checkpoint import Checkpointer
from clstream.checks import example_model, example_stream
from clstream.comparison import Record, append_record, from_json, read_file, read_records, record_of, to_json
from clstream.metrics import average_accuracy, forgetting
from clstream.results import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return run(Finetune(example_model()), example_stream(), seed=3, measures=["nll"])


@pytest.fixture(scope="module")
def record(result: Result) -> Record:
    return record_of(result, fingerprint="abc", tuned="tuned, 12 trials", source="runs/x")


def test_a_record_has_what_the_result_has(result: Result, record: Record) -> None:
    assert (record.strategy, record.label, record.stream, record.seed) == ("Finetune", "Finetune", "example", 3)
    assert (record.scenario, record.main, record.tuned) == ("class", "accuracy", "tuned, 12 trials")
    assert torch.equal(record.main_matrix, result.main) and torch.equal(record.taught, result.taught)
    assert record.sessions == result.sessions == (1, 2, 3)
    assert record.metrics["average_accuracy"] == result.average_accuracy == average_accuracy(record.main_matrix, record.taught)
    assert record.metrics["forgetting"] == result.forgetting == forgetting(record.main_matrix, record.taught)
    assert {"nll/mean", "nll/seen", "transfer/backward", "learning_accuracy", "task_il/accuracy/mean"} <= record.metrics.keys()
    assert not [name for name in record.metrics if "task_0" in name or name.startswith("final/")]
    assert record.params["stream.batch_size"] == str(result.params["stream.batch_size"])
    assert record.cost["learning_flops"] == float(result.cost.learning_flops.sum())
    assert record.cost["memory_bytes"] == float(result.cost.memory_bytes[-1]) and record.seconds == result.seconds


def test_it_knows_what_is_better(record: Record) -> None:
    better = record.higher_is_better
    assert better["average_accuracy"] and better["transfer/backward"] and better["accuracy/mean"]
    assert (
        not better["forgetting"]
        and not better["nll/mean"]
        and not better["nll/forgetting"]
        and not better["task_il/forgetting/mean"]
    )


def test_round_trip(record: Record) -> None:
    line = to_json(record)
    assert "\n" not in line and from_json(line) == record  # nan in none of its values: these compare equal
    values = json.loads(line, parse_constant=pytest.fail)
    assert values["rows"][1] == list(record.rows[1])


def test_what_is_not_a_number_is_null(record: Record) -> None:
    odd = replace(record, metrics={"forgetting": math.nan, "nll": math.inf, "r2": -math.inf}, matrix=[[0.5, None], [0.25, 1.0]])
    odd = replace(odd, rows=record.rows[:1] * 2, cost={"flops": math.nan}, seconds=math.nan)
    values = json.loads(to_json(odd), parse_constant=pytest.fail)
    assert values["metrics"] == {"forgetting": None, "nll": "inf", "r2": "-inf"}
    back = from_json(to_json(odd))
    assert math.isnan(back.metrics["forgetting"]) and back.metrics["nll"] == math.inf and back.metrics["r2"] == -math.inf
    assert math.isnan(back.cost["flops"]) and math.isnan(back.seconds) and back.matrix == odd.matrix
    assert torch.equal(back.main_matrix.isnan(), torch.tensor([[False, True], [False, False]]))


def test_a_failed_run_has_a_record_without_metrics() -> None:
    failed = Record("EWC", "EWC", "split_digits", "class", 0, error="the loss is not finite")
    assert str(from_json(to_json(failed))) == str(failed) and failed.main_matrix.shape == failed.taught.shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "3"}, "its 'seed' is not what it should be"),
        ({"seed": True}, "its 'seed' is not"),
        ({"seed": -1}, "its 'seed' is not"),
        ({"rows": [[10**30, 2, [0]], [2, 4, [1]], [3, 6, []]]}, "its 'rows' is not"),
        ({"matrix": [[], [], []], "rows": [[1, 2, []], [2, 4, []], [3, 6, []]]}, "its matrix is not whole"),
        ({"seconds": 10**400}, "its 'seconds' is not"),
        ({"metrics": {"forgetting": "much"}}, "its 'metrics' is not"),
        ({"metrics": []}, "its 'metrics' is not"),
        ({"higher_is_better": {"forgetting": 0}}, "its 'higher_is_better' is not"),
        ({"matrix": [[0.5, 0.5], [0.5]]}, "its matrix is not whole"),
        ({"matrix": []}, "its matrix is not whole"),
        ({"rows": [[1, 2, [0]], [2, 4, [1]], [3, 6, [9]]]}, "it taught tasks that its matrix doesn't have"),
        ({"rows": [[1, 2]]}, "its 'rows' is not"),
        ({"stream": None}, "its 'stream' is not"),
        ({"strateggy": "x"}, "no record of this version of clstream: it has no 'strateggy'"),
    ],
)
def test_a_damaged_record_is_refused(record: Record, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(json.loads(to_json(record)) | change))


@pytest.mark.parametrize("line", ["", "{", "[1]", "null", '{"strategy": "Replay"}', "[" * 100_000, '{"a": 1}\x00'])
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="this is no record"):
        from_json(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "0"]), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.slow
@given(name=st.sampled_from([attribute.name for attribute in fields(Record)]), value=JSON)
def test_whatever_is_in_a_line_it_is_a_record_or_refused(record: Record, name: str, value: object) -> None:
    try:
        read = from_json(json.dumps(json.loads(to_json(record)) | {name: value}))
    except ValueError:
        return
    assert from_json(to_json(read).encode().decode()).main_matrix.shape == read.taught.shape


def test_a_file_of_records(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    for seed in range(3):
        append_record(file, replace(record, seed=seed))
    assert [read.seed for read in read_records(file)] == [0, 1, 2]
    assert [read.seed for read in read_records(tmp_path)] == [0, 1, 2]  # as a sweep's folder


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_sweeps_can_append_to_one_file(record: Record, tmp_path: Path) -> None:
    import fcntl

    file = tmp_path / "records.jsonl"
    second = Thread(target=append_record, args=(file, replace(record, seed=1)))
    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = to_json(replace(record, seed=0)) + "\n"
        other.write(line[:100])
        other.flush()
        second.start()
        second.join(0.05)
        assert second.is_alive() and file.stat().st_size == 100  # it waits, and doesn't take what is half written for torn
        other.write(line[100:])
    second.join()
    assert [read.seed for read in read_records(file)] == [0, 1]


def test_a_torn_last_line_is_told_and_written_over(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append_record(file, record)
    with file.open("a") as out:
        out.write(to_json(record)[:100])
    with pytest.warns(RuntimeWarning, match="line 2 of .* was not written to its end"):
        assert len(read_records(file)) == 1
    append_record(file, replace(record, seed=7))
    assert [read.seed for read in read_records(file)] == [3, 7]
    file.write_text(file.read_text().rstrip("\n"))  # an editor's way: the last line is whole
    append_record(file, replace(record, seed=8))
    assert [read.seed for read in read_records(file)] == [3, 7, 8]


def test_a_damaged_line_is_named(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "headline.jsonl"
    file.write_text(f"{to_json(record)}\n{to_json(record)[:50]}\n{to_json(record)}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*headline\.jsonl: this is no record of a run"):
        read_records(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="it is not text"):
        read_records(file)
    file.write_text("\n")
    assert read_file(file) == []
    with pytest.raises(ValueError, match="there are no records"):
        read_records(file)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(OSError, match="is no regular file"):
        read_records(tmp_path / "pipe.jsonl")
    with pytest.raises(OSError, match=r"there is no .*missing: give a sweep's folder"):
        read_records(tmp_path / "missing")


def test_run_folders_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no records\.jsonl, and no run folders"):
        read_records(tmp_path)
    folder = tmp_path / "Finetune-example-12345678"
    results = {}
    for seed in range(2):
        stream = example_stream()
        results[seed] = run(Finetune(example_model()), stream, Checkpointer(folder / f"seed_{seed}"), seed=seed)
    (folder / "config.yaml").write_text("")
    (folder / "seed_0" / "finished").touch()
    torch.set_num_threads(2)  # not as the runs had it: that is no matter here
    records = read_records(tmp_path)
    assert [(record.seed, record.fingerprint) for record in records] == [(0, stream.fingerprint), (1, stream.fingerprint)]
    assert records[0].error == "" and "not finished" in records[1].error
    assert asdict(records[0])["metrics"]["average_accuracy"] == results[0].average_accuracy
    assert len(read_records(folder)) == 2
