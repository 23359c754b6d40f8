"""The command `clstream`: all commands, or a sentence on the package that they lack."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status, as `clstream.cli.commands.main` says; 1 where a package is missing."""
    try:
        from clstream.cli.commands import main as run_command

        return run_command(arguments)
    except ModuleNotFoundError as error:
        if error.name not in ("jsonargparse", "mlflow", "pandas", "rich", "yaml"):
            raise
        print(
            f"clstream: error: the command line needs the package {error.name}, which is not installed: pip install . in "
            "clstream's folder brings it; from Python, streams are run without it",
            file=sys.stderr,
        )
        return 1
