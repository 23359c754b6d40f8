"""Costs: what a run took, session by session: FLOPs, seconds, parameters, memory, and bytes that were sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

ADDED = (
    "learning_flops", "consolidating_flops", "evaluating_flops",
    "learning_seconds", "consolidating_seconds", "evaluating_seconds", "tracking_seconds",
)  # fmt: skip
"""The columns of `Cost` that add up over sessions."""

HELD = ("parameters", "trainable_parameters", "memory_bytes", "peak_bytes")
"""The columns of `Cost` that say what there was when a session was over."""


SENT = ("bytes_up", "bytes_down")
"""The columns of `Cost` that are 0 unless there are clients; dictionaries, totals and frames leave them out then."""

SAVED = ("epochs_saved",)
"""The same, of those that are 0 unless sessions are stopped early."""


def _unknown() -> Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """What a run took: tensors of (sessions,), float64, on the CPU; NaN is unknown.

    The first session has what came before it too: the evaluation of the untrained strategy, and the start.

    Args:
        learning_flops: floating-point operations of the steps on batches: see `clstream.measures.flops`.
        consolidating_flops: of what the strategy does when a session or a task ends.
        evaluating_flops: of answers in evaluations.
        learning_seconds: all that is not in the other seconds.
        consolidating_seconds, evaluating_seconds: as the FLOPs.
        tracking_seconds: in the handlers of observers, with what these deferred, such as checkpoints.
        parameters, trainable_parameters: numbers that the strategy answers with, and those of them that require a gradient.
        memory_bytes: what the strategy keeps beside these when the session is over, evaluated or not: see
            `clstream.measures.memory`.
        peak_bytes: the most memory that the process had until then, on a GPU the most that tensors had there.
        epochs_saved: passes over a session that early stopping left out.
        bytes_up, bytes_down: of tensors that clients sent to a server, and that it sent to them.
        memory: the bytes in the newest of `memory_bytes`, by the attribute of the strategy that holds them.
        compiling_seconds: of the whole run, which are in none of the columns; 0 unless steps are compiled.

    """

    learning_flops: Tensor = field(default_factory=_unknown)
    consolidating_flops: Tensor = field(default_factory=_unknown)
    evaluating_flops: Tensor = field(default_factory=_unknown)
    learning_seconds: Tensor = field(default_factory=_unknown)
    consolidating_seconds: Tensor = field(default_factory=_unknown)
    evaluating_seconds: Tensor = field(default_factory=_unknown)
    tracking_seconds: Tensor = field(default_factory=_unknown)
    parameters: Tensor = field(default_factory=_unknown)
    trainable_parameters: Tensor = field(default_factory=_unknown)
    memory_bytes: Tensor = field(default_factory=_unknown)
    peak_bytes: Tensor = field(default_factory=_unknown)
    bytes_up: Tensor = field(default_factory=_unknown)
    bytes_down: Tensor = field(default_factory=_unknown)
    epochs_saved: Tensor = field(default_factory=_unknown)
    memory: dict[str, int] = field(default_factory=dict)
    compiling_seconds: float = 0.0

    def __len__(self) -> int:
        """Return how many sessions there are."""
        return len(self.learning_flops)

    @property
    def flops(self) -> Tensor:
        """All FLOPs, (sessions,)."""
        return self.learning_flops + self.consolidating_flops + self.evaluating_flops

    @property
    def training_flops(self) -> Tensor:
        """The FLOPs of learning and consolidating, (sessions,)."""
        return self.learning_flops + self.consolidating_flops

    @property
    def sends(self) -> bool:
        """Whether anything was sent."""
        return any(bool(getattr(self, name).any()) for name in SENT)

    @property
    def saves(self) -> bool:
        """Whether early stopping left anything out."""
        return bool(self.epochs_saved.any())

    @property
    def total(self) -> dict[str, float]:
        """The whole run: sums of FLOPs and seconds, the last number of parameters, the most memory that was held; NaN of none.

        Where anything was sent, or left out by early stopping, the sums of that too.
        """
        known = len(self) > 0
        values = {name: float(getattr(self, name).sum()) if known else float("nan") for name in ADDED}
        values["flops"] = float(self.flops.sum()) if known else float("nan")
        for name in HELD:
            column = getattr(self, name)
            values[name] = float(column.amax() if name.endswith("bytes") else column[-1]) if known else float("nan")
        values |= {name: float(getattr(self, name).sum()) for name in self._optional}
        return values | ({"compiling_seconds": self.compiling_seconds} if self.compiling_seconds else {})

    @property
    def _optional(self) -> tuple[str, ...]:
        return (*(SENT if self.sends else ()), *(SAVED if self.saves else ()))

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, as checkpoints hold them, that `from_dict` takes."""
        left_out = {*(() if self.compiling_seconds else ("compiling_seconds",)), *{*SENT, *SAVED} - {*self._optional}}
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(Cost) if attribute.name not in left_out}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cost:
        """Return the cost whose `to_dict` gave these values. Raises ValueError for values that no cost gives."""
        optional = (*(() if values.keys().isdisjoint(SENT) else SENT), *(SAVED if "epochs_saved" in values else ()))
        columns = [values.get(name) for name in (*ADDED, *HELD, *optional)]
        right = {"compiling_seconds", *SENT, *SAVED, *values} == {attribute.name for attribute in fields(Cost)} and isinstance(
            values["memory"], dict
        )
        right = right and type(values.get("compiling_seconds", 0.0)) is float
        right = right and all(isinstance(column, Tensor) and column.dtype == torch.float64 for column in columns)
        right = right and all(column.dim() == 1 and len(column) == len(values[ADDED[0]]) for column in columns)  # type: ignore[union-attr,arg-type]
        right = right and all(isinstance(name, str) and type(size) is int for name, size in values["memory"].items())
        if not right:
            raise ValueError("these can't be the values of a Cost")
        none = torch.zeros_like(values[ADDED[0]])
        return Cost(**{**dict.fromkeys((*SENT, *SAVED), none), **values})

    def to_frame(self) -> DataFrame:
        """Return a pandas DataFrame: a row for each session, a column for each of the tensors."""
        try:
            from pandas import DataFrame, RangeIndex
        except ModuleNotFoundError:
            raise ImportError("a DataFrame needs the package pandas, which is not installed: pip install pandas") from None
        columns = {name: getattr(self, name).numpy() for name in (*ADDED, *HELD, *self._optional)}
        return DataFrame(columns, index=RangeIndex(1, len(self) + 1, name="sessions_finished"))


def pareto_front(costs: Tensor, values: Tensor) -> Tensor:
    """Return the points that no other one beats, by number, cheapest first: (points,) costs, less is better, and values, more is.

    Of two that cost the same the better one is there, of two that are as good the cheaper one; one that is not a number is not.
    """
    front: list[int] = []
    best = -float("inf")
    for number in sorted(range(len(costs)), key=lambda number: (float(costs[number]), -float(values[number]))):
        if float(costs[number]) < float("inf") and float(values[number]) > best:
            best = float(values[number])
            front.append(number)
    return torch.tensor(front, dtype=torch.int64)
