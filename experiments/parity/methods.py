"""What is compared: for each method a strategy of ours and one of Avalanche's, with the same hyper-parameters.

Avalanche 0.6.0, read, differs from the papers and from clstream in this. Where an option of ours does what theirs does, it is set;
where theirs is wrong, or only different, both are measured: as it is, and made the same ("as Avalanche's").

Replay: theirs fills its memory when an experience is over, as many samples of each, and goes over it in shuffled passes; an
    experience is learned with no replay of its own samples. Ours takes in each batch when it was learned, and draws independently.
DER++: theirs (DER with beta > 0) fills its memory in the same way, with the outputs of the model at the end of the experience, in
    evaluation mode. Paper, ours: those at the step that learned the sample. Theirs takes both replay terms on one draw, in one
    forward pass with the batch; paper, ours: two.
ER-ACE: theirs takes the samples of an experience into its memory before it is learned, as many of each class; replay and masking
    start with the second experience, and from there on its loss is the mean of both terms. Ours, as the paper: their sum, and the
    memory takes in each batch when it was learned.
A-GEM: theirs takes the reference gradient on sample_size // (past experiences) samples of each past one, in shuffled passes; ours
    draws from all of them together. The rest is the same.
EWC: their importance is the mean over batches of the squared gradient of a batch's mean loss, without the batch size as a factor
    (ours: fisher="empirical", fisher_batch=BATCH, and a BATCH-th of the strength). It goes over the samples as they lie in the
    experience. `nc_benchmark` lays them class by class, so the gradients of a batch agree, and it is up to twice as large.
SI: theirs follows the gradient of the loss with its own penalty, cuts importance off at 0.001, and halves the penalty (ours:
    gradient="objective", most=0.001, half of the strength). On the CPU it does nothing at all: the weights that it notes before a
    step are views of the weights, so no step moves them. It is measured as it is, and with copies in their place.
MAS: theirs takes the absolute value of a batch's mean gradient, as it goes over the samples as they lie, and a moving average over
    tasks (ours: importance_batch=BATCH, alpha=0.5).
RWalk: theirs puts negative scores to 0 at a task's end alone, damps by the precision of its numbers (ours: clip="task"), brings
    importance to 0 to 1 by the greatest alone, and its windows of steps run on from task to task.
GEM: theirs keeps a uniform sample of each experience (ours: memory="reservoir").
GDumb: theirs keeps a uniform sample of each class, and takes in an experience before it is learned; ours keeps the first ones. A
    plain rate and no limit of the gradient's norm, as theirs.
LwF: theirs distils by a divergence over the classes seen so far, without T^2: the same gradient as the cross-entropy.
MER: theirs takes a batch for one example (ours: examples="batch"), and fills its memory when an experience is over.
iCaRL: theirs goes over the samples of an experience and all exemplars in the same batches, so it takes more steps, and keeps up to
    a sample more of each class; a sample that herding would choose again counts again each time; and classes to come have a mean of
    zeros, which may win. The loss of both is a mean over ten outputs (ours: form="mean"), at ten times the rate of the others.
SCR: theirs divides features by their length before its projection too, multiplies the loss by 0.1 / 0.07 (ours:
    base_temperature=0.07), and fills its memory when an experience is over. It leaves it to the network to divide what is projected
    by its length, as its loss expects: here it is given one that does. A class mean is the average of the one before and the new
    one. No augmentation: the second view is the sample again.
GSS: theirs scores and keeps samples at the forward pass, before the step, also those that come out of its memory, which it replays
    from the second experience on, 32 of them beside each batch, in one step on both; ours takes a step on each.
PackNet: theirs lets pruned weights begin the next task with what they were, ours at 0, as the authors' code. Both are given a head
    for each task: as it is, theirs shares its output layer out among tasks too. Three passes, of which the last is after pruning.
PNN: theirs leads the inputs to the first layer of each column through adapters too, and has no lateral connections into its heads;
    U and V have biases, and the scale of each earlier column (alpha) begins as N(0, 1), ours as N(0, 0.01). Its columns begin with
    torch's initial weights, ours with those of the net.
Cumulative: theirs is our Joint(restart=False).

All learn the cross-entropy over all outputs, from the start (active_classes="all"), LwF with distillation; but for iCaRL (binary
cross-entropies), SCR (contrast), and PackNet and PNN (over the outputs of the task).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from clstream.strategies import (
    AGEM,
    ERACE,
    EWC,
    GEM,
    GSS,
    MAS,
    MER,
    PNN,
    SCR,
    SI,
    DERpp,
    Finetune,
    GDumb,
    ICaRL,
    Joint,
    LwF,
    PackNet,
    Replay,
    RWalk,
)
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import Batch, BatchLearned, Samples, Strategy, TaskEnded, TaskStarted, on
from clstream.avalanche.imports import import_avalanche
from clstream.losses import supervised_contrastive
from clstream.memory import ClassBalanced, Memory

LR, BATCH, CAPACITY, ALPHA, BETA, PER_TASK, SAMPLE = 0.03, 10, 500, 1.0, 0.5, 250, 60
MAS_LAMBDA, RWALK_LAMBDA, MARGIN, MER_BETA = 0.1, 10.0, 0.5, 0.3
WIDTH, GRADIENTS = 100, 5
LOADED = 32  # kept samples in a batch of Avalanche's loader for replay, if nothing else is said
EWC_LAMBDA, SI_LAMBDA, SI_EPSILON, LWF_ALPHA, TEMPERATURE = 100.0, 2000.0, 0.1, 2.0, 2.0

Make = Callable[[nn.Module], Any]
SGD, FASTER = partial(torch.optim.SGD, lr=LR), partial(torch.optim.SGD, lr=10 * LR)


@dataclass(frozen=True)
class Method:
    """One comparison.

    Args:
        name: of the method, and what is special about this comparison.
        ours, theirs: make a strategy of clstream, and one of Avalanche, of a net.
        within: what theirs is made and run in.
        by_class: whether theirs is given the samples class by class.
        apart: whether both are known to differ, for the reason given in the module; then the row says how much.
        scenario: "class", or "task" for what needs the task to answer.
        epochs: passes over each task.

    """

    name: str
    ours: Make
    theirs: Make
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    by_class: bool = False
    apart: bool = False
    scenario: str = "class"
    epochs: int = 1


class FilledAfterwards:
    """Comes before a replay method among the bases: its memory is filled as Avalanche's, when a task is over."""

    memory: Memory

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Keep nothing yet."""

    @on(TaskEnded)
    def fill(self, event: TaskEnded) -> None:
        """Offer the whole task."""
        self.memory.add(event.task.train[:])


class ReplayFilledAfterwards(FilledAfterwards, Replay):
    """Replay whose memory is filled as Avalanche's: when a task is over, class by class."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], capacity: int) -> None:
        super().__init__(model, optimizer, capacity, memory="class_balanced")


