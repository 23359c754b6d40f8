"""Pre-training: the joined stream, files of weights, and runs that start from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clstream.streams import blobs
from torch import nn

from clstream import Samples, Stream, Task, run
from clstream.cli import main
from clstream.cli.build import build_strategy, build_stream
from clstream.cli.parser import parse_run
from clstream.models import ConvNet, Mlp, VitTiny
from clstream.pretraining import join_tasks, load_weights, save_weights
from clstream.strategy import Strategy

TINY = ("--stream", "blobs", "--stream.train_per_class", "20", "--model", "Mlp", "--model.hidden", "[16]")


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return " ".join((captured.err if status else captured.out).split())


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# The joined stream --------------------------------------------------------------------------------------------------------


def test_a_joined_stream_has_each_sample_of_its_classes_once() -> None:
    stream = blobs(tasks=3, classes=7, class_order=1)
    whole = join_tasks(stream, epochs=4)
    assert (len(whole.tasks), len(whole), whole.epochs, whole.classes, whole.batch_size) == (1, 1, 4, 7, stream.batch_size)
    for kind in ("train", "test"):
        rows = [tuple(row) for task in stream.tasks for row in getattr(task, kind).x.tolist()]
        assert sorted(rows) == sorted(tuple(row) for row in getattr(whole.tasks[0], kind).x.tolist())
    some = join_tasks(stream, [5, 2, 2])
    assert some.tasks[0].classes == (2, 5) and some.epochs == stream.epochs
    assert some.tasks[0].train.y.unique().tolist() == some.tasks[0].test.y.unique().tolist() == [2, 5]
    by_label = {tuple(row): int(y) for task in stream.tasks for row, y in zip(task.train.x.tolist(), task.train.y, strict=True)}
    train = some.tasks[0].train
    assert all(by_label[tuple(row)] == int(y) for row, y in zip(train.x.tolist(), train.y, strict=True))


def test_a_joined_stream_keeps_the_augmentation_and_refuses_strange_classes() -> None:
    stream = blobs()
    object.__setattr__(stream, "augment", torch.neg)
    assert join_tasks(stream).augment is torch.neg
    with pytest.raises(ValueError, match=r"blobs has no classes 12: it has 0-9"):
        join_tasks(stream, [3, 12])
    with pytest.raises(ValueError, match="there are no classes to train on"):
        join_tasks(stream, [])
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1 or None, not 0"):
        join_tasks(stream, epochs=0)


# Files of weights ---------------------------------------------------------------------------------------------------------


def test_weights_come_back_and_the_head_stays(tmp_path: Path) -> None:
    trained, fresh = VitTiny((1, 8, 8), 10, width=8, depth=1, heads=2), VitTiny((1, 8, 8), 3, width=8, depth=1, heads=2)
    head = fresh.head.weight.clone()
    file = save_weights(trained, tmp_path / "vit.pt", {"seed": 3})
    assert [file.name for file in tmp_path.iterdir()] == ["vit.pt"]
    content = torch.load(file, weights_only=True)
    assert json.loads(content["header"])["model"] == "VitTiny" and content["weights"].keys() == trained.state_dict().keys()
    header = load_weights(fresh, file)
    assert header["seed"] == 3 and header["params"]["width"] == 8
    assert equal(fresh.stages, trained.stages)
    assert torch.equal(fresh.head.weight, head)
    assert fresh.params["pretrained"].startswith("vit.pt ") and "pretrained" not in trained.params


def test_a_growing_head_starts_empty(tmp_path: Path) -> None:
    trained, growing = Mlp(4, 3, hidden=(5,)), Mlp(4, 3, hidden=(5,), head="growing")
    load_weights(growing, save_weights(trained, tmp_path / "mlp.pt", {}))
    assert equal(growing.stages, trained.stages) and not len(growing.head.labels)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Mlp(4, 3, hidden=(6,)), r"are of Mlp, and don't fit Mlp: stages.layer1.weight is \(5, 4\) there, \(6, 4\) here; build"),
        (Mlp(4, 3, hidden=(5, 5)), r"stages.layer2.weight is missing there, \(5, 5\) here"),
        (Mlp(4, 3, hidden=()), r"stages.layer1.weight is \(5, 4\) there, missing here; .* 'hidden': '\[5\]'"),
        (ConvNet((1, 8, 8), 3), "are of Mlp, and don't fit ConvNet"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_changed(model: nn.Module, message: str, tmp_path: Path) -> None:
    file = save_weights(Mlp(4, 3, hidden=(5,)), tmp_path / "mlp.pt", {})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, file)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    model = Mlp(4, 3, hidden=(5,))
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(model, tmp_path / "module.pt")
    torch.save({"header": json.dumps({"format": "another"}), "weights": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "torn.pt").write_bytes(save_weights(model, tmp_path / "whole.pt", {}).read_bytes()[:500])
    for name in ("plain", "module", "other", "text", "torn"):
        with pytest.raises(ValueError, match=f"{name}.pt is no file of weights that `clstream pretrain` wrote"):
            load_weights(model, tmp_path / f"{name}.pt")
    with pytest.raises(OSError, match=r"the weights .*missing.pt can't be read: No such file"):
        load_weights(model, tmp_path / "missing.pt")
    with pytest.raises(OSError, match="can't be written: No such file"):
        save_weights(model, tmp_path / "nowhere" / "mlp.pt", {})


def test_a_file_that_can_t_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = save_weights(Mlp(4, 3, hidden=(5,)), tmp_path / "mlp.pt", {})
    before = file.read_bytes()
    with pytest.raises(TypeError):
        save_weights(Mlp(4, 3, hidden=(5,)), file, {"strange": object()})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


# The commands -------------------------------------------------------------------------------------------------------------


def test_pretrain_writes_what_plain_training_gives(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(
        capsys, 0, "pretrain", *TINY, "--optimizer.lr", "0.05", "--epochs", "3", "--seed", "4", "--out", "blobs.pt",
        "--schedule", "constant",
    )  # fmt: skip
    assert "Mlp on blobs, joined" in text and "clstream run --weights blobs.pt" in text
    parser, options = parse_run([*TINY, "--strategy", "Finetune", "--strategy.optimizer.lr", "0.05", "--seed", "4"])
    stream = build_stream(parser, options)
    strategy = build_strategy(parser, options, stream, 4)
    result = run(strategy, join_tasks(stream, epochs=3), seed=4)
    content = torch.load(tmp_path / "blobs.pt", weights_only=True)
    assert all(torch.equal(content["weights"][name], value) for name, value in strategy.model.state_dict().items())
    header = json.loads(content["header"])
    assert header["accuracy"] == result.average_accuracy > 0.5
    assert (header["strategy.optimizer"], header["epochs"], header["labels"]) == ("SGD(lr=0.05)", 3, list(range(10)))


@pytest.mark.slow
def test_a_run_starts_from_the_weights(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, 0, "pretrain", *TINY, "--classes", "0,1,2,3", "--optimizer", "Adam", "--out", "some.pt")
    assert json.loads(torch.load("some.pt", weights_only=True)["header"])["labels"] == [0, 1, 2, 3]
    parser, options = parse_run([*TINY, "--weights", "some.pt"])
    stream = build_stream(parser, options)
    strategy = build_strategy(parser, options, stream, 0)
    plain = build_strategy(*parse_run([*TINY]), stream, 0)
    kept = torch.load("some.pt", weights_only=True)["weights"]
    assert torch.equal(strategy.model.stages.layer1.weight, kept["stages.layer1.weight"])
    assert torch.equal(strategy.model.head.weight, plain.model.head.weight)  # from the run's seed, as ever
    assert "Replay on blobs" in said(capsys, 0, "run", *TINY, "--weights", "some.pt", "--seeds", "0,1")
    assert "weights: some.pt" in said(capsys, 0, "run", *TINY, "--weights", "some.pt", "--print_config")


def test_a_checkpoint_is_of_the_run_that_started_from_the_same_weights(tmp_path: Path) -> None:
    from clstream.checkpoint import Checkpointer, newest
    from clstream.engine import OtherRunError

    def start(seed: int) -> Strategy:
        torch.manual_seed(seed)
        file = save_weights(Mlp(20, 10, hidden=(5,)), tmp_path / f"{seed}.pt", {})
        model = Mlp(20, 10, hidden=(5,))
        load_weights(model, file)
        return Strategy(model)

    stream = blobs(train_per_class=10)
    run(start(0), stream, Checkpointer(tmp_path / "run"), max_sessions=2)
    with pytest.raises(OtherRunError, match=r"model.pretrained was '0.pt \w+', now it is '1.pt"):
        run(start(1), stream, max_sessions=2, resume=newest(tmp_path / "run"))


@pytest.mark.parametrize(
    ("status", "arguments", "sentence"),
    [
        (2, ["--out", "a.pt", "--strategy", "Replay"], "clstream pretrain has no option --strategy"),
        (2, ["--out", "a.pt", "--epcohs", "2"], "clstream pretrain has no option --epcohs: did you mean --epochs?"),
        (2, ["--out", "a.pt", "--classes", "0,one"], "--classes takes whole numbers with commas, as 0,1,2 or 0-4,7, not '0,one'"),
        (1, ["--out", "a.pt", "--classes", "0,10"], "blobs has no classes 10: it has 0-9"),
        (1, ["--out", "a.pt", "--epochs", "0"], "epochs must be a whole number of at least 1"),
        (1, ["--out", "nowhere/a.pt"], "there is no folder nowhere"),
        (1, ["--out", "there.pt"], "there.pt is there already: --force replaces it"),
        (1, ["--out", ".", "--force"], ". is there already"),
        (1, ["--out", "a.pt", "--device", "cuda:77"], "there is no device 'cuda:77'"),
        (1, ["--out", "a.pt", "--optimizer.lr", "1e30"], "the loss is"),
    ],
)
def test_what_pretrain_refuses(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "there.pt").write_text("something")
    text = said(capsys, status, "pretrain", *TINY, *arguments)
    assert text.startswith("clstream: error: ") and sentence in text and text.count("clstream: error: ") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "there.pt"]
    assert (tmp_path / "there.pt").read_text() == "something"


def test_run_refuses_weights_that_don_t_fit(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, 0, "pretrain", *TINY, "--out", "a.pt")
    said(capsys, 0, "pretrain", *TINY, "--out", "a.pt", "--force")
    assert "the weights a.pt are of Mlp, and don't fit Mlp" in said(
        capsys, 1, "run", "--stream", "blobs", "--weights", "a.pt", "--model.hidden", "[7]"
    )
    assert "can't be read: No such file" in said(capsys, 1, "run", "--stream", "blobs", "--weights", "missing.pt")


def test_domains_can_be_joined_too() -> None:
    x = torch.arange(8.0)[:, None]
    tasks = [
        Task(n, (0, 1), part, part)
        for n, part in enumerate([Samples(x[:4], torch.arange(4) % 2), Samples(x[4:], torch.arange(4) % 2)])
    ]
    whole = join_tasks(Stream("domains", tasks, scenario="domain"))
    assert whole.scenario == "class" and whole.tasks[0].train.x.flatten().tolist() == list(range(8))
