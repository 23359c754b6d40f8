"""Running episodes: each from the same start, whatever came before; resumed in the middle; and what is measured."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from clstream.strategies import Finetune, ProtoNet, Replay
from clstream.streams import episodes
from torch.optim import SGD

from clstream import on
from clstream.engine import OtherRunError
from clstream.episodes import EpisodeEnded, run_episodes
from clstream.episodes.runner import run_episode
from clstream.models import Mlp
from clstream.pretraining import save_weights
from clstream.seeds import isolated
from clstream.serialization.compare import digest

FAMILY = episodes("digits", ways=2, shots=2, targets=4, sets=6, sets_per_group=2, steps=5, count=6, noise=[0.2])
INSTANCES = episodes("digits", shots=5, sets=4, instances=True, noise=[0.0, 0.5], occlusion=[0.4], count=5)
LEARNERS = {"Finetune": partial(Finetune, optimizer=partial(SGD, lr=0.1)), "ProtoNet": ProtoNet, "Replay": Replay}


def make(name, family=FAMILY):
    return lambda: LEARNERS[name](Mlp(family[0].input_shape, family.outputs, hidden=(32,)))


def facts(result):
    """What must be equal, bit for bit: all but the seconds."""
    return [(o.index, o.accuracy, o.by_set, o.corrupted, o.nearest, o.steps, o.memory_bytes) for o in result.outcomes]


class Watch:
    def __init__(self, stop_after=None):
        self.seen, self.stop_after = [], stop_after

    @on(EpisodeEnded)
    def see(self, event):
        self.seen.append(event.outcome.index)
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", LEARNERS)
def test_an_episode_leaves_the_learner_as_it_was_and_depends_on_no_other(name):
    with isolated(0, "model"):
        snapshot = make(name)()
    before = digest(snapshot)
    backwards = [run_episode(snapshot, FAMILY[number], number) for number in reversed(range(6))]
    assert digest(snapshot) == before
    result = run_episodes(make(name), FAMILY)
    assert facts(result) == facts(SimpleNamespace(outcomes=backwards[::-1]))


def test_what_is_measured():
    result = run_episodes(make("ProtoNet"), FAMILY, watch := Watch())
    assert watch.seen == [0, 1, 2, 3, 4, 5] and result.by_set.shape == (6, 6) and result.chance == 1 / 6
    assert torch.allclose(result.by_set.mean(1), result.accuracy)  # all sets have as many targets
    assert result.corrupted.keys() == {"noise_0.2"} and result.nearest.keys() == {"accuracy", "noise_0.2"}
    assert result.outcomes[0].steps == 6 * 5 and result.outcomes[0].memory_bytes > 0
    mean = result.mean
    assert mean.size == 6 and mean.low < float(result.accuracy.mean()) < mean.high
    text = str(result)
    assert "chance     0.1667" in text and text.count("1-NN on inputs") == 2 and "by set" in text


def test_the_nearest_neighbour_knows_every_instance_that_is_not_corrupted():
    result = run_episodes(make("Finetune", INSTANCES), INSTANCES)
    assert result.nearest["accuracy"].eq(1).all() and result.nearest["noise_0"].eq(1).all()
    assert result.nearest["occlusion_0.4"].mean() < 1
    assert torch.equal(result.corrupted["noise_0"], result.accuracy)  # nothing is corrupted, so the answers are the same


@pytest.mark.slow
def test_gradient_steps_favour_the_last_sets_and_prototypes_do_not():
    family = episodes("digits", ways=2, shots=2, targets=4, sets=5, steps=20, count=12)
    tuned = run_episodes(lambda: Finetune(Mlp((1, 8, 8), 10, hidden=(32,)), partial(SGD, lr=0.1)), family).by_set.mean(0)
    assert tuned[-1] > 0.8 and tuned[0] < 0.3
    means = run_episodes(lambda: ProtoNet(Mlp((1, 8, 8), 10, hidden=(32,))), family).by_set.mean(0)
    assert abs(means[-1] - means[0]) < 0.35


@pytest.mark.parametrize("stop_after", [1, 4])
def test_resumed_in_the_middle_it_ends_the_same(tmp_path, stop_after):
    whole = run_episodes(make("Finetune"), FAMILY, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_episodes(make("Finetune"), FAMILY, Watch(stop_after), folder=tmp_path / "cut")
    file = tmp_path / "cut" / "episodes.jsonl"
    file.write_bytes(file.read_bytes() + b'{"index": 5, "accur')  # the machine went off while it wrote
    again = run_episodes(make("Finetune"), FAMILY, watch := Watch(), folder=tmp_path / "cut", resume=True)
    assert watch.seen == [*range(stop_after, 6)]
    assert facts(again) == facts(whole)
    texts = [(tmp_path / name / "episodes.jsonl").read_text() for name in ("whole", "cut")]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert lines[0][0] == lines[1][0] and [line["index"] for line in lines[1][1:]] == [0, 1, 2, 3, 4, 5]
    assert facts(run_episodes(make("Finetune"), FAMILY, folder=tmp_path / "cut", resume=True)) == facts(whole)


def test_episodes_of_another_run_are_not_gone_on_with(tmp_path):
    run_episodes(make("Finetune"), FAMILY, folder=tmp_path)
    with pytest.raises(FileExistsError, match="has episodes already: resume=True goes on with them"):
        run_episodes(make("Finetune"), FAMILY, folder=tmp_path)
    with pytest.raises(OtherRunError, match="is of another run: params was"):
        run_episodes(make("Replay"), FAMILY, folder=tmp_path, resume=True)
    with pytest.raises(OtherRunError, match="is of another run"):
        run_episodes(make("Finetune"), FAMILY, folder=tmp_path, resume=True, seed=1)
    other = episodes("digits", ways=2, shots=2, targets=4, sets=6, sets_per_group=2, steps=5, count=6, noise=[0.3])
    with pytest.raises(OtherRunError, match="is of another run: drawn_from was"):
        run_episodes(make("Finetune"), other, folder=tmp_path, resume=True)
    header = b'{"format": "clstream episodes 1"}\n'
    for junk in (b"[1]\n", b'{"format": "x"}\n', b"\xff\n", header + b'{"index": -1}\n', b"[" * 9999 + b"\n"):
        (tmp_path / "episodes.jsonl").write_bytes(junk)
        with pytest.raises(ValueError, match="is no record of episodes"):
            run_episodes(make("Finetune"), FAMILY, folder=tmp_path, resume=True)


@pytest.mark.slow
def test_each_episode_begins_with_the_weights_of_the_start(tmp_path):
    with isolated(5):
        trained = Mlp((1, 8, 8), 3, hidden=(32,))
    file = save_weights(trained, tmp_path / "start.pt", {})
    results = [facts(run_episodes(make("ProtoNet"), FAMILY, start=start)) for start in (file, trained, trained.state_dict())]
    assert results[0] == results[1] == results[2] != facts(run_episodes(make("ProtoNet"), FAMILY))
    with pytest.raises(ValueError, match=r"start does not fit Mlp: .*weight is \(8, 64\) there, \(32, 64\) here"):
        run_episodes(make("ProtoNet"), FAMILY, start=Mlp((1, 8, 8), 3, hidden=(8,)))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"make_strategy": lambda: 3}, TypeError, "make_strategy must return a Strategy, not a int"),
        ({"episodes": [1]}, TypeError, "run_episodes takes Episodes, as clstream.streams.episodes returns them, not a list"),
        ({"resume": True}, ValueError, "resume=True goes on with the episodes of a folder: name it"),
        ({"seed": -1}, ValueError, "seed must be a whole number of at least 0, not -1"),
    ],
)
def test_what_is_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        run_episodes(**{"make_strategy": make("ProtoNet"), "episodes": FAMILY} | options)
