"""Checkpoints and processes: a run killed at any moment ends as if it had not been; signals stop it after a batch."""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from conftest import STRATEGIES, built, interrupted, make
from forked import fork_server

import clstream
from clstream import BatchLearned, RunEnded, TaskEnded, on, run
from clstream.checkpoint import Checkpointer, Stopped, newest
from clstream.checkpoint.compare import difference
from clstream.checkpoint.store import files
from clstream.checks import example_stream
from clstream.checks.recorders import Checkpoints
from clstream.files import FolderError, locked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """What starts processes, from a server that has imported what takes seconds to import."""
    return fork_server()


@contextmanager
def living(processes: ForkServerContext, target: Callable[..., None], *arguments: object) -> Iterator[ForkServerProcess]:
    """A process that plays something, and dies with the block at the latest."""
    process = processes.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def long_stream() -> clstream.Stream:
    return example_stream((0, 1, 0, 2), epochs=5, batch_size=16)


class Waits:
    """Waits for the end of its process after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    @on(BatchLearned)
    def wait(self, event: BatchLearned) -> None:
        self.left -= 1
        while not self.left:
            signal.pause()


def play_and_die(name: str, folder: str, last: int) -> None:
    """Play a strategy of the zoo into a folder, from where it is to a batch at most, until somebody kills this process."""
    torch.set_num_threads(1)
    state = newest(folder)
    waits = Waits(last - state["step"] if state else last)
    run(built(make(name)), long_stream(), waits, Checkpointer(folder, every_batches=2), seed=3, resume=state)


KILLED = ["AvalancheStrategy", "EWC", "Hypernetwork", "ICaRL", "MultiLane", "OpenVAE", "Replay", "TAME", "WithDetectedBoundaries"]
"""Which hold unlike things. That all of their state is in a checkpoint is a matter of the contract, for every strategy."""


@pytest.mark.parametrize("name", [name for name in KILLED if name in STRATEGIES])
def test_killed_at_random_it_ends_the_same(name: str, processes: ForkServerContext, tmp_path: Path) -> None:
    whole = Checkpoints(every=0)
    begin = time.monotonic()
    run(built(make(name)), long_stream(), whole, Checkpointer(tmp_path / "whole", every_batches=2), seed=3)
    seconds, steps = time.monotonic() - begin, whole.load(-1)["step"]
    folder, draw = tmp_path / "killed", random.Random(name)
    for left in range(3 if name == "Replay" else 1, 0, -1):  # that what went on is killed again is no matter of the strategy
        before = files(folder)[:1]
        share = 1 - newest(folder)["step"] / steps if before else 1
        last = steps - 4 * left + 2  # so that each of those to come has four batches of its own
        with living(processes, play_and_die, name, str(folder), last) as process:
            while process.is_alive() and files(folder)[:1] == before:  # until it is under way
                time.sleep(0.002)
            time.sleep(draw.uniform(0, seconds * share / (left + 1)))
        assert process.exitcode == -signal.SIGKILL
    rest = Checkpoints(every=0)
    run(built(make(name)), long_stream(), rest, Checkpointer(folder), seed=3, resume=newest(folder))
    assert difference(whole.load(-1), rest.load(-1)) is None


OWN = """
import sys, time
import torch
from clstream import BatchLearned, TaskEnded, TaskEnded, on, run
from clstream.checkpoint import Checkpointer, newest, Stopped
from clstream.checks import example_model, example_stream
from clstream.seeds import isolated
from clstream.serialization.compare import digest
from clstream.strategies import Replay

torch.set_num_threads(1)
folder, way = sys.argv[1:]

class Shrinking(Replay):
    @on(TaskEnded)
    def consolidate(self, event):
        with torch.no_grad():
            next(self.model.parameters()).mul_(0.99)

class Tell:
    @on(BatchLearned)
    def tell(self, event):
        time.sleep(0.01)
        print("batch", flush=True)

with isolated(0, "strategy"):
    strategy = Shrinking(example_model())
