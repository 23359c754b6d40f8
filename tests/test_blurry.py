"""The blurry stream: its rule, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clstream.streams.blurry import episodes

from clstream import streams


def test_slots_are_filled_as_the_rule_says() -> None:
    new = later = 0
    for seed in range(200):
        found = episodes(list(range(10)), 3, 0.3, seed)
        taught = set(found[0])
        assert len(taught) == 3
        for episode in found[1:]:
            assert len(set(episode)) == 3 and episode == sorted(episode)
            fresh = set(episode) - taught
            new, later = new + len(fresh), later + (3 if len(taught) < 10 else 0)
            taught |= fresh
        assert taught == set(range(10)) and set(found[-1]) - set().union(*found[:-1])  # it ends with the last new class
    assert new / later == pytest.approx(0.3, abs=0.03)  # the last episodes have less room for new ones


def test_seeds_give_other_episodes_and_one_seed_the_same() -> None:
    runs = [episodes(list(range(10)), 3, 0.3, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert episodes([4, 7, 9], 3, 0.3, 0) == [[4, 7, 9]]


def test_a_class_comes_whole_each_time_and_validation_never() -> None:
    stream = streams.blurry_episodes("digits", validation=0.2, new_class=0.5)
    assert stream.data is not None
    train = stream.data.parts["train"]
    held = torch.cat([task.validation.index for task in stream.tasks if task.validation is not None]).unique()
    rows = [task.train.index for task in stream.tasks]
    assert not torch.isin(torch.cat(rows), held).any() and len(torch.cat(rows).unique()) + len(held) == len(train)
    for task, mine in zip(stream.tasks, rows, strict=True):
        for label in task.classes:
            left = train.y[torch.tensor([row for row in range(len(train)) if row not in set(held.tolist())])]
            assert int((train.y[mine] == label).sum()) == int((left == label).sum())
        assert set(task.test.y.tolist()) == set(task.classes)
    assert stream.name == "blurry_digits" and "classes come again" in str(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "EMNIST"}, "data must be one of digits"),
        ({"new_class": 0}, "new_class must be a finite number above 0"),
        ({"new_class": 1.5}, "a probability above 0"),
        ({"slots": 11}, "slots must be 1 to 10"),
        ({"slots": 0}, "slots must be a whole number of at least 1"),
        ({"validation": 1.0}, "validation must be a share, from 0 to below 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streams.blurry_episodes(**({"data": "digits"} | options))
