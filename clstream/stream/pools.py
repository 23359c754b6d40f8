"""A pool of samples whose labels are bought: what each session has depends on what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clstream.params import check_integer


@dataclass(frozen=True, eq=False, repr=False)
class PoolSchedule:
    """A schedule over a pool: the first session has some labelled samples, each later one those whose labels were bought for it.

    Which these are is written to `bought` in a run, where a strategy has a method `query`. Where nothing was bought, it is a random
    choice, a pure function of the session's number: so a stream that nobody asks anything of is the random baseline.

    Args:
        pool: how many samples there are.
        start: how many of them are labelled from the start, drawn at random.
        budget: labels that are bought for each later session.
        rounds: later sessions.
        seed: of what is random.
        bought: the rows that were bought, by session: (budget,), int64, on the CPU.

    Raises ValueError for a pool that has fewer samples than labels are bought.
    """

    pool: int
    start: int
    budget: int
    rounds: int
    seed: int = 0
    bought: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer(1, pool=self.pool, start=self.start, budget=self.budget, rounds=self.rounds)
        check_integer(0, seed=self.seed)
        if self.start + self.budget * self.rounds > self.pool:
            raise ValueError(
                f"the pool has {self.pool:,} samples, fewer than the {self.start:,} + {self.rounds:,} x {self.budget:,} labels "
                "bought: take a larger pool, or a smaller budget"
            )

    @property
    def once(self) -> bool:
        """Whether a training sample comes in one session at most: it does."""
        return True

    def __len__(self) -> int:
        """Return the number of sessions."""
        return 1 + self.rounds

    def __repr__(self) -> str:
        return (
            f"{self.start} labels of a pool of {self.pool}, then {self.rounds} rounds that buy {self.budget}, drawn by {self.seed}"
        )

    def draw(self, session: int) -> Tensor:
        """Return the rows of a session: (n,), int64."""
        return self._sessions(session)[-1]

    def unlabelled(self, session: int) -> Tensor:
        """Return the rows whose labels can be bought for a session, in their order: (n,), int64."""
        free = torch.ones(self.pool, dtype=torch.bool)
        free[torch.cat(self._sessions(session - 1))] = False
        return free.nonzero().flatten()

    def with_bought(self, bought: Mapping[int, Tensor]) -> PoolSchedule:
        """Return the schedule with what was bought."""
        return replace(self, bought=dict(bought))

    def restored(self, bought: object, sessions: int) -> PoolSchedule:
        """Return the schedule with what was bought for so many sessions, lists of rows by session; ValueError for anything else."""
        schedule, listed = self.with_bought({}), bought if isinstance(bought, Mapping) else {}
        for session in range(1, 1 + max(sessions, len(listed))):
            rows = listed.get(str(session))
            own = set(rows) if isinstance(rows, list) and all(type(row) is int for row in rows) else set()
            if session > sessions or len(own) != self.budget or not own <= set(schedule.unlabelled(session).tolist()):
                raise ValueError(
                    f"the checkpoint is no good: it has no {self.budget} rows of the pool bought for session {session}"
                )
            schedule = schedule.with_bought({**schedule.bought, session: torch.tensor(rows)})
        return schedule

    def _sessions(self, last: int) -> list[Tensor]:
        """Return the rows of each session up to one."""
        order = torch.randperm(self.pool, generator=torch.Generator().manual_seed(self.seed))
        rows, free = [order[: self.start]], torch.ones(self.pool, dtype=torch.bool)
        free[rows[0]] = False
        for session in range(1, last + 1):
            own = self.bought.get(session)
            rows.append(order[free[order]][: self.budget] if own is None else own)
            free[rows[-1]] = False
        return rows
