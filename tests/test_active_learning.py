"""Active learning: labels that weren't bought are hidden, queries buy what they say, and a resumed run buys the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clstream.strategies import Active, Finetune, Joint, OpenVAE, Refresh, Replay
from clstream.strategies.active import QUERIES
from clstream.streams import label_pool
from clstream.streams.data import source
from clstream.streams.label_pool import corrupted_rows
from conftest import make
from test_hidden import Greedy, leaks
from torch import Tensor, nn

from clstream import Result, Stream, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import check_alike
from clstream.checks.recorders import Checkpoints, Trace
from clstream.engine import LabelsQueried, LabelsRevealed
from clstream.models import Mlp
from clstream.recording import record
from clstream.seeds import isolated
from clstream.strategy.core_sets import k_center
from clstream.stream import PoolSchedule, Samples
from clstream.training import EpochMeasured, Training


def pool(**options: object) -> Stream:
    given = {"size": 120, "start": 20, "budget": 10, "rounds": 3, "epochs": 3, **options}
    return label_pool(**given)  # type: ignore[arg-type]


def model(stream: Stream) -> nn.Module:
    with isolated(0, "model"):
        return Mlp(stream.input_shape, stream.classes, hidden=(32,))


class Bought:
    """Keeps what was asked for and what was revealed."""

    def __init__(self) -> None:
        self.asked: list[LabelsQueried] = []
        self.revealed: list[LabelsRevealed] = []

    @on(LabelsQueried)
    def ask(self, event: LabelsQueried) -> None:
        assert len(self.asked) == len(self.revealed)
        self.asked.append(event)

    @on(LabelsRevealed)
    def reveal(self, event: LabelsRevealed) -> None:
        self.revealed.append(event)


class Curious(Greedy):
    """Keeps all that it is given, also what it is asked to choose from, and buys the last ones."""

    def query(self, x: Tensor, budget: int) -> Tensor:
        self.asked.append(x)
        return torch.arange(len(x) - budget, len(x))


def test_no_label_that_was_not_bought_can_be_reached() -> None:
    stream = pool()
    strategy = Curious(model(stream))
    run(strategy, stream, bought := Bought())
    assert leaks(strategy, stream) == []
    kinds = {type(thing) for thing in strategy.given}
    assert {LabelsQueried, LabelsRevealed} <= kinds
    labels = [thing.samples.y for thing in strategy.given if isinstance(thing, LabelsRevealed)]
    assert sum(map(len, labels)) == 30 and [event.labelled for event in bought.revealed] == [30, 40, 50]


def test_what_is_bought_is_what_the_session_has() -> None:
    stream = pool()
    run(strategy := Curious(model(stream)), stream, bought := Bought(), trace := Trace())
    assert [(event.session, event.budget, event.unlabelled) for event in bought.asked] == [(1, 10, 100), (2, 10, 90), (3, 10, 80)]
    assert bought.revealed[0].curves() == {"labels/bought": 30}
    schedule, train = stream.schedule, stream.tasks[0].train
    assert isinstance(schedule, PoolSchedule) and not schedule.bought  # the stream is data: a run leaves it as it is
    free = torch.ones(120, dtype=torch.bool)
    free[schedule.draw(0)] = False
    for event in bought.revealed:
        assert event.rows.tolist() == free.nonzero().flatten()[-10:].tolist()
        free[event.rows] = False
        assert torch.equal(event.samples.x, train[event.rows].x) and torch.equal(event.samples.y, train[event.rows].y)
    learned = {tuple(thing.samples.y.tolist()) for thing in strategy.given if hasattr(thing, "task_hidden")}
    assert learned and "S" in trace.word


@pytest.mark.parametrize("name", QUERIES)
def test_labels_that_are_not_bought_change_nothing(name: str) -> None:
    """All of them are exchanged for others, and the run ends with the same weights."""
    ends, rows = [], torch.zeros(0, dtype=torch.int64)
    for exchanged in (False, True):
        stream = pool()
        task, schedule = stream.tasks[0], stream.schedule
        assert isinstance(schedule, PoolSchedule)
        if exchanged:
            hidden = torch.ones(120, dtype=torch.bool)
            hidden[torch.cat([rows, schedule.draw(0)])] = False
            whole = task.train[:]
            y = torch.where(hidden, (whole.y + 1) % 10, whole.y)
            stream = replace(stream, tasks=[replace(task, train=Samples(whole.x, y))])
        with isolated(0, "strategy"):
            strategy = Active(Joint(model(stream)), name)
        run(strategy, stream, bought := Bought())
        rows = torch.cat([event.rows for event in bought.revealed])
        ends.append(torch.cat([weight.detach().flatten() for weight in strategy.model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("strategy", [Finetune, lambda net: Refresh(Active(Replay(net), "random"))])
def test_whoever_asks_nothing_gets_random_labels_and_a_wrapped_query_is_asked(strategy: object) -> None:
    stream = pool()
    run(strategy(model(stream)), stream, bought := Bought())  # type: ignore[operator]
    rows = [event.rows for event in bought.revealed]
    if strategy is Finetune:
        assert all(torch.equal(own, stream.schedule.draw(number)) for number, own in enumerate(rows, 1))  # type: ignore[union-attr]
        assert all(torch.equal(event.samples.y, stream.labels(number)) for number, event in enumerate(bought.revealed, 1))
    else:
        assert not torch.equal(rows[0], stream.schedule.draw(1))  # type: ignore[union-attr]
    assert len(torch.cat(rows).unique()) == 30


@pytest.mark.slow
def test_a_run_that_is_resumed_buys_the_same() -> None:
    stream = pool(epochs=2, batch_size=8)

    def go_on(observer: Checkpoints, state: object = None, name: str = "evt") -> list[list[int]]:
        with isolated(0, "strategy"):
            base = Joint(model(stream)) if name == "entropy" else Replay(model(stream))
        run(Active(base, name), stream, observer, bought := Bought(), evaluate_every=3, resume=state)  # type: ignore[arg-type]
        return [event.rows.tolist() for event in bought.revealed]

    for name in ("entropy", "evt"):
        whole = Checkpoints()
        expected, end = go_on(whole, name=name), whole.load(-1)
        for number in range(0, len(whole.written) - 1, 3):
            rest, state = Checkpoints(every=0), whole.load(number)
            rows = go_on(rest, state, name)
            assert rows == expected[len(expected) - len(rows) :]
            assert difference(end, rest.load(-1)) is None


def test_training_controls_on_a_pool_resume_bit_for_bit_and_leave_sessions_whole_that_are_too_small() -> None:
    train = Training(
        "cosine", warmup=1, clip=1.0, accumulate=2, patience=1, held_out=0.2, class_weights="balanced", renew_optimizer="session"
    )
    stream = pool(epochs=6, batch_size=8, start=40, budget=2, rounds=2)

    def go_on(observer: Checkpoints, state: object = None) -> Result:
        with isolated(0, "strategy"):
            strategy = Active(Replay(model(stream)), "entropy")
        return run(strategy, stream, observer, Epochs(), train=train, resume=state)  # type: ignore[arg-type]

    class Epochs:
        """Hears how many epochs there were after which a session's held-out samples were answered."""

        def __init__(self) -> None:
            sessions.clear()

        @on(EpochMeasured)
        def hear(self, event: EpochMeasured) -> None:
            sessions.append(event.session)

    sessions = list[int]()
    whole = Checkpoints(every=3)
    expected, end = go_on(whole), whole.load(-1)
    measured, saved = {*sessions}, expected.cost.epochs_saved.tolist()
    assert 0 in measured and saved[0] > 0
    small = [number for number in range(3) if number not in measured]
    assert small and all(saved[number] == 0 for number in small)  # of two labels a class none can be held back
    for number in range(1, len(whole.written) - 1, 5):
        result = go_on(rest := Checkpoints(every=0), whole.load(number))
        assert difference(end, rest.load(-1)) is None and torch.equal(result.cost.epochs_saved, expected.cost.epochs_saved)
    with pytest.raises(ValueError, match="shows while it is played, so schedule_over='run' can't be: take 'session'"):
        run(Active(Replay(model(stream))), stream, train=Training("cosine", "run"))


