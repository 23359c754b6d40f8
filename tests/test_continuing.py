"""Continuing: a run goes on where another one ended, with more sessions, tasks and classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import EWC, TAME, DERpp, Finetune, Replay
from conftest import StopAt
from torch import Tensor, nn
from torch.optim import Adam

from clstream import Result, RunContinued, Strategy, Stream, Task, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.checkpoint.store import save
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints, Trace
from clstream.models import Linear, grow
from clstream.seeds import isolated
from clstream.serialization.compare import first_difference
from clstream.stream import History
from clstream.training import Training

WHOLE = example_stream()


def first_tasks(count: int, stream: Stream = WHOLE) -> Stream:
    """Return the stream of the first tasks alone."""
    return replace(stream, name="first", tasks=stream.tasks[:count], schedule=tuple(range(count)))


def last_task() -> Stream:
    """Return a stream of the third task alone, as its own first one."""
    return replace(WHOLE, name="new", tasks=[replace(WHOLE.tasks[2], id=0)], schedule=None)


def build(classes: int = 4, head: str = "growing", make: Callable[[nn.Module], Strategy] = Replay) -> Strategy:
    """Return a fresh strategy, always the same."""
    with isolated(0, "strategy"):
        return make(example_model(head=head, classes=classes))


def weights(strategy: Strategy) -> list[Tensor]:
    """Return the weights of a strategy's model."""
    return list(strategy.model.state_dict().values())


@pytest.fixture(autouse=True)
def _told() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the outputs of .* are drawn now|the 2 tasks of first are not asked")
        yield


def test_the_result_of_a_run_is_gone_on_from() -> None:
    expected = run(at_once := build(6), WHOLE)
    first = run(strategy := build(), first_tasks(2))
    result = run(strategy, WHOLE, continues=first)
    assert all(map(torch.equal, weights(strategy), weights(at_once)))
    assert torch.equal(result.accuracy[:2, :2], first.accuracy) and result.accuracy[:2, 2].isnan().all()
    assert torch.equal(result.accuracy[2], expected.accuracy[2]) and torch.equal(result.taught, expected.taught)
    assert result.forgetting == expected.forgetting and result.average == expected.average
    assert result.sessions == (1, 2, 3) and result.probe_steps == expected.probe_steps
    assert torch.equal(result.cost.learning_flops, expected.cost.learning_flops)


def test_it_goes_on_from_a_folder_and_is_resumed(tmp_path: Path) -> None:
    expected = run(build(6), WHOLE)
    run(build(), first_tasks(2), Checkpointer(tmp_path / "first"))
    with pytest.raises(KeyboardInterrupt):
        run(build(), WHOLE, Checkpointer(tmp_path / "rest", every_batches=2), StopAt(5), continues=tmp_path / "first")
    state = newest(tmp_path / "rest")
    assert state is not None and state["position"][0] == 2 and state["continued"]["first"] == 2
    result = run(build(), WHOLE, Checkpointer(tmp_path / "rest"), continues=tmp_path / "first", resume=state)
    assert torch.equal(result.accuracy[2], expected.accuracy[2])


def test_new_tasks_alone_come_after_those_that_are_gone(tmp_path: Path) -> None:
    expected = run(at_once := build(6), WHOLE)
    run(build(), first_tasks(2), Checkpointer(tmp_path / "first"))
    with pytest.warns(UserWarning, match="the 2 tasks of first are not asked about any more"):
        result = run(strategy := build(), last_task(), Checkpointer(tmp_path / "rest"), continues=tmp_path / "first")
    assert all(map(torch.equal, weights(strategy), weights(at_once)))
    assert result.accuracy[2, :2].isnan().all() and float(result.accuracy[2, 2]) == float(expected.accuracy[2, 2])
    again = run(build(), last_task(), Checkpointer(tmp_path / "rest"), resume=newest(tmp_path / "rest"))
    assert torch.equal(again.accuracy.nan_to_num(2), result.accuracy.nan_to_num(2))
    with pytest.raises(ValueError, match="all 3 sessions of example were learned by the run before"):
        run(build(), WHOLE, continues=tmp_path / "rest")


