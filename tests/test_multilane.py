"""MULTI-LANE: its arithmetic against the paper's, written out; old lanes that never change; what it costs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.experiments.multilane import as_written
from clstream.strategies import MultiLane
from clstream.strategies.multilane import Lanes, attend, selection
from clstream.streams import from_tensors, multilabel_folder
from picture_folders import scenes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

from clstream import BatchLearned, EpochStarted, Evaluated, TaskEnded, on, run
from clstream.checks import example_stream
from clstream.evaluation import evaluating
from clstream.models import Mlp, Timm, VitTiny
from clstream.models.vit_blocks import vit_of
from clstream.seeds import isolated


def model(head: str = "fixed", **options: Any) -> VitTiny:
    with isolated(0, "model"):
        return VitTiny((1, 8, 8), 6, **{"patch": 2, "width": 16, "depth": 3, "heads": 2, "head": head, **options})


def strategy(**options: Any) -> MultiLane:
    return MultiLane(model(**options.pop("model", {})), **{"selectors": 3, "prompts": 2, "prompted_blocks": 2, **options})


# The arithmetic -------------------------------------------------------------------------------------------------------


def test_selectors_choose_as_the_vectors_say() -> None:
    tokens, selectors = torch.tensor([[[1.0, 0], [0, 2], [1, 1]]]), torch.tensor([[2.0, 0], [0, 1]])
    shares = selection(selectors, tokens)
    expected = torch.tensor([[0.4458082741, 0.1083834518, 0.4458082741], [0.1400292450, 0.5759753452, 0.2839954097]])
    assert torch.allclose(shares[0], expected, atol=1e-6)
    chosen = torch.tensor([[0.8916165482, 0.6625751777], [0.4240246548, 1.4359461002]])
    assert torch.allclose(shares[0] @ tokens[0], chosen, atol=1e-6)


def test_the_class_token_attends_as_the_vectors_say() -> None:
    net = VitTiny((1, 4, 4), 2, patch=4, width=2, depth=1, heads=1)
    attention: Any = net.stages.block1.attention
    for layer in (attention.q, attention.k, attention.v, attention.out):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    tokens, selectors = torch.tensor([[[1.0, 0], [0, 2], [1, 1]]]), torch.tensor([[2.0, 0], [0, 1]])
    (block,) = vit_of(net).blocks
    _, keys, values = block.qkv(tokens)
    classes, prompts = torch.tensor([[[0.5, -0.5]]]), torch.tensor([[[1.0, 1]], [[0, 3.0]]])
    added = attend(block, classes, selection(selectors, tokens), keys, values, prompts)
    assert torch.allclose(added[0, 0], torch.tensor([0.4694664102, 0.9531251326]), atol=1e-6)
    whole = torch.cat([classes, selection(selectors, tokens) @ tokens], 1)
    assert torch.allclose(added[0, 0], block.attention(whole, (prompts[0], prompts[1]))[0, 0], atol=1e-6), (
        "the first row of the full attention"
    )


def test_selectors_move_by_their_norm_as_the_vectors_say() -> None:
    net = VitTiny((1, 4, 4), 2, patch=4, width=3, depth=1, heads=1)
    seen: list[Tensor] = []
    block: Any = net.stages.block1
    block.norm1.eps = 1e-6
    block.norm2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    lanes = Lanes(1, 0, 0, 3)
    lanes.open(torch.Generator(), block.norm1.weight)
    lanes.selectors[0].data = torch.tensor([[2.0, 0, -1]])
    lanes(vit_of(net), torch.zeros(1, 1, 4, 4), [0])
    assert torch.allclose(seen[-1][0], torch.tensor([3.3363057800, -0.2672611560, -2.0690446240]), atol=1e-6)


@pytest.mark.parametrize(("selectors", "prompts", "blocks"), [(3, 2, 2), (3, 0, 0), (0, 2, 3), (0, 0, 0)])
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_what_the_paper_computes(selectors: int, prompts: int, blocks: int, fused: bool) -> None:
    vit, draw = vit_of(model(fused=fused)), torch.Generator().manual_seed(0)
    lanes = Lanes(selectors, prompts, blocks, 16)
    for _ in range(3):
        lanes.open(draw, torch.zeros(1))
        for parameter in (lanes.selectors[-1], lanes.prompts[-1]):
            parameter.data = torch.randn(parameter.shape, generator=draw)
    x = torch.rand(5, 1, 8, 8, generator=draw)
    answers = lanes(vit, x, [0, 2])
    for answer, lane in zip(answers, (0, 2), strict=True):
        assert torch.allclose(answer, as_written(vit, x, lanes.selectors[lane], lanes.prompts[lane]), atol=1e-6)
    slopes = torch.autograd.grad(answers[0][:, 0].sum(), [*lanes.selectors[:1], *lanes.prompts[:1]], materialize_grads=True)
    written = as_written(vit, x, lanes.selectors[0], lanes.prompts[0])[:, 0].sum()
    for slope, expected in zip(slopes, torch.autograd.grad(written, [lanes.selectors[0], lanes.prompts[0]], materialize_grads=True),
                               strict=True):  # fmt: skip
        assert torch.allclose(slope, expected, atol=1e-5)


def test_a_vision_transformer_of_timm_is_run_as_written_too() -> None:
    pytest.importorskip("timm")
    with isolated(0, "model"):
        net = Timm((3, 32, 32), 4, "vit_tiny_patch16_224")
        for block in net.stages.body.blocks:  # type: ignore[operator,union-attr]
            nn.init.normal_(block.mlp.fc2.weight, std=0.1)  # type: ignore[union-attr]
    vit, lanes = vit_of(net.eval()), Lanes(4, 3, 5, 192)
    lanes.open(torch.Generator().manual_seed(0), torch.zeros(1))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(lanes(vit, x, [0])[0], as_written(vit, x, lanes.selectors[0], lanes.prompts[0]), atol=1e-6)


def test_a_first_lane_is_drawn_as_the_authors_draw_theirs_and_the_next_is_a_copy() -> None:
    lanes = Lanes(20, 10, 5, 96)
    for _ in range(2):
        lanes.open(torch.Generator().manual_seed(0), torch.zeros(1))
    assert lanes.selectors[0].norm().item() == pytest.approx(1, abs=0.05)
    assert lanes.prompts[0].std().item() == pytest.approx((10 * 96) ** -0.5, rel=0.05)
    assert torch.equal(lanes.selectors[0], lanes.selectors[1]) and lanes.selectors[0] is not lanes.selectors[1]
    assert sum(parameter.numel() for parameter in lanes.parameters()) == 2 * (20 * 96 + 2 * 5 * 10 * 96)


# Nothing is forgotten -------------------------------------------------------------------------------------------------


class Watch:
    """Keeps what stays when a task is over, and what is said then of fixed images; and looks at what learns."""

    def __init__(self, learner: MultiLane, images: Tensor) -> None:
        self.learner, self.images = learner, images
        self.kept: list[tuple[list[Tensor], Tensor]] = []
        self.backbone = [weight.clone() for weight in learner.model.stages.parameters()]  # type: ignore[union-attr]
        self.rates: list[float] = []

    def lanes(self, upto: int) -> list[Tensor]:
        labels = [label for classes in self.learner.classes[: upto + 1] for label in classes.tolist()]
        head: Any = self.learner.head
        own = [*self.learner.lanes.selectors[: upto + 1], *self.learner.lanes.prompts[: upto + 1]]
        return [part.detach().clone() for part in (*own, head.weight[labels], head.bias[labels])]

    @on(EpochStarted)
    def note_rate(self, event: EpochStarted) -> None:
        self.rates.append(self.learner.optimizer.param_groups[0]["lr"])

    @on(BatchLearned)
    def look(self, event: BatchLearned) -> None:
        current = self.learner.current
        assert all(weight.grad is None for weight in self.learner.model.stages.parameters())  # type: ignore[union-attr]
        for number, lane in enumerate(self.learner.lanes.selectors):
            assert (lane.grad is not None) == lane.requires_grad == (number == current)

    @on(TaskEnded)
    def keep(self, event: TaskEnded) -> None:
        self.kept.append((self.lanes(event.task.id), self.learner.scores(self.images)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["label", "multilabel"])
def test_old_lanes_and_what_they_say_of_fixed_images_never_change(target: str) -> None:
    stream = example_stream(epochs=2, target=target)
    learner = strategy(optimizer=partial(Adam, lr=0.05))
    watch = Watch(learner, torch.cat([task.test.x for task in stream.tasks]))
    result = run(learner, stream, watch)
    if target == "multilabel":
        assert result.forgetting == 0, "of a task's own test images and classes, both of which stay the same"
    for task, (kept, scores) in enumerate(watch.kept):
        assert all(torch.equal(now, then) for now, then in zip(watch.lanes(task), kept, strict=True))
        labels = torch.cat(learner.classes[: task + 1])
        for _, later in watch.kept[task:]:
            assert torch.equal(later[:, labels], scores[:, labels]), "raw scores of old classes on fixed images"
        assert scores[:, 2 * task + 2 :].isinf().all(), "classes that have not come"
    assert all(torch.equal(now, then) for now, then in zip(learner.model.stages.parameters(), watch.backbone, strict=True))  # type: ignore[union-attr]
    assert not torch.equal(learner.lanes.selectors[0], learner.lanes.selectors[1]), "it learns"
    assert watch.rates == pytest.approx([0.05, 0.025] * 3), "a cosine over the epochs, anew in each task"


@pytest.mark.slow
def test_with_the_task_given_nothing_is_forgotten_at_all() -> None:
    """A task's own test images and classes: a fixed set of both."""
    result = run(strategy(), example_stream(epochs=3, scenario="task"))
    table = result.task_accuracy
    assert all(torch.equal(table[task:, task], table[task, task].expand(3 - task)) for task in range(3))


