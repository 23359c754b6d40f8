"""Memories of multi-label targets and values: rows stay whole, kinds stay apart, label sets are balanced."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from clstream.strategies import Replay

from clstream import run
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import ClassBalanced, Memory, Reservoir, Ring
from clstream.stream import Samples

KINDS = ("multilabel", "value")


def some(target: str, n: int = 20, first: int = 0) -> Samples:
    """Return samples whose input tells their target: of (n, 3) columns, one for each bit of a number."""
    numbers = torch.arange(first, first + n)
    y = (numbers[:, None] >> torch.arange(3) & 1).float()
    return Samples(numbers[:, None].float(), y + (numbers[:, None] if target == "value" else 0), target=target)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("make", [Reservoir, Ring, ClassBalanced])
def test_targets_of_any_shape_are_kept_with_their_inputs(make: type[Memory], target: str) -> None:
    if make is ClassBalanced and target == "value":
        return
    memory = make(7)
    for first in (0, 20, 40):
        memory.add(some(target, first=first))
    for kept in (memory.all(), memory.sample(30)):
        assert kept.target == target and kept.y.shape[1:] == (3,)
        for number, row in zip(kept.x.flatten().long().tolist(), kept.y, strict=True):
            assert torch.equal(row, some(target, 1, number).y[0])
    joined = some(target) + memory.sample(4)
    assert joined.target == target and len(joined) == 24


@pytest.mark.parametrize("make", [Reservoir, Ring])
def test_a_memory_keeps_one_kind_of_targets(make: type[Memory]) -> None:
    memory = make(7)
    memory.add(some("value"))
    with pytest.raises(ValueError, match="this memory keeps samples with value targets, not with multilabel targets"):
        memory.add(some("multilabel"))
    assert memory.seen == 20


def test_a_balanced_memory_keeps_as_many_of_each_set_of_labels() -> None:
    sets = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]]).float()
    rows = torch.tensor([0] * 50 + [1] * 20 + [2] * 4 + [3] * 30)
    memory, draw = ClassBalanced(24), torch.Generator().manual_seed(0)
    for part in torch.randperm(len(rows), generator=draw).split(9):
        memory.add(Samples(rows[part, None].float(), sets[rows[part]], target="multilabel"))
    kept = memory.all()
    assert torch.equal(kept.y, sets[kept.x[:, 0].long()])
    counts = Counter(kept.x[:, 0].long().tolist())
    assert counts[2] == 4 and sorted(counts.values()) == [4, 6, 7, 7]  # all there are of the rarest, the rest in equal shares
    limited = ClassBalanced(24, per_class=3)
    limited.add(Samples(rows[:, None].float(), sets[rows], target="multilabel"))
    assert Counter(limited.all().x[:, 0].long().tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_label_sets_of_many_columns_are_told_apart() -> None:
    y = torch.eye(300)
    memory = ClassBalanced(300)
    memory.add(Samples(torch.arange(300.0)[:, None], y, target="multilabel"))
    memory.add(Samples(torch.arange(300.0)[:, None], y, target="multilabel"))
    assert memory.shares() == dict.fromkeys(range(300), 1)


def test_memories_of_classes_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="a ClassBalanced memory has shares of classes, and values have none: use a Reservoir"):
        ClassBalanced(5).add(some("value"))
    for target in KINDS:
        with pytest.raises(ValueError, match=f"a Ring of 3 classes takes labels, not {target} targets: leave out `classes`"):
            Ring(6, classes=3).add(some(target))


def test_replay_balances_label_sets_and_goes_on_after_a_checkpoint() -> None:
    def build() -> Replay:
        return Replay(example_model(), capacity=12, memory="class_balanced")

    stream, whole, rest = example_stream(target="multilabel"), Checkpoints(every=7), Checkpoints(every=0)
    strategy = build()
    run(strategy, stream, whole)
    counts = Counter(map(tuple, strategy.memory.all().y.tolist()))
    assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 1  # none, one or both of two labels, three times
    run(build(), stream, rest, resume=whole.load(len(whole.written) // 2))
    assert difference(whole.load(-1), rest.load(-1)) is None


def test_replay_refuses_what_values_and_label_sets_dont_have() -> None:
    with pytest.raises(ValueError, match="a class-balanced memory has shares of classes, and example has values: take memory="):
        run(Replay(example_model(), memory="class_balanced"), example_stream(target="value"))
    for target in KINDS:
        with pytest.raises(ValueError, match=f"Replay mixes labels, and example has {target} targets: take mix=None"):
            run(Replay(example_model(), mix="cutmix"), example_stream(target=target))
