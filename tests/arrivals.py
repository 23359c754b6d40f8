"""Sessions for the tests of streams that arrive: a class or two of points each, as arrays and as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from clstream.strategies import Replay

from clstream.models import Mlp
from clstream.stream import Arrival

CENTRES = 4 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def session(number: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    y = torch.randint(2 * number % 6, 2 * number % 6 + 2, (size,), generator=draw)
    return CENTRES[y] + torch.randn(size, 3, generator=draw), y


def sessions(count: int = 3):
    return lambda: (session(number) for number in range(count))


def late(number: int) -> tuple[Arrival, Arrival]:
    """Return the inputs of a session, and its labels."""
    x, y = session(number)
    return Arrival(x, name=f"late {number}"), Arrival(None, y, name=f"late {number}")


def write(folder: Path, number: int, **changes: object) -> Path:
    x, y = session(number)
    file = folder / f"{number:02d}.npz"
    arrays = {"x": x.numpy(), "y": y.numpy()} | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def learner() -> Replay:
    torch.manual_seed(0)
    return Replay(Mlp(3, 6, hidden=(8,)), capacity=10)
