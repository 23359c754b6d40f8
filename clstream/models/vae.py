"""Variational autoencoders: what turns features into a latent and a latent back into inputs, and its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models.layers import FlatInput, LinearRelu
from clstream.params import check_choice, check_integer, check_integers

RECONSTRUCTIONS = ("bce", "mse")
"""Losses of decoded inputs: "bce" for inputs from 0 to 1, whose decoder ends in a sigmoid, "mse" for any, whose ends without."""


class Latent(nn.Module):
    """Mean and log variance of a latent, a prior of it, and the decoder: all of a VAE but the encoder's hidden layers.

    A decoder's layer is ReLU(gates * (W h + b)). Without classes there are no gates, and the prior is a unit normal; with classes
    each has a normal of its own, whose mean and log variance are learned, and keeps a random share of each hidden layer's units.

    Args:
        features: width of what the encoder gives.
        latent: width of the latent.
        hidden: widths of the decoder's hidden layers, from the latent on.
        input_shape: of what it decodes.
        reconstruction: "bce" or "mse".
        classes: that have a normal of the prior and gates of their own; 0 for none.
        gated: the share of each hidden layer's units that is off for a class, drawn at random for good.
        conditional: whether classes have normals of their own; if not, the prior is a unit normal.

    """

    seed: Tensor
    prior_mean: nn.Parameter | None
    prior_log_variance: nn.Parameter | None

    def __init__(
        self,
        features: int,
        latent: int,
        hidden: Sequence[int],
        input_shape: Sequence[int],
        reconstruction: str = "bce",
        classes: int = 0,
        gated: float = 0.0,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.input_shape, self.reconstruction = latent, tuple(input_shape), reconstruction
        self.gated = gated if classes and hidden else 0.0
        self.mean = nn.Linear(features, latent)
        self.log_variance = nn.Linear(features, latent, bias=False)
        widths = [latent, *hidden]
        self.layers = nn.ModuleList(nn.Linear(into, out) for into, out in pairwise(widths))
        self.output = nn.Linear(widths[-1], math.prod(self.input_shape))
        self.prior_mean = self.prior_log_variance = None
        if not classes:
            return
        self.register_buffer("seed", torch.randint(2**31, ()))
        if conditional:
            self.prior_mean, self.prior_log_variance = (nn.Parameter(torch.empty(0, latent)) for _ in range(2))
        for number, units in enumerate(hidden if self.gated else ()):
            self.register_buffer(f"gates{number}", torch.empty(0, units))
        self.widen(classes)

    def widen(self, classes: int) -> dict[nn.Parameter, int]:
        """Give more classes a normal and gates, each its own whatever others there are; return the rows of parameters before."""
        before = {parameter: len(parameter) for parameter in (self.prior_mean, self.prior_log_variance) if parameter is not None}
        gates = [name for name, _ in self.named_buffers() if name != "seed"]
        first = len(self.get_buffer(gates[0])) if gates else max(before.values(), default=classes)
        for label in range(first, classes):
            random = torch.Generator().manual_seed(int(self.seed) + label)
            for parameter in before:
                row = torch.randn(1, self.width, generator=random).to(parameter)
                parameter.data, parameter.grad = torch.cat([parameter.data, row]), None
            for name in gates:
                kept = self.get_buffer(name)
                row = (torch.rand(1, kept.shape[1], generator=random) >= self.gated).to(kept)
                setattr(self, name, torch.cat([kept, row]))
        return {parameter: rows for parameter, rows in before.items() if rows < classes}

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, log variance, and a latent drawn with them: three (n, latent)."""
        mean, log_variance = self.mean(features), self.log_variance(features)
        return mean, log_variance, mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def decode(self, z: Tensor, labels: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """Return (n, inputs) before the sigmoid, of (n, latent), with the gates of (k,) labels by their (n, k) shares."""
        for number, layer in enumerate(self.layers):
            z = layer(z)
            if self.gated and labels is not None:
                gates = self.get_buffer(f"gates{number}")[labels]
                z = z * (gates if shares is None else shares @ gates)
            z = F.relu(z)
        decoded: Tensor = self.output(z)
        return decoded

    def inputs(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the inputs that latents stand for, (n, *input_shape), each of the class that (n,) labels name."""
        decoded = self.decode(z, labels)
        return (decoded.sigmoid() if self.reconstruction == "bce" else decoded).view(-1, *self.input_shape)

    def loss(self, x: Tensor, features: Tensor, labels: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """Return reconstruction + variational loss, both divided by the number of inputs: the mean over samples.

        Args:
            x: (n, *input_shape), from 0 to 1 with "bce".
            features: (n, features) of the encoder.
            labels: (k,), of the classes that there may be.
            shares: (n, k), their probabilities, which weigh the normals of the prior, and the gates.

        """
        mean, log_variance, z = self.encode(features)
        decoded, x = self.decode(z, labels, shares), x.flatten(1)
        if self.reconstruction == "bce":
            reconstruction = F.binary_cross_entropy_with_logits(decoded, x)
        else:
            reconstruction = 0.5 * F.mse_loss(decoded, x)
        return reconstruction + self.divergence(mean, log_variance, z, labels, shares).mean() / x.shape[1]

    def divergence(
        self, mean: Tensor, log_variance: Tensor, z: Tensor, labels: Tensor | None = None, shares: Tensor | None = None
    ) -> Tensor:
        """Return (n,), the divergence of the latent's distribution from the prior: exact, with classes as the drawn z has it."""
        if self.prior_mean is None or self.prior_log_variance is None or labels is None or shares is None:
            return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        each = log_normal(z[:, None], self.prior_mean[labels], self.prior_log_variance[labels])
        return log_normal(z, mean, log_variance) - (each + shares.log()).logsumexp(1)

    @torch.no_grad()
    def sample(self, n: int, random: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """Return n inputs (n, *input_shape) that latents of the prior stand for; with classes of those that (n,) labels name."""
        device = self.mean.weight.device
        z = torch.randn(n, self.width, generator=random).to(device)
        if labels is not None and self.prior_mean is not None and self.prior_log_variance is not None:
            z = self.prior_mean[labels] + (0.5 * self.prior_log_variance[labels]).exp() * z
        return self.inputs(z, labels)


def log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log density of latents (..., latent) under normals with a diagonal covariance, without its constant."""
    return -0.5 * (log_variance + (z - mean).square() / log_variance.exp()).sum(-1)


class VAE(nn.Module):
    """A variational autoencoder of fully connected layers (Kingma & Welling 2014), whose decoder mirrors its encoder.

    Args:
        input_shape: of one input; bytes are divided by 255.
        hidden: widths of the encoder's hidden layers.
        latent: width of the latent.
        reconstruction: "bce" for inputs from 0 to 1, "mse" for any.

    """

    def __init__(
        self, input_shape: Sequence[int], hidden: Sequence[int] = (400, 400), latent: int = 100, reconstruction: str = "bce"
    ) -> None:
        super().__init__()
        check_integers(1, hidden=tuple(hidden))
        check_integer(1, latent=latent)
        check_choice(RECONSTRUCTIONS, reconstruction=reconstruction)
        widths = [math.prod(input_shape), *hidden]
        self.encoder = nn.Sequential(FlatInput(0.0, 1.0), *(LinearRelu(into, out) for into, out in pairwise(widths)))
        self.latent = Latent(widths[-1], latent, widths[:0:-1], input_shape, reconstruction)

    def loss(self, x: Tensor) -> Tensor:
        """Return reconstruction + variational loss of (n, *input_shape) floats, as `Latent.loss` has it: a scalar."""
        return self.latent.loss(x, self.encoder(x))

    def sample(self, n: int, random: torch.Generator) -> Tensor:
        """Return n inputs (n, *input_shape), drawn from the prior."""
        return self.latent.sample(n, random)
