"""A checkpoint is data: one that was crafted, with a right hash, runs no code, and is refused in a sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess  # noqa: F401  # what a checkpoint may try to find here
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clstream
from clstream import Batch, BatchLearned, Samples, Strategy, on, run
from clstream.checkpoint import newest
from clstream.checkpoint.store import FORMAT, files, save
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import Reservoir
from clstream.seeds import isolated
from clstream.serialization import restore
from clstream.serialization.capture import references_of

MARKER = Path("code-was-run")
STREAM = example_stream((0, 1))


def shell(*arguments: object, **options: object) -> str:
    """What an attacker would like to have called: it is the user's own function, which no run holds."""
    MARKER.touch()
    return ""


class Tool:
    """A class of the user's own module whose making and ending does something."""

    def __init__(self, *arguments: object) -> None:
        MARKER.touch()

    def __new__(cls, *arguments: object) -> Tool:
        MARKER.touch()
        return object.__new__(cls)

    def __call__(self, *arguments: object) -> Tensor:
        MARKER.touch()
        return torch.zeros(())

    def __setstate__(self, state: object) -> None:
        MARKER.touch()

    def __reduce__(self) -> Any:
        MARKER.touch()


class Ends:
    """Another one, whose end does something."""

    def __del__(self) -> None:
        if vars(self):
            MARKER.touch()


class Victim(Strategy):
    """Calls what it holds, as many strategies do: an activation, a step, a method of its own, a memory's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.memory, self.activation, self.notes, self.scale = Reservoir(20), F.relu, [1.0], torch.ones(6)
        self.step = self.plainly
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def plainly(self, value: Tensor) -> Tensor:
        return value

    def rate(self, step: int) -> float:
        return 1.0

    def loss(self, samples: Samples) -> Tensor:
        outputs = self.activation(self.logits(samples) * self.scale)
        return self.step(F.cross_entropy(outputs, samples.y))

    def learn(self, batch: Batch) -> Tensor:
        loss = super().learn(batch)
        self.schedule.step()
        return loss

    @on(BatchLearned)
    def keep(self, event: BatchLearned) -> None:
        self.memory.add(event.batch.samples)
        self.memory.sample(2)


def victim() -> Victim:
    with isolated(0, "strategy"):
        return Victim(example_model())


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    """The state of a run that was cut after a few batches, as its file has it."""
    kept = Checkpoints()
    run(victim(), STREAM, kept)
    return dict(kept.load(4)) | {"format": FORMAT, "clstream": clstream.__version__, "torch": str(torch.__version__), "threads": 1}


Edit = Callable[[dict[str, Any]], object]


def node(state: dict[str, Any], path: str) -> dict[str, Any]:
    return next(each for each in state["strategy"]["nodes"] if each["path"] == path)


def append(state: dict[str, Any], /, **content: Any) -> list[Any]:
    """Add an object to a checkpoint, and return what refers to it."""
    nodes = state["strategy"]["nodes"]
    nodes.append({"path": f"Victim.evil{len(nodes)}", **content})
    return ["node", len(nodes) - 1]


def put(state: dict[str, Any], name: str, value: Any) -> None:
    node(state, "Victim")["attributes"][name] = value


@pytest.fixture
def resumed(checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], str]:
    """What edits a checkpoint, writes it with a right hash, goes on from it, and returns the sentence that refused it."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def resume(edit: Edit, *observers: object) -> str:
        state = deepcopy(checkpoint) | {"threads": threads}
        edit(state)
        for old in files(tmp_path):
            old.unlink()
        save(state, tmp_path, 1)
        strategy = victim()
        with pytest.raises(ValueError) as refused:  # noqa: PT011  # its text is looked at by each test
            run(strategy, STREAM, *observers, resume=newest(tmp_path))
        assert not MARKER.exists(), "a checkpoint ran code"
        text = str(refused.value)
        assert 20 < len(text) < 500 and "\n" not in text
        return text

    return resume


