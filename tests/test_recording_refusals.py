"""A recording is replayed on the recorded data alone: other data, other code or another order is refused in one sentence."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from clstream.streams import (
    blobs,
    from_tensors,
    recorded,
    split_cifar10,
    split_digits,
    split_mnist,
)
from recorded_files import contents, crafted
from recorded_streams import Invert, by_hand, flip, own, pictures
from torch import Tensor

from clstream import Samples
from clstream.recording import record
from clstream.stream import Epoch

replaying = sys.modules["clstream.streams.recorded"]  # the function of this name hides its module


def one_pixel(x: Tensor) -> Tensor:
    x = x.clone()
    x[-1, 0, -1, -1] += 1
    return x


def one_label(y: Tensor) -> Tensor:
    y = y.clone()
    y[-1] = (y[-1] + 1) % 6
    return y


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (lambda part: replace(part, x=one_pixel(part.x)), lambda part: part, "the inputs of its part 'train' have other values"),
        (lambda part: part, lambda part: replace(part, x=one_pixel(part.x)), "the inputs of its part 'test' have other values"),
        (lambda part: replace(part, y=one_label(part.y)), lambda part: part, "the labels of its part 'train' have other values"),
        (lambda part: part, lambda part: replace(part, y=one_label(part.y)), "the labels of its part 'test' have other values"),
        (
            lambda part: part[:54],
            lambda part: part,
            r"part 'train' are \(54, 1, 6, 6\) of uint8, not \(60, 1, 6, 6\)",
        ),
        (lambda part: replace(part, x=part.x.float()), lambda part: replace(part, x=part.x.float()), "of float32, not"),
    ],
)
def test_other_data_is_refused(train, test, message, scenario, tmp_path):
    file = record(own(scenario=scenario), tmp_path / "my.clstream")
    one, two = train(pictures()), test(pictures(24, 1))
    other = from_tensors(one.x, one.y, two.x, two.y, name="others", tasks=3, scenario=scenario)
    with pytest.raises(ValueError, match=rf"the data of others is not the data that .*my\.clstream was recorded from: .*{message}"):
        recorded(file, data=other)


def test_another_data_set_is_refused(tmp_path):
    file = record(own(), tmp_path / "my.clstream")
    with pytest.raises(ValueError, match=r"the data of split_digits is not the data .*: the inputs .* are \(1352, 1, 8, 8\)"):
        recorded(file, data=split_digits())


def mnist_in(root: Path) -> tuple[Path, Path]:
    """Copy MNIST to a folder; return its files of test images and of training labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes((Path(os.environ["CLSTREAM_DATA"]) / "MNIST" / "raw" / name).read_bytes())
    return raw / "t10k-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"


@pytest.mark.data
def test_data_is_found_wherever_it_lies_and_refused_where_it_is_another(tmp_path, monkeypatch):
    stream = split_mnist(scenario="domain")
    file = record(stream, tmp_path / "my.clstream")
    images, labels = mnist_in(tmp_path / "elsewhere")
    monkeypatch.delenv("CLSTREAM_DATA")
    assert recorded(file, root=tmp_path / "elsewhere").session(0).samples[:9].x.equal(stream.session(0).samples[:9].x)
    for damaged, what in ((images, "the inputs of its part 'test'"), (labels, "the labels of its part 'train'")):
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        other = pytest.raises(ValueError, match=f"MNIST in .*elsewhere is not the data .*: {what} have other values")
        with pytest.warns(UserWarning, match=f"{damaged.name} in .* are not the known files of MNIST"), other:
            recorded(file, root=tmp_path / "elsewhere")
        damaged.write_bytes(content)


def test_data_that_is_not_there_is_named_with_its_folder(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    fake = Samples(torch.randint(0, 256, (40, 3, 4, 4), generator=draw).to(torch.uint8), torch.arange(40) % 10)
    monkeypatch.setattr("clstream.streams.splits.load", lambda name, root: (fake, fake))
    file = record(split_cifar10(augment=True), tmp_path / "my.clstream")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 is not in .*missing.*--data-root"):
        recorded(file, root=tmp_path / "missing")
    monkeypatch.setattr(replaying, "load", lambda name, root: (fake, fake))
    assert recorded(file).augment.__name__ == "crop_and_flip"


def test_points_that_another_torch_draws_otherwise_are_refused(tmp_path, monkeypatch):
    file = record(blobs(), tmp_path / "my.clstream")
    monkeypatch.setattr(replaying, "points", lambda **_: (pictures(), pictures()))
    with pytest.raises(ValueError, match="blobs, as this torch draws them, is not the data"):
        recorded(file)


def test_a_torch_that_deals_the_batches_in_another_order_is_refused(tmp_path, monkeypatch):
    file = record(blobs(), tmp_path / "my.clstream")
    order = Epoch.order
    monkeypatch.setattr(Epoch, "order", lambda epoch: order(epoch).flip(0))
    with pytest.raises(ValueError, match=r"torch \S+ deals the batches in another order than torch \d"):
        recorded(file)


def test_a_transform_that_has_changed_is_refused(tmp_path):
    file = record(by_hand(Invert()), tmp_path / "my.clstream")

    @dataclass(frozen=True)
    class Inverted:
        highest: int = 255

        def __call__(self, x: Tensor) -> Tensor:
            return self.highest - 1 - x

    @dataclass(frozen=True)
    class Renamed:
        top: int = 255

    for functions, message in (
        ({"Invert": Inverted}, "its transform Invert gives other values than when it was recorded"),
        ({"Invert": Renamed}, "Invert does not take the recorded .*'highest': 255"),
        ({}, r"uses 'Invert', which does not come with clstream: supply it, recorded\(..., functions=\{'Invert': Invert\}\)"),
    ):
        with pytest.raises(ValueError, match=message):
            recorded(file, data=by_hand(), functions=functions)


def test_a_recording_names_only_what_is_offered(tmp_path):
    """Names in the file are looked up in a table; no import and no attribute is reached by them."""
    file = tmp_path / "my.clstream"
    about, arrays = contents(own(augment=flip))
    for name in ("os.system", "print", "__import__", "clstream.streams.domains.Rotate"):
        file.write_bytes(crafted({**about, "augment": {"name": name}}, arrays))
        with pytest.raises(ValueError, match="which does not come with clstream"):
            recorded(file, data=own())
    file.write_bytes(crafted({**about, "loader": "os.system", "options": {"command": "ls"}}, arrays))
    with pytest.raises(ValueError, match="clstream can't load"):
        recorded(file)
