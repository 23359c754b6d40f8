"""A strategy in a folder: saved, loaded in another process, gone on with; and what is refused."""

from __future__ import annotations

import importlib
import json
import linecache
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.strategies import DERpp, Finetune, Joint, LwF, Replay, WithDetectedBoundaries
from forked import fork_server
from saved_module import MyNet, MyStrategy, answer, squash
from torch import Tensor, nn
from torch.optim import SGD, Adam

import clstream
from clstream import SessionEnded, Strategy, on, run
from clstream.adapters import LoRA, Peft, adapt, adapter_params
from clstream.checks import example_model, example_stream
from clstream.checks.examples import normed_model
from clstream.files import FolderError
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.serialization import CaptureError, capture
from clstream.serialization.callables import method_of
from clstream.serialization.compare import digest, first_difference
from clstream.serialization.whole import NamedCode
from clstream.strategy import read_card

STREAM = example_stream()
X = STREAM.tasks[0].test[:].x


def taught(make: Callable[[nn.Module], Strategy] = Replay, model: nn.Module | None = None) -> Strategy:
    strategy = make(example_model() if model is None else model)
    run(strategy, example_stream((0, 1)))
    return strategy


def mine() -> Strategy:
    with isolated(0, "model"):
        return taught(MyStrategy, MyNet())


def state_file(folder: Path) -> Path:
    return folder / str(read_card(folder)["state"])


def edited(folder: Path, edit: Callable[[list[dict[str, Any]]], object]) -> Path:
    """Edit the nodes of a saved state, and let the card name it."""
    from clstream.strategy.saving import hash_of

    state = torch.load(state_file(folder), weights_only=True)
    edit(state["strategy"]["nodes"])
    torch.save(state, folder / "new.pt")
    state_file(folder).unlink()
    name = f"state-{hash_of(folder / 'new.pt')}.pt"
    (folder / "new.pt").rename(folder / name)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"state": name}))
    return folder


def node(nodes: list[dict[str, Any]], path: str) -> dict[str, Any]:
    return next(node for node in nodes if node["path"] == path)


def test_another_process_with_the_users_module_answers_the_same_bits(tmp_path: Path) -> None:
    strategy = mine()
    folder = strategy.save(tmp_path / "mine")
    process = fork_server().Process(target=answer, args=(str(folder), str(tmp_path / "answers.pt")))
    process.start()
    process.join(120)
    answers = torch.load(tmp_path / "answers.pt", weights_only=True)
    assert all(map(torch.equal, answers, [strategy.scores(X), strategy.predict(X), strategy.novelty(X)]))


def test_a_loaded_strategy_is_the_same_and_a_further_run_of_it_too(tmp_path: Path) -> None:
    strategy = mine()
    loaded = clstream.load(strategy.save(tmp_path), classes=[MyStrategy, MyNet, squash])
    assert type(loaded) is MyStrategy and type(loaded.model) is MyNet and loaded.model is not strategy.model
    assert first_difference(capture([strategy])[0], capture([loaded])[0]) is None
    assert isinstance(loaded.optimizer, SGD) and loaded.optimizer.param_groups[0]["params"][0] is next(loaded.model.parameters())
    rest = example_stream((1, 2))
    with pytest.warns(UserWarning, match="was run before"):
        expected = run(strategy, rest, seed=3)
    result = run(loaded, rest, seed=3)
    assert torch.equal(result.accuracy, expected.accuracy) and digest(strategy) == digest(loaded)
    assert result.params == expected.params


@pytest.mark.parametrize("make", [partial(LwF, optimizer=partial(Adam, lr=0.01)), DERpp], ids=["LwF, Adam, growing", "DERpp"])
def test_optimizers_teachers_and_grown_heads_come_back(make: Callable[[nn.Module], Strategy], tmp_path: Path) -> None:
    strategy = taught(make, example_model(head="growing" if make is not DERpp else "fixed"))
    loaded = clstream.load(strategy.save(tmp_path))
    assert first_difference(capture([strategy])[0], capture([loaded])[0]) is None
    assert torch.equal(loaded.scores(X), strategy.scores(X))


def test_adapters_come_back(tmp_path: Path) -> None:
    strategy = taught(Finetune, adapt(normed_model(), LoRA(rank=2)))
    loaded = clstream.load(strategy.save(tmp_path), classes=[type(normed_model())])
    assert first_difference(capture([strategy])[0], capture([loaded])[0]) is None
    assert torch.equal(loaded.scores(X), strategy.scores(X))
    assert adapter_params(loaded.model) == adapter_params(strategy.model) != {}


