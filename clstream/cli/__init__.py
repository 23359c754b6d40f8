"""The command `clstream`."""

from clstream.cli.commands import main as main
