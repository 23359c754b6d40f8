"""TAME: an expert for each distribution that the stream draws from, switched by the loss; a selector sends test samples to them.

Zhu, Majzoubi, Jain, Choromanska 2024, "TAME: Task Agnostic Continual Learning using Multiple Experts" (CVPR workshop CLVision). The
paper's body could not be read: this follows the authors' code (HaoranZhuExplorer/TAME), which has the Split MNIST driver alone.

No boundaries and no task ids, in training or test. Labels are local to tasks: on a stream of scenario "domain" the accuracy is the
one that the authors' code reports: a sample that went to the wrong expert counts if the label is right. `Routing` measures the
strict one too.

batch     l_k      cross-entropy of every expert k on the batch, in evaluation mode; outputs pass a sigmoid before the softmax
          S_k      <- alpha l_k + (1 - alpha) S_k, of every expert, at every batch
          tau_c    <- mean(W_c) + deviations max(std(W_c), floor), of the active expert c; W_c its newest losses of before this
                   batch, at first ln(classes)
          switch   if S_c > tau_c, to the first expert, c among them, with alpha l_k + (1 - alpha) A_k < tau_k, where A_k is
                   smoothed over the batches that k learned; if there is none, to a new expert with an optimizer of its own
          learn    one step of the active expert; then its loss from before the step goes into W and A
          offer    to the selector's memory, with the number of the expert, and to the expert's pruning memory
answer    the selector, a network trained on its memory to name the expert, sends each sample to an expert

The selector is trained where answers are asked for: anew, from its memory, as a function of the run's seed and of what the memory
was offered, so no evaluation leaves a trace. It is kept until there is more to learn from. The same holds for pruned copies.

novelty   1 - max over classes of sum over experts of (the selector's probability of the expert) * (the expert's of the class): the
          sureness of all experts as one mixture; own choice, not measured

Where paper and code differ: `window` 100 in the paper, 35 in the code for Split MNIST; `selector` "mlp" in the paper (its width is
not known: 100 here), "expert" (the experts' architecture) in the code, which the published sizes fit; Nesterov's momentum in the
paper (give it as the optimizer), plain in the code; `pruning` of experts "online" in the paper's first version, "posthoc" in its
second, never called in the code ("none"); `selector_retrain_lr` 0.1 in the paper, 1e-3 in the code; `pruning_capacity` 6000 in the
paper, 500 in the code. What is said of the paper is from summaries of it, not verified. `settle=True` is ours: with it an expert
comes back with S = A. Then losses that it had while others learned raise no alarm, and only the active expert has to be scored at
each batch, so the cost doesn't grow with the experts.

Deviations: the memory of the selector is balanced over pairs (expert, label), with shares as equal as can be; the code has heaps
by global class, which for permuted images tell of the task. A session is offered in its first epoch, or from a switch on in the
epoch of that (code: each sample once, by its number in the data set, which no stream gives). Each expert has a pruning memory of
its own, filled while it is active (code: one, which goes on where an old expert comes back). The first batch is never a shift. An
alarm after which the same expert is chosen again is no `ShiftDetected`. No learning rate schedule: the code's are not reached on
MNIST. l_k is measured without augmentation. Answers are taken before the sigmoid, which rounds large outputs to ties. At the
code's learning rate the sigmoids of a selector may saturate for good (on permuted MNIST in 3 of 9 trainings): one that sends its
whole memory to one expert is trained anew, from other weights, up to four times. Batches are shuffled, and none spans two sessions
of the stream, unless the stream has it so.

Measured: see `docs/tame.md` (anchors `tame-split-mnist`, `tame-recurring`, `tame-permuted-mnist-10`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from clstream.strategies.tame.events import ExpertAdded, ExpertReactivated
from clstream.strategies.tame.experts import Expert, check_redrawable, redrawn
from clstream.strategies.tame.pruning import cut, magnitude_masks, parameter_counts
from clstream.strategies.tame.selector import PrunedModel, check_selector, fit, is_collapsed, new_selector, prune
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from clstream.bus import on
from clstream.drift_detection import LossWindow, ShiftDetected, check_detection, smooth
from clstream.eval_mode import answers
from clstream.events import RunContinued, RunEnded, RunStarted, SessionEnded, SessionStarted
from clstream.measures.flops import counted_once
from clstream.memory import ClassBalanced, Reservoir
from clstream.models.ensemble import Ensemble
from clstream.params import check_bool, check_choice, check_integer, check_positive, check_share
from clstream.seeds import isolated
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Samples, Task

TRIES = 5
"""Trainings of a selector, at most, as long as it sends its whole memory to one expert."""


class TAME(Strategy):
    """Switch between experts as the loss says, and add one where none fits.

    `experts` are all of them, and `active` is the number of the one that learns; `model` and `optimizer` are its own.

    Args:
        model: the first expert. Others have the same architecture; they need a fixed head.
        optimizer: makes the optimizer of each expert.
        alpha, window, deviations, floor: of the detector of shifts, see `clstream.drift_detection`.
        sigmoid: whether outputs pass a sigmoid before the softmax. Losses are bounded so, and all thresholds are made for that.
        settle: whether an expert that comes back forgets the losses it had while others learned.
        initial: what a new expert starts from: "new" (weights drawn anew) or "given" (those that the model came with).
        selector: "expert" (the experts' architecture) or "mlp" (one hidden layer of 100).
        selector_capacity: samples in the selector's memory.
        selector_epochs: passes over it to train a selector.
        selector_sparsity: the share of the selector's weights that is pruned; then it is trained again.
        selector_retrain_lr: learning rate of that.
        pruning: "none", "online" (an expert is pruned, for good, when another takes its place) or "posthoc" (copies that answer).
        sparsity: the share of an expert's weights that is pruned; then it is trained again, from its memory.
        pruning_capacity: samples in each expert's pruning memory.
        retrain_epochs: passes over a memory after pruning; the learning rate falls to a tenth at 1/2 and 3/4 of them.

    With `sigmoid` and batches of few samples, momentum of 0.9 at a rate of 0.1 may saturate an expert for good: it warns of that.

    Raises:
        ValueError: for options out of range, a growing head, or a model whose weights can't be drawn anew; where a run starts, for
            a model that no selector can be made of, and for another number of classes than it has learned.

    """

    not_state: tuple[str, ...] = (
        "ensemble", "cached_selector", "cached_copies", "selector_collapsed", "sigmoid_slope", "last_loss", "warned",
    )  # fmt: skip
    fixed_classes = "all outputs of an expert"
    takes_new_classes = False
    exempt = {"grows": "all experts have the same outputs from the start"}  # noqa: RUF012  # as the base has it

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        alpha: float = 0.2,
        window: int = 100,
        deviations: float = 3.0,
        floor: float = 0.005,
        sigmoid: bool = True,
        settle: bool = False,
        initial: str = "new",
        selector: str = "expert",
        selector_capacity: int = 5000,
        selector_epochs: int = 200,
        selector_sparsity: float = 0.5,
        selector_retrain_lr: float = 1e-3,
        pruning: str = "none",
        sparsity: float = 0.98,
        pruning_capacity: int = 500,
        retrain_epochs: int = 200,
    ) -> None:
        super().__init__(model, optimizer)
        check_detection(alpha, window, deviations, floor)
        check_integer(
            1,
            window=window,
            selector_capacity=selector_capacity,
            selector_epochs=selector_epochs,
            retrain_epochs=retrain_epochs,
            pruning_capacity=pruning_capacity,
        )
        check_share(sparsity=sparsity, selector_sparsity=selector_sparsity)
        check_choice(("new", "given"), initial=initial)
        check_choice(("expert", "mlp"), selector=selector)
        check_choice(("none", "online", "posthoc"), pruning=pruning)
        check_positive(selector_retrain_lr=selector_retrain_lr)
        check_bool(sigmoid=sigmoid, settle=settle)
        check_redrawable(model, initial == "new", selector == "expert")
        if pruning != "none" or (selector_sparsity and selector == "expert"):
            magnitude_masks(model, 0.5)  # refuses one with nothing to prune
        self.make_optimizer = optimizer
        self.alpha, self.window, self.deviations, self.floor = alpha, window, deviations, floor
        self.sigmoid, self.settle, self.selector = sigmoid, settle, selector
        self.selector_epochs, self.selector_sparsity = selector_epochs, selector_sparsity
        self.selector_retrain_lr, self.retrain_epochs = selector_retrain_lr, retrain_epochs
        self.pruning, self.sparsity, self.pruning_capacity = pruning, sparsity, pruning_capacity
        self.given = deepcopy(model) if initial == "given" else None
        self.classes, self.seed, self.step, self.active = 1, 0, 0, 0
        self.start_epoch = 0  # of the session, in which the active expert took over
        self.sigmoid_slope: Tensor | None = None  # the largest derivative of a sigmoid in the newest batch
        self.last_loss = 0.0  # of the newest batch
        self.warned = False
        self.memory = ClassBalanced(selector_capacity)  # its labels are expert * classes + label
        self.random = torch.Generator()
        self.experts = [self.untrained_expert(model, self.optimizer)]
        self.ensemble: Ensemble | None = None  # the experts, to be scored together
        self.cached_selector: tuple[tuple[int, int], PrunedModel] | None = None  # with what it was made from
        self.selector_collapsed = False  # whether it sends all that it was trained on to one expert
        self.cached_copies: dict[int, tuple[tuple[int, int], PrunedModel]] = {}  # pruned experts, with what they were made from

    def untrained_expert(self, model: nn.Module, optimizer: Optimizer) -> Expert:
        """Return an expert that has learned nothing."""
        memory = None if self.pruning == "none" else Reservoir(self.pruning_capacity)
        return Expert(model, optimizer, LossWindow(math.log(self.classes), self.window), memory)

    # Learning

    def outputs(self, samples: Samples) -> Tensor:
        """Return the active expert's outputs for samples to learn: augmented, and bounded."""
        outputs = self.bounded(super().outputs(samples))
        self.sigmoid_slope = (outputs * (1 - outputs)).detach().amax() if self.sigmoid else None
        return outputs

    def bounded(self, outputs: Tensor) -> Tensor:
        """Return outputs between 0 and 1, if they are to be."""
        return outputs.sigmoid() if self.sigmoid else outputs

    def learn(self, batch: Batch) -> Tensor:
        """Select the expert, have it take one step, and offer the batch to the memories."""
        active = self.active
        before = self.last_loss = self.select_expert(batch.samples)
        if self.active != active:
            self.start_epoch = batch.epoch
        loss = super().learn(batch)
        expert = self.experts[self.active]
        if expert.masks:
            cut(expert.model, expert.masks)
        expert.loss_window.add(before, self.alpha)
        expert.steps += 1
        self.step += 1
        if batch.epoch == self.start_epoch:
            samples = batch.samples
            self.memory.add(Samples(samples.x, samples.y + self.active * self.classes))
            if expert.memory is not None:
                expert.memory.add(Samples(samples.x, samples.y))
        return loss

    def select_expert(self, samples: Samples) -> float:
        """Switch the expert if the loss says so, and return the loss of the active one before it learns."""
        losses = self.losses(samples, self.active if self.settle else None)
        for number, loss in losses.items():
            window = self.experts[number].loss_window
            window.smoothed = smooth(window.smoothed, loss, self.alpha)
        window = self.experts[self.active].loss_window
        threshold = window.update_threshold(self.deviations, self.floor)
        if self.step and window.smoothed is not None and window.smoothed > threshold:
            shift = ShiftDetected(self.step, window.smoothed, threshold)
            self.switch_expert(self.losses(samples) if self.settle else losses, shift)
            if self.active not in losses:
                losses = self.losses(samples, self.active)
        return losses[self.active]

    def losses(self, samples: Samples, only: int | None = None) -> dict[int, float]:
        """Return the loss of each expert on samples by its number, in evaluation mode; it waits for the device, once."""
        if self.ensemble is None or len(self.ensemble.models) != len(self.experts):
            self.ensemble = Ensemble([expert.model for expert in self.experts])
        if only is None:
            self.ensemble.refresh(self.active)  # no other has learned since
            outputs = self.ensemble.outputs(samples.x)
        else:
            outputs = self.ensemble.outputs_of(only, samples.x)[None]
        y = samples.y.repeat(len(outputs))
        task = samples.extra.get("task")
        tasks = None if task is None else task.repeat(len(outputs))
        with torch.no_grad():
            logits = self.mask_other_heads(self.bounded(outputs).flatten(0, 1), y, tasks)
            losses = F.cross_entropy(logits, y, reduction="none").view(len(outputs), -1).mean(1).tolist()
        return dict(enumerate(losses) if only is None else [(only, losses[0])])

    def switch_expert(self, losses: dict[int, float], shift: ShiftDetected) -> None:
        """Switch to the first expert that knows such losses, or to a new one; emit events if that is another one than before."""
        left = self.active
        for number, expert in enumerate(self.experts):
            window = expert.loss_window
            value = smooth(window.learned, losses[number], self.alpha)
            if window.threshold is not None and value < window.threshold:
                if self.settle:
                    window.smoothed = value
                break
        else:
            number = len(self.experts)
            self.experts.append(self.new_expert())
        if number == left:
            return
        if self.pruning == "online" and not self.experts[left].masks:
            self.prune_for_good(left)
        self.active, self.model, self.optimizer = number, self.experts[number].model, self.experts[number].optimizer
        self.emit(shift)
        event = ExpertAdded if number == len(losses) else ExpertReactivated
        self.emit(event(self.step, number, len(self.experts)))

    def new_expert(self) -> Expert:
        """Return a new expert, like the first one (which alone knows how it was built), with weights from the run's numbers."""
        with isolated(int(torch.randint(2**62, (), generator=self.random)), "expert"):
            model = deepcopy(self.given) if self.given is not None else redrawn(self.experts[0].model)
        model.to(self.device).train()
        return self.untrained_expert(model, self.make_optimizer(model.parameters()))

    def prune_for_good(self, number: int) -> None:
        """Prune an expert itself; if it comes back, it learns with the weights that are left."""
        expert = self.experts[number]
        if expert.memory is None or not len(expert.memory):
            return
        with isolated(self.seed, "pruning", number, expert.steps, device=self.device):
            expert.masks = self.prune(expert.model, expert.memory.all())
        expert.optimizer = self.make_optimizer(expert.model.parameters())
        self.ensemble = None

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return next(self.model.parameters()).device

    # Answering

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return for each sample the outputs of the expert that the selector sends it to."""
        if not len(x):
            return torch.zeros(0, self.classes, device=x.device)
        experts = self.route(x)
        rows = [(experts == number).nonzero().flatten() for number in range(len(self.experts))]
        parts = [model(x[own]) for own, (model, _) in zip(rows, self.answering_models(), strict=True) if len(own)]
        scores: Tensor = torch.cat(parts)
        return torch.empty_like(scores).index_copy_(0, torch.cat(rows), scores)

    @torch.no_grad()
    def novelty(self, x: Tensor) -> Tensor:
        """Return (n,): 1 minus the greatest probability of a class, by all experts weighed as the selector's probabilities say."""
        models = self.answering_models()
        shares = self.trained_selector()[0](x).softmax(1) if len(models) > 1 else torch.ones(len(x), 1, device=x.device)
        parts = [share[:, None] * model(x).softmax(1) for share, (model, _) in zip(shares.unbind(1), models, strict=True)]
        return 1 - torch.stack(parts).sum(0).amax(1)

    @property
    def scores_ignore_task(self) -> bool:
        """Whether one answer serves both questions: the selector is not given the task."""
        return type(self).scores is TAME.scores and type(self).predict is Strategy.predict

    def predict_online(self, x: Tensor) -> Tensor:
        """Label what the stream brings next: the active expert's labels."""
        scores: Tensor = self.model(x)
        return scores.argmax(1)

    @answers
    def route(self, x: Tensor) -> Tensor:
        """Return the number of the expert that each sample is sent to: (n,), int64."""
        if len(self.experts) == 1:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        selector, _ = self.trained_selector()
        scores: Tensor = selector(x)
        return scores.argmax(1)

    def trained_selector(self) -> PrunedModel:
        """Return the selector, trained anew if there is more to learn from than there was, and its masks."""
        source = self.memory.seen, len(self.experts)
        if self.cached_selector is None or self.cached_selector[0] != source:
            memory = self.memory.all()
            samples = Samples(memory.x, memory.y // self.classes)
            with counted_once(("selector", source)):
                for attempt in range(TRIES):
                    seeds = self.seed, "selector", *source, *range(attempt)
                    with torch.enable_grad(), isolated(*seeds, device=self.device):
                        selector = self.train_selector(samples)
                    self.selector_collapsed = len(samples.y.unique()) > 1 and is_collapsed(selector[0], samples.x)
                    if not self.selector_collapsed:
                        break
            self.cached_selector = source, selector
        return self.cached_selector[1]

    def train_selector(self, samples: Samples) -> PrunedModel:
        """Return a selector trained on inputs and the numbers of their experts, pruned and trained again, and its masks."""
        shape = tuple(samples.x.shape[1:])
        model = new_selector(self.selector, self.experts[0].model, len(self.experts), shape).to(self.device)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        fit(model, samples, self.selector_epochs, optimizer, self.training_outputs)
        masks: dict[str, Tensor] = {}
        if self.selector_sparsity:
            options = self.selector_sparsity, self.retrain_epochs, self.selector_retrain_lr
            masks = prune(model, samples, *options, self.training_outputs)
        return model.eval(), masks

    def answering_models(self) -> list[PrunedModel]:
        """Return the experts that answer, with their masks: themselves, or pruned copies."""
        if self.pruning != "posthoc":
            return [(expert.model, expert.masks) for expert in self.experts]
        for number, expert in enumerate(self.experts):
            assert expert.memory is not None
            source = expert.steps, expert.memory.seen
            if len(expert.memory) and (number not in self.cached_copies or self.cached_copies[number][0] != source):
                model = deepcopy(expert.model)
                seeds = self.seed, "pruning", number, *source
                with counted_once(seeds), torch.enable_grad(), isolated(*seeds, device=self.device):
                    masks = self.prune(model, expert.memory.all())
                self.cached_copies[number] = source, (model.eval(), masks)
        copies = {number: copy for number, (_, copy) in self.cached_copies.items()}
        return [copies.get(number, (expert.model, {})) for number, expert in enumerate(self.experts)]

    def prune(self, model: nn.Module, samples: Samples) -> dict[str, Tensor]:
        """Prune an expert, train what is left on some of what it learned, and return the masks."""
        return prune(model, samples, self.sparsity, self.retrain_epochs, 0.1, self.training_outputs)

    def training_outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return a model's outputs for inputs out of a memory: augmented, and bounded."""
        return self.bounded(model(x if self.augment is None else self.augment(x)))

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights and buffers of all experts; selector and pruned copies are made of what is kept."""
        for expert in self.experts:
            yield from (*expert.model.parameters(), *expert.model.buffers())

    @answers
    def parameter_counts(self) -> tuple[int, int]:
        """Return how many parameters the networks that answer have, selector included: all, and those that pruning has left."""
        networks = self.answering_models() + ([self.trained_selector()] if len(self.experts) > 1 else [])
        dense, sparse = zip(*(parameter_counts(model, masks) for model, masks in networks), strict=True)
        return sum(dense), sum(sparse)

    # The run

    @on(RunStarted)
    def begin_run(self, event: RunStarted) -> None:
        """Read the number of classes, which gives the loss of a guess."""
        classes, fresh = event.stream.classes, not self.experts[0].steps
        if not fresh and classes != self.classes:
            raise ValueError(
                f"this TAME has learned {self.classes} classes, and {event.stream.name} has {classes}: make another one"
            )
        self.classes, self.seed, self.step = classes, event.seed, 0
        if fresh:
            self.experts[0].loss_window = LossWindow(math.log(classes), self.window)
        self.ensemble, self.cached_selector, self.cached_copies = None, None, {}
        if self.selector == "expert":
            check_selector(self.experts[0].model, event.stream.input_shape, self.device)

    def read_more(self, event: RunContinued) -> None:
        """Go on with as many classes. Raises ValueError for more, which the labels of the selector's memory have no room for."""
        if event.stream.classes != self.classes:
            raise ValueError(
                f"this TAME has learned {self.classes} classes, and with {event.stream.name} there are {event.stream.classes}: "
                "make another one"
            )
        super().read_more(event)

    @on(SessionStarted)
    def grow_head(self, event: SessionStarted) -> None:
        """Grow nothing, since heads are fixed here; the session's samples are new to the expert."""
        self.start_epoch = 0

    @on(SessionEnded)
    def warn_if_saturated(self, event: SessionEnded) -> None:
        """Warn of an active expert that can learn no more, at the first session that ends so."""
        slope = self.sigmoid_slope
        if slope is not None and float(slope) < 1e-3 and self.last_loss > math.log(self.classes) and not self.warned:
            self.warned = True
            warnings.warn(
                "the sigmoids of TAME's active expert are saturated, so it answers no better than a guess and learns nothing: take "
                "a smaller learning rate, less momentum, larger batches, or sigmoid=False",
                stacklevel=2,
            )

    @on(RunEnded)
    def warn_if_collapsed(self, event: RunEnded) -> None:
        """Warn of a selector that never learned to tell the experts apart."""
        if self.selector_collapsed and event.error is None:
            warnings.warn(
                f"TAME's selector sends all that it was trained on to one expert, after {TRIES} trainings: take selector='mlp', or "
                "another number of selector_epochs",
                stacklevel=2,
            )
