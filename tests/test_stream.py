"""Streams: every sample once, in an order that can be had again, and bad input refused in one sentence."""

from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
from clstream.streams import blobs, from_dataset, from_tensors, permuted_mnist, rotated_mnist, split_digits, split_mnist
from clstream.streams.augmentations import crop_and_flip
from clstream.streams.data import load
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from clstream.stream import Samples, Stream, Subset, Task


def numbered(each=10, classes=6, first=0):
    """Return inputs that hold their own row number and label, and labels: `each` samples of each class, interleaved."""
    y = torch.arange(classes).repeat(each)
    number = torch.arange(first, first + len(y))
    return torch.stack([number, y], 1).float(), y


def make(each=10, classes=6, tasks=3, **options):
    return from_tensors(*numbered(each, classes), *numbered(4, classes, 10_000), tasks=tasks, **options)


def rows(part):
    """Return the row numbers of samples."""
    return part.x[:, 0].int().tolist()


def played(stream):
    """Return the row numbers of all batches: by session, epoch and batch."""
    return [[[rows(batch.samples) for batch in epoch] for epoch in session] for session in stream]


def flat(epoch):
    return [row for batch in epoch for row in batch]


# Order -------------------------------------------------------------------------------------------------------------------


@given(
    each=st.integers(2, 9),
    classes=st.integers(2, 6),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 20),
    sessions_per_task=st.integers(1, 2),
    data=st.data(),
)
def test_each_sample_comes_once_an_epoch_and_the_same_way_every_time(each, classes, epochs, batch_size, sessions_per_task, data):
    tasks = data.draw(st.integers(1, classes))
    stream = make(each, classes, tasks, epochs=epochs, batch_size=batch_size, sessions_per_task=sessions_per_task)
    seen = played(stream)
    assert seen == played(stream)
    assert len(seen) == len(stream) == tasks * sessions_per_task
    for number, (session, delivered) in enumerate(zip(stream, seen, strict=True)):
        assert len(session) == len(delivered) == epochs
        for epoch, batches in zip(session, delivered, strict=True):
            assert sorted(flat(batches)) == sorted(rows(session.samples))
            assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(epoch) - 1)
            assert 1 <= len(batches[-1]) <= batch_size
        assert set(session.samples.y.tolist()) <= set(stream.tasks[stream.task_of(number)].classes)
    everything = [row for delivered in seen for row in flat(delivered[0])]
    assert sorted(everything) == list(range(each * classes))


@given(first=st.integers(0, 9), batch_size=st.integers(1, 9), epoch=st.integers(0, 2))
def test_batches_from_a_number_on_equal_skipping(first, batch_size, epoch):
    session = make(batch_size=batch_size, epochs=3).session(1)
    epoch = list(session)[epoch]
    skipped = [(batch.index, batch.epoch, rows(batch.samples)) for batch in epoch][first:]
    assert [(batch.index, batch.epoch, rows(batch.samples)) for batch in epoch.batches(first)] == skipped


def test_batches_are_numbered_and_keep_inputs_with_labels():
    for session in make(epochs=2, batch_size=7):
        for number, epoch in enumerate(session):
            assert epoch.index == number
            for index, batch in enumerate(epoch):
                assert (batch.index, batch.epoch) == (index, number)
                assert torch.equal(batch.samples.x[:, 1].long(), batch.samples.y)
                assert batch.samples.y.dtype == torch.int64


def test_order_differs_between_epochs_sessions_and_seeds():
    def order(seed=0, session=0, epoch=0):
        stream = make(each=20, tasks=2, epochs=2).reseeded(seed)
        return list(stream.session(session))[epoch].order().tolist()

    assert order() == order(seed=0)
    assert sorted(order()) == list(range(60))
    orders = [order(), order(epoch=1), order(session=1), order(seed=1), order(seed=1, epoch=1), list(range(60))]
    assert len(set(map(tuple, orders))) == len(orders)


def test_a_run_s_seed_moves_the_order_but_not_the_tasks():
    stream = make(seed=3)
    assert played(stream.reseeded(0)) == played(stream)
    other = stream.reseeded(1)
    assert played(other) != played(stream)
    for session, moved in zip(stream, other, strict=True):
        assert rows(session.samples) == rows(moved.samples)


