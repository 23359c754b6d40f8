"""BiC: old outputs are distilled, then two numbers correct the outputs of new classes, learned on samples held out for that.

Wu, Chen, Wang, Ye, Liu, Guo, Fu 2019, "Large Scale Incremental Learning". Form implemented, with n old classes, m new ones (those
of the session that goes on), o the network's outputs and o' those of a frozen copy from before it, as they were corrected:

split      a tenth of what each class has of the memory, K / (n + m), is for validation, rounded up: of an old class the first of
           those that it had for that, of a new one as many samples of the session, drawn at random. No step of stage 1 learns
           them, now or later
stage 1    lambda L_d + (1 - lambda) L_c, lambda = n / (n + m), over the session's other samples and all exemplars
           L_c = CE(softmax(o over old and new), y)
           L_d = CE(softmax(o' / T), softmax(o / T)), both over the old classes, T = 2, no factor T^2
stage 2    the network stays as it is: q = o for old classes, alpha o + beta for new ones, and alpha, beta minimise
           CE(softmax(q), y) + 0.1 beta^2 / 2 over the validation samples of all classes, from 1 and 0
exemplars  by herding, as in iCaRL (`clstream.strategy.exemplars`): K / (n + m) of each class, with those for validation
answer     the highest q of the classes that came; while a session is learned, of o

The correction is of the newest classes alone: in the next session the network learns what was corrected, as o', and o is its answer
for them. So it is in the authors' code. FACIL and PyCIL keep the corrections of all sessions in their forward passes.

Stage 2 is convex. As in the code it is SGD with a momentum of 0.9 and a rate of 0.1 that falls to a tenth after 30, 60, 80 and 90 %
of the steps; here all validation samples make one step, so that nothing is drawn. The term with beta is the code's, not the paper's
(`beta_penalty=0`). PyCIL has none, and takes the softmax twice; in Avalanche 0.6.0 the teacher's is over the samples of a batch.

Deviations: K / (n + m) is rounded down, and new classes count from the start, so that the memory never holds more than K, as in
FACIL (the authors' code: up, by old classes alone while a session is learned). Features are divided by their length before herding,
as in iCaRL; in the authors' code they are not, and old classes are herded anew among their exemplars, where here they keep the
first. Theirs runs the network in training mode in stage 2, here it answers: with batch norm these differ. A class that comes again
is new again, with other validation samples; where the very samples come again, an exemplar may be among these. Of a class with
fewer samples than its share a tenth of these is held out, and of one with a single sample none.

Measured: see the end of `docs/replay.md`.
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
from clstream.eval_mode import evaluating
from clstream.events import EpochStarted, SessionEnded, SessionStarted
from clstream.losses import distillation
from clstream.measures.flops import same_flops
from clstream.params import check_integer, check_number, check_positive, check_share
from clstream.strategy import OptimizerFactory
from clstream.strategy.answers import mask_logits
from clstream.strategy.exemplars import TOGETHER, Rehearsal
from clstream.stream import Batch, Samples, Task
from clstream.stream.samples import sent

DROPS = (0.3, 0.6, 0.8, 0.9)
"""The shares of the steps of stage 2 after which the learning rate falls to a tenth."""


class BiC(Rehearsal):
    """Learn beside exemplars with distillation, then correct the outputs of new classes by alpha and beta.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with `features`: the same to (n, features).
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples of all classes together that are kept; at least two of each class.
        validation: the share of them that corrections are learned on, above 0 and below 1.
        temperature: T, which outputs are divided by before the softmax of distillation.
        bias_steps: steps on alpha and beta when a session ends.
        bias_lr: the learning rate that they begin with.
        beta_penalty: of beta^2 / 2.

    """

    takes_controls = ("schedule", "clip", "accumulate", "patience", "renew_optimizer")
    least = 2

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 2000,
        validation: float = 0.1,
        temperature: float = 2.0,
        bias_steps: int = 200,
        bias_lr: float = 0.1,
        beta_penalty: float = 0.1,
    ) -> None:
        super().__init__(model, optimizer, capacity)
        check_share(validation=validation)
        check_positive(validation=validation, temperature=temperature, bias_lr=bias_lr)
        check_integer(1, bias_steps=bias_steps)
        check_number(0, beta_penalty=beta_penalty)
        self.validation, self.temperature = validation, temperature
        self.bias_steps, self.bias_lr, self.beta_penalty = bias_steps, bias_lr, beta_penalty

    def forget_all(self, classes: int, input_shape: tuple[int, ...], device: torch.device | str) -> None:
        """Start with nothing learned, on a stream of so many classes and of inputs of a shape."""
        super().forget_all(classes, input_shape, device)
        self.validating: dict[int, Tensor] = {}  # raw inputs of each class
        self.held_out = self.trained = torch.empty(0, dtype=torch.bool)  # of the session's samples, in its and in the pass's order
        self.batch_size = 1
        self.correction = self.teacher_correction = torch.tensor([1.0, 0.0], device=device)  # alpha, beta
        self.corrected = self.teacher_corrected = self.new_classes  # the classes that they are of

    def for_validation(self, classes: int) -> int:
        """Return how many of the samples of each of so many classes are for validation: some, and not all."""
        whole = self.capacity // classes
        return min(whole - 1, math.ceil(self.validation * whole - 1e-9))  # 0.1 * 70 is above 7

    def share(self, classes: int) -> int:
        """Return how many exemplars each of so many classes has beside its samples for validation."""
        return self.capacity // classes - self.for_validation(classes)

    @on(SessionStarted)
    def split(self, event: SessionStarted) -> None:
        """Hold samples of the new classes out, and keep fewer of the old ones."""
        samples, count = event.session.samples, self.for_validation(len(self.competing))
        y = samples.y.cpu()
        self.held_out = torch.zeros(len(y), dtype=torch.bool)
        self.validating = {label: self.validating[label][:count] for label in self.old_classes.tolist()}
        for label in self.new_classes.tolist():
            rows = (y == label).nonzero().flatten()
            most = min(count, math.ceil(self.validation * len(rows)), len(rows) - 1)
            rows = rows[torch.randperm(len(rows), generator=self.random)[:most]]
            self.held_out[rows] = True
            self.validating[label] = samples[rows.to(samples.y.device)].x.to(self.new_classes.device)
        self.teacher_correction, self.teacher_corrected = self.correction, self.corrected
        self.correction, self.corrected = torch.ones_like(self.correction), self.new_classes.new_empty(0)

    @on(EpochStarted)
    def follow(self, event: EpochStarted) -> None:
        """Take down which samples of the pass are learned."""
        self.trained, self.batch_size = ~self.held_out[event.epoch.order()], event.epoch.session.batch_size

    def learn(self, batch: Batch) -> Tensor:
        """Take one step on what is not held out of a batch, and on its share of the exemplars."""
        first = batch.index * self.batch_size
        rows = self.trained[first : first + len(batch.samples)].nonzero().flatten()
        samples = batch.samples[sent(rows, batch.samples.y.device)]
        with same_flops((len(rows), *map(len, self.draw(samples)))):
            loss = self.objective(samples)
            self.minimise(loss)
        return loss.detach()

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss of stage 1; 0 where all of a batch is held out, and no exemplar comes with it."""
        if not len(samples) and not self.drawn_for(samples):
            return torch.zeros((), device=samples.y.device, requires_grad=True)
        x, y = self.joined(samples)
        outputs = self.model(x)
        loss = F.cross_entropy(mask_logits(outputs, self.competing), y)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            before = corrected(self.teacher(x), self.teacher_correction, self.teacher_corrected)
        kept = len(self.old_classes) / len(self.competing)
        return kept * distillation(outputs, before, self.old_classes, self.temperature) + (1 - kept) * loss

    @on(SessionEnded)
    def close(self, event: SessionEnded) -> None:
        """Correct the outputs of the new classes, then choose exemplars among what was not held out."""
        if len(self.old_classes):
            x = torch.cat([*self.validating.values()])
            y = self.new_classes.new_tensor([label for label, own in self.validating.items() for _ in own])
            with evaluating(self), torch.no_grad():
                outputs = mask_logits(torch.cat([self.model(part) for part in x.split(TOGETHER)]), self.competing)
            options = self.bias_steps, self.bias_lr, self.beta_penalty
            self.correction, self.corrected = fit_correction(outputs, y, self.new_classes, *options), self.new_classes
        learned = (~self.held_out).nonzero().flatten().to(event.session.samples.y.device)
        self.choose(event.session.samples[learned], self.new_classes.tolist())
        self.teacher = None

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes) corrected outputs, -inf for classes that did not come."""
        return corrected(super().scores(x, task), self.correction, self.corrected)

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: the model's, and the correction."""
        yield from super().answering_weights()
        yield self.correction


