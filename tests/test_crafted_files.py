"""Event logs, journals and files of weights that are rubbish, damaged or crafted: a sentence, and what can be read is not lost."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune
from clstream.streams import blobs
from mlflow.tracking import MlflowClient
from torch import nn

from clstream import run
from clstream.checkpoint import Checkpointer, newest
from clstream.cli import main
from clstream.files import FolderError, locked
from clstream.models import Mlp
from clstream.pretraining import load_weights, save_weights
from clstream.serialization import torch_files
from clstream.tracking import EventLog
from clstream.tracking import journal as journals
from clstream.tracking.event_log import read
from clstream.tracking.outbox import Outbox, is_plain_name, peek

LOG = [
    {"event": "RunStarted", "time": "2026-01-01T00:00:00.000", "seconds": 0.0, "log": 1, "title": "A on b",
     "params": {"stream.sessions": 2}},
    {"event": "TaskStarted", "time": "2026-01-01T00:00:01.000", "seconds": 1.0, "task": 0, "classes": [0, 1]},
    {"event": "RunEnded", "time": "2026-01-01T00:00:02.000", "seconds": 2.0, "error": None},
]  # fmt: skip


def lines(*entries: object) -> bytes:
    return b"".join(entry if isinstance(entry, bytes) else json.dumps(entry).encode() + b"\n" for entry in entries)


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> tuple[str, str]:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


# The journal -----------------------------------------------------------------------------------------------------------------

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
    assert [each.path for each in client.list_artifacts(tracked.info.run_id)] == ["events.jsonl"]


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
    assert ([item["do"] for item in again.pending], again.damaged, again.numbered) == (["params"], [3], 1)
    again.close()


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


# Weights -----------------------------------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def weights(place: Path) -> tuple[nn.Module, Path, dict]:
    model = Mlp(6, 4, hidden=(8,))
    file = save_weights(model, place / "w.pt", {})
    return model, file, torch.load(file, weights_only=True)


def packed(file: Path, change=lambda name, content: content, how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w", how) as out:
        for name, content in members.items():
            out.writestr(name, change(name, content))


def test_weights_are_no_pickle(place):
    model, file, content = weights(place)
    torch.save(content | {"weights": Runs()}, file)
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    file.write_bytes(pickle.dumps(content | {"weights": Runs()}))
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    packed(weights(place)[1], lambda name, data: pickle.dumps(Runs()) if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, place / "w.pt")
    assert not Path("ran").exists()


def test_weights_are_no_bomb(place):
    model, file, content = weights(place)
    torch.save(content | {"more": torch.zeros(1 << 24)}, file)
    packed(file, how=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 18
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    assert load_weights(model, weights(place)[1])["model"] == "Mlp"


def two_faced(members: dict[str, bytes]) -> bytes:
    """Return a zip file with two directories: to Python its members are as they are, to torch the largest is packed."""
    body, told, seen = b"", b"", b""
    largest = max(members, key=lambda name: len(members[name]))
    for name, data in members.items():
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        inner = deflate.compress(data) + deflate.flush() if name == largest else data
        how, crc, encoded = 8 if name == largest else 0, zlib.crc32(data), name.encode()

        def entry(how: int, size: int, crc=crc, inner=inner, encoded=encoded, at=len(body)) -> bytes:
            sizes = (crc, len(inner), size, len(encoded), 0, 0, 0, 0, 0, at)
            return struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, how, 0, 33, *sizes) + encoded

        seen, told = seen + entry(0, len(inner)), told + entry(how, len(data))
        head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, how, 0, 33, crc, len(inner), len(data), len(encoded), 0)
        body += head + encoded + inner
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(members), len(members), len(told), len(body), 0)
    return body + told + seen + end


class Asks:
    def __reduce__(self):
        return bytearray, (1 << 20,)


def test_torch_reads_no_other_members_than_were_looked_at(place):
    torch.save({"more": torch.zeros(1 << 20)}, "whole.pt")
    with zipfile.ZipFile("whole.pt") as source:
        members = {name: source.read(name) for name in source.namelist()}
    whole = Path("whole.pt").read_bytes()
    crafted = two_faced(members)
    Path("two.pt").write_bytes(crafted)
    with zipfile.ZipFile("two.pt") as seen:
        assert all(not each.compress_type for each in seen.infolist())
    assert torch.load("two.pt", weights_only=True)["more"].shape == (1 << 20,)  # the bomb is one
    at = len(whole) - 98  # the end record of 64 bits
    moved = whole[:at] + whole[at:][:64] + struct.pack("<Q", at - 8) + whole[at + 72 :]
    for content in (crafted, b"before" + whole, b"PK\3\4" + whole, whole + b"behind", whole[:-2] + b"\1\0c", moved):
        Path("two.pt").write_bytes(content)
        with pytest.raises(ValueError, match="its directory is not where torch writes it"):
            torch_files.load(Path("two.pt"))
    assert torch_files.load(Path("whole.pt"))["more"].shape == (1 << 20,)


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL", "Data.pkl"])  # by each of which torch finds it
def test_a_pickle_asks_for_no_memory_by_a_number(place, name):
    torch.save({"a": [Asks()]}, "asks.pt")
    with zipfile.ZipFile("asks.pt") as source:
        members = {each.replace("data.pkl", name): source.read(each) for each in source.namelist()}
    with zipfile.ZipFile("asks.pt", "w") as out:
        for each, content in members.items():
            out.writestr(each, content)
    assert len(torch.load("asks.pt", weights_only=True)["a"][0]) == 1 << 20  # torch itself gives it
    with pytest.raises(ValueError, match="bytearray', which no tensor needs"):
        torch_files.load(Path("asks.pt"))


def test_what_torch_saves_of_tensors_is_read(place):
    tensors = [torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.uint16, torch.complex64, torch.bool)]
    content = {"a": tensors, "b": nn.Parameter(torch.ones(2)), "c": nn.Linear(2, 2).state_dict(), "d": torch.Size((1, 2))}
    torch.save(content, "whole.pt")
    again = torch_files.load(Path("whole.pt"))
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(tensors, again["a"], strict=True))
    assert (again["d"], list(again["c"]), type(again["b"])) == ((1, 2), ["weight", "bias"], nn.Parameter)


@pytest.mark.parametrize(
    "change",
    [
        {"header": "[]"}, {"header": "{}"}, {"header": 5}, {"header": "[" * 50_000}, {"header": '{"format": "clstream weights 1"}'},
        {"weights": 5}, {"weights": []}, {"weights": {"body.0.weight": 5}}, {"weights": {5: torch.ones(2)}},
        {"weights": {"a": torch.ones(2, 2).to_sparse()}}, {"weights": {"a": torch.ones(2, device="meta")}},
    ],
)  # fmt: skip
def test_weights_of_other_kinds_are_refused(place, change):
    model, file, content = weights(place)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    torch.save(content | change, file)
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_weights_of_another_shape_or_dtype_are_refused(place):
    model, file, content = weights(place)
    name = next(name for name in content["weights"] if not name.startswith("head"))
    weight = content["weights"][name]
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)  # a terabyte, of four bytes in the file
    for other, sentence in ((weight.double(), "is torch.float64 there"), (weight[:1], "there"), (huge, r"\(1048576, 1048576\)")):
        torch.save(content | {"weights": content["weights"] | {name: other}}, file)
        with pytest.raises(ValueError, match=sentence):
            load_weights(model, file)


def test_a_file_of_weights_that_is_cut_is_refused(place):
    model, file, _ = weights(place)
    whole = file.read_bytes()
    for size in range(0, len(whole), len(whole) // 23):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is no file of weights that"):
            load_weights(model, file)


# What is under way ---------------------------------------------------------------------------------------------------------------


def test_the_log_of_a_run_is_read_as_before(place, capsys):
    stream = blobs(tasks=2, classes=4, train_per_class=10)
    run(Finetune(Mlp(20, 4, hidden=(8,))), stream, EventLog("run"))
    assert said(capsys, 0, "log", "run")[0].splitlines()[-1].endswith("the run ended")
