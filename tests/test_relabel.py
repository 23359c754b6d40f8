"""Labels with gaps are told of; relabel=True numbers them, and reports call them what they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import blobs, from_dataset, from_tensors, recorded

from clstream import run
from clstream.figures import composition
from clstream.models import Mlp
from clstream.recording import read, record
from clstream.stream import Stream
from clstream.tracking import EventLog
from clstream.tracking.event_log import FILE

TENS = torch.arange(60) % 6 * 10  # 0, 10, ... 50
WORDS = np.array(["ape", "bee", "cat", "dog", "elk", "fox"])


def of(y: object, **options: object) -> Stream:
    x = torch.arange(60.0)[:, None] + torch.zeros(60, 3)
    return from_tensors(x, y, x, y, **{"tasks": 3, "batch_size": 7, **options})  # type: ignore[arg-type]


def test_gaps_are_told_on_the_card_and_only_there() -> None:
    gapped, whole = of(TENS), of(TENS // 10)
    assert "its 6 labels have gaps: models get 51 outputs, and 45 of them are never right" in str(gapped)
    assert "gaps" not in str(whole) and whole.gaps == "" and gapped.notes == whole.notes == ()  # recordings stay as they were


@pytest.mark.parametrize("y", [TENS, TENS.numpy(), TENS - 1000, TENS.tolist(), WORDS[TENS // 10], WORDS[TENS // 10].tolist()])
def test_it_is_the_stream_of_labels_without_gaps(y: object) -> None:
    plain, relabelled = of(TENS // 10), of(y, relabel=True)
    assert relabelled.fingerprint == plain.fingerprint and relabelled.classes == 6 and relabelled.gaps == ""
    assert [task.classes for task in relabelled.tasks] == [(0, 1), (2, 3), (4, 5)]
    for one, two in zip(plain, relabelled, strict=True):
        assert torch.equal(one.samples.x, two.samples.x) and torch.equal(one.samples.y, two.samples.y)


def test_reports_call_classes_what_they_were() -> None:
    numbers, words = of(TENS, relabel=True), of(WORDS[TENS // 10], relabel=True)
    assert numbers.class_names == ("0", "10", "20", "30", "40", "50") and words.class_names == tuple(WORDS)
    assert "classes 20, 30; 20 to train" in str(numbers) and "classes cat, dog; 20 to train" in str(words)
    assert composition(words).names == tuple(WORDS) and composition(of(TENS // 10)).names == (0, 1, 2, 3, 4, 5)
    assert torch.equal(composition(words).counts, composition(of(TENS // 10)).counts)
    assert words.class_name(2) == "cat" and of(TENS // 10).class_name(2) == "2"


def test_the_event_log_says_the_names(tmp_path: Path) -> None:
    for name, stream in (("words", of(WORDS[TENS // 10], relabel=True)), ("numbers", of(TENS // 10))):
        run(Finetune(Mlp(3, 6, hidden=(4,))), stream, EventLog(tmp_path / name))
        first = json.loads((tmp_path / name / FILE).read_text().splitlines()[0])
        assert first.get("class_names") == (list(WORDS) if name == "words" else None)


def test_the_class_order_names_the_user_s_labels() -> None:
    stream = of(WORDS[TENS // 10], relabel=True, class_order=["fox", "ape", "bee", "elk", "dog", "cat"])
    assert [[stream.class_name(label) for label in task.classes] for task in stream.tasks] == [
        ["fox", "ape"],
        ["bee", "elk"],
        ["dog", "cat"],
    ]
    assert of(TENS, relabel=True, class_order=3).fingerprint == of(TENS // 10, class_order=3).fingerprint
    with pytest.raises(ValueError, match="class_order names 'gnu', which is not one of the labels"):
        of(WORDS[TENS // 10], relabel=True, class_order=["gnu", "ape", "bee", "elk", "dog", "cat"])


def test_domains_number_their_labels_anyway() -> None:
    stream = of(WORDS[TENS // 10], relabel=True, scenario="domain")
    assert stream.class_names == () and stream.fingerprint == of(TENS // 10, scenario="domain").fingerprint


def test_a_data_set_is_relabelled_too() -> None:
    class Named(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
            return torch.full((3,), float(index)), str(WORDS[index % 6])

    stream = from_dataset(Named(), Named(), tasks=3, relabel=True, progress=False)
    assert stream.fingerprint == of(TENS // 10).fingerprint and stream.class_names == tuple(WORDS)
    with pytest.raises(TypeError, match="labels are strings: relabel=True numbers them"):
        from_dataset(Named(), Named(), tasks=3, progress=False)


def test_a_recording_keeps_the_names(tmp_path: Path) -> None:
    stream = of(WORDS[TENS // 10], relabel=True)
    file = record(stream, tmp_path / "words.clstream")
    assert read(file).about["format"] == 3 and read(record(of(TENS), tmp_path / "tens.clstream")).about["format"] == 1
    again = recorded(file, data=stream)
    assert again.class_names == stream.class_names and again.fingerprint == stream.fingerprint


def test_a_memory_of_so_many_a_class_holds_the_classes_that_there_are() -> None:
    sizes = []
    for y, options in ((TENS, {}), (TENS, {"relabel": True})):
        strategy = Replay(Mlp(3, 51, hidden=(4,)), memory="class_balanced", per_class=2)
        run(strategy, of(y, **options))
        sizes.append(strategy.memory.capacity)
    assert sizes == [102, 12]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (TENS / 10, r"must be one whole number or string each, to be numbered anew, not \(60,\) of float32"),
        (TENS[:, None], r"must be one whole number or string each"),
        ([None] * 60, "must be one whole number or string each"),
        ([*WORDS[TENS[:59] // 10].tolist(), 5], "must be all whole numbers, or all strings"),
    ],
)
def test_what_is_no_label_is_refused_all_the_same(y: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        of(y, relabel=True)


def test_names_that_do_not_go_with_the_classes_are_refused() -> None:
    stream = blobs()
    with pytest.raises(ValueError, match="there must be a name for each of the 10 classes, not 2"):
        Stream("s", stream.tasks, class_names=("a", "b"))
    with pytest.raises(TypeError, match="class_names must be a tuple of strings"):
        Stream("s", stream.tasks, class_names="abcdefghij")  # type: ignore[arg-type]
