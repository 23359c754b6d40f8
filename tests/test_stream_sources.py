"""Where the data of streams comes from: arrays, data sets, pictures, MNIST in other domains; and augmentation."""

from collections import Counter

import numpy as np
import pytest
import torch
from clstream.streams import blobs, from_dataset, from_tensors, permuted_mnist, rotated_mnist, split_digits, split_mnist
from clstream.streams.augmentations import crop_and_flip
from clstream.streams.data import load
from numbered_streams import numbered, numbered_stream, played, rows
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import TensorDataset

X, Y = numbered(per_class=2)


def test_arrays_are_as_good_as_tensors_and_float64_becomes_float32():
    parts = *numbered(), *numbered(4)
    expected = from_tensors(*parts, tasks=3)
    for dtype in (np.float64, np.float32, np.float16):
        stream = from_tensors(*(part.numpy().astype(dtype if part.dim() > 1 else np.int32) for part in parts), tasks=3)
        assert stream.tasks[0].train.x.dtype == torch.float32
        assert stream.fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.uint64])
def test_labels_may_be_of_any_whole_dtype(dtype):
    labels = Y.numpy().astype(dtype)
    assert from_tensors(X, labels, X, labels, tasks=3).tasks[2].train.y.unique().tolist() == [4, 5]


def test_class_order_may_be_a_seed_from_numpy():
    assert [task.classes for task in numbered_stream(class_order=np.int64(1)).tasks] == [
        task.classes for task in numbered_stream(class_order=1).tasks
    ]


def test_uint8_stays_raw_and_a_read_only_array_is_fine():
    x = X.byte().numpy()
    x.setflags(write=False)
    stream = from_tensors(x, Y.numpy(), x, Y.numpy(), tasks=3)
    assert stream.tasks[0].train.x.dtype == torch.uint8
    assert sorted(rows(stream.tasks[0].train)) == [0, 1, 6, 7]


def test_tasks_are_views_of_one_copy_of_the_data():
    x, y = numbered()
    stream = from_tensors(x, y, x, y, tasks=3)
    assert {task.train.source.x.data_ptr() for task in stream.tasks} == {x.data_ptr()}


def test_blobs_are_the_same_again_and_other_ones_for_another_seed():
    assert blobs().fingerprint == blobs().fingerprint != blobs(seed=1).fingerprint
    stream = blobs(tasks=2, classes=4, features=3, train_per_class=5, test_per_class=2)
    assert (len(stream.tasks), stream.classes, stream.input_shape) == (2, 4, (3,))
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(10, 4), (10, 4)]


