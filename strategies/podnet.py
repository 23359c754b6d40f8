"""PODNet: what all stages of the network give stays near what it was, summed over rows and columns; classes have several proxies.

Douillard, Cord, Ollion, Robert, Valle 2020, "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning". Form
implemented, with n old classes, m new ones (those of the session that goes on), f the features, a_l the (channels, height, width)
that stage l gives, f' and a'_l those of a frozen copy from before the session:

similarity  y_c = sum over k of softmax(s)_k s_k, s_k = cos(f, w_ck), with K proxies w_ck of each class: local similarities
loss        L_LSC + sqrt((n + m) / m) (lambda_c L_spatial + lambda_f L_flat); in the first session L_LSC alone
            L_LSC = -log(exp(eta y_c) / (exp(eta max y) + sum over others i of exp(eta y_i))), c the sample's class, eta learned,
                    from 1: NCA
            L_spatial = mean over stages l of |p(a_l) - p(a'_l)|; p has the squares of the channels, summed over rows and over
                        columns, all divided by their common length
            L_flat = 1 - cos(f, f')
old w_ck    are fixed while a session is learned; new ones begin as the centres of k-means of f / |f| over their samples, brought
            to the mean length of old proxies; in the first session from N(0, 1 / width)
exemplars   by herding, as in iCaRL (`clstream.strategy.exemplars`), capacity / (n + m) of each class
finetuning  when a session has ended, `finetune_epochs` passes over the exemplars: all proxies learn L_LSC, f and eta fixed
answer      the highest eta y_c of the classes that came. `ClassMeans` around it answers by nearest means of exemplars

The defaults of losses and finetuning are those of the authors' configuration for CIFAR-100, which has SGD of 0.1 with momentum 0.9,
decay 5e-4 and a cosine schedule. Stages are those of the model that convolve, but for a stem: of ResNet18 the four that they take.
A network without feature maps, as an Mlp, has L_flat alone. Features are to have both signs: the authors' network for CIFAR has no
ReLU at the end of any block, their ResNet18 none at the end of any stage. Here `ResNet18(last_relu=False)` drops that of the last
block alone.

Conflicts: `form="paper"` is, as recalled, what the paper prints:

    L_LSC = max(0, -log(exp(eta (y_c - margin)) / sum over others i of exp(eta y_i)))

In the authors' code, and PyCIL's, the margin is taken off all similarities, so that it cancels, the sum has a further term, and
nothing is cut off at 0: `form="code"`, the default, as above. The paper's form is no good with eta learned: where similarities
differ by less than the margin, a lower eta lowers the loss. With two classes eta went from 1 to below 0, where answers turn around.

Their similarities are -|f/|f| - w/|w||^2 = 2 s - 2 in place of s, in the softmax over proxies too; PyCIL's are s. As recalled, the
paper prints squared distances between pooled outputs; the codes have them as here. The authors hold each number of a gradient
within +-5. PyCIL lets the network learn in finetuning, and has lambda_c = 5.

Deviations: the authors finetune in training mode, so that statistics of batch norm go on, and multiply centres as they are, a
little shorter than unit vectors, by the mean length. k-means begins with samples at random, once (theirs ten times, by k-means++);
with fewer samples than proxies some begin alike. The budget is rounded down; the authors' main results have 20 exemplars of each
class. Everything else is as in `cosine_rehearsal`.

Measured, own numbers (class-IL Split MNIST, one epoch in batches of 32, Mlp 400-400, so without feature maps, capacity 500, SGD
0.03; nothing tuned): accuracy 0.882 ± 0.006 over 3 seeds. With `ResNet18(width=8, last_relu=False)`: 0.944 ± 0.016 on
`split_digits` (anchor `podnet-split-digits`: 20 epochs in batches of 16, capacity 200, SGD 0.03 with momentum 0.9; with 5 epochs,
85 steps a task, the three seeds have 0.890, 0.856 and 0.627); on CIFAR-10 as JPEG files (1,000 images a class, 2 epochs, else as on
MNIST) 0.255 with one seed: few steps for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.params import check_choice, check_number
from clstream.strategy import OptimizerFactory
from clstream.strategy.core_sets import k_means
from clstream.strategy.cosine_rehearsal import CosineRehearsal, feature_distance
from clstream.stream import Samples


class PODNet(CosineRehearsal):
    """Learn a classifier of several proxies a class beside exemplars, and distil pooled outputs.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with `features`: the same to (n, features), and a `head` that
            tells their width, which is not used else.
        optimizer: makes the optimizer of a session, anew for each.
        capacity: the most exemplars of all classes together; at least as many as there are classes.
        proxies: K, of each class.
        margin: that a sample's class is to be ahead of all others by; of form "paper" alone.
        lambda_c: the weight of the distillation of feature maps, before it is adapted to the number of classes.
        lambda_f: that of features.
        form: of the classification loss, "code" or "paper", see above.
        layers: names of the modules whose (n, channels, height, width) outputs are distilled. None: the stages that convolve.
        finetune_epochs: passes over the exemplars when a session has ended, in which the classifier learns.
        finetune_lr: the learning rate of these.
        finetune_batch: samples of a step in these.

    Raises:
        TypeError: for a model without `features`, or without a head that tells their width.
        ValueError: for layers that the model hasn't.

    """

    finetune_decay = 5e-4

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 2000,
        proxies: int = 10,
        margin: float = 0.6,
        lambda_c: float = 3.0,
        lambda_f: float = 1.0,
        form: str = "code",
        layers: Sequence[str] | None = None,
        finetune_epochs: int = 20,
        finetune_lr: float = 0.05,
        finetune_batch: int = 128,
    ) -> None:
        super().__init__(model, optimizer, capacity, proxies, finetune_epochs, finetune_lr, finetune_batch)
        check_number(0, margin=margin, lambda_c=lambda_c, lambda_f=lambda_f)
        check_choice(("code", "paper"), form=form)
        names = dict(model.named_modules())
        if layers is not None and (isinstance(layers, str) or any(name not in names for name in layers)):
            raise ValueError(f"layers must be a list of names of modules of {type(model).__name__}, not {layers!r}")
        self.margin, self.lambda_c, self.lambda_f, self.form = margin, lambda_c, lambda_f, form
        self.layers = convolving_stages(model) if layers is None else list(layers)

    def first_proxies(self, classes: int) -> Tensor:
        """Return (classes, K, width), normally distributed."""
        width = self.classifier.old.shape[2]
        return torch.randn(classes, self.proxies, width, generator=self.random) / math.sqrt(width)

    def imprint(self, features: Tensor) -> Tensor:
        """Return (K, width), the centres of k-means."""
        centres = k_means(features, self.proxies, self.random)
        return centres[torch.arange(self.proxies, device=centres.device) % len(centres)]

    def features_and_maps(self, network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the (rows, width) features of raw inputs, and the (rows, channels, height, width) outputs of the layers."""
        maps = list[Tensor]()
        with ExitStack() as hooks:
            for name in self.layers:
                layer = network.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(lambda _, __, output: maps.append(output)))
            features: Tensor = network.features(x)  # type: ignore[operator]  # the constructor has asked for it
        if any(output.dim() != 4 for output in maps):
            name = next(name for name, output in zip(self.layers, maps, strict=True) if output.dim() != 4)
            raise ValueError(
                f"PODNet distils feature maps (n, channels, height, width), and {name} gives none: leave it out of layers"
            )
        return features, maps

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss over the samples and what was drawn beside them."""
        x, y = self.joined(samples)
        features, maps = self.features_and_maps(self.model, x)
        loss = nca(self.classifier(features), self.classifier.places(y), self.classifier.eta, self.margin, self.form)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            features_before, maps_before = self.features_and_maps(self.teacher, x)
        distilled = self.lambda_f * feature_distance(features, features_before)
        if maps:
            distilled = distilled + self.lambda_c * pooled_distance(maps, maps_before)
        return loss + math.sqrt(1 + self.ratio) * distilled

    def finetune_loss(self, similar: Tensor, places: Tensor) -> Tensor:
        """Return the classification loss of exemplars."""
        return nca(similar, places, self.classifier.eta.detach(), self.margin, self.form)


def convolving_stages(model: nn.Module) -> list[str]:
    """Return the names of a model's stages that hold a convolution of images, but for a stem; of a model without stages none."""
    stages = getattr(model, "stages", None)
    children = stages.named_children() if isinstance(stages, nn.Module) else ()
    return [
        f"stages.{name}"
        for name, stage in children
        if name != "stem" and any(isinstance(part, nn.Conv2d) for part in stage.modules())
    ]


