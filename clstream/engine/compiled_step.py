"""Compiled steps: forward pass, loss with its penalties, backward pass and optimizer as one function of `torch.compile`.

What a step learns of the past is drawn before, as ever: see `Strategy`. The steps that follow are compiled, each shape by itself;
all others are taken as they are written. Which ones these are depends on the state of the run alone, so that a resumed run
takes the same ones:

- steps on fewer samples than a full batch has
- steps with a draw that took all of a memory that still fills up: it grows from step to step
- steps whose FLOPs are counted
- the first step of an optimizer that keeps something of each weight
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from tempfile import TemporaryFile
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from clstream.attributes import find_all
from clstream.measures.ledger import Ledger
from clstream.memory import Memory
from clstream.strategy import Strategy, Wrapper
from clstream.stream import Batch, Samples

MOST_COMPILES = 8
"""How often a step is compiled within a session before that is given up: it takes seconds each time."""


MOST_RATES = 1024
"""Learning rates that are kept as tensors."""


class Group(NamedTuple):
    """A group of an optimizer's weights, as a compiled step takes it.

    Args:
        weights: those that require a gradient.
        kept: what the optimizer keeps of each of them: a list for each of `kept_names`.
        lr: the learning rate, a tensor: a number would be compiled in.
        options: the others that its step depends on.

    """

    weights: list[Tensor]
    kept: list[list[Tensor]]
    lr: Tensor
    options: dict[str, Any]


ADAM = ("weight_decay", "betas", "eps", "amsgrad", "maximize", "decoupled_weight_decay")

OPTIONS: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("weight_decay", "momentum", "dampening", "nesterov", "maximize"),
    Adam: ADAM,
    AdamW: ADAM,
}
"""The optimizers whose step is compiled too, and their options beside the learning rate. Others step as they are written."""


def kept_names(group: dict[str, Any]) -> tuple[str, ...]:
    """Return what one of these optimizers keeps of each weight of a group."""
    if "betas" in group:
        return ("exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_buffer",) if group["momentum"] else ()


def is_compiled_too(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's step is compiled with the rest: it is one of `OPTIONS`, and nothing was put around its step."""
    special = ("fused", "capturable", "differentiable")
    return (
        type(optimizer) in OPTIONS
        and "step" not in vars(optimizer)
        and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        and not any(isinstance(group["lr"], Tensor) or any(group.get(name) for name in special) for group in optimizer.param_groups)
    )


