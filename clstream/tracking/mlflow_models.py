"""MLflow models: a strategy in MLflow's format, loaded by `clstream.strategy.served`."""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from clstream.strategy import Strategy, read_card

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of type hints of its own
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # that an example is checked is no news

LOADER = "clstream.strategy.served"

_BESIDE = ("timm", "torchvision", "open_clip", "peft")
"""Packages whose layers a model may have."""


def write_model(strategy: Strategy, folder: Path, example: np.ndarray[Any, Any], sources: Mapping[str, str]) -> Path:
    """Write a strategy as an MLflow model.

    Args:
        strategy: it was taught.
        folder: that is made.
        example: a few inputs, as the stream has them.
        sources: the user's own modules, texts by the names of files.

    Raises:
        CaptureError: a TypeError, for what can't be saved.
        OSError: if it can't be written.

    """
    with TemporaryDirectory() as name:
        place = Path(name)
        saved = strategy.save(place / "strategy")
        card = read_card(saved)
        for file, text in sources.items():
            (place / "own" / file).parent.mkdir(parents=True, exist_ok=True)
            (place / "own" / file).write_text(text, encoding="utf-8")
        about = card["run"]
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=LOADER,
            data_path=str(saved),
            code_paths=[str(path) for path in sorted((place / "own").iterdir())] if sources else None,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))]),
                outputs=answer_schema(about["targets"]),
                params=ParamSchema([ParamSpec("task", "long", -1), ParamSpec("threshold", "double", 0.5)]),
            ),
            input_example=example,
            pip_requirements=requirements(card, sources),
            metadata={
                "strategy": card["strategy"],
                "known_classes": about["known_classes"],
                "class_names": about["class_names"],
                "data_fingerprint": about["data_fingerprint"],
            },
        )
    return folder


def answer_schema(targets: Sequence[str]) -> Schema:
    """Return the columns of what `ServedStrategy.predict` answers, where a stream has targets of some kinds."""
    numbers, texts = Array(DataType.double), Array(DataType.string)
    predicted = Array(DataType.long) if targets == ["label"] else Array(numbers)
    labels = Array(DataType.long)
    return Schema(
        [
            ColSpec(predicted, "prediction"), ColSpec(texts, "names"), ColSpec(Array(numbers), "scores"),
            ColSpec(numbers, "novelty", required=False), ColSpec(labels, "known_classes"), ColSpec(texts, "known_names"),
        ]
    )  # fmt: skip


def requirements(card: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """Return what answering needs, each package at its version here: clstream, torch, numpy, and what the model is built of."""
    tops = {name.partition(":")[0].partition(".")[0] for name in card["code"]} & set(_BESIDE)
    own = {name.partition("/")[0].removesuffix(".py") for name in sources}
    for text in sources.values():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops |= {name.partition(".")[0] for name in names}
    distributions = packages_distributions()
    needed = {"clstream", "torch", "numpy"}
    needed |= {distributions[top][0] for top in tops - own - set(sys.stdlib_module_names) if top in distributions}
    return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(needed)]
