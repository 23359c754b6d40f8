"""Omniglot from torchvision's layout, with drawings made here: classes, drawers, rotations, and what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.streams import image_cache, omniglot, recorded
from picture_folders import zipped
from PIL import Image

from clstream.checks import check_stream
from clstream.cli import main
from clstream.recording import record

SMALL1, SMALL2 = "images_background_small1", "images_background_small2"


def drawing(name: str, drawer: int) -> Image.Image:
    """Return a drawing of one bit, another one for each character and drawer."""
    draw = np.random.default_rng([*name.encode(), drawer])
    return Image.fromarray(draw.integers(0, 2, (15, 15), dtype=np.uint8) * 255).convert("1")


def write_drawings(folder: Path, alphabets: dict[str, int]) -> Path:
    for alphabet, characters in alphabets.items():
        for number in range(1, characters + 1):
            own = folder / alphabet / f"character{number:02}"
            own.mkdir(parents=True)
            for drawer in range(1, 21):
                drawing(f"{alphabet}/character{number:02}", drawer).save(own / f"{100 + number:04}_{drawer:02}.png")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with both small background sets, which share Greek, one as a folder and one as an archive."""
    write_drawings(tmp_path / "omniglot-py" / SMALL1, {"Greek": 2, "Korean": 1})
    made = write_drawings(tmp_path / "made" / SMALL2, {"Tagalog": 1, "Greek": 2})
    zipped(made, tmp_path / "omniglot-py" / f"{SMALL2}.zip", f"{SMALL2}/")
    return tmp_path


def test_characters_are_classes_and_the_last_drawers_are_for_the_test(root: Path) -> None:
    stream = omniglot("small1", tasks=[2, 1], root=root, size=15)
    assert stream.class_names == ("Greek/character01", "Greek/character02", "Korean/character01")
    assert stream.input_shape == (1, 15, 15) and [(len(task.train), len(task.test)) for task in stream.tasks] == [(30, 10), (15, 5)]
    korean = stream.tasks[1]
    for part, drawers in ((korean.train, range(1, 16)), (korean.test, range(16, 21))):
        expected = {np.array(drawing("Korean/character01", drawer).convert("L")).tobytes() for drawer in drawers}
        assert {image.numpy().tobytes() for image in part.x} == expected
    for check in check_stream(stream):
        check()
    assert len(omniglot("small1", tasks=1, root=root, test_drawers=1).tasks[0].test) == 3


def test_both_small_sets_have_a_shared_alphabet_once(root: Path) -> None:
    stream = omniglot("small", tasks=4, root=root, size=15)
    assert stream.class_names == ("Greek/character01", "Greek/character02", "Korean/character01", "Tagalog/character01")
    assert [len(task.train) for task in stream.tasks] == [15] * 4
    tagalog = omniglot("small2", tasks=[["Tagalog/character01"]], root=root, size=15).tasks[0]
    assert torch.equal(stream.tasks[3].test.x, tagalog.test.x)


def test_rotations_are_classes_beside_their_characters(root: Path) -> None:
    plain, turned = (omniglot("small", tasks=4, root=root, size=15, rotations=rotations) for rotations in (False, True))
    assert len(turned.class_names) == 16
    for number, task in enumerate(turned.tasks):
        name = plain.class_names[number]
        assert [turned.class_name(label) for label in task.classes] == [
            name,
            *(f"{name}/turned{angle:03}" for angle in (90, 180, 270)),
        ]
        for turns, label in enumerate(task.classes):
            own = task.train.x[task.train.y == label]
            before = plain.tasks[number].train.x.rot90(turns, (2, 3))
            assert {image.numpy().tobytes() for image in own} == {image.contiguous().numpy().tobytes() for image in before}


def test_images_have_28_pixels_and_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = omniglot("small", tasks=2, root=root, cache=root / "kept")
    assert first.input_shape == (1, 28, 28) and len(list((root / "kept").iterdir())) == 2
    monkeypatch.setattr(image_cache, "decode", lambda *_: pytest.fail("an image was decoded again"))
    assert omniglot("small", tasks=[1, 3], root=root, cache=root / "kept", rotations=True).tasks[0].train.x.shape == (15, 1, 28, 28)


@pytest.mark.parametrize("options", [{"rotations": True}, {"size": 7, "test_drawers": 3}])
def test_it_is_recorded(root: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = omniglot("small", tasks=[2, 1], root=root, **options)  # type: ignore[arg-type]
    file = record(stream, root / "omniglot.clstream")
    again = recorded(file, root=root)
    assert again.fingerprint == stream.fingerprint and str(again) == str(stream)
    monkeypatch.setenv("CLSTREAM_DATA", str(root))
    assert recorded(file).fingerprint == stream.fingerprint


@pytest.mark.parametrize(
    ("background", "folder"),
    [(True, "images_background"), (False, "images_evaluation"), ("all", "images_background"), ("small", SMALL1)],
)
def test_what_is_missing_is_said_in_one_sentence(
    background: bool | str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileNotFoundError) as caught:
        omniglot(background, root=tmp_path)
    sentence = str(caught.value)
    for what in (folder, str(tmp_path / "omniglot-py"), f"Put {folder}.zip there", "CLSTREAM_DATA"):
        assert what in sentence
    assert "\n" not in sentence and ("no network" in sentence) == (folder != SMALL1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "Greek" / "character01" / "0101_07.png").unlink(), "Greek/character01 must have the 20 drawings"),
        (lambda place: (place / "Greek" / "notes.txt").write_text("x"), r"notes\.txt is no drawing of Omniglot"),
        (lambda place: (place / "Greek" / "character01" / "0101_07.png").write_text("x"), r"0101_07\.png is no image"),
    ],
)
def test_damaged_data_is_named(root: Path, change: object, message: str) -> None:
    change(root / "omniglot-py" / SMALL1)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        omniglot("small1", tasks=1, root=root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "smal"}, "background must be True, False or one of background, .* not 'smal': did you mean small"),
        ({"background": 1}, "background must be True, False or one of"),
        ({"test_drawers": 20}, "test_drawers must be a whole number from 1 to 19"),
        ({"size": 0}, "size must be a whole number from 1 to"),
        ({"rotations": "yes"}, "rotations must be True or False"),
    ],
)
def test_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        omniglot(**options)  # type: ignore[arg-type]


def test_on_the_command_line(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(root)
    given = ["--stream", "omniglot", "--stream.background", "small", "--stream.tasks", "[3,1]", "--data_root", "."]
    run = ["--strategy", "Finetune", "--checkpoint_every", "0", "--track", "false", "--threads", "1"]
    assert main(["run", *given, *run]) == 0
    assert "Finetune on omniglot" in capsys.readouterr().out


@pytest.mark.data
def test_the_small_background_sets(tmp_path: Path) -> None:
    if not (Path(os.environ["CLSTREAM_DATA"]) / "omniglot-py").is_dir():
        pytest.skip("omniglot-py is not in CLSTREAM_DATA")
    stream = omniglot("small", tasks=[136, 53, 53], cache=tmp_path)
    assert stream.classes == 242 and stream.input_shape == (1, 28, 28)
    assert len({name.split("/")[0] for name in stream.class_names}) == 8
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [
        (136 * 15, 136 * 5),
        (53 * 15, 53 * 5),
        (53 * 15, 53 * 5),
    ]
