"""The parser of the options of commands other than `run`, and how a command says what is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from clstream.cli.errors import UsageError, nearest, printable


class CommandParser(argparse.ArgumentParser):
    """The parser of a command's own options: each in full and once, and an error is one sentence."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(prog=f"clstream {command}", description=description, usage=usage, epilog=epilog, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the options that it has. Raises UsageError for one that is given twice."""
        own = [option for action in self._actions for option in action.option_strings]
        given = [name.replace("-", "_") for word in args or () if (name := word.partition("=")[0]) in own]
        if twice := next((name for name in given if given.count(name) > 1), None):
            self.error(f"--{twice.lstrip('_')} is given twice: keep the right one")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with what argparse says, and the option that was probably meant."""
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            options = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option {unknown[1]}{nearest(unknown[1], options)}"
            if not unknown[1].startswith("-"):
                message = f"{unknown[1]!r} belongs to no option"
        if odd := re.match(r"argument (--\w+)\S*: invalid int value: (.*)", message):
            message = f"{odd[1]} takes a whole number, not {odd[2]}"
        raise UsageError(f"{message}; {self.prog} --help says what it takes")


def print_error(error: Exception | str) -> None:
    """Print an error to stderr as a command does, in one sentence."""
    print(printable(f"clstream: error: {error}"), file=sys.stderr)
