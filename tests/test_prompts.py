"""L2P, DualPrompt and CODA-Prompt: their equations by hand, what learns and what doesn't, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clstream.strategies import L2P, CODAPrompt, DualPrompt
from clstream.strategies.coda_prompt import PARTS, mixed, orthonormal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import TaskEnded, on, run
from clstream.bus import Emitter
from clstream.checks import example_model, example_stream
from clstream.engine.numerics import Numerics
from clstream.models import VitTiny
from clstream.models.vit_blocks import vit_of
from clstream.seeds import isolated
from clstream.strategy.prompting import Prompting

WIDTH = 16


def vit(depth: int = 2, **options: object) -> VitTiny:
    with isolated(0, "model"):
        return VitTiny((1, 8, 8), 6, width=WIDTH, depth=depth, heads=2, **options)


def l2p(**options: object) -> L2P:
    return L2P(vit(), **{"pool": 5, "length": 3, "chosen": 2, **options})


def dual(**options: object) -> DualPrompt:
    return DualPrompt(vit(3), **{"g_blocks": (0,), "e_blocks": (1, 2), "g_length": 2, "e_length": 3, **options})


def coda(**options: object) -> CODAPrompt:
    return CODAPrompt(vit(), **{"blocks": (0, 1), "components": 3, "length": 2, **options})


MAKES: dict[str, Callable[..., Prompting]] = {"L2P": l2p, "DualPrompt": dual, "CODAPrompt": coda}
each_method = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
X = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fed(strategy: Prompting) -> tuple[Tensor, Tensor]:
    """Return what a strategy gives its prompts for X: tokens and query."""
    parts = vit_of(strategy.model)
    return parts.embed(X), strategy.model.features(X)


def test_l2p_is_its_equations() -> None:
    strategy = l2p(pull=0.5)
    parts, (tokens, query) = strategy.vit, fed(strategy)
    pool, keys = strategy.prompts["prompt"], strategy.prompts["key"]
    features, pulled = [], []
    for sample in range(len(X)):
        cosines = F.cosine_similarity(query[sample][None], keys).tolist()
        chosen = sorted(range(5), key=lambda number: -cosines[number])[:2]
        prompts = torch.cat([pool[number] for number in chosen])
        through = parts.norm(parts.run(torch.cat([prompts, tokens[sample]])[None]))
        features.append(through[0, :6].mean(0))
        pulled.append(sum(cosines[number] for number in chosen))
    outcome, penalty = strategy.prompted(parts, tokens, query, learning=True)
    torch.testing.assert_close(outcome, torch.stack(features))
    assert penalty.item() == pytest.approx(-0.5 * sum(pulled) / 4, abs=1e-6)


def test_dualprompt_is_its_equations() -> None:
    strategy = dual(pull=0.5)
    run(strategy, example_stream(), max_sessions=2)
    parts, (tokens, query) = strategy.vit, fed(strategy)
    e, keys = strategy.all_prompts()
    assert (e.shape, keys.shape) == ((2, 2, 2, 3, WIDTH), (2, WIDTH))
    keys[:] = torch.stack([query[0], -query[0]])  # so that both are chosen
    query[2] = -query[0]
    strategy.kept_e, strategy.kept_keys = e, keys.clone()
    strategy.prompts["key"].data = keys[1].clone()
    g = strategy.prompts["g"]

    def with_task(sample: int, task: int) -> Tensor:
        prompts = {0: (g[0, 0], g[0, 1]), 1: (e[task, 0, 0], e[task, 0, 1]), 2: (e[task, 1, 0], e[task, 1, 1])}
        return parts.features(parts.run(tokens[sample : sample + 1], prompts))[0]

    nearest = [int(F.cosine_similarity(features[None], keys).argmax()) for features in query]
    assert set(nearest) == {0, 1}
    answered, _ = strategy.prompted(parts, tokens, query, learning=False)
    torch.testing.assert_close(answered, torch.stack([with_task(sample, task) for sample, task in enumerate(nearest)]))
    learned, penalty = strategy.prompted(parts, tokens, query, learning=True)
    torch.testing.assert_close(learned, torch.stack([with_task(sample, 1) for sample in range(4)]))
    assert penalty.item() == pytest.approx(-0.5 * float(F.cosine_similarity(query, keys[1:]).mean()), abs=1e-6)


def test_coda_prompt_is_its_equations() -> None:
    strategy = coda(orthogonality=0.5)
    run(strategy, example_stream(), max_sessions=3)
    parts, (tokens, query) = strategy.vit, fed(strategy)
    key, attention, prompt = (torch.cat([strategy.past[part], strategy.prompts[part]], 1) for part in PARTS)
    assert (key.shape, prompt.shape) == ((2, 9, WIDTH), (2, 9, 2, 2, WIDTH))
    prompts = {}
    for block in range(2):
        weights = F.cosine_similarity(query[:, None] * attention[block], key[block].expand(4, 9, WIDTH), dim=2)
        sums = torch.einsum("nm,mkld->knld", weights, prompt[block])
        prompts[block] = (sums[0], sums[1])
    outcome, penalty = strategy.prompted(parts, tokens, query, learning=True)
    torch.testing.assert_close(outcome, parts.features(parts.run(tokens, prompts)))
    excess = 0.0
    for rows in (part[block].flatten(1) for part in (key, attention, prompt) for block in range(2)):
        excess += (rows @ rows.T - torch.eye(9)).square().mean().item()
    assert penalty.item() == pytest.approx(0.5 * excess, rel=1e-5)
    assert strategy.prompted(parts, tokens, query, learning=False)[1] == 0


def test_a_query_of_zeros_has_no_weights_and_no_nan() -> None:
    components = {"key": torch.randn(1, 2, 4), "attention": torch.randn(1, 2, 4), "prompt": torch.randn(1, 2, 2, 3, 4)}
    for part in components.values():
        part.requires_grad_()
    sums = mixed(torch.zeros(1, 4), components)
    sums.sum().backward()
    assert not sums.any() and all(part.grad.isfinite().all() for part in components.values())


@pytest.mark.parametrize(("m", "count", "width"), [(0, 3, 8), (4, 4, 8), (6, 3, 8), (2, 3, 2)])
def test_components_are_drawn_orthogonal_where_there_is_room(m: int, count: int, width: int) -> None:
    past = torch.randn(2, m, width, generator=torch.Generator().manual_seed(1))
    drawn = orthonormal(past, count, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, count, width)
    gram = drawn @ drawn.mT
    torch.testing.assert_close(gram.diagonal(0, 1, 2), torch.ones(2, count))
    if count <= width:
        torch.testing.assert_close(gram, torch.eye(count).expand(2, -1, -1), atol=1e-5, rtol=0)
    if m + count <= width:
        torch.testing.assert_close(drawn @ past.mT, torch.zeros(2, count, m), atol=1e-5, rtol=0)


class Keeps(Emitter):
    """Keeps a copy of something at the end of each task."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what, self.kept = what, []

    @on(TaskEnded)
    def keep(self, event: TaskEnded) -> None:
        self.kept.append(self.what())