def test_it_learns_a_folder_of_images_with_several_labels(tmp_path: Path) -> None:
    stream = multilabel_folder(scenes(tmp_path / "scenes"), tasks=[["sea"], ["boat", "tree"]], epochs=3, cache=tmp_path)
    learner = MultiLane(VitTiny((3, 6, 6), 3, patch=3, width=16, depth=1, heads=2), selectors=2, prompts=2)
    result = run(learner, stream, measures=["cf1", "of1"])
    assert [classes.tolist() for classes in learner.classes] == [[1], [0, 2]] and result.forgetting == 0
    assert all(result.measured[name][-1].isfinite().all() for name in ("map", "cf1", "of1"))


@pytest.mark.slow
def test_the_loss_is_of_the_tasks_classes_divided_by_all_classes() -> None:
    stream, learner = example_stream(target="multilabel"), strategy()
    asked: list[int] = []

    class Ask:
        @on(BatchLearned)
        def ask(self, event: BatchLearned) -> None:
            samples, own = event.batch.samples, event.batch.task.classes
            logits = learner.outputs(samples)
            visible = F.binary_cross_entropy_with_logits(logits[:, own], samples.y[:, own])
            zeros = torch.zeros_like(logits).index_copy(1, torch.tensor(own), logits[:, own])
            as_published = F.binary_cross_entropy_with_logits(zeros, samples.y)
            loss = learner.loss(samples)
            assert torch.allclose(loss, visible * len(own) / 6)
            assert torch.allclose(loss, as_published - math.log(2) * 4 / 6, atol=1e-6), "without the constant of masked columns"
            asked.append(event.batch.task.id)

    run(learner, stream, Ask(), max_sessions=2)
    assert set(asked) == {0, 1}


