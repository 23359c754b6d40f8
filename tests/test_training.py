"""Training controls: schedules, clipping, accumulation, early stopping, class weights, new optimizers, for any strategy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.strategies import AGEM, EWC, NCM, DERpp, Finetune, ICaRL, LwF, Replay, WithDetectedBoundaries
from clstream.streams import drifting
from clstream.streams.schedules import Transitions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import Batch, BatchLearned, BatchReady, Result, Samples, SessionEnded, Strategy, Stream, load, on, run, run_seeds
from clstream.bus import Event
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.engine import OtherRunError
from clstream.engine.simulation import Simulation
from clstream.seeds import isolated
from clstream.strategy.strategy import CONTROLS
from clstream.training import BestWeightsRestored, EpochMeasured, SessionStoppedEarly, Training, rate_factor
from clstream.training.class_weights import balanced

ALL = Training(
    "cosine", "run", 3, clip=0.5, accumulate=2, patience=2, held_out=0.2, class_weights="balanced", renew_optimizer="task"
)


def built(make: Callable[[nn.Module], Strategy], head: str = "fixed") -> Strategy:
    with isolated(0, "strategy"):
        return make(example_model(head=head))


class Steps:
    """Hears the learning rate and the norm of the gradients of each step, and all events of a kind."""

    def __init__(self) -> None:
        self.strategy: Any = None
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.weights: list[Tensor] = []
        self.events: list[Any] = []

    @on(BatchReady)
    def ready(self, event: BatchReady) -> None:
        self.rates.append(self.strategy.optimizer.param_groups[0]["lr"])

    @on(BatchLearned)
    def learned(self, event: BatchLearned) -> None:
        grads = [weight.grad for weight in self.strategy.model.parameters()]
        self.norms.append(float(torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()))
        self.weights.append(next(self.strategy.model.parameters()).detach().clone())

    @on(Event)
    def hear(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


def played(
    train: Training | None, make: Callable[[nn.Module], Strategy] = Finetune, stream: Stream | None = None, **options: Any
) -> tuple[Result, Strategy, Steps]:
    strategy, steps = built(make), Steps()
    steps.strategy = strategy
    return run(strategy, stream or example_stream(epochs=3), steps, train=train, **options), strategy, steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_each_session_has_a_schedule_of_its_own_or_the_run_has_one(kind: str) -> None:
    each, whole = (played(Training(kind, over, 5))[2].rates for over in ("session", "run"))
    steps = len(each) // 3
    assert each == pytest.approx(3 * [0.1 * rate_factor(kind, step, steps, 5) for step in range(steps)])
    assert whole == pytest.approx([0.1 * rate_factor(kind, step, 3 * steps, 5) for step in range(3 * steps)])


def test_the_factors_are_those_of_torch_s_own_schedules() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(20):
        assert rate_factor("cosine", step, 20, 0) == pytest.approx(torchs.get_last_lr()[0])
        optimizer.step()
        torchs.step()
    assert [rate_factor("linear", step, 6, 2) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_an_optimizer_has_its_own_learning_rate_when_the_session_ends() -> None:
    class Ended(Finetune):
        @on(SessionEnded)
        def note(self, event: SessionEnded) -> None:
            assert self.optimizer.param_groups[0]["lr"] == 0.1

    assert played(Training("cosine"), Ended)[1].optimizer.param_groups[0]["lr"] == 0.1


def test_gradients_of_a_greater_norm_are_scaled_down_and_others_are_not() -> None:
    free, clipped = (played(Training(clip=clip), stream=example_stream())[2].norms for clip in (1e9, 0.3))
    assert max(free) > 0.4 and max(clipped) == pytest.approx(0.3)
    assert clipped[0] == pytest.approx(min(free[0], 0.3))
    assert torch.equal(played(Training(clip=1e9))[0].accuracy, played(None)[0].accuracy)


def test_the_mean_gradient_of_several_batches_makes_one_step() -> None:
    """Batches of 4, four at a time, are batches of 16, with as many steps as these: the last ones of an epoch are fewer."""
    stream = replace(example_stream(), shuffle=False)
    whole = played(None, stream=replace(stream, batch_size=16))[2].weights
    parts = played(Training(accumulate=4), stream=replace(stream, batch_size=4))[2].weights
    assert len(parts) == 3 * 15 and len(whole) == 3 * 4  # of 60 samples
    for session in range(3):
        for step in range(3):
            torch.testing.assert_close(parts[15 * session + 4 * step + 3], whole[4 * session + step])
        assert torch.equal(parts[15 * session + 3], parts[15 * session + 4])  # no step but after the fourth
        assert not torch.equal(parts[15 * session + 13], parts[15 * session + 14])  # the last three
        torch.testing.assert_close(parts[15 * session + 14], whole[4 * session + 3])  # 12 samples


def test_classes_of_a_session_weigh_alike() -> None:
    weights = balanced(torch.tensor([0, 0, 0, 4]), 6)
    assert weights.tolist() == pytest.approx([4 / 6, 1, 1, 1, 2, 1])
    strategy = built(Finetune)
    strategy.train_class_weights = weights
    samples = Samples(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 4, 5]))
    expected = F.cross_entropy(strategy.model(samples.x), samples.y, weights)
    torch.testing.assert_close(strategy.loss(samples), expected)
    torch.testing.assert_close(strategy.loss_of_outputs(strategy.model(samples.x), samples), expected)


@pytest.mark.parametrize(("make", "loss"), [(Replay, "loss"), (DERpp, "loss"), (EWC, "loss")])
def test_class_weights_reach_the_loss(make: Callable[[nn.Module], Strategy], loss: str) -> None:
    stream = example_stream()
    task = stream.tasks[0]
    rare = (task.train.y == 0).nonzero().flatten()[4:]
    kept = torch.ones(len(task.train), dtype=torch.bool).index_fill_(0, rare, False)
    stream = replace(stream, tasks=[replace(task, train=task.train[:][kept]), *stream.tasks[1:]])
    plain, weighed = (played(train, make, stream)[1].model.state_dict() for train in (None, Training(class_weights="balanced")))
    assert any(not torch.equal(plain[name], weighed[name]) for name in plain)


class OwnLoss(Strategy):
    """A loss of the user's own that knows nothing of class weights."""

    def loss(self, samples: Samples) -> Tensor:
        return F.cross_entropy(self.logits(samples), samples.y)


