"""Avalanche's strategies by name, for the command line."""

from __future__ import annotations

import inspect
import warnings
from functools import cache, partial
from typing import Any, get_args, get_type_hints

from clstream.strategies.avalanche.introspection import _is_template
from clstream.strategies.avalanche.strategy import AvalancheStrategy
from torch import nn
from torch.optim import SGD

from clstream.avalanche.imports import import_avalanche
from clstream.strategy import OptimizerFactory, Strategy

UNFIT = (
    "AR1", "JointTraining", "AETraining", "VAETraining", "BiC", "FeatureReplay", "LFL", "LearningToPrompt", "PNNStrategy",
)  # fmt: skip
"""Those whose loops can't be played batch by batch, that don't classify, or that need a model or data of a kind of their own."""


@cache
def known_names() -> list[str]:
    """Return the names of Avalanche's supervised strategies that can be had by a model, an optimizer and plain options."""
    supervised, template = import_avalanche("training.supervised"), import_avalanche("training.templates").SupervisedTemplate
    classes = {
        name: cls for name, cls in vars(supervised).items()
        if isinstance(cls, type) and issubclass(cls, template) and not _is_template(cls) and name not in UNFIT
    }  # fmt: skip
    return sorted(name for name, cls in classes.items() if all(_can_be_given(option) for option in _options_of(cls)))


OURS = ("self", "model", "optimizer", "criterion", "device", "plugins", "evaluator", "eval_every", "peval_mode", "train_mb_size",
        "train_epochs")  # fmt: skip
"""Parameters of theirs that come from us, or from the stream."""


def _options_of(cls: Any) -> list[inspect.Parameter]:
    """Return the parameters of a strategy of theirs that a command line asks for."""
    construct = cls.__init__
    hints = get_type_hints(inspect.unwrap(construct))
    options = []
    for parameter in inspect.signature(construct).parameters.values():
        if parameter.name in OURS or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        type_ = hints.get(parameter.name, Any if parameter.default in (None, parameter.empty) else type(parameter.default))
        if parameter.default is None and type(None) not in get_args(type_):
            type_ = type_ | None
        if type_ is int and isinstance(parameter.default, float):  # as SCR's temperature
            type_ = float
        options.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=type_))
    return options


def _can_be_given(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter can be left out, or given on a command line."""
    types = get_args(parameter.annotation) or (parameter.annotation,)
    plain = (int, float, bool, str)
    return parameter.default is not parameter.empty or any(type_ in plain for type_ in types)


def __getattr__(name: str) -> Any:
    """Return the class for one of Avalanche's strategies by name."""
    if not name[:1].isupper():  # whoever looks this module over is not to have Avalanche imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return strategy_class(name.removeprefix("Avalanche"))  # as the class itself is called, which is not to be taken for one of ours


@cache
def strategy_class(name: str) -> type[AvalancheStrategy]:
    """Return a class that builds one of Avalanche's strategies out of a model, an optimizer and its own plain options.

    Raises AttributeError for a name that isn't among `known()`.
    """
    if name not in known_names():
        raise AttributeError(f"Avalanche has no strategy {name!r} that can be had by name")
    theirs = getattr(import_avalanche("training.supervised"), name)
    options = [option for option in _options_of(theirs) if _can_be_given(option)]
    default: OptimizerFactory = partial(SGD, lr=0.1)

    def __init__(self: AvalancheStrategy, model: nn.Module, optimizer: OptimizerFactory = default, **given: Any) -> None:  # noqa: N807
        built = {"criterion": nn.CrossEntropyLoss()} if "criterion" in inspect.signature(theirs.__init__).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own arguments
            try:
                strategy = theirs(model=model, optimizer=optimizer(model.parameters()), **built, **given)
            except Exception as error:  # noqa: BLE001  # they check by assertions, or not at all
                raise ValueError(f"Avalanche's {name} can't be built so: {type(error).__name__}: {error}") from None
        AvalancheStrategy.__init__(self, strategy)

    first = list(inspect.signature(__init__).parameters.values())[:3]
    hints = get_type_hints(Strategy.__init__)
    first[1] = first[1].replace(annotation=nn.Module)
    first[2] = first[2].replace(annotation=hints["optimizer"])
    __init__.__signature__ = inspect.Signature([*first, *options])  # type: ignore[attr-defined]
    __init__.__annotations__ = {parameter.name: parameter.annotation for parameter in [*first[1:], *options]}
    doc = f"Avalanche's {name}.\n\nOptions: its own, and `optimizer`, which makes the optimizer from the model's parameters."
    own = f"Avalanche{name}"
    return type(own, (AvalancheStrategy,), {"__init__": __init__, "__module__": __name__, "__qualname__": own, "__doc__": doc})
