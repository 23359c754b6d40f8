"""Models: shapes, what each computes against a version by hand, published numbers of parameters, and what is refused."""

from fnmatch import fnmatch
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.models import Classifier, ConvNet, LeNet, Mlp, ResNet18, SlimResNet18, Timm, VitTiny
from clstream.models.heads import CosineHead, grow_heads
from clstream.models.layers import HalvingPool, Normalise

IMAGE = (3, 12, 16)

MODELS = {
    "Mlp": (partial(Mlp, IMAGE, hidden=(7, 5)), 5),
    "linear Mlp": (partial(Mlp, IMAGE, hidden=()), 576),
    "ConvNet": (partial(ConvNet, IMAGE, channels=(2, 3, 4), hidden=6), 6),
    "normed ConvNet": (partial(ConvNet, IMAGE, channels=(2, 3, 4), hidden=6, norm="batch"), 6),
    "LeNet": (partial(LeNet, IMAGE), 84),
    "ResNet18": (partial(ResNet18, IMAGE, width=3), 24),
    "SlimResNet18": (partial(SlimResNet18, IMAGE), 160),
    "VitTiny": (partial(VitTiny, IMAGE, width=8, depth=2, heads=2), 8),
    "fused VitTiny": (partial(VitTiny, IMAGE, width=8, depth=2, heads=2, fused=True), 8),
}

every_model = pytest.mark.parametrize("name", MODELS)

both_heads = pytest.mark.parametrize("head", ["fixed", "growing"])


def build(name, head="fixed", classes=4, **options):
    torch.manual_seed(0)
    return MODELS[name][0](classes=classes, head=head, **options).eval()


def images(n=3):
    return torch.randint(256, (n, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@every_model
@both_heads
def test_shapes(name, head):
    model = build(name, head)
    grow_heads(model, [SGD(model.parameters(), lr=0.1)], lambda: [0, 1, 2, 3])
    for n in (1, 3):
        assert model(images(n)).shape == (n, 4)
        assert model.features(images(n)).shape == (n, MODELS[name][1])
    assert model(images()).dtype == torch.float32


@every_model
def test_uint8_equals_floats_from_zero_to_one(name):
    model = build(name, mean=0.3, std=0.5)
    assert torch.equal(model(images()), model(images().float() / 255))
    assert torch.equal(model(images()), model(images().double().div(255).float()))


@every_model
def test_inputs_are_not_changed(name):
    x, floats = images(), images() / 255
    build(name, mean=0.3, std=0.5)(x)
    build(name)(floats)
    assert torch.equal(x, images())
    assert torch.equal(floats, images() / 255)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"LeNet"}))  # it pads raw images
def test_mean_and_std_are_applied_after_the_division(name):
    torch.testing.assert_close(build(name, mean=0.3, std=0.5)(images()), build(name)((images() / 255 - 0.3) / 0.5))


@pytest.mark.parametrize("name", ["ConvNet", "ResNet18", "SlimResNet18"])
def test_mean_and_std_of_each_channel(name):
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    x = (images() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(build(name, mean=tuple(mean.tolist()), std=tuple(std.tolist()))(images()), build(name)(x))


@every_model
@both_heads
@pytest.mark.parametrize("training", [False, True])
def test_features_and_activations_are_on_the_way_to_the_logits(name, head, training):
    model = build(name, head).train(training)
    grow_heads(model, [SGD(model.parameters(), lr=0.1)], lambda: [2, 0])
    logits = model(images())
    assert torch.equal(model.head(model.features(images())), logits)
    assert torch.equal(model.from_activations(model.activations(images())), logits)


@every_model
def test_each_stage_can_be_the_cut(name):
    model = build(name)
    for cut, _ in model.stages.named_children():
        model.cut = cut
        assert torch.equal(model.from_activations(model.activations(images())), model(images()))


def test_the_cut_gives_what_its_stage_gives():
    assert build("ConvNet").activations(images()).shape == (3, 4, 3, 4)  # conv3: 4 channels, a quarter of 12 x 16
    assert build("Mlp").activations(images()).shape == (3, 5)
    assert build("ResNet18").activations(images()).shape == (3, 24, 2, 2)


@every_model
def test_the_normalisation_is_no_part_of_the_state(name):
    model = build(name, mean=0.3, std=0.5)
    assert not any("input" in key for key in model.state_dict())
    build(name).load_state_dict(model.state_dict())


def test_mlp_is_linear_layers_with_relu_between():
    model = Mlp((2, 3), 4, hidden=(8, 5))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))
    for into, source in zip(plain.parameters(), model.parameters(), strict=True):
        into.data.copy_(source)
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.features(x), plain[:-1](x))