class DERppFilledAfterwards(DERpp):
    """DER++ whose memory is filled as Avalanche's: class by class when a task is over, with the outputs that it then has."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], capacity: int, alpha: float, beta: float) -> None:
        super().__init__(model, optimizer, capacity, None, alpha, beta, draws=1)
        self.memory = ClassBalanced(capacity)  # type: ignore[assignment]

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Keep nothing yet."""

    @on(TaskEnded)
    @torch.no_grad()
    def fill(self, event: TaskEnded) -> None:
        """Offer the whole task, with the outputs of the model as it is now."""
        samples = event.task.train[:]
        self.memory.add(type(samples)(samples.x, samples.y, {"logits": self.outputs(samples)}))


class ERACEFilledBefore(ERACE):
    """ER-ACE as Avalanche's: its memory takes in a task before it is learned, and from the second one on the loss is a mean."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], capacity: int) -> None:
        super().__init__(model, optimizer, capacity, start="second_task")
        self.memory = ClassBalanced(capacity)  # type: ignore[assignment]

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean of both terms, and in the first task the first one."""
        loss = super().loss(samples)
        return loss / 2 if self.finished is not None and self.finished.tasks else loss

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Keep nothing now."""

    @on(TaskStarted)
    def fill(self, event: TaskStarted) -> None:
        """Offer the whole task."""
        self.memory.add(event.task.train[:])


class MERFilledAfterwards(MER):
    """MER as Avalanche's: a batch is one example, and its memory takes in a task when it is over."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], capacity: int) -> None:
        super().__init__(model, optimizer, capacity, BATCH, batches=1, beta=MER_BETA, gamma=1.0, examples="batch")

    def offer_example(self, example: Samples, epoch: int) -> None:
        """Keep nothing yet."""

    @on(TaskEnded)
    def fill(self, event: TaskEnded) -> None:
        """Offer the whole task."""
        self.memory.add(event.task.train[:])


