"""The parameters of a run by name, for MLflow, results and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from clstream.adapters import adapter_params, adapters_of
from clstream.attributes import find_all, walk
from clstream.events import RunStarted
from clstream.params import HasParams, flat
from clstream.strategy import Strategy
from clstream.stream import Stream, Subset


def run_params(
    strategy: Strategy, stream: Stream, seed: int, device: str | torch.device
) -> dict[str, str | int | float | bool | None]:
    """Return the parameters of a run by name: those of strategy, model and stream, the seed and the device."""
    model = getattr(strategy, "model", None)
    return {
        **flat(strategy, "strategy"),
        **(flat(model, "model") if isinstance(model, HasParams) else {"model": type(model).__name__}),
        **(adapter_params(model, "model.") if isinstance(model, nn.Module) else {}),
        "stream": stream.name,
        "stream.tasks": "unknown" if stream.arrives else len(stream.tasks),
        "stream.sessions": "unknown" if stream.arrives else len(stream),
        "stream.scenario": stream.scenario,
        "stream.epochs": stream.epochs,
        "stream.batch_size": stream.batch_size,
        "stream.boundaries": stream.boundaries,
        **({"stream.drop_last": True} if stream.drop_last else {}),
        **_drawn(stream),
        "seed": seed,
        "device": str(device),
    }


def params_of(started: RunStarted) -> dict[str, str | int | float | bool | None]:
    """Return the parameters of a run that begins, and those options of the engine that are not as by default."""
    options = {} if started.run is None else started.run.options
    return run_params(started.strategy, started.stream, started.seed, started.stream.device or "cpu") | options


def _drawn(stream: Stream) -> dict[str, str | int | float | None]:
    """Return how many training images of each class were drawn from a folder, if not all are taken."""
    options = stream.data.options if stream.data is not None and stream.data.loader == "image_folder" else {}
    return {"stream.train_per_class": options["train_per_class"]} if "train_per_class" in options else {}


def built_from(strategy: Strategy, stream: Stream) -> Iterator[object]:
    """Yield the objects that a strategy and a stream are built from, whose code may be the user's own."""
    for _, value in walk(strategy):
        yield value
        if isinstance(value, nn.Module):
            yield from adapters_of(value)
        if isinstance(value, HasParams):
            yield from (param for _, param in walk(dict(getattr(value, "params", {}))))
    parts = [part for task in stream.tasks for part in (task.train, task.test, task.validation)]
    parts += [probe.samples for probe in stream.probes]
    yield stream
    for held_by_stream in (stream.augment, stream.schedule, *(part.transform for part in parts if isinstance(part, Subset))):
        yield from (value for _, value in walk(held_by_stream))


def weight_shapes_hash(strategy: Strategy) -> str:
    """Return a hash of the names, shapes and types of all weights."""
    lines = [
        f"{path}.{name} {tuple(tensor.shape)} {tensor.dtype}"
        for path, module in find_all(strategy, nn.Module)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
