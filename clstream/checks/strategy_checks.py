"""The contract: what every strategy and every stream must do, as small named checks that anyone can run on theirs.

    for check in check_strategy(MyStrategy):
        check()

or, one test each, `@pytest.mark.parametrize("check", check_strategy(MyStrategy), ids=str)`. A check that fails raises
AssertionError with a sentence. A strategy that can't meet one says so on its class: `exempt = {"grows": "why"}`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clstream import events
from clstream.attributes import find_all, walk
from clstream.checkpoint.compare import difference
from clstream.checks.check import Check
from clstream.checks.examples import example_model, example_stream, normed_model
from clstream.checks.recorders import HIDDEN, SHOWN, Asking, Checkpoints, Losses, SquaredNorm, Trace
from clstream.checks.retention import InputSearch
from clstream.engine import run
from clstream.eval_mode import evaluating
from clstream.evaluation import evaluate
from clstream.params import describe
from clstream.results import Result
from clstream.seeds import isolated
from clstream.serialization import capture
from clstream.serialization.compare import digest, first_difference
from clstream.strategy import Strategy, load, needs
from clstream.stream import TARGETS, HiddenTaskError, Session, Stream, Subset, Task
from clstream.training import Training, taken

Make = Callable[[nn.Module], Strategy]

OF_EACH_TARGET = ("is_deterministic", "resumes_exactly", "learns", "answers", "leaves_the_data_alone", "takes_any_batch")
"""The checks that are run with each kind of targets that a strategy learns; all others take labels."""


def chance() -> tuple[bytes, object, bytes]:
    """Return the states of the caller's random generators: torch's, Python's and numpy's."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]


class PlainRun:
    """A run that several checks look at, with what was there before it.

    Args:
        checks: the checks of a strategy, which is played.

    """

    def __init__(self, checks: StrategyChecks) -> None:
        self.stream, self.trace = checks.stream(epochs=2), Trace()
        self.data_before, self.chance_before = self.stream.fingerprint, chance()
        self.result, self.strategy = checks.play(self.stream, self.trace)
        self.chance_after = chance()
        self.digest = digest(self.strategy)


