"""Recordings from anyone: what a crafted one asks for is refused in a sentence, before memory is taken for it."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clstream.streams import blobs, fuzzy_tasks, recorded, split_digits
from recorded_files import contents, crafted, npy, sealed, zipped

from clstream.cli import main
from clstream.recording import read, record
from clstream.recording.header import MAX_MEMBERS, MAX_RATIO, MAX_TEXT, STREAM
from clstream.stream import Samples, Stream, Subset, Task

MIB = 1 << 20


def good() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what a recording says, and its arrays as members: two tasks of blobs."""
    return contents(blobs(tasks=2, classes=4, train_per_class=10, test_per_class=5))


def refused(file: Path, content: bytes, sentence: str, most: int = 24 * MIB) -> None:
    """Check that a file is refused, and that it took little memory to find out."""
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=sentence):
            recorded(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak / MIB:.0f} MiB"


def test_what_the_tests_start_from_is_taken(tmp_path):
    file = tmp_path / "my.clstream"
    file.write_bytes(crafted(*good()))
    assert recorded(file).fingerprint == blobs(tasks=2, classes=4, train_per_class=10, test_per_class=5).fingerprint


# Sizes -------------------------------------------------------------------------------------------------------------------


def test_a_bomb_in_a_member_that_is_not_named_is_not_unpacked(tmp_path):
    about, arrays = good()
    content = crafted(about, arrays, ("bomb.npy", npy(np.zeros(64 * MIB, np.uint8))))
    assert len(content) < MIB
    refused(tmp_path / "my.clstream", content, r"bomb\.npy is said to be 67,\d{3},\d{3} bytes, of \d+,\d+ in the file: too many")


def test_a_member_that_is_not_named_is_refused_though_it_is_small(tmp_path):
    about, arrays = good()
    refused(
        tmp_path / "my.clstream", crafted(about, arrays, ("more.npy", npy(np.arange(9, dtype=np.uint8)))),
        r"stream\.json doesn't name the members that there are: more\.npy",
    )  # fmt: skip


def test_a_bomb_in_a_named_member_is_not_unpacked(tmp_path):
    about, arrays = good()
    name = about["tasks"][0]["train"]["rows"]
    refused(tmp_path / "my.clstream", crafted(about, arrays | {name: npy(np.zeros(64 * MIB, np.uint8))}), "too many")


def test_a_member_that_unpacks_to_more_than_it_is_said_to_have_is_cut_there(tmp_path):
    """The directory lies: it says 200 bytes, and there are 64 MiB."""
    about, arrays = good()
    name = about["tasks"][0]["train"]["rows"]
    bomb = npy(np.zeros(64 * MIB, np.uint8))
    content = bytearray(crafted(about, arrays | {name: bomb})[:-64])
    content = content.replace(struct.pack("<I", len(bomb)), struct.pack("<I", 200))
    refused(tmp_path / "my.clstream", sealed(bytes(content) + b"0" * 64), r"is no recording that clstream .* can read")


