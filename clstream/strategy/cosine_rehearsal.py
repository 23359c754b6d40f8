"""Cosine classifiers beside exemplars: what LUCIR and PODNet share.

The classifier has k proxies, vectors as wide as the features f, for each class that came. With s_i the cosine of f and the i-th
proxy of a class, its similarity is sum over i of softmax(s)_i s_i, which is the cosine for k = 1, and its output is eta times that,
eta learned. What a session does, with n old classes and m new ones:

begin     the network is copied: the copy is a teacher of features. Proxies of old classes are fixed. Those of new ones begin at
          random in the first session; later they are imprinted: from the features of the class's samples, divided by their length,
          and brought to the mean length of old proxies. The optimizer is made anew: for the network, the new proxies and eta
steps     a batch of the session, and its share of the exemplars (`clstream.strategy.exemplars`)
end       exemplars by herding; then, from the second session on, the proxies of all classes may learn them, the network and eta
          fixed: SGD with a momentum of 0.9, the network in evaluation mode

A class that comes again is new again, and its proxies go on from where they were.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import SessionEnded, SessionStarted
from clstream.measures.flops import same_flops
from clstream.params import check_integer, check_positive
from clstream.strategy.exemplars import Rehearsal
from clstream.strategy.strategy import OptimizerFactory
from clstream.stream import Task


class CosineClassifier(nn.Module):
    """Similarities of features with proxies of classes; those of old classes are fixed.

    Args:
        width: of the features.
        proxies: k, of each class.

    """

    old: Tensor
    old_labels: Tensor
    new_labels: Tensor

    def __init__(self, width: int, proxies: int) -> None:
        super().__init__()
        self.register_buffer("old", torch.empty(0, proxies, width))
        self.new = nn.Parameter(torch.empty(0, proxies, width))
        self.eta = nn.Parameter(torch.ones(()))
        self.register_buffer("old_labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("new_labels", torch.empty(0, dtype=torch.int64))

    @property
    def labels(self) -> Tensor:
        """The labels of the classes that have proxies, the old ones first: (n + m,)."""
        return torch.cat([self.old_labels, self.new_labels])

    def forward(self, features: Tensor) -> Tensor:
        """Return the (rows, n + m) similarities of (rows, width) features with the classes of `labels`, from -1 to 1."""
        return similarities(features, torch.cat([self.old, self.new]))

    def places(self, y: Tensor) -> Tensor:
        """Return (rows,), where labels stand among `labels`."""
        return (y[:, None] == self.labels).int().argmax(1)

    @torch.no_grad()
    def replace(self, labels: Tensor, proxies: Tensor, new: Tensor) -> None:
        """Have these (c, k, width) proxies of (c,) labels; those of the labels `new` learn from now on, as a new parameter."""
        learn = torch.isin(labels, new)
        self.old, self.old_labels = proxies[~learn].detach().clone(), labels[~learn]
        self.new, self.new_labels = nn.Parameter(proxies[learn].detach().clone()), labels[learn]


class CosineRehearsal(Rehearsal):
    """Learn a cosine classifier beside exemplars. A subclass has a `loss`, and says how proxies begin and are learned in the end.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with `features`: the same to (n, features), and a `head` that
            tells their width, which is not used else.
        optimizer: makes the optimizer of a session, anew for each.
        capacity: the most exemplars of all classes together; at least as many as there are classes.
        proxies: k, of each class.
        finetune_epochs: passes over the exemplars in which the proxies of all classes learn when a session has ended.
        finetune_lr: the learning rate of these.
        finetune_batch: samples of a step in these.

    Raises:
        TypeError: for a model without `features`, or without a head that tells their width.

    """

    takes_controls = ("schedule", "clip", "accumulate", "patience")

    finetune_decay: float
    """The weight decay of proxies while they learn exemplars."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        capacity: int,
        proxies: int,
        finetune_epochs: int,
        finetune_lr: float,
        finetune_batch: int,
    ) -> None:
        check_integer(1, proxies=proxies, finetune_batch=finetune_batch)
        check_integer(0, finetune_epochs=finetune_epochs)
        check_positive(finetune_lr=finetune_lr)
        self.proxies = proxies
        super().__init__(model, optimizer, capacity)
        self.make_optimizer = optimizer
        self.finetune_epochs, self.finetune_lr, self.finetune_batch = finetune_epochs, finetune_lr, finetune_batch

    def forget_all(self, classes: int, input_shape: tuple[int, ...], device: torch.device | str) -> None:
        """Start with nothing learned, on a stream of so many classes and of inputs of a shape."""
        super().forget_all(classes, input_shape, device)
        width = getattr(getattr(self.model, "head", None), "in_features", None)
        if not isinstance(width, int):
            name = type(self.model).__name__
            raise TypeError(
                f"{type(self).__name__} needs a model whose `head` tells the width of its features, and {name} has none"
            )
        self.classifier = CosineClassifier(width, self.proxies).to(device)

    @on(SessionStarted)
    def open(self, event: SessionStarted) -> None:
        """Copy the network, fix the proxies of old classes, have some for the new ones, and make the optimizer."""
        super().open(event)
        known, proxies = self.classifier.labels, torch.cat([self.classifier.old, self.classifier.new]).detach()
        came = self.new_classes[~torch.isin(self.new_classes, known)]
        if len(known) and len(came):
            length = proxies.norm(dim=2).mean()
            samples = event.session.samples[:]
            with evaluating(self):
                own = [self.unit_features(samples.x[samples.y == label].to(came.device)) for label in came.tolist()]
            begun = torch.stack([F.normalize(self.imprint(features), dim=1) for features in own]) * length
        else:
            begun = self.first_proxies(len(came)).to(proxies)
        self.classifier.replace(torch.cat([known, came]), torch.cat([proxies, begun]), self.new_classes)
        self.optimizer = self.make_optimizer([*self.model.parameters(), *self.classifier.parameters()])

    @abstractmethod
    def first_proxies(self, classes: int) -> Tensor:
        """Return (classes, k, width), the proxies that classes of the first session begin with."""

    @abstractmethod
    def imprint(self, features: Tensor) -> Tensor:
        """Return (k, width), the directions of the proxies that a class begins with, from its (samples, width) unit features."""

    @property
    def ratio(self) -> float:
        """The ratio n / m of old classes to new ones."""
        return len(self.old_classes) / len(self.new_classes)

    @abstractmethod
    def finetune_loss(self, similar: Tensor, places: Tensor) -> Tensor:
        """Return the loss of exemplars from their (rows, n + m) similarities, and (rows,) where their labels stand among these."""

    @on(SessionEnded)
    def close(self, event: SessionEnded) -> None:
        """Choose exemplars, then let the proxies of all classes learn them."""
        super().close(event)
        if self.finetune_epochs and len(self.old_classes):
            self.finetune()

    def finetune(self) -> None:
        """Let the proxies of all classes learn the exemplars; the network and eta stay as they are."""
        classifier = self.classifier
        labels, new = classifier.labels, classifier.new_labels
        proxies = nn.Parameter(torch.cat([classifier.old, classifier.new]).detach().clone())
        optimizer = SGD([proxies], self.finetune_lr, momentum=0.9, weight_decay=self.finetune_decay)
        features_of: Callable[[Tensor], Tensor] = self.model.features  # type: ignore[assignment]  # the constructor has asked for it
        for epoch, features, y in self.exemplar_features(self.finetune_batch, self.finetune_epochs, features_of):
            optimizer.param_groups[0]["lr"] = self.finetune_lr * self.finetune_factor(epoch)
            with same_flops(("finetune", len(y), len(labels))):
                loss = self.finetune_loss(similarities(features, proxies), classifier.places(y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        classifier.replace(labels, proxies.detach(), new)

    def finetune_factor(self, epoch: int) -> float:
        """Return what the learning rate of a pass over the exemplars is multiplied by: here 1."""
        return 1.0

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): eta times the similarities, -inf for classes that did not come; first the model's outputs."""
        labels = self.classifier.labels
        if not len(labels):
            outputs: Tensor = self.model(x)
            return outputs
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        similar: Tensor = self.classifier.eta * self.classifier(features)
        return similar.new_full((len(x), self.classes), -math.inf).index_copy(1, labels, similar)

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: the model's, and the classifier's."""
        yield from super().answering_weights()
        yield from (*self.classifier.parameters(), *self.classifier.buffers())


def similarities(features: Tensor, proxies: Tensor) -> Tensor:
    """Return (rows, classes), the similarities of (rows, width) features with (classes, k, width) proxies; see above."""
    cosines: Tensor = F.normalize(features, dim=1) @ F.normalize(proxies, dim=2).flatten(0, 1).T
    if proxies.shape[1] == 1:
        return cosines
    by_class = cosines.view(len(cosines), *proxies.shape[:2])
    return (by_class.softmax(2) * by_class).sum(2)


def feature_distance(features: Tensor, before: Tensor) -> Tensor:
    """Return 1 minus the cosine of features (rows, width) and those of a teacher: the mean over rows, a scalar."""
    return 1 - F.cosine_similarity(features, before, dim=1).mean()