class StrategyChecks:
    """The contract of strategies: a method for each check, which raises AssertionError if the strategy doesn't meet it.

    Args:
        make: builds a fresh strategy from a model: the class itself, or a function.
        target: the kind of targets of the streams that it learns.

    """

    def __init__(self, make: Make, target: str = "label") -> None:
        self.make, self.target = make, target

    def stream(self, schedule: tuple[int, ...] = (0, 1, 2), epochs: int = 1, batch_size: int = 20) -> Stream:
        """Return the example stream, with targets of the kind."""
        return example_stream(schedule, epochs, batch_size, target=self.target)

    def build(self, head: str = "fixed", classes: int = 6) -> Strategy:
        """Return a fresh strategy, always the same, around the example model with a head."""
        with isolated(0, "strategy"):
            return self.make(example_model(head=head, classes=classes))

    def play(self, stream: Stream, *observers: object, seed: int = 0, evaluate_every: int | None = None) -> tuple[Result, Strategy]:
        """Run a fresh strategy; return what was measured, and the strategy."""
        strategy = self.build()
        return run(strategy, stream, *observers, seed=seed, evaluate_every=evaluate_every), strategy

    @cached_property
    def plain(self) -> PlainRun:
        """Return a run over three tasks, the same for all checks that need one; none of them changes the strategy."""
        return PlainRun(self)

    def records_params(self) -> None:
        """Its constructor's arguments are kept by name, and can be described."""
        strategy = self.build()
        assert isinstance(strategy, Strategy), "it must derive from clstream.Strategy"
        for name, value in strategy.params.items():
            assert isinstance(describe(value), (str, int, float, bool, type(None))), f"param {name} can't be described"

    def follows_grammar(self) -> None:
        """Runs of it give the events that `clstream.events` says, also where a task comes again or in several sessions."""
        again = self.stream((0, 0, 1, 0, 2))
        self.play(again, trace := Trace())
        for schedule, word in ((self.plain.stream.schedule, self.plain.trace.word), (again.schedule, trace.word)):
            assert SHOWN.fullmatch(word), f"schedule {schedule} gave the events {word}"

    def needs_what_it_says(self) -> None:
        """On a stream that hides its boundaries it is refused before the run if it needs them, and runs if it doesn't."""
        hidden, trace = example_stream(batch_size=20, boundaries=False), Trace()
        if needs(self.build()):
            try:
                self.play(hidden, trace)
            except ValueError as refusal:
                assert not trace.word, "it was refused, but only after the run had started"
                assert "needs" in str(refusal), f"it was refused for another reason: {refusal}"
            else:
                raise AssertionError("it needs boundaries, and was not refused on a stream that hides them")
        else:
            try:
                self.play(hidden, trace)
            except HiddenTaskError as error:
                what = "session" if "a session" in str(error) else "batch"
                raise AssertionError(f"it reads the task of a {what}: say needs_task = True on its class") from error
            assert HIDDEN.fullmatch(trace.word), f"without boundaries it gave the events {trace.word}"

    def minimises_penalties(self) -> None:
        """Its steps minimise the penalties of regularisers, unless it takes none."""
        strategy = self.build()
        if strategy.takes_regularisers:
            strategy.add_regularisers(penalty := SquaredNorm())
            try:
                run(strategy, self.stream(), max_sessions=1)
            except TypeError as error:
                if penalty.penalised:
                    raise
                raise AssertionError(
                    "its steps leave out the penalties of regularisers: minimise self.objective(samples) in learn, or say "
                    "takes_regularisers = False on its class"
                ) from error

    def is_deterministic(self) -> None:
        """Two runs with one seed give equal results and states, bit for bit."""
        repeated, other = self.play(self.plain.stream)
        assert torch.equal(self.plain.result.main, repeated.main), "two runs with one seed differ in what is measured"
        assert self.plain.digest == digest(other), "two runs with one seed leave different states"

    def resumes_exactly(self) -> None:
        """A run that goes on from one of its checkpoints ends as it would have without the break, bit for bit.

        Of a fixed head every seventh checkpoint is tried, so one in each session; of a growing one every fourteenth.
        """
        schedule, epochs = ((0, 1, 0, 2), 2) if self.target == "label" else ((0, 1, 2), 1)

        def go_on(head: str, observer: Checkpoints, state: Mapping[str, Any] | None = None) -> Result:
            stream = self.stream(schedule, epochs)
            return run(self.build(head), stream, observer, evaluate_every=3, resume=state)

        heads = (("fixed", 7), ("growing", 14)) if self.target == "label" else (("growing", 7),)
        for head, step in heads:
            if head == "growing" and "grows" in self.build().exempt:
                continue
            whole = Checkpoints(step=step)
            expected = go_on(head, whole)
            end = whole.load(-1)
            for number in range(len(whole.written) - 1):  # the last one has nothing left to go on with
                state, rest = whole.load(number), Checkpoints(every=0)
                where = "the checkpoint before (session, epoch, batch) ({}, {}, {})".format(*state["position"])
                result = go_on(head, rest, state)
                differs = difference(end, rest.load(-1))
                assert differs is None, f"resumed from {where}, the run ends with another {differs}"
                assert torch.equal(expected.main, result.main), f"resumed from {where}, the run ends with other results"

    def resumes_with_controls(self) -> None:
        """Under all the training controls that it takes, it goes on from a checkpoint within an epoch as without the break."""
        if "resumes_exactly" in self.build().exempt:
            return
        stream = self.stream((0, 1), epochs=2)

        def go_on(observer: Checkpoints, train: Training, state: Mapping[str, Any] | None = None) -> Result:
            return run(self.build(), stream, observer, train=train, resume=state)

        train = taken(self.build())
        try:
            expected = go_on(whole := Checkpoints(every=0, at=10), train)
        except ValueError as error:  # whether a loss weighs classes shows when it is computed
            if train.class_weights is None or "class weights" not in str(error):
                raise
            expected = go_on(whole := Checkpoints(every=0, at=10), train := taken(self.build(), but=("class_weights",)))
        state = whole.load(0)
        result = go_on(rest := Checkpoints(every=0), train, state)
        differs = difference(whole.load(-1), rest.load(-1))
        assert differs is None, (
            f"resumed from {state['position']} under {', '.join(train.controls)}, the run ends with another {differs}"
        )
        assert torch.equal(expected.main, result.main), "resumed under training controls, the run ends with other results"

    def saves_exactly(self) -> None:
        """Saved and loaded it is the same, bit for bit: what it holds, what it answers, and what becomes of it in a further run."""
        first, second = self.stream((0, 1)), self.stream((2,))
        _, strategy = self.play(first)
        classes = {type(value) for _, value in walk(strategy)}
        classes |= {type(part) for _, model in find_all(strategy, nn.Module) for part in model.modules()}
        with TemporaryDirectory() as folder:
            loaded = load(strategy.save(folder), classes)
        apart = any(isinstance(value, (Session, Subset, Task)) for _, value in walk(strategy))  # saved apart from the whole stream
        differs = None if apart else first_difference(capture([strategy])[0], capture([loaded])[0])
        assert differs is None, f"what it holds is another one after it was saved and loaded: {differs}"
        x = first.tasks[0].test[:].x
        assert torch.equal(loaded.scores(x), strategy.scores(x)), "saved and loaded, it answers otherwise"

        def go_on(learner: Strategy) -> str:
            try:
                return str(run(learner, second).main)
            except ValueError as error:  # a strategy may have nothing left to learn
                return str(error)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this .* was run before")
            assert go_on(strategy) == go_on(loaded), "saved and loaded, a further run of it has other results"
        assert digest(strategy) == digest(loaded), "saved and loaded, it is another one after a further run"

    def continues_exactly(self) -> None:
        """A run that ends after two tasks, and is continued, ends as one run over all three, bit for bit where both were asked.

        With a growing head the first run is on a stream of these two tasks alone, so that its classes are fewer; with a fixed
        one it is on the stream of all, and stops.
        """
        stream, short = self.stream(), self.stream()
        short = replace(short, tasks=short.tasks[:2], schedule=(0, 1))
        for head in ("fixed", "growing"):
            if head == "growing" and "grows" in self.build().exempt:
                continue
            whole, first, rest = (Checkpoints(every=0) for _ in range(3))
            expected = run(self.build(head), stream, whole, evaluate_every=3)
            if head == "fixed" or not self.build().takes_new_classes:
                run(self.build(head), stream, first, max_sessions=2)
            else:
                run(self.build(head, 4), short, first)
            result = run(self.build(head), stream, rest, evaluate_every=3, continues=first.load(-1))
            differs = first_difference(whole.load(-1)["strategy"], rest.load(-1)["strategy"])
            assert differs is None, f"with a {head} head, a run that was continued ends with another {differs}"
            both = result.main.isfinite()
            assert torch.equal(expected.main[both], result.main[both]), (
                f"with a {head} head, a run that was continued has other results"
            )
            assert bool(both[-1].all()), "not all tasks were asked about in the end"

    def leaves_the_caller_alone(self) -> None:
        """A run doesn't move the caller's random generators."""
        assert self.plain.chance_before == self.plain.chance_after, "the caller's random generators were moved"

    def learns(self) -> None:
        """Right after each of three easy tasks it does better than half on it; with other targets, better than right before."""
        result, _ = self.play(self.stream(epochs=10, batch_size=8))
        if self.target != "label":
            start = result.start[result.main_names[0]][:1]
            before, after = torch.cat([start, result.main[:-1].diagonal(1)]), result.main.diagonal()
            assert bool((after > before).all()) and float((after - before).mean()) > 0.1, (
                f"right before each of three easy tasks {result.main_name} is {before.tolist()} on it, right after {after.tolist()}"
            )
            return
        taught = [float(result.accuracy[task, task]) for task in range(3)]
        assert min(taught) > 0.5, f"right after each of three easy tasks of 2 classes among 6 the accuracy is {taught}"

    def answers(self) -> None:
        """Scores and labels have the right shapes and types; the answer for a sample doesn't depend on the others."""
        stream, strategy = self.plain.stream, self.plain.strategy
        x = torch.cat([task.test.x for task in stream.tasks])
        shape, dtype = ((len(x),), torch.int64) if self.target == "label" else ((len(x), 6), torch.float32)
        with evaluating(strategy):
            scores = strategy.scores(x)
            assert scores.shape == (len(x), 6) and scores.is_floating_point(), f"scores are {tuple(scores.shape)} of {scores.dtype}"
            assert not scores.isnan().any(), "scores hold NaN"
            if strategy.scores_are == "probabilities":
                assert bool((scores >= 0).all()), "its scores are probabilities, but some are below 0"
                assert self.target != "label" or bool(((scores.sum(1) - 1).abs() < 1e-3).all()), "its scores don't add up to 1"
            for task in (None, *stream.tasks):
                answers = strategy.predict(x, task)
                assert (answers.shape, answers.dtype) == (shape, dtype), f"it predicts {tuple(answers.shape)} of {answers.dtype}"
                if self.target == "label":
                    predicted = set(answers.tolist())
                else:
                    predicted = set(answers.any(0).nonzero().flatten().tolist())
                    assert self.target == "value" or set(answers.unique().tolist()) <= {0, 1}, "it predicts others than 0 and 1"
                allowed = range(6) if task is None or self.target == "value" else task.classes
                assert predicted <= set(allowed), f"with {task} given it answers {sorted(predicted)}"
                assert torch.equal(strategy.predict(x[:7], task), answers[:7]), (
                    "the answer for a sample depends on the others asked with it"
                )
            if strategy.tells_novelty((self.target,)):
                novelty = strategy.novelty(x)
                assert novelty.shape == (len(x),) and bool(novelty.isfinite().all()), f"its novelty is {novelty}"

    def answers_before_learning(self) -> None:
        """It answers before it has learned anything."""
        row, task_row = evaluate(self.build(), example_stream())
        assert bool(((row >= 0) & (row <= 1) & (task_row >= 0)).all()), f"untrained, it answers {row}"

    def evaluates_without_trace(self) -> None:
        """Evaluating more often changes nothing."""
        often, other = self.play(self.plain.stream, evaluate_every=2)
        assert torch.equal(self.plain.result.accuracy, often.accuracy), "evaluating more often changes what is learned"
        assert self.plain.digest == digest(other), "evaluating more often changes the state"

    def answers_without_trace(self) -> None:
        """An observer that asks it for scores and labels, whenever it can, changes nothing."""

        def go(*observers: object) -> tuple[Result, Strategy]:
            with isolated(0, "strategy"):
                try:
                    strategy = self.make(normed_model())
                except (TypeError, ValueError):  # a strategy for other networks
                    strategy = self.make(example_model())
            return run(strategy, self.stream(), *observers), strategy

        (plain, strategy), (asked, other) = go(), go(asking := Asking())
        assert torch.equal(plain.accuracy, asked.accuracy), "an observer that asks changes what is learned"
        assert digest(strategy) == digest(other), "an observer that asks changes the state"
        again = Asking()
        again.strategy, again.task = other, asking.task
        state, before = digest(other), chance()
        again.ask(events.RunEnded(None))
        for answer, then in zip(again.answers, asking.answers, strict=True):
            assert torch.equal(answer, then), "after the run it answers otherwise than when the run ended"
        assert digest(other) == state, "an answer after the run changes the state"
        assert chance() == before, "an answer moves the caller's random generators"

    def leaves_the_data_alone(self) -> None:
        """It doesn't change the stream's data."""
        stream = self.plain.stream
        now = Stream(stream.name, stream.tasks, stream.schedule, stream.epochs, stream.batch_size).fingerprint
        assert now == self.plain.data_before, "it changes the stream's data"

    def keeps_no_samples(self) -> None:
        """If it says that it is rehearsal-free, it holds no inputs of a session that is over."""
        search = InputSearch()
        if self.build().rehearsal_free:
            self.play(self.stream((0, 1, 0, 2), epochs=2), search)
        assert search.path is None, f"it says that it is rehearsal-free, but {search.path} holds inputs of a past session"

    def takes_any_batch(self) -> None:
        """Batches of one sample, a last batch that is not full, and all samples in one batch are learned."""
        for batch_size in (1, 59, 1000):  # one sample, a last batch of one sample, everything at once
            self.play(self.stream((0, 1), batch_size=batch_size), trace := Trace())
            assert trace.word.count("l") == 2 * -(-60 // batch_size), "not every batch was learned"

    def refuses_other_targets(self) -> None:
        """It refuses targets of the kinds that it doesn't learn, before the run starts."""
        for target in set(TARGETS) - set(self.build().learns_targets):
            trace = Trace()
            try:
                self.play(example_stream(target=target), trace)
            except ValueError as refusal:
                assert not trace.word, f"it refused {target} targets, but only after the run had started"
                assert target in str(refusal), f"it refused {target} targets for another reason: {refusal}"
            else:
                raise AssertionError(f"it doesn't say that it learns {target} targets, and was not refused")

    def learns_tasks_with_their_heads(self) -> None:
        """On a task-incremental stream, where the task is given, it does well."""
        result, _ = self.play(example_stream(epochs=10, scenario="task"))
        assert result.average_accuracy > 0.6, f"with the task given, the average accuracy is {result.average_accuracy:.2f}"

    def grows(self) -> None:
        """It learns with a head that grows with the classes."""
        strategy = self.build(head="growing")
        result = run(strategy, example_stream(epochs=10))
        assert float(result.accuracy.diagonal().min()) > 0.5, f"with a growing head the accuracies are {result.accuracy}"

    def runs_on_every_device(self) -> None:
        """It learns on a GPU, where there is one."""
        for device in ["cuda"] * torch.cuda.is_available():
            strategy = self.build()
            result = run(strategy, example_stream(epochs=10), device=device)
            assert float(result.accuracy.diagonal().min()) > 0.5, f"on {device} the accuracies are {result.accuracy}"


def check_strategy(make: Make) -> Iterator[Check]:
    """Yield the checks of a strategy, but for those that its class is exempt from: all with labels, some with other targets too.

    Args:
        make: builds a fresh strategy from a model: the class itself, or a function.

    Raises ValueError if its class is exempt from what is no check.

    """
    names = [name for name in vars(StrategyChecks) if name[0] != "_" and name not in ("stream", "build", "play", "plain")]
    strategy = StrategyChecks(make).build()
    if unknown := set(strategy.exempt) - set(names):
        raise ValueError(f"it is exempt from {sorted(unknown)}, which are no checks")
    for target in strategy.learns_targets:
        checks = StrategyChecks(make, target)
        for name in names if target == "label" else OF_EACH_TARGET:
            if name not in strategy.exempt:
                yield Check(name if target == "label" else f"{name}_{target}", getattr(checks, name))


def check_alike(first: Make, second: Make) -> Iterator[Check]:
    """Yield the checks of two strategies that are to be the same, bit for bit: with a penalty of strength 0 and without it, say.

    Each check is a run of both, on class- and task-incremental streams, with an augmentation that draws: losses, results, weights,
    buffers and the modes of modules must be equal.

    Args:
        first, second: functions that build a fresh strategy from a model.

    """

    def alike(model: Callable[[], nn.Module], scenario: str) -> None:
        def jitter(x: Tensor) -> Tensor:
            shift = int(torch.randint(3, ())) + random.randrange(3) + int(np.random.randint(3))
            return x.roll(shift, -1)

        ends = []
        for make in (first, second):
            stream = replace(example_stream((0, 1, 0, 2), epochs=2, scenario=scenario), augment=jitter)
            with isolated(0, "strategy"):
                strategy = make(model())
            losses = Losses()
            ends.append((run(strategy, stream, losses, seed=4), strategy.model, torch.stack(losses.all)))
        (result, first_model, first_losses), (expected, second_model, second_losses) = ends
        assert torch.equal(first_losses, second_losses), (
            f"the losses differ, first in step {int((first_losses != second_losses).nonzero()[0])}"
        )
        modes = [[(name, part.training) for name, part in whole.named_modules()] for whole in (first_model, second_model)]
        assert modes[0] == modes[1], "modules are in other modes"
        for name, value in second_model.state_dict().items():
            assert torch.equal(first_model.state_dict()[name], value), f"{name} differs"
        assert torch.equal(result.accuracy, expected.accuracy), "without the task given, the accuracies differ"
        assert torch.equal(result.task_accuracy, expected.task_accuracy), "with the task given, the accuracies differ"

    models: dict[str, Callable[[], nn.Module]]
    models = {"": example_model, "_growing": partial(example_model, head="growing"), "_normed": normed_model}
    for scenario in ("class", "task"):
        for name, model in models.items():
            yield Check(f"alike_{scenario}{name}", partial(alike, model, scenario))
