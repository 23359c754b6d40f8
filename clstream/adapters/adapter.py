"""What adapters have in common: which modules of a network they are put on, and how.

    model = adapt(VitTiny(shape, classes), LoRA(rank=4, modules="*.attention.*"))

The network's modules and the names of their weights stay as they are. A module that an adapter is put on, its host, has one more
child, `adapter`, and a forward hook that gives the child what the host took and what it gave; what the child returns is what the
host gives from then on. So an adapter's weights are called `stages.block1.attention.q.adapter.A.weight`, say, and the pattern
`*.adapter.*` names all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clstream.params import HasParams

Model = TypeVar("Model", bound=nn.Module)


class AdapterLayer(nn.Module, ABC):
    """What an adapter puts on one module, its host."""

    origin: Adapter
    """The adapter that put it there."""

    @abstractmethod
    def forward(self, taken: Tensor, given: Tensor) -> Tensor:
        """Return what the host gives from now on, for what it took and what it gave: a tensor of the shape of `given`."""


class Adapter(HasParams, ABC):
    """A kind of adapter with its options, and the modules that it is for. It holds no weights: `adapt` puts these into a model.

    Args:
        modules: patterns of module names, as a shell knows them ("*", "stages.block1.*", "*.attn.qkv"): one, or several in a list.

    """

    def __init__(self, modules: str | list[str] = "*") -> None:
        self.modules = patterns_of(modules, "modules")
        if not self.modules:
            raise ValueError("modules must name at least one pattern, such as '*'")

    takes: str
    """The modules that it can be put on, for errors and tables: "linear layers", say."""

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Return whether it can be put on a module. Where a pattern names many, the others are passed over."""

    @abstractmethod
    def layer(self, name: str, host: nn.Module) -> AdapterLayer:
        """Return what is put on a host. Raises ValueError for a host that the options don't fit."""

    def hosts(self, model: nn.Module, passed_over: set[str]) -> list[str]:
        """Return the names of the modules that it is put on. Raises ValueError for a pattern that names none.

        Args:
            model: where the modules are looked for.
            passed_over: names of modules that no adapter is put on.

        """
        able = [name for name, module in model.named_modules() if name and name not in passed_over and self.fits(module)]
        for pattern in self.modules:
            if any(fnmatchcase(name, pattern) for name in able):
                continue
            kind, network = type(self).__name__, type(model).__name__
            others = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
            if others:
                other = next((name for name in reversed(others) if name not in passed_over), "")
                kind_of_other = type(model.get_submodule(other)).__name__
                why = f"{other} is of the class {kind_of_other}" if other else f"{others[0]} learns itself, or is never called"
                raise ValueError(f"{kind} is put on {self.takes}, and {pattern!r} names none in {network}: {why}")
            near = get_close_matches(pattern, able, n=3, cutoff=0)
            hint = f"near it: {', '.join(near)}" if near else f"there is nothing in it that {kind} could be put on"
            raise ValueError(f"no module of {network} is called {pattern!r}; {hint}")
        return [name for name in able if any(fnmatchcase(name, pattern) for pattern in self.modules)]

    def prepare(self, model: nn.Module, hosts: Sequence[str]) -> Callable[[], None]:
        """Build what is put on the hosts, and return a function that puts it there. Raises ValueError for hosts that don't fit."""
        layers = [(model.get_submodule(name), self.layer(name, model.get_submodule(name))) for name in hosts]

        def put() -> None:
            for host, layer in layers:
                put_on(host, layer, self)

        return put


