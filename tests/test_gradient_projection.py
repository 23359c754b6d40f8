"""GPM and OWM: bases and projectors by hand, gradients orthogonal to them, and old answers that stay."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import GPM, OWM, Finetune
from clstream.strategies.gpm import extended
from clstream.strategies.owm import renewed
from torch import Tensor, nn
from torch.optim import SGD

from clstream import BatchLearned, BatchReady, TaskStarted, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.strategy.layer_inputs import input_rows, inputs_of, matrix_layers

DOUBLE = torch.float64


def spans(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().T


def test_the_basis_has_the_vectors_worked_out_by_hand() -> None:
    """R has the columns 3 e2, 2 e1, e3: of squares 9, 4, 1 of 14. One vector spans 0.643, two 0.929."""
    inputs = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=DOUBLE)
    none = torch.zeros(3, 0, dtype=DOUBLE)
    for share, count, ones in ((0.64, 1, [1]), (0.65, 2, [1, 0]), (0.93, 3, [0, 1, 2]), (1.0, 3, [0, 1, 2]), (0.0, 0, [])):
        basis = extended(none, inputs @ inputs.T, share)
        assert basis.shape == (3, count)
        unit = torch.eye(3, dtype=DOUBLE)[:, ones]
        torch.testing.assert_close(spans(basis), unit @ unit.T)
    # a second task, of 2 (e1 + e2) and e3: with e1 there, 4 of 9 is spanned, then e2 makes it 8 of 9
    basis, more = torch.eye(3, dtype=DOUBLE)[:, :1], torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    assert torch.equal(extended(basis, more @ more.T, 0.4), basis)
    torch.testing.assert_close(spans(extended(basis, more @ more.T, 0.8)), torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE).diag())
    assert extended(basis, more @ more.T, 0.9).shape == (3, 3)


def test_bases_are_those_of_the_singular_value_decomposition() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(20, 50, generator=draw, dtype=DOUBLE) * torch.logspace(0, -2, 20)[:, None] for _ in range(2))
    basis = extended(torch.zeros(20, 0, dtype=DOUBLE), first @ first.T, 0.9)
    u, s, _ = torch.linalg.svd(first)
    count = int((s.square().cumsum(0) / s.square().sum() < 0.9).sum()) + 1
    torch.testing.assert_close(spans(basis), spans(u[:, :count]))
    longer = extended(basis, second @ second.T, 0.97)
    u, s, _ = torch.linalg.svd(second - spans(basis) @ second)
    spanned = 1 - (s.square().sum() - torch.cat([s.new_zeros(1), s.square().cumsum(0)])) / second.square().sum()
    count = int((spanned < 0.97).sum())
    torch.testing.assert_close(spans(longer), spans(basis) + spans(u[:, :count]))
    torch.testing.assert_close(longer.T @ longer, torch.eye(longer.shape[1], dtype=DOUBLE))


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_the_inputs_of_a_convolution_are_what_its_matrix_multiplies(padding: int | str, mode: str) -> None:
    stride = 1 if padding == "same" else 2
    layer = nn.Conv2d(3, 4, (3, 2), stride, padding, dilation=(1, 2), bias=False, padding_mode=mode)
    x = torch.randn(5, 3, 9, 8)
    rows, expected = input_rows(layer, x), layer(x)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, expected.permute(0, 2, 3, 1).flatten(0, 2))


class Steps:
    """Watches what a step does to the matrices, and what their gradients were."""

    def __init__(self, strategy: GPM | OWM) -> None:
        self.layers = matrix_layers(strategy.model)
        self.task, self.strategy = -1, strategy
        self.found: list[tuple[int, str, Tensor, Tensor]] = []

    @on(TaskStarted)
    def begin(self, event: TaskStarted) -> None:
        self.task = event.task.id

    @on(BatchReady)
    def before(self, event: BatchReady) -> None:
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @on(BatchLearned)
    def after(self, event: BatchLearned) -> None:
        for name, layer in self.layers.items():
            self.found.append((self.task, name, layer.weight.grad.clone(), layer.weight.detach() - self.weights[name]))


@pytest.mark.parametrize("make", [example_model, normed_model])
def test_gpm_steps_are_orthogonal_to_the_bases(make) -> None:
    strategy = GPM(make(), partial(SGD, lr=0.05, momentum=0.9), threshold=0.9)
    watch, bases = Steps(strategy), {}

    class Keep:
        @on(TaskStarted)
        def keep(self, event: TaskStarted) -> None:
            bases[event.task.id] = dict(strategy.bases)

    run(strategy, example_stream(epochs=2), watch, Keep())
    assert bases[0] == {} and set(bases[1]) == set(watch.layers)
    moved = 0.0
    for task, name, gradient, step in watch.found:
        if task:
            basis = bases[task][name]
            assert float((gradient.flatten(1) @ basis).abs().max()) < 1e-6 * max(1.0, float(gradient.norm()))
            assert float((step.flatten(1) @ basis).abs().max()) < 1e-6
            moved = max(moved, float(step.abs().max()))
    assert moved > 1e-3
    for name, basis in bases[2].items():  # each basis goes on from the one before
        torch.testing.assert_close(spans(basis) @ bases[1][name].double(), bases[1][name].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [partial(GPM, threshold=1.0, samples=60), partial(OWM, alpha=1e-6)], ids=["GPM", "OWM"])
def test_old_answers_stay_as_they_are(make) -> None:
    """With a basis of all that came, a network answers old samples as before, while it learns others, if there is room for it."""
    stream = example_stream(epochs=5, batch_size=1)  # OWM takes up means of batches
    strategy, plain = (kind(example_model(), partial(SGD, lr=0.01)) for kind in (make, Finetune))
    x, drift = stream.tasks[0].train[:30].x, []
    for learner in (strategy, plain):
        run(learner, stream, max_sessions=1)
        before = learner.model(x).detach()
        samples = stream.tasks[1].train[:]
        layers = matrix_layers(learner.model)
        for _ in range(20):
            learner.optimizer.zero_grad()
            learner.loss(samples).backward()
            if learner is strategy:
                learner.project(layers) if isinstance(learner, OWM) else learner.project()
            learner.optimizer.step()
        drift.append(float((learner.model(x).detach() - before).abs().max()))
    assert drift[0] < 0.02 * drift[1]


def test_gpm_holds_other_parameters_after_the_first_task_and_what_is_named_alone() -> None:
    strategy, found = GPM(example_model(), parameters="stages.*"), []

    class Watch:
        @on(BatchLearned)
        def see(self, event: BatchLearned) -> None:
            model = strategy.model
            found.append((strategy.tasks, bool(model.stages.layer1.bias.grad.any()), bool(model.head.bias.grad.any())))

    run(strategy, example_stream(), Watch())
    assert set(found) == {(0, True, True), (1, False, True), (2, False, True)}
    assert set(strategy.bases) == {"stages.layer1"}


@pytest.mark.parametrize("kind", [GPM, partial(OWM, update="task")])
def test_the_first_task_is_learned_freely(kind) -> None:
    one, two = kind(example_model()), Finetune(example_model())
    for strategy in (one, two):
        run(strategy, example_stream(epochs=2), max_sessions=1)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_projector_is_the_closed_form_however_it_takes_inputs_up() -> None:
    """P = I - A (A'A + alpha I)^-1 A' of all inputs, one by one, by a few, or by more than they have numbers."""
    inputs = torch.randn(30, 7, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for size in (1, 3, 15):
        projector = torch.eye(7, dtype=DOUBLE)
        for number, rows in enumerate(inputs[:15].split(size)):
            if number == 0 and size == 1:  # by the paper's equation
                r = rows[0]
                expected = projector - projector @ r[:, None] @ r[None] @ projector / (0.3 + r @ projector @ r)
                torch.testing.assert_close(renewed(projector, rows, 0.3), expected)
            projector = renewed(projector, rows, 0.3)
        a = inputs[:15].T
        closed = torch.eye(7, dtype=DOUBLE) - a @ torch.linalg.inv(a.T @ a + 0.3 * torch.eye(15, dtype=DOUBLE)) @ a.T
        torch.testing.assert_close(projector, closed)


@pytest.mark.parametrize("update", ["task", "step"])
def test_owm_steps_are_the_gradients_times_the_projectors_by_hand(update: str) -> None:
    """The projectors of a network of one layer, by a loop over batches: its inputs are the images, and 1 for the bias."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.double() / 255)

    stream = example_stream(batch_size=20, epochs=2)
    strategy = OWM(Net(), partial(SGD, lr=0.1), alpha=0.5, alpha_decay=0.1, update=update)
    held, steps = [torch.eye(65, dtype=DOUBLE)], []

    def take(p: Tensor, x: Tensor, alpha: float) -> Tensor:
        r = torch.cat([(x.double() / 255).flatten(1).mean(0), torch.ones(1, dtype=DOUBLE)])
        return p - torch.outer(p @ r, r @ p) / (alpha + r @ p @ r)

    class Watch:
        number = 0

        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            self.start = torch.cat([net[1].weight.detach(), net[1].bias.detach()[:, None]], 1).clone()
            loss = strategy.loss(event.batch.samples)
            weight, bias = torch.autograd.grad(loss, [net[1].weight, net[1].bias])
            if update == "step":
                held[0] = take(held[0], event.batch.samples.x, 0.5 * 0.1 ** (self.number % 6 / 6))
            self.expected = torch.cat([weight, bias[:, None]], 1) @ held[0]
            self.number += 1

        @on(BatchLearned)
        def after(self, event: BatchLearned) -> None:
            now = torch.cat([net[1].weight.detach(), net[1].bias.detach()[:, None]], 1)
            torch.testing.assert_close((self.start - now) / 0.1, self.expected)
            steps.append(float(self.expected.norm()))
            if update == "task" and self.number % 6 == 0:
                samples = stream.tasks[self.number // 6 - 1].train[:]
                for part, rows in enumerate(torch.arange(60).split(20)):
                    held[0] = take(held[0], samples.x[rows], 0.5 * 0.1 ** (part / 3))

    run(strategy, stream, Watch())
    assert len(steps) == 18
    torch.testing.assert_close(strategy.projectors["net.1"], held[0])


def test_what_goes_into_layers_is_noted_within_alone() -> None:
    model = example_model()
    layers = matrix_layers(model)
    assert list(layers) == ["stages.layer1", "head"]
    x = example_stream().tasks[0].train[:5].x
    with inputs_of(layers) as noted:
        model(x)
    model(x)
    assert [len(given) for given in noted.values()] == [1, 1] and noted["head"][0].shape == (5, 32)


def test_what_can_not_be_is_refused() -> None:
    for make, sentence in (
        (lambda: GPM(example_model(), threshold=1.5), "threshold must be a finite number from 0 to 1"),
        (lambda: GPM(example_model(), samples=0), "samples must be a whole number of at least 1"),
        (lambda: GPM(nn.Conv2d(4, 4, 3, groups=2)), "is a convolution of 2 groups, and only those of one group can be held"),
        (lambda: GPM(nn.LayerNorm(3)), "LayerNorm has no linear layer or 2d convolution"),
        (lambda: OWM(example_model(), alpha=0.0), "alpha must be a finite number above 0"),
        (lambda: OWM(example_model(), update="epoch"), "update must be one of task, step"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
