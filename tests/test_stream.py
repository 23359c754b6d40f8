"""Streams: every sample once, in an order that can be had again; tasks, sessions, scenarios, fingerprints."""

import pytest
import torch
from clstream.streams import from_tensors
from hypothesis import given
from hypothesis import strategies as st
from numbered_streams import flat, numbered, numbered_stream, played, rows

from clstream.stream import Samples, Stream, Subset, Task

# Order -------------------------------------------------------------------------------------------------------------------


@given(
    per_class=st.integers(2, 9),
    classes=st.integers(2, 6),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 20),
    sessions_per_task=st.integers(1, 2),
    data=st.data(),
)
def test_each_sample_comes_once_an_epoch_and_the_same_way_every_time(
    per_class, classes, epochs, batch_size, sessions_per_task, data
):
    tasks = data.draw(st.integers(1, classes))
    stream = numbered_stream(per_class, classes, tasks, epochs=epochs, batch_size=batch_size, sessions_per_task=sessions_per_task)
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
    assert sorted(everything) == list(range(per_class * classes))


@given(first=st.integers(0, 9), batch_size=st.integers(1, 9), epoch=st.integers(0, 2))
def test_batches_from_a_number_on_equal_skipping(first, batch_size, epoch):
    session = numbered_stream(batch_size=batch_size, epochs=3).session(1)
    epoch = list(session)[epoch]
    skipped = [(batch.index, batch.epoch, rows(batch.samples)) for batch in epoch][first:]
    assert [(batch.index, batch.epoch, rows(batch.samples)) for batch in epoch.batches(first)] == skipped


def test_batches_are_numbered_and_keep_inputs_with_labels():
    for session in numbered_stream(epochs=2, batch_size=7):
        for number, epoch in enumerate(session):
            assert epoch.index == number
            for index, batch in enumerate(epoch):
                assert (batch.index, batch.epoch) == (index, number)
                assert torch.equal(batch.samples.x[:, 1].long(), batch.samples.y)
                assert batch.samples.y.dtype == torch.int64


def test_order_differs_between_epochs_sessions_and_seeds():
    def order(seed=0, session=0, epoch=0):
        stream = numbered_stream(per_class=20, tasks=2, epochs=2).reseeded(seed)
        return list(stream.session(session))[epoch].order().tolist()

    assert order() == order(seed=0)
    assert sorted(order()) == list(range(60))
    orders = [order(), order(epoch=1), order(session=1), order(seed=1), order(seed=1, epoch=1), list(range(60))]
    assert len(set(map(tuple, orders))) == len(orders)


def test_a_run_s_seed_moves_the_order_but_not_the_tasks():
    stream = numbered_stream(seed=3)
    assert played(stream.reseeded(0)) == played(stream)
    other = stream.reseeded(1)
    assert played(other) != played(stream)
    for session, moved in zip(stream, other, strict=True):
        assert rows(session.samples) == rows(moved.samples)


def test_a_session_can_be_reached_directly():
    stream = numbered_stream(schedule=[0, 1, 0, 2])
    for number, session in enumerate(stream):
        assert session.index == number
        assert rows(stream.session(number).samples) == rows(session.samples)


def test_order_ignores_and_leaves_the_global_generator():
    torch.manual_seed(1)
    first = played(numbered_stream())
    state = torch.get_rng_state()
    assert played(numbered_stream()) == first
    assert torch.equal(torch.get_rng_state(), state)


# Sessions and tasks ------------------------------------------------------------------------------------------------------


def test_sessions_of_a_task_share_its_samples_without_overlap():
    stream = numbered_stream(per_class=11, sessions_per_task=3)
    assert [stream.task_of(number) for number in range(len(stream))] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for number, task in enumerate(stream.tasks):
        parts = [rows(stream.session(3 * number + part).samples) for part in range(3)]
        assert sorted(row for part in parts for row in part) == sorted(rows(task.train))
        assert sorted(map(len, parts)) == [7, 7, 8]  # 22 samples


def test_a_schedule_deals_out_a_task_that_comes_back():
    stream = numbered_stream(schedule=[1, 0, 1], tasks=2)
    assert [stream.task_of(number) for number in range(3)] == [1, 0, 1]
    first, other, last = (set(rows(session.samples)) for session in stream)
    assert first | last == set(rows(stream.tasks[1].train))
    assert not first & last
    assert other == set(rows(stream.tasks[0].train))