def test_a_run_that_was_stopped_goes_on_within_its_session() -> None:
    expected = run(build(6), WHOLE)
    kept = Checkpoints(every=5)
    run(build(), first_tasks(2), kept)
    state = kept.load(3)
    assert state["position"] != [1, 0, 0] and state["position"][0] == 1
    assert torch.equal(run(build(), WHOLE, continues=state).accuracy[2], expected.accuracy[2])
    with pytest.raises(ValueError, match="was stopped in task 1 of first: give a stream that begins with what it had learned"):
        run(build(), last_task(), continues=state)


def test_max_sessions_counts_those_to_come() -> None:
    first = run(strategy := build(6), WHOLE, max_sessions=1)
    second = run(strategy, WHOLE, continues=first, max_sessions=1)
    third = run(strategy, WHOLE, continues=second)
    assert [len(result.accuracy) for result in (first, second, third)] == [1, 2, 3]
    assert torch.equal(third.accuracy, run(build(6), WHOLE).accuracy)


def test_its_events_are_a_run_of_their_own() -> None:
    heard = list[RunContinued]()

    class Hearing(Finetune):
        @on(RunContinued)
        def hear(self, event: RunContinued) -> None:
            heard.append(event)

    stream = replace(WHOLE, schedule=(0, 0, 0, 1, 2), batch_size=20)
    first = run(strategy := build(make=Hearing), replace(stream, schedule=(0, 0, 0), tasks=stream.tasks[:1]))
    run(strategy, stream, trace := Trace(), continues=first)
    assert trace.word == "R" + "TSEblblblestV" * 2 + "r"
    assert [(event.sessions, event.tasks, event.classes) for event in heard] == [(3, 1, 2)]
    first = run(strategy := build(6), stream, max_sessions=1)  # in the middle of a task, which it ended
    run(strategy, stream, trace := Trace(), continues=first, max_sessions=2)
    assert trace.word == "RTSEblesVSEblestVr"


@pytest.mark.parametrize("make", [lambda model: EWC(model, partial(Adam, lr=0.01)), DERpp], ids=["EWC", "DERpp"])
def test_a_fixed_head_gets_outputs_that_are_drawn(make: Callable[[nn.Module], Strategy]) -> None:
    first = run(strategy := build(4, "fixed", make), first_tasks(2))
    before = [rows.clone() for rows in weights(strategy)]

    with pytest.warns(UserWarning, match=r"the outputs of \w+.model.head for new classes are drawn now"):
        result = run(strategy, WHOLE, continues=first)
    head = strategy.model.head
    assert isinstance(head, nn.Linear)
    assert (
        head.out_features == 6 == len(head.weight) == len(head.bias)
        and head.weight is strategy.optimizer.param_groups[0]["params"][-2]
    )
    assert before[-2].shape == (4, 32) and bool(result.accuracy[2].isfinite().all())
    for state in strategy.optimizer.state.values():
        assert all(len(value) in (6, 32) for value in state.values() if isinstance(value, Tensor) and value.dim())


