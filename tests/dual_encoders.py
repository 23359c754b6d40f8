"""A small CLIP that knows the classes of the example stream by their names: what a file of weights would bring."""

from __future__ import annotations

from pathlib import Path

import torch
from clstream.strategies import CPECLIP
from torch import nn
from torch.nn import functional as F

from clstream.checks import example_stream
from clstream.models import Clip
from clstream.seeds import isolated

NAMES = ["ape", "bee", "cat", "dog", "eel", "fox"]
TOWERS = Path(__file__).parent / "towers.json"
WEIGHTS = Path(__file__).parent / "towers.pt"


def small_clip(head: str = "fixed", classes: int = 6) -> Clip:
    """Return a small CLIP with random weights, always the same."""
    with isolated(0, "model"):
        return Clip((1, 8, 8), classes, str(TOWERS), "random", head)


def train_towers() -> dict[str, torch.Tensor]:
    """Return the weights of towers that were trained on the classes of the example stream and their names, beside prompts.

    Rounding in another process, of another machine, leads to other towers, so those that tests take are kept in a file:
    `python tests/dual_encoders.py` writes it.
    """
    with isolated(0, "towers"):
        model = small_clip()
        strategy, samples = CPECLIP(model, prompts=2, depth=1), [task.train[:] for task in example_stream().tasks]
        strategy.tokens = model.tokens([f"{name}." for name in NAMES])
        x, y = torch.cat([part.x for part in samples]), torch.cat([part.y for part in samples])
        optimizer = torch.optim.Adam(model.clip.requires_grad_(True).parameters(), lr=0.01)
        for _ in range(150):
            nn.init.xavier_uniform_(strategy.bank.weight)
            strategy.map.reset_parameters()
            rows = torch.randperm(len(x))[:48]
            cosines = strategy.encode_images(x[rows]) @ strategy.encode_names(torch.arange(6)).T
            optimizer.zero_grad()
            F.cross_entropy(10 * cosines, y[rows]).backward()
            optimizer.step()
    return {name: weight.detach().clone() for name, weight in model.clip.state_dict().items()}


def trained_clip(head: str = "fixed") -> Clip:
    """Return the trained one."""
    model = small_clip(head)
    model.clip.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(train_towers(), WEIGHTS)
