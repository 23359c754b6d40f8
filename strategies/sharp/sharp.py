"""SHARP: a sparse network grows a path for each episode, replays hidden activations of recent classes, and freezes older paths.

Gurbuz, Moorman, Dovrolis 2023, "SHARP: Sparsity and Hidden Activation RePlay for Neuro-Inspired Continual Learning". The paper's
body could not be read: this follows the authors' code (BurakGurbuz97/SHARP-Continual-Learning) and the paper's figure.

Every unit has a rank: 0 idle, 1 learning, 2 to m + 1 fine-tuning, m + 2 and above frozen; below the cut, 2 and above are frozen.
An episode is a session of the stream: its samples are needed again at its end. It goes through phases of `phase_epochs` epochs.

phase      quota q = max(100 (1 + cos(pi s / period)) / 2, least_quota), s = 2, 2, 3, 4, ...
           select   units of each layer by summed activation on 1,024 samples, the most active first, until they have q % of it:
                    those of rank 0 or 1 among them get rank 1, the others of rank 0 or 1 get rank 0
           drop     connections from idle units to others; as many are
           grow     at random into idle units, at zero; so no idle unit ever reaches the output
           train    with a fresh optimizer
batch      h = f(x) of the batch, and from the cut upward of activations of the m episodes before, evenly over their classes;
           idle units of the last layer are silenced; supervised contrastive loss over all of h; frozen units get no gradient
end        promote  ranks above 0 rise by 1
           freeze   incoming weights and bias of units above the rank of their place
           store    the activations at the cut of n samples of each class, at 8 bits
           redraw   the incoming weights of idle units
           long-term memory: features of n samples of each class, and which units had a path when the class was learned; classes
                    of the m episodes before get theirs anew from their stored activations, until all their units are frozen
answer     the k nearest exemplars vote; the distance to each is measured within the units of its class, at unit length

`scores` are votes, plus a part below 1 that falls with the distance to the nearest exemplar of the class: it breaks ties, and
orders classes without votes. With the task given, only exemplars of its classes vote.

Deviations: "the first n samples", which are probed and kept, are the first ones of an order drawn for each session (there: of one
order of the whole data). The batch that an epoch ends with is learned too, however small, beside as many stored activations
(there: dropped); the stream's `drop_last` leaves it out. Ties go to the nearer class (there: to the smaller label). Absent
connections are zeros in the weights, and the gradient's mask keeps them so (there: the mask is applied in each forward pass): the
same network. The optimizer starts afresh by forgetting its state. Activations of classes that are out of the window are deleted
(there: never read again). A class that comes again belongs to its newest episode; its memories are written anew. The code's
option of batch norm after the last layer, and its other quota schedules, are left out.

Measured (anchor `sharp-split-mnist`, with `drop_last`): class-IL 0.871 ± 0.011 over 8 seeds; the authors' code, run by us, 0.884 ±
0.014 over 8. Learning the last batch too costs: 0.862 over 7 seeds. Given the same weights, masks, batches and draws, both are the
same method: a whole run of five episodes of ten phases, in float64 on smaller images, ends with the same weights to 1e-14 and the
same answers but for ties, which are worth 0.002 there and nothing on Split MNIST. So what is left of the difference, 0.013 ± 0.013
with 95 % confidence, is in what is drawn, or chance. No published accuracy could be verified.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from clstream.strategies.sharp.events import ActivationsStored, PhaseStarted, UnitsFrozen
from clstream.strategies.sharp.layers import Chain, Path
from clstream.strategies.sharp.memories import LongTerm, ShortTerm, leading, quantise
from torch import Tensor, nn
from torch.optim import Adadelta

from clstream.bus import on
from clstream.events import EpochStarted, RunStarted, SessionEnded, SessionStarted
from clstream.losses import supervised_contrastive
from clstream.params import check_bool, check_choice, check_integer, check_number, check_positive, check_share
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Samples, Subset, Task

PROBE = 1024
"""Samples whose activations say which units are selected."""

PRETRAINED = 100
"""The rank of units that are frozen from the start."""

COMPARED = 2**22
"""Distances that are held at once when a test sample's neighbours are looked for."""


