"""SHARP: the invariants of its rules, each step of it against a slow one written out, and its memories and answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from clstream.strategies import SHARP
from clstream.strategies.sharp import ActivationsStored, PhaseStarted, UnitsFrozen
from clstream.strategies.sharp.memories import ShortTerm, dequantise, leading, quantise
from clstream.strategies.sharp.sharp import most_active, squared_distances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from clstream import Batch, BatchLearned, EpochStarted, Evaluated, Samples, Stream, on, run, streams
from clstream.checks.recorders import Checkpoints
from clstream.losses import supervised_contrastive
from clstream.models import ConvNet, Mlp, MnistLike, SlimResNet18
from clstream.seeds import isolated
from clstream.serialization.compare import digest

pytestmark = pytest.mark.filterwarnings("ignore:SHARP. after episode")


def stream(tasks: int = 5, epochs: int = 4, **options: Any) -> Stream:
    return streams.split_digits(tasks=tasks, epochs=epochs, batch_size=64, **options)


def model(channels: int = 6, hidden: int = 40) -> MnistLike:
    return MnistLike((1, 8, 8), 10, channels=channels, hidden=hidden)


def built(seed: int = 0, net: nn.Module | None = None, **options: Any) -> SHARP:
    options = {"phase_epochs": 2, "short_term": 10, "long_term": 10, "least_quota": 60.0} | options
    with isolated(seed, "model"):
        return SHARP(model() if net is None else net, **options)


class Watch:
    """An observer that keeps what SHARP was at each phase, and at the end of each episode."""

    def __init__(self, strategy: SHARP, x: Tensor | None = None) -> None:
        self.strategy, self.x = strategy, x
        self.phases: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self.events: list[PhaseStarted | UnitsFrozen | ActivationsStored] = []

    def look(self) -> dict[str, Any]:
        own = self.strategy
        found = {
            "weights": [layer.module.weight.detach().clone() for layer in own.chain.layers],
            "biases": [layer.module.bias.detach().clone() for layer in own.chain.layers],
            **{name: [each.clone() for each in getattr(own, name)] for name in ("masks", "ranks", "frozen")},
        }
        if own.long is not None:
            found["long"] = {
                int(label): (own.long.exemplars[row].clone(), own.long.units[row].clone(), int(own.long.episodes[row]))
                for row, label in enumerate(own.long.labels)
            }
        if self.x is not None:
            with torch.no_grad():
                found["features"] = own.features(own.chain.below(self.x))
        return found

    @on(PhaseStarted)
    def phase(self, event: PhaseStarted) -> None:
        self.phases.append(self.look())
        self.events.append(event)

    @on(UnitsFrozen)
    def froze(self, event: UnitsFrozen) -> None:
        self.events.append(event)

    @on(ActivationsStored)
    def stored(self, event: ActivationsStored) -> None:
        self.ends.append(self.look())
        self.events.append(event)


@pytest.fixture(scope="module")
def watched() -> Watch:
    """A run of five episodes, watched; with room for all of them, so that nothing runs out."""
    own = built(net=model(12, 120))
    watch = Watch(own, torch.cat([task.test.x for task in stream().tasks])[:50])
    run(own, stream(), watch)
    return watch


# the nine checks of the method's specification


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
    assert len(batch) > 20 and any(bool(each.any()) for each in own.frozen)


@given(st.integers(1, 4), st.integers(1, 9), st.floats(-1e3, 1e3), st.floats(0, 1e3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_quantising_loses_half_a_step_at_most(classes: int, n: int, least: float, width: float, seed: int) -> None:
    values = least + width * torch.rand(classes, n, 2, 3, generator=torch.Generator().manual_seed(seed))
    codes, low, high = quantise(values)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    off = (dequantise(codes, low, high) - values).abs().flatten(1).amax(1)
    bound = (high - low) / 510
    assert bool((off <= bound * 1.001 + 4e-7 * (abs(least) + width) + 1e-42).all())  # and the rounding of float32


@pytest.mark.parametrize("width", [1e-30, 1e-37, 3.5e-39])
def test_quantising_a_range_next_to_nothing(width: float) -> None:
    values = torch.tensor([[[0.0, 0.5 * width, width]]])
    codes, _, _ = quantise(values)
    assert codes.flatten().tolist() == [0, 128, 255]


@given(st.integers(1, 40), st.floats(1, 100), st.floats(1e-3, 1e3), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_selection_goes_with_the_units_and_not_with_their_scale(n: int, quota: float, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sums = torch.rand(n, generator=draw, dtype=torch.float64)
    order, chosen = torch.randperm(n, generator=draw), most_active(sums, quota)
    assert torch.equal(most_active(sums[order], quota), chosen[order])
    assert torch.equal(most_active(sums * 2.0 ** math.floor(math.log2(scale)), quota), chosen)
    inside, total = sums[chosen].sum().item(), sums.sum().item()
    assert inside >= quota / 100 * total - 1e-9
    assert inside - sums[chosen].min().item() < quota / 100 * total + 1e-9  # none to spare
    assert chosen.all() or sums[chosen].min() >= sums[~chosen].max()


def test_selection_takes_one_of_units_that_are_all_silent() -> None:
    assert most_active(torch.zeros(5, dtype=torch.float64), 90).sum() == 1


def test_distances_to_old_classes_do_not_change(watched: Watch) -> None:
    def distances(state: dict[str, Any], labels: list[int]) -> Tensor:
        exemplars, units = (torch.stack([state["long"][label][part] for label in labels]) for part in (0, 1))
        unit = nn.functional.normalize(exemplars * units[:, None], dim=2)
        return squared_distances(state["features"], unit, units)

    for episode in range(2, 5):  # those of episodes up to e - 1 after episode e, and after e + 1
        old = list(range(2 * (episode - 1)))
        assert torch.equal(distances(watched.ends[episode - 1], old), distances(watched.ends[episode], old))


# its steps, against slow ones


def test_quotas_are_those_of_the_authors_schedule() -> None:
    quotas = [built(least_quota=0.0).quota(phase) for phase in range(1, 16)]
    expected = [98.91, 98.91, 97.55, 95.68, 93.30, 90.45, 87.16, 83.46, 79.39, 75.00, 70.34, 65.45, 60.40, 55.23, 50.00]
    assert quotas == pytest.approx(expected, abs=0.005)
    assert built(least_quota=90.0).quota(9) == 90.0


def test_it_starts_sparse_but_for_the_first_convolution() -> None:
    own = built(net=MnistLike((1, 28, 28), 10))
    density = [float(mask.float().mean()) for mask in own.masks]
    assert density[0] == 1 and density[1] == pytest.approx(0.4, abs=0.1) and density[2:] == pytest.approx([0.4, 0.4], abs=0.01)
    for layer, mask in zip(own.chain.layers, own.masks, strict=True):
        weight = layer.module.weight.detach()
        assert weight[mask].std().item() == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=0.15)
        assert not layer.module.bias.detach().any()
    assert not any(bool(ranks.any()) for ranks in own.ranks)


def test_selection_never_changes_units_that_were_promoted() -> None:
    own = built()
    own.ranks = [torch.tensor([0, 1, 2, 3, 0, 1]), *own.ranks[1:]]
    own.select([torch.tensor([1, 2, 100, 1, 50, 3.0]), *(torch.ones(len(each)) for each in own.ranks[1:])], 95)
    assert own.ranks[0].tolist() == [0, 0, 2, 3, 1, 0]  # 150 of 157 are 95.5 %: units 2 and 4


def test_dropped_connections_grow_again_into_idle_units_at_zero() -> None:
    own = built()
    draw = torch.Generator().manual_seed(1)
    own.ranks = [torch.randint(0, 4, (len(each),), generator=draw) for each in own.ranks]
    before = [mask.clone() for mask in own.masks]
    weights = [layer.module.weight.detach().clone() for layer in own.chain.layers]
    own.rewire()
    for number, layer in enumerate(own.chain.layers):
        mask, idle = own.masks[number], own.ranks[number] == 0
        dropped = grown = 0
        for unit in range(layer.units):
            for source in range(layer.inputs):
                was, has = bool(before[number][unit, source]), bool(mask[unit, source])
                from_idle = number > 0 and int(own.ranks[number - 1][source // layer.span]) == 0
                if was and not has:
                    assert from_idle and not idle[unit]
                    dropped += 1
                elif has and not was:
                    assert idle[unit] and not layer.module.weight[unit, source].any()
                    grown += 1
                elif was and from_idle:
                    assert idle[unit], "a connection from an idle unit to another was kept"
                elif has:
                    assert torch.equal(layer.module.weight[unit, source], weights[number][unit, source])
        room = int((~before[number] & idle[:, None]).sum())
        assert grown == min(dropped, room)


def test_where_there_is_no_room_connections_are_lost() -> None:
    own = built()
    own.ranks = [torch.zeros_like(own.ranks[0]), *(torch.ones_like(each) for each in own.ranks[1:])]
    own.rewire()
    assert not own.masks[1].any()  # all came from idle units, and no unit is idle to grow into
    assert float(own.masks[2].float().mean()) == pytest.approx(0.4, abs=0.1)


def test_redrawn_units_have_the_spread_that_grows_as_they_get_fewer() -> None:
    own = built(net=Mlp(300, 10, hidden=(400, 60)))
    own.ranks[0][50:] = 2
    with torch.no_grad():
        own.redraw()
    weight, mask = own.chain.layers[0].module.weight.detach(), own.masks[0]
    assert weight[:50][mask[:50]].std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.03)
    assert not weight[~mask].any()


def dense_loss(own: SHARP, samples: Samples, past: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as the equations have it: the whole network, masked, both entries apart."""

    def through(modules: list[nn.Module], x: Tensor) -> Tensor:
        for module in modules:
            number = next((n for n, layer in enumerate(own.chain.layers) if layer.module is module), None)
            if number is None:
                x = module(x)
                continue
            mask = own.masks[number]
            weight = module.weight * mask.view(*mask.shape, *(1,) * (module.weight.dim() - 2))  # type: ignore[operator]
            x = torch.func.functional_call(module, {"weight": weight}, (x,))
        return x

    keep = torch.tensor([int((samples.y == label).sum()) > 1 for label in samples.y])
    stream_part = through(own.chain._above, through(own.chain._below, samples.x[keep]))
    joined = torch.cat([stream_part, through(own.chain._above, past)]) * (own.ranks[-1] > 0)
    return supervised_contrastive(joined, torch.cat([samples.y[keep], labels]), own.temperature)


