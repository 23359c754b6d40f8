"""Refresh learning: before a strategy learns a batch, its network unlearns it a little. A wrapper around any strategy.

Wang, Li, Shen, Huang 2024, "A Unified and General Framework for Continual Learning" (ICLR). Two forms:

"released" (the default), as the authors' code does. For each batch (x, y), before the base's own step, at the weights w:

    g = d CE(f(x), y) / d w                       the batch alone, all outputs, in training mode; batch norm's statistics stay; with
                                                  other targets than labels their own loss (`clstream.losses`)
    n = |w| g / (|g| + 1e-20)                     for each tensor by itself
    w <- w + delta (n + noise xi) / (1 + fisher_weight F),    xi normal

`steps` times. The move is kept: the base's step is taken from there. F is the diagonal Fisher, zero at first; when a session ends
it becomes tau F + f, f the mean over the session's samples of p(y|x) (d log p(y|x) / d w)^2, one sample at a time.

"paper", RECONSTRUCTED: the paper's body could not be read; this is what its reviews and abstract describe. Ascent on the base's
whole loss L, preconditioned by the inverse Fisher, damped because its entries come near 0:

    w <- w + gamma P dL / d w + sqrt(2 gamma P) noise xi,    P = 1 / (F + damping)

Nothing published can be compared with it. It draws from the base's memories once more a step, so its runs differ from the base's
also for gamma = 0.

The release unlearns on the very augmented batch that the base learns. So does this one where the base augments the batch by itself,
before it draws anything else at random, as DER, DERpp and ERACE do: both start from the same random numbers. `Replay` augments
batch and memory in one, so that its batch may be cropped in another way.

Deviations of "released": the direction is taken from g itself, where the authors' code takes the difference of the weights before
and after a step of 0.01 g: the same but for rounding. f is divided by the number of samples (there: batches times batch size).
F is renewed at the end of each session, not task, so that no boundaries are needed; with one session a task it is the same. The
release trains with weight decay 1e-4, its baseline with none: that is the base's optimizer's business here.

Measured around DER++, paired over 5 seeds, with 95 % confidence: Split MNIST -0.001 ± 0.004, with weight decay in both +0.001 ±
0.004; rotated MNIST +0.000 ± 0.002 (anchors `refresh-derpp-split-mnist`, `refresh-derpp-wd-split-mnist`,
`refresh-derpp-rotated-mnist`). It costs 46 % of a DER++ run at batch 128 + 128, and 93 % at 10 + 10, where drawing the noise
takes as long as a backward pass. The noise is 1e-8 for a weight, so `noise=0` is the fast form: at 10 + 10 it costs half as much.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from clstream.bus import on
from clstream.events import RunStarted, SessionEnded, SessionStarted
from clstream.fisher import session_fisher
from clstream.losses import mean_loss, sample_losses
from clstream.models.heads import pad_rows
from clstream.params import check_choice, check_integer, check_number, check_positive
from clstream.seeds import random_state_kept
from clstream.strategy import CONTROLS, Strategy, Wrapper
from clstream.strategy.regulariser import no_step
from clstream.stream import Batch, Samples, Subset

TINY = 1e-20  # of the release: a zero gradient gives no NaN


class Refresh(Wrapper):
    """Unlearn each batch a little before the wrapped strategy learns it.

    Args:
        base: the strategy; it has a `model` that gives logits, and for form "paper" a scalar `loss`.
        delta: how far each tensor moves, relative to its norm; form "released".
        steps: moves before each batch (J).
        noise: standard deviation of the noise, relative to what it is added to as written above. None: 1e-3 in form "released", 1
            in form "paper".
        fisher_weight: of the Fisher in form "released"; 0 leaves it out, and saves the pass over each session.
        tau: how much of the Fisher so far stays when a session ends.
        form: "released" or "paper".
        gamma: the step of form "paper".
        damping: what is added to the Fisher in form "paper".

    """

    fixed_classes = 'as in the wrapped strategy; all in the move of form "released"'
    takes_controls = tuple(control for control in CONTROLS if control != "accumulate")  # it moves with each batch
    not_state: tuple[str, ...] = ("factors",)

    def __init__(
        self,
        base: Strategy,
        delta: float = 1e-5,
        steps: int = 1,
        noise: float | None = None,
        fisher_weight: float = 1e-3,
        tau: float = 1e-5,
        form: str = "released",
        gamma: float = 1e-5,
        damping: float = 1.0,
    ) -> None:
        super().__init__(base)
        check_choice(("released", "paper"), form=form)
        noise = (1e-3 if form == "released" else 1.0) if noise is None else noise
        check_number(0, delta=delta, noise=noise, fisher_weight=fisher_weight, tau=tau, gamma=gamma)
        check_integer(1, steps=steps)
        check_positive(damping=damping)
        self.delta, self.steps, self.noise, self.fisher_weight, self.tau = delta, steps, noise, fisher_weight, tau
        self.form, self.gamma, self.damping = form, gamma, damping
        self.fisher: dict[str, Tensor] = {}  # by parameter; nothing as long as it is zero
        self.factors: list[Tensor] | None = None  # 1 + fisher_weight F, for each of `weights()`, made when it is needed
        self.random = torch.Generator()

    def learn(self, batch: Batch) -> Tensor:
        """Move away, then have the wrapped strategy take its own step from there."""
        for _ in range(self.steps):
            if self.form == "released":
                self.unlearn(batch.samples)
            else:
                self.ascend(batch.samples)
        return self.base.learn(batch)

    def unlearn(self, samples: Samples) -> None:
        """Take one move of form "released"."""
        weights = self.weights()
        gradients = self.gradients(samples, weights)
        with torch.no_grad():
            slopes = torch._foreach_norm(gradients)
            torch._foreach_add_(slopes, TINY)
            scales = torch._foreach_div(torch._foreach_norm(weights), slopes)
            moves = torch._foreach_mul(gradients, scales)
            if self.noise:
                torch._foreach_add_(moves, self.noise_like(weights), alpha=self.noise)
            if self.fisher:
                if self.factors is None:
                    self.factors = [1 + self.fisher_weight * fisher for fisher in self.fisher_of_weights()]
                torch._foreach_div_(moves, self.factors)
            torch._foreach_add_(weights, moves, alpha=self.delta)

    def ascend(self, samples: Samples) -> None:
        """Take one move of form "paper"."""
        weights, buffers = self.weights(), list(self.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        with no_step(self.base):
            objective = self.base.objective(samples)
        slopes = torch.autograd.grad(objective, weights, materialize_grads=True)
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)  # the base's step has its own part in batch norm's statistics
            fishers = self.fisher_of_weights() if self.fisher else [torch.zeros_like(weight) for weight in weights]
            for weight, slope, fisher, noise in zip(weights, slopes, fishers, self.noise_like(weights), strict=True):
                scale = self.gamma / (fisher + self.damping)
                weight += scale * slope + (2 * scale).sqrt() * self.noise * noise

    def weights(self) -> list[Tensor]:
        """Return the parameters that move."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def gradients(self, samples: Samples, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of the batch's mean loss; neither the buffers nor the run's random numbers are moved."""
        x = samples.x
        with random_state_kept(x.device):
            x = x if self.augment is None else self.augment(x)
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            logits = functional_call(self.model, buffers, (x,)) if buffers else self.model(x)
        loss = mean_loss(logits, samples.y, samples.target, self.bce_mean)
        return torch.autograd.grad(loss, weights, materialize_grads=True)

    def noise_like(self, weights: list[Tensor]) -> list[Tensor]:
        """Return normal numbers of the shapes of the weights, drawn together."""
        drawn = torch.randn(sum(weight.numel() for weight in weights), generator=self.random, device=weights[0].device)
        parts = drawn.split([weight.numel() for weight in weights])
        return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]

    def fisher_of(self, samples: Samples | Subset) -> dict[str, Tensor]:
        """Return the Fisher of samples: each square times the likelihood, which is exp(-loss), see `diagonal_fisher`."""
        losses = partial(sample_losses, target=samples.target, bce_mean=self.bce_mean)
        return session_fisher(self.model, samples, "weighted", self.augment, losses=losses)

    def fisher_of_weights(self) -> list[Tensor]:
        """Return the Fisher of each of `weights()`; rows that a growing head got since are zero."""
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        return [pad_rows(self.fisher.get(name, torch.zeros_like(weight)), weight) for name, weight in weights.items()]

    @on(RunStarted)
    def begin_run(self, event: RunStarted) -> None:
        """Start without a Fisher, and with a generator for the noise on the device of the weights."""
        weights = self.weights()
        if not weights:
            raise ValueError(f"Refresh moves parameters, and {type(self.model).__name__} has none that require a gradient")
        if self.form == "released" and any(weight.dtype in (torch.float16, torch.bfloat16) for weight in weights):
            raise ValueError("Refresh needs parameters of float32: its moves vanish in half precision")
        self.fisher, self.factors, self.random = {}, None, torch.Generator(event.stream.device or "cpu")

    @on(SessionStarted)
    def drop_factors(self, event: SessionStarted) -> None:
        """Drop the factors, since a head may have grown; before anything is learned, try whether the Fisher can be taken."""
        self.factors = None
        if not self.fisher and (self.fisher_weight or self.form == "paper"):
            self.fisher_of(event.session.samples[:1])

    @on(SessionEnded)
    def consolidate(self, event: SessionEnded) -> None:
        """Renew the Fisher from the session's samples."""
        if self.fisher_weight == 0 and self.form == "released":
            return
        new = self.fisher_of(event.session.samples)
        old = dict(zip(new, self.fisher_of_weights(), strict=True))
        self.fisher = {name: self.tau * old[name] + fisher for name, fisher in new.items()}
        self.factors = None
