"""The diagonal of the Fisher information of a model's parameters, over whole batches, exact sample by sample.

For a parameter w it is the mean over samples of weight * (d log p(y | x) / d w)^2; log p is minus the loss. A linear layer's share
has a closed form: with inputs a and gradients d of its outputs, one row a sample, it is (weight * d^2)^T (a^2). All other
parameters take one gradient a sample, by `torch.func.vmap`; where that can't follow a model (recurrent layers), one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from clstream.losses import sample_losses
from clstream.measures.flops import same_flops
from clstream.params import check_choice, check_integer
from clstream.seeds import random_state_kept
from clstream.stream import Samples, Subset

KINDS = ("empirical", "weighted", "sampled", "predicted")
Losses = Callable[[Tensor, Tensor], Tensor]
"""(n, outputs) outputs and n targets to (n,) losses: negative log likelihoods."""
_ROOM = {"cpu": 2**24, "cuda": 2**28}  # numbers in the gradients of the samples that are taken together
_MOST, _FEW = 1024, 64  # of those samples, where there are closed forms for all, and else


def diagonal_fisher(
    model: nn.Module,
    samples: Samples | Subset,
    kind: str = "empirical",
    augment: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    losses: Losses | None = None,
    competing: Losses | None = None,
    power: int = 2,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher of each parameter that requires a gradient, by name: of its shape, not below 0.

    The model is asked in the mode that it is in; its parameters, gradients and buffers stay as they are. Batch norm that takes the
    statistics of the batch takes those of each sample by itself, as it would with batches of one.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        samples: what the mean is over; moved to the model's device a part at a time. Their targets may be of any kind.
        kind: "empirical" (the true targets), "weighted" (the true targets, each square times their likelihood), "sampled" (targets
            drawn from the model's own answer: an unbiased estimate of the Fisher itself) or "predicted" (the targets that the
            model finds likeliest). Multi-label: each column is drawn by its sigmoid, or is 1 where that is above 1/2. Values are
            drawn from the normal around the outputs whose negative log density is the loss up to a constant: for the mean
            squared error of k outputs, of variance k / 2. Predicted values have no loss, so "predicted" is refused.
            The likelihood is exp(-loss): for labels the probability of the label; for a mean over k columns the k-th root of the
            probability of them all; for values a density, as a share of its greatest. None is ever above 1.
        augment: of the raw inputs, a batch at a time.
        generator: of the sampled targets, on the CPU. None: torch's global one.
        losses: each sample's negative log likelihood. None: that of the targets' kind over all outputs, see
            `clstream.losses.sample_losses`. It is called under `vmap`.
        competing: outputs and true targets to outputs, -inf for those that don't compete: what targets are sampled or predicted
            from. None: all outputs.
        power: 2, or 1 for the mean of absolute gradients in place of squares (memory aware synapses).

    Raises:
        ValueError: for another kind, no samples, no parameters, or batch norm over single values.

    """
    check_choice(KINDS, kind=kind)
    check_integer(1, 2, power=power)
    check_kind(kind, samples)
    coupled = any(_is_coupled(module) for module in model.modules())
    model = _parted(model) if coupled else model
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no parameters that require a gradient, so it has no Fisher")
    losses = partial(sample_losses, target=samples.target) if losses is None else losses
    device = next(iter(weights.values())).device
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    first = samples[:1].x.to(device)
    closed = {} if coupled else _closed(model, weights, first if augment is None else augment(first))
    rest = {name: weight for name, weight in weights.items() if name not in {*closed, *closed.values()}}
    size = sum(weight.numel() for weight in rest.values())
    step = max(1, min(_FEW, _ROOM.get(device.type, _ROOM["cpu"]) // size)) if rest else _MOST
    counted: dict[int, int] = {}
    for start in range(0, len(samples), step):
        part = samples[start : start + step].to(device)
        x = part.x if augment is None else augment(part.x)
        y = part.y
        if kind in ("sampled", "predicted"):
            answers = _answers(model, weights, x, coupled)
            answers = answers if competing is None else competing(answers, y)
            y = _own_targets(answers, y, part.target, kind, generator, losses)
        with same_flops(len(y), counted):
            if closed:
                _add_closed(totals, model, weights, closed, x, y, losses, kind == "weighted", power)
            if rest:
                _add_rest(totals, model, weights, rest, x, y, losses, kind == "weighted", power)
    return {name: total / len(samples) for name, total in totals.items()}


def batch_fisher(
    model: nn.Module,
    samples: Samples | Subset,
    batch_size: int,
    kind: str = "empirical",
    augment: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    losses: Losses | None = None,
    competing: Losses | None = None,
    power: int = 2,
) -> dict[str, Tensor]:
    """Return, by name, what many codes take for the diagonal Fisher: squares of the gradients of whole batches.

    The mean over batches of batch_size * (d mean loss / d w)^2, over the batches that are full, or the only one. Gradients of a
    batch are averaged before they are squared, so what they don't agree on is lost, and the factor only brings it back to the size
    of the Fisher; of absolute gradients (`power=1`) there is no factor. The model is asked in the mode that it is in; its gradients
    stay as they are.

    Args:
        model, samples, kind, augment, generator, losses, competing, power: see `diagonal_fisher`.
        batch_size: samples of a batch, in a random order.

    """
    check_choice(("empirical", "sampled", "predicted"), kind=kind)
    check_integer(1, batch_size=batch_size)
    check_integer(1, 2, power=power)
    check_kind(kind, samples)
    losses = partial(sample_losses, target=samples.target) if losses is None else losses
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    device = next(iter(weights.values())).device
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    size = min(batch_size, len(samples))
    order = torch.randperm(len(samples), generator=generator)[: len(samples) // size * size].split(size)
    counted: dict[int, int] = {}
    for rows in order:
        part = samples[rows.to(samples.y.device)].to(device)
        with same_flops(size, counted):
            outputs = model(part.x if augment is None else augment(part.x))
            y = part.y
            if kind != "empirical":
                answers = outputs.detach() if competing is None else competing(outputs.detach(), y)
                y = _own_targets(answers, y, part.target, kind, generator, losses)
            slopes = torch.autograd.grad(losses(outputs, y).mean(), list(weights.values()), materialize_grads=True)
        for total, slope in zip(totals.values(), slopes, strict=True):
            total += _size(slope, power) * ((size if power == 2 else 1) / len(order))
    return totals


def session_fisher(
    model: nn.Module,
    samples: Samples | Subset,
    kind: str,
    augment: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    losses: Losses | None = None,
    competing: Losses | None = None,
    batch_size: int | None = None,
    power: int = 2,
) -> dict[str, Tensor]:
    """Return the Fisher of a session's samples in a run, whose random numbers stay: augmentations and dropout draw from them.

    Args:
        model, samples, kind, augment, generator, losses, competing, power: see `diagonal_fisher`.
        batch_size: for `batch_fisher`. None: `diagonal_fisher`.

    """
    options = kind, augment, generator, losses, competing
    with random_state_kept(next(model.parameters()).device):
        if batch_size is None:
            return diagonal_fisher(model, samples, *options, power)
        return batch_fisher(model, samples, batch_size, *options, power)


def running_mean(mean: Tensor, seen: int, new: Tensor, n: int) -> Tensor:
    """Return the mean over `seen` samples and `n` more, from those over each."""
    return (seen * mean + n * new) / (seen + n)


def _size(slope: Tensor, power: int) -> Tensor:
    """Return the squares, or the absolute values: that of a product is the product of those of its factors."""
    return slope.square() if power == 2 else slope.abs()


def _is_coupled(module: nn.Module) -> bool:
    """Return whether a module takes the statistics of the batch: then samples have an influence on each other."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _parted(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose batch norm keeps no running statistics where it takes those of the batch."""
    model = deepcopy(model)
    for module in model.modules():
        if _is_coupled(module):
            module.running_mean = module.running_var = module.num_batches_tracked = None  # type: ignore[assignment]
            module.track_running_stats = False  # type: ignore[assignment]  # as its constructor would have it
    return model


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _answers(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, coupled: bool) -> Tensor:
    """Return a model's answers, each sample asked by itself if samples have an influence on each other."""
    with torch.no_grad():
        parts = x.split(1) if coupled else (x,)
        return torch.cat([functional_call(model, {**_buffers(model), **weights}, (part,)) for part in parts])


def check_kind(kind: str, samples: Samples | Subset) -> None:
    """Refuse no samples, and a kind of Fisher that their targets don't have. Raises ValueError."""
    if not len(samples):
        raise ValueError("the Fisher of no samples is not defined")
    if kind == "predicted" and samples.target == "value":
        raise ValueError("a model's own values have no error, so their 'predicted' Fisher is 0: take 'sampled' or 'empirical'")


def _own_targets(answers: Tensor, y: Tensor, target: str, kind: str, generator: torch.Generator | None, losses: Losses) -> Tensor:
    """Return targets like `y` for answers out of these themselves: the likeliest, or drawn ones."""
    if target == "label":
        if kind == "predicted":
            return answers.argmax(1)
        shares = answers.softmax(1).cpu().double().cumsum(1)
        drawn = torch.rand(len(answers), 1, generator=generator) * shares[:, -1:]  # a number a sample, however many outputs
        return torch.searchsorted(shares, drawn, right=True)[:, 0].to(answers.device)
    if target == "multilabel":
        odds = answers[:, : y.shape[1]].sigmoid()
        return (odds > (0.5 if kind == "predicted" else torch.rand(odds.shape, generator=generator).to(odds))).to(y)
    unit = losses(torch.zeros_like(answers), torch.ones_like(answers))  # of an error of 1 in each of k outputs: k / (2 variance)
    noise = torch.randn(answers.shape, generator=generator).to(answers)
    return answers + noise * (answers.shape[1] / (2 * unit))[:, None].sqrt()


def _closed(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> dict[str, str | None]:
    """Return the weights of linear layers with a row for each sample, used nowhere else, with their biases, all by name."""
    candidates: list[dict[str, str | None]] = []
    for n in (1, 3):  # a layer over something else than samples has other numbers of rows
        with torch.no_grad(), random_state_kept(x.device):
            leaves = {name: weight.detach() for name, weight in weights.items()}
            with _Linear(leaves) as seen:
                functional_call(model, {**_buffers(model), **leaves}, (x.expand(n, *x.shape[1:]),))
        candidates.append({name: layer.bias for name, layer in seen.closed(n).items()})
    return {name: bias for name, bias in candidates[0].items() if candidates[1].get(name, "none") == bias}


def _add_closed(
    totals: dict[str, Tensor],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    closed: Mapping[str, str | None],
    x: Tensor,
    y: Tensor,
    losses: Losses,
    weighted: bool,
    power: int,
) -> None:
    """Add the sums over a batch for the layers that have a closed form."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad(), _Linear(leaves) as seen:
        likelihood = -losses(functional_call(model, {**_buffers(model), **leaves}, (x,)), y)
    layers = [seen.uses[name][0] for name in closed]
    slopes = torch.autograd.grad(likelihood.sum(), [layer.outputs for layer in layers], materialize_grads=True)
    for (name, bias), layer, slope in zip(closed.items(), layers, slopes, strict=True):
        sizes = _size(slope, power) * likelihood.detach().exp()[:, None] if weighted else _size(slope, power)
        totals[name] += sizes.T @ _size(layer.inputs.detach(), power)
        if bias is not None:
            totals[bias] += sizes.sum(0)


def _add_rest(
    totals: dict[str, Tensor],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    losses: Losses,
    weighted: bool,
    power: int,
) -> None:
    """Add the sums over a batch for all other parameters."""
    fixed = {**_buffers(model), **{name: weight for name, weight in weights.items() if name not in rest}}

    def likelihood_of(free: dict[str, Tensor], sample: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        likelihood = -losses(functional_call(model, {**fixed, **free}, (sample[None],)), label[None])[0]
        return likelihood, likelihood.detach()

    slope_of = grad(likelihood_of, has_aux=True)
    try:
        slopes, likelihoods = vmap(slope_of, (None, 0, 0), randomness="different")(dict(rest), x, y)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise ValueError(
                f"{type(model).__name__} has batch norm over single values, and the Fisher takes one sample at a time: leave "
                "the Fisher out (Refresh: fisher_weight=0), or use another norm"
            ) from error
        raise
    except RuntimeError:  # vmap can't follow every model
        pairs = [slope_of(dict(rest), sample, label) for sample, label in zip(x, y, strict=True)]
        slopes = {name: torch.stack([slope[name] for slope, _ in pairs]) for name in rest}
        likelihoods = torch.stack([likelihood for _, likelihood in pairs])
    share = likelihoods.exp() if weighted else torch.ones_like(likelihoods)
    for name, slope in slopes.items():
        totals[name] += torch.tensordot(share, _size(slope, power), 1)


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
        if function is F.linear:
            inputs, weight, bias = (*args, *kwargs.values(), None)[:3]
            if id(weight) in self.names and inputs.dim() == 2:
                layer = _Layer(inputs, result, self.names.get(id(bias)))  # a frozen bias counts as none
                self.uses.setdefault(self.names[id(weight)], []).append(layer)
                return result.clone()  # what comes next may change it in place
        self.others |= {self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names}
        return result

    def closed(self, n: int) -> dict[str, _Layer]:
        """Return the layers, by their weight's name, whose parameters are used there and nowhere else, with n rows."""
        biases = [layer.bias for uses in self.uses.values() for layer in uses]
        return {
            name: uses[0]
            for name, uses in self.uses.items()
            if len(uses) == 1
            and len(uses[0].inputs) == n
            and name not in self.others
            and (uses[0].bias is None or (biases.count(uses[0].bias) == 1 and uses[0].bias not in self.others))
        }
