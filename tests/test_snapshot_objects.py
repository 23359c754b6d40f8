"""Snapshots of objects: what comes back as it was, what is refused by name, and what differs first."""

from __future__ import annotations

import io
import math
import threading
from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from clstream.strategies import Joint, Replay
from torch import nn
from torch.nn import functional as F

from clstream import Samples, Strategy, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.models import Timm
from clstream.serialization import CaptureError, capture, restore
from clstream.serialization.capture import references_of
from clstream.serialization.compare import digest, first_difference, hashes


@dataclass
class Notes:
    losses: list[float] = field(default_factory=list)


@pytest.mark.slow
def test_compiled_and_recurrent_modules_are_captured() -> None:
    one, two = (Holder(net=torch.compile(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 2)))) for _ in range(2))
    references, there = references_of([one]), references_of([two])
    restore([two], through_a_file(capture([one], references)[0]), there)
    for name, value in one.net.state_dict().items():
        assert torch.equal(value, two.net.state_dict()[name])


def through_a_file(snapshot: dict) -> dict:
    file = io.BytesIO()
    torch.save(snapshot, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Holder:
    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


def restored(before: Holder, fresh: Holder | None = None) -> Holder:
    """Return a holder with the state of another one, by way of a file."""
    fresh = fresh or Holder()
    snapshot, _ = capture([before], references_of([before]))
    restore([fresh], through_a_file(snapshot), references_of([fresh, *map(type, ())]))
    assert first_difference(capture([before])[0], capture([fresh])[0]) is None
    return fresh


def test_what_was_one_object_is_one_again() -> None:
    weight, generator, row = nn.Parameter(torch.ones(3)), torch.Generator(), [1]
    net = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = net.weight
    before = Holder(a=weight, b=[weight], c={"w": weight.data}, d=generator, e=(generator, row), f=row, nets=[net, tied])
    before.g = before  # and in a circle
    after = restored(before, Holder(d=torch.Generator(), nets=[nn.Linear(3, 3), nn.Linear(3, 3)]))
    assert after.a is after.b[0] and after.d is after.e[0] and after.f is after.e[1] and after.g is after
    assert after.nets[0].weight is after.nets[1].weight
    with torch.no_grad():
        after.a.add_(1)
    assert after.c["w"].tolist() == [2, 2, 2]  # another tensor, the same storage
    assert weight.tolist() == [1, 1, 1]


def test_what_was_two_objects_is_not_one_again() -> None:
    shared = nn.Parameter(torch.zeros(2))
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    same = torch.Generator()
    after = restored(
        Holder(a=nn.Parameter(torch.ones(2)), b=nn.Parameter(torch.ones(2) * 2), c=one, d=two),
        Holder(a=shared, b=shared, c=same, d=same),
    )
    assert after.a is not after.b and after.a.tolist() == [1, 1] and after.b.tolist() == [2, 2] and after.c is not after.d


def test_constants_that_others_hold_are_left_alone() -> None:
    """What a strategy no longer holds is not touched, whoever has it."""
    constant, samples = torch.zeros(3), Samples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    array, default = np.zeros(2), [1.0, 1.0]
    one, two = (Holder(table=constant, samples=samples, array=array, scales=default, names={"a": 1}) for _ in range(2))
    one.names["b"] = 2  # changed in place, as the other one's is to be
    references, there = references_of([one]), references_of([two])
    one.table, one.array, one.scales = torch.ones(3), np.ones(2), [3.0, 2.0]
    one.samples = Samples(torch.ones(2, 1), torch.ones(2, dtype=torch.int64), {"logits": torch.ones(2, 3)})
    names = two.names
    restore([two], through_a_file(capture([one], references)[0]), there)
    assert two.table.tolist() == [1, 1, 1] and two.scales == [3, 2] and two.samples.extra["logits"].sum() == 6
    assert not constant.any() and not array.any() and default == [1, 1] and not samples.x.any() and not samples.extra
    assert names == {"a": 1, "b": 2} and two.names is names


def test_strides_and_types_stay() -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    numbers = [torch.ones(3, dtype=dtype) for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.complex64)]
    after = restored(Holder(image=image, numbers=numbers, scalar=np.float32(1.5)))
    assert after.image.stride() == image.stride() and torch.equal(after.image, image)
    assert [tensor.dtype for tensor in after.numbers] == [tensor.dtype for tensor in numbers]
    assert type(after.scalar) is np.float32


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_sparse_tensors_stay() -> None:
    assert torch.equal(restored(Holder(sparse=torch.eye(3).to_sparse())).sparse.to_dense(), torch.eye(3))


