"""The contract: what every strategy and every stream must do, as small named checks that anyone can run on theirs.

    for check in check_strategy(MyStrategy):
        check()

or, one test each, `@pytest.mark.parametrize("check", check_strategy(MyStrategy), ids=str)`. A check that fails raises
AssertionError with a sentence. A strategy that can't meet one says so on its class: `exempt = {"grows": "why"}`.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clstream import events
from clstream.bus import on
from clstream.checkpoint import difference
from clstream.comparing import digest
from clstream.engine import Result, run
from clstream.evaluation import evaluate, evaluating
from clstream.models import Mlp
from clstream.params import describe
from clstream.retention import Search
from clstream.seeds import isolated
from clstream.strategy import Strategy, needs
from clstream.stream import Mixture, Samples, Stream, Subset, Task

Make = Callable[[nn.Module], Strategy]

LETTERS = {
    events.RunStarted: "R", events.TaskStarted: "T", events.SessionStarted: "S", events.EpochStarted: "E", events.BatchReady: "b",
    events.BatchLearned: "l", events.EpochEnded: "e", events.SessionEnded: "s", events.TaskEnded: "t", events.Evaluated: "V",
    events.RunEnded: "r",
}  # fmt: skip
SESSION = "S(E(bl)*e)+s"
SHOWN = re.compile(f"R(T({SESSION}V)*{SESSION}tV)*r")
HIDDEN = re.compile(f"R({SESSION}V)*r")


@dataclass(frozen=True, slots=True)
class Check:
    """One check; call it to run it."""

    name: str
    body: Callable[[], None]

    def __call__(self) -> None:
        """Run it; AssertionError if it fails."""
        self.body()

    def __str__(self) -> str:
        return self.name


class Trace:
    """An observer that writes each event of a run down as a letter; events of a strategy's own are left out."""

    def __init__(self) -> None:
        self.word = ""

    @on(events.Event)
    def write(self, event: events.Event) -> None:
        """Write the letter."""
        self.word += LETTERS.get(type(event), "")


class Checkpoints:
    """An observer that keeps checkpoints of a run in memory, as they would be on disk.

    Args:
        every: one after the start, after each batch and after each evaluation; if not, the first and the last one only.

    """

    def __init__(self, every: bool = True) -> None:
        self.every = every
        self.written: list[bytes] = []

    @on(events.RunStarted)
    def begin(self, event: events.RunStarted) -> None:
        """Take the first one."""
        assert event.run is not None
        self.run = event.run
        self.run.ask(self.write)

    @on(events.BatchLearned)
    def learned(self, event: events.BatchLearned) -> None:
        """Take one after the batch."""
        if self.every:
            self.run.ask(self.write)

    @on(events.Evaluated)
    def evaluated(self, event: events.Evaluated) -> None:
        """Take one after the evaluation."""
        if self.every or len(event.evaluation.accuracy) == self.run.sessions:
            self.run.ask(self.write)

    def write(self) -> None:
        """Keep one."""
        file = io.BytesIO()
        torch.save(self.run.state(), file)
        self.written.append(file.getvalue())

    def load(self, number: int) -> Mapping[str, Any]:
        """Return one, for `run(resume=...)`."""
        state: Mapping[str, Any] = torch.load(io.BytesIO(self.written[number]), weights_only=True)
        return state


def example_stream(
    schedule: tuple[int, ...] = (0, 1, 2), epochs: int = 1, batch_size: int = 8, scenario: str = "class", boundaries: bool = True
) -> Stream:
    """Return a small stream: 3 tasks of 2 classes, (1, 8, 8) uint8 images of one pattern a class with noise, 30 + 10 each."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 200, (6, 1, 8, 8), generator=draw)

    def samples(task: int, each: int) -> Samples:
        y = torch.tensor([2 * task, 2 * task + 1]).repeat(each)
        noise = torch.randint(0, 56, (len(y), 1, 8, 8), generator=draw)
        return Samples((patterns[y] + noise).to(torch.uint8), y)

    tasks = [Task(number, (2 * number, 2 * number + 1), samples(number, 30), samples(number, 10)) for number in range(3)]
    return Stream("example", tasks, schedule, epochs, batch_size, scenario, boundaries=boundaries)


def example_model(seed: int = 0, head: str = "fixed") -> nn.Module:
    """Return a small model for `example_stream`, the same for the same seed."""
    with isolated(seed, "model"):
        return Mlp((1, 8, 8), 6, hidden=(32,), head=head)


class NormedNet(nn.Module):
    """A small model for `example_stream` that answers otherwise while it learns: a convolution, batch norm, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(144, 6)

    def features(self, x: Tensor) -> Tensor:
        """Return (n, 144) features of (n, 1, 8, 8) bytes."""
        features: Tensor = self.stages(x.float() / 255)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 6) logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


