"""Recorded streams: what replaying a recording gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clstream.stream import MixedSchedule, Samples, Session, Stream, Subset


@dataclass(frozen=True, eq=False, repr=False)
class RecordedStream(Stream):
    """A stream whose sessions deliver what was recorded, also where today's code would deal samples out otherwise.

    Args:
        dealt: for each session, the positions of its samples among its task's training samples: a slice, or (n,) int64.

    """

    dealt: Sequence[slice | Tensor] = ()

    def session(self, index: int) -> Session:
        """Return a session by number, as `Stream.session` does."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has the sessions 0 to {len(self) - 1}, not {index}")
        return self._session(index, self._delivered(index))

    def _delivered(self, index: int) -> Samples | Subset:
        if isinstance(self.schedule, MixedSchedule):
            return self._mixed(self.schedule.draw(index))
        train, dealt = self.tasks[self.task_of(index)].train, self.dealt[index]
        if isinstance(dealt, Tensor):
            dealt = dealt.to(train[:1].y.device)
        return train.take(dealt) if isinstance(train, Subset) else train[dealt]


@dataclass(frozen=True, eq=False)
class RecordedMixture:
    """The recorded draws of the sessions of a stream that mixes its tasks; see `MixedSchedule`.

    Args:
        what: its rule in words.
        once: whether each sample comes once.
        drawn: for each session, a slice of the training samples of all tasks, or (n,) int64 numbers of them.

    """

    what: str
    once: bool
    drawn: Sequence[slice | Tensor]

    def __repr__(self) -> str:
        return self.what

    def __len__(self) -> int:
        return len(self.drawn)

    def draw(self, session: int) -> Tensor:
        """Return what a session draws: see `MixedSchedule`."""
        drawn = self.drawn[session]
        return drawn if isinstance(drawn, Tensor) else torch.arange(drawn.start, drawn.stop, drawn.step)
