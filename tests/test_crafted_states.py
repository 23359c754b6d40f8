"""Crafted checkpoints with sizes, numbers and circles that can't be: each is refused in a sentence, and takes no memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_checkpoints import STREAM, Edit, append, node, put, resumer, victim, written
from torch import nn

from clstream import BatchLearned, on, run
from clstream.checkpoint.store import FORMAT


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return written()


@pytest.fixture
def resumed(checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    return resumer(checkpoint, tmp_path, monkeypatch)


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
