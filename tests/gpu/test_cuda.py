"""On a GPU: the same as on the CPU, within what the order of additions changes, and the same bits again after a resumption.

This folder needs a GPU, torch and pytest, and neither pytest-xdist nor hypothesis, nor clstream installed: `make gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from clstream.streams import from_tensors, recorded
from conftest import STRATEGIES, make
from torch import Tensor

from clstream import BatchLearned, Result, Samples, Strategy, Stream, Subset, Task, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.checkpoint.compare import difference
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.evaluation import evaluating
from clstream.memory import ClassBalanced, Memory, Reservoir, Ring
from clstream.recording import record
from clstream.seeds import isolated

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:SHARP. after episode"),  # its layers are small here
]


def built(name: str) -> Strategy:
    with isolated(0, "strategy"):
        return make(name)(example_model())


def played(name: str, device: str, *observers: object, epochs: int = 5, **options: object) -> tuple[Result, Strategy]:
    strategy = built(name)
    return run(strategy, example_stream((0, 1, 0, 2), epochs=epochs, batch_size=16), *observers, device=device, **options), strategy


# Strategies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_does_what_it_does_on_the_cpu(name: str) -> None:
    """Its accuracies: what is drawn on the device is drawn by another generator there."""
    (there, strategy), (here, _) = played(name, DEVICE), played(name, "cpu")
    assert {parameter.device.type for parameter in strategy.model.parameters()} == {DEVICE}
    assert there.accuracy.shape == here.accuracy.shape and there.accuracy.device.type == "cpu"
    assert float((there.accuracy - here.accuracy).abs().mean()) <= 0.1
    assert float((there.task_accuracy - here.task_accuracy).abs().mean()) <= 0.1


@pytest.mark.parametrize("name", ["Finetune", "Replay", "EWC", "Joint"])
def test_costs_are_those_of_the_cpu(name: str) -> None:
    (there, _), (here, _) = played(name, DEVICE), played(name, "cpu")
    assert torch.equal(there.cost.flops, here.cost.flops) and there.cost.memory == here.cost.memory
    assert (there.cost.peak_bytes > 0).all()


@pytest.mark.parametrize("name", ["Finetune", "Replay", "DERpp", "AGEM", "EWC", "SI", "LwF", "L2"])
def test_weights_are_those_of_the_cpu(name: str) -> None:
    """Which samples are replayed is drawn on the CPU, so only the order of additions differs."""
    (_, there), (_, here) = played(name, DEVICE, epochs=1), played(name, "cpu", epochs=1)
    for key, value in here.model.state_dict().items():
        torch.testing.assert_close(there.model.state_dict()[key].cpu(), value, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_resumes_exactly(name: str) -> None:
    whole = Checkpoints()
    expected, _ = played(name, DEVICE, whole, epochs=2)
    for number in range(1, len(whole.written) - 1, 6):
        rest = Checkpoints(every=0)
        result, _ = played(name, DEVICE, rest, epochs=2, resume=whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None, f"from checkpoint {number}"
        assert torch.equal(result.accuracy, expected.accuracy)


class Interrupts:
    """Ends a run in its second session."""

    @on(BatchLearned)
    def interrupt(self, event: BatchLearned) -> None:
        if event.batch.task.id == 1 and event.batch.epoch == 1:
            raise KeyboardInterrupt


def test_a_run_resumes_exactly_from_a_file(tmp_path: Path) -> None:
    whole, rest = Checkpoints(every=0), Checkpoints(every=0)
    played("Replay", DEVICE, whole)
    with pytest.raises(KeyboardInterrupt):
        played("Replay", DEVICE, Interrupts(), Checkpointer(tmp_path, every_batches=3))
    played("Replay", DEVICE, rest, resume=newest(tmp_path))
    assert difference(whole.load(-1), rest.load(-1)) is None


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_contract_on_every_device(name: str) -> None:
    checks = {check.name: check for check in check_strategy(make(name))}
    if "runs_on_every_device" in checks:
        checks["runs_on_every_device"]()


def test_the_evaluation_counts_right_answers() -> None:
    result, strategy = played("Replay", DEVICE)
    for task in example_stream().tasks:
        with evaluating(strategy), torch.no_grad():
            of_all, of_task = (strategy.predict(task.test.x.to(DEVICE), given).cpu() for given in (None, task))
        assert float(result.accuracy[-1, task.id]) == pytest.approx(float((of_all == task.test.y).double().mean()))
        assert float(result.task_accuracy[-1, task.id]) == pytest.approx(float((of_task == task.test.y).double().mean()))


# Memories -----------------------------------------------------------------------------------------------------------------

KINDS = {
    "reservoir": Reservoir, "class_balanced": ClassBalanced, "ring": Ring, "class_ring": lambda capacity: Ring(capacity, 1),
}  # fmt: skip


def numbered(n: int, first: int) -> Samples:
    """Return samples with their number as input, as label and in an extra field."""
    number = torch.arange(first, first + n)
    return Samples(number.float()[:, None], number, {"number": number})


def fed(memory: Memory, device: str, batches: int, classes: int) -> Memory:
    memory.random.manual_seed(3)
    for batch in range(batches):
        samples = numbered(256, 256 * batch)
        memory.add(Samples(samples.x, samples.y % classes, samples.extra).to(device))
    return memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [1, 6])
def test_a_memory_keeps_inputs_with_labels_and_what_one_on_the_cpu_keeps(kind: str, capacity: int) -> None:
    """Two writes to one slot at once may put the input of one beside the label of the other."""
    classes = 1 if kind == "class_ring" else 4
    there, here = (fed(KINDS[kind](capacity), device, 50, classes) for device in (DEVICE, "cpu"))
    for kept, expected in ((there.all(), here.all()), (there.sample(20), here.sample(20))):
        assert {tensor.device.type for tensor in (kept.x, kept.y, kept.extra["number"])} == {DEVICE}
        assert torch.equal(kept.x[:, 0].long(), kept.extra["number"]) and torch.equal(kept.extra["number"] % classes, kept.y)
        assert torch.equal(kept.x.cpu(), expected.x) and torch.equal(kept.y.cpu(), expected.y)


# Streams ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Invert:
    """Turns images into their negatives."""

    def __call__(self, x: Tensor) -> Tensor:
        return 255 - x


def test_a_resident_stream_moves_its_data_once() -> None:
    def stream() -> Stream:
        samples = numbered(60, 0)
        return from_tensors(samples.x, samples.y % 6, samples.x, samples.y % 6, tasks=3)

    def delivered(of: Stream) -> list[list[float]]:
        return [batch.samples.x[:, 0].tolist() for session in of for epoch in session for batch in epoch]

    there = stream().to(DEVICE)
    assert len({id(task.train.source.x) for task in there.tasks}) == 1
    assert all(part.x.device.type == DEVICE for task in there.tasks for part in (task.train, task.test))
    assert there.fingerprint == stream().fingerprint
    assert delivered(there) == delivered(stream())


def test_a_stream_on_a_gpu_gives_the_same_recording(tmp_path: Path) -> None:
    def stream() -> Stream:
        draw = torch.Generator().manual_seed(0)
        source = Samples(torch.randint(0, 256, (60, 1, 4, 4), generator=draw, dtype=torch.uint8), torch.arange(60) % 6)
        first, second = (Subset(source, torch.arange(60), transform) for transform in (None, Invert()))
        tasks = [Task(number, tuple(range(6)), part, part) for number, part in enumerate((first, second))]
        return Stream("two domains", tasks, scenario="domain", batch_size=9)

    one, two = (record(stream().to(device), tmp_path / f"{device}.clstream") for device in ("cpu", DEVICE))
    assert one.read_bytes() == two.read_bytes()
    replay = recorded(one, data=stream(), functions={"Invert": Invert}).to(DEVICE)
    assert replay.session(1).samples.x.device.type == DEVICE