@pytest.mark.slow
def test_a_task_that_comes_again_goes_on_with_its_lane() -> None:
    learner = strategy()
    run(learner, example_stream((0, 1, 0)))
    assert learner.tasks == [0, 1] and len(learner.lanes) == 2 and learner.current == 0


# Cost -----------------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_each_lane_as_one_more_token_and_what_it_chooses() -> None:
    stream = example_stream(batch_size=20)
    s, p, d, h, t, depth, prompted = 3, 2, 16, 2, 17, 3, 2
    learner = strategy()
    cost = run(learner, stream, evaluate_at="tasks").cost
    token = 2 * 12 * d * d  # a token through the layers of a block: 4 of the attention, 8 of the hidden layer

    def answered(lanes: int, samples: int) -> int:
        embedded = 2 * 4 * d * 16
        frozen = (depth - 1) * (t * token + 4 * t * t * d) + t * 2 * 3 * d * d
        chosen = 2 * s * t * d + 2 * (2 * h * s * t + 2 * t * d)
        lane = depth * (token + chosen) + prompted * 4 * p * d + 2 * d * 6
        selectors = depth * s * 2 * 8 * d * d  # once for all samples that are asked together
        return samples * (embedded + frozen + lanes * lane) + lanes * selectors

    assert cost.evaluating_flops.tolist()[1:] == [answered(2, 60), answered(3, 60)]
    assert cost.parameters.diff().tolist() == [s * d + 2 * prompted * p * d] * 2
    assert cost.trainable_parameters.tolist() == [s * d + 2 * prompted * p * d + 6 * d + 6] * 3
    assert cost.memory_bytes[-1] < 4000, "labels of each lane, and the optimizer's moments"


def test_a_step_keeps_as_much_for_its_gradients_whatever_the_number_of_lanes() -> None:
    learner, kept = strategy(), []

    class Weigh:
        @on(TaskEnded)
        def weigh(self, event: TaskEnded) -> None:
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.nbytes) or saved, lambda saved: saved):
                learner.loss(event.task.train[:20])
            kept.append(sum(sizes))

    run(learner, example_stream(), Weigh())
    assert kept[0] == kept[1] == kept[2] > 0


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_refused_in_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"MultiLane needs a vision transformer: VitTiny, .* Mlp is none"):
        MultiLane(Mlp(4, 2))
    with pytest.raises(ValueError, match="weight decay would move them"):
        MultiLane(model(), AdamW)
    MultiLane(model(), partial(AdamW, weight_decay=0.0))
    x, y = torch.rand(20, 1, 16, 16), torch.arange(20) % 2
    with pytest.raises(ValueError, match="can't take the inputs of larger"):
        run(strategy(), from_tensors(x, y, x, y, "larger", tasks=2))


def test_a_transformer_without_a_class_token_is_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(TypeError, match="with a class token"):
        MultiLane(Timm((3, 32, 32), 4, "vit_medium_patch16_gap_240"))


def test_it_answers_before_and_after_it_learns_without_a_trace() -> None:
    learner = strategy(optimizer=partial(SGD, lr=0.1))
    x = torch.rand(4, 1, 8, 8)
    assert learner.scores(x).isinf().all()
    evaluated: list[Tensor] = []

    class Ask:
        @on(Evaluated)
        def ask(self, event: Evaluated) -> None:
            with evaluating(learner):
                evaluated.append(learner.scores(x))

    run(learner, example_stream(), Ask())
    assert torch.equal(evaluated[-1], learner.scores(x))
