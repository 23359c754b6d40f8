"""Files of recordings: their format, and what is damaged, of another make, or newer."""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import zipfile

import numpy as np
import pytest
import torch
from clstream.streams import (
    blobs,
    recorded,
)
from recorded_files import contents, crafted, npy
from recorded_streams import STREAMS, by_hand

from clstream.recording import FORMAT, read, record
from clstream.stream import content_hash


def test_the_same_stream_gives_the_same_bytes(tmp_path):
    for make in (blobs, by_hand):
        one, two = (record(make(), tmp_path / f"{make.__name__} {number}") for number in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_the_file_is_read_with_zip_json_and_numpy_alone(tmp_path):
    stream = STREAMS["blobs, recurring"]()
    file = record(stream, tmp_path / "my.clstream")
    with zipfile.ZipFile(file) as packed:
        assert packed.testzip() is None
        about = json.loads(packed.read("stream.json"))
        arrays = {}
        for name in packed.namelist():
            member = packed.read(name)
            if name != "stream.json":
                arrays[name] = np.load(io.BytesIO(member), allow_pickle=False)
            with pytest.raises((ValueError, AssertionError, AttributeError)):  # it is no pickle
                list(pickletools.genops(member))
        assert {entry.date_time for entry in packed.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert about["format"] == 1
    assert about["fingerprint"] == stream.fingerprint
    assert [task["classes"] for task in about["tasks"]] == [list(task.classes) for task in stream.tasks]
    assert [session["task"] for session in about["sessions"]] == [0, 1, 2, 1, 0]
    for number, session in enumerate(about["sessions"]):  # the rows of every session, as the documentation says
        rows = arrays[about["tasks"][session["task"]]["train"]["rows"]]
        delivered = rows[session["start"] :: session["step"]][: session["count"]]
        assert delivered.tolist() == stream.session(number).samples.index.tolist()
        assert rows.dtype == np.uint8  # 200 points
    assert about["parts"]["train"]["x"] == {
        "shape": [200, 20],
        "dtype": "float32",
        "sha256": content_hash(stream.tasks[0].train.source.x).hex(),
    }


def test_the_hash_of_a_tensor_stays_as_it_is():
    """Recordings hold it: another one would refuse them all."""
    found = content_hash(torch.arange(20_000, dtype=torch.int64).view(10_000, 2)).hex()
    data = np.arange(20_000, dtype="<i8").tobytes()
    assert found == hashlib.sha256(b"torch.int64 (10000, 2)" + data).hexdigest()
    assert content_hash(torch.arange(40).view(20, 2)[::2]) == content_hash(torch.arange(40).view(20, 2)[::2].clone())


def test_every_flipped_bit_and_every_torn_end_is_refused(tmp_path):
    file = record(blobs(tasks=2, classes=4, train_per_class=3, test_per_class=2), tmp_path / "my.clstream")
    whole = file.read_bytes()
    places = range(0, len(whole), 7)
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"my\.clstream is (damaged or was changed|no recording of clstream)"):
            read(file)
        file.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"my\.clstream is (empty|damaged or was changed|no recording of clstream)"):
            read(file)
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="damaged or was changed"):
        read(file)
    file.write_bytes(whole)
    assert read(file).about["name"] == "blobs"


def test_files_that_are_no_recordings_are_refused(tmp_path):
    file = tmp_path / "my.clstream"
    torch.save({"a": 1}, tmp_path / "a torch file")  # a zip too
    for content in (b"x", b"stream: blobs\n", b"\x80\x04K\x01.", (tmp_path / "a torch file").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"my\.clstream is no recording of clstream"):
            recorded(file)
    with pytest.raises(FileNotFoundError, match=r"there is no recording .*nowhere: clstream record --stream"):
        recorded(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"the recording .* can't be read: Is a directory"):
        recorded(tmp_path)


def test_a_newer_format_and_a_file_of_other_make_are_refused(tmp_path):
    file = tmp_path / "my.clstream"
    about, arrays = contents(blobs())
    file.write_bytes(crafted({**about, "format": FORMAT + 1, "clstream": "9.0"}, {}))
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, of clstream 9\.0; clstream \S+ reads up to format {FORMAT}"):
        recorded(file)
    del about["format"]
    file.write_bytes(crafted(about, arrays))
    with pytest.raises(ValueError, match=r"is no recording that clstream .* can read"):
        recorded(file)


def test_an_array_of_objects_is_not_read(tmp_path):
    about, arrays = contents(blobs())
    pickled = npy(np.array([print], dtype=object), allow_pickle=True)
    (tmp_path / "my.clstream").write_bytes(crafted(about, {**arrays, "task_0_train.npy": pickled}))
    with pytest.raises(ValueError, match=r"is no recording that clstream .* can read: task_0_train.npy is no row of whole numbers"):
        recorded(tmp_path / "my.clstream")
