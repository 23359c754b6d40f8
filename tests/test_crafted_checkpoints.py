"""A checkpoint is data: one that was crafted, with a right hash, runs no code, and is refused in a sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clstream
from clstream import Batch, BatchLearned, Samples, Strategy, on, run
from clstream.checkpoint import files, newest, save
from clstream.checks import Checkpoints, example_model, example_stream
from clstream.memory import Reservoir
from clstream.models import Mlp
from clstream.origin import Origin
from clstream.restoration import restore
from clstream.seeds import isolated
from clstream.snapshot import capture, origin_of

MARKER = Path("code-was-run")


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
    run(victim(), example_stream(), kept)
    return dict(kept.load(4)) | {"format": 2, "clstream": clstream.__version__, "torch": str(torch.__version__), "threads": 1}


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
            run(strategy, example_stream(), *observers, resume=newest(tmp_path))
        assert not MARKER.exists(), "a checkpoint ran code"
        text = str(refused.value)
        assert 20 < len(text) < 500 and "\n" not in text
        return text

    return resume


def test_the_builder_makes_checkpoints_that_go_on(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    save(checkpoint | {"threads": torch.get_num_threads()}, tmp_path, 1)
    result = run(victim(), example_stream(), resume=newest(tmp_path))
    assert torch.equal(result.accuracy, run(victim(), example_stream()).accuracy)


# Names --------------------------------------------------------------------------------------------------------------------

HERE = __name__
EVIL = [
    "os:system", "posix:system", "subprocess:Popen", "subprocess:run", "builtins:eval", "builtins:exec", "builtins:open", "builtins:type",
    "builtins:__import__", "torch:load", "torch:compile", "torch:from_file", "torch:save", "torch.hub:load", "nowhere:x",
    "torch.utils.collect_env:run", "torch.utils.cpp_extension:load", "torch.jit:CompilationUnit", "torch.jit:load",
    "torch.nn.modules.module:torch.load", "torch.nn.functional:torch.load", "torch.nn.functional:torch.hub.load",
    "torch.nn.functional:handle_torch_function", "torch.nn.functional:boolean_dispatch", "torch.nn.functional:importlib.import_module",
    "torch.nn.functional:_verify_batch_size", "torch.nn.modules.module:warnings", "torch.optim.optimizer:torch.load",
    "torch.optim.lr_scheduler:partial", "torch.nn.modules.module:OrderedDict", "torch.nn:Module.apply", "torch.nn.modules.module:Module.compile",
    "torch.fx:GraphModule", "torch.fx.graph_module:GraphModule", "torch.jit._script:RecursiveScriptModule", "torch.nn.parallel:DistributedDataParallel",
    "numpy:memmap", "numpy:load", "numpy:save", "clstream.cli:main", "clstream.cli:os.system", "clstream.store:connect",
    "clstream.checkpoint:Checkpointer", "clstream.checkpoint:save", "clstream.recording:record", "numpy.lib._datasource:DataSource",
    "tempfile:TemporaryDirectory", "pathlib:Path", "clstream.folders:FileLock", "weakref:finalize", "functools:partial", "types:FunctionType",
    f"{HERE}:shell", f"{HERE}:Tool", f"{HERE}:subprocess.Popen", f"{HERE}:os.system", f"{HERE}:Ends", "__main__:__builtins__",
]  # fmt: skip
FORMS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "name": lambda state, name: ["name", name],  # noqa: ARG005
    "partial": lambda state, name: ["partial", ["name", name], ["tuple", "", ["touch code-was-run"]], []],  # noqa: ARG005
    "enum": lambda state, name: ["enum", name, "ls"],  # noqa: ARG005
    "flag": lambda state, name: ["flag", name, 1],  # noqa: ARG005
    "tuple": lambda state, name: ["tuple", name, ["touch code-was-run"]],  # noqa: ARG005
    "object": lambda state, name: append(state, kind="object", **{"class": name, "attributes": {"_destpath": "/nowhere", "x": 1}}),
    "code": lambda state, name: append(state, kind="code", called=name, text=[name.partition(":")[0], "x", 1, ""], cells=[]),
    "code at a place": lambda state, name: append(state, kind="code", called=name, origin="Victim.activation"),
    "bits": lambda state, name: append(state, kind="bits", **{"class": name.partition(":")[2], "state": "{}", "seeds": None}),
    "dict": lambda state, name: append(state, kind="dict", **{"class": name, "items": []}),
    "factory": lambda state, name: append(state, kind="dict", **{"class": "defaultdict", "items": [], "factory": ["name", name]}),
    "method": lambda state, name: ["method", ["node", 0], name.partition(":")[2]],  # noqa: ARG005
    "dtype": lambda state, name: ["dtype", name.partition(":")[2]],  # noqa: ARG005
    "global": lambda state, name: ["global", name],  # noqa: ARG005
    "array type": lambda state, name: ["array type", name],  # noqa: ARG005
    "a tag of its own": lambda state, name: [name, "touch code-was-run"],  # noqa: ARG005
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cannot_choose_what_is_run(form: str, checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import clstream.cli
    import clstream.store  # noqa: F401  # loaded, as they are under the command

    monkeypatch.chdir(tmp_path)
    strategy, stream = victim(), example_stream()
    origin = origin_of([strategy], stream)
    for name in EVIL:
        state = deepcopy(checkpoint)
        put(state, "activation", FORMS[form](state, name))
        with pytest.raises(ValueError, match=r"^the checkpoint can't be restored: "):
            restore([strategy], state["strategy"], origin)
        assert not MARKER.exists(), f"{name} was run, as a {form}"
