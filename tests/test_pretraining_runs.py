"""Pre-training as a run: the schedule, the linear probe, the card, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import NCM, Finetune, SimCLR
from clstream.streams import blobs, from_tensors, split_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam

from clstream import BatchLearned, Samples, Strategy, Stream, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.engine import OtherRunError
from clstream.models import ConvNet, Mlp
from clstream.pretraining import LearningRateSchedule, ValidationLines, join_tasks, linear_probe, load_weights, pretrain
from clstream.pretraining.weights import ranges
from clstream.seeds import isolated

DIGITS = (
    "--stream",
    "split_digits",
    "--model",
    "ConvNet",
    "--model.channels",
    "[4,4,4]",
    "--model.hidden",
    "16",
    "--classes",
    "0-4",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return " ".join((captured.err if status else captured.out).split())


def small(seed: int = 0) -> ConvNet:
    with isolated(seed, "model"):
        return ConvNet((1, 8, 8), 10, channels=(8, 16, 16), hidden=32, mean=0.5, std=0.25)


# The schedule -------------------------------------------------------------------------------------------------------------


class Rates:
    """Keeps the learning rate that each step was taken with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.rates: list[float] = []

    @on(BatchLearned)
    def keep(self, event: BatchLearned) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [0.0, 0.5, 2.0])
def test_the_learning_rate_follows_the_formula(warmup: float) -> None:
    stream = join_tasks(blobs(train_per_class=20), epochs=4)  # 200 samples, 7 batches of 32
    strategy = Finetune(Mlp(20, 10), partial(SGD, lr=0.2))
    strategy.parts = (LearningRateSchedule(strategy.optimizer, warmup=warmup),)
    run(strategy, stream, rates := Rates(strategy.optimizer))
    rise = round(7 * warmup)
    expected = [0.2 * (step + 1) / rise for step in range(rise)]
    expected += [0.2 * (1 + math.cos(math.pi * (step - rise) / (28 - rise))) / 2 for step in range(rise, 28)]
    assert rates.rates == pytest.approx(expected, rel=1e-12) and max(rates.rates) == pytest.approx(0.2)


def test_a_constant_schedule_is_plain_training() -> None:
    stream = join_tasks(blobs(train_per_class=20), epochs=2)
    plain, scheduled = (Finetune(Mlp(20, 10, hidden=(8,))) for _ in range(2))
    scheduled.model.load_state_dict(plain.model.state_dict())
    run(plain, stream)
    card = pretrain(scheduled, stream, schedule="constant")
    assert all(map(torch.equal, plain.model.state_dict().values(), scheduled.model.state_dict().values()))
    assert (card["objective"], card["strategy.schedule"], card["epochs"], card["samples"]) == ("Finetune", "constant", 2, 200)


# The linear probe ---------------------------------------------------------------------------------------------------------


