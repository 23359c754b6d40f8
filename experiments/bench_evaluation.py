"""What an evaluation costs with many tasks: `python experiments/bench_evaluation.py [--tasks 10 100 1000 3000]`.

Prints, for 10, 100 and 1,000 tasks, or others, of 20 test samples each, all with the outputs of the most, what one evaluation takes
beside a bare forward pass and argmax over the same samples in chunks of the same size: the median of the repeats, both in turns.
Budget: at most 1.2 times the bare pass, and for 1,000 tasks at most 12 times what 100 take.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from clstream.strategies import Finetune
from clstream.streams import from_tensors
from torch import Tensor

from clstream import Stream
from clstream.evaluation import CHUNK, Questions, evaluate
from clstream.models import Mlp


def stream_of(tasks: int, samples: int, inputs: int, boundaries: bool) -> Stream:
    """Return a stream of tasks of one class each."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(tasks).repeat_interleave(samples)
    x = torch.randn(len(y), inputs, generator=draw)
    return from_tensors(x[::samples], y[::samples], x, y, tasks=tasks, boundaries=boundaries)


def bare(model: Mlp, x: Tensor) -> Tensor:
    """Return the labels that a model gives, by forward pass and argmax alone."""
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(1) for chunk in x.split(CHUNK)])


def seconds(action: Callable[[], object]) -> float:
    """Return how long something takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=(10, 100, 1000))
    parser.add_argument("--samples", type=int, default=20, help="test samples of a task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.threads} threads, median of {options.repeats}")
    for boundaries in (True, False):
        medians: dict[int, float] = {}
        for tasks in options.tasks:
            stream = stream_of(tasks, options.samples, 256, boundaries)
            torch.manual_seed(0)
            model = Mlp(stream.input_shape, max(options.tasks), hidden=(256,))
            strategy = Finetune(model)
            x = torch.cat([task.test.x for task in stream.tasks])
            began = time.perf_counter()
            questions = Questions(strategy, stream)
            laid_out = time.perf_counter() - began
            sides = (partial(bare, model.eval(), x), partial(evaluate, strategy, stream, questions))
            for side in sides:
                side()
            pairs = [(seconds(sides[0]), seconds(sides[1])) for _ in range(options.repeats)]
            by_hand, medians[tasks] = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(ours / theirs for theirs, ours in pairs)
            print(
                f"{'shown' if boundaries else 'hidden'} boundaries, {tasks:5,} tasks   bare {1000 * by_hand:8.1f} ms   evaluation "
                f"{1000 * medians[tasks]:8.1f} ms   ratio {ratio:5.2f} (budget 1.20)   laid out once {1000 * laid_out:7.1f} ms",
                flush=True,
            )
        if {100, 1000} <= medians.keys():
            print(f"1,000 tasks take {medians[1000] / medians[100]:.1f} times as long as 100 (budget 12)", flush=True)


if __name__ == "__main__":
    main()
