"""Memories of past samples, kept raw in preallocated tensors.

Each takes whole batches of one kind of targets, keeps a sample's input, target and extra fields together, and draws from a
generator of its own, which a run seeds. Which samples are kept is decided on the CPU, so it is the same on every device.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush
from operator import index

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.params import check_integer
from clstream.stream import Samples, sent

OFFERS = ("first_epoch", "every_epoch")
"""When a strategy offers what it learns to its memory: in the first pass over a session only, or in each."""

Ints = npt.NDArray[np.int64]
Kind = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def offered(offer: str, epoch: int) -> bool:
    """Return whether a batch of a pass (counted from 0) is offered: `offer` is one of OFFERS."""
    return epoch == 0 or offer == "every_epoch"


class Memory:
    """What all memories share: storage that is allocated at the first `add`, and uniform draws from it.

    Args:
        capacity: the most samples that are kept, at least 1.

    """

    def __init__(self, capacity: int) -> None:
        check_integer(1, capacity=capacity)
        self.capacity = index(capacity)
        self.seen = 0
        self.size = 0
        self.kept: Samples | None = None
        self._kind: Kind = {}
        # from torch's global generator: one that is made in the middle of a run follows the run's seed too
        self.random = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def __len__(self) -> int:
        """Return how many samples are kept now."""
        return self.size

    def add(self, samples: Samples) -> None:
        """Offer a batch."""
        raise TypeError(f"{type(self).__name__} is not a memory by itself: use Reservoir, ClassBalanced, GreedyBalanced or Ring")

    def sample(self, n: int, repeats: bool = True) -> Samples:
        """Draw `n` kept samples uniformly, on the device where they are kept; without `repeats`, all of them at most.

        Raises ValueError if nothing is kept.
        """
        kept = self._filled()
        if repeats:
            index = torch.randint(self.size, (n,), generator=self.random)
        else:
            index = torch.randperm(self.size, generator=self.random)[:n]
        return kept[sent(index, kept.y.device)]

    def all(self) -> Samples:
        """Return every kept sample, as a view of the storage: what is added later may change it. ValueError if there are none."""
        return self._filled()[: self.size]

    def widen(self, name: str, columns: int, fill: float) -> None:
        """Give an extra field of (n, columns) more columns, filled with a number for the samples that are kept."""
        if self.kept is None or name not in self.kept.extra or self.kept.extra[name].dim() != 2:
            return
        rows = self.kept.extra[name]
        more = F.pad(rows, (0, max(0, columns - rows.shape[1])))
        more[: self.size, rows.shape[1] :] = fill
        self.kept = replace(self.kept, extra={**self.kept.extra, name: more})
        self._kind[name] = (more.dtype, tuple(more.shape[1:]))

    def _filled(self) -> Samples:
        if self.kept is None or not self.size:
            raise ValueError("this memory is empty: add samples before drawing from it")
        return self.kept

    def _prepare(self, samples: Samples) -> None:
        """Allocate the storage for samples like these, or refuse samples unlike those kept, before anything changes."""
        if self.kept is None:

            def storage(rows: Tensor) -> Tensor:
                return rows.new_zeros((self.capacity, *rows.shape[1:]))

            extra = {name: storage(rows) for name, rows in samples.extra.items()}
            self.kept = Samples(storage(samples.x), storage(samples.y), extra, samples.target)
            self._kind = _kind(samples)
        elif samples.target != self.kept.target:
            raise ValueError(f"this memory keeps samples with {self.kept.target} targets, not with {samples.target} targets")
        elif _kind(samples) != self._kind:
            raise ValueError(f"this memory keeps {_shown(self._kind)}, not {_shown(_kind(samples))}")

    def _write(self, samples: Samples, slots: Ints, rows: Ints) -> None:
        """Put `samples[rows]` into `slots`; no slot may come twice, or inputs and labels could be mispaired."""
        kept = self.kept
        assert kept is not None
        device = kept.y.device
        if device.type == "cpu":
            where, which = torch.from_numpy(slots), torch.from_numpy(rows)
        else:  # sent together: sending takes longer than what is sent
            where, which = sent(torch.from_numpy(np.stack((slots, rows))), device).unbind()
        kept.x.index_copy_(0, where, samples.x.detach().index_select(0, which))
        kept.y.index_copy_(0, where, samples.y.index_select(0, which))
        for name, values in samples.extra.items():
            kept.extra[name].index_copy_(0, where, values.detach().index_select(0, which))

    def _uniform(self, n: int) -> npt.NDArray[np.float64]:
        return torch.rand(n, generator=self.random, dtype=torch.float64).numpy()


def _kind(samples: Samples) -> Kind:
    """Return dtype and shape of a row of each tensor."""
    return {
        name: (rows.dtype, tuple(rows.shape[1:])) for name, rows in (("x", samples.x), ("y", samples.y), *samples.extra.items())
    }


def _shown(kind: Kind) -> str:
    return ", ".join(f"{name} {shape} of {dtype}" for name, (dtype, shape) in kind.items())


class Reservoir(Memory):
    """A uniform sample of everything offered so far, of at most `capacity` samples (Vitter 1985, algorithm R).

    The n-th sample offered takes the slot floor(u n) if that is a slot, u uniform in [0, 1). Where two samples of one batch
    want one slot, the later one gets it, as if they had come one by one.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._taker = np.zeros(capacity, dtype=np.int64)  # scratch: the last row of a batch that wants each slot

    def add(self, samples: Samples) -> None:
        """Offer a batch; each of its samples is kept with probability capacity / offered so far."""
        self._prepare(samples)
        n = len(samples)
        order = np.arange(self.seen, self.seen + n)
        slot = (self._uniform(n) * (order + 1)).astype(np.int64)
        if self.seen < self.capacity:
            slot = np.where(order < self.capacity, order, slot)
        rows = np.flatnonzero(slot < self.capacity)
        self.seen += n
        self.size = min(self.seen, self.capacity)
        if not len(rows):
            return
        slot = slot[rows]
        self._taker[slot] = rows  # numpy assigns in order: the last one stays
        last = self._taker[slot] == rows
        self._write(samples, slot[last], rows[last])


