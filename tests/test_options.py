"""Every option of everything that users build refuses what it is not, in one sentence that names it, before any work."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import clstream.strategies as strategies
import clstream.streams as streams
import pytest
import torch
from clstream.strategies.hypernetwork.generators import LstmGenerator, MlpGenerator
from clstream.strategies.tame.pruning import magnitude_masks
from clstream.streams.domains import Pad, Permute, Rotate
from clstream.streams.schedules import Blurry, Gaussian, LabelShift, Transitions
from conftest import VITS, vit_like
from torch.utils.data import TensorDataset

from clstream import drift_detection, memory, models, online_metrics, run
from clstream.augmentations import CropFlipJitter
from clstream.bus import Event
from clstream.checkpoint import checkpointer
from clstream.checks import example_model, example_stream, retention
from clstream.fisher import batch_fisher, diagonal_fisher
from clstream.pretraining import join_tasks
from clstream.stream import Samples, Stream, Task
from clstream.tracking import EventLog

NAN = float("nan")
WRONG: dict[object, tuple[object, ...]] = {
    bool: ("no", 2, 2.5, NAN),
    int: ("no", 2.5, True, NAN, -1),
    float: ("no", True, NAN, -1.0),
    str: ("no such thing", 5, True),
}
"""What is no value of an option of a type. Of strings only those that name a choice are asked: see `FREE`."""

FREE = {"name", "what", "label", "root", "file", "weights", "memory_map", "folder", "train", "test", "parameters"}
"""Strings that may be any."""

SIGNED = {"mean", "degrees", "cosine_below"}
"""Numbers that may be below 0."""


def points() -> dict[str, Any]:
    y = torch.arange(60) % 6
    return {"x": torch.randn(60, 4), "y": y, "x_test": torch.randn(60, 4), "y_test": y}


def stream() -> Stream:
    return streams.blobs(tasks=3, classes=6, train_per_class=10, test_per_class=4, features=4)


def samples() -> Samples:
    given = points()
    return Samples(given["x"], given["y"])


def dataset() -> TensorDataset:
    given = points()
    return TensorDataset(given["x"], given["y"])


NEEDED: dict[str, Callable[[], dict[str, Any]]] = {
    "from_tensors": points,
    "from_dataset": lambda: {"train": dataset(), "test": dataset()},
    "image_folder": lambda: {"root": "pictures"},
    "multilabel_folder": lambda: {"root": "pictures"},
    "nevis_list": lambda: {"file": "list.yaml"},
    "drifting": lambda: {"stream": stream(), "schedule": Transitions(0.5)},
    "arriving": lambda: {"source": [(torch.rand(8, 4), torch.arange(8) % 2)]},
    "at_moments": lambda: {"stream": stream(), "moments": torch.rand(60), "what": "at random"},
    "long_tailed": lambda: {"stream": stream()},
    "few_shot": lambda: {"stream": stream()},
    "sorted_by": lambda: {"train": samples(), "test": samples()},
    "Stream": lambda: {"name": "s", "tasks": [Task(0, (0, 1, 2, 3, 4, 5), samples(), samples())]},
    "EventLog": lambda: {"folder": "log"},
    "Pad": lambda: {"pad": 1},
    "Permute": lambda: {"seed": 1},
    "Rotate": lambda: {"degrees": 1.0},
    "join_tasks": lambda: {"stream": stream()},
    "Federated": lambda: {"base": strategies.Finetune(example_model())},
    "diagonal_fisher": lambda: {"model": example_model(), "samples": samples()},
    "batch_fisher": lambda: {"model": example_model(), "samples": samples(), "batch_size": 5},
    "magnitude_masks": lambda: {"model": example_model(), "sparsity": 0.5},
    "run": lambda: {"strategy": strategies.Finetune(models.Mlp(4, 6)), "stream": stream()},
    "Blurry": lambda: {"blurry": (0,)},
    "Reservoir": lambda: {"capacity": 5},
    "ClassBalanced": lambda: {"capacity": 5},
    "GreedyBalanced": lambda: {"capacity": 5},
    "Ring": lambda: {"capacity": 5},
    "Mlp": lambda: {"input_shape": 4, "classes": 3},
    "Refresh": lambda: {"base": strategies.DERpp(example_model())},
    "ContinualBackprop": lambda: {"base": strategies.DERpp(example_model())},
    "ReDo": lambda: {"base": strategies.DERpp(example_model())},
    "ShrinkAndPerturb": lambda: {"base": strategies.DERpp(example_model())},
    "Regularised": lambda: {"base": strategies.Finetune(example_model()), "penalties": [strategies.EWCPenalty(0.1)]},
    "WithDetectedBoundaries": lambda: {"base": strategies.EWC(example_model())},
    "CoreSets": lambda: {"base": strategies.Replay(example_model())},
    "Active": lambda: {"base": strategies.Replay(example_model())},
    "ClassMeans": lambda: {"base": strategies.Replay(example_model())},
    "features": lambda: {"stream": example_stream(), "backbone": example_model()},
    "Checkpointer": lambda: {"folder": "checkpoints"},
    "BatchNormMlp": lambda: {"input_shape": 4, "classes": 3},
    "MlpGenerator": lambda: {"size": 10, "chunk": 5, "task_size": 2, "chunk_size": 2},
    "LstmGenerator": lambda: {"size": 10, "chunk": 5, "task_size": 2, "chunk_size": 2},
}
"""Arguments that have no default, by what needs them."""

LEFT_OUT = {"from_avalanche", "with_test", "recorded", "AvalancheStrategy"}
"""What needs Avalanche, or a file: their own tests ask them."""


INNER = {"LossWindow", "Stopped"}
"""What is made by what users build, not by them."""


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in (streams, strategies, models):
        found |= {name: getattr(module, name) for name in module.__all__ if name not in LEFT_OUT}
    for cls in (memory.Reservoir, memory.ClassBalanced, memory.Ring, Stream, Transitions, Gaussian, LabelShift, Blurry):
        found[cls.__name__] = cls
    more = (MlpGenerator, LstmGenerator, EventLog, CropFlipJitter, Pad, Permute, Rotate, join_tasks, diagonal_fisher, batch_fisher)
    for thing in (*more, magnitude_masks, run):
        found[thing.__name__] = thing
    for module in (drift_detection, online_metrics, checkpointer, retention):
        found |= {
            name: thing
            for name, thing in vars(module).items()
            if inspect.isclass(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
            if not issubclass(thing, (Event, Exception, BaseException)) and name not in INNER
        }
    return found


THINGS = everything()
PYTHON_S_OWN = ("unsupported operand", "not supported between", "object is not", "cannot be interpreted", "unexpected keyword")


def kinds_of(annotation: object) -> tuple[set[object], bool]:
    """Return the plain types that an annotation takes, and whether it takes None."""
    parts = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return {str if get_origin(part) is Literal else get_origin(part) or part for part in parts}, type(None) in parts


def options_of(thing: Any) -> Iterator[tuple[str, set[object], bool]]:
    target = thing.__init__ if inspect.isclass(thing) else thing
    try:
        hints = get_type_hints(inspect.unwrap(target))
    except NameError:
        return
    for name, parameter in inspect.signature(thing).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name not in hints:
            continue
        kinds, none = kinds_of(hints[name])
        if kinds & {bool, int, float, str}:
            yield name, kinds, none


def wrong_values(option: str, kinds: set[object], none: bool) -> list[object]:
    """Return values of other types than an option takes, and what no option of its type takes."""
    if str in kinds and (option in FREE or Path in kinds):
        return []
    values: list[object] = [] if none else [None]
    for kind in kinds:
        values += WRONG.get(kind, ())
    return [value for value in values if not (fits(value, kinds) or (option in SIGNED and value in (-1, -1.0)))]


def fits(value: object, kinds: set[object]) -> bool:
    """Return whether a value is of one of the kinds, and no number that none of them is."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, (int, float)) and (value < 0 or math.isnan(value)):
        return False
    return type(value) in kinds - {str} or (isinstance(value, int) and float in kinds)


