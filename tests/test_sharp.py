"""SHARP: the invariants of its rules over a run, its events, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from clstream.strategies import SHARP
from clstream.strategies.sharp import ActivationsStored, PhaseStarted, UnitsFrozen
from clstream.strategies.sharp.sharp import distances_to_exemplars
from sharp_runs import Watch, built, model, stream
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from clstream import Batch, BatchLearned, on, run, streams
from clstream.checks.recorders import Checkpoints
from clstream.models import ConvNet, Mlp, SlimResNet18
from clstream.seeds import isolated
from clstream.serialization.compare import digest

pytestmark = pytest.mark.filterwarnings("ignore:SHARP. after episode")


@pytest.fixture(scope="module")
def watched() -> Watch:
    """A run of five episodes, watched; with room for all of them, so that nothing runs out."""
    own = built(net=model(12, 120))
    watch = Watch(own, torch.cat([task.test.x for task in stream().tasks])[:50])
    run(own, stream(), watch)
    return watch


# the nine checks of the method's specification
@pytest.mark.slow
def test_no_idle_unit_reaches_another(watched: Watch) -> None:
    for state in watched.phases:
        for number, layer in list(enumerate(watched.strategy.chain.layers))[1:]:
            idle = (state["ranks"][number - 1] == 0).repeat_interleave(layer.span)
            others = state["ranks"][number] > 0
            assert not state["masks"][number][others][:, idle].any()
            assert not state["weights"][number][others][:, idle].any()


class Counted(SHARP):
    """Counts at each rewiring, for each layer: connections that were dropped, that grew, and that there was room for."""

    counts: tuple[list[int], ...] = ()

    def rewire(self) -> None:
        before, idle = [mask.clone() for mask in self.masks], [(ranks == 0)[:, None] for ranks in self.ranks]
        super().rewire()
        for was, has, free in zip(before, self.masks, idle, strict=True):
            self.counts = (*self.counts, [int((was & ~has).sum()), int((has & ~was).sum()), int((~was & free).sum())])


@pytest.mark.slow
def test_the_number_of_connections_stays_where_there_is_room() -> None:
    with isolated(0, "model"):
        own = Counted(model(12, 120), phase_epochs=2, least_quota=60.0)
    run(own, stream())
    counts = torch.tensor(own.counts)
    assert len(counts) == 10 * 4 and torch.equal(counts[:, 1], counts[:, [0, 2]].amin(1))
    assert int((counts[:, 0] > 0).sum()) > 10 and int((counts[:, 1] < counts[:, 0]).sum()) < 5


def test_absent_connections_are_zero_at_all_times(watched: Watch) -> None:
    for state in watched.phases + watched.ends:
        for mask, weight in zip(state["masks"], state["weights"], strict=True):
            assert not weight[~mask].any()


def test_what_is_frozen_never_moves(watched: Watch) -> None:
    ends = watched.ends
    for before, after in pairwise(ends):
        for number in range(4):
            frozen = before["frozen"][number]
            assert torch.equal(before["weights"][number][frozen], after["weights"][number][frozen])
            assert torch.equal(before["biases"][number][frozen], after["biases"][number][frozen])
            assert bool((after["frozen"][number] >= frozen).all())
        assert torch.equal(before["features"][:, before["frozen"][3]], after["features"][:, before["frozen"][3]])
    assert int(ends[-1]["frozen"][3].sum()) > 10


def test_exemplars_are_final_after_the_window(watched: Watch) -> None:
    ends = watched.ends
    for episode in range(1, 5):
        for label in (2 * episode - 2, 2 * episode - 1):
            (at_once, units, _), (refreshed, final, _) = ends[episode - 1]["long"][label], ends[episode]["long"][label]
            assert not torch.equal(at_once, refreshed) and torch.equal(units, final)
            for later in ends[episode + 1 :]:
                assert torch.equal(later["long"][label][0], refreshed) and torch.equal(later["long"][label][1], final)


def test_ranks_after_an_episode(watched: Watch) -> None:
    for episode, state in enumerate(watched.ends, 1):
        for ranks in state["ranks"]:
            assert set(ranks.tolist()) <= {0, *range(2, episode + 2)}


@pytest.mark.slow
def test_idle_units_are_silent_and_get_no_gradient() -> None:
    own = built()
    batch: list[Batch] = []

    class Probe:
        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            batch.append(event.batch)
            for layer, ranks, frozen, mask in zip(own.chain.layers, own.ranks, own.frozen, own.masks, strict=True):
                weight, bias = layer.module.weight.grad, layer.module.bias.grad
                assert weight is not None and bias is not None
                assert not weight[ranks == 0].any() and not bias[ranks == 0].any()
                assert not weight[frozen].any() and not bias[frozen].any()
                assert not weight[~mask].any()
            with torch.no_grad():
                features = own.features(own.chain.below(event.batch.samples.x))
            assert not features[:, own.ranks[-1] == 0].any()

    run(own, stream(3), Probe())
    assert len(batch) > 20 and any(bool(frozen.any()) for frozen in own.frozen)


def test_distances_to_old_classes_do_not_change(watched: Watch) -> None:
    def distances(state: dict[str, Any], labels: list[int]) -> Tensor:
        exemplars, units = (torch.stack([state["long"][label][part] for label in labels]) for part in (0, 1))
        unit = nn.functional.normalize(exemplars * units[:, None], dim=2)
        return distances_to_exemplars(state["features"], unit, units)

    for episode in range(2, 5):  # those of episodes up to e - 1 after episode e, and after e + 1
        old = list(range(2 * (episode - 1)))
        assert torch.equal(distances(watched.ends[episode - 1], old), distances(watched.ends[episode], old))


@pytest.mark.slow
def test_capacity_runs_out_with_one_warning_for_each_layer() -> None:
    own = built(net=model(4, 16), least_quota=95.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(own, stream())
    texts = [str(warning.message) for warning in caught if "SHARP" in str(warning.message)]
    assert len(texts) == len(own.full) == len(set(own.full)) > 1
    assert any("layer conv1 has no idle units left" in text for text in texts)
    assert float(result.task_accuracy[-1].mean()) > 0.6  # it went on


def test_events_tell_where_units_are(watched: Watch) -> None:
    phases = [event for event in watched.events if isinstance(event, PhaseStarted)]
    assert [(event.episode, event.phase) for event in phases] == [(e, p) for e in range(1, 6) for p in (1, 2)]
    for event in watched.events:
        if isinstance(event, (PhaseStarted, UnitsFrozen)):
            assert {name: sum(counts.values()) for name, counts in event.units.items()} == {
                "conv1": 12, "conv2": 12, "hidden": 120, "penultimate": 120
            }  # fmt: skip
            assert event.curves()["units/hidden/idle"] == event.units["hidden"]["idle"]
    last = [event for event in watched.events if isinstance(event, UnitsFrozen)][-1]
    ranks = watched.ends[-1]["ranks"][2]
    assert last.units["hidden"] == {
        "idle": int((ranks == 0).sum()), "learning": 0, "fine_tuning": int((ranks == 2).sum()), "frozen": int((ranks > 2).sum())
    }  # fmt: skip


@pytest.mark.slow
def test_the_tracker_draws_units_and_bytes_as_curves(store: str) -> None:
    from mlflow import MlflowClient

    from clstream.tracking import MlflowTracker

    own, tracker = built(), MlflowTracker(uri=store)
    watch = Watch(own)
    run(own, stream(3), watch, tracker)
    assert tracker.run_id is not None
    last = [event.curves() for event in watch.events if isinstance(event, UnitsFrozen)]
    points = MlflowClient(store).get_metric_history(tracker.run_id, "units/hidden/frozen")
    expected = [curves["units/hidden/frozen"] for curves in last]
    assert [(point.step, point.value) for point in points] == list(enumerate(expected, 1)) and expected[-1] > 0
    held = MlflowClient(store).get_metric_history(tracker.run_id, "memory/long_term_bytes")
    assert [point.value for point in held] == [e.long_term_bytes for e in watch.events if isinstance(e, ActivationsStored)]


@pytest.mark.slow
@pytest.mark.parametrize("early", ["pretrained", "frozen"])
def test_early_layers_may_come_pretrained(early: str) -> None:
    net = model()
    conv2 = net.stages.get_submodule("conv2")
    before = [weight.detach().clone() for weight in conv2.parameters()]
    own = built(net=net, early=early)
    assert own.masks[0].all() and own.masks[1].all() and not own.masks[2].all()
    assert all(map(torch.equal, before, conv2.parameters()))
    result = run(own, stream())
    same = all(map(torch.equal, before, conv2.parameters()))
    assert same == (early == "frozen")
    assert float(result.task_accuracy[-1].mean()) > 0.7
    assert bool((own.ranks[0] >= 100).all()) == (early == "frozen")


@pytest.mark.slow
def test_it_resumes_exactly_with_convolutions_and_a_wider_window() -> None:
    def go_on(observer: Checkpoints, state: Any = None) -> tuple[SHARP, Tensor]:
        own = built(window=2)
        return own, run(own, stream(3, epochs=2), observer, resume=state).accuracy

    whole = Checkpoints(every=7)
    own, accuracy = go_on(whole)
    for number in range(len(whole.written)):
        again, other = go_on(Checkpoints(every=0), whole.load(number))
        assert digest(again) == digest(own) and torch.equal(accuracy, other)


@pytest.mark.slow
def test_blurry_episodes() -> None:
    blurry = streams.blurry_episodes("digits", epochs=4, batch_size=64, new_class=0.6)
    own = built(net=model(12, 200), least_quota=80.0, redraw=False)
    result = run(own, blurry)
    assert own.long_term is not None and sorted(own.long_term.labels.tolist()) == list(range(10))
    newest = {label: number for number, task in enumerate(blurry.tasks, 1) for label in task.classes}
    assert dict(zip(own.long_term.labels.tolist(), own.long_term.episodes.tolist(), strict=True)) == newest
    assert result.average_accuracy > 0.6


def test_a_session_is_an_episode_also_where_boundaries_are_hidden() -> None:
    own = built()
    run(own, stream(2, boundaries=False, sessions_per_task=2, epochs=2))
    assert own.episode == 4 and own.long_term is not None and set(own.long_term.episodes.tolist()) == {2, 4}


@pytest.mark.slow
def test_it_learns_better_than_fine_tuning_on_real_digits() -> None:
    from clstream.strategies import Finetune

    ours = run(built(net=model(16, 200), least_quota=90.0), stream(epochs=8))
    with isolated(0, "model"):
        theirs = run(Finetune(model(16, 200)), stream(epochs=8))
    assert theirs.average_accuracy < 0.35
    assert ours.average_accuracy > 0.6
    assert float(ours.task_accuracy[-1].mean()) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window must be a whole number of at least 0"),
        ({"phase_epochs": 0}, "phase_epochs must be a whole number of at least 1"),
        ({"short_term": 0}, "short_term must be"),
        ({"long_term": 1.5}, "long_term must be"),
        ({"neighbours": 0}, "neighbours must be"),
        ({"sparsity": 1.0}, "sparsity must be a share, from 0 to below 1"),
        ({"least_quota": 120}, "least_quota must be a finite number from 0 to 100"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"early": "old"}, "early must be one of new, pretrained, frozen"),
        ({"cut": "conv9"}, "the cut must be one of"),
        ({"optimizer": lambda p: AdamW(p, weight_decay=0.1)}, "without weight decay"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**options)


def test_a_network_that_is_no_chain_is_refused() -> None:
    with pytest.raises(TypeError, match=r"stem\.1 is a BatchNorm2d"):
        SHARP(SlimResNet18((3, 32, 32), 10))


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: ConvNet((1, 8, 8), 10), lambda: Mlp((1, 8, 8), 10), lambda: nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
)])  # fmt: skip
def test_other_networks(make: Callable[[], nn.Module]) -> None:
    with isolated(0, "model"):
        own = SHARP(make(), phase_epochs=2, optimizer=lambda p: SGD(p, lr=0.1))
    result = run(own, stream(epochs=4))
    assert float(result.task_accuracy[-1].mean()) > 0.8