class SCRAsAvalanche(FilledAfterwards, SCR):
    """SCR as Avalanche's: features of length 1 go into the projection, and its memory takes in a task when it is over."""

    def loss(self, samples: Samples) -> Tensor:
        """Return the contrastive loss, of a sample and the same again."""
        for past in self.drawn_for(samples):
            samples = samples + past
        features = self.unit_features(samples.x).repeat(2, 1)
        return self.scale * supervised_contrastive(self.projection(features), samples.y.repeat(2), self.temperature)


class GSSAsAvalanche(GSS):
    """GSS as Avalanche's: from the second task on a draw of the memory joins the batch; all is offered before the step."""

    replays = False

    @on(TaskStarted)
    def note(self, event: TaskStarted) -> None:
        """Note whether anything is kept."""
        self.replays = len(self.memory) > 0

    def learn(self, batch: Batch) -> Tensor:
        """Offer a batch and what is drawn, then take one step on both."""
        samples = batch.samples
        if self.replays:
            samples = samples + self.memory.sample(LOADED, repeats=False)
        self.model.eval()
        self.offer(samples)
        self.model.train()
        loss = self.objective(samples)
        self.step(loss)
        return loss.detach()


@contextmanager
def copies() -> Any:
    """Have Avalanche's SI note copies of the weights, as it does where the weights are not on the CPU."""
    plugin = import_avalanche("training.plugins").SynapticIntelligencePlugin
    noted = plugin.extract_weights

    def extract_weights(model: nn.Module, target: dict[str, Any], excluded: set[str]) -> None:
        noted(model, target, excluded)
        for weights in target.values():
            weights.data = weights.data.clone()

    plugin.extract_weights = staticmethod(extract_weights)
    try:
        yield
    finally:
        plugin.extract_weights = staticmethod(noted)


def their(name: str, **options: Any) -> Make:
    """Return what makes a strategy of Avalanche by name."""

    def make(net: nn.Module) -> Any:
        return getattr(import_avalanche("training.supervised"), name)(
            model=net, optimizer=SGD(net.parameters()), criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH, eval_mb_size=2048,
            evaluator=None, **{"train_epochs": 1, **options},
        )  # fmt: skip

    return make


def our_ewc(net: nn.Module) -> Strategy:
    """Return EWC with Avalanche's importance."""
    return EWC(net, SGD, EWC_LAMBDA / BATCH, fisher="empirical", fisher_batch=BATCH)


def our_si(net: nn.Module) -> Strategy:
    """Return SI with Avalanche's importance."""
    return SI(net, SGD, SI_LAMBDA / 2, damping=SI_EPSILON, gradient="objective", most=0.001)


def our_rwalk(net: nn.Module) -> Strategy:
    """Return RWalk with Avalanche's importance."""
    return RWalk(net, SGD, RWALK_LAMBDA, damping=torch.finfo(torch.float32).eps, clip="task")


def their_rwalk(net: nn.Module) -> Any:
    """Return Avalanche's plain strategy with its plugin of RWalk."""
    plugin = import_avalanche("training.plugins").RWalkPlugin(ewc_lambda=RWALK_LAMBDA, ewc_alpha=0.9, delta_t=10)
    return their("Naive", plugins=[plugin])(net)


