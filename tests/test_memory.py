"""Memories: what they keep, that it stays together, and that it is the sample it should be."""

import copy
from collections import Counter, defaultdict, deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clstream.attributes import attributes
from clstream.memory import ClassBalanced, GreedyBalanced, Memory, Reservoir, Ring
from clstream.stream import Samples

CLASSES = 4
KINDS = {
    "reservoir": Reservoir,
    "class_balanced": ClassBalanced,
    "greedy": GreedyBalanced,
    "ring": Ring,
    "class_ring": lambda capacity: Ring(capacity, min(CLASSES, capacity)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def encode(labels, first=0, dtype=torch.uint8):
    """Return samples with number and label written into x and into both extra fields."""
    y = torch.tensor(labels, dtype=torch.int64)
    number = torch.arange(first, first + len(y))
    x = torch.stack([number // 256, number % 256, y], 1).to(dtype)
    return Samples(x, y, {"number": number, "logits": torch.stack([number, y], 1).float()})


def numbers(samples):
    """Return the numbers of samples from `encode`; fail if x, y and the extra fields don't belong together."""
    high, low, label = samples.x.long().unbind(1)
    found = high * 256 + low
    assert torch.equal(label, samples.y)
    assert torch.equal(found, samples.extra["number"])
    assert torch.equal(samples.extra["logits"], torch.stack([found, samples.y], 1).float())
    return found.tolist()


def kept(memory):
    return numbers(memory.all()) if len(memory) else []


def feed(memory, batches):
    """Add batches of labels, and return all of them."""
    offered = []
    for labels in batches:
        memory.add(encode(labels, len(offered)))
        offered += labels
    return offered


def seeded(memory, seed):
    memory.random.manual_seed(seed)
    return memory


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


BATCHES = st.lists(st.lists(st.integers(0, CLASSES - 1), max_size=12), max_size=12)
CAPACITIES = st.integers(1, 20)
SEEDS = st.integers(0, 2**32)


# All of them -------------------------------------------------------------------------------------------------------------


@every_kind
@given(BATCHES, CAPACITIES, SEEDS, st.sampled_from([torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64]))
def test_invariants(kind, batches, capacity, seed, dtype):
    memory = seeded(KINDS[kind](capacity), seed)
    classes = getattr(memory, "classes", None) or CLASSES  # a ring for each class needs a place for each
    offered = 0
    for labels in batches:
        memory.add(encode([label % classes for label in labels], offered, dtype))
        offered += len(labels)
        assert memory.seen == offered
        held = kept(memory)
        assert len(held) == len(memory) <= min(capacity, offered)
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(offered))
        if held:
            assert memory.all().x.dtype == dtype
            drawn = memory.sample(2 * capacity)
            assert len(drawn) == 2 * capacity
            assert drawn.x.dtype == dtype
            assert set(numbers(drawn)) <= set(held)


@pytest.mark.parametrize("kind", ["reservoir", "class_balanced", "ring"])
@given(BATCHES, CAPACITIES, SEEDS)
def test_all_is_kept_until_the_memory_is_full_and_then_it_stays_full(kind, batches, capacity, seed):
    memory = seeded(KINDS[kind](capacity), seed)
    offered = feed(memory, batches)
    assert len(memory) == min(capacity, len(offered))
    if len(offered) <= capacity:
        assert sorted(kept(memory)) == list(range(len(offered)))


@every_kind
def test_a_batch_larger_than_the_memory(kind):
    memory = KINDS[kind](8)
    memory.add(encode(list(range(CLASSES)) * 25))
    assert len(set(kept(memory))) == 8


@every_kind
def test_draws_are_uniform_with_repeats(kind):
    memory = seeded(KINDS[kind](8), 5)
    memory.add(encode(list(range(CLASSES)) * 5))
    counts = Counter(numbers(memory.sample(8000)))
    assert set(counts) == set(kept(memory))
    assert chi_square(counts.values(), 1000) < 24.3  # 7 degrees of freedom, p = 0.001


@every_kind
def test_what_is_kept_and_drawn_depends_on_nothing_but_the_generator(kind):
    def draw(seed):
        torch.manual_seed(draws[-1] if draws else 7)  # the global generator has no say
        memory = seeded(KINDS[kind](6), seed)
        feed(memory, [list(range(CLASSES)) * 3] * 3)
        return numbers(memory.sample(30))

    draws = []
    draws.extend(draw(1))
    assert draw(1) == draws
    assert draw(2) != draws


@every_kind
def test_what_was_drawn_does_not_change_later(kind):
    memory = KINDS[kind](4)
    memory.add(encode([0, 1, 2, 3]))
    drawn = memory.sample(6)
    before = numbers(drawn)
    for _ in range(5):
        memory.add(encode([0, 1, 2, 3] * 4, 100))
    assert numbers(drawn) == before


@every_kind
@pytest.mark.parametrize("capacity", [0, -1, 2.0, None])
def test_a_capacity_is_a_whole_number_of_at_least_one(kind, capacity):
    make = Ring if kind == "class_ring" else KINDS[kind]
    with pytest.raises(ValueError, match="capacity must be a whole number of at least 1"):
        make(capacity)


@every_kind
def test_an_empty_memory_has_nothing_to_draw(kind):
    memory = KINDS[kind](4)
    for draw in (lambda: memory.sample(1), memory.all):
        with pytest.raises(ValueError, match="this memory is empty"):
            draw()
    memory.add(encode([]))
    with pytest.raises(ValueError, match="this memory is empty"):
        memory.sample(1)


UNLIKE = {
    "width": lambda s: Samples(s.x[:, :2], s.y, s.extra),
    "dtype": lambda s: Samples(s.x.float(), s.y, s.extra),
    "no extra": lambda s: Samples(s.x, s.y),
    "more extra": lambda s: Samples(s.x, s.y, {**s.extra, "task": s.y}),
    "width of extra": lambda s: Samples(s.x, s.y, {**s.extra, "logits": s.extra["logits"][:, :1]}),
    "dtype of extra": lambda s: Samples(s.x, s.y, {**s.extra, "logits": s.extra["logits"].double()}),
}


@every_kind
@pytest.mark.parametrize("what", UNLIKE)
def test_samples_unlike_those_kept_are_refused(kind, what):
    memory = KINDS[kind](8)
    memory.add(encode([0, 1]))
    with pytest.raises(ValueError, match="this memory keeps"):
        memory.add(UNLIKE[what](encode([2, 3, 0, 1], 2)))


@every_kind
@pytest.mark.parametrize("what", UNLIKE)
def test_a_refused_batch_leaves_the_memory_as_it_was(kind, what):
    memory = KINDS[kind](8)
    memory.add(encode([0, 1]))
    with pytest.raises((ValueError, RuntimeError)):
        memory.add(UNLIKE[what](encode([2, 3, 0, 1], 2)))
    assert (len(memory), memory.seen) == (2, 2)
    memory.add(encode([2, 3], 2))
    assert sorted(kept(memory)) == [0, 1, 2, 3]


@every_kind
@pytest.mark.parametrize("field", ["x", "logits"])
def test_what_is_kept_carries_no_gradient(kind, field):
    memory = KINDS[kind](4)
    tracked = torch.ones(4, 2, requires_grad=True) * 2
    plain = torch.ones(4, 2)
    memory.add(Samples(tracked if field == "x" else plain, torch.arange(4), {"logits": tracked if field == "logits" else plain}))
    drawn = memory.sample(2)
    assert not (drawn.x if field == "x" else drawn.extra["logits"]).requires_grad


def test_memory_alone_keeps_nothing():
    with pytest.raises(TypeError, match="use Reservoir, ClassBalanced, GreedyBalanced or Ring"):
        Memory(3).add(encode([0]))


@every_kind
@given(BATCHES, CAPACITIES, SEEDS)
def test_no_slot_is_written_twice_at_once(kind, batches, capacity, seed):
    memory = seeded(KINDS[kind](capacity), seed)
    write = memory._write  # on CUDA, two writes to one slot may put the input of one beside the label of the other

    def checked(samples, slots, rows):
        assert len(slots) == len(rows) == len(set(slots.tolist()))
        assert all(0 <= slot < capacity for slot in slots.tolist())
        write(samples, slots, rows)

    memory._write = checked
    classes = getattr(memory, "classes", None) or CLASSES
    feed(memory, [[label % classes for label in labels] for labels in batches])


# Reservoir ---------------------------------------------------------------------------------------------------------------


@given(BATCHES, CAPACITIES, SEEDS)
def test_reservoir_equals_algorithm_r_one_by_one(batches, capacity, seed):
    memory = seeded(Reservoir(capacity), seed)
    same_draws = torch.Generator().manual_seed(seed)
    slots, offered = {}, 0
    for labels in batches:
        memory.add(encode(labels, offered))
        for uniform in torch.rand(len(labels), generator=same_draws, dtype=torch.float64).tolist():
            slot = offered if offered < capacity else int(uniform * (offered + 1))
            if slot < capacity:
                slots[slot] = offered
            offered += 1
        assert kept(memory) == [slots[slot] for slot in range(len(slots))]


def test_reservoir_of_one_stays_paired():
    for seed in range(50):
        memory = seeded(Reservoir(1), seed)
        feed(memory, [[0, 1, 2, 3] * 8] * 4)  # many samples of one batch want the one slot
        assert len(kept(memory)) == 1


@pytest.mark.slow
def test_reservoir_keeps_each_position_equally_often():
    capacity, offered, runs = 5, 20, 1500
    counts = Counter()
    for seed in range(runs):
        memory = seeded(Reservoir(capacity), seed)
        feed(memory, [[0] * 3, [1] * 7, [2] * 10])
        counts.update(kept(memory))
    expected = runs * capacity / offered
    scale = (offered - 1) / (offered - capacity)  # drawn without repeats: the counts of one run vary less
    assert chi_square([counts[number] for number in range(offered)], expected) * scale < 43.8  # 19 degrees of freedom, p = 0.001


# ClassBalanced -----------------------------------------------------------------------------------------------------------


def fair_shares(offered, capacity):
    """Deal out the places one by one, each to the smallest share that may still grow; of equal ones, to who came first."""
    shares = dict.fromkeys(offered, 0)
    for _ in range(min(capacity, sum(offered.values()))):
        poorest = min((label for label in offered if shares[label] < offered[label]), key=lambda label: shares[label])
        shares[poorest] += 1
    return shares


@pytest.mark.slow
@given(BATCHES, CAPACITIES, SEEDS)
def test_class_balanced_keeps_the_smallest_keys_of_each_class(batches, capacity, seed):
    memory = seeded(ClassBalanced(capacity), seed)
    same_draws = torch.Generator().manual_seed(seed)
    keys, offered = defaultdict(list), 0
    for labels in batches:
        memory.add(encode(labels, offered))
        uniforms = torch.rand(len(labels), generator=same_draws, dtype=torch.float64).tolist()
        for label in sorted(set(labels)):
            keys[label]  # of classes that are new in one batch, the smaller label comes first
        for label, key in zip(labels, uniforms, strict=True):
            keys[label].append((key, offered))
            offered += 1
        shares = fair_shares({label: len(seen) for label, seen in keys.items()}, capacity)
        assert memory.shares() == shares
        assert sorted(kept(memory)) == sorted(number for label, seen in keys.items() for _, number in sorted(seen)[: shares[label]])


@given(BATCHES, CAPACITIES, SEEDS)
def test_class_balanced_shares_are_even_and_never_grow_after_a_drop(batches, capacity, seed):
    memory = seeded(ClassBalanced(capacity), seed)
    offered, limit = [], {}
    for labels in batches:
        memory.add(encode(labels, len(offered)))
        offered += labels
        share = Counter(memory.all().y.tolist() if offered else [])
        for label, count in Counter(offered).items():
            if share[label] < count:  # one was dropped
                assert share[label] >= max(share.values()) - 1
                assert share[label] <= limit.setdefault(label, share[label])
                limit[label] = share[label]


def test_class_balanced_worked_example():
    memory = ClassBalanced(6)
    feed(memory, [[2] * 10, [0] * 1, [1] * 10])
    assert memory.shares() == {2: 3, 0: 1, 1: 2}  # 6 = 1 + 5, and of 5 the class that came first gets 3
    assert Counter(memory.all().y.tolist()) == {2: 3, 0: 1, 1: 2}


@pytest.mark.slow
def test_class_balanced_is_uniform_within_each_class():
    runs, labels = 1500, [0] * 12 + [1] * 6 + [0] * 4 + [1] * 2
    counts = Counter()
    for seed in range(runs):
        memory = seeded(ClassBalanced(8), seed)
        feed(memory, [labels[:5], labels[5:16], labels[16:]])
        counts.update(kept(memory))
    for label, total, limit in ((0, 16, 37.7), (1, 8, 24.3)):  # 15 and 7 degrees of freedom, p = 0.001
        found = [counts[number] for number, other in enumerate(labels) if other == label]
        assert chi_square(found, runs * 4 / total) * (total - 1) / (total - 4) < limit


# Ring --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(BATCHES, CAPACITIES)
def test_ring_keeps_the_newest(batches, capacity):
    memory, newest = Ring(capacity), deque(maxlen=capacity)
    offered = 0
    for labels in batches:
        memory.add(encode(labels, offered))
        newest.extend(range(offered, offered + len(labels)))
        offered += len(labels)
        assert sorted(kept(memory)) == list(newest)


@pytest.mark.slow
@given(BATCHES, st.integers(CLASSES, 20))
def test_class_ring_keeps_the_newest_of_each_class(batches, capacity):
    memory = Ring(capacity, CLASSES)
    newest = [deque(maxlen=capacity // CLASSES) for _ in range(CLASSES)]
    offered = 0
    for labels in batches:
        memory.add(encode(labels, offered))
        for label in labels:
            newest[label].append(offered)
            offered += 1
        assert sorted(kept(memory)) == sorted(number for ring in newest for number in ring)


@pytest.mark.parametrize("label", [-1, 3])
def test_class_ring_refuses_a_label_without_a_ring(label):
    memory = Ring(6, 3)
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        memory.add(Samples(torch.zeros(2, 3), torch.tensor([0, label])))
    assert (len(memory), memory.seen) == (0, 0)


def test_class_ring_needs_a_place_for_each_class():
    with pytest.raises(ValueError, match="6 can't be shared by 7 classes"):
        Ring(6, 7)


def test_a_class_balanced_memory_goes_on_from_its_keys_alone():
    """What it looks up the greatest keys by is no state: it is made anew where they were restored or copied."""
    memory, copied = ClassBalanced(20), ClassBalanced(20)
    draw = torch.Generator().manual_seed(0)
    for number in range(30):
        samples = Samples(torch.rand(8, 2, generator=draw), torch.randint(0, 1 + number // 4, (8,), generator=draw))
        if number == 15:
            copied = copy.deepcopy(memory)
            copied._keys = copied._keys.copy()  # as a restored one has them
        if number >= 15:
            copied.add(samples)
        memory.add(samples)
    assert torch.equal(memory.all().x, copied.all().x) and torch.equal(memory.all().y, copied.all().y)
    assert "_heaps" not in dict(attributes(memory))
