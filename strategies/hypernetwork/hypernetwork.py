"""Hypernetworks: a network makes the weights of another one from an embedding of the task, and is held to what it made before.

von Oswald, Henning, Sacramento, Grewe 2020, "Continual learning with hypernetworks" (ICLR): `generator="mlp"`. With an LSTM in
its place: Chandra, Varshney, Srijith, Gupta 2023, "Continual Learning with Dependency Preserving Hypernetworks" (WACV),
`generator="lstm"`. Neither paper's body could be read. The first is as in the authors' code (chrhenning/hypercl). Of the second
only the abstract is certain; what is here is from a fragment of code that may be its authors', and no result of it is reproduced.

The target network f(x; W) has no weights of its own: W_t = h(e_t; Theta). e_t is an embedding of the task; Theta has the
generator's weights and the embeddings of the chunks that W is made in (`generators.py`). A step of task t:

task        L_task = mean cross-entropy of f(x; h(e_t)) over the outputs of the task's own classes
look ahead  dTheta = how the optimizer would change Theta now, by the gradients of L_task alone; it stays as it is
regularise  L_reg = beta / (t - 1) sum over old tasks j of |W*_j - h(e_j; Theta + dTheta)|^2, W*_j as they were when t began: a sum
            over all weights, no mean
step        on the gradients of both; that of L_reg passes through Theta + dTheta as through Theta, and e_t has that of L_task alone

The optimizers of Theta and of e_t are made anew for each task. e_t is frozen when its task is over. All old tasks go through the
generator in one batch; where they are many, L_reg comes from their states before its last layer, which is linear
(`squared_distance`): the same sum, at a cost that hardly grows with their number. Batch norm has running statistics for each
task. The number of tasks is not needed beforehand.

Answers: with the task given, its network and its own classes. Without (HNET+ENT), each sample is put to the networks of all tasks
so far, and the one whose answer has the least entropy answers. A task of one class has no entropy, and takes every sample. That
entropy is the `novelty` of a sample too, as what the task is chosen by; own choice, not measured.

`lookahead`, `old_embeddings`, `held_heads`, `chunks`, `clip` and `old_tasks` are there for the authors' later code
(chrhenning/posterior_replay_cl): no look-ahead, of which they found little gain; one Adam over everything, so that old e_j move
too; outputs of other tasks left out of L_reg.

That code also multiplies L_task by the task's number of samples; divide its beta, its norm of clipping and Adam's eps by that.

`importance="fisher"` weighs the squares of L_reg by F_j, the diagonal empirical Fisher of the weights made for task j, over its
samples one by one, as its sessions end. F is tiny: beta with it is another by orders of magnitude, unless F is divided by its
mean ("normalised", our own). `growth=True`: after the first task what leads from state to state in the LSTM is frozen, and all
else of Theta is stored when a task ends, for the task to be answered with. So nothing is forgotten and L_reg is not used, and a
task costs nearly a whole generator (`docs/hypernetworks.md` counts it).

Deviations: dTheta is what the optimizer does, whichever it is (the authors' code has formulas for Adam and SGD, without weight
decay). A task that comes again goes on with its embedding (with `growth`, with its stored copy), and all others are held. Epochs
are the stream's, where the papers count steps. Gates of the LSTM are drawn one by one by Xavier's rule. Left out: HNET+R and
HNET+TIR, which replay from a variational autoencoder; gradients through dTheta; e_t begun from the last one; hyperfan
initialisation.

Measured: see `docs/hypernetworks.md` (anchors `hnet-split-mnist`, `hnet-split-mnist-iclr`, `hnet-permuted-mnist-10`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from clstream.strategies.hypernetwork.generators import FactoredWeights, LstmGenerator, MlpGenerator, Target, squared_distance
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Adam

from clstream.bus import on
from clstream.evaluation import evaluating
from clstream.events import RunStarted, SessionEnded, TaskEnded, TaskStarted
from clstream.fisher import running_mean, session_fisher
from clstream.params import check_bool, check_choice, check_integer, check_integers, check_number, check_positive
from clstream.seeds import isolated
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Samples, Task


@dataclass(slots=True, eq=False)
class TaskState:
    """What is kept of a task: its embedding, and what belongs to the network that is made of it."""

    classes: Tensor  # its labels
    columns: Tensor  # the outputs that stand for them
    embedding: nn.Parameter
    chunks: nn.Parameter | None  # embeddings of chunks, where each task has its own
    statistics: dict[str, Tensor]  # the target network's buffers
    fisher: Tensor | None = None
    samples: int = 0  # that the Fisher is over
    copy: dict[str, Tensor] = field(default_factory=dict)  # with `growth`, the generator's weights when the task ended

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are the task's own."""
        return [self.embedding] if self.chunks is None else [self.embedding, self.chunks]