class Net(nn.Module):
    """A network of a user's, with its outputs in the last layer."""

    def __init__(self, outputs: int, last: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))
        self.last = nn.Identity() if last else nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, outputs)."""
        outputs: Tensor = self.last(self.body(x.float() / 255))
        return outputs


def test_a_network_of_the_users_grows() -> None:
    torch.manual_seed(0)
    net = Net(4)
    before = net.body[3].weight.clone()
    assert grow(net, 6) == "body.3" and grow(net, 6) == ""
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 6) and torch.equal(net.body[3].weight[:4], before)
    torch.manual_seed(0)
    first = run(strategy := Finetune(Net(4)), first_tasks(2))
    assert run(strategy, WHOLE, continues=first).accuracy[2, 2] > 0.5
    with pytest.raises(ValueError, match="Conv1d has no linear layer that has its outputs, so it can't get more of them"):
        grow(nn.Conv1d(1, 1, 1), 6)
    with pytest.raises(ValueError, match="the layer '' for its outputs, which is parametrized"):
        grow(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 6)


def relabelled(task: Task, shape: tuple[int, ...] = (1, 8, 8)) -> Task:
    """Return a task with inputs of another shape."""
    train, test = (replace(part[:], x=part[:].x.view(-1, *shape)) for part in (task.train, task.test))
    return replace(task, id=0, train=train, test=test)


def test_what_can_t_come_next_is_refused() -> None:
    first = run(strategy := build(), first_tasks(2))
    end = [rows.clone() for rows in weights(strategy)]
    new, names, second = last_task(), tuple("abcdef"), replace(WHOLE.tasks[1], id=0)
    refusals: list[tuple[Stream, str]] = [
        (replace(new, tasks=[relabelled(new.tasks[0], (64,))]), r"inputs of \(1, 8, 8\) uint8, and new has those of \(64,\)"),
        (example_stream(target="value"), "had label targets of 4 outputs, and example has value targets of 6"),
        (replace(new, scenario="task"), "first was class-incremental, and new is task-incremental"),
        (
            replace(WHOLE, tasks=[second], schedule=None),
            "task 0 of example is what was learned already, as task 1",
        ),
        (first_tasks(2), "all 2 sessions of first were learned by the run before"),
    ]
    for stream, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            run(strategy, stream, continues=first)
    named = run(own := build(), replace(first_tasks(2), class_names=("a", "b", "c", "x")))
    with pytest.raises(ValueError, match="label 3 was 'x' in first, and is 'd' in new: number new classes from 4 up"):
        run(own, replace(new, class_names=names), continues=named)
    with pytest.raises(ValueError, match="seed was 0, now it is 1"):
        run(strategy, WHOLE, continues=first, seed=1)
    with pytest.raises(ValueError, match="this result is of another strategy than the Replay that is to go on"):
        run(build(), WHOLE, continues=first)
    with pytest.raises(ValueError, match="continues takes the result that run returned in this process"):
        run(strategy, WHOLE, continues=replace(first))
    with pytest.raises(TypeError, match="continues takes a result of run, or a folder of checkpoints, not a int"):
        run(strategy, WHOLE, continues=3)  # type: ignore[arg-type]
    assert all(map(torch.equal, weights(strategy), end))  # nothing is lost
    assert len(run(strategy, WHOLE, continues=first).accuracy) == 3


class Convolved(nn.Module):
    """A network whose outputs come of a convolution, which can't get more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 4)."""
        outputs: Tensor = self.layer(x.float() / 255).flatten(1)
        return outputs


def test_a_network_without_room_is_named_and_nothing_is_lost() -> None:
    with isolated(0, "model"):
        strategy = Finetune(Convolved())
    first = run(strategy, first_tasks(2))
    end, random = [rows.clone() for rows in weights(strategy)], torch.get_rng_state()
    with pytest.raises(ValueError, match="Convolved has no linear layer that has its outputs, so it can't get more of them"):
        run(strategy, WHOLE, trace := Trace(), continues=first)
    assert not trace.word and all(map(torch.equal, weights(strategy), end)) and torch.equal(random, torch.get_rng_state())


