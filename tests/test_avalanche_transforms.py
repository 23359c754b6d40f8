"""Random transforms of Avalanche's benchmarks, as augmentations of a stream."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from avalanche_benchmarks import NORMAL, Images, Import, images
from clstream.streams import from_avalanche
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv

pytestmark = pytest.mark.filterwarnings("ignore:stream generator", "ignore:No loggers")


def outcomes(call: Callable[[], Tensor], draws: int) -> set[bytes]:
    torch.manual_seed(0)
    return {(call() * 1000).round().to(torch.int32).numpy().tobytes() for _ in range(draws)}


@pytest.mark.parametrize("fill", [0, 128])
def test_random_crops_and_flips_become_an_augmentation_that_gives_the_same_images(avalanche: Import, fill: int) -> None:
    """9 crops x 2 flips x 2: in 600 draws each of 36 outcomes comes up, in theirs and in ours, and no others."""
    chain = [tv.RandomCrop(6, padding=1, fill=fill), tv.RandomHorizontalFlip(), tv.RandomVerticalFlip(), *NORMAL]
    benchmark = images(avalanche, tv.Compose(chain))
    stream = from_avalanche(benchmark)
    assert stream.augment is not None
    dataset = benchmark.train_stream[0].dataset.train()
    whole = stream.tasks[0].train[:1].x.expand(600, -1, -1, -1)
    torch.manual_seed(1)
    ours = {(image * 1000).round().to(torch.int32).numpy().tobytes() for image in stream.augment(whole)}
    assert len(ours) == 36 and ours == outcomes(lambda: dataset[0][0], 600)
    plain = tv.Compose(list(NORMAL))(Images()[0][0])
    assert torch.equal(stream.tasks[0].train[:1].x[0], plain)  # read without what is random
    assert torch.equal(stream.tasks[0].test[:1].x[0], tv.Compose(list(NORMAL))(Images(8)[0][0]))


def test_flips_are_as_likely_as_they_were(avalanche: Import) -> None:
    stream = from_avalanche(images(avalanche, tv.Compose([tv.RandomHorizontalFlip(0.2), *NORMAL])))
    x = stream.tasks[0].train[:1].x.expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    assert stream.augment is not None
    assert float((stream.augment(x) != x).flatten(1).any(1).double().mean()) == pytest.approx(0.2, abs=0.03)


def test_a_random_transform_inside_the_data_set_is_found(avalanche: Import) -> None:
    stream = from_avalanche(images(avalanche, tv.Compose(list(NORMAL)), transform=tv.RandomHorizontalFlip()))
    assert "Flip(probability=0.5" in repr(stream.augment)
    assert torch.equal(stream.tasks[0].train[:1].x[0], tv.Compose(list(NORMAL))(Images()[0][0]))


def test_a_rotation_by_one_angle_is_no_random_one(avalanche: Import) -> None:
    benchmark = images(avalanche, tv.Compose([tv.RandomRotation((90, 90)), *NORMAL]))
    stream = from_avalanche(benchmark)
    assert stream.augment is None
    assert torch.equal(stream.tasks[0].train[:1].x[0], benchmark.train_stream[0].dataset.train()[0][0])


def halved(image: Any) -> Any:
    """Half the time, nothing: random, without saying so."""
    return Image.new("RGB", image.size) if random.random() < 0.5 else image


class Speckle:
    """Noise from a generator of its own, which no look at the global ones would show."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.random.normal()


def test_transforms_of_the_second_version(avalanche: Import) -> None:
    from torchvision.transforms import v2

    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])]
    chain = [v2.ToImage(), v2.RandomCrop(6, padding=[1, 0], fill=9), v2.RandomVerticalFlip(), *scale]
    benchmark = images(avalanche, v2.Compose(chain), v2.Compose([v2.ToImage(), *scale]))
    stream = from_avalanche(benchmark)
    assert stream.augment is not None
    torch.manual_seed(1)
    drawn = stream.augment(stream.tasks[0].train[:1].x.expand(200, -1, -1, -1))
    ours = {(image * 1000).round().to(torch.int32).numpy().tobytes() for image in drawn}
    dataset = benchmark.train_stream[0].dataset.train()
    assert len(ours) == 6 and ours == outcomes(lambda: torch.as_tensor(dataset[0][0]).as_subclass(Tensor), 200)


@pytest.mark.parametrize(
    ("chain", "sentence"),
    [
        ([*NORMAL, Speckle()], "Speckle is random, and is not known to act on whole batches"),
        ([tv.ColorJitter(0.5), *NORMAL], "ColorJitter is random, and is not known to act on whole batches"),
        ([halved, *NORMAL], "halved is random, and is not known to act on whole batches"),
        ([tv.RandomCrop(4), *NORMAL], "RandomCrop changes the size of the images"),
        ([tv.RandomHorizontalFlip(), tv.Pad(1), *NORMAL], "Pad comes after a random one and moves pixels"),
        ([tv.RandomCrop(6, padding=1, padding_mode="reflect"), *NORMAL], "pads in another way"),
    ],
)
def test_other_random_transforms_are_refused(avalanche: Import, chain: list[Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        from_avalanche(images(avalanche, tv.Compose(chain)))
    assert "augment=..." in str(refusal.value) and "lazy=True" in str(refusal.value)


def test_lazily_they_are_done_sample_by_sample(avalanche: Import) -> None:
    """At the start of the chain the images are what PIL had, to the bit: a chain that negates them at random shows it."""
    benchmark = images(avalanche, tv.Compose([tv.RandomInvert(), tv.RandomVerticalFlip(), *NORMAL]))
    stream = from_avalanche(benchmark, lazy=True)
    assert stream.augment is not None
    dataset = benchmark.train_stream[0].dataset.train()
    x = stream.tasks[0].train[:1].x
    assert len(outcomes(lambda: dataset[0][0], 60)) == 4
    assert outcomes(lambda: stream.augment(x)[0], 60) == outcomes(lambda: dataset[0][0], 60)
    with pytest.raises(ValueError, match="Resize can't be undone"):
        from_avalanche(images(avalanche, tv.Compose([tv.ColorJitter(0.5), tv.Resize(6), *NORMAL])), lazy=True)


def test_what_is_tested_must_not_be_random(avalanche: Import) -> None:
    random_eval = tv.Compose([tv.RandomHorizontalFlip(), *NORMAL])
    with pytest.raises(ValueError, match="RandomHorizontalFlip is random, and what is tested must stay the same"):
        from_avalanche(images(avalanche, tv.Compose(list(NORMAL)), random_eval))
    with pytest.raises(ValueError, match="what Images gives is random"):
        from_avalanche(images(avalanche, tv.Compose(list(NORMAL)), noisy=True), lazy=True)


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


class Rarely:
    """A transform with a generator of its own, which mostly does nothing."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x + 1 if self.random.random() < 0.4 else x


@pytest.mark.parametrize("transform", [tv.Lambda(noise), Rarely()], ids=["Lambda", "a generator of its own"])
def test_noise_of_ones_own_is_not_frozen_into_the_data(avalanche: Import, transform: Any) -> None:
    given = tv.Compose([tv.ToTensor(), transform])
    images = Images()
    for group in ("train", "eval"):
        options = {"train_transform": None, "eval_transform": None, f"{group}_transform": given}
        options = {name: transform or tv.ToTensor() for name, transform in options.items()}
        benchmark = avalanche("benchmarks").nc_benchmark(images, images, 2, task_labels=False, **options)
        with pytest.raises(ValueError, match="random"):
            from_avalanche(benchmark)
