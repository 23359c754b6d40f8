"""Compiled steps on a GPU, where each is recorded as a graph."""

from __future__ import annotations

import pytest
import torch
from conftest import built, make

from clstream import run
from clstream.checks import example_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch's advice: float32 is what was asked for
]

DEVICE = "cuda"


@pytest.mark.parametrize("name", ["Finetune", "Replay", "DERpp", "L2", "EWC", "LwF"])
def test_compiled_steps_equal_those_that_are_not(name: str) -> None:
    strategies = built(make(name)), built(make(name))
    stream = example_stream((0, 1), epochs=2, batch_size=16)
    run(strategies[0], stream, device=DEVICE)
    assert run(strategies[1], stream, device=DEVICE, compile=True).cost.compiling_seconds > 0
    for ours, theirs in zip(*(strategy.model.parameters() for strategy in strategies), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
