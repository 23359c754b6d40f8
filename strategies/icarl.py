"""iCaRL: exemplars chosen by herding, sigmoid outputs distilled from the network before, and nearest means of exemplars as answers.

Rebuffi, Kolesnikov, Sperl, Lampert 2017, "iCaRL: Incremental Classifier and Representation Learning". Form implemented, with f the
features divided by their length, o the outputs, o' those of a frozen copy from before the session, K the capacity and t the classes
so far. A session is what the paper has as a batch of classes; those that come in it are new, all others old:

loss       sum over old and new classes of BCE(sigmoid(o), u), mean over samples: u = sigmoid(o' / T) for old classes, for new
           ones 1 if it is the sample's, else 0. Each pass goes over the session's samples and all exemplars, shuffled: a step takes
           a batch of the session, and its share of the exemplars
exemplars  when a session ends, the first K / t of each class in the order of its herding: the k-th exemplar is the sample that
           brings the mean of the first k nearest to the mean of all, |mean - (f + sum of those before) / k|. Old classes keep
           their first ones
answer     the class whose mean over exemplars, divided by its length, is nearest (`answer="means"`), or has the highest output

`form="mean"` is the loss of the authors' code, its mean over all outputs, those of classes to come too (with a rate of 2.0 there).
A growing head has none of these. T is 1 in both; other code that builds on iCaRL has 2 (Hendryx et al. 2021).

Deviations: K / t is rounded down (theirs up, so that the memory may hold more than K); what was chosen is not chosen again, which
the paper leaves open; means are of the exemplars as they are (theirs also of mirrored ones). Our own choice, where a class comes
in several sessions: it is new again, and its exemplars are chosen among the session's samples and those that it had.

Merging (`export`, `merge`), in the form of Hendryx, KC, Walls, Morrison 2021, "Federated Reconnaissance", as their code has it: the
network is the average of the learners' networks, but an output is averaged over those learners alone that know its class. Exemplars
come with the networks, and all are learned with cross-entropy for `merge_epochs`. Our own: they are chosen again by herding under
the merged network (theirs: the first ones).

Measured: loss, exemplars and means are those of Avalanche's (`tests/test_icarl.py`). Class-IL, one epoch in batches of 32, Mlp
400-400, 2,000 exemplars, SGD 0.03, nothing tuned, 3 seeds: Split MNIST 0.756 ± 0.006 (anchor `icarl-split-mnist`), Split
Fashion-MNIST 0.644 ± 0.003 (`icarl-split-fashion-mnist`); published for neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import as_written, evaluating
from clstream.events import RunContinued
from clstream.models import GrowingHead
from clstream.params import check_choice, check_integer, check_positive
from clstream.strategy import OptimizerFactory
from clstream.strategy.answers import mask_logits
from clstream.strategy.exemplars import Rehearsal
from clstream.strategy.frozen_features import add_by_class
from clstream.strategy.merging import Payload, as_payloads, average, check_is_payload, check_tensors, shares_of
from clstream.stream import Samples, Task


class ICaRL(Rehearsal):
    """Learn beside exemplars of old classes, hold old outputs near those of the network before, answer by nearest means.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with `features`: the same to (n, features).
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most exemplars of all classes together; at least as many as there are classes.
        form: of the loss, "sum" (over classes, the paper's) or "mean" (over outputs, the authors' code's).
        temperature: T, that the outputs of the network before are divided by.
        answer: "means" (nearest mean of exemplars) or "outputs" (the highest output of a class that came).
        merge_epochs: passes over all exemplars after networks were merged, 0 for none.
        merge_batch: samples of a step in these.

    """

    scores_are = "ranks"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 2000,
        form: str = "sum",
        temperature: float = 1.0,
        answer: str = "means",
        merge_epochs: int = 50,
        merge_batch: int = 64,
    ) -> None:
        super().__init__(model, optimizer, capacity)
        check_choice(("sum", "mean"), form=form)
        check_positive(temperature=temperature)
        check_choice(("means", "outputs"), answer=answer)
        check_integer(0, merge_epochs=merge_epochs)
        check_integer(1, merge_batch=merge_batch)
        self.merge_epochs, self.merge_batch, self.make_optimizer = merge_epochs, merge_batch, optimizer
        self.form, self.temperature, self.answer = form, temperature, answer

    def forget_all(self, classes: int, input_shape: tuple[int, ...], device: torch.device | str) -> None:
        """Start with nothing learned, on a stream of so many classes and of inputs of a shape."""
        super().forget_all(classes, input_shape, device)
        self.means: Tensor | None = None  # (classes, features), of length 1; 0 of those that have no exemplars

    @on(RunContinued)
    def widen(self, event: RunContinued) -> None:
        """Have no means of classes that are new."""
        if self.means is not None:
            self.means = F.pad(self.means, (0, 0, 0, event.stream.classes - len(self.means)))

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss of the form, over the samples and what was drawn beside them."""
        x, y = self.joined(samples)
        outputs = self.model(x)
        targets = torch.zeros_like(outputs).scatter_(1, y[:, None], 1.0)
        if self.teacher is not None:
            with torch.no_grad():
                before = self.teacher(x)[:, self.old_classes]
            targets[:, self.old_classes] = (before / self.temperature).sigmoid()
        if self.form == "sum" or any(isinstance(module, GrowingHead) for module in self.model.modules()):
            outputs, targets = outputs[:, self.competing], targets[:, self.competing]
        errors = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return errors.sum(1).mean() if self.form == "sum" else errors.mean()

    def choose(self, samples: Samples, labels: list[int]) -> None:
        """Choose exemplars as `Rehearsal` does, and take all means."""
        super().choose(samples, labels)
        with evaluating(self):
            self.take_means()

    def take_means(self) -> None:
        """Take the mean of each class over its exemplars, with the network as it is."""
        assert self.exemplars is not None
        features = self.unit_features(self.exemplars.x)
        sums = features.new_zeros(self.classes, features.shape[1])
        add_by_class(sums, self.exemplars.y, features)
        self.means = F.normalize(sums, dim=1)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): cosines with the means, or outputs; -inf for classes that did not come.

        Before there is any mean, all outputs.
        """
        if self.means is None:
            outputs: Tensor = self.model(x)
            return outputs
        if self.answer == "outputs":
            return mask_logits(self.model(x), self.labels)
        features = F.normalize(self.model.features(x), dim=1)  # type: ignore[operator]  # the constructor has asked for it
        return (features @ self.means.T).masked_fill((self.means == 0).all(1), float("-inf"))

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,): 1 minus the cosine with the nearest mean, or the highest sigmoid; own choice."""
        nearest = scores.amax(1)
        return 1 - (nearest.sigmoid() if self.means is None or self.answer == "outputs" else nearest)

    def export(self, since: Payload | None = None) -> dict[str, Tensor]:
        """Return the model, the classes that came, and exemplars; with `since`, only those of the newest session's classes."""
        payload = super().export()
        own = self.exemplars
        if own is None:
            return payload
        rows = torch.isin(own.y, self.new_classes) if since else torch.ones_like(own.y, dtype=torch.bool)
        return {**payload, "classes": self.labels, "exemplars.x": own.x[rows], "exemplars.y": own.y[rows]}

    def merge(self, payloads: Payload | Iterable[Payload], weights: Sequence[float] | None = None) -> None:
        """Average models, each output over those that know its class, join the exemplars, choose among them, and learn them."""
        payloads = as_payloads(payloads)
        self.become(payloads, shares_of(weights, len(payloads)))
        if self.merge_epochs and self.exemplars is not None:
            with as_written():
                self.learn_exemplars()
            with evaluating(self):
                self.take_means()

    def take_over(self, payload: Payload) -> None:
        """Become what another learner exported: its model and its exemplars."""
        self.become([payload], [1.0])

    def check_payload(self, payload: Payload) -> None:
        """Raise ValueError for a model of other shapes, numbers that are not finite, and exemplars that are none."""
        check_is_payload(payload, "ICaRL")
        super().check_payload({name: tensor for name, tensor in payload.items() if name.startswith("model.")})
        others = {name: tensor for name, tensor in payload.items() if not name.startswith("model.")}
        if not others:
            return
        images = 1 + len(self.input_shape)
        check_tensors(others, "ICaRL", {}, {"classes": 1, "exemplars.x": images, "exemplars.y": 1})
        x, y, labels = others["exemplars.x"], others["exemplars.y"], others["classes"]
        if len(x) != len(y) or tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"these exemplars are {tuple(x.shape)} inputs with {len(y)} labels, and inputs are {self.input_shape}")
        if labels.is_floating_point() or y.is_floating_point() or not bool(torch.isin(y, labels).all()):
            raise ValueError("these exemplars have labels that are not among the classes that came to their learner")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"these exemplars have classes outside of the stream's 0 to {self.classes - 1}")

    def become(self, payloads: Sequence[Payload], shares: Sequence[float]) -> None:
        """Take the average of models, and choose exemplars among the own ones and those that come with them."""
        for payload in payloads:
            self.check_payload(payload)
        came = {*self.counts, *(label for payload in payloads for label in payload.get("classes", self.labels).tolist())}
        if len(came) > self.capacity:
            raise ValueError(
                f"merging makes it {len(came)} classes, and capacity={self.capacity} exemplars are fewer: take a larger capacity"
            )
        state = {name: average([payload[f"model.{name}"] for payload in payloads], shares) for name in self.model.state_dict()}
        known = torch.zeros(len(payloads), self.classes, dtype=torch.float64)
        for row, payload in zip(known, payloads, strict=True):
            row[payload.get("classes", self.labels).cpu()] = 1
        weights = known * torch.tensor(shares, dtype=torch.float64)[:, None]  # of each output in the average of it
        for name, merged in state.items():
            if name.startswith("head.") and merged.dim() and len(merged) >= self.classes:
                for label in (known.sum(0) > 0).nonzero().flatten().tolist():
                    share = (weights[:, label] / weights[:, label].sum()).tolist()
                    merged[label] = average([payload[f"model.{name}"][label] for payload in payloads], share)
        self._load_model(state)
        parts = [payload for payload in payloads if "exemplars.x" in payload]
        if parts:
            x, y = (
                torch.cat([part[name] for part in parts]).to(self.new_classes.device) for name in ("exemplars.x", "exemplars.y")
            )
            self.choose(Samples(x, y), y.unique().tolist())

    def learn_exemplars(self) -> None:
        """Pass `merge_epochs` times over all exemplars, with the cross-entropy of the classes that came."""
        optimizer, labels = self.make_optimizer(self.model.parameters()), self.labels
        for _ in range(self.merge_epochs):
            for x, y in self.exemplar_batches(self.merge_batch):
                loss = F.cross_entropy(mask_logits(self.model(x), labels), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
