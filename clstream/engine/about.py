"""About: what the card of a saved strategy says of the run that taught it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from clstream.results import Result
from clstream.stream import Stream
from clstream.stream.samples import positives


class RunFacts(NamedTuple):
    """What there is to say of a run, at some time of it: its stream, the sessions that have begun, and what was measured so far."""

    stream: Stream
    begun: int
    result: Result

    def about(self) -> dict[str, Any]:
        """Return it in plain values, as JSON has them; what isn't known is None."""
        stream, result = self.stream, self.result
        first = stream.tasks[0].test[:1].x
        last = result.after_sessions[-1] if result.after_sessions else None
        seen = [False] * len(stream.tasks) if last is None else last.seen.tolist()
        measured = {} if last is None else {
            name: dict(zip(result.test_sets, values.tolist(), strict=True)) for name, values in last.values.items()
        }  # fmt: skip
        about = {
            "stream": stream.name,
            "data_fingerprint": stream.fingerprint,
            "scenario": stream.scenario,
            "targets": list(stream.targets),
            "outputs": stream.outputs,
            "input_shape": list(first.shape[1:]),
            "input_dtype": str(first.dtype).removeprefix("torch."),
            "class_names": list(stream.class_names),
            "known_classes": self.known_classes(),
            "tasks": [
                {"id": task.id, "classes": list(task.classes), "target": task.target, "taught": seen[task.id]}
                for task in stream.tasks
            ],
            "sessions": self.begun,
            "params": result.params,
            "metrics": {f"average_{result.main_name}": result.average, "forgetting": result.forgetting} if measured else {},
            "measured": measured,
            "cost": result.cost.total,
            "seconds": result.seconds,
        }
        plain: dict[str, Any] = _without_nan(about)
        return plain

    def known_classes(self) -> list[int]:
        """Return the classes that came so far, sorted; of values there are none."""
        gone = [task for task in self.stream.tasks if not len(task.train)]  # of a run that this one continues
        classes = {label for task in gone for label in task.classes}
        for session in range(self.begun):
            if not self.stream.size_of(session):
                continue
            labels = self.stream.labels(session)
            if labels.dim() == 1:
                classes |= set(labels.unique().tolist())
            elif self.stream.tasks[self.stream.task_of(session)].target == "multilabel":
                classes |= set(positives(labels))
        return sorted(classes)


def _without_nan(value: Any) -> Any:
    """Return plain values with None in place of numbers that are not finite, which JSON doesn't have."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
