"""Recordings that get the sessions that came later: the history of a run that is continued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clstream.strategies import Replay
from clstream.streams import blobs, recorded, split_digits
from recorded_streams import by_hand, digest, own

from clstream import Stream, run
from clstream.cli import main
from clstream.models import Mlp
from clstream.recording import read, record

YEAR = blobs(tasks=4, classes=8, train_per_class=20, test_per_class=5)


def months(stream: Stream, first: int) -> tuple[Stream, Stream]:
    """Return the streams of the first tasks of a stream, and of the others, which are numbered from 0."""
    later = [replace(task, id=number) for number, task in enumerate(stream.tasks[first:])]
    early = replace(stream, name="january", tasks=stream.tasks[:first], schedule=None)
    return early, replace(stream, name="february", tasks=later, schedule=None)


def learner(classes: int) -> Replay:
    torch.manual_seed(0)
    return Replay(Mlp(YEAR.input_shape, classes, hidden=(16,), head="growing"))


def test_the_recording_of_a_continued_run_has_the_whole_history_and_replays_it(tmp_path: Path) -> None:
    january, february = months(YEAR, 2)
    both, file = january.followed_by(february), tmp_path / "run.clstream"
    first = run(strategy := learner(4), january)
    record(january, file)
    result = run(strategy, both, continues=first)
    record(both, file, extend=True)
    replayed = recorded(file)  # by name: both have their samples of the same data
    assert digest(replayed) == digest(both) and replayed.fingerprint == both.fingerprint == YEAR.fingerprint
    assert len(read(file).about["sessions"]) == 4
    again = run(learner(8), replayed)
    assert torch.equal(again.accuracy[2:], result.accuracy[2:])
    with pytest.raises(ValueError, match="all 4 sessions of january, february were learned"):
        run(strategy, replayed, continues=result)


def test_samples_of_the_users_own_and_domains_are_extended(tmp_path: Path) -> None:
    january, february = months(own(), 2)
    file, whole = record(january, tmp_path / "own.clstream"), january.followed_by(february)
    record(whole, file, extend=True)
    assert digest(recorded(file, data=whole)) == digest(whole)
    domains = by_hand()
    file = record(months(domains, 1)[0], tmp_path / "domains.clstream")
    record(domains, file, extend=True)
    assert digest(recorded(file, data=domains)) == digest(domains)


def test_a_stream_that_begins_otherwise_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    january, february = months(YEAR, 2)
    file = record(january, tmp_path / "run.clstream")
    before, both = file.read_bytes(), january.followed_by(february)
    refusals = [
        (february, "is not the data that|task 0 has other classes"),
        (months(YEAR, 1)[0], "it has 2 tasks and 2 sessions, and january has 1 and 1"),
        (replace(both, epochs=2), "its epochs was 1, and is 2"),
        (replace(both, seed=2), "its seed was 0, and is 2"),
        (replace(both, schedule=(1, 0, 2, 3)), "session 0 is of another task"),
        (replace(both, schedule=(0, 1, 2, 3, 0)), "session 0 delivers other samples"),
        (february.followed_by(january), "task 0 has other classes or test samples"),
    ]
    for stream, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            record(stream, file, extend=True)
    with pytest.raises(FileNotFoundError, match="there is no recording"):
        record(both, tmp_path / "none.clstream", extend=True)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["run.clstream"]
    gone = replace(both, name="gone")
    object.__setattr__(gone, "tasks", (replace(gone.tasks[0], train=gone.tasks[0].train[:0]), *gone.tasks[1:]))
    with pytest.raises(ValueError, match="gone can't be recorded: its first tasks are of a run that it continues"):
        record(gone, file, extend=True)


def test_the_command_extends_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    two = ["--stream", "split_digits", "--stream.epochs", "1", "--stream.tasks", "[2,2]"]
    assert main(["record", *two, "--out", "digits.clstream"]) == 0
    whole = ["--stream", "split_digits", "--stream.epochs", "1", "--stream.tasks", "[2,2,2]"]
    assert main(["record", *whole, "--out", "digits.clstream"]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert main(["record", *whole, "--out", "digits.clstream", "--extend"]) == 0
    assert digest(recorded("digits.clstream")) == digest(split_digits(tasks=[2, 2, 2], epochs=1))
    assert main(["record", *two, "--out", "digits.clstream", "--extend"]) == 1
    assert "task 0 of split_digits is what was learned already" in capsys.readouterr().err


LATER = """
from dataclasses import replace

from clstream import Stream
from clstream.streams import blobs


def later() -> Stream:
    year = blobs(tasks=4, classes=8, train_per_class=20, test_per_class=5)
    later = [replace(task, id=number) for number, task in enumerate(year.tasks[2:])]
    return replace(year, name="february", tasks=later, schedule=None)
"""


def test_new_tasks_come_after_what_the_recording_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "later_tasks.py").write_text(LATER, encoding="utf-8")
    january, february = months(YEAR, 2)
    record(january, "run.clstream")
    assert main(["record", "--stream", "later_tasks.later", "--out", "run.clstream", "--extend"]) == 0
    assert digest(recorded("run.clstream")) == digest(january.followed_by(february))