def test_a_session_can_be_reached_directly():
    stream = make(schedule=[0, 1, 0, 2])
    for number, session in enumerate(stream):
        assert session.index == number
        assert rows(stream.session(number).samples) == rows(session.samples)


def test_order_ignores_and_leaves_the_global_generator():
    torch.manual_seed(1)
    first = played(make())
    state = torch.get_rng_state()
    assert played(make()) == first
    assert torch.equal(torch.get_rng_state(), state)


# Sessions and tasks ------------------------------------------------------------------------------------------------------


def test_sessions_of_a_task_share_its_samples_without_overlap():
    stream = make(each=11, sessions_per_task=3)
    assert [stream.task_of(number) for number in range(len(stream))] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for number, task in enumerate(stream.tasks):
        parts = [rows(stream.session(3 * number + part).samples) for part in range(3)]
        assert sorted(row for part in parts for row in part) == sorted(rows(task.train))
        assert sorted(map(len, parts)) == [7, 7, 8]  # 22 samples


def test_a_schedule_deals_out_a_task_that_comes_back():
    stream = make(schedule=[1, 0, 1], tasks=2)
    assert [stream.task_of(number) for number in range(3)] == [1, 0, 1]
    first, other, last = (set(rows(session.samples)) for session in stream)
    assert first | last == set(rows(stream.tasks[1].train))
    assert not first & last
    assert other == set(rows(stream.tasks[0].train))


