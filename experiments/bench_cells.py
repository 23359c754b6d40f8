"""What `experiments/bench_methods.py` measures: cells of one strategy each, and what each is held against.

Data has the shapes of MNIST and is random, since speed doesn't depend on it. Cells are as large as half a second to three seconds
take; fine-tuning at batch 10, the shortest step of all, has as many samples as MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter, process_time

import torch
from clstream.experiments import loops_by_hand as by_hand
from clstream.experiments import loops_in_avalanche as in_avalanche
from clstream.experiments.vit_by_hand import LowRankVit
from clstream.strategies import EWC, NCM, SHARP, TAME, DERpp, Finetune, Hypernetwork, LwF, Refresh, Replay
from clstream.streams import from_tensors
from torch import nn
from torch.optim import SGD, Adam

from clstream import Samples, Strategy, Stream, run
from clstream.adapters import LoRA, adapt
from clstream.models import ConvNet, Linear, Mlp, MnistLike, SlimResNet18, VitTiny
from clstream.seeds import isolated

SIDE = 28
CLASSES = 10

PARTS = ("learning", "consolidating", "evaluating")


@dataclass
class Times:
    """Seconds that runs took, one after the other: by the wall clock, of the CPU, and by part."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    learning: list[float] = field(default_factory=list)
    consolidating: list[float] = field(default_factory=list)
    evaluating: list[float] = field(default_factory=list)


Runs = Callable[[nn.Module, Times], None]
"""Runs something with a network, and adds its seconds."""

Way = Callable[[Stream], Runs]
"""What runs on a stream; what can be made ready beforehand is."""


def strategy(make: Callable[[nn.Module], Strategy], compiled: bool = False) -> Way:
    """Return how a strategy is run."""

    def runs(stream: Stream, network: nn.Module, times: Times) -> None:
        with isolated(0, "strategy"):
            built = make(network)
        begin, cpu = perf_counter(), process_time()
        cost = run(built, stream, device=stream.device or "cpu", compile=compiled).cost
        times.wall.append(perf_counter() - begin)
        times.cpu.append(process_time() - cpu)
        for part in PARTS:
            getattr(times, part).append(float(getattr(cost, f"{part}_seconds").sum()))

    return lambda stream: partial(runs, stream)


def loop(play: Callable[[nn.Module, by_hand.Data], by_hand.Spent]) -> Way:
    """Return how a loop is run, on a network as it is written by hand and samples made floats beforehand."""

    def runs(data: by_hand.Data, network: nn.Module, times: Times) -> None:
        network = plain(network).to(data.x.device)
        begin, cpu = perf_counter(), process_time()
        spent = play(network, data)
        times.wall.append(perf_counter() - begin)
        times.cpu.append(process_time() - cpu)
        for part in PARTS:
            getattr(times, part).append(getattr(spent, part))

    return lambda stream: partial(runs, by_hand.data_of(stream))


def plain(network: nn.Module) -> nn.Module:
    """Return a network as it is written by hand: an Mlp flat, without the layer that makes floats of bytes; others as they are.

    A vision transformer is one with LoRA.
    """
    if isinstance(network, VitTiny):
        return LowRankVit(network)
    if not isinstance(network, Mlp):
        return network
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    layers: list[nn.Module] = [nn.Flatten()]
    for layer in linear[:-1]:
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, linear[-1])