def test_the_builder_makes_checkpoints_that_go_on(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    save(checkpoint | {"threads": torch.get_num_threads()}, tmp_path, 1)
    result = run(victim(), STREAM, resume=newest(tmp_path))
    assert torch.equal(result.accuracy, run(victim(), STREAM).accuracy)


# Names --------------------------------------------------------------------------------------------------------------------

HERE = __name__
EVIL = [
    "os:system", "posix:system", "subprocess:Popen", "subprocess:run", "builtins:eval", "builtins:exec", "builtins:open",
    "builtins:type", "builtins:__import__", "torch:load", "torch:compile", "torch:from_file", "torch:save", "torch.hub:load",
    "nowhere:x", "torch.utils.collect_env:run", "torch.utils.cpp_extension:load", "torch.jit:CompilationUnit", "torch.jit:load",
    "torch.nn.modules.module:torch.load", "torch.nn.functional:torch.load", "torch.nn.functional:torch.hub.load",
    "torch.nn.functional:handle_torch_function", "torch.nn.functional:boolean_dispatch",
    "torch.nn.functional:importlib.import_module", "torch.nn.functional:_verify_batch_size", "torch.nn.modules.module:warnings",
    "torch.optim.optimizer:torch.load", "torch.optim.lr_scheduler:partial", "torch.nn.modules.module:OrderedDict",
    "torch.nn:Module.apply", "torch.nn.modules.module:Module.compile", "torch.fx:GraphModule",
    "torch.fx.graph_module:GraphModule", "torch.jit._script:RecursiveScriptModule", "torch.nn.parallel:DistributedDataParallel",
    "numpy:memmap", "numpy:load", "numpy:save", "clstream.cli:main", "clstream.cli:os.system",
    "clstream.tracking.mlflow_store:connect",
    "clstream.checkpoint:Checkpointer", "clstream.checkpoint:save", "clstream.recording:record",
    "numpy.lib._datasource:DataSource", "tempfile:TemporaryDirectory", "pathlib:Path", "clstream.files:FileLock",
    "weakref:finalize", "functools:partial", "types:FunctionType", f"{HERE}:shell", f"{HERE}:Tool", f"{HERE}:subprocess.Popen",
    f"{HERE}:os.system", f"{HERE}:Ends", "__main__:__builtins__",
]  # fmt: skip
FORMS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "name": lambda state, name: ["name", name],
    "partial": lambda state, name: ["partial", ["name", name], ["tuple", "", ["touch code-was-run"]], []],
    "enum": lambda state, name: ["enum", name, "ls"],
    "flag": lambda state, name: ["flag", name, 1],
    "tuple": lambda state, name: ["tuple", name, ["touch code-was-run"]],
    "object": lambda state, name: append(state, kind="object", **{"class": name, "attributes": {"_destpath": "/nowhere", "x": 1}}),
    "code": lambda state, name: append(state, kind="code", called=name, text=[name.partition(":")[0], "x", 1, ""], cells=[]),
    "code at a place": lambda state, name: append(state, kind="code", called=name, origin="Victim.activation"),
    "bits": lambda state, name: append(state, kind="bits", **{"class": name.partition(":")[2], "state": "{}", "seeds": None}),
    "dict": lambda state, name: append(state, kind="dict", **{"class": name, "items": []}),
    "factory": lambda state, name: append(state, kind="dict", **{"class": "defaultdict", "items": [], "factory": ["name", name]}),
    "method": lambda state, name: ["method", ["node", 0], name.partition(":")[2]],
    "dtype": lambda state, name: ["dtype", name.partition(":")[2]],
    "global": lambda state, name: ["global", name],
    "array type": lambda state, name: ["array type", name],
    "a tag of its own": lambda state, name: [name, "touch code-was-run"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cannot_choose_what_is_run(
    form: str, checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clstream.cli
    import clstream.tracking.mlflow_store  # noqa: F401  # loaded, as they are under the command

    monkeypatch.chdir(tmp_path)
    strategy, stream = victim(), STREAM
    references = references_of([strategy], stream)
    for name in EVIL:
        state = deepcopy(checkpoint)
        put(state, "activation", FORMS[form](state, name))
        with pytest.raises(ValueError, match=r"^the checkpoint can't be restored: "):
            restore([strategy], state["strategy"], references)
        assert not MARKER.exists(), f"{name} was run, as a {form}"


@pytest.mark.parametrize(
    "change",
    [{"defaults": [["tuple", "", [True]], None]}, {"attributes": {"mine": 1}}, {"defaults": [None, None]}],
)
def test_a_function_that_others_use_too_stays_as_it_is(change: dict[str, Any], resumed: Callable[..., str]) -> None:
    """relu(..., inplace=True) would hold for whoever calls it in this process, also after the run."""
    before = F.relu.__defaults__, dict(vars(F.relu))

    def edit(state: dict[str, Any]) -> None:
        kept = node(state, "Victim.activation")
        kept |= {"cells": [], "defaults": [["tuple", "", [False]], None], "attributes": {}} | change

    assert "would change torch.nn.functional:relu" in resumed(edit)
    assert before == (F.relu.__defaults__, dict(vars(F.relu)))


# Attributes and methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learn", "loss", "__class__", "__dict__", "__call__", "read_stream", "plainly"])
def test_no_attribute_stands_in_for_a_method(name: str, resumed: Callable[..., str]) -> None:
    evil = ["partial", ["name", "torch.nn.functional:relu"], ["tuple", "", []], []]
    assert f"sets {name!r} of a Victim, which is no state" in resumed(lambda state: put(state, name, evil))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Victim.model", "forward"),
        ("Victim.model", "_forward_hooks"),
        ("Victim.model", "_compiled_call_impl"),
        ("Victim.model", "_call_impl"),
        ("Victim.optimizer", "step"),
        ("Victim.optimizer", "_optimizer_step_pre_hooks"),
        ("Victim.memory", "sample"),
        ("Victim.schedule", "get_lr"),
        ("Victim.scale", "backward"),
        ("Victim.scale", "__torch_function__"),
    ],
)
def test_nor_of_what_it_holds(path: str, name: str, resumed: Callable[..., str]) -> None:
    def edit(state: dict[str, Any]) -> None:
        node(state, path).setdefault("attributes", {})[name] = ["name", "torch.nn.functional:relu"]

    assert f"sets {name!r}" in resumed(edit)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("Victim.model", "compile"),
        ("Victim.model", "apply"),
        ("Victim.model", "register_forward_hook"),
        ("Victim.model", "__init__"),
        ("Victim.optimizer", "register_step_post_hook"),
        ("Victim.scale", "numpy"),
        ("Victim.scale", "map_"),
        ("Victim.scale", "set_"),
        ("Victim", "__setattr__"),
        ("Victim", "__init_subclass__"),
        ("Victim.notes", "__class__"),
        ("Victim", "nothing"),
        ("Victim", 3),
    ],
)
def test_methods_that_no_checkpoint_may_call(owner: str, name: object, resumed: Callable[..., str]) -> None:
    def edit(state: dict[str, Any]) -> None:
        number = state["strategy"]["nodes"].index(node(state, owner))
        put(state, "step", ["method", ["node", number], name])

    assert "the checkpoint can't be restored" in resumed(edit)


