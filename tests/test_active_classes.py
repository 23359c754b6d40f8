"""Whose outputs compete, in losses and answers; penalties of strength 0; and tasks that share classes."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import clstream.strategies as zoo
import pytest
import torch
from clstream.strategies import (
    AGEM,
    DER,
    ERACE,
    EWC,
    L2,
    SI,
    DERpp,
    EWCPenalty,
    FeatKDPenalty,
    Finetune,
    Joint,
    L2Penalty,
    LwF,
    LwFMC,
    Regularised,
    Replay,
    SIPenalty,
    WithDetectedBoundaries,
)  # fmt: skip
from conftest import STRATEGIES, VITS, make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, RunStarted, SessionEnded, Strategy, Stream, Task, TaskEnded, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import Check, check_alike, example_model, example_stream, normed_model
from clstream.checks.recorders import Checkpoints
from clstream.params import describe
from clstream.recording import read, record
from clstream.strategy import Regulariser, needs
from clstream.stream import Samples, Subset

ROOT = Path(__file__).resolve().parent.parent
WITHOUT: dict[str, Callable[[nn.Module], Strategy]] = {
    "EWC": partial(EWC, strength=0.0),
    "EWC online": partial(EWC, strength=0.0, online=True),
    "SI": partial(SI, strength=0.0),
    "L2": partial(L2, strength=0.0),
    "LwF": partial(LwF, alpha=0.0),
    "LwF among seen": partial(LwF, alpha=0.0, distil="seen"),
}


def checks(one: Callable[[nn.Module], Strategy], other: Callable[[nn.Module], Strategy]) -> dict[str, Check]:
    return {check.name: check for check in check_alike(one, other)}


ALIKE = list(checks(Finetune, Finetune))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check"),
    [*itertools.product(["EWC", "LwF"], ALIKE), *itertools.product([*WITHOUT], ["alike_class_normed", "alike_task_growing"])],
)
def test_without_strength_each_is_fine_tuning_bit_for_bit(name: str, check: str) -> None:
    checks(WITHOUT[name], Finetune)[check]()


PENALTIES: dict[str, Callable[[], Regulariser]] = {
    "EWC": partial(EWCPenalty, 0.0),
    "SI": partial(SIPenalty, 0.0),
    "L2": partial(L2Penalty, 0.0),
    "FeatKD": partial(FeatKDPenalty, 0.0),
}


@pytest.mark.parametrize(("base", "check"), [(Replay, "alike_task"), (partial(DERpp, active_classes="seen"), "alike_class_normed")])
@pytest.mark.parametrize("name", PENALTIES)
def test_without_strength_a_penalty_leaves_its_host_as_it_is(name: str, base: Callable[[nn.Module], Strategy], check: str) -> None:
    checks(lambda model: Regularised(base(model), [PENALTIES[name]()]), base)[check]()


@pytest.mark.slow
def test_the_check_tells_what_differs() -> None:
    for one, other, name in (
        (partial(EWC, strength=0.0, bn_mode="eval"), Finetune, "alike_class_normed"),
        (partial(EWC, strength=0.0, active_classes="seen"), Finetune, "alike_class"),
        (partial(EWC, strength=1.0), Finetune, "alike_task"),
    ):
        with pytest.raises(AssertionError):
            checks(one, other)[name]()
    checks(partial(EWC, strength=0.0, active_classes="seen"), partial(Finetune, active_classes="seen"))["alike_class"]()


@pytest.mark.parametrize("kind", [EWC, SI, L2, LwF, LwFMC])
def test_with_batch_norm_the_defaults_learn(kind: type[Strategy]) -> None:
    result = run(kind(normed_model(), partial(SGD, lr=0.05)), example_stream(epochs=10))
    assert min(float(result.accuracy[task, task]) for task in range(3)) > 0.7
    resting = kind(normed_model(), bn_mode="eval")
    run(resting, example_stream(), max_sessions=1)
    assert float(resting.model.stages[1].running_var.sum()) == 4


# Whose outputs compete --------------------------------------------------------------------------------------------------


def columns(active: str, seen: list[int], own: list[int]) -> list[int]:
    return {"all": list(range(6)), "seen": seen, "task": own}[active]


OPTIONED = {
    "Finetune": Finetune, "Joint": Joint, "Replay": Replay, "MIR": partial(Replay, retrieval="mir", candidates=10, replay_batch=4),
    "DER": DER, "DERpp": DERpp, "ERACE": ERACE, "AGEM": partial(AGEM, per_task=20, sample=10), "EWC": EWC, "SI": SI, "L2": L2,
    "LwF": LwF, "EWC of sigmoids": partial(EWC, form="bce"),
}  # fmt: skip


@pytest.mark.parametrize("active", ["all", "seen", "task"])
@pytest.mark.parametrize("name", OPTIONED)
def test_each_strategy_takes_the_option(name: str, active: str) -> None:
    """In the second task of three, of two classes each: the loss by its closed form, the gradients, and what an answer can be."""
    strategy = OPTIONED[name](example_model(), active_classes=active)
    assert strategy.params["active_classes"] == active and describe(strategy.params["active_classes"]) == active
    run(strategy, stream := example_stream(), max_sessions=2)
    samples = stream.tasks[1].train[:16]
    outputs = strategy.model(samples.x).detach()
    weights = strategy.mask_other_heads(outputs, samples.y).isfinite()
    assert weights.all(0).nonzero().flatten().tolist() == weights.any(0).nonzero().flatten().tolist()
    assert weights[0].nonzero().flatten().tolist() == columns(active, [0, 1, 2, 3], [2, 3])
    answers = strategy.scores(samples.x)
    assert answers[0].isfinite().nonzero().flatten().tolist() == columns(active, [0, 1, 2, 3], [0, 1, 2, 3])
    assert strategy.predict(samples.x, stream.tasks[2]).unique().tolist() != [] and strategy.scores_ignore_task
    of_old = stream.tasks[0].train[:4]
    if name != "EWC of sigmoids":
        losses = strategy.sample_losses(strategy.model(of_old.x), of_old.y)
        expected = F.cross_entropy(strategy.model(of_old.x)[:, columns(active, [0, 1, 2, 3], [0, 1])], of_old.y, reduction="none")
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("name", ["Finetune", "EWC", "LwF"])
def test_it_is_the_loss_of_the_outputs_that_compete(name: str) -> None:
    for active in ("all", "seen", "task"):
        strategy = OPTIONED[name](example_model(), active_classes=active)
        given = {"strength": 0.0} if name == "EWC" else {"alpha": 0.0} if name == "LwF" else {}
        strategy = OPTIONED[name](example_model(), active_classes=active, **given)
        run(strategy, stream := example_stream(), max_sessions=2)
        samples, own = stream.tasks[1].train[:16], columns(active, [0, 1, 2, 3], [2, 3])
        expected = F.cross_entropy(strategy.model(samples.x)[:, own], torch.tensor([own.index(int(y)) for y in samples.y]))
        torch.testing.assert_close(strategy.objective(samples), expected)


@pytest.mark.parametrize(
    ("name", "active"), [*((name, "task") for name in OPTIONED if name != "EWC of sigmoids"), ("Replay", "seen"), ("LwF", "seen")]
)
def test_on_a_task_incremental_stream_it_changes_nothing(name: str, active: str) -> None:
    stream = example_stream((0, 1, 0, 2), scenario="task")
    one, two = (OPTIONED[name](example_model(), active_classes=classes) for classes in ("all", active))
    first, second = run(one, stream), run(two, stream)
    assert torch.equal(first.task_accuracy, second.task_accuracy) and torch.equal(first.accuracy, second.accuracy)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "active"), [("Replay", "task"), ("DERpp", "seen"), ("EWC", "task"), ("LwF", "seen")])
def test_it_goes_on_after_a_checkpoint_as_it_would_have(name: str, active: str) -> None:
    stream, make = example_stream((0, 1, 0, 2)), partial(OPTIONED[name], active_classes=active)
    whole, rest = Checkpoints(), Checkpoints(every=0)
    result = run(make(example_model(head="growing")), stream, whole)
    middle = whole.load(len(whole.written) // 2)
    resumed = run(make(example_model(head="growing")), stream, rest, resume=middle)
    assert torch.equal(result.accuracy, resumed.accuracy) and difference(whole.load(-1), rest.load(-1)) is None


def test_classes_of_a_task_need_boundaries() -> None:
    hidden = example_stream(boundaries=False)
    for active in ("all", "seen"):
        assert not needs(Finetune(example_model(), active_classes=active))
        run(Finetune(example_model(), active_classes=active), hidden)
    for strategy in (
        Finetune(example_model(), active_classes="task"),
        zoo.Refresh(Finetune(example_model(), active_classes="task")),
    ):
        with pytest.raises(ValueError, match=r"needs boundaries, which example hides \(active_classes='task' is about the classes"):
            run(strategy, hidden)
    with pytest.raises(ValueError, match="finds boundaries, but a session tells no task"):
        WithDetectedBoundaries(Finetune(example_model(), active_classes="task"))
    WithDetectedBoundaries(EWC(example_model(), active_classes="task"))


def test_a_class_that_comes_again_is_of_its_newest_task() -> None:
    tasks = [Task(n, classes, *parts(classes)) for n, classes in enumerate([(0, 1), (1, 2), (3, 4)])]
    strategy = Finetune(example_model(), active_classes="task")
    run(strategy, Stream("shared", tasks, (0, 1)), max_sessions=2)
    assert [row.nonzero().flatten().tolist() for row in strategy.heads] == [[0, 1], [1, 2], [1, 2], [], []]
    assert strategy.task_classes.tolist() == [1, 2] and strategy.seen_classes.tolist() == [0, 1, 2]


def table() -> list[str]:
    """Return the rows of the table in the docs, from the code."""
    rows = ["| strategy | option `active_classes` | what competes where the method fixes it |", "|---|---|---|"]
    for name in zoo.__all__:
        cls = getattr(zoo, name)
        if isinstance(cls, type) and issubclass(cls, Strategy):
            option = inspect.signature(cls).parameters.get("active_classes")
            assert (option is None) == bool(cls.fixed_classes) or name in ("ERACE", "LwF", "LwFMC"), name
            assert option is None or option.default == ("task" if name in VITS else "all")
            rows.append(f"| `{name}` | {'no' if option is None else '`' + option.default + '`'} | {cls.fixed_classes} |")
    return rows


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page, "\n" + "\n".join(table())


# Tasks that share classes ----------------------------------------------------------------------------------------------------


def parts(classes: tuple[int, ...], per_class: int = 30, seed: int = 0) -> tuple[Samples, Samples]:
    draw = torch.Generator().manual_seed(seed + sum(classes))
    patterns = torch.randint(0, 200, (10, 1, 8, 8), generator=draw)

    def some(number: int) -> Samples:
        y = torch.tensor(classes).repeat(number)
        return Samples((patterns[y] + torch.randint(0, 56, (len(y), 1, 8, 8), generator=draw)).to(torch.uint8), y)

    return some(per_class), some(10)


def shared(
    epochs: int = 1, subset: bool = False, schedule: tuple[int, ...] | None = None, last: tuple[int, ...] = (1, 2)
) -> Stream:
    """Return three tasks that share classes: {0, 1}, {1, 2} and the last; their inputs are of their own."""
    tasks = []
    for number, classes in enumerate([(0, 1), (1, 2), last]):
        train, test = parts(classes, seed=100 * number)
        tasks.append(Task(number, classes, Subset(train, torch.arange(len(train))) if subset else train, test))
    return Stream("shared", tasks, schedule, epochs, 8, "task")


class Zero(nn.Module):
    """Answers 0 for all six classes, so a loss is the logarithm of how many compete."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), 6)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("name", ["Finetune", "Replay", "MIR", "Joint", "AGEM", "EWC", "SI", "L2", "LwF"])
