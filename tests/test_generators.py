"""Generators of weights: the published counts, what a chunk is made from, and distances between weights that are not made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies.hypernetwork.generators import LstmGenerator, MlpGenerator, Target, squared_distance
from torch import nn
from torch.nn import functional as F

from clstream.models import Mlp


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("inputs", "widths", "outputs", "weights", "tasks", "hidden", "sizes", "chunk", "chunks", "total"),
    [
        (784, (400, 400), 10, 478_410, 5, (10, 10), (96, 96), 42_000, 12, 465_672),
        (1024, (1000, 1000), 100, 2_126_100, 10, (25, 25), (24, 8), 78_000, 28, 2_029_939),
        (1024, (1000, 1000), 1000, 3_027_000, 100, (200, 250, 350), (128, 12), 7_500, 404, 2_816_448),
        (None, (), 0, 1_276_508, 6, (100, 150, 200), (48, 80), 5_500, 233, 1_182_678),
        (None, (), 0, 468_540, 6, (), (32, 32), 7_000, 67, 457_336),
        (784, (100, 100), 10, 89_610, 5, (10, 10, 10, 10), (32, 32), 8_000, 12, 89_524),
    ],
    ids=["split MNIST", "permuted MNIST, 10", "permuted MNIST, 100", "Zenke's network", "ResNet-32", "split MNIST, 100-100"],
)
def test_counts_are_those_of_the_published_settings(
    inputs: int | None,
    widths: tuple[int, ...],
    outputs: int,
    weights: int,
    tasks: int,
    hidden: tuple[int, ...],
    sizes: tuple[int, int],
    chunk: int,
    chunks: int,
    total: int,
) -> None:
    if inputs is not None:
        assert Target(Mlp(inputs, outputs, hidden=widths)).size == weights
    generator = MlpGenerator(weights, chunk, *sizes, hidden=hidden)
    assert generator.n_chunks == chunks
    assert count(generator) + tasks * sizes[0] == total


@pytest.mark.parametrize(("hidden", "chunk", "total"), [(96, 7000, 741_208), (96, 4000, 450_208), (64, 7000, 488_280)])
def test_counts_of_the_lstm(hidden: int, chunk: int, total: int) -> None:
    generator = LstmGenerator(468_540, chunk, 32, 32, hidden=hidden)
    assert count(generator) - generator.n_chunks * 32 == total
    assert sum(weight.numel() for weight in generator.recurrent().values()) == 4 * (hidden * hidden + hidden)


def changed(generator: MlpGenerator | LstmGenerator, number: int) -> list[int]:
    """Return the chunks that are made otherwise if the embedding of one is another."""
    embedding = torch.randn(1, 3)
    with torch.no_grad():
        before = generator(embedding)[0].split(generator.chunk)
        generator.chunks[number] += 1.0
        after = generator(embedding)[0].split(generator.chunk)
    return [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if not torch.equal(old, new)]


def test_what_a_chunk_depends_on() -> None:
    torch.manual_seed(0)
    mlp = MlpGenerator(95, 20, 3, 2, hidden=(32,), activation="tanh")
    assert [changed(mlp, number) for number in range(5)] == [[0], [1], [2], [3], [4]]
    lstm = LstmGenerator(95, 20, 3, 2, hidden=6)
    assert [changed(lstm, number) for number in range(5)] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]


def test_the_mlp_by_hand() -> None:
    generator = MlpGenerator(95, 20, 3, 2, hidden=(6,), activation="elu")
    first, last = generator.hidden[0], generator.output
    e = torch.randn(3)
    parts = [
        last.weight @ F.elu(first.weight @ torch.cat([e, generator.chunks[place]]) + first.bias) + last.bias for place in range(5)
    ]
    assert torch.allclose(generator(e[None])[0], torch.cat(parts)[:95], atol=1e-6)


def test_the_lstm_by_hand() -> None:
    generator = LstmGenerator(95, 20, 3, 2, hidden=6)
    e, h, c, parts = torch.randn(3), torch.zeros(6), torch.zeros(6), []
    for place in range(5):
        x = torch.cat([e, generator.chunks[place]])
        gates = generator.weight_ih @ x + generator.bias_ih + generator.weight_hh @ h + generator.bias_hh
        i, f, g, o = gates.split(6)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        parts.append(generator.output.weight @ h + generator.output.bias)
    assert torch.allclose(generator(e[None])[0], torch.cat(parts)[:95], atol=1e-6)


@pytest.mark.parametrize("kind", [partial(MlpGenerator, hidden=(7,)), partial(LstmGenerator, hidden=7)])
def test_tasks_are_made_together_as_each_by_itself(kind: Any) -> None:
    generator = kind(95, 20, 3, 2)
    embeddings, chunks = torch.randn(4, 3), torch.randn(4, 5, 2)
    for own in (None, chunks):
        together = generator(embeddings, own)
        assert together.shape == (4, 95)
        for number in range(4):
            alone = generator(embeddings[number : number + 1], None if own is None else own[number : number + 1])
            assert torch.allclose(together[number], alone[0], atol=1e-6)
    single = kind(95, 1000, 3, 2)  # a chunk larger than the network
    assert single.n_chunks == 1 and single(embeddings).shape == (4, 95)


@pytest.mark.parametrize("size", [81, 95, 100])
@pytest.mark.parametrize("far", [1.0, 1e-5])
def test_distances_without_making_weights(size: int, far: float) -> None:
    """Between weights that are far from each other, and between some that are nearly the same, where roundings would show."""
    torch.manual_seed(0)
    states, weight, bias = torch.randn(3, 5, 6), torch.randn(20, 6), torch.randn(20)
    old = states, weight, bias
    new = tuple(factor + far * torch.randn_like(factor) for factor in old)
    ours, theirs = (F.linear(*(factor.double() for factor in factors)).flatten(1)[:, :size] for factors in (new, old))
    expected = (ours - theirs).square().sum().item()
    assert squared_distance(new, old, size).item() == pytest.approx(expected, rel=1e-4 if far == 1.0 else 0.02)


def test_initial_weights() -> None:
    """Xavier's uniform in all matrices, the output's too, biases of zero, normal embeddings: what the target's weights rest on."""
    torch.manual_seed(0)
    generator = MlpGenerator(478_410, 42_000, 96, 96)
    bound = (6 / (10 + 42_000)) ** 0.5
    assert generator.output.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert not any(bool(layer.bias.any()) for layer in generator.modules() if isinstance(layer, nn.Linear))
    assert MlpGenerator(478_410, 420, 96, 96, chunk_std=0.1).chunks.std().item() == pytest.approx(0.1, rel=0.02)
    spreads = [MlpGenerator(478_410, 42_000, 96, 96)(torch.randn(1, 96)).std().item() for _ in range(20)]
    assert sum(spreads) / 20 == pytest.approx(0.015, rel=0.3)
