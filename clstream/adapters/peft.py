"""Peft: methods of Hugging Face's `peft` by their name, put into any network (extra `peft`).

    adapt(model, Peft("IA3", {"target_modules": ["q", "v"], "feedforward_modules": []}))

`peft.inject_adapter_in_model` replaces layers by layers of its own, so that the names of the weights in them change: a file of
weights must be loaded before. What reaches into the input of a whole language model (prompt tuning) can't be put in so, and is
refused. LoRA of our own needs no package, and leaves names as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from clstream.adapters.adapter import Adapter, adapters_of


class Peft(Adapter):
    """A method of Hugging Face's `peft`, with its own options.

    Args:
        method: as peft calls it: "LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "FOURIERFT" ...
        options: those of the method's configuration in peft, such as `target_modules`. None: its defaults.

    Raises:
        ImportError: if peft is not installed.
        ValueError: for a method or options that it hasn't.

    """

    def __init__(self, method: str = "LORA", options: dict[str, Any] | None = None) -> None:
        self.method, self.options = method, dict(options or {})
        self.configuration()

    def configuration(self) -> Any:
        """Return what peft takes."""
        try:
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        except ImportError:
            raise ImportError("the adapter Peft needs the package peft: pip install 'clstream[peft]'") from None
        names = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.method not in names:
            raise ValueError(f"peft has no method {self.method!r}: it has {', '.join(sorted(names))}")
        try:
            return names[self.method](**self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"peft's {self.method} can't have these options: {str(error).splitlines()[0]}") from None

    def hosts(self, model: nn.Module, passed_over: set[str]) -> list[str]:
        """Return the names of the modules that are replaced: a copy of the model is tried.

        Raises ValueError for what peft refuses.
        """
        if any(isinstance(adapter, Peft) for adapter in adapters_of(model)):
            raise ValueError(f"{type(model).__name__} has adapters of peft already: build it anew, and name all modules at once")
        trial = deepcopy(model)
        self.inject(trial)
        names = [name for name, module in trial.named_modules() if name and _is_layer(module)]
        if inside := [name for name in names if name in passed_over]:
            raise ValueError(
                f"peft's {self.method} would be put on {inside[0]}, which learns itself, or is in an adapter: name others"
            )
        return names

    def prepare(self, model: nn.Module, hosts: Sequence[str]) -> Callable[[], None]:
        """Return a function that has peft replace the hosts."""

        def put() -> None:
            self.inject(model)
            for name in hosts:
                layer: Any = model.get_submodule(name)
                layer.origin = self

        return put

    def inject(self, model: nn.Module) -> None:
        """Have peft replace layers of a model. Raises ValueError for what it refuses."""
        from peft import inject_adapter_in_model

        try:
            inject_adapter_in_model(self.configuration(), model)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"peft's {self.method} can't be put into {type(model).__name__}: {str(error).splitlines()[0]}"
            ) from None


def _is_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
