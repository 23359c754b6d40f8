"""The base of every strategy: what to minimise, how to step, what to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from clstream.attributes import find_all
from clstream.bus import Emitter, on
from clstream.eval_mode import answers, learns, wrap_methods
from clstream.events import BatchLearned, RunContinued, RunStarted, SessionStarted
from clstream.losses import mean_loss, sample_losses
from clstream.models.heads import grow_heads
from clstream.params import HasParams, check_choice
from clstream.strategy.answers import allowed, heads_of_positives, mask_logits, predictions_of, session_outputs, softmax_novelty
from clstream.strategy.merging import Merging
from clstream.strategy.saving import save
from clstream.stream import Batch, Samples, Subset, Task

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

ACTIVE_CLASSES = ("all", "seen", "task")

CONTROLS = ("schedule", "clip", "accumulate", "patience", "class_weights", "renew_optimizer")
"""The training controls: see `clstream.training`."""


class Updates(Protocol):
    """What takes the optimizer's steps in place of `Strategy.minimise`: see `clstream.training.updates`."""

    def step(self, optimizer: Optimizer, loss: Tensor) -> None:
        """Add the gradients of a loss, and take the optimizer's step if it is due."""

    def add(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients that were computed already."""

    def update(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step on the gradients that are there, if it is due."""


class Strategy(Merging, Emitter, HasParams):
    """Plain fine-tuning; override `loss`, `learn`, `scores` or `predict`, and subscribe with `on`.

    A step has two halves. `draw` reads memories, and all that is random about them happens there. `loss` asks `drawn_for` for it;
    but for that it reads no memory: it is a function of the samples, of what was drawn, and of the strategy's tensors, and changes
    nothing but attributes of the strategy. So `objective_with` can be compiled, or computed for several seeds at once.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, or to values.
        optimizer: makes the optimizer from the model's parameters.
        active_classes: whose outputs compete, in the loss of a sample and in an answer. "all": all outputs of the head, from the
            start. "seen": those of classes that came so far. "task": in the loss those of the sample's own task, as far as they
            came, in an answer those that came so far; it needs boundaries. On a task-incremental stream only the outputs of the
            sample's own task compete, whatever this is. A sample with several labels has the outputs of all tasks that these came
            in; one without any has those of the task that goes on. Values don't compete: it must be "all" for them.

    Raises:
        ValueError: for other `active_classes`, or a model without parameters.
        TypeError: for a model that is no module, or an optimizer that was already made.

    """

    not_state: tuple[str, ...] = ("drawn_before", "train_updates", "train_class_weights", "train_weighed", "about")
    """Attributes that are no state: what they hold is not seeded, moved, or kept. Subclasses add their own."""

    not_saved: tuple[str, ...] = ()
    """Attributes in `not_state` that `save` leaves out, since the rest makes them again; each has a default on the class."""

    drawn_before: tuple[Samples, ...] | None = None
    """What was drawn for the step that goes on; None but within `objective_with`."""

    about: Callable[[], dict[str, Any]] | None = None
    """What tells, for the card of a saved strategy, of the run that taught it; None before a run, and of a copy."""

    checkpoint_modules: tuple[str, ...] = ()
    """Modules beside its own whose classes a checkpoint may name: those of objects that come while the run goes on."""

    parts: tuple[object, ...] = ()
    """Objects whose handlers are subscribed with this strategy's, after its own: a wrapped strategy, a detector."""

    regularisers: tuple[Regulariser, ...] = ()
    """What `add_regularisers` was given: their penalties are part of what a step minimises."""

    needs_task: bool = False
    """Whether it reads the `task` of batches or sessions; then it is refused on a stream that hides its boundaries."""

    needs_images: bool = False
    """Whether its inputs must be images (channels, height, width); a stream of others is refused."""

    takes_regularisers: bool = True
    """Whether its steps minimise `self.objective(samples)`, so that penalties can be added: see `add_regularisers`."""

    takes_controls: tuple[str, ...] = CONTROLS
    """The training controls that it takes. A class with a `learn` of its own takes none, and one that answers by `scores` or
    `predict` of its own no "patience", unless it says so here."""

    train_updates: Updates | None = None
    """What takes the optimizer's steps, in a run that clips or accumulates gradients."""

    train_class_weights: Tensor | None = None
    """(labels,), what a sample of each class weighs in the loss, in a run with class weights."""

    train_weighed: bool = False
    """Whether a loss has read `train_class_weights` since the session began."""

    rehearsal_free: bool = False
    """Whether it says that nothing of a session's inputs is in it when the session is over; then the contract checks it."""

    learns_targets: tuple[str, ...] = ("label",)
    """The kinds of targets that it learns, of "label", "multilabel" and "value"; a stream of another kind is refused."""

    mixes_targets: bool = False
    """Whether it learns streams whose tasks have targets of several kinds; a batch has one."""

    takes_new_classes: bool = True
    """Whether its networks get outputs for new classes where a run of it is continued; if not, they are as they were built."""

    scores_are: str = "logits"
    """What `scores` returns: "logits", "probabilities", or "ranks", which say which class is likelier and no more.

    Logits are what a softmax, with multi-label targets a sigmoid, turns into probabilities.
    """

    bce_mean: str = "all"
    """What the binary cross-entropies of multi-label targets are averaged over, "all" or "competing": see `clstream.losses`."""

    target: str = "label"
    """The kind of targets that is learned and asked for: the stream's from RunStarted on, and that of each session."""

    target_columns: int = 0
    """How many classes or outputs the stream's targets have; 0 before a run."""

    exempt: Mapping[str, str] = MappingProxyType({})
    """Checks of the contract (`clstream.checks`) that this strategy can't meet, by name, each with the reason."""

    augment: Callable[[Tensor], Tensor] | None = None
    """The stream's augmentation of raw inputs, from RunStarted on."""

    active_classes: str = "all"
    """Whose outputs compete: see the constructor."""

    fixed_classes: str = ""
    """What competes where a method itself fixes that; if in all of it, there is no option `active_classes`. For the docs."""

    seen_classes: Tensor | None = None
    """Labels that came so far, sorted; None unless they are tracked: see `track_classes`."""

    task_number: int = -1
    """The number of the task that goes on; -1 before the first one, and where the stream hides tasks."""

    task_classes: Tensor | None = None
    """Labels that came in the task that goes on, sorted; None unless they are tracked."""

    heads: Tensor | None = None
    """Which outputs compete, for a sample of each label (or task, see `heads_by_task`): (labels or tasks, outputs), bool.

    There are such on a task-incremental stream, and with `active_classes="task"`.
    """

    task_given: bool = False
    """Whether the stream is task-incremental."""

    heads_by_task: bool = False
    """Whether `heads` has a row for each task, not for each label: see `Stream.marks_tasks`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the class's own methods that answer and learn, as `clstream.eval_mode` says."""
        super().__init_subclass__(**kwargs)
        wrap_methods(cls)

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory = partial(SGD, lr=0.1), active_classes: str = "all") -> None:
        check_choice(ACTIVE_CLASSES, active_classes=active_classes)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__} takes a torch module as its model, not {model!r}")
        if not callable(optimizer):
            raise TypeError(
                "optimizer is called with the model's parameters: pass partial(SGD, lr=0.1), say, "
                f"not a {type(optimizer).__name__} object"
            )
        self.model = model
        try:
            self.optimizer = optimizer(model.parameters())
        except ValueError as error:
            if next(model.parameters(), None) is not None:
                raise
            raise ValueError(
                f"{type(model).__name__} has no parameters, so there is nothing that {type(self).__name__} could learn"
            ) from error
        self.active_classes = active_classes

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies, beside the run's bus, what tells of the run: it holds the stream."""
        return {name: value for name, value in super().__getstate__().items() if name != "about"}

    def save(self, folder: str | Path) -> Path:
        """Save this strategy in a folder, with all that it needs to answer and to go on; `clstream.load` returns one like it.

        The folder has two files. `state-HASH.pt` is data that `torch.load(weights_only=True)` reads: model, optimizer, memories,
        generators, as a checkpoint has them, and of a stream what the strategy keeps of it. `card.json` says what it is: format,
        versions of clstream, torch and python, strategy, model, scores_are, the file of the state, its bytes, the classes that
        `clstream.load` must be given (code), and of its last run, as far as that came, the stream, the data's fingerprint, tasks,
        classes and their names, params, metrics and cost. A strategy that is there is replaced, once the new one is written.

        Args:
            folder: a new one, an empty one, or that of a saved strategy.

        Returns the folder, absolute.

        Raises:
            CaptureError: a TypeError, for an attribute that can't be saved; it names it. Nothing is written then.
            OSError: if the folder can't be written, or holds something else.

        """
        return save(self, folder)

    def outputs(self, samples: Samples) -> Tensor:
        """Return the model's (n, outputs) outputs for samples to learn, augmented."""
        outputs: Tensor = self.model(samples.x if self.augment is None else self.augment(samples.x))
        return outputs

    def mask_other_heads(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n, classes) outputs, with those that don't compete masked with -inf; of values, all as they are.

        Args:
            outputs: (n, classes), of samples to learn.
            y: their targets: (n,) labels, or what else `Samples` has.
            task: (n,) or (), the numbers of their tasks; needed where samples have them as `extra["task"]`: on a task-incremental
                stream whose tasks share classes, or have multi-label targets.

        Raises:
            ValueError: if they are needed, and not there.

        """
        if self.heads is None:
            return outputs if self.active_classes == "all" else mask_logits(outputs, self.seen_classes)
        if self.target == "value":
            return outputs
        if self.heads.shape[1] < outputs.shape[1]:  # outputs that no class has never compete
            self.heads = F.pad(self.heads, (0, outputs.shape[1] - self.heads.shape[1]))
        if self.heads_by_task:
            if task is None:
                raise ValueError(
                    "on this stream the targets of a sample don't tell its task (tasks share classes, or samples have several), so "
                    f"{type(self).__name__}.mask_other_heads needs the task of each sample: pass "
                    'samples.extra["task"], which batches and memories have'
                )
            y = task
        elif self.target == "multilabel":
            return outputs.masked_fill(~heads_of_positives(y, self.heads, self.task_classes), float("-inf"))
        return outputs.masked_fill(~self.heads[y], float("-inf"))

    def logits(self, samples: Samples) -> Tensor:
        """Return the (n, classes) outputs for samples to learn, augmented, those that don't compete masked with -inf."""
        return self.mask_other_heads(self.outputs(samples), samples.y, samples.extra.get("task"))

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return the past samples that a step on these learns beside them: one for each draw, none without a memory. Here none."""
        return ()

    def drawn_for(self, samples: Samples) -> tuple[Samples, ...]:
        """Return what `objective_with` was given, else what `draw` returns now."""
        return self.draw(samples) if self.drawn_before is None else self.drawn_before

    @learns
    def loss(self, samples: Samples) -> Tensor:
        """Return what one step minimises: a scalar that can be differentiated.

        Here: the mean loss of the targets' kind: cross-entropy, binary cross-entropy, or squared error: see `clstream.losses`.
        """
        return self.loss_of_logits(self.logits(samples), samples)

    def sample_losses(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n,), the loss of each sample from its (n, outputs) outputs: the negative log likelihood, as a Fisher needs it.

        It is that of the targets' kind, which is `self.target`; `task` is as for `mask_other_heads`.
        """
        return sample_losses(self.mask_other_heads(outputs, y, task), y, self.target, self.bce_mean)

    def loss_of_outputs(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the mean loss of (n, outputs) outputs for samples, over those that compete: a scalar."""
        return self.loss_of_logits(self.mask_other_heads(outputs, samples.y, samples.extra.get("task")), samples)

    def loss_of_logits(self, logits: Tensor, samples: Samples) -> Tensor:
        """Return the mean loss of (n, outputs) masked outputs for samples, weighed if classes have weights: a scalar."""
        if self.train_class_weights is None:
            return mean_loss(logits, samples.y, samples.target, self.bce_mean)
        self.train_weighed = True
        weights = self.train_class_weights[samples.y]
        return (weights * F.cross_entropy(logits, samples.y, reduction="none")).sum() / weights.sum()

    def add_regularisers(self, *regularisers: Regulariser) -> None:
        """Add regularisers: they hear the run as parts do, and each step minimises their penalties too.

        A `learn` of the strategy's own must minimise `self.objective(samples)`; if not, the run ends after its first batch.
        Raises TypeError, ValueError if they don't fit this strategy.
        """
        if not self.takes_regularisers:
            raise TypeError(f"{type(self).__name__} takes steps of its own, so it takes no regularisers")
        for regulariser in regularisers:
            regulariser.attach(self)
        self.regularisers = (*self.regularisers, *regularisers)
        self.parts = (*self.parts, *regularisers)

    @learns
    def objective(self, samples: Samples) -> Tensor:
        """Return the loss, and the penalties of the regularisers: what one step minimises."""
        loss = self.loss(samples)
        for regulariser in self.regularisers:
            loss = loss + regulariser.penalty(samples)
            regulariser.penalised = True
        return loss

    @learns
    def objective_with(self, samples: Samples, drawn: tuple[Samples, ...]) -> Tensor:
        """Return `objective(samples)` with what was drawn for it before, so that nothing is drawn now."""
        self.drawn_before = drawn
        try:
            return self.objective(samples)
        finally:
            self.drawn_before = None

    @learns
    def learn(self, batch: Batch) -> Tensor:
        """Take one step on a batch of the stream, and return its loss: a detached scalar."""
        loss = self.objective(batch.samples)
        self.minimise(loss)
        return loss.detach()

    def minimise(self, loss: Tensor) -> None:
        """Take the optimizer's step on a loss; in a run that clips or accumulates gradients, as that says.

        A `learn` of the strategy's own that calls it for its one step on a batch can say that it takes "clip" and "accumulate".
        """
        if self.train_updates is None:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        else:
            self.train_updates.step(self.optimizer, loss)

    @answers
    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, outputs), for classes higher is likelier, or the values; `task` is given only where the question names it."""
        outputs: Tensor = self.model(x)
        return self.mask_answer(outputs)

    def mask_answer(self, outputs: Tensor) -> Tensor:
        """Return (n, outputs) outputs for a question, with those that don't compete in an answer masked with -inf."""
        if self.target == "multilabel" and outputs.shape[1] > self.target_columns:  # outputs that no class has
            outputs = mask_logits(outputs, torch.arange(self.target_columns, device=outputs.device))
        if self.active_classes == "all" or self.task_given:
            return outputs
        return mask_logits(outputs, self.seen_classes)

    @answers
    @torch.no_grad()
    def predict(self, x: Tensor, task: Task | None = None, threshold: float = 0.5) -> Tensor:
        """Return the predictions, by the kind of targets, the task's if it is given; then only its classes compete.

        label       (n,), int64
        multilabel  (n, outputs), float32: 1 for classes whose probability is above the threshold, 0 for others
        value       (n, outputs): the scores
        """
        scores, target = self.scores(x, task), self.target if task is None else task.target
        if task is not None and target != "value":
            scores = scores.masked_fill(~allowed(task, scores), float("-inf"))
        return predictions_of(scores, target, self.scores_are, threshold)

    @answers
    @torch.no_grad()
    def predict_online(self, x: Tensor) -> Tensor:
        """Return the predictions for the next inputs of the stream, before they are learned: `predict`, unless overridden."""
        return self.predict(x)

    @answers
    @torch.no_grad()
    def novelty(self, x: Tensor) -> Tensor:
        """Return (n,), how strange inputs are, higher is stranger: `novelty_of` their scores, unless overridden.

        Raises TypeError where there is none.
        """
        return self.novelty_of(self.scores(x))

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,), how strange the inputs of some scores are, higher is stranger.

        Here: 1 minus the greatest probability of a class. Raises TypeError for scores that give none: ranks, and values.
        """
        try:
            return softmax_novelty(scores, self.scores_are, self.target)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__} can't tell how strange inputs are: {error}") from None

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given, so that one forward pass serves both."""
        return type(self).scores is Strategy.scores and self.predicts_from_scores

    @property
    def predicts_from_scores(self) -> bool:
        """Whether `predict` reads its answer from `scores`, as it does unless overridden."""
        return type(self).predict is Strategy.predict

    @property
    def novelty_is_of_scores(self) -> bool:
        """Whether `novelty` is `novelty_of` the scores, so that one forward pass serves both."""
        return type(self).novelty is Strategy.novelty

    def tells_novelty(self, targets: Sequence[str]) -> bool:
        """Return whether `novelty` has an answer where the targets are of these kinds."""
        if type(self).novelty is not Strategy.novelty or type(self).novelty_of is not Strategy.novelty_of:
            return True
        return self.scores_are != "ranks" and "value" not in targets

    def kept_samples(self) -> Iterable[Samples | Subset]:
        """Return samples of the stream that it learns again, though it only refers to them: they count as memory. Here none."""
        return ()

    @on(RunStarted)
    def read_stream(self, event: RunStarted) -> None:
        """Take the stream's augmentation, its targets and, if it is task-incremental, which classes each task has."""
        stream, device = event.stream, event.stream.device or "cpu"
        self.augment = stream.augment
        self.target, self.target_columns = stream.target, stream.outputs
        self.task_given = stream.scenario == "task"
        self.heads_by_task = self.task_given and stream.marks_tasks
        self.heads = None
        if self.task_given:
            self.heads = (stream.task_heads if self.heads_by_task else stream.heads).to(device)
        elif self.active_classes == "task":
            self.heads = torch.zeros(stream.classes, stream.classes, dtype=torch.bool, device=device)
        if self.active_classes != "all":
            self.track_classes(device)

    @on(RunContinued)
    def read_more(self, event: RunContinued) -> None:
        """Take what `read_stream` takes of the stream that the run goes on with. What is tracked of classes that came stays.

        An attribute `classes`, the number of classes of the stream, follows it.
        """
        stream, device = event.stream, event.stream.device or "cpu"
        self.augment, self.target_columns = stream.augment, stream.outputs
        if self.task_given:
            self.heads = (stream.task_heads if self.heads_by_task else stream.heads).to(device)
        elif self.heads is not None:
            more = stream.classes - len(self.heads)
            self.heads = F.pad(self.heads, (0, stream.classes - self.heads.shape[1], 0, more))
        held = vars(self).get("classes")
        if isinstance(held, int) and 0 < held < stream.classes:
            vars(self)["classes"] = stream.classes

    def track_classes(self, device: torch.device | str) -> None:
        """Start to track which classes came: `seen_classes` and `task_classes`."""
        self.seen_classes = self.task_classes = torch.empty(0, dtype=torch.int64, device=device)
        self.task_number = -1

    @on(SessionStarted)
    def read_target(self, event: SessionStarted) -> None:
        """Take the session's kind of targets."""
        self.target = event.session.target

    @on(SessionStarted)
    def grow_head(self, event: SessionStarted) -> None:
        """Give a growing head an output for each class that is new in this session; with values, all that there are."""
        grow_heads(self.model, [optimizer for _, optimizer in find_all(self, Optimizer)], lambda: session_outputs(event.session))

    @on(SessionStarted)
    def add_classes(self, event: SessionStarted) -> None:
        """Add the session's classes to those that compete; a growing head has outputs for them by now."""
        if self.seen_classes is None or self.task_classes is None:
            return
        task = event.session.task_if_shown
        if task is not None and task.id != self.task_number:
            self.task_number, self.task_classes = task.id, self.task_classes[:0]
        new = self.seen_classes.new_tensor(session_outputs(event.session))
        self.task_classes = torch.cat([self.task_classes, new]).unique()
        self.seen_classes = torch.cat([self.seen_classes, new]).unique()
        if self.heads is not None and not self.task_given:
            self.heads[self.task_classes] = False  # a class that came in another task before
            self.heads[self.task_classes[:, None], self.task_classes] = True


