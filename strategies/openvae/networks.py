"""OpenVAE's networks beside the encoder: mean and deviation of the latent, the classifier, the decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models import GrowingHead


def kl_divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return -1/2 the mean over samples and latents of 1 + log(1e-8 + deviation^2) - mean^2 - deviation^2.

    The deviation is raw and may be negative: only its square counts.
    """
    variance = deviation.square()
    return -0.5 * (1 + (1e-8 + variance).log() - mean.square() - variance).mean()


class BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes a single sample too: it is normalised by the running statistics."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as torch names it
        """Return (n, features)."""
        if len(input) > 1 or not self.training:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class LatentNetwork(nn.Module):
    """What comes after the encoder's features, all linear layers without bias: mean, raw deviation, classifier, decoder.

    Args:
        features: width of the encoder's features.
        latent: width of the latent.
        classes: outputs that the classifier may get; it has those of classes that came.
        hidden: widths of the decoder's hidden layers, each with batch norm and ReLU.
        input_shape: of the images that it decodes.

    """

    def __init__(self, features: int, latent: int, classes: int, hidden: Sequence[int], input_shape: Sequence[int]) -> None:
        super().__init__()
        self.latent, self.input_shape = latent, tuple(input_shape)
        self.mean = nn.Linear(features, latent, bias=False)
        self.deviation = nn.Linear(features, latent, bias=False)
        self.classifier = GrowingHead(latent, classes, bias=False)
        widths = [latent, *hidden]
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layers += [nn.Linear(into, out, bias=False), BatchNorm(out), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.input_shape), bias=False))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def grow(self, labels: Sequence[int]) -> None:
        """Give the classifier a row for each class that has none, drawn after Kaiming; those that are there stay as they are."""
        head = self.classifier
        if new := head.grow(labels):
            with torch.no_grad():
                nn.init.kaiming_normal_(head.weight[-new:])

    def decode(self, z: Tensor) -> Tensor:
        """Return the logits of the pixels of (n, latent): (n, pixels)."""
        logits: Tensor = self.decoder(z)
        return logits
