"""On a GPU: seeds together end as each seed's own run does."""

from __future__ import annotations

import pytest
import torch
from clstream.strategies import EWC, DERpp, Finetune, LwF, Replay
from clstream.streams import from_tensors

from clstream import Strategy, run, run_seeds
from clstream.models import Mlp
from clstream.seeds import isolated

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("kind", [Finetune, Replay, DERpp, EWC, LwF])
@pytest.mark.filterwarnings("error:the seeds of")
def test_each_seed_ends_as_its_own_run(kind: type[Strategy]) -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(640) % 4
    x = torch.rand(4, 16, generator=draw)[y] + torch.rand(640, 16, generator=draw) / 2
    stream, strategies = from_tensors(x[:480], y[:480], x[480:], y[480:], tasks=2, batch_size=8), dict[int, Strategy]()

    def make(seed: int) -> Strategy:
        strategies[seed] = kind(Mlp(16, 4, hidden=(16,)))
        return strategies[seed]

    for seed, result in enumerate(run_seeds(make, stream, range(4), device=DEVICE)):
        together = strategies[seed]
        with isolated(seed, "model"):
            alone = make(seed)
        single = run(alone, stream, seed=seed, device=DEVICE)
        assert torch.allclose(result.accuracy, single.accuracy, atol=0.05)
        for weight, other in zip(together.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.allclose(weight, other, atol=1e-3) and other.is_cuda
