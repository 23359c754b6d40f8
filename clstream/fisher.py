"""The diagonal of the Fisher information of a model's parameters, over whole batches, exact sample by sample.

For a parameter w it is the mean over samples of weight * (d log p(label | x) / d w)^2. A linear layer's share has a closed form:
with inputs a and gradients d of its outputs, one row a sample, it is (weight * d^2)^T (a^2). All other parameters take one
gradient a sample, by `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from clstream.stream import Samples, Subset

KINDS = ("empirical", "weighted", "sampled")
_ROOM = 2**24  # numbers in the gradients of the samples that are taken together
_MOST = 1024  # of those samples


def diagonal_fisher(
    model: nn.Module,
    samples: Samples | Subset,
    kind: str = "empirical",
    augment: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher of each parameter that requires a gradient, by name: of its shape, not below 0.

    The model is asked in the mode that it is in; its parameters, gradients and buffers stay as they are. In training mode, batch
    norm takes each sample by itself, as it would with batches of one.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        samples: what the mean is over.
        kind: "empirical" (the true labels), "weighted" (the true labels, each square times the probability of its label) or
            "sampled" (labels drawn from the model's own answer: an unbiased estimate of the Fisher itself).
        augment: of the raw inputs, a batch at a time.
        generator: of the sampled labels, on the CPU. None: torch's global one.

    Raises:
        ValueError: for another kind, no samples, or a batch norm over single values in training mode.

    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if not len(samples):
        raise ValueError("the Fisher of no samples is not defined")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    if norms:  # each sample by itself: with its own statistics, and none that run along
        model = deepcopy(model)
        replace_all_batch_norm_modules_(model)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    step = max(1, min(_MOST, _ROOM // max(1, sum(weight.numel() for weight in weights.values()))))
    step = step if norms else _MOST
    for start in range(0, len(samples), step):
        part = samples[start : start + step]
        x = part.x if augment is None else augment(part.x)
        _add(found, model, weights, x, part.y.to(x.device), kind, generator, bool(norms))
    return {name: total / len(samples) for name, total in found.items()}


def _add(
    found: dict[str, Tensor],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    kind: str,
    generator: torch.Generator | None,
    alone: bool,
) -> None:
    """Add the sums over a batch to what was found; if `alone`, the samples of a batch have an influence on each other."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    leaves = {name: weight.requires_grad_() for name, weight in ((n, w.detach()) for n, w in weights.items())}
    closed: dict[str, _Layer] = {}
    if alone:
        fixed = {**kept, **weights}
        logits = vmap(lambda one: functional_call(model, fixed, (one[None],))[0], randomness="different")(x)
    else:
        with torch.enable_grad(), _Linear(leaves) as seen:
            logits = functional_call(model, {**kept, **leaves}, (x,))
        closed = seen.closed(len(x))
    chances = logits.detach().softmax(1)
    if kind == "sampled":
        y = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(y.device)
    share = chances.gather(1, y[:, None])[:, 0] if kind == "weighted" else torch.ones_like(chances[:, 0])
    if closed:
        likelihood = -F.cross_entropy(logits, y, reduction="sum")
        slopes = torch.autograd.grad(likelihood, [layer.outputs for layer in closed.values()])
        for (name, layer), slope in zip(closed.items(), slopes, strict=True):
            squares = share[:, None] * slope.square()
            found[name] += squares.T @ layer.inputs.detach().square()
            if layer.bias is not None:
                found[layer.bias] += squares.sum(0)
    done = {*closed, *(layer.bias for layer in closed.values())}
    rest = {name: weight.detach() for name, weight in weights.items() if name not in done}
    fixed = {name: weight.detach() for name, weight in weights.items() if name in done} | kept
    if not rest:
        return

    def likelihood_of(those: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        answer = functional_call(model, {**fixed, **those}, (one[None],))
        return -F.cross_entropy(answer, label[None])

    room = max(1, _ROOM // sum(weight.numel() for weight in rest.values()))
    for few in torch.arange(len(x), device=x.device).split(room):
        each = vmap(grad(likelihood_of), (None, 0, 0), randomness="different")(rest, x[few], y[few])
        for name, slope in each.items():
            found[name] += torch.tensordot(share[few], slope.square(), 1)


class _Layer:
    """One use of a linear layer: its inputs and outputs, a row a sample, and the name of its bias."""

    def __init__(self, inputs: Tensor, outputs: Tensor, bias: str | None) -> None:
        self.inputs, self.outputs, self.bias = inputs, outputs, bias


class _Linear(TorchFunctionMode):
    """Notes what goes into and comes out of linear layers."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.uses: dict[str, list[_Layer]] = {}
        self.others: set[str] = set()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, and note it if it is a linear layer's."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        named = [self.names[id(each)] for each in [*args, *kwargs.values()] if id(each) in self.names]
        if function is F.linear:
            inputs, weight, bias = (*args, *kwargs.values(), None)[:3]
            if id(weight) in self.names and inputs.dim() == 2 and (bias is None or id(bias) in self.names):
                layer = _Layer(inputs, result, None if bias is None else self.names[id(bias)])
                self.uses.setdefault(self.names[id(weight)], []).append(layer)
                return result
        self.others |= set(named)
        return result

    def closed(self, n: int) -> dict[str, _Layer]:
        """Return the layers, by their weight's name, whose parameters are used there and nowhere else, for n samples."""
        biases = [layer.bias for uses in self.uses.values() for layer in uses]
        return {
            name: uses[0]
            for name, uses in self.uses.items()
            if len(uses) == 1
            and len(uses[0].inputs) == n
            and name not in self.others
            and (uses[0].bias is None or (biases.count(uses[0].bias) == 1 and uses[0].bias not in self.others))
        }
