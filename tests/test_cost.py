"""What runs cost: FLOPs against a count of every operation, memory, seconds, and runs that are resumed."""

import io
import math
import time
from collections import deque
from functools import partial

import clstream.strategies as zoo
import numpy as np
import pytest
import torch
from conftest import STRATEGIES, make
from torch import nn
from torch.optim import SGD

from clstream import BatchLearned, Evaluated, RunStarted, SessionEnded, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.checks import example_model, example_stream
from clstream.engine import check_fits
from clstream.measures import Cost, pareto_front
from clstream.measures.flops import FlopMode
from clstream.results import result_of
from clstream.seeds import isolated
from clstream.stream import Session, Stream, Subset, Task


def example(name):
    return make(name)(example_model(head="fixed") if name in ("TAME", "Hypernetwork", "SHARP") else example_model())


def counted(call):
    """Return the FLOPs of all operations in a call, and what it returns."""
    everything = FlopMode(lambda: False)
    with everything:
        result = call()
    return everything.flops, result


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_flops_of_a_run_are_those_of_every_step(name):
    with isolated(0, "strategy"):
        strategy = example(name)
    stream = example_stream(batch_size=14, epochs=2)  # the last batch of an epoch is smaller
    before, _ = counted(lambda: check_fits(strategy, stream))
    everything, result = counted(lambda: run(strategy, stream, evaluate_every=4))
    assert result.cost.total["flops"] == everything - before


def held_bytes(root, left_out):
    """Return the bytes of all tensors and arrays that an object holds, by a walk of its own, those of some storages left out."""
    seen, sizes, waiting = set(), {}, [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (str, int, float, type, type(None), Stream, Session, Task, Subset)):
            continue
        seen.add(id(value))
        seen_alive.append(value)
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, np.ndarray):
            sizes[id(value)] = value.nbytes
        elif isinstance(value, nn.Module):
            waiting += [*value.parameters(), *value.buffers()]
        elif isinstance(value, torch.optim.Optimizer):
            waiting += [item for state in value.state.values() for item in state.values()]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, deque)):
            waiting += value
        else:
            hidden = {name for cls in type(value).__mro__ for name in getattr(cls, "not_state", ())}
            names = [
                *getattr(value, "__dict__", ()),
                *(name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())),
            ]
            waiting += [getattr(value, name) for name in names if name not in hidden and hasattr(value, name)]
    return sum(size for storage, size in sizes.items() if storage not in left_out)


seen_alive = []
"""What was looked at, so that no new object gets the id of an old one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_memory_is_what_a_walk_of_all_that_is_held_finds(name):
    with isolated(0, "strategy"):
        strategy = example(name)
    stream, expected = example_stream(), []
    parts = [part for task in stream.tasks for part in (task.train, task.test)]
    of_stream = {tensor.untyped_storage().data_ptr() for part in parts for tensor in (part.x, part.y)}

    class Walks:
        @on(SessionEnded)
        def walk(self, event):
            self.run.defer(self.add)

        @on(RunStarted)
        def start(self, event):
            self.run = event.run

        def add(self):
            left_out = of_stream | {weight.untyped_storage().data_ptr() for weight in strategy.answering_weights()}
            expected.append(held_bytes(strategy, left_out) + sum(len(samples) * (64 + 8) for samples in strategy.kept_samples()))

    cost = run(strategy, stream, Walks()).cost
    assert cost.memory_bytes.tolist() == expected and sum(cost.memory.values()) == expected[-1]
    weights = sum(
        {id(weight): weight.numel() for weight in strategy.answering_weights() if isinstance(weight, nn.Parameter)}.values()
    )
    assert cost.parameters[-1] == weights and cost.trainable_parameters[-1] <= weights
    assert not any(column.isnan().any() for column in (cost.memory_bytes, cost.parameters, cost.peak_bytes))


IMAGE, LABEL, WEIGHT = 64, 8, 4  # bytes


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda model: zoo.Finetune(model), {}),
        (lambda model: zoo.Finetune(model, partial(SGD, lr=0.1, momentum=0.9)), {"optimizer": WEIGHT * 2278}),
        (lambda model: zoo.Replay(model, capacity=50), {"memory": 50 * (IMAGE + LABEL) + 50 * 8}),
        (lambda model: zoo.DER(model, capacity=50), {"memory": 50 * (IMAGE + LABEL + 6 * WEIGHT) + 50 * 8}),
        (lambda model: zoo.Joint(model, restart=False), {"kept_samples": 180 * (IMAGE + LABEL), "steps": 180 * 8}),
        (lambda model: zoo.EWC(model), {"anchor": WEIGHT * 2278, "importance": WEIGHT * 2278, "offset": 4}),
    ],
    ids=["nothing", "momentum", "samples", "samples and outputs", "all data", "importance"],
)
def test_memory_by_hand(make, expected):
    strategy = make(example_model())
    memory = run(strategy, example_stream()).cost.memory
    assert {name: memory.get(name) for name in expected} == expected
    assert sum(memory.values()) <= sum(expected.values()) + 200  # which classes came


def test_seconds_are_all_of_the_run():
    class Sleeps:
        @on(BatchLearned)
        def sleep(self, event):
            time.sleep(0.002)

    result = run(zoo.Replay(example_model()), example_stream(), Sleeps())
    cost = result.cost
    assert len(cost) == 3
    parts = [cost.learning_seconds, cost.consolidating_seconds, cost.evaluating_seconds, cost.tracking_seconds]
    assert float(sum(parts).sum()) == pytest.approx(result.seconds, abs=0.05)
    assert all((part >= 0).all() for part in parts) and (cost.tracking_seconds > 8 * 0.002).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Replay", "EWC", "SHARP", "TAME", "Joint", "WithDetectedBoundaries", "Hypernetwork"])
def test_a_run_that_is_resumed_has_the_costs_of_the_whole_run(name, tmp_path):
    stream = example_stream(batch_size=6, epochs=2)

    def strategy():
        with isolated(0, "strategy"):
            return example(name)

    whole = run(strategy(), stream).cost
    saved = []

    class Saves:
        @on(BatchLearned)
        def save(self, event):
            if event.batch.index % 4 == 3 or event.batch.index == 9:
                self.run.defer(lambda: saved.append(copied(self.run.state())))

        @on(Evaluated)
        def save_too(self, event):
            self.run.defer(lambda: saved.append(copied(self.run.state())))

        @on(RunStarted)
        def start(self, event):
            self.run = event.run

    run(strategy(), stream, Saves())
    for state in saved[:: max(1, len(saved) // 6)]:
        cost = run(strategy(), stream, resume=state).cost
        for column in ("learning_flops", "consolidating_flops", "evaluating_flops", "memory_bytes", "parameters"):
            assert torch.equal(getattr(cost, column), getattr(whole, column)), (column, state["position"])
        assert cost.memory == whole.memory


def copied(state):
    """Return a state as a checkpoint has it on disk."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_has_the_costs(tmp_path):
    result = run(zoo.Replay(example_model()), example_stream(), Checkpointer(tmp_path))
    again = result_of(newest(tmp_path)).cost
    assert torch.equal(again.flops, result.cost.flops) and again.memory == result.cost.memory and len(again) == 3
    frame = result.cost.to_frame()
    assert list(frame.index) == [1, 2, 3] and frame["learning_flops"].sum() == result.cost.total["learning_flops"]


