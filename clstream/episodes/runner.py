"""Running a learner through episodes, each from the same start."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clstream.bus import Bus
from clstream.engine import check_fits, run
from clstream.engine.run_params import run_params
from clstream.episodes.outcomes import CLEAN, EpisodeEnded, EpisodeOutcome, EpisodesResult
from clstream.episodes.record import EpisodesRecord
from clstream.episodes.together import check_together, nearest_together, outcomes_together
from clstream.params import check_bool, check_integer, describe
from clstream.pretraining import load_weights
from clstream.seeds import derive, isolated
from clstream.strategy import Strategy
from clstream.stream import Episodes, Samples, Stream, content_hash


def run_episodes(
    make_strategy: Callable[[], Strategy],
    episodes: Episodes,
    *observers: object,
    start: str | Path | nn.Module | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    resume: bool = False,
    batch: int = 1,
) -> EpisodesResult:
    """Run a learner through episodes, each from the same start, ask it once at the end of each, and return what came of them.

    What comes of an episode depends on the start, its number and the seed, not on the other episodes: a learner that is resumed in
    the middle ends as it would have without the break, bit for bit.

    Args:
        make_strategy: builds the learner, around a model for `episodes[0]`; called once, seeded by `seed`.
        episodes: as `clstream.streams.episodes` returns them.
        observers: objects with a handler of `EpisodeEnded`.
        start: the weights that each episode begins with, all but those of the `head`: a file that `clstream pretrain` wrote, a
            model, or its state dict. None: those of the model as it was made.
        seed: of all that is random beside what the episodes draw themselves.
        device: where it runs, as torch names it.
        folder: where the outcome of each episode is written when it is over. None: nowhere.
        resume: whether to go on with what is in the folder.
        batch: how many episodes are computed together; 1: one by one. More are for `ProtoNet`, and for learners that take plain
            steps of SGD, as `Finetune` does, around a model without batch norm and dropout. The numbers are those of one by one,
            but for rounding; `memory_bytes` is not known.

    Raises:
        ValueError, TypeError: if the learner doesn't fit the episodes, or `start` the model; before anything is learned.
        FileExistsError: if the folder has episodes, and these are not to be gone on with.
        OtherRunError: if the folder is of another run; a ValueError.

    """
    check_integer(0, seed=seed)
    check_integer(1, batch=batch)
    check_bool(resume=resume)
    if resume and folder is None:
        raise ValueError("resume=True goes on with the episodes of a folder: name it, folder=...")
    if not isinstance(episodes, Episodes):
        raise TypeError(f"run_episodes takes Episodes, as clstream.streams.episodes returns them, not a {type(episodes).__name__}")
    bus = Bus(*observers)
    first = episodes[0]
    with isolated(index(seed), "model"):
        snapshot = make_strategy()
    if not isinstance(snapshot, Strategy):
        raise TypeError(f"make_strategy must return a Strategy, not a {type(snapshot).__name__}")
    give_start(snapshot, start)
    check_fits(snapshot, first, device, evaluate_at="end")
    if batch > 1:
        check_together(snapshot)
    with EpisodesRecord(folder, identity_of(snapshot, episodes, seed, device, batch), resume) as record:
        for begin in range(0, len(episodes), batch):  # always the same ones together, so that a break changes nothing
            numbers = range(begin, min(begin + batch, len(episodes)))
            if all(number in record.outcomes for number in numbers):
                continue
            if batch > 1:
                outcomes = outcomes_together(snapshot, episodes, numbers, device)
            else:
                outcomes = [run_episode(snapshot, episodes[begin], begin, seed, device)]
            new = [outcome for outcome in outcomes if outcome.index not in record.outcomes]
            record.add(*new)
            for outcome in new:
                bus.emit(EpisodeEnded(outcome))
    ended = tuple(record.outcomes[number] for number in range(len(episodes)))
    return EpisodesResult(type(snapshot).__name__, repr(episodes), episodes.chance, ended)


def identity_of(strategy: Strategy, episodes: Episodes, seed: int, device: str | torch.device, batch: int = 1) -> dict[str, Any]:
    """Return what makes episodes those of one run, in plain values: those of another are not gone on with."""
    params = run_params(strategy, episodes[0], seed, device)
    return {
        "params": {name: describe(value) for name, value in params.items()},
        "start": weights_hash(strategy),
        "episodes": repr(episodes),
        "drawn_from": family_hash(episodes),
        "batch": batch,
    }


def run_episode(
    snapshot: Strategy, stream: Stream, number: int, seed: int = 0, device: str | torch.device = "cpu"
) -> EpisodeOutcome:
    """Run a copy of a learner through one episode, and return what came of it; the learner itself stays as it is."""
    began = time.perf_counter()
    result = run(deepcopy(snapshot), stream, seed=derive("episode", number, seed) >> 1, device=device, evaluate_at="end")
    measured = result.measured["accuracy"][-1].tolist()
    of = dict(zip(result.test_sets, measured, strict=True))
    sets = len(stream.tasks)
    kept = result.cost.memory_bytes
    return EpisodeOutcome(
        index=number, accuracy=of["seen"], by_set=tuple(measured[:sets]),
        corrupted={probe.name: of[probe.name] for probe in stream.probes}, nearest=nearest_neighbour(stream),
        steps=result.rows[-1].batches, memory_bytes=float(kept[-1]) if len(kept) else float("nan"),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def give_start(strategy: Strategy, start: str | Path | nn.Module | Mapping[str, Tensor] | None) -> None:
    """Give a learner's model the weights that it starts from, all but those of its head. Raises ValueError if they don't fit."""
    if start is None:
        return
    model = getattr(strategy, "model", None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(strategy).__name__} has no model that could start from weights")
    if isinstance(start, (str, Path)):
        load_weights(model, start)
        return
    weights = dict(start.state_dict() if isinstance(start, nn.Module) else start)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items() if not name.startswith("head.")}
    if own != given:
        name = next(name for name in [*own, *given] if own.get(name) != given.get(name))
        there, here = given.get(name, "missing"), own.get(name, "missing")
        raise ValueError(f"start does not fit {type(model).__name__}: {name} is {there} there, {here} here")
    model.load_state_dict({name: weights[name] for name in own}, strict=False)


def nearest_neighbour(stream: Stream) -> dict[str, float]:
    """Return the accuracy of the nearest neighbour among raw inputs, of the targets as they are, and by corruption."""
    support = joined([task.train[:] for task in stream.tasks])
    asked = {CLEAN: joined([task.test[:] for task in stream.tasks])} | {probe.name: probe.samples[:] for probe in stream.probes}
    answers = {name: nearest_together(support.x[None], support.y[None], samples.x[None])[0] for name, samples in asked.items()}
    return {name: float((answers[name] == samples.y).double().mean()) for name, samples in asked.items()}


def joined(parts: Sequence[Samples]) -> Samples:
    """Return all samples of some parts in one."""
    return Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def weights_hash(strategy: Strategy) -> str:
    """Return sixteen hexadecimal digits that change with the weights and buffers of a learner's model."""
    digest = hashlib.sha256()
    model = getattr(strategy, "model", None)
    for name, tensor in model.state_dict().items() if isinstance(model, nn.Module) else ():
        digest.update(name.encode() + content_hash(tensor if tensor.dim() else tensor[None]))
    return digest.hexdigest()[:16]


def family_hash(episodes: Episodes) -> str:
    """Return sixteen hexadecimal digits that change with what any episode of a family is."""
    shape = {name: value for name, value in vars(episodes).items() if name not in ("pool", "corruptions", "classes")}
    digest = hashlib.sha256(repr((shape, list(episodes.corruptions))).encode())
    digest.update(content_hash(episodes.pool.x) + content_hash(episodes.pool.y))
    return digest.hexdigest()[:16]
