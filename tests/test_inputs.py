"""What is given as data: taken as it is, or refused in one sentence before any work."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from clstream.strategies import DERpp, Finetune, Replay
from clstream.streams import from_dataset, from_tensors
from conftest import STRATEGIES, make
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from clstream import run
from clstream.checks import example_model, example_stream
from clstream.models import Mlp
from clstream.stream import Samples, Stream, Subset, Task

X, Y = torch.arange(180.0).view(60, 3) / 180, torch.arange(60) % 6


def of(x: object = X, y: object = Y, **options: object) -> Stream:
    return from_tensors(x, y, x, y, **{"tasks": 3, "batch_size": 7, **options})  # type: ignore[arg-type]


def sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 400
    return text


# Inputs that stay what they are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_stay_integers(dtype: torch.dtype) -> None:
    x = torch.arange(60)[:, None].to(dtype)
    batch = next(iter(next(iter(of(x).session(0))))).samples
    assert batch.x.dtype == dtype and set(batch.x.flatten().tolist()) <= set(range(60))


def test_tokens_above_two_to_the_twenty_fourth_do_not_collide() -> None:
    ids = 2**24 + torch.arange(60)[:, None]
    assert len(torch.cat([session.samples.x for session in of(ids)]).unique()) == 60
    assert len(ids.float().unique()) < 60  # as they did


@pytest.mark.parametrize(("dtype", "kept"), [(np.uint16, torch.int32), (np.uint32, torch.int64)])
def test_unsigned_numbers_are_widened_without_loss(dtype: type, kept: torch.dtype) -> None:
    most = np.iinfo(dtype).max
    x = most - np.arange(60, dtype=dtype)[:, None]
    stream = of(x)
    assert stream.tasks[0].train.x.dtype == kept
    assert sorted(torch.cat([task.train.x.flatten() for task in stream.tasks]).tolist()) == sorted(int(v) for v in x.flatten())


@pytest.mark.slow
def test_a_model_that_embeds_gets_its_tokens() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.EmbeddingBag(100, 8), nn.Linear(8, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            answer: Tensor = self.head(self.embed(tokens))
            return answer

    tokens = (Y * 10)[:, None] + torch.arange(4)
    for strategy in (Finetune, Replay, DERpp):
        torch.manual_seed(0)
        result = run(strategy(Words()), of(tokens, epochs=20))
        assert result.task_accuracy[-1].mean() > 0.9


def test_our_models_learn_integers_as_the_same_floats() -> None:
    whole = (X * 180).long()
    rows = []
    for x in (whole, whole.float()):
        torch.manual_seed(0)
        strategy = Replay(Mlp(3, 6, hidden=(8,)))
        result = run(strategy, of(x, epochs=3))
        rows.append([result.accuracy, *strategy.model.state_dict().values()])
    assert all(torch.equal(one, two) for one, two in zip(*rows, strict=True))


@pytest.mark.parametrize("x", [X.numpy(), X.tolist(), X.double(), X.t().contiguous().t(), torch.stack([X, X], 2)[..., 0]])
def test_other_ways_to_hold_the_same_numbers_are_taken(x: object) -> None:
    assert of(x).fingerprint == of().fingerprint


@pytest.mark.parametrize("y", [Y.numpy(), Y.tolist(), Y.to(torch.uint8), Y.to(torch.int32), Y.numpy().astype(np.uint64)])
def test_whole_labels_of_any_kind_are_taken(y: object) -> None:
    assert of(y=y).fingerprint == of().fingerprint


# Inputs and labels that are refused --------------------------------------------------------------------------------------

FRAME = pd.DataFrame(X.numpy())
ONE_HOT = nn.functional.one_hot(Y, 6)
SEVERAL = torch.ones(60, 6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (FRAME, r"training inputs must be a tensor or an array, not a DataFrame: its \.to_numpy\(\) makes one"),
        (FRAME[0], "not a Series"),
        (scipy.sparse.csr_matrix(X.numpy()), r"must be dense, not a sparse csr_matrix: its \.toarray\(\)"),
        (X.to_sparse(), r"must be dense, not sparse: \.to_dense\(\)"),
        (X.clone().requires_grad_(), r"require a gradient.*: \.detach\(\) them"),
        ({"pixels": X}, "must be a tensor, an array or a list of numbers, not a dict"),
        ("pixels", "not a str"),
        (None, "not a NoneType"),
        (5, "not a int"),
        ([[1.0, 2.0], [3.0]], "must be a tensor, an array or a list of numbers: "),
        (np.array([None] * 60), "must be a tensor, an array or a list of numbers: "),
        (torch.tensor(1.0), "not a single number"),
        (X[:59], "inputs are 59, labels 60"),
        (X > 0.5, "must be integers or real numbers, not torch.bool: .float\\(\\) makes"),
        (X + 1j, "must be integers or real numbers, not torch.complex64"),
        (torch.where(X > 0.5, torch.nan, X), "is NaN or infinite"),
        (X.double() * 1e300, "is NaN or infinite"),  # too great for float32
    ],
)
def test_inputs_that_are_refused(x: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        of(x)
    sentence(caught.value)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array(list("abcdef"))[Y], "labels are strings: relabel=True numbers them"),
        ([str(label) for label in Y.tolist()], "labels are strings: relabel=True"),
        (ONE_HOT, r"not a row of 6 numbers: y\.argmax\(1\) are the labels"),
        (ONE_HOT.float(), r"y\.argmax\(1\) are the labels"),
        (SEVERAL, "not a row of 6 numbers: several labels of a sample need target='multilabel'"),
        (Y[:, None], r"y\.flatten\(\) are the labels"),
        (Y.float(), r"not \(60,\) of torch.float32: y\.long\(\) makes whole numbers"),
        (Y > 2, r"not \(60,\) of torch.bool: y\.long\(\)"),
        (torch.tensor(3), r"not \(\) of torch.int64"),
        (3, "not a int"),
        (Y - 1, "labels must be from 0 up, not -1: relabel=True numbers any labels"),
        (pd.Series(Y.numpy()), "not a Series"),
        (Y[:0], "training set is empty"),
        (Y.to_sparse(), "must be dense"),
        (None, "not a NoneType"),
        (Y * 100_000, "the greatest label is 500000"),
    ],
)
def test_labels_that_are_refused(y: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        of(y=y)
    sentence(caught.value)


def test_inputs_of_two_dtypes_are_refused_not_promoted() -> None:
    with pytest.raises(ValueError, match="one shape and dtype"):
        from_tensors(X, Y, (X * 180).long(), Y, tasks=3)


class Pairs:
    """A data set of given items."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"x": X[0], "y": 0}], "must be a pair of input and label, not a dict"),
        ([(X[0], 0, 1)], "must be a pair of input and label, not 3 values"),
        ([X[0]], "must be a pair of input and label, not a Tensor"),
        ([({"a": X[0]}, 0)], "not a dict"),
        ([(X[0], "cat")], "labels are strings: relabel=True"),
        ([(X[0], ONE_HOT[0])], r"not of shape \(6,\): of a one-hot row take y.argmax\(\)"),
        ([(X[0], [0, 1])], "not a list: of a one-hot row"),
        ([(X[0], 0.0)], "labels must be whole numbers, not 0.0"),
        ([(X[0], torch.tensor(1.0))], "labels must be whole numbers, not 1.0"),
        ([(X[0], True)], "labels must be whole numbers, not True"),
        ([(X[0], None)], "labels must be whole numbers, not None"),
        ([(X[0], 0), (X[0].long(), 1)], r"one dtype, not \[torch.float32, torch.int64\]"),
        ([(X[0], 0), (X[0].byte(), 1)], r"one dtype, not \[torch.float32, torch.uint8\]"),
        ([(X[0].to_sparse(), 0)], "must be dense"),
        ([(X[0] > 0, 0)], "must be integers or real numbers"),
        ([("a picture", 0)], "not a str"),
    ],
)
def test_items_of_a_data_set_that_are_refused(items: list[object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        from_dataset(Pairs(*items), Pairs(*items), tasks=1, progress=False)  # type: ignore[arg-type]
    sentence(caught.value)


@pytest.mark.parametrize(
    "label", [1, torch.tensor(1), torch.tensor([1]), np.int32(1), np.array([1]), torch.tensor(1, dtype=torch.uint8)]
)
def test_items_whose_label_is_a_whole_number_are_taken(label: object) -> None:
    items = Pairs(*[(X[index], label) for index in range(4)])
    assert from_dataset(items, items, tasks=1, progress=False).tasks[0].classes == (1,)  # type: ignore[arg-type]


def test_integers_of_a_data_set_stay_integers() -> None:
    data = TensorDataset(2**24 + torch.arange(60)[:, None], Y)
    stream = from_dataset(data, data, tasks=3, progress=False)
    assert stream.tasks[0].train.x.dtype == torch.int64
    assert len(torch.cat([task.train.x for task in stream.tasks]).unique()) == 60


def test_folders_that_number_other_classes_alike_are_refused(tmp_path: Path) -> None:
    """What is class 1 in a folder of three is class 0 in one without the first: accuracy would be that of other classes."""
    for part, labels in (("train", "cat dog fox"), ("same", "cat dog fox"), ("fewer", "dog fox"), ("more", "ant cat dog fox")):
        for label in labels.split():
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / label / "0.png")
    sets = {part.name: ImageFolder(str(part)) for part in tmp_path.iterdir()}
    assert from_dataset(sets["train"], sets["same"], tasks=3, progress=False).classes == 3
    for part, other in (("fewer", "dog"), ("more", "ant")):
        with pytest.raises(ValueError, match=f"label 0 is 'cat' in the training set and '{other}' in the test set: give both"):
            from_dataset(sets["train"], sets[part], tasks=3, progress=False)
    named = TensorDataset(X, Y)
    named.class_to_idx = {"cat": 0}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="label 0 is 'cat' in the training set and 'dog' in the test set"):
        from_dataset(named, sets["fewer"], tasks=3, progress=False)