def test_class_order():
    assert [task.classes for task in make().tasks] == [(0, 1), (2, 3), (4, 5)]
    assert [task.classes for task in make(class_order=[5, 0, 3, 1, 2, 4]).tasks] == [(5, 0), (3, 1), (2, 4)]
    shuffled = [[task.classes for task in make(class_order=seed).tasks] for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(label for group in shuffled[0] for label in group) == list(range(6))
    for task in make(class_order=1).tasks:
        assert set(task.train.y.tolist()) == set(task.test.y.tolist()) == set(task.classes)


@pytest.mark.parametrize(("classes", "tasks", "sizes"), [(6, 4, [2, 2, 1, 1]), (5, 2, [3, 2]), (7, 3, [3, 2, 2])])
def test_uneven_classes_are_spread_and_noted_and_none_is_dropped(classes, tasks, sizes):
    stream = make(classes=classes, tasks=tasks)
    assert [len(task.classes) for task in stream.tasks] == sizes
    assert sorted(label for task in stream.tasks for label in task.classes) == list(range(classes))
    assert f"{classes} classes don't divide evenly into {tasks} tasks: they have {', '.join(map(str, sizes))}" in str(stream)
    assert sum(len(task.train) for task in stream.tasks) == 10 * classes


def test_labels_may_have_gaps():
    y = torch.tensor([2, 2, 7, 7, 9, 9])
    stream = from_tensors(torch.randn(6, 2), y, torch.randn(6, 2), y, tasks=3)
    assert [task.classes for task in stream.tasks] == [(2,), (7,), (9,)]
    assert stream.classes == 10


def test_the_card_tells_what_the_stream_is():
    card = str(make(epochs=2, batch_size=16, boundaries=False, name="mine"))
    for line in ("mine: class-incremental, boundaries hidden", "tasks        3", "classes      6", "inputs       (2,) float32",
                 "train/test   60 / 24 samples", "sessions     3, 2 epochs each, batches of 16",
                 "task 1       classes 2, 3; 20 to train, 8 to test"):  # fmt: skip
        assert line in card
    assert "note:" not in card


# Scenarios ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_class_and_task_incremental_labels_stay(scenario):
    stream = make(scenario=scenario)
    assert stream.classes == 6
    for task in stream.tasks:
        for part in (task.train, task.test):
            assert torch.equal(part.x[:, 1].long(), part.y)


def test_domain_incremental_labels_are_places_within_the_task():
    stream = make(scenario="domain", class_order=[3, 0, 5, 1, 2, 4])
    assert stream.classes == 2
    for task, first in zip(stream.tasks, (3, 5, 2), strict=True):
        assert task.classes == (0, 1)
        for part in (task.train, task.test):
            assert torch.equal((part.x[:, 1] != first).long(), part.y)


def test_heads_hold_the_classes_of_the_task_of_each_class():
    heads = make(class_order=[3, 0, 5, 1, 2, 4]).heads
    assert heads.dtype == torch.bool
    assert [row.nonzero().flatten().tolist() for row in heads] == [[0, 3], [1, 5], [2, 4], [0, 3], [2, 4], [1, 5]]
    assert make(scenario="domain").heads.all()


def test_boundaries_can_be_hidden():
    shown, hidden = make(), make(boundaries=False)
    for number, (session, other) in enumerate(zip(shown, hidden, strict=True)):
        assert session.task is shown.tasks[number]
        assert other.task_hidden
        assert all(batch.task is session.task for epoch in session for batch in epoch)
        assert all(batch.task_hidden for epoch in other for batch in epoch)
        assert hidden.task_of(number) == number
    assert played(shown) == played(hidden)


# Validation --------------------------------------------------------------------------------------------------------------


def test_validation_is_held_back_apart_from_training_and_test():
    stream, whole = make(validation=0.2), make()
    for task, full in zip(stream.tasks, whole.tasks, strict=True):
        train, held = set(rows(task.train)), set(rows(task.validation))
        assert len(held) == 4  # of 20
        assert not train & held
        assert train | held == set(rows(full.train))
        assert rows(task.test) == rows(full.test)
        assert full.validation is None
    delivered = {row for session in played(stream) for row in flat(session[0])}
    assert delivered == {row for task in stream.tasks for row in rows(task.train)}
    held = [rows(task.validation) for task in stream.tasks]
    assert held == [rows(task.validation) for task in make(validation=0.2).tasks]
    assert held != [rows(task.validation) for task in make(validation=0.2, seed=1).tasks]


def test_a_stream_for_tuning_is_tested_on_what_was_held_back():
    stream = make(validation=0.2)
    tuning = stream.for_tuning()
    assert [rows(task.test) for task in tuning.tasks] == [rows(task.validation) for task in stream.tasks]
    assert all(task.validation is None for task in tuning.tasks)
    assert tuning.name != stream.name
    assert played(tuning) == played(stream)
    with pytest.raises(ValueError, match=r"holds back no validation samples: build it with validation"):
        make().for_tuning()


# Fingerprint -------------------------------------------------------------------------------------------------------------


def test_fingerprint_is_stable():
    stream = make()
    assert len(stream.fingerprint) == 16
    same = [make(), stream.to("cpu"), stream.reseeded(5), make(name="other", batch_size=3, epochs=2, boundaries=False)]
    assert {other.fingerprint for other in same} == {stream.fingerprint}


def test_fingerprint_changes_with_all_that_the_stream_is_made_of():
    def pixel(part, row=59):
        changed = part.clone()
        changed[row, 0] += 1
        return changed

    x, y = numbered()
    x_test, y_test = numbered(4, first=10_000)
    other_test = y_test.clone()
    other_test[[0, 1]] = other_test[[1, 0]]  # two labels of task 0 change places
    streams = {
        "as it is": from_tensors(x, y, x_test, y_test, tasks=3),
        "a training pixel": from_tensors(pixel(x), y, x_test, y_test, tasks=3),
        "a test pixel": from_tensors(x, y, pixel(x_test, 23), y_test, tasks=3),
        "a label": from_tensors(x, y, x_test, other_test, tasks=3),
        "dtype": from_tensors(x.byte(), y, x_test.byte(), y_test, tasks=3),
        "class order": make(class_order=[1, 0, 2, 3, 4, 5]),
        "tasks": make(tasks=2),
        "scenario": make(scenario="task"),
        "schedule": make(schedule=[0, 2, 1]),
        "sessions": make(sessions_per_task=2),
        "validation": make(validation=0.1),
    }
    found = {what: stream.fingerprint for what, stream in streams.items()}
    assert len(set(found.values())) == len(found), found


def test_fingerprint_tells_which_of_the_same_tensors_is_for_which_task_and_part():
    def sharing(*parts):
        return Stream("shared", [Task(number, (0, 1), *pair) for number, pair in enumerate(parts)], scenario="domain")

    one, two = (Samples(torch.rand(4, 2), torch.tensor([0, 1, 0, 1])) for _ in range(2))
    streams = [sharing((one, two), (one, two)), sharing((one, two), (two, one)), sharing((one, two), (two, two))]
    assert len({stream.fingerprint for stream in streams}) == 3


def test_fingerprint_is_of_the_samples_not_of_how_they_are_stored():
    x, y = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])

    def stream(share):
        parts = [Samples(x, y) if share else Samples(x.clone(), y.clone()) for _ in range(4)]
        return Stream("mine", [Task(0, (0, 1), *parts[:2]), Task(1, (0, 1), *parts[2:])], scenario="domain")

    assert stream(share=True).fingerprint == stream(share=False).fingerprint


