"""SimCLR: its views, its loss against a loop by hand, and what learns from what."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from clstream.strategies import SimCLR
from clstream.streams import blobs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Batch, Samples, run
from clstream.augmentations import ContrastiveViews, gray
from clstream.checks import example_model, example_stream
from clstream.losses import nt_xent
from clstream.models import ConvNet, Mlp


def images(n: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, 12, 16, generator=torch.Generator().manual_seed(1))


# The loss -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_loop_of_the_paper(temperature: float) -> None:
    z = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for i in range(10):
        other = (i + 5) % 10
        similar = [float(z[i] @ z[k] / (z[i].norm() * z[k].norm())) / temperature for k in range(10)]
        losses.append(-math.log(math.exp(similar[other]) / sum(math.exp(similar[k]) for k in range(10) if k != i)))
    assert float(nt_xent(z, temperature)) == pytest.approx(sum(losses) / 10, rel=1e-12)
    assert float(nt_xent(z[[0, 5]], temperature)) == pytest.approx(0, abs=1e-12)  # of one sample there is nothing to tell apart


# The views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_views_are_images_from_0_to_1_each_in_a_way_of_its_own(channels: int) -> None:
    views, x = ContrastiveViews(), (images(channels=channels) * 255).to(torch.uint8)
    kept = x.clone()
    torch.manual_seed(0)
    view = views(x)
    assert view.shape == x.shape and view.dtype == torch.float32 and torch.equal(x, kept)
    assert float(view.min()) >= 0 and float(view.max()) <= 1
    torch.manual_seed(0)
    assert torch.equal(views(x.float() / 255), view) and not torch.equal(views(x), view)
    assert len(views(x[:1].expand(32, -1, -1, -1)).flatten(1).unique(dim=0)) == 32


def test_a_crop_is_a_rectangle_of_the_image_and_mirrored_only_where_asked() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)  # brightness says the column
    x = torch.cat([ramp, ramp.mT, torch.zeros_like(ramp)], 1).repeat(200, 1, 1, 1)
    crops = ContrastiveViews(0.2, flip=False).cropped(x)
    across, down = crops[:, 0], crops[:, 1]
    assert torch.allclose(across, across[:, :1], atol=1e-6) and torch.allclose(down, down[:, :, :1], atol=1e-6)
    wide, high = across[:, 0, -1] - across[:, 0, 0], down[:, -1, 0] - down[:, 0, 0]
    assert bool((wide > 0).all()) and bool((high > 0).all())
    inside = (wide < 0.9) & (high < 0.9)  # those that were not cut to the image
    areas, ratios = (wide * high)[inside], (wide / high)[inside]  # the ramps end in the middle of the outer pixels
    assert 0.15 < float(areas.min()) < 0.3 and float(areas.max()) < 1
    assert 0.7 < float(ratios.min()) < 0.8 and 1.25 < float(ratios.max()) < 1.4
    mirrored = ContrastiveViews(0.2).cropped(x)[:, 0]  # images of three channels are
    assert 60 < int((mirrored[:, 0, -1] < mirrored[:, 0, 0]).sum()) < 140
    digits = ContrastiveViews(0.2).cropped(x[:, :1])[:, 0]  # and grey ones are not
    assert bool((digits[:, 0, -1] > digits[:, 0, 0]).all())
    digits = ContrastiveViews(0.2, flip=True).cropped(x[:, :1])[:, 0]
    assert 60 < int((digits[:, 0, -1] < digits[:, 0, 0]).sum()) < 140


def test_each_part_of_the_jitter_does_its_own() -> None:
    x = images()
    grey = gray(x)
    torch.manual_seed(0)
    coloured = ContrastiveViews(jitter=1.0).coloured(grey)
    torch.testing.assert_close(coloured, coloured[:, :1].expand(-1, 3, -1, -1))  # grey stays grey
    torch.testing.assert_close(ContrastiveViews(jitter=0).coloured(x), x)
    pale = 0.5 + 0.1 * (x - 0.5)  # nothing is clamped: what is done to an image is affine
    torch.manual_seed(0)
    a = ContrastiveViews(jitter=0.3).coloured(pale)
    torch.manual_seed(0)
    b = ContrastiveViews(jitter=0.3).coloured(pale.flip(2, 3))
    torch.testing.assert_close(a, b.flip(2, 3))  # each pixel by itself
    assert not torch.allclose(a, pale, atol=0.02)
    every = ContrastiveViews(grayscale=1.0, blur=0)(x)
    torch.testing.assert_close(every, every[:, :1].expand(-1, 3, -1, -1))


def test_blur_keeps_a_flat_image_and_is_a_gaussian_of_each_image() -> None:
    views = ContrastiveViews()
    flat = torch.full((4, 3, 12, 16), 0.3)
    torch.testing.assert_close(views.blurred(flat), flat)
    point = torch.zeros(2, 3, 11, 11)
    point[:, :, 5, 5] = 1
    torch.manual_seed(3)
    blurred = views.blurred(point)
    torch.manual_seed(3)
    for image, deviation in zip(blurred, (0.1 + 1.9 * torch.rand(2, 1)).flatten().tolist(), strict=True):
        weights = torch.tensor([math.exp(-(k**2) / deviation**2 / 2) for k in (-1, 0, 1)])
        weights /= weights.sum()
        torch.testing.assert_close(image[0, 4:7, 4:7], weights[:, None] * weights)
        torch.testing.assert_close(image.sum((1, 2)), torch.ones(3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"smallest": 0.0}, "smallest must be"),
        ({"smallest": 1.5}, "smallest must be a finite number from 0 to 1, not 1.5"),
        ({"jitter": 2.0}, "jitter must be a finite number from 0 to 1.25, not 2.0"),
        ({"blur": -1}, "blur must be a finite number from 0 to 1, not -1"),
        ({"flip": "yes"}, "flip must be True or False or None"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"projection": 0}, "projection must be a whole number of at least 1"),
    ],
)
def test_what_simclr_refuses(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SimCLR(example_model(), **options)


# What learns from what ----------------------------------------------------------------------------------------------------


def test_the_network_learns_without_labels_and_the_head_with_them() -> None:
    torch.manual_seed(0)
    model = ConvNet((1, 8, 8), 6, channels=(4, 4, 4), hidden=16)
    strategy = SimCLR(model, partial(SGD, lr=0.0))
    samples = example_stream().tasks[0].train[:16]

    def gradients(y: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        strategy.learn(Batch(Samples(samples.x, y), None, 0, 0))
        return model.stages.conv1[0].weight.grad.clone(), model.head.weight.grad.clone()

    (network, head), (same, other) = gradients(samples.y), gradients(1 - samples.y)
    assert torch.equal(network, same) and float(network.abs().max()) > 0
    assert not torch.allclose(head, other)
    torch.manual_seed(0)
    views = strategy.views(torch.cat([samples.x, samples.x]))
    features = model.features(views).detach()
    expected = nt_xent(strategy.projection(features), 0.5) + F.cross_entropy(model.head(features), samples.y.repeat(2))
    torch.manual_seed(0)
    torch.testing.assert_close(strategy.loss(samples), expected)


def test_it_is_refused_where_there_are_no_images_or_no_features() -> None:
    with pytest.raises(ValueError, match=r"SimCLR learns from images .*, and blobs has inputs of the shape \(20,\)"):
        run(SimCLR(Mlp(20, 10, hidden=(8,))), blobs())
    with pytest.raises(TypeError, match=r"SimCLR needs a model with .* `features` and a linear `head`, .* which Linear hasn't"):
        SimCLR(nn.Linear(3, 2))
