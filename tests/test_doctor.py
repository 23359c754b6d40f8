"""`clstream doctor`: one screen that says what is wrong, and an exit status."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from clstream.cli import doctor, main


@pytest.fixture(autouse=True)
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLSTREAM_DATA", str(tmp_path / "data"))


@pytest.fixture(autouse=True)
def any_disk() -> Iterator[None]:
    """Accept any free space: how full the disk of this machine is must not decide; one test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "LEAST_DISK", 0)
        yield


def test_a_good_place_is_one_screen_and_nothing_is_left_behind(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24 and lines[-1] == "all that runs need is there" and not [line for line in lines if "!!" in line]
    assert f"torch {metadata.version('torch')}, " in lines[1] and f"{store}" in "\n".join(lines)
    assert "MNIST, FashionMNIST, CIFAR10, CIFAR100" in "\n".join(lines) and "cpu (" in lines[3]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_place_has_no_store_yet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--runs", "far/away/runs"]) == 0
    assert "mlflow.db, not there yet: the first run makes it" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.data
def test_data_that_is_there_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert main(["doctor"]) == 0
    assert "MNIST, FashionMNIST whole" in capsys.readouterr().out


@pytest.mark.data
def test_a_file_with_other_bytes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    shutil.copytree(Path(os.environ["CLSTREAM_DATA"]) / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["doctor", "--data_root", str(tmp_path)]) == 1
    assert "MNIST: t10k-images-idx3-ubyte in" in (printed := capsys.readouterr().out) and "SHA-256 differ" in printed


def test_data_that_is_not_whole_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "CIFAR10").mkdir(parents=True)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    assert main(["doctor"]) == 0  # an empty folder is what a download that failed leaves
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0" * 20)
    (tmp_path / "data" / "cifar-10-batches-py").mkdir()
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"nothing")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "!!  data      MNIST: " in printed.replace("!!            ", "!!  data      ")
    assert "CIFAR10: it is not whole: there must be the unpacked cifar-10-python.tar.gz" in printed
    assert printed.endswith("2 things to mend, marked !!\n")


def test_a_store_that_is_away_or_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tracking_uri", "http://someone:secret@127.0.0.1:9"]) == 1
    printed = capsys.readouterr().out
    assert "!!  store     http://127.0.0.1:9: the tracking server http://127.0.0.1:9 does not answer" in printed
    assert "secret" not in printed
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    assert main(["doctor"]) == 1
    assert "mlflow.db: " in (printed := capsys.readouterr().out) and "not a database" in printed


def test_packages_that_are_absent_or_too_old_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["torch>=99", "no-such-package>=1", "numpy>=1", 'nothing-like-it>=2; extra == "tune"', 'numpy>=1; extra == "timm"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)  # as a package of another version says
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "clstream needs torch>=99, no-such-package>=1: pip install 'torch>=99' 'no-such-package>=1'" in printed
    assert "no-such-package absent" in printed and "timm; not tune: pip install 'clstream[tune]'" in printed


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**60)
    assert main(["doctor"]) == 1
    assert "GiB free for runs, less than 1 GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_light(tmp_path: Path) -> None:
    script = "import sys; from clstream.cli import main; main(['doctor']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded and not loaded & {"mlflow", "matplotlib", "sklearn", "pandas", "torchvision", "optuna", "jsonargparse"}