@pytest.mark.parametrize(
    "labels",
    [{}, None, {"1": [0] * 10}, {"1": list(range(9))}, {"2": [1]}, {"1": "rows"}, {"1": [0.5] * 10}, {"1": list(range(-5, 5))}],
)
def test_checkpoints_with_other_rows_are_refused(labels: object) -> None:
    schedule = pool().schedule
    assert isinstance(schedule, PoolSchedule)
    with pytest.raises(ValueError, match="the checkpoint is no good: it has no 10 rows of the pool bought for session"):
        schedule.restored(labels, 1)
    assert not schedule.restored({}, 0).bought


def test_wrong_answers_and_pools_that_are_too_small_are_refused(tmp_path: Path) -> None:
    class Wrong(Finetune):
        answer = torch.zeros(10, dtype=torch.int64)

        def query(self, x: Tensor, budget: int) -> Tensor:
            return self.answer

    stream = pool()
    for answer in (Wrong.answer, torch.arange(9), torch.arange(10.0), torch.arange(95, 105), torch.arange(-1, 9)):
        strategy = Wrong(model(stream))
        strategy.answer = answer
        with pytest.raises(ValueError, match=r"Wrong\.query must answer 100 samples with 10 of their rows, int64, each once"):
            run(strategy, stream)
    with pytest.raises(ValueError, match=r"the pool has 120 samples, fewer than the 20 . 3 x 40 labels bought: take a larger"):
        pool(budget=40)
    with pytest.raises(ValueError, match=r"digits has .* samples to train on, so no pool of 9,999"):
        pool(size=9999)
    with pytest.raises(ValueError, match="asks the strategy which labels it buys, so no recording can say what it delivers"):
        record(stream, tmp_path / "pool.clstream")


