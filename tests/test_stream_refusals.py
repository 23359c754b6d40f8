"""Streams that can't be played, and samples, data sets and options that are none: each is refused in one sentence."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
from clstream.streams import blobs, from_dataset, from_tensors, permuted_mnist, rotated_mnist
from clstream.streams.data import load
from numbered_streams import numbered

from clstream.stream import Samples, Stream, Task

X, Y = numbered(per_class=2)


def task(number=0, classes=(0, 1), n=4, **parts):
    samples = Samples(torch.rand(n, 3), torch.arange(n) % 2)
    return Task(number, classes, **{"train": samples, "test": samples, **parts})


EMPTY = Samples(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "no tasks"),
        ([task()], {"schedule": []}, "schedule is empty"),
        ([task()], {"schedule": [0, 1]}, "session 1 draws from task 1"),
        ([task()], {"schedule": [-1]}, "session 0 draws from task -1"),
        ([task()], {"schedule": [0] * 5}, "4 training samples, too few for 5 sessions"),
        ([task()], {"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ([task()], {"batch_size": 2.0}, "batch_size must be a whole number"),
        ([task()], {"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ([task()], {"scenario": "instance"}, "one of class, task, domain, not 'instance'"),
        ([task(1)], {}, "position 0 has id 1"),
        ([task(classes=())], {}, "distinct classes"),
        ([task(classes=(0, 1, 1))], {}, "distinct classes"),
        ([task(classes=(-1, 0, 1))], {}, "distinct classes from 0 up"),
        ([task(), task(1, train=EMPTY)], {}, "task 1 has no training samples"),
        ([task(test=EMPTY)], {}, "task 0 has no test samples"),
        ([task(validation=EMPTY)], {}, "task 0 has no validation samples"),
        ([task(classes=(0, 2))], {}, r"training samples of task 0 have labels \[1\], which are not among its classes \(0, 2\)"),
        ([task(test=Samples(torch.rand(2, 3), torch.tensor([0, 7])))], {}, r"test samples of task 0 have labels \[7\]"),
        ([task(test=Samples(torch.rand(2, 3), torch.tensor([0])))], {}, "2 inputs with 1 labels"),
        ([task(test=Samples(torch.rand(2, 4), torch.tensor([0, 1])))], {}, "one shape and dtype"),
        ([task(test=Samples(torch.rand(2, 3).double(), torch.tensor([0, 1])))], {}, "one shape and dtype"),
    ],
)
def test_a_stream_that_can_not_be_played_is_refused(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        Stream("bad", tasks, **options)


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0], [1]])])
def test_labels_of_a_task_must_be_int64(labels):
    with pytest.raises(TypeError, match=r"test samples of task 0 need labels as a \(samples,\) tensor of int64"):
        Stream("bad", [task(test=Samples(torch.rand(2, 3), labels))])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 37, 59])
def test_inputs_that_are_not_finite_are_refused_by_row(value, row):
    x, y = numbered()
    x[row, 1] = value
    with pytest.raises(ValueError, match=rf"input {row} of the data is NaN or infinite"):
        from_tensors(x, y, *numbered(4))
    with pytest.raises(ValueError, match=r"test samples of task \d: input 0 of the data is NaN or infinite"):
        from_tensors(*numbered(4), x[[row]], y[[row]], tasks=1)


def test_a_row_far_into_the_data_is_named_too():
    x = torch.zeros(20_000, 1)
    x[17_321] = float("nan")
    y = torch.arange(20_000) % 2
    with pytest.raises(ValueError, match="input 17321 of the data"):
        from_tensors(x, y, x[:2], y[:2], tasks=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": 7}, ValueError, "6 classes make 1 to 6 tasks, not 7"),
        ({"tasks": 0}, ValueError, "tasks must be a whole number of at least 1, not 0"),
        ({"scenario": "online"}, ValueError, "scenario must be one of"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"sessions_per_task": 0}, ValueError, "sessions_per_task must be a whole number of at least 1, not 0"),
        ({"sessions_per_task": 5}, ValueError, "too few for 5 sessions"),
        ({"sessions_per_task": 2, "schedule": [0, 1]}, ValueError, "exclude each other"),
        ({"schedule": []}, ValueError, "schedule is empty"),
        ({"class_order": [0, 1, 2, 3, 4]}, ValueError, "name each of the classes"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, ValueError, "name each of the classes"),
        ({"class_order": [1, 2, 3, 4, 5, 6]}, ValueError, "name each of the classes"),
        ({"validation": 1.0}, ValueError, "from 0 to below 1, not 1.0"),
        ({"validation": -0.1}, ValueError, "from 0 to below 1, not -0.1"),
        ({"validation": float("nan")}, ValueError, "from 0 to below 1, not nan"),
        ({"validation": 0.01}, ValueError, "leaves one part empty"),
        ({"validation": 0.99}, ValueError, "leaves one part empty"),
        ({"y": Y[:-1]}, ValueError, "training inputs are 12, labels 11"),
        ({"y": Y - 1}, ValueError, "labels must be from 0 up, not -1"),
        ({"y": Y.float()}, TypeError, "training labels must be one whole number each"),
        ({"y": Y > 2}, TypeError, "training labels must be one whole number each"),
        ({"y": Y[:, None]}, TypeError, "training labels must be one whole number each"),
        ({"y_test": Y.double()}, TypeError, "test labels must be one whole number each"),
        ({"y_test": Y + 1}, ValueError, r"labels \[6\] are in the test set only: a class needs training samples"),
        ({"x": X > 0}, TypeError, r"integers or real numbers, not torch\.bool"),
        ({"x": X + 1j}, TypeError, r"integers or real numbers, not torch\.complex64"),
        ({"x": np.array(["a"] * 12)}, TypeError, "training inputs must be a tensor, an array or a list of numbers"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "training set is empty"),
        ({"x_test": X[:0], "y_test": Y[:0]}, ValueError, "test set is empty"),
        ({"x_test": X[Y < 4], "y_test": Y[Y < 4]}, ValueError, "task 2 has no test samples"),
        ({"x_test": X[:, :1]}, ValueError, "one shape and dtype"),
        ({"x_test": X.byte()}, ValueError, "one shape and dtype"),
    ],
)
def test_bad_tensors_and_options_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        from_tensors(**{"x": X, "y": Y, "x_test": X, "y_test": Y, "tasks": 3, **change})


@pytest.mark.parametrize("option", ["classes", "features", "train_per_class", "test_per_class"])
def test_blobs_refuses_sizes_below_one(option):
    with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, not 0"):
        blobs(**{option: 0})


class Changing:
    """A data set whose input and label are others from row 8 on, or from row 256 on: the loader's second batch."""

    def __init__(self, n=12, x=torch.zeros(3), y=0):
        self.n, self.x, self.y = n, x, y

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return (self.x if index >= (8 if self.n < 256 else 256) else torch.zeros(3)), index % 3 + self.y


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Changing(0), ValueError, r"train\w* set is empty"),
        (Changing(x=torch.zeros(4)), ValueError, r"one shape, not \[\(3,\), \(4,\)\]"),
        (Changing(300, x=torch.zeros(4)), ValueError, r"input 256 .*\(4,\).*\(3,\)"),
        (Changing(300, x=torch.zeros(3, dtype=torch.uint8)), ValueError, "uint8"),
        (Changing(y=0.5), (TypeError, ValueError), "whole number"),
    ],
)
def test_bad_data_sets_are_refused(dataset, error, message):
    with pytest.raises(error, match=message):
        from_dataset(dataset, Changing(), tasks=3)


@pytest.mark.parametrize("error", [OSError("no network"), URLError("no network")])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"])
def test_missing_data_names_files_and_folder(name, error, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    files = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}.get(name, "train-images-idx3-ubyte")
    for what in (name, str(tmp_path), files, "CLSTREAM_DATA"):
        assert what in message


@pytest.mark.data
@pytest.mark.parametrize("make_domains", [permuted_mnist, rotated_mnist])
@pytest.mark.parametrize("option", ["tasks", "sessions_per_task", "epochs", "batch_size"])
def test_domains_refuse_counts_below_one(make_domains, option):
    with pytest.raises(ValueError, match="at least 1"):
        make_domains(**{"tasks": 2, option: 0})