@pytest.mark.parametrize("name", THINGS)
def test_options_refuse_what_they_are_not(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLSTREAM_DATA", str(tmp_path))  # no data is there: nothing may be looked for before
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("data was looked for before the option was checked"))
    monkeypatch.chdir(tmp_path)
    thing = THINGS[name]
    needed = NEEDED.get(name, dict)()
    if name in strategies.__all__ and "model" in inspect.signature(thing).parameters:
        needed["model"] = vit_like(example_model(), depth=5) if name in VITS else example_model()
    if name in models.__all__ and name != "Mlp":
        needed = {"input_shape": (1, 32, 32), "classes": 6}
    for option, kinds, none in options_of(thing):
        for value in wrong_values(option, kinds, none):
            what = f"{name}({option}={value!r})"
            try:
                thing(**{**needed, option: value})
            except (ValueError, TypeError) as error:
                sentence = str(error)
            else:
                pytest.fail(f"{what} was taken")
            assert option in sentence, f"{what} isn't named: {sentence}"
            assert "\n" not in sentence and len(sentence) < 400, f"{what} is no sentence: {sentence}"
            assert not [own for own in PYTHON_S_OWN if own in sentence], f"{what} gets Python's own: {sentence}"
            assert not list(tmp_path.iterdir()), f"{what} was refused after something was written"


def test_the_test_finds_the_options() -> None:
    """It is told by annotations: without them it would ask nothing."""
    asked = {(name, option) for name, thing in THINGS.items() for option, kinds, none in options_of(thing) if kinds}
    for pair in (
        ("split_cifar10", "augment"),
        ("TAME", "sigmoid"),
        ("Mlp", "head"),
        ("Stream", "drop_last"),
        ("run", "max_sessions"),
    ):
        assert pair in asked
    assert len(asked) > 500
