"""APER against its definition: adapt to the first session, then class means of both networks' features."""

from copy import deepcopy
from functools import partial
from itertools import pairwise

import pytest
import torch
from clstream.strategies import APER, NCM
from clstream.streams import split_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import EpochStarted, on, run
from clstream.adapters import Bottleneck, InputPrompts, LoRA, adapt
from clstream.checkpoint.compare import difference
from clstream.checks.recorders import Checkpoints
from clstream.models import VitTiny

STREAM = split_digits([[0, 1], [2, 3], [4, 5]], epochs=2, batch_size=64)


def vit():
    torch.manual_seed(0)
    return VitTiny((1, 8, 8), 10, patch=4, width=8, depth=2, heads=2)


def means_of(features):
    y = torch.cat([task.train.y for task in STREAM.tasks])
    x = torch.cat([features(task.train.x.float()) for task in STREAM.tasks])
    return torch.stack([x[y == label].mean(0) for label in range(6)])


@pytest.mark.parametrize("make", [lambda: adapt(vit(), Bottleneck(4)), lambda: adapt(vit(), InputPrompts(2)), vit])
def test_it_answers_by_class_means_of_both_networks(make):
    strategy, plain = APER(make(), partial(SGD, lr=0.1)), vit()
    run(strategy, STREAM)

    def both(x):
        return torch.cat([plain.features(x), strategy.model.features(x)], 1).double()

    x = STREAM.tasks[2].test.x.float()
    with torch.no_grad():
        assert not torch.allclose(plain.features(x), strategy.model.features(x))
        expected = F.normalize(both(x), dim=1) @ F.normalize(means_of(both), dim=1).T
    torch.testing.assert_close(strategy.scores(x)[:, :6], expected.float(), rtol=1e-4, atol=1e-5)
    assert strategy.scores(x)[:, 6:].eq(float("-inf")).all()


def test_without_a_step_it_is_simplecil_which_is_ncm_with_the_cosine():
    aper, simplecil = (
        run(strategy, STREAM) for strategy in (APER(adapt(vit(), LoRA()), partial(SGD, lr=0.0)), NCM(vit(), distance="cosine"))
    )
    assert torch.equal(aper.accuracy, simplecil.accuracy)


def test_the_copy_shares_what_is_frozen_and_nothing_learns_after_the_first_session():
    weights = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event):
            weights.append(deepcopy(strategy.model.state_dict()))

    strategy = APER(adapt(vit(), Bottleneck(4)), partial(SGD, lr=0.1))
    cost = run(strategy, STREAM, Watch()).cost
    own, before = dict(strategy.model.named_parameters()), dict(strategy.before.named_parameters())
    shared = {name for name in own if name in before and own[name].data_ptr() == before[name].data_ptr()}
    assert shared == {name for name in own if ".adapter." not in name and not name.startswith("head.")}
    sizes = {name: weight.numel() for name, weight in own.items()}
    assert cost.total["parameters"] == sum(sizes.values()) + sizes["head.weight"] + sizes["head.bias"]
    assert cost.total["memory_bytes"] == 8 * (6 + 6 * 16 + 2)  # counts and sums of both networks' features, the first classes
    changed = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in pairwise(weights)]
    assert changed[0] >= {name for name in own if ".adapter." in name}
    assert changed[2:] == [set()] * 3


def test_the_learning_rate_falls_by_a_cosine_epoch_by_epoch():
    rates = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event):
            rates.append(strategy.optimizer.param_groups[0]["lr"])

    strategy = APER(adapt(vit(), LoRA()), partial(SGD, lr=0.4))
    run(strategy, STREAM, Watch())
    assert rates[:2] == pytest.approx([0.4, 0.2])


@pytest.mark.slow
def test_it_resumes_within_the_first_session_and_after_it():
    def make():
        return APER(adapt(vit(), LoRA(modules="*.attention.*")), partial(SGD, lr=0.1, momentum=0.9))

    run(make(), STREAM, checkpoints := Checkpoints(every=3))
    for number in (1, len(checkpoints.written) - 3):
        run(make(), STREAM, rest := Checkpoints(every=0), resume=checkpoints.load(number))
        assert difference(checkpoints.load(-1), rest.load(-1)) is None


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="nothing of this VitTiny learns, so APER can't adapt it"):
        APER(vit().requires_grad_(False))
    with pytest.raises(ValueError, match="schedule must be one of cosine, constant"):
        APER(vit(), schedule="linear")
    with pytest.raises(TypeError, match="needs a model with a method `features`"):
        APER(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="learners of APER adapt networks of their own"):
        APER(vit()).export()