def test_mlp_takes_a_size_for_a_shape():
    assert parameters(Mlp(6, 4, hidden=(8,))) == parameters(Mlp((1, 2, 3), 4, hidden=(8,))) == 6 * 8 + 8 + 8 * 4 + 4


def test_convnet_is_three_convolutions_and_a_hidden_layer():
    model = ConvNet((1, 8, 12), 3, channels=(2, 4, 5), hidden=6)
    weights = [p.detach() for p in model.parameters()]
    x = torch.randn(4, 1, 8, 12)
    out = F.max_pool2d(F.conv2d(x, *weights[0:2], padding=1).relu(), 2)
    out = F.max_pool2d(F.conv2d(out, *weights[2:4], padding=1).relu(), 2)
    out = F.conv2d(out, *weights[4:6], padding=1).relu().flatten(1)
    out = F.linear(F.linear(out, *weights[6:8]).relu(), *weights[8:10])
    torch.testing.assert_close(model(x), out)


def test_convnet_can_have_batch_norm_before_the_relus():
    model = ConvNet((1, 8, 12), 3, channels=(2, 4, 5), hidden=6, norm="batch")
    weights = [p.detach() for p in model.parameters()]
    x = torch.randn(4, 1, 8, 12)
    out = x
    for place in (0, 4, 8):
        weight, bias, *scale = weights[place : place + 4]
        out = F.batch_norm(F.conv2d(out, weight, bias, padding=1), None, None, *scale, training=True).relu()
        out = F.max_pool2d(out, 2) if place < 8 else out
    out = F.linear(F.linear(out.flatten(1), *weights[12:14]).relu(), *weights[14:16])
    torch.testing.assert_close(model(x), out)
    with pytest.raises(ValueError, match="norm must be one of none, batch, not 'layer'"):
        ConvNet((1, 8, 12), 3, norm="layer")


def resnet_parameters(width, classes):
    """Count by hand: 3x3 convolutions without bias, batch norm with two numbers a channel, 1x1 shortcuts, and the head."""

    def block(into, out, shortcut):
        return 9 * into * out + 2 * out + 9 * out * out + 2 * out + (into * out + 2 * out if shortcut else 0)

    stem = 9 * 3 * width + 2 * width
    stages = block(width, width, shortcut=False) * 2
    for into in (width, 2 * width, 4 * width):
        stages += block(into, 2 * into, shortcut=True) + block(2 * into, 2 * into, shortcut=False)
    return stem + stages + 8 * width * classes + classes


def test_resnets_have_as_many_parameters_as_published():
    # slim: stem 580, stages 14,560 + 51,600 + 205,600 + 820,800, head 16,100
    assert parameters(SlimResNet18((3, 32, 32), 100)) == resnet_parameters(20, 100) == 1_109_240
    assert parameters(ResNet18((3, 32, 32), 10)) == resnet_parameters(64, 10) == 11_173_962


def test_without_its_last_relu_a_resnet_has_features_of_both_signs():
    whole, open_ended = build("ResNet18"), build("ResNet18", last_relu=False)
    x = images()
    maps = open_ended.activations(x)
    assert torch.equal(maps.relu(), whole.activations(x)) and bool((maps < 0).any())
    assert torch.equal(open_ended.features(x), maps.mean((2, 3))) and bool((open_ended.features(x) < 0).any())
    assert open_ended.stages.layer3[1].relu and not open_ended.stages.layer4[1].relu


