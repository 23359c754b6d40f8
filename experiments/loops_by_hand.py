"""Five methods as a careful user writes them, without a framework: clstream is held against them in `experiments/bench_methods.py`.

Each is one function with the whole method in it, over inputs that were made floats beforehand. They do the same arithmetic as
clstream's strategies of that name: the same draws, losses and steps, and an evaluation of all tasks before the first and after
each. Given the seeds that a run derives, they end in the weights that it ends in.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from clstream import Stream
from clstream.seeds import derive


class Data(NamedTuple):
    """All samples of a stream: float inputs as the network takes them, labels, and of each task its rows and its order's seed."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    tasks: list[Tensor]
    tests: list[Tensor]
    seeds: list[int]
    batch: int


class Spent(NamedTuple):
    """Seconds by part, and the average accuracy in the end."""

    learning: float
    consolidating: float
    evaluating: float
    accuracy: float


def data_of(stream: Stream, seed: int = 0) -> Data:
    """Return a stream's samples, the rows of each task, and what seeds its order in a run with some seed."""
    train, test = ([getattr(task, part)[:] for task in stream.tasks] for part in ("train", "test"))
    x, x_test = (torch.cat([part.x for part in parts]).float() / 255 for parts in (train, test))
    y, y_test = (torch.cat([part.y for part in parts]) for parts in (train, test))
    rows, tests = (torch.arange(sum(map(len, parts))).split([len(part) for part in parts]) for parts in (train, test))
    seeds = [derive(stream.reseeded(seed).seed, task, 0) for task in range(len(stream.tasks))]
    return Data(x, y, x_test, y_test, [*rows], [*tests], seeds, stream.batch_size)


class Reservoir:
    """A uniform sample of all rows so far, with its fields side by side."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seen, self.fields = capacity, 0, list[Tensor]()
        self.random = torch.Generator().manual_seed(seed)

    def add(self, *rows: Tensor) -> None:
        """Offer rows."""
        if not self.fields:
            self.fields = [row.new_zeros(self.capacity, *row.shape[1:]) for row in rows]
        order = torch.arange(self.seen, self.seen + len(rows[0]))
        drawn = (torch.rand(len(order), generator=self.random, dtype=torch.float64) * (order + 1)).long()
        slot = torch.where(order < self.capacity, order, drawn)
        kept = (slot < self.capacity).nonzero()[:, 0]
        for field, row in zip(self.fields, rows, strict=True):
            field[slot[kept]] = row[kept]
        self.seen += len(order)

    def sample(self, n: int, repeats: bool = True) -> list[Tensor]:
        """Draw rows."""
        size = min(self.seen, self.capacity)
        random = self.random
        drawn = torch.randint(size, (n,), generator=random) if repeats else torch.randperm(size, generator=random)[:n]
        drawn = drawn.to(self.fields[0].device)
        return [field.index_select(0, drawn) for field in self.fields]


def accuracy_of(net: nn.Module, data: Data) -> list[float]:
    """Return the accuracy on each task's test samples."""
    net.eval()
    with torch.inference_mode():
        row = [
            float((torch.cat([net(data.x_test[part]) for part in rows.split(1024)]).argmax(1) == data.y_test[rows]).float().mean())
            for rows in data.tests
        ]
    net.train()
    return row


def time_on(device: torch.device) -> float:
    """Return the time, once a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def play(net: nn.Module, data: Data, lr: float, loss: Callable[[Tensor, Tensor], Tensor], after: Callable[..., None],
         task_ends: Callable[[Tensor, Tensor], None]) -> Spent:  # fmt: skip
    """Learn task after task by SGD; `after` sees each batch that was learned, `task_ends` each task."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    now = partial(time_on, data.x.device)
    begin = now()
    row = accuracy_of(net, data)  # as it starts
    spent = [0.0, 0.0, now() - begin]
    for rows, seed in zip(data.tasks, data.seeds, strict=True):
        begin = now()
        x, y = data.x[rows], data.y[rows]
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
        for index in order.split(data.batch):
            batch_x, batch_y = x.index_select(0, index), y.index_select(0, index)
            optimizer.zero_grad()
            loss(batch_x, batch_y).backward()
            optimizer.step()
            after(batch_x, batch_y)
        learned = now()
        task_ends(x, y)
        consolidated = now()
        row = accuracy_of(net, data)
        for part, seconds in enumerate((learned - begin, consolidated - learned, now() - consolidated)):
            spent[part] += seconds
    return Spent(spent[0], spent[1], spent[2], sum(row) / len(row))