def test_methods_of_the_stream_and_of_functions_are_out_of_reach(resumed: Callable[..., str]) -> None:
    for owner in (["stream"], ["task", 0], ["session", 0], ["name", "torch.nn.functional:relu"], ["global", "torch"]):
        for name in ("reseeded", "__init__", "__globals__", "set_state", "manual_seed", "replace"):
            resumed(lambda state, owner=owner, name=name: put(state, "step", ["method", owner, name]))


# Sizes, numbers, circles --------------------------------------------------------------------------------------------------

SIZES = {
    "past the end": {"offset": 10**6},
    "before the beginning": {"offset": -1},
    "strides backwards": {"stride": [-1]},
    "huge strides": {"stride": [2**61]},
    "huge": {"size": [10**15]},
    "huge, of nothing": {"size": [10**15], "stride": [0]},
    "more than any number": {"size": [2**70]},
    "another length": {"size": [6, 6]},
    "no numbers": {"size": ["6"]},
    "true": {"size": [True]},
    "another type": {"dtype": "complex128"},
    "no type": {"dtype": "load"},
    "another device": {"device": "nowhere"},
    "another storage": {"storage": 10**6},
    "a storage before": {"storage": -1},
    "the stream's data, past the end": {"place": [0, "train", "x"], "offset": 10**9},
    "the stream's data, as other numbers": {"place": [0, "train", "x"], "size": [10**6]},
    "no data": {"place": [9, "train", "x"]},
}


