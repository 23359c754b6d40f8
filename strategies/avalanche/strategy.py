"""Strategies of Avalanche 0.6.0 on our streams: their losses, plugins and heads; our batches, evaluation, metrics and tracking.

    AvalancheStrategy(EWC(model=model, optimizer=SGD(model.parameters(), lr=0.1), ewc_lambda=0.4))     any that is at hand
    clstream run --strategy avalanche:EWC --strategy.ewc_lambda 0.4                                    one of theirs by name

Form implemented: a session is an experience, and its epochs are theirs. Our events become the calls of their loop, so that plugins
hear its callbacks in its order:

    SessionStarted   before_training, {before, after}_train_dataset_adaptation, before_training_exp; model and optimizer adapt
    EpochStarted     before_training_epoch
    a batch          `training_epoch` over that one batch: {before, after} each of training_iteration, forward, backward, update
    EpochEnded       after_training_epoch
    SessionEnded     after_training_exp, after_training; so what they consolidate is there when the session is evaluated
    a question       {before, after} each of eval, eval_dataset_adaptation, eval_exp, eval_iteration, eval_forward

The batches are ours where their loader would go over the session's own samples. Where a plugin or strategy puts another loader in
its place (replay, cumulative training), its batches are drawn when the epoch starts, and spread over ours: each takes its share.
Task labels are the numbers of the tasks on a task-incremental stream, else 0; `train_mb_size` and `train_epochs` are the stream's,
and where it does not shuffle, they are told `shuffle=False`.

Deviations: their evaluator is left out, since we evaluate, and their periodic evaluation is refused. Heads don't grow by being
asked: for a task whose head is not there yet, all classes score alike. Without the task given, a class scores what the best head
says. The stream's augmentation changes the batches that a step learns, not what their plugins draw on their own.

Boundaries are needed where a plugin or strategy does something between experiences, unless it is known to be about samples alone,
as replay is: see `FREE`. `boundaries` says otherwise.

A checkpoint holds what it can write: iterators and lambdas are none of it. It says so, with the name, before much is learned; see
`docs/avalanche.md` for those of theirs that can be resumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from clstream.strategies.avalanche.introspection import (
    _counts,
    _is_template,
    _nothing,
    check_playable,
    draw_order,
    is_multi_task,
    lists_classes,
    loader_source,
    needs_boundaries,
)
from clstream.strategies.avalanche.session_dataset import (
    AtBoundaries,
    Batches,
    SessionDataset,
    collate,
    is_whole,
    new_experience,
    quiet,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from clstream.avalanche.imports import import_avalanche
from clstream.bus import on
from clstream.events import EpochEnded, EpochStarted, RunContinued, RunStarted, SessionEnded, SessionStarted
from clstream.measures.flops import same_flops
from clstream.strategy import Strategy
from clstream.stream import Batch, Samples, Session, Task

BUILT_OF = (
    *(f"avalanche.benchmarks.scenarios.{name}" for name in ("dataset_scenario", "generic_scenario")),
    *(f"avalanche.benchmarks.utils.{name}" for name in ("classification_dataset", "data", "data_attribute", "data_loader",
                                                        "dataset_definitions", "flat_data", "transform_groups")),
    "avalanche.training.utils",
    SessionDataset.__module__,
)  # fmt: skip
"""The modules of the classes that experiences, loaders and what plugins keep are of."""


class AvalancheStrategy(Strategy):
    """Learn and answer as a strategy of Avalanche does.

    Args:
        strategy: an object of one of the classes in `avalanche.training`, with its model, optimizer and plugins.
        plugins: more plugins of Avalanche's; they come before its own.
        boundaries: whether it needs to be told of tasks. None: see above.

    Raises:
        TypeError: for what is no such object.
        ValueError: for one whose loop can't be played batch by batch, or that evaluates by itself.
        ImportError: if Avalanche is not there.

    """

    fixed_classes = "as Avalanche's strategy and model have it"
    not_state = ("drawn",)
    checkpoint_modules = BUILT_OF
    exempt = {"saves_exactly": "its strategy holds functions of torch, and loaders of Avalanche"}  # noqa: RUF012  # as the base has it
    takes_regularisers = False  # a plugin of theirs does that

    def __init__(self, strategy: Any, plugins: Sequence[Any] = (), boundaries: bool | None = None) -> None:
        check_playable(strategy, plugins)
        theirs = self.theirs = strategy
        evaluation = import_avalanche("training.plugins").EvaluationPlugin
        theirs.plugins = [*plugins, *(plugin for plugin in theirs.plugins if not isinstance(plugin, evaluation))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has no loggers: it is not asked
            theirs.evaluator = evaluation()
        needy = needs_boundaries(theirs) if boundaries is None else boundaries
        identity = import_avalanche("benchmarks.utils.transform_groups").identity
        self.functions = (identity, collate, default_collate, torch.zeros)  # their data sets that come hold these
        self.parts = (AtBoundaries(),) if needy else ()
        self.classes, self.tells_tasks = 0, False  # of the stream
        der = import_avalanche("training.supervised").DER  # it copies train_mb_size when it is built, if it is given no other
        self.memory_batch = isinstance(strategy, der) and strategy.batch_size_mem == strategy.train_mb_size
        self.coming: list[list[int]] | None = None  # the classes of each session, where the stream shows them
        self.seen: set[int] = set()
        self.by_label: dict[int, list[int]] = {}  # the classes that came with each task label
        self.own = False  # whether their loader would go over the session's own samples
        self.stopped = False  # whether a plugin has ended the training of this session
        self.loader: Any = None
        self.order: list[list[int]] = []  # of the batches of another loader: rows of what it draws from
        self.drawn: tuple[Any, Callable[..., Any]] | None = None  # what it draws from, and how rows become a batch
        self.iterator: Iterator[Any] | None = None  # of a loader whose order can't be had beforehand
        self.batches = 1  # of the epoch
        self.last: Tensor = torch.zeros(())
        self.told: dict[str, Any] = {}  # what their callbacks are given beside the strategy

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # it is theirs, also if they take another one
        """Their model."""
        model: nn.Module = self.theirs.model
        return model

    @property
    def optimizer(self) -> Optimizer:  # type: ignore[override]
        """Their optimizer."""
        optimizer: Optimizer = self.theirs.optimizer
        return optimizer

    def loss(self, samples: Samples) -> Tensor:
        """Return their criterion on samples of one task, without what plugins add."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        loss: Tensor = self.theirs._criterion(self.outputs_for(x, self.labels_of(samples)), samples.y)
        return loss

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Read the number of classes, and the device of the run."""
        stream: Any = event.stream
        self.theirs.device = torch.device(stream.device or "cpu")
        self.classes, self.tells_tasks, self.seen, self.by_label = stream.classes, stream.scenario == "task", set(), {}
        self.coming = [stream.labels(number).unique().tolist() for number in range(len(stream))] if stream.boundaries else None
        if lists_classes(self.theirs):
            self.check_listed(stream.name)
            if self.theirs.clock.train_exp_counter:
                raise ValueError("Avalanche's iCaRL counts its experiences from the first on: make a new one for another run")

    @on(RunContinued)
    def count_more(self, event: RunContinued) -> None:
        """Take down which classes the sessions to come have."""
        if self.coming is not None:
            stream, first = event.stream, event.sessions
            self.coming = self.coming[:first] + [stream.labels(number).unique().tolist() for number in range(first, len(stream))]
            if lists_classes(self.theirs):
                self.check_listed(stream.name)

    def check_listed(self, name: str) -> None:
        """Raise ValueError for a stream whose classes their iCaRL can't list: it takes every class to come once and reads which."""
        if self.coming is None:
            raise ValueError(f"Avalanche's iCaRL reads which classes come, which {name} hides: take clstream's ICaRL")
        order = [label for labels in self.coming for label in labels]
        again = next((label for place, label in enumerate(order) if label in order[:place]), None)
        if again is not None:
            raise ValueError(
                f"Avalanche's iCaRL takes each class in one session alone, and class {again} of {name} comes again: "
                "take clstream's ICaRL"
            )

    @on(SessionStarted)
    def open_experience(self, event: SessionStarted) -> None:
        """Do as their `train` does before the first epoch."""
        theirs, session = self.theirs, event.session
        experience, dataset = self.experience_of(session)
        theirs.train_epochs, theirs.train_mb_size = session.epochs, session.batch_size
        if self.memory_batch:
            theirs.batch_size_mem = session.batch_size
        theirs.is_training, theirs._stop_training, self.stopped, theirs._eval_streams = True, False, False, []
        self.told = ({} if session.shuffle else {"shuffle": False}) | ({"drop_last": True} if session.drop_last else {})
        theirs.model.train()
        theirs._before_training(**self.told)
        theirs.experience = experience
        make, self.own = theirs.make_train_dataloader, False
        ours = Batches(dataset, session.batch_size, session.drop_last)

        def make_train_dataloader(**options: Any) -> None:
            plain = not any("make_train_dataloader" in vars(cls) for cls in type(theirs).__mro__ if not _is_template(cls))
            if plain and is_whole(theirs.adapted_dataset, dataset):
                theirs.dataloader = ours
            else:
                make(**options)

        theirs.make_train_dataloader = make_train_dataloader
        try:
            with quiet():
                theirs._before_training_exp(**self.told)
        finally:
            del theirs.make_train_dataloader
        self.own, self.loader = theirs.dataloader is ours, theirs.dataloader

    @on(EpochStarted)
    def open_epoch(self, event: EpochStarted) -> None:
        """Begin an epoch of theirs, and draw its batches, where they aren't ours."""
        self.batches = len(event.epoch)
        self.order, self.drawn, self.iterator = [], None, None
        if self.stopped:
            return
        self.theirs._before_training_epoch(**self.told)
        if self.theirs._stop_training:
            self.stopped = True
        elif self.own:
            for _ in range(1 + event.epoch.session.shuffle):  # what their loader would draw: it seeds itself, and its shuffle
                torch.empty((), dtype=torch.int64).random_()
        else:
            self.drawn = loader_source(self.loader)
            if self.drawn is None:
                self.iterator = iter(self.loader)
            else:
                self.order = draw_order(self.loader)

    def learn(self, batch: Batch) -> Tensor:
        """Have them learn the batch, or its share of their own batches, and return the mean of the losses."""
        losses = []
        for minibatch in () if self.stopped else self.minibatches(batch):
            if self.augment is not None:
                minibatch[0] = self.augment(minibatch[0])
            self.theirs.dataloader = [minibatch]
            with same_flops(("step", len(minibatch[0]))):
                self.theirs.training_epoch(**self.told)
            losses.append(self.theirs.loss.detach().mean())
        self.theirs.dataloader = self.loader
        for name, value in vars(self.theirs).items():  # the graph of the step is of no more use
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(self.theirs, name, value.detach())
        if losses:
            self.last = torch.stack(losses).mean()
        return self.last.to(batch.samples.y.device)

    def minibatches(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Yield the batches that are learned in place of one of ours, as they have them: inputs, labels, ..., task labels."""
        if self.own:
            yield [batch.samples.x, batch.samples.y, self.labels_of(batch.samples)]
        elif self.iterator is not None:
            share = getattr(self.loader, "__len__", lambda: self.batches)()
            for _ in range(share * batch.index // self.batches, share * (batch.index + 1) // self.batches):
                if (minibatch := next(self.iterator, None)) is not None:
                    yield list(minibatch)
        else:
            if self.drawn is None:  # the run was resumed within the epoch
                self.drawn = loader_source(self.loader)
            assert self.drawn is not None
            source, collate = self.drawn
            first, end = (len(self.order) * (batch.index + more) // self.batches for more in (0, 1))
            for rows in self.order[first:end]:
                yield list(collate([source[row] for row in rows]))

    @on(EpochEnded)
    def close_epoch(self, event: EpochEnded) -> None:
        """End their epoch."""
        self.iterator = None
        if not self.stopped:
            self.theirs._after_training_epoch(**self.told)

    @on(SessionEnded)
    def close_experience(self, event: SessionEnded) -> None:
        """Do as their `train` does after the last epoch."""
        with quiet():
            self.theirs._after_training_exp(**self.told)
            self.theirs._after_training(**self.told)
        self.theirs._train_cleanup()
        self.loader, self.order, self.drawn = None, [], None

    def experience_of(self, session: Session) -> tuple[Any, SessionDataset]:
        """Return a session as an experience of theirs, and what its data set reads."""
        samples = session.samples[:]
        label = self.label_of(session.task_if_shown if self.tells_tasks else None)
        dataset = SessionDataset(session, samples)
        labels = samples.extra["task_label"].tolist() if self.tells_tasks and "task_label" in samples.extra else label
        experience = new_experience(dataset, labels, session.index)
        classes = session.classes
        experience.classes_in_this_experience, experience.previous_classes = classes, sorted(self.seen)
        self.seen |= set(classes)
        experience.classes_seen_so_far, experience.future_classes = sorted(self.seen), []
        experience.task_labels = sorted(set(labels)) if isinstance(labels, list) else [labels]
        if len(experience.task_labels) == 1:
            experience.task_label = experience.task_labels[0]
        for label in experience.task_labels:
            self.by_label[label] = sorted({*self.by_label.get(label, ()), *classes})
        sizes = order = None
        if self.coming is not None:
            sizes, order = [len(labels) for labels in self.coming], [label for labels in self.coming for label in labels]
        experience.benchmark = SimpleNamespace(n_classes_per_exp=sizes, classes_order=order, n_classes=self.classes)
        return experience, dataset

    def label_of(self, task: Task | None) -> int:
        """Return the task label of a task."""
        if task is None or not self.tells_tasks:
            return 0
        told = task.test[:1].extra.get("task_label")
        return task.id if told is None else int(told)

    def labels_of(self, samples: Samples) -> Tensor:
        """Return the task label of each sample of a batch: (n,), int64."""
        if self.tells_tasks and "task_label" in samples.extra:
            return samples.extra["task_label"]
        label = getattr(self.theirs.experience, "task_label", 0)
        return torch.full_like(samples.y, int(label))

    @property
    def scores_ignore_task(self) -> bool:
        """Whether the answer doesn't depend on the task: that of models without heads for tasks."""
        return not is_multi_task(self.model)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes), as their evaluation does; the lowest number for classes that no output is of yet.

        All classes score alike while a classifier by class means (that of their iCaRL and SCR) has no mean to compare with.
        """
        model: Any = self.model
        dynamic = import_avalanche("models").DynamicModule
        if not self.classes and any(isinstance(module, dynamic) for module in model.modules()):
            raise RuntimeError(f"{type(model).__name__} gets its outputs in a run: it can't be asked before")
        if any(getattr(module, "class_means_dict", None) == {} for module in model.modules()):
            return torch.zeros(len(x), self.classes, device=x.device)
        if not is_multi_task(model):
            return self.pad_scores(self.outputs_for(x, torch.zeros(len(x), dtype=torch.int64, device=x.device)))
        label = self.label_of(task)
        asked = list(self.by_label) if task is None and self.tells_tasks else [label] if label in self.by_label else []
        answers = [self.head_scores(x, label) for label in asked]
        return torch.stack(answers).amax(0) if answers else torch.zeros(len(x), self.classes, device=x.device)

    def head_scores(self, x: Tensor, label: int) -> Tensor:
        """Return (n, classes), what the head of a task label says of its classes; the lowest number for all others.

        A head of theirs that is narrower than another one says 0 for the rest, which would often win.
        """
        answers = self.pad_scores(self.outputs_for(x, torch.full((len(x),), label, device=x.device)))
        other = torch.ones(answers.shape[1], dtype=torch.bool, device=x.device)
        other[self.by_label[label]] = False
        return answers.masked_fill(other, torch.finfo(answers.dtype).min)

    def pad_scores(self, outputs: Tensor) -> Tensor:
        """Return outputs with the lowest number for classes that they lack."""
        lacking = self.classes - outputs.shape[1]
        low = torch.finfo(outputs.dtype).min
        return torch.cat([outputs, outputs.new_full((len(outputs), lacking), low)], 1) if lacking > 0 else outputs

    def outputs_for(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return their outputs in their evaluation of inputs with task labels; it leaves no trace."""
        theirs = self.theirs
        names = ("is_training", "experience", "mbatch", "mb_output", "loss", "adapted_dataset", "dataloader")
        before = {name: getattr(theirs, name) for name in names}
        plugins = [plugin for plugin in theirs.plugins if not _counts(plugin)] if theirs.clock.train_iterations else []

        def call_plugins(moment: str) -> None:
            for plugin in plugins:
                getattr(plugin, moment, _nothing)(theirs)

        try:
            theirs.is_training = False
            theirs.experience = self.evaluation_experience(int(labels[0]) if len(labels) else 0)
            for moment in ("before_eval", "before_eval_dataset_adaptation", "after_eval_dataset_adaptation", "before_eval_exp"):
                call_plugins(moment)
            theirs.mbatch = [x, torch.zeros(len(x), dtype=torch.int64, device=x.device), labels]
            call_plugins("before_eval_iteration")
            call_plugins("before_eval_forward")
            theirs.mb_output = theirs.forward()
            for moment in ("after_eval_forward", "after_eval_iteration", "after_eval_exp", "after_eval"):
                call_plugins(moment)
            output: Tensor = theirs.mb_output
            return output
        finally:
            for name, value in before.items():
                setattr(theirs, name, value)

    def evaluation_experience(self, label: int) -> Any:
        """Return an experience to be asked in: it has nothing that wasn't seen, so nothing grows by it."""
        experience = import_avalanche("benchmarks").CLExperience(0, import_avalanche("benchmarks").CLStream("test", []))
        experience.classes_in_this_experience, experience.classes_seen_so_far = sorted(self.seen), sorted(self.seen)
        experience.task_labels, experience.task_label = [label], label
        return experience
