"""Evaluation mode: a strategy that is asked from outside answers in evaluation mode, without gradients, and without a trace.

`scores`, `predict`, `predict_online` and `novelty` of every strategy are wrapped by `answers` where its class is made; `learn`,
`loss` and `objective` by `learns`. While a strategy learns (in these three, and in its handlers of events), what it asks itself is
run as it is written: in the mode that its modules are in, with gradients. Every other caller is outside, also an observer whose
handler is called in the middle of a step.
"""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from clstream.attributes import walk
from clstream.seeds import random_state_kept

F = TypeVar("F", bound=Callable[..., Any])

AS_WRITTEN: ContextVar[bool] = ContextVar("as_written", default=False)
"""Whether a strategy's methods run as they are written: while it learns, and within `evaluating`."""

ANSWERS = ("scores", "predict", "predict_online", "novelty")

LEARNS = ("learn", "loss", "objective")

_MARK = "__clstream_wrapper__"


@contextmanager
def as_written(whether: bool = True) -> Iterator[None]:
    """Run the methods of strategies as they are written; with False, as for a caller from outside."""
    before = AS_WRITTEN.set(whether)
    try:
        yield
    finally:
        AS_WRITTEN.reset(before)


def answers(method: F) -> F:
    """Wrap a method that answers, so that a call from outside runs within `evaluating`."""

    @wraps(method)
    def answer(self: object, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or AS_WRITTEN.get():  # a compiled step is as written; a ContextVar can't be compiled
            return method(self, *args, **kwargs)
        with evaluating(self):
            return method(self, *args, **kwargs)

    return cast("F", _marked(answer))


def learns(method: F) -> F:
    """Wrap a method that learns, so that all methods that it calls run as they are written."""

    @wraps(method)
    def learn(self: object, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or AS_WRITTEN.get():  # as in a run
            return method(self, *args, **kwargs)
        with as_written():
            return method(self, *args, **kwargs)

    return cast("F", _marked(learn))


def _marked(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    setattr(wrapper, _MARK, wrapper)  # itself, since `wraps` copies attributes to what a user puts around it
    return wrapper


def wrap_methods(cls: type) -> None:
    """Wrap what a class has of `ANSWERS` and `LEARNS`, its own or that of a class beside `Strategy`.

    Raises TypeError for one that is no plain method.
    """
    for names, wrap in ((ANSWERS, answers), (LEARNS, learns)):
        for name in names:
            method = inspect.getattr_static(cls, name)
            if getattr(method, _MARK, None) is method:
                continue
            if not inspect.isfunction(method) or inspect.isgeneratorfunction(method) or inspect.iscoroutinefunction(method):
                raise TypeError(f"{cls.__name__}.{name} must be a plain method: def {name}(self, ...)")
            setattr(cls, name, wrap(method))


@contextmanager
def evaluating(strategy: object) -> Iterator[None]:
    """Put every module that the strategy holds in evaluation mode, keep gradients off, and leave no trace of it afterwards.

    Restored afterwards are the mode of each module; the buffers of modules that are not torch's own (torch's don't change theirs
    in this mode); the global generators of torch, numpy and Python; and the generators that the strategy and such modules hold.
    Other attributes that a module changes when it is called are not.
    """
    modules: dict[nn.Module, bool] = {}
    generators: list[Any] = []
    for value in _held(strategy):
        if isinstance(value, nn.Module):
            modules |= {module: module.training for module in value.modules()}
        else:
            generators.append(value)
    own = [module for module in modules if not type(module).__module__.startswith("torch.nn.")]
    generators += [value for module in own for _, value in walk(vars(module)) if isinstance(value, _GENERATORS)]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in own
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()  # which nothing can change
    ]
    kept = [(generator, _state(generator)) for generator in generators]
    for module in modules:
        module.training = False
    try:
        with as_written(), torch.no_grad(), random_state_kept(*_devices(modules)):
            yield
    finally:
        for module, training in modules.items():
            module.training = training
        for module, name, buffer, copy in buffers:
            module._buffers[name] = buffer
            buffer.data.copy_(copy)  # changed or not: what was written to `.data` or by numpy shows in no version
        for generator, state in kept:
            _set_state(generator, state)


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _held(strategy: object) -> Iterator[Any]:
    """Yield the modules and generators that a strategy holds; also the modules of what is no state, in plain containers."""
    for _, value in walk(strategy):
        if isinstance(value, (nn.Module, *_GENERATORS)):
            yield value
        elif hasattr(type(value), "not_state"):
            hidden = {name for cls in type(value).__mro__ for name in vars(cls).get("not_state", ())} - {"params", "bus"}
            waiting = deque(vars(value)[name] for name in hidden if name in getattr(value, "__dict__", ()))
            while waiting:
                item = waiting.popleft()
                if isinstance(item, nn.Module):
                    yield item
                elif isinstance(item, dict):
                    waiting.extend(item.values())
                elif isinstance(item, (list, tuple, set, frozenset, deque)):
                    waiting.extend(item)


def _devices(modules: dict[nn.Module, bool]) -> set[torch.device]:
    """Return the GPUs that the modules are on."""
    if not torch.cuda.is_initialized():
        return set()
    tensors: Iterator[Tensor] = (weight for module in modules for weight in module.parameters(recurse=False))
    return {weight.device for weight in tensors if weight.is_cuda}


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
