"""Errors of the command line whose message says it all in a sentence; nothing else is imported here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UsageError(ValueError):
    """The user asked for what can't be; the message is one sentence. The exit status is 2."""


class Failure(Exception):  # noqa: N818  # it is not a fault of the program
    """The command failed, by its data, options or files; the message is one sentence. The exit status is 1."""


@contextmanager
def as_failure(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors whose message says it all into Failure; a UsageError stays one."""
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise Failure(str(error)) from error


def nearest(word: str, names: Iterable[str]) -> str:
    """Return ': did you mean ...?' for the name nearest to a word, or nothing."""
    near = get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else ""


def printable(text: str) -> str:
    r"""Return a text whose control characters, which would steer a terminal, are written out, as \x1b; lines and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda odd: ascii(odd[0])[1:-1], text)
