"""Continual backprop: in each step, a few of the least useful hidden units start anew, so that a network goes on learning.

Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton 2024, "Loss of plasticity in deep continual learning" (Nature), for any
strategy whose model is, in parts, a chain of layers: `ContinualBackprop(Finetune(model))`. Form implemented, after each step, for
unit i of a layer, with h its activations, w its outgoing weights and a its age, the steps since it started:

    u_i <- decay u_i + (1 - decay) mean |h_i| sum |w_i|          its utility, divided by 1 - decay^a where units are compared
    c   <- c + rate * (units with a > maturity)                  when c reaches 1, the unit of these with the lowest utility starts
                                                                 anew, and c <- c - 1

A unit that starts anew has new incoming weights, no bias, and outgoing weights of 0, so that the outputs stay what they are but for
what the old unit gave; utility and age are 0, and the optimizer's moments of its weights too. The mean of |h| is over the samples
of the step's last forward pass, and over the places of a convolution's channel.

As the authors' code (github.com/shibhansh/loss-of-plasticity): maturity 100, decay 0.99, rate 0.0001, which replaces a unit of 100
in each 100 steps; c is kept for each layer. There the mean of |w| stands for the sum: the same order. `utility="adaptable"` is that
of the earlier preprint, which the code's configs for permuted MNIST and ImageNet have: |h_i - mean of h_i so far| in place of
|h_i|, divided by the sum of the incoming weights' sizes. The code would have the next layer's bias take over the mean activation of
a unit that goes, but has set that mean to 0 before; here, as in the paper, nothing takes it over.

Deviations: a norm between two layers keeps what it has of a unit that starts anew (theirs resets that too); new weights are
uniform, with the spread of the layer's first ones (theirs: Kaiming's bound); torch's count of Adam's steps is one for a whole
tensor, so it stays (theirs: one for each weight). Units that go around a layer too, as in residual networks, are left alone: see
`clstream.models.units`. Measured: see `docs/plasticity.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.bus import on
from clstream.events import RunStarted, SessionStarted
from clstream.models.units import HiddenUnits, hidden_units, noting, units_between
from clstream.params import check_choice, check_integer, check_number, check_share
from clstream.strategy import CONTROLS, Strategy, Wrapper
from clstream.stream import Batch


class ContinualBackprop(Wrapper):
    """Start the least useful hidden units anew, a few at a time, while the wrapped strategy learns.

    Args:
        base: the strategy; its model has hidden units that one layer makes and another one takes.
        rate: the share of the mature units that start anew in each step.
        maturity: how many steps a unit is left alone after it started.
        decay: how much of the utility so far stays in each step.
        utility: "contribution" or "adaptable".

    """

    takes_controls = tuple(control for control in CONTROLS if control != "accumulate")  # it goes by steps

    def __init__(
        self, base: Strategy, rate: float = 1e-4, maturity: int = 100, decay: float = 0.99, utility: str = "contribution"
    ) -> None:
        super().__init__(base)
        check_number(0, 1, rate=rate)
        check_integer(0, maturity=maturity)
        check_share(decay=decay)
        check_choice(("contribution", "adaptable"), utility=utility)
        self.rate, self.maturity, self.decay, self.utility = rate, maturity, decay, utility
        self.random = torch.Generator()
        self.forget_all()

    def forget_all(self) -> None:
        """Start with units of age 0."""
        self.names: list[tuple[str, str]] = []  # of the layers that make and take the units, for each hidden layer
        self.bounds: list[float] = []  # of new incoming weights, for each layer
        self.utilities: list[Tensor] = []  # for each layer (units,), and so on
        self.means: list[Tensor] = []  # running means of activations
        self.ages: list[Tensor] = []  # in steps
        self.due: list[float] = []  # how many units are to start anew, with a part of one
        self.renewed: list[list[int]] = []  # the steps, of the newest `maturity` ones, in which units started anew
        self.steps = 0

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Forget what was known of units."""
        self.forget_all()

    @on(SessionStarted)
    def find_units(self, event: SessionStarted) -> None:
        """Find the hidden units, once. Raises ValueError for a network that has none of the kind."""
        if self.names:
            return
        units = hidden_units(self.model, event.session.samples[:8].x.to(next(self.model.parameters()).device))
        self.names = [layer.names for layer in units]
        self.bounds = [layer.initial_bound() for layer in units]
        self.utilities, self.means, self.ages = ([layer.incoming.new_zeros(len(layer)) for layer in units] for _ in range(3))
        self.due, self.renewed = [0.0] * len(units), [[] for _ in units]

    def learn(self, batch: Batch) -> Tensor:
        """Have the wrapped strategy take its step, then replace units."""
        units = units_between(self.model, self.names)
        with noting(units) as noted:
            loss = self.base.learn(batch)
        self.steps += 1
        with torch.no_grad():
            for number, (layer, activations) in enumerate(zip(units, noted, strict=True)):
                self.compare(number, layer, activations)
                self.replace(number, layer)
        return loss

    def compare(self, number: int, layer: HiddenUnits, activations: Tensor) -> None:
        """Take up what units of a layer did in a step: (n, units, places)."""
        mean = self.means[number]
        self.ages[number] += 1
        mean.lerp_(activations.mean((0, 2)), 1 - self.decay)
        if self.utility == "adaptable":
            activations = activations - (mean / (1 - self.decay ** self.ages[number]))[:, None]
        used = activations.abs().mean((0, 2)) * layer.outgoing.abs().sum((0, 2))
        if self.utility == "adaptable":
            used = used / layer.incoming.abs().flatten(1).sum(1)
        self.utilities[number].lerp_(used, 1 - self.decay)

    def replace(self, number: int, layer: HiddenUnits) -> None:
        """Start units of a layer anew, if it is time. How many is known without a look at the device."""
        ages, utilities = self.ages[number], self.utilities[number]
        self.renewed[number] = young = [step for step in self.renewed[number] if self.steps - step <= self.maturity]
        mature = len(layer) - len(young) if self.steps > self.maturity else 0
        self.due[number] += self.rate * mature
        count = min(int(self.due[number]), mature)
        if not count:
            return
        self.due[number] -= count
        young += [self.steps] * count
        ready = (utilities / (1 - self.decay**ages)).masked_fill(ages <= self.maturity, float("inf"))
        chosen = torch.zeros_like(ages, dtype=torch.bool).index_fill(0, ready.topk(count, largest=False).indices, True)
        layer.renew(chosen, self.bounds[number], self.random, self.base.optimizer)
        for values in (utilities, self.means[number], ages):
            values.masked_fill_(chosen, 0)
