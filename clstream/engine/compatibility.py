"""Compatibility: whether a strategy can run on a stream, checked before anything is learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import index

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_uninitialized
from torch.optim import Optimizer

from clstream.attributes import find_all
from clstream.bus import subscriptions, with_parts
from clstream.engine.continuation import check_room
from clstream.engine.control_checks import check_controls
from clstream.engine.controls import prepared
from clstream.engine.single_samples import check_single_samples
from clstream.evaluation import check_labels, evaluating
from clstream.losses import BCE_MEANS
from clstream.measures import SCORES, Measure, chosen
from clstream.params import check_choice, check_choices, check_integer, reason_of
from clstream.seeds import isolated
from clstream.strategy import Strategy, needs
from clstream.stream import TARGETS, Stream, own_storage
from clstream.training import Training

EVALUATE_AT = ("sessions", "tasks", "end")

EVALUATE_ON = ("all", "seen")


def check_fits(
    strategy: Strategy,
    stream: Stream,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    seed: int = 0,
    evaluate_at: str = "sessions",
    evaluate_on: str = "all",
    measures: Sequence[str | Measure | type[Measure]] | None = None,
    train: Training | None = None,
    outputs: int | None = None,
) -> tuple[Measure, ...]:
    """Refuse, in one sentence, what can't run (see the errors of `run`); return the measures that will be taken.

    `outputs` is how many the strategy must answer with for now, if it grows before it learns the stream.
    """
    check_played(strategy, stream)
    check_integer(1, none=True, evaluate_every=evaluate_every, max_sessions=max_sessions)
    check_integer(0, seed=seed)
    check_choice(EVALUATE_AT, evaluate_at=evaluate_at)
    check_choice(EVALUATE_ON, evaluate_on=evaluate_on)
    if not stream.boundaries and (evaluate_at == "tasks" or evaluate_on == "seen"):
        option, other = ("evaluate_on='seen'", "'all'") if evaluate_on == "seen" else ("evaluate_at='tasks'", "'sessions' or 'end'")
        raise ValueError(f"{stream.name} hides its boundaries, and {option} would tell of them: take {other}")
    if stream.arrives and evaluate_at != "sessions":
        raise ValueError(f"nobody knows which session of {stream.name} is the last one: take evaluate_at='sessions'")
    check_targets(strategy, stream)
    taken = check_measures(strategy, stream, measures)
    check_device(device)
    list(subscriptions(strategy))  # refuses handlers and parts that can't be
    for need, reason in needs(strategy).items():
        if not stream.boundaries:
            raise ValueError(f"{type(strategy).__name__} needs {need}, which {stream.name} hides ({reason})")
    for owner in with_parts(strategy):
        if getattr(owner, "needs_images", False) and len(stream.input_shape) != 3:
            raise ValueError(
                f"{type(owner).__name__} learns from images (channels, height, width), and {stream.name} has inputs of the shape "
                f"{stream.input_shape}"
            )
        for regulariser in getattr(owner, "regularisers", ()):
            if not any(regulariser is part for part in getattr(owner, "parts", ())):
                name = type(owner).__name__
                raise ValueError(f"{name} has a regulariser that is not among its parts: set {name}.parts to (*self.parts, ...)")
    if type(strategy).learn is Strategy.learn and not isinstance(getattr(strategy, "optimizer", None), Optimizer):
        raise TypeError(f"{type(strategy).__name__} has no optimizer: call super().__init__(model, optimizer) in its constructor")
    check_optimizers(strategy)
    check_augment(stream)
    check_lazy(strategy, stream, seed)
    if outputs is not None and outputs < stream.outputs:
        check_room(strategy)
    check_answers(strategy, stream, outputs)
    check_controls(train, strategy, prepared(stream, train), device, max_sessions)
    check_single_samples(strategy, prepared(stream, train), device, max_sessions)
    return taken


def check_played(strategy: object, stream: object) -> None:
    """Refuse what is no strategy or no stream. Raises TypeError."""
    if not isinstance(strategy, Strategy):
        what = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {type(strategy).__name__}"
        raise TypeError(f"run takes a Strategy object, not {what}")
    if not isinstance(stream, Stream):
        raise TypeError(f"run takes a Stream as its second argument, not a {type(stream).__name__}")


def check_measures(
    strategy: Strategy, stream: Stream, measures: Sequence[str | Measure | type[Measure]] | None
) -> tuple[Measure, ...]:
    """Return the measures that are taken of a run; refuse those that the stream or the strategy has nothing for."""
    taken = chosen(measures, stream.targets, stream.scenario, stream.name)
    name = type(strategy).__name__
    for measure in taken:
        if measure.asks == "novelty" and all(probe.known is True for probe in stream.probes):
            raise ValueError(
                f"{measure.name} needs a test set of strange samples, which {stream.name} hasn't: give it a probe, as "
                "stream.with_probes(unknown(stream, 'fashion_mnist')), --probes unknown:fashion_mnist"
            )
        if measure.asks != "novelty" and strategy.scores_are not in measure.scores_are:
            raise ValueError(
                f"{measure.name} needs {' or '.join(measure.scores_are)}, and the scores of {name} are "
                f"{strategy.scores_are}: leave it out"
            )
        if measure.asks == "novelty" and not strategy.tells_novelty(stream.targets):
            whose = f"the scores of {name}" if strategy.scores_are == "ranks" else f"the values that {name} answers"
            raise ValueError(
                f"{measure.name} needs how strange a sample is, and {whose} don't say: leave it out, or override {name}.novelty"
            )
    return taken


def check_targets(strategy: Strategy, stream: Stream) -> None:
    """Refuse targets that the strategy, or one of its parts, doesn't learn, and what its class says if that is nothing there is."""
    name = type(strategy).__name__
    check_choice(SCORES, scores_are=strategy.scores_are)
    check_choice(BCE_MEANS, bce_mean=strategy.bce_mean)
    kinds = " and ".join(stream.targets)
    for owner in with_parts(strategy):
        learns = getattr(owner, "learns_targets", TARGETS)
        check_choices(TARGETS, **{f"{type(owner).__name__}.learns_targets": learns})
        for target in stream.targets:
            if target not in learns:
                raise ValueError(
                    f"{type(owner).__name__} learns {' and '.join(learns)} targets, and {stream.name} has {target} ones: Finetune, "
                    "Joint, Replay and DERpp, say, learn these"
                )
    if len(stream.targets) > 1 and not strategy.mixes_targets:
        raise ValueError(
            f"{name} learns streams with targets of one kind, and {stream.name} has {kinds} targets: Finetune learns several kinds"
        )
    widths = {task.train[:1].y.shape[1] for task in stream.tasks if task.target == "value"}  # there is one, if any
    if widths and widths != {stream.outputs}:
        raise ValueError(
            f"{stream.name} has tasks of {max(widths)} values, and others of {stream.outputs} outputs: one head must fit all"
        )
    for _, learner in find_all(strategy, Strategy):
        if widths and learner.active_classes != "all":
            raise ValueError(
                f"active_classes={learner.active_classes!r} says which classes compete, and {stream.name} has values: take 'all'"
            )


