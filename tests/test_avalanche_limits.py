"""What is refused of Avalanche's strategies, which need boundaries, and what resumes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from avalanche_strategies import BUILT, Import, benchmark, builder, maker
from clstream.strategies import EWCPenalty, WithDetectedBoundaries
from clstream.strategies.avalanche import AvalancheStrategy, strategy_class
from clstream.strategies.avalanche.introspection import needs_boundaries
from clstream.streams import from_avalanche, split_digits
from torch import nn
from torch.optim import SGD

from clstream import run
from clstream.checks import check_strategy
from clstream.cli import main
from clstream.models import Mlp
from clstream.serialization import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:No loggers", "ignore:Using a non-tuple sequence")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EWC", {"ewc_lambda": 0.4}),
        ("Replay", {"mem_size": 30}),
        ("SynapticIntelligence", {"si_lambda": 1.0}),
        ("LwF", {"alpha": 1.0, "temperature": 2.0}),
        ("GEM", {"patterns_per_exp": 10}),
        ("Cumulative", {}),
    ],
)
def test_a_run_of_theirs_resumes_exactly(avalanche: Import, name: str, options: dict[str, Any]) -> None:
    checks = {check.name: check for check in check_strategy(lambda model: strategy_class(name)(model, **options))}
    checks["resumes_exactly"]()
    if name == "Replay":
        checks["evaluates_without_trace"]()
        checks["leaves_the_caller_alone"]()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_networks_of_theirs_resume_exactly(avalanche: Import, name: str) -> None:
    """Class means, masks and columns that came to be within the run are there again."""
    from clstream.checks.recorders import Checkpoints

    options: dict[str, Any] = {"task_labels": True} if name in ("PackNet", "PNN") else {}
    stream = from_avalanche(benchmark(avalanche, **options), epochs=2, batch_size=10)
    make, whole, strategy = builder(avalanche, name), Checkpoints(step=90), AvalancheStrategy(builder(avalanche, name)())
    expected = run(strategy, stream, whole)
    weights = strategy.model.state_dict()
    assert len(whole.written) > 1
    for number in range(len(whole.written) - 1):
        again = AvalancheStrategy(make())
        result = run(again, stream, Checkpoints(every=0), resume=whole.load(number))
        assert torch.equal(result.accuracy, expected.accuracy) and torch.equal(result.task_accuracy, expected.task_accuracy)
        assert all(torch.equal(value, weights[key]) for key, value in again.model.state_dict().items())


@pytest.mark.slow
def test_heads_of_theirs_resume_exactly(avalanche: Import) -> None:
    """A head that came to be within the run is there again, with what the optimizer knows of it."""
    from clstream.checks.recorders import Checkpoints

    stream = from_avalanche(benchmark(avalanche, task_labels=True), epochs=1, batch_size=30)
    make = maker(avalanche, "Replay", net="headed", momentum=0.9, mem_size=30)
    whole = Checkpoints(step=5)
    expected = run(AvalancheStrategy(make()), stream, whole, evaluate_every=2)
    for number in range(len(whole.written) - 1):
        state = whole.load(number)
        result = run(AvalancheStrategy(make()), stream, Checkpoints(every=0), evaluate_every=2, resume=state)
        assert torch.equal(result.accuracy, expected.accuracy) and torch.equal(result.task_accuracy, expected.task_accuracy)


def test_what_cannot_be_captured_is_said(avalanche: Import, tmp_path: Any) -> None:
    from clstream.checkpoint import Checkpointer

    strategy = strategy_class("AGEM")(Mlp((1, 8, 8), 10, hidden=(20,)), patterns_per_exp=20, sample_size=20)
    with pytest.raises(CaptureError, match=r"theirs\.plugins\[0\]\.buffer_dliter is a .*iterator.*--checkpoint_every 0"):
        run(strategy, split_digits(epochs=1), Checkpointer(tmp_path / "run"))


@pytest.mark.slow
def test_boundaries_are_needed_where_something_is_consolidated(avalanche: Import) -> None:
    net = Mlp((1, 8, 8), 10, hidden=(20,))
    for name, options in (("EWC", {"ewc_lambda": 0.4}), ("AGEM", {"patterns_per_exp": 20, "sample_size": 20})):
        with pytest.raises(ValueError, match="needs boundaries, which split_digits hides"):
            run(strategy_class(name)(net, **options), split_digits(epochs=1, boundaries=False))
    result = run(strategy_class("Replay")(net, mem_size=100), split_digits(epochs=5, boundaries=False))
    assert result.average_accuracy > 0.5
    plain = AvalancheStrategy(maker(avalanche, "EWC", ewc_lambda=0.1)(), boundaries=False)
    assert run(plain, split_digits(epochs=1, boundaries=False)).average_accuracy < 0.5
    plugins = avalanche("training.plugins")
    assert needs_boundaries(maker(avalanche, "Naive", plugins=[plugins.MASPlugin()])())
    assert not needs_boundaries(maker(avalanche, "Naive", plugins=[plugins.ReplayPlugin(20)])())
    assert not needs_boundaries(maker(avalanche, "Naive")())


@pytest.mark.slow
def test_detected_boundaries_do_for_theirs_too(avalanche: Import) -> None:
    base = AvalancheStrategy(maker(avalanche, "EWC", ewc_lambda=0.4)())
    run(WithDetectedBoundaries(base, warmup=4, window=10), split_digits(epochs=2, boundaries=False))
    assert base.theirs.clock.train_exp_counter > 1


def test_what_cannot_be_played_is_refused(avalanche: Import) -> None:
    supervised, plugins = avalanche("training.supervised"), avalanche("training.plugins")
    with pytest.raises(
        TypeError, match=r"an object of a supervised strategy of Avalanche, such as Naive\(\.\.\.\), not the class EWC"
    ):
        AvalancheStrategy(supervised.EWC)
    with pytest.raises(TypeError, match="not a Mlp"):
        AvalancheStrategy(Mlp((1, 8, 8), 10))
    with pytest.raises(ValueError, match=r"JointTraining has a train of its own.*Cumulative, or clstream's Joint"):
        AvalancheStrategy(maker(avalanche, "JointTraining")())
    with pytest.raises(ValueError, match=r"Naive is to evaluate by itself \(eval_every=1\)"):
        AvalancheStrategy(maker(avalanche, "Naive", eval_every=1)())
    with pytest.raises(TypeError, match="plugins must be plugins of Avalanche"):
        AvalancheStrategy(maker(avalanche, "Naive")(), plugins=[EWCPenalty()])
    with pytest.raises(ValueError, match="EarlyStoppingPlugin looks at what Avalanche's evaluation measured"):
        AvalancheStrategy(maker(avalanche, "Naive")(), plugins=[plugins.EarlyStoppingPlugin(2, "test_stream")])
    with pytest.raises(TypeError, match="takes no regularisers"):
        strategy_class("Naive")(Mlp((1, 8, 8), 10)).add_regularisers(EWCPenalty())


def test_their_icarl_learns_streams_whose_classes_it_can_list(avalanche: Import) -> None:
    make = builder(avalanche, "iCaRL")
    with pytest.raises(ValueError, match="which split_digits hides: take clstream's ICaRL"):
        run(AvalancheStrategy(make(), boundaries=False), split_digits(epochs=1, boundaries=False))
    with pytest.raises(ValueError, match="which split_digits hides: take clstream's ICaRL"):
        run(WithDetectedBoundaries(AvalancheStrategy(make()), warmup=4, window=10), split_digits(epochs=1, boundaries=False))
    with pytest.raises(ValueError, match="class 0 of split_digits comes again: take clstream's ICaRL"):
        run(AvalancheStrategy(make()), replace(split_digits(epochs=1), schedule=[0, 1, 0]))
    theirs = make()
    plugin = theirs.plugins[0]
    plugin.__class__ = type("MyICaRL", (type(plugin),), {})  # one of the user's own that builds on it is no exception
    with pytest.raises(ValueError, match="class 0 of split_digits comes again"):
        run(AvalancheStrategy(theirs), replace(split_digits(epochs=1), schedule=[0, 1, 0]))
    strategy = AvalancheStrategy(make())
    run(strategy, split_digits(epochs=1), max_sessions=2)
    again = pytest.raises(ValueError, match="counts its experiences from the first on: make a new one")
    with pytest.warns(UserWarning, match="was run before"), again:
        run(strategy, split_digits(epochs=1))


def test_what_waits_for_their_evaluation_is_refused(avalanche: Import) -> None:
    model = Mlp((1, 8, 8), 10, hidden=(20,))
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    plugins = avalanche("training.plugins")
    plugin = plugins.LRSchedulerPlugin(scheduler, metric="val_loss")
    naive = avalanche("training.supervised").Naive(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="LRSchedulerPlugin looks at what Avalanche's evaluation measured"):
        AvalancheStrategy(naive, plugins=[plugin])
    with pytest.raises(TypeError, match="plugins must be a list of Avalanche's plugins, not a LRSchedulerPlugin"):
        AvalancheStrategy(naive, plugins=plugin)


def test_what_works_between_experiences_needs_boundaries_whoever_wrote_it(avalanche: Import) -> None:
    supervised, plugins = avalanche("training.supervised"), avalanche("training.plugins")

    class Naive(supervised.Naive):
        def _after_training_exp(self, **options: Any) -> None:
            super()._after_training_exp(**options)

    class MyReplay(plugins.ReplayPlugin):
        pass

    class Mine(plugins.SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **options: Any) -> None:
            pass

    def needy(cls: Any, *more: Any) -> bool:
        model = Mlp((1, 8, 8), 10, hidden=(20,))
        built = cls(model=model, optimizer=SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(), plugins=list(more))
        return needs_boundaries(built)

    assert not needy(supervised.Naive) and needy(Naive)
    assert not needy(supervised.Naive, MyReplay(mem_size=10)) and needy(supervised.Naive, Mine())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["avalanche:EWC", "--strategy.ewc_lambda", "1", "--strategy.mode", "onlin"],
            "Avalanche's EWC can't be built so: Assertion",
        ),
        (["avalanche:BiC"], "there is no strategy 'BiC' of Avalanche's that can be had by name"),
    ],
)
def test_what_they_assert_is_a_sentence(
    avalanche: Import, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["run", "--track", "false", "--checkpoint_every", "0", "--strategy", *arguments]) in (1, 2)
    assert sentence in " ".join(capsys.readouterr().err.split())
