"""The bench: the loops by hand do what the strategies do, and end in the same weights; the table has what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.experiments import loops_by_hand
from clstream.experiments.bench_cells import CELLS, plain
from clstream.experiments.bench_methods import measure, row_of
from clstream.experiments.bench_table import line, save
from clstream.strategies import EWC, DERpp, Finetune, LwF, Replay
from clstream.streams import from_tensors
from torch.optim import SGD

from clstream import Strategy, run
from clstream.models import Mlp
from clstream.seeds import derive

SEED = 3

Loop = Callable[..., loops_by_hand.Spent]

PAIRS: dict[str, tuple[Callable[..., Strategy], Loop]] = {
    "fine-tune": (Finetune, loops_by_hand.finetune),
    "replay": (
        partial(Replay, capacity=50),
        partial(loops_by_hand.replay, capacity=50, seed=derive(SEED, "Replay.memory.random")),
    ),
    "DER++": (
        partial(DERpp, capacity=50),
        partial(loops_by_hand.derpp, capacity=50, alpha=0.5, beta=0.5, seed=derive(SEED, "DERpp.memory.random")),
    ),
    "EWC": (partial(EWC, strength=10.0), partial(loops_by_hand.ewc, strength=10.0)),
    "LwF": (LwF, partial(loops_by_hand.lwf, temperature=2.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_loop_by_hand_ends_in_the_weights_of_the_strategy(name: str) -> None:
    strategy, loop = PAIRS[name]
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (330, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(330) % 6
    stream = from_tensors(x[30:], y[30:], x[:30], y[:30], tasks=3, batch_size=16)
    torch.manual_seed(0)
    network = Mlp(stream.input_shape, 6, hidden=(20, 20))
    other, first = deepcopy(network), [weight.clone() for weight in network.parameters()]
    result = run(strategy(network, optimizer=partial(SGD, lr=0.1)), stream, seed=SEED)
    spent = loop(plain(other), loops_by_hand.data_of(stream, SEED), lr=0.1)
    torch.testing.assert_close(list(other.parameters()), list(network.parameters()), rtol=1e-5, atol=1e-6)
    assert spent.accuracy == pytest.approx(result.average_accuracy, abs=1e-6)
    assert any((weight - before).abs().max() > 0.01 for weight, before in zip(network.parameters(), first, strict=True))


def test_the_bench_measures_a_cell_and_saves_its_table(tmp_path: Path) -> None:
    cell = replace(next(cell for cell in CELLS if cell.against == "by hand"), samples=100)
    ours, other = measure(cell, turns=2)
    row = row_of(cell, ours, other) | {"peak_mib": 1.0, "peak_mib_other": 1.0}
    assert row["wall_least"] <= row["wall_ratio"] <= row["wall_greatest"] and row["cpu_seconds"] > 0
    spent = [sum(parts) for parts in zip(ours.learning, ours.consolidating, ours.evaluating, strict=True)]
    assert all(0 < seconds <= wall for seconds, wall in zip(spent, ours.wall, strict=True))
    assert cell.name in line(row, busy=False)
    save([row], {"torch": torch.__version__}, tmp_path)
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["rows"] == [row] and saved["environment"] == {"torch": torch.__version__}
    assert (tmp_path / "bench.csv").read_text().startswith("cell,batch,against") and (tmp_path / "bench.png").stat().st_size > 0