def test_gradients_and_what_is_frozen_stay() -> None:
    net = nn.Linear(2, 2)
    net(torch.ones(1, 2)).sum().backward()
    net.bias.requires_grad_(False)
    after = restored(Holder(net=net), Holder(net=nn.Linear(2, 2)))
    assert torch.equal(after.net.weight.grad, net.weight.grad) and after.net.weight.requires_grad
    assert not after.net.bias.requires_grad


def test_a_small_view_is_written_without_the_rest_of_its_storage() -> None:
    whole = torch.zeros(1_000_000)
    snapshot, _ = capture([Holder(row=whole[5:10])], references_of([Holder()]))
    file = io.BytesIO()
    torch.save(snapshot, file)
    assert len(file.getvalue()) < 5000


def test_the_streams_data_is_referred_to() -> None:
    stream = example_stream(schedule=(0, 0, 1, 2), batch_size=1000)
    kept = Checkpoints()
    strategy = Joint(example_model())
    strategy.own = Holder(task=stream.tasks[1], rows=stream.tasks[1].train.x[3:5], half=stream.session(0).samples[:])
    run(strategy, stream, kept, max_sessions=1)
    fresh = Joint(example_model(1))
    fresh.own = Holder()
    run(fresh, stream, max_sessions=1, resume=kept.load(-1))
    assert fresh.own.task is stream.tasks[1] and torch.equal(fresh.own.rows, stream.tasks[1].train.x[3:5])
    assert torch.equal(fresh.own.half.x, stream.session(0).samples.x)
    data = {task.train.x.untyped_storage().data_ptr() for task in stream.tasks}
    for rows in (fresh.own.rows, fresh.own.half.x, fresh.sessions[0].samples[:].x):  # views of the stream's data, as they were
        assert rows.untyped_storage().data_ptr() in data


def test_any_model_of_timm_is_captured() -> None:
    model = Timm((3, 32, 32), 4, "resnet10t")
    fresh = Timm((3, 32, 32), 4, "resnet10t")
    restored(Holder(model=model), Holder(model=fresh))
    x = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.eval()(x), fresh.eval()(x))


def test_parametrized_modules_are_captured() -> None:
    nets = [nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2)]
    restored(Holder(net=nets[0]), Holder(net=nets[1]))
    assert torch.equal(nets[0](torch.ones(1, 3)), nets[1](torch.ones(1, 3)))


# What can't be captured ---------------------------------------------------------------------------------------------------


def refusal(**attributes: object) -> str:
    before = Holder(inner=Holder(**attributes))
    with pytest.raises(CaptureError) as refused:
        capture([before], references_of([Holder()]))
    return str(refused.value)