class Double(nn.Module):
    """A model whose features are its inputs, one of them constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[:, :1])], 1) + self.weight


def test_the_linear_probe_is_ridge_regression_in_closed_form() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (3000,), generator=draw)
    x = torch.randn(5, 6, generator=draw)[y] + 1.5 * torch.randn(3000, 6, generator=draw) * torch.arange(1, 7) + 3
    train, test = Samples(x[:2000], y[:2000]), Samples(x[2000:], y[2000:])
    f, g = x[:2000].double(), x[2000:].double()
    mean, scale = f.mean(0), f.std(0, correction=0)
    f, g = (f - mean) / scale, (g - mean) / scale
    targets = torch.eye(5, dtype=torch.float64)[train.y]
    stacked = torch.cat([f, math.sqrt(0.01 * 2000) * torch.eye(6, dtype=torch.float64)])
    weights = torch.linalg.lstsq(stacked, torch.cat([targets - targets.mean(0), torch.zeros(6, 5, dtype=torch.float64)])).solution
    expected = ((g @ weights + targets.mean(0)).argmax(1) == test.y).double().mean()
    model = Double().train()
    assert linear_probe(model, train, test) == float(expected) and model.training
    assert 0.3 < float(expected) < 0.9
    unknown = Samples(test.x, torch.full_like(test.y, 7))
    assert linear_probe(model, train, unknown) == 0.0


# The card, and what a run has of it ---------------------------------------------------------------------------------------


def test_the_card_tells_the_training_and_a_run_shows_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 0, "pretrain", *DIGITS, "--epochs", "2", "--validation", "0.2", "--warmup", "0.5", "--out", "w.pt")
    header = json.loads(torch.load("w.pt", weights_only=True)["header"])
    assert (header["objective"], header["stream"], header["labels"]) == ("supervised", "split_digits", [0, 1, 2, 3, 4])
    assert header["data"] == split_digits(validation=0.2).fingerprint and header["epochs"] == 2 and header["seed"] == 0
    assert (header["strategy.schedule"], header["strategy.warmup"]) == ("cosine", 0.5) and "torch" in header
    assert 0 <= header["linear_probe"] <= 1
    assert f"linear probe {header['linear_probe']:.4f} on the test samples" in text and "classes 5: 0-4" in text
    assert not Path("w.pt.checkpoints").exists()
    model = ConvNet((1, 8, 8), 10, channels=(4, 4, 4), hidden=16)
    load_weights(model, "w.pt")
    stream = join_tasks(split_digits(), range(5))
    assert (
        linear_probe(model, join_tasks(split_digits(validation=0.2), range(5)).tasks[0].train, stream.tasks[0].test)
        == (header["linear_probe"])
    )
    result = run(Finetune(model), join_tasks(split_digits(), range(5), epochs=1))
    shown = {name.removeprefix("model.pretrained"): value for name, value in result.params.items() if ".pretrained" in name}
    assert shown.pop("").startswith("w.pt ")
    assert shown == {
        ".objective": "supervised", ".stream": "split_digits", ".data": header["data"], ".labels": "0-4", ".epochs": 2,
        ".linear_probe": header["linear_probe"], ".seed": 0,
    }  # fmt: skip


def test_labels_are_shown_as_ranges() -> None:
    assert ranges([7, 0, 1, 2, 3, 10, 11]) == "0-3, 7, 10-11" and ranges([]) == ""


def test_validation_samples_are_asked_about_on_the_way() -> None:
    stream, lines = join_tasks(split_digits(validation=0.2), range(3), epochs=3), []
    strategy = Finetune(small())
    card = pretrain(strategy, stream, ValidationLines(lines.append))
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    told = [float(word) for word in lines[-1].replace(",", "").split() if word.startswith(("0.", "1."))]
    task = stream.tasks[0]
    assert told[0] == pytest.approx(float((strategy.predict(task.validation.x) == task.validation.y).double().mean()), abs=1e-4)
    assert told[1] == pytest.approx(linear_probe(strategy.model, task.train, task.validation), abs=1e-4)
    assert card["accuracy"] == pytest.approx(float((strategy.predict(task.test.x) == task.test.y).double().mean()))
    assert len(task.validation) + len(task.train) == len(join_tasks(split_digits(), range(3)).tasks[0].train)
    quiet = Finetune(small())
    pretrain(quiet, stream)
    assert all(map(torch.equal, strategy.model.state_dict().values(), quiet.model.state_dict().values()))


# Stopped, and resumed -----------------------------------------------------------------------------------------------------


class Interrupt:
    """Sends SIGINT after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["supervised", "simclr"])
