"""Lifelong learning with one mechanism, the stiffness of weights, after an idea of Ling & Bohn.

Ling & Bohn 2021, "A Deep Learning Framework for Lifelong Machine Learning" (arXiv 2105.00157; earlier 1911.09704). Of the papers
only the abstracts could be read, and there is no public code. Certain is the idea: how stiff each weight, or group of weights, is
while the network learns gives non-forgetting, transfer, few-shot learning, less confusion and graceful forgetting. Groups,
policies, schedules and numbers are own choices, and no published number is for this. Form implemented:

    L(w) = L_new(w) + sum_i b_i (w_i - ref_i)^2,    b in [0, inf]; ref is the value when a task was last consolidated

    step="proximal"  the optimizer's step on L_new gives w'; then w = (w' + 2 lr b ref) / (1 + 2 lr b), with b = inf: w = ref, bit
                     for bit. It comes last, so momentum and weight decay move no weight that is held. It is stable for any b. With
                     an optimizer that is not plain SGD it is not the same as the penalty's gradient
    step="gradient"  the penalty is part of the loss; b must be finite

Policies. "zero": b is 0, fine-tuning. When a task ends, "constant" sets b = strength everywhere, which is L2 with a single anchor,
and "fisher" b <- decay b + strength F, with F as `EWC` has it: its form online=True. Then `prune` sets the share of weights with
the smallest b w^2 to 0, with b = 0. All others are a b for each group. With t the task that is learned, the units of each layer
belong to tasks, an equal share each, and a weight is in the group

    old         to a unit of a task before t, from one as old or older       old_rows   of the head, of a class that came before t
    new         to a unit of t, from one of t                                new_rows   of the head, of a class of t
    old_to_new  to a unit of t, from an older one, or an input               new_to_old to a unit or row, from a newer unit

New links to older units start at 0. What belongs to no task yet is held always. "guarantee" is old, old_rows, new_to_old: inf, all
others 0: then nothing that is older depends on what is newer, and the logits of old classes are the same bits after any later
task. With a head that grows they are equal to rounding. It is a guarantee of logits, not of accuracy, where new classes compete.
Layers whose units something mixes, as a layer norm, belong to the first task as a whole: see `groups`. Where anything is held,
batch norm stays in evaluation mode after the first task. With "guarantee", a task without new classes finds nothing free to learn.

`start`, when a task gets units: "nearest_task": their weights from older units and inputs are those of the task with the nearest
classes; "nearest_class": the row of a class in the head is that of the nearest class. Nearest is the cosine of class means of
features, over units that the older class had.

`relax`, when a task has ended, is a pass with other stiffness over `per_class` kept samples of each class, all at once, in
`relax_steps` steps of plain SGD: "all" lets everything that belongs to a task move with b = relax_stiffness; "pair" the head's rows
of the two classes that are taken for each other most, on the quarter of their inputs with the greatest Fisher, until the share of
their samples that is taken for the other class is below `pair_error`. What such a pass moves is not guaranteed. No test sample is
looked at.

Left out: expansion, and a joint "sleep" pass over all weights other than relax="all". Measured: see `docs/lifelong.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from math import inf
from types import MappingProxyType

import torch
from clstream.strategies.lifelong.confusion import error, freed_for, worst_pair
from clstream.strategies.lifelong.events import Consolidated, Pruned, Relaxed
from clstream.strategies.lifelong.groups import GROUPS, Groups, parts_of, shares_needed
from clstream.strategies.lifelong.starts import Nearest, class_means, copy_rows, copy_units, nearest_classes
from clstream.strategies.lifelong.stiffness import check_groups, penalty, proximal, pull_share, quantiles, smallest
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import BatchLearned, RunContinued, RunStarted, SessionEnded, SessionStarted, TaskEnded, TaskStarted
from clstream.fisher import diagonal_fisher, running_mean, session_fisher
from clstream.memory import ClassBalanced
from clstream.models.heads import pad_rows
from clstream.params import check_choice, check_integer, check_number, check_positive, check_share
from clstream.strategy import CONTROLS, OptimizerFactory, Strategy
from clstream.stream import Samples, Subset

EVERYWHERE = ("zero", "constant", "fisher")
GUARANTEE = {"old": inf, "new": 0.0, "old_to_new": 0.0, "new_to_old": inf, "old_rows": inf, "new_rows": 0.0}


class Lifelong(Strategy):
    """Hold each weight by its own stiffness, from free to frozen.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits; for groups it has `stages` and a linear `head`.
        optimizer: makes the optimizer from the model's parameters.
        policy: "zero", "constant", "fisher" or "guarantee", or the stiffness of each group by its name, at least 0; those that it
            leaves out have 0.
        tasks: how many tasks share out the units. None: as many as the stream has; one that comes again with classes that are new
            counts again. For policies of groups.
        strength: the stiffness of "constant", and what the Fisher is multiplied by.
        decay: how much of the stiffness so far stays when a task ends; "fisher" only.
        prune: the share of weights that are set free when a task has ended; "fisher" only.
        step: "proximal" or "gradient".
        start: "fresh", "nearest_task" or "nearest_class": what new units or rows start from; groups only.
        relax: "none", "all" or "pair": the pass when a task has ended; "pair" with groups only.
        relax_stiffness: of what is free in it. 0: these are plain replay steps.
        relax_steps: how many steps it takes, with "pair" at most.
        relax_lr: their learning rate.
        per_class: samples of each class that are kept for it.
        pair_error: "pair" stops when the share of the pair's samples that is taken for the other class is below it.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    Raises:
        ValueError: for options that don't go together, and, when a run starts, for tasks that share classes where the policy holds
            old rows, or more tasks than a layer has units.
        TypeError: for groups of a model of another form.

    """

    takes_controls = tuple(control for control in CONTROLS if control != "accumulate")  # weights are pulled with each batch
    not_state = ("drawn_before", "pulls")

    exempt = MappingProxyType(
        {"continues_exactly": "units are shared out among the tasks of the first stream, unless `tasks` is given"}
    )

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        policy: str | dict[str, float] = "guarantee",
        tasks: int | None = None,
        strength: float = 1.0,
        decay: float = 1.0,
        prune: float = 0.0,
        step: str = "proximal",
        start: str = "fresh",
        relax: str = "none",
        relax_stiffness: float = 0.01,
        relax_steps: int = 50,
        relax_lr: float = 0.1,
        per_class: int = 20,
        pair_error: float = 0.2,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        if isinstance(policy, str):
            check_choice((*EVERYWHERE, "guarantee"), policy=policy)
        else:
            check_groups(policy, GROUPS)
        check_integer(1, none=True, tasks=tasks)
        check_number(0, strength=strength, relax_stiffness=relax_stiffness)
        check_number(0, 1, decay=decay, pair_error=pair_error)
        check_share(prune=prune)
        check_choice(("proximal", "gradient"), step=step)
        check_choice(("fresh", "nearest_task", "nearest_class"), start=start)
        check_choice(("none", "all", "pair"), relax=relax)
        check_integer(1, relax_steps=relax_steps, per_class=per_class)
        check_positive(relax_lr=relax_lr)
        self.by_group: dict[str, float] = {}  # the stiffness of each group; none for the policies that are the same everywhere
        if policy not in EVERYWHERE:
            self.by_group = GUARANTEE if policy == "guarantee" else dict.fromkeys(GROUPS, 0.0) | dict(policy)  # type: ignore[arg-type]
        self.policy = policy if isinstance(policy, str) else "groups"
        wanted = {"tasks": tasks is not None, f"start={start!r}": start != "fresh", "relax='pair'": relax == "pair"}
        if lacking := [name for name, is_wanted in wanted.items() if is_wanted and not self.by_group]:
            raise ValueError(f"{lacking[0]} needs groups of weights: take policy='guarantee', or a stiffness for each group")
        if policy != "fisher" and (decay != 1 or prune):
            raise ValueError(f"decay and prune go by the stiffness of policy='fisher', not of {self.policy!r}")
        if step == "gradient" and inf in self.by_group.values():
            raise ValueError(f"policy {self.policy!r} has an infinite stiffness, whose gradient is none: take step='proximal'")
        if self.by_group:
            parts_of(model)
        self.tasks, self.strength, self.decay, self.share, self.step, self.start = tasks, strength, decay, prune, step, start
        self.relax_kind, self.relax_stiffness, self.relax_steps = relax, relax_stiffness, relax_steps
        self.relax_lr, self.per_class, self.pair_error = relax_lr, per_class, pair_error
        self.rehearsal_free = relax == "none"
        self.random = torch.Generator()
        self.groups: Groups | None = None
        self.memory: ClassBalanced | None = None
        self.stiffness: dict[str, Tensor] = {}  # by name, in each weight's shape: b
        self.reference: dict[str, Tensor] = {}  # and ref
        self.pulls: dict[str, tuple[float, Tensor]] = {}  # for which learning rate, and how far weights go to their references
        self.fisher: dict[str, Tensor] = {}  # of the task that goes on
        self.fisher_samples = 0
        self.means: dict[int, Tensor] = {}  # (features,), of each class that came
        self.learning = False  # whether the task that goes on has units

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start with weights that are free, and units of no task. Raises ValueError for a stream that doesn't fit."""
        stream = event.stream
        self.stiffness, self.reference, self.means, self.learning = {}, {}, {}, False
        self.start_fisher()
        self.memory = ClassBalanced(self.per_class * stream.classes, self.per_class) if self.relax_kind != "none" else None
        self.groups = None
        if not self.by_group:
            return
        if not stream.boundaries:
            raise ValueError(
                f"policy {self.policy!r} gives tasks units of their own, and {stream.name} hides its tasks: take 'constant' or "
                "'fisher'"
            )
        labels = [label for task in stream.tasks for label in task.classes]
        if self.by_group["old_rows"] == inf and len(set(labels)) < len(labels):
            raise ValueError(
                f"policy {self.policy!r} holds the outputs of classes that came, and tasks of {stream.name} share classes, so the "
                "later ones couldn't be learned: take 'constant' or 'fisher', or a finite stiffness of old_rows"
            )
        tasks = shares_needed(stream)
        if self.tasks is not None and self.tasks < tasks:
            raise ValueError(f"tasks={self.tasks} is too few for {stream.name}, which has {tasks}")
        self.groups = Groups(self.model, self.tasks or tasks)

    @on(RunContinued)
    def go_on(self, event: RunContinued) -> None:
        """Make room for samples of the classes that are new. Raises ValueError if there are no units for the tasks to come."""
        if self.memory is not None:
            self.memory.enlarge(self.per_class * event.stream.classes)
        tasks = 0 if self.groups is None else shares_needed(event.stream)
        if self.groups is not None and self.groups.tasks < tasks:
            raise ValueError(
                f"the units were shared out among {self.groups.tasks} tasks, and {event.stream.name} makes them {tasks}: "
                "say with tasks= at the start how many there may be"
            )

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All weights of the model, by name."""
        return dict(self.model.named_parameters())

    def start_fisher(self) -> None:
        """Start the Fisher of a task anew."""
        self.fisher, self.fisher_samples = {}, 0

    # a task begins

    @on(TaskStarted)
    def begin_task(self, event: TaskStarted) -> None:
        """Take notice that a task starts: it has no units yet."""
        self.learning = False

    @on(SessionStarted)
    def begin_session(self, event: SessionStarted) -> None:
        """Give the task units, and rows for classes that are new; set the stiffness of all weights by their groups."""
        weights, groups = self.weights, self.groups
        self.pulls = {}
        for name, b in self.stiffness.items():  # of a head that has grown
            if b.dim() and len(b) < len(weights[name]):
                self.stiffness[name] = pad_rows(b, weights[name])
                self.reference[name] = torch.cat([self.reference[name], weights[name].detach()[len(b) :]])
        if groups is None:
            return
        groups.grow(self.model)
        new = groups.without_row(event.session.classes)
        nearest: Nearest = {}
        if new and self.means:
            nearest = nearest_classes(groups, self.means, self.class_means(event.session.samples), new)
        if allocates := bool(new) and not self.learning:
            groups.allocate(weights)
            self.learning = True
            if self.start == "nearest_task" and nearest:
                copy_units(groups, weights, nearest)
        groups.take_rows(new, weights)
        if self.start == "nearest_class" and nearest:
            copy_rows(groups, weights, nearest)
        if allocates:
            self.set_reference()
        rows = [groups.labels.index(label) for label in new]  # those that come in a later session too
        for name in [name for name, layer in groups.rows.items() if layer == groups.head]:
            self.reference[name][rows] = weights[name].detach()[rows]
        self.stiffen(self.by_group)

    def class_means(self, samples: Samples | Subset) -> dict[int, Tensor]:
        """Return the means of features of a session's classes, in evaluation mode."""
        with evaluating(self):
            return class_means(self.model, samples, next(self.model.parameters()).device)

    # stiffness

    def set_reference(self) -> None:
        """Take the weights as they are for the reference."""
        self.reference = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def stiffen(self, by_group: Mapping[str, float]) -> None:
        """Set the stiffness of all weights by their groups; what belongs to no task is held."""
        groups = self.groups
        assert groups is not None
        now = groups.allocated - 1 if self.learning else groups.allocated
        self.stiffness = {}
        for name, weight in self.weights.items():
            table = torch.tensor([*(by_group[group] for group in GROUPS), inf], dtype=weight.dtype, device=weight.device)
            self.stiffness[name] = table[groups.numbers(name, weight, now)]

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss of the samples, with step="gradient" and the penalty."""
        loss = super().loss(samples)
        return loss + penalty(self.weights, self.reference, self.stiffness) if self.step == "gradient" and self.stiffness else loss

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory for relax passes, in the first pass over its session."""
        if self.memory is not None and event.batch.epoch == 0:
            self.memory.add(event.batch.samples)

    @on(BatchLearned)
    @torch.no_grad()
    def pull(self, event: BatchLearned) -> None:
        """After the optimizer's step, bring weights nearer to their references, each by its stiffness."""
        if self.step == "gradient" or not self.stiffness:
            return
        rates = {id(weight): group["lr"] for group in self.optimizer.param_groups for weight in group["params"]}
        for name, weight in self.model.named_parameters():
            lr = rates[id(weight)]
            if name not in self.pulls or self.pulls[name][0] != lr:
                self.pulls[name] = lr, pull_share(self.stiffness[name], lr)
            weight.lerp_(self.reference[name], self.pulls[name][1])  # as `proximal`

    # a task ends

    @on(SessionEnded)
    def end_session(self, event: SessionEnded) -> None:
        """Take the Fisher of the session's samples, or the means of its classes, while they are there."""
        samples = event.session.samples
        if self.policy == "fisher":
            model = deepcopy(self.model).eval()
            losses, competing = self.sample_losses, self.mask_other_heads
            fisher = session_fisher(model, samples, "predicted", self.augment, self.random, losses, competing)
            for name, new in fisher.items():
                mean = pad_rows(self.fisher.get(name, torch.zeros_like(new)), new)
                self.fisher[name] = running_mean(mean, self.fisher_samples, new, len(samples))
            self.fisher_samples += len(samples)
        if self.start != "fresh":
            self.means = self.class_means(samples) | self.means

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Make the weights as they are the reference, set the stiffness from here on, prune, and take the relax pass."""
        weights = self.weights
        moved = float(penalty(weights, self.reference, self.stiffness).detach()) if self.stiffness else 0.0
        self.learning = False
        self.set_reference()
        if inf in self.by_group.values():
            for module in [module for module in self.model.modules() if isinstance(module, _BatchNorm)]:
                module.eval()
        if self.groups is not None:
            self.stiffen(self.by_group)
        elif self.policy == "constant":
            self.stiffness = {name: torch.full_like(weight, self.strength) for name, weight in self.reference.items()}
        elif self.policy == "fisher":
            for name, weight in self.reference.items():
                new = self.strength * self.fisher[name] if name in self.fisher else torch.zeros_like(weight)
                self.stiffness[name] = new + self.decay * self.stiffness[name] if name in self.stiffness else new
            self.start_fisher()
        if self.share:
            self.prune(self.share)
        if self.stiffness:
            self.emit(self.told(moved))
        if self.memory is not None:
            self.relax(self.memory.all())

    def told(self, moved: float) -> Consolidated:
        """Return the event that says how stiff the weights are."""
        b = torch.cat([values.flatten() for values in self.stiffness.values()])
        finite = b[b.isfinite()]
        mean = float(finite.mean()) if len(finite) else 0.0
        capacity = self.groups.capacity() if self.groups is not None else float((b > 0).float().mean())
        kept = len(self.memory) if self.memory is not None else 0
        return Consolidated(self.policy, mean, quantiles(self.stiffness), moved, capacity, kept)

    @torch.no_grad()
    def prune(self, share: float) -> int:
        """Set the ceil(share n) of the n weights with the smallest b w^2 to 0, with b = 0; return how many these are."""
        chosen = smallest(self.weights, self.stiffness, share)
        for name, weight in self.weights.items():
            weight[chosen[name]] = 0
            self.stiffness[name] = self.stiffness[name].masked_fill(chosen[name], 0)
            self.reference[name] = self.reference[name].masked_fill(chosen[name], 0)
        many = sum(int(mask.sum()) for mask in chosen.values())
        self.emit(Pruned(many))
        return many

    def relax(self, samples: Samples) -> None:
        """Take a pass over kept samples with other stiffness: of everything, or for the pair that is taken for each other most."""
        before, pair = self.stiffness, None
        if self.relax_kind == "pair":
            pair = worst_pair(self.kept_scores(samples), samples.y)
            if pair is None:
                return
            samples = samples[(samples.y == pair[0]) | (samples.y == pair[1])]
            self.stiffness = self.freed(pair, samples)
        elif self.groups is not None:
            self.stiffen(dict.fromkeys(GROUPS, self.relax_stiffness))
        else:
            self.stiffness = {name: torch.full_like(weight, self.relax_stiffness) for name, weight in self.reference.items()}
        errors = [error(self.kept_scores(samples), samples.y, pair)]
        steps = 0
        while steps < self.relax_steps and (pair is None or errors[-1] >= self.pair_error):
            self.relax_step(samples)
            steps += 1
            if pair is not None or steps == self.relax_steps:
                errors.append(error(self.kept_scores(samples), samples.y, pair))
        self.stiffness = before
        self.set_reference()
        self.emit(Relaxed(pair or tuple(samples.y.unique().tolist()), len(samples), steps, errors[0], errors[-1]))

    def relax_step(self, samples: Samples) -> None:
        """Take one step of plain SGD on samples, and the proximal step after it."""
        weights = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        loss = super().loss(samples)
        slopes = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        with torch.no_grad():
            for (name, weight), slope in zip(weights.items(), slopes, strict=True):
                moved = weight - self.relax_lr * slope
                weight.copy_(proximal(moved, self.reference[name], self.stiffness[name], self.relax_lr))

    def kept_scores(self, samples: Samples) -> Tensor:
        """Return (n, classes), the scores of kept samples in evaluation mode; what doesn't compete has -inf."""
        with evaluating(self), torch.no_grad():
            return self.mask_other_heads(self.model(samples.x), samples.y, samples.extra.get("task"))

    def freed(self, pair: tuple[int, int], samples: Samples) -> dict[str, Tensor]:
        """Return the stiffness for a pass for a pair of classes, from samples of both."""
        groups = self.groups
        assert groups is not None
        model = deepcopy(self.model).eval()
        for name, weight in model.named_parameters():
            weight.requires_grad_(groups.rows.get(name) == groups.head)
        fisher = diagonal_fisher(model, samples, "empirical", losses=self.sample_losses)
        return freed_for(pair, groups, self.reference, fisher, self.relax_stiffness)
