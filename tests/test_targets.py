"""Strategies on streams of multi-label targets and values: what is refused, what competes, what is answered."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies import (
    DER,
    ERACE,
    EWC,
    L2,
    PRD,
    DERpp,
    Finetune,
    Joint,
    LwF,
    LwFMC,
    Refresh,
    Regularised,
    Replay,
    WithDetectedBoundaries,
)
from clstream.streams import split_regression
from conftest import STRATEGIES, make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, BatchReady, RunStarted, SessionStarted, Strategy, Stream, Task, on, run
from clstream.bus import ObserverError
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Trace
from clstream.cli import main
from clstream.losses import sample_losses
from clstream.models import GrowingHead, Mlp
from clstream.online_metrics import Prequential
from clstream.strategy import Regulariser
from clstream.stream import TARGETS, Samples

ALL = {"Finetune", "Joint", "Replay", "DER", "DERpp", "AGEM", "AGEMR", "CLSER", "FDR", "GEM", "GPM", "OWM", "L2", "EWC", "MAS",
       "MER", "RWalk", "SI", "LwFMC", "LinearProbe", "Refresh", "Regularised", "Federated", "L2Init", "ContinualBackprop", "ReDo",
       "ShrinkAndPerturb"}  # fmt: skip
SEVERAL = {"ERACE", "MultiLane", "Independent", "Previous", "DynamicKNN", "FrozenLinear"}


def mixed(*targets: str) -> Stream:
    """Return a stream of one task of each of some kinds, in this order."""
    tasks = [replace(example_stream(target=target).tasks[number], id=number) for number, target in enumerate(targets)]
    return Stream("mixed", tasks, epochs=10, batch_size=8)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_says_what_it_learns(name: str) -> None:
    expected = TARGETS if name in ALL else ("label", "multilabel") if name in SEVERAL else ("label",)
    assert make(name)(example_model()).learns_targets == expected


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_other_targets_are_refused_before_anything_is_learned(target: str) -> None:
    stream, trace = example_stream(target=target), Trace()
    for strategy in (LwF(example_model()), Strategy(example_model()), PRD(example_model())):
        match = (
            f"{type(strategy).__name__} learns label targets, and example has {target} ones: Finetune, Joint, Replay and DERpp, say"
        )
        with pytest.raises(ValueError, match=match):
            run(strategy, stream, trace)
    with pytest.raises(ValueError, match=f"Refresh learns label targets, and example has {target} ones"):
        run(Refresh(LwF(example_model())), stream, trace)
    with pytest.raises(ValueError, match=f"WithDetectedBoundaries learns label targets, and example has {target} ones"):
        run(WithDetectedBoundaries(Finetune(example_model())), stream, trace)
    assert not trace.word
    for cls in (Finetune, Joint, Replay, DERpp):  # whom the sentence names
        run(cls(example_model()), stream, max_sessions=1)
    with pytest.raises(ValueError, match="ERACE learns label and multilabel targets, and example has value ones"):
        run(ERACE(example_model()), example_stream(target="value"))


def test_a_part_may_learn_less() -> None:
    class OfLabels(Regulariser):
        learns_targets = ("label",)

        def penalty(self, samples: Samples) -> Tensor:
            return torch.zeros(())

    with pytest.raises(ValueError, match="OfLabels learns label targets, and example has multilabel ones"):
        run(Regularised(Finetune(example_model()), [OfLabels()]), example_stream(target="multilabel"))


def test_values_leave_nothing_to_compete() -> None:
    for active in ("seen", "task"):
        for strategy in (Finetune(example_model(), active_classes=active), Refresh(Replay(example_model(), active_classes=active))):
            with pytest.raises(
                ValueError, match=f"active_classes='{active}' says which classes compete, and example has values: take"
            ):
                run(strategy, example_stream(target="value"))


def test_outputs_must_be_as_many_as_there_are_columns() -> None:
    for outputs in (5, 7):
        with pytest.raises(ValueError, match=rf"answers one sample with \(1, {outputs}\), but example has 6 values: build it with"):
            run(Finetune(Mlp((1, 8, 8), outputs)), example_stream(target="value"))
    with pytest.raises(ValueError, match=r"answers one sample with \(1, 5\), but example has 6 columns of targets: build it with"):
        run(Finetune(Mlp((1, 8, 8), 5)), example_stream(target="multilabel"))
    run(Finetune(Mlp((1, 8, 8), 7)), example_stream(target="multilabel"), max_sessions=1)


def test_options_that_other_targets_dont_have_are_refused() -> None:
    with pytest.raises(
        ValueError, match="form='bce_balanced' of LwFMC weighs labels that are absent, and example has values: take"
    ):
        run(LwFMC(example_model(), form="bce_balanced"), example_stream(target="value"))
    with pytest.raises(ValueError, match="goes by the highest label, and example has multilabel ones: take 'batch'"):
        run(ERACE(example_model(), competing="batch_and_above"), example_stream(target="multilabel"))
    for target in ("multilabel", "value"):
        with pytest.raises(ObserverError, match=f"prequential accuracy is of labels, and example has {target} ones"):
            run(Finetune(example_model()), example_stream(target=target), Prequential())


def test_list_shows_what_strategies_learn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["list", "strategies"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["Replay"].rstrip().endswith("label, multilabel, value") and lines["LwF"].rstrip().endswith("label")
    assert lines["ERACE"].rstrip().endswith("label, multilabel") and lines["Refresh"].rstrip().endswith("as the wrapped one")


def test_what_a_class_says_must_be_something_there_is() -> None:
    class Odd(Finetune):
        scores_are = "logit"

    class Sums(Finetune):
        bce_mean = "sum"

    with pytest.raises(ValueError, match="scores_are must be one of logits, probabilities, ranks, not 'logit'"):
        run(Odd(example_model()), example_stream())
    with pytest.raises(ValueError, match="bce_mean must be one of all, competing, not 'sum'"):
        run(Sums(example_model()), example_stream())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_they_are_learned_where_boundaries_are_hidden(target: str) -> None:
    stream = example_stream(epochs=5, target=target, boundaries=False)
    for strategy in (Replay(example_model()), ERACE(example_model(), active_classes="seen"), Refresh(DERpp(example_model()))):
        if target in strategy.learns_targets:
            result = run(strategy, stream)
            assert result.main[2, 2] > result.main[1, 2]


# Streams of several kinds ---------------------------------------------------------------------------------------------


def test_fine_tuning_learns_a_stream_of_all_kinds() -> None:
    strategy = Finetune(example_model())
    result = run(strategy, mixed("label", "multilabel", "value"))
    assert result.main_name == "accuracy/map/r2"
    assert result.main[0, 0] > 0.9 and result.main[1, 1] > 0.9 and result.main[2, 2] > result.main[1, 2] + 1
    assert strategy.target == "value"
    tasks = mixed("label", "multilabel", "value").tasks
    for task, shape in zip(tasks, ((20,), (20, 6), (20, 6)), strict=True):
        assert strategy.predict(task.test.x, task).shape == shape
    assert strategy.predict(tasks[0].test.x, tasks[0]).unique().tolist() == [0, 1]


def test_a_growing_head_grows_by_what_each_kind_brings() -> None:
    strategy, sizes = Finetune(example_model(head="growing")), []

    class Sizes:
        @on(SessionStarted)
        def see(self, event: SessionStarted) -> None:
            sizes.append(len(strategy.model.head.weight))

    run(strategy, mixed("label", "multilabel", "value"), Sizes())
    assert sizes == [2, 4, 6]


def test_all_others_refuse_streams_of_several_kinds() -> None:
    for strategy in (Replay(example_model()), Refresh(EWC(example_model())), Joint(example_model())):
        match = f"{type(strategy).__name__} learns streams with targets of one kind, and mixed has label and multilabel targets"
        with pytest.raises(ValueError, match=match):
            run(strategy, mixed("label", "multilabel"))
    run(Refresh(Finetune(example_model())), replace(mixed("label", "multilabel"), epochs=1))
    narrow = mixed("label", "value")
    cut = Samples(narrow.tasks[1].train.x, narrow.tasks[1].train.y[:, :3], target="value")
    with pytest.raises(ValueError, match="mixed has tasks of 3 values, and others of 6 outputs: one head must fit all"):
        run(Finetune(example_model()), Stream("mixed", [replace(example_stream().tasks[2], id=0), Task(1, (), cut, cut)]))


# What competes --------------------------------------------------------------------------------------------------------


def overlapping(scenario: str = "class") -> Stream:
    """Return multi-label tasks that bring the columns 0 and 1, 1 and 2, 3 and 4: each sample has none, one or both of them."""
    tasks, draw = [], torch.Generator().manual_seed(0)
    for number, classes in enumerate([(0, 1), (1, 2), (3, 4)]):
        y = torch.zeros(8, 5)
        y[:, list(classes)] = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])[:, : len(classes)].repeat(2, 1)
        x = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=draw)
        samples = Samples(x, y, target="multilabel")
        tasks.append(Task(number, classes, samples, samples))
    return Stream("overlapping", tasks, batch_size=4, scenario=scenario)


def competing_for(strategy: Strategy, rows: list[list[int]], task: int | None = None) -> list[list[int]]:
    y = torch.zeros(len(rows), 5)
    for place, labels in enumerate(rows):
        y[place, labels] = 1
    numbers = None if task is None else torch.full((len(rows),), task)
    return [row.nonzero().flatten().tolist() for row in strategy.mask_other_heads(torch.zeros(len(rows), 6), y, numbers).isfinite()]


@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_columns_compete_as_the_option_says(head: str) -> None:
    model = partial(Mlp, (1, 8, 8), 6, hidden=(8,), head=head)
    expected = {"all": [[0, 1, 2, 3, 4, 5]] * 4, "seen": [[0, 1, 2]] * 4, "task": [[0, 1], [1, 2], [0, 1, 2], [1, 2]]}
    for active, columns in expected.items():
        strategy = Finetune(model(), active_classes=active)
        run(strategy, overlapping(), max_sessions=2)
        assert competing_for(strategy, [[0], [2], [0, 2], []]) == columns  # one without any has those of the task that goes on
        answers = strategy.scores(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))[0].isfinite().nonzero().flatten().tolist()
        assert answers == ([0, 1, 2, 3, 4] if active == "all" and head == "fixed" else [0, 1, 2])  # none has column 5


def test_on_a_task_incremental_stream_the_tasks_columns_compete() -> None:
    stream = overlapping("task")

    class Watch:
        @on(RunStarted)
        def meet(self, event: RunStarted) -> None:
            self.strategy = event.strategy

        @on(BatchReady)
        def see(self, event: BatchReady) -> None:
            samples, task = event.batch.samples, event.batch.task
            logits = self.strategy.logits(samples)
            assert self.strategy.heads_by_task and samples.extra["task"].tolist() == [task.id] * len(samples)
            assert logits.isfinite().all(0).nonzero().flatten().tolist() == list(task.classes)
            assert logits.isfinite().any(0).nonzero().flatten().tolist() == list(task.classes)

    strategy = Replay(Mlp((1, 8, 8), 5, hidden=(8,)), capacity=100)
    run(strategy, stream, Watch())
    kept = strategy.memory.all()
    competing = strategy.logits(kept).isfinite()
    for task, row in zip(kept.extra["task"].tolist(), competing, strict=True):
        assert row.nonzero().flatten().tolist() == list(stream.tasks[task].classes)
    with pytest.raises(ValueError, match=r"Replay\.mask_other_heads needs the task of each sample"):
        strategy.mask_other_heads(torch.zeros(1, 5), torch.zeros(1, 5))
    ewc = EWC(Mlp((1, 8, 8), 5, hidden=(8,)))
    run(ewc, stream)
    assert all(bool(value.isfinite().all()) for value in ewc.regularisers[0].importance.values())


@pytest.mark.slow
def test_a_session_without_positives_is_learned() -> None:
    for cls in (Finetune, partial(Finetune, active_classes="seen"), partial(Finetune, active_classes="task"), LwFMC, ERACE, EWC):
        for head in ("fixed", "growing"):
            stream = overlapping()
            stream.tasks[0].train.y.zero_()
            strategy = cls(Mlp((1, 8, 8), 5, hidden=(8,), head=head))
            run(strategy, stream)
            assert all(bool(weight.isfinite().all()) for weight in strategy.model.parameters())


# What is answered -----------------------------------------------------------------------------------------------------


def test_predictions_by_kind_of_target() -> None:
    stream = example_stream(epochs=5, target="multilabel")
    strategy, x = Finetune(Mlp((1, 8, 8), 8, hidden=(32,)), active_classes="seen"), stream.tasks[0].test.x
    run(strategy, stream, max_sessions=2)
    odds = strategy.scores(x).sigmoid()
    assert not odds[:, 4:].any() and strategy.scores(x).shape == (20, 8)
    for threshold in (0.5, 0.2):
        assert torch.equal(strategy.predict(x, threshold=threshold), (odds > threshold).float())
    of_task = strategy.predict(x, stream.tasks[1], threshold=0.0)
    assert of_task[:, 2:4].all() and not of_task[:, [0, 1, 4, 5, 6, 7]].any()
    wrapped = Refresh(strategy)
    assert torch.equal(wrapped.predict(x, threshold=0.2), strategy.predict(x, threshold=0.2))
    values = Finetune(example_model())
    run(values, stream := example_stream(target="value"), max_sessions=1)
    for task in (None, stream.tasks[1]):
        assert torch.equal(values.predict(x, task), values.scores(x))


# Methods --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_der_holds_outputs_and_learns_by_the_loss_of_the_targets(target: str) -> None:
    stream = example_stream(target=target)
    strategy = DERpp(example_model(), alpha=2.0, beta=0.5, draws=1)
    run(strategy, stream, max_sessions=1)
    kept = strategy.memory.all()
    assert kept.target == target and kept.extra["logits"].shape == (60, 6)
    samples = stream.tasks[1].train[:8]
    strategy.memory.random.manual_seed(1)
    loss = strategy.loss(samples)
    strategy.memory.random.manual_seed(1)
    past = strategy.memory.sample(8, repeats=False)
    now = strategy.model(past.x)
    expected = sample_losses(strategy.model(samples.x), samples.y, target).mean()
    expected = expected + 2 * (now - past.extra["logits"]).square().mean() + 0.5 * sample_losses(now, past.y, target).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_der_with_a_growing_head_learns_label_sets(head: str) -> None:
    strategy = DER(example_model(head=head))
    run(strategy, example_stream(target="multilabel"))
    assert all(bool(weight.isfinite().all()) for weight in strategy.model.parameters())


def test_er_ace_lets_the_columns_with_a_positive_in_the_batch_compete() -> None:
    stream = overlapping()
    strategy = ERACE(Mlp((1, 8, 8), 5, hidden=(8,)), capacity=100)
    run(strategy, stream, max_sessions=1)
    samples, past = stream.tasks[1].train[:3], strategy.memory.all()  # rows of none, of 1 and of 2
    strategy.memory.sample = lambda n: past
    outputs, y = strategy.model(samples.x), samples.y
    first = F.binary_cross_entropy_with_logits(outputs[:, 1:3], y[:, 1:3], reduction="none").sum(1).mean() / 5
    second = F.binary_cross_entropy_with_logits(strategy.model(past.x), past.y)
    torch.testing.assert_close(strategy.loss(samples), first + second)


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_lwf_mc_holds_the_old_outputs(target: str) -> None:
    for scale in (5.0, None):
        stream, strategy = example_stream(target=target), LwFMC(example_model(), bce_scale=scale)
        seen: list[Tensor] = []

        class Watch:
            @on(BatchLearned)
            def see(
                self, event: BatchLearned, seen: list[Tensor] = seen, strategy: LwFMC = strategy, scale: float | None = scale
            ) -> None:
                seen[:] = [event.loss, event.batch.samples.x, event.batch.samples.y]
                samples = event.batch.samples
                outputs = strategy.model(samples.x)
                new = strategy.new_classes.tolist()
                old = strategy.old_classes.tolist()
                y = samples.y
                if target == "value":
                    assert new == list(range(6)) and old in ([], new)
                    errors = (outputs - y).square()
                else:
                    errors = F.binary_cross_entropy_with_logits(outputs[:, new], y[:, new], reduction="none")
                if strategy.teacher is not None:
                    before = strategy.teacher(samples.x)
                    if target == "value":
                        errors = torch.cat([(outputs - before).square(), errors], 1)
                    else:
                        kept = F.binary_cross_entropy_with_logits(outputs[:, old], before[:, old].sigmoid(), reduction="none")
                        errors = torch.cat([kept, errors], 1)
                expected = errors.sum(1).mean() if scale is None else errors.mean() * (5 if target == "multilabel" else 1)
                torch.testing.assert_close(strategy.loss(samples), expected)

        run(strategy, stream, Watch())
        assert seen


@pytest.mark.parametrize(("method", "form"), [(L2, "bce"), (EWC, "bce"), (LwFMC, "bce"), (LwFMC, "bce_kd")])
def test_the_scale_of_binary_cross_entropies_is_not_of_squared_errors(method: Any, form: str) -> None:
    five, one = (run(method(example_model(), form=form, bce_scale=scale), example_stream(target="value")) for scale in (5.0, 1.0))
    assert torch.equal(five.main, one.main)


def test_lwf_mc_learns_values_with_all_defaults() -> None:
    result = run(LwFMC(Mlp(10, 1)), split_regression(epochs=2))
    assert result.average > -1


def test_lwf_mc_balances_label_sets() -> None:
    strategy = LwFMC(example_model(), form="bce_balanced")
    run(strategy, stream := example_stream(target="multilabel"), max_sessions=1)
    samples = stream.tasks[0].train[:]
    terms = F.binary_cross_entropy_with_logits(strategy.model(samples.x)[:, :2], samples.y[:, :2], reduction="none")
    weights = torch.where(samples.y[:, :2] > 0, 1.0, 0.5)
    strategy.teacher = None
    torch.testing.assert_close(strategy.loss(samples), (weights * terms).mean() * 2 * 2 / 1.5)


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_the_form_of_sigmoids_takes_other_targets(target: str) -> None:
    strategy = L2(Mlp((1, 8, 8), 6 if target == "value" else 8, hidden=(8,)), strength=0.0, form="bce")
    run(strategy, stream := example_stream(target=target), max_sessions=1)
    samples = stream.tasks[0].train[:]
    outputs = strategy.model(samples.x)[:, :6]
    errors = (outputs - samples.y).square() if target == "value" else F.softplus(outputs) - outputs * samples.y
    errors = errors * (5 if target == "multilabel" else 1)
    torch.testing.assert_close(strategy.loss(samples), errors.mean())
    torch.testing.assert_close(strategy.sample_losses(strategy.model(samples.x), samples.y), errors.mean(1))


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_refresh_unlearns_by_the_loss_of_the_targets(target: str) -> None:
    class Competing(Finetune):
        bce_mean = "competing"

    for base in (Finetune(example_model()), Competing(example_model(head="growing"))):
        strategy = Refresh(base, fisher_weight=0.0)
        run(strategy, stream := example_stream(target=target), max_sessions=1)
        samples, weights = stream.tasks[0].train[:5], strategy.weights()
        loss = sample_losses(base.model(samples.x), samples.y, target, base.bce_mean).mean()
        expected = torch.autograd.grad(loss, weights)
        for slope, other in zip(strategy.gradients(samples, weights), expected, strict=True):
            torch.testing.assert_close(slope, other)


def test_a_growing_head_has_all_outputs_of_values_from_the_first_session() -> None:
    strategy = Finetune(example_model(head="growing"), partial(SGD, lr=0.1))
    run(strategy, example_stream(target="value"), max_sessions=1)
    head = strategy.model.head
    assert isinstance(head, GrowingHead) and head.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert isinstance(strategy.model, nn.Module) and strategy.scores(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).isfinite().all()
