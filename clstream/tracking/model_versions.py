"""Model versions: what a tracked run writes of its strategy as MLflow models, and how these are registered."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clstream import events
from clstream.bus import ObserverError
from clstream.params import check_choice, reason_of
from clstream.serialization.whole import capture_whole
from clstream.tracking.outbox import Outbox

WHEN = ("", "end", "sessions")


class ModelVersions:
    """Writes a run's strategy as MLflow models, among its artifacts, and registers each as the next version of a name.

    Args:
        when: "end" (of a run that came to its end), "sessions" (at each evaluation that follows a session), or "" (never).
        name: of the registered model; None: the strategy and the stream, "Replay-split_mnist".
        folder: of the run, where a model lies until it is sent. None: a temporary one.

    Raises:
        ValueError: for another `when`.

    """

    def __init__(self, when: str, name: str | None, folder: Path | None) -> None:
        check_choice(WHEN, log_model=when)
        self.when, self.name, self.folder = when, name, folder
        self.written: list[Path] = []

    def check(self, started: events.RunStarted) -> None:
        """Refuse what could not be written or served later. Raises ObserverError."""
        if not self.when:
            return
        sources = {} if started.run is None else started.run.source_files
        try:
            nodes = capture_whole(started.strategy)["nodes"]
        except TypeError as error:
            raise ObserverError(f"the strategy can't be logged as a model: {error}") from None
        script = next((name for name in _texts(nodes) if name.startswith("__main__:")), None)
        if script is not None:
            raise ObserverError(
                f"the strategy can't be logged as a model: {script.partition(':')[2]} is written in a script, which would run "
                "where it is served. Put it into a module that the script imports"
            )
        self.started, self.sources = started, sources

    def put(self, outbox: Outbox, session: int, path_of: Callable[[Path], str]) -> None:
        """Write the strategy as it is after some sessions, and have it sent and registered.

        Args:
            outbox: what sends it.
            session: how many sessions are finished.
            path_of: what the outbox calls a file.

        """
        from clstream.tracking.mlflow_models import write_model  # it imports what takes a second

        strategy, stream = self.started.strategy, self.started.stream
        name = f"model_{session:03d}" if self.when == "sessions" else "model"
        place = Path(tempfile.mkdtemp(prefix="clstream-")) if self.folder is None else self.folder
        folder = place / name
        self.written.append(folder if self.folder is not None else place)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        example: Any = stream.tasks[0].test[:1].x.cpu().numpy()
        try:
            write_model(strategy, folder, example, self.sources)
        except (OSError, TypeError) as error:  # a full disk, or what came since the run began
            text = f"the model after {session} sessions could not be logged ({reason_of(error)}): the run goes on"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            outbox.put("file", path=path_of(file), folder=file.parent.relative_to(place).as_posix())
        registered = self.name or f"{type(strategy).__name__}-{stream.name}"
        tags = {"sessions": str(session), "seed": str(self.started.seed)}
        outbox.put("register", name=registered, path=name, tags=tags)

    def clear(self) -> None:
        """Remove the models that were sent from where they lay."""
        earlier = [] if self.folder is None or not self.when else [*self.folder.glob("model"), *self.folder.glob("model_[0-9]*")]
        for folder in (*self.written, *earlier):  # those of attempts that were killed, too
            shutil.rmtree(folder, ignore_errors=True)
        self.written = []


def _texts(part: object) -> Iterator[str]:
    """Yield the texts among plain values, at any depth."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, (list, dict)):
        for item in part.values() if isinstance(part, dict) else part:
            yield from _texts(item)
