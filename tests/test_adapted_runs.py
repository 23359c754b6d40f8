"""Networks with adapters in runs: resumed, as files of weights, on the command line."""

import pytest
import torch
from clstream.strategies import EWC, L2, Finetune, LwF, Replay
from clstream.streams import split_digits
from torch import nn

import clstream.adapters
from clstream import run
from clstream.adapters import Bottleneck, InputPrompts, LoRA, Peft, Prefix, ScaleShift, adapt
from clstream.checkpoint.compare import difference
from clstream.checks.recorders import Checkpoints
from clstream.cli import main
from clstream.cli.sweep_plan import plan_of
from clstream.models import VitTiny
from clstream.pretraining import load_weights, save_weights, weights_header

STREAM = split_digits([[0, 1], [2, 3]], epochs=1, batch_size=64)


def vit(**options):
    torch.manual_seed(0)
    return VitTiny((1, 8, 8), 10, patch=4, width=8, depth=2, heads=2, **options)


def adapted():
    return adapt(vit(head="growing"), LoRA(rank=2, modules="*.attention.*"), Bottleneck(width=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's attention for the gradients of single samples
@pytest.mark.parametrize(
    "make",
    [
        lambda: LwF(adapted()),  # its teacher is a copy that is made while the run goes on
        lambda: EWC(adapted(), parameters="*.adapter.*"),
        lambda: L2(adapted(), parameters="*.adapter.*"),
        lambda: Replay(adapted(), capacity=20),
    ],
)
def test_a_run_with_adapters_resumes_bit_for_bit_and_leaves_what_is_frozen_as_it_was(make):
    strategy, checkpoints = make(), Checkpoints(every=3)
    before = {name: weight.detach().clone() for name, weight in strategy.model.named_parameters()}
    result = run(strategy, STREAM, checkpoints)
    for name, weight in strategy.model.named_parameters():
        assert weight.requires_grad == (".adapter." in name or name.startswith("head."))
        if not name.startswith("head."):  # which has grown
            assert torch.equal(weight, before[name]) != (".adapter." in name), name
    run(make(), STREAM, rest := Checkpoints(every=0), resume=checkpoints.load(4))
    assert difference(checkpoints.load(-1), rest.load(-1)) is None
    assert result.params["model.adapter"] == "LoRA"
    assert result.params["model.adapter.rank"] == 2
    assert result.params["model.adapter2.width"] == 2
    assert 0 < result.params["model.trained_share"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: Finetune(adapt(vit(), InputPrompts(length=2, deep=True), ScaleShift())),
        lambda: Finetune(adapt(vit(), Peft("LORA", {"r": 2, "lora_dropout": 0.1, "target_modules": ["q", "v"]}))),
        lambda: LwF(adapt(vit(), Prefix(length=2))),
    ],
)
def test_prompts_and_methods_of_peft_resume_too(make):
    pytest.importorskip("peft")
    run(make(), STREAM, checkpoints := Checkpoints(every=3))
    run(make(), STREAM, rest := Checkpoints(every=0), resume=checkpoints.load(4))
    assert difference(checkpoints.load(-1), rest.load(-1)) is None


def test_in_bfloat16_the_weights_of_adapters_stay_float32():
    strategy = Finetune(adapted())
    before = strategy.model.stages.block1.attention.q.weight.clone()
    run(strategy, STREAM, precision="bf16")
    layer = strategy.model.stages.block1.attention.q
    assert torch.equal(layer.weight, before)
    assert layer.adapter.B.weight.dtype == torch.float32
    assert layer.adapter.B.weight.abs().max() > 0


def test_weights_with_adapters_and_without(tmp_path):
    plain, model = vit(), adapt(vit(), LoRA(rank=2))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    file = save_weights(model, tmp_path / "lora.pt", {})
    header = weights_header(file)
    assert (header["adapter"], header["adapter.rank"]) == ("LoRA", 2)
    assert header["trained_parameters"] == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    other = adapt(vit(), LoRA(rank=2))
    load_weights(other, file)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(other.features(x), model.features(x))
    with pytest.raises(ValueError, match=r"adapter.A.weight is .* there, missing here; build .*'LoRA'"):
        load_weights(plain, file)


VIT = ["--model", "VitTiny", "--model.patch", "4", "--model.width", "8", "--model.depth", "1", "--model.heads", "2"]
RUN = ["run", "--stream", "split_digits", "--stream.tasks", "[[0,1],[2,3]]", "--stream.epochs", "1"]
HERE = ["--strategy", "Finetune", "--track", "false", "--checkpoint_every", "0", "--threads", "1"]


@pytest.mark.slow
def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pretrain = ["pretrain", "--stream", "split_digits", *VIT, "--epochs", "1", "--checkpoint_every", "0", "--threads", "1"]
    lora = ["--adapter", "LoRA", "--adapter.rank", "2", "--adapter.modules", "*.attention.*"]
    assert main([*pretrain, "--out", "plain.pt"]) == 0
    assert main([*pretrain, "--weights", "plain.pt", *lora, "--out", "lora.pt"]) == 0
    assert "adapter       LoRA: 218 parameters learned, 16." in capsys.readouterr().out
    for weights in ("plain.pt", "lora.pt"):
        assert main([*RUN, *VIT, "--weights", weights, *lora, *HERE]) == 0
    assert main([*RUN, *VIT, *lora, "--print_config"]) == 0
    assert "class_path: clstream.adapters.LoRA" in capsys.readouterr().out
    assert main(["list", "adapters"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in clstream.adapters.__all__)


GRID = """
stream: {class_path: split_digits, init_args: {epochs: 1, tasks: [[0, 1], [2, 3]]}}
model: {class_path: VitTiny, init_args: {patch: 4, width: 8, depth: 1, heads: 2}}
strategy: Finetune
sweep:
  adapter: [LoRA, Bottleneck]
  LoRA.rank: [1, 2]
"""


@pytest.mark.slow
def test_a_grid_varies_adapters_and_their_options(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    runs = plan_of(str(grid), []).runs
    assert [run.label for run in runs] == [
        f"Finetune, {own}" for own in ("LoRA, adapter.rank 1", "LoRA, adapter.rank 2", "Bottleneck")
    ]
    assert len({run.identity for run in runs}) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*VIT, "--adapter", "Lora"], "there is no adapter 'Lora': did you mean LoRA?"),
        ([*VIT, "--adapter.rank", "3"], "--adapter.rank is an option of an adapter: name it too, --adapter NAME"),
        ([*VIT, "--adapter", "LoRA", "--adapter.ranks", "3"], "LoRA has no option 'ranks': did you mean rank?"),
        (
            [*VIT, "--adapter", "LoRA", "--adapter.modules", "*.attn"],
            "--adapter: no module of VitTiny is called '*.attn'; near",
        ),
        ([*VIT, "--adapter", "LoRA", "--features"], "--features freezes the whole model"),
        (["--model", "Mlp", "--adapter", "Prefix"], "Prefix needs a vision transformer"),
    ],
)
def test_what_the_command_line_refuses(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, *words, *HERE]) in (1, 2)
    assert sentence in capsys.readouterr().err