@pytest.mark.parametrize("way", SIZES)
def test_a_tensor_reaches_no_memory_but_its_own(way: str, resumed: Callable[..., str]) -> None:
    assert "the checkpoint can't be restored" in resumed(lambda state: node(state, "Victim.scale").update(SIZES[way]))


GENERATORS = {
    "MT19937": {"bit_generator": "MT19937", "state": {"key": {"array": [1] * 624, "type": "<u4"}, "pos": 10**6}},
    "MT19937 before": {"bit_generator": "MT19937", "state": {"key": {"array": [1] * 624, "type": "<u4"}, "pos": -5}},
    "short": {"bit_generator": "MT19937", "state": {"key": {"array": [1], "type": "<u4"}, "pos": 0}},
    "objects": {"bit_generator": "MT19937", "state": {"key": {"array": ["x"] * 624, "type": "O"}, "pos": 0}},
}


def test_a_generator_reaches_no_memory_but_its_own(resumed: Callable[..., str]) -> None:
    for content in GENERATORS.values():

        def edit(state: dict[str, Any], content: Any = content) -> None:
            put(state, "evil", append(state, kind="bits", **{"class": "MT19937", "state": json.dumps(content), "seeds": None}))

        resumed(edit)
    philox = {
        "bit_generator": "Philox",
        "state": {"counter": {"array": [0] * 4, "type": "<u8"}, "key": {"array": [0] * 2, "type": "<u8"}},
    }
    philox |= {"buffer": {"array": [0] * 4, "type": "<u8"}, "buffer_pos": -9, "has_uint32": 0, "uinteger": 0}

    def beyond(state: dict[str, Any]) -> None:
        seeds = append(
            state, kind="seeds", attributes={"entropy": 1, "spawn_key": ["tuple", "", []], "pool_size": 4, "n_children_spawned": 0}
        )
        put(state, "evil", append(state, kind="bits", **{"class": "Philox", "state": json.dumps(philox), "seeds": seeds}))

    assert "no such position" in resumed(beyond)

    def slow(state: dict[str, Any]) -> None:
        seeds = append(
            state,
            kind="seeds",
            attributes={"entropy": 1, "spawn_key": ["tuple", "", []], "pool_size": 10**7, "n_children_spawned": 0},
        )
        put(state, "evil", seeds)

    assert "pool of 10000000" in resumed(slow)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = ["tuple", "", [value]]
    return value


def doubled(depth: int) -> Any:
    value: Any = ["tuple", "", []]
    for _ in range(depth):
        value = ["tuple", "", [value, value]]
    return value


def itself() -> Any:
    value: list[Any] = ["tuple", ""]
    value.append([value])
    return value


