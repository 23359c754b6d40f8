"""Files of the known data sets: whole, of the right kind and in their places, or refused; variants are told of."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from clstream.streams import data, split_mnist
from clstream.streams.data import KINDS, load

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = KINDS


def idx(values: np.ndarray) -> bytes:  # type: ignore[type-arg]
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a small MNIST, which is the known one for the test."""
    draw = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for count, images, labels in ((40, IMAGES, LABELS), (20, TEST_IMAGES, TEST_LABELS)):
        (raw / images).write_bytes(idx(draw.integers(0, 256, (count, 28, 28))))
        (raw / labels).write_bytes(idx(np.arange(count) % 10))
    monkeypatch.setitem(data.COUNTS, "MNIST", (40, 20))
    monkeypatch.setitem(data.SHA256, "MNIST", tuple(data._sha256(raw / kind, 0, 0) for kind in KINDS))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("nothing is to be downloaded"))
    return tmp_path


def raw(root: Path, kind: str) -> Path:
    return root / "MNIST" / "raw" / kind


def test_the_known_files_are_read_without_a_word(root: Path) -> None:
    train, test = load("MNIST", root)
    assert (len(train), len(test), tuple(train.x.shape[1:])) == (40, 20, (1, 28, 28))
    assert split_mnist(root=root, batch_size=4).classes == 10


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (IMAGES, b"\0\0\x08", "is no IDX file of bytes in 3 dimensions"),
        (IMAGES, b"", "is no IDX file of bytes in 3 dimensions"),
        (LABELS, b"\0\0\x08", "is no IDX file of bytes in 1 dimensions"),
        (IMAGES, b"\0\0\x08\x03" + b"\0" * 7, "is no IDX file of bytes in 3 dimensions"),
        (IMAGES, b"\x1f\x8b" + b"\0" * 30, "is no IDX file"),  # still packed by gzip
        (IMAGES, bytes((0, 0, 13, 3)) + struct.pack(">3I", 40, 28, 28), "is no IDX file of bytes"),  # of floats
        (IMAGES, idx(np.arange(40) % 10), "is no IDX file of bytes in 3 dimensions"),  # labels
        (LABELS, idx(np.zeros((40, 28, 28))), "is no IDX file of bytes in 1 dimensions"),
        (IMAGES, idx(np.zeros((40, 32, 32))), r"holds samples of \(32, 32\), not of \(28, 28\)"),
        (IMAGES, idx(np.zeros((40, 28, 28)))[:-1], "its header promises 31,360 bytes, and 31,359 follow"),
        (IMAGES, idx(np.zeros((40, 28, 28))) + b"\0", "its header promises 31,360 bytes, and 31,361 follow"),
        (LABELS, idx(np.arange(40) % 10)[:-1], "its header promises 40 bytes, and 39 follow"),
        (
            IMAGES,
            b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 28, 28),
            "promises 3,367,254,359,280 bytes, and 0 follow",
        ),
        (LABELS, b"\0\0\x08\x01" + struct.pack(">I", 2**32 - 1), "its header promises 4,294,967,295 bytes, and 0 follow"),
        (LABELS, idx(np.full(40, 200)), "training set of MNIST in .* has the label 200, but there are only 0 to 9"),
        (TEST_LABELS, idx(np.full(20, 10)), "test set of MNIST in .* has the label 10, but there are only 0 to 9"),
        (LABELS, idx(np.arange(39) % 10), "training set of MNIST in .* has 40 images and 39 labels"),
        (TEST_IMAGES, idx(np.zeros((0, 28, 28))), "test set of MNIST in .* has 0 images and 20 labels"),
    ],
)
def test_a_file_that_is_none_is_refused(root: Path, kind: str, content: bytes, message: str) -> None:
    raw(root, kind).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load("MNIST", root)
    assert "\n" not in str(caught.value) and "delete it, and it is downloaded again" in str(caught.value)


def test_a_header_that_promises_much_allocates_nothing(root: Path) -> None:
    raw(root, IMAGES).write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 2**20, 28, 28))  # 822 MB
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is damaged"):
            load("MNIST", root)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("into", "out_of"), [(KINDS[2:], KINDS[:2]), (KINDS[:2], KINDS[2:])])
def test_files_in_the_place_of_others_are_refused(root: Path, into: tuple[str, str], out_of: tuple[str, str]) -> None:
    for there, here in zip(into, out_of, strict=True):
        raw(root, there).write_bytes(raw(root, here).read_bytes())
    with pytest.raises(ValueError, match="images, as the other set must have: are its files in the place of others"):
        load("MNIST", root)


def test_empty_sets_are_refused(root: Path) -> None:
    raw(root, TEST_IMAGES).write_bytes(idx(np.zeros((0, 28, 28))))
    raw(root, TEST_LABELS).write_bytes(idx(np.zeros(0)))
    with pytest.raises(ValueError, match=r"the test set of MNIST in .* is empty"):
        load("MNIST", root)


def test_variants_are_taken_and_told_of(root: Path) -> None:
    raw(root, LABELS).write_bytes(idx(np.arange(40)[::-1] % 10))
    with pytest.warns(UserWarning, match=f"{LABELS} in .* are not the known files of MNIST"):
        train, _ = load("MNIST", root)
    assert train.y[0] == 9
    raw(root, IMAGES).write_bytes(idx(np.zeros((30, 28, 28))))
    raw(root, LABELS).write_bytes(idx(np.arange(30) % 10))
    with (
        pytest.warns(UserWarning, match=r"has 30 \+ 20 images, not 40 \+ 20: results are not those of the known data set"),
        pytest.warns(UserWarning, match="are not the known files of MNIST"),
    ):
        load("MNIST", root)


def test_a_file_that_changed_is_read_again(root: Path) -> None:
    load("MNIST", root)
    content = bytearray(raw(root, TEST_IMAGES).read_bytes())
    content[-1] ^= 1
    raw(root, TEST_IMAGES).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{TEST_IMAGES} in .* are not the known files"):
        load("MNIST", root)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_checked_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision compares checksums; what it then gives is looked at as the others are."""
    from torchvision import datasets

    class Given:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            count = data.COUNTS[name][0 if train else 1]
            self.data, self.targets = np.zeros((count, 1, 1, 3), np.uint8), [data.CLASSES[name] if train else 0] * count

    monkeypatch.setattr(datasets, name, Given)
    with pytest.raises(
        ValueError, match=f"training set of {name} in .* has the label {data.CLASSES[name]}, but there are only 0 to"
    ):
        load(name, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_images_are_mapped_so_that_processes_share_them_and_written_to_by_nobody(root: Path) -> None:
    before = raw(root, IMAGES).read_bytes()
    train, _ = load("MNIST", root)
    assert str(raw(root, IMAGES)) in Path("/proc/self/maps").read_text()
    train.x[0] += 1
    assert raw(root, IMAGES).read_bytes() == before
    assert not load("MNIST", root)[0].x[0].equal(train.x[0])
