"""Served: a saved strategy as MLflow calls a model. `mlflow models serve` loads it by this module; nothing is pickled.

Of what is beside clstream, this needs torch and numpy only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clstream.strategy.loading import load, read_card
from clstream.stream import Samples, Task


class ServedStrategy:
    """Answers arrays of inputs, in plain values that JSON has.

    Args:
        folder: that `Strategy.save` wrote.
        code: the folder of the user's own modules that the strategy is built of, which is on Python's path.

    Raises as `clstream.load`.

    """

    def __init__(self, folder: str | Path, code: Path | None = None) -> None:
        self.card = read_card(folder)
        self.strategy = load(folder, classes=[*_classes_in(code)] if code is not None else ())
        about = self.card["run"]
        self.dtype = getattr(torch, about.get("input_dtype", "float32"))
        self.tasks = {task["id"]: task for task in about.get("tasks", ())}

    def predict(self, model_input: npt.ArrayLike, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Answer (n, *input_shape) raw inputs.

        Args:
            model_input: the inputs, of the dtype that the strategy learned.
            params: "task": the number of the task that they are of, whose classes compete; -1: it isn't given. "threshold": of the
                probability of a class, with several labels.

        Returns by name:
            prediction: as `strategy.predict` has it: a label for each input, 0 or 1 for each class, or values.
            names: of labels, what they are called.
            scores: as `strategy.scores` has them; None for a class that doesn't compete.
            novelty: for each input how strange it is, higher is stranger; None where the strategy can't tell.
            known_classes, known_names: the classes that were learned so far.

        Raises:
            ValueError: for a task that there isn't.

        """
        given = {"task": -1, "threshold": 0.5, **(params or {})}
        strategy, x = self.strategy, torch.as_tensor(np.asarray(model_input)).to(self.dtype)
        task = None if given["task"] < 0 else self._task(int(given["task"]), x)
        target = strategy.target if task is None else task.target
        scores = strategy.scores(x, task)
        predicted = strategy.predict(x, task, given["threshold"]) if target == "multilabel" else strategy.predict(x, task)
        told = strategy.tells_novelty([target])
        novelty = strategy.novelty(x).tolist() if told else None
        known = self.card["run"].get("known_classes", [])
        return {
            "prediction": predicted.tolist(),
            "names": [self._name(label) for label in predicted.tolist()] if target == "label" else [],
            "scores": [[value if math.isfinite(value) else None for value in row] for row in scores.tolist()],
            "novelty": novelty,
            "known_classes": known,
            "known_names": [self._name(label) for label in known],
        }

    def _name(self, label: int) -> str:
        names = self.card["run"].get("class_names") or []
        return names[label] if label < len(names) else str(label)

    def _task(self, number: int, x: torch.Tensor) -> Task:
        """Return a task, as far as a question needs it."""
        if number not in self.tasks:
            raise ValueError(f"there is no task {number}: the strategy has the tasks {', '.join(map(str, self.tasks)) or 'none'}")
        task = self.tasks[number]
        outputs = self.card["run"]["outputs"]
        y = torch.empty(0, dtype=torch.int64) if task["target"] == "label" else torch.empty(0, outputs)
        nothing = Samples(x[:0], y, target=task["target"])
        return Task(number, tuple(task["classes"]), nothing, nothing, target=task["target"])


def _classes_in(code: Path) -> Iterator[Any]:
    """Yield the classes and functions of the modules in a folder of code, which is the model's own and on Python's path."""
    for file in sorted(code.rglob("*.py")):
        place = file.relative_to(code).with_suffix("")
        module = import_module(".".join(place.parts[:-1] if place.name == "__init__" else place.parts))
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        yield from filter(callable, own)


def _load_pyfunc(path: str) -> ServedStrategy:
    """Return the model that MLflow asks for, of the folder with the strategy."""
    code = Path(path).parent.parent / "code"
    if code.is_dir() and str(code) not in sys.path:
        sys.path.insert(0, str(code))
    return ServedStrategy(path, code if code.is_dir() else None)
