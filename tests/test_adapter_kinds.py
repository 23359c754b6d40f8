"""Each kind of adapter: what it computes, where it is put, what it refuses; and in runs."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clstream.adapters import Bottleneck, InputPrompts, LoRA, Peft, Prefix, ScaleShift, adapt, adapters_of, without_adapters
from clstream.models import BatchNormMlp, ConvNet, Mlp, Timm, VitTiny
from clstream.models.vit_blocks import vit_of

SHAPE = (1, 8, 8)
OPTIONS = {"patch": 4, "width": 8, "depth": 2, "heads": 2}


def vit(**options):
    torch.manual_seed(0)
    return VitTiny(SHAPE, 10, **OPTIONS, **options)


def images(n=3, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def learning(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def draw(model):
    for name, weight in model.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(weight, std=0.5)
    return model


def test_a_bottleneck_beside_the_hidden_layer_and_after_it():
    model, x = draw(adapt(vit(), Bottleneck(width=3, scale=2.0))), torch.randn(2, 5, 8)
    mlp = model.stages.block1.mlp
    own = F.linear(F.relu(F.linear(x, mlp.adapter.down.weight, mlp.adapter.down.bias)), mlp.adapter.up.weight, mlp.adapter.up.bias)
    torch.testing.assert_close(mlp(x), mlp[2](mlp[1](mlp[0](x))) + 2 * own)
    assert list(dict(mlp.named_children())) == ["0", "1", "2", "adapter"]
    model = draw(adapt(vit(), Bottleneck(width=3, form="after", modules="*.attention")))
    attention = model.stages.block1.attention
    plain = vit().stages.block1.attention(x)
    torch.testing.assert_close(attention(x), plain + attention.adapter.up(F.relu(attention.adapter.down(plain))))


def test_a_bottleneck_of_convolutions():
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)))
    model, x = draw(adapt(deepcopy(body), Bottleneck(width=2, modules="0"), trained=[])), torch.randn(2, 3, 8, 8)
    adapter = model[0].adapter
    torch.testing.assert_close(model(x), body(x) + adapter.up(F.relu(adapter.down(x))))


@pytest.mark.parametrize(
    ("make", "shape"), [(vit, SHAPE), (lambda: Mlp(4, 3, hidden=(5,)), (4,)), (lambda: BatchNormMlp(4, 3), (4,)),
                        (lambda: ConvNet((3, 16, 16), 3), (3, 16, 16))]
)  # fmt: skip
def test_scale_and_shift_of_all_layers(make, shape):
    model, x = make().eval(), images(3, shape)
    before = model(x)
    adapt(model, ScaleShift())
    assert torch.equal(model(x), before)
    hosts = [module for module in model.modules() if hasattr(module, "adapter")]
    last, outputs = hosts[-1], []
    last.register_forward_hook(lambda module, taken, given: outputs.append(given))
    model(x)
    nn.init.constant_(last.adapter.scale, 2.0)
    nn.init.constant_(last.adapter.shift, 3.0)
    model(x)
    torch.testing.assert_close(outputs[1], 2 * outputs[0] + 3)


def test_a_prefix_is_what_vit_blocks_compute_with_its_keys_and_values():
    model, x = vit(), images()
    prompted = draw(adapt(deepcopy(model), Prefix(length=3)))
    prompts, parts = prompted.stages.adapter, vit_of(model)
    tokens = parts.run(parts.embed(x), {number: (prompts.keys[number], prompts.values[number]) for number in (0, 1)})
    assert torch.equal(prompted.features(x), parts.features(tokens))
    assert learning(prompted) == {"stages.adapter.keys", "stages.adapter.values", "head.weight", "head.bias"}


def test_input_prompts_are_tokens_that_all_attend_to():
    model, x = vit(), images()
    parts, tokens = vit_of(model), vit_of(model).embed(x)
    for deep in (False, True):
        prompted = draw(adapt(deepcopy(model), InputPrompts(length=3, deep=deep)))
        own = prompted.stages.adapter.tokens
        assert own.shape == (2 if deep else 1, 3, 8)
        whole = torch.cat([tokens[:, :1], own[0].expand(3, -1, -1), tokens[:, 1:]], 1)
        whole = parts.blocks[0](whole)
        if deep:
            whole = torch.cat([whole[:, :1], own[1].expand(3, -1, -1), whole[:, 4:]], 1)
        torch.testing.assert_close(prompted.features(x), parts.features(parts.blocks[1](whole)))


def test_prompts_in_a_vit_of_timm_that_pools_its_patches():
    pytest.importorskip("timm")
    model, x = Timm((3, 32, 32), 5, "test_vit"), images(2, (3, 32, 32))
    for adapter in (InputPrompts(length=2), Prefix(length=2)):
        prompted = adapt(deepcopy(model), adapter)
        nn.init.constant_(next(prompted.stages.adapter.parameters()), 0.0)
        assert prompted(x).shape == (2, 5)
        prompted(x).sum().backward()
        assert all((weight.grad is not None) == weight.requires_grad for weight in prompted.parameters())


@pytest.mark.parametrize(
    "adapter", [LoRA(), Bottleneck(), ScaleShift(), Prefix(2), InputPrompts(2)], ids=lambda adapter: type(adapter).__name__
)
def test_without_it_the_network_is_what_it_was(adapter):
    model, x = draw(adapt(vit(), adapter)), images()
    assert not torch.allclose(model.features(x), vit().features(x))
    plain = without_adapters(model)
    assert torch.equal(plain.features(x), vit().features(x))
    assert plain.state_dict().keys() == vit().state_dict().keys()


def test_a_classifier_of_another_name_is_named():
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), fc=nn.Linear(4, 2)))
    assert learning(adapt(model, LoRA(), trained="fc.*")) == {
        "body.adapter.A.weight", "body.adapter.B.weight", "fc.weight", "fc.bias"
    }  # fmt: skip


def test_a_copy_with_prompts_is_a_model_of_its_own():
    model, x = adapt(vit(), InputPrompts(length=2)), images()
    before, copy = model(x), deepcopy(model)
    assert copy.stages.whole == (copy,)
    draw(copy)
    nn.init.zeros_(copy.head.weight)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (lambda: adapt(Mlp(4, 3), Prefix()), TypeError, "Prefix needs a vision transformer"),
        (lambda: adapt(vit(), Prefix(), InputPrompts()), ValueError, "stages has an adapter already, Prefix"),
        (lambda: adapt(adapt(vit(), Prefix()), Prefix()), ValueError, "stages has an adapter already, Prefix"),
        (lambda: adapt(vit(), Prefix()).activations(images()), TypeError, "prompts reach into all blocks"),
        (lambda: adapt(ConvNet((3, 16, 16), 3), Bottleneck()), ValueError, r"no module of ConvNet is called '\*.mlp'"),
        (
            lambda: adapt(vit(), ScaleShift("*.attention")),
            ValueError,
            "ScaleShift is put on linear layers, convolutions",
        ),
        (lambda: Bottleneck(form="before"), ValueError, "form must be one of beside, after"),
        (lambda: Prefix(length=0), ValueError, "length must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        wrong()


def test_methods_of_peft():
    pytest.importorskip("peft")
    model, x = vit(), images()
    before = model(x)
    adapt(model, Peft("IA3", {"target_modules": ["q", "v"], "feedforward_modules": []}))
    torch.testing.assert_close(model(x), before)
    assert {name.partition(".ia3")[0] for name in learning(model)} == {"head.weight", "head.bias"} | {
        f"stages.block{number}.attention.{part}" for number in (1, 2) for part in "qv"
    }
    assert [adapter.params["method"] for adapter in adapters_of(model)] == ["IA3"]
    adapt(model, LoRA(modules="*.k"))
    assert not model.stages.block1.attention.q.base_layer.weight.requires_grad
    for wrong, sentence in (
        (lambda: Peft("NONE"), "peft has no method 'NONE': it has"),
        (lambda: Peft("LORA", {"rank": 3}), "peft's LORA can't have these options"),
        (lambda: adapt(vit(), Peft("LORA", {"target_modules": ["nothing"]})), "peft's LORA can't be put into VitTiny: .*nothing"),
        (lambda: adapt(vit(), Peft("LORA", {"target_modules": ["head"]})), "would be put on head, which learns itself"),
        (lambda: adapt(model, Peft("LORA", {"target_modules": ["out"]})), "VitTiny has adapters of peft already"),
        (lambda: adapt(adapt(vit(), LoRA(modules="*.q")), Peft("LORA", {"target_modules": ["A"]})), "or is in an adapter"),
        (lambda: adapt(vit(), Peft("PROMPT_TUNING", {"num_virtual_tokens": 2})), "peft's PROMPT_TUNING can't"),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrong()