try:
    result = run(strategy, example_stream(), *([Tell()] if way == "told" else []), Checkpointer(folder), resume=newest(folder))
except Stopped as stop:
    print(stop, flush=True)
    sys.exit(128 + stop.signal)
print(digest(strategy), result.accuracy.tolist())
"""


def started(tmp_path: Path, folder: str, way: str, hash_seed: int = 0) -> subprocess.Popen[str]:
    (tmp_path / "own.py").write_text(OWN)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "own.py"), str(tmp_path / folder), way],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
    )  # fmt: skip


def wait_for_batches(process: subprocess.Popen[str], batches: int = 5) -> None:
    assert process.stdout is not None
    lines = [line for line in islice(process.stdout, batches) if line == "batch\n"]
    assert len(lines) == batches, process.communicate()[1]


def test_the_same_bits_in_every_process_and_after_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = started(tmp_path, "stopped", "told", hash_seed=code)
        wait_for_batches(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert f"stopped by {number.name}; its checkpoint is in" in out.splitlines()[-1]
        assert "stopping after this batch; once more ends at once" in err
        assert newest(tmp_path / "stopped")["step"] in range(5, 24)
    end = started(tmp_path, "stopped", "plain", hash_seed=2).communicate()[0].splitlines()[-1]
    monkeypatch.setattr(sys, "argv", ["own.py", str(tmp_path / "whole"), "plain"])
    runpy.run_path(str(tmp_path / "own.py"), run_name="__main__")  # by that name its class is part of the digest
    assert capsys.readouterr().out.splitlines()[-1] == end


class Slow:
    """Takes its time at the end of a task."""

    def __init__(self, begun: Event) -> None:
        self.begun = begun

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        self.begun.set()
        time.sleep(600)


def play_slowly(folder: str, begun: Event) -> None:
    torch.set_num_threads(1)
    run(built(), example_stream(), Slow(begun), Checkpointer(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(processes: ForkServerContext, tmp_path: Path, number: signal.Signals) -> None:
    begun = processes.Event()
    with living(processes, play_slowly, str(tmp_path), begun) as process:
        assert begun.wait(300)
        os.kill(process.pid, number)
        process.join(0.3)
        assert process.is_alive()  # the end of the task goes on
        os.kill(process.pid, number)
        process.join(60)  # the end of the task takes 600
        assert process.exitcode not in (0, None)
    assert newest(tmp_path) is not None


def test_handlers_of_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(built(), example_stream(), Checkpointer(tmp_path / "a"))
    interrupted(tmp_path / "b")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_that_are_ignored_stay_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        class Interrupt:
            @on(BatchLearned)
            def interrupt(self, event: BatchLearned) -> None:
                signal.raise_signal(signal.SIGINT)

        run(built(), example_stream(), Interrupt(), Checkpointer(tmp_path))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_comes_when_all_is_done_stops_what_would_follow(tmp_path: Path) -> None:
    class Late:
        @on(RunEnded)
        def end(self, event: RunEnded) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM, when the run was over"):
        run(built(), example_stream(), Late(), Checkpointer(tmp_path))
    assert newest(tmp_path)["position"] == [3, 0, 0]
    with locked(tmp_path):
        pass


def test_a_signal_is_heeded_when_nobody_hears_of_it(tmp_path: Path) -> None:
    process = started(tmp_path, "run", "told")
    wait_for_batches(process)
    process.stderr.close()  # as where the reader of a pipe died by the same Ctrl-C
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 130
    assert newest(tmp_path / "run")["step"] >= 5


def test_a_second_process_is_refused(processes: ForkServerContext, tmp_path: Path) -> None:
    with living(processes, play_and_die, "Replay", str(tmp_path), 1) as process:
        while not files(tmp_path):
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(FolderError, match=f"{tmp_path} is in use by another process"):
            run(built(), example_stream(), Checkpointer(tmp_path))
    with locked(tmp_path):  # a process that died lets go
        pass
