"""The command `clstream`."""

from clstream.cli.entry import main as main
