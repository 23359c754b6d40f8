"""A checkpoint is data: one that was crafted, with a right hash, runs no code, and is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_checkpoints import MARKER, STREAM, Victim, append, node, put, resumer, victim, written
from torch.nn import functional as F

from clstream import run
from clstream.checkpoint import newest
from clstream.checkpoint.store import save
from clstream.serialization import restore
from clstream.serialization.capture import references_of


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return written()


@pytest.fixture
def resumed(checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    return resumer(checkpoint, tmp_path, monkeypatch)


def test_the_builder_makes_checkpoints_that_go_on(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    save(checkpoint | {"threads": torch.get_num_threads()}, tmp_path, 1)
    result = run(victim(), STREAM, resume=newest(tmp_path))
    assert torch.equal(result.accuracy, run(victim(), STREAM).accuracy)


# Names --------------------------------------------------------------------------------------------------------------------

HERE = Victim.__module__
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


@pytest.mark.slow
def test_methods_of_the_stream_and_of_functions_are_out_of_reach(resumed: Callable[..., str]) -> None:
    for owner in (["stream"], ["task", 0], ["session", 0], ["name", "torch.nn.functional:relu"], ["global", "torch"]):
        for name in ("reseeded", "__init__", "__globals__", "set_state", "manual_seed", "replace"):
            resumed(lambda state, owner=owner, name=name: put(state, "step", ["method", owner, name]))
