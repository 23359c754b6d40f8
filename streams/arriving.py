"""Streams whose sessions arrive while they are learned: from a folder, an iterator or a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clstream.streams.arrival_files import FileOptions
from clstream.streams.arrival_sources import Iterated, WatchedFolder
from clstream.streams.image_folder import check_images, sides
from clstream.streams.options import check_options
from torch import Tensor

from clstream.params import check_bool, check_choice, check_number, check_positive
from clstream.stream import Arrival, ArrivingStream, NothingYetError, Refusal, Samples, Stream, Task
from clstream.stream.arriving import FIRST_ROWS, Reader, held_out, labels_of, numbered


def arriving(
    source: str | Path | Iterable[object] | Callable[[], Iterable[object]],
    classes: int | None = None,
    class_names: Sequence[str] = (),
    test: float = 0.2,
    watch: bool = False,
    label: str | list[str] = "label",
    size: int | list[int] | None = None,
    mode: str = "RGB",
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    boundaries: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    resident: bool = True,
    shuffle: bool = True,
    drop_last: bool = False,
    target: str = "label",
    poll: float = 1.0,
    seed: int = 0,
    name: str | None = None,
) -> Stream:
    """Sessions that arrive while the run goes on: files in a folder, or what an iterator delivers.

    Nobody knows how many there will be. Each session is learned as it comes, and one at a time is in memory; its test samples stay,
    so that the tasks of the run, one a session, grow in number. What can't be learned is set aside, named, and the run goes on.

    A folder's files are sessions, in the order of their names: Parquet tables and NPZ files with arrays x, y, and maybe x_test and
    y_test; folders or zip archives with a folder of images for each class. A table or an NPZ file without labels waits for a file
    of these, 2026-01.labels.parquet for 2026-01.parquet, a row for each of its rows.

    An iterator delivers pairs (x, y), Samples, or `Arrival` objects, and None where nothing has arrived yet.

    Args:
        source: a folder; a function that returns an iterator anew at each call, such as a generator function; or an iterator, which
            can be played once and not resumed.
        classes: that there is room for. None: as many as the first session has. With values, and with several labels, the columns.
        class_names: of the labels, where these are strings. (): they are numbered as they come.
        test: share of the samples of a session that is held out for its test, where it brings none; above 0.
        watch: whether to wait for more files in the folder; if not, the stream ends when those that are there were learned.
        label: the column of a table that has the labels; for other targets all of their columns.
        size, mode: of images: see `image_folder`.
        scenario: "class" or "domain" (each session has the same classes).
        epochs, batch_size, augment, resident, shuffle, drop_last: see `Stream`.
        boundaries: whether each session is a task, and strategies are told so.
        target: the kind of targets: "label", "multilabel" or "value".
        poll: seconds from one look at the source to the next, where nothing has arrived.
        seed: of which samples are held out, and of the order of batches.
        name: how tables and MLflow call the stream. None: as the folder, or "arriving".

    Raises:
        NothingYetError: a ValueError, if nothing that can be learned has arrived.
        FileNotFoundError, NotADirectoryError: if there is no such folder.
        ValueError, TypeError: for options that don't fit.

    """
    check_options(locals(), "classes")
    check_bool(watch=watch)
    check_positive(poll=poll)
    check_number(0, 1, test=test)
    check_choice(("class", "domain"), scenario=scenario)
    check_images(size, mode)
    if not 0 < test < 1:
        raise ValueError(f"test must be a share of each session, above 0 and below 1, not {test}")
    labels = _names([label] if isinstance(label, str) else label, "label", least=1, most=1 if target == "label" else None)
    class_names = _names(class_names, "class_names")
    if isinstance(source, Stream):
        raise TypeError(
            "arriving takes what delivers sessions; at_moments delivers the samples of a stream at moments of their own"
        )
    opened: WatchedFolder | Iterated
    if isinstance(source, (str, Path)):
        folder = Path(source).expanduser()
        if not folder.exists():
            raise FileNotFoundError(f"there is no folder {folder} to take sessions from: make it")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file: name the folder that sessions are put into")
        opened, name = (
            WatchedFolder(folder, watch, poll, FileOptions(labels, sides(size), mode, target)),
            name or folder.resolve().name,
        )
    elif watch:
        raise ValueError("watch=True is for a folder; an iterator says by None that nothing has arrived yet")
    elif callable(source):
        opened = Iterated(source, None, target)  # type: ignore[arg-type]  # what it delivers is checked as it comes
    elif isinstance(source, Iterator):
        opened = Iterated(None, source, target)
    elif isinstance(source, Iterable):
        opened = Iterated(lambda: source, None, target)  # type: ignore[arg-type,return-value]
    else:
        raise TypeError(f"source must be a folder, an iterator or a function that returns one, not a {type(source).__name__}")
    name = name or "arriving"
    first = first_session(opened, name)
    named = list(class_names)
    y = numbered(first.y, named, classes or 2**31, bool(class_names))
    whole = Samples(first.x, y, target=target)
    if first.x_test is None:
        train, tested = held_out(whole, test, seed)
    else:
        train = whole
        tested = Samples(first.x_test, numbered(first.y_test, named, classes or 2**31, bool(class_names)), target=target)
    own = set() if target == "value" else labels_of(train) | labels_of(tested)
    room = classes or max(1 + max(own), len(class_names)) if target == "label" else int(whole.y.shape[1])
    few = train[:FIRST_ROWS]
    few = Samples(few.x.clone(), few.y.clone(), target=target)
    task = Task(0, tuple(sorted(own)), few, tested, target=target)
    return ArrivingStream(
        name, (task,), None, epochs, batch_size, scenario, seed, boundaries, augment, resident, shuffle=shuffle,
        drop_last=drop_last, given_names=class_names, target=target, source=opened, first=task, first_size=len(train),
        room=room, share=test, poll=poll, split_seed=seed,
    )  # fmt: skip


def _names(names: object, what: str, least: int = 0, most: int | None = None) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a list of strings, not {names!r:.100}")
    if len(names) < least or (most is not None and len(names) > most) or len(set(names)) < len(names):
        count = f"{least} or more distinct names" if most is None else "one name"
        raise ValueError(f"{what} must be {count}, not {names!r:.100}")
    return tuple(names)


def first_session(source: WatchedFolder | Iterated, name: str) -> Arrival:
    """Return the first session with labels that a source has now, which it delivers again.

    Raises NothingYetError if there is none.
    """
    kept: list[object] = []
    if isinstance(source, Iterated) and source.once is not None:
        items = source.once

        def noted() -> Iterator[object]:
            for item in items:
                kept.append(item)
                yield item

        reader: Reader = Iterated(noted, None, source.target).open()  # type: ignore[arg-type]
    else:
        reader = (replace(source, watch=False) if isinstance(source, WatchedFolder) else source).open()
    reasons: list[Refusal] = []
    while not reader.ended:
        came = reader.next()
        if isinstance(came, Arrival) and came.y is not None:
            if isinstance(source, Iterated):
                source.put_back(kept)  # type: ignore[arg-type]
            return came
        if came is None:
            break
        reasons += [came] if isinstance(came, Refusal) else []
    why = f" that can be learned: {reasons[0].name}: {reasons[0].reason}" if reasons else " with labels"
    raise NothingYetError(f"nothing has arrived in {name} yet{why}")
