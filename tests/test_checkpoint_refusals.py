"""Checkpoints of another run, another version or another folder, and odd options: each is refused in a sentence."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune, Replay
from conftest import built, interrupted
from torch import nn
from torch.optim import SGD

import clstream
from clstream import RunStarted, Strategy, on, run
from clstream.checkpoint import Checkpointer, newest, store
from clstream.checkpoint.store import files
from clstream.checks import example_stream
from clstream.checks.recorders import Trace
from clstream.engine import OtherRunError
from clstream.files import FolderError, locked
from clstream.models import ConvNet, Mlp


class Odd:
    def state_dict(self) -> dict[str, object]:
        return {"when": [time.gmtime]}

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        pass


def test_an_observers_state_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the state of observers\[0\]\[1\]\['when'\]\[0\] is a builtin_function_or_method"):
        run(built(), example_stream(), Odd(), Checkpointer(tmp_path))


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path)
    with monkeypatch.context() as later:
        later.setattr(clstream, "__version__", "9.9.9")
        with pytest.raises(ValueError, match=rf"was made by clstream 0.1.0 \(format {store.FORMAT}\), and this is 9.9.9"):
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