def normed_model() -> nn.Module:
    """Return a model with batch norm and dropout for `example_stream`, always the same."""
    with isolated(0, "model"):
        return NormedNet()


class Asking:
    """An observer that asks whenever it can: before and within the first steps of a session, when it ends, after each evaluation.

    What it was answered at the end is in `answers`.
    """

    def __init__(self) -> None:
        self.answers: list[Tensor] = []

    @on(events.Event)
    def ask(self, event: events.Event) -> None:
        """Ask for everything there is to ask."""
        if isinstance(event, events.RunStarted):  # some have nothing to answer with yet
            self.strategy, self.task = event.strategy, event.stream.tasks[0]
        early = isinstance(event, (events.BatchReady, events.BatchLearned)) and event.batch.index < 2
        if not early and not isinstance(event, (events.SessionEnded, events.Evaluated, events.RunEnded)):
            return
        x, strategy = self.task.test[:].x, self.strategy
        self.answers = [strategy.scores(x), strategy.predict(x), strategy.predict(x, self.task), strategy.anticipate(x)]
        assert not any(answer.requires_grad for answer in self.answers), "an answer has the graph that it was computed by"


def check_strategy(make: Make) -> Iterator[Check]:
    """Yield the checks of a strategy.

    Args:
        make: builds a fresh strategy from a model: the class itself, or a function.

    """
    needy = bool(needs(make(example_model())))

    def built(head: str = "fixed") -> Strategy:
        with isolated(0, "strategy"):
            return make(example_model(head=head))

    def played(stream: Stream, *observers: object, seed: int = 0, evaluate_every: int | None = None) -> tuple[Result, Strategy]:
        strategy = built()
        return run(strategy, stream, *observers, seed=seed, evaluate_every=evaluate_every), strategy

    def records_params() -> None:
        strategy = built()
        assert isinstance(strategy, Strategy), "it must derive from clstream.Strategy"
        for name, value in strategy.params.items():
            assert isinstance(describe(value), (str, int, float, bool, type(None))), f"param {name} can't be described"

    def follows_grammar() -> None:
        for schedule, epochs in (((0, 1, 2), 1), ((0, 0, 1, 2), 2), ((0, 1, 0, 2), 1)):
            trace = Trace()
            played(example_stream(schedule, epochs), trace)
            assert SHOWN.fullmatch(trace.word), f"schedule {schedule} gave the events {trace.word}"

    def needs_what_it_says() -> None:
        hidden, trace = example_stream(boundaries=False), Trace()
        if needy:
            try:
                played(hidden, trace)
            except ValueError as refusal:
                assert not trace.word, "it was refused, but only after the run had started"
                assert "needs" in str(refusal), f"it was refused for another reason: {refusal}"
            else:
                raise AssertionError("it needs boundaries, and was not refused on a stream that hides them")
        else:
            played(hidden, trace)
            assert HIDDEN.fullmatch(trace.word), f"without boundaries it gave the events {trace.word}"

    def is_deterministic() -> None:
        (one, first), (two, second) = (played(example_stream(epochs=2)) for _ in range(2))
        assert torch.equal(one.accuracy, two.accuracy), "two runs with one seed differ in accuracy"
        assert digest(first) == digest(second), "two runs with one seed leave different states"

    def resumes_exactly() -> None:
        def go_on(head: str, observer: Checkpoints, state: Mapping[str, Any] | None = None) -> Result:
            stream = example_stream((0, 1, 0, 2), epochs=2, batch_size=20)
            return run(built(head), stream, observer, evaluate_every=3, resume=state)

        for head in ("fixed", *(["growing"] if "grows" not in built().exempt else [])):
            whole = Checkpoints()
            expected = go_on(head, whole)
            end = whole.load(-1)
            for number in range(len(whole.written)):
                state, rest = whole.load(number), Checkpoints(every=False)
                where = "the checkpoint before (session, epoch, batch) ({}, {}, {})".format(*state["position"])
                result = go_on(head, rest, state)
                differs = difference(end, rest.load(-1))
                assert differs is None, f"resumed from {where}, the run ends with another {differs}"
                assert torch.equal(expected.accuracy, result.accuracy), f"resumed from {where}, the run ends with other results"

    def leaves_the_caller_alone() -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # a tuple
        played(example_stream())
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "the caller's random generators were moved"

    def learns() -> None:
        result, _ = played(example_stream(epochs=10))
        taught = [float(result.accuracy[task, task]) for task in range(3)]
        assert min(taught) > 0.5, f"right after each of three easy tasks of 2 classes among 6 the accuracy is {taught}"

    def answers() -> None:
        stream = example_stream()
        _, strategy = played(stream)
        x = torch.cat([task.test.x for task in stream.tasks])
        with evaluating(strategy):
            scores = strategy.scores(x)
            assert scores.shape == (len(x), 6) and scores.is_floating_point(), f"scores are {tuple(scores.shape)} of {scores.dtype}"
            assert not scores.isnan().any(), "scores hold NaN"
            for task in (None, *stream.tasks):
                labels = strategy.predict(x, task)
                assert labels.shape == (len(x),) and labels.dtype == torch.int64, (
                    f"labels are {tuple(labels.shape)} of {labels.dtype}"
                )
                allowed = range(6) if task is None else task.classes
                assert set(labels.tolist()) <= set(allowed), f"with {task} given it answers {sorted(set(labels.tolist()))}"
                assert torch.equal(strategy.predict(x[:7], task), labels[:7]), (
                    "the answer for a sample depends on the others asked with it"
                )

    def answers_before_learning() -> None:
        row, task_row = evaluate(built(), example_stream())
        assert bool(((row >= 0) & (row <= 1) & (task_row >= 0)).all()), f"untrained, it answers {row}"

    def evaluates_without_trace() -> None:
        (plain, one), (often, two) = (played(example_stream(), evaluate_every=every) for every in (None, 2))
        assert torch.equal(plain.accuracy, often.accuracy), "evaluating more often changes what is learned"
        assert digest(one) == digest(two), "evaluating more often changes the state"

    def answers_without_trace() -> None:
        def go(*observers: object) -> tuple[Result, Strategy]:
            with isolated(0, "strategy"):
                try:
                    strategy = make(normed_model())
                except (TypeError, ValueError):  # a strategy for other networks
                    strategy = make(example_model())
            return run(strategy, example_stream(), *observers), strategy

        (plain, one), (asked, two) = go(), go(asking := Asking())
        assert torch.equal(plain.accuracy, asked.accuracy), "an observer that asks changes what is learned"
        assert digest(one) == digest(two), "an observer that asks changes the state"
        again = Asking()
        again.strategy, again.task = two, asking.task
        state, chance = digest(two), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
        again.ask(events.RunEnded(None))
        for answer, then in zip(again.answers, asking.answers, strict=True):
            assert torch.equal(answer, then), "after the run it answers otherwise than when the run ended"
        assert digest(two) == state, "an answer after the run changes the state"
        now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        assert torch.equal(now[0], chance[0]) and now[1:] == chance[1:], "an answer moves the caller's random generators"

    def leaves_the_data_alone() -> None:
        stream = example_stream(epochs=2)
        before = stream.fingerprint
        played(stream)
        assert Stream(stream.name, stream.tasks, stream.schedule, stream.epochs, stream.batch_size).fingerprint == before, (
            "it changes the stream's data"
        )

    def keeps_no_samples() -> None:
        search = Search()
        if built().rehearsal_free:
            played(example_stream((0, 1, 0, 2), epochs=2, batch_size=16), search)
        assert search.found is None, f"it says that it is rehearsal-free, but {search.found} holds inputs of a past session"

    def takes_any_batch() -> None:
        for batch_size in (1, 59, 1000):  # one sample, a last batch of one sample, everything at once
            trace = Trace()
            played(example_stream(batch_size=batch_size), trace)
            assert trace.word.count("l") == 3 * -(-60 // batch_size), "not every batch was learned"

    def learns_tasks_with_their_heads() -> None:
        result, _ = played(example_stream(epochs=10, scenario="task"))
        assert result.average_accuracy > 0.6, f"with the task given, the average accuracy is {result.average_accuracy:.2f}"

    def grows() -> None:
        strategy = built(head="growing")
        result = run(strategy, example_stream(epochs=10))
        assert float(result.accuracy.diagonal().min()) > 0.5, f"with a growing head the accuracies are {result.accuracy}"

    def runs_on_every_device() -> None:
        for device in ["cuda"] * torch.cuda.is_available():
            strategy = built()
            result = run(strategy, example_stream(epochs=10), device=device)
            assert float(result.accuracy.diagonal().min()) > 0.5, f"on {device} the accuracies are {result.accuracy}"

    exempt = built().exempt
    bodies = (
        records_params, follows_grammar, needs_what_it_says, is_deterministic, resumes_exactly, leaves_the_caller_alone,
        learns, answers, answers_before_learning, evaluates_without_trace, answers_without_trace,
        leaves_the_data_alone, keeps_no_samples, takes_any_batch,
        learns_tasks_with_their_heads, grows, runs_on_every_device,
    )  # fmt: skip
    if unknown := set(exempt) - {body.__name__ for body in bodies}:
        raise ValueError(f"it is exempt from {sorted(unknown)}, which are no checks")
    for body in bodies:
        if body.__name__ not in exempt:
            yield Check(body.__name__, body)


class Losses:
    """An observer that keeps the loss of each step."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []

    @on(events.BatchLearned)
    def keep(self, event: events.BatchLearned) -> None:
        """Keep it."""
        self.all.append(event.loss)


def check_alike(one: Make, other: Make) -> Iterator[Check]:
    """Yield the checks of two strategies that are to be the same, bit for bit: one with a penalty of strength 0 and its host, say.

    Each check is a run of both, on class- and task-incremental streams, with an augmentation that draws: losses, results, weights,
    buffers and the modes of modules must be equal.

    Args:
        one, other: each builds a fresh strategy from a model.

    """

    def alike(model: Callable[[], nn.Module], scenario: str) -> None:
        def jitter(x: Tensor) -> Tensor:
            shift = int(torch.randint(3, ())) + random.randrange(3) + int(np.random.randint(3))
            return x.roll(shift, -1)

        ends = []
        for make in (one, other):
            stream = replace(example_stream((0, 1, 0, 2), epochs=2, scenario=scenario), augment=jitter)
            with isolated(0, "strategy"):
                strategy = make(model())
            losses = Losses()
            ends.append((run(strategy, stream, losses, seed=4), strategy.model, torch.stack(losses.all)))
        (result, net, ours), (expected, host, theirs) = ends
        assert torch.equal(ours, theirs), f"the losses differ, first in step {int((ours != theirs).nonzero()[0])}"
        modes = [[(name, module.training) for name, module in each.named_modules()] for each in (net, host)]
        assert modes[0] == modes[1], "modules are in other modes"
        for name, value in host.state_dict().items():
            assert torch.equal(net.state_dict()[name], value), f"{name} differs"
        assert torch.equal(result.accuracy, expected.accuracy), "without the task given, the accuracies differ"
        assert torch.equal(result.task_accuracy, expected.task_accuracy), "with the task given, the accuracies differ"

    models: dict[str, Callable[[], nn.Module]]
    models = {"": example_model, "_growing": partial(example_model, head="growing"), "_normed": normed_model}
    for scenario in ("class", "task"):
        for name, model in models.items():
            yield Check(f"alike_{scenario}{name}", partial(alike, model, scenario))


def check_stream(stream: Stream) -> Iterator[Check]:
    """Yield the checks of a stream."""

    def all_batches(of: Stream) -> list[tuple[int, int, int, Tensor, Tensor]]:
        return [
            (session.index, batch.epoch, batch.index, batch.samples.x, batch.samples.y)
            for session in of
            for epoch in session
            for batch in epoch
        ]

    def is_repeatable() -> None:
        for one, two in zip(_hashed(all_batches(stream)), _hashed(all_batches(stream)), strict=True):
            assert one == two, f"the batch (session, epoch, batch) {one[:3]} differs from one iteration to the next"

    def delivers_every_sample_once() -> None:
        for session in stream:
            for epoch in session:
                order = epoch.order()
                assert torch.equal(order.sort().values, torch.arange(len(session.samples))), (
                    f"{epoch} is not one pass over its session"
                )
                sizes = [len(batch.samples) for batch in epoch]
                dropped = len(session.samples) % stream.batch_size if stream.drop_last else 0
                assert sum(sizes) == len(session.samples) - dropped and len(sizes) == len(epoch), (
                    f"the batches of session {session.index} are {sizes}"
                )
                assert set(sizes[:-1]) <= {stream.batch_size}, f"the batches of session {session.index} are {sizes}"

    def deals_tasks_out() -> None:
        if isinstance(stream.schedule, Mixture):
            drawn = [stream.schedule.draw(index) for index in range(len(stream))]
            assert sum(map(len, drawn)) == sum(int(stream.mix(index).sum()) for index in range(len(stream))), "mixes don't add up"
            counts = torch.cat(drawn).bincount(minlength=sum(len(task.train) for task in stream.tasks))
            assert not stream.schedule.once or int(counts.max()) == 1, "a sample comes twice"
            return
        for number, task in enumerate(stream.tasks):
            parts = [stream.session(index).samples for index in range(len(stream)) if stream.task_of(index) == number]
            assert sum(map(len, parts)) <= len(task.train), f"the sessions of task {number} deliver more than it has"
            rows = [part.index for part in parts if isinstance(part, Subset)]
            if rows:
                joined = torch.cat(rows)
                assert len(joined.unique()) == len(joined), f"a sample of task {number} comes in two sessions"

    def keeps_labels_within_tasks() -> None:
        for session in stream:
            tasks = [stream.tasks[number] for number in stream.mix(session.index).nonzero().flatten().tolist()]
            assert stream.tasks[stream.task_of(session.index)] in tasks, f"session {session.index} has nothing of its task"
            allowed = {label for task in tasks for label in task.classes}
            assert set(session.classes) <= allowed, f"session {session.index} has labels outside of {tasks}"

    def reaches_any_batch() -> None:
        epoch = next(iter(stream.session(len(stream) - 1)))
        whole = [batch.samples.x for batch in epoch]
        for first in {0, len(whole) // 2, len(whole) - 1}:
            rest = [batch.samples.x for batch in epoch.batches(first)]
            assert len(rest) == len(whole) - first, f"starting at batch {first} gives {len(rest)} batches of {len(whole)}"
            assert all(torch.equal(one, two) for one, two in zip(rest, whole[first:], strict=True)), (
                f"starting at batch {first} gives other batches"
            )

    def reseeds() -> None:
        epoch, other = (next(iter(each.session(0))) for each in (stream, stream.reseeded(1)))
        assert torch.equal(next(iter(stream.reseeded(0).session(0))).order(), epoch.order()), "seed 0 changes the order"
        same = torch.equal(other.order(), epoch.order())
        assert len(epoch.order()) < 5 or same != stream.shuffle, "another seed must change the order, unless nothing is shuffled"

    def hides_what_it_hides() -> None:
        for session in stream:
            batch = next(iter(next(iter(session))))
            assert (session.task is None) == (batch.task is None) == (not stream.boundaries), "task and boundaries disagree"
            assert stream.boundaries or isinstance(session.samples, Samples), "a session leads to the data that it hides"

    def describes_itself() -> None:
        card = str(stream)
        for fact in (stream.name, stream.fingerprint, f"tasks        {len(stream.tasks)}", f"classes      {stream.classes}"):
            assert fact in card, f"its card does not say {fact!r}"

    for body in (
        is_repeatable, delivers_every_sample_once, deals_tasks_out, keeps_labels_within_tasks, reaches_any_batch, reseeds,
        hides_what_it_hides, describes_itself,
    ):  # fmt: skip
        yield Check(body.__name__, body)


def _hashed(batches: list[tuple[int, int, int, Tensor, Tensor]]) -> list[tuple[int, int, int, int, int]]:
    return [
        (session, epoch, index, hash(x.cpu().numpy().tobytes()), hash(y.cpu().numpy().tobytes()))
        for session, epoch, index, x, y in batches
    ]
