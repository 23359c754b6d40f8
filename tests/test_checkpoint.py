"""Checkpoints: a run killed at any moment ends as if it had not been; and every fault that a disk or a user can make."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickletools
import random
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune, Joint, Replay
from conftest import HAS_AVALANCHE, STRATEGIES, make
from torch import Tensor, nn
from torch.optim import SGD, Adam

import clstream
from clstream import Batch, BatchLearned, Evaluated, RunEnded, RunStarted, Strategy, TaskEnded, on, run
from clstream.checkpoint import Checkpointer, Stopped, checkpointer, newest, store
from clstream.checkpoint.compare import difference
from clstream.checkpoint.store import files, load
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints, Trace
from clstream.engine import OtherRunError
from clstream.files import FolderError, locked
from clstream.models import ConvNet, Mlp
from clstream.seeds import isolated


def built(make: Callable[[nn.Module], Strategy] = Replay) -> Strategy:
    with isolated(0, "strategy"):
        return make(example_model())


class StopAt:
    """Ends the run, as a failure of the user's would, after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted(folder: Path, batches: int = 13, every: int = 4, **options: object) -> None:
    """Leave a folder as a run does that is interrupted."""
    with pytest.raises(KeyboardInterrupt):
        run(
            built(),
            example_stream(),
            StopAt(batches),
            Checkpointer(folder, every_batches=every, **{"every_seconds": None, **options}),
        )


# Going on -----------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_folder(tmp_path: Path) -> None:
    whole, rest = Checkpoints(every=False), Checkpoints(every=False)
    expected = run(built(), example_stream(), whole)
    interrupted(tmp_path)
    assert newest(tmp_path)["step"] == 12
    result = run(built(), example_stream(), rest, Checkpointer(tmp_path), resume=newest(tmp_path))
    assert torch.equal(result.accuracy, expected.accuracy) and result.params == expected.params
    assert difference(whole.load(-1), rest.load(-1)) is None
    again = run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))  # it was over: nothing is learned
    assert torch.equal(again.accuracy, expected.accuracy) and torch.equal(again.probes, expected.probes)


def test_without_checkpoints_it_begins(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))
    assert len(files(tmp_path)) == 1


def test_events_go_on_where_they_stopped() -> None:
    stream, whole, marks = partial(example_stream, (0, 1, 0, 2), 2, 16), Trace(), list[int]()

    class Marking(Checkpoints):
        def write(self) -> None:
            super().write()
            marks.append(len(whole.word))

    kept = Marking()
    run(built(), stream(), whole, kept, evaluate_every=3)
    assert len(marks) == 1 + 24 + 8 + 4  # the start, each batch, those evaluated within sessions once more, each session
    for number, mark in enumerate(marks):
        rest = Trace()
        run(built(), stream(), rest, evaluate_every=3, resume=kept.load(number))
        assert whole.word[:mark] + rest.word[1:] == whole.word and rest.word[0] == "R"


