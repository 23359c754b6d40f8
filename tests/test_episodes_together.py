"""Episodes computed as one batch: equal to one by one, and refused where the learner can't."""

from functools import partial

import pytest
import torch
from clstream.strategies import Finetune, ProtoNet, Replay, SupportReplay
from clstream.streams import episodes
from torch import nn
from torch.optim import SGD, Adam

from clstream.engine import run
from clstream.episodes import run_episodes
from clstream.episodes.together import outcomes_together, tune_together
from clstream.models import Conv4, Linear, Mlp
from clstream.seeds import isolated
from clstream.serialization.compare import digest

SHAPE = {"ways": 2, "shots": 2, "targets": 4, "sets": 6, "sets_per_group": 2, "count": 7, "noise": [0.3]}
FAMILY = episodes("digits", **SHAPE, steps=3)
INSTANCES = episodes("digits", shots=3, sets=4, instances=True, noise=[0.5], count=7)
LEARNERS = {
    "ProtoNet": ProtoNet,
    "ProtoNet, cosine": partial(ProtoNet, similarity="cosine", scale=10.0),
    "ProtoNet, dot": partial(ProtoNet, similarity="dot"),
    "Finetune": partial(Finetune, optimizer=partial(SGD, lr=0.2)),
}


def make(name, family=FAMILY):
    return lambda: LEARNERS[name](Conv4((1, 8, 8), family.outputs, width=8, blocks=2, norm="layer"))


@pytest.mark.slow
@pytest.mark.parametrize("family", [FAMILY, INSTANCES], ids=["classes", "instances"])
@pytest.mark.parametrize("name", LEARNERS)
def test_episodes_together_come_to_the_same_as_one_by_one(name, family):
    alone, together = (run_episodes(make(name, family), family, batch=batch) for batch in (1, 3))
    assert [own.index for own in together.outcomes] == [*range(7)]
    assert torch.allclose(alone.by_set, together.by_set) and torch.allclose(alone.accuracy, together.accuracy)
    for kind, values in alone.corrupted.items():
        assert torch.allclose(values, together.corrupted[kind])
    for kind, values in alone.nearest.items():
        assert torch.allclose(values, together.nearest[kind])
    assert [own.steps for own in alone.outcomes] == [own.steps for own in together.outcomes]


@pytest.mark.parametrize("name", LEARNERS)
def test_their_scores_are_equal_but_for_rounding(name):
    draws = [FAMILY.draw(number) for number in range(3)]
    x = FAMILY.pool.x
    support, asked = (torch.stack([x[getattr(draw, own)] for draw in draws]) for own in ("support", "targets"))
    labels = torch.stack([draw.support_labels for draw in draws])
    with isolated(0, "model"):
        learner = make(name)()
    asked = asked.flatten(1, 2)
    if name == "Finetune":
        together = tune_together(learner, support, labels, asked, FAMILY.steps)
    else:
        with torch.no_grad():
            together = learner.answer_together(support, labels, asked, FAMILY.outputs)
    for number in range(3):
        with isolated(0, "model"):
            alone = make(name)()
        run(alone, FAMILY[number])
        assert torch.allclose(alone.scores(asked[number]), together[number], atol=1e-4)


def test_the_learner_stays_as_it_is():
    for name in LEARNERS:
        with isolated(0, "model"):
            learner = make(name)()
        before = digest(learner)
        outcomes_together(learner, FAMILY, range(2))
        assert digest(learner) == before


def test_a_break_within_a_batch_changes_nothing(tmp_path):
    whole = run_episodes(make("ProtoNet"), FAMILY, batch=4, folder=tmp_path)
    file = tmp_path / "episodes.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]))  # two of four
    again = run_episodes(make("ProtoNet"), FAMILY, batch=4, folder=tmp_path, resume=True)
    assert torch.equal(whole.by_set, again.by_set)
    with pytest.raises(ValueError, match="is of another run: batch was 4, and is 3"):
        run_episodes(make("ProtoNet"), FAMILY, batch=3, folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Replay(Mlp((1, 8, 8), 6)), "Replay learns one episode at a time: batch=1"),
        (lambda: SupportReplay(Mlp((1, 8, 8), 6)), "SupportReplay learns one episode at a time: batch=1"),
        (lambda: Finetune(Mlp((1, 8, 8), 6), active_classes="seen"), "Finetune learns one episode at a time"),
        (lambda: Finetune(Mlp((1, 8, 8), 6), Adam), "episodes are learned together with plain SGD alone"),
        (lambda: Finetune(Mlp((1, 8, 8), 6), partial(SGD, lr=0.1, momentum=0.9)), "without momentum and decay"),
        (lambda: Finetune(Conv4((1, 8, 8), 6, blocks=2)), "Conv4 has statistics or dropout, so episodes can't be learned together"),
        (lambda: Finetune(nn.Sequential(nn.Dropout(0.1), Linear(64, 6))), "Sequential has statistics or dropout"),
    ],
)
def test_learners_that_can_not_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_episodes(make, FAMILY, batch=2)