def corrected(outputs: Tensor, correction: Tensor, labels: Tensor) -> Tensor:
    """Return (n, classes) outputs with those for some labels times alpha, plus beta; `correction` holds both."""
    if not len(labels):
        return outputs
    alpha, beta = correction.unbind()
    return outputs.index_copy(1, labels, alpha * outputs[:, labels] + beta)


@torch.no_grad()
def fit_correction(outputs: Tensor, y: Tensor, new: Tensor, steps: int, lr: float, beta_penalty: float) -> Tensor:
    """Return (2,), alpha and beta for the outputs of new classes, which lower the cross-entropy of corrected outputs.

    Args:
        outputs: (n, classes), those that don't compete -inf.
        y: (n,), the labels.
        new: (m,), the new classes.
        steps, lr, beta_penalty: see `BiC`.

    """
    own = outputs[:, new]
    others = outputs.index_fill(1, new, float("-inf")).logsumexp(1, keepdim=True)  # all old outputs, as if they were one
    targets = (y[:, None] == new).to(outputs.dtype)
    correction, velocity = outputs.new_tensor([1.0, 0.0]), outputs.new_zeros(2)
    for step in range(steps):
        alpha, beta = correction.unbind()
        errors = torch.cat([others, alpha * own + beta], 1).softmax(1)[:, 1:] - targets  # the slope of each q
        slope = torch.stack([(errors * own).sum() / len(y), errors.sum() / len(y) + beta_penalty * beta])
        velocity = 0.9 * velocity + slope
        correction = correction - lr * 0.1 ** sum(step >= int(share * steps) for share in DROPS) * velocity
    return correction
