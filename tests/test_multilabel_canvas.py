"""Canvases of several objects: what is on them is what their targets say."""

from __future__ import annotations

import pytest
import torch
from clstream.streams import multilabel_canvas
from clstream.streams.data import source
from clstream.streams.multilabel_canvas import canvases

from clstream.stream import Samples


def cells(x: torch.Tensor) -> torch.Tensor:
    """Return the four quarters of canvases: (n, 4, channels, height, width)."""
    height, width = (side // 2 for side in x.shape[2:])
    quarters = [x[:, :, top : top + height, left : left + width] for top in (0, height) for left in (0, width)]
    return torch.stack(quarters, 1)


@pytest.mark.parametrize("data", ["digits", pytest.param("mnist+fashion_mnist", marks=pytest.mark.data)])
def test_each_cell_is_empty_or_an_object_of_the_same_part_of_the_data_and_targets_name_them_all(data: str) -> None:
    train, test = canvases(data, 200, 100, 0)
    origins = [source(name) for name in data.split("+")] if data == "digits" else [source("MNIST"), source("FashionMNIST")]
    for kind, samples in enumerate((train, test)):
        labels: dict[bytes, set[int]] = {}
        for number, parts in enumerate(origins):
            for image, label in zip(parts[kind].x, parts[kind].y.tolist(), strict=True):
                labels.setdefault(image.numpy().tobytes(), set()).add(label + 10 * number)
        quarters = cells(samples.x)
        occupied = quarters.flatten(2).any(2)
        assert samples.x.dtype == origins[0][0].x.dtype and samples.y.shape == (len(samples), 10 * len(origins))
        for row in range(len(samples)):
            objects = [labels[quarters[row, cell].contiguous().numpy().tobytes()] for cell in occupied[row].nonzero().flatten()]
            assert all(len(several) == 1 for several in objects)
            assert set(samples.y[row].nonzero().flatten().tolist()) == set().union(*objects)
        counts = occupied.sum(1).bincount(minlength=5)
        assert counts[0] == 0 and min(counts[1:]) > 0.15 * len(samples), "1 to 4 objects, uniformly"
        assert occupied.float().mean(0).std() < 0.05, "no cell is preferred"


def test_canvases_are_a_pure_function_of_the_seed() -> None:
    def same(one: Samples, other: Samples) -> bool:
        return torch.equal(one.x, other.x) and torch.equal(one.y, other.y)

    torch.manual_seed(3)
    train, test = canvases("digits", 50, 50, 1)
    again, _ = canvases("digits", 50, 20, 1)
    other, _ = canvases("digits", 50, 50, 2)
    assert same(train, again) and not same(train, other) and not torch.equal(train.x, test.x)


def test_a_canvas_comes_in_the_task_of_each_of_its_objects() -> None:
    stream = multilabel_canvas(train=400, test=100)
    times = torch.zeros(400)
    for task in stream.tasks:
        times[task.train.index] += 1  # type: ignore[union-attr]
    y = stream.data.parts["train"].y  # type: ignore[union-attr]
    assert torch.equal(times, y.view(400, 5, 2).amax(2).sum(1))
    assert "1 to 4 objects of digits on a canvas of 2 x 2" in str(stream) and stream.input_shape == (1, 16, 16)


@pytest.mark.data
def test_two_data_sets_have_their_classes_one_after_the_other() -> None:
    stream = multilabel_canvas("mnist+fashion_mnist", train=500, test=200)
    assert stream.classes == 20 and [len(task.classes) for task in stream.tasks] == [4] * 5 and stream.input_shape == (1, 56, 56)
    assert stream.class_names[9:11] == ("mnist_9", "fashion_mnist_0") and stream.name == "multilabel_canvas_mnist_fashion_mnist"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "wine"}, "data must be one of digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, not 'wine'"),
        ({"data": "MNST"}, "did you mean MNIST?"),
        ({"data": "digits+digits"}, r"data must name data sets once each, not 'digits\+digits'"),
        ({"data": 3}, "data must be the name of a data set, or of two joined by a plus, not 3"),
        ({"train": 0}, "train must be a whole number of at least 1"),
        ({"test": 0}, "test must be a whole number of at least 1"),
        ({"train": 10**9}, "take fewer"),
        ({"train": 3, "test": 3}, "no training sample has a positive of the classes"),
        ({"scenario": "domain"}, "scenario must be class or task"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multilabel_canvas(**options)  # type: ignore[arg-type]