def adapt(model: Model, *adapters: Adapter, trained: str | Sequence[str] = "head.*") -> Model:
    """Put adapters into a model, in place, freeze all of it but them and what `trained` names, and return it.

    Frozen parameters require no gradient, so torch computes none. Batch norm without a parameter that learns is put in evaluation
    mode: its statistics stay as they are. Adapters that an earlier call put in go on learning. No adapter is put on what `trained`
    names.

    Args:
        model: any module. Its weights, and their names, stay as they are.
        adapters: what to put in, such as `LoRA(rank=4)`. New weights are drawn from torch's global generator.
        trained: patterns of the names of parameters that learn beside the adapters: one, or several; [] for none.

    Raises:
        TypeError: for what is no module or no adapter.
        ValueError: if a pattern names nothing, a module has an adapter already, or one doesn't fit. Then the model is as it was.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt takes a torch module as its model, not {model!r}")
    if not adapters or not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise TypeError(f"adapt takes adapters after the model, as adapt(model, LoRA(rank=4)), not {list(adapters)!r}")
    patterns = patterns_of(trained, "trained")
    own = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in _of_adapters(model)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own):
            near = get_close_matches(pattern, list(own), n=3, cutoff=0)
            raise ValueError(
                f"no parameter of {type(model).__name__} is called {pattern!r}: name what learns beside the adapters, as the "
                f"classifier, by trained=..., or give [] for nothing; near it: {', '.join(near) or 'none'}"
            )
    learning = {id(parameter) for name, parameter in own.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    passed_over = {*_out_of_reach(model, learning)}
    taken = {name: module.adapter.origin for name, module in model.named_modules() if _has_adapter(module)}
    puts = []
    for adapter in adapters:
        hosts = adapter.hosts(model, passed_over)
        if twice := [name for name in hosts if name in taken]:
            raise ValueError(
                f"{twice[0]} has an adapter already, {type(taken[twice[0]]).__name__}: a module takes one, so name other modules, "
                "or build the model anew"
            )
        taken |= dict.fromkeys(hosts, adapter)
        puts.append(adapter.prepare(model, hosts))
    for put in puts:
        put()
    frozen = {id(parameter) for parameter in own.values()} - learning
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(weight.requires_grad for weight in module.parameters()):
            module.eval()
    return model


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Return the adapters that were put into a model, in the order of their first hosts."""
    return list({id(module.origin): module.origin for module in model.modules() if isinstance(module, AdapterLayer)}.values())


def put_on(host: nn.Module, layer: AdapterLayer, origin: Adapter) -> None:
    """Put a layer on its host, where the host's weights are: as its child `adapter`, and by a forward hook."""
    weight = next(host.parameters(), torch.empty(0))
    layer.origin = origin
    host.adapter = layer.to(weight.device)
    if type(host) is nn.Sequential:
        host.__class__ = _HostSequential
    host.register_forward_hook(_adapted)


class _HostSequential(nn.Sequential):
    """A sequence whose child `adapter` is not one of its steps."""

    def forward(self, input: Any) -> Any:  # noqa: A002  # as nn.Sequential names it
        for name, module in self._modules.items():
            if name != "adapter" and module is not None:
                input = module(input)  # noqa: A001
        return input


def _adapted(host: Any, taken: tuple[Any, ...], given: Any) -> Any:
    """Return what a host gives, with its adapter: a forward hook."""
    return host.adapter(taken[0], given)


def _has_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(module, "adapter", None), AdapterLayer)


def _of_adapters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of adapters that are in a model."""
    return {id(weight) for module in model.modules() if isinstance(module, AdapterLayer) for weight in module.parameters()}


def _out_of_reach(model: nn.Module, learning: set[int]) -> Iterator[str]:
    """Yield the names of modules that no adapter is put on: those that learn themselves, and those that nothing calls.

    torch's attention reads the weights of its child, and never calls it.
    """
    for name, module in model.named_modules():
        weights = [id(weight) for weight in module.parameters()]
        if (weights and learning.issuperset(weights)) or isinstance(module, AdapterLayer):
            yield from (f"{name}.{inner}".rstrip(".") for inner, _ in module.named_modules())
        elif isinstance(module, nn.MultiheadAttention):
            yield f"{name}.out_proj".lstrip(".")


def patterns_of(given: str | Sequence[str], option: str) -> list[str]:
    """Return patterns as a list. Raises ValueError for what are no texts."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"{option} must be a pattern of names, or a list of some, not {given!r}")
    return list(patterns)