def test_resnet_block_adds_its_input():
    model = ResNet18((3, 8, 8), 2, width=4).eval()
    block = model.stages.layer1[0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), x.relu())  # nothing is left but the shortcut


def attention_by_hand(x, layer, heads):
    """softmax(q k' / sqrt(d)) v for each sample and head by itself."""
    out = torch.empty_like(x)
    for sample, tokens in enumerate(x):
        q, k, v = layer.q(tokens), layer.k(tokens), layer.v(tokens)
        for columns in torch.arange(x.shape[2]).chunk(heads):
            near = (q[:, columns] @ k[:, columns].T / len(columns) ** 0.5).softmax(1)
            out[sample][:, columns] = near @ v[:, columns]
    return layer.out(out)


def test_vit_is_a_transformer_over_patches():
    model = build("VitTiny")
    x = images() / 255
    stages = model.stages
    patches = torch.stack([x[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4, 8) for j in (0, 4, 8, 12)], 1)
    tokens = patches @ stages.patches.embed.weight.flatten(1).T + stages.patches.embed.bias
    tokens = torch.cat([stages.patches.token.expand(3, 1, 8), tokens], 1) + stages.patches.positions
    for block in (stages.block1, stages.block2):
        tokens = tokens + attention_by_hand(block.norm1(tokens), block.attention, 2)
        tokens = tokens + block.mlp[2](F.gelu(block.mlp[0](block.norm2(tokens))))
    expected = F.layer_norm(tokens[:, 0], (8,), stages.norm.weight, stages.norm.bias)
    torch.testing.assert_close(model.features(x), expected)


def test_a_fused_vit_computes_the_same_and_its_parameters_can_be_found_by_name():
    model, fused = build("VitTiny"), build("fused VitTiny")
    state = model.state_dict()
    for block in ("block1", "block2"):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"stages.{block}.attention.{part}.{kind}") for part in "qkv"]
            state[f"stages.{block}.attention.qkv.{kind}"] = torch.cat(parts)
    fused.load_state_dict(state)
    torch.testing.assert_close(fused(images()), model(images()))
    names = [name for name, _ in model.named_parameters() if fnmatch(name, "*.q.weight")]
    assert names == ["stages.block1.attention.q.weight", "stages.block2.attention.q.weight"]


def test_vit_tiny_becomes_the_published_vit_ti():
    """DeiT-Ti/16 at 224 x 224 has 5,717,416 parameters (12 blocks of width 192, 3 heads)."""
    assert parameters(VitTiny((3, 224, 224), 1000, patch=16, width=192, depth=12, heads=3)) == 5_717_416


