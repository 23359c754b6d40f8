"""Checkpoints on disk: what a file holds, and every fault that a disk, a clock or another process can make."""

from __future__ import annotations

import hashlib
import os
import pickletools
import signal
import subprocess
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune
from conftest import StopAt, built, interrupted

import clstream
from clstream import BatchLearned, Evaluated, on, run
from clstream.checkpoint import Checkpointer, Stopped, newest, store
from clstream.checkpoint.compare import difference
from clstream.checkpoint.store import files, load
from clstream.checks import example_stream
from clstream.checks.recorders import Checkpoints, Trace
from clstream.files import FolderError


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    interrupted(tmp_path)
    file = files(tmp_path)[0]
    state = torch.load(file, weights_only=True)
    assert state["format"] == store.FORMAT and state["clstream"] == clstream.__version__
    with zipfile.ZipFile(file) as packed:
        code = packed.read(next(name for name in packed.namelist() if name.endswith("data.pkl")))
    named = {arg for opcode, arg, _ in pickletools.genops(code) if opcode.name in ("GLOBAL", "STACK_GLOBAL")}
    assert named <= {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", *(f"torch {kind}Storage" for kind in KINDS)}


KINDS = ("Float", "Double", "Long", "Byte", "Bool", "Int")


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [torn, flipped, empty, longer])
def test_a_damaged_file_is_found_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    interrupted(tmp_path)
    damage(files(tmp_path)[0])
    with pytest.warns(RuntimeWarning, match=r"checkpoint .* is damaged: the one before it is used"):
        state = newest(tmp_path)
    assert state["step"] == 8
    whole, rest = Checkpoints(every=0), Checkpoints(every=0)
    run(built(), example_stream(), whole)
    run(built(), example_stream(), rest, Checkpointer(tmp_path), resume=state)
    assert difference(whole.load(-1), rest.load(-1)) is None
    for file in files(tmp_path):
        damage(file)
    with pytest.warns(RuntimeWarning, match="damaged"), pytest.raises(FolderError, match=r"every checkpoint in .* is damaged"):
        newest(tmp_path)


def test_what_a_killed_write_leaves_is_cleaned_up(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (tmp_path / "000099.writing").write_bytes(b"half of a checkp")
    assert newest(tmp_path)["step"] == 12
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))
    assert not list(tmp_path.glob("*.writing"))


def test_the_newest_is_so_by_number_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # an hour back at each look
    interrupted(tmp_path)
    for age, file in enumerate(files(tmp_path)):
        os.utime(file, (age * 1e6, age * 1e6))
    assert newest(tmp_path)["step"] == 12
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["1-best.pt", "2024-results.pt", "notes.writing", "000001-abc.pt", "000001.pt"]
    for name in names:
        (tmp_path / name).write_bytes(b"the user's own")
    (tmp_path / "000007.writing").write_bytes(b"what a killed write left")
    run(built(), example_stream(), Checkpointer(tmp_path, every_batches=2))
    assert sorted(file.name for file in tmp_path.iterdir() if file not in files(tmp_path)) == sorted([*names, "lock"])


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    interrupted(tmp_path)
    flipped(files(tmp_path)[0])
    with pytest.warns(RuntimeWarning, match="damaged"):
        state = newest(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(built(), example_stream(), StopAt(3), Checkpointer(tmp_path, every_batches=2), resume=state)
    assert [load(file)["step"] for file in files(tmp_path)] == [10, 8]
    assert len(list(tmp_path.glob("*.damaged"))) == 1


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    for number, content in enumerate((b"no zip at all", b"")):
        name = hashlib.blake2b(content, digest_size=8).hexdigest()
        (tmp_path / f"{number:06d}-{name}.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of clstream"):
            newest(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 kB, where one can be mounted; a checkpoint holds the source of this module too."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a disk that is full or read-only takes the right to mount a small one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_at_the_start_is_refused(small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(790_000))
    trace = Trace()
    with pytest.raises(FolderError, match=r"checkpoints can't be written to .* \(No space left on device\): make room, or name"):
        run(built(), example_stream(), trace, Checkpointer(small_disk / "run"))
    assert trace.word == "Rr" and not list((small_disk / "run").glob("*.writing"))


def test_on_a_disk_that_fills_up_the_run_goes_on(small_disk: Path) -> None:
    class Fill:
        """Others fill the disk in the second session, and make room in the third."""

        @on(Evaluated)
        def fill(self, event: Evaluated) -> None:
            others = small_disk / "others"
            if len(event.evaluation.accuracy) == 1:
                with pytest.raises(OSError, match="No space"), others.open("wb") as file:
                    file.write(bytes(1_000_000))
            elif len(event.evaluation.accuracy) == 2:
                self.kept = load(files(small_disk / "run")[0])["step"]
                others.unlink()

    fill = Fill()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run(built(Finetune), example_stream(), fill, Checkpointer(small_disk / "run", every_batches=3, keep=1))
    assert len(said) == 1 and "no checkpoint could be written" in str(said[0].message) and "No space left" in str(said[0].message)
    assert fill.kept in (6, 9)  # the last whole one stayed
    assert torch.equal(result.accuracy, run(built(Finetune), example_stream()).accuracy)
    assert load(files(small_disk / "run")[0])["position"] == [3, 0, 0]


def test_a_read_only_folder_is_refused(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(FolderError, match=r"the run folder .* can't be written: Read-only file system"):
        run(built(), example_stream(), Checkpointer(small_disk / "run"))


def test_stopped_on_a_full_disk_it_says_so(small_disk: Path) -> None:
    class Stop:
        @on(BatchLearned)
        def stop(self, event: BatchLearned) -> None:
            if event.batch.task.id == 1 and event.batch.index == 2:
                with pytest.raises(OSError, match="No space"), (small_disk / "others").open("wb") as file:
                    file.write(bytes(1_000_000))
                signal.raise_signal(signal.SIGTERM)

    with (
        pytest.warns(RuntimeWarning, match="no checkpoint could be written"),
        pytest.raises(Stopped, match="of some batches before"),
    ):
        run(built(Finetune), example_stream(), Stop(), Checkpointer(small_disk / "run", every_batches=8))
    assert newest(small_disk / "run")["step"] == 8