def check_device(device: str | torch.device) -> None:
    """Refuse a device that isn't there, or that holds no numbers."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a name such as cpu or cuda:0, not {device!r}")
    if str(device).partition(":")[0] == "meta":
        raise ValueError("on the device meta tensors have no values, so nothing can be learned: take cpu or cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        devices = ["cpu"] + [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"there is no device {str(device)!r} here, only {', '.join(devices)} ({reason_of(error)})") from None


def check_optimizers(strategy: Strategy) -> None:
    """Refuse optimizers that can't learn: options that are no numbers, or, where a step is one of ours, nothing to learn."""
    for path, optimizer in find_all(strategy, Optimizer):
        for group in optimizer.param_groups:
            for name, value in group.items():
                if isinstance(value, float) and (math.isnan(value) or (name == "lr" and math.isinf(value))):
                    raise ValueError(f"{name} of {type(optimizer).__name__} ({path}) must be a finite number, not {value}")
    for _, learner in find_all(strategy, Strategy):
        own = getattr(learner, "optimizer", None)
        if not isinstance(own, Optimizer) or not type(learner).learn.__module__.startswith("clstream."):
            continue  # a step of the user's own may learn without gradients
        if not any(weight.requires_grad for group in own.param_groups for weight in group["params"]):
            raise ValueError(
                f"no weight that {type(learner).__name__} learns requires a gradient, so there is nothing to learn: unfreeze some "
                f"of the {type(getattr(learner, 'model', None)).__name__}, weight.requires_grad_(True)"
            )