class Regulariser(HasParams, ABC):
    """A penalty on top of a strategy's loss: define `penalty`, and subscribe with `on`. See `clstream.strategy.regulariser`."""

    strategy: Strategy
    """The strategy whose loss it is added to."""

    penalised: bool = False
    """Whether a step asked for the penalty. Who calls `objective` without stepping on it puts this back: see `no_step`."""

    def attach(self, strategy: Strategy) -> None:
        """Attach to a strategy. Raises TypeError or ValueError for one that it doesn't fit."""
        if hasattr(self, "strategy"):
            raise ValueError(f"{type(self).__name__} is a regulariser of a {type(self.strategy).__name__} already: build another")
        self.strategy = strategy

    @on(BatchLearned)
    def check_penalised(self, event: BatchLearned) -> None:
        """Refuse a strategy whose step leaves the penalty out. Raises TypeError."""
        if not self.penalised:
            name = type(self.strategy).__name__
            raise TypeError(
                f"{name}.learn didn't minimise self.objective(samples), so the penalty of {type(self).__name__} was left out: let "
                f"{name} minimise it, or take the regulariser away"
            )

    @abstractmethod
    def penalty(self, samples: Samples) -> Tensor:
        """Return what is added to the loss of the samples: a scalar that can be differentiated."""
