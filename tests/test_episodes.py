"""Episodes: what they are drawn from, corruptions of the instance test, and the same episode whenever it is asked for."""

import pytest
import torch
from clstream.streams import episode, episodes
from clstream.streams.corruptions import Disc, PixelNoise

from clstream.stream import Episodes, Samples


def pool(classes=30, per_class=12):
    """Samples that say who they are: the number of the class, and of the sample in it."""
    y = torch.arange(classes).repeat_interleave(per_class)
    x = torch.stack([y, torch.arange(per_class).repeat(classes)], 1).float()
    shuffle = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return Samples(x[shuffle], y[shuffle])


def family(**options):
    return Episodes("family", pool(), **{"ways": 5, "shots": 1, "targets": 5, "count": 20} | options)


@pytest.mark.parametrize(
    ("ways", "sets", "per_group", "overwrite", "outputs", "kind"),
    [
        (5, 4, 2, False, 10, "classes and samples"),
        (5, 8, 2, False, 20, "classes and samples"),
        (2, 20, 2, False, 20, "classes and samples"),
        (10, 4, 2, False, 20, "classes and samples"),
        (5, 42, 2, False, 105, "classes and samples"),
        (53, 4, 2, False, 106, "classes and samples"),
        (5, 80, 2, False, 200, "classes and samples"),
        (100, 4, 2, False, 200, "classes and samples"),
        (5, 2, 2, False, 5, "new samples"),
        (5, 4, 1, True, 5, "overwritten classes"),
        (5, 4, 1, False, 20, "new classes"),
    ],
)
def test_an_episode_has_the_classes_of_its_groups(ways, sets, per_group, overwrite, outputs, kind):
    drawn = Episodes("family", pool(200), ways, 1, 5, sets, per_group, overwrite)
    stream, draw = drawn[3], drawn.draw(3)
    assert (drawn.outputs, stream.classes, drawn.kind, drawn.chance) == (outputs, outputs, kind, 1 / outputs)
    assert draw.support.shape == (sets, ways) and draw.targets.shape == (sets, 5 * ways)
    was = drawn.pool.y[draw.support]
    for number, labels in enumerate(draw.support_labels):
        first = 0 if overwrite else number // per_group * ways
        assert labels.tolist() == [*range(first, first + ways)] == list(stream.tasks[number].classes)
        assert torch.equal(was[number], was[number // per_group * per_group])  # a group has its classes in every set
    assert len(was.unique()) == ways * sets // per_group  # and no class comes in two groups
    of_targets = drawn.pool.y[draw.targets].view(sets, ways, 5)
    assert torch.equal(of_targets, was[:, :, None].expand(-1, -1, 5))
    assert torch.equal(draw.target_labels, draw.support_labels.repeat_interleave(5, 1))
    rows = torch.cat([draw.support, draw.targets], 1).flatten()
    assert len(rows.unique()) == len(rows)


def test_the_same_number_is_the_same_episode_in_any_order():
    drawn, again = family(), family()
    forwards = [drawn.draw(index) for index in range(20)]
    for index in reversed(range(20)):
        for name in ("support", "support_labels", "targets", "target_labels"):
            assert torch.equal(getattr(forwards[index], name), getattr(again.draw(index), name))
    assert not torch.equal(forwards[0].support, forwards[1].support)
    other = family(seed=1).draw(4)
    assert torch.equal(drawn.pool.y[other.support], drawn.pool.y[forwards[4].support])  # classes are of the number alone
    assert not torch.equal(other.support, forwards[4].support)


def test_with_repeats_a_target_may_come_again_as_a_support_sample():
    drawn, shared = family(sets=4, sets_per_group=4, repeats=True), 0
    for index in range(20):
        draw = drawn.draw(index)
        for number in range(4):
            own = torch.cat([draw.support[number], draw.targets[number]])
            assert len(own.unique()) == 30
        shared += len({*draw.targets[0].tolist()} & {*draw.support[1].tolist()})
    assert shared > 0


def test_a_stream_delivers_each_support_set_whole_in_each_step():
    stream = family(sets=4, sets_per_group=2, shots=2, targets=3, steps=3)[0]
    assert len(stream) == 4
    for session in stream:
        batches = [batch for epoch in session for batch in epoch]
        assert len(batches) == 3 and all(torch.equal(batch.samples.x, stream.tasks[session.index].train.x) for batch in batches)


@pytest.mark.parametrize(("sets", "shots"), [(1, 10), (2, 5), (5, 2), (10, 1)])
def test_the_instance_test_asks_which_sample_it_is(sets, shots):
    images = Samples(torch.randint(0, 256, (60, 1, 28, 28)).to(torch.uint8), torch.arange(6).repeat(10))
    corruptions = {"noise_0.4": lambda seed: PixelNoise(0.4, seed), "noise_0": lambda seed: PixelNoise(0.0, seed)}
    drawn = Episodes("instances", images, 1, shots, 5, sets, sets, instances=True, corruptions=corruptions)
    stream = drawn[0]
    assert drawn.outputs == stream.classes == 10 and drawn.kind == "instances"
    for number, task in enumerate(stream.tasks):
        assert task.train.y.tolist() == [*range(number * shots, (number + 1) * shots)]
        assert torch.equal(task.train.x, task.test.x)  # only the probes are corrupted
    asked = torch.cat([task.test.x for task in stream.tasks])
    noisy, clean = (probe.samples.x for probe in stream.probes)
    assert torch.equal(clean, asked) and not torch.equal(noisy, asked)
    assert len(drawn.pool.y[drawn.draw(0).support].unique()) == 1 and len(drawn.draw(0).support.unique()) == 10
    assert torch.equal(drawn[0].probes[0].samples.x, noisy)


@pytest.mark.parametrize(("radius", "pixels"), [(0.0, 1), (0.1, 13), (0.2, 81), (0.3, 197), (0.5, 611)])
def test_a_disc_hides_so_many_pixels_all_within_the_image(radius, pixels):
    x = torch.full((200, 3, 28, 28), 200, dtype=torch.uint8)
    hidden = Disc(radius, 3)(x)
    assert ((hidden == 0).sum((2, 3)) == pixels).all() and hidden[hidden != 0].eq(200).all()
    if radius == 0.3:
        assert len({tuple(image.any(0).flatten().tolist()) for image in hidden}) > 20  # each at a place of its own
        assert hidden[:, 0, 0].ne(0).any()
    assert torch.equal(Disc(radius, 3)(x), hidden)


@pytest.mark.parametrize(("share", "pixels"), [(0.0, 0), (0.4, 313), (1.0, 784)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_noise_replaces_exactly_so_many_numbers(share, pixels, dtype):
    x = torch.full((50, 1, 28, 28), 0.5) if dtype == torch.float32 else torch.full((50, 1, 28, 28), 77, dtype=dtype)
    noisy = PixelNoise(share, 1)(x)
    changed = (noisy != x).flatten(1).sum(1)
    assert (changed <= pixels).all() and (changed >= pixels - 12).all()  # noise may be what was there
    if share == 1:
        assert abs(float(noisy.float().mean()) / (1 if dtype == torch.float32 else 256) - 0.5) < 0.01
    if share == 0.4:
        alike = torch.stack([(noisy[0] != x[0]).flatten(), (noisy[1] != x[1]).flatten()])
        assert not torch.equal(alike[0], alike[1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ways": 5, "sets": 14, "sets_per_group": 2}, "an episode of 7 groups with 5 ways needs 35 classes, and the pool has 30"),
        ({"targets": 12}, "1 shots and 12 targets need 13 samples of a class, and one class has 12: take fewer"),
        (
            {"sets": 4, "sets_per_group": 4},
            "1 shots and 5 targets in each of 4 sets need 24 samples of a class, and one class has 12",
        ),
        ({"sets": 5, "sets_per_group": 2}, "sets must be a multiple of sets_per_group, 2, not 5"),
        ({"instances": True}, "the instance test is of one class: ways must be 1, and sets_per_group as many as sets"),
        ({"ways": 0}, "ways must be a whole number of at least 1, not 0"),
    ],
)
def test_what_can_not_be_drawn_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        family(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise": [1.2]}, "noise must be a finite number from 0 to 1, not 1.2"),
        ({"occlusion": [0.6]}, "occlusion must be a finite number from 0 to 0.5, not 0.6"),
        ({"noise": 0.4}, "noise must be a list of shares, not 0.4"),
        ({"data": "omniglot"}, "data must be one of omniglot_base, omniglot_novel, digits"),
        ({"data": "digits", "rotations": True}, "rotations=True is for the characters of Omniglot, not for digits"),
    ],
)
def test_options_are_refused_before_any_data_is_looked_for(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        episodes(**options, root="nowhere")


def test_episodes_of_digits_and_one_of_them_by_number():
    drawn = episodes("digits", ways=2, sets=4, sets_per_group=2, count=5, noise=[0.3])
    assert len(drawn) == 5 == len(list(drawn))
    alone = episode(3, "digits", ways=2, sets=4, sets_per_group=2, count=5, noise=[0.3])
    assert alone.fingerprint == drawn[3].fingerprint != drawn[2].fingerprint
    assert [probe.name for probe in alone.probes] == ["noise_0.3"]
    with pytest.raises(IndexError, match="there are the episodes 0 to 4, not 5"):
        drawn[5]
    with pytest.raises(ValueError, match="index must be below count, 5, not 7"):
        episode(7, "digits", sets=1, count=5)


def test_other_inputs_make_the_same_episodes():
    drawn = family(sets=2)
    other = drawn.with_inputs(drawn.pool.x * 2, "doubled")
    assert torch.equal(other[1].tasks[0].train.x, 2 * drawn[1].tasks[0].train.x)
    with pytest.raises(ValueError, match="the pool has 360 samples, and there are 3 inputs"):
        drawn.with_inputs(torch.zeros(3, 2), "short")


@pytest.mark.data
def test_omniglot_s_novel_characters_are_not_among_the_base_ones():
    base, novel = (episodes(data, sets=4, sets_per_group=2).pool for data in ("omniglot_base", "omniglot_novel"))
    assert (len(base), len(base.y.unique()), len(novel), len(novel.y.unique())) == (2720, 136, 2120, 106)
    assert {len(rows) for rows in episodes(sets=1).classes} == {20}
    wide = episodes(ways=53, sets=4, sets_per_group=2)
    assert wide.outputs == 106 == wide[0].classes
    with pytest.raises(ValueError, match="needs 200 classes, and the pool has 106"):
        episodes(ways=100, sets=4, sets_per_group=2)
    assert len(episodes(rotations=True).classes) == 424
