"""Folders and archives of images with several labels each, as a stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clstream.streams import multilabel_folder, recorded
from picture_folders import SCENES, as_tensor, picture, scenes, zipped

from clstream.checks import check_stream
from clstream.recording import record


def test_a_task_has_the_images_with_its_labels_and_hides_all_others(tmp_path: Path) -> None:
    stream = multilabel_folder(scenes(tmp_path / "scenes"), tasks=[["sea"], ["boat", "tree"]], cache=tmp_path / "cache")
    assert stream.class_names == ("boat", "sea", "tree") and stream.input_shape == (3, 6, 6) and stream.target == "multilabel"
    first, second = stream.tasks
    assert first.train.y.sum(0).tolist() == [0, 2, 0] and second.train.y.sum(0).tolist() == [2, 0, 2]
    assert first.test.y.tolist() == [[0, 1, 1]], "test samples keep all of their labels"
    assert sorted(len(task.train) for task in stream.tasks) == [2, 3], "an image without labels is in no task"
    pixels = {x.numpy().tobytes(): y.tolist() for x, y in zip(second.train.x, second.train.y, strict=True)}
    assert pixels[as_tensor(picture(0)).numpy().tobytes()] == [1, 0, 0], "the sea of the first image is background here"
    for check in check_stream(stream):
        check()


def test_an_archive_is_the_folder_and_a_recording_finds_it_again(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    file = zipped(root, tmp_path / "scenes.zip", "all of them/")
    stream = multilabel_folder(root, tasks=3, size=4, mode="L", class_order=["tree", "sea", "boat"])
    assert stream.fingerprint == multilabel_folder(file, tasks=3, size=4, mode="L", class_order=["tree", "sea", "boat"]).fingerprint
    assert stream.tasks[0].classes == (2,) and stream.input_shape == (1, 4, 4)
    record(stream, tmp_path / "scenes.clstream")
    again = recorded(tmp_path / "scenes.clstream", root=file)
    assert again.fingerprint == stream.fingerprint and again.class_names == stream.class_names


def test_without_a_folder_test_the_one_called_val_is_for_it(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    (root / "test").rename(root / "val")
    (root / "labels.csv").write_text((root / "labels.csv").read_text().replace("test/", "val/"))
    assert torch.equal(multilabel_folder(root, tasks=1).tasks[0].test.y.sum(0), torch.tensor([1.0, 1, 1]))


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        (SCENES, {"tasks": [["sea"], ["moon"]]}, "tasks.1. names 'moon', which is not one of the labels"),
        (SCENES, {"class_order": ["sea", "moon", "tree"]}, "class_order names 'moon', which is not one of the labels"),
        (SCENES, {"scenario": "domain"}, "scenario must be class or task"),
        (SCENES, {"size": 0}, "size must be a whole number"),
        ({**SCENES, "test/1.png": "moon"}, {"tasks": 1}, "no training sample has a positive of the classes"),
        ({"train/0.png": "sea"}, {"tasks": 1}, "labels.csv has no line for train/1.png"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    tmp_path: Path, labels: dict[str, str], options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        multilabel_folder(scenes(tmp_path / "scenes", labels), cache=tmp_path / "cache", **options)  # type: ignore[arg-type]


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    (root / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*labels\.csv"):
        multilabel_folder(root)
    (root / "labels.csv").write_text("image,tags\n")
    with pytest.raises(ValueError, match="must have the columns file and labels"):
        multilabel_folder(root)