class LaterOwnLoss(Strategy):
    """The same, from the second session on."""

    def loss(self, samples: Samples) -> Tensor:
        late = int(samples.y.max()) > 1
        return F.cross_entropy(self.logits(samples), samples.y) if late else super().loss(samples)


@pytest.mark.parametrize("make", [OwnLoss, LwF, ICaRL])
def test_a_loss_that_leaves_class_weights_out_is_refused_before_anything_is_learned(make: Callable[[nn.Module], Strategy]) -> None:
    steps = Steps()
    with pytest.raises(ValueError, match=f"the loss of {make.__name__} leaves class weights out"):  # type: ignore[attr-defined]
        run(built(make), example_stream(), steps, train=Training(class_weights="balanced"))
    assert not steps.events


def test_one_that_does_so_later_ends_the_run_in_that_session() -> None:
    with pytest.raises(TypeError, match="the loss of LaterOwnLoss leaves class weights out"):
        played(Training(class_weights="balanced"), LaterOwnLoss)


@pytest.mark.parametrize("each", ["session", "task"])
def test_optimizers_forget_when_a_session_or_task_begins(each: str) -> None:
    momentum = partial(Finetune, optimizer=partial(SGD, lr=0.05, momentum=0.9))
    stream = example_stream((0, 0, 1))

    class Renewed(Finetune):
        """By hand."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, partial(SGD, lr=0.05, momentum=0.9))
            self.before = -1

        @on(BatchReady)
        def renew(self, event: BatchReady) -> None:
            if event.batch.index == 0 and (each == "session" or event.batch.task.id != self.before):
                self.optimizer = SGD(self.model.parameters(), lr=0.05, momentum=0.9)
            self.before = event.batch.task.id

    renewed, expected, plain = (
        played(train, make, stream)[1].model.state_dict()
        for train, make in ((Training(renew_optimizer=each), momentum), (None, Renewed), (None, momentum))
    )
    assert all(torch.equal(renewed[name], expected[name]) for name in renewed)
    assert any(not torch.equal(renewed[name], plain[name]) for name in renewed)


# early stopping


def test_a_session_stops_with_the_best_weights_and_says_so() -> None:
    train = Training(patience=2, held_out=0.25)
    result, strategy, steps = played(train, Replay, example_stream(epochs=12))
    stopped, measured = steps.of(SessionStoppedEarly), steps.of(EpochMeasured)
    assert stopped and float(result.cost.epochs_saved.sum()) == sum(event.epochs_saved for event in stopped) > 0
    for event in stopped:
        values = [epoch.value for epoch in measured if epoch.session == event.session]
        assert event.epochs == len(values) == 12 - event.epochs_saved and max(values) == event.value
        assert event.best_epoch == max(range(len(values)), key=lambda epoch: (values[epoch], epoch))
        assert max(values[-2:]) <= max(values[:-2])
    assert result.cost.total["epochs_saved"] == sum(event.epochs_saved for event in stopped)
    assert isinstance(strategy, Replay) and not any(hasattr(part, "patience") for part in strategy.parts)
    assert len(strategy.memory) < 180  # what is held out is in no memory


def test_the_best_weights_are_back_though_the_session_ran_to_its_end() -> None:
    class Spoiled(Finetune):
        """Has weights of zeros from the second epoch on."""

        @on(BatchLearned)
        def spoil(self, event: BatchLearned) -> None:
            if event.batch.epoch:
                for weight in self.model.parameters():
                    weight.data.zero_()

    _, strategy, steps = played(Training(patience=2, held_out=0.25), Spoiled, example_stream(epochs=2), max_sessions=1)
    (restored,) = steps.of(BestWeightsRestored)
    assert restored.best_epoch == 0 and not steps.of(SessionStoppedEarly)
    assert bool(torch.cat([weight.flatten() for weight in strategy.model.parameters()]).any())


@pytest.mark.parametrize(
    "make",
    [
        lambda: example_stream((0, 1, 0)),
        lambda: example_stream(scenario="task"),
        lambda: example_stream(boundaries=False),
        lambda: drifting(example_stream(), Transitions(0.5), session_size=60),
        lambda: example_stream(target="multilabel"),
        lambda: example_stream(target="value"),
    ],
)
def test_what_is_held_out_is_a_share_of_each_class_and_is_never_delivered(make: Callable[[], Stream]) -> None:
    stream = make().reseeded(3)
    held = stream.holding_out(0.2)
    assert held.fingerprint == stream.fingerprint and len(held) == len(stream)
    for index in range(len(stream)):
        whole, rest, back = stream.session(index).samples, held.session(index).samples, held.held_back(index)
        assert len(rest) + len(back) == len(whole) and held.size_of(index) == len(rest) == int(held.mix(index).sum())
        rows = {tuple(row) for row in back.x.flatten(1).tolist()}
        assert len(back) and not rows & {tuple(row) for row in rest.x.flatten(1).tolist()}
        assert torch.equal(held.held_back(index).x, back.x)
        if not getattr(stream.schedule, "once", True):  # it draws with replacement: of a sample that comes twice both are held
            assert 0 < len(back) < len(whole) / 3
        elif stream.target == "label":
            counts = whole.y.bincount()
            assert torch.equal(back.y.bincount(minlength=len(counts)), (counts * 0.2).round().long())
        else:
            assert len(back) == round(0.2 * len(whole))


@pytest.mark.parametrize(
    "stream",
    [
        example_stream(epochs=2, scenario="task"),
        example_stream(epochs=2, boundaries=False),
        example_stream(epochs=2, target="multilabel"),
        example_stream(epochs=2, target="value"),
    ],
    ids=lambda stream: f"{stream.scenario}-{stream.target}-{stream.boundaries}",
)
def test_every_kind_of_stream_is_measured_on_what_it_holds_out(stream: Stream) -> None:
    steps = played(Training(patience=1, held_out=0.25), Finetune, stream)[2]
    values = [event.value for event in steps.of(EpochMeasured)]
    assert len(values) >= 6 and all(math.isfinite(value) and value <= 1 for value in values)


# resumption


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("Finetune", "growing"), ("Replay", "fixed")])
def test_a_run_under_all_controls_resumes_bit_for_bit(name: str, head: str) -> None:
    make: Any = {
        "Finetune": partial(Finetune, optimizer=partial(Adam, lr=0.01)),
        "Replay": partial(Replay, optimizer=partial(SGD, lr=0.05, momentum=0.9), capacity=40),
    }[name]
    stream = example_stream((0, 1, 0), epochs=5, batch_size=8)

    def go_on(observer: Checkpoints, state: Any = None) -> Result:
        return run(built(make, head), stream, observer, train=ALL, resume=state)

    whole = Checkpoints()
    expected = go_on(whole)
    end = whole.load(-1)
    assert float(expected.cost.epochs_saved.sum()) > 0
    for number in range(0, len(whole.written) - 1, 7):
        rest = Checkpoints(every=0)
        result = go_on(rest, whole.load(number))
        where = whole.load(number)["position"]
        assert difference(end, rest.load(-1)) is None, where
        assert torch.equal(expected.accuracy, result.accuracy) and torch.equal(expected.cost.epochs_saved, result.cost.epochs_saved)
    with pytest.raises(OtherRunError, match=r"train\.clip was 0.5, now it is None"):
        run(built(make, head), stream, train=Training("cosine"), resume=whole.load(3))


# who takes what


class OwnLearn(Strategy):
    """Steps of the user's own."""

    def learn(self, batch: Batch) -> Tensor:
        loss = self.objective(batch.samples)
        self.minimise(loss)
        return loss.detach()


