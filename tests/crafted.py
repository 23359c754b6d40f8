"""Files that nobody's run wrote."""

from __future__ import annotations

import json

import pytest

from clstream.cli import main


def lines(*entries: object) -> bytes:
    return b"".join(entry if isinstance(entry, bytes) else json.dumps(entry).encode() + b"\n" for entry in entries)


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> tuple[str, str]:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return captured.out, captured.err