def test_what_cannot_be_captured_is_named() -> None:
    assert "Holder.inner.lock is a _thread.lock, which a checkpoint can't hold" in refusal(lock=threading.Lock())
    assert "name 'lock' in the `not_state` of the class of Holder.inner" in refusal(lock=threading.Lock())
    assert "Holder.inner.rows is a builtins.generator" in refusal(rows=(row for row in range(3)))
    assert "Holder.inner.choose is a function nowhere.<lambda> that it didn't hold when the run began" in refusal(
        choose=eval("lambda: 3", {"__name__": "nowhere"})
    )
    assert "Holder.inner.gaps is a view with gaps" in refusal(gaps=np.zeros((4, 4))[:, ::2])
    assert "Holder.inner.point is a test_snapshot_objects.P, which" in refusal(point=namedtuple("P", "x", module=__name__)(1))
    assert "Holder.inner.objects is a numpy.ndarray" in refusal(objects=np.array([{}, 1], dtype=object))
    assert "a tensor with the graph that it was computed by" in refusal(loss=nn.Linear(2, 1)(torch.ones(2)))
    assert "Holder.inner.act is a builtins.builtin_function_or_method" in refusal(act=math.tanh)  # none of ours, nor a layer's
    table = np.zeros((4, 2))
    assert "Holder.inner.row shares its memory with Holder.inner.table" in refusal(table=table, row=table[1])
    tensor = torch.zeros(3)
    assert "Holder.inner.array shares its memory with Holder.inner.tensor" in refusal(tensor=tensor, array=tensor.numpy())

    class Local:
        pass

    assert "<locals>.Local, which a checkpoint can't hold" in refusal(local=Local())
    chain: list[object] = []
    for _ in range(1000):
        chain = [chain]
    assert "is nested too deeply for a checkpoint" in refusal(chain=chain)


def test_hooks_that_came_during_the_run_are_refused() -> None:
    before = Holder(net=nn.Linear(2, 2))
    before.net.register_forward_hook(print)
    references = references_of([before])
    capture([before], references)
    before.net.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(CaptureError, match=r"Holder.net.weight got or lost hooks since the run began"):
        capture([before], references)


def test_what_is_no_state_may_be_anything() -> None:
    class Locked(Strategy):
        not_state = ("lock",)

        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.lock = threading.Lock()

    {check.name: check for check in check_strategy(Locked)}["resumes_exactly"]()


def test_a_run_without_checkpoints_may_hold_anything() -> None:
    strategy = Strategy(example_model())
    strategy.lock = threading.Lock()
    run(strategy, example_stream())
    with pytest.warns(UserWarning, match="was run before"), pytest.raises(CaptureError, match=r"Strategy.lock"):
        run(strategy, example_stream(), Checkpoints())


# What doesn't fit -------------------------------------------------------------------------------------------------------


def test_functions_from_the_start_must_be_there_again() -> None:
    before = Holder(act=eval("lambda x: x", {"__name__": "nowhere"}))
    snapshot, _ = capture([before], references_of([before]))
    with pytest.raises(ValueError, match=r"expects nowhere:<lambda> at Holder.act when the run begins, but there is .*relu"):
        restore([Holder(act=F.relu)], snapshot, references_of([Holder(act=F.relu)]))


def test_another_class_is_refused() -> None:
    snapshot, _ = capture([Holder()], references_of([Holder()]))
    with pytest.raises(ValueError, match=r"it is of .*Holder, not of .*Notes"):
        restore([Notes()], snapshot, references_of([Notes()]))


# Digests ------------------------------------------------------------------------------------------------------------------


def test_hashes_name_what_differs() -> None:
    def made(**changes: object) -> Strategy:
        torch.manual_seed(0)
        strategy = Replay(example_model())
        run(strategy, example_stream(), seed=1)
        vars(strategy).update(changes)
        return strategy

    same = capture([made()])[0]
    assert first_difference(same, capture([made()])[0]) is None and digest(made()) == digest(made())
    assert first_difference(same, capture([made(replay_batch=3)])[0]) == "Replay.replay_batch"
    other = made()
    other.memory.kept.x[3] += 1
    assert first_difference(same, capture([other])[0]) == "Replay.memory.kept.x"
    other = made()
    other.memory.random.manual_seed(1)
    assert first_difference(same, capture([other])[0]) == "Replay.memory.random"
    other = made()
    with torch.no_grad():
        other.model.head.weight[0, 0] += 1e-7
    assert first_difference(same, capture([other])[0]) == "Replay.model.head.weight"
    other = made()
    other.model.head.weight.grad[0] += 1
    assert first_difference(same, capture([other])[0]) == "Replay.model.head.weight.grad" and digest(other) == digest(made())
    assert "Replay.optimizer.param_groups[0]" in hashes(same)