def test_a_data_set_that_is_iterated_is_refused() -> None:
    class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield X[0], 0

    with pytest.raises(TypeError, match="has no length, or no items"):
        from_dataset(Endless(), Endless())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y))
    with pytest.raises(TypeError, match=r"dataset: train set is a DataLoader.*pass its data set, loader\.dataset"):
        from_dataset(loader, loader)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Samples(X.numpy(), Y), "need inputs as a tensor, not a ndarray"),  # type: ignore[arg-type]
        (Samples(X, Y.tolist()), "need labels as a tensor, not a list"),  # type: ignore[arg-type]
        (Samples(X.to_sparse(), Y), "need inputs as a dense tensor"),
        (Samples(X.clone().requires_grad_(), Y), r"have inputs that require a gradient.*\.detach\(\)"),
        (Samples(X, Y, {"logits": X.clone().requires_grad_()}), "have logits that require a gradient"),
        (Samples(torch.tensor(1.0), Y), "not a single number"),
        (Samples(X > 0, Y), "need inputs of integers or real numbers, not torch.bool"),
        (Samples(X + 1j, Y), "not torch.complex64"),
        (Samples(X[:5], Y), "are 5 inputs with 60 labels"),
        (X, "must be Samples or a Subset, not a Tensor"),
    ],
)
def test_samples_of_a_task_that_are_refused(samples: Samples, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        Stream("s", [Task(0, tuple(range(6)), samples, Samples(X, Y))])
    sentence(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2**70}, "batch_size must be a whole number from 1 to 2147483647, not 1180591620717411303424"),
        ({"epochs": 2**70}, "epochs must be a whole number from 1 to"),
        ({"tasks": 2.0}, "tasks must be a whole number of at least 1, not 2.0"),
        ({"sessions_per_task": 1.5}, "sessions_per_task must be a whole number of at least 1, not 1.5"),
        ({"class_order": True}, "class_order must be a whole number of at least 0 or None, not True"),
        ({"class_order": [0, 1, 2, 3, 4, 5.0]}, r"class_order\[5\] must be a whole number"),
        ({"schedule": 5}, "schedule must be None, a MixedSchedule or the number of each session's task, not 5"),
        ({"schedule": [0, True]}, "session 1 draws from task True"),
        ({"schedule": [0, 1.0]}, "session 1 draws from task 1.0"),
        ({"name": 5}, "name must be a string"),
    ],
)
def test_options_of_streams_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        of(**options)  # type: ignore[arg-type]
    sentence(caught.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (5, "tasks must be a list of Task objects, not a int"),
        ([5], "tasks must be a list of Task objects, and one of them is a int"),
        ([], "has no tasks"),
    ],
)
def test_tasks_that_are_none_are_refused(tasks: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Stream("s", tasks)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the classes of a task must be whole numbers, not 'ab'"):
        Task(0, "ab", Samples(X, Y), Samples(X, Y))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns_integers_as_the_same_floats(name: str) -> None:
    """What a network turns into floats first may be anything on the way: memories, teachers, generators, experts."""
    whole = example_stream((0, 1))
    rows = []
    for dtype in (torch.int64, torch.float32):

        def cast(part: Samples | Subset, to: torch.dtype = dtype) -> Samples:
            return Samples(part[:].x.to(to) // 128, part[:].y)  # 0 and 1, as images may be

        tasks = [replace(task, train=cast(task.train), test=cast(task.test)) for task in whole.tasks]
        torch.manual_seed(0)  # some draw weights of their own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TAME's sigmoids
            rows.append(run(make(name)(example_model()), replace(whole, tasks=tasks)).accuracy)
    assert torch.equal(*rows)