class Says(OwnLearn):
    """The same, and says what it takes."""

    takes_controls = CONTROLS


class SaysNot(Strategy):
    """Takes clipping alone."""

    takes_controls = ("clip",)


ONE = {
    "schedule": Training("cosine"), "clip": Training(clip=1.0), "accumulate": Training(accumulate=2),
    "patience": Training(patience=1, held_out=0.2), "class_weights": Training(class_weights="balanced"),
    "renew_optimizer": Training(renew_optimizer="session"),
}  # fmt: skip


@pytest.mark.parametrize("control", CONTROLS)
def test_a_learn_of_its_own_takes_what_it_says_and_nothing_else(control: str) -> None:
    assert ONE[control].controls == (control,)
    with pytest.raises(ValueError, match=f"OwnLearn has a `learn` of its own, and doesn't say that {control} goes with it"):
        played(ONE[control], OwnLearn)
    with pytest.raises(ValueError, match=f"NCM has a `learn` of its own|FrozenFeatures.*{control}"):
        played(ONE[control], NCM)
    if control != "clip":
        with pytest.raises(ValueError, match=f"SaysNot doesn't take {control}: of the training controls it takes clip"):
            played(ONE[control], SaysNot)
    said, plain = played(ONE[control], Says), played(ONE[control], Finetune)
    assert torch.equal(said[0].accuracy, plain[0].accuracy)
    assert torch.equal(torch.stack(said[2].weights), torch.stack(plain[2].weights))