class ClassBalanced(Memory):
    """A uniform sample of each class offered so far, the classes' shares as equal as their numbers allow.

    Every sample gets a random key; a class keeps those with its smallest keys. The shares are the fair ones: no class has
    more than another unless that one has offered no more, and all of the capacity is used. With multi-label targets each set of
    labels that comes together, the empty one too, counts as a class of its own; values have none, and are refused.

    Args:
        capacity: the most samples that are kept, at least 1.
        per_class: the most samples of one class; None for no such limit.

    """

    not_state = ("_heaps",)

    _heaps: tuple[npt.NDArray[np.float64], dict[int, list[list[float]]]] | None = None
    """The heaps of the classes, and the keys that they are of: made anew where they are not there, as after a resumption."""

    def __init__(self, capacity: int, per_class: int | None = None) -> None:
        super().__init__(capacity)
        check_integer(1, none=True, per_class=per_class)
        self.per_class = per_class
        self._keys = np.full(capacity, np.inf)
        self._labels = np.full(capacity, -1, dtype=np.int64)
        self._offered: dict[int, int] = {}
        self._label_sets: dict[str, int] = {}  # of multi-label targets: the number that stands for each set of labels

    def add(self, samples: Samples) -> None:
        """Offer a batch; each class keeps a uniform sample of what it was offered. Raises ValueError for values."""
        if samples.target == "value":
            raise ValueError("a ClassBalanced memory has shares of classes, and values have none: use a Reservoir")
        self._prepare(samples)
        labels: Ints = samples.y.cpu().numpy() if samples.target == "label" else self._number_label_sets(samples.y)
        new, counts = np.unique(labels, return_counts=True)
        for label, count in zip(new.tolist(), counts.tolist(), strict=True):
            self._offered[label] = self._offered.get(label, 0) + count
        self.seen += len(labels)
        heaps, keys = self._heaps_by_label(), self._uniform(len(labels))
        offered: list[list[float]] = [[-key, -1 - row] for row, key in enumerate(keys.tolist())]
        for label, entry in zip(labels.tolist(), offered, strict=True):
            heappush(heaps.setdefault(label, []), entry)
        freed, refused = list[int](), set[int]()
        for label, share in self.shares().items():
            heap = heaps.get(label, [])
            while len(heap) > share:
                place = int(heappop(heap)[1])
                if place < 0:
                    refused.add(-1 - place)
                else:
                    freed.append(place)
        rows = np.array([row for row in range(len(labels)) if row not in refused], dtype=np.int64)
        slots = np.r_[np.sort(np.array(freed, dtype=np.int64)), np.arange(self.size, self.capacity)][: len(rows)]
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            offered[row][1] = slot
        self._labels[slots], self._keys[slots] = labels[rows], keys[rows]
        self.size += len(rows) - len(freed)
        self._write(samples, slots, rows)

    def enlarge(self, capacity: int) -> None:
        """Make room for more samples; those that are kept stay. A smaller capacity changes nothing."""
        more = capacity - self.capacity
        if more <= 0:
            return

        def longer(rows: Tensor) -> Tensor:
            return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])

        self.capacity = capacity
        self._keys, self._labels = np.r_[self._keys, np.full(more, np.inf)], np.r_[self._labels, np.full(more, -1)]
        if self.kept is not None:
            extra = {name: longer(rows) for name, rows in self.kept.extra.items()}
            self.kept = Samples(longer(self.kept.x), longer(self.kept.y), extra, self.kept.target)

    def _heaps_by_label(self) -> dict[int, list[list[float]]]:
        """Return for each class a heap of [-key, slot], its greatest key first; it is made anew for keys that were restored."""
        if self._heaps is None or self._heaps[0] is not self._keys:
            heaps: dict[int, list[list[float]]] = {}
            for slot, (label, key) in enumerate(zip(self._labels[: self.size].tolist(), self._keys.tolist(), strict=False)):
                heaps.setdefault(label, []).append([-key, slot])
            for heap in heaps.values():
                heapify(heap)
            self._heaps = self._keys, heaps
        return self._heaps[1]

    def _number_label_sets(self, y: Tensor) -> Ints:
        """Return (n,), the number that stands for the set of labels of each of (n, classes) multi-label targets."""
        rows, inverse = np.unique(np.packbits(y.cpu().numpy() > 0, axis=1), axis=0, return_inverse=True)
        names = [row.tobytes().hex() for row in rows]
        numbers = [self._label_sets.setdefault(name, len(self._label_sets)) for name in names]
        return np.array(numbers, dtype=np.int64)[inverse.reshape(-1)]

    def shares(self) -> dict[int, int]:
        """Return how many samples each class may keep: an even level, or all it was offered, and what is left one by one.

        What is left over goes to the classes that came first. So no share ever grows once a sample of its class was dropped,
        and what a class keeps stays uniform.
        """
        most = self.capacity if self.per_class is None else self.per_class
        wanted = {label: min(offered, most) for label, offered in self._offered.items()}
        level, left, open_classes = 0, self.capacity, sorted(wanted.values())
        for position, offered in enumerate(open_classes):
            step = min(offered - level, left // (len(open_classes) - position))
            level, left = level + step, left - step * (len(open_classes) - position)
            if level < offered:
                break
        shares = {label: min(offered, level) for label, offered in wanted.items()}
        for label in [label for label, offered in wanted.items() if offered > level][:left]:
            shares[label] += 1
        return shares


class GreedyBalanced(Memory):
    """The first samples of each class, as many of each as can be (the greedy balancing sampler of Prabhu et al. 2020).

    A sample is kept if its class is new, or has less than capacity / classes so far, rounded down: with a broken number the memory
    would never settle. If it is full, one of the class that has the most makes room, drawn uniformly; of several such classes one
    of that which came first. For labels; where samples have the number of their task, a label of each task is a class of its own.

    Args:
        capacity: the most samples that are kept, at least 1.

    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._slots: dict[int, list[int]] = {}  # of each class, in the order in which they came

    def add(self, samples: Samples) -> None:
        """Offer a batch, sample by sample. Raises ValueError for targets other than labels."""
        if samples.target != "label":
            raise ValueError(f"a GreedyBalanced memory has shares of classes: it takes labels, not {samples.target} targets")
        self._prepare(samples)
        labels: Ints = samples.y.cpu().numpy()
        if "task" in samples.extra:
            labels = labels + (samples.extra["task"].cpu().numpy() << 32)
        self.seen += len(labels)
        full = [label for label, slots in self._slots.items() if len(slots) >= self.capacity // len(self._slots)]
        taken: dict[int, int] = {}  # slots and the rows that they get
        for row in np.flatnonzero(~np.isin(labels, full)).tolist():  # those that are full stay so
            new = int(labels[row]) not in self._slots
            slots = self._slots.setdefault(int(labels[row]), [])
            if not new and len(slots) >= self.capacity // len(self._slots):
                continue
            if self.size < self.capacity:
                slot, self.size = self.size, self.size + 1
            else:
                most = max(self._slots.values(), key=len)
                slot = most.pop(int(torch.randint(len(most), (), generator=self.random)))
            slots.append(slot)
            taken[slot] = row
        self._write(samples, np.array([*taken], dtype=np.int64), np.array([*taken.values()], dtype=np.int64))


class Ring(Memory):
    """The newest samples: one first-in, first-out ring, or one for each class (Chaudhry et al. 2019).

    Args:
        capacity: the most samples that are kept, at least 1.
        classes: None for one ring of all samples; else the number of classes, each with a ring of capacity // classes; for labels.

    """

    def __init__(self, capacity: int, classes: int | None = None) -> None:
        super().__init__(capacity)
        check_integer(1, none=True, classes=classes)
        if classes is not None and classes > capacity:
            raise ValueError(f"a capacity of {capacity} can't be shared by {classes} classes: each needs a place")
        self.classes = classes
        self._slots = np.full((classes or 1, capacity // (classes or 1)), -1, dtype=np.int64)  # of each place in each ring
        self._offered = np.zeros(classes or 1, dtype=np.int64)

    def add(self, samples: Samples) -> None:
        """Keep a batch, in place of the oldest samples (of each class).

        Raises ValueError for labels that have no ring, and with `classes` for other targets than labels.
        """
        if self.classes and samples.target != "label":
            raise ValueError(f"a Ring of {self.classes} classes takes labels, not {samples.target} targets: leave out `classes`")
        self._prepare(samples)
        room = self._slots.shape[1]
        ring = samples.y.cpu().numpy() if self.classes else np.zeros(len(samples), dtype=np.int64)
        if len(ring) and not 0 <= ring.min() <= ring.max() < len(self._slots):
            raise ValueError(f"labels must be 0 to {len(self._slots) - 1} for a Ring of {self.classes} classes")
        order = np.argsort(ring, kind="stable")
        count = np.bincount(ring, minlength=len(self._slots))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        rows = np.flatnonzero(rank >= count[ring] - room)  # of more than fit, the newest
        place = (self._offered[ring] + rank)[rows] % room
        empty = np.flatnonzero(self._slots[ring[rows], place] < 0)
        self._slots[ring[rows][empty], place[empty]] = np.arange(self.size, self.size + len(empty))
        self.size += len(empty)
        self._offered += count
        self.seen += len(ring)
        self._write(samples, self._slots[ring[rows], place], rows)
