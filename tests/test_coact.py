"""CoACT: the vectors of its parts, the order of its steps, what each part leaves alone, and what chooses the epoch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies import CoACT
from clstream.strategies.coact import marks, move
from conftest import vit_like
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from clstream import EpochStarted, on, run
from clstream.adapters import LoRA, adapt, without_adapters
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.eval_mode import evaluating
from clstream.losses import supervised_contrastive
from clstream.measures.memory import count_parameters
from clstream.seeds import isolated

PLAIN = {"smallest": 1.0, "jitter": 0.0, "grayscale": 0.0}
STREAM = example_stream(epochs=2)


def built(lora: bool = True, **options: Any) -> CoACT:
    """Return a fresh strategy, the same each time."""
    with isolated(0, "strategy"):
        model = vit_like(example_model())
        if lora:
            adapt(model, LoRA(rank=2, dropout=0.1, modules="*.qkv"), trained=[])
        return CoACT(model, **{"optimizer": partial(SGD, lr=0.02, momentum=0.9), **PLAIN, **options})


def play(sessions: int | None = None, lora: bool = True, **options: Any) -> CoACT:
    """Run it."""
    strategy = built(lora, **options)
    run(strategy, STREAM, max_sessions=sessions)
    return strategy


def scaled(x: Tensor) -> Tensor:
    """Return images as they are, from 0 to 1: a view in which nothing is drawn."""
    return x.float() / 255


def means(strategy: CoACT, tasks: int = 3) -> Tensor:
    """Return the mean features of each class of the first tasks, as the strategy is."""
    with evaluating(strategy), torch.no_grad():
        parts = [task.train[:] for task in STREAM.tasks[:tasks]]
        return torch.stack([strategy.features(part.x[part.y == y]).mean(0) for part in parts for y in part.y.unique()])


def test_contrast_by_hand() -> None:
    q, k = torch.eye(2, dtype=torch.float64), torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    middle, y = torch.tensor([[0.96, 0.28], [0.28, 0.96]], dtype=torch.float64), torch.tensor([0, 1])
    assert float(supervised_contrastive(torch.cat([q, k]), y.repeat(2), 0.07)) == pytest.approx(1.2218559835, abs=1e-9)
    rows = torch.cat([q, middle, k])
    assert float(supervised_contrastive(rows, y.repeat(3), 0.07)) == pytest.approx(1.3260144506, abs=1e-9)


def test_the_teacher_moves_by_a_thousandth_of_the_way() -> None:
    slow, fast = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3.0, -2.0], dtype=torch.float64)
    for _ in range(100):
        move([slow], [fast], 0.999)
    assert slow.tolist() == pytest.approx([1.1904157058, 1.6191685885], abs=1e-9)
    same = torch.randn(1000)
    before = same.clone()
    move([same], [before], 0.999)
    assert torch.equal(same, before)
    assert float(F.mse_loss(torch.tensor([1.0, 2, 0]), torch.tensor([1.5, 1, 0]))) == pytest.approx(0.4166666667)


def test_the_learning_rate_falls_by_a_cosine_in_the_first_session() -> None:
    rates: list[float] = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            rates.extend(group["lr"] for group in strategy.optimizer.param_groups)

    strategy = built(optimizer=partial(SGD, lr=0.1), base_epochs=50, encoder_factor=0.5, unfreeze_epoch=None, contrast=0.0)
    run(strategy, example_stream(epochs=50, batch_size=60), Watch(), max_sessions=1, evaluate_at="end")
    own, encoder = rates[::2], rates[1::2]
    assert [own[epoch] for epoch in (0, 1, 25, 49)] == pytest.approx([0.1, 0.0999013364, 0.05, 9.866e-5], rel=1e-4)
    assert encoder == pytest.approx([rate / 2 for rate in own])


def test_without_epochs_class_means_answer() -> None:
    strategy = play(base_epochs=0, later_epochs=0)
    torch.testing.assert_close(strategy.head.weight.detach(), means(strategy), rtol=0, atol=1e-6)
    x = STREAM.tasks[1].test[:5].x
    torch.testing.assert_close(strategy.scores(x), strategy.features(x).detach() @ means(strategy).T)
    cosines = play(base_epochs=0, later_epochs=0, similarity="cosine").scores(x)
    torch.testing.assert_close(cosines, F.normalize(strategy.features(x).detach(), dim=1) @ F.normalize(means(strategy), dim=1).T)


def test_without_later_epochs_later_sessions_are_the_prototype_rule() -> None:
    first, whole = play(1, later_epochs=0), play(later_epochs=0)
    for name, value in first.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], value), name
    assert torch.equal(first.head.weight[:2], whole.head.weight[:2])
    torch.testing.assert_close(whole.head.weight[2:].detach(), means(first)[2:], rtol=0, atol=1e-6)


def test_the_teacher_is_the_network_as_it_came_while_none_of_its_weights_learns() -> None:
    with isolated(0, "strategy"):
        before = vit_like(example_model()).state_dict()
    resting, moved = play(unfreeze_epoch=None), play(1)
    for strategy, same in ((resting, True), (moved, False)):
        teacher = strategy.teacher.state_dict()
        assert all(torch.equal(teacher[name], value) for name, value in before.items()) is same
        assert all(torch.equal(strategy.pristine.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(resting.model.state_dict()[name], value) for name, value in before.items())  # adapters beside it


def test_a_loss_is_its_parts_by_hand() -> None:
    strategy, samples = play(1, consistency=0.5, contrast=2.0), STREAM.tasks[1].train[:8]
    strategy.session, strategy.views = 1, scaled
    x = scaled(samples.x)
    with torch.no_grad():
        strategy.head.weight += 0.1
        features, base = strategy.features(x), strategy.base.features(x)  # type: ignore[operator]
        logits, rows = strategy.head(features), [net.features(x) for net in (strategy.teacher, strategy.pristine)]  # type: ignore[operator]
        contrast = supervised_contrastive(torch.cat([features, *rows]), samples.y.repeat(3), 0.07)
        drift = (logits - strategy.base_head(base)).square().mean()
        expected = F.cross_entropy(logits, samples.y) + 2 * contrast + 0.5 * drift
    torch.testing.assert_close(strategy.loss(samples).detach(), expected)
    assert drift > 0
    strategy.session = 0
    with torch.no_grad():
        first = supervised_contrastive(torch.cat([features, rows[0]]), samples.y.repeat(2), 0.07)
        torch.testing.assert_close(strategy.loss(samples), F.cross_entropy(logits, samples.y) + 2 * first)


@pytest.mark.slow
def test_gradients_go_to_what_the_options_say() -> None:
    def learning(strategy: CoACT) -> set[str]:
        names = {name for name, weight in strategy.model.named_parameters() if weight.requires_grad}
        return names | ({"W"} if strategy.head.weight.requires_grad else set())

    adapters = {f"stages.block1.attention.qkv.adapter.{matrix}.weight" for matrix in "AB"}
    strategy = built(unfreeze="stages.block1.mlp.0.*", unfreeze_epoch=1)
    assert learning(strategy) == adapters | {"W"}
    seen: list[set[str]] = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            seen.append(learning(strategy))

    run(strategy, STREAM, Watch())
    assert count_parameters(strategy) == (sum(map(torch.numel, strategy.model.parameters())) + 6 * 32, 6 * 32)
    opened = adapters | {"W", "stages.block1.mlp.0.weight", "stages.block1.mlp.0.bias"}
    assert seen == [adapters | {"W"}, opened, {"W"}, {"W"}, {"W"}, {"W"}]
    assert learning(play(2, later="adapters")) == adapters and learning(play(2, later="both")) == adapters | {"W"}


def test_a_strong_consistency_holds_the_logits_of_the_base_student() -> None:
    x, drifts = STREAM.tasks[0].test[:].x, []
    for strength in (0.0, 100.0):
        optimizer = partial(SGD, lr=0.001)
        strategy = play(2, optimizer=optimizer, later="both", later_factor=1.0, later_epochs=2, consistency=strength, contrast=0.0)
        with evaluating(strategy), torch.no_grad():
            base = strategy.base_head(strategy.base.features(x))  # type: ignore[operator]
            drifts.append(float((strategy.head(strategy.features(x)) - base)[:, :2].square().mean()))
    assert drifts[1] < drifts[0] / 2


def test_development_images_have_no_part_in_a_step_and_choose_the_epoch() -> None:
    strategy, samples = play(1, development=0.2), STREAM.tasks[0].train[:]
    assert samples.y[strategy.held].bincount().tolist() == [6, 6] and strategy.best_hits >= 6
    assert torch.isin(marks(samples.x), strategy.marks).nonzero().flatten().tolist() == strategy.held.tolist()
    strategy.session, strategy.views, batch = 0, scaled, samples[:20]
    held = torch.isin(torch.arange(20), strategy.held)
    assert 0 < held.sum() < 20
    other = torch.where(held[:, None, None, None], batch.x.flip(3), batch.x)
    kept = [strategy.loss(part).detach() for part in (batch, batch[(~held).nonzero().flatten()])]
    torch.testing.assert_close(kept[0], kept[1])
    strategy.marks = marks(other[held])
    torch.testing.assert_close(strategy.loss(type(batch)(other, batch.y)).detach(), kept[0])


def test_the_best_epoch_is_taken_back() -> None:
    """Two epochs at a rate that ruins all: the first one's state is no better than the last one's unless it was kept."""
    strategy = built(development=0.3, optimizer=partial(SGD, lr=0.02), contrast=0.0)
    kept: list[dict[str, Tensor]] = []

    class Watch:
        @on(EpochStarted)
        def ruin(self, event: EpochStarted) -> None:
            if event.epoch.index == 1 and event.epoch.session.index == 0:
                kept.append({name: value.clone() for name, value in strategy.head.state_dict().items()})
                with torch.no_grad():
                    strategy.head.weight.copy_(-100 * strategy.head.weight)

    run(strategy, STREAM, Watch(), max_sessions=1)
    assert torch.equal(strategy.head.weight, kept[0]["weight"])


def test_a_copy_without_adapters_is_the_network_as_it_was() -> None:
    x = torch.rand(2, 1, 8, 8)
    model = vit_like(example_model())
    before, types = model(x), [type(module) for module in model.modules()]
    adapt(model, LoRA(rank=2), trained=[])
    for name, weight in model.named_parameters():
        if ".adapter.B" in name:
            weight.data.normal_()
    copy = without_adapters(model)
    assert torch.equal(copy(x), before) and not torch.equal(model(x), before)
    assert [type(module) for module in copy.modules()] == types


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    for options, sentence in (
        ({"base_epochs": 3}, "base_epochs of CoACT is 3, and example has 2 epochs: give it more"),
        ({"later_epochs": 3}, "later_epochs of CoACT is 3, and example has 2 epochs: give it more"),
        ({"development": 0.01}, "development=0.01 of 60 images holds back none of any class: take a larger share"),
        ({"unfreeze": "stages.block9.*"}, "unfreeze names no parameter of VitTiny: 'stages.block9.*'; take unfreeze_epoch=None"),
    ):
        with pytest.raises(ValueError, match=sentence.replace("*", r"\*")):
            play(**options)
    with pytest.raises(TypeError, match="CoACT needs a model with a method `features` and a linear `head`"):
        CoACT(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_it_resumes_within_the_first_session_and_after_it() -> None:
    def go(observer: Checkpoints, state: Any = None) -> None:
        run(built(development=0.2, later="both"), example_stream(epochs=2, batch_size=20), observer, resume=state)

    whole = Checkpoints()
    go(whole)
    for number in (4, 7, 13):  # in the second epoch of the first session, and in both others
        rest = Checkpoints(every=0)
        go(rest, whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None
