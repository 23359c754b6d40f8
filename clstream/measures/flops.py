"""FLOPs: floating-point operations of real steps, by the formulas of `torch.utils.flop_counter`.

Counted are matrix products, convolutions, attention, and recurrent layers that run as one operation: a multiplication and an
addition are 2. So a linear layer of n inputs and m outputs has 2 n m a sample in its forward pass, and as many for the gradient
of its weights and for that of its inputs; the first layer of a network needs no gradient of its inputs. Fused attention computes
its scores again in the backward pass, which then has 5 products for the forward pass's 2. Elementwise operations, reductions,
norms, softmax, optimizers' arithmetic, pooling, sorting and random numbers are not counted. What runs is counted, zeros too: a
matrix of which most is masked costs what a full one does. Operations under `torch.func` are seen as they run, batched. Of code
that runs outside of PyTorch's operations nothing is seen.

To look at each operation takes longer than a small step does. So steps are looked at where their cost may be another one, and
the others taken to cost the same: see `Steps`, and `same_flops`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from clstream.attributes import CONTAINERS, walk

KINDS = ("learning", "consolidating", "evaluating")

MOST_KNOWN = 10_000
"""Blocks whose FLOPs are remembered; of more, all are counted anew."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(slope: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(slope.shape, query.shape, key.shape, value.shape))


def _convolution_backward(slope: Tensor, x: Tensor, weight: Tensor, *options: Any, **_: Any) -> int:
    """Return the FLOPs of the gradients of a convolution's inputs and weights: for each as many as for its outputs.

    torch's own formula has those of grouped weights as often as there are groups.
    """
    transposed, asked = options[4], options[7]
    places = (x if transposed else slope).shape[2:].numel()
    return int(2 * len(x) * places * weight.numel() * sum(asked[:2]))


def _rnn(x: Tensor, inputs: Tensor, states: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a recurrent layer over (steps, n, width) inputs."""
    return int(2 * x.shape[0] * x.shape[1] * (inputs.numel() + states.numel()))


def _self_attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention with its four layers, over (n, length, width)."""
    n, length, width = query.shape
    return int(n * (4 * width * width * (length + key.shape[1]) + 4 * length * key.shape[1] * width))


def _transformer_layer(x: Tensor, *others: Any, **_: Any) -> int:
    """Return the FLOPs of a whole layer of a transformer: self-attention, and the two layers that follow it."""
    first, second = others[13], others[15]
    return _self_attention(x, x) + int(2 * x.shape[0] * x.shape[1] * (first.numel() + second.numel()))


OWN_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "convolution_backward": _convolution_backward,
    "mkldnn_rnn_layer": _rnn,
    "mkldnn_rnn_layer_backward": lambda *args, **kwargs: 2 * _rnn(*args, **kwargs),
    "_native_multi_head_attention": _self_attention,
    "_transformer_encoder_layer_fwd": _transformer_layer,
    "mm": lambda left, right, *_, **__: 2 * left.numel() * right.shape[1],
    "addmm": lambda _, left, right, *__, **___: 2 * left.numel() * right.shape[1],
    "mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "addmv": lambda _, matrix, *__, **___: 2 * matrix.numel(),
    "addmv_": lambda _, matrix, *__, **___: 2 * matrix.numel(),
    "dot": lambda vector, *_, **__: 2 * vector.numel(),
    "addbmm": lambda _, left, right, *__, **___: 2 * left.numel() * right.shape[2],
    "addbmm_": lambda _, left, right, *__, **___: 2 * left.numel() * right.shape[2],
}
"""Operations that torch's formulas leave out, get wrong, or take long for, by name."""

FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],  # torch has no formulas of what adds in place
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    **{getattr(torch.ops.aten, name): formula for name, formula in OWN_FORMULAS.items() if hasattr(torch.ops.aten, name)},
}


