"""Streams that arrive as files: Parquet, NPZ and images; half written, unreadable, late, changed and gone ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from arrivals import learner, session, write
from clstream.strategies import Finetune
from clstream.streams import arriving
from PIL import Image
from test_arriving import Heard, Stop, same

from clstream import RunStarted, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.drift_detection import DriftAlarm, ShiftDetected
from clstream.engine import InputsArrived, SessionArrived, SetAside
from clstream.events import NothingArrived
from clstream.models import Mlp
from clstream.online_metrics import Delayed, DelayedMeasured


def table(file: Path, number: int, **more: object) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table as arrow_table

    x, y = session(number)
    columns = {f"f{place}": x[:, place].numpy() for place in range(3)} | {"label": y.numpy()} | more
    parquet.write_table(arrow_table({name: column for name, column in columns.items() if column is not None}), file)


def inbox(folder: Path, **options):
    return arriving(folder, **{"classes": 6, "batch_size": 8, "poll": 0.001} | options)


class Deliver:
    """Puts something into the folder each time that the run waits; stops it when there is nothing left."""

    def __init__(self, *steps) -> None:
        self.steps = list(steps)

    @on(NothingArrived)
    def put(self, event: NothingArrived) -> None:
        if not self.steps:
            raise KeyboardInterrupt
        self.steps.pop(0)()


def watched(folder: Path, *steps, heard: Heard | None = None) -> Heard:
    heard = heard or Heard()
    with pytest.raises(KeyboardInterrupt):
        run(learner(), inbox(folder, watch=True), Delayed(), heard, Deliver(*steps))
    return heard


def test_files_come_in_the_order_of_their_names_and_are_the_same_as_from_an_iterator(tmp_path):
    for number in (2, 0, 1):
        write(tmp_path, number)
    result = run(learner(), inbox(tmp_path))
    expected = run(learner(), arriving(lambda: map(session, range(3)), classes=6, batch_size=8))
    assert same(result.accuracy, expected.accuracy)
    assert inbox(tmp_path).name == tmp_path.name


def test_tables_are_read_by_the_names_of_their_columns(tmp_path):
    table(tmp_path / "a.parquet", 0)
    x, y = session(1)
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table as arrow_table

    parquet.write_table(arrow_table({"label": y.numpy()} | {f"f{i}": x[:, i].numpy() for i in (2, 0, 1)}), tmp_path / "b.parquet")
    table(tmp_path / "c.parquet", 2, f1=None)
    table(tmp_path / "d.parquet", 3, f9=np.zeros(24))
    table(tmp_path / "e.parquet", 4, f0=np.array(["x"] * 24))
    table(tmp_path / "f.parquet", 5, f0=[None] * 24)
    heard = Heard()
    result = run(learner(), inbox(tmp_path), heard)
    expected = run(learner(), arriving(lambda: map(session, range(2)), classes=6, batch_size=8))
    assert same(result.accuracy, expected.accuracy)
    assert [(event.name, event.reason.partition(",")[0]) for event in heard.of(SetAside)] == [
        ("c.parquet", "it lacks the column 'f1'"),
        ("d.parquet", "it has the column 'f9'"),
        ("e.parquet", "its column 'f0' has no numbers"),
        ("f.parquet", "its column 'f0' has empty fields: fill them"),
    ]


def test_images_lie_in_a_folder_for_each_class(tmp_path):
    for number, classes in enumerate((("cat", "dog"), ("dog", "emu"))):
        for name in classes:
            place = tmp_path / f"day {number}" / name
            place.mkdir(parents=True)
            for image in range(4):
                Image.fromarray(np.full((4, 5, 3), 40 * number + 10 * image + len(name), np.uint8)).save(place / f"{image}.png")
    shutil.make_archive(str(tmp_path / "day 2"), "zip", tmp_path / "day 1")
    (tmp_path / "day 3").mkdir()
    heard = Heard()
    run(Finetune(Mlp((3, 4, 5), 3)), inbox(tmp_path, classes=3), heard)
    stream = heard.of(RunStarted)[0].stream
    assert [stream.class_name(label) for label in range(3)] == ["cat", "dog", "emu"]
    assert [task.classes for task in stream.tasks] == [(0, 1), (1, 2)]
    assert stream.tasks[0].test.x.dtype == torch.uint8
    assert [(event.name, event.reason) for event in heard.of(SetAside)] == [
        ("day 2.zip", "it has the very samples of day 1, which were learned before"),
        ("day 3", "it has nothing, and there must be a folder of images for each class, CLASS/IMAGE.png"),
    ]


def test_what_is_half_written_is_named_and_learned_when_it_is_whole(tmp_path):
    write(tmp_path, 0)
    whole = write(tmp_path, 1).read_bytes()
    (tmp_path / "01.npz").write_bytes(whole[:200])
    (tmp_path / "02.npz").write_bytes(b"no archive")
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "03.npz.part").write_bytes(b"")
    heard = watched(tmp_path, lambda: (tmp_path / "01.npz").write_bytes(whole), lambda: write(tmp_path, 4))
    assert [event.name for event in heard.of(SessionArrived)] == ["00.npz", "01.npz", "04.npz"]
    assert [(event.name, event.reason.partition(" (")[0]) for event in heard.of(SetAside)] == [
        ("01.npz", "it can't be read as NPZ"),
        ("02.npz", "it can't be read as NPZ"),
        ("notes.txt", "it is no folder of images, and its name ends in none of .npz, .parquet, .zip"),
    ]


def with_bytes_of_members(content: bytes, place: int, value: int) -> bytes:
    """Return a zip archive with a byte of the header of each member changed; `place` is that in the directory at its end."""
    changed = bytearray(content)
    for mark, at in ((b"PK\x03\x04", place - 2), (b"PK\x01\x02", place)):
        start = changed.find(mark)
        while start >= 0:
            changed[start + at] |= value
            start = changed.find(mark, start + 4)
    return bytes(changed)


@pytest.mark.parametrize(("place", "value", "reason"), [(8, 1, "encrypted"), (10, 77, "compression"), (8, 32, "patched")])
def test_an_archive_that_cannot_be_read_is_set_aside_and_the_run_goes_on(tmp_path, place, value, reason):
    content = write(tmp_path, 0).read_bytes()
    (tmp_path / "00.npz").write_bytes(with_bytes_of_members(content, place, value))
    write(tmp_path, 1)
    heard = Heard()
    run(learner(), inbox(tmp_path), heard)
    [aside] = heard.of(SetAside)
    assert aside.name == "00.npz" and reason in aside.reason
    assert [event.name for event in heard.of(SessionArrived)] == ["01.npz"]


def test_a_pickle_in_a_file_is_not_run(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, y=np.array([Path], dtype=object))
    heard = Heard()
    run(learner(), inbox(tmp_path), heard)
    assert "Object arrays cannot be loaded" in heard.of(SetAside)[0].reason


def test_a_file_that_was_learned_is_not_learned_again(tmp_path):
    write(tmp_path, 0)
    heard = watched(
        tmp_path, lambda: write(tmp_path, 0, y=np.zeros(24, np.int64)), lambda: shutil.copy(write(tmp_path, 1), tmp_path / "b.npz")
    )
    assert [event.name for event in heard.of(SessionArrived)] == ["00.npz", "01.npz"]
    assert [event.name for event in heard.of(SetAside)] == ["00.npz", "b.npz"]
    assert "a session of that name was learned before" in heard.of(SetAside)[0].reason


def test_labels_come_in_a_file_of_their_own_and_judge_what_was_answered(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, y=None)
    table(tmp_path / "02.parquet", 2, label=None)
    x, y = session(1)
    _, wrong = session(3)
    heard = watched(
        tmp_path,
        lambda: np.savez(tmp_path / "01.labels.npz", y=y.numpy()),
        lambda: table(tmp_path / "02.labels.parquet", 2, f0=None, f1=None, f2=None, label=wrong[:3].numpy()),
    )
    assert [event.name for event in heard.of(InputsArrived)] == ["01.npz", "02.parquet"]
    assert [event.name for event in heard.of(SessionArrived)] == ["00.npz", "01.npz"]
    assert [event.reason for event in heard.of(SetAside)] == ["its inputs are 24, and its targets 3: there must be one for each"]
    [judged] = heard.of(DelayedMeasured)
    strategy = learner()
    (tmp_path / "01.npz").unlink()
    run(strategy, inbox(tmp_path))
    assert judged.session == judged.mean == float((strategy.predict(x) == y).double().mean())


@pytest.mark.parametrize("batches", [2, 5])
def test_a_run_goes_on_where_it_was_with_what_came_meanwhile(tmp_path, batches):
    folder, runs = tmp_path / "inbox", tmp_path / "run"
    folder.mkdir()
    write(folder, 1)
    write(folder, 2)
    with pytest.raises(KeyboardInterrupt):
        run(learner(), inbox(folder), Delayed(), DriftAlarm(), Checkpointer(runs, every_batches=1), Stop(batches))
    write(folder, 0)  # earlier by its name, and later than what was under way
    order = [1, 0, 2] if batches < 4 else [1, 2, 0]
    result = run(learner(), inbox(folder), Delayed(), DriftAlarm(), Checkpointer(runs), resume=newest(runs))
    expected = run(learner(), arriving(lambda: map(session, order), classes=6, batch_size=8))
    assert same(result.accuracy, expected.accuracy)


def test_test_samples_that_are_gone_are_asked_about_no_more(tmp_path):
    folder, runs = tmp_path / "inbox", tmp_path / "run"
    folder.mkdir()
    write(folder, 0)
    write(folder, 1)
    with pytest.raises(KeyboardInterrupt):
        run(learner(), inbox(folder), Checkpointer(runs, every_batches=1), Stop(5))
    (folder / "01.npz").rename(tmp_path / "01.npz")
    with pytest.raises(ValueError, match=r"the session 01.npz is under way, and inbox no longer has it: put it back"):
        run(learner(), inbox(folder), resume=newest(runs))
    (tmp_path / "01.npz").rename(folder / "01.npz")
    (folder / "00.npz").unlink()
    with pytest.warns(RuntimeWarning, match=r"1 sessions of inbox can't be read again, 00.npz for one"):
        result = run(learner(), inbox(folder), resume=newest(runs))
    assert result.accuracy.isnan().tolist() == [[False, True], [True, False]]


def test_an_alarm_is_raised_where_the_loss_rises():
    def source():
        for number in (0, 0.5, 1, 1.5, 2):
            x, y = session(0, 200)
            generator = torch.Generator().manual_seed(int(10 * number))
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
            yield x, (y if number < 2 else 1 - y)

    heard = Heard()
    run(Finetune(Mlp(3, 2)), arriving(source, batch_size=8), DriftAlarm(deviations=4), heard)
    alarms = heard.of(ShiftDetected)
    assert alarms
    assert all(alarm.step >= 80 for alarm in alarms)
    assert alarms[0].step < 90


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match=f"nothing has arrived in {tmp_path.name} yet"):
        inbox(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="with labels"):
        inbox(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file: name the folder"):
        inbox(tmp_path / "a.npz")


def test_a_watched_folder_is_read_in_a_pause_of_writing(tmp_path):
    write(tmp_path, 0)
    reader = inbox(tmp_path, watch=True, poll=60.0).source.open()
    assert reader.next() is None
    assert not reader.ended
    reader = inbox(tmp_path, poll=60.0).source.open()
    assert reader.next().name == "00.npz"
