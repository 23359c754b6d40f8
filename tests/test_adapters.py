"""Adapters: put into networks from outside by name patterns, frozen but for themselves and the head."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clstream.adapters import LoRA, ScaleShift, adapt, adapters_of
from clstream.models import BatchNormMlp, ConvNet, Mlp, VitTiny

SMALL = {"patch": 7, "width": 8, "depth": 2, "heads": 2}
SHAPE = (1, 28, 28)


def vit(**options):
    torch.manual_seed(0)
    return VitTiny(SHAPE, 5, **SMALL, **options)


def images(n=3, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def draw(model, scale=0.5):
    """Give all weights of adapters other values than those that they begin with."""
    for name, weight in model.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(weight, std=scale)
    return model


def learning(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_a_network_begins_as_it_was_and_all_but_adapters_and_head_are_frozen():
    model, x = vit(), images()
    before, names = model(x), dict(model.named_parameters())
    assert adapt(model, LoRA(rank=2, modules="*.attention.*")) is model
    assert torch.equal(model(x), before)
    assert {name: weight for name, weight in model.named_parameters() if ".adapter." not in name} == names  # the same objects
    assert learning(model) == {"head.weight", "head.bias"} | {
        f"stages.block{block}.attention.{part}.adapter.{matrix}.weight"
        for block in (1, 2) for part in ("q", "k", "v", "out") for matrix in "AB"
    }  # fmt: skip
    model(x).sum().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == learning(model)


def test_what_it_computes_is_the_sum_of_both_weights():
    model = adapt(nn.Sequential(nn.Linear(2, 2, bias=False)), LoRA(rank=1, modules="0"), trained=[])
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].adapter.A.weight.copy_(torch.tensor([[0.5, -0.5]]))
        x = torch.tensor([[2.0, 1.0]])
        assert model(x).tolist() == [[2.0, 1.0]]
        model[0].adapter.B.weight.copy_(torch.tensor([[1.0], [2.0]]))
    assert model(x).tolist() == [[2.5, 2.0]]
    scaled = adapt(nn.Sequential(nn.Linear(6, 4)), LoRA(rank=2, alpha=5.0), trained=[])
    layer, x = draw(scaled)[0], torch.randn(3, 6)
    torch.testing.assert_close(
        scaled(x), F.linear(x, layer.weight + 2.5 * layer.adapter.B.weight @ layer.adapter.A.weight, layer.bias)
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_of_a_convolution_too(kernel):
    layer = nn.Conv2d(4, 6, kernel, stride=2, padding=kernel // 2)
    model, x = draw(adapt(nn.Sequential(layer), LoRA(rank=2, modules="0"), trained=[])), torch.randn(2, 4, 8, 8)
    merged = layer.weight + torch.einsum("or,rikl->oikl", layer.adapter.B.weight[:, :, 0, 0], layer.adapter.A.weight)
    torch.testing.assert_close(model(x), F.conv2d(x, merged, layer.bias, 2, kernel // 2))


@pytest.mark.parametrize("parts", ["qkv", "qv"])
def test_parts_of_a_fused_layer_are_as_layers_of_their_own(parts):
    separate, fused, x = vit(), vit(fused=True), images()
    state = separate.state_dict()
    for block in (1, 2):
        for kind in ("weight", "bias"):
            names = [f"stages.block{block}.attention.{part}.{kind}" for part in "qkv"]
            state[f"stages.block{block}.attention.qkv.{kind}"] = torch.cat([state.pop(name) for name in names])
    fused.load_state_dict(state)
    draw(adapt(separate, LoRA(rank=2, modules=[f"*.{part}" for part in parts])))
    adapt(fused, LoRA(rank=2, parts=parts, modules="*.qkv"))
    for block in (1, 2):
        own, theirs = (model.get_submodule(f"stages.block{block}.attention") for model in (fused, separate))
        with torch.no_grad():
            own.qkv.adapter.A.weight.copy_(torch.cat([theirs.get_submodule(part).adapter.A.weight for part in parts]))
            for layer, part in zip(own.qkv.adapter.B, parts, strict=True):
                layer.weight.copy_(theirs.get_submodule(part).adapter.B.weight)
    torch.testing.assert_close(fused(x), separate(x))


def test_a_copy_has_adapters_of_its_own():
    model, x = vit(), images()
    teacher = deepcopy(adapt(model, LoRA()))
    before = model(x)
    draw(teacher)
    assert torch.equal(model(x), before)
    assert not torch.equal(teacher(x), before)
    assert [type(adapter) for adapter in adapters_of(teacher)] == [LoRA]


@pytest.mark.parametrize("adapter", [LoRA(), ScaleShift()], ids=["LoRA", "ScaleShift"])
def test_batch_norm_of_a_frozen_network_stays_as_it_is(adapter):
    model = adapt(BatchNormMlp(4, 5), adapter)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    model(torch.rand(6, 4))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_what_torchs_own_layers_may_not_call_is_passed_over():
    model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)), torch.randn(2, 3, 8)
    adapt(model, LoRA(), trained=[])
    assert learning(model) == {"1.adapter.A.weight", "1.adapter.B.weight"}
    assert model(x).shape == x.shape
    with pytest.raises(ValueError, match=r"0.self_attn.out_proj learns itself, is not called by what it is in"):
        adapt(model, LoRA(modules="*.out_proj"), trained=[])


def test_a_second_call_leaves_the_first_adapters_learning():
    model = adapt(vit(), LoRA(modules="*.q"))
    first = learning(model)
    adapt(model, LoRA(rank=1, modules="*.v"))
    assert first < learning(model)
    assert [adapter.rank for adapter in adapters_of(model)] == [4, 1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda model: adapt(model, LoRA(modules="*.attn.*")), r"no module of VitTiny is called '\*.attn.\*'; near it: stages.bl"),
        (
            lambda model: adapt(model, LoRA(modules=["*.q", "*.norm1"])),
            "names none in VitTiny: stages.block2.norm1 is of",
        ),
        (lambda model: adapt(model, LoRA(modules="head")), "names none in VitTiny: head learns itself"),
        (lambda model: adapt(model, LoRA(modules="*.q"), LoRA(modules="*.q")), "q has an adapter already, LoRA: a module takes"),
        (lambda model: adapt(adapt(model, LoRA()), LoRA()), "has an adapter already, LoRA"),
        (lambda model: adapt(model, LoRA(parts="qv")), "stages.patches.embed is none: name these by modules"),
        (lambda model: adapt(model, LoRA(), trained="classifier.*"), "no parameter of VitTiny is called 'classifier"),
        (lambda model: adapt(Mlp(4, 3), LoRA()), "LoRA is put on linear layers, and convolutions in one group, and .* LinearRelu"),
        (lambda model: LoRA(parts="vq"), "parts must be some of q, k and v in this order"),
        (lambda model: LoRA(rank=0), "rank must be a whole number of at least 1"),
        (lambda model: LoRA(modules=[]), "modules must name at least one pattern"),
        (lambda model: LoRA(modules=3), "modules must be a pattern of names"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(vit())


def test_a_refusal_changes_nothing():
    model = vit()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="is called"):
        adapt(model, LoRA(modules="*.q"), LoRA(modules="nothing"))
    assert names == [name for name, _ in model.named_modules()]
    assert learning(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("wrong", [lambda: adapt("model", LoRA()), lambda: adapt(vit()), lambda: adapt(vit(), LoRA)])
def test_what_is_no_module_or_adapter_is_refused(wrong):
    with pytest.raises(TypeError, match="adapt takes"):
        wrong()


def test_lora_is_that_of_peft():
    peft = pytest.importorskip("peft")
    x = images()
    model, theirs = vit(), vit()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=r".*(\.q|\.v|embed)")
    peft.inject_adapter_in_model(config, theirs)
    adapt(model, LoRA(rank=2, alpha=6.0, modules=["*.q", "*.v", "*.embed"]))
    torch.manual_seed(3)
    for name, host in model.named_modules():
        if hasattr(host, "adapter"):
            layer = theirs.get_submodule(name)
            for ours, weight in ((host.adapter.A, layer.lora_A.default.weight), (host.adapter.B, layer.lora_B.default.weight)):
                assert ours.weight.shape == weight.shape
                nn.init.normal_(weight)
                ours.weight.data.copy_(weight)
    assert not torch.equal(model(x), vit()(x))
    torch.testing.assert_close(model(x), theirs(x))
    gradients = [torch.autograd.grad(network(x).square().sum(), weights) for network, weights in (
        (model, [model.stages.block1.attention.q.adapter.A.weight, model.stages.block2.attention.v.adapter.B.weight]),
        (theirs, [theirs.stages.block1.attention.q.lora_A.default.weight, theirs.stages.block2.attention.v.lora_B.default.weight]),
    )]  # fmt: skip
    torch.testing.assert_close(*gradients)


def test_of_a_network_of_convolutions():
    model = adapt(ConvNet((3, 16, 16), 3), LoRA())
    assert learning(model) > {"head.weight", "head.bias"}