def test_only_the_outputs_of_a_samples_own_task_compete(name: str, subset: bool) -> None:
    stream, losses = shared(subset=subset), []

    class Watch:
        @on(BatchLearned)
        def see(self, event: BatchLearned) -> None:
            losses.append(float(event.loss))
            assert event.batch.samples.extra["task"].tolist() == [event.batch.task.id] * len(event.batch.samples)

    given = {"strength": 0.0} if name in ("EWC", "SI", "L2") else {"alpha": 0.0} if name == "LwF" else {}
    run(OPTIONED[name](Zero(), partial(SGD, lr=0.0), **given), stream, Watch())
    assert losses == pytest.approx([math.log(2)] * len(losses), abs=1e-6) and len(losses) >= 15


def test_replayed_samples_and_fishers_are_of_their_own_task() -> None:
    stream = shared()
    strategy = Replay(Zero(), partial(SGD, lr=0.0), capacity=1000)
    run(strategy, stream)
    kept = strategy.memory.all()
    assert kept.extra["task"].bincount().tolist() == [60, 60, 60]
    logits = strategy.logits(kept)
    for label, task, row in zip(kept.y.tolist(), kept.extra["task"].tolist(), logits.isfinite(), strict=True):
        assert row.nonzero().flatten().tolist() == list(stream.tasks[task].classes) and label in stream.tasks[task].classes
    with pytest.raises(ValueError, match=r"so Replay.mask_other_heads needs the task of each sample: pass samples.extra"):
        strategy.mask_other_heads(logits, kept.y)
    ewc = EWC(example_model(), partial(SGD, lr=0.0), fisher="empirical")
    run(ewc, stream, max_sessions=2)
    found = {name: torch.zeros_like(weight) for name, weight in ewc.model.named_parameters()}
    for task in stream.tasks[:2]:
        for x, y in zip(task.train[:].x, task.train[:].y, strict=True):
            loss = F.cross_entropy(ewc.model(x[None])[:, list(task.classes)], torch.tensor([task.classes.index(int(y))]))
            slopes = torch.autograd.grad(loss, list(ewc.model.parameters()))
            for total, slope in zip(found.values(), slopes, strict=True):
                total += slope.square() / len(task.train)
    for name, value in ewc.regularisers[0].importance.items():
        torch.testing.assert_close(value, found[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["cutmix", "resizemix"])
def test_mixed_samples_have_the_outputs_of_both_tasks(kind: str) -> None:
    stream = shared(last=(3, 4))
    strategy = Replay(Zero(), partial(SGD, lr=0.0), mix=kind)
    run(strategy, stream, max_sessions=1)
    one, two = (Samples(task.train[:4].x, task.train[:4].y, {"task": torch.full((4,), task.id)}) for task in stream.tasks[::2])
    torch.manual_seed(0)
    assert strategy.mixed_loss(one, kind).item() == pytest.approx(math.log(2))
    loss = strategy.mixed_loss(one + two, kind).item()  # each pair is of one task, but for those at the border
    assert math.log(2) - 1e-6 <= loss <= math.log(4) + 1e-6
    across = Samples(torch.cat([one.x[:1], two.x[:1]]), torch.cat([one.y[:1], two.y[:1]]), {"task": torch.tensor([0, 2])})
    assert strategy.mixed_loss(across, kind).item() == pytest.approx(math.log(4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SHARP. after episode")
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "CPECLIP"])  # its towers know other images
def test_every_strategy_learns_tasks_that_share_classes(name: str) -> None:
    if name == "Lifelong":  # its default holds the rows of classes that came, and refuses such a stream
        strategy = zoo.Lifelong(example_model(), policy={"old": float("inf"), "new_to_old": float("inf")})
    else:
        strategy = make(name)(example_model())
    result = run(strategy, shared(epochs=10, schedule=(0, 1)))
    assert [float(result.task_accuracy[task, task]) > 0.8 for task in range(2)] == [True] * 2, result.task_accuracy


def test_streams_whose_tasks_share_nothing_carry_nothing() -> None:
    for stream in (
        example_stream(scenario="task"),
        Stream("shared", shared().tasks, scenario="domain"),
        Stream("s", shared().tasks),
    ):
        assert not stream.session(0).samples[:].extra
    train, test = parts((0, 1))
    odd = Samples(train.x, train.y, {"task": train.y})
    with pytest.raises(ValueError, match="the task is given to its samples as the extra field 'task': give your own"):
        Stream("odd", [Task(0, (0, 1), odd, test), Task(1, (0, 1), odd, test)], scenario="task")
    Stream("even", [Task(0, (0, 1), odd, test)], scenario="task")


def test_an_unseen_task_changes_no_answer_of_another() -> None:
    """Two tasks with the same labels, one of them with its labels turned round: with heads by label one could not be learned."""

    class Told:
        @on(RunStarted)
        def see(self, event: RunStarted) -> None:
            self.heads = event.strategy.heads

        @on(SessionEnded)
        @on(TaskEnded)
        def check(self, event: object) -> None:
            assert torch.equal(self.heads, torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 1]]).bool())

    run(Finetune(example_model()), shared(), Told())


def test_a_recording_and_a_checkpoint_carry_the_task(tmp_path: Path) -> None:
    stream = shared(subset=True)
    recording = read(record(stream, tmp_path / "shared.clstream"))
    again = recording.replay(recording.find_parts(stream))
    whole, results = Checkpoints(), []
    for variant in (stream, again):
        strategy = Replay(example_model(), capacity=20)
        results.append(run(strategy, variant, *([whole] if variant is stream else [])))
    assert torch.equal(results[0].task_accuracy, results[1].task_accuracy)
    number = len(whole.written) // 2
    resumed = Replay(example_model(), capacity=20)
    assert torch.equal(run(resumed, stream, rest := Checkpoints(every=0), resume=whole.load(number)).accuracy, results[0].accuracy)
    assert difference(whole.load(-1), rest.load(-1)) is None
