"""What fits: whether a strategy can run on a stream, asked before anything is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.bus import members, subscriptions
from clstream.evaluation import check_labels, evaluating
from clstream.samples import apart
from clstream.seeds import isolated
from clstream.strategy import Strategy, needs
from clstream.stream import Stream


def check_fits(
    strategy: Strategy,
    stream: Stream,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    seed: int = 0,
) -> None:
    """Refuse, in one sentence, what can't run: see the errors of `run`."""
    given: tuple[object, object] = (strategy, stream)  # whatever they are annotated as
    if not isinstance(given[0], Strategy):
        what = f"the class {given[0].__name__}" if isinstance(given[0], type) else f"a {type(strategy).__name__}"
        raise TypeError(f"run takes a Strategy object, not {what}")
    if not isinstance(given[1], Stream):
        raise TypeError(f"run takes a Stream as its second argument, not a {type(stream).__name__}")
    for name, value in (("evaluate_every", evaluate_every), ("max_sessions", max_sessions)):
        if value is not None and (not hasattr(value, "__index__") or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, or None, not {value!r}")
    if not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    check_device(device)
    list(subscriptions(strategy))  # refuses handlers and parts that can't be
    for need, reason in needs(strategy).items():
        if not stream.boundaries:
            raise ValueError(f"{type(strategy).__name__} needs {need}, which {stream.name} hides ({reason})")
    for each in members(strategy):
        for regulariser in getattr(each, "regularisers", ()):
            if not any(regulariser is part for part in getattr(each, "parts", ())):
                name = type(each).__name__
                raise ValueError(f"{name} carries what is not among its parts: set {name}.parts to (*self.parts, ...)")
    if type(strategy).learn is Strategy.learn and not isinstance(getattr(strategy, "optimizer", None), Optimizer):
        raise TypeError(f"{type(strategy).__name__} has no optimizer: call super().__init__(model, optimizer) in its constructor")
    check_answers(strategy, stream)


def check_device(device: str | torch.device) -> None:
    """Refuse a device that isn't there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"there is no device {str(device)!r} here, only {', '.join(there)} ({str(error).splitlines()[0]})"
        ) from None


def check_answers(strategy: Strategy, stream: Stream) -> None:
    """Refuse a strategy whose answer to one sample is not what the stream asks for; the caller's generators stay as they are.

    One that overrides `scores` or `predict` may need the start of a run to answer: only the shape of an answer that it gives
    is checked, and the evaluation before the first session tells the rest.
    """
    plain = type(strategy).scores is Strategy.scores and type(strategy).predict is Strategy.predict
    model = getattr(strategy, "model", None)
    if plain and not isinstance(model, nn.Module):
        raise TypeError(f"{type(strategy).__name__} has no model: call super().__init__(model) in its constructor")
    first = apart(stream.tasks[0].test[:1])
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    samples = first if parameter is None else first.to(parameter.device)
    name = type(model).__name__
    with isolated(0, "check"), evaluating(strategy):
        try:
            scores = strategy.scores(samples.x)
        except (RuntimeError, ValueError, TypeError) as error:
            if not plain and not _fails_alike(model, samples.x, error):
                return
            raise ValueError(
                f"{name} can't take the inputs of {stream.name}, {tuple(first.x.shape[1:])} of {first.x.dtype}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        except Exception:  # noqa: BLE001  # its own business until the run has started
            return
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < stream.classes:
        who = name if plain else f"{type(strategy).__name__}.scores"
        raise ValueError(
            f"{who} answers one sample with {shape}, but {stream.name} has {stream.classes} classes: "
            f"build it with classes={stream.classes}"
        )
    if type(strategy).predict is not Strategy.predict:
        with isolated(0, "check"), evaluating(strategy):
            check_labels((strategy.predict(samples.x),), samples, strategy)


def _fails_alike(model: object, x: Tensor, error: Exception) -> bool:
    """Return whether a model can't take inputs for the reason that a strategy gave."""
    try:
        if isinstance(model, nn.Module):
            model(x)
    except Exception as own:  # noqa: BLE001  # whatever the module raises
        return str(own) == str(error)
    return False
