"""Elastic weight consolidation (EWC): weights are held near what they were, the more the Fisher says that past answers need them.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks". Form implemented, from the second task on:

    loss + strength * sum over past tasks t of sum over the held weights of F_t (w - w_t)^2

w_t are the weights at the end of task t, F_t the diagonal Fisher there, over the task's samples. `online=True` keeps one term, at
the last weights, with F <- decay F + F_t (Schwarz et al. 2018; Hsu et al. 2018 with decay 1). The terms of all tasks are kept as
one, which is the same sum exactly, in constant memory. No 1/2 as in Kirkpatrick's equation: his lambda is 2 strength.

`fisher` says what F is. What published numbers rest on are very different things, by a factor of a batch size and more:

"predicted"   one sample at a time, the gradient of the likelihood of the label found likeliest: Hsu et al.'s code; the default, but
              for values, which have no such gradient
"sampled"     the same with a label drawn from the model's answer: the Fisher itself, without bias; the default for values
"empirical"   the same with the true label
fisher_batch  a number: squares of the mean gradient of batches of so many samples, times their number. Smith et al.'s research code
              has it with true labels and batches of the stream's size (and a penalty with 1/2, at 10); Avalanche's EWC without the
              factor

Smith et al.'s code also holds the feature extractor alone (parameters="stages.*") and one summed term (online=True), with F of the
binary cross-entropy over the new classes (`Regularised(LwFMC(model), [EWCPenalty(...)])`), and its pass leaves out the last batch
that is not full.

F is of the strategy's own classification loss: over the outputs that compete (`active_classes`), and in its form; with `LwFMC`'s
forms, over the new classes alone. With several sessions a task, F_t is the mean over samples of what each session gave
while it was there.

Measured: see `docs/rehearsal-free.md`; against Avalanche's EWC: `docs/avalanche.md`.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import RunStarted, SessionEnded, TaskEnded
from clstream.fisher import running_mean, session_fisher
from clstream.models.heads import pad_rows
from clstream.params import check_bool, check_choice, check_integer, check_number
from clstream.strategy import OptimizerFactory, Quadratic, RehearsalFree


class EWCPenalty(Quadratic):
    """Hold weights near those of past tasks, each by its Fisher.

    Args:
        strength, parameters: see `Quadratic`.
        online: whether there is one term, at the last weights; if not, there is one for each task.
        decay: how much of the Fisher so far stays when a task ends; online only.
        fisher: "predicted", "sampled" or "empirical": whose gradients are squared. None: "sampled" for values, else "predicted".
        fisher_batch: batch size of the batch-gradient variant. None: one sample at a time, exactly.

    """

    def __init__(
        self,
        strength: float | dict[str, Any] = 1.0,
        parameters: str | list[str] = "*",
        online: bool = False,
        decay: float = 1.0,
        fisher: str | None = None,
        fisher_batch: int | None = None,
    ) -> None:
        super().__init__(strength, parameters)
        if fisher is not None:
            check_choice(("predicted", "sampled", "empirical"), fisher=fisher)
        check_number(0, 1, decay=decay)
        check_bool(online=online)
        check_integer(1, none=True, fisher_batch=fisher_batch)
        self.online, self.decay, self.fisher, self.fisher_batch = online, decay, fisher, fisher_batch
        self.random = torch.Generator()
        self.start_task()

    def start_task(self) -> None:
        """Start the Fisher of a task anew."""
        self.task_fisher: dict[str, Tensor] = {}
        self.samples = 0

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start with no Fisher: nothing was learned yet. Raises ValueError for one that the stream's targets don't have."""
        self.start_task()
        if self.fisher == "predicted" and "value" in getattr(event.stream, "targets", (event.stream.target,)):
            raise ValueError(
                f"fisher='predicted' squares the gradient at the model's own answer, which is 0 for the values of "
                f"{event.stream.name}: take 'sampled' or 'empirical'"
            )

    @on(SessionEnded)
    def estimate_fisher(self, event: SessionEnded) -> None:
        """Take the Fisher of the session's samples, while they are there."""
        strategy, samples = self.strategy, event.session.samples
        model = deepcopy(strategy.model).eval()
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in self.weights)
        device = next(iter(self.weights.values())).device
        losses, competing = strategy.sample_losses, strategy.mask_other_heads
        if strategy.heads_by_task and (task := event.session.task_if_shown) is not None:
            number = torch.tensor(task.id, device=device)
            losses, competing = partial(losses, task=number), partial(competing, task=number)
        kind = self.fisher or ("sampled" if samples.target == "value" else "predicted")
        options = kind, strategy.augment, self.random, losses, competing, self.fisher_batch
        for name, fisher in session_fisher(model, samples, *options).items():
            mean = pad_rows(self.task_fisher.get(name, torch.zeros_like(fisher)), fisher)
            self.task_fisher[name] = running_mean(mean, self.samples, fisher, len(samples))
        self.samples += len(samples)

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Add the task's term."""
        if self.online:
            self.set_anchor()
            self.importance = {
                name: new + self.decay * pad_rows(self.importance[name], new) if self.importance else new
                for name, new in self.task_fisher.items()
            }
        else:
            self.add(self.task_fisher)
        self.start_task()


class EWC(RehearsalFree):
    """Hold the weights near those of past tasks, each by its Fisher.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        strength: of the penalty: a number, or one or a tensor for each held weight by its name.
        parameters: which weights are held: a pattern of their names in the model, or several.
        online: whether there is one term, at the last weights; if not, there is one for each task.
        decay: how much of the Fisher so far stays when a task ends; online only.
        fisher: "predicted", "sampled" or "empirical": whose gradients are squared. None: "sampled" for values, else "predicted".
        fisher_batch: batch size of the batch-gradient variant. None: one sample at a time, exactly.
        form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        strength: float | dict[str, Any] = 1.0,
        parameters: str | list[str] = "*",
        online: bool = False,
        decay: float = 1.0,
        fisher: str | None = None,
        fisher_batch: int | None = None,
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.add_regularisers(EWCPenalty(strength, parameters, online, decay, fisher, fisher_batch))