def test_resuming_leaves_the_callers_generators_alone(tmp_path: Path) -> None:
    interrupted(tmp_path)
    before = torch.get_rng_state(), random.getstate()
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_time_and_evaluations_within_sessions_go_on(tmp_path: Path) -> None:
    expected = run(built(), example_stream(), evaluate_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(built(), example_stream(), StopAt(11), Checkpointer(tmp_path, every_batches=1), evaluate_every=3)
    state = newest(tmp_path)
    begin = time.perf_counter()
    result = run(built(), example_stream(), resume=state, evaluate_every=3)
    assert torch.equal(result.probes, expected.probes) and result.probe_steps == expected.probe_steps
    assert state["seconds"] < result.seconds < state["seconds"] + time.perf_counter() - begin


def test_observers_with_a_state_go_on_too(tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.batches, self.restored = 0, 0

        def state_dict(self) -> dict[str, int]:
            return {"batches": self.batches}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.batches, self.restored = state["batches"], self.restored + 1

        @on(BatchLearned)
        def count(self, event: BatchLearned) -> None:
            self.batches += 1

    one, two = Counter(), Counter()
    with pytest.raises(KeyboardInterrupt):  # the first one hears the batch before the checkpointer, the second one after it
        run(built(), example_stream(), one, Checkpointer(tmp_path, every_batches=5), two, StopAt(13))
    one, two = Counter(), Counter()
    run(built(), example_stream(), one, two, resume=newest(tmp_path))
    assert (one.batches, two.batches, one.restored, two.restored) == (24, 24, 1, 1)


class Odd:
    def state_dict(self) -> dict[str, object]:
        return {"when": [time.gmtime]}

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        pass


def test_an_observers_state_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the state of observers\[0\]\[1\]\['when'\]\[0\] is a builtin_function_or_method"):
        run(built(), example_stream(), Odd(), Checkpointer(tmp_path))


# Kills --------------------------------------------------------------------------------------------------------------------


def long_stream() -> clstream.Stream:
    return example_stream((0, 1, 0, 2), epochs=10, batch_size=16)


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


KILLS = 8
SLOW_TO_IMPORT = ["torch._dynamo", *(["avalanche.training.supervised"] if HAS_AVALANCHE else [])]
"""What a process imports when it makes its first optimizer, and its first strategy of Avalanche's."""


@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_at_random_it_ends_the_same(name: str, tmp_path: Path) -> None:
    whole = Checkpoints(every=False)
    begin = time.monotonic()
    run(built(make(name)), long_stream(), whole, Checkpointer(tmp_path / "whole", every_batches=2), seed=3)
    seconds, steps = time.monotonic() - begin, whole.load(-1)["step"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clstream.checks", "clstream.checkpoint", "clstream.strategies", *SLOW_TO_IMPORT])
    folder, draw, kills = tmp_path / "killed", random.Random(name), 0
    while kills < KILLS:
        there = files(folder)[:1]
        left = 1 - newest(folder)["step"] / steps if there else 1
        last = steps - 4 * (KILLS - kills) + 2  # so that each of those to come has four batches of its own
        process = context.Process(target=play_and_die, args=(name, str(folder), last))
        process.start()
        while process.is_alive() and files(folder)[:1] == there:  # until it is under way
            time.sleep(0.001)
        time.sleep(draw.uniform(0, seconds * left / (KILLS - kills + 1)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    rest = Checkpoints(every=False)
    run(built(make(name)), long_stream(), rest, Checkpointer(folder), seed=3, resume=newest(folder))
    assert difference(whole.load(-1), rest.load(-1)) is None


OWN = '''
import os, signal, sys, time
from pathlib import Path
import torch
from clstream import BatchLearned, Strategy, TaskEnded, on, run
from clstream.checkpoint import Checkpointer, newest, Stopped
from clstream.checks import example_model, example_stream
from clstream.seeds import isolated
from clstream.serialization.compare import digest
from clstream.strategies import Replay

torch.set_num_threads(1)
folder, way = sys.argv[1:]

class Slow(Replay):
    """Its tasks take their time to end."""

    @on(TaskEnded)
    def consolidate(self, event):
        print("consolidating", flush=True)
        time.sleep(600 if way == "slow" else 0)
        with torch.no_grad():
            next(self.model.parameters()).mul_(0.99)

class Tell:
    @on(BatchLearned)
    def tell(self, event):
        time.sleep(0.01)
        print("batch", flush=True)

with isolated(0, "strategy"):
    strategy = Slow(example_model())
try:
    result = run(strategy, example_stream(), *([Tell()] if way != "plain" else []), Checkpointer(folder), resume=newest(folder))
except Stopped as stop:
    print(stop, flush=True)
    sys.exit(128 + stop.signal)
print(digest(strategy), result.accuracy.tolist())
'''


def started(tmp_path: Path, folder: str, way: str, **environment: str) -> subprocess.Popen[str]:
    (tmp_path / "own.py").write_text(OWN)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "own.py"), str(tmp_path / folder), way],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip


def after(process: subprocess.Popen[str], line: str, times: int = 1) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        times -= said.strip() == line
        if not times:
            return
    raise AssertionError(f"it ended without saying {line!r}: {process.communicate()[1]}")


def test_the_same_bits_in_every_process_and_after_signals(tmp_path: Path) -> None:
    plain = [started(tmp_path, f"plain{n}", "plain", PYTHONHASHSEED=str(n)) for n in (1, 2)]
    ends = [process.communicate()[0].splitlines()[-1] for process in plain]
    assert ends[0] == ends[1]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = started(tmp_path, "stopped", "told")
        after(process, "batch", 5)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert f"stopped by {number.name}; its checkpoint is in" in out.splitlines()[-1]
        assert "stopping after this batch; once more ends at once" in err
        assert newest(tmp_path / "stopped")["step"] in range(5, 24)
    process = started(tmp_path, "stopped", "plain")
    assert process.communicate()[0].splitlines()[-1] == ends[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    process = started(tmp_path, "slow", "slow")
    after(process, "consolidating")
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None  # the end of the task goes on
    process.send_signal(number)
    process.communicate(timeout=300)  # the end of the task takes 600
    assert process.returncode != 0
    assert newest(tmp_path / "slow") is not None


def test_handlers_of_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(built(), example_stream(), Checkpointer(tmp_path / "a"))
    interrupted(tmp_path / "b")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Files --------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    interrupted(tmp_path)
    file = files(tmp_path)[0]
    state = torch.load(file, weights_only=True)
    assert state["format"] == store.FORMAT and state["clstream"] == clstream.__version__
    with zipfile.ZipFile(file) as packed:
        code = packed.read(next(name for name in packed.namelist() if name.endswith("data.pkl")))
    named = {arg for opcode, arg, _ in pickletools.genops(code) if opcode.name in ("GLOBAL", "STACK_GLOBAL")}
    assert named <= {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", *(f"torch {kind}Storage" for kind in KINDS)}


KINDS = ("Float", "Double", "Long", "Byte", "Bool", "Int")


def test_how_many_are_kept(tmp_path: Path) -> None:
    interrupted(tmp_path / "two", every=2)
    assert [load(file)["step"] for file in files(tmp_path / "two")] == [12, 10]
    interrupted(tmp_path / "three", every=2, keep=3)
    assert [load(file)["step"] for file in files(tmp_path / "three")] == [12, 10, 8]
    run(built(), example_stream(), Checkpointer(tmp_path / "two", keep=5), resume=newest(tmp_path / "two"))
    assert [load(file)["position"] for file in files(tmp_path / "two")] == [[3, 0, 0]]  # it is over: the last one is enough


def test_when_they_are_written(tmp_path: Path) -> None:
    often = Checkpointer(tmp_path / "often", every_seconds=1e-9)
    often._schedule = lambda cost: setattr(often, "due", 0.0)  # whatever it costs
    run(built(), example_stream(), often)
    assert often.written == 1 + 24 + 3
    quick = Checkpointer(tmp_path / "quick", every_seconds=1e-9, share=1)
    run(built(), example_stream(epochs=20), quick)
    assert quick.written > 3
    never = Checkpointer(tmp_path / "never", every_seconds=None)
    run(built(), example_stream(), never)
    assert never.written == 2  # the first and the last


def test_slow_writes_come_less_often(tmp_path: Path) -> None:
    slow = Checkpointer(tmp_path, every_seconds=1.0)
    for cost, rest in ((3.0, 150.0), (0.001, 1.0)):  # 2 % of the time at most
        before = time.monotonic()
        slow._schedule(cost)
        assert before + rest <= slow.due <= time.monotonic() + rest


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [torn, flipped, empty, longer])
def test_a_damaged_file_is_found_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    interrupted(tmp_path)
    damage(files(tmp_path)[0])
    with pytest.warns(RuntimeWarning, match=r"checkpoint .* is damaged: the one before it is used"):
        state = newest(tmp_path)
    assert state["step"] == 8
    whole, rest = Checkpoints(every=False), Checkpoints(every=False)
    run(built(), example_stream(), whole)
    run(built(), example_stream(), rest, Checkpointer(tmp_path), resume=state)
    assert difference(whole.load(-1), rest.load(-1)) is None
    for file in files(tmp_path):
        damage(file)
    with pytest.warns(RuntimeWarning, match="damaged"), pytest.raises(FolderError, match=r"every checkpoint in .* is damaged"):
        newest(tmp_path)


def test_what_a_killed_write_leaves_is_cleaned_up(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (tmp_path / "000099.writing").write_bytes(b"half of a checkp")
    assert newest(tmp_path)["step"] == 12
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))
    assert not list(tmp_path.glob("*.writing"))


def test_the_newest_is_so_by_number_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # an hour back at each look
    interrupted(tmp_path)
    for age, file in enumerate(files(tmp_path)):
        os.utime(file, (age * 1e6, age * 1e6))
    assert newest(tmp_path)["step"] == 12
    run(built(), example_stream(), Checkpointer(tmp_path), resume=newest(tmp_path))


# Refusals -----------------------------------------------------------------------------------------------------------------


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path)
    with monkeypatch.context() as later:
        later.setattr(clstream, "__version__", "9.9.9")
        with pytest.raises(ValueError, match=r"was made by clstream 0.1.0 \(format 2\), and this is 9.9.9"):
            newest(tmp_path)
    monkeypatch.setattr(store, "FORMAT", 3)
    monkeypatch.setattr(checkpointer, "FORMAT", 3)
    with pytest.raises(ValueError, match=r"\(format 2\), and this is 0.1.0 \(format 3\): finish the run with that version"):
        newest(tmp_path)


def test_another_torch_or_number_of_threads_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.warns(RuntimeWarning, match=f"made with threads {threads}, here it is {threads + 1}: the last bits may differ"):
        assert newest(tmp_path)["step"] == 12


def other_data() -> clstream.Stream:
    stream = example_stream()
    stream.tasks[1].test.x[0, 0, 0, 0] += 1
    return stream


NARROW = "'[32]', now it is '[16]'"


@pytest.mark.parametrize(
    ("make", "stream", "options", "expected"),
    [
        (Finetune, example_stream, {}, "strategy was 'Replay', now it is 'Finetune'"),
        (partial(Replay, capacity=9), example_stream, {}, "strategy.capacity was 500, now it is 9"),
        (partial(Replay, optimizer=partial(SGD, lr=0.2)), example_stream, {}, r"optimizer was 'SGD\(lr=0.1\)'.*'SGD\(lr=0.2\)'"),
        (Replay, other_data, {}, "data fingerprint was '[0-9a-f]{16}', now it is '[0-9a-f]{16}'"),
        (Replay, partial(example_stream, (0, 1)), {}, "stream.sessions was 3, now it is 2"),
        (Replay, partial(example_stream, batch_size=9), {}, "stream.batch_size was 8, now it is 9"),
        (Replay, lambda: example_stream().reseeded(4), {}, "stream.seed was 0, now it is 4"),
        (Replay, example_stream, {"seed": 2}, "seed was 0, now it is 2"),
        (Replay, example_stream, {"evaluate_every": 5}, "evaluate_every was None, now it is 5"),
        (Replay, example_stream, {"max_sessions": 2}, "max_sessions was None, now it is 2"),
        (lambda model: Replay(Mlp((1, 8, 8), 6, hidden=(16,))), example_stream, {}, f"model.hidden was {NARROW}"),
        (lambda model: Replay(ConvNet((1, 8, 8), 6)), example_stream, {}, "model was 'Mlp', now it is 'ConvNet'"),
    ],
)  # fmt: skip
def test_another_run_is_refused(
    tmp_path: Path, make: Callable[[nn.Module], Strategy], stream: Callable[[], clstream.Stream], options: dict, expected: str
) -> None:
    interrupted(tmp_path)
    trace = Trace()
    with pytest.raises(OtherRunError, match=expected.replace("[32]", r"\[32\]").replace("[16]", r"\[16\]")):
        run(built(make), stream(), trace, Checkpointer(tmp_path), resume=newest(tmp_path), **options)
    assert not trace.word  # before anything was done


def test_a_used_folder_is_refused_to_a_new_run(tmp_path: Path) -> None:
    interrupted(tmp_path)
    before = [file.read_bytes() for file in files(tmp_path)]
    with pytest.raises(FolderError, match=r"has the checkpoints of a run: go on with it by resume=newest\('.*'\), or name another"):
        run(built(), example_stream(), Checkpointer(tmp_path))
    assert [file.read_bytes() for file in files(tmp_path)] == before
    with locked(tmp_path):  # and it was let go
        pass


def test_another_runs_checkpoints_are_left_alone(tmp_path: Path) -> None:
    interrupted(tmp_path / "mine")
    run(built(Finetune), example_stream(), Checkpointer(tmp_path / "other"))
    before = [file.read_bytes() for file in files(tmp_path / "other")]
    with pytest.raises(FolderError, match=r"other has the checkpoints of another run: .* was 'Finetune', now it is 'Replay'"):
        run(built(), example_stream(), Checkpointer(tmp_path / "other"), resume=newest(tmp_path / "mine"))
    assert [file.read_bytes() for file in files(tmp_path / "other")] == before
    run(built(), example_stream(), Checkpointer(tmp_path / "new"), resume=newest(tmp_path / "mine"))  # into an empty one it goes on
    assert newest(tmp_path / "new")["position"] == [3, 0, 0]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["1-best.pt", "2024-results.pt", "notes.writing", "000001-abc.pt", "000001.pt"]
    for name in names:
        (tmp_path / name).write_bytes(b"the user's own")
    (tmp_path / "000007.writing").write_bytes(b"what a killed write left")
    run(built(), example_stream(), Checkpointer(tmp_path, every_batches=2))
    assert sorted(file.name for file in tmp_path.iterdir() if file not in files(tmp_path)) == sorted([*names, "lock"])


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    interrupted(tmp_path)
    flipped(files(tmp_path)[0])
    with pytest.warns(RuntimeWarning, match="damaged"):
        state = newest(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(built(), example_stream(), StopAt(3), Checkpointer(tmp_path, every_batches=2), resume=state)
    assert [load(file)["step"] for file in files(tmp_path)] == [10, 8]
    assert len(list(tmp_path.glob("*.damaged"))) == 1


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    for number, content in enumerate((b"no zip at all", b"")):
        name = hashlib.blake2b(content, digest_size=8).hexdigest()
        (tmp_path / f"{number:06d}-{name}.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of clstream"):
            newest(tmp_path)


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
    after(process, "batch", 5)
    process.stderr.close()  # as where the reader of a pipe died by the same Ctrl-C
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 130
    assert newest(tmp_path / "run")["step"] >= 5


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    process = started(tmp_path, "shared", "told")
    after(process, "batch")
    with pytest.raises(FolderError, match=r"shared is in use by another process"):
        run(built(), example_stream(), Checkpointer(tmp_path / "shared"))
    process.kill()
    process.communicate()
    with locked(tmp_path / "shared"):  # a process that died lets go
        pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_batches": 0}, "every_batches must be a whole number of at least 1 or None, not 0"),
        ({"every_seconds": 0}, "every_seconds must be a finite number above 0 or None"),
        ({"every_seconds": float("nan")}, "every_seconds must be a finite number above 0"),
        ({"keep": 0}, "keep must be a whole number of at least 1"),
        ({"share": 0}, "share must be a finite number above 0"),
    ],
)
def test_odd_numbers_are_refused(tmp_path: Path, options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Checkpointer(tmp_path, **options)


def test_no_checkpoint_follows_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Explodes(Strategy):
        batches = 0

        def learn(self, batch: Batch) -> Tensor:
            self.batches += 1
            return super().learn(batch) * (float("inf") if self.batches >= 10 else 1)

    with pytest.raises(FloatingPointError, match="session 1, epoch 0, batch 1"):
        run(Explodes(example_model()), example_stream(), Checkpointer(tmp_path, every_batches=1))
    assert newest(tmp_path)["step"] == 9


# Disks --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 kB, where one can be mounted; a checkpoint holds the source of this module too."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a disk that is full or read-only takes the right to mount a small one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_at_the_start_is_refused(small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(790_000))
    trace = Trace()
    with pytest.raises(FolderError, match=r"checkpoints can't be written to .* \(No space left on device\): make room, or name"):
        run(built(), example_stream(), trace, Checkpointer(small_disk / "run"))
    assert trace.word == "Rr" and not list((small_disk / "run").glob("*.writing"))


def test_on_a_disk_that_fills_up_the_run_goes_on(small_disk: Path) -> None:
    class Fill:
        """Others fill the disk in the second session, and make room in the third."""

        @on(Evaluated)
        def fill(self, event: Evaluated) -> None:
            others = small_disk / "others"
            if len(event.evaluation.accuracy) == 1:
                with pytest.raises(OSError, match="No space"), others.open("wb") as file:
                    file.write(bytes(1_000_000))
            elif len(event.evaluation.accuracy) == 2:
                self.kept = load(files(small_disk / "run")[0])["step"]
                others.unlink()

    fill = Fill()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run(built(Finetune), example_stream(), fill, Checkpointer(small_disk / "run", every_batches=3, keep=1))
    assert len(said) == 1 and "no checkpoint could be written" in str(said[0].message) and "No space left" in str(said[0].message)
    assert fill.kept in (6, 9)  # the last whole one stayed
    assert torch.equal(result.accuracy, run(built(Finetune), example_stream()).accuracy)
    assert load(files(small_disk / "run")[0])["position"] == [3, 0, 0]


def test_a_read_only_folder_is_refused(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(FolderError, match=r"the run folder .* can't be written: Read-only file system"):
        run(built(), example_stream(), Checkpointer(small_disk / "run"))


def test_stopped_on_a_full_disk_it_says_so(small_disk: Path) -> None:
    class Stop:
        @on(BatchLearned)
        def stop(self, event: BatchLearned) -> None:
            if event.batch.task.id == 1 and event.batch.index == 2:
                with pytest.raises(OSError, match="No space"), (small_disk / "others").open("wb") as file:
                    file.write(bytes(1_000_000))
                signal.raise_signal(signal.SIGTERM)

    with (
        pytest.warns(RuntimeWarning, match="no checkpoint could be written"),
        pytest.raises(Stopped, match="of some batches before"),
    ):
        run(built(Finetune), example_stream(), Stop(), Checkpointer(small_disk / "run", every_batches=8))
    assert newest(small_disk / "run")["step"] == 8


# What it is for -----------------------------------------------------------------------------------------------------------


def test_joint_with_adam_and_task_heads_goes_on(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Strategy:
        return Joint(model, partial(Adam, lr=0.01), restart=False)

    whole, stream = Checkpoints(), partial(example_stream, (0, 1, 2, 0), 2, 16, "task")
    expected = run(built(make), stream(), whole)
    for number in range(0, len(whole.written), 5):
        result = run(built(make), stream(), resume=whole.load(number))
        assert torch.equal(result.task_accuracy, expected.task_accuracy)


def test_a_failing_handler_at_the_end_of_a_task_costs_only_that(tmp_path: Path) -> None:
    class Fragile(Replay):
        @on(TaskEnded)
        def consolidate(self, event: TaskEnded) -> None:
            if event.task.id == 1 and not (tmp_path / "mended").exists():
                raise RuntimeError("a bug in the user's code")

    def make() -> Strategy:
        with isolated(0, "strategy"):
            return Fragile(example_model())

    folder, ended = tmp_path / "run", []

    class Ends:
        @on(RunEnded)
        def end(self, event: RunEnded) -> None:
            ended.append(event.error)

    with pytest.raises(RuntimeError, match="a bug"):
        run(make(), example_stream(), Ends(), Checkpointer(folder, every_batches=1))
    assert newest(folder)["position"] == [1, 0, 8]
    (tmp_path / "mended").touch()
    result = run(make(), example_stream(), Ends(), Checkpointer(folder), resume=newest(folder))
    assert torch.equal(result.accuracy, run(make(), example_stream()).accuracy)
    assert isinstance(ended[0], RuntimeError) and ended[1] is None
