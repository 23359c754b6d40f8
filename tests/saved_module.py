"""A module of the user's own, with a strategy, a network and what they hold."""

from __future__ import annotations

import torch
from clstream.strategies import Replay
from torch import Tensor, nn

from clstream import BatchLearned, on
from clstream.models import Mlp


def squash(x: Tensor) -> Tensor:
    return torch.tanh(x) + 0.1 * x


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, width), squash

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.linear(x))
        return result


class MyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(nn.Flatten(), Block(64), nn.BatchNorm1d(64)), nn.Linear(64, 6)
        self.between = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.blocks(x.float() / 255)))
        return logits


class MyStrategy(Replay):
    """Replay that counts what it saw, and answers with the mean of its weights over the run."""

    def __init__(self, model: nn.Module, decay: float = 0.9) -> None:
        super().__init__(model, capacity=30)
        self.decay, self.batches, self.averages = decay, 0, {name: p.detach().clone() for name, p in model.named_parameters()}

    @on(BatchLearned)
    def average(self, event: BatchLearned) -> None:
        self.batches += 1
        for name, weight in self.model.named_parameters():
            self.averages[name].lerp_(weight.detach(), 1 - self.decay)

    def scores(self, x: Tensor, task: object = None) -> Tensor:
        scores: Tensor = torch.func.functional_call(self.model, self.averages, (x,))
        return scores


def answer(folder: str, file: str) -> None:
    """Be a process of one's own: load a strategy, and write its answers to the test samples of the example stream."""
    import clstream
    from clstream.checks import example_stream

    assert "saved_module" in MyNet.__module__
    strategy = clstream.load(folder, classes=[MyStrategy, MyNet, squash])
    x = example_stream().tasks[0].test[:].x
    torch.save([strategy.scores(x), strategy.predict(x), strategy.novelty(x)], file)


__all__ = ["Mlp", "MyNet", "MyStrategy", "squash"]
