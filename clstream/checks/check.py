"""A check of a contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """A check of a contract; call it to run it. Raises AssertionError if it fails."""

    name: str
    body: Callable[[], None]

    def __call__(self) -> None:
        """Run it; AssertionError if it fails."""
        self.body()

    def __str__(self) -> str:
        return self.name
