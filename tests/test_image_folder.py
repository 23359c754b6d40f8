"""Folders and archives of images as streams: what comes out, where it is kept, and what is refused."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune
from clstream.streams import image_cache, image_folder, recorded
from picture_folders import as_tensor, in_parts, picture, write_pictures, zipped
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from clstream.checks import check_stream
from clstream.cli import main
from clstream.engine.run_params import run_params
from clstream.models import Mlp
from clstream.recording import record
from clstream.stream import Stream


def samples_of(stream: Stream) -> list[tuple[str, bytes, str]]:
    """Return part, pixels and class of each sample."""
    return sorted(
        (part, x.numpy().tobytes(), stream.class_name(int(y)))
        for task in stream.tasks
        for part in ("train", "test")
        for x, y in zip(getattr(task, part).x, getattr(task, part).y, strict=True)
    )


def test_it_is_what_torchvision_reads(tmp_path: Path) -> None:
    root = in_parts(tmp_path / "pets")
    stream = image_folder(root, tasks=2)
    theirs = {part: ImageFolder(str(root / part)) for part in ("train", "test")}
    assert stream.class_names == tuple(theirs["train"].classes) == ("cat", "dog", "fox", "owl")
    assert samples_of(stream) == sorted(
        (part, as_tensor(image).numpy().tobytes(), stream.class_names[label])
        for part, data in theirs.items()
        for image, label in data
    )
    assert stream.input_shape == (3, 6, 6) and stream.tasks[0].train[:1].x.dtype == torch.uint8 and stream.name == "pets"
    assert "classes cat, dog; 12 to train, 6 to test" in str(stream)
    for check in check_stream(stream):
        check()


@pytest.mark.parametrize(("within", "compression"), [("", zipfile.ZIP_STORED), ("pets/", zipfile.ZIP_DEFLATED), ("a/b/", 8)])
def test_an_archive_is_the_folder(tmp_path: Path, within: str, compression: int) -> None:
    root = in_parts(tmp_path / "pets")
    (root / "train" / "cat" / ".DS_Store").write_text("left by a system")
    (root / "README.txt").write_text("about them")
    file = zipped(root, tmp_path / "archive.zip", within, compression)
    assert image_folder(file, tasks=2).fingerprint == image_folder(root, tasks=2).fingerprint
    assert image_folder(file, tasks=2).name == "archive"


def test_it_is_looked_for_in_the_data_folder_if_it_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = in_parts(tmp_path / "data" / "pets")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CLSTREAM_DATA", str(tmp_path / "data"))
    assert image_folder("pets", tasks=2).fingerprint == image_folder(there, tasks=2).fingerprint
    write_pictures(tmp_path / "here" / "pets", {"cat": 10, "dog": 5})
    assert image_folder("pets", tasks=2).class_names == ("cat", "dog")  # what is here comes first


def test_without_parts_a_share_of_each_class_is_for_the_test(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pets", {"cat": 10, "dog": 5, "owl": 2})
    stream, other = image_folder(root, tasks=3, test=0.3), image_folder(root, tasks=3, test=0.3, seed=1)
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(7, 3), (3, 2), (1, 1)]
    assert stream.fingerprint == image_folder(root, tasks=3, test=0.3).fingerprint != other.fingerprint
    assert sorted(row[1:] for row in samples_of(stream)) == sorted(row[1:] for row in samples_of(other))
    assert len({row[1] for row in samples_of(stream)}) == 17


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_modes_are_converted(tmp_path: Path, mode: str) -> None:
    root, originals = tmp_path / "pets", {}
    for number, source in enumerate(("RGB", "L", "P", "RGBA", "LA", "1", "CMYK")):
        for count in range(2):
            image = picture(10 * number + count).convert("RGB") if source == "P" else picture(10 * number + count, mode=source)
            image = image.quantize(16) if source == "P" else image
            (root / source).mkdir(parents=True, exist_ok=True)
            file = root / source / f"{count}.{'tif' if source == 'CMYK' else 'png'}"
            image.save(file)
            with Image.open(file) as opened:
                originals[as_tensor(opened.convert(mode)).numpy().tobytes()] = source
    stream = image_folder(root, tasks=7, mode=mode, test=0.5)
    assert stream.input_shape == (3 if mode == "RGB" else 1, 6, 6)
    assert {row[1]: row[2] for row in samples_of(stream)} == originals


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), ([8, 4], (8, 4))])
def test_images_are_scaled_and_cut_to_one_size(tmp_path: Path, size: int | list[int], shape: tuple[int, int]) -> None:
    root = write_pictures(tmp_path / "pets", {"cat": 3}, height=40, width=20)
    write_pictures(root, {"dog": 3}, height=12, width=40)
    write_pictures(root, {"owl": 3}, height=shape[0], width=shape[1])
    stream = image_folder(root, tasks=3, size=size)
    assert stream.input_shape == (3, *shape)
    kept = {as_tensor(picture(number, *shape)).numpy().tobytes() for number in range(3)}
    assert {row[1] for row in samples_of(stream) if row[2] == "owl"} == kept  # of that size already: as it is
    if size == 8:
        theirs = Compose([Resize(8), CenterCrop(8)])
        x = torch.cat([stream.tasks[0].train.x, stream.tasks[0].test.x]).float()
        expected = [as_tensor(theirs(picture(number, 40, 20))).float() for number in range(3)]
        assert all(min((image - row).abs().mean() for row in x) < 6 for image in expected)


def test_the_second_time_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = in_parts(tmp_path / "pets"), tmp_path / "kept"
    file = zipped(root, tmp_path / "pets.zip")
    first = [image_folder(place, tasks=2, cache=cache).fingerprint for place in (root, file)]
    names = sorted(cache.iterdir())
    assert len(names) == 2
    monkeypatch.setattr(image_cache, "decode", lambda *_: pytest.fail("an image was decoded again"))
    assert [image_folder(place, tasks=[3, 1], cache=cache).tasks[0].classes for place in (root, file)] == [(0, 1, 2)] * 2
    assert [image_folder(place, tasks=2, cache=cache).fingerprint for place in (root, file)] == first
    monkeypatch.undo()
    os.utime(root / "train" / "cat" / "000.png", (1, 1))
    image_folder(root, cache=cache, tasks=2)
    image_folder(root, cache=cache, tasks=2, mode="L")
    image_folder(root, cache=cache, tasks=2, size=5)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "numbers", "no header", "names"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    root, cache = in_parts(tmp_path / "pets"), tmp_path / "kept"
    whole = image_folder(root, tasks=2, cache=cache).fingerprint
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut": content[:-1],
            "longer": content + b"0",
            "header": b"99999999" + content[8:],
            "numbers": content.replace(b"[6, 6, 6, 6]", b"[6, 6, 0, 6]"),
            "no header": b"",
            "names": content.replace(b'["cat", "dog"', b'["cat",     1'),
        }[damage]
    )
    assert image_folder(root, tasks=2, cache=cache).fingerprint == whole
    assert [kept.read_bytes() == content for kept in cache.iterdir()] == [True]


def test_the_cache_is_beside_the_data_or_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root = in_parts(tmp_path / "data" / "pets")
    image_folder(root, tasks=2)
    assert len(list((tmp_path / "data" / "pets.cache").iterdir())) == 1 and not (tmp_path / "home").exists()
    other = in_parts(tmp_path / "locked" / "pets")
    (tmp_path / "locked" / "pets.cache").write_text("a file where the folder would be")
    image_folder(other, tasks=2)
    assert len(list((tmp_path / "home" / "clstream" / "images").iterdir())) == 1
    third = in_parts(tmp_path / "read only" / "pets")
    third.parent.chmod(0o555)
    image_folder(third, tasks=2)
    third.parent.chmod(0o755)
    assert len(list((tmp_path / "home" / "clstream" / "images").iterdir())) == 2 and len(list(third.parent.iterdir())) == 1
    with pytest.raises(OSError, match=r"the folder for the cache of images .* can't be made"):
        image_folder(root, tasks=2, cache=tmp_path / "locked" / "pets.cache")


def test_a_full_disk_is_said_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_parts(tmp_path / "pets")
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"decoded images take .* GB left: name another folder, cache="):
        image_folder(root, tasks=2)
    assert not list((tmp_path / "pets.cache").iterdir())


def test_nothing_is_printed_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(in_parts(tmp_path / "pets"), tasks=2)
    assert capsys.readouterr() == ("", "")


def test_classes_are_named_by_their_folders(tmp_path: Path) -> None:
    root = in_parts(tmp_path / "pets")
    chosen = image_folder(root, tasks=[["owl", "cat"], ["fox"]])
    assert [[chosen.class_name(label) for label in task.classes] for task in chosen.tasks] == [["owl", "cat"], ["fox"]]
    assert "left out, they are in no task: dog" in str(chosen) and chosen.classes == 3
    ordered = image_folder(root, tasks=[3, 1], class_order=["owl", "fox", "dog", "cat"])
    assert [[ordered.class_name(label) for label in task.classes] for task in ordered.tasks] == [["owl", "fox", "dog"], ["cat"]]
    with pytest.raises(ValueError, match=r"tasks\[0\] names 'gnu', which is not one of the labels"):
        image_folder(root, tasks=[["gnu"], ["cat"]])


@pytest.mark.parametrize("parts", [True, False])
def test_so_many_training_images_of_each_class_are_drawn(tmp_path: Path, parts: bool) -> None:
    root = in_parts(tmp_path / "pets") if parts else write_pictures(tmp_path / "pets", {"cat": 10, "dog": 5, "owl": 9, "fox": 8})
    whole, drawn = image_folder(root, tasks=2), image_folder(root, tasks=2, train_per_class=3)
    everything = samples_of(whole)
    rows = samples_of(drawn)
    assert [row for row in rows if row[0] == "test"] == [row for row in everything if row[0] == "test"]
    assert {row for row in rows if row[0] == "train"} < {row for row in everything if row[0] == "train"}
    assert [len(task.train) for task in drawn.tasks] == [6, 6] and len(set(rows)) == len(rows)
    other = image_folder(root, tasks=2, train_per_class=3, seed=1 if parts else 0, class_order=None if parts else 1)
    assert drawn.fingerprint == image_folder(root, tasks=2, train_per_class=3).fingerprint
    assert len({stream.fingerprint for stream in (whole, drawn, other)}) == 3
    assert "note: 3 training images of each class, drawn by seed 0" in str(drawn)
    assert run_params(Finetune(Mlp((3, 6, 6), 4)), drawn, 0, "cpu")["stream.train_per_class"] == 3
    assert "stream.train_per_class" not in run_params(Finetune(Mlp((3, 6, 6), 4)), whole, 0, "cpu")
    with pytest.raises(ValueError, match=r"pets has \d training images of '\w+': take a train_per_class of at most that"):
        image_folder(root, tasks=2, train_per_class=7)
    with pytest.raises(ValueError, match="train_per_class must be a whole number of at least 1 or None, not 0"):
        image_folder(root, tasks=2, train_per_class=0)


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": 2, "validation": 0.2},
        {"tasks": [["owl"], ["cat"]], "size": 4, "mode": "L"},
        {"tasks": 2, "train_per_class": 4, "seed": 3},
    ],
)
@pytest.mark.parametrize("parts", [True, False])
def test_it_is_recorded_over_the_same_folder(tmp_path: Path, options: dict[str, object], parts: bool) -> None:
    root = (
        in_parts(tmp_path / "pets") if parts else write_pictures(tmp_path / "pets", dict.fromkeys(["owl", "cat", "dog", "fox"], 9))
    )
    stream = image_folder(root, **options)  # type: ignore[arg-type]
    file = record(stream, tmp_path / "pets.clstream")
    again = recorded(file, root=root)
    assert again.fingerprint == stream.fingerprint and str(again) == str(stream)
    with pytest.raises(ValueError, match=r"was recorded from a folder of images: name it, root=... or --data_root"):
        recorded(file)
    (root / "train/cat/000.png" if parts else root / "cat/000.png").unlink()
    with pytest.raises(ValueError, match="is not the data that"):
        recorded(file, root=root)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    in_parts(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    given = ["--stream", "image_folder", "--stream.root", "pets"]
    run = ["--strategy", "Finetune", "--checkpoint_every", "0", "--track", "false", "--threads", "1"]
    assert main(["run", *given, "--stream.tasks", "[[owl,cat],[dog]]", "--stream.size", "[5,4]", *run]) == 0
    assert "Finetune on pets" in capsys.readouterr().out
    assert main(["run", "--stream", "image_folder", *run]) == 2
    assert "--stream needs root: give --stream.root" in capsys.readouterr().err
    (tmp_path / "pets" / "test" / "owl" / "bad.png").write_text("no picture")
    assert main(["run", *given, *run]) == 2
    assert capsys.readouterr().err.startswith("clstream: error: pets/test/owl/bad.png is no image that can be read")


@pytest.mark.data
def test_cifar10_of_jpeg_files(tmp_path: Path) -> None:
    file = Path(os.environ["CLSTREAM_DATA"]) / "cifar10-jpeg.zip"
    if not file.exists():
        pytest.skip("cifar10-jpeg.zip is not in CLSTREAM_DATA")
    stream = image_folder(file, tasks=5, cache=tmp_path)
    assert stream.name == "cifar10-jpeg" and stream.input_shape == (3, 32, 32) and stream.class_names[0] == "airplane"
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(10000, 2000)] * 5
