"""Files of weights that runs can start from.

A file is read by `torch.load(weights_only=True)`, which runs no code. It has a header, JSON text that says what was trained, and
the state dict of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

import clstream
from clstream.adapters import adapter_params
from clstream.files import write_atomically
from clstream.params import HasParams, describe
from clstream.serialization import torch_files

FORMAT = "clstream weights 1"

SHOWN = ("objective", "stream", "data", "labels", "epochs", "linear_probe", "seed")
"""What a run that starts from a file has of its header among its params, as `model.pretrained.objective`."""


def save_weights(model: nn.Module, file: str | Path, about: Mapping[str, Any]) -> Path:
    """Write a model's weights to a file, atomically. Raises OSError, which names the file.

    Args:
        model: whose state dict is kept.
        file: what is written; one that is there is replaced.
        about: what else the header says, in plain values.

    """
    file = Path(file)
    params = getattr(model, "params", {}) if isinstance(model, HasParams) else {}
    header = (
        {
            "format": FORMAT,
            "model": type(model).__name__,
            "params": {name: describe(value) for name, value in params.items()},
            "clstream": clstream.__version__,
            "torch": torch.__version__,
        }
        | adapter_params(model)
        | dict(about)
    )
    content = {"header": json.dumps(header), "weights": {name: weight.cpu() for name, weight in model.state_dict().items()}}
    try:
        write_atomically(file, lambda out: torch.save(content, out))
    except OSError as error:
        raise OSError(f"{file} can't be written: {os.strerror(error.errno) if error.errno else error}") from None
    return file


def load_weights(model: nn.Module, file: str | Path) -> dict[str, Any]:
    """Give a model the weights of a file, all but those of its `head`, which stays as it is; return the file's header.

    A model of ours has it among its params from then on, as `pretrained`: what the file is called, and a hash of it; and as
    `pretrained.objective` and so on what its header says of `SHOWN`.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is no file of weights, or they don't fit; then the model stays as it was.

    """
    file = Path(file)
    header, weights, digest = _read(file)
    mine = {name: weight for name, weight in model.state_dict().items() if not name.startswith("head.")}
    theirs = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
    for name in [*mine, *theirs]:
        shapes = [str(tuple(state[name].shape)) if name in state else "missing" for state in (theirs, mine)]
        if shapes[0] == shapes[1]:
            shapes = [str(state[name].dtype) for state in (theirs, mine)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the weights {file} are of {header['model']}, and don't fit {type(model).__name__}: {name} is {shapes[0]} there, "
                f"{shapes[1]} here; build the model as it was trained: {header['params']}{_adapters(header)}"
            )
    model.load_state_dict(theirs, strict=False)
    if isinstance(model, HasParams):
        model.params["pretrained"] = f"{file.name} {digest}"
        model.params |= {f"pretrained.{name}": _line(header[name]) for name in SHOWN if name in header}
    return header


def weights_header(file: str | Path) -> dict[str, Any]:
    """Return the header of a file of weights: what was trained, and how. Raises as `load_weights`."""
    return _read(Path(file))[0]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return the header of a file of weights, the weights by name, and a hash of the file. Raises as `load_weights`."""
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        content = torch_files.load(file)
    except OSError as error:
        raise OSError(f"the weights {file} can't be read: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, UnpicklingError):
        content = None
    try:
        header: dict[str, Any] = json.loads(content["header"])
        weights: dict[str, Tensor] = content["weights"]
        if header["format"] != FORMAT or not {"model", "params"} <= header.keys() or not all(map(_is_weight, weights.items())):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"{file} is no file of weights that `clstream pretrain` wrote") from None
    return header, weights, digest


def _adapters(header: Mapping[str, Any]) -> str:
    """Return the adapters that a header names, as the end of a sentence."""
    options = {name: value for name, value in header.items() if name.startswith("adapter")}
    return f", with {options}" if options else ""


def _line(value: object) -> str | int | float | None:
    """Return what a header says as params show it: in a line of bounded length."""
    if isinstance(value, list) and all(type(item) is int for item in value):
        return ranges(value)[:200]
    return value if value is None or isinstance(value, (int, float)) else str(value)[:200]


def ranges(labels: Iterable[int]) -> str:
    """Return labels as a line, those that follow each other by the first and the last: "0-4, 7"."""
    runs: list[list[int]] = []
    for label in sorted(labels):
        if runs and label == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], label]
        else:
            runs.append([label])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _is_weight(named: tuple[object, object]) -> bool:
    """Return whether an entry is a name, and a tensor whose numbers are there."""
    name, weight = named
    return isinstance(name, str) and isinstance(weight, Tensor) and weight.layout == torch.strided and weight.device.type == "cpu"
