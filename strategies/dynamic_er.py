"""DynamicER (DER, dynamically expandable representation): new classes get a feature extractor of their own, beside frozen ones.

Yan, Xie, He 2021, "DER: Dynamically Expandable Representation for Class Incremental Learning"; here DynamicER, since `DER` is dark
experience replay. Form implemented, with n old classes, m new ones (those of the session that goes on), extractors F_1, ..., F_t:

expansion   a session with a class that never came begins with a new extractor F_t, which begins as the one before it, with `prune`
            as that was with all of its channels; that one is frozen, in evaluation mode. Super-feature u = [F_1(x), ..., F_t(x)]
loss        CE(H(u), y) + lambda_a CE(H_a(F_t(x)), y_a) + lambda_s L_S; in the first session without the second term
            H    linear, without bias: n + m outputs. What it had for old classes and extractors stays, the rest is drawn
            H_a  linear, without bias, anew in each session: m + 1 outputs; y_a is the new class, or one output for all old ones
masks       with `prune`: m_i = sigmoid(s e_i) for channel i of F_t, s from 1 / s_max to s_max over the batches of a pass; the
            gradient of e is that of s_max sigmoid(e) in place of sigmoid(s e), as in HAT, but without HAT's bounds on s e and e
            L_S = sum over layers of K |m_in| |m_out| / sum over layers of K c_in c_out, K the kernel's size, c the channels
            when the session ends, the channels with e <= 0 are taken out of F_t for good
exemplars   by herding on u, as in iCaRL (`clstream.strategy.exemplars`), capacity / (n + m) of each class
classifier  from the second session on, when it has ended, H is drawn anew and learns the exemplars with CE(H(u) / T, y), all
            extractors in evaluation mode: `finetune_epochs` passes of SGD, momentum 0.9, decay 5e-4, a rate that falls to a tenth
            after half of the passes
answer      the highest output of H of the classes that came

The defaults are those of the authors' configuration for CIFAR-100 in ten steps: T = 5, 30 passes at 0.1. Their code leaves masks
out, and so does the default. The formulas of masks, and that H goes on, are as recalled from the paper; but for s_max in the
gradient of e, without which e hardly moves in few steps: that is HAT's. In the code H is drawn anew in each session
(`inherit=False`), and with H_a once more after 10 passes of warm-up, which is left out here. In PyCIL H goes on, has biases, and
has its weights aligned, as in WA, in place of the classifier's stage. lambda_a is 1 in both. No code tells lambda_s, s_max or where
e begins: here at 1, so that all channels are open.

Deviations: H learns the exemplars in its stage, where the code draws samples of each class at random, as many as old classes had
until then; and the stage draws H as a session does, where the code draws it as `nn.Linear` does. Masks are of channels that
reach the features through one further layer alone (`clstream.strategy.channel_masks`): those within residual blocks, not those that
blocks add up. At least one channel of a layer stays. A session of known classes alone learns on with the newest extractor.

Measured, own numbers, 3 seeds, nothing tuned: class-IL Split MNIST (one epoch in batches of 32, Mlp 400-400, capacity 500, SGD
0.03) 0.820 ± 0.005. `split_digits` (20 epochs, Mlp 64-64, capacity 200, SGD 0.05) 0.917 ± 0.009 with 41,600 parameters in 5
extractors, and with `prune` 0.926 ± 0.005 with 20,057 to 23,540. `ResNet18(width=8)` on it 0.952 ± 0.001 (anchor
`dynamic-er-split-digits`: 5 epochs in batches of 16, SGD 0.03 with momentum 0.9).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import SessionEnded, SessionStarted
from clstream.measures.flops import same_flops
from clstream.params import check_bool, check_integer, check_number, check_positive
from clstream.strategy import OptimizerFactory
from clstream.strategy.channel_masks import followers, masked_features, pruned, used_share
from clstream.strategy.exemplars import TOGETHER, Rehearsal
from clstream.strategy.regulariser import frozen
from clstream.stream import Samples, Task


class Outputs(nn.Module):
    """A linear layer without bias.

    Args:
        weight: (outputs, features), what it begins with.

    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, features) to (n, outputs)."""
        return F.linear(features, self.weight)


class DynamicER(Rehearsal):
    """Learn an extractor for each new batch of classes beside frozen ones, and a classifier of all their features.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with `features`: the same to (n, features), and a `head` that
            tells their width, which is not used else. It is the newest extractor.
        optimizer: makes the optimizer of a session, anew for each.
        capacity: the most exemplars of all classes together; at least as many as there are classes.
        lambda_a: the weight of the auxiliary loss.
        inherit: whether the classifier goes on from that of the session before.
        prune: whether channels have masks, and are taken out when a session has ended.
        lambda_s: the weight of the share of weights that masks leave.
        s_max: the steepest slope of masks.
        finetune_epochs: passes over the exemplars when a session has ended, in which the classifier learns from a new start; 0 for
            none.
        finetune_lr: the learning rate of these.
        finetune_batch: samples of a step in these.
        temperature: T, which outputs are divided by in these.

    Raises:
        TypeError: for a model without `features`, or without a head that tells their width.

    """

    takes_controls = ("schedule", "clip", "accumulate", "patience")

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 2000,
        lambda_a: float = 1.0,
        inherit: bool = True,
        prune: bool = False,
        lambda_s: float = 0.1,
        s_max: float = 400.0,
        finetune_epochs: int = 30,
        finetune_lr: float = 0.1,
        finetune_batch: int = 128,
        temperature: float = 5.0,
    ) -> None:
        super().__init__(model, optimizer, capacity)
        check_number(0, lambda_a=lambda_a, lambda_s=lambda_s)
        check_bool(inherit=inherit, prune=prune)
        check_number(1, s_max=s_max)
        check_integer(0, finetune_epochs=finetune_epochs)
        check_integer(1, finetune_batch=finetune_batch)
        check_positive(finetune_lr=finetune_lr, temperature=temperature)
        self.lambda_a, self.inherit, self.prune, self.lambda_s, self.s_max = lambda_a, inherit, prune, lambda_s, s_max
        self.finetune_epochs, self.finetune_lr, self.finetune_batch = finetune_epochs, finetune_lr, finetune_batch
        self.temperature, self.make_optimizer = temperature, optimizer

    def forget_all(self, classes: int, input_shape: tuple[int, ...], device: torch.device | str) -> None:
        """Start with nothing learned, on a stream of so many classes and of inputs of a shape."""
        super().forget_all(classes, input_shape, device)
        width = getattr(getattr(self.model, "head", None), "in_features", None)
        if not isinstance(width, int):
            name = type(self.model).__name__
            raise TypeError(
                f"{type(self).__name__} needs a model whose `head` tells the width of its features, and {name} has none"
            )
        self.width = width
        self.extractors: list[nn.Module] = []  # frozen, of earlier sessions
        self.smaller: nn.Module | None = None  # the newest extractor without channels that were shut, once its session is over
        self.labels_of_outputs = self.new_classes  # of the classifier, in the order of its outputs
        self.H, self.H_a = (Outputs(torch.empty(0, width, device=device)) for _ in range(2))
        self.follows: dict[str, str] = {}  # the layers that have masks, and those that follow them
        self.embeddings = nn.ParameterList()  # e, (channels,) of each

    @on(SessionStarted)
    def open(self, event: SessionStarted) -> None:
        """Add an extractor if there are classes that never came, make classifiers and the optimizer."""
        super().open(event)
        before, self.teacher = self.teacher, None
        came = self.new_classes[~torch.isin(self.new_classes, self.labels_of_outputs)]
        first = not len(self.labels_of_outputs)
        if len(came) and not first:
            self.extractors.append(self.smaller or headless(before or frozen(self.model)))
        if len(came):
            self.labels_of_outputs = torch.cat([self.labels_of_outputs, came])
            self.H = self.expanded(self.H)
        self.smaller = None
        self.H_a = self.drawn(len(self.new_classes) + 1, self.width)
        if self.prune and len(came):
            if first:
                self.follows = followers(self.model, event.session.samples[:2].x.to(came.device))
            weights = [self.model.get_parameter(f"{name}.weight") for name in self.follows]
            self.embeddings = nn.ParameterList(nn.Parameter(weight.new_ones(len(weight))) for weight in weights)
        learned = (*self.model.parameters(), *self.H.parameters(), *self.H_a.parameters())
        self.optimizer = self.make_optimizer(learned)
        if len(self.embeddings):
            self.optimizer.add_param_group({"params": list(self.embeddings), "weight_decay": 0.0})

    def drawn(self, outputs: int, width: int) -> Outputs:
        """Return a linear layer drawn from N(0, 1 / width), as the authors' code does at a session's start."""
        return Outputs((torch.randn(outputs, width, generator=self.random) / math.sqrt(width)).to(self.new_classes.device))

    @torch.no_grad()
    def expanded(self, before: Outputs) -> Outputs:
        """Return a classifier of all extractors and classes, with the weights that were there, if they are inherited."""
        layer = self.drawn(len(self.labels_of_outputs), self.width * (len(self.extractors) + 1))
        if self.inherit:
            rows, columns = before.weight.shape
            layer.weight[:rows, :columns] = before.weight
        return layer

    def masks(self) -> list[Tensor]:
        """Return the masks of the step that goes on, whose gradients are those of s_max sigmoid(e)."""
        low = 1 / self.s_max
        s = low + (self.s_max - low) * self.turn / max(1, self.batches - 1)
        return [(s * e).sigmoid().detach() + self.s_max * (e.sigmoid() - e.sigmoid().detach()) for e in self.embeddings]

    def super_features(self, x: Tensor, newest: Tensor | None = None) -> Tensor:
        """Return u, (n, t * width), for raw inputs; `newest` is what the newest extractor gives, if it is there already."""
        with torch.no_grad():
            parts = [features_of(extractor, x) for extractor in self.extractors]
        return torch.cat([*parts, features_of(self.smaller or self.model, x) if newest is None else newest], 1)

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss over the samples and what was drawn beside them."""
        x, y = self.joined(samples)
        masks = self.masks()
        newest = masked_features(self.model, self.follows, masks, x) if masks else features_of(self.model, x)
        loss = F.cross_entropy(self.H(self.super_features(x, newest)), self.places(y))
        if len(self.old_classes):
            loss = loss + self.lambda_a * F.cross_entropy(self.H_a(newest), auxiliary_labels(y, self.new_classes))
        return loss + self.lambda_s * used_share(self.model, self.follows, masks) if masks else loss

    def places(self, y: Tensor) -> Tensor:
        """Return (n,), where labels stand among the outputs of the classifier."""
        return (y[:, None] == self.labels_of_outputs).int().argmax(1)

    @on(SessionEnded)
    def close(self, event: SessionEnded) -> None:
        """Take shut channels out, choose exemplars, and let the classifier learn these from a new start."""
        if len(self.embeddings):
            self.smaller = headless(frozen(pruned(self.model, self.follows, self.open_channels())))  # of the model, not in place
        super().close(event)
        if self.finetune_epochs and len(self.old_classes):
            self.learn_classifier()

    def open_channels(self) -> list[Tensor]:
        """Return (channels,) bool of each layer with masks: those that stay, at least the one with the greatest e."""
        return [(e > 0) | (e == e.max()) for e in self.embeddings]

    def learn_classifier(self) -> None:
        """Draw the classifier anew, and let it learn the exemplars, with the extractors as they are."""
        self.H = self.drawn(*self.H.weight.shape)
        optimizer = SGD(self.H.parameters(), self.finetune_lr, momentum=0.9, weight_decay=5e-4)
        for epoch, u, y in self.exemplar_features(self.finetune_batch, self.finetune_epochs, self.super_features):
            optimizer.param_groups[0]["lr"] = self.finetune_lr * (0.1 if 2 * epoch >= self.finetune_epochs else 1.0)
            with same_flops(("classifier", len(y), *self.H.weight.shape)):
                loss = F.cross_entropy(self.H(u) / self.temperature, self.places(y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def unit_features(self, x: Tensor) -> Tensor:
        """Return super-features for raw inputs, divided by their length."""
        return torch.cat([F.normalize(self.super_features(part), dim=1) for part in x.split(TOGETHER)])

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): the outputs, -inf for classes that did not come. First the model's outputs."""
        if not len(self.labels_of_outputs):
            outputs: Tensor = self.model(x)
            return outputs
        newest = None
        if len(self.embeddings) and self.smaller is None:
            masks = [channels.to(x.device, torch.float32) for channels in self.open_channels()]
            newest = masked_features(self.model, self.follows, masks, x)
        own: Tensor = self.H(self.super_features(x, newest))
        return own.new_full((len(x), self.classes), -math.inf).index_copy(1, self.labels_of_outputs, own)

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: those of all extractors, and the classifier's."""
        for module in (*self.extractors, self.smaller or self.model, self.H, *([] if self.smaller else [self.embeddings])):
            yield from (*module.parameters(), *module.buffers())


def headless(extractor: nn.Module) -> nn.Module:
    """Return an extractor without the head that it doesn't use."""
    extractor.head = nn.Identity()
    return extractor


def features_of(extractor: nn.Module, x: Tensor) -> Tensor:
    """Return what an extractor gives for raw inputs: (n, width)."""
    features: Tensor = extractor.features(x)  # type: ignore[operator]  # the constructor has asked for it
    return features


def auxiliary_labels(y: Tensor, new: Tensor) -> Tensor:
    """Return (n,): 0 for labels that are not new, and for the k-th new one k, from 1."""
    same = y[:, None] == new
    return torch.where(same.any(1), same.int().argmax(1) + 1, 0)