def check_augment(stream: Stream) -> None:
    """Refuse an augmentation that gives no batch of inputs like those that it is given; it is tried on a few."""
    if stream.augment is None:
        return
    x = own_storage(stream.tasks[0].train[:4]).x
    with isolated(0, "augment"):
        given: object = stream.augment(x.clone())
    what = f"the augmentation of {stream.name}"
    if not isinstance(given, Tensor):
        raise TypeError(f"{what} gives a {type(given).__name__} for a batch of inputs, not a tensor: does it return what it made?")
    if not given.dim() or len(given) != len(x):
        raise ValueError(f"{what} gives {tuple(given.shape)} for {tuple(x.shape)}: it must give as many inputs as it is given")
    if given.dtype == x.dtype:
        return
    if x.dtype != torch.uint8 or given.dtype != torch.float32:
        raise TypeError(f"{what} gives {given.dtype} for {x.dtype}: it must keep the dtype of its inputs")
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(
            f"{what} gives float32 from {float(given.min()):g} to {float(given.max()):g} for uint8, and models divide by 255 only "
            "what is uint8: keep the dtype, or give floats from 0 to 1"
        )


def check_lazy(strategy: Strategy, stream: Stream, seed: int) -> None:
    """Call a model with lazy layers once, so that they get weights, from the run's seed; refuse a layer that is not called."""
    if not any(map(is_uninitialized, weights_of(strategy))):
        return
    model = strategy.model
    with isolated(index(seed), "lazy"), evaluating(strategy):
        model(own_storage(stream.tasks[0].test[:1]).x)
    for path, module in find_all(strategy, nn.Module):
        for name, weight in [*module.named_parameters(), *module.named_buffers()]:
            if is_uninitialized(weight):
                raise ValueError(f"{path}.{name} has no shape yet, and gets none by a call of the model: give the layer its sizes")


def weights_of(strategy: Strategy) -> Iterator[Tensor]:
    """Yield the parameters and buffers of all modules that a strategy holds."""
    for _, module in find_all(strategy, nn.Module):
        yield from module.parameters()
        yield from module.buffers()


def check_answers(strategy: Strategy, stream: Stream, outputs: int | None = None) -> None:
    """Refuse a strategy whose answer to one sample is not what the stream asks for; the caller's generators stay as they are.

    One that overrides `scores` or `predict` may need the start of a run to answer: only the shape of an answer that it gives
    is checked, and the evaluation before the first session tells the rest.
    """
    plain = type(strategy).scores is Strategy.scores and type(strategy).predict is Strategy.predict
    model = getattr(strategy, "model", None)
    if plain and not isinstance(model, nn.Module):
        raise TypeError(f"{type(strategy).__name__} has no model: call super().__init__(model) in its constructor")
    first = own_storage(stream.tasks[0].test[:1])
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    samples = first if parameter is None else first.to(parameter.device)
    name = type(model).__name__
    with isolated(0, "check"), evaluating(strategy):
        try:
            scores = strategy.scores(samples.x)
        except (RuntimeError, ValueError, TypeError) as error:
            if not plain and not _same_failure(model, samples.x, error):
                return
            other = "" if parameter is None or parameter.dtype == torch.float32 else f" (its weights are {parameter.dtype})"
            raise ValueError(
                f"{name}{other} can't take the inputs of {stream.name}, {tuple(first.x.shape[1:])} of {first.x.dtype}: "
                f"{reason_of(error)}"
            ) from error
        except Exception:  # noqa: BLE001  # its own business until the run has started
            return
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    wanted, values = stream.outputs if outputs is None else outputs, "value" in stream.targets
    width = scores.shape[1] if isinstance(scores, Tensor) and scores.dim() == 2 else -1
    if width < wanted or (values and width > wanted):
        who = name if plain else f"{type(strategy).__name__}.scores"
        what = "values" if values else "classes" if stream.targets == ("label",) else "columns of targets"
        raise ValueError(
            f"{who} answers one sample with {shape}, but {stream.name} has {wanted} {what}: build it with classes={wanted}"
        )
    if type(strategy).predict is not Strategy.predict and stream.targets == ("label",):  # others need the start of a run
        with isolated(0, "check"), evaluating(strategy):
            check_labels((strategy.predict(samples.x),), samples, strategy)


def _same_failure(model: object, x: Tensor, error: Exception) -> bool:
    """Return whether a model can't take inputs for the reason that a strategy gave."""
    try:
        if isinstance(model, nn.Module):
            model(x)
    except Exception as own:  # noqa: BLE001  # whatever the module raises
        return str(own) == str(error)
    return False
