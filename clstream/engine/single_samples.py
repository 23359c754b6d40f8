"""Batches of one sample: batch norm can't normalise one value a channel, so a run that would come to that is not begun.

A session may leave one sample for its last batch, as 271 samples in batches of 10 do. That is as in torch's `DataLoader`, and
harmless but where a batch norm layer that learns gets one value for each channel: images with more than one pixel left there pass,
and so does a strategy that learns each sample with others of its memory. So whether it fails is not looked up but tried: a copy of
the strategy learns a full batch and one of one sample. That is done only if the model itself fails on one sample, and only if a
session leaves one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from clstream.engine.trial import learn_briefly
from clstream.seeds import isolated
from clstream.strategy import Strategy
from clstream.stream import Stream

_TORCH_SAYS = "Expected more than 1 value per channel"


def check_single_samples(strategy: Strategy, stream: Stream, device: str | torch.device, max_sessions: int | None) -> None:
    """Raise ValueError if a batch of one sample comes and batch norm can't learn it; the layer is named, and what helps."""
    model = getattr(strategy, "model", None)
    if not isinstance(model, nn.Module) or not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        return
    layer = failing_layer(model, stream.tasks[0].train[:1].x)
    if layer is None:
        return
    session = next((index for index in range(min(len(stream), max_sessions or len(stream))) if leaves_one(stream, index)), None)
    if session is not None and fails(strategy, stream, session, device):
        size = stream.size_of(session)
        dropping = "" if stream.batch_size == 1 or size == 1 else "drop_last=True, or "
        raise ValueError(
            f"{type(strategy).__name__} can't learn {stream.name} with this {type(model).__name__}: of the {size:,} samples of "
            f"session {session} one comes alone, in batches of {stream.batch_size}, and the batch norm of its layer {layer} needs "
            f"two or more: take {dropping}another batch_size"
        )


def leaves_one(stream: Stream, session: int) -> bool:
    """Return whether a session has a batch of one sample."""
    return stream.batch_size == 1 or (not stream.drop_last and stream.size_of(session) % stream.batch_size == 1)


def failing_layer(model: nn.Module, x: Tensor) -> str | None:
    """Return the name of the batch norm layer that fails on one sample, as the model is; its statistics stay as they are."""
    entered: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, __, name=name: entered.append(name))
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
    ]
    try:
        with isolated(0, "single"), torch.no_grad():
            parameter = next(model.parameters(), None)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            functional_call(model, buffers, (x if parameter is None else x.to(parameter.device),))
    except ValueError as error:
        if _TORCH_SAYS in str(error) and entered:
            return entered[-1] or type(model).__name__
    except Exception:  # noqa: BLE001  # another check's business
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def fails(strategy: Strategy, stream: Stream, session: int, device: str | torch.device) -> bool:
    """Return whether a copy of the strategy fails in batch norm on a full batch and one of one sample.

    False if that can't be tried.
    """
    before = session > 0 or stream.size_of(session) > 1  # whether something is learned before the sample that comes alone
    refusal = learn_briefly(strategy, stream, session, device, stream.batch_size + 1 if before else 1)
    return isinstance(refusal, ValueError) and _TORCH_SAYS in str(refusal)
