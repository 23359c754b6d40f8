"""EWC with true, with detected and with no boundaries: `python experiments/detected_boundaries.py [--tune] [--seeds 0,1,2]`.

Permuted MNIST, five tasks of one epoch, in sessions of a sixth of a task, so that no session's end tells of a task's. The rows:

true       the stream shows its boundaries to EWC
detected   the stream hides them, and `WithDetectedBoundaries` tells EWC of those that it finds
none       the stream hides them, and nothing is held: what is left of EWC is fine-tuning

Strengths were chosen for each row on validation samples, with seed 100 (`--tune` shows that); tests saw no choice. Each row is the
mean of the seeds with its 95 % confidence interval (t), and the detected one also says what was detected.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from clstream.strategies import EWC, WithDetectedBoundaries
from clstream.streams import permuted_mnist
from scipy.stats import t as student
from torch.optim import Adam

from clstream import Stream, run
from clstream.models import Mlp
from clstream.online_metrics import Detection
from clstream.seeds import isolated

ROWS = ("true", "detected", "none")
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)


def play(row: str, stream: Stream, seed: int, strength: float, rate: float) -> tuple[float, float, Detection]:
    """Return average accuracy, forgetting and what was detected, of a run of one row."""
    with isolated(seed, "model"):
        net = Mlp(stream.input_shape, stream.classes, hidden=(100, 100), mean=0.1307, std=0.3081)
    ewc = EWC(net, partial(Adam, lr=rate), strength=0.0 if row == "none" else strength)
    seen = Detection()
    result = run(ewc if row == "true" else WithDetectedBoundaries(ewc), stream, seen, seed=seed)
    return result.average_accuracy, result.forgetting, seen


def main() -> None:
    """Run each row, and print it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--true", type=float, default=10.0, help="strength with true boundaries")
    parser.add_argument("--detected", type=float, default=10.0, help="strength with detected ones")
    parser.add_argument("--tune", action="store_true", help="try strengths on validation samples, with seed 100")
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def stream(row: str, validation: float = 0.0) -> Stream:
        return permuted_mnist(
            options.tasks,
            batch_size=128,
            sessions_per_task=6,
            validation=validation,
            root=options.data_root,
            boundaries=row == "true",
        )

    if options.tune:
        for row in ROWS:
            for strength in STRENGTHS if row != "none" else (0.0,):
                try:
                    accuracy, forgetting, _ = play(row, stream(row, 0.1).for_tuning(), 100, strength, options.rate)
                except FloatingPointError as error:  # so strong a penalty needs a smaller rate
                    print(f"{row:9} strength {strength:6g}: {error}", flush=True)
                    continue
                print(f"{row:9} strength {strength:6g}: {accuracy:.4f}, forgetting {forgetting:.4f} (validation)", flush=True)
        return
    seeds = [int(seed) for seed in options.seeds.split(",")]
    print(f"boundaries: average accuracy, forgetting; seeds {options.seeds}")
    for row in ROWS:
        strength = {"true": options.true, "detected": options.detected}.get(row, 0.0)
        results = [play(row, stream(row), seed, strength, options.rate) for seed in seeds]
        cells = []
        for values in zip(*[result[:2] for result in results], strict=True):
            wide = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(values) / len(seeds) ** 0.5
            cells.append(f"{statistics.mean(values):.3f} ± {wide:.3f}")
        print(f"{row:9} {'   '.join(cells)}", flush=True)
        if row == "detected":
            for _, _, seen in results:
                print(f"          {len(seen.alarms)} alarms, {seen.measured}", flush=True)


if __name__ == "__main__":
    main()
