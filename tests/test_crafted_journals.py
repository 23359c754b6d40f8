"""Journals of trackers from somebody else: what they may send, and where to."""

from __future__ import annotations

from pathlib import Path

import pytest
from crafted import lines, said
from mlflow.tracking import MlflowClient

from clstream.tracking.outbox import Outbox, is_plain_name, peek


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


HEAD = {"clstream": "tracking", "format": 1, "uri": "", "experiment": "clstream", "key": "0" * 32}
CREATE = {"item": 1, "do": "create", "name": "mine", "tags": {"a": "b"}, "at": 1_700_000_000_000}
METRICS = {"item": 2, "do": "metrics", "at": 1_700_000_000_000, "points": [["accuracy/mean", 1, 0.5]]}
END = {"item": 9, "do": "end", "status": "FINISHED", "at": 1_700_000_000_000}


def journal(folder: Path, uri: str, *entries: object, head: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tracking.jsonl"
    file.write_bytes(lines((HEAD if head is None else head) | {"uri": uri} if not isinstance(head, bytes) else head, *entries))
    return file


@pytest.mark.parametrize(
    "content",
    [
        b"", b"rubbish", b"rubbish\n" * 3, bytes(range(256)), lines({"event": "RunStarted"}), lines({"item": 1, "do": "end"}),
        lines(HEAD | {"format": 7}), lines(HEAD | {"clstream": "other"}), lines(HEAD | {"uri": 5}), lines([HEAD]), lines(HEAD)[:-1],
        lines({"clstream": "tracking", "format": 1}), b"[" * 50_000 + b"\n",
    ],
)  # fmt: skip
def test_a_journal_of_rubbish_is_a_sentence(place, capsys, content):
    (place / "runs" / "a").mkdir(parents=True)
    (place / "runs" / "a" / "tracking.jsonl").write_bytes(content)
    for arguments in (["sync"], ["sync", "a"], ["sync", "runs/a/tracking.jsonl"]):
        out, err = said(capsys, 1, *arguments)
        assert "nothing to send" not in out
        assert err.startswith("clstream: error: runs/a/tracking.jsonl is ") and "journal of a tracker" in err
    assert (place / "runs" / "a" / "tracking.jsonl").read_bytes() == content


def test_a_folder_without_a_journal_is_said(place, capsys):
    (place / "runs" / "a").mkdir(parents=True)
    assert "there is no journal of a tracker in runs/a" in said(capsys, 1, "sync", "a")[1]
    assert "there is nothing to send in runs" in said(capsys, 0, "sync")[0]


@pytest.mark.parametrize(
    "damage",
    [
        b"{]\n", b"\xff\n", lines([1]), lines({"item": 3}), lines({"item": "3", "do": "end"}), lines({"item": 3, "do": 5}),
        lines({"item": 3, "do": "metrics", "at": 0, "points": [["a", "b", 1]]}), lines({"item": 3, "do": "metrics", "points": 5}),
        lines({"item": 3, "do": "params", "values": ["a"]}), lines({"item": 3, "do": "artifact", "name": "x"}),
        lines({"item": 3, "do": "end", "status": "DONE", "at": 1}), lines({"sent": "x"}), lines({"run_id": 5}),
        lines({"seed": 0, "points": [["a", 1]]}), lines({"seed": "0", "points": []}),
    ],
)  # fmt: skip
def test_what_can_be_read_of_a_damaged_journal_is_sent(store, place, capsys, damage):
    file = journal(place / "runs" / "a", store, CREATE, METRICS, damage, END)
    out, err = said(capsys, 1, "sync", "a")
    assert "3 writes sent to the MLflow run" in out
    assert "runs/a/tracking.jsonl: line 4 is damaged, and what it said can't be sent" in err
    client = MlflowClient(store)
    (tracked,) = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    assert (tracked.data.metrics, tracked.info.status) == ({"accuracy/mean": 0.5}, "FINISHED")
    assert len(peek(file).pending) == 0
    assert "line 4 is damaged" in said(capsys, 1, "sync", "a")[1]  # it is said as long as it is so


def test_a_damaged_journal_holds_up_no_other(store, place, capsys):
    (place / "runs" / "a").mkdir(parents=True)
    (place / "runs" / "a" / "tracking.jsonl").write_bytes(b"rubbish\n")
    journal(place / "runs" / "b", store, CREATE, END)
    out, err = said(capsys, 1, "sync")
    assert "runs/b/tracking.jsonl: 2 writes sent" in out and "runs/a/tracking.jsonl is not the journal" in err


def test_a_journal_sends_no_file_from_outside_of_its_folder(store, place, capsys):
    (place / "secret.txt").write_text("secret")
    folder = place / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "link.txt").symlink_to(place / "secret.txt")
    (folder / "events.jsonl").write_text("mine\n")
    files = [str(place / "secret.txt"), "../../secret.txt", "link.txt", "events.jsonl", "/etc/hostname"]
    items = [{"item": number + 2, "do": "file", "path": path} for number, path in enumerate(files)]
    journal(folder, store, CREATE, *items, END)
    assert "4 lines are damaged: 3, 4, 5, ..." in said(capsys, 1, "sync", "a")[1]
    client = MlflowClient(store)
    (tracked,) = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    assert [artifact.path for artifact in client.list_artifacts(tracked.info.run_id)] == ["events.jsonl"]


@pytest.mark.parametrize("name", ["../up.txt", "/tmp/abs.txt", "a/../../up.txt", "..", "", ".", "a\\..\\b", "nul\0"])
def test_a_journal_writes_no_file_outside_of_its_folder(store, place, capsys, name):
    assert not is_plain_name(name)
    journal(place / "runs" / "a", store, CREATE, {"item": 2, "do": "artifact", "name": name, "text": "x"}, END)
    before = sorted(place.rglob("up.txt"))
    assert "line 3 is damaged" in said(capsys, 1, "sync", "a")[1]
    assert sorted(place.rglob("up.txt")) == before == []


def test_names_of_artifacts_in_folders_are_taken():
    assert all(map(is_plain_name, ("accuracy.csv", "code/mine.py", "code.2/pkg/__init__.py", "..txt", "a..b/c")))


def test_a_run_goes_on_beside_a_journal_that_is_damaged(place):
    outbox = Outbox({name: HEAD[name] for name in ("uri", "experiment", "key")})
    outbox.open_journal(place / "tracking.jsonl")
    outbox.put("params", values={"a": "1"})
    outbox.close()
    with (place / "tracking.jsonl").open("ab") as file:
        file.write(b"rubbish\n")
    again = Outbox.read(place / "tracking.jsonl")
    assert ([item["do"] for item in again.pending], again.damaged, again.last_number) == (["params"], [3], 1)
    again.close()
