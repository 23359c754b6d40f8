"""How far the reading of data is: a bar in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, progress: bool, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Show a bar, if that is asked for, in a terminal, and where rich is installed; yield what advances it by a number."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda _: None
        return
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        shown = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(shown, count)
