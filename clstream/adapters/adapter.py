"""What adapters have in common: which modules of a network they are put on, and how.

    model = adapt(VitTiny(shape, classes), LoRA(rank=4, modules="*.attention.*"))

The network's modules and the names of their weights stay as they are. A module that an adapter is put on, its host, has one more
child, `adapter`, and a class that derives from its own: what the host gave goes through the child, with what the host took. So an
adapter's weights are called `stages.block1.attention.q.adapter.A.weight`, say, and the pattern `*.adapter.*` names all of them.
No hooks: these are code, which a checkpoint can't put on copies of a network that come while a run goes on, as teachers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clstream.params import HasParams, flat

Model = TypeVar("Model", bound=nn.Module)


class AdapterLayer(nn.Module, ABC):
    """What an adapter puts on one module, its host."""

    origin: Adapter
    """The adapter that put it there."""

    @abstractmethod
    def forward(self, taken: Tensor, given: Tensor) -> Tensor:
        """Return what the host gives from now on, for what it took and what it gave: a tensor of the shape of `given`."""


class Adapter(HasParams, ABC):
    """A kind of adapter with its options. It holds no weights: `adapt` puts these into a model."""

    @abstractmethod
    def hosts(self, model: nn.Module, passed_over: set[str]) -> list[str]:
        """Return the names of the modules that it is put on.

        Args:
            model: where the modules are looked for.
            passed_over: names of modules that no adapter is put on.

        Raises ValueError or TypeError for a model that it isn't for, and for patterns that name nothing.
        """

    @abstractmethod
    def prepare(self, model: nn.Module, hosts: Sequence[str]) -> Callable[[], None]:
        """Build what is put on the hosts, and return a function that puts it there. Raises ValueError for hosts that don't fit."""


class ModuleAdapter(Adapter):
    """An adapter of modules that patterns name, each by itself.

    Args:
        modules: patterns of module names, as a shell knows them ("*", "stages.block1.*", "*.attn.qkv"): one, or several in a list.

    """

    takes: str
    """The modules that it can be put on, for errors: "linear layers", say."""

    def __init__(self, modules: str | list[str] = "*") -> None:
        self.modules = patterns_of(modules, "modules")
        if not self.modules:
            raise ValueError("modules must name at least one pattern, such as '*'")

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Return whether it can be put on a module. Where a pattern names many, the others are passed over."""

    @abstractmethod
    def layer(self, name: str, host: nn.Module) -> AdapterLayer:
        """Return what is put on a host. Raises ValueError for a host that the options don't fit."""

    def hosts(self, model: nn.Module, passed_over: set[str]) -> list[str]:
        """Return the names of the modules that patterns name and that it can be put on. Raises ValueError for a pattern of none."""
        able = [
            name
            for name, module in model.named_modules()
            if name and name not in passed_over and (self.fits(module) or _is_host(module))
        ]
        for pattern in self.modules:
            if not any(fnmatchcase(name, pattern) for name in able):
                raise ValueError(self._no_match(model, pattern, able, passed_over))
        return [name for name in able if any(fnmatchcase(name, pattern) for pattern in self.modules)]

    def prepare(self, model: nn.Module, hosts: Sequence[str]) -> Callable[[], None]:
        """Build a layer for each host, and return a function that puts them there."""
        layers = [(model.get_submodule(name), self.layer(name, model.get_submodule(name))) for name in hosts]

        def put() -> None:
            for host, layer in layers:
                put_on(host, layer, self)

        return put

    def _no_match(self, model: nn.Module, pattern: str, able: list[str], passed_over: set[str]) -> str:
        kind, network = type(self).__name__, type(model).__name__
        named = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
        if not named:
            near = get_close_matches(pattern, able, n=3, cutoff=0)
            hint = f"near it: {', '.join(near)}" if near else f"there is nothing in it that {kind} could be put on"
            return f"no module of {network} is called {pattern!r}; {hint}"
        other = next((name for name in reversed(named) if name not in passed_over), None)
        if other is None:
            why = f"{named[0]} learns itself, is not called by what it is in, or is in an adapter"
        else:
            why = f"{other} is of the class {type(model.get_submodule(other)).__name__}"
        return f"{kind} is put on {self.takes}, and {pattern!r} names none in {network}: {why}"


