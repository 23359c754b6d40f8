"""Regularisers that can be added to any strategy, in code and by name on the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from clstream.strategies import (
    AGEM,
    EWC,
    L2,
    SHARP,
    DERpp,
    EWCPenalty,
    FeatKDPenalty,
    Finetune,
    Joint,
    L2Penalty,
    LwF,
    LwFMC,
    Refresh,
    Regularised,
    Replay,
    SIPenalty,
)
from torch import Tensor, nn
from torch.optim import SGD

from clstream import Batch, BatchLearned, BatchReady, Samples, Strategy, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Trace
from clstream.cli.build import build_strategy
from clstream.cli.errors import UsageError
from clstream.cli.parser import parse_run
from clstream.models import Mlp
from clstream.strategy import Regulariser

HOSTS: dict[str, Callable[[nn.Module], Strategy]] = {
    "Finetune": Finetune,
    "Replay": Replay,
    "MIR": partial(Replay, retrieval="mir"),
    "DERpp": DERpp,
    "AGEM": AGEM,
    "Joint": Joint,
    "LwF": LwF,
    "LwFMC": LwFMC,
    "Refresh": lambda model: Refresh(DERpp(model)),
    "Refresh, paper": lambda model: Refresh(DERpp(model), form="paper"),
    "Regularised": lambda model: Regularised(LwFMC(model), [FeatKDPenalty()]),
}


@pytest.mark.parametrize("name", HOSTS)
def test_any_strategy_can_carry_regularisers(name: str) -> None:
    """What a step minimises is the host's own loss and the penalties; all of them hear the run."""
    host = HOSTS[name](example_model())
    penalties: list[Regulariser] = [L2Penalty(), EWCPenalty(), SIPenalty(), FeatKDPenalty()]
    asked = [0] * 4
    for number, penalty in enumerate(penalties):

        def counting(samples: Samples, number: int = number, own: Callable[[Samples], Tensor] = penalty.penalty) -> Tensor:
            asked[number] += 1
            return own(samples)

        penalty.penalty = counting  # type: ignore[method-assign]
    run(Regularised(host, penalties), example_stream())
    assert min(asked) >= 24 - 1 and len(set(asked)) == 1
    assert all(penalty.strategy.model is host.model for penalty in penalties)
    assert penalties[0].anchor and penalties[1].importance and penalties[2].importance and penalties[3].teacher is not None


def test_the_loss_that_is_reported_holds_the_penalty() -> None:
    strategy, losses = L2(example_model(), strength=2.0), []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            self.expected = strategy.loss(event.batch.samples) + strategy.regularisers[0].penalty(event.batch.samples)

        @on(BatchLearned)
        def after(self, event: BatchLearned) -> None:
            losses.append((self.expected.item(), event.loss.item()))

    run(strategy, example_stream(), Watch())
    assert all(one == two for one, two in losses) and len(losses) == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda model: Regularised(Refresh(Replay(model)), [SIPenalty()]),
        lambda model: Regularised(LwFMC(model, partial(SGD, lr=0.05), renew_optimizer=True), [L2Penalty(0.01), FeatKDPenalty(0.5)]),
        lambda model: LwF(model, alpha=[0.0, 1.0]),
        lambda model: EWC(model, online=True, fisher="sampled", fisher_batch=8, decay=0.5),
    ],
    ids=["SI on Refresh", "L2 and FeatKD on LwF", "LwF, softmax", "EWC, online"],
)
def test_composed_strategies_meet_the_contract(make: Callable[[nn.Module], Strategy]) -> None:
    checks = {check.name: check for check in check_strategy(make)}
    for name in ("is_deterministic", "resumes_exactly", "continues_exactly", "saves_exactly", "learns", "keeps_no_samples"):
        checks[name]()  # what the parts alone, which meet all of it, could break together


