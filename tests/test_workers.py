"""Workers: every job ends, once, whatever becomes of the processes that do it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from clstream.sweep.workers import JobError, TerminatedError, run_jobs

pytestmark = pytest.mark.slow


def double(number: int) -> int:
    if number == 3:
        raise ValueError("three is refused")
    return 2 * number


def die_or_wait(job: tuple[str, str, int]) -> tuple[int, int]:
    """End this process by a signal as often as it is said, each time leaving a file; then return the process and the job."""
    name, folder, deaths = job
    if len(list(Path(folder).glob(f"{name}.*"))) < deaths:
        (Path(folder) / f"{name}.{time.monotonic_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return os.getpid(), len(list(Path(folder).glob(f"{name}.*")))


def test_jobs_in_this_process_end_in_order_and_an_error_stops_none() -> None:
    ended = list(run_jobs(double, [1, 2, 3, 4], workers=1))
    assert [job for job, _ in ended] == [1, 2, 3, 4]
    assert [value for _, value in ended if not isinstance(value, JobError)] == [2, 4, 8]
    (error,) = (value for _, value in ended if isinstance(value, JobError))
    assert str(error) == "ValueError: three is refused" and "in double" in error.trace


def test_no_jobs_start_no_worker() -> None:
    assert list(run_jobs(double, [], workers=4)) == []


def test_a_dead_worker_takes_nothing_along(tmp_path: Path) -> None:
    jobs = [("healthy", str(tmp_path), 0), ("unlucky", str(tmp_path), 1), ("late", str(tmp_path), 0), ("deadly", str(tmp_path), 99)]
    ended = dict(run_jobs(die_or_wait, jobs, workers=2, threads=None, attempts=2))
    assert ended.keys() == set(jobs)
    assert all(isinstance(ended[job], tuple) and ended[job][0] != os.getpid() for job in jobs[:3])
    assert ended[jobs[1]][1] == 1
    assert isinstance(ended[jobs[3]], JobError) and "2 attempts" in str(ended[jobs[3]])
    assert len(list(tmp_path.glob("deadly.*"))) == 2


def refuse_text(job: object) -> str:
    if job == "stop":
        raise KeyboardInterrupt
    return f"done {job}"


def test_an_interruption_in_this_process_is_passed_on() -> None:
    jobs = run_jobs(refuse_text, ["first", "stop", "never"], workers=1)
    assert next(jobs) == ("first", "done first")
    with pytest.raises(KeyboardInterrupt):
        next(jobs)


def wait_for_sigterm(place: str) -> None:
    """Say that this process is there, and leave a file when it is told to end, as a run does its checkpoint."""

    def last_words(_number: int, _frame: object) -> None:
        (Path(place) / f"{os.getpid()}.told").touch()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, last_words)
    (Path(place) / f"{os.getpid()}.here").touch()
    time.sleep(60)


def test_an_interruption_gives_workers_time_for_their_last_words(tmp_path: Path) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.glob("*.here"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(TerminatedError):
        list(run_jobs(wait_for_sigterm, [str(tmp_path)] * 3, workers=2, threads=None))
    assert len(list(tmp_path.glob("*.told"))) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"engine": "slurm"}, "engine"),
        ({"workers": 0}, "workers"),
        ({"threads": 0}, "threads"),
        ({"attempts": 0}, "attempts"),
        ({"address": "127.0.0.1:6379"}, "choose the engine ray or dask"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_starts(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_jobs(double, [1], **options)