class SHARP(Strategy):
    """Grow a sparse path for each episode, replay activations of recent classes, and freeze older paths.

    Args:
        model: a chain of Conv2d and Linear layers, each followed by a ReLU (`clstream.strategies.sharp.layers.Chain`), such as
            MnistLike, VggSmall, Mlp, ConvNet, or an nn.Sequential of your own. Its weights are drawn anew, here; its head is not
            used.
        optimizer: makes the optimizer of each phase from the layers' parameters; without weight decay.
        cut: the module after which activations are stored, by name. None: the model's own, see `Chain`.
        window: episodes whose classes are replayed (m), 0 or more.
        sparsity: the share of connections that are left out at the start.
        temperature: of the supervised contrastive loss.
        phase_epochs: epochs of a phase. The stream says how many epochs a session has, and so how many phases.
        least_quota: what a phase's quota never falls below, in percent.
        period: of the quota's cosine, in phases.
        replay_batch: how many stored activations are replayed with each batch. None: as many as the batch holds.
        short_term: samples of each class whose activations are stored.
        long_term: exemplars of each class.
        neighbours: how many exemplars vote.
        early: what the layers below the cut start from: "new" (drawn anew and sparse, as the others are), "pretrained" (the
            model's own weights, dense) or "frozen" (the same, and they never learn).
        redraw: whether idle units' incoming weights are drawn anew when an episode ends.

    Raises:
        TypeError, ValueError: for a model that is no chain (the message names what it can't take), or options out of range.

    """

    fixed_classes = "none in the loss; classes with exemplars in an answer"
    not_state: tuple[str, ...] = ("chain", "active_path", "gradient_masks", "replayed")
    scores_are = "ranks"
    takes_controls = ("schedule", "renew_optimizer")
    takes_regularisers = False  # its loss is of representations, and its own step masks gradients
    checkpoint_modules: tuple[str, ...] = (ShortTerm.__module__,)

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adadelta, lr=1.0),
        cut: str | None = None,
        window: int = 1,
        sparsity: float = 0.6,
        temperature: float = 0.1,
        phase_epochs: int = 3,
        least_quota: float = 90.0,
        period: float = 30.0,
        replay_batch: int | None = None,
        short_term: int = 25,
        long_term: int = 25,
        neighbours: int = 5,
        early: str = "new",
        redraw: bool = True,
    ) -> None:
        super().__init__(model, optimizer)
        check_integer(0, window=window)
        check_integer(
            1, phase_epochs=phase_epochs, short_term=short_term, long_term=long_term, neighbours=neighbours,
        )  # fmt: skip
        check_integer(1, none=True, replay_batch=replay_batch)
        check_share(sparsity=sparsity)
        check_number(0, 100, least_quota=least_quota)
        check_positive(temperature=temperature, period=period)
        check_bool(redraw=redraw)
        check_choice(("new", "pretrained", "frozen"), early=early)
        self.chain = Chain(model, cut)
        for layer in self.chain.layers:
            if layer.early:
                layer.module.requires_grad_(early != "frozen")
        self.optimizer = optimizer([parameter for parameter in self.chain.parameters() if parameter.requires_grad])
        if any(group.get("weight_decay") for group in self.optimizer.param_groups):
            raise ValueError("SHARP needs an optimizer without weight decay, which would move frozen weights")
        self.window, self.temperature, self.phase_epochs = window, temperature, phase_epochs
        self.least_quota, self.period, self.replay_batch = least_quota, period, replay_batch
        self.short_capacity, self.long_capacity, self.neighbours, self.redraws = short_term, long_term, neighbours, redraw
        self.classes = getattr(self.chain.head, "classes", 0) or getattr(self.chain.head, "out_features", 0)
        self.episode = 0
        self.order = torch.empty(0, dtype=torch.int64)  # of the session's samples: the first ones are probed and kept
        self.short_term: ShortTerm | None = None
        self.long_term: LongTerm | None = None
        self.full: list[str] = []  # layers that are known to have no idle units left
        self.random = torch.Generator()
        self.active_path: Path | None = None  # of the units that are not idle, made when it is needed
        self.gradient_masks: list[Tensor] | None = None  # which weights may move, made when it is needed
        self.replayed: Tensor | None = None  # the stored activations as floats, made when they are needed
        self.masks: list[Tensor] = []  # (units, inputs), bool: which connections there are
        self.ranks: list[Tensor] = []  # (units,), int64
        self.frozen: list[Tensor] = []  # (units,), bool
        for number, layer in enumerate(self.chain.layers):
            pretrained = layer.early and early != "new"
            weight = layer.module.weight
            if not pretrained:
                nn.init.kaiming_normal_(weight)
                if layer.module.bias is not None:
                    nn.init.zeros_(layer.module.bias)
            dense = pretrained or (number == 0 and isinstance(layer.module, nn.Conv2d))
            shape = layer.units, layer.inputs
            self.masks.append(torch.ones(shape, dtype=torch.bool) if dense else torch.rand(shape) >= sparsity)
            self.ranks.append(torch.full(shape[:1], PRETRAINED if layer.early and early == "frozen" else 0))
            self.frozen.append(self.ranks[-1] > 0)
            with torch.no_grad():
                weight *= _like(self.masks[-1].to(weight.device), weight)

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Read the number of classes, and move masks and ranks of the units to the device of the weights."""
        self.classes = max(self.classes, event.stream.classes)
        for tensors in (self.masks, self.ranks, self.frozen):
            tensors[:] = [tensor.to(layer.module.weight.device) for tensor, layer in zip(tensors, self.chain.layers, strict=True)]
        self.clear_caches()

    @on(SessionStarted)
    def begin_episode(self, event: SessionStarted) -> None:
        """Count the episode, and draw the order in which samples of this session are looked at."""
        self.episode += 1
        self.order = torch.randperm(len(event.session.samples), generator=self.random)

    def clear_caches(self) -> None:
        """Drop what is derived from units and memories: they have changed."""
        self.active_path = self.gradient_masks = self.replayed = None

    # a phase

    @on(EpochStarted)
    def begin_phase(self, event: EpochStarted) -> None:
        """Every `phase_epochs` epochs: select units by their activity, rewire, and start with a fresh optimizer."""
        if event.epoch.index % self.phase_epochs:
            return
        phase = 1 + event.epoch.index // self.phase_epochs
        self.select_units(self.chain.activity(self.gather(event.epoch.session.samples, self.order[:PROBE]).x), self.quota(phase))
        self.rewire()
        self.optimizer.state.clear()
        self.emit(PhaseStarted(self.episode, phase, self.quota(phase), self.count_units()))

    def quota(self, phase: int) -> float:
        """Return how much of a layer's activity its selected units must have, in percent."""
        return max(50 * (1 + math.cos(math.pi * max(phase, 2) / self.period)), self.least_quota)

    def select_units(self, activity: list[Tensor], quota: float) -> None:
        """Give rank 1 to candidates among the most active units of each layer, and rank 0 to the others."""
        for sums, ranks in zip(activity, self.ranks, strict=True):
            candidate, chosen = ranks <= 1, most_active(sums, quota)
            ranks[candidate] = chosen[candidate].to(ranks.dtype)

    @torch.no_grad()
    def rewire(self) -> None:
        """Drop the connections from idle units to others, and grow as many into idle units."""
        for number, layer in enumerate(self.chain.layers):
            if not number:
                continue  # inputs are never idle
            mask, idle = self.masks[number], self.ranks[number] == 0
            before = (self.ranks[number - 1] == 0).repeat_interleave(layer.span)
            dropped = mask & before & ~idle[:, None]
            mask &= ~dropped
            absent = (~mask & idle[:, None]).flatten().nonzero().flatten()
            chosen = torch.randperm(len(absent), generator=self.random)[: int(dropped.sum())]
            mask.view(-1)[absent[chosen.to(absent.device)]] = True  # the weights there are zero since they were absent
            layer.module.weight *= _like(mask, layer.module.weight)
        self.clear_caches()

    # a batch

    def loss(self, samples: Samples) -> Tensor:
        """Return the supervised contrastive loss of a batch and the stored activations drawn for it.

        A sample whose class comes once in the batch is left out.
        """
        if self.active_path is None:
            self.active_path = self.chain.path([ranks.nonzero().flatten() for ranks in self.ranks])
        activations = self.chain.below(samples.x if self.augment is None else self.augment(samples.x), self.active_path)
        y = samples.y
        counted = (y[:, None] == y).sum(1) > 1
        if self.short_term is not None:
            past, labels = self.draw_activations(self.short_term, self.replay_batch or len(samples), self.active_path)
            activations, y = torch.cat([activations, past]), torch.cat([y, labels])
            counted = torch.cat([counted, counted.new_ones(len(labels))])
        return supervised_contrastive(self.chain.above(activations, self.active_path), y, self.temperature, counted)

    def features(self, activations: Tensor) -> Tensor:
        """Map activations at the cut to the last layer's: (n, width), those of idle units zero."""
        return self.chain.above(activations) * (self.ranks[-1] > 0)

    def draw_activations(self, short: ShortTerm, n: int, path: Path) -> tuple[Tensor, Tensor]:
        """Return n stored activations and their labels, as even over classes as can be; none twice if a class has enough."""
        classes, capacity = short.codes.shape[:2]
        count = short.count[:, None]
        share = n // classes + (torch.arange(classes) < n % classes).long()[:, None]
        most = int(share[0])
        rows = (torch.rand(classes, most, generator=self.random) * count).long()
        if most <= capacity:
            keys = torch.rand(classes, capacity, generator=self.random).masked_fill_(torch.arange(capacity) >= count, 2)
            rows = torch.where(share <= count, keys.argsort(1)[:, :most], rows)
        chosen = torch.arange(most) < share
        indices = (rows + capacity * torch.arange(classes)[:, None])[chosen]
        if self.replayed is None:
            self.replayed = self.chain.along(short.activations().flatten(0, 1), path)
        device = self.replayed.device
        labels = short.labels[chosen.nonzero()[:, 0]]
        return self.replayed.index_select(0, indices.to(device)), labels.to(device)

    def learn(self, batch: Batch) -> Tensor:
        """Take one step; weights that are frozen, or absent, get no gradient."""
        loss = self.loss(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        self.mask_gradients()
        self.optimizer.step()
        return loss.detach()

    def mask_gradients(self) -> None:
        """Zero the gradients of frozen units' weights and biases, and of absent connections."""
        if self.gradient_masks is None:
            self.gradient_masks = []
            for layer, mask, frozen in zip(self.chain.layers, self.masks, self.frozen, strict=True):
                weight, bias = layer.module.weight, layer.module.bias
                if weight.requires_grad:
                    free = _like(mask & ~frozen[:, None], weight).to(weight.dtype)
                    self.gradient_masks.append(free.expand_as(weight).contiguous())
                    self.gradient_masks += [] if bias is None else [(~frozen).to(bias.dtype)]
        gradients = [parameter.grad for parameter in self.chain.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, self.gradient_masks)

    # the end of an episode

    @on(SessionEnded)
    @torch.no_grad()
    def consolidate(self, event: SessionEnded) -> None:
        """Promote, freeze, store activations, redraw idle units, and write the long-term memory: in this order."""
        for layer, ranks, frozen in zip(self.chain.layers, self.ranks, self.frozen, strict=True):
            ranks += ranks > 0
            frozen |= ranks > (1 if layer.early else 1 + self.window)
        samples = event.session.samples
        labels, rows, count = leading(samples.y.cpu(), self.order, max(self.short_capacity, self.long_capacity))
        episodes = torch.full_like(labels, self.episode)
        self.store_activations(samples, labels, episodes, rows, count)
        if self.redraws:
            self.redraw_idle()
        self.store_exemplars(samples, labels, episodes, rows, count)
        recent = None if self.short_term is None else self.short_term.where(self.short_term.episodes > self.episode - self.window)
        self.short_term = recent if recent is not None and len(recent.labels) else None
        self.clear_caches()
        self.emit(UnitsFrozen(self.episode, self.count_units()))
        sizes = [0 if memory is None else memory.bytes for memory in (self.short_term, self.long_term)]
        self.emit(ActivationsStored(self.episode, tuple(labels.tolist()), *sizes))
        self.warn_if_full()

    def store_activations(self, samples: Samples | Subset, labels: Tensor, episodes: Tensor, rows: Tensor, count: Tensor) -> None:
        """Write the short-term memory: the activations at the cut of the first samples of each class."""
        if not self.window:
            return
        rows = rows[:, : self.short_capacity]
        activations = self.chain.below(self.gather(samples, rows.flatten()).x)
        codes, least, greatest = quantise(activations.reshape(*rows.shape, *activations.shape[1:]))
        new = ShortTerm(labels, episodes, count.clamp(max=self.short_capacity), codes, least, greatest)
        self.short_term = new if self.short_term is None else self.short_term.updated(new)

    def redraw_idle(self) -> None:
        """Draw the incoming weights of idle units anew, with a spread that grows as these get fewer; their biases become 0."""
        for layer, mask, ranks in zip(self.chain.layers, self.masks, self.ranks, strict=True):
            idle = (ranks == 0).nonzero().flatten()
            if len(idle):
                weight, bias = layer.module.weight, layer.module.bias
                std = math.sqrt(2 / (len(idle) * layer.kernel))
                drawn = torch.randn((len(idle), *weight.shape[1:]), generator=self.random).to(weight) * std
                weight[idle] = drawn * _like(mask[idle], weight)
                if bias is not None:
                    bias[idle] = 0

    def store_exemplars(self, samples: Samples | Subset, labels: Tensor, episodes: Tensor, rows: Tensor, count: Tensor) -> None:
        """Write the long-term memory: exemplars of this episode's classes from their samples, of those before from activations."""
        rows, ranks = rows[:, : self.long_capacity], self.ranks[-1]
        features = self.features(self.chain.below(self.gather(samples, rows.flatten()).x))
        units = (ranks >= 2).expand(len(labels), -1)
        new = LongTerm(labels, episodes, count.clamp(max=self.long_capacity), features.view(*rows.shape, -1), units)
        past = None if self.short_term is None else self.short_term.where(self.short_term.episodes < self.episode)
        if past is not None and len(past.labels):
            stored, device = past.activations(), ranks.device
            chosen = torch.arange(self.long_capacity).expand(len(past.labels), -1)
            drawn = (torch.rand(chosen.shape, generator=self.random) * past.count[:, None]).long()
            chosen = torch.where((past.count < self.long_capacity)[:, None], drawn, chosen)
            replayed = stored[torch.arange(len(stored))[:, None].to(device), chosen.to(device)]
            features = self.features(replayed.flatten(0, 1)).view(*chosen.shape, -1)
            age = (self.episode - 1 - past.episodes).to(device)
            units = ranks >= 3 + age[:, None]
            count = torch.full_like(past.count, self.long_capacity)
            new = new.updated(LongTerm(past.labels, past.episodes, count, features, units))
        self.long_term = new if self.long_term is None else self.long_term.updated(new)

    def gather(self, samples: Samples | Subset, rows: Tensor) -> Samples:
        """Return samples of the session by row, on the device of the weights."""
        source = samples.source if isinstance(samples, Subset) else samples
        return samples[rows.to(source.y.device)].to(self.ranks[-1].device)

    def warn_if_full(self) -> None:
        """Warn, once for each layer, that it has no idle units left."""
        for layer, ranks in zip(self.chain.layers, self.ranks, strict=True):
            if layer.name not in self.full and not bool((ranks == 0).any()):
                self.full.append(layer.name)
                if int(ranks.max()) < PRETRAINED:
                    warnings.warn(
                        f"SHARP: after episode {self.episode}, layer {layer.name} has no idle units left: nothing is recruited "
                        "there from now on; a wider layer or a smaller least_quota lasts longer",
                        RuntimeWarning,
                        stacklevel=2,
                    )

    def count_units(self) -> dict[str, dict[str, int]]:
        """Return how many units of each layer are idle, learning, fine-tuning and frozen."""
        units = {}
        for layer, ranks, frozen in zip(self.chain.layers, self.ranks, self.frozen, strict=True):
            tuning = (ranks > 1) & ~frozen
            counts = torch.stack([(ranks == 0).sum(), (ranks == 1).sum(), tuning.sum(), frozen.sum()]).tolist()
            units[layer.name] = dict(zip(("idle", "learning", "fine_tuning", "frozen"), counts, strict=True))
        return units

    # answers

    @torch.no_grad()
    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): the votes of the nearest exemplars, and below 1 how near the class is; -1 for an unknown class.

        With a task given, only exemplars of its classes vote.
        """
        features = self.features(self.chain.below(x))
        scores = features.new_full((len(x), self.classes), -1.0)
        memory = self.long_term
        if memory is not None and task is not None:
            memory = memory.where(torch.isin(memory.labels, torch.tensor(task.classes)))
        if memory is None or not len(memory.labels):
            return scores
        classes, n = memory.exemplars.shape[:2]
        unit = nn.functional.normalize(memory.exemplars * memory.units[:, None], dim=2)
        absent = (torch.arange(n) >= memory.count[:, None]).to(x.device)
        votes = min(self.neighbours, int(memory.count.sum()))
        labels = memory.labels.to(x.device)
        for start in range(0, len(x), max(1, COMPARED // (classes * n))):
            rows = slice(start, start + max(1, COMPARED // (classes * n)))
            distances = distances_to_exemplars(features[rows], unit, memory.units).masked_fill(absent, float("inf"))
            nearest = distances.flatten(1).topk(votes, largest=False).indices // n
            near = 0.5 * (1 - distances.amin(2).sqrt() / 2)  # distances are 0 to 2
            scores[rows, labels] = near.scatter_add(1, nearest, torch.ones_like(nearest, dtype=near.dtype))
        return scores


def distances_to_exemplars(features: Tensor, unit: Tensor, units: Tensor) -> Tensor:
    """Return (samples, classes, n): the squared distance of each sample to each exemplar, within the units of its class.

    Args:
        features: (samples, width).
        unit: (classes, n, width): exemplars at unit length within their class's units, zero elsewhere.
        units: (classes, width), bool.

    A row that is zero within the units stays zero: its distance is 1 to every exemplar that is not.

    """
    classes, n, width = unit.shape
    lengths = (features.square() @ units.to(features.dtype).T).sqrt()  # (samples, classes)
    inner = (features @ unit.view(-1, width).T).view(-1, classes, n) / lengths.clamp(min=1e-12)[:, :, None]
    return ((lengths > 0).to(inner.dtype)[:, :, None] + unit.square().sum(2) - 2 * inner).clamp(min=0)


def most_active(sums: Tensor, quota: float) -> Tensor:
    """Return (units,), bool: the fewest units, the most active first, that have `quota` percent of the sums; one at least."""
    ordered, order = sums.sort(descending=True, stable=True)
    reached = ordered.cumsum(0)
    number = int((reached < quota / 100 * reached[-1]).sum()) + 1
    chosen = torch.zeros_like(sums, dtype=torch.bool)
    chosen[order[:number]] = True
    return chosen


def _like(mask: Tensor, weight: Tensor) -> Tensor:
    """Return a (units, inputs) mask with the dimensions of a weight."""
    return mask.view(*mask.shape, *(1,) * (weight.dim() - 2))
