"""A vision transformer run block by block is the model, and prompts go before keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.adapters import LoRA, Prefix, adapt
from clstream.models import Mlp, Pretrained, Timm, VitTiny
from clstream.models.vit_blocks import vit_of

SHAPE = (3, 32, 32)


def tiny(fused: bool = False) -> VitTiny:
    torch.manual_seed(0)
    return VitTiny((1, 8, 8), 5, width=16, depth=2, heads=2, fused=fused)


def of_timm(name: str) -> nn.Module:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = Timm(SHAPE, 5, name)
    for parameter in model.parameters():  # LayerScale and registers would hardly be seen at their first values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images(shape: tuple[int, ...], n: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8)


@pytest.mark.parametrize("fused", [False, True])
def test_block_by_block_is_vit_tiny(fused: bool) -> None:
    model, x = tiny(fused), images((1, 8, 8))
    vit = vit_of(model)
    tokens = vit.run(vit.embed(x))
    assert torch.equal(model.head(vit.features(tokens)), model(x))
    assert torch.equal(vit.norm(tokens)[:, 0], vit.features(tokens))
    assert vit.norm(tokens).shape == (3, 5, 16)
    assert (vit.width, vit.prefix, len(vit.blocks)) == (16, 1, 2)
    assert vit.class_token is model.stages.patches.token


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])  # the last two: registers, LayerScale, other pooling
def test_block_by_block_is_timms_model(name: str) -> None:
    model, x = of_timm(name), images(SHAPE)
    vit = vit_of(model)
    assert torch.equal(model.head(vit.features(vit.run(vit.embed(x)))), model(x))
    assert (vit.prefix, vit.class_token is not None) == (1, name == "test_vit")


def test_block_by_block_is_timms_model_with_all_that_it_can_have() -> None:
    timm = pytest.importorskip("timm")
    model, x = of_timm("test_vit"), images(SHAPE)
    model.stages.body = timm.models.VisionTransformer(
        32, 8, num_classes=0, embed_dim=64, depth=2, num_heads=2, qk_norm=True, scale_attn_norm=True, init_values=0.5,
        no_embed_class=True, reg_tokens=2, pre_norm=True, drop_path_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5,
    )  # fmt: skip
    vit = vit_of(model.train())
    assert (vit.prefix, len(vit.blocks)) == (3, 2)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(model.head(vit.features(vit.run(vit.embed(x)))), expected)


def test_a_pretrained_vit_takes_images_of_another_size() -> None:
    pytest.importorskip("timm")
    model, x = Pretrained((1, 20, 20), 5, "test_vit", weights="random", size=32).eval(), images((1, 20, 20))
    vit = vit_of(model)
    assert torch.equal(model.head(vit.features(vit.run(vit.embed(x)))), model(x))


@pytest.mark.parametrize("fused", [False, True])
def test_queries_keys_and_values_alone_are_those_of_all_three(fused: bool) -> None:
    block = vit_of(tiny(fused)).blocks[0]
    tokens = torch.randn(3, 5, 16)
    q, k, v = block.qkv(tokens)
    torch.testing.assert_close((block.queries(tokens), *block.keys_values(tokens)), (q, k, v))
    torch.testing.assert_close(block.mix(block.queries(tokens[:, :1]), k, v), block.attention(tokens)[:, :1])


def test_a_fused_layer_that_is_more_than_a_linear_layer_is_called_whole() -> None:
    model = tiny(fused=True)
    attention = model.stages.block1.attention
    attention.qkv = nn.Sequential(attention.qkv, nn.Tanh())
    block, tokens = vit_of(model).blocks[0], torch.randn(3, 5, 16)
    assert torch.equal(block.queries(tokens), block.qkv(tokens)[0])


def test_prompts_are_more_keys_and_values_for_every_head() -> None:
    block, (n, t, d, p, heads) = vit_of(tiny()).blocks[0], (3, 5, 16, 2, 2)
    tokens, keys, values = torch.randn(n, t, d), torch.randn(n, p, d), torch.randn(n, p, d)
    mixed = []
    q, k, v = (layer(tokens) for layer in block.projections)
    k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    for head in range(heads):
        part = slice(head * d // heads, (head + 1) * d // heads)
        weights = F.softmax(q[..., part] @ k[..., part].mT / (d // heads) ** 0.5, 2)
        mixed.append(weights @ v[..., part])
    expected = block.output[0](torch.cat(mixed, 2))
    torch.testing.assert_close(block.attention(tokens, (keys, values)), expected)


def test_prompts_for_all_are_those_of_each_sample() -> None:
    vit = vit_of(tiny())
    tokens, keys, values = vit.embed(images((1, 8, 8))), torch.randn(2, 16), torch.randn(2, 16)
    same = vit.run(tokens, {1: (keys.expand(3, 2, 16), values.expand(3, 2, 16))})
    assert torch.equal(vit.run(tokens, {1: (keys, values)}), same)
    assert not torch.equal(vit.run(tokens), same)


@pytest.mark.parametrize("shape", [(2, 8), (4, 2, 16), (16,)])
def test_prompts_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    vit = vit_of(tiny())
    with pytest.raises(ValueError, match=r"must be \(p, 16\), or \(n, p, 16\) with n = 3 samples"):
        vit.blocks[0](vit.embed(images((1, 8, 8))), (torch.zeros(shape), torch.zeros(shape)))


def test_what_is_no_such_vit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"L2P needs a vision transformer: VitTiny, or .*Mlp is none"):
        vit_of(Mlp((1, 8, 8), 5), "L2P")
    pytest.importorskip("timm")
    with pytest.raises(TypeError, match="Timm around a ResNet is none"):
        vit_of(Timm(SHAPE, 5, "resnet10t"))


def test_what_would_be_left_out_is_refused() -> None:
    model = tiny()
    model.stages.block1.attention = nn.Sequential(model.stages.block1.attention)
    with pytest.raises(TypeError, match="here is a Sequential in place of its Attention"):
        vit_of(model)
    model = tiny()
    model.stages.block1.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="a hook on _TransformerBlock would be left out"):
        vit_of(model)


def test_prompts_from_outside_are_refused_and_lora_is_kept() -> None:
    with pytest.raises(TypeError, match=r"MultiLane runs .* this one's stages are PromptedStages, which would be left out"):
        vit_of(adapt(tiny(), Prefix(length=2)), "MultiLane")
    model, x = adapt(tiny(), LoRA(rank=2)), images((1, 8, 8))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # what LoRA adds is 0 at first
    vit = vit_of(model)
    torch.testing.assert_close(model.head(vit.features(vit.run(vit.embed(x)))), model(x))


def test_images_of_another_size_are_refused() -> None:
    vit = vit_of(tiny())
    vit.check_input((1, 8, 8))
    with pytest.raises(ValueError, match=r"VitTiny takes images of the shape \(1, 8, 8\), and these are of \(1, 4, 16\)"):
        vit.check_input((1, 4, 16))