@dataclass(frozen=True)
class Cell:
    """What is measured: a strategy of ours, and what it is held against.

    Args:
        name, batch, samples, network, epochs, scenario, tasks: of the run; `samples` are all training samples, a sixth as many are
            tested.
        ours: the strategy.
        against: what it is held against: "by hand", "Avalanche", or the strategy that it wraps or goes beyond.
        other: that.
        budget: the most that the ratio of their times may be. None: no budget.
        of: what is compared: "wall" (the seconds of a whole run) or "learning" (of this part alone).
        device: where it is run.
        gpu_steps: how many steps it takes on a GPU, in place of `samples`: there, small networks take as long as others.

    """

    name: str
    batch: int
    samples: int
    network: Callable[[], nn.Module]
    ours: Way
    against: str
    other: Way
    budget: float | None = None
    epochs: int = 1
    scenario: str = "class"
    of: str = "wall"
    device: str = "cpu"
    tasks: int = 5
    gpu_steps: int = 400

    def on(self, device: str) -> Cell:
        """Return this cell on a device."""
        return self if device == "cpu" else replace(self, device=device, samples=self.gpu_steps * self.batch)

    def stream(self) -> Stream:
        """Return a stream of random images, or of features for networks of one layer."""
        draw = torch.Generator().manual_seed(0)
        flat = self.network is features

        def images(n: int) -> torch.Tensor:
            shape = (SIDE * SIDE,) if flat else (1, SIDE, SIDE)
            drawn = torch.randint(256, (n, *shape), generator=draw, dtype=torch.uint8)
            return drawn.float() / 255 if flat else drawn

        labels, test_labels = torch.arange(self.samples) % CLASSES, torch.arange(self.samples // 6 + CLASSES) % CLASSES
        train, test = images(len(labels)), images(len(test_labels))
        tasks, batch, epochs, scenario = self.tasks, self.batch, self.epochs, self.scenario
        return from_tensors(train, labels, test, test_labels, tasks=tasks, batch_size=batch, epochs=epochs, scenario=scenario).to(
            self.device
        )


def mlp() -> nn.Module:
    """Return the network of most cells."""
    return Mlp((1, SIDE, SIDE), CLASSES, hidden=(100, 100))


def wide() -> nn.Module:
    """Return a wider one."""
    return Mlp((1, SIDE, SIDE), CLASSES, hidden=(400, 400))


def convnet() -> nn.Module:
    """Return a convolutional network."""
    return ConvNet((1, SIDE, SIDE), CLASSES)


def slim() -> nn.Module:
    """Return a small ResNet."""
    return SlimResNet18((1, SIDE, SIDE), CLASSES)


def mnist_like() -> nn.Module:
    """Return SHARP's network."""
    return MnistLike((1, SIDE, SIDE), CLASSES)


def adapted_vit() -> nn.Module:
    """Return a small vision transformer with LoRA in its attention: 50 tokens, 64 wide."""
    return adapt(VitTiny((1, SIDE, SIDE), CLASSES), LoRA(rank=4, modules="*.attention.*"))


def features() -> nn.Module:
    """Return a network of features as they are."""
    return Linear((SIDE * SIDE,), CLASSES)


def tame(network: nn.Module, experts: int, settle: bool = False) -> TAME:
    """Return TAME with so many experts from the start, which never switches; its selector is trained for a pass alone."""
    built = TAME(network, LR, floor=1e9, settle=settle, selector="mlp", selector_epochs=1, retrain_epochs=1)
    built.experts += [built.new_expert() for _ in range(experts - 1)]
    numbers = torch.arange(experts)
    built.memory.add(Samples(torch.zeros(experts, 1, SIDE, SIDE, dtype=torch.uint8), numbers * CLASSES))  # one of each
    return built


LR = partial(SGD, lr=0.03)
ADAM = partial(Adam, lr=1e-3)

FINETUNE, REPLAY = partial(Finetune, optimizer=LR), partial(Replay, optimizer=LR, capacity=500)
DERPP = partial(DERpp, optimizer=LR, capacity=500)

OURS_FINETUNE, OURS_REPLAY, OURS_DERPP = strategy(FINETUNE), strategy(REPLAY), strategy(DERPP)
HAND_FINETUNE, HAND_REPLAY = loop(partial(by_hand.finetune, lr=0.03)), loop(partial(by_hand.replay, lr=0.03, capacity=500))
HAND_DERPP = loop(partial(by_hand.derpp, lr=0.03, capacity=500, alpha=0.5, beta=0.5))
HAND_EWC, HAND_LWF = loop(partial(by_hand.ewc, lr=0.03, strength=10.0)), loop(partial(by_hand.lwf, lr=0.03, temperature=2.0))
THEIR_FINETUNE = loop(partial(in_avalanche.finetune, lr=0.03))
THEIR_REPLAY = loop(partial(in_avalanche.replay, lr=0.03, capacity=500))

OURS_EWC, OURS_LWF = strategy(partial(EWC, optimizer=LR, strength=10.0)), strategy(partial(LwF, optimizer=LR))
OURS_HYPERNETWORK = strategy(partial(Hypernetwork, optimizer=ADAM))
ONE_EXPERT = strategy(lambda network: tame(network, 1))

CELLS = (
    Cell("fine-tune, Mlp 100-100", 10, 60_000, mlp, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.10),
    Cell("fine-tune, Mlp 400-400", 128, 20_000, wide, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.05),
    Cell("fine-tune, Mlp 400-400", 1024, 20_000, wide, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.05),
    Cell("fine-tune, ConvNet", 10, 2_500, convnet, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.10),
    Cell("fine-tune, ConvNet", 128, 4_000, convnet, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.05),
    Cell("replay, Mlp 100-100", 10, 20_000, mlp, OURS_REPLAY, "by hand", HAND_REPLAY, 1.10),
    Cell("replay, Mlp 400-400", 128, 15_000, wide, OURS_REPLAY, "by hand", HAND_REPLAY, 1.05),
    Cell("replay, Mlp 400-400", 1024, 20_000, wide, OURS_REPLAY, "by hand", HAND_REPLAY, 1.05),
    Cell("replay, ConvNet", 10, 1_500, convnet, OURS_REPLAY, "by hand", HAND_REPLAY, 1.10),
    Cell("replay, SlimResNet18", 128, 256, slim, OURS_REPLAY, "by hand", HAND_REPLAY, 1.05, tasks=2, gpu_steps=40),
    Cell("fine-tune LoRA, VitTiny", 10, 1_000, adapted_vit, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.10),
    Cell("fine-tune LoRA, VitTiny", 64, 2_000, adapted_vit, OURS_FINETUNE, "by hand", HAND_FINETUNE, 1.10),
    Cell("DER++, Mlp 100-100", 10, 20_000, mlp, OURS_DERPP, "by hand", HAND_DERPP, 1.10),
    Cell("EWC, Mlp 100-100", 128, 5_000, mlp, OURS_EWC, "by hand", HAND_EWC, 1.05, gpu_steps=40),
    Cell("LwF, Mlp 400-400", 128, 15_000, wide, OURS_LWF, "by hand", HAND_LWF, 1.05),
    Cell("fine-tune, Mlp 100-100", 10, 5_000, mlp, OURS_FINETUNE, "Avalanche", THEIR_FINETUNE),
    Cell("replay, Mlp 100-100", 10, 5_000, mlp, OURS_REPLAY, "Avalanche", THEIR_REPLAY),
    Cell("replay, Mlp 400-400", 128, 5_000, wide, OURS_REPLAY, "Avalanche", THEIR_REPLAY),
    Cell("Refresh(replay), Mlp 100-100", 10, 5_000, mlp, strategy(lambda net: Refresh(REPLAY(net))), "replay", OURS_REPLAY),
    Cell("Refresh(replay, noise=0)", 10, 5_000, mlp, strategy(lambda net: Refresh(REPLAY(net), noise=0)), "replay", OURS_REPLAY),
    Cell("Refresh(DER++), Mlp 100-100", 10, 5_000, mlp, strategy(lambda net: Refresh(DERPP(net))), "DER++", OURS_DERPP),
    Cell("Refresh(DER++, noise=0)", 10, 5_000, mlp, strategy(lambda net: Refresh(DERPP(net), noise=0)), "DER++", OURS_DERPP),
    Cell("TAME, 1 expert", 128, 10_000, mlp, ONE_EXPERT, "fine-tune", OURS_FINETUNE, of="learning"),
    Cell("TAME, 20 experts", 128, 3_000, mlp, strategy(lambda net: tame(net, 20)), "1 expert", ONE_EXPERT, 4.0, of="learning"),
    Cell("TAME, 20 experts, settle=True", 128, 3_000, mlp, strategy(lambda net: tame(net, 20, settle=True)), "1 expert",
         ONE_EXPERT, 4.0, of="learning"),
    Cell("Hypernetwork, Mlp 100-100", 128, 5_000, mlp, OURS_HYPERNETWORK, "fine-tune",
         strategy(partial(Finetune, optimizer=ADAM)), scenario="task"),
    Cell("Hypernetwork(importance='fisher')", 128, 5_000, mlp,
         strategy(partial(Hypernetwork, optimizer=ADAM, importance="fisher")), "importance='none'", OURS_HYPERNETWORK,
         scenario="task"),
    Cell("SHARP, MnistLike", 128, 1_500, mnist_like, strategy(SHARP), "replay", OURS_REPLAY, epochs=3),
    Cell("NCM on features", 128, 60_000, features, strategy(NCM), "fine-tune", OURS_FINETUNE),
)  # fmt: skip

COMPILED = (
    Cell("fine-tune, compiled", 10, 20_000, mlp, strategy(FINETUNE, compiled=True), "by hand", HAND_FINETUNE, 0.70, of="learning"),
    Cell("replay, compiled", 10, 20_000, mlp, strategy(REPLAY, compiled=True), "by hand", HAND_REPLAY, 0.70, of="learning"),
    Cell("DER++, compiled", 10, 10_000, mlp, strategy(DERPP, compiled=True), "by hand", HAND_DERPP, 0.70, of="learning"),
    Cell("EWC, compiled", 10, 5_000, mlp, strategy(partial(EWC, optimizer=LR, strength=0.1), compiled=True), "by hand",
         loop(partial(by_hand.ewc, lr=0.03, strength=0.1)), 0.70, of="learning"),
    Cell("LwF, compiled", 10, 20_000, mlp, strategy(partial(LwF, optimizer=LR), compiled=True), "by hand", HAND_LWF, 0.70,
         of="learning"),
)  # fmt: skip
"""With compiled steps, whose learning leaves out the seconds of compiling."""
