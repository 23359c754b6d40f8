"""The jittered views that PRD comes with: what each part of them does to an image."""

from __future__ import annotations

import colorsys
from pathlib import Path

import pytest
import torch
from clstream.strategies import PRD
from clstream.streams import from_tensors, recorded
from torch import Tensor

from clstream import run
from clstream.augmentations import CropFlipJitter, crop_and_flip, gray
from clstream.checks import example_stream
from clstream.models import ConvNet
from clstream.recording import record


def pictures(n: int = 64, channels: int = 3) -> Tensor:
    return torch.randint(256, (n, channels, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("clamp_quirk", [False, True])
def test_jittered_views_are_images_from_0_to_1_of_the_same_shape(channels: int, clamp_quirk: bool) -> None:
    views, x = CropFlipJitter(clamp_quirk=clamp_quirk), pictures(channels=channels)
    kept = x.clone()
    torch.manual_seed(0)
    view = views(x)
    assert view.shape == x.shape and view.dtype == torch.float32
    assert float(view.min()) >= 0 and float(view.max()) <= 1
    assert torch.equal(x, kept) and not torch.equal(view, views(x))
    torch.manual_seed(0)
    torch.testing.assert_close(views(x.float() / 255), view)
    assert len(views(x[:1].expand(32, -1, -1, -1)).flatten(1).unique(dim=0)) > 29  # each image in a way of its own


def test_without_jitter_and_grayscale_the_views_are_crops_and_flips() -> None:
    torch.manual_seed(3)
    plain = crop_and_flip(pictures()).float() / 255
    torch.manual_seed(3)
    assert torch.equal(CropFlipJitter(jitter=0, grayscale=0)(pictures()), plain)


def test_each_part_of_the_jitter_does_its_own() -> None:
    x = pictures() / 255
    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    torch.testing.assert_close(CropFlipJitter(**nothing).jittered(x), x)

    brighter = CropFlipJitter(**nothing | {"brightness": 0.4}).jittered(x)
    inside = (brighter > 0) & (brighter < 1)
    for before, after, seen in zip(x, brighter, inside, strict=True):
        added = (after - before)[seen]
        assert float(added.max() - added.min()) < 1e-6 and abs(float(added[0])) <= 0.4
    contrast = CropFlipJitter(**nothing | {"contrast": 0.4}).jittered(x)
    for before, after in zip(x, contrast, strict=True):
        factor = (after / before)[(after < 1) & (before > 0)]
        assert float(factor.max() - factor.min()) < 1e-5 and 0.6 <= float(factor[0]) <= 1.4
    coloured = CropFlipJitter(**nothing | {"saturation": 0.4}).jittered(x)
    for before, after in zip(x[:8], coloured[:8], strict=True):
        pairs = [
            (colorsys.rgb_to_hsv(*old.tolist()), colorsys.rgb_to_hsv(*new.tolist()))
            for old, new in zip(before.flatten(1).T, after.flatten(1).T, strict=True)
        ]
        factors = [new[1] / old[1] for old, new in pairs if old[1] > 0.05 and new[1] < 0.999]
        assert max(factors) - min(factors) < 1e-3 and 0.6 <= factors[0] <= 1.4
        assert all(old[2] == pytest.approx(new[2], abs=1e-6) for old, new in pairs)  # the value stays
        assert all(abs(old[0] - new[0]) < 1e-3 for old, new in pairs if old[1] > 0.05)  # and the hue


def test_the_clamping_quirk_makes_dark_pixels_mid_grey_in_four_of_five_views() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4000, 1, 8, 8)
    quirky = CropFlipJitter(clamp_quirk=True, grayscale=0)(x)
    share = float((quirky.flatten(1).amin(1) >= 0.5).float().mean())
    assert share == pytest.approx(0.8, abs=0.03)
    assert float((CropFlipJitter(grayscale=0)(x).flatten(1).amin(1) >= 0.5).float().mean()) < 0.01


def test_gray_images_have_one_value_in_all_channels() -> None:
    assert gray(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).flatten().tolist() == pytest.approx([0.299] * 3)
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(gray(x), x)
    views = CropFlipJitter(jitter=0)(pictures(2000))
    share = (views == views[:, :1]).flatten(1).all(1).float().mean()
    assert float(share) == pytest.approx(0.2, abs=0.03)


def test_views_of_its_own_stand_in_for_the_stream_s() -> None:
    stream, drawn = example_stream(), []
    object.__setattr__(stream, "augment", lambda x: drawn.append(len(x)) or x)
    run(PRD(ConvNet((1, 8, 8), 6, channels=(2, 2, 2), hidden=8), views="jitter", clamp_quirk=True), stream, max_sessions=1)
    assert len(drawn) == 1  # tried before anything is learned, and not drawn then


def test_a_recording_of_a_stream_names_its_jitter(tmp_path: Path) -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    stream = from_tensors(x, y, x, y, tasks=1, augment=CropFlipJitter(brightness=0.1))
    assert recorded(record(stream, tmp_path / "jittered.clstream"), data=stream).augment == CropFlipJitter(brightness=0.1)
    run(PRD(ConvNet((1, 8, 8), 2, channels=(2, 2, 2), hidden=8)), stream)
