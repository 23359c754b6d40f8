"""Novelty: how strange an input is, from the scores or from what a method has of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import PRD, SHARP, TAME, Finetune, Hypernetwork, Refresh, Regularised, Replay
from clstream.strategies.featkd import FeatKDPenalty
from conftest import make
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Stream, run
from clstream.checks import example_model, example_stream
from clstream.models import Mlp
from clstream.strategy.answers import softmax_novelty
from clstream.stream import Samples, TestSet

NONE = float("-inf")


def test_it_is_1_minus_the_greatest_probability() -> None:
    scores = torch.tensor([[2.0, 0.0, NONE], [0.0, 0.0, 0.0], [NONE, NONE, NONE]])
    torch.testing.assert_close(softmax_novelty(scores, "logits", "label"), torch.tensor([1 / (1 + torch.e**2), 2 / 3, 1.0]))
    torch.testing.assert_close(softmax_novelty(scores, "logits", "multilabel"), torch.tensor([1 / (1 + torch.e**2), 0.5, 1.0]))
    odds = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.0, 0.0], [NONE, NONE, NONE]])
    for target in ("label", "multilabel"):
        torch.testing.assert_close(softmax_novelty(odds, "probabilities", target), torch.tensor([0.3, 0.6, 1.0]))
    assert softmax_novelty(torch.tensor([[float("nan"), 0.0]]), "logits", "label").isnan().all()


@pytest.mark.parametrize("target", ["label", "multilabel"])
def test_it_comes_from_the_scores_of_one_forward_pass(target: str) -> None:
    strategy, stream = Finetune(example_model()), example_stream(target=target)
    run(strategy, stream)
    x = stream.tasks[0].test.x
    calls: list[int] = []
    strategy.model.register_forward_hook(lambda *_: calls.append(1))
    novelty = strategy.novelty(x)
    assert len(calls) == 1 and novelty.shape == (20,) and not novelty.requires_grad
    assert torch.equal(strategy.novelty_of(strategy.scores(x)), novelty) and strategy.novelty_is_of_scores
    odds = strategy.scores(x).softmax(1) if target == "label" else strategy.scores(x).sigmoid()
    torch.testing.assert_close(novelty, 1 - odds.amax(1))


def test_values_and_ranks_have_none() -> None:
    strategy, stream = Finetune(example_model()), example_stream(target="value")
    run(strategy, stream, max_sessions=1)
    with pytest.raises(TypeError, match="Finetune can't tell how strange inputs are: values have no novelty"):
        strategy.novelty(stream.tasks[0].test.x)
    sharp = SHARP(Mlp((1, 8, 8), 6, hidden=(40, 40)), phase_epochs=1)
    run(sharp, stream := example_stream())
    with pytest.raises(TypeError, match="SHARP can't tell how strange inputs are: scores that only rank classes give no prob"):
        sharp.novelty(stream.tasks[0].test.x)
    assert not sharp.tells_novelty(("label",)) and not Finetune(example_model()).tells_novelty(("value",))


def test_a_measure_of_novelty_is_refused_where_there_is_none() -> None:
    for target in ("label", "value"):
        plain = example_stream(target=target)
        odd = TestSet("odd", Samples(plain.tasks[0].test.x, plain.tasks[0].test.y, target=target), known=False)
        stream = Stream("open", plain.tasks, probes=[odd])
        strategy = SHARP(Mlp((1, 8, 8), 6, hidden=(40, 40))) if target == "label" else Finetune(example_model())
        with pytest.raises(
            ValueError, match=f"auroc needs how strange a sample is, and the .* {type(strategy).__name__} .*don't say"
        ):
            run(strategy, stream, measures=["auroc"])
    learned = run(PRD(example_model()), Stream("open", example_stream().tasks, probes=[odd_set()]), measures=["accuracy", "auroc"])
    assert 0 <= float(learned.measured["auroc"][-1, learned.test_sets.index("noise")]) <= 1


def odd_set() -> TestSet:
    x = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TestSet("noise", Samples(x, torch.zeros(20, dtype=torch.int64)), known=False)


def test_wrappers_answer_as_what_they_wrap() -> None:
    stream = example_stream()
    x = stream.tasks[0].test.x
    for base in (Replay(example_model()), PRD(example_model())):
        wrapped = (
            Regularised(base, [FeatKDPenalty(0.1)]) if isinstance(base, Replay) else Refresh(base, fisher_weight=0.0, delta=0.0)
        )
        run(wrapped, stream)
        assert wrapped.scores_are == base.scores_are and wrapped.novelty_is_of_scores == base.novelty_is_of_scores
        assert torch.equal(wrapped.novelty(x), base.novelty(x)) and wrapped.tells_novelty(("label",))


def test_prd_says_how_far_the_nearest_prototype_is() -> None:
    strategy, stream = PRD(example_model()), example_stream()
    x = stream.tasks[0].test.x
    assert strategy.novelty(x).tolist() == [2.0] * len(x)  # there is none yet
    run(strategy, stream)
    features, prototypes = strategy.model.features(x), strategy.prototypes.weight
    cosines = F.cosine_similarity(features[:, None], prototypes[None], dim=2)
    torch.testing.assert_close(strategy.novelty(x), 1 - cosines.amax(1).detach())


def test_a_hypernetwork_says_the_entropy_that_the_task_is_chosen_by() -> None:
    strategy, stream = make("Hypernetwork")(example_model()), example_stream()
    assert isinstance(strategy, Hypernetwork)
    run(strategy, stream)
    x = stream.tasks[0].test.x
    entropies = []
    for task in stream.tasks:
        logits = strategy.scores(x, task)[:, list(task.classes)]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(strategy.novelty(x), torch.stack(entropies).amin(0))
    assert strategy.novelty_is_of_scores


def test_tame_asks_all_experts_as_one_mixture() -> None:
    stream = example_stream(boundaries=False)
    strategy = TAME(example_model(), partial(SGD, lr=0.1), window=10, selector_epochs=20, retrain_epochs=10, selector_sparsity=0.2)
    run(strategy, stream)
    x = stream.tasks[0].test.x

    def mixture() -> Tensor:
        experts = [expert.model(x).softmax(1) for expert in strategy.experts]
        shares = strategy.trained_selector()[0](x).softmax(1) if len(experts) > 1 else torch.ones(len(x), 1)
        return 1 - torch.einsum("ne,enc->nc", shares, torch.stack(experts)).amax(1)

    torch.testing.assert_close(strategy.novelty(x), mixture().detach())
    assert not strategy.novelty_is_of_scores and strategy.novelty(x).shape == (20,)
    if len(strategy.experts) == 1:
        strategy.experts.append(strategy.new_expert())
        strategy.memory.add(Samples(x, torch.arange(len(x)) % 12))
        torch.testing.assert_close(strategy.novelty(x), mixture().detach())