@pytest.mark.parametrize("cut", ["conv1", "conv2", "hidden"])
def test_a_step_is_that_of_the_whole_masked_network(cut: str) -> None:
    own = built(cut=cut)
    run(own, stream(2))
    own.ranks[-1][own.ranks[-1] == 0] = torch.randint(0, 2, (int((own.ranks[-1] == 0).sum()),))
    own.rewire()
    own.silence()
    samples = stream().tasks[2].train[:20] + stream().tasks[3].train[:1]  # the last one is alone with its class
    assert own.short is not None
    drawn = own.random.get_state()
    loss = own.loss(samples)
    own.random.set_state(drawn)
    own.replayed = None
    past, labels = own.draw(own.short, len(samples), own.chain.path([torch.arange(each.units) for each in own.chain.layers]))
    own.replayed = None
    expected = dense_loss(own, samples, past, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(each, list(own.chain.parameters())) for each in (loss, expected))
    present = [each for mask in own.masks for each in (mask, torch.ones(len(mask), dtype=torch.bool))]
    for one, two, mask in zip(ours, theirs, present, strict=True):  # what absent weights get, `silence` takes away
        assert torch.allclose(one[mask], two[mask], atol=2e-5)


def test_draws_are_even_over_classes_and_without_repeats_where_there_are_enough() -> None:
    own = built()
    values = torch.rand(3, 8, 5)
    short = ShortTerm(torch.tensor([7, 2, 4]), torch.ones(3), torch.tensor([8, 3, 8]), *quantise(values))
    own.replayed = torch.arange(24.0)[:, None]
    path = own.chain.path([torch.arange(each.units) for each in own.chain.layers])
    for n, repeats in ((17, False), (60, True)):
        rows, labels = own.draw(short, n, path)
        assert len(rows) == len(labels) == n
        count = [int((labels == label).sum()) for label in (7, 2, 4)]
        assert count == [n // 3 + (place < n % 3) for place in range(3)]
        for place, label in enumerate((7, 2, 4)):
            mine = rows[labels == label].flatten().long() - 8 * place
            assert int(mine.min()) >= 0 and int(mine.max()) < short.count[place]
            assert repeats or place == 1 or len(mine.unique()) == len(mine)
    drawn = torch.cat([own.draw(short, 30, path)[0] for _ in range(200)]).flatten().long()
    counts = torch.bincount(drawn, minlength=24)
    assert counts[11:16].sum() == 0 and int(counts[8:11].min()) > 550  # a third of 2,000 each
    assert int(counts[:8].min()) > 180 and int(counts[:8].max()) < 320


def test_the_first_samples_of_each_class_are_kept() -> None:
    y = torch.tensor([3, 1, 3, 3, 1, 5])
    labels, rows, count = leading(y, torch.tensor([5, 4, 3, 2, 1, 0]), 2)
    assert labels.tolist() == [1, 3, 5] and rows.tolist() == [[4, 1], [3, 2], [5, 5]] and count.tolist() == [2, 2, 1]


def slow_answer(own: SHARP, x: Tensor, classes: tuple[int, ...]) -> list[int]:
    """Return the k-nearest-neighbour answer of each sample as its rule reads, in float64."""
    assert own.long is not None
    with torch.no_grad():
        features = own.features(own.chain.below(x)).double()
    answers = []
    for h in features:
        found = []
        for row, label in enumerate(own.long.labels.tolist()):
            if label in classes:
                units = own.long.units[row].double()
                for e in own.long.exemplars[row][: int(own.long.count[row])].double():
                    a, b = h * units, e * units
                    a, b = a / a.norm().clamp(min=1e-12), b / b.norm().clamp(min=1e-12)
                    found.append(((a - b).norm().item(), label))
        found.sort()
        near = [label for _, label in found[: own.neighbours]]
        most = max(near.count(label) for label in near)
        tied = {label for label in near if near.count(label) == most}
        answers.append(next(label for _, label in found if label in tied))
    return answers


def test_answers_are_the_votes_of_the_nearest_exemplars() -> None:
    own, digits = built(neighbours=4), stream()
    run(own, digits)
    x = torch.cat([task.test.x[:12] for task in digits.tasks])
    assert own.predict(x).tolist() == slow_answer(own, x, tuple(range(10)))
    for task in digits.tasks:
        assert own.predict(x, task).tolist() == slow_answer(own, x, task.classes)


def test_scores_hold_few_distances_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, digits = built(), stream()
    run(own, digits)
    x = torch.cat([task.test.x for task in digits.tasks])
    whole = own.scores(x)
    monkeypatch.setattr("clstream.strategies.sharp.sharp.COMPARED", 1000)
    assert torch.allclose(own.scores(x), whole, atol=1e-5)


def test_unknown_classes_score_below_all_others() -> None:
    own, digits = built(), stream()
    run(own, digits, max_sessions=2)
    scores = own.scores(digits.tasks[0].test.x)
    assert bool((scores[:, 4:] == -1).all()) and bool((scores[:, :4] >= 0).all())
    assert bool((scores[:, :4].floor().sum(1) == own.neighbours).all())
    assert set(own.predict(digits.tasks[3].test.x, digits.tasks[3]).tolist()) <= set(digits.tasks[3].classes)


# memories


@pytest.mark.parametrize("window", [0, 1, 3])
def test_short_term_memory_holds_the_window(window: int) -> None:
    own = built(window=window)
    held: list[list[int]] = []

    class Look:
        @on(Evaluated)
        def look(self, event: Evaluated) -> None:
            held.append([] if own.short is None else sorted(own.short.labels.tolist()))

    run(own, stream(), Look())
    assert held == [list(range(max(0, 2 * (episode - window)), 2 * episode)) for episode in range(1, 6)]
    for layer, ranks, frozen in zip(own.chain.layers, own.ranks, own.frozen, strict=True):
        assert torch.equal(frozen, ranks > (1 if layer.early else window + 1))


def test_a_wider_window_refreshes_exemplars_longer() -> None:
    own = built(net=model(12, 120), window=2)
    watch = Watch(own)
    run(own, stream(), watch)
    for label in (0, 1):
        rows = [state["long"][label][0] for state in watch.ends]
        assert not torch.equal(rows[1], rows[2]) and torch.equal(rows[2], rows[3]) and torch.equal(rows[3], rows[4])
        assert all(torch.equal(state["long"][label][1], watch.ends[0]["long"][label][1]) for state in watch.ends)


def test_stored_activations_are_those_at_the_cut_in_fixed_order() -> None:
    own, digits = built(redraw=False), stream(2)
    run(own, digits, max_sessions=1)
    assert own.short is not None and own.short.codes.dtype == torch.uint8
    samples = digits.session(0).samples[own.order]
    for row, label in enumerate(own.short.labels.tolist()):
        with torch.no_grad():
            activations = own.chain.below(samples.x[samples.y == label][:10])
        step = (own.short.greatest[row] - own.short.least[row]) / 255
        assert float((activations - own.short.activations()[row]).abs().max()) <= 0.51 * float(step)


def test_a_class_with_few_samples_is_stored_as_it_is() -> None:
    own = built(short_term=500, long_term=400)
    result = run(own, stream(2))
    assert own.long is not None and own.short is not None
    count = own.long.count.tolist()
    assert max(count[:5]) < 150 and count[5:] == [400] * 5  # older classes: drawn from what is stored, with repeats
    assert own.short.codes.shape[1] == 500 and int(own.short.count.max()) < 200
    assert result.average_accuracy > 0.7


def test_bytes_are_counted() -> None:
    own = built()
    watch = Watch(own)
    run(own, stream(2), watch)
    last = [event for event in watch.events if isinstance(event, ActivationsStored)][-1]
    assert own.short is not None and own.long is not None
    codes, exemplars = own.short.codes.numel(), 4 * own.long.exemplars.numel()
    assert codes < last.short_term_bytes < codes + 300
    assert exemplars < last.long_term_bytes < exemplars + 10 * (40 + 50)


# the run around it


def test_a_fresh_optimizer_each_phase() -> None:
    own = built()
    steps: list[float] = []

    class Look:
        @on(EpochStarted)
        def look(self, event: EpochStarted) -> None:
            states = [float(state["step"]) for state in own.optimizer.state.values()]
            steps.append(max(states, default=0.0))

    run(own, stream(2, epochs=4), Look())
    per_epoch = -(-len(stream(2).tasks[0].train) // 64)
    assert steps[:4] == [0, per_epoch, 0, per_epoch]


def test_capacity_runs_out_with_one_warning_for_each_layer() -> None:
    own = built(net=model(4, 16), least_quota=95.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(own, stream())
    said = [str(each.message) for each in caught if "SHARP" in str(each.message)]
    assert len(said) == len(own.full) == len(set(own.full)) > 1
    assert any("layer conv1 has no idle units left" in text for text in said)
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


@pytest.mark.parametrize("early", ["pretrained", "frozen"])
def test_early_layers_may_come_pretrained(early: str) -> None:
    net = model()
    before = [each.detach().clone() for each in net.stages.get_submodule("conv2").parameters()]
    own = built(net=net, early=early)
    assert own.masks[0].all() and own.masks[1].all() and not own.masks[2].all()
    assert all(torch.equal(one, two) for one, two in zip(before, net.stages.get_submodule("conv2").parameters(), strict=True))
    result = run(own, stream())
    same = all(torch.equal(one, two) for one, two in zip(before, net.stages.get_submodule("conv2").parameters(), strict=True))
    assert same == (early == "frozen")
    assert float(result.task_accuracy[-1].mean()) > 0.7
    assert bool((own.ranks[0] >= 100).all()) == (early == "frozen")


def test_it_resumes_exactly_with_convolutions_and_a_wider_window() -> None:
    def go_on(observer: Checkpoints, state: Any = None) -> tuple[SHARP, Tensor]:
        own = built(window=2)
        return own, run(own, stream(3, epochs=2), observer, resume=state).accuracy

    whole = Checkpoints()
    own, accuracy = go_on(whole)
    for number in range(0, len(whole.written), 7):
        again, other = go_on(Checkpoints(every=False), whole.load(number))
        assert digest(again) == digest(own) and torch.equal(accuracy, other)


def test_blurry_episodes() -> None:
    blurry = streams.blurry_episodes("digits", epochs=4, batch_size=64, new_class=0.6)
    own = built(net=model(12, 200), least_quota=80.0, redraw=False)
    result = run(own, blurry)
    assert own.long is not None and sorted(own.long.labels.tolist()) == list(range(10))
    newest = {label: number for number, task in enumerate(blurry.tasks, 1) for label in task.classes}
    assert dict(zip(own.long.labels.tolist(), own.long.episodes.tolist(), strict=True)) == newest
    assert result.average_accuracy > 0.6


def test_a_session_is_an_episode_also_where_boundaries_are_hidden() -> None:
    own = built()
    run(own, stream(2, boundaries=False, sessions_per_task=2, epochs=2))
    assert own.episode == 4 and own.long is not None and set(own.long.episodes.tolist()) == {2, 4}


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
        ({"sparsity": 1.0}, "sparsity is the share"),
        ({"least_quota": 120}, "least_quota must be a finite number from 0 to 100"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"early": "old"}, "early must be new, pretrained or frozen"),
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


@pytest.mark.parametrize("make", [lambda: ConvNet((1, 8, 8), 10), lambda: Mlp((1, 8, 8), 10), lambda: nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
)])  # fmt: skip
def test_other_networks(make: Callable[[], nn.Module]) -> None:
    with isolated(0, "model"):
        own = SHARP(make(), phase_epochs=2, optimizer=lambda p: SGD(p, lr=0.1))
    result = run(own, stream(epochs=4))
    assert float(result.task_accuracy[-1].mean()) > 0.8
