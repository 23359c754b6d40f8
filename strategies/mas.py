"""Memory aware synapses (MAS): weights are held near what they were, the more the outputs would change with them.

Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars 2018, "Memory Aware Synapses: Learning what (not) to forget". Form implemented,
from the second task on, with z(x) the outputs that compete (`active_classes`):

    Omega_t = mean over samples of | d |z(x)|^2 / d w |          at the weights where task t ends
    Omega   <- Omega + Omega_t
    loss + strength * sum over the held weights of Omega (w - anchor)^2          anchor: the weights at the last task's end

No 1/2, as in the paper and the authors' code. No target is used: `add_importance` takes up samples of any kind, also such as come
when the network is in use, which the paper proposes. What codes do differently is options:

importance_batch  a number: gradients are averaged over a batch of so many before their absolute value is taken, so that what
                  samples don't agree on is lost. So the authors' code, Hsu et al.'s (2018), FACIL and Avalanche; None, the default,
                  is the paper's equation, one sample at a time, exactly
norm              "sum" of the squared outputs (paper, authors, Avalanche), or "mean" over them (Hsu et al.; how many
                  they are grows on a class-incremental stream). FACIL has the norm itself, not its square
alpha             None: Omega is summed (paper, authors' accumulation, Hsu et al.). A number, from the second task on (Avalanche:
                  0.5; FACIL from the first one on): Omega <- alpha Omega + (1 - alpha) Omega_t

Avalanche and FACIL take the pass in training mode, the others and this in evaluation mode. The authors' `MAS_sequence` computes
Omega anew at the newest weights, over the data of all past tasks. With several sessions a task, Omega_t is the mean
over samples of what each session gave while it was there. The paper's local form (Hebbian, by pairs of activations) is left out.

Hsu et al.'s strengths on Split MNIST are 1 / 10000 / 1 (task- / domain- / class-IL), with importance_batch 128 and norm "mean". The
default is ours: the paper's 1 goes, in object recognition, with rates of 0.001 and less. A step of plain SGD on the penalty is
stable while lr strength Omega < 1, and Omega, of a norm that no softmax bounds, soon is 100.

Measured: see `docs/rehearsal-free.md`; against Avalanche's, the same weights (`tests/test_mas.py`).
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
from clstream.params import check_choice, check_integer, check_number
from clstream.strategy import OptimizerFactory, Quadratic, RehearsalFree
from clstream.stream import Samples, Subset, Task


class MASPenalty(Quadratic):
    """Hold weights near those of the last task, each by how much the outputs depend on it.

    Args:
        strength, parameters: see `Quadratic`.
        importance_batch: how many samples' gradients are averaged before the absolute value. None: one at a time, exactly.
        norm: "sum" or "mean" of the squared outputs of a sample.
        alpha: how much of the importance so far stays in a moving average. None: it is summed.

    """

    def __init__(
        self,
        strength: float | dict[str, Any] = 0.01,
        parameters: str | list[str] = "*",
        importance_batch: int | None = None,
        norm: str = "sum",
        alpha: float | None = None,
    ) -> None:
        super().__init__(strength, parameters)
        check_integer(1, none=True, importance_batch=importance_batch)
        check_choice(("sum", "mean"), norm=norm)
        check_number(0, 1, none=True, alpha=alpha)
        self.importance_batch, self.norm, self.alpha = importance_batch, norm, alpha
        self.random = torch.Generator()
        self.start_task()

    def start_task(self) -> None:
        """Start the importance of a task anew."""
        self.task_importance: dict[str, Tensor] = {}
        self.samples = 0

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start with no importance: nothing was learned yet."""
        self.start_task()

    def output_norms(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n,), the squared norm of the outputs that compete, or their mean square."""
        masked = self.strategy.mask_other_heads(outputs, y, task)
        left_out = masked == float("-inf")
        norms = masked.masked_fill(left_out, 0).square().sum(1)
        return norms if self.norm == "sum" else norms / (~left_out).sum(1).clamp(min=1)

    def add_importance(self, samples: Samples | Subset, task: Task | None = None) -> None:
        """Take up samples in the importance of the task that goes on; it counts from the end of that task.

        Args:
            samples: at least one. Their targets say no more than which outputs compete: nothing, where all do.
            task: theirs, if the stream is task-incremental and its tasks share classes.

        """
        strategy = self.strategy
        model = deepcopy(strategy.model).eval()
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in self.weights)
        norms = self.output_norms
        if strategy.heads_by_task and task is not None:
            norms = partial(norms, task=torch.tensor(task.id, device=next(iter(self.weights.values())).device))
        found = session_fisher(
            model, samples, "empirical", strategy.augment, self.random, norms, batch_size=self.importance_batch, power=1
        )
        for name, importance in found.items():
            mean = pad_rows(self.task_importance.get(name, torch.zeros_like(importance)), importance)
            self.task_importance[name] = running_mean(mean, self.samples, importance, len(samples))
        self.samples += len(samples)

    @on(SessionEnded)
    def measure(self, event: SessionEnded) -> None:
        """Take up the session's samples, while they are there."""
        self.add_importance(event.session.samples, event.session.task_if_shown)

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Add the task's importance, and anchor the weights where it left them."""
        self.set_anchor()
        old, stays, comes = self.importance, 1.0, 1.0
        if self.alpha is not None and old:
            stays, comes = self.alpha, 1 - self.alpha
        self.importance = {
            name: comes * new + stays * pad_rows(old[name], new) if old else new for name, new in self.task_importance.items()
        }
        self.start_task()


class MAS(RehearsalFree):
    """Hold the weights near those of the last task, each by how much the outputs depend on it.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        strength: of the penalty: a number, or one or a tensor for each held weight by its name.
        parameters: which weights are held: a pattern of their names in the model, or several.
        importance_batch: how many samples' gradients are averaged before the absolute value. None: one at a time, exactly.
        norm: "sum" or "mean" of the squared outputs of a sample.
        alpha: how much of the importance so far stays in a moving average. None: it is summed.
        form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        strength: float | dict[str, Any] = 0.01,
        parameters: str | list[str] = "*",
        importance_batch: int | None = None,
        norm: str = "sum",
        alpha: float | None = None,
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.add_regularisers(MASPenalty(strength, parameters, importance_batch, norm, alpha))