@each_method
def test_only_prompts_and_the_tasks_rows_of_the_head_learn(make: Callable[..., Prompting]) -> None:
    strategy = make()
    before = {name: weight.clone() for name, weight in strategy.model.stages.state_dict().items()}
    rows = Keeps(lambda: torch.cat([strategy.model.head.weight, strategy.model.head.bias[:, None]], 1).detach().clone())
    first = rows.what()
    run(strategy, example_stream(epochs=2), rows)
    assert all(torch.equal(weight, before[name]) for name, weight in strategy.model.stages.state_dict().items())
    for task, (past, now) in enumerate(zip([first, *rows.kept], rows.kept, strict=False)):
        moved = (past != now).any(1).nonzero().flatten().tolist()
        assert moved == [2 * task, 2 * task + 1]
    assert all(weight.grad is None for weight in strategy.model.stages.parameters())
    assert all(prompt.grad is not None for prompt in strategy.prompts.values())


def test_prompts_of_past_tasks_of_dualprompt_stay_and_come_back() -> None:
    strategy = dual(optimizer=partial(Adam, lr=1e-4))
    keeps = Keeps(strategy.all_prompts)
    run(strategy, example_stream((0, 1, 0)), keeps)  # 8 steps on task 1
    (e0, key0), (e1, key1), (e2, key2) = keeps.kept
    assert torch.equal(e0[0], e1[0]) and torch.equal(key0[0], key1[0])  # a task that is over
    assert torch.equal(e1[1], e2[1]) and torch.equal(key1[1], key2[1])
    assert not torch.equal(key1[0], key2[0]) and len(key2) == 2  # one that came again
    assert 0 < float((e1[1] - e0[0]).abs().max()) < 1e-3  # they began as those of the task before; keys began afresh
    assert float((key1[1] - key0[0]).abs().max()) > 1e-3
    with pytest.warns(UserWarning, match="was run before"):
        run(strategy, example_stream((0,)))
    assert len(strategy.all_prompts()[0]) == 3  # another run's tasks are others


