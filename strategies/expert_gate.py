"""Expert Gate: a network for each task, and an autoencoder for each, which tells whose inputs look like what it knows.

Aljundi, Chakravarty, Tuytelaars 2017, "Expert Gate: Lifelong Learning with a Network of Experts" (CVPR), and the authors' code
(github.com/rahafaljundi/Expert-Gate). Form implemented, when a session of task k begins:

1. An undercomplete autoencoder of one layer learns its inputs t, from 0 to 1, by cross-entropy, with Adagrad:
   t^ = sigmoid(W' relu(W t + b) + b'); its error is Er(t) = sum over inputs of (t^ - t)^2
2. With Er_a the mean error of task a's autoencoder over samples of task k that were held out from 1., the relatedness is

       Rel(k, a) = 1 - (Er_a - Er_k) / Er_k

3. The expert of the most related task a is copied, and the copy learns task k: if Rel > `threshold`, by learning without forgetting
   (cross-entropy + `lwf_weight` times the cross-entropy to expert a's softened outputs of its own classes, T = 2), else by the
   cross-entropy alone (fine-tuning). The first expert is the model as it was given

An answer is that of one expert, that of the greatest exp(-Er_i / T) / sum over j of exp(-Er_j / T), T = 2; classes of other tasks
have -inf. With the task given, its expert answers, and no gate is asked. What an expert and an autoencoder answer stays the same
bit for bit once the task is over.

The paper's autoencoder is over features of a pre-trained AlexNet, standardised, then through a sigmoid. Here it is over the inputs
of the stream: bytes divided by 255, others standardised by each input's mean and deviation in the first session, then through a
sigmoid. Give it a stream of features (`clstream.streams.features`, `--features`) to have it over these; its experts are over them
too then, where the paper's are whole networks.

Other deviations: a temperature doesn't change which expert is asked; it counts for `gate_probabilities` alone. If a task has
several sessions, its autoencoder learns each, and its expert is chosen in the first. Weights of the autoencoder begin as
`nn.Linear` has them, where the code has a sparse initialisation, and there is no weight decay. The code's own example has a code of
500, 100 passes and batches of 12. The paper may also ask several experts; here it is one. A task that comes again gets a further
expert. `lwf_weight` 0.01 and T = 2 in LwF are those of Avalanche 0.6.0, which says that they are the paper's; its gate asks one
expert for a whole batch, by the error of all of it, and trains the autoencoder on squared errors.

Measured (class-IL Split MNIST, Mlp 400-400, one pass in batches of 32, three seeds): accuracy 0.915 ± 0.008.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted, SessionStarted, TaskEnded
from clstream.losses import distillation
from clstream.measures.flops import same_flops
from clstream.models.heads import grow_heads
from clstream.params import check_integer, check_number, check_positive, check_share
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.answers import session_outputs
from clstream.strategy.task_networks import TaskNetworks
from clstream.stream import Samples, Subset, Task


class Autoencoder(nn.Module):
    """An undercomplete autoencoder of one layer, for inputs from 0 to 1.

    Args:
        inputs: how many numbers an input has.
        code: width of the hidden layer.

    """

    def __init__(self, inputs: int, code: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(inputs, code), nn.Linear(code, inputs)

    def forward(self, targets: Tensor) -> Tensor:
        """Return (n, inputs) reconstructions of (n, inputs), before the sigmoid."""
        reconstructions: Tensor = self.decoder(F.relu(self.encoder(targets)))
        return reconstructions

    def errors(self, targets: Tensor) -> Tensor:
        """Return (n,), the squared errors of reconstructions, summed over inputs."""
        errors: Tensor = (self(targets).sigmoid() - targets).square().sum(1)
        return errors


class ExpertGate(TaskNetworks):
    """Learn each task in a network of its own, begun from that of the most related task; an autoencoder of each says who answers.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits: what the first expert is.
        optimizer: makes the optimizer of an expert, anew for each.
        code: width of an autoencoder's hidden layer.
        gate_epochs: passes of an autoencoder over a session.
        gate_batch: samples of its step.
        gate_lr: rate of its Adagrad.
        held_out: the share of a session that an autoencoder doesn't learn, for relatedness; one sample at least.
        temperature: T of the gate's probabilities, and of learning without forgetting.
        threshold: the relatedness above which an expert is learned without forgetting.
        lwf_weight: of the distillation then.

    """

    fixed_classes = "those of the task in the loss, those of one task in an answer"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        code: int = 100,
        gate_epochs: int = 5,
        gate_batch: int = 100,
        gate_lr: float = 0.01,
        held_out: float = 0.1,
        temperature: float = 2.0,
        threshold: float = 0.85,
        lwf_weight: float = 0.01,
    ) -> None:
        Strategy.__init__(self, model, optimizer)  # experts are whole networks: any model, also with weight decay
        check_integer(1, code=code, gate_epochs=gate_epochs, gate_batch=gate_batch)
        check_positive(gate_lr=gate_lr, temperature=temperature)
        check_share(held_out=held_out)
        check_number(0, threshold=threshold, lwf_weight=lwf_weight)
        self.make_optimizer = optimizer
        self.code, self.gate_epochs, self.gate_batch, self.gate_lr, self.held_out = code, gate_epochs, gate_batch, gate_lr, held_out
        self.temperature, self.threshold, self.lwf_weight = temperature, threshold, lwf_weight
        self.random = torch.Generator()
        self.forget_tasks()

    def forget_tasks(self) -> None:
        """Start without experts."""
        super().forget_tasks()
        self.experts: list[nn.Module] = []
        self.gates: list[Autoencoder] = []
        self.relatedness: list[list[float]] = []  # of each task, to each before it
        self.started_from: list[int | None] = []  # the expert that each began from
        self.unforgetting = False  # whether the expert of the task that goes on learns without forgetting
        self.mean = self.deviation = torch.zeros(0)  # of inputs that aren't bytes
        self.scaled = False  # whether mean and deviation were taken

    @on(RunStarted)
    def take_device(self, event: RunStarted) -> None:
        """Start where the run is."""
        self.mean = self.deviation = torch.zeros(0, device=event.stream.device or "cpu")

    def learned_weights(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the newest expert; of the model where there is none yet."""
        newest: nn.Module = self.experts[-1] if self.experts else self.model
        return newest.parameters()

    @on(SessionStarted)
    def prepare_expert(self, event: SessionStarted) -> None:
        """Learn the task's autoencoder, then, if it is new, begin its expert from that of the most related task."""
        samples = event.session.samples
        if not self.scaled:
            self.take_scale(samples)
        order = torch.randperm(len(samples), generator=self.random)
        count = min(max(1, int(self.held_out * len(samples))), len(samples) - 1)
        held, learned = order[:count], order[count:]
        if len(self.gates) < len(self.tasks):
            self.gates.append(Autoencoder(samples[:1].x.numel(), self.code).to(self.mean.device))
        self.learn_gate(samples, learned)
        if len(self.experts) < len(self.tasks):
            self.begin_expert(samples, held if count else order)
        grow_heads(self.experts[-1], [self.optimizer], lambda: session_outputs(event.session))

    def take_scale(self, samples: Samples | Subset) -> None:
        """Take mean and deviation of each input, unless they are bytes."""
        self.scaled = True
        if samples[:1].x.dtype != torch.uint8:
            x = samples[:].x.flatten(1).float().to(self.mean.device)
            self.mean, self.deviation = x.mean(0), x.std(0, correction=0)

    def gate_inputs(self, x: Tensor) -> Tensor:
        """Return the (n, inputs) that autoencoders reconstruct, from 0 to 1."""
        x = x.flatten(1).float()
        if not len(self.mean):
            return x / 255
        return ((x - self.mean) / self.deviation.clamp(min=1e-6)).sigmoid()

    def learn_gate(self, samples: Samples | Subset, rows: Tensor) -> None:
        """Let the newest autoencoder learn some samples, by their rows."""
        gate, where = self.gates[-1], samples[:1].y.device
        optimizer = Adagrad(gate.parameters(), lr=self.gate_lr)
        for _ in range(self.gate_epochs):
            order = rows[torch.randperm(len(rows), generator=self.random)]
            for part in order.split(self.gate_batch):
                with same_flops(("gate", len(part))):
                    targets = self.gate_inputs(samples[part.to(where)].x.to(self.mean.device))
                    optimizer.zero_grad()
                    F.binary_cross_entropy_with_logits(gate(targets), targets).backward()
                    optimizer.step()

    def begin_expert(self, samples: Samples | Subset, rows: Tensor) -> None:
        """Copy the expert of the task most related to some samples, and say how the copy learns."""
        x = samples[rows.to(samples[:1].y.device)].x.to(self.mean.device)
        with torch.no_grad():
            *before, own = (float(errors) for errors in self.gate_errors(x).mean(0))
        related = [1 - (error - own) / own for error in before]
        self.relatedness.append(related)
        start = max(range(len(related)), key=related.__getitem__) if related else None
        self.started_from.append(start)
        self.unforgetting = start is not None and related[start] > self.threshold
        expert = deepcopy(self.model if start is None else self.experts[start])
        self.experts.append(expert.requires_grad_(True).train(self.model.training))
        self.optimizer = self.make_optimizer(self.learned_weights())

    @on(TaskEnded)
    def close_task(self, event: TaskEnded) -> None:
        """Freeze expert and autoencoder."""
        for module in (self.experts[-1], self.gates[-1]):
            module.eval().requires_grad_(False)

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy over the task's classes, and what holds an expert without forgetting."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        outputs = self.experts[-1](x)
        loss = self.loss_of_outputs(outputs, samples)
        start = self.started_from[-1]
        if start is None or not self.unforgetting:
            return loss
        with torch.no_grad():
            before = self.experts[start](x)
        return loss + self.lwf_weight * distillation(outputs, before, self.classes_of[start], self.temperature)

    def outputs_of(self, x: Tensor, place: int) -> Tensor:
        """Return the (n, outputs) outputs of an expert for raw inputs."""
        outputs: Tensor = self.experts[place](x)
        return outputs

    def gate_errors(self, x: Tensor) -> Tensor:
        """Return (n, autoencoders), the errors of all autoencoders for raw inputs."""
        targets = self.gate_inputs(x)
        return torch.stack([gate.errors(targets) for gate in self.gates], 1)

    def gate_probabilities(self, x: Tensor) -> Tensor:
        """Return (n, experts), how likely each expert is the one for raw inputs; 0 for those that a newer one took the place of."""
        with evaluating(self):
            errors = self.gate_errors(x)
        replaced = torch.ones(len(self.gates), dtype=torch.bool, device=x.device)
        replaced[self.newest()] = False
        return (-errors / self.temperature).masked_fill(replaced, float("-inf")).softmax(1)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, outputs) log-probabilities of the expert that the gate asks, or of the task's; -inf for others' classes."""
        if not self.experts:
            outputs: Tensor = self.model(x)
            return outputs
        if task is not None and task.id in self.tasks[: len(self.experts)]:
            place = max(place for place, other in enumerate(self.tasks[: len(self.experts)]) if other == task.id)
            return self.masked(self.outputs_of(x, place), place).log_softmax(1)
        errors = self.gate_errors(x)
        places = [place for place in self.newest() if place < len(self.experts)]
        chosen = errors[:, places].argmin(1)
        parts, rows = list[Tensor](), [(chosen == number).nonzero().flatten() for number in range(len(places))]
        for place, own in zip(places, rows, strict=True):
            if len(own):
                parts.append(self.masked(self.outputs_of(x[own], place), place).log_softmax(1))
        width = max(part.shape[1] for part in parts)
        joined = torch.cat([F.pad(part, (0, width - part.shape[1]), value=float("-inf")) for part in parts])
        return torch.empty_like(joined).index_copy(0, torch.cat(rows), joined)

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: the gate is asked only without."""
        return False

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: those of experts and autoencoders."""
        for module in (*self.experts, *self.gates):
            yield from (*module.parameters(), *module.buffers())
