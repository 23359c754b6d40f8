"""Streams whose targets are several labels or values: what tasks have, what is refused, and what a stream with probes is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune
from clstream.streams import blobs, drifting, few_shot, from_dataset, from_tensors, sorted_by
from clstream.streams.schedules import Transitions
from torch import Tensor
from torch.utils.data import TensorDataset

from clstream import SessionStarted, on, run
from clstream.checks import check_stream
from clstream.checks.recorders import Checkpoints
from clstream.figures import composition
from clstream.models import Mlp
from clstream.pretraining import join_tasks
from clstream.seeds import isolated
from clstream.stream import Samples, Stream, Subset, Task, TestSet

DRAW = torch.Generator().manual_seed(0)
X, X_TEST = torch.rand(60, 5, generator=DRAW), torch.rand(30, 5, generator=DRAW)
SEVERAL = (torch.rand(60, 6, generator=DRAW) < 0.3).int()
SEVERAL_TEST = (torch.rand(30, 6, generator=DRAW) < 0.3).int()
VALUES, VALUES_TEST = torch.randn(60, 2, generator=DRAW), torch.randn(30, 2, generator=DRAW)


def several(y: object = SEVERAL, y_test: object = SEVERAL_TEST, **options: object) -> Stream:
    return from_tensors(X, y, X_TEST, y_test, **{"tasks": 3, "batch_size": 8, "target": "multilabel", **options})  # type: ignore[arg-type]


def values(y: object = VALUES, y_test: object = VALUES_TEST, **options: object) -> Stream:
    return from_tensors(X, y, X_TEST, y_test, **{"tasks": 3, "batch_size": 8, "target": "value", **options})  # type: ignore[arg-type]


def test_a_multi_label_task_has_the_samples_of_its_classes_and_hides_others_in_training() -> None:
    stream = several(class_order=[5, 0, 3, 1, 2, 4], validation=0.2)
    assert [task.classes for task in stream.tasks] == [(5, 0), (3, 1), (2, 4)]
    assert stream.targets == ("multilabel",) and stream.classes == stream.outputs == 6
    for task in stream.tasks:
        own = torch.tensor(task.classes)
        assert task.train.y.dtype == torch.float32 and task.validation is not None
        rows = SEVERAL[:, own].any(1).nonzero().flatten()
        assert isinstance(task.train, Subset) and isinstance(task.validation, Subset)
        assert torch.equal(torch.cat([task.train.index, task.validation.index]).sort().values, rows)
        expected = torch.zeros(len(task.train), 6)
        expected[:, own] = SEVERAL[task.train.index][:, own].float()
        assert torch.equal(task.train.y, expected) and torch.equal(task.train[:].y, expected)
        assert torch.equal(task.train.take(slice(3)).y, expected[:3])
        assert torch.equal(task.validation.y, SEVERAL[task.validation.index].float()), "it stands for the test"
        assert torch.equal(task.test.y, SEVERAL_TEST[SEVERAL_TEST[:, own].any(1)].float())
    assert all(set(session.classes) <= set(task.classes) for session, task in zip(stream, stream.tasks, strict=True))
    batch = next(iter(next(iter(stream.session(1)))))
    assert batch.samples.target == "multilabel" and not batch.samples.y[:, [0, 2, 4, 5]].any()
    assert "training samples come in more than one task" in str(stream)
    assert "have no positive of any task's classes, and are left out" in str(several(tasks=[[0], [1]]))


def test_multi_label_tasks_share_the_inputs_and_the_targets() -> None:
    stream = several()
    sources = [task.train.source for task in stream.tasks if isinstance(task.train, Subset)]
    assert {source.x.data_ptr() for source in sources} == {X.data_ptr()} and len({source.y.data_ptr() for source in sources}) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_zeros_and_ones_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    assert several(SEVERAL.to(dtype), SEVERAL_TEST.to(dtype).numpy()).fingerprint == several().fingerprint


def test_values_are_dealt_out_evenly_and_each_row_comes_once() -> None:
    stream = values()
    assert [len(task.train) for task in stream.tasks] == [20] * 3 and [len(task.test) for task in stream.tasks] == [10] * 3
    for kind, count in (("train", 60), ("test", 30)):
        parts = [getattr(task, kind) for task in stream.tasks]
        assert torch.equal(torch.cat([part.index for part in parts]).sort().values, torch.arange(count))
    assert (stream.scenario, stream.classes, stream.outputs, stream.targets) == ("domain", 0, 2, ("value",))
    assert stream.tasks[0].classes == () and stream.session(0).classes == [] and stream.session(0).target == "value"
    assert stream.heads.shape == (0, 0) and stream.task_heads.shape == (3, 0)
    assert "dealt out to 3 tasks at random, evenly" in str(stream) and "targets      value; 2 outputs" in str(stream)
    assert values(seed=1).fingerprint != stream.fingerprint == values().fingerprint
    assert values(VALUES[:, 0], VALUES_TEST[:, 0]).outputs == 1, "a column may be left out"


@pytest.mark.parametrize("make", [several, values])
def test_the_contract_holds(make: object) -> None:
    hidden = make(boundaries=False, sessions_per_task=2, validation=0.1)  # type: ignore[operator]
    for stream in (make(), hidden, drifting(make(), Transitions(0.5), 6), several(scenario="task")):  # type: ignore[operator]
        for check in check_stream(stream):
            check()


def test_a_data_set_of_rows_equals_the_tensors() -> None:
    for make, y, y_test in (
        (several, SEVERAL, SEVERAL_TEST),
        (values, VALUES, VALUES_TEST),
        (values, VALUES[:, 0], VALUES_TEST[:, 0]),
    ):
        target = "value" if make is values else "multilabel"
        train, test = TensorDataset(X, y), TensorDataset(X_TEST, y_test)
        stream = from_dataset(train, test, tasks=3, target=target, progress=False)
        assert stream.fingerprint == make(y, y_test).fingerprint
    with pytest.raises(ValueError, match=r"dataset: train targets must be rows of one length, not of \[1, 2\]"):
        from_dataset([(X[0], [1]), (X[1], [1, 0])], [(X[0], [1])], target="multilabel", progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="value targets must be numbers, not 'high'"):
        from_dataset([(X[0], "high")], [(X[0], "low")], target="value", progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"several labels of a sample need from_dataset\(..., target='multilabel'\), real numbers"):
        from_dataset(TensorDataset(X, SEVERAL), TensorDataset(X_TEST, SEVERAL_TEST), progress=False)


def changed(y: Tensor, row: int, value: float) -> Tensor:
    y = y.clone().float()
    y[row, 1] = value
    return y


NO_POSITIVE = SEVERAL.clone()
NO_POSITIVE[:, 4] = 0


@pytest.mark.parametrize(
    ("make", "y", "options", "message"),
    [
        (several, SEVERAL, {"target": "label"}, "several labels of a sample need target='multilabel', real numbers target="),
        (values, VALUES[:, 0], {"target": "label"}, r"y.long\(\) makes whole numbers, and real ones need target='value'"),
        (several, changed(SEVERAL, 7, 2), {}, "must be 0 or 1 for each class, and row 7 has 2 for class 1"),
        (several, changed(SEVERAL, 7, float("nan")), {}, "row 7 has nan for class 1"),
        (several, NO_POSITIVE, {}, r"no training sample has a positive of the classes \[4\]"),
        (several, SEVERAL[:, :5], {}, "training targets have 5 columns, test targets 6"),
        (several, SEVERAL[:50], {}, "inputs are 60, targets 50: there must be one row for each"),
        (several, SEVERAL[:, 0], {}, r"targets must be \(samples, classes\), 0 or 1 for each class, not \(60,\) of torch.int32"),
        (several, ["cat"] * 60, {}, r"targets are strings, and multilabel targets are numbers: \(samples, classes\)"),
        (several, np.array([[1, 0]] * 60, dtype=object), {}, "targets must be a tensor, an array or a list of numbers"),
        (several, SEVERAL, {"relabel": True}, "relabel numbers labels anew, and multilabel targets are none"),
        (several, SEVERAL, {"scenario": "domain"}, "scenario must be class or task, not domain"),
        (several, SEVERAL, {"tasks": 7}, "6 classes make 1 to 6 tasks, not 7"),
        (several, SEVERAL, {"tasks": [[0, 1], [1]]}, "tasks 0 and 1 both have the label 1"),
        (several, SEVERAL, {"target": "labels"}, "target must be one of label, multilabel, value, not 'labels'"),
        (values, changed(VALUES, 3, float("nan")), {}, "targets must be finite, and row 3 is not"),
        (values, changed(VALUES, 3, float("inf")), {}, "targets must be finite, and row 3 is not"),
        (values, VALUES[None], {}, r"targets must be \(samples,\) or \(samples, outputs\), real numbers, not \(1, 60, 2\)"),
        (values, VALUES.to(torch.complex64), {}, "real numbers, not"),
        (values, VALUES, {"tasks": [2, 1]}, "of values tasks is a number"),
        (values, VALUES, {"tasks": 31}, "60 training and 30 test samples are too few for 31 tasks"),
        (values, VALUES, {"class_order": 0}, "values have no classes: class_order must be None"),
        (values, VALUES, {"scenario": "task"}, "values have no classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(make, y, options, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        make(y, **options)
    assert "\n" not in str(refused.value) and "torch.nn" not in str(refused.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, dtype=torch.bool), "class_mask"),
        (torch.ones(6), "class_mask"),
        (None, r"have positives of the classes \[2, 3"),
    ],
)
def test_a_stream_refuses_a_mask_that_is_none(mask: Tensor | None, message: str) -> None:
    stream = several()
    train = stream.tasks[0].train
    assert isinstance(train, Subset)
    with pytest.raises(ValueError, match=message):
        replace(stream, tasks=[replace(stream.tasks[0], train=replace(train, class_mask=mask)), *stream.tasks[1:]])


def test_the_fingerprint_changes_with_target_mask_and_probe() -> None:
    stream = several()
    train = stream.tasks[0].train
    probe = TestSet("more", Samples(X_TEST, SEVERAL_TEST.float(), target="multilabel"))
    assert isinstance(train, Subset)
    narrower = replace(train, class_mask=torch.tensor([1, 0, 0, 0, 0, 0]).bool())
    y = torch.randint(0, 2, (60, 1)).float()
    kinds = [
        Stream("same", [Task(0, classes, Samples(X, y, target=target), Samples(X, y, target=target))])
        for target, classes in (("multilabel", (0,)), ("value", ()))
    ]
    others = [
        several(tasks=2), replace(stream, tasks=[replace(stream.tasks[0], train=narrower), *stream.tasks[1:]]), *kinds,
        *(stream.with_probes(replace(probe, **change)) for change in ({}, {"name": "others"}, {"known": False}, {"task": 1})),
        stream.with_probes(replace(probe, samples=Samples(X_TEST + 1, SEVERAL_TEST.float(), target="multilabel"))),
        stream.with_probes(replace(probe, samples=Samples(X_TEST, 1 - SEVERAL_TEST.float(), target="multilabel"))),
    ]  # fmt: skip
    assert len({stream.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)
    assert stream.with_probes(replace(probe, note="as they are")).fingerprint == stream.with_probes(probe).fingerprint


def test_a_stream_moves_and_tunes_and_reseeds_with_its_mask_and_probes() -> None:
    probe = TestSet("more", Samples(X_TEST, SEVERAL_TEST.float(), target="multilabel"), note="30 more")
    stream = several(validation=0.2).with_probes([probe], replace(probe, name="again", known=False))
    assert [named.name for named in stream.test_sets] == ["task_00", "task_01", "task_02", "more", "again"]
    assert "probe        more: 30 to test; 30 more" in str(stream) and "again: 30 to test, strange; 30 more" in str(stream)
    moved = stream.to("meta")
    assert moved.tasks[0].train[:1].y.device.type == moved.probes[0].samples.x.device.type == "meta"
    assert stream.for_tuning().probes == () and stream.reseeded(3).probes == stream.probes


@pytest.mark.parametrize(
    ("probe", "error", "message"),
    [
        (lambda: TestSet("..", Samples(X, VALUES)), ValueError, "a test set's name is made of letters"),
        (lambda: TestSet("noise/../low", Samples(X, VALUES)), ValueError, "a test set's name is made of letters"),
        (lambda: TestSet("more", X), TypeError, "the test set more must have Samples or a Subset, not a Tensor"),
        (lambda: TestSet("more", Samples(X, VALUES), task="0"), ValueError, "task must be a whole number of at least 0 or None"),
        (lambda: TestSet("more", Samples(X, VALUES), known=1), ValueError, "known must be True, False or 'taught', not 1"),
        (lambda: 3, TypeError, "probes must be TestSet objects, not a int"),
        (lambda: [3], TypeError, "probes must be a list of TestSet objects, and one of them is a int"),
        (lambda: TestSet("task_00", Samples(X, VALUES, target="value")), ValueError, "has the name of another test set"),
        (lambda: TestSet("more", Samples(X[:, :4], VALUES, target="value")), ValueError, r"has inputs of \(4,\) torch.float32"),
        (lambda: TestSet("more", Samples(X, VALUES[:, :1], target="value")), ValueError, "one number of columns, not"),
        (lambda: TestSet("more", Samples(X[:0], VALUES[:0], target="value")), ValueError, "the probe more has no samples"),
        (lambda: TestSet("more", Subset(Samples(X, VALUES, target="value"), torch.arange(0))), ValueError, "has no samples"),
        (lambda: TestSet("more", Samples(X, VALUES, target="value"), 7), ValueError, "is of task 7, but the tasks are 0 to 2"),
    ],
)
def test_probes_that_do_not_fit_are_one_sentence(probe, error, message) -> None:
    with pytest.raises(error, match=message):
        values().with_probes(probe())


@pytest.mark.parametrize("target", ["regression", "labels", None])
def test_samples_of_a_kind_that_there_is_not_are_refused_by_its_name(target) -> None:
    with pytest.raises(ValueError, match=f"target must be one of label, multilabel, value, not {target!r}"):
        Task(0, (), *[Samples(X, VALUES, target=target)] * 2)


def test_a_stream_is_of_the_kind_of_its_tasks() -> None:
    stream = several()
    assert (
        replace(stream, tasks=values().tasks).target
        == "value"
        == replace(blobs(features=5), tasks=values().tasks, schedule=None).target
    )
    mixed = Stream("mixed", [*stream.tasks, replace(blobs(features=5).tasks[0], id=3)], target="label")
    assert mixed.target == "label" and mixed.targets == ("multilabel", "label") and mixed.outputs == 6
    assert several(tasks=[[3], [5]]).gaps == "" and "relabel" not in str(several(tasks=[[3], [5]])), "columns have no other numbers"
    whole = Samples(X, SEVERAL.float())
    assert Stream("mine", [Task(0, tuple(range(6)), whole, whole)], target="multilabel").tasks[0].train.target == "multilabel"


def test_values_can_be_sorted_by_a_feature() -> None:
    train, test = Samples(X, VALUES, target="value"), Samples(X_TEST, VALUES_TEST, target="value")
    stream = sorted_by(train, test, tasks=2, sessions=4)
    assert stream.targets == ("value",) and float(stream.tasks[0].train.x[:, 0].max()) < float(stream.tasks[1].train.x[:, 0].min())
    with pytest.raises(ValueError, match="which multi-label targets can't have"):
        sorted_by(Samples(X, SEVERAL.float(), target="multilabel"), test)


def test_a_run_with_masked_targets_goes_on_where_it_stopped() -> None:
    """Also where the strategy keeps the session, whose samples are rows with a mask."""

    class Keeps(Finetune):
        @on(SessionStarted)
        def keep(self, event: SessionStarted) -> None:
            self.session = event.session

    def learned(*observers: object, **options: object) -> Keeps:
        with isolated(0, "model"):
            strategy = Keeps(Mlp(5, 6, hidden=(8,)))
        run(strategy, several(), *observers, **options)  # type: ignore[arg-type]
        return strategy

    whole = learned()
    learned(kept := Checkpoints())
    for number in range(0, len(kept.written), 4):
        again = learned(resume=kept.load(number))
        assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), again.model.parameters(), strict=True))
        assert torch.equal(again.session.samples.y, whole.session.samples.y)


def test_what_counts_by_class_counts_positives_and_values_by_task() -> None:
    shown = composition(several())
    assert shown.by == "class" and shown.names == tuple(range(6)) and torch.equal(shown.counts.sum(0), SEVERAL.sum(0))
    assert composition(values()).by == "task" and composition(values()).counts.diag().tolist() == [20] * 3
    with pytest.raises(ValueError, match="has values for targets, and values have no classes"):
        composition(values(), "class")


@pytest.mark.parametrize("stream", [several(), values()])
def test_what_needs_labels_says_so(stream: Stream) -> None:
    with pytest.raises(ValueError, match="tasks are joined for training on labels only"):
        join_tasks(stream)
    with pytest.raises(ValueError, match="samples are left out by label only"):
        few_shot(stream)
    label = replace(blobs(features=5).tasks[0], id=3)
    with pytest.raises(ValueError, match="a stream that drifts has one kind"):
        drifting(replace(stream, tasks=[*stream.tasks, label], schedule=None), Transitions())