def inputs_of(net: nn.Module) -> int:
    """Return the width of the net's inputs."""
    return net.get_parameter("stages.layer1.weight").shape[1]


def their_icarl(net: nn.Module) -> Any:
    """Return Avalanche's iCaRL of the net's layers and its head."""
    return import_avalanche("training.supervised").ICaRL(
        feature_extractor=net.stages, classifier=net.head, optimizer=FASTER(net.parameters()), memory_size=CAPACITY,
        buffer_transform=None, fixed_memory=True, train_mb_size=BATCH, train_epochs=1, eval_mb_size=2048, evaluator=None,
    )  # fmt: skip


def our_scr(net: nn.Module) -> Strategy:
    """Return SCR with Avalanche's loss."""
    return SCRAsAvalanche(
        net, SGD, CAPACITY, memory="class_balanced", temperature=0.1, base_temperature=0.07, width=WIDTH, views="stream"
    )


class Unit(nn.Module):
    """Divides each row by its length: Avalanche's contrastive loss leaves that to the network."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, features) of length 1."""
        return F.normalize(x, dim=1)


def their_scr(net: nn.Module) -> Any:
    """Return Avalanche's SCR of the net's layers, without augmentation."""
    projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), Unit())
    model = import_avalanche("models").SCRModel(net.stages, projection)
    return import_avalanche("training.supervised").SCR(
        model=model, optimizer=SGD(model.parameters()), mem_size=CAPACITY, temperature=0.1, train_mb_size=BATCH,
        batch_size_mem=100, train_epochs=1, eval_mb_size=2048, evaluator=None,
    )  # fmt: skip


def their_gss(net: nn.Module) -> Any:
    """Return Avalanche's plain strategy with its plugin of GSS."""
    plugins = import_avalanche("training.plugins")
    plugin = plugins.GSS_greedyPlugin(mem_size=CAPACITY, mem_strength=GRADIENTS, input_size=[inputs_of(net)])
    return their("Naive", plugins=[plugin])(net)


def their_packnet(net: nn.Module, zero: bool = False) -> Any:
    """Return Avalanche's plain strategy with its plugin of PackNet, the net's layers, and a head for each task.

    Args:
        net: has the layers `layer1` and `layer2`.
        zero: whether weights that are pruned become 0, as in the authors' code and here.

    """
    models, packnet = import_avalanche("models"), import_avalanche("models.packnet")
    layers = nn.Sequential()
    for own in (net.get_submodule("stages.layer1"), net.get_submodule("stages.layer2")):
        assert isinstance(own, nn.Linear)
        layer = nn.Linear(own.in_features, own.out_features)  # theirs would take a layer with its ReLU for one without
        layer.load_state_dict(own.state_dict())
        layers.extend((layer, nn.ReLU()))

    class Headed(packnet.PackNetModel):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__(layers)
            self.heads = models.MultiHeadClassifier(WIDTH)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            scores: Tensor = self.heads(super().forward(x, task_labels), task_labels)
            return scores

    class Zeroing(packnet.PackNetPlugin):  # type: ignore[misc,name-defined]
        def before_training_epoch(self, strategy: Any, **given: Any) -> None:
            super().before_training_epoch(strategy, **given)
            for module in strategy.model.modules():
                if isinstance(module, packnet.WeightAndBiasPackNetModule):
                    module.wrappee.weight.data[module.pruned_mask] = 0

    plugin = Zeroing if zero else packnet.PackNetPlugin
    return their("Naive", train_epochs=3, plugins=[plugin(1, 0.5)])(Headed())


def their_pnn(net: nn.Module) -> Any:
    """Return Avalanche's progressive network of as many layers of the same widths."""
    return their("PNNStrategy")(import_avalanche("models").PNN(2, inputs_of(net), WIDTH))


def our_gdumb(net: nn.Module) -> Strategy:
    """Return GDumb with Avalanche's training."""
    return GDumb(net, SGD, CAPACITY, 1, BATCH, "constant", cutmix=0.0, clip=None)


