"""Processes of a server that has imported what takes seconds to import: torch, MLflow, and ours."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import IO

import pytest

from clstream.cli import main

PRELOAD = ["conftest", "forked", "torch._dynamo", "clstream.cli.experiment", "clstream.tracking.mlflow_store", "matplotlib.pyplot"]
"""What the server imports, so that no process does: conftest has the strategies; dynamo comes with an optimizer."""


def fork_server() -> ForkServerContext:
    """Return what starts processes from the server, which runs from now on."""
    context = multiprocessing.get_context("forkserver")
    avalanche = ["avalanche.training.supervised"] * (importlib.util.find_spec("avalanche") is not None)
    context.set_forkserver_preload(PRELOAD + avalanche)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where it finds conftest
        ensure_running()
    return context


def play_command(arguments: Sequence[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Be the process of a command: with a folder, an environment, a group and a file for what it prints of its own."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(main(arguments))


class Command:
    """A process `python -m clstream.cli ...` of the server's; what subprocess.Popen has for it, as far as tests need it."""

    def __init__(self, command: Sequence[str], *, stdout: IO[str], **_: object) -> None:
        assert command[0] == sys.executable and command[2] == "clstream.cli"
        arguments = (list(command[3:]), str(Path.cwd()), dict(os.environ), str(Path(stdout.name).absolute()))
        self.process = fork_server().Process(target=play_command, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, less than 0 for a signal; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit code."""
        return self.process.exitcode

    def wait(self) -> int:
        """Wait until it ends, and return its exit code."""
        self.process.join(300)
        assert self.process.exitcode is not None
        return self.process.exitcode