def test_split_digits_is_all_of_scikit_learn_s_digits():
    stream = split_digits()
    train, test = (sum(len(part) for part in parts) for parts in zip(*((t.train, t.test) for t in stream.tasks), strict=True))
    assert train + test == 1797
    assert stream.input_shape == (1, 8, 8)
    assert (float(stream.tasks[0].train.x.min()), float(stream.tasks[0].train.x.max())) == (0, 1)
    for t in stream.tasks:  # every fourth of each class
        counts, test_counts = Counter(t.train.y.tolist()), Counter(t.test.y.tolist())
        assert all(test_counts[label] == (counts[label] + test_counts[label]) // 4 for label in t.classes)


class Pictures:
    """A data set of PIL images that hold their own number."""

    def __init__(self, mode, n=12):
        self.mode, self.n = mode, n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        pixels = np.full((4, 5, 3), index, dtype=np.uint8)
        pixels[0, 1] = (1, 2, 3)
        return Image.fromarray(pixels if self.mode == "RGB" else pixels[:, :, 0]), index % 3


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_data_set_of_pictures(mode, channels):
    stream = from_dataset(Pictures(mode), Pictures(mode, 6), tasks=3, progress=False)
    assert stream.input_shape == (channels, 4, 5)
    for number, t in enumerate(stream.tasks):
        assert t.train.x.dtype == torch.uint8
        assert sorted(t.train.x[:, 0, 3, 3].tolist()) == [number, number + 3, number + 6, number + 9]
        assert t.test.x[:, :, 0, 1].tolist() == [[1, 2, 3][:channels]] * 2
        assert set(t.train.y.tolist()) == {number}


def test_a_data_set_of_tensors_equals_the_tensors():
    (x, y), test = numbered(60), numbered(2)  # more than one of the loader's batches
    stream = from_dataset(TensorDataset(x, y), TensorDataset(*test), tasks=3)
    assert stream.fingerprint == from_tensors(x, y, *test, tasks=3).fingerprint
    doubles = TensorDataset(x.double(), y)
    assert from_dataset(doubles, doubles, tasks=3).tasks[0].train.x.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_memory_map_holds_what_memory_would(tmp_path, dtype):
    x, y = numbered(60)
    data = TensorDataset(x.to(dtype), y)
    mapped = from_dataset(data, data, tasks=3, memory_map=tmp_path / "new folder")
    inside = from_dataset(data, data, tasks=3)
    assert not mapped.resident
    assert inside.resident
    assert mapped.fingerprint == inside.fingerprint
    assert played(mapped) == played(inside)
    files = [file.stat().st_size for file in (tmp_path / "new folder").iterdir()]
    assert files == [x.to(dtype).nbytes] * 2


@pytest.mark.data
def test_permuted_mnist_moves_the_pixels_of_training_and_test_alike():
    stream = permuted_mnist(tasks=3, sessions_per_task=2)
    plain, *others = stream.tasks
    train, test = load("MNIST")
    assert torch.equal(plain.train[:100].x, train.x[plain.train.index[:100]])
    assert torch.equal(plain.test.x, test.x)
    places = torch.arange(784.0).view(1, 1, 28, 28)
    orders = []
    for other in others:
        order = other.train.transform(places).flatten().long()
        assert torch.equal(order.sort().values, torch.arange(784))  # every pixel goes to one place
        assert torch.equal(other.test.x.flatten(1), test.x.flatten(1)[:, order])
        assert torch.equal(other.train[:100].x.flatten(1), train.x[other.train.index[:100]].flatten(1)[:, order])
        orders.append(order)
    assert not torch.equal(*orders)
    session = stream.session(3)
    first = next(iter(next(iter(session)))).samples
    source = others[0].train.take(slice(1, None, 2))[next(iter(session)).order()[:32]]
    assert torch.equal(first.x, source.x)
    assert torch.equal(first.y, source.y)


@pytest.mark.data
def test_permuted_mnist_scenarios_and_seeds():
    shared, own = permuted_mnist(tasks=2), permuted_mnist(tasks=2, scenario="class", pad=2, validation=0.1)
    assert [t.classes for t in shared.tasks] == [tuple(range(10))] * 2
    assert [t.classes for t in own.tasks] == [tuple(range(10)), tuple(range(10, 20))]
    assert own.input_shape == (1, 32, 32)
    assert {len(t.validation) for t in own.tasks} == {6000}
    assert shared.fingerprint == permuted_mnist(tasks=2).fingerprint != permuted_mnist(tasks=2, seed=1).fingerprint


@pytest.mark.data
def test_rotated_mnist_turns_counter_clockwise():
    stream = rotated_mnist(tasks=3, degrees=[0, 90, 180])
    plain, quarter, half = (t.test.x for t in stream.tasks)
    assert torch.equal(plain, load("MNIST")[1].x)
    assert torch.equal(quarter, plain.rot90(1, (2, 3)))
    assert torch.equal(half, plain.flip(2, 3))
    index = stream.tasks[1].train.index[:20]
    assert torch.equal(stream.tasks[1].train[:20].x, load("MNIST")[0].x[index].rot90(1, (2, 3)))
    with pytest.raises(ValueError, match="an angle for each of 2 tasks, not 3"):
        rotated_mnist(tasks=2, degrees=[0, 90, 180])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip_gives_crops_of_the_padded_image_or_their_mirrors(dtype):
    n, height, width = 200, 6, 5
    x = torch.arange(1, 1 + 2 * height * width).view(2, height, width).to(dtype).expand(n, -1, -1, -1).clone()
    x += torch.arange(n).to(dtype)[:, None, None, None] % 100  # no two images alike
    torch.manual_seed(0)
    out = crop_and_flip(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    padded, found = F.pad(x, (4, 4, 4, 4)), []
    for image, whole in zip(out, padded, strict=True):
        crops = {
            (top, left, mirrored): crop.flip(2) if mirrored else crop
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            for crop in [whole[:, top : top + height, left : left + width]]
        }
        found.append([place for place, crop in crops.items() if torch.equal(image, crop)])
    assert all(found)
    sure = [places[0] for places in found if len(places) == 1]
    assert {place[0] for place in sure} >= set(range(1, 8))
    assert 0.3 < sum(place[2] for place in sure) / len(sure) < 0.7
    assert len(set(sure)) > 60  # each image in a way of its own


def test_crop_and_flip_draws_from_the_global_generator():
    x = torch.rand(8, 3, 6, 6)
    torch.manual_seed(3)
    first = crop_and_flip(x)
    second = crop_and_flip(x)
    torch.manual_seed(3)
    assert torch.equal(crop_and_flip(x), first)
    assert not torch.equal(first, second)


@pytest.mark.data
def test_split_mnist_pads_every_image_and_nothing_else():
    plain, padded = split_mnist(validation=0.1), split_mnist(validation=0.1, pad=2)
    assert plain.input_shape == (1, 28, 28) and padded.input_shape == (1, 32, 32)
    for one, two in zip(plain.tasks, padded.tasks, strict=True):
        for part in ("train", "test", "validation"):
            before, after = getattr(one, part)[:50], getattr(two, part)[:50]
            assert torch.equal(F.pad(before.x, (2, 2, 2, 2)), after.x) and torch.equal(before.y, after.y)
    assert plain.fingerprint != padded.fingerprint
    batch, wider = (next(iter(next(iter(stream.session(1))))).samples for stream in (plain, padded))
    assert torch.equal(wider.x[:, :, 2:-2, 2:-2], batch.x) and wider.x.dtype == torch.uint8
    with pytest.raises(ValueError, match="pad must be a whole number of at least 0"):
        split_mnist(pad=-1)