# Devices -----------------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_not_resident_moves_batches_only():
    stream = make(resident=False).to("meta")
    assert all(task.train.x.device.type == "cpu" for task in stream.tasks)
    assert all(batch.samples.x.device.type == "meta" for session in stream for epoch in session for batch in epoch)


# Samples -----------------------------------------------------------------------------------------------------------------


def test_samples_are_cut_and_joined_with_their_extra_fields():
    x, y = numbered(2, 3)
    samples = Samples(x, y, {"logits": x * 2})
    for index in (slice(1, None, 2), torch.tensor([3, 3, 0])):
        part = samples[index]
        assert torch.equal(part.x, x[index])
        assert torch.equal(part.y, y[index])
        assert torch.equal(part.extra["logits"], 2 * x[index])
    joined = samples[:2] + samples[4:]
    assert rows(joined) == [0, 1, 4, 5]
    assert torch.equal(joined.extra["logits"], joined.x * 2)
    assert joined.y.tolist() == [0, 1, 1, 2]
    with pytest.raises(ValueError, match=r"\['logits'\] can't be joined to samples with \[\]"):
        samples + Samples(x, y)


def test_a_subset_gathers_rows_and_transforms_inputs():
    x, y = numbered(2, 3)
    subset = Subset(Samples(x, y, {"n": x[:, 0]}), torch.tensor([4, 1, 5]), lambda x: x + 100)
    assert rows(subset) == [104, 101, 105]
    assert subset.y.tolist() == [1, 1, 2]
    assert subset[1:].extra["n"].tolist() == [1, 5]
    assert rows(subset.take(torch.tensor([2, 0]))) == [105, 104]
    assert rows(subset.take(slice(None, None, 2))) == [104, 105]


class Counted:
    """A transform that counts its calls."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + 100


def test_a_domain_is_made_once_a_session():
    change, (x, y) = Counted(), numbered(2, 2)
    part = Subset(Samples(x, y), torch.arange(4), change)
    stream = Stream("domains", [Task(0, (0, 1), part, part)], epochs=3, batch_size=1, scenario="domain")
    session, change.calls = stream.session(0), 0
    batches = [batch for epoch in session for batch in epoch]
    assert len(batches) == 12
    assert change.calls == 0
    assert sorted(row for batch in batches[:4] for row in rows(batch.samples)) == [100, 101, 102, 103]


# Bad input ---------------------------------------------------------------------------------------------------------------


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


X, Y = numbered(each=2)


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


# Where the data comes from -----------------------------------------------------------------------------------------------


def test_arrays_are_as_good_as_tensors_and_float64_becomes_float32():
    parts = *numbered(), *numbered(4)
    expected = from_tensors(*parts, tasks=3)
    for dtype in (np.float64, np.float32, np.float16):
        made = from_tensors(*(part.numpy().astype(dtype if part.dim() > 1 else np.int32) for part in parts), tasks=3)
        assert made.tasks[0].train.x.dtype == torch.float32
        assert made.fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.uint64])
def test_labels_may_be_of_any_whole_dtype(dtype):
    labels = Y.numpy().astype(dtype)
    assert from_tensors(X, labels, X, labels, tasks=3).tasks[2].train.y.unique().tolist() == [4, 5]


def test_class_order_may_be_a_seed_from_numpy():
    assert [task.classes for task in make(class_order=np.int64(1)).tasks] == [task.classes for task in make(class_order=1).tasks]


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


# MNIST in other domains --------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("make_domains", [permuted_mnist, rotated_mnist])
@pytest.mark.parametrize("option", ["tasks", "sessions_per_task", "epochs", "batch_size"])
def test_domains_refuse_counts_below_one(make_domains, option):
    with pytest.raises(ValueError, match="at least 1"):
        make_domains(**{"tasks": 2, option: 0})


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


# Augmentation ------------------------------------------------------------------------------------------------------------


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