def test_a_stopped_training_goes_on_bit_for_bit(
    objective: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", *DIGITS, "--objective", objective, "--epochs", "2", "--warmup", "0.5", "--out"]
    said(capsys, 0, *command, "whole.pt")
    import clstream.pretraining.training as training

    plain = training.run
    monkeypatch.setattr(training, "run", lambda *given, **options: plain(*given, Interrupt(80), **options))
    assert main([*command, "w.pt"]) == 130
    assert "to go on, give the same command and --resume" in capsys.readouterr().out
    monkeypatch.setattr(training, "run", plain)
    assert "--resume goes on with it, --force starts anew" in said(capsys, 1, *command, "w.pt")
    said(capsys, 0, *command, "w.pt", "--resume")
    whole, resumed = (torch.load(name, weights_only=True)["weights"] for name in ("whole.pt", "w.pt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and not Path("w.pt.checkpoints").exists()


def test_a_checkpoint_is_of_one_schedule(tmp_path: Path) -> None:
    stream = join_tasks(split_digits(), range(2), epochs=1)
    pretrain(Finetune(small()), stream, Checkpointer(tmp_path / "run"), warmup=0.5)
    with pytest.raises(OtherRunError, match=r"strategy.warmup was 0.5, now it is 0.25"):
        pretrain(Finetune(small()), stream, warmup=0.25, resume=newest(tmp_path / "run"))


# What it is for, and what it refuses --------------------------------------------------------------------------------------


def gratings(seed: int) -> tuple[Tensor, Tensor]:
    """Return 40 noisy images of stripes for each of ten orientations, the phase at random: no mean image tells them apart."""
    draw, i = torch.Generator().manual_seed(seed), torch.arange(8.0)
    y = torch.arange(10).repeat(40)
    angle, phase = math.pi / 10 * y[:, None, None], 2 * math.pi * torch.rand(len(y), 1, 1, generator=draw)
    stripes = (1.6 * (angle.cos() * i[:, None] + angle.sin() * i) + phase).sin()
    return (0.5 + 0.25 * stripes + 0.3 * (torch.rand(stripes.shape, generator=draw) - 0.5))[:, None].clamp(0, 1), y


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Finetune, partial(SimCLR, temperature=0.2, smallest=0.8, jitter=0.0, blur=0.0)])
def test_pretraining_on_other_classes_helps(objective: Callable[..., Strategy]) -> None:
    data = (*gratings(0), *gratings(1))
    even, odd = from_tensors(*data, tasks=1), from_tensors(*data, tasks=[[1, 3], [5, 7, 9]])

    def answered(model: nn.Module) -> float:
        return run(NCM(model), odd).average_accuracy

    strategy = objective(small(), partial(Adam, lr=0.003))
    card = pretrain(strategy, join_tasks(even, [0, 2, 4, 6, 8], epochs=20))
    before, after = answered(small()), answered(strategy.model)
    assert card["linear_probe"] > 0.9 and after > before + 0.1, (card["linear_probe"], before, after)


@pytest.mark.parametrize(
    ("status", "arguments", "sentence"),
    [
        (
            2,
            ["--objective", "simcrl"],
            "no objective 'simcrl': did you mean simclr?; there are supervised, simclr, episodes",
        ),
        (2, ["--objective.temprature", "1"], "Finetune has no option 'temprature'"),
        (2, ["--classes", "0-"], "--classes takes whole numbers with commas, as 0,1,2 or 0-4,7, not '0-'"),
        (1, ["--schedule", "linear"], "schedule must be one of cosine, constant, not 'linear'"),
        (1, ["--warmup", "3"], "warmup must be less than the epochs that there are, 1, not 3"),
        (1, ["--warmup", "-1"], "warmup must be a finite number of at least 0, not -1"),
        (2, ["--validation", "1.5"], "validation must be"),
        (
            1,
            ["--objective", "simclr"],
            "SimCLR learns from images (channels, height, width), and blobs, joined has inputs",
        ),
        (2, ["--resume", "--checkpoint_every", "0"], "without any there is nothing to --resume"),
    ],
)
def test_what_pretrain_refuses(
    place: Path, capsys: pytest.CaptureFixture[str], status: int, arguments: list[str], sentence: str
) -> None:
    tiny = (
        "--stream",
        "blobs",
        "--stream.train_per_class",
        "20",
        "--stream.epochs",
        "1",
        "--model",
        "Mlp",
        "--model.hidden",
        "[16]",
    )
    text = said(capsys, status, "pretrain", *tiny, "--out", "w.pt", *arguments)
    assert text.startswith("clstream: error: ") and sentence in text and text.count("clstream: error: ") == 1
    assert not list(place.iterdir())


def test_a_stream_of_several_sessions_or_of_other_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="example has value targets: pre-training is on labels"):
        pretrain(Finetune(example_model()), example_stream(target="value"))
    with pytest.raises(ValueError, match="blobs has 5 sessions: pre-training is on one, as join_tasks makes it"):
        pretrain(Finetune(Mlp(20, 10)), blobs())


def test_some_classes_of_a_stream_whose_classes_have_names() -> None:
    x, y = torch.rand(40, 3), ["ant", "bee", "cat", "dog"] * 10
    named = from_tensors(x, y, x, y, tasks=2, relabel=True)
    assert isinstance(named, Stream)
    some = join_tasks(named, [0, 2])
    assert some.class_names == ("ant", "bee", "cat") and some.tasks[0].classes == (0, 2)
