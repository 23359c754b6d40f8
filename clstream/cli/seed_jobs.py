"""The run of one seed as a worker is told of it, and where the worker is to be for it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from clstream.cli import run_folders
from clstream.cli.build import build_stream
from clstream.cli.errors import Failure, as_failure
from clstream.cli.parser import parse_run
from clstream.cli.yaml_files import dump_yaml, parse_yaml
from clstream.stream import Stream

LOST_WORKERS = 60.0
"""Seconds to wait for the folder of a run that another worker has."""


class SeedJob(NamedTuple):
    """The run of one seed as a worker is told of it, maybe on another machine that shares the folders.

    Args:
        config: the options, as YAML.
        seed: of the run.
        folder: of the run folder; that of the seed is in it.
        place: the working folder.
        parent: the id of the MLflow run that it is shown under.
        trust: packages that the config may name.
        accept_changed_code: whether a checkpoint of other code of the user's own is gone on from.
        others: seeds that run together with it.

    """

    config: str
    seed: int
    folder: Path
    place: Path
    parent: str | None = None
    trust: tuple[str, ...] = ()
    accept_changed_code: bool = False
    others: tuple[int, ...] = ()

    @property
    def of_seed(self) -> Path:
        """The folder of the seed."""
        return self.folder / f"seed_{self.seed}"

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Enter the working folder, and have what is printed go to output.txt in the folder of the seed.

        Raises Failure if a folder is not on this machine.
        """
        if Path.cwd() != self.place:  # a worker on another machine begins elsewhere
            try:
                os.chdir(self.place)
            except OSError as error:
                raise Failure(
                    f"{self.place} can't be entered on {platform.node()} ({error.strerror}): the machines of a cluster must share "
                    "the folder where the command is given"
                ) from None
        if str(self.place) not in sys.path:
            sys.path.append(str(self.place))
        with as_failure(OSError):
            self.of_seed.mkdir(parents=True, exist_ok=True)
            output = (self.of_seed / "output.txt").open("a", encoding="utf-8")
        with suppress(Timeout, OSError):  # of a worker whose machine is lost to the cluster, and that has not noticed yet
            FileLock(self.of_seed / "lock", timeout=LOST_WORKERS).acquire().lock.release()
        with output, redirect_stdout(output), redirect_stderr(output):
            yield


def stream_of_job(config: Mapping[str, Any], trust: tuple[str, ...]) -> Stream:
    """Return the stream of a config; the last one is kept, and what may be imported is from then on what that one needs."""
    of_features = ("features", "model", "weights", "seed", "seeds") if config.get("features") else ()
    names = ("stream", "probes", "tune", "data_root", *of_features)
    return _stream_of(dump_yaml({name: config[name] for name in names if name in config}), trust)


@lru_cache(maxsize=1)
def _stream_of(config: str, trust: tuple[str, ...]) -> Stream:
    """Return the stream of a config that has all that it depends on: runs of one stream, one after the other, share its data."""
    name, trusted = run_folders.CONFIG, [f"--trust={','.join(trust)}"] if trust else []
    return build_stream(*parse_run(["--config", name, *trusted], {name: parse_yaml(config.encode(), "the config")}))