def step(
    learner: Strategy, samples: Samples, drawn: tuple[Samples, ...], groups: list[Group], updates: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the detached loss of a step and the gradients of the weights, and take the optimizer's step if it `updates`."""
    loss = learner.objective_with(samples, drawn)
    gradients = torch.autograd.grad(loss, [weight for group in groups for weight in group.weights], allow_unused=True)
    if updates:
        begin = 0
        with torch.no_grad():
            for group in groups:
                update(group, gradients[begin : begin + len(group.weights)])
                begin += len(group.weights)
    return loss.detach(), gradients


def update(group: Group, gradients: tuple[Tensor | None, ...]) -> None:
    """Take an optimizer's step on a group of weights; those that have no gradient stay."""
    used = [(place, gradient) for place, gradient in enumerate(gradients) if gradient is not None]
    weights, slopes = [group.weights[place] for place, _ in used], [gradient for _, gradient in used]
    kept = [[values[place] for place, _ in used] for values in group.kept]
    options = group.options
    if "betas" in options:
        beta1, beta2 = options["betas"]
        rest = {name: value for name, value in options.items() if name != "betas"}
        steps = [number.double() for number in kept[2]]  # else powers of the betas are rounded to float32
        greatest = kept[3] if len(kept) == 4 else []
        adam(weights, slopes, kept[0], kept[1], greatest, steps, foreach=False, beta1=beta1, beta2=beta2, lr=group.lr, **rest)
        for number in kept[2]:
            number += 1
    else:
        momenta: Any = kept[0] if kept else [None] * len(weights)
        sgd(weights, slopes, momenta, has_sparse_grad=False, foreach=False, lr=group.lr, **options)


class CompiledStep:
    """Takes the steps of a strategy.

    Args:
        strategy: whose steps.
        batch_size: of a full batch.
        device: of the run. On CUDA a step is recorded as a graph.
        ledger: is told of the seconds of compiling, and says whether the FLOPs of a step are counted.

    """

    def __init__(self, strategy: Strategy, batch_size: int, device: torch.device, ledger: Ledger) -> None:
        self.strategy, self.batch_size, self.device, self.ledger = strategy, batch_size, device, ledger
        self.learner = learner_of(strategy)
        self.refusal = ""  # why steps are taken as they are written
        if type(self.learner).learn is not Strategy.learn:
            self.refusal = f"{type(self.learner).__name__} takes its steps by a `learn` of its own"
        self.is_told = False
        self.compiles = 0  # within the session
        self.memories: list[Memory] = []
        self.rates: dict[float, Tensor] = {}
        own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__)  # torch keeps what it compiled with the code
        options: dict[str, Any] = {"fallback_random": True}  # random numbers as in steps that are not compiled
        if device.type == "cuda":
            options["triton.cudagraphs"] = True
        begin = time.perf_counter()
        self.step = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        ledger.spent["compiling"] = time.perf_counter() - begin

    def begin_session(self) -> None:
        """Look at the strategy as it is when a session begins."""
        if self.refusal:
            self.tell()
        self.memories, self.compiles = [memory for _, memory in find_all(self.learner, Memory)], 0

    def learn(self, batch: Batch) -> Tensor:
        """Take one step, as `Strategy.learn` does."""
        samples, learner, optimizer = batch.samples, self.learner, self.learner.optimizer
        if self.refusal or len(samples) != self.batch_size or self.ledger.meter.is_on:
            return self.strategy.learn(batch)
        groups, updates = self.groups(optimizer)
        if not updates and not optimizer.state and type(optimizer) in OPTIONS:
            return self.strategy.learn(batch)
        updates = updates and learner.train_updates is None  # else that takes the optimizer's step
        drawn = learner.draw(samples)
        if any(len(past) == len(memory) < memory.capacity for memory in self.memories for past in drawn):
            return self.as_written(batch, drawn)
        stepped = self.compiled(samples, drawn, groups, updates)
        if stepped is None:
            return self.as_written(batch, drawn)
        loss, gradients = stepped
        weights = [weight for group in groups for weight in group.weights]
        if learner.train_updates is not None:
            learner.train_updates.add(weights, gradients)
            learner.train_updates.update(optimizer)
            return loss
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        if not updates:
            optimizer.step()
        return loss

    def compiled(
        self, samples: Samples, drawn: tuple[Samples, ...], groups: list[Group], updates: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]] | None:
        """Return what `step` returns; None if it can't be compiled, and then nothing has changed."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._dynamo.utils import counters

        graphs, begin = counters["stats"]["unique_graphs"], time.perf_counter()
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            loss, gradients = self.step(self.learner, samples, drawn, groups, updates)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.ledger.spent["compiling"] += time.perf_counter() - begin
            self.refusal = str(error).strip().partition("\n")[0]
            self.tell()
            return None
        if counters["stats"]["unique_graphs"] != graphs:
            self.ledger.spent["compiling"] += time.perf_counter() - begin
            self.compiles += 1
            if self.compiles == MOST_COMPILES:
                self.refusal = f"one had to be compiled {MOST_COMPILES} times within a session, as it changes from batch to batch"
                self.tell()
        return (loss.clone() if on_cuda else loss), gradients  # what a graph on CUDA returns is overwritten by the next step

    def as_written(self, batch: Batch, drawn: tuple[Samples, ...]) -> Tensor:
        """Take a step as it is written, with what was drawn for it."""
        self.learner.drawn_before = drawn
        try:
            return self.strategy.learn(batch)
        finally:
            self.learner.drawn_before = None

    def groups(self, optimizer: Optimizer) -> tuple[list[Group], bool]:
        """Return the groups of an optimizer, and whether its step is compiled: it can be, and all that it keeps is there."""
        updates, groups = is_compiled_too(optimizer), list[Group]()
        for group in optimizer.param_groups:
            weights = [weight for weight in group["params"] if weight.requires_grad]
            if not updates:
                groups.append(Group(weights, [], self.rate(0.0), {}))
                continue
            kept = [[optimizer.state.get(weight, {}).get(name) for weight in weights] for name in kept_names(group)]
            updates = not any(value is None for values in kept for value in values)
            if self.device.type == "cuda" and updates:
                for value in chain.from_iterable(kept):
                    torch._dynamo.mark_static_address(value)  # as weights are: else the graph could not be one that changes it
            groups.append(Group(weights, kept, self.rate(group["lr"]), {name: group[name] for name in OPTIONS[type(optimizer)]}))
        return groups, updates

    def rate(self, lr: float) -> Tensor:
        """Return a learning rate as a tensor."""
        if len(self.rates) >= MOST_RATES:  # a schedule has another one in each step
            self.rates.clear()
        if lr not in self.rates:
            self.rates[lr] = torch.tensor(lr, dtype=torch.float64, device=self.device)
        return self.rates[lr]

    def tell(self) -> None:
        """Say once why steps are taken as they are written."""
        if not self.is_told:
            self.is_told = True
            warnings.warn(
                f"the steps of {type(self.strategy).__name__} are not compiled, but taken as they are written: {self.refusal}",
                RuntimeWarning,
                stacklevel=2,
            )


@contextmanager
def compiling(whether: bool) -> Iterator[None]:
    """Within it, torch compiles gradients and optimizers too, as often as it takes; its settings are the same afterwards."""
    if not whether:
        yield
        return
    from torch._dynamo import config

    with config.patch(trace_autograd_ops=True, trace_numpy=False, recompile_limit=1_000, accumulated_recompile_limit=1_000_000):
        yield


def learner_of(strategy: Strategy) -> Strategy:
    """Return whose steps a strategy's are: its own, or those of the one that it wraps."""
    while isinstance(strategy, Wrapper) and type(strategy).learn is Wrapper.learn:
        strategy = strategy.base
    return strategy


def check_compiler(precision: str) -> None:
    """Refuse to compile where networks don't compute in float32, torch is older, or there is no C++ compiler or folder for it.

    Raises ValueError.
    """
    if precision != "fp32":
        raise ValueError(f"compile=True computes in float32: leave it out, or precision={precision!r}")
    from torch._dynamo import config

    if not hasattr(config, "trace_autograd_ops"):
        raise ValueError(f"compile=True needs torch 2.11 or newer, and this is {torch.__version__}: leave it out, or upgrade torch")
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        with TemporaryFile(dir=cache_dir()):
            pass
    except OSError as error:
        raise ValueError(
            f"compile=True keeps what it compiled in a folder that can't be written ({error}): name another one in the "
            "environment, as TORCHINDUCTOR_CACHE_DIR"
        ) from error
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "compile=True needs a C++ compiler, and there is none: install g++, name another one in the environment as CXX, or "
            "leave compile out"
        ) from None
