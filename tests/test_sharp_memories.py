"""SHARP's memories and its answers from them, against slow ones written out."""

from __future__ import annotations

import pytest
import torch
from clstream.strategies import SHARP
from clstream.strategies.sharp import ActivationsStored
from clstream.strategies.sharp.memories import ShortTerm, dequantise, leading, quantise
from hypothesis import given, settings
from hypothesis import strategies as st
from sharp_runs import Watch, built, model, stream
from torch import Tensor

from clstream import Evaluated, on, run

pytestmark = pytest.mark.filterwarnings("ignore:SHARP. after episode")


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


def test_draws_are_even_over_classes_and_without_repeats_where_there_are_enough() -> None:
    own = built()
    values = torch.rand(3, 8, 5)
    short = ShortTerm(torch.tensor([7, 2, 4]), torch.ones(3), torch.tensor([8, 3, 8]), *quantise(values))
    own.replayed = torch.arange(24.0)[:, None]
    path = own.chain.path([torch.arange(layer.units) for layer in own.chain.layers])
    for n, repeats in ((17, False), (60, True)):
        rows, labels = own.draw_activations(short, n, path)
        assert len(rows) == len(labels) == n
        count = [int((labels == label).sum()) for label in (7, 2, 4)]
        assert count == [n // 3 + (place < n % 3) for place in range(3)]
        for place, label in enumerate((7, 2, 4)):
            mine = rows[labels == label].flatten().long() - 8 * place
            assert int(mine.min()) >= 0 and int(mine.max()) < short.count[place]
            assert repeats or place == 1 or len(mine.unique()) == len(mine)
    drawn = torch.cat([own.draw_activations(short, 30, path)[0] for _ in range(200)]).flatten().long()
    counts = torch.bincount(drawn, minlength=24)
    assert counts[11:16].sum() == 0 and int(counts[8:11].min()) > 550  # a third of 2,000 each
    assert int(counts[:8].min()) > 180 and int(counts[:8].max()) < 320


def test_the_first_samples_of_each_class_are_kept() -> None:
    y = torch.tensor([3, 1, 3, 3, 1, 5])
    labels, rows, count = leading(y, torch.tensor([5, 4, 3, 2, 1, 0]), 2)
    assert labels.tolist() == [1, 3, 5] and rows.tolist() == [[4, 1], [3, 2], [5, 5]] and count.tolist() == [2, 2, 1]


def slow_answer(own: SHARP, x: Tensor, classes: tuple[int, ...]) -> list[int]:
    """Return the k-nearest-neighbour answer of each sample as its rule reads, in float64."""
    assert own.long_term is not None
    with torch.no_grad():
        features = own.features(own.chain.below(x)).double()
    answers = []
    for h in features:
        neighbours = []
        for row, label in enumerate(own.long_term.labels.tolist()):
            if label in classes:
                units = own.long_term.units[row].double()
                for e in own.long_term.exemplars[row][: int(own.long_term.count[row])].double():
                    a, b = h * units, e * units
                    a, b = a / a.norm().clamp(min=1e-12), b / b.norm().clamp(min=1e-12)
                    neighbours.append(((a - b).norm().item(), label))
        neighbours.sort()
        near = [label for _, label in neighbours[: own.neighbours]]
        most = max(near.count(label) for label in near)
        tied = {label for label in near if near.count(label) == most}
        answers.append(next(label for _, label in neighbours if label in tied))
    return answers


@pytest.mark.slow
def test_answers_are_the_votes_of_the_nearest_exemplars() -> None:
    own, digits = built(neighbours=4), stream()
    run(own, digits)
    x = torch.cat([task.test.x[:12] for task in digits.tasks])
    assert own.predict(x).tolist() == slow_answer(own, x, tuple(range(10)))
    for task in digits.tasks:
        assert own.predict(x, task).tolist() == slow_answer(own, x, task.classes)


@pytest.mark.slow
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
@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 1, 3])
def test_short_term_memory_holds_the_window(window: int) -> None:
    own = built(window=window)
    held: list[list[int]] = []

    class Look:
        @on(Evaluated)
        def look(self, event: Evaluated) -> None:
            held.append([] if own.short_term is None else sorted(own.short_term.labels.tolist()))

    run(own, stream(), Look())
    assert held == [list(range(max(0, 2 * (episode - window)), 2 * episode)) for episode in range(1, 6)]
    for layer, ranks, frozen in zip(own.chain.layers, own.ranks, own.frozen, strict=True):
        assert torch.equal(frozen, ranks > (1 if layer.early else window + 1))


@pytest.mark.slow
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
    assert own.short_term is not None and own.short_term.codes.dtype == torch.uint8
    samples = digits.session(0).samples[own.order]
    for row, label in enumerate(own.short_term.labels.tolist()):
        with torch.no_grad():
            activations = own.chain.below(samples.x[samples.y == label][:10])
        step = (own.short_term.greatest[row] - own.short_term.least[row]) / 255
        assert float((activations - own.short_term.activations()[row]).abs().max()) <= 0.51 * float(step)


@pytest.mark.slow
def test_a_class_with_few_samples_is_stored_as_it_is() -> None:
    own = built(short_term=500, long_term=400)
    result = run(own, stream(2))
    assert own.long_term is not None and own.short_term is not None
    count = own.long_term.count.tolist()
    assert max(count[:5]) < 150 and count[5:] == [400] * 5  # older classes: drawn from what is stored, with repeats
    assert own.short_term.codes.shape[1] == 500 and int(own.short_term.count.max()) < 200
    assert result.average_accuracy > 0.7


def test_bytes_are_counted() -> None:
    own = built()
    watch = Watch(own)
    run(own, stream(2), watch)
    last = [event for event in watch.events if isinstance(event, ActivationsStored)][-1]
    assert own.short_term is not None and own.long_term is not None
    codes, exemplars = own.short_term.codes.numel(), 4 * own.long_term.exemplars.numel()
    assert codes < last.short_term_bytes < codes + 300
    assert exemplars < last.long_term_bytes < exemplars + 10 * (40 + 50)
