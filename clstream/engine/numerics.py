"""Numerics: with which precision a run computes, and whether all of its operations must be deterministic."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from clstream.engine.compiled_step import check_compiler
from clstream.params import check_bool, check_choice
from clstream.stream import Batch

PRECISIONS = ("fp32", "bf16")
"""What networks compute in: float32, or bfloat16 where torch's autocast takes it."""

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class NotDeterministicError(RuntimeError):
    """An operation has no deterministic form, and the run was to be deterministic."""


@dataclass(frozen=True)
class Numerics:
    """How a run computes.

    Args:
        precision: "fp32", or "bf16": while a strategy learns a batch, and while it is evaluated, each call of a module runs under
            torch's autocast to bfloat16, and what it returns is float32 again. Weights, gradients of them, losses, memories and
            statistics are float32, and what a strategy does in its handlers of events is computed in float32.
        deterministic: whether torch may run deterministic algorithms only.
        compile: whether steps are compiled: see `clstream.engine.compiled_step`.

    """

    precision: str = "fp32"
    deterministic: bool = False
    compile: bool = False

    @property
    def options(self) -> dict[str, str | bool]:
        """What is not as by default, by name: it changes the bits of a run."""
        lower = {} if self.precision == "fp32" else {"precision": self.precision}
        return {
            **lower, **({"deterministic": True} if self.deterministic else {}), **({"compile": True} if self.compile else {})
        }  # fmt: skip

    def check(self, device: str | torch.device) -> None:
        """Refuse what is no option, and what the device or the machine hasn't. Raises ValueError."""
        check_choice(PRECISIONS, precision=self.precision)
        check_bool(deterministic=self.deterministic, compile=self.compile)
        if self.compile:
            check_compiler(self.precision)
        kind = torch.device(device).type
        if self.precision == "bf16" and (kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_bf16_supported())):
            raise ValueError(f"{device} has no bfloat16 to compute in: leave precision='bf16' out, or take another device")

    def lowered(self, learn: Callable[[Batch], Tensor], device: torch.device) -> Callable[[Batch], Tensor]:
        """Return what learns a batch with this precision."""
        if self.precision == "fp32":
            return learn

        def learn_lowered(batch: Batch) -> Tensor:
            with self.lowering(device):
                return learn(batch)

        return learn_lowered

    @contextmanager
    def lowering(self, device: torch.device) -> Iterator[None]:
        """Have modules that are called compute with this precision, in this thread."""
        if self.precision == "fp32":
            yield
            return
        thread, autocast = get_ident(), torch.autocast(device.type, torch.bfloat16)
        depth = 0  # of calls of modules within one another: the outermost one computes, and returns, for all

        def enter(*_: Any) -> None:
            nonlocal depth
            if get_ident() == thread:
                if depth == 0:
                    autocast.__enter__()
                depth += 1

        def leave(_: nn.Module, __: Any, returned: Any) -> Any:
            nonlocal depth
            if get_ident() != thread:
                return None
            depth -= 1
            if depth:
                return None  # as it is
            autocast.__exit__(None, None, None)
            return _float32(returned)

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Run deterministic algorithms only, if that was asked for; torch's setting is the same afterwards.

        Raises NotDeterministicError, in one sentence, for an operation that has none.
        """
        if not self.deterministic:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        workspace = os.environ.get(_WORKSPACE)
        if device.type == "cuda":
            os.environ.setdefault(_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            yield
        except RuntimeError as error:
            operation, says, _ = str(error).partition(" does not have a deterministic implementation")
            if says:
                raise NotDeterministicError(
                    f"{operation} has no deterministic form on {device}, and the run was to be deterministic: leave that out, or "
                    "let what calls it do without"
                ) from error
            if _WORKSPACE in str(error):
                raise NotDeterministicError(
                    f"CUDA was in use before the run, and products of matrices are deterministic only if the environment says "
                    f"{_WORKSPACE}=:4096:8 from the start: set it before Python starts"
                ) from error
            raise
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            if workspace is None:
                os.environ.pop(_WORKSPACE, None)


def _float32(returned: Any) -> Any:
    """Return what a module returned with its bfloat16 tensors as float32, in containers too."""
    if isinstance(returned, Tensor):
        return returned.float() if returned.dtype == torch.bfloat16 else returned
    if isinstance(returned, dict):
        return {key: _float32(value) for key, value in returned.items()}
    if type(returned) in (list, tuple):
        return type(returned)(map(_float32, returned))
    return returned
