"""Heads: one of cosines, and one that grows as classes come."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

from clstream.models import GrowingHead, Mlp
from clstream.models.heads import CosineHead, grow_heads


def test_a_cosine_head_is_deaf_to_lengths():
    torch.manual_seed(0)
    head, features = CosineHead(5, 3), torch.randn(4, 5)
    expected = 10 * torch.stack([F.cosine_similarity(features, row[None], dim=1) for row in head.weight], 1)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(7 * features), expected)
    with torch.no_grad():
        head.weight *= torch.tensor([[0.1], [1.0], [30.0]])
    torch.testing.assert_close(head(features), expected)
    assert not head(torch.zeros(2, 5)).any() and head.bias is None
    with pytest.raises(ValueError, match="scale must be a finite number above 0, not 0"):
        CosineHead(5, 3, scale=0)


def test_unseen_classes_score_minus_infinity():
    head = GrowingHead(3, 5)
    x = torch.randn(2, 3)
    assert (head(x) == -torch.inf).all()
    head.grow([3, 1])
    assert head.labels.tolist() == [3, 1]
    out = head(x)
    assert (out[:, [0, 2, 4]] == -torch.inf).all()
    torch.testing.assert_close(out[:, [3, 1]], F.linear(x, head.weight, head.bias))
    assert F.cross_entropy(out, torch.tensor([3, 1])).isfinite()


def test_growing_leaves_the_old_outputs_as_they_were():
    head = GrowingHead(3, 5)
    head.grow([3, 1])
    x = torch.randn(2, 3)
    before, rows, biases = head(x), head.weight.clone(), head.bias.clone()
    same = head.weight, head.bias
    assert head.grow([1, 0, 3]) == 1  # 1 and 3 have theirs
    assert head.labels.tolist() == [3, 1, 0]
    assert (head.weight is same[0], head.bias is same[1]) == (True, True)  # whoever optimises them goes on doing so
    assert torch.equal(head.weight[:2], rows)
    assert torch.equal(head.bias[:2], biases)
    assert torch.equal(head(x)[:, [3, 1]], before[:, [3, 1]])
    assert head.grow([3, 0]) == 0


def test_new_rows_are_drawn_as_linear_draws_its_own():
    torch.manual_seed(0)
    head, plain = GrowingHead(16, 4000), nn.Linear(16, 4000)
    head.grow(range(4000))
    for mine, other in ((head.weight.data, plain.weight.data), (head.bias.data, plain.bias.data)):
        assert mine.abs().max() <= 0.25  # 1 / sqrt(16)
        assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.05)


def test_a_label_named_twice_gets_one_output():
    head = GrowingHead(3, 5)
    head.grow([1, 1, 0, 1])
    assert head.labels.tolist() == [1, 0]


def test_a_head_without_biases_is_a_matrix_that_grows():
    head = GrowingHead(3, 5, bias=False)
    optimizer = SGD(head.parameters(), lr=0.1, momentum=0.9)
    for labels in ([3, 1], [0]):
        grow_heads(head, [optimizer], lambda labels=labels: labels)
        head(x := torch.randn(2, 3))[:, labels].sum().backward()
        optimizer.step()
    assert [name for name, _ in head.named_parameters()] == ["weight"] and head.bias is None
    torch.testing.assert_close(head(x)[:, [3, 1, 0]], x @ head.weight.T)
    assert optimizer.state[head.weight]["momentum_buffer"].shape == (3, 3)
    other = GrowingHead(3, 5, bias=False)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight) and other.labels.tolist() == [3, 1, 0]


@pytest.mark.parametrize("label", [5, -1])
def test_only_classes_get_an_output(label):
    with pytest.raises(ValueError, match=str(label)):
        GrowingHead(3, 5).grow([label])


OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=0.01),
    "amsgrad": partial(AdamW, lr=0.01, weight_decay=0.0, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_growing_as_with_a_fixed_head_of_which_only_seen_classes_compete(name):
    torch.manual_seed(0)
    growing, fixed = (Mlp(4, 6, hidden=(8,), head=head) for head in ("growing", "fixed"))
    fixed.stages.load_state_dict(growing.stages.state_dict())
    optimizer, other = (OPTIMIZERS[name](model.parameters()) for model in (growing, fixed))
    seen = []
    for new in ([4, 1], [0], [5, 2]):
        grow_heads(growing, [optimizer], lambda new=new: new)
        seen += new
        with torch.no_grad():  # what is new starts from the same weights in both
            fixed.head.weight[new] = growing.head.weight[-len(new) :]
            fixed.head.bias[new] = growing.head.bias[-len(new) :]
        unseen = torch.tensor([label not in seen for label in range(6)])
        for _ in range(5):
            x, y = torch.randn(16, 4), torch.tensor(seen)[torch.randint(len(seen), (16,))]
            for model, step in ((growing, optimizer), (fixed, other)):
                step.zero_grad()
                F.cross_entropy(model(x).masked_fill(unseen, -torch.inf), y).backward()
                step.step()
        torch.testing.assert_close(growing.head.weight, fixed.head.weight[seen])
        torch.testing.assert_close(growing.head.bias, fixed.head.bias[seen])
        torch.testing.assert_close(growing.stages.layer1.weight, fixed.stages.layer1.weight)
    assert len(optimizer.state) == (0 if name == "sgd" else 4)  # nothing is kept for parameters that were replaced
    for parameter, state in optimizer.state.items():
        assert all(value.shape in (parameter.shape, ()) for value in state.values() if isinstance(value, torch.Tensor))
