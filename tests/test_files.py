"""Files are written whole or not at all, and errors name them as their user does."""

from __future__ import annotations

from pathlib import Path

import pytest

from clstream.files import write_atomically


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "table.tex"
    write_atomically(file, lambda out: out.write(b"first"))

    def fail(out):
        out.write(b"second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, fail)
    assert file.read_bytes() == b"first" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["missing/table.tex", "a file/table.tex", "folder"])
def test_errors_name_the_file_that_was_asked_for(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as raised:  # noqa: PT011  # of several kinds
        write_atomically(tmp_path / place, lambda out: out.write(b"table"))
    assert str(tmp_path / place) in str(raised.value) and "/." not in str(raised.value)