def test_normalise_keeps_floats_and_scales_bytes():
    assert Normalise()(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert Normalise()(torch.tensor([-2.0, 51.0])).tolist() == [-2, 51]
    assert Normalise(0.5, 0.25)(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == pytest.approx([-2, 2])


@every_model
def test_every_model_takes_a_cosine_head(name):
    model = build(name, head="cosine")
    assert isinstance(model.head, CosineHead)
    logits = model(images())
    assert logits.shape == (3, 4) and logits.abs().max() <= 10.0001


@pytest.mark.parametrize("shape", [0, (3, 0, 4), (-1,), ()])
def test_mlp_refuses_shapes_without_size(shape):
    with pytest.raises(ValueError, match="input_shape must be a size or some sizes of at least 1"):
        Mlp(shape, 2)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (ConvNet, (28, 28), "ConvNet takes images .* at least 4 x 4"),
        (ConvNet, 784, "ConvNet takes images"),
        (ConvNet, (1, 3, 28), "at least 4 x 4"),
        (ResNet18, (3, 32, 7), "ResNet18 takes images .* at least 8 x 8"),
        (SlimResNet18, (3, 32), "SlimResNet18 takes images"),
        (SlimResNet18, (0, 32, 32), "at least 1"),
        (VitTiny, 784, "VitTiny takes images .* at least 4 x 4"),
        (VitTiny, (1, 28, 30), "VitTiny cuts images into 4 x 4 patches, and 28 x 30 is no whole number of them"),
        (partial(VitTiny, width=10, heads=4), (1, 8, 8), "width must be a multiple of heads, which 10 of 4 is not"),
        (partial(VitTiny, depth=0), (1, 8, 8), "depth must be a whole number of at least 1"),
    ],
)
def test_image_models_refuse_other_shapes(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(shape, 10)


@every_model
def test_bad_heads_and_classes_are_refused(name):
    with pytest.raises(ValueError, match="head must be one of fixed, growing, cosine, not 'shrinking'"):
        build(name, head="shrinking")
    with pytest.raises(ValueError, match="classes must be a whole number of at least 1, not 0"):
        build(name, classes=0)


def test_a_cut_must_be_a_stage():
    with pytest.raises(ValueError, match="cut must be one of the stages first, second, not 'third'"):
        Classifier({"first": nn.Flatten(), "second": nn.ReLU()}, 3, 2, "fixed", cut="third")


@both_heads
def test_timm_has_our_head(head):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = Timm((1, 32, 32), 4, name="test_resnet", head=head).eval()
    grow_heads(model, [SGD(model.parameters(), lr=0.1)], lambda: [0, 1, 2, 3])
    x = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    logits = model(x)
    assert logits.shape == (2, 4)
    assert model.features(x).shape == (2, model.head.in_features)
    assert torch.equal(model.from_activations(model.activations(x)), logits)
    assert torch.equal(model(x / 255), logits)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_models_of_timm_take_the_size_of_the_images_and_heads_the_width_of_features(name):
    pytest.importorskip("timm")
    model = Timm((3, 32, 48), 4, name=name).eval()
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 4)


def test_timm_names_models_near_one_that_it_does_not_have():
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm has no model 'resnet1'; near it: ") as caught:
        Timm((3, 32, 32), 4, name="resnet1")
    assert timm.is_model(str(caught.value).split("near it: ")[1].split(", ")[0])


def test_an_mlp_has_the_activation_that_is_asked_for():
    curved, bent = (Mlp(4, 3, hidden=(5,), activation=activation) for activation in ("tanh", "relu"))
    curved.load_state_dict(bent.state_dict())
    x = torch.randn(6, 4)
    inner = F.linear(x, bent.stages.layer1.weight, bent.stages.layer1.bias)
    assert torch.equal(curved.features(x), inner.tanh())
    assert torch.equal(bent.features(x), inner.relu())
    with pytest.raises(ValueError, match="activation must be one of relu, tanh, not 'gelu'"):
        Mlp(4, 3, activation="gelu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3)])
def test_pooling_is_torchs_with_and_without_gradients(layout, size):
    x = torch.randn(5, 3, *size).to(memory_format=layout)
    x[0, 0, 0, 0], x[1, :, :2, :2] = float("nan"), 1.0  # a tie too
    wanted, pool = F.max_pool2d(x, 2), HalvingPool()
    with torch.no_grad():
        assert torch.equal(pool(x).nan_to_num(9), wanted.nan_to_num(9))
    assert torch.equal(torch.func.vmap(pool)(x[None])[0].nan_to_num(9), wanted.nan_to_num(9))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pool(ours).nan_to_num().square().sum().backward()
    F.max_pool2d(theirs, 2).nan_to_num().square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_lenet_has_the_size_of_tames_and_pads_raw_images_before_they_are_normalised():
    assert parameters(LeNet((1, 28, 28), 10)) == 61_706
    assert parameters(LeNet((1, 28, 28), 2)) == 61_026
    small = LeNet((1, 28, 28), 10, mean=0.1307, std=0.3081)
    x = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    padded = F.pad(x, (2, 2, 2, 2))
    assert torch.equal(small.stages.input(x), small.stages.input(padded))
    assert float(small.stages.input(x)[0, 0, 0, 0]) == pytest.approx(-0.1307 / 0.3081)
    assert LeNet((3, 40, 50), 7)(torch.zeros(2, 3, 40, 50)).shape == (2, 7)
