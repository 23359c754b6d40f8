"""Precision and determinism: bfloat16 within networks and nowhere else, deterministic algorithms only, and torch as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import built, make
from torch import Tensor, nn

from clstream import BatchLearned, Result, Samples, SessionStarted, Strategy, Stream, on, run
from clstream.bus import Event
from clstream.checkpoint.compare import difference
from clstream.checks import example_stream
from clstream.checks.recorders import Checkpoints
from clstream.cli import main
from clstream.engine import OtherRunError
from clstream.engine.numerics import NotDeterministicError
from clstream.events import RunEnded


def short() -> Stream:
    return example_stream((0, 1, 0, 2), epochs=2, batch_size=16)


def tensors(state: object) -> Iterator[Tensor]:
    """Yield all tensors in a state of plain values."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (Mapping, list, tuple)):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from tensors(value)


def played(name: str, *observers: object, **options: Any) -> tuple[Result, Strategy]:
    strategy = built(make(name))
    return run(strategy, short(), *observers, **options), strategy


@pytest.mark.parametrize("name", ["Finetune", "Replay", "DERpp", "EWC", "LwF", "L2", "SHARP", "RanPAC", "Hypernetwork"])
def test_bfloat16_is_within_networks_alone(name: str) -> None:
    checkpoints, losses = Checkpoints(every=0), Losses()
    (lower, there), (exact, here) = played(name, checkpoints, losses, precision="bf16"), played(name)
    assert not any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors(checkpoints.load(-1)))
    assert {loss.dtype for loss in losses.heard} == {torch.float32} and not torch.is_autocast_enabled("cpu")
    assert float((lower.accuracy - exact.accuracy).nan_to_num().abs().mean()) <= 0.05
    assert lower.params["precision"] == "bf16" and "precision" not in exact.params
    assert torch.equal(lower.cost.flops, exact.cost.flops)
    weights = [torch.cat([weight.flatten() for weight in strategy.model.parameters()]) for strategy in (there, here)]
    assert not torch.equal(*weights) or name in ("SHARP", "RanPAC", "Hypernetwork")
    torch.testing.assert_close(*weights, rtol=0.1, atol=0.05)


class Losses:
    """Keeps the losses."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    @on(BatchLearned)
    def keep(self, event: BatchLearned) -> None:
        self.heard.append(event.loss)


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_exactly_and_as_one_in_bfloat16_alone() -> None:
    whole = Checkpoints()
    expected, _ = played("DERpp", whole, precision="bf16")
    for number in range(1, len(whole.written) - 1, 5):
        rest = Checkpoints(every=0)
        result, _ = played("DERpp", rest, precision="bf16", resume=whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None and torch.equal(result.accuracy, expected.accuracy)
    with pytest.raises(OtherRunError, match="precision was 'bf16', now it is None"):
        played("DERpp", resume=whole.load(1))


class Layer(nn.Module):
    """Notes what its inputs, its products and those of the layer in it are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dtypes = nn.Linear(8, 8), list[torch.dtype]()

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return a product and an input."""
        product = x @ x.T
        self.dtypes = [x.dtype, product.dtype, self.inner(x).dtype]
        if product.isnan().any():
            raise ValueError("NaN")
        return {"product": (product, [self.inner(x)]), "x": x}


class Probing(Strategy):
    """Calls a layer of its own where it learns, where it answers, and in a handler."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layer, self.given = Layer(), dict[str, list[torch.dtype]]()

    def note(self, where: str) -> None:
        """Note the types within and without the layer."""
        x = torch.randn(4, 8)
        with pytest.raises(ValueError, match="NaN"):
            self.layer(x * torch.nan)
        returned = self.layer(x)
        self.given[where] = [*self.layer.dtypes, *(tensor.dtype for tensor in tensors(returned)), (x @ x.T).dtype]

    def loss(self, samples: Samples) -> Tensor:
        """Note, and fine-tune."""
        self.note("learning")
        return super().loss(samples)

    def scores(self, x: Tensor, task: Any = None) -> Tensor:
        """Note, and answer."""
        self.note("evaluating")
        return super().scores(x, task)

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        """Note."""
        self.note("handling")


