"""ReDo: hidden units that sleep are recycled from time to time, so that a network goes on learning.

Sokar, Agarwal, Castro, Evci 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning" (ICML), for any strategy whose
model is, in parts, a chain of layers: `ReDo(Finetune(model))`. Form implemented, every `period` steps, for unit i of a layer, with
h its activations:

    s_i = mean |h_i| / mean over the layer's units of mean |h|

A unit with s_i <= `threshold` is dormant: it gets new incoming weights, no bias, and outgoing weights of 0, so that the outputs
stay what they are but for what little it gave; the optimizer's moments of these weights become 0. The means are over the samples
of the last steps' forward passes, of as many steps as it takes to have `samples` of them (the last pass of a step), and over the
places of a convolution's channel.

As the authors' code (dopamine, labs/redo), which takes one batch of a replay buffer, and by default has a threshold of 0 and a
period of 200,000; the defaults here are the paper's, as recalled: 0.025 to 0.1, and 1,000 updates. Deviations: new weights are
uniform, with the spread of the layer's first ones (theirs: Xavier's); the last steps' samples in place of a batch of their own,
which a stream has not. Its variants (incoming weights scaled to the norm of others, outgoing ones drawn too) are left out. Units
that go around a layer too, as in residual networks, are left alone: see `clstream.models.units`. Measured: see
`docs/plasticity.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.bus import on
from clstream.events import RunStarted, SessionStarted
from clstream.models.units import hidden_units, noting, units_between
from clstream.params import check_integer, check_number
from clstream.strategy import CONTROLS, Strategy, Wrapper
from clstream.stream import Batch


class ReDo(Wrapper):
    """Recycle dormant hidden units from time to time, while the wrapped strategy learns.

    Args:
        base: the strategy; its model has hidden units that one layer makes and another one takes.
        period: of recycling, in steps.
        threshold: the activity, relative to the mean of the layer, up to which a unit is dormant.
        samples: how many samples activities are taken over, at least, if there are as many in a period.

    """

    takes_controls = tuple(control for control in CONTROLS if control != "accumulate")  # it goes by steps

    def __init__(self, base: Strategy, period: int = 1000, threshold: float = 0.1, samples: int = 64) -> None:
        super().__init__(base)
        check_integer(1, period=period, samples=samples)
        check_number(0, threshold=threshold)
        self.period, self.threshold, self.samples = period, threshold, samples
        self.random = torch.Generator()
        self.forget_all()

    def forget_all(self) -> None:
        """Start with nothing known of units."""
        self.names: list[tuple[str, str]] = []  # of the layers that make and take the units, for each hidden layer
        self.bounds: list[float] = []  # of new incoming weights
        self.sums: list[Tensor] = []  # (units,): of absolute activations
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
        self.sums = [layer.incoming.new_zeros(len(layer)) for layer in units]

    def learn(self, batch: Batch) -> Tensor:
        """Have the wrapped strategy take its step; when it is time, recycle."""
        self.steps += 1
        left = -self.steps % self.period  # steps to the next recycling
        if left * len(batch.samples) >= self.samples:
            return self.base.learn(batch)
        units = units_between(self.model, self.names)
        with noting(units) as noted:
            loss = self.base.learn(batch)
        for total, activations in zip(self.sums, noted, strict=True):
            total += activations.abs().mean(2).sum(0)
        if not left:
            for layer, total, bound in zip(units, self.sums, self.bounds, strict=True):
                layer.renew(total <= self.threshold * total.mean(), bound, self.random, self.base.optimizer)
                total.zero_()
        return loss
