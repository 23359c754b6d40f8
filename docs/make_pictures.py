"""Render the pictures of the documentation: `python docs/make_pictures.py`. The same versions give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import split_digits
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from clstream import Result, Strategy, run
from clstream.figures import forgetting_curves
from clstream.models import Mlp
from clstream.seeds import isolated

FOLDER = Path(__file__).parent / "images"


def play(method: Callable[[nn.Module], Strategy]) -> Result:
    """Run a method on the digits: seed 0 of the two configs of `make run`."""
    stream = split_digits()
    with isolated(0, "model"):
        model = Mlp(stream.input_shape, stream.classes, hidden=(100, 100))
    return run(method(model), stream, seed=0)


def picture(result: Result, title: str) -> np.ndarray:
    """Return the forgetting curves of a run as (height, width, 3) bytes."""
    figure = forgetting_curves(result.main, result.taught, title)
    figure.set_size_inches(7.5, 3.6)
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def main() -> None:
    """Render fine-tuning above, and replay below."""
    torch.set_num_threads(1)
    above = picture(play(Finetune), "Finetune on split_digits")
    below = picture(play(partial(Replay, capacity=200)), "Replay (capacity 200) on split_digits")
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "forgetting-curves.png"
    image.imsave(file, np.ascontiguousarray(np.vstack([above, below])), metadata={"Software": None})


if __name__ == "__main__":
    main()