def test_folders_and_states_that_can_t_be_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .* whose run could be continued"):
        run(build(), WHOLE, continues=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no checkpoint to go on from"):
        run(build(), WHOLE, continues=str(tmp_path))
    run(build(), first_tasks(2), kept := Checkpoints(every=0))
    state = kept.load(-1)
    with pytest.raises(ValueError, match=r"strategy\.capacity was 500, now it is 20"):
        run(build(make=partial(Replay, capacity=20)), WHOLE, continues=state)
    with pytest.raises(ValueError, match="its 'history' can't be"):
        run(build(), WHOLE, continues={**state, "history": {**state["history"], "visits": [[9, 0, 1]]}})
    run(build(4, "fixed", TAME), first_tasks(2), kept := Checkpoints(every=0))
    with pytest.raises(ValueError, match="this TAME has learned 4 classes, and with example there are 6: make another one"):
        run(build(4, "fixed", TAME), WHOLE, continues=kept.load(-1))


def test_a_checkpoint_from_before_histories_goes_on_with_its_own_stream() -> None:
    run(build(6), WHOLE, kept := Checkpoints(every=0), max_sessions=2)
    old = {name: value for name, value in kept.load(-1).items() if name not in ("history", "notes")}
    assert torch.equal(run(build(6), WHOLE, continues=old).accuracy, run(build(6), WHOLE).accuracy)
    with pytest.raises(ValueError, match="the checkpoint is of a version of clstream whose runs could not be continued"):
        run(build(6), last_task(), continues=old)


def test_a_history_is_data() -> None:
    history = History.of(WHOLE)
    assert History.from_dict(history.to_dict()) == history and history.begins(WHOLE, 3)
    assert not history.begins(last_task(), 1)
    for name, value in (("tasks", []), ("gone", 4), ("dtype", "save"), ("visits", [[0, 0]]), ("scenario", "x")):
        with pytest.raises(ValueError, match="these can't be the values of a History"):
            History.from_dict({**history.to_dict(), name: value})


KEPT = Path(__file__).parent / "kept_checkpoints"
"""By format a checkpoint that clstream 0.1.0 wrote: fine-tuning of a linear model, after two of the sessions below."""


def linear() -> Finetune:
    """Return the strategy that the kept checkpoints are of."""
    with isolated(0, "model"):
        return Finetune(Linear((1, 8, 8), 6))


@pytest.mark.filterwarnings("ignore:this is a checkout of clstream", "ignore:the checkpoint .* was made with")
def test_a_kept_checkpoint_is_gone_on_from_or_refused_by_name(tmp_path: Path) -> None:
    """Format 5 before there were histories: it goes on with its own stream; one of format 4 is refused by its number."""
    stream = example_stream(batch_size=20)
    result = run(linear(), stream, continues=KEPT / "format_5")
    torch.testing.assert_close(result.accuracy, run(linear(), stream).accuracy)
    with pytest.raises(ValueError, match="doesn't say what was learned"):
        run(linear(), last_task(), continues=KEPT / "format_5")
    state = newest(KEPT / "format_5")
    assert state is not None and "history" not in state
    assert len(run(linear(), stream, resume=state, max_sessions=2).accuracy) == 2
    (tmp_path / "newer").mkdir()
    save({**state, "format": 6, "clstream": "0.2.0"}, tmp_path / "newer", 1)
    with pytest.raises(ValueError, match=r"was made by clstream 0.2.0 \(format 6\), and this is .* \(format 5\): finish the run"):
        run(linear(), stream, continues=tmp_path / "newer")
    save({**state, "format": 4}, tmp_path, 1)
    with pytest.raises(ValueError, match=r"was made by clstream 0.1.0 \(format 4\), and this is .* \(format 5\): finish the run"):
        run(linear(), stream, continues=tmp_path)


SESSIONS = Training(
    "cosine", warmup=2, clip=0.5, accumulate=2, patience=2, held_out=0.2, class_weights="balanced", renew_optimizer="task"
)
"""All controls, with a schedule for each session."""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "result"])
def test_under_training_controls_two_halves_are_one_run(source: str, tmp_path: Path) -> None:
    make = partial(Replay, optimizer=partial(Adam, lr=0.01), capacity=40)
    stream = example_stream((0, 1, 1, 2, 2), epochs=4, batch_size=12)
    short = replace(stream, tasks=stream.tasks[:2], schedule=(0, 1, 1))
    at_once, strategy, kept = build(6, make=make), build(make=make), Checkpointer(tmp_path / "first")
    expected = run(at_once, stream, whole := Checkpoints(every=0), train=SESSIONS)
    first = run(strategy, short, kept, train=SESSIONS)
    strategy = strategy if source == "result" else build(make=make)
    goes_on: Result | Path = first if source == "result" else tmp_path / "first"
    result = run(strategy, stream, rest := Checkpoints(every=0), train=SESSIONS, continues=goes_on)
    assert first_difference(whole.load(-1)["strategy"], rest.load(-1)["strategy"]) is None
    assert all(map(torch.equal, weights(strategy), weights(at_once)))
    assert torch.equal(result.accuracy[3:], expected.accuracy[3:])
    assert torch.equal(result.cost.epochs_saved, expected.cost.epochs_saved) and float(expected.cost.epochs_saved.sum()) > 0
    assert not torch.equal(weights(at_once)[0], weights(played_without(make, stream))[0])