EDITS: dict[str, Edit] = {
    "nested deeply": lambda state: put(state, "evil", nested(150)),
    "doubled": lambda state: put(state, "evil", doubled(60)),
    "itself": lambda state: put(state, "evil", itself()),
    "number of no object": lambda state: put(state, "evil", ["node", 10**9]),
    "number before all": lambda state: put(state, "evil", ["node", -1]),
    "number that is none": lambda state: put(state, "evil", ["node", "0"]),
    "a tag alone": lambda state: put(state, "evil", ["node"]),
    "an empty list": lambda state: put(state, "evil", []),
    "a list of lists": lambda state: put(state, "evil", [["node", 0]]),
    "generator of itself": lambda state: put(
        state, "evil", append(state, kind="Generator", bits=["node", len(state["strategy"]["nodes"])])
    ),
    "sparse of itself": lambda state: put(
        state,
        "evil",
        append(state, kind="sparse", indices=["node", len(state["strategy"]["nodes"])], values=None, size=[1], coalesced=True),
    ),
    "an object of no kind": lambda state: put(state, "evil", append(state, kind="nothing")),
    "an object without kind": lambda state: put(state, "evil", append(state)),
    "an object at another's place": lambda state: put(
        state,
        "evil",
        append(state, kind="object", **{"origin": "Victim.memory", "class": "clstream.memory:Reservoir", "attributes": {}}),
    ),
    "another root": lambda state: state["strategy"].update(roots=[1]),
    "no root": lambda state: state["strategy"].update(roots=[]),
    "roots that are none": lambda state: state["strategy"].update(roots=["Victim"]),
    "no objects": lambda state: state["strategy"].update(nodes=[]),
    "objects that are none": lambda state: state["strategy"].update(nodes=[1, 2]),
    "a layer of a string": lambda state: node(state, "Victim.model._modules")["items"].append(["evil", "layer"]),
    "a table of a string": lambda state: node(state, "Victim.model")["attributes"].update(_modules="layers"),
    "an array of objects": lambda state: put(
        state,
        "evil",
        append(state, kind="array", type="|O", size=[1], order="C", data=torch.zeros(8, dtype=torch.uint8), writeable=True),
    ),
    "an array that is too large": lambda state: put(
        state,
        "evil",
        append(state, kind="array", type="<f8", size=[10**9], order="C", data=torch.zeros(8, dtype=torch.uint8), writeable=True),
    ),
    "a number of objects": lambda state: put(state, "evil", ["number", "|O", "00" * 8]),
    "a deque of no length": lambda state: put(state, "evil", append(state, kind="deque", items=[], maxlen=-1)),
    "a range of text": lambda state: put(state, "evil", ["range", ["a", "b", "c"]]),
    "a pattern that is none": lambda state: put(state, "evil", ["pattern", ["(", 0]]),
    "a fraction of nothing": lambda state: put(state, "evil", ["fraction", [1, 0]]),
    "a fraction of text": lambda state: put(state, "evil", ["fraction", ["1e999999999", None]]),
    "storages that are none": lambda state: state["strategy"].update(storages=[1]),
    "storages of numbers": lambda state: state["strategy"].update(storages=[torch.ones(3)] * 1),
    "position beyond": lambda state: state.update(position=[99, 0, 0]),
    "epoch beyond": lambda state: state.update(position=[0, 9, 0]),
    "position before": lambda state: state.update(position=[-1, 0, 0]),
    "half a position": lambda state: state.update(position=[0, 0]),
    "position of text": lambda state: state.update(position=["0", 0, 0]),
    "step before": lambda state: state.update(step=-1),
    "step true": lambda state: state.update(step=True),
    "no time": lambda state: state.update(seconds=float("nan")),
    "time of text": lambda state: state.update(seconds="now"),
    "another evaluation": lambda state: state["evaluation"].update(accuracy=torch.zeros(1, 7)),
    "evaluation of numbers": lambda state: state["evaluation"].update(baseline=[0.5] * 3),
    "more of an evaluation": lambda state: state["evaluation"].update(evil=1),
    "no evaluation": lambda state: state.update(evaluation={}),
    "no strategy": lambda state: state.pop("strategy"),
    "strategy of text": lambda state: state.update(strategy="Victim"),
    "no identity": lambda state: state.update(identity={}),
    "torch's generator of nothing": lambda state: state["random"].update(torch=torch.zeros(3, dtype=torch.uint8)),
    "python's generator of nothing": lambda state: state["random"].update(python="[3, [1, 2], null]"),
    "numpy's generator of nothing": lambda state: state["random"].update(numpy="{}"),
    "no generators": lambda state: state.update(random={}),
    "placed that are none": lambda state: state.update(placed=["x"]),
    "observers that are none": lambda state: state.update(observers=[1]),
    "a set in it": lambda state: put(state, "evil", {1, 2}),
    "a sparse tensor": lambda state: put(state, "evil", torch.eye(2).to_sparse()),
    "a parameter": lambda state: put(state, "evil", nn.Parameter(torch.ones(1))),
    "another format": lambda state: state.update(format=str(FORMAT)),
    "threads of text": lambda state: state.update(threads="1"),
    "no torch": lambda state: state.pop("torch"),
}


@pytest.mark.parametrize("way", EDITS)
def test_whatever_is_written_it_is_a_sentence(way: str, resumed: Callable[..., str]) -> None:
    resumed(EDITS[way])


