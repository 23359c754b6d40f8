"""Runs in TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clstream.tracking.point_tracker import Point, PointTracker, cut

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardTracker(PointTracker):
    """Writes the points of a run as TensorBoard's scalars, to the folder `tensorboard` in the run's, and its params as text.

    `tensorboard --logdir runs` shows all runs below a folder.

    Args:
        folder, name: see `PointTracker`; the name is among the params.

    Raises:
        ImportError: if TensorBoard is not installed.

    """

    writer: SummaryWriter | None = None

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise ImportError("TensorBoard is not installed: pip install 'clstream[tensorboard]'") from None
        super().__init__(folder, name)

    @property
    def path(self) -> Path:
        """The folder with TensorBoard's files."""
        return self.folder / FOLDER

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.path))
        return self.writer

    def create(self, title: str, params: Mapping[str, object]) -> None:
        """Begin anew: files of an earlier run in the folder are removed, or TensorBoard would join both."""
        shutil.rmtree(self.path, ignore_errors=True)
        rows = "".join(f"| {param} | {str(value).replace('|', '&#124;')} |\n" for param, value in {"name": title, **params}.items())
        self._open().add_text("params", f"| param | value |\n|---|---|\n{rows}", 0)

    def go_on(self, state: Mapping[str, int]) -> None:
        """Cut each file where the checkpoint was, and go on in another one, as TensorBoard does."""
        for file in sorted(self.path.glob("events.*")):
            if file.name in state:
                cut(file, state[file.name])
            else:
                file.unlink()
        self._open()

    def put(self, points: Sequence[Point]) -> None:
        """Write a scalar for each point."""
        assert self.writer is not None
        for name, step, value in points:
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def position(self) -> dict[str, int]:
        """Return the bytes of each file so far, by name."""
        assert self.writer is not None
        self.writer.flush()
        return {file.name: file.stat().st_size for file in sorted(self.path.glob("events.*"))}

    def finish(self, status: str) -> None:  # TensorBoard has no word for it
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
