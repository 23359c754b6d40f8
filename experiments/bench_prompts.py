"""What a step of prompts takes: `python experiments/bench_prompts.py [--turns 5] [--batch 32] [--bytes]`.

Each strategy learns two tasks of random images on a small vision transformer, and so does a loop that is written by hand for this
transformer alone: the same passes, prompts, losses and steps of Adam. Printed are seconds of the CPU, the median of the ratios of
turns, and the least and the greatest of them. Turns of both sides follow each other, after one that isn't counted.

With `--bytes`, in place of that: what a strategy holds after each of ten tasks, beside what the prompts of a task are, and the
peak of memory that a step of the last task takes above one of the first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from time import process_time
from typing import Any

import torch
from clstream.strategies import L2P, CODAPrompt, DualPrompt
from clstream.streams import from_tensors
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from clstream import BatchLearned, Strategy, Stream, on, run
from clstream.models import VitTiny
from clstream.seeds import isolated

STRATEGIES = {"L2P": L2P, "DualPrompt": DualPrompt, "CODAPrompt": CODAPrompt}
RATE = 0.001
CLASSES = 20


def images(tasks: int, batches: int, batch: int) -> Stream:
    """Return random images of the size of MNIST's, as many batches in each task, and hardly any to test on."""
    y = torch.arange(CLASSES).repeat_interleave(tasks * batches * batch // CLASSES + 1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (len(y), 1, 28, 28), dtype=torch.uint8, generator=draw)
    return from_tensors(x, y, x[:: len(y) // CLASSES], y[:: len(y) // CLASSES], tasks=tasks, batch_size=batch, name="random")


def network() -> VitTiny:
    """Return the transformer: 17 tokens, 64 wide, 6 blocks."""
    with isolated(0, "model"):
        return VitTiny((1, 28, 28), CLASSES, patch=7, width=64, depth=6, fused=True)


def through(layer: Any, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None) -> Tensor:
    """Return tokens after a block, by hand; keys and values are (n, p, width)."""
    q, k, v = layer.attention.qkv(layer.norm1(x)).chunk(3, 2)
    if keys is not None and values is not None:
        k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    q, k, v = (part.unflatten(2, (layer.attention.heads, -1)).transpose(1, 2) for part in (q, k, v))
    x = x + layer.attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    mixed: Tensor = x + layer.mlp(layer.norm2(x))
    return mixed


Prompted = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From tokens and queries to features and what is added to the loss."""


def by_hand(name: str, stream: Stream) -> None:
    """Learn a stream."""
    net: Any = network().eval().requires_grad_(False)
    net.head.requires_grad_(True)
    blocks = [getattr(net.stages, f"block{number}") for number in range(1, 7)]
    past: list[list[Tensor]] = []
    for task in stream.tasks:
        prompts, prompted = {"L2P": l2p, "DualPrompt": dualprompt, "CODAPrompt": coda_prompt}[name](net, blocks, past)
        optimizer = Adam([*prompts, *net.head.parameters()], lr=RATE)
        other = torch.ones(CLASSES, dtype=torch.bool)
        other[list(task.classes)] = False
        samples = task.train[:]
        for rows in torch.randperm(len(samples)).split(stream.batch_size):
            x, y = samples.x[rows], samples.y[rows]
            with torch.no_grad():
                tokens = query = net.stages.patches(net.stages.input(x))
                for block in blocks:
                    query = through(block, query)
                query = net.stages.norm(query)
            features, penalty = prompted(tokens, query)
            loss = F.cross_entropy(net.head(features).masked_fill(other, float("-inf")), y) + penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        past.append([prompt.detach() for prompt in prompts])


def l2p(net: Any, blocks: list[Any], past: list[list[Tensor]]) -> tuple[list[Tensor], Prompted]:
    """Return the prompts of L2P, those of the last task if there was one, and what they do."""
    pool, keys = (
        part.requires_grad_() for part in (past[-1] if past else [0.01 * torch.rand(10, 10, 64), 0.01 * torch.rand(10, 64)])
    )

    def prompted(tokens: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = (F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T).topk(4, 1)
        x = torch.cat([pool[indices].flatten(1, 2), tokens], 1)
        for block in blocks:
            x = through(block, x)
        norm = net.stages.norm
        x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return x[:, :40].mean(1), -values.sum(1).mean()

    return [pool, keys], prompted


def dualprompt(net: Any, blocks: list[Any], past: list[list[Tensor]]) -> tuple[list[Tensor], Prompted]:
    """Return the prompts of DualPrompt, of which only the key is new in a new task, and what they do."""
    g, e = (part.requires_grad_() for part in (past[-1][:2] if past else [0.01 * torch.rand(n, 2, 5, 64) for n in (2, 3)]))
    key = (0.01 * torch.rand(64)).requires_grad_()

    def prompted(tokens: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        x = tokens
        for block, prompt in zip(blocks, [*g, *e, None], strict=True):
            x = through(block, x, *(() if prompt is None else prompt[:, None].expand(-1, len(x), -1, -1)))
        return net.stages.norm(x), -F.cosine_similarity(query, key[None]).mean()

    return [g, e, key], prompted


def coda_prompt(net: Any, blocks: list[Any], past: list[list[Tensor]]) -> tuple[list[Tensor], Prompted]:
    """Return new components of CODA-Prompt, and what they do with the past ones."""
    keys, attention = (F.normalize(torch.randn(5, 10, 64), dim=2).requires_grad_() for _ in range(2))
    prompts = (torch.randn(5, 10, 2, 4, 64) / 512**0.5).requires_grad_()
    old = [torch.cat(parts, 1) for parts in zip(*past, strict=True)] if past else []

    def weighted(query: Tensor, k: Tensor, a: Tensor, p: Tensor) -> Tensor:
        cosines = torch.einsum("nd,bmd->bnm", query, a * F.normalize(k, dim=2))
        cosines = cosines / torch.einsum("nd,bmd->bnm", query.square(), a.square()).clamp(min=1e-24).sqrt()
        sums: Tensor = (cosines @ p.flatten(2)).unflatten(2, (2, 4, 64)).transpose(1, 2)
        return sums

    def prompted(tokens: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        sums = weighted(query, keys, attention, prompts)
        if old:
            sums = sums + weighted(query, *old)
        x = tokens
        for block, prompt in zip(blocks, [*sums, None], strict=True):
            x = through(block, x, *(() if prompt is None else prompt))
        penalty = torch.zeros(())
        for number, part in enumerate((keys, attention, prompts)):
            new = part.flatten(2)
            rows = [new, old[number].flatten(2)] if old else [new]
            squares = sum((group @ group.mT - torch.eye(group.shape[1])).square().sum() for group in rows)
            if old:
                squares = squares + 2 * (new @ rows[1].mT).square().sum()
            penalty = penalty + squares / sum(group.shape[1] for group in rows) ** 2
        return net.stages.norm(x), 0.1 * penalty

    return [keys, attention, prompts], prompted


def built(name: str) -> Strategy:
    """Return a fresh strategy."""
    with isolated(0, "strategy"):
        strategy: Strategy = STRATEGIES[name](network(), partial(Adam, lr=RATE))
    return strategy


def seconds(call: Callable[[], object]) -> float:
    """Return what a call takes of the CPU."""
    begin = process_time()
    call()
    return process_time() - begin


def step_bytes(strategy: Strategy, stream: Stream) -> list[int]:
    """Return what autograd keeps for the backward pass of a step of each task, weights left out, as the tensors' bytes."""
    kept: list[int] = []

    class Looks:
        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            if event.batch.index:
                return
            sizes: dict[int, int] = {}
            weights = {weight.untyped_storage().data_ptr() for weight in strategy.model.parameters()}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                strategy.loss(event.batch.samples)
            kept.append(sum(sizes.values()))

    run(strategy, stream, Looks())
    return kept


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50, help="of each of the two tasks")
    parser.add_argument("--bytes", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in STRATEGIES:
        if options.bytes:
            stream = images(10, 2, options.batch)
            held = run(built(name), stream).cost.memory_bytes
            kept = step_bytes(built(name), stream)
            print(f"{name}: {held.tolist()} bytes held after each task; for a backward pass {kept}", flush=True)
            continue
        stream = images(2, options.steps, options.batch)
        sides = (lambda: run(built(name), stream), lambda: by_hand(name, stream))  # noqa: B023  # called in this turn of the loop
        turns = [[seconds(side) for side in sides] for _ in range(options.turns + 1)][1:]
        ratios = [ours / hand for ours, hand in turns]
        step = statistics.median(ours for ours, _ in turns) / (2 * options.steps)
        print(
            f"{name}, batch {options.batch}: {1000 * step:.2f} ms a step, {statistics.median(ratios):.3f} of by hand "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