def test_a_share_of_the_pool_is_corrupted_and_nothing_else() -> None:
    clean, spoiled = pool(corrupted=0.0), pool(corrupted=0.25)
    rows = corrupted_rows(120, 0.25, 0)
    differs = (clean.tasks[0].train.x != spoiled.tasks[0].train.x).flatten(1).any(1)
    assert differs.nonzero().flatten().tolist() == rows.sort().values.tolist() and len(rows) == 30
    assert torch.equal(clean.tasks[0].train.y, spoiled.tasks[0].train.y)
    assert torch.equal(clean.tasks[0].test.x, spoiled.tasks[0].test.x) and torch.equal(
        spoiled.tasks[0].test.x, source("digits")[1].x
    )
    assert "30 of 120 samples of the pool have noise of severity 5 of 5" in str(spoiled)


# Queries --------------------------------------------------------------------------------------------------------------


def asked(name: str, **options: object) -> tuple[Active, Stream, Tensor]:
    """Return a strategy that has learned the first session, and what is unlabelled."""
    stream = pool(epochs=20, **options)
    strategy = Active(Replay(model(stream)), name)
    run(strategy, stream, max_sessions=1)
    return strategy, stream, stream.tasks[0].train[stream.schedule.unlabelled(1)].x  # type: ignore[union-attr]


def test_entropy_buys_what_is_least_sure() -> None:
    strategy, _, x = asked("entropy")
    shares = strategy.scores(x).softmax(1).detach()
    entropy = -(shares * shares.log()).sum(1)
    assert set(strategy.query(x, 7).tolist()) == set(entropy.topk(7).indices.tolist())


def test_core_set_buys_what_is_farthest_from_what_is_labelled() -> None:
    strategy, stream, x = asked("core_set")
    first = stream.session(0).samples[:].x
    net = strategy.model
    with torch.no_grad():
        assert strategy.query(x, 7).tolist() == k_center(net.features(x), 7, net.features(first)).tolist()  # type: ignore[operator]


def test_extreme_values_leave_corrupted_samples_out() -> None:
    strategy, stream, x = asked("evt", size=600, start=200, budget=40, rounds=1, corrupted=0.3)
    free = stream.schedule.unlabelled(1)  # type: ignore[union-attr]
    spoiled = torch.isin(free, corrupted_rows(600, 0.3, 0))
    omegas = strategy.outlier_probabilities(x)
    assert float(omegas[spoiled].median()) > float(omegas[~spoiled].median())
    rows = strategy.query(x, 40)
    assert len(rows.unique()) == 40 and bool((omegas[rows] <= 0.95).all())
    everything = strategy.query(x, len(x))
    inside = omegas[everything] <= 0.95
    assert bool((inside.int().diff() <= 0).all())  # those left out come last, the least outlying first
    assert bool((omegas[everything][~inside].diff() >= 0).all())
    strategy.omega = 0.0
    assert set(strategy.query(x, 5).tolist()) <= set((omegas <= omegas.sort().values[4]).nonzero().flatten().tolist())


def test_a_strategy_that_tells_outliers_is_asked_itself() -> None:
    stream = pool(batch_size=8)
    with isolated(0, "strategy"):
        base = OpenVAE(model(stream), replay="none", latent=8, decoder=(16,))
    strategy = Active(base, "evt")
    run(strategy, stream, bought := Bought())
    x = stream.tasks[0].test[:30].x
    assert torch.equal(strategy.outlier_probabilities(x), base.novelty(x)) and len(bought.revealed) == 3
    assert strategy.labelled is None and strategy.rehearsal_free


@pytest.mark.parametrize("name", QUERIES)
def test_each_query_buys_different_rows_again_and_again(name: str) -> None:
    rows = []
    for _ in range(2):
        stream = pool()
        with isolated(0, "strategy"):
            strategy = Active(Replay(model(stream)), name)
        run(strategy, stream, bought := Bought())
        rows.append(torch.cat([event.rows for event in bought.revealed]))
    assert torch.equal(*rows) and len(rows[0].unique()) == 30


def test_queries_that_a_strategy_can_t_answer_are_refused() -> None:
    with pytest.raises(TypeError, match="ask='evt' needs a model with a method `features`, which Linear hasn't"):
        Active(Finetune(nn.Linear(3, 2)), "evt")
    ranks = make("NCM")(Mlp(3, 6))
    assert ranks.scores_are == "ranks"
    with pytest.raises(ValueError, match="ask='entropy' needs probabilities of classes, and the scores of NCM are ranks"):
        Active(ranks)
    assert not Active(Finetune(Mlp(3, 2)), "core_set").rehearsal_free and replace(pool(), epochs=1).epochs == 1


@pytest.mark.slow
def test_on_a_stream_that_is_no_pool_it_is_the_wrapped_strategy() -> None:
    for check in check_alike(lambda net: Active(Replay(net, capacity=20), "evt"), lambda net: Replay(net, capacity=20)):
        check()