def test_components_of_past_tasks_of_coda_prompt_stay_as_they_are() -> None:
    strategy = coda(optimizer=partial(Adam, lr=0.01))
    keeps = Keeps(lambda: {part: torch.cat([strategy.past[part], strategy.prompts[part].detach()], 1) for part in PARTS})
    run(strategy, example_stream((0, 1, 0)), keeps)
    for before, after in zip(keeps.kept, keeps.kept[1:], strict=False):
        for part in PARTS:
            assert after[part].shape[1] == before[part].shape[1] + 3
            assert torch.equal(after[part][:, : before[part].shape[1]], before[part])


@pytest.mark.parametrize(
    ("make", "numbers"), [(l2p, 0), (dual, (2 * 2 * 3 + 1) * WIDTH), (coda, 2 * 3 * (2 + 2 * 2) * WIDTH)], ids=MAKES
)
def test_a_task_adds_what_its_prompts_are(make: Callable[..., Prompting], numbers: int) -> None:
    strategy = make(optimizer=partial(SGD, lr=0.01))
    memory = run(strategy, example_stream()).cost.memory_bytes
    assert (memory[1:] - memory[:-1]).tolist() == [4 * numbers + 16] * 2  # and two labels that came


class Calls:
    """Counts the calls of a module, by whether gradients were on."""

    def __init__(self, module: nn.Module) -> None:
        self.grad: list[bool] = []
        module.register_forward_hook(lambda *_: self.grad.append(torch.is_grad_enabled()))


@each_method
def test_a_step_embeds_once_and_takes_the_query_without_gradients(make: Callable[..., Prompting]) -> None:
    strategy = make()
    stages = strategy.model.stages
    patches, norms, head = Calls(stages.patches), Calls(stages.block1.norm1), Calls(strategy.model.head)
    samples = example_stream().tasks[0].train[:8]
    strategy.loss(samples).backward()
    assert (patches.grad, norms.grad, head.grad) == ([False], [False, True], [True])


@each_method
def test_with_bfloat16_the_attention_is_in_it(make: Callable[..., Prompting]) -> None:
    strategy, seen = make(), []
    strategy.model.stages.block1.attention.out.register_forward_hook(lambda _, given, __: seen.append(given[0].dtype))
    with Numerics("bf16").lowering(torch.device("cpu")):
        loss = strategy.loss(example_stream().tasks[0].train[:8])
    assert seen == [torch.bfloat16] * 2 and loss.dtype == torch.float32


@each_method
def test_what_they_can_not_learn_is_refused(make: Callable[..., Prompting]) -> None:
    cls = type(make())
    with pytest.raises(TypeError, match=f"{cls.__name__} needs a vision transformer: VitTiny, or a Timm .*; Mlp is none"):
        cls(example_model())
    strategy = make()
    strategy.model.params["input_shape"] = (1, 4, 16)  # as many patches
    with pytest.raises(ValueError, match=r"VitTiny takes images of the shape \(1, 4, 16\), and these are of \(1, 8, 8\)"):
        run(strategy, example_stream())
    with pytest.raises(ValueError, match="needs boundaries, which example hides"):
        run(make(), example_stream(boundaries=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: l2p(chosen=6), "chosen must be a whole number from 1 to 5, not 6"),
        (lambda: dual(e_blocks=(1, 3)), r"e_blocks must be different numbers of blocks.*3 blocks, so \[1, 3\] can't be"),
        (lambda: dual(e_blocks=(0, 1)), r"g_blocks and e_blocks both have \[0\]"),
        (lambda: coda(blocks=(1, 1)), r"blocks must be different numbers"),
        (lambda: coda(blocks=()), "blocks must name at least one block"),
    ],
)
def test_options_that_can_not_be_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_l2p_learns_without_boundaries_if_classes_need_none() -> None:
    result = run(l2p(active_classes="seen"), example_stream(boundaries=False))
    assert result.accuracy.isfinite().all()
