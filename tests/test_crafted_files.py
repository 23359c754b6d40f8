"""Event logs and run folders that are rubbish, damaged or crafted: a sentence, and what can be read is not lost."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from clstream.strategies import Finetune
from clstream.streams import blobs
from crafted import lines, said

from clstream import run
from clstream.checkpoint import Checkpointer, newest
from clstream.cli import main
from clstream.files import FolderError, locked
from clstream.models import Mlp
from clstream.tracking import EventLog
from clstream.tracking import journal as journals
from clstream.tracking.event_log import read
from clstream.tracking.outbox import Outbox


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


LOG = [
    {"event": "RunStarted", "time": "2026-01-01T00:00:00.000", "seconds": 0.0, "log": 1, "title": "A on b",
     "params": {"stream.sessions": 2}},
    {"event": "TaskStarted", "time": "2026-01-01T00:00:01.000", "seconds": 1.0, "task": 0, "classes": [0, 1]},
    {"event": "RunEnded", "time": "2026-01-01T00:00:02.000", "seconds": 2.0, "error": None},
]  # fmt: skip


# The event log -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 50, "is no event log: no line of it is an event"),
        (b'{"event": "RunSta', "is empty, or its first line is not whole"),
        (lines({"clstream": "tracking", "format": 1}, {"item": 1, "do": "create"}), "is no event log"),
        (lines([1, 2], 5, "x", None, {"event": 5}, {"event": None}), "is no event log"),
        (lines({"level": "INFO", "message": "of another program"}), "is no event log"),
        (b"[" * 50_000 + b"\n", "is no event log"),
        (b"1" * 5000 + b"\n", "is no event log"),
        (lines(LOG[0] | {"log": 99, "clstream": "9.0"}), "is an event log of clstream 9.0, which this version can't read"),
    ],
)
def test_a_log_of_rubbish_is_a_sentence(place, capsys, content, sentence):
    (place / "events.jsonl").write_bytes(content)
    for name in ("events.jsonl", "."):
        out, err = said(capsys, 1, "log", name)
        assert out == "" and err.startswith("clstream: error: ") and sentence in err
    with pytest.raises(ValueError, match=r"events\.jsonl is"):
        list(read("events.jsonl", []))


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\n", b"{]\n", b"{}\n", lines({"event": 7}), lines([]), b'{"event": "TaskEnded"\n',
        lines({"item": 1, "do": "end"}),
    ],
)  # fmt: skip
def test_what_can_be_read_of_a_damaged_log_is_printed(place, capsys, damage):
    (place / "events.jsonl").write_bytes(lines(LOG[0], LOG[1], damage, LOG[2]))
    out, err = said(capsys, 1, "log", "events.jsonl")
    assert [part in out for part in ("A on b: 2 sessions", "task 0: classes 0, 1", "the run ended")] == [True] * 3
    assert "events.jsonl: line 3 is damaged, and left out" in err
    with pytest.warns(RuntimeWarning, match="line 3 is damaged, and left out"):
        assert len(list(read("events.jsonl"))) == 3


@pytest.mark.parametrize(
    "entry",
    [
        {"event": "TaskStarted"}, {"event": "TaskStarted", "classes": 5, "task": 1}, {"event": "Evaluated", "accuracy": "x"},
        {"event": "RunEnded", "error": None, "seconds": "soon"}, {"event": "TaskEnded", "task": 1, "time": 5, "seconds": [1]},
        {"event": "Mine", "fields": [1, 2]}, {"event": "Mine", "fields": {"a": {"b": [None]}}},
        {"event": "Evaluated", "accuracy": [[1]]},
        {"event": "TaskStarted", "task": 1, "classes": []},
    ],
)  # fmt: skip
def test_entries_of_other_types_are_printed_as_they_are(place, capsys, entry):
    (place / "events.jsonl").write_bytes(lines(LOG[0], entry, LOG[2]))
    out, err = said(capsys, 0, "log", "events.jsonl")
    assert len(out.splitlines()) == 3 and err == ""


def test_a_last_line_that_is_not_whole_is_no_damage(place, capsys):
    (place / "events.jsonl").write_bytes(lines(LOG[0]) + b'{"event": "Ta')
    assert said(capsys, 0, "log", "events.jsonl")[1] == ""


def test_one_log_that_is_rubbish_hides_no_other(place, capsys):
    for seed, content in ((0, b"rubbish\n"), (1, lines(*LOG))):
        (place / f"seed_{seed}").mkdir()
        (place / f"seed_{seed}" / "events.jsonl").write_bytes(content)
    out, err = said(capsys, 1, "log", ".")
    assert "the run ended" in out and "seed_0/events.jsonl is no event log" in err
    (place / "empty").mkdir()
    assert "there is no event log in empty" in said(capsys, 1, "log", "empty")[1]


def test_a_line_without_end_takes_little_memory(place, monkeypatch):
    monkeypatch.setattr(journals, "LONGEST", 1 << 20)
    with (place / "events.jsonl").open("wb") as file:
        file.write(lines(LOG[0]))
        for _ in range(20):
            file.write(b" " * (1 << 20))
        file.write(b"\n" + lines(LOG[2]))
    tracemalloc.start()
    entries = list(read("events.jsonl", damaged := []))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(entries), damaged) == (2, [2]) and peak < 5 << 20


# Links, and what steers a terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["events.jsonl", "tracking.jsonl", "lock", "finished", "000009.writing", "more"])
def test_a_run_is_not_resumed_in_a_folder_with_links(place, capsys, name):
    """What is written to a link is written elsewhere: a log that is cut, say."""
    arguments = ["--stream", "blobs", "--strategy", "Finetune", "--track", "false", "--max_sessions", "1"]
    assert main(["run", *arguments]) == 0
    (seed,) = Path("runs").glob("*/seed_0")
    (place / "precious").write_text("{}\nprecious")
    (seed / name).unlink(missing_ok=True)
    (seed / name).symlink_to(place / "precious")
    assert f"{name} is a link, and a run folder has plain files only" in said(capsys, 1, "resume", str(seed.parent))[1]
    assert (place / "precious").read_text() == "{}\nprecious" and (seed / name).is_symlink()


@pytest.mark.parametrize("name", ["000009-0123456789abcdef.pt", "events.jsonl", "tracking.jsonl"])
def test_a_pipe_is_not_waited_for(place, capsys, name):
    folder = place / "runs" / "a"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    assert newest(folder) is None
    assert main(["sync"]) == 0
    assert "there is no event log" in said(capsys, 1, "log", "a")[1]
    with pytest.raises(FolderError, match="is neither a file nor a folder"):
        run(Finetune(Mlp(20, 4, hidden=(8,))), blobs(tasks=2, classes=4), Checkpointer(folder))


def test_a_journal_writes_through_no_link(place):
    (place / "precious").write_text("{}\nprecious")
    for name in ("events.jsonl", "tracking.jsonl"):
        (place / name).symlink_to(place / "precious")
        with pytest.raises(OSError, match="symbolic links"):
            journals.Journal(place / name)
    (place / "tracking.jsonl").unlink()
    (place / "tracking.jsonl").write_text("{}\n")
    (place / "tracking.jsonl.lock").symlink_to(place / "precious")
    with pytest.raises(OSError, match="lock is a link: remove it"):
        Outbox.read(place / "tracking.jsonl")
    (place / "lock").symlink_to(place / "precious")
    with pytest.raises(FolderError, match="is a link: remove it"), locked(place):
        pass
    assert (place / "precious").read_text() == "{}\nprecious"


def test_nothing_that_is_printed_of_a_file_steers_the_terminal(place, capsys):
    steering = "\x1b]0;title\x07\x1b[2J\x9b1m\x08\u202e\r"
    entry = LOG[0] | {"title": steering}
    own = {"event": "My" + steering, "time": steering, "seconds": 1.0, "fields": {steering: steering}}
    (place / "events.jsonl").write_bytes(lines(entry, own, LOG[2] | {"error": f"{steering}\nclstream: all is well"}))
    out, _ = said(capsys, 0, "log", "events.jsonl")
    assert r"\x1b]0;title\x07\x1b[2J\x9b1m\x08\u202e\r" in out
    assert out.count("\n") == 3 and all(letter.isprintable() for letter in out.replace("\n", ""))
    (place / "c.yaml").write_text(json.dumps({"stream": "x" + steering, steering: 1}))
    _, err = said(capsys, 2, "run", "--config", "c.yaml")
    assert all(letter.isprintable() for letter in err.replace("\n", "")) and r"\x1b" in err


# What is under way ---------------------------------------------------------------------------------------------------------------


def test_the_log_of_a_run_is_read_as_before(place, capsys):
    stream = blobs(tasks=2, classes=4, train_per_class=10)
    run(Finetune(Mlp(20, 4, hidden=(8,))), stream, EventLog("run"))
    assert said(capsys, 0, "log", "run")[0].splitlines()[-1].endswith("the run ended")