def test_answers_of_its_own_are_asked_within_a_session_only_if_it_says_so() -> None:
    with pytest.raises(ValueError, match="ICaRL has a `scores` of its own, and doesn't say that patience goes with it"):
        played(Training(patience=1), ICaRL)


def test_a_wrapper_takes_what_both_take() -> None:
    with pytest.raises(ValueError, match="AGEM doesn't take clip"):
        played(Training(clip=1.0), lambda model: WithDetectedBoundaries(AGEM(model)))


WRONG: list[tuple[dict[str, Any], Callable[[], Stream], str]] = [
    ({"patience": 2}, lambda: example_stream(epochs=1), "patience is of epochs, and example has one"),
    ({"patience": 2, "held_out": 0.01}, lambda: example_stream(epochs=3), "session 0 of example has too few samples of each class"),
    ({"warmup": 24}, lambda: example_stream(epochs=3), "warmup must be less than the batches that there are, 24 in session 0"),
    ({"schedule": "cosine", "schedule_over": "run", "warmup": 99}, lambda: example_stream(epochs=3), "72 in the run, not 99"),
    ({"class_weights": "balanced"}, lambda: example_stream(target="value"), "class_weights are of labels, and example has value"),
    ({"renew_optimizer": "task"}, lambda: example_stream(boundaries=False), "renew_optimizer='task' can't be"),
]


