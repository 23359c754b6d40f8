"""Crafted checkpoint files: other formats, packed members, pickles that run something."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_checkpoints import MARKER, STREAM, victim, written

from clstream import run
from clstream.checkpoint import newest
from clstream.checkpoint.store import FORMAT, files, save


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return written()


def test_a_checkpoint_of_an_older_format_is_refused_in_a_sentence(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    older = {name: checkpoint[name] for name in ("clstream", "torch", "threads", "strategy")} | {"format": 2}
    save(older, tmp_path, 1)
    with pytest.raises(
        ValueError, match=rf"format 2\), and this is .* \(format {FORMAT}\): finish the run with that version"
    ) as refusal:
        run(victim(), STREAM, resume=newest(tmp_path))
    assert "\n" not in str(refusal.value)


def hashed(folder: Path, content: bytes) -> Path:
    """Write a file as a checkpoint, with the hash of its content."""
    file = folder / f"000001-{hashlib.blake2b(content, digest_size=8).hexdigest()}.pt"
    file.write_bytes(content)
    return file


def test_a_file_takes_no_more_memory_than_it_has_bytes(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    state = checkpoint | {"threads": torch.get_num_threads()}
    whole = io.BytesIO()
    torch.save(state, whole)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole.getvalue())) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as into:
        for name in source.namelist():
            into.writestr(name, source.read(name))
    hashed(tmp_path, packed.getvalue())
    with pytest.raises(ValueError, match=r"is no checkpoint of clstream \(its members are packed"):
        newest(tmp_path)
    for old in files(tmp_path):
        old.unlink()
    state = deepcopy(state)
    state["strategy"]["storages"].append(torch.zeros(5, dtype=torch.uint8))
    again = io.BytesIO()
    torch.save(state, again)
    with zipfile.ZipFile(again) as source, zipfile.ZipFile(larger := io.BytesIO(), "w") as into:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):  # the size of the last tensor: from 5 to 2,147,483,647 numbers
                data = data.replace(b"K\x05\x85", b"J\xff\xff\xff\x7f\x85")
            into.writestr(name, data)
    hashed(tmp_path, larger.getvalue())
    with pytest.raises(ValueError, match="is no checkpoint of clstream"):
        newest(tmp_path)


def test_a_checkpoint_is_read_as_other_files_of_torch_are(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    class Asks:
        def __reduce__(self) -> Any:
            return bytearray, (1 << 20,)

    whole = io.BytesIO()
    torch.save(checkpoint | {"threads": torch.get_num_threads(), "more": Asks()}, whole)
    for content in (whole.getvalue(), b"before" + whole.getvalue()):
        hashed(tmp_path, content)
        with pytest.raises(
            ValueError, match=r"is no checkpoint of clstream .(it names '__builtin__ bytearray'|its directory|it is no)"
        ):
            newest(tmp_path)
        for old in files(tmp_path):
            old.unlink()


def test_pickles_that_run_something_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch code-was-run",)

    saved = io.BytesIO()
    torch.save({"format": FORMAT, "evil": Evil()}, saved)
    for content in (saved.getvalue(), pickle.dumps(Evil())):
        hashed(tmp_path, content)
        with pytest.raises(ValueError, match="is no checkpoint of clstream"):
            newest(tmp_path)
        assert not MARKER.exists()
        for old in files(tmp_path):
            old.unlink()


def test_the_journal_of_a_tracker_lies_below_its_folder(tmp_path: Path) -> None:
    from clstream.tracking.uploader import default_journal

    assert default_journal(tmp_path, {"run_id": "5f0c-7e_3"}).parent == tmp_path / "5f0c-7e_3"
    for name in ("../elsewhere", "/etc", "..", "a/b", "a\n"):
        with pytest.raises(ValueError, match="there is no MLflow run"):
            default_journal(tmp_path, {"run_id": name, "key": "x"})