def played_without(make: Callable[[nn.Module], Strategy], stream: Stream) -> Strategy:
    """Return a strategy after a run without training controls."""
    run(strategy := build(6, make=make), stream)
    return strategy


@pytest.mark.slow
def test_a_task_that_goes_on_has_its_optimizer_and_other_controls_may_come_with_a_session(tmp_path: Path) -> None:
    make = partial(Finetune, optimizer=partial(Adam, lr=0.01))
    stream = replace(WHOLE, schedule=(0, 0, 1, 2))
    train = Training(renew_optimizer="task", class_weights="balanced", clip=1.0)
    ends = []
    for source in ("result", "folder", "at once"):
        strategy = build(6, make=make)
        first = run(strategy, stream, Checkpointer(tmp_path / source), train=train, max_sessions=None if source == "at once" else 1)
        if source == "folder":
            strategy = build(6, make=make)
        if source != "at once":
            run(strategy, stream, train=train, continues=first if source == "result" else tmp_path / source)
        ends.append(weights(strategy))
    assert all(map(torch.equal, ends[0], ends[2])) and all(map(torch.equal, ends[1], ends[2]))
    ends = []
    for source in ("result", "folder"):
        strategy = build(6, make=make)
        first = run(strategy, stream, Checkpointer(tmp_path / f"other {source}"), train=train, max_sessions=1)
        strategy = strategy if source == "result" else build(6, make=make)
        goes_on = first if source == "result" else tmp_path / f"other {source}"
        result = run(strategy, stream, train=Training("linear", accumulate=2), continues=goes_on)
        assert result.params["train.accumulate"] == 2 and "train.clip" not in result.params
        ends.append(weights(strategy))
    assert all(map(torch.equal, *ends))
    strategy = build(6, make=make)
    assert len(run(strategy, stream, continues=tmp_path / "other folder").accuracy) == 4  # without any
    run(build(6, make=make), stream, cut := Checkpoints(every=3), train=train)
    with pytest.raises(ValueError, match=r"train\.clip was 1.0, now it is 2.0"):
        run(build(6, make=make), stream, train=Training(renew_optimizer="task", clip=2.0), continues=cut.load(1))


def test_a_schedule_over_the_run_can_t_go_on() -> None:
    first = run(strategy := build(6), WHOLE, train=Training("cosine", "run"), max_sessions=1)
    end = [rows.clone() for rows in weights(strategy)]
    with pytest.raises(ValueError, match="a schedule over the run is laid over the sessions that there are when it begins"):
        run(strategy, WHOLE, train=Training("cosine", "run"), continues=first)
    assert all(map(torch.equal, weights(strategy), end))
    assert len(run(strategy, WHOLE, train=Training("cosine"), continues=first).accuracy) == 3