def nothing(*_: Tensor) -> None:
    """Do nothing."""


def finetune(net: nn.Module, data: Data, lr: float) -> Spent:
    """Fine-tuning."""
    return play(net, data, lr, lambda x, y: F.cross_entropy(net(x), y), nothing, nothing)


def replay(net: nn.Module, data: Data, lr: float, capacity: int, seed: int = 0) -> Spent:
    """Experience replay: as many past samples as the batch holds."""
    memory = Reservoir(capacity, seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if memory.seen:
            past_x, past_y = memory.sample(len(y))
            x, y = torch.cat([x, past_x]), torch.cat([y, past_y])
        return F.cross_entropy(net(x), y)

    return play(net, data, lr, loss, memory.add, nothing)


def derpp(net: nn.Module, data: Data, lr: float, capacity: int, alpha: float, beta: float, seed: int = 0) -> Spent:
    """DER++: two draws, one held near its outputs of then, one near its labels."""
    memory, outputs = Reservoir(capacity, seed), list[Tensor]()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        now = net(x)
        outputs[:] = [now.detach()]
        whole = F.cross_entropy(now, y)
        if memory.seen:
            past_x, _, past_outputs = memory.sample(len(y), repeats=False)
            whole = whole + alpha * F.mse_loss(net(past_x), past_outputs)
            past_x, past_y, _ = memory.sample(len(y), repeats=False)
            whole = whole + beta * F.cross_entropy(net(past_x), past_y)
        return whole

    return play(net, data, lr, loss, lambda x, y: memory.add(x, y, outputs[0]), nothing)


def ewc(net: nn.Module, data: Data, lr: float, strength: float, chunk: int = 128) -> Spent:
    """EWC, with the Fisher of the labels found likeliest, sample by sample; the terms of all tasks summed."""
    names = [name for name, _ in net.named_parameters()]
    importance, center = dict[str, Tensor](), dict[str, Tensor]()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        whole = F.cross_entropy(net(x), y)
        if importance:
            weights = dict(net.named_parameters())
            whole = whole + strength * torch.stack([(importance[n] * (weights[n] - center[n]).square()).sum() for n in names]).sum()
        return whole

    def estimate(x: Tensor, _: Tensor) -> None:
        weights = {name: weight.detach() for name, weight in net.named_parameters()}

        def of_one(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
            outputs = functional_call(net, weights, (sample[None],))
            return F.cross_entropy(outputs, outputs.detach().argmax(1))

        slopes = vmap(grad(of_one), (None, 0))
        fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for part in x.split(chunk):
            for name, slope in slopes(weights, part).items():
                fisher[name] += slope.square().sum(0)
        for name, weight in weights.items():  # the sum of both quadratics is one quadratic
            old, new = importance.get(name, torch.zeros_like(weight)), fisher[name] / len(x)
            total = old + new
            mixed = (old * center.get(name, weight) + new * weight) / total.clamp(min=1e-30)
            center[name] = torch.where(total > 0, mixed, weight).clone()
            importance[name] = total

    return play(net, data, lr, loss, nothing, estimate)


def lwf(net: nn.Module, data: Data, lr: float, temperature: float) -> Spent:
    """Learning without forgetting: the outputs of all past classes held near those of the network before the task."""
    teacher, past = list[nn.Module](), list[Tensor]()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        outputs = net(x)
        whole = F.cross_entropy(outputs, y)
        if teacher:
            with torch.no_grad():
                targets = (teacher[0](x)[:, past[0]] / temperature).softmax(1)
            whole = whole - (targets * (outputs[:, past[0]] / temperature).log_softmax(1)).sum(1).mean()
        return whole

    def keep(_: Tensor, y: Tensor) -> None:
        teacher[:] = [deepcopy(net).eval().requires_grad_(False)]
        past[:] = [torch.cat([*past, y]).unique()]

    return play(net, data, lr, loss, nothing, keep)