def test_a_text_that_is_a_bomb_is_not_parsed(tmp_path):
    about, arrays = good()
    spaces = b" " * (64 * MIB)
    refused(tmp_path / "my.clstream", crafted(json.dumps(about).encode() + spaces, arrays), "stream.json is said to be")
    lists = b"[" + b",".join([b"[]"] * (MIB // 4)) + b"]"
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:  # stored, so that its ratio is no matter
        packed.writestr(zipfile.ZipInfo(STREAM), lists)
        packed.comment = b"0" * 64
    refused(tmp_path / "my.clstream", sealed(whole.getvalue()), "more lists than it can need", 8 * MIB)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"format": 1' + b"0" * 5000 + b"}", b"{", b"null", b"\xff\xfe"]
)
def test_a_text_that_is_no_header_is_refused(tmp_path, text):
    refused(tmp_path / "my.clstream", crafted(text, {}), r"is no recording that clstream .* can read: ")


def test_members_that_overlap_are_refused(tmp_path):
    """Each is small for what it takes, and all of them are the same bytes."""
    about, arrays = good()
    content = crafted(about, arrays, ("x0.npy", npy(np.random.default_rng(0).integers(0, 255, 60_000).astype(np.uint8))))[:-64]
    directory = content.index(b"PK\x01\x02")
    last = content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    entry = content[last:end]
    copies = [entry.replace(b"x0.npy", f"x{number}.npy".encode()) for number in range(1, 10)]
    record = list(struct.unpack("<4s4H2IH", content[end:]))
    record[3] = record[4] = record[4] + len(copies)
    record[5] += len(entry) * len(copies)
    body = content[:end] + b"".join(copies) + struct.pack("<4s4H2IH", *record)
    assert directory < last
    refused(tmp_path / "my.clstream", sealed(body + b"0" * 64), "its members overlap")


def test_a_directory_that_is_too_large_is_not_read(tmp_path):
    about, arrays = good()
    content = crafted(about, arrays)[:-64]
    end = content.rindex(b"PK\x05\x06")
    for change in ({4: MAX_MEMBERS + 1}, {5: 1 << 30}):
        record = list(struct.unpack("<4s4H2IH", content[end:]))
        for place, value in change.items():
            record[place] = value
        refused(tmp_path / "my.clstream", sealed(content[:end] + struct.pack("<4s4H2IH", *record) + b"0" * 64), "is too large")
    record = list(struct.unpack("<4s4H2IH", content[end:]))
    locator = b"PK\x06\x07" + b"\0" * 16  # of the 64-bit form, whose numbers would hold instead
    refused(tmp_path / "my.clstream", sealed(content[:end] + locator + content[end:] + b"0" * 64), "not where it should be")


def test_what_would_be_a_bomb_is_stored_as_it_is_when_it_is_recorded(tmp_path):
    """A recording whose arrays are all alike can be read: the writer keeps to the reader's bound."""
    points = Samples(torch.rand(4, 1), torch.zeros(4, dtype=torch.int64))
    stream = Stream("alike", [Task(0, (0,), Subset(points, torch.zeros(400_000, dtype=torch.int64)), points)])
    rows = read(record(stream, tmp_path / "my.clstream")).arrays["task_0_train.npy"]
    assert len(zlib.compress(npy(np.zeros(400_000, np.uint8)))) * MAX_RATIO < 400_000
    assert torch.equal(rows, torch.zeros(400_000, dtype=torch.int64))


@pytest.mark.parametrize("make", [lambda: fuzzy_tasks(), lambda: split_digits(sessions_per_task=3), lambda: blobs(validation=0.2)])
def test_memory_stays_near_the_size_of_the_file(make, tmp_path):
    file = record(make(), tmp_path / "my.clstream")
    size = file.stat().st_size
    tracemalloc.start()
    try:
        read(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 * size + MIB


# Members -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.npy", "/etc/x.npy", "a/b.npy", "x.npz", "x.npy.exe", "x y.npy", "é.npy", "x" * 200 + ".npy", ".npy"]
)
def test_names_of_members_are_plain(name, tmp_path):
    about, arrays = good()
    refused(tmp_path / "my.clstream", crafted(about, arrays, (name, npy(np.arange(3, dtype=np.uint8)))), "it has a member")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    about, arrays = good()
    name = next(iter(arrays))
    refused(tmp_path / "my.clstream", crafted(about, arrays, (name, arrays[name])), "it has two members")
    text = json.dumps(about).encode()
    refused(tmp_path / "my.clstream", zipped((STREAM, text), *arrays.items(), (STREAM, text)), "it has two members 'stream.json'")


def test_other_compressions_are_refused(tmp_path):
    about, arrays = good()

    def other(entry: zipfile.ZipInfo) -> None:
        entry.compress_type = zipfile.ZIP_BZIP2 if entry.filename != STREAM else zipfile.ZIP_DEFLATED

    text = json.dumps(about).encode()
    refused(tmp_path / "my.clstream", zipped((STREAM, text), *arrays.items(), change=other), "packed in an unusual way")


def test_encrypted_members_are_refused(tmp_path):
    about, arrays = good()
    content = bytearray(crafted(about, arrays))
    place = content.rindex(b"PK\x01\x02")
    content[place + 8] |= 1
    refused(tmp_path / "my.clstream", sealed(bytes(content)), "encrypted")


@pytest.mark.parametrize(
    "member",
    [
        npy(np.arange(20, dtype=np.float64)),
        npy(np.arange(20).astype(">i4")),
        npy(np.arange(20, dtype=np.int64)),
        npy(np.arange(20, dtype=np.uint8).reshape(4, 5)),
        npy(np.asfortranarray(np.arange(20, dtype=np.uint8).reshape(4, 5))),
        npy(np.array([], dtype=np.uint8)),
        npy(np.array(3, dtype=np.uint8)),
        npy(np.array([print], dtype=object), allow_pickle=True),
        npy(np.zeros(20, dtype=[("a", "u1")])),
        npy(np.arange(20, dtype=np.uint8), version=(2, 0)),
        npy(np.arange(20, dtype=np.uint8))[:-1],
        npy(np.arange(20, dtype=np.uint8)) + b"0",
        npy(np.arange(20, dtype=np.uint8)).replace(b"(20,)", b"(99,)"),
        npy(np.arange(20, dtype=np.uint8)).replace(b"(20,), }" + b" " * 13, b"(999999999999999,), }"),
        npy(np.arange(20, dtype=np.uint8)).replace(b"(20,)", b"(-1,)"),
        npy(np.arange(20, dtype=np.uint8)).replace(b"(20,), }    ", b"(4294967296,4294967296), }"),
        npy(np.array([1 << 63], dtype=np.uint64)),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 6000,
        b"",
        b"PK\x03\x04" + zipped((STREAM, b"{}")),
        torch.arange(3).numpy().tobytes(),
    ],
)
def test_members_that_are_no_rows_of_whole_numbers_are_refused(member, tmp_path):
    about, arrays = good()
    name = about["tasks"][0]["train"]["rows"]
    sentence = rf"{name} (is no row of whole numbers|is said to have [\d,]+ numbers, and has others|has numbers that are too large)"
    refused(tmp_path / "my.clstream", crafted(about, arrays | {name: member}), sentence)


# What it says --------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda about: about.pop("tasks"), "stream.json lacks 'tasks'"),
        (lambda about: about.update(more=1), "stream.json has 'more', which doesn't belong there"),
        (lambda about: about.update(epochs=True), "stream.json: epochs is not what it should be"),
        (lambda about: about.update(epochs=1.5), "stream.json: epochs is not"),
        (lambda about: about.update(name=["a"]), "stream.json: name is not"),
        (lambda about: about.update(tasks={}), "stream.json: tasks is not"),
        (lambda about: about.update(augment={"name": ["Pad"]}), "stream.json: augment is not"),
        (lambda about: about.update(options={"classes": [1]}), "stream.json: options: classes is not"),
        (lambda about: about["parts"]["train"].pop("y"), "its part 'train' has no inputs, or no labels"),
        (lambda about: about["tasks"][0]["train"].update(source=5), "it has no source 5"),
        (lambda about: about["tasks"][0]["train"].update(source=-1), "it has no source -1"),
        (lambda about: about["sources"][0].update(part="other"), "it has no part 'other'"),
        (lambda about: about["sources"][0].update(labels=[[0, 1, 2]]), "its labels are no pairs"),
        (lambda about: about["sources"][0].update(labels=[[0, 1], [7, 2]]), "its labels are not those of the data"),
        (lambda about: about["sources"][0].update(labels=[[0, 1 << 70]]), "its labels are no pairs"),
        (lambda about: about["sessions"][0].update(task=9), "it has no task 9"),
        (lambda about: about["sessions"][0].update(count=10**15), "a session names sample 999,999,999,999,999 of 20"),
        (lambda about: about["sessions"][0].update(count=0), "a session names sample 20 of 20"),
        (lambda about: about["sessions"][0].update(step=0), "a session names sample"),
        (lambda about: about["sessions"][0].update(start=-5), "a session names sample"),
        (lambda about: about["sessions"][0].pop("start"), "a session names sample"),
        (lambda about: about.update(augment={"name": "Pad"}), "it uses 'Pad' as something else than it is"),
        (lambda about: about.update(augment={"name": "crop_and_flip", "fields": {}}), "it uses 'crop_and_flip' as something else"),
        (lambda about: about.update(augment={"name": "Pad", "fields": {"pad": 10**6}}), "pad must be a whole number from 0 to 64"),
        (lambda about: about.update(augment={"name": "Pad", "fields": {"pad": 1, "file": "x"}}), "Pad does not take"),
        (lambda about: about.update(augment={"name": "__import__"}), "which does not come with clstream"),
        (lambda about: about["options"].update(train_per_class=10**9), "asks for blobs of more than"),
        (lambda about: about["options"].update(train_per_class="9"), "asks for blobs that can't be"),
        (lambda about: about["options"].update(file="/etc/passwd"), "asks for blobs that can't be"),
        (lambda about: about.update(loader="torch.load"), "clstream can't load"),
        (lambda about: about.update(seed=float("nan")), "stream.json has NaN, which is no number"),
    ],
)
def test_what_it_says_is_checked_before_it_is_used(change, sentence, tmp_path):
    about, arrays = good()
    change(about)
    refused(tmp_path / "my.clstream", crafted(about, arrays), sentence)


