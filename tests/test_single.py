"""A batch of one sample and batch norm: refused before the run where it would fail, and only there."""

from __future__ import annotations

import pytest
import torch
from clstream.strategies import DERpp, Finetune, LwF, Refresh, Replay
from clstream.streams import blobs, drifting, split_digits
from clstream.streams.schedules import Transitions
from torch import Tensor, nn

from clstream import run
from clstream.bus import on
from clstream.engine.single_samples import failing_layer
from clstream.events import RunStarted
from clstream.models import SlimResNet18


def normed(features: int = 20, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))


def of_sizes(batch_size: int = 8, train_per_class: int = 12, **options: object):
    """Return a stream of tasks of 2 x 12 samples: 24 in batches of 8."""
    return blobs(tasks=3, classes=6, train_per_class=train_per_class, batch_size=batch_size, **options)


@pytest.mark.slow
def test_the_default_stream_and_a_batch_norm_network() -> None:
    stream = split_digits(epochs=1)
    model = SlimResNet18(stream.input_shape, stream.classes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"of the 271 samples of session 0 one comes alone, in batches of 10, .*layer4.*drop_last=True"
    ):
        run(Finetune(model), stream)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # nothing was learned
    run(Finetune(SlimResNet18(stream.input_shape, stream.classes)), split_digits(epochs=1, drop_last=True), max_sessions=1)


@pytest.mark.parametrize(
    ("stream", "alone"),
    [
        (of_sizes(), None),
        (of_sizes(23), 0),  # 24 = 23 + 1
        (of_sizes(1), 0),
        (of_sizes(1, drop_last=True), 0),
        (of_sizes(23, drop_last=True), None),
        (of_sizes(24), None),
        (of_sizes(7, schedule=[0, 1, 0, 2]), None),  # 12, 24, 12, 24
        (of_sizes(11, schedule=[0, 1, 0, 2]), 0),  # 12 = 11 + 1
        (of_sizes(23, schedule=[0, 1, 0, 2]), 1),
        (of_sizes(8, sessions_per_task=23), 1),  # the first of each task has 2
        (of_sizes(23, boundaries=False), 0),
        (of_sizes(23, epochs=2), 0),
        (drifting(of_sizes(23), Transitions(0.0), sessions=3), 0),
    ],
)
def test_over_sessions_and_schedules(stream, alone) -> None:
    strategy = Finetune(normed())
    if alone is None:
        run(strategy, stream)
        return
    with pytest.raises(ValueError, match=rf"samples of session {alone} one comes alone.* layer 1 needs two or more"):
        run(strategy, stream)


def test_sessions_that_are_not_played_are_not_looked_at() -> None:
    stream = of_sizes(23, schedule=[0, 1, 0, 2])
    run(Finetune(normed()), stream, max_sessions=1)
    with pytest.raises(ValueError, match="one comes alone"):
        run(Finetune(normed()), stream, max_sessions=2)


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (Replay, True),  # learns it with samples of its memory, in one batch
        (DERpp, False),  # learns it apart from those of its memory
        (lambda model: LwF(model, bn_mode="train"), False),
        (lambda model: LwF(model, bn_mode="eval"), True),
        (lambda model: Refresh(Replay(model), fisher_weight=0.0), False),  # unlearns the batch by itself
        (lambda model: Refresh(DERpp(model), fisher_weight=0.0), False),
    ],
    ids=["Replay", "DERpp", "LwF", "LwF without statistics", "Refresh(Replay)", "Refresh(DERpp)"],
)
def test_what_is_refused_would_fail_and_what_is_not_does_not(make, fits, monkeypatch) -> None:
    if fits:
        assert run(make(normed()), of_sizes(23)).average_accuracy > 0
        return
    with pytest.raises(ValueError, match="one comes alone"):
        run(make(normed()), of_sizes(23))
    monkeypatch.setattr("clstream.engine.compatibility.check_single_samples", lambda *_: None)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        run(make(normed()), of_sizes(23))


def test_images_with_pixels_left_pass() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    run(Finetune(net), split_digits(epochs=1, tasks=2, batch_size=677), max_sessions=1)  # 678 = 677 + 1


def test_a_network_that_only_evaluates_passes() -> None:
    class Frozen(Finetune):
        @on(RunStarted)
        def freeze(self, event: RunStarted) -> None:
            self.model.eval()

    run(Frozen(normed()), of_sizes(23))
    run(Finetune(normed().eval()), of_sizes(23))


def test_networks_without_batch_norm_are_not_asked() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(20, 10), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            answer: Tensor = self.layer(x)
            return answer

    model = Counting()
    run(Finetune(model), of_sizes(23))
    assert model.calls == 6  # as many as batches


def test_trying_it_changes_nothing_of_the_run() -> None:
    class Draws(Replay):
        """Draws from a generator of its own, which the trial must not move."""

        def learn(self, batch):
            torch.rand(1, generator=self.memory.random)
            return super().learn(batch)

    def rows(check: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        with monkeypatch.context() as patch:
            if not check:
                patch.setattr("clstream.engine.compatibility.check_single_samples", lambda *_: None)
            strategy = Draws(normed())
            result = run(strategy, of_sizes(23))
        return [result.accuracy, *strategy.model.state_dict().values()]

    patch = pytest.MonkeyPatch()
    assert all(torch.equal(one, two) for one, two in zip(rows(True, patch), rows(False, patch), strict=True))


def test_the_layer_is_named_and_its_statistics_stay() -> None:
    model = normed()
    assert failing_layer(model, torch.zeros(1, 20)) == "1"
    assert int(model[1].num_batches_tracked) == 0
    assert failing_layer(model, torch.zeros(2, 20)) is None
    assert int(model[1].num_batches_tracked) == 0 and torch.equal(model[1].running_mean, torch.zeros(16))
    assert failing_layer(nn.BatchNorm1d(3), torch.zeros(1, 3)) == "BatchNorm1d"
