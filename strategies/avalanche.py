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

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset

from clstream.bus import on
from clstream.events import EpochEnded, EpochStarted, RunStarted, SessionEnded, SessionStarted, TaskEnded
from clstream.optional import avalanche
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Samples, Session, Task

FREE = (
    "Naive", "Replay", "ER_ACE", "ER_AML", "DER", "MIR", "MER", "CoPE", "GSS_greedy", "GDumb", "SCR", "StreamingLDA", "Cumulative",
    "ReplayPlugin", "MIRPlugin", "GSS_greedyPlugin", "CoPEPlugin", "GDumbPlugin", "LRSchedulerPlugin", "EvaluationPlugin", "Clock",
    "PeriodicEval",
)  # fmt: skip
"""Strategies and plugins of Avalanche's whose work between experiences is about samples, whatever task they are of."""

BUILT_OF = (
    *(f"avalanche.benchmarks.scenarios.{name}" for name in ("dataset_scenario", "generic_scenario")),
    *(f"avalanche.benchmarks.utils.{name}" for name in ("classification_dataset", "data", "data_attribute", "data_loader",
                                                        "dataset_definitions", "flat_data", "transform_groups")),
    "avalanche.training.utils",
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

    def __init__(self, strategy: Any, plugins: Sequence[Any] = (), boundaries: bool | None = None) -> None:
        check_playable(strategy, plugins)
        theirs = self.theirs = strategy
        evaluation = avalanche("training.plugins").EvaluationPlugin
        theirs.plugins = [*plugins, *(each for each in theirs.plugins if not isinstance(each, evaluation))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has no loggers: it is not asked
            theirs.evaluator = evaluation()
        needy = needs_boundaries(theirs) if boundaries is None else boundaries
        identity = avalanche("benchmarks.utils.transform_groups").identity
        self.functions = (identity, collate, torch.zeros)  # their data sets that come hold these
        self.parts = (AtBoundaries(),) if needy else ()
        self.classes, self.tells_tasks = 0, False  # of the stream
        der = avalanche("training.supervised").DER  # it copies train_mb_size when it is built, if it is given no other
        self.memory_batch = isinstance(strategy, der) and strategy.batch_size_mem == strategy.train_mb_size
        self.sizes: list[int] | None = None  # number of classes of each session, where the stream shows them
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
        found: nn.Module = self.theirs.model
        return found

    @property
    def optimizer(self) -> Optimizer:  # type: ignore[override]
        """Their optimizer."""
        found: Optimizer = self.theirs.optimizer
        return found

    def loss(self, samples: Samples) -> Tensor:
        """Return their criterion on samples of one task, without what plugins add."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        found: Tensor = self.theirs._criterion(self.outputs_for(x, self.labels_of(samples)), samples.y)
        return found

    def carry(self, *regularisers: object) -> None:
        """Refuse regularisers of ours: a step is theirs. Raises TypeError."""
        raise TypeError(
            "a strategy of Avalanche's takes its own steps, so it can't carry regularisers: give it a plugin of Avalanche's"
        )

    @on(RunStarted)
    def meet(self, event: RunStarted) -> None:
        """Learn how many classes there are, and where the run takes place."""
        stream: Any = event.stream
        self.theirs.device = torch.device(stream.device or "cpu")
        self.classes, self.tells_tasks, self.seen, self.by_label = stream.classes, stream.scenario == "task", set(), {}
        self.sizes = [len(stream.labels(number).unique()) for number in range(len(stream))] if stream.boundaries else None

    @on(SessionStarted)
    def open_experience(self, event: SessionStarted) -> None:
        """Do as their `train` does before the first epoch."""
        theirs, session = self.theirs, event.session
        experience, delivery = self.experience_of(session)
        theirs.train_epochs, theirs.train_mb_size = session.epochs, session.batch_size
        if self.memory_batch:
            theirs.batch_size_mem = session.batch_size
        theirs.is_training, theirs._stop_training, self.stopped, theirs._eval_streams = True, False, False, []
        self.told = ({} if session.shuffle else {"shuffle": False}) | ({"drop_last": True} if session.drop_last else {})
        theirs.model.train()
        theirs._before_training(**self.told)
        theirs.experience = experience
        make, self.own = theirs.make_train_dataloader, False
        ours = Batches(delivery, session.batch_size, session.drop_last)

        def make_train_dataloader(**options: Any) -> None:
            plain = not any("make_train_dataloader" in vars(cls) for cls in type(theirs).__mro__ if not _is_template(cls))
            if plain and is_whole(theirs.adapted_dataset, delivery):
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
            self.drawn = source_of(self.loader)
            if self.drawn is None:
                self.iterator = iter(self.loader)
            else:
                self.order = order_of(self.loader)

    def learn(self, batch: Batch) -> Tensor:
        """Have them learn the batch, or its share of their own batches, and return the mean of the losses."""
        losses = []
        for each in () if self.stopped else self.steps(batch):
            if self.augment is not None:
                each[0] = self.augment(each[0])
            self.theirs.dataloader = [each]
            self.theirs.training_epoch(**self.told)
            losses.append(self.theirs.loss.detach().mean())
        self.theirs.dataloader = self.loader
        for name, value in vars(self.theirs).items():  # the graph of the step is of no more use
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(self.theirs, name, value.detach())
        if losses:
            self.last = torch.stack(losses).mean()
        return self.last.to(batch.samples.y.device)

    def steps(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Yield the batches that are learned in place of one of ours, as they have them: inputs, labels, ..., task labels."""
        if self.own:
            yield [batch.samples.x, batch.samples.y, self.labels_of(batch.samples)]
        elif self.iterator is not None:
            share = getattr(self.loader, "__len__", lambda: self.batches)()
            for _ in range(share * batch.index // self.batches, share * (batch.index + 1) // self.batches):
                if (found := next(self.iterator, None)) is not None:
                    yield list(found)
        else:
            if self.drawn is None:  # the run was resumed within the epoch
                self.drawn = source_of(self.loader)
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

    def experience_of(self, session: Session) -> tuple[Any, Delivery]:
        """Return a session as an experience of theirs, and what its data set reads."""
        samples = session.samples[:]
        label = self.label_of(getattr(session, "task", None) if self.tells_tasks else None)
        delivery = Delivery(session, samples)
        labels = samples.extra["task_label"].tolist() if self.tells_tasks and "task_label" in samples.extra else label
        experience = new_experience(delivery, labels, session.index)
        classes = session.classes
        experience.classes_in_this_experience, experience.previous_classes = classes, sorted(self.seen)
        self.seen |= set(classes)
        experience.classes_seen_so_far, experience.future_classes = sorted(self.seen), []
        experience.task_labels = sorted(set(labels)) if isinstance(labels, list) else [labels]
        if len(experience.task_labels) == 1:
            experience.task_label = experience.task_labels[0]
        for each in experience.task_labels:
            self.by_label[each] = sorted({*self.by_label.get(each, ()), *classes})
        experience.benchmark = SimpleNamespace(n_classes_per_exp=self.sizes, n_classes=self.classes)
        return experience, delivery

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
    def answers_once(self) -> bool:
        """Whether the answer doesn't depend on the task: that of models without heads for tasks."""
        return not is_multi_task(self.model)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes), as their evaluation does; the lowest number for classes that no output is of yet."""
        model: Any = self.model
        dynamic = avalanche("models").DynamicModule
        if not self.classes and any(isinstance(module, dynamic) for module in model.modules()):
            raise RuntimeError(f"{type(model).__name__} gets its outputs in a run: it can't be asked before")
        if not is_multi_task(model):
            return self.padded(self.outputs_for(x, torch.zeros(len(x), dtype=torch.int64, device=x.device)))
        label = self.label_of(task)
        asked = list(self.by_label) if task is None and self.tells_tasks else [label] if label in self.by_label else []
        answers = [self.head(x, each) for each in asked]
        return torch.stack(answers).amax(0) if answers else torch.zeros(len(x), self.classes, device=x.device)

    def head(self, x: Tensor, label: int) -> Tensor:
        """Return (n, classes), what the head of a task label says of its classes; the lowest number for all others.

        A head of theirs that is narrower than another one says 0 for the rest, which would often win.
        """
        answers = self.padded(self.outputs_for(x, torch.full((len(x),), label, device=x.device)))
        other = torch.ones(answers.shape[1], dtype=torch.bool, device=x.device)
        other[self.by_label[label]] = False
        return answers.masked_fill(other, torch.finfo(answers.dtype).min)

    def padded(self, outputs: Tensor) -> Tensor:
        """Return outputs with the lowest number for classes that they lack."""
        lacking = self.classes - outputs.shape[1]
        low = torch.finfo(outputs.dtype).min
        return torch.cat([outputs, outputs.new_full((len(outputs), lacking), low)], 1) if lacking > 0 else outputs

    def outputs_for(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return their outputs in their evaluation of inputs with task labels; it leaves no trace."""
        theirs = self.theirs
        names = ("is_training", "experience", "mbatch", "mb_output", "loss", "adapted_dataset", "dataloader")
        before = {name: getattr(theirs, name) for name in names}
        plugins = [each for each in theirs.plugins if not _counts(each)] if theirs.clock.train_iterations else []

        def tell(moment: str) -> None:
            for each in plugins:
                getattr(each, moment, _nothing)(theirs)

        try:
            theirs.is_training = False
            theirs.experience = self.question(int(labels[0]) if len(labels) else 0)
            for moment in ("before_eval", "before_eval_dataset_adaptation", "after_eval_dataset_adaptation", "before_eval_exp"):
                tell(moment)
            theirs.mbatch = [x, torch.zeros(len(x), dtype=torch.int64, device=x.device), labels]
            tell("before_eval_iteration")
            tell("before_eval_forward")
            theirs.mb_output = theirs.forward()
            for moment in ("after_eval_forward", "after_eval_iteration", "after_eval_exp", "after_eval"):
                tell(moment)
            found: Tensor = theirs.mb_output
            return found
        finally:
            for name, value in before.items():
                setattr(theirs, name, value)

    def question(self, label: int) -> Any:
        """Return an experience to be asked in: it has nothing that wasn't seen, so nothing grows by it."""
        experience = avalanche("benchmarks").CLExperience(0, avalanche("benchmarks").CLStream("test", []))
        experience.classes_in_this_experience, experience.classes_seen_so_far = sorted(self.seen), sorted(self.seen)
        experience.task_labels, experience.task_label = [label], label
        return experience


class AtBoundaries:
    """A part of a strategy that consolidates when tasks end, and so needs to be told."""

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Their own callbacks do, whenever a session ends."""


class Delivery(Dataset[Any]):
    """The samples of a session, one at a time, as Avalanche's data sets read them."""

    not_state = ("samples",)

    def __init__(self, session: Session, samples: Samples) -> None:
        self.session, self.samples = session, samples
        self.targets: list[int] = samples.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if "samples" not in vars(self):  # the run was resumed
            self.samples = self.session.samples[:]
        return self.samples.x[index], self.targets[index]


def new_experience(delivery: Delivery, labels: int | list[int], number: int) -> Any:
    """Return an experience of theirs with a data set of some samples, which have these task labels."""
    dataset = avalanche("benchmarks.utils")._make_taskaware_classification_dataset(delivery, task_labels=labels, collate_fn=collate)
    benchmarks = avalanche("benchmarks")
    experience = benchmarks.DatasetExperience(dataset=dataset, current_experience=number)
    experience.origin_stream = benchmarks.CLStream("train", [])
    return experience


def collate(samples: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Return samples of theirs as a batch: inputs, labels, ..., task labels."""
    return [torch.stack(list(each)) if isinstance(each[0], Tensor) else torch.tensor(each) for each in zip(*samples, strict=True)]


class Batches:
    """Stands for a loader of our batches."""

    def __init__(self, delivery: Delivery, batch_size: int, drop_last: bool) -> None:
        self.delivery, self.batch_size, self.drop_last = delivery, batch_size, drop_last

    def __len__(self) -> int:
        return (len(self.delivery) if self.drop_last else len(self.delivery) + self.batch_size - 1) // self.batch_size


@contextmanager
def quiet() -> Iterator[None]:
    """Let warnings through, but for those of Avalanche that it calls what it itself deprecates."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for each in caught:
        if not issubclass(each.category, DeprecationWarning) or "/avalanche/" not in each.filename.replace("\\", "/"):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def check_playable(strategy: Any, plugins: Sequence[Any]) -> None:
    """Refuse what is no supervised strategy of Avalanche's, or one whose loop can't be played batch by batch."""
    template = avalanche("training.templates").SupervisedTemplate
    if isinstance(strategy, type) or not isinstance(strategy, template):
        what = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {type(strategy).__name__}"
        raise TypeError(f"AvalancheStrategy takes an object of a supervised strategy of Avalanche, such as Naive(...), not {what}")
    name = type(strategy).__name__
    callbacks = avalanche("core").BasePlugin
    if not isinstance(plugins, (list, tuple)):
        raise TypeError(f"plugins must be a list of Avalanche's plugins, not a {type(plugins).__name__}")
    for each in plugins:
        if not isinstance(each, callbacks):
            raise TypeError(f"plugins must be plugins of Avalanche, not {each!r}")
    for loop in ("train", "_train_exp"):
        if any(loop in vars(cls) for cls in type(strategy).__mro__ if not _is_template(cls)):
            instead = ": Cumulative, or clstream's Joint, can be" if name == "JointTraining" else ""
            raise ValueError(f"{name} has a {loop} of its own, so it can't be played batch by batch{instead}")
    if name == "AR1":
        raise ValueError("AR1 counts the batches of its own loop, so it can't be played batch by batch")
    if strategy.eval_every >= 0:
        raise ValueError(
            f"{name} is to evaluate by itself (eval_every={strategy.eval_every}): leave that out, run(...) evaluates it"
        )
    stopping = avalanche("training.plugins").EarlyStoppingPlugin
    for each in (*plugins, *strategy.plugins):
        if isinstance(each, stopping) or getattr(each, "metric", None) == "val_loss":
            raise ValueError(
                f"{type(each).__name__} looks at what Avalanche's evaluation measured, which there is none of: leave it out"
            )


def _is_template(cls: type) -> bool:
    """Return whether a class is one of Avalanche's templates, which all strategies share."""
    return cls.__module__.startswith("avalanche.training.templates")


def _counts(plugin: object) -> bool:
    return type(plugin).__name__ in ("Clock", "PeriodicEval", "EvaluationPlugin")


def _nothing(strategy: object) -> None:
    """Stand for a callback that a plugin hasn't."""


def needs_boundaries(strategy: Any) -> bool:
    """Return whether one of a strategy's plugins, or itself, does something between experiences that is not about samples alone."""
    return any(_works_between(each, "") for each in strategy.plugins) or _works_between(strategy, "_")


def _works_between(worker: Any, prefix: str) -> bool:
    """Return whether a plugin or strategy handles the begin or the end of experiences, and is none of `FREE`."""
    names = [f"{prefix}{moment}" for moment in ("before_training_exp", "after_training_exp")]
    shared = ("avalanche.core", "avalanche.training.templates")  # what all have
    kinds = [cls for cls in type(worker).__mro__ if not cls.__module__.startswith(shared)]
    handling = [cls for cls in kinds if any(name in vars(cls) for name in names)]
    theirs = next((cls.__name__ for cls in kinds if cls.__module__.startswith("avalanche.")), "")
    return any(theirs not in FREE or not cls.__module__.startswith("avalanche.") for cls in handling)


def is_multi_task(model: nn.Module) -> bool:
    """Return whether a model of theirs takes task labels."""
    found: bool = avalanche("models.utils").is_multi_task_module(model)
    return found


def is_whole(dataset: Any, delivery: Delivery) -> bool:
    """Return whether an Avalanche data set is all of a session, in its order."""
    inside = dataset._flat_data
    while hasattr(inside, "_datasets"):
        if inside._indices is not None or len(inside._datasets) != 1:
            return False
        inside = inside._datasets[0]
    return inside is delivery


def source_of(loader: Any) -> tuple[Any, Callable[..., Any]] | None:
    """Return what a loader draws rows from, and how they become a batch; None for one that says neither."""
    found = _torch_loader(loader)
    return None if found is None or found.batch_sampler is None else (found.dataset, found.collate_fn)


def order_of(loader: Any) -> list[list[int]]:
    """Return the rows of each batch of one pass, drawn as the loader itself would draw them."""
    found = _torch_loader(loader)
    assert found is not None
    assert found.batch_sampler is not None
    torch.empty((), dtype=torch.int64).random_(generator=found.generator)  # torch's loaders draw a seed for workers first
    return [list(rows) for rows in found.batch_sampler]


def _torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the loader of torch's that does the work."""
    if isinstance(loader, DataLoader):
        return loader if loader.num_workers == 0 else None
    multiple = avalanche("benchmarks.utils.data_loader").MultiDatasetDataLoader
    if isinstance(loader, multiple) and not loader.never_ending:
        found: DataLoader[Any] = loader._get_loader()
        return found if found.num_workers == 0 else None
    return None


UNFIT = (
    "AR1", "JointTraining", "AETraining", "VAETraining", "BiC", "FeatureReplay", "LFL", "LearningToPrompt", "PNNStrategy",
)  # fmt: skip
"""Those whose loops can't be played batch by batch, that don't classify, or that need a model or data of a kind of their own."""


@cache
def known() -> list[str]:
    """Return the names of Avalanche's supervised strategies that can be had by a model, an optimizer and plain options."""
    supervised, template = avalanche("training.supervised"), avalanche("training.templates").SupervisedTemplate
    found = {
        name: cls for name, cls in vars(supervised).items()
        if isinstance(cls, type) and issubclass(cls, template) and not _is_template(cls) and name not in UNFIT
    }  # fmt: skip
    return sorted(name for name, cls in found.items() if all(_can_be_given(each) for each in _options_of(cls)))


OURS = ("self", "model", "optimizer", "criterion", "device", "plugins", "evaluator", "eval_every", "peval_mode", "train_mb_size",
        "train_epochs")  # fmt: skip
"""Parameters of theirs that come from us, or from the stream."""


def _options_of(cls: Any) -> list[inspect.Parameter]:
    """Return the parameters of a strategy of theirs that a command line asks for."""
    construct = cls.__init__
    hints = get_type_hints(inspect.unwrap(construct))
    found = []
    for each in inspect.signature(construct).parameters.values():
        if each.name in OURS or each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
            continue
        type_ = hints.get(each.name, Any if each.default in (None, each.empty) else type(each.default))
        if each.default is None and type(None) not in get_args(type_):
            type_ = type_ | None
        if type_ is int and isinstance(each.default, float):  # as SCR's temperature
            type_ = float
        found.append(each.replace(kind=each.KEYWORD_ONLY, annotation=type_))
    return found


def _can_be_given(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter can be left out, or given on a command line."""
    types = get_args(parameter.annotation) or (parameter.annotation,)
    plain = (int, float, bool, str)
    return parameter.default is not parameter.empty or any(each in plain for each in types)


def __getattr__(name: str) -> Any:
    """Return the class for one of Avalanche's strategies by name."""
    if not name[:1].isupper():  # whoever looks this module over is not to have Avalanche imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return named(name.removeprefix("Avalanche"))  # as the class itself is called, which is not to be taken for one of ours


@cache
def named(name: str) -> type[AvalancheStrategy]:
    """Return a class that builds one of Avalanche's strategies out of a model, an optimizer and its own plain options.

    Raises AttributeError for a name that isn't among `known()`.
    """
    if name not in known():
        raise AttributeError(f"Avalanche has no strategy {name!r} that can be had by name")
    theirs = getattr(avalanche("training.supervised"), name)
    options = [each for each in _options_of(theirs) if _can_be_given(each)]
    default: OptimizerFactory = partial(SGD, lr=0.1)

    def __init__(self: AvalancheStrategy, model: nn.Module, optimizer: OptimizerFactory = default, **given: Any) -> None:  # noqa: N807
        built = {"criterion": nn.CrossEntropyLoss()} if "criterion" in inspect.signature(theirs.__init__).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own arguments
            try:
                strategy = theirs(model=model, optimizer=optimizer(model.parameters()), **built, **given)
            except Exception as error:  # noqa: BLE001  # they check by assertions, or not at all
                raise ValueError(f"Avalanche's {name} can't be built so: {type(error).__name__}: {error}") from None
        AvalancheStrategy.__init__(self, strategy)

    first = list(inspect.signature(__init__).parameters.values())[:3]
    hints = get_type_hints(Strategy.__init__)
    first[1] = first[1].replace(annotation=nn.Module)
    first[2] = first[2].replace(annotation=hints["optimizer"])
    __init__.__signature__ = inspect.Signature([*first, *options])  # type: ignore[attr-defined]
    __init__.__annotations__ = {each.name: each.annotation for each in [*first[1:], *options]}
    doc = f"Avalanche's {name}.\n\nOptions: its own, and `optimizer`, which makes the optimizer from the model's parameters."
    own = f"Avalanche{name}"
    return type(own, (AvalancheStrategy,), {"__init__": __init__, "__module__": __name__, "__qualname__": own, "__doc__": doc})