def test_modules_compute_in_bfloat16_and_return_float32() -> None:
    strategy = built(Probing)
    run(strategy, short(), precision="bf16", max_sessions=1)
    low, full = torch.bfloat16, torch.float32
    assert strategy.given["learning"] == strategy.given["evaluating"] == [full, low, low, full, full, full, full]
    assert strategy.given["handling"] == [full] * 7
    modules = nn.modules.module
    assert not modules._global_forward_hooks and not modules._global_forward_pre_hooks


class Permutes(Strategy):
    """Learns with an operation that has no deterministic form."""

    def loss(self, samples: Samples) -> Tensor:
        """Fine-tune."""
        torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))
        return super().loss(samples)


class Ended:
    """Keeps the error of a run."""

    error: BaseException | None = None

    @on(RunEnded)
    def keep(self, event: RunEnded) -> None:
        self.error = event.error


def test_deterministic_algorithms_only() -> None:
    class Asks:
        """Asks torch while the run goes on."""

        asked: bool | None = None

        @on(Event)
        def ask(self, event: Event) -> None:
            if not isinstance(event, RunEnded):
                self.asked = torch.are_deterministic_algorithms_enabled()

    asks = Asks()
    result, _ = played("Replay", asks, deterministic=True)
    assert asks.asked is True and not torch.are_deterministic_algorithms_enabled() and result.params["deterministic"] is True
    assert torch.equal(result.accuracy, played("Replay")[0].accuracy)
    ended = Ended()
    with pytest.raises(NotDeterministicError, match="put_ has no deterministic form on cpu, and the run was to be deterministic:"):
        run(built(Permutes), short(), ended, deterministic=True)
    assert isinstance(ended.error, NotDeterministicError) and not torch.are_deterministic_algorithms_enabled()
    run(built(Permutes), short(), max_sessions=1)
    try:  # what the caller has set is set again
        torch.use_deterministic_algorithms(True, warn_only=True)
        played("Finetune", deterministic=True, max_sessions=1)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf8"}, "precision must be one of fp32, bf16, not 'bf8'"),
        ({"precision": None}, "precision must be one of fp32, bf16, not None"),
        ({"deterministic": 1}, "deterministic must be True or False, not 1"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    ended = Ended()
    with pytest.raises(ValueError, match=message):
        played("Finetune", ended, **options)
    assert ended.error is None


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blobs = ["--stream", "blobs", "--stream.tasks", "2", "--stream.train_per_class", "8", "--threads", "1"]
    given = ["run", *blobs, "--track", "false"]
    assert main([*given, "--precision", "bf16", "--deterministic", "--strategy", "Finetune"]) == 0
    capsys.readouterr()
    (folder,) = Path("runs").iterdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["precision"], config["deterministic"]) == ("bf16", True)
    log = (folder / "seed_0" / "events.jsonl").read_text()
    assert '"precision":"bf16"' in log.replace(" ", "") and '"deterministic":true' in log.replace(" ", "")
    assert main([*given, "--print_config"]) == 0
    assert "precision" not in (printed := capsys.readouterr().out) and "deterministic" not in printed
    assert main([*given, "--precision", "fp16"]) == 2
    assert "--precision" in capsys.readouterr().err
    Path("mine.py").write_text(
        "import torch\nfrom clstream.strategies import Finetune\n\n\nclass Mine(Finetune):\n    def loss(self, samples):\n"
        "        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))\n        return super().loss(samples)\n"
    )
    assert main([*given, "--strategy", "mine.Mine", "--deterministic", "--checkpoint_every", "0"]) == 1
    assert "clstream: error: put_ has no deterministic form on cpu" in capsys.readouterr().err
