"""Building what parsed options name: seeds, observers, the stream, the model and the strategy."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace
from torch import nn

from clstream.adapters import adapt
from clstream.cli.errors import UsageError
from clstream.cli.lookup import PLACES, measure_of, observer_class
from clstream.cli.option_parser import Parser
from clstream.cli.settings import parse_seeds, split_names
from clstream.cli.training_options import training_of
from clstream.measures import Measure
from clstream.models import Linear
from clstream.pretraining import load_weights, weights_header
from clstream.seeds import isolated
from clstream.strategy import Strategy
from clstream.stream import Stream


def seeds_of(options: Namespace) -> list[int]:
    """Return the seeds to run. Raises UsageError for what are not distinct whole numbers."""
    return [options.seed] if options.seeds is None else parse_seeds(options.seeds)


def observers_of(options: Namespace) -> list[Callable[[], object]]:
    """Return the classes of the observers that were asked for by name. Raises UsageError for what is none."""
    return [observer_class(name, options.trust) for name in split_names(options.observers)] if options.observers else []


def measures_of(options: Namespace) -> list[str | type[Measure]]:
    """Return the measures that were asked for, as `run` takes them. Raises UsageError for what is none."""
    return [measure_of(name, options.trust) for name in split_names(options.measures)] if options.measures else []


def numerics_of(options: Namespace) -> dict[str, Any]:
    """Return how a run is to compute, as `run` takes it."""
    return {
        "precision": options.precision or "fp32",
        "deterministic": bool(options.deterministic),
        "compile": bool(options.compile),
    }


def steps_of(options: Namespace) -> dict[str, Any]:
    """Return how a run is to compute and to take its steps, as `run` takes it."""
    return {**numerics_of(options), "train": training_of(options)}


def build_stream(parser: Parser, options: Namespace, adapt: Callable[[Stream], Stream] | None = None) -> Stream:
    """Return the stream that was asked for, with its probes, or its features; `adapt` makes another one of it before these.

    Raises UsageError for options that it can't have.
    """
    chosen = options.stream
    if options.data_root and "root" in chosen.init_args and chosen.init_args.root is None:
        chosen.init_args.root = options.data_root
    stream: Stream = _instantiate(parser, "stream", chosen)
    stream = stream.for_tuning() if options.tune else stream
    stream = stream if adapt is None else adapt(stream)
    if options.probes:
        probes_from = importlib.import_module(f"{PLACES['stream']}.probes").probes_from
        try:
            stream = stream.with_probes(probes_from(stream, split_names(options.probes), options.data_root))
        except ValueError as error:
            raise UsageError(f"--{error}" if str(error).startswith("probes") else f"--probes: {error}") from error
    if options.features:  # of one network, whatever the seeds: it is no part of what is run
        with isolated(seeds_of(options)[0], "model"):
            backbone = build_model(parser, options, stream)
        stream = importlib.import_module(PLACES["stream"]).features(stream, backbone)
    return stream


def build_model(parser: Parser, options: Namespace, stream: Stream, outputs: int | None = None) -> nn.Module:
    """Return the model that was asked for, for the stream, or with other outputs; its weights are random, or those of a file."""

    def make_model(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        parameters = inspect.signature(cls).parameters
        offered = {"input_shape": stream.input_shape, "classes": outputs or stream.outputs}
        return cls(*args, **{name: value for name, value in offered.items() if name in parameters}, **kwargs)

    model: nn.Module = _instantiate(parser, "model", options.model, (make_model, nn.Module, True))
    adapted = options.weights is not None and "adapter" in weights_header(options.weights)  # it has weights of adapters too
    if options.weights is not None and not adapted:
        load_weights(model, options.weights)
    if options.adapter is not None:
        if options.features:
            raise UsageError("--features freezes the whole model, so that nothing of --adapter would learn: leave one of them out")
        try:
            adapt(model, _instantiate(parser, "adapter", options.adapter))
        except ValueError as error:
            raise UsageError(f"--adapter: {error}") from error
    if adapted:
        load_weights(model, options.weights)
    return model


def build_strategy(parser: Parser, options: Namespace, stream: Stream, seed: int, outputs: int | None = None) -> Strategy:
    """Return the strategy that was asked for, with a model for the stream whose initial weights come from the seed.

    A model of a run that is continued has as many `outputs` as it had at first, and gets more when all is as it was.
    """

    def make_strategy(cls: type[Strategy], *args: Any, **kwargs: Any) -> Strategy:
        if "model" in inspect.signature(cls).parameters:
            kwargs["model"] = model
        return cls(*args, **kwargs)

    with isolated(seed, "model"):
        if options.features:
            model: nn.Module = Linear(stream.input_shape, outputs or stream.outputs)
        else:
            model = build_model(parser, options, stream, outputs)
        strategy: Strategy = _instantiate(parser, "strategy", options.strategy, (make_strategy, Strategy, True))
    return strategy


def _instantiate(parser: Parser, kind: str, chosen: Namespace, *instantiators: tuple[Any, type, bool]) -> Any:
    """Build one thing. Raises what its constructor raised, without jsonargparse's report around it.

    A ValueError is about the options, so it becomes a UsageError, but for a recording: there it is about the file.
    """
    try:
        return parser.instantiate(Namespace(**{kind: chosen}), instantiators=list(instantiators))[kind]
    except Exception as error:  # noqa: BLE001  # jsonargparse wraps whatever it was
        cause: BaseException = error
        while cause.__cause__ is not None or (cause.__context__ is not None and not cause.__suppress_context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]  # one of them is there
        if isinstance(cause, ValueError) and chosen.class_path != f"{PLACES['stream']}.recorded":
            raise UsageError(str(cause)) from cause
        raise cause from None