def test_an_observer_that_cannot_take_up_its_state_says_so(checkpoint: dict[str, Any], resumed: Callable[..., str]) -> None:
    class Counts:
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"] + 1

        @on(BatchLearned)
        def count_up(self, event: BatchLearned) -> None: ...

    name = Counts.__qualname__
    for content in ({}, {"count": "x"}, 7):
        text = resumed(lambda state, content=content: state.update(observers=[[name, content]]), Counts())
        assert "can't take up its state in the checkpoint" in text


def test_what_is_no_checkpoint_at_all_is_a_sentence() -> None:
    for given in ({"a": 1}, {}, [1], "runs/mine"):
        with pytest.raises(ValueError, match=r"resume takes a checkpoint as clstream\.checkpoint\.newest"):
            run(victim(), STREAM, resume=given)


# Files --------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_an_older_format_is_refused_in_a_sentence(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    older = {name: checkpoint[name] for name in ("clstream", "torch", "threads", "strategy")} | {"format": 2}
    save(older, tmp_path, 1)
    with pytest.raises(
        ValueError, match=rf"format 2\), and this is .* \(format {FORMAT}\): finish the run with that version"
    ) as refusal:
        run(victim(), STREAM, resume=newest(tmp_path))
    assert "\n" not in str(refusal.value)


def hashed(folder: Path, content: bytes) -> Path:
    """Write a file as a checkpoint, with the hash of its content."""
    file = folder / f"000001-{hashlib.blake2b(content, digest_size=8).hexdigest()}.pt"
    file.write_bytes(content)
    return file


def test_a_file_takes_no_more_memory_than_it_has_bytes(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    state = checkpoint | {"threads": torch.get_num_threads()}
    whole = io.BytesIO()
    torch.save(state, whole)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole.getvalue())) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as into:
        for name in source.namelist():
            into.writestr(name, source.read(name))
    hashed(tmp_path, packed.getvalue())
    with pytest.raises(ValueError, match=r"is no checkpoint of clstream \(its members are packed"):
        newest(tmp_path)
    for old in files(tmp_path):
        old.unlink()
    state = deepcopy(state)
    state["strategy"]["storages"].append(torch.zeros(5, dtype=torch.uint8))
    again = io.BytesIO()
    torch.save(state, again)
    with zipfile.ZipFile(again) as source, zipfile.ZipFile(larger := io.BytesIO(), "w") as into:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):  # the size of the last tensor: from 5 to 2,147,483,647 numbers
                data = data.replace(b"K\x05\x85", b"J\xff\xff\xff\x7f\x85")
            into.writestr(name, data)
    hashed(tmp_path, larger.getvalue())
    with pytest.raises(ValueError, match="is no checkpoint of clstream"):
        newest(tmp_path)


def test_a_checkpoint_is_read_as_other_files_of_torch_are(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    class Asks:
        def __reduce__(self) -> Any:
            return bytearray, (1 << 20,)

    whole = io.BytesIO()
    torch.save(checkpoint | {"threads": torch.get_num_threads(), "more": Asks()}, whole)
    for content in (whole.getvalue(), b"before" + whole.getvalue()):
        hashed(tmp_path, content)
        with pytest.raises(
            ValueError, match=r"is no checkpoint of clstream .(it names '__builtin__ bytearray'|its directory|it is no)"
        ):
            newest(tmp_path)
        for old in files(tmp_path):
            old.unlink()


def test_pickles_that_run_something_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch code-was-run",)

    saved = io.BytesIO()
    torch.save({"format": FORMAT, "evil": Evil()}, saved)
    for content in (saved.getvalue(), pickle.dumps(Evil())):
        hashed(tmp_path, content)
        with pytest.raises(ValueError, match="is no checkpoint of clstream"):
            newest(tmp_path)
        assert not MARKER.exists()
        for old in files(tmp_path):
            old.unlink()


def test_the_journal_of_a_tracker_lies_below_its_folder(tmp_path: Path) -> None:
    from clstream.tracking.uploader import default_journal

    assert default_journal(tmp_path, {"run_id": "5f0c-7e_3"}).parent == tmp_path / "5f0c-7e_3"
    for name in ("../elsewhere", "/etc", "..", "a/b", "a\n"):
        with pytest.raises(ValueError, match="there is no MLflow run"):
            default_journal(tmp_path, {"run_id": name, "key": "x"})