class Hypernetwork(Strategy):
    """Make a network's weights from an embedding of the task, and hold what is made for old tasks.

    The defaults are the authors' for Split MNIST, where the target network is an Mlp of 400 and 400.

    Args:
        model: the target network: it gives the shapes, and needs a fixed head. Its own weights answer before the first task, and
            are not used later, except those that require no gradient: they are used as they are.
        optimizer: makes the optimizer of the generator, and that of the embeddings, anew for each task.
        generator: "mlp" or "lstm".
        hidden: widths of the generator's hidden layers; of an LSTM, the one of its state.
        activation: of the hidden layers of "mlp": "relu", "elu", "sigmoid" or "tanh".
        chunk: how many weights are made at a time.
        task_size, chunk_size: of the embeddings of tasks and chunks.
        task_std, chunk_std: of the normals that these are drawn from.
        chunks: "shared" (embeddings of chunks are the generator's) or "own" (each task has its own, frozen with its embedding).
        beta: weight of the regulariser; 0 leaves it out. The loss of the task is a mean: for the authors' later code, which
            multiplies it by the task's number of samples, divide theirs by that.
        lookahead: whether the regulariser looks at Theta + dTheta, or at Theta.
        old_tasks: how many old tasks are held at each step, drawn anew. None: all.
        old_embeddings: "frozen" or "learned": whether embeddings of old tasks move with the regulariser.
        held_heads: "all" or "own": whether outputs of other tasks' classes are held in an old task's network. "own" has no effect
            where outputs are shared or the head is not made, or with `importance`.
        importance: "none", "fisher" or "normalised": what the squares of the regulariser are weighed by.
        fisher_samples: samples of each session that the Fisher is over, drawn at random. None: all.
        growth: store the generator with each task, but for the LSTM's recurrent weights; only for "lstm". Then there is no
            regulariser, so `beta` and what else belongs to it has no effect.
        head: "own" (each class has an output of the network) or "shared" (each task's classes take the first outputs in turn: the
            network may have as few as the largest task has classes).
        clip: norm that the gradients are clipped to, all together. None: they aren't.

    Raises:
        ValueError: for options out of range or at odds, a growing head, or a model without weights that require a gradient.

    """

    rehearsal_free = True
    not_state: tuple[str, ...] = ("cached_weights",)
    takes_regularisers = False  # its step has two losses and two optimizers
    fixed_classes = "those of the task whose network answers"
    takes_new_classes = False
    exempt = {"grows": "all of the network's weights are made from the start"}  # noqa: RUF012  # as the base has it

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=1e-3),
        generator: str = "mlp",
        hidden: tuple[int, ...] = (10, 10),
        activation: str = "relu",
        chunk: int = 42_000,
        task_size: int = 96,
        chunk_size: int = 96,
        task_std: float = 1.0,
        chunk_std: float = 1.0,
        chunks: str = "shared",
        beta: float = 0.01,
        lookahead: bool = True,
        old_tasks: int | None = None,
        old_embeddings: str = "frozen",
        held_heads: str = "all",
        importance: str = "none",
        fisher_samples: int | None = None,
        growth: bool = False,
        head: str = "own",
        clip: float | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        check_choice(("mlp", "lstm"), generator=generator)
        check_choice(("shared", "own"), chunks=chunks)
        check_choice(("frozen", "learned"), old_embeddings=old_embeddings)
        check_choice(("all", "own"), held_heads=held_heads)
        check_choice(("none", "fisher", "normalised"), importance=importance)
        check_choice(("own", "shared"), head=head)
        check_integers(1, hidden=hidden)
        check_integer(1, none=True, old_tasks=old_tasks, fisher_samples=fisher_samples)
        check_number(0, beta=beta, task_std=task_std, chunk_std=chunk_std)
        check_positive(none=True, clip=clip)
        check_bool(lookahead=lookahead, growth=growth)
        if generator == "lstm" and len(hidden) != 1:
            raise ValueError(f"an LSTM has one state: hidden must be one width, as (64,), not {hidden}")
        if growth and (generator != "lstm" or importance != "none"):
            raise ValueError("growth stores what is around an LSTM's recurrent weights: generator='lstm', importance='none'")
        self.network = Target(model)
        size, std = self.network.size, chunk_std if chunks == "shared" else None
        self.generator: MlpGenerator | LstmGenerator
        if generator == "lstm":
            self.generator = LstmGenerator(size, chunk, task_size, chunk_size, std, hidden[0])
        else:
            self.generator = MlpGenerator(size, chunk, task_size, chunk_size, std, hidden, activation)
        self.make_optimizer, self.optimizer = optimizer, optimizer(self.generator.parameters())
        self.task_size, self.chunk_size, self.task_std, self.chunk_std = task_size, chunk_size, task_std, chunk_std
        self.beta, self.lookahead, self.old_tasks, self.clip = (0.0 if growth else beta), lookahead, old_tasks, clip
        self.own_chunks, self.learns_old, self.own_head = chunks == "own", old_embeddings == "learned", head == "own"
        self.held_heads, self.importance = held_heads, importance
        self.fisher_samples, self.growth, self.classes = fisher_samples, growth, 0
        self.random = torch.Generator()
        self.reset()

    def reset(self) -> None:
        """Forget all tasks."""
        self.tasks: dict[int, TaskState] = {}  # by id
        self.current: TaskState | None = None
        self.old: list[TaskState] = []  # those that are held
        self.targets: FactoredWeights | None = None  # W*, as what it was made of when the task began
        self.coefficients: Tensor | None = None  # (old tasks, weights), of the squares of the regulariser; None: 1
        self.cached_weights: dict[int, dict[str, Tensor]] = {}  # of the networks that answer, by task

    # The run

    @on(RunStarted)
    def begin_run(self, event: RunStarted) -> None:
        """Read the number of classes, and refuse a network that they don't fit."""
        stream = event.stream
        self.classes, tasks = stream.classes, getattr(stream, "tasks", ())
        self.reset()
        x = tasks[0].test[:1].x if tasks else torch.zeros(1, *stream.input_shape)
        with isolated(0, "check"), evaluating(self):
            outputs = self.network.find_head(x.to(next(self.model.parameters()).device))
        most, name = max((len(task.classes) for task in tasks), default=0), type(self.model).__name__
        if outputs < most:
            raise ValueError(f"{name} has {outputs} outputs, too few for a task of {most} classes")
        if self.held_heads == "own" and self.network.head is None:
            raise ValueError(
                f"held_heads='own' is about the rows of a linear layer, and none gives the outputs of {name}: take 'all'"
            )

    @on(TaskStarted)
    def open_task(self, event: TaskStarted) -> None:
        """Draw the task's embedding, store the targets of old tasks, and make both optimizers."""
        self.cached_weights = {}
        current = self.tasks.pop(event.task.id, None)  # the newest is the last
        if current is None:
            current = self.new_state(event.task)
        current.fisher, current.samples = None, 0
        self.old, self.current = list(self.tasks.values()), current
        self.tasks[event.task.id] = current
        if self.growth:
            self.restore(current)
        trained = [current, *self.old] if self.learns_old else [current]
        for state in self.tasks.values():
            for parameter in state.parameters():
                parameter.requires_grad_(state in trained)
                parameter.grad = None
        self.optimizer = self.make_optimizer(weight for weight in self.generator.parameters() if weight.requires_grad)
        self.embedding_optimizer = self.make_optimizer([parameter for state in trained for parameter in state.parameters()])
        if self.old and self.beta:
            self.store_targets()

    @on(SessionEnded)
    def estimate_fisher(self, event: SessionEnded) -> None:
        """Take the Fisher of the weights that are made for the task, over the session's samples while they are there."""
        state = self.current
        if self.importance == "none" or state is None:
            return
        samples = event.session.samples
        if self.fisher_samples is not None:
            samples = samples[torch.randperm(len(samples), generator=self.random)[: self.fisher_samples].to(samples.y.device)]
        model = self.network.with_weights(self.network.unflatten(self.weights([state])[0]), state.statistics)
        fisher = session_fisher(model, samples, "empirical", self.augment, losses=partial(task_losses, state))
        new, n = torch.cat([fisher[name].flatten() for name in self.network.shapes]), len(samples)
        state.fisher = new if state.fisher is None else running_mean(state.fisher, state.samples, new, n)
        state.samples += n

    @on(TaskEnded)
    def close_task(self, event: TaskEnded) -> None:
        """Freeze the embedding; with `growth`, store what the weights were made with."""
        self.cached_weights, state = {}, self.tasks[event.task.id]
        for parameter in state.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        if isinstance(self.generator, LstmGenerator) and self.growth:
            recurrent = self.generator.recurrent()
            for weight in recurrent.values():
                weight.requires_grad_(False)
                weight.grad = None
            rest = {name: weight for name, weight in self.generator.named_parameters() if name not in recurrent}
            state.copy = {name: weight.detach().clone() for name, weight in rest.items()}

    def new_state(self, task: Task) -> TaskState:
        """Return the state of a task of which nothing was learned: its embedding drawn, its statistics the given model's."""
        device = next(self.generator.parameters()).device

        def normal(std: float, *shape: int) -> nn.Parameter:
            return nn.Parameter((std * torch.randn(shape, generator=self.random)).to(device))

        chunks = normal(self.chunk_std, self.generator.n_chunks, self.chunk_size) if self.own_chunks else None
        statistics = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        classes, columns = torch.tensor(task.classes, device=device), self.columns(task).to(device)
        return TaskState(classes, columns, normal(self.task_std, self.task_size), chunks, statistics)

    @torch.no_grad()
    def restore(self, state: TaskState) -> None:
        """Go on with the generator's weights that were stored with a task."""
        for name, value in state.copy.items():
            self.generator.get_parameter(name).copy_(value)
        state.copy = {}

    def columns(self, task: Task) -> Tensor:
        """Return which outputs of the network stand for a task's classes, in their order."""
        return torch.tensor(task.classes) if self.own_head else torch.arange(len(task.classes))

    @torch.no_grad()
    def store_targets(self) -> None:
        """Store the targets of old tasks, as what their weights are made of now, and how much each weight counts."""
        output = self.generator.output
        self.targets = self.generator(*self.inputs(self.old), True), output.weight.clone(), output.bias.clone()
        rows: list[Tensor] = []
        if self.importance != "none":
            rows = [state.fisher for state in self.old if state.fisher is not None]
            rows = [row / row.mean().clamp(min=1e-30) for row in rows] if self.importance == "normalised" else rows
        elif self.held_heads == "own" and self.own_head:
            rows = [self.network.head_mask(state.columns) for state in self.old]
        self.coefficients = torch.stack(rows) if rows else None

    # Making weights

    def inputs(self, tasks: list[TaskState]) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of tasks, (tasks, task_size), and those of their chunks if they are their own."""
        chunks = torch.stack([state.chunks for state in tasks if state.chunks is not None]) if self.own_chunks else None
        return torch.stack([state.embedding for state in tasks]), chunks

    def weights(self, tasks: list[TaskState]) -> Tensor:
        """Return (tasks, weights): all that the generator makes for some tasks."""
        weights: Tensor = self.generator(*self.inputs(tasks))
        return weights

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the generator's weights, what is each task's own, and what the network uses as it is."""
        yield from (*self.generator.parameters(), *self.generator.buffers())
        for state in self.tasks.values():
            yield from (*state.parameters(), *state.statistics.values(), *state.copy.values())
        yield from (weight for weight in self.model.parameters() if not weight.requires_grad)

    # Learning

    def outputs(self, samples: Samples) -> Tensor:
        """Return the outputs of the network that is made for the current task: augmented."""
        assert self.current is not None
        x = samples.x if self.augment is None else self.augment(samples.x)
        return self.network.outputs(self.network.unflatten(self.weights([self.current])[0]), self.current.statistics, x)

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean cross-entropy of the current task's own classes."""
        assert self.current is not None
        return task_losses(self.current, self.outputs(samples), samples.y).mean()

    def learn(self, batch: Batch) -> Tensor:
        """Take one step on a batch, and return the loss of both terms."""
        self.cached_weights = {}
        self.optimizer.zero_grad()
        self.embedding_optimizer.zero_grad()
        loss = self.loss(batch.samples)
        loss.backward()
        total = loss.detach()
        if self.old and self.beta:
            total = total + self.regularise()
        if self.clip is not None:
            groups = [group for optimizer in (self.optimizer, self.embedding_optimizer) for group in optimizer.param_groups]
            nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], self.clip)
        self.optimizer.step()
        self.embedding_optimizer.step()
        return total

    def regularise(self) -> Tensor:
        """Add the gradients of the regulariser, and return it."""
        parameters = dict(self.generator.named_parameters())
        theta = self.look_ahead() if self.lookahead else {name: weight.detach() for name, weight in parameters.items()}
        for weight in theta.values():
            weight.requires_grad_()
        rows = None
        if self.old_tasks is not None and self.old_tasks < len(self.old):
            rows = torch.randperm(len(self.old), generator=self.random)[: self.old_tasks]
        held = self.old if rows is None else [self.old[row] for row in rows.tolist()]
        embeddings = [parameter for state in held for parameter in state.parameters() if self.learns_old]
        factor = self.beta / len(held)
        assert self.targets is not None
        if self.coefficients is None and len(held) * self.generator.n_chunks > 4 * self.targets[0].shape[2]:
            states = functional_call(self.generator, theta, (*self.inputs(held), True))
            now = states, theta["output.weight"], theta["output.bias"]
            penalty = factor * squared_distance(now, self.targets_of(rows), self.network.size)
            gradients = torch.autograd.grad(penalty, [*theta.values(), *embeddings])
        else:
            weights: Tensor = functional_call(self.generator, theta, self.inputs(held))
            errors = weights.detach() - self.target_weights(rows)
            scaled = errors if self.coefficients is None else errors * select(self.coefficients, rows)
            penalty = factor * (errors * scaled).sum()
            gradients = torch.autograd.grad(weights, [*theta.values(), *embeddings], 2 * factor * scaled)
        for parameter, gradient in zip([*parameters.values(), *embeddings], gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return penalty.detach()

    def targets_of(self, rows: Tensor | None) -> FactoredWeights:
        """Return what the weights of old tasks, or of some of them, were made of when this task began."""
        assert self.targets is not None
        states, weight, bias = self.targets
        return select(states, rows), weight, bias

    @torch.no_grad()
    def target_weights(self, rows: Tensor | None) -> Tensor:
        """Return (old tasks, weights), or some rows of it: W*."""
        states, weight, bias = self.targets_of(rows)
        return F.linear(states, weight, bias).flatten(1)[:, : self.network.size]

    @torch.no_grad()
    def look_ahead(self) -> dict[str, Tensor]:
        """Return Theta + dTheta by name: the step is taken, and taken back, so that optimizer and Theta are as they were."""
        parameters = dict(self.generator.named_parameters())
        before = [weight.clone() for weight in parameters.values()]
        states = {
            weight: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
            for weight, state in self.optimizer.state.items()
        }
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.step()
        theta = {name: weight.clone() for name, weight in parameters.items()}
        for weight, value in zip(parameters.values(), before, strict=True):
            weight.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(states)
        for group, options in zip(self.optimizer.param_groups, groups, strict=True):  # some count steps there
            group.update(options)
        return theta

    # Answering

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): the logits of the task that is given, or for each sample of the one that is surest; -inf for others.

        A task that was not learned is answered with the newest one's network; before the first, nothing that was learned answers.
        """
        if not self.tasks:
            if not self.own_head:
                if not self.classes:
                    raise ValueError(
                        "with head='shared' there are answers once a run has started: it says how many classes there are"
                    )
                return torch.zeros(len(x), self.classes, device=x.device)
            outputs: Tensor = self.model(x)
            return outputs
        weights = self.task_weights()
        if task is not None:
            number = task.id if task.id in self.tasks else next(reversed(self.tasks))
            labels = torch.tensor(task.classes, device=x.device)
            outputs = self.network.outputs(weights[number], self.tasks[number].statistics, x)
            return self.scatter(outputs, labels, self.columns(task).to(x.device))
        best, least = torch.empty(0), torch.empty(0)
        for number, state in self.tasks.items():
            outputs = self.network.outputs(weights[number], state.statistics, x)
            scores, entropies = self.scatter(outputs, state.classes, state.columns), entropy(outputs[:, state.columns])
            if not len(best):
                best, least = scores, entropies
            surer = entropies < least
            best, least = torch.where(surer[:, None], scores, best), torch.where(surer, entropies, least)
        return best

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,), the entropy of the answer: the least one of all tasks' networks, since that one answers."""
        entropies: Tensor = torch.special.entr(scores.softmax(1)).sum(1)  # 0 where a class doesn't compete
        return entropies

    def scatter(self, outputs: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
        """Return (n, classes) with some outputs as the scores of labels, and -inf for all others."""
        width = outputs.shape[1] if self.own_head else self.classes
        return outputs.new_full((len(outputs), width), float("-inf")).index_copy(1, labels, outputs[:, columns])

    @torch.no_grad()
    def predict_online(self, x: Tensor) -> Tensor:
        """Label what the stream brings next: the current task's network."""
        if self.current is None:
            return self.predict(x)
        number = next(reversed(self.tasks))
        outputs = self.network.outputs(self.task_weights()[number], self.current.statistics, x)
        return self.scatter(outputs, self.current.classes, self.current.columns).argmax(1)

    @torch.no_grad()
    def task_weights(self) -> dict[int, dict[str, Tensor]]:
        """Return the weights of all tasks so far, made once for as long as nothing is learned."""
        if not self.cached_weights:
            if self.growth:
                rows = [self.stored_weights(state) for state in self.tasks.values()]
            else:
                rows = list(self.weights(list(self.tasks.values())))
            self.cached_weights = {number: self.network.unflatten(row) for number, row in zip(self.tasks, rows, strict=True)}
        return self.cached_weights

    def stored_weights(self, state: TaskState) -> Tensor:
        """Return a task's row of weights, made with its own copy of the generator if there is one."""
        theta = {**dict(self.generator.named_parameters()), **state.copy}
        weights: Tensor = functional_call(self.generator, theta, self.inputs([state]))
        return weights[0]


def task_losses(state: TaskState, outputs: Tensor, y: Tensor) -> Tensor:
    """Return (n,), the cross-entropy of a task's own classes, from (n, outputs) and labels."""
    if outputs.shape[1] < len(state.columns):
        raise ValueError(f"the network has {outputs.shape[1]} outputs, too few for a task of {len(state.columns)} classes")
    own = y[:, None] == state.classes
    losses = F.cross_entropy(outputs[:, state.columns], own.long().argmax(1), reduction="none")
    return torch.where(own.any(1), losses, float("nan"))  # a label of another task has no loss here, and the run ends


def entropy(logits: Tensor) -> Tensor:
    """Return (n,), the entropy of the softmax of each row, also where a probability is too small for a float."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return some rows of a tensor, or all."""
    return tensor if rows is None else tensor[rows.to(tensor.device)]