class OwnStep(Strategy):
    """Steps on its loss alone."""

    def learn(self, batch: Batch) -> Tensor:
        loss = self.loss(batch.samples)
        loss.backward()
        return loss.detach()


class LosesParts(L2):
    """Leaves its regularisers out of its parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.parts = ()


def test_a_step_that_leaves_the_penalty_out_is_refused_after_its_first_batch() -> None:
    paper = Refresh(OwnStep(example_model()), form="paper")  # it asks for the objective itself, for its own move
    for wrapped in (OwnStep(example_model()), Refresh(OwnStep(example_model())), paper):
        trace = Trace()
        with pytest.raises(TypeError, match=r"OwnStep\.learn didn't minimise self\.objective\(samples\), so the penalty of L2Pen"):
            run(Regularised(wrapped, [L2Penalty()]), example_stream(), trace)
        assert trace.word == "RTSEbr"  # the strategy hears first
    (check,) = (check for check in check_strategy(OwnStep) if check.name == "minimises_penalties")
    with pytest.raises(AssertionError, match=r"its steps leave out the penalties of regularisers: minimise self\.objective"):
        check()
    with pytest.raises(TypeError, match="SHARP takes steps of its own, so it takes no regularisers"):
        SHARP(example_model()).add_regularisers(L2Penalty())


def test_what_cannot_carry_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"LosesParts has a regulariser that is not among its parts"):
        run(LosesParts(example_model()), example_stream())
    with pytest.raises(TypeError, match="abstract class Regulariser"):
        Regulariser()
    penalty = L2Penalty()
    Finetune(example_model()).add_regularisers(penalty)
    with pytest.raises(ValueError, match="L2Penalty is a regulariser of a Finetune already"):
        Finetune(example_model()).add_regularisers(penalty)
    with pytest.raises(TypeError, match="needs a model with a method `features`, which Linear hasn't"):
        Finetune(nn.Linear(2, 2)).add_regularisers(FeatKDPenalty())
    with pytest.raises(TypeError, match="Regularised wraps a strategy object"):
        Regularised(Finetune, [L2Penalty()])
    with pytest.raises(TypeError, match="regularisers must be a list of at least one Regulariser"):
        Regularised(Finetune(example_model()), [])
    with pytest.raises(ValueError, match=r"Regularised needs boundaries, which example hides \(L2Penalty\.anchor_end handles"):
        run(Regularised(Replay(example_model()), [L2Penalty()]), example_stream(boundaries=False))


def test_the_command_line_knows_regularisers_by_name() -> None:
    regularised = ["--strategy", "Regularised", "--strategy.base", "Replay"]
    with pytest.raises(UsageError, match="there is no 'EWCPenalti': did you mean EWCPenalty"):
        parse_run([*regularised, "--strategy.regularisers+=EWCPenalti"])
    with pytest.raises(UsageError, match="EWCPenalty has no option 'strenght': did you mean strength"):
        parse_run([*regularised, "--strategy.regularisers+=EWCPenalty", "--strategy.regularisers.strenght", "3"])


def test_the_command_line_builds_any_of_it() -> None:
    stream = example_stream()
    given = (
        "--strategy Regularised --strategy.base LwF --strategy.base.alpha [0,1,2] "
        "--strategy.regularisers+=L2Penalty --strategy.regularisers.parameters stages.* "
        "--strategy.regularisers+=EWCPenalty --strategy.regularisers.strength 100 --strategy.regularisers.online true"
    )
    parser, options = parse_run(given.split())
    strategy = build_strategy(parser, options, stream, 0)
    assert isinstance(strategy, Regularised) and isinstance(strategy.base, LwF) and strategy.base.alpha == [0, 1, 2]
    held, consolidated = strategy.base.regularisers
    assert list(held.weights) == ["stages.layer1.weight", "stages.layer1.bias", "stages.layer2.weight", "stages.layer2.bias"]
    assert consolidated.strength == 100 and consolidated.online and isinstance(strategy.model, Mlp)