def nca(similar: Tensor, places: Tensor, eta: Tensor, margin: float, form: str) -> Tensor:
    """Return the classification loss, the mean over rows, a scalar: see above.

    Args:
        similar: (rows, classes), the similarities of samples with classes.
        places: (rows,), where their own classes stand among these.
        eta: their factor.
        margin: by how much the own one is to be ahead.
        form: "code" or "paper".

    """
    scaled = eta * similar
    own = scaled.gather(1, places[:, None])[:, 0]
    if form == "paper":
        others = scaled.scatter(1, places[:, None], float("-inf"))
        return (others.logsumexp(1) - own + eta * margin).clamp(min=0).mean() if similar.shape[1] > 1 else 0 * own.mean()
    others = scaled.scatter(1, places[:, None], scaled.amax(1, keepdim=True))
    return (others.logsumexp(1) - own).mean()


def pooled_distance(maps: list[Tensor], before: list[Tensor]) -> Tensor:
    """Return the mean over maps and rows of the distance of pooled squares: of (rows, channels, height, width) maps, a scalar."""
    distances = [(pooled(now) - pooled(then)).norm(dim=1).mean() for now, then in zip(maps, before, strict=True)]
    return torch.stack(distances).mean()


def pooled(maps: Tensor) -> Tensor:
    """Return (rows, channels * (height + width)), sums of squares over rows and columns of maps, at unit length."""
    squares = maps.square()
    return F.normalize(torch.cat([squares.sum(3).flatten(1), squares.sum(2).flatten(1)], 1), dim=1)
