"""Folders and archives of images that make no stream: one sentence each, before anything is decoded, and nothing out of bounds."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from clstream.streams import image_files, image_folder
from picture_folders import in_parts, picture, write_pictures, zipped
from PIL import Image


def empty(root: Path) -> None:
    root.mkdir()


def one_class(root: Path) -> None:
    write_pictures(root, {"cat": 3})


def empty_class(root: Path) -> None:
    write_pictures(root, {"cat": 3, "dog": 0})


def one_image(root: Path) -> None:
    write_pictures(root, {"cat": 3, "dog": 1})


def loose(root: Path) -> None:
    write_pictures(root, {"cat": 3, "dog": 3})
    picture(0).save(root / "stray.png")


def text(root: Path) -> None:
    write_pictures(root, {"cat": 3, "dog": 3})
    (root / "dog" / "notes.txt").write_text("about dogs")


def damaged(root: Path) -> None:
    write_pictures(root, {"cat": 3, "dog": 3}, height=60, width=60, ending="jpg")
    content = (root / "dog" / "001.jpg").read_bytes()
    (root / "dog" / "001.jpg").write_bytes(content[: len(content) // 2])


def sizes(root: Path) -> None:
    write_pictures(root, {"cat": 3})
    write_pictures(root, {"dog": 3}, height=7)


def deep(root: Path) -> None:
    write_pictures(root, {"cat": 3, "dog": 2})
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(root / "dog" / "x-ray.png")


def other_classes(root: Path) -> None:
    in_parts(root)
    write_pictures(root / "train", {"gnu": 2})


def unseen(root: Path) -> None:
    in_parts(root)
    write_pictures(root / "test", {"gnu": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "has no folders of images: it needs one for each class"),
        (one_class, "has images of one class only, 'cat': there is nothing to tell apart"),
        (empty_class, "the class 'dog' in .* has no images"),
        (one_image, "dog has one image, and a class needs one to train on and one to test on"),
        (loose, "stray.png is in no folder of a class"),
        (text, "notes.txt is no image, by its name: images end in .bmp, .gif"),
        (damaged, r"001.jpg can't be read as an image: image file is truncated"),
        (sizes, "dog/00..png has 7 x 6 pixels, and .*cat/00..png has 6 x 6: give a size for all, as size=32"),
        (deep, "x-ray.png has more than 8 bits a channel"),
        (other_classes, "test has no folder 'gnu', and both parts need the same classes"),
        (unseen, "train has no folder 'gnu', and both parts need the same classes"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_folders_that_make_no_stream(tmp_path: Path, make: object, message: str, packed: bool) -> None:
    root = tmp_path / "pets"
    make(root)  # type: ignore[operator]
    place = zipped(root, tmp_path / "pets.zip") if packed else root
    with pytest.raises(ValueError, match=message) as caught:
        image_folder(place, tasks=2)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*/*.images"))


def test_a_place_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder or zip archive"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match="text is neither a folder nor a zip archive"):
        image_folder(tmp_path / "text")


def test_links_are_followed_to_classes_and_never_in_circles(tmp_path: Path) -> None:
    write_pictures(tmp_path / "elsewhere", {"cat": 4})
    root = write_pictures(tmp_path / "pets", {"dog": 4})
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    assert image_folder(root, tasks=2).class_names == ("cat", "dog")
    (root / "dog" / "again").symlink_to(root / "dog")
    (root / "dog" / "again" / "more").mkdir()
    with pytest.raises(ValueError, match="is a link to a folder"):
        image_folder(root, tasks=2)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pets", {"cat": 4, "dog": 4})
    os.mkfifo(root / "dog" / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png is neither a file nor a folder"):
        image_folder(root, tasks=2)


def packed_with(file: Path, name: str, content: bytes = b"", mode: int = 0, times: int = 1) -> Path:
    """Write an archive of two classes that also has a member of that name."""
    root = write_pictures(file.with_suffix(""), {"cat": 3, "dog": 3})
    zipped(root, file)
    with zipfile.ZipFile(file, "a") as archive:
        for _ in range(times):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, content)
    return file


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("../cat/evil.png", 0, "leads out of the archive"),
        ("/etc/evil.png", 0, "leads out of the archive"),
        ("cat/../../evil.png", 0, "leads out of the archive"),
        ("cat\\..\\..\\evil.png", 0, "leads out of the archive"),
        ("C:/cat/evil.png", 0, "leads out of the archive"),
        ("cat//evil.png", 0, "leads out of the archive"),
        ("cat/link.png", stat.S_IFLNK | 0o777, "is no plain file"),
    ],
)
def test_members_that_no_honest_archive_has(tmp_path: Path, name: str, mode: int, message: str) -> None:
    file = packed_with(tmp_path / "pets.zip", name, b"x", mode)
    with pytest.raises(ValueError, match=message):
        image_folder(file, tasks=2)
    assert {path.name for path in tmp_path.iterdir()} <= {"pets", "pets.zip", "pets.zip.cache"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'cat/a.png' comes twice"):
        image_folder(packed_with(tmp_path / "pets.zip", "cat/a.png", b"x", times=2), tasks=2)


def test_sizes_are_bounded_by_what_headers_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MOST_BYTES", 5000)
    bomb = zipped(write_pictures(tmp_path / "a", {"cat": 3, "dog": 3}), tmp_path / "a.zip")
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dog/large.png", bytes(100_000))
    with pytest.raises(ValueError, match=r"dog/large.png has 100,000 bytes, and an image may have 5,000"):
        image_folder(bomb, tasks=2)
    monkeypatch.setattr(image_files, "MOST_PIXELS", 30)
    with pytest.raises(ValueError, match="has 6 x 6 pixels, and an image may have 30"):
        image_folder(write_pictures(tmp_path / "b", {"cat": 3, "dog": 3}), tasks=2)


@pytest.mark.parametrize("damage", ["cut", "byte", "directory"])
def test_a_damaged_archive(tmp_path: Path, damage: str) -> None:
    file = zipped(in_parts(tmp_path / "pets"), tmp_path / "pets.zip")
    content = bytearray(file.read_bytes())
    if damage == "byte":
        with zipfile.ZipFile(file) as archive:
            content[archive.getinfo("train/dog/002.png").header_offset + 120] ^= 255
    elif damage == "directory":
        content[content.rindex(b"PK\x01\x02") + 46 + len("train/owl/00")] ^= 8  # another name than the member's own
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(
        ValueError, match=r"002.png can't be read as an image: Bad CRC-32|is neither a folder nor|File name in directory"
    ):
        image_folder(file, tasks=2)


def test_only_formats_that_decode_themselves_are_opened(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pets", {"cat": 3, "dog": 3})
    (root / "dog" / "001.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"001.png is no image that can be read"):
        image_folder(root, tasks=2)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_bytes_are_damaged_it_is_one_sentence_or_an_image(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    root = write_pictures(
        tmp_path / "pets", {"cat": 2, "dog": 2}, ending=("png", "jpg", "gif", "tif", "bmp", "webp", "ppm")[seed % 7]
    )
    (file,) = (root / "dog").glob("001.*")
    content = bytearray(file.read_bytes())
    for place in draw.integers(0, len(content), 6):
        content[place] = draw.integers(256)
    file.write_bytes(content)
    try:
        assert image_folder(root, tasks=2, size=6).input_shape == (3, 6, 6)
    except (ValueError, OSError) as error:
        sentence = str(error)
    else:
        sentence = "001."
    assert "001." in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number from 1 to 4096"),
        ({"size": 5000}, "size must be a whole number from 1 to 4096"),
        ({"size": [4]}, "size must be a number of pixels, or height and width, up to 4096, not"),
        ({"size": [4, 5000]}, "size must be a number of pixels"),
        ({"size": [4, 0]}, r"size\[1\] must be a whole number of at least 1"),
        ({"mode": "rgb"}, "mode must be one of RGB, L"),
        ({"test": 0}, "test must be a share above 0 and below 1"),
        ({"test": 1.0}, "test must be a share above 0 and below 1"),
        ({"class_order": [1.5]}, "class_order names '1.5', which is not one of the labels"),
    ],
)
def test_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    root = in_parts(tmp_path / "pets")
    with pytest.raises(ValueError, match=message):
        image_folder(root, tasks=2, **options)  # type: ignore[arg-type]