def adapt(model: Model, *adapters: Adapter, trained: str | Sequence[str] = "head.*") -> Model:
    """Put adapters into a model, in place, freeze all of it but them and what `trained` names, and return it.

    Frozen parameters require no gradient, so torch computes none. Batch norm whose own parameters don't learn is put in evaluation
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
    before = dict(model.named_parameters())
    earlier = {id(parameter) for module in model.modules() if _origin(module) for parameter in module.parameters()}
    own = [name for name, parameter in before.items() if id(parameter) not in earlier]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own):
            near = get_close_matches(pattern, own, n=3, cutoff=0)
            raise ValueError(
                f"no parameter of {type(model).__name__} is called {pattern!r}: name what learns beside the adapters, as the "
                f"classifier, by trained=..., or give [] for nothing; near it: {', '.join(near) or 'none'}"
            )
    learning = {id(before[name]) for name in own if any(fnmatchcase(name, pattern) for pattern in patterns)}
    passed_over = {*_out_of_reach(model, learning)}
    hosted = {name: module.adapter.origin for name, module in model.named_modules() if _is_host(module)}
    puts = []
    for adapter in adapters:
        hosts = adapter.hosts(model, passed_over)
        if twice := [name for name in hosts if name in hosted]:
            raise ValueError(
                f"{twice[0]} has an adapter already, {type(hosted[twice[0]]).__name__}: a module takes one, so name other modules, "
                "or build the model anew"
            )
        hosted |= dict.fromkeys(hosts, adapter)
        puts.append(adapter.prepare(model, hosts))
    for put in puts:
        put()
    for name in own:
        before[name].requires_grad_(id(before[name]) in learning)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(weight.requires_grad for weight in module.parameters(recurse=False)):
            module.eval()
    return model


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Return the adapters that were put into a model, in the order of their first hosts."""
    return list({id(origin): origin for module in model.modules() if (origin := _origin(module))}.values())


def adapter_params(model: nn.Module, prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Return the adapters in a model as params show them, and how much of it learns; nothing, if there are none.

    `adapter` is the class, `adapter.rank` and so on are its options; of several, `adapter2` and so on. `trained_parameters` is how
    many numbers learn as the model is now, of a growing head those that it has, and `trained_share` is their share of all.
    """
    params: dict[str, str | int | float | bool | None] = {}
    for number, adapter in enumerate(adapters_of(model), 1):
        params |= flat(adapter, f"{prefix}adapter{number if number > 1 else ''}")
    if params:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trained = sum(size for size, learns in sizes if learns)
        params[f"{prefix}trained_parameters"] = trained
        params[f"{prefix}trained_share"] = round(trained / max(sum(size for size, _ in sizes), 1), 6)
    return params


def without_adapters(model: Model, share_frozen: bool = False) -> Model:
    """Return a copy of a model as it is without its adapters.

    Args:
        model: any module. It stays as it is.
        share_frozen: whether parameters that require no gradient are those of the model, not copies: for where they stay frozen.

    Raises TypeError where an adapter replaced modules, as those of peft do.
    """
    copy = deepcopy(model, {id(weight): weight for weight in model.parameters() if share_frozen and not weight.requires_grad})
    hosts = [module for module in copy.modules() if _is_host(module)]
    for module in hosts:
        module.__class__ = type(module).__bases__[0]
        del module.adapter
        vars(module).pop("whole", None)  # of prompts, which reach into the whole model
    if rest := adapters_of(copy):
        raise TypeError(
            f"{type(rest[0]).__name__} replaced modules of {type(model).__name__}, and can't be taken out of it: use LoRA"
        )
    return copy


def put_on(host: nn.Module, layer: AdapterLayer, origin: Adapter) -> None:
    """Put a layer on its host, where the host's weights are."""
    weight = next(host.parameters(), torch.empty(0))
    layer.origin = origin
    host.adapter = layer.to(weight.device)
    host.__class__ = _host_class(type(host))  # type: ignore[arg-type]  # classes are hashable


@cache
def _host_class(own: type[nn.Module]) -> type[nn.Module]:
    """Return the class of hosts that are of some class by themselves: what they give goes through their adapter."""
    forward = _steps if own.forward is nn.Sequential.forward else own.forward

    def adapted(self: Any, taken: Any, *others: Any, **named: Any) -> Any:
        return self.adapter(taken, forward(self, taken, *others, **named))

    name = f"Adapted{own.__qualname__}"
    return type(name, (own,), {"forward": adapted, "__module__": own.__module__, "__qualname__": name, "__doc__": own.__doc__})


def _steps(sequence: nn.Sequential, taken: Any) -> Any:
    """Return what a sequence gives whose child `adapter` is none of its steps."""
    for name, module in sequence.named_children():
        if name != "adapter":
            taken = module(taken)
    return taken


def _origin(module: nn.Module) -> Adapter | None:
    """Return the adapter that put a module where it is; None if none did."""
    origin = getattr(module, "origin", None)
    return origin if isinstance(origin, Adapter) else None


def _is_host(module: nn.Module) -> bool:
    return isinstance(getattr(module, "adapter", None), AdapterLayer)


def _out_of_reach(model: nn.Module, learning: set[int]) -> Iterator[str]:
    """Yield the names of modules that no adapter is put on: those that learn themselves, in adapters, and that may not be called.

    torch's own attention and encoder layers read the weights of their children, and call them at times or never.
    """
    for name, module in model.named_modules():
        weights = [id(weight) for weight in module.parameters()]
        if (weights and learning.issuperset(weights)) or _origin(module):
            yield from (f"{name}.{inner}".rstrip(".") for inner, _ in module.named_modules())
        elif isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            yield from (f"{name}.{inner}".lstrip(".") for inner, _ in module.named_modules() if inner)


def patterns_of(given: str | Sequence[str], option: str) -> list[str]:
    """Return patterns as a list. Raises ValueError for what are no texts."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"{option} must be a pattern of names, or a list of some, not {given!r}")
    return list(patterns)