def test_adapters_of_peft_come_back(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    strategy = taught(Finetune, adapt(Mlp((1, 8, 8), 6, hidden=(16,)), Peft("LORA", {"r": 2, "target_modules": ["stages.layer1"]})))
    loaded = clstream.load(strategy.save(tmp_path))
    assert torch.equal(loaded.scores(X), strategy.scores(X)) and adapter_params(loaded.model) == adapter_params(strategy.model)
    rest = example_stream((1, 2))
    with pytest.warns(UserWarning, match="was run before"):
        expected = run(strategy, rest)
    assert torch.equal(run(loaded, rest).accuracy, expected.accuracy) and digest(strategy) == digest(loaded)


def test_joint_saves_the_samples_of_its_sessions_once(tmp_path: Path) -> None:
    strategy = taught(Joint)
    assert strategy.seen is not None
    state = torch.load(state_file(strategy.save(tmp_path)), weights_only=True)["strategy"]
    samples = len(strategy.everything()) * 64
    assert [storage.numel() for storage in state["storages"]].count(samples // 2) == 2  # two sessions, and not both again
    assert samples not in [storage.numel() for storage in state["storages"]]
    loaded = clstream.load(tmp_path)
    assert isinstance(loaded, Joint) and torch.equal(loaded.everything().x, strategy.everything().x)


def test_code_that_has_changed_since_is_told_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from clstream.strategies import Finetune

RATE = 2


class Own(Finetune):
    def scores(self, x, task=None):
        return RATE * super().scores(x, task)

    def other(self):
        return 1
"""
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_strategy.py"

    def module(text: str) -> Any:
        file.write_text(text)
        monkeypatch.delitem(sys.modules, "own_strategy", raising=False)
        importlib.invalidate_caches()
        linecache.clearcache()
        return importlib.import_module("own_strategy")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    taught(module(text).Own).save(tmp_path / "saved")
    for edited_text, told in (
        (text.replace("    def other", "    # a word\n    def other"), ""),
        (text.replace("RATE * super", "3 * super"), r"own_strategy \(Own.scores\)"),
        (text.replace("RATE = 2", "RATE = 3"), r"own_strategy \(what it sets\)"),
    ):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            clstream.load(tmp_path / "saved", classes=[module(edited_text).Own])
        sentences = [str(warning.message) for warning in heard if "has changed since it was saved" in str(warning.message)]
        assert len(sentences) == bool(told) and re.search(told, "".join(sentences))


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    strategy = Replay(example_model())
    result = run(strategy, STREAM, seed=5, max_sessions=2)
    folder = strategy.save(tmp_path)
    card = json.loads((folder / "card.json").read_text())
    assert card == read_card(folder)
    assert (card["strategy"], card["model"], card["scores_are"], card["code"]) == ("Replay", "Mlp", "logits", [])
    assert card["bytes"] == state_file(folder).stat().st_size and card["clstream"] == clstream.__version__
    about = card["run"]
    assert about["known_classes"] == [0, 1, 2, 3] and about["sessions"] == 2
    assert [task["taught"] for task in about["tasks"]] == [True, True, False] and about["tasks"][2]["classes"] == [4, 5]
    assert (about["input_shape"], about["input_dtype"], about["outputs"]) == ([1, 8, 8], "uint8", 6)
    assert about["data_fingerprint"] == STREAM.reseeded(5).fingerprint
    assert about["metrics"]["average_accuracy"] == result.average_accuracy and about["params"] == result.params
    assert about["measured"]["accuracy"]["task_01"] == float(result.accuracy[-1, 1])
    assert about["cost"]["parameters"] == 2278
    again = clstream.load(folder)
    assert read_card(again.save(tmp_path / "again"))["run"] == about  # it goes along


def test_what_was_never_run_has_a_card_without_a_run(tmp_path: Path) -> None:
    strategy = Replay(example_model())
    loaded = clstream.load(strategy.save(tmp_path))
    assert read_card(tmp_path)["run"] == {}
    assert torch.equal(loaded.scores(X), strategy.scores(X))
    assert run(loaded, STREAM).average_accuracy == run(strategy, STREAM).average_accuracy


def test_it_can_be_saved_while_a_run_goes_on(tmp_path: Path) -> None:
    class Saver:
        @on(SessionEnded)
        def save(self, event: SessionEnded) -> None:
            strategy.save(tmp_path / str(event.session.index))

    strategy = Finetune(example_model())
    run(strategy, STREAM, Saver())
    assert [read_card(tmp_path / name)["run"]["known_classes"] for name in "012"] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert not torch.equal(clstream.load(tmp_path / "0").scores(X), strategy.scores(X))
    assert torch.equal(clstream.load(tmp_path / "2").scores(X), strategy.scores(X))


def test_samples_of_the_stream_are_saved_apart_from_it(tmp_path: Path) -> None:
    big = example_stream((0, 1))
    strategy = WithDetectedBoundaries(Replay(example_model(), capacity=5), warmup=4, window=10)
    run(strategy, big)
    loaded = clstream.load(strategy.save(tmp_path))
    assert loaded.current_session.index == 1 and torch.equal(loaded.current_session.samples.x, big.session(1).samples[:].x)
    assert not len(loaded.current_session.task_if_shown.train)


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    first, second = Replay(example_model(0)), Replay(example_model(1))
    first.save(tmp_path)
    second.save(tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    assert torch.equal(clstream.load(tmp_path).scores(X), second.scores(X))


def test_a_copy_and_a_pickle_leave_the_run_out() -> None:
    import copy
    import pickle

    strategy = taught()
    assert strategy.about is not None
    assert copy.deepcopy(strategy).about is None and pickle.loads(pickle.dumps(strategy)).about is None


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = example_model()
        self.inner.register_forward_hook(lambda module, given, result: result)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def lambda_net() -> nn.Module:
    net = MyNet()
    net.between = lambda x: x.relu()
    return net


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Hooked, r"Finetune.model.inner has hooks, which can't be saved"),
        (lambda_net, r"Finetune.model.between is a function that no module has by its name"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(
    model: Callable[[], nn.Module], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CaptureError, match=sentence):
        Finetune(model()).save(tmp_path / "new")
    assert not [*tmp_path.iterdir()]


def test_a_stream_that_is_held_and_a_lock_are_named(tmp_path: Path) -> None:
    import threading

    strategy: Any = Finetune(example_model())
    strategy.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"Finetune.lock is a _thread.lock, which a saved strategy can't hold: keep it out"):
        strategy.save(tmp_path)
    del strategy.lock
    strategy.stream = STREAM
    with pytest.raises(CaptureError, match=r"Finetune.stream is a Stream, which is not saved"):
        strategy.save(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match="holds other files, and no saved strategy: name a new folder"):
        Finetune(example_model()).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_classes_that_are_not_named_are_refused_and_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mine().save(tmp_path)
    with pytest.raises(ValueError, match="objects of saved_module:MyStrategy, saved_module:MyNet, saved_module:Block, which"):
        clstream.load(folder)
    with pytest.raises(ValueError, match="it names the function saved_module:squash, which was not given: if it is yours"):
        clstream.load(folder, classes=[MyStrategy, MyNet])
    monkeypatch.delitem(sys.modules, "saved_module")
    with pytest.raises(ValueError, match=r"name them, clstream.load\(..., classes=\[MyStrategy, MyNet, Block\]\)"):
        clstream.load(folder)
    assert "saved_module" not in sys.modules
    with pytest.raises(TypeError, match="classes takes classes and functions of your own, not 'MyNet'"):
        clstream.load(folder, classes=["MyNet"])  # type: ignore[list-item]


def test_what_a_script_defined_is_found_in_its_module(tmp_path: Path) -> None:
    """A class that was saved as __main__'s is its module's where that is imported."""
    folder = mine().save(tmp_path)

    def as_script(nodes: list[dict[str, Any]]) -> None:
        for entry in nodes:
            if entry.get("class", "").startswith("saved_module:"):
                entry["class"] = entry["class"].replace("saved_module", "__main__")

    loaded = clstream.load(edited(folder, as_script), classes=[MyStrategy, MyNet, squash])
    assert torch.equal(loaded.scores(X), mine().scores(X))


CRAFTED: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "a class that writes": lambda nodes: node(nodes, "Replay.memory").update(
        {"class": "clstream.checkpoint.checkpointer:Checkpointer"}
    ),
    "a class of Python's": lambda nodes: node(nodes, "Replay.memory").update({"class": "subprocess:Popen"}),
    "no strategy": lambda nodes: nodes[0].update({"class": "clstream.models.mlp:Mlp"}),
    "a function": lambda nodes: nodes[0]["attributes"].update({"loss_of": ["name", "os:system"]}),
    "a function of ours": lambda nodes: nodes[0]["attributes"].update({"loss_of": ["name", "clstream.files:write_atomically"]}),
    "a function of torch's": lambda nodes: nodes[0]["attributes"].update({"loss_of": ["name", "torch:load"]}),
    "a method that is replaced": lambda nodes: nodes[0]["attributes"].update({"scores": 3}),
    "an object that was there": lambda nodes: node(nodes, "Replay.memory").update({"origin": "Replay.memory", "hooks": []}),
    "the stream": lambda nodes: nodes[0]["attributes"].update({"held": ["stream"]}),
    "a circle": lambda nodes: nodes[0].update({"attributes": nodes}),
    "nothing": lambda nodes: nodes.clear(),
    "no nodes": lambda nodes: nodes.insert(0, {}),
    "a huge tensor": lambda nodes: next(n for n in nodes if n["kind"] == "tensor").update({"size": [10**15], "stride": [0]}),
}


@pytest.mark.parametrize("way", CRAFTED)
def test_a_crafted_state_is_refused_in_a_sentence(way: str, saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError,
        match=r"the strategy in .* it can't be built: |which are none that clstream|is no state that clstream saved",
    ):
        clstream.load(edited(tmp_path, CRAFTED[way]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught().save(tmp_path_factory.mktemp("saved"))


CARDS = {
    "no card": (None, FolderError, "holds no saved strategy: it has no card.json"),
    "no JSON": ("{", ValueError, "is no card of a strategy that clstream saved"),
    "a list": ("[]", ValueError, "is no card"),
    "another card": ('{"format": 1, "clstream": "0.1.0"}', ValueError, "is no card"),
    "a newer one": ('{"format": 99, "clstream": "9.1"}', ValueError, r"was saved by clstream 9.1 \(format 99\), and this is"),
    "a path": ('"state": "../state-0.pt"', ValueError, "is no card"),
    "no file": (f'"state": "state-{"0" * 32}.pt"', FolderError, "can't be read: No such file"),
}


@pytest.mark.parametrize("way", CARDS)
def test_a_folder_that_holds_none_is_refused_in_a_sentence(way: str, saved: Path, tmp_path: Path) -> None:
    text, error, sentence = CARDS[way]
    if text is not None:
        card = json.loads((saved / "card.json").read_text())
        (tmp_path / "card.json").write_text(json.dumps(card | json.loads(f"{{{text}}}")) if text.startswith('"') else text)
    with pytest.raises(error, match=sentence):
        clstream.load(tmp_path)


def test_a_damaged_file_is_refused(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = bytearray(state_file(tmp_path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state_file(tmp_path).write_bytes(damaged)
    with pytest.raises(FolderError, match="is damaged: save the strategy again"):
        clstream.load(tmp_path)


def test_the_model_of_a_file_has_its_params(saved: Path) -> None:
    loaded = clstream.load(saved)
    assert isinstance(loaded.model, Mlp) and loaded.model.params["hidden"] == (32,)
    assert loaded.params["model"] is loaded.model and loaded.params["optimizer"].keywords == {"lr": 0.1}


@pytest.mark.parametrize(
    ("place", "method"),
    [
        ("timm.models.vision_transformer:VisionTransformer", "load_pretrained"),  # reads a file
        ("timm.models.vision_transformer:VisionTransformer", "requires_grad_"),
        ("peft.tuners.lora.config:LoraConfig", "save_pretrained"),  # writes one
        ("peft.peft_model:PeftModel", "push_to_hub"),
    ],
)
def test_of_packages_of_layers_a_file_calls_what_answers_alone(place: str, method: str) -> None:
    module, _, name = place.partition(":")
    pytest.importorskip(module)
    code = NamedCode()
    cls = code.find_class(place)
    owner = cls.__new__(cls)
    with pytest.raises(ValueError, match=f"it names the method '{method}' of a {name}, which no checkpoint may call"):
        method_of(owner, method, code)
    if issubclass(cls, nn.Module):
        nn.Module.__init__(owner)
        assert method_of(owner, "forward", code).__self__ is owner


def test_of_what_a_class_of_ones_own_derives_from_too() -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Shared(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc,name-defined]
        def answer(self) -> None:
            pass

    code, owner = NamedCode([Shared]), Shared()
    assert method_of(owner, "answer", code).__self__ is owner
    for method in ("push_to_hub", "save_pretrained"):
        with pytest.raises(ValueError, match=f"it names the method '{method}' of a Shared, which no checkpoint may call"):
            method_of(owner, method, code)
