"""Where mlflow, jsonargparse, rich, pandas, torchmetrics and PyYAML are not installed: runs go on, and what needs them says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from picture_folders import in_parts

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
from importlib.machinery import PathFinder

ABSENT = ("mlflow", "jsonargparse", "rich", "pandas", "torchmetrics", "yaml", "timm", "plotly", "optuna")


class Hides(PathFinder):
    # as if they were not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Hides

import torch
import clstream, clstream.checks, clstream.evaluation, clstream.models, clstream.recording, clstream.strategies, clstream.streams
from clstream import run
from clstream.checkpoint import Checkpointer, newest
from clstream.cli import main
from clstream.models import Mlp
from clstream.strategies import Finetune, Replay
from clstream.streams import features, from_dataset, image_folder, split_digits
from clstream.tracking import CsvTracker, EventLog


def said(call):
    try:
        call()
    except ImportError as error:
        return type(error).__name__, str(error)


torch.set_num_threads(1)
pets = image_folder("pets", tasks=2, train_per_class=4)
log, tracker, checkpointer = EventLog("folder"), CsvTracker("csv"), Checkpointer("folder", every_batches=1)
result = run(Replay(Mlp(pets.input_shape, 4, hidden=(8,))), pets, log, tracker, checkpointer, measures=["top5", "nll"])
assert newest("folder") and result.measured["top5"].shape[0] == 2
samples = torch.utils.data.TensorDataset(torch.rand(20, 3), torch.arange(20) % 2)
assert run(Finetune(Mlp(3, 2, hidden=(8,))), from_dataset(samples, samples, tasks=2)).accuracy.shape == (2, 2)
assert features(pets, Mlp(pets.input_shape, 4, hidden=(8,)), cache="cache").input_shape == (8,)
needed = [
    lambda: run(Finetune(Mlp(64, 10)), split_digits(), measures=["ece"]),
    lambda: __import__("clstream.tracking").tracking.MlflowTracker(),
    lambda: __import__("clstream.progress"),
    result.to_frame,
    result.cost.to_frame,
]
for call in needed:
    print(*said(call))
assert main(["--help"]) == 1
"""


@pytest.mark.slow
def test_what_needs_no_other_package_runs(tmp_path: Path) -> None:
    in_parts(tmp_path / "pets")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "ImportError the measure ece needs the package torchmetrics, which is not installed: pip install torchmetrics",
        "ImportError MlflowTracker needs the package mlflow, which is not installed: pip install mlflow",
        "ImportError the progress bar needs the package rich: pip install rich, or run without a ProgressBar",
        *["ImportError a DataFrame needs the package pandas, which is not installed: pip install pandas"] * 2,
    ]
    assert done.stderr.splitlines()[-1].startswith("clstream: error: the command line needs the package ")
