"""CPE-CLIP: the bank against the formulas, both towers against a loop by hand, the brake, the masks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

pytest.importorskip("open_clip")

from clstream.strategies import CPECLIP
from clstream.strategies.cpe_clip.prompts import braked, run_with_prompts, warm_up
from clstream.streams import recorded
from dual_encoders import NAMES, TOWERS, small_clip, trained_clip

from clstream import EpochStarted, SessionStarted, Stream, Task, on, run
from clstream.checks import example_model, example_stream
from clstream.measures.memory import count_parameters
from clstream.models import Clip
from clstream.recording import record
from clstream.seeds import isolated
from clstream.stream import Samples

STREAM = replace(example_stream(), class_names=tuple(NAMES))


def play(stream: Stream = STREAM, model: Clip | None = None, sessions: int | None = None, **options: Any) -> CPECLIP:
    """Run it."""
    with isolated(0, "strategy"):
        strategy = CPECLIP(model or small_clip(), **options)
    run(strategy, stream, max_sessions=sessions)
    return strategy


@pytest.mark.parametrize(("depth", "prompts"), [(None, 2), (1, 3)])
def test_what_is_learned_is_the_bank_and_the_map(depth: int | None, prompts: int) -> None:
    strategy = CPECLIP(small_clip(), depth=depth, prompts=prompts)
    count = sum(weight.numel() for group in strategy.optimizer.param_groups for weight in group["params"])
    assert count == count_parameters(strategy)[1] == (depth or 2) * prompts * 16 + 16 * 24 + 24
    assert 12 * 2 * 512 + 512 * 768 + 768 == 406_272  # of ViT-B/16, as the authors' code has it


@pytest.mark.slow
def test_the_ratio_is_the_share_of_the_sessions_classes() -> None:
    def ratios(base: int, way: int, sessions: int) -> list[float]:
        classes = [range(base), *(range(begin, begin + way) for begin in range(base, base + way * sessions, way))]
        x = torch.zeros(1, 1, 8, 8)
        tasks = [
            Task(number, tuple(labels), *[Samples(x.expand(len(labels), -1, -1, -1), torch.tensor(labels))] * 2)
            for number, labels in enumerate(classes)
        ]
        stream = Stream("many", tasks, batch_size=100, class_names=[f"{label}" for label in range(base + way * sessions)])
        seen: list[float] = []

        class Watch:
            @on(SessionStarted)
            def keep(self, event: SessionStarted) -> None:
                seen.append(float(strategy.ratio))

        strategy = CPECLIP(small_clip(classes=stream.classes), depth=1)
        run(strategy, stream, Watch(), evaluate_at="end")
        return seen

    cifar = [1, 0.076923, 0.071429, 0.066667, 0.0625, 0.058824, 0.055556, 0.052632, 0.05]
    assert ratios(60, 5, 8) == pytest.approx(cifar, abs=1e-6)
    assert ratios(100, 10, 10) == pytest.approx([1, *(1 / number for number in range(11, 21))], abs=1e-6)  # as for CUB


def test_the_learning_rate_rises_within_each_session() -> None:
    assert [0.1 * warm_up(epoch) for epoch in range(6)] == pytest.approx([0.001, 0.00298, 0.00496, 0.00694, 0.00892, 0.0109])
    assert [warm_up(epoch) for epoch in (50, 125, 200)] == pytest.approx([1, 0.505, 0.01])  # then it begins anew
    rates: list[float] = []

    class Watch:
        @on(EpochStarted)
        def keep(self, event: EpochStarted) -> None:
            rates.append(strategy.optimizer.param_groups[0]["lr"])

    strategy = CPECLIP(small_clip(), depth=1)
    run(strategy, replace(STREAM, epochs=2, batch_size=60), Watch(), max_sessions=2)
    assert rates == pytest.approx([0.001, 0.00298] * 2)


@pytest.mark.parametrize("mode", ["replace", "accumulate", "accumulate_same"])
def test_prompts_stand_where_the_mode_says(mode: str) -> None:
    tokens, prompts = torch.randn(3, 7, 4), torch.randn(3, 2, 4)
    tokens[:, 1:3] = prompts[0]
    entered: list[Tensor] = []

    def block(x: Tensor) -> Tensor:
        entered.append(x)
        return x + 1

    end = run_with_prompts([block] * 4, tokens, 1, prompts, mode)
    lengths = {"replace": [7] * 4}.get(mode, [7, 9, 11, 11])
    assert [x.shape[1] for x in entered] == lengths and end.shape == (3, lengths[3], 4)
    third = entered[2]
    torch.testing.assert_close(third[:, [0, -4, -3, -2, -1]], tokens[:, [0, -4, -3, -2, -1]] + 2)
    middle = {
        "replace": prompts[2],
        "accumulate": torch.cat([prompts[0] + 2, prompts[1] + 1, prompts[2]]),
        "accumulate_same": prompts.flatten(0, 1),
    }[mode]
    torch.testing.assert_close(third[:, 1:-4], middle.expand(3, -1, -1))


def test_both_towers_are_as_a_loop_by_hand() -> None:
    strategy = play(sessions=1)
    clip, model, x = strategy.clip_model.clip, strategy.clip_model, STREAM.tasks[0].test[:5].x

    def attended(layer: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = layer.ln_1(tokens)
        tokens = tokens + layer.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return tokens + layer.mlp(layer.ln_2(tokens))

    with torch.no_grad():
        grown = strategy.map(strategy.bank.weight)
        patches = clip.visual.conv1(model.stages.input(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat([clip.visual.class_embedding.expand(5, 1, -1), patches], 1) + clip.visual.positional_embedding
        tokens = clip.visual.ln_pre(torch.cat([tokens, grown[0].expand(5, -1, -1)], 1))
        first, second = clip.visual.transformer.resblocks
        tokens = attended(second, torch.cat([attended(first, tokens), grown[1].expand(5, -1, -1)], 1))
        assert tokens.shape[1] == 1 + 4 + 2 * 2
        image = F.normalize(clip.visual.ln_post(tokens[:, 0]) @ clip.visual.proj, dim=1)
        torch.testing.assert_close(strategy.encode_images(x), image)
        for label, name in enumerate(NAMES[:2]):
            embedded = clip.token_embedding(torch.tensor([256, *f"{name}.".encode(), 257]))
            tokens = torch.cat([embedded[:1], strategy.bank.weight[0], embedded[1:]])[None] + clip.positional_embedding[:8]
            mask = torch.full((8, 8), float("-inf")).triu(1)
            first, second = clip.transformer.resblocks
            tokens = attended(first, tokens, mask)
            tokens = attended(second, torch.cat([tokens[:, :1], strategy.bank.weight[1:], tokens[:, 3:]], 1), mask)
            text = F.normalize(clip.ln_final(tokens[:, 5 + 2]) @ clip.text_projection, dim=1)  # the end's place, plus the prompts
            torch.testing.assert_close(strategy.encode_names(torch.tensor([label])), text)


def test_a_name_is_read_the_same_beside_longer_ones() -> None:
    strategy = play(replace(STREAM, class_names=("ox", "beetle", *NAMES[2:])), sessions=1)
    with torch.no_grad():
        both = strategy.encode_names(torch.tensor([0, 1]))
        strategy.tokens = strategy.tokens[:, :5]
        torch.testing.assert_close(strategy.encode_names(torch.tensor([0])), both[:1])


def test_names_of_other_sessions_have_no_part_in_the_loss() -> None:
    strategy = play(sessions=2)
    samples = STREAM.tasks[1].train[:8]
    loss = strategy.loss(samples)
    logits = strategy.scale * strategy.encode_images(samples.x) @ strategy.encode_names(torch.arange(4)).T
    masked = logits.masked_fill(torch.tensor([True, True, False, False]), -9999.0)
    whole = F.cross_entropy(masked, samples.y)
    torch.testing.assert_close(loss, whole)
    learned = list(strategy.learned())
    gradients = [torch.autograd.grad(value, learned, retain_graph=True) for value in (loss, whole)]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)
    (gradient,) = torch.autograd.grad(whole, logits, retain_graph=True)
    assert not gradient[:, :2].any() and gradient[:, 2:].any()
    with torch.no_grad():
        torch.testing.assert_close(strategy.scores(samples.x)[:, :4], logits)  # in an answer none is masked
    assert (strategy.scores(samples.x)[:, 4:] == float("-inf")).all()


def test_the_brake_scales_gradients_and_nothing_else() -> None:
    weight = nn.Parameter(torch.randn(50) * 1e3)
    for ratio in (0.0, 0.3, 1.0):
        held = braked(weight, torch.tensor(ratio))
        assert torch.equal(held, weight)
        (gradient,) = torch.autograd.grad(held.square().sum(), weight)
        torch.testing.assert_close(gradient, ratio * 2 * weight)
    free, slow = (play(brake=brake, sessions=1) for brake in (False, True))
    samples = STREAM.tasks[0].train[:8]
    slow.ratio = torch.tensor(0.25)
    gradients = [torch.autograd.grad(strategy.loss(samples), list(strategy.learned())) for strategy in (free, slow)]
    for whole, part in zip(*gradients, strict=True):
        torch.testing.assert_close(part, whole / 4)


def test_at_a_ratio_of_nothing_only_decay_and_momentum_move_the_prompts() -> None:
    samples = STREAM.tasks[0].train[:8]
    for options, moves in (({}, False), ({"weight_decay": 0.1}, True)):
        strategy = play(optimizer=partial(SGD, lr=0.1, **options), sessions=1)
        strategy.ratio, before = torch.tensor(0.0), strategy.bank.weight.detach().clone()
        strategy.optimizer.zero_grad()
        strategy.objective(samples).backward()
        strategy.optimizer.step()
        assert torch.equal(strategy.bank.weight, before) is not moves


def test_the_towers_stay_as_they_are_and_names_are_read_anew() -> None:
    model = trained_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy = play(model=model, depth=1, sessions=1)
    names = strategy.encode_names(torch.arange(2)).detach()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    strategy.learn(next(next(iter(STREAM.session(0))).batches()))
    assert not torch.equal(strategy.encode_names(torch.arange(2)), names)
    scores = strategy.scores(STREAM.tasks[0].test[:4].x)
    with torch.no_grad():
        strategy.bank.weight += 0.1
    strategy.forget_encoded(None)  # type: ignore[arg-type]  # as after a step
    assert not torch.equal(strategy.scores(STREAM.tasks[0].test[:4].x), scores)


def test_it_runs_where_boundaries_are_hidden_and_hears_the_names() -> None:
    strategy = play(replace(STREAM, boundaries=False))
    assert strategy.tokens.shape == (6, 6) and strategy.seen_classes.tolist() == list(range(6))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: run(CPECLIP(small_clip()), example_stream()), "CPECLIP tells classes by their names, and example has none: give"),
        (lambda: run(CPECLIP(small_clip(), class_names=["ape"]), example_stream()), "has 6 classes, and class_names only 1"),
        (
            lambda: play(replace(STREAM, class_names=["a" * 8, *NAMES[1:]])),
            "has 11 tokens, 13 with its prompts, and the",
        ),
        (lambda: play(replace(STREAM, class_names=["a" * 20, *NAMES[1:]])), "has 23 tokens, and the text tower reads 12"),
        (lambda: CPECLIP(example_model()), "needs a model with an image tower and a text tower, Clip, not Mlp"),
        (lambda: CPECLIP(small_clip(), depth=3), "depth must be at most 2, as many blocks as Clip has, not 3"),
        (lambda: CPECLIP(small_clip(), text_of_class="a photo"), "text_of_class must be a text with {} where the name goes"),
        (lambda: Clip((1, 8, 8), 6), "there are no weights of ViT-B-16-quickgelu here, and none are fetched: give a file"),
        (lambda: Clip((1, 8, 8), 6, "ViT-B-61", "random"), "open_clip has no model 'ViT-B-61'; near it: ViT-B-16"),
        (lambda: Clip((1, 8, 8), 6, "RN50", "random"), "RN50 has other towers than CLIP's plain transformers"),
        (lambda: Clip((1, 8, 8), 6, "ViT-B-16-SigLIP", "random"), "ViT-B-16-SigLIP has other towers than CLIP's plain"),
        (lambda: Clip((2, 8, 8), 6, "ViT-B-16", "random"), "Clip takes images of 3 channels, or grey ones, not of 2 channels"),
        (lambda: Clip((1, 8, 8), 6, "none.json", "random"), "there is no file none.json"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        make()
    assert sentence in str(error.value)


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    trained, file = trained_clip(), tmp_path / "towers.pt"
    torch.save(trained.clip.state_dict(), file)
    model = Clip((1, 8, 8), 6, str(TOWERS), str(file))
    x = STREAM.tasks[0].test[:3].x
    assert torch.equal(model.features(x), trained.features(x)) and model.params["pretrained"].startswith("towers.pt ")
    torch.testing.assert_close(model.features(x).norm(dim=1), torch.ones(3))
    other = tmp_path / "other.json"
    other.write_text(TOWERS.read_text().replace('"width": 24', '"width": 32'))
    with pytest.raises(ValueError, match=r"towers.pt don't fit .*other.json: .* is \(24,\) there, \(32,\) here"):
        Clip((1, 8, 8), 6, str(other), str(file))


def test_other_text_towers_read_the_tokens_of_open_clip(tmp_path: Path) -> None:
    import open_clip

    file = tmp_path / "towers.json"
    file.write_text(TOWERS.read_text().replace("258", "49408"))
    model, texts = Clip((1, 8, 8), 6, str(file), "random"), ["aquarium fish.", "a photo of a dog."]
    tokens = model.tokens(texts)
    assert torch.equal(tokens, open_clip.tokenize(texts)[:, : tokens.shape[1]])
    with torch.no_grad():
        plain = model.clip.encode_text(F.pad(tokens, (0, 12 - tokens.shape[1])), normalize=True)
    assert plain.shape == (2, 16)


def test_a_recording_brings_the_names(tmp_path: Path) -> None:
    again = recorded(record(STREAM, tmp_path / "example.clstream"), data=STREAM)
    assert again.class_names == tuple(NAMES) and "classes ape, bee" in str(again)
    strategies = [play(stream, sessions=1) for stream in (STREAM, again)]
    assert torch.equal(strategies[0].bank.weight, strategies[1].bank.weight) and torch.equal(
        strategies[0].tokens, strategies[1].tokens
    )