@pytest.mark.parametrize(("options", "stream", "says"), WRONG)
def test_what_does_not_fit_a_stream_is_refused_in_a_sentence(
    options: dict[str, Any], stream: Callable[[], Stream], says: str
) -> None:
    steps = Steps()
    with pytest.raises(ValueError, match=says):
        run(built(Finetune), stream(), steps, train=Training(**options))
    assert not steps.events


def test_options_are_checked_when_they_are_given() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "cosin"}, "did you mean cosine"), ({"schedule_over": "run"}, "schedule_over='run' is of a schedule"),
        ({"held_out": 0.5}, "held_out is of early stopping"), ({"held_out": 0.0, "patience": 1}, "held_out"),
        ({"accumulate": 0}, "accumulate"), ({"clip": 0.0}, "clip"), ({"patience": 0}, "patience"), ({"warmup": 1.5}, "warmup"),
        ({"class_weights": "even"}, "class_weights"), ({"renew_optimizer": "epoch"}, "renew_optimizer"),
    ]  # fmt: skip
    for options, says in wrong:
        with pytest.raises(ValueError, match=says):
            Training(**options)
    with pytest.raises(TypeError, match="train takes training controls, as"):
        run(built(Finetune), example_stream(), train={"clip": 1.0})  # type: ignore[arg-type]


def test_a_strategy_holds_nothing_of_it_when_the_run_is_over_and_none_is_saved(tmp_path: Path) -> None:
    class Save:
        @on(SessionEnded)
        def save(self, event: SessionEnded) -> None:
            strategy.save(tmp_path)

    strategy = built(Replay)
    run(strategy, example_stream(), max_sessions=1)
    before = {**vars(strategy)}
    with pytest.warns(UserWarning, match="was run before"):
        run(strategy, example_stream(epochs=3), Save(), train=ALL)
    assert vars(strategy).keys() == before.keys() and strategy.parts == ()
    saved = load(tmp_path)
    assert saved.train_updates is None and saved.train_class_weights is None
    x = example_stream().tasks[0].test.x
    assert torch.equal(saved.scores(x), strategy.scores(x))
    Simulation(strategy, example_stream(), (), 0, "cpu", None, None, train=ALL)  # refused since, say, and not left
    with pytest.warns(UserWarning, match="was run before"):
        result = run(strategy, example_stream(), max_sessions=1)
    assert vars(strategy).keys() == before.keys() and not result.cost.saves and "train.clip" not in result.params


# together, and compiled


@pytest.mark.parametrize("stacked", [False, True])
def test_seeds_together_are_each_as_alone(stacked: bool) -> None:
    stream, kept = example_stream(epochs=3), dict[int, Strategy]()
    train = Training(patience=1, class_weights="balanced", renew_optimizer="session") if stacked else ALL

    def make(seed: int) -> Strategy:
        kept[seed] = Replay(example_model(), capacity=40)
        return kept[seed]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        together = run_seeds(make, stream, [0, 1], train=train)
    assert ("each seed clips or accumulates" in " ".join(str(warning.message) for warning in told)) is not stacked
    for seed, result in zip((0, 1), together, strict=True):
        ended = kept[seed].model.state_dict()
        with isolated(seed, "model"):
            alone = run(make(seed), stream, seed=seed, train=train)
        assert torch.equal(alone.cost.epochs_saved, result.cost.epochs_saved)
        for name, weight in kept[seed].model.state_dict().items():
            torch.testing.assert_close(ended[name], weight, rtol=1e-4, atol=1e-5)