def test_values_that_no_cost_has():
    values = run(zoo.Finetune(example_model()), example_stream()).cost.to_dict()
    assert torch.equal(Cost.from_dict(values).flops, Cost(**values).flops)
    for name, wrong in (
        ("learning_flops", torch.zeros(2, dtype=torch.float64)), ("evaluating_seconds", [1.0]), ("peak_bytes", torch.zeros(3)),
        ("memory", {1: 2}), ("memory", []), ("memory_bytes", None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="can't be the values of a Cost"):
            Cost.from_dict(values | {name: wrong})
    with pytest.raises(ValueError, match="can't be"):
        Cost.from_dict({})
    assert math.isnan(Cost().total["flops"]) and math.isnan(Cost().total["memory_bytes"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("cost", {}), ("ledger", {}), ("ledger", {"rows": [[1.0]]}), ("ledger", {"meter": {}}), ("ledger", {"spent": {}}),
     ("ledger", {"held": [1, 2]}), ("ledger", {"sent": [[1, -2], [1, 2]]}), ("ledger", {"sent": [[1, 2]]}), ("ledger", {"sent": 1}),
     ("ledger", {"memory": {"x": 1.5}}), ("ledger", {"before": []})],
)  # fmt: skip
def test_a_checkpoint_whose_costs_cant_be_is_refused(name, wrong, tmp_path):
    run(zoo.Replay(example_model()), example_stream(), Checkpointer(tmp_path))
    state = newest(tmp_path)
    state[name] = {**state[name], **wrong} if wrong else wrong
    with pytest.raises(ValueError, match=f"its '{name}' can't be"):
        run(zoo.Replay(example_model()), example_stream(), resume=state)


def test_what_is_sent_is_told_only_where_something_is(tmp_path):
    result = run(zoo.Finetune(example_model()), example_stream(), Checkpointer(tmp_path))
    assert result.cost.bytes_up.tolist() == result.cost.bytes_down.tolist() == [0, 0, 0] and not result.cost.sends
    state = newest(tmp_path)
    told = {*result.cost.to_dict(), *result.cost.total, *result.cost.to_frame(), *state["cost"], *state["ledger"]}
    assert told.isdisjoint({"bytes_up", "bytes_down", "sent"})
    values = result.cost.to_dict() | {"bytes_up": torch.ones(3, dtype=torch.float64)}
    with pytest.raises(ValueError, match="can't be the values of a Cost"):
        Cost.from_dict(values)  # one without the other
    assert Cost.from_dict(values | {"bytes_down": values["bytes_up"]}).total["bytes_down"] == 3


def test_the_pareto_front():
    costs, errors = torch.tensor([6, 1, 2, 2.5, 4, 5]), torch.tensor([0.31, 0.5, 0.4, 0.45, 0.4, 0.3])
    assert pareto_front(costs, 1 - errors).tolist() == [1, 2, 5]  # an equal error at more FLOPs is out
    assert pareto_front(torch.tensor([1.0, 1.0, math.nan, 3.0]), torch.tensor([0.2, 0.3, 0.9, math.nan])).tolist() == [1]


def test_the_union_of_evaluations_costs_the_same_whenever_it_is_asked():
    cost = run(zoo.Finetune(example_model()), example_stream(), evaluate_at="end").cost
    each = 2 * 60 * (64 * 32 + 32 * 6)
    assert cost.evaluating_flops.tolist() == [each, 0, each]  # the untrained strategy, and the end
    cost = run(zoo.Finetune(example_model()), example_stream(), evaluate_every=2).cost
    assert cost.evaluating_flops.tolist() == [each * 6, each * 5, each * 5]
