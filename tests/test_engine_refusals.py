"""What a run refuses: before anything is learned what doesn't fit, and then losses and answers that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clstream.strategies import Finetune, Refresh, Replay
from clstream.streams import blobs
from torch import Tensor, nn
from torch.optim import SGD

import clstream
from clstream import (
    BatchReady,
    Evaluated,
    Samples,
    SessionStarted,
    Strategy,
    Stream,
    Task,
    TaskEnded,
    on,
    run,
)
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Trace
from clstream.models import Mlp
from clstream.stream import HiddenTaskError


def refused(error: type[Exception], match: str, strategy: object, stream: object, **options: object) -> None:
    trace = Trace()
    with pytest.raises(error, match=match):
        run(strategy, stream, trace, **options)
    assert "b" not in trace.word


def test_refuses_what_does_not_fit() -> None:
    stream = example_stream()
    good = Finetune(example_model())
    refused(
        ValueError,
        r"Mlp answers one sample with \(1, 4\).* 6 classes: build it with classes=6",
        Finetune(Mlp((1, 8, 8), 4)),
        stream,
    )
    refused(ValueError, r"Mlp can't take the inputs of example, \(1, 8, 8\)", Refresh(Finetune(Mlp(20, 6))), stream)
    refused(ValueError, r"Mlp can't take the inputs of example, \(1, 8, 8\)", Finetune(Mlp(20, 6)), stream)
    refused(ValueError, "there is no device 'warp'", good, stream, device="warp")
    refused(ValueError, "there is no device 'cuda:99'", good, stream, device="cuda:99")
    refused(ValueError, "evaluate_every must be", good, stream, evaluate_every=0)
    refused(ValueError, "max_sessions must be", good, stream, max_sessions=-1)
    refused(TypeError, "not the class Finetune", Finetune, stream)
    refused(TypeError, "takes a Stream", good, stream.tasks)
    with pytest.raises(TypeError, match="Trace is a class"):
        run(good, stream, Trace)
    with pytest.raises(TypeError, match="would hear nothing"):
        run(good, stream, object())
    with pytest.raises(TypeError, match=r"^3 is no observer, and would hear nothing: options are given by name, as seed=0"):
        run(good, stream, 3)


class NeedsTasks(Strategy):
    @on(TaskEnded)
    def end(self, event: TaskEnded) -> None:
        pass


class ReadsTask(Strategy):
    needs_task = True

    def learn(self, batch: clstream.Batch) -> Tensor:
        assert batch.task
        return super().learn(batch)


class ReadsTaskOfEvent(Strategy):
    needs_task = True

    @on(BatchReady)
    def look(self, event: BatchReady) -> None:
        self.now = event.batch.task


class Wrapper(Strategy):
    def __init__(self, base: Strategy) -> None:
        super().__init__(base.model)
        self.parts = (base,)


@pytest.mark.parametrize("kind", [NeedsTasks, ReadsTask, ReadsTaskOfEvent])
def test_needs_are_read_from_the_code_and_refused_where_hidden(kind: type[Strategy]) -> None:
    hidden = example_stream(boundaries=False)
    refused(ValueError, f"{kind.__name__} needs .* which example hides", kind(example_model()), hidden)
    refused(ValueError, "Wrapper needs .* which example hides", Wrapper(Wrapper(kind(example_model()))), hidden)
    run(kind(example_model()), example_stream())


def test_wrong_answers_of_a_strategys_own_are_refused_before_training() -> None:
    class Narrow(Strategy):
        def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
            return torch.zeros(len(x), 6)

        def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
            return self.scores(x)

    refused(ValueError, r"Narrow.predict answers 1 samples with \(1, 6\)", Narrow(example_model()), example_stream())


class Explodes(Strategy):
    """Its loss is NaN from batch `at` on."""

    def __init__(self, model: nn.Module, at: int) -> None:
        super().__init__(model)
        self.at, self.count = at, 0

    def loss(self, samples: Samples) -> Tensor:
        self.count += 1
        return super().loss(samples) * (float("nan") if self.count > self.at else 1.0)


@pytest.mark.parametrize("at", [0, 1, 7, 8, 63, 64, 100, 239])
def test_non_finite_loss_names_its_batch(at: int) -> None:
    stream = example_stream(epochs=80, batch_size=20)  # 3 batches an epoch, 240 a session
    trace = Trace()
    session, batch = 0, at
    with pytest.raises(
        FloatingPointError, match=f"nan in task {session}, session {session}, epoch {batch // 3}, batch {batch % 3}:"
    ):
        run(Explodes(example_model(), at), stream, trace)
    assert trace.word.endswith("r")


def test_loss_that_keeps_its_graph_is_refused() -> None:
    class Leaks(Strategy):
        def learn(self, batch: clstream.Batch) -> Tensor:
            return self.loss(batch.samples)

    with pytest.raises(TypeError, match=r"Leaks.learn must return its loss as a detached scalar"):
        run(Leaks(example_model()), example_stream())


def test_bad_constructor_arguments() -> None:
    with pytest.raises(TypeError, match="takes a torch module"):
        Finetune("Mlp")
    model = example_model()
    with pytest.raises(TypeError, match="not a SGD object"):
        Finetune(model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="replay_batch must be"):
        Replay(model, replay_batch=0)


def test_a_stream_with_bad_samples_is_refused_when_built() -> None:
    def task(x: Tensor, y: Tensor) -> Task:
        return Task(0, (0, 1), Samples(x, y), Samples(torch.zeros(2, 3), torch.tensor([0, 1])))

    with pytest.raises(ValueError, match=r"labels \[5\]"):
        Stream("mine", [task(torch.zeros(2, 3), torch.tensor([0, 5]))])
    with pytest.raises(ValueError, match="input 1 of the data is NaN or infinite"):
        Stream("mine", [task(torch.tensor([[0.0, 0, 0], [0, float("inf"), 0]]), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match="batch_size"):
        blobs(batch_size=0)


def test_an_object_passed_twice_is_refused() -> None:
    trace = Trace()
    with pytest.raises(ValueError, match="Trace would hear every event twice"):
        run(Finetune(example_model()), example_stream(), trace, trace)
    strategy = Finetune(example_model())
    with pytest.raises(ValueError, match="Finetune would hear every event twice"):
        run(strategy, example_stream(), strategy)


def test_scores_with_nan_are_refused() -> None:
    class NanInEvaluation(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if self.training else float("nan"))

    refused(
        FloatingPointError, "answers test samples of example with NaN", Finetune(NanInEvaluation((1, 8, 8), 6)), example_stream()
    )


def test_a_loss_that_is_not_finite_is_found_before_the_next_evaluation() -> None:
    seen: list[int] = []

    class Watch:
        @on(Evaluated)
        def see(self, event: Evaluated) -> None:
            seen.append(event.evaluation.probe_steps[-1])

    with pytest.raises(FloatingPointError, match="batch 2:"):
        run(Explodes(example_model(), 2), example_stream(batch_size=10), Watch(), evaluate_every=1)
    assert seen == [1, 2]


def test_numpy_seeds_are_seeds() -> None:
    plain, numpy_seeded = (run(Replay(example_model()), example_stream(), seed=seed) for seed in (3, np.int64(3)))
    assert torch.equal(plain.accuracy, numpy_seeded.accuracy)
    refused(ValueError, "seed must be a whole number of at least 0, not 1.5", Finetune(example_model()), example_stream(), seed=1.5)


def test_who_reads_a_hidden_task_without_saying_so_is_stopped_where_it_reads() -> None:
    class OfBatch(Strategy):
        def learn(self, b: clstream.Batch) -> Tensor:
            return self.step(b)

        def step(self, b: clstream.Batch) -> Tensor:
            assert b.task
            return super().learn(b)

    class OfSession(Strategy):
        @on(SessionStarted)
        def start(self, event: SessionStarted) -> None:
            self.now = event.session.task

    class ForBoth(Strategy):
        def learn(self, batch: clstream.Batch) -> Tensor:
            self.now = None if batch.task_hidden else batch.task
            return super().learn(batch)

    for kind, what in ((OfBatch, "batch"), (OfSession, "session")):
        run(kind(example_model()), example_stream())
        with pytest.raises(HiddenTaskError, match=f"hides its boundaries, so a {what} has no task: .* needs_task = True"):
            run(kind(example_model()), example_stream(boundaries=False))
        (check,) = (check for check in check_strategy(kind) if check.name == "needs_what_it_says")
        with pytest.raises(AssertionError, match=r"it reads the task of a (batch|session): say needs_task = True on its class"):
            check()
    run(ForBoth(example_model()), example_stream(boundaries=False))


def test_forgotten_constructor_calls_are_said() -> None:
    class Forgot(Strategy):
        def __init__(self, model: nn.Module) -> None:
            self.net = model

    class NoOptimizer(Strategy):
        def __init__(self, model: nn.Module) -> None:
            self.model = model

    refused(TypeError, r"Forgot has no optimizer: call super\(\).__init__", Forgot(example_model()), example_stream())
    refused(TypeError, "NoOptimizer has no optimizer", NoOptimizer(example_model()), example_stream())


def test_raw_bytes_are_not_joined_to_floats() -> None:
    samples = example_stream().tasks[0].train
    with pytest.raises(TypeError, match=r"torch.uint8 can't be joined to inputs of torch.float32"):
        samples + Samples(samples.x.float(), samples.y)