def test_rows_and_positions_beyond_the_data_are_refused(tmp_path):
    about, arrays = good()
    name = about["tasks"][0]["train"]["rows"]
    refused(
        tmp_path / "my.clstream", crafted(about, arrays | {name: npy(np.array([0, 40], np.uint8))}), f"{name} names row 40 of 40"
    )
    about["sessions"][0] = {"task": 0, "positions": "p.npy"}
    refused(
        tmp_path / "my.clstream",
        crafted(about, arrays | {"p.npy": npy(np.array([20], np.uint8))}),
        "a session names sample 20 of 20",
    )
    about["sources"][0]["labels"] = "p.npy"
    refused(tmp_path / "my.clstream", crafted(about, arrays | {"p.npy": npy(np.array([1], np.uint8))}), "p.npy has 1 labels for 40")


def test_by_command_it_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about, arrays = good()
    Path("my.clstream").write_bytes(crafted(about, arrays, ("bomb.npy", npy(np.zeros(8 * MIB, np.uint8)))))
    assert main(["run", "--stream", "recorded:my.clstream", "--track", "false"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("clstream: error: my.clstream is no recording that clstream") and "too many" in said[-1]


def test_a_text_as_long_as_can_be_is_written_and_read_no_longer_one(tmp_path):
    stream = blobs(tasks=2, classes=4, train_per_class=10, test_per_class=5)
    room = MAX_TEXT - len(json.dumps(contents(stream)[0], indent=1)) - 200
    longest = replace(stream, notes=("n" * room,))
    assert recorded(record(longest, tmp_path / "my.clstream")).notes == longest.notes
    with pytest.raises(ValueError, match="can't be recorded: it has too many sessions"):
        record(replace(stream, notes=("n" * MAX_TEXT,)), tmp_path / "longer.clstream")