def test_class_order():
    assert [task.classes for task in numbered_stream().tasks] == [(0, 1), (2, 3), (4, 5)]
    assert [task.classes for task in numbered_stream(class_order=[5, 0, 3, 1, 2, 4]).tasks] == [(5, 0), (3, 1), (2, 4)]
    shuffled = [[task.classes for task in numbered_stream(class_order=seed).tasks] for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(label for group in shuffled[0] for label in group) == list(range(6))
    for task in numbered_stream(class_order=1).tasks:
        assert set(task.train.y.tolist()) == set(task.test.y.tolist()) == set(task.classes)


@pytest.mark.parametrize(("classes", "tasks", "sizes"), [(6, 4, [2, 2, 1, 1]), (5, 2, [3, 2]), (7, 3, [3, 2, 2])])
def test_uneven_classes_are_spread_and_noted_and_none_is_dropped(classes, tasks, sizes):
    stream = numbered_stream(classes=classes, tasks=tasks)
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
    card = str(numbered_stream(epochs=2, batch_size=16, boundaries=False, name="mine"))
    for line in ("mine: class-incremental, boundaries hidden", "tasks        3", "classes      6", "inputs       (2,) float32",
                 "train/test   60 / 24 samples", "sessions     3, 2 epochs each, batches of 16",
                 "task 1       classes 2, 3; 20 to train, 8 to test"):  # fmt: skip
        assert line in card
    assert "note:" not in card


# Scenarios ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_class_and_task_incremental_labels_stay(scenario):
    stream = numbered_stream(scenario=scenario)
    assert stream.classes == 6
    for task in stream.tasks:
        for part in (task.train, task.test):
            assert torch.equal(part.x[:, 1].long(), part.y)


def test_domain_incremental_labels_are_places_within_the_task():
    stream = numbered_stream(scenario="domain", class_order=[3, 0, 5, 1, 2, 4])
    assert stream.classes == 2
    for task, first in zip(stream.tasks, (3, 5, 2), strict=True):
        assert task.classes == (0, 1)
        for part in (task.train, task.test):
            assert torch.equal((part.x[:, 1] != first).long(), part.y)


def test_heads_hold_the_classes_of_the_task_of_each_class():
    heads = numbered_stream(class_order=[3, 0, 5, 1, 2, 4]).heads
    assert heads.dtype == torch.bool
    assert [row.nonzero().flatten().tolist() for row in heads] == [[0, 3], [1, 5], [2, 4], [0, 3], [2, 4], [1, 5]]
    assert numbered_stream(scenario="domain").heads.all()


def test_boundaries_can_be_hidden():
    shown, hidden = numbered_stream(), numbered_stream(boundaries=False)
    for number, (session, other) in enumerate(zip(shown, hidden, strict=True)):
        assert session.task is shown.tasks[number]
        assert other.task_hidden
        assert all(batch.task is session.task for epoch in session for batch in epoch)
        assert all(batch.task_hidden for epoch in other for batch in epoch)
        assert hidden.task_of(number) == number
    assert played(shown) == played(hidden)


# Validation --------------------------------------------------------------------------------------------------------------


def test_validation_is_held_back_apart_from_training_and_test():
    stream, whole = numbered_stream(validation=0.2), numbered_stream()
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
    assert held == [rows(task.validation) for task in numbered_stream(validation=0.2).tasks]
    assert held != [rows(task.validation) for task in numbered_stream(validation=0.2, seed=1).tasks]


def test_a_stream_for_tuning_is_tested_on_what_was_held_back():
    stream = numbered_stream(validation=0.2)
    tuning = stream.for_tuning()
    assert [rows(task.test) for task in tuning.tasks] == [rows(task.validation) for task in stream.tasks]
    assert all(task.validation is None for task in tuning.tasks)
    assert tuning.name != stream.name
    assert played(tuning) == played(stream)
    with pytest.raises(ValueError, match=r"holds back no validation samples: build it with validation"):
        numbered_stream().for_tuning()


# Fingerprint -------------------------------------------------------------------------------------------------------------


def test_fingerprint_is_stable():
    stream = numbered_stream()
    assert len(stream.fingerprint) == 16
    same = [
        numbered_stream(),
        stream.to("cpu"),
        stream.reseeded(5),
        numbered_stream(name="other", batch_size=3, epochs=2, boundaries=False),
    ]
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
        "class order": numbered_stream(class_order=[1, 0, 2, 3, 4, 5]),
        "tasks": numbered_stream(tasks=2),
        "scenario": numbered_stream(scenario="task"),
        "schedule": numbered_stream(schedule=[0, 2, 1]),
        "sessions": numbered_stream(sessions_per_task=2),
        "validation": numbered_stream(validation=0.1),
    }
    fingerprints = {what: stream.fingerprint for what, stream in streams.items()}
    assert len(set(fingerprints.values())) == len(fingerprints), fingerprints


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
    stream = numbered_stream(resident=False).to("meta")
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
