"""Flower's simulation engine: clients in processes of its own learn what they learn in one process."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from clstream.strategies import NCM, Federated, Finetune
from clstream.streams import blobs, federated

from clstream import run
from clstream.federated import run_on_flower
from clstream.models import Mlp
from clstream.seeds import isolated

needs_flower = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="Flower is not installed: the extra federated")


def test_without_flower_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.clientapp", None)
    with pytest.raises(ImportError, match=r"Flower is not installed: pip install 'clstream\[federated\]', from Python 3.11 on"):
        run_on_flower(Federated(NCM(Mlp(20, 10))), blobs())


@needs_flower
def test_what_has_no_clients_is_refused() -> None:
    with pytest.raises(TypeError, match=r"plays the clients of a Federated\(...\), and NCM has none: wrap it"):
        run_on_flower(NCM(Mlp(20, 10)), blobs())
    with pytest.raises(ValueError, match=r"blobs has no clients: take a stream of streams\.federated"):
        run_on_flower(Federated(NCM(Mlp(20, 10))), blobs())


@needs_flower
@pytest.mark.filterwarnings("ignore")  # Flower's own
@pytest.mark.parametrize("make", [NCM, Finetune], ids=["NCM", "Finetune"])
def test_flower_s_clients_learn_what_they_learn_in_one_process(monkeypatch: pytest.MonkeyPatch, make: type[NCM | Finetune]) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine its processes would get no time
    stream = federated(clients=2, rounds=2)

    def strategy() -> Federated:
        with isolated(0, "model"):
            model = Mlp(stream.input_shape, stream.classes, hidden=(16,))
        return Federated(make(model), epochs=2, dropout=0.3)

    run(here := strategy(), stream, seed=2)
    result = run_on_flower(there := strategy(), stream, seed=2, init_args={"num_cpus": 2})
    ours, theirs = here.base.export(), there.base.export()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (here.bytes_up, here.bytes_down) == (there.bytes_up, there.bytes_down)
    assert result.average_accuracy == run(strategy(), stream, seed=2).average_accuracy