THEIR_REPLAY = their("Replay", mem_size=CAPACITY)
THEIR_DER = their("DER", mem_size=CAPACITY, batch_size_mem=BATCH, alpha=ALPHA, beta=BETA)
THEIR_ACE = their("ER_ACE", mem_size=CAPACITY, batch_size_mem=BATCH)
THEIR_EWC = their("EWC", ewc_lambda=EWC_LAMBDA)
THEIR_SI = their("SynapticIntelligence", si_lambda=SI_LAMBDA, eps=SI_EPSILON)

METHODS = (
    Method("Replay", lambda net: Replay(net, SGD, CAPACITY, BATCH), THEIR_REPLAY, apart=True),
    Method("Replay, filled as theirs", lambda net: ReplayFilledAfterwards(net, SGD, CAPACITY), THEIR_REPLAY),
    Method("ER-ACE", lambda net: ERACE(net, SGD, CAPACITY, BATCH), THEIR_ACE, apart=True),
    Method("ER-ACE, filled as theirs", lambda net: ERACEFilledBefore(net, SGD, CAPACITY), THEIR_ACE),
    Method("EWC", our_ewc, THEIR_EWC),
    Method("EWC, theirs class by class", our_ewc, THEIR_EWC, by_class=True, apart=True),
    Method("SI", our_si, THEIR_SI, apart=True),
    Method("SI, theirs with copies", our_si, THEIR_SI, within=copies),
    Method(
        "MAS",
        lambda net: MAS(net, SGD, MAS_LAMBDA, importance_batch=BATCH, alpha=0.5),
        their("MAS", lambda_reg=MAS_LAMBDA, alpha=0.5),
    ),
    Method("RWalk", our_rwalk, their_rwalk),
    Method(
        "GEM",
        lambda net: GEM(net, SGD, PER_TASK, MARGIN, memory="reservoir"),
        their("GEM", patterns_per_exp=PER_TASK, memory_strength=MARGIN),
    ),
    Method("GDumb", our_gdumb, their("GDumb", mem_size=CAPACITY)),
    Method(
        "LwF",
        lambda net: LwF(net, SGD, LWF_ALPHA, temperature=TEMPERATURE),
        their("LwF", alpha=LWF_ALPHA, temperature=TEMPERATURE),
    ),
    Method("A-GEM", lambda net: AGEM(net, SGD, PER_TASK, SAMPLE), their("AGEM", patterns_per_exp=PER_TASK, sample_size=SAMPLE)),
    Method("DER++", lambda net: DERpp(net, SGD, CAPACITY, BATCH, ALPHA, BETA), THEIR_DER, apart=True),
    Method(
        "DER++, filled as theirs", lambda net: DERppFilledAfterwards(net, SGD, CAPACITY, ALPHA, BETA), THEIR_DER
    ),
    Method(
        "MER, filled as theirs",
        lambda net: MERFilledAfterwards(net, SGD, CAPACITY),
        their("MER", mem_size=CAPACITY, batch_size_mem=BATCH, n_inner_steps=1, beta=MER_BETA, gamma=1.0),
    ),
    Method("iCaRL", lambda net: ICaRL(net, FASTER, CAPACITY, form="mean"), their_icarl),
    Method("SCR", our_scr, their_scr),
    Method("GSS", lambda net: GSS(net, SGD, CAPACITY, LOADED, gradients=GRADIENTS), their_gss, apart=True),
    Method("GSS, selecting as theirs", lambda net: GSSAsAvalanche(net, SGD, CAPACITY, gradients=GRADIENTS), their_gss),
    Method("PackNet", lambda net: PackNet(net, SGD), their_packnet, apart=True, scenario="task", epochs=3),
    Method(
        "PackNet, theirs zeroed",
        lambda net: PackNet(net, SGD),
        partial(their_packnet, zero=True),
        scenario="task",
        epochs=3,
    ),
    Method("PNN", lambda net: PNN(net, SGD), their_pnn, scenario="task"),
    Method("Cumulative", lambda net: Joint(net, SGD, restart=False), their("Cumulative")),
    Method("Fine-tuning", lambda net: Finetune(net, SGD), their("Naive")),
)  # fmt: skip