class FlopMode(TorchDispatchMode):
    """Counts the FLOPs of all operations while it is entered, unless it is paused."""

    def __init__(self, paused: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.paused = 0, paused

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is None and torch.is_inference_mode_enabled() and hasattr(func, "decompose"):
            with self:  # in this mode, operations that are made of others come whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None and not self.paused():
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class Steps:
    """The FLOPs of steps on batches of one size: some are counted, those between them lie on a line.

    Counted are the first two; as long as two that follow each other differ, those after another eighth of all so far; then those
    at four times the number of the last. So no step is missed where each costs the same, or a little more than the one before.
    """

    def __init__(self, state: Mapping[str, int] | None = None) -> None:
        self.number, self.flops, self.gap, self.left = 0, 0, 0, 0
        vars(self).update(state or {})

    def count(self, flops: int) -> int:
        """Take up a step that was counted, and return its FLOPs with those of the ones that were skipped before it."""
        gap, same = self.gap - self.left, flops == self.flops
        between = gap * (self.flops + flops) // 2
        self.number += gap + 1
        self.gap = 0 if self.number == 1 else 3 * self.number if same else self.number // 8
        self.flops, self.left = flops, self.gap
        return between + flops

    def skipped(self) -> int:
        """Return the FLOPs of the steps that were skipped since the last one that was counted: as many each as that one."""
        return (self.gap - self.left) * self.flops

    def flush(self) -> int:
        """Return the same, and take these steps for counted."""
        flops, self.number, self.gap = self.skipped(), self.number + self.gap - self.left, self.left
        return flops


class FlopMeter:
    """Counts the FLOPs of a run: `totals`, by what they were for.

    Args:
        strategy: whose they are; the structure of what it holds says whether counts still hold.
        paused: whether what runs now is not the strategy's.

    """

    def __init__(self, strategy: object, paused: Callable[[], bool]) -> None:
        self.strategy, self.paused = strategy, paused
        self.totals = dict.fromkeys(KINDS, 0)
        self.kind = "learning"
        self.mode, self.is_on = FlopMode(paused), False
        self.known: dict[str, int] = {}  # by structure and key
        self.structure = self.steps_structure = ""
        self.steps: dict[int, Steps] = {}  # by size of the batch
        self.events = 0  # of the strategy's own in this session

    def counts(self, size: int) -> bool:
        """Return whether the next step on a batch of some size needs a count."""
        steps = self.steps.get(size)
        return steps is None or not steps.left

    def skips(self, size: int) -> bool:
        """Return whether the next step on a batch of some size needs no count, and note that it was taken."""
        steps = self.steps.get(size)
        if steps is None or not steps.left:
            return False
        steps.left -= 1
        return True

    def step(self, size: int, call: Callable[..., Any], *args: object) -> Any:
        """Call what takes a step, count its FLOPs, and return what it returns."""
        steps = self.steps.get(size) or self.steps.setdefault(size, Steps())
        before = self.mode.flops
        with self._mode(True):
            result = call(*args)
        self.totals["learning"] += steps.count(self.mode.flops - before)
        self.mode.flops = before
        return result

    @contextmanager
    def counting(self, kind: str, wholly: bool = True) -> Iterator[None]:
        """Count all that runs within; if not `wholly`, only what is in blocks of `same_flops`."""
        outer, before, self.kind = self.kind, self.mode.flops, kind
        try:
            with self._mode(wholly):
                yield
        finally:
            self.totals[kind] += self.mode.flops - before
            self.mode.flops, self.kind = before, outer

    @contextmanager
    def block(self, key: Hashable, known: dict[Any, int] | None) -> Iterator[None]:
        """See `same_flops`."""
        counts: dict[Any, int] = self.known if known is None else known
        key = f"{self.structure} {key!r}" if known is None else key
        flops, before = counts.get(key), self.mode.flops
        with self._mode(flops is None):
            yield
        if flops is None:
            flops = self.mode.flops - before
            if len(counts) >= MOST_KNOWN:
                counts.clear()
            counts[key] = flops
        self.mode.flops = before
        self.totals[self.kind] += flops

    @contextmanager
    def once(self, key: Hashable) -> Iterator[None]:
        """See `counted_once`."""
        name, totals, before = f"once {key!r}", dict(self.totals), self.mode.flops
        again = name in self.known
        with self._mode(not again):
            yield
        flops, self.mode.flops, self.known[name] = self.mode.flops - before, before, 0
        if again:
            self.totals = totals
        else:
            self.totals[self.kind] += flops

    @contextmanager
    def _mode(self, on: bool) -> Iterator[None]:
        """Have the mode entered, or left, within."""
        if on == self.is_on:
            yield
            return
        self.is_on = on
        try:
            if on:
                with self.mode:
                    yield
            else:
                self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                try:
                    yield
                finally:
                    self.mode.__enter__()  # type: ignore[no-untyped-call]
        finally:
            self.is_on = not on

    def flush(self) -> None:
        """Add the steps that were skipped since the last counts."""
        self.totals["learning"] += sum(steps.flush() for steps in self.steps.values())

    def look(self, steps: bool = False) -> None:
        """Look at the structure of the strategy: counts of another one don't hold, with `steps` also those of steps."""
        self.structure = structure(self.strategy)
        if steps:
            self.events = 0
            if self.steps_structure != self.structure:
                self.restart()
                self.steps_structure = self.structure

    def restart(self) -> None:
        """Count the next steps anew."""
        self.flush()
        self.steps = {}

    def on_own_event(self) -> None:
        """Count the next steps anew, since the strategy tells of something; if it does so all the time, only now and then."""
        self.events += 1
        if self.events <= 64 or not self.events & (self.events - 1):
            self.restart()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the counts to come depend on, as plain values."""
        return {
            "totals": dict(self.totals),
            "known": dict(self.known),
            "structure": [self.structure, self.steps_structure],
            "steps": {str(size): dict(vars(steps)) for size, steps in self.steps.items()},
            "events": self.events,
        }

    @staticmethod
    def is_state(state: Mapping[str, Any]) -> bool:
        """Return whether these may be what `state_dict` returns."""
        kinds = {"totals": dict, "known": dict, "structure": list, "steps": dict, "events": int}
        if state.keys() != kinds.keys() or not all(isinstance(state[name], kind) for name, kind in kinds.items()):
            return False
        counts = [state["totals"], state["known"], *state["steps"].values()]
        return (
            state["totals"].keys() == {*KINDS}
            and all(isinstance(count, dict) and all(type(number) is int for number in count.values()) for count in counts)
            and all(str(size).isdecimal() and steps.keys() == vars(Steps()).keys() for size, steps in state["steps"].items())
            and [type(name) for name in state["structure"]] == [str, str]
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.totals, self.known, self.events = dict(state["totals"]), dict(state["known"]), state["events"]
        self.structure, self.steps_structure = state["structure"]
        self.steps = {int(size): Steps(steps) for size, steps in state["steps"].items()}


METER: ContextVar[FlopMeter | None] = ContextVar("meter", default=None)
"""What counts the FLOPs of the run that goes on."""


@contextmanager
def same_flops(key: Hashable, known: dict[Any, int] | None = None) -> Iterator[None]:
    """Say that this block has the same FLOPs whenever its key is the same: the first one is counted, the others are not looked at.

    Args:
        key: what the FLOPs depend on, such as the number of samples. Without `known`, also the shapes of all that the strategy
            holds.
        known: a dictionary that holds the counts; of a loop, a new one.

    """
    meter = METER.get()
    if meter is None or meter.paused():
        yield
    else:
        with meter.block(key, known):
            yield


@contextmanager
def counted_once(key: Hashable) -> Iterator[None]:
    """Count the FLOPs of this block, but not again for the same key: for what is kept for later, and lost when a run is resumed."""
    meter = METER.get()
    if meter is None or meter.paused():
        yield
    else:
        with meter.once(key):
            yield


@contextmanager
def consolidating() -> Iterator[None]:
    """Count the FLOPs of this block as those of consolidating: for what is done when a task or a session ends, at another time."""
    meter = METER.get()
    if meter is None or meter.paused():
        yield
    else:
        with meter.counting("consolidating"):
            yield


def structure(strategy: object) -> str:
    """Return a hash of what FLOPs may depend on: shapes of tensors, which have gradients, modes, and sizes of containers."""
    parts: list[object] = []
    for path, value in walk(strategy):
        if isinstance(value, Tensor):
            parts.append((path, tuple(value.shape), value.requires_grad))
        elif isinstance(value, nn.Module):
            parts.append((path, [(tuple(weight.shape), weight.requires_grad) for weight in value.parameters()]))
            parts.append([(type(module).__qualname__, module.training) for module in value.modules()])
        elif isinstance(value, (Mapping, *CONTAINERS)) or (isinstance(value, Sized) and hasattr(value, "sample")):  # or a memory
            parts.append((path, len(value).bit_length()))  # while a memory fills up, `Steps` follows
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
