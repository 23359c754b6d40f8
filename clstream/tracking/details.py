"""Details: what was answered about each test sample, and what that says of each class or output."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clstream.bus import on
from clstream.events import Answered, Evaluated, RunEnded, RunStarted, SessionEnded, SessionStarted
from clstream.figures import confusion_matrix
from clstream.files import check_writable, write_atomically
from clstream.measures.multilabel import average_precisions
from clstream.measures.values import R2
from clstream.params import check_choice
from clstream.stream import Stream
from clstream.stream.samples import repeated_samples
from clstream.tracking.picture_timer import PictureTimer

WHICH = ("last", "all")

MOST_CLASSES = 2000
"""Classes of the largest confusion matrix: it has a number for each two of them."""

PICTURE = "confusion.png"

NAMES = re.compile(r"(confusion|classes|outputs|predictions)(_(label|multilabel|value))?\.(csv|npz|png)")

Columns = Mapping[str, Sequence[object]]


class Part(NamedTuple):
    """Answers about some test samples: the numbers of their test sets, their own in these, targets, predictions, scores."""

    test_set: Tensor
    row: Tensor
    y: Tensor
    prediction: Tensor
    scores: Tensor

    def take(self, rows: Tensor) -> Part:
        """Return the answers about some of the samples."""
        return Part(*(tensor[rows] for tensor in self))


class Kept(NamedTuple):
    """The answers of an evaluation, by kind of targets, and when it was; `seen` is (tasks,), bool: the tasks taught by then."""

    kinds: dict[str, Part]
    seen: Tensor
    sessions: int


class Confusion(NamedTuple):
    """A confusion matrix: (labels, labels), int64, rows are the right ones, columns the answers; and the labels."""

    counts: Tensor
    labels: list[int]


class Details:
    """Writes what was answered about each test sample, and what that says of each class, after each session or the last one.

    Of an evaluation there are `predictions.npz` (of all test sets, with scores), `classes.csv` or, of values, `outputs.csv`, and of
    labels `confusion.csv` and, if it is the newest, `confusion.png`: these over the test samples of the tasks taught so far, each
    once. What is measured is read from the same answers. Evaluations within a session are left out. On a stream whose tasks have
    several kinds of targets the names say which: `classes_label.csv`.

    The scores of all test samples of an evaluation are in memory until they are written: samples x outputs x 4 bytes.

    Args:
        folder: where.
        which: "last" (of the last evaluation there was, also of a run that fails) or "all" (of each, in a folder by sessions
            finished, `sessions_0001`; the picture is beside them).

    Raises:
        OSError: if the folder can't be written. Later, a disk that is full costs a warning.

    """

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(self, folder: str | Path, which: str = "last") -> None:
        check_choice(WHICH, which=which)
        self.folder, self.which = check_writable(Path(folder), "the folder of the details"), which
        self._reset()

    def _reset(self) -> None:
        self.stream: Stream | None = None
        self.title = ""
        self.listening = False  # whether what is answered now is of an evaluation after a session
        self.answered: dict[str, list[Part]] = {}
        self.newest: Kept | None = None  # what is not written yet
        self.confusion: Confusion | None = None  # of the newest evaluation
        self.picture_timer = PictureTimer()

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Remember the stream; a run that is not resumed takes away what an earlier one left in the folder."""
        self._reset()
        self.stream = event.stream
        self.title = f"{type(event.strategy).__name__} on {event.stream.name}, seed {event.seed}"
        self._number(event.stream)
        if not event.resumed:
            for path in self.folder.iterdir():
                if path.is_file() and NAMES.fullmatch(path.name):
                    path.unlink()
                elif path.is_dir() and not path.is_symlink() and re.fullmatch(r"sessions_\d{4,}", path.name):
                    shutil.rmtree(path)

    def _number(self, stream: Stream) -> None:
        self.number = {test_set.name: number for number, test_set in enumerate(stream.test_sets)}
        self.repeated = repeated_samples([task.test for task in stream.tasks])

    @on(SessionStarted)
    def leave_out(self, event: SessionStarted) -> None:
        """Leave out what is answered within the session."""
        self.listening, self.answered = False, {}

    @on(SessionEnded)
    def listen(self, event: SessionEnded) -> None:
        """Keep what is answered from now on."""
        self.listening, self.answered = True, {}
        if self.stream is not None and self.stream.arrives:  # it has one more test set
            self._number(self.stream)

    @on(Answered)
    def keep(self, event: Answered) -> None:
        """Keep answers, on the CPU. Those within a session are read, too: so each evaluation costs the same."""
        scores, prediction = event.scores, event.predictions
        if self.listening:
            number = torch.full((len(event.rows),), self.number[event.test_set.name])
            part = Part(number, event.rows.cpu(), event.y.cpu(), prediction.cpu(), scores.cpu())
            self.answered.setdefault(event.test_set.samples.target, []).append(part)

    @on(Evaluated)
    def take_up(self, event: Evaluated) -> None:
        """Keep the answers of an evaluation after a session, or write them."""
        if not self.answered:
            return
        kinds = {kind: in_order(parts) for kind, parts in self.answered.items()}
        newest = event.evaluation.rows[-1]
        self.newest, self.answered, self.listening = Kept(kinds, newest.seen, newest.sessions), {}, False
        if self.which == "all":
            self._write()
        if self.picture_timer.due():
            self._write()
            self._draw()

    @on(RunEnded)
    def end(self, event: RunEnded) -> None:
        """Write what is not written yet, and draw the picture, also of a run that failed."""
        self._write()
        self._draw()
        self._reset()

    def state_dict(self) -> dict[str, Any]:
        """Write what is not written yet, and return what the picture is of: a checkpoint needs no scores."""
        self._write()
        return {
            "counts": None if self.confusion is None else self.confusion.counts,
            "labels": [] if self.confusion is None else self.confusion.labels,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the files that were written are in the folder. Raises ValueError for what is none."""
        counts, labels = state["counts"], state["labels"]
        self.confusion = None
        if counts is not None:
            size = (len(labels), len(labels))
            if not isinstance(counts, Tensor) or counts.shape != size or any(type(label) is not int for label in labels):
                raise ValueError("the state of Details has no confusion matrix with its labels")
            self.confusion = Confusion(counts, labels)

    def _write(self) -> None:
        """Write the newest answers, if they were not written yet; a disk that is full costs a warning."""
        newest, self.newest = self.newest, None
        if newest is None or self.stream is None:
            return
        folder = self.folder if self.which == "last" else self.folder / f"sessions_{newest.sessions:04d}"
        self.confusion = None
        try:
            folder.mkdir(exist_ok=True)
            for kind, part in newest.kinds.items():
                suffix = f"_{kind}" if self.stream.targets != (kind,) else ""
                write_atomically(folder / f"predictions{suffix}.npz", partial(self._save, part=part))
                if kind not in self.stream.targets:  # of strange samples
                    continue
                name = "outputs" if kind == "value" else "classes"
                seen = part.take(self._seen(part, newest.seen))
                rows = self._rows(kind, seen, newest.seen)
                write_table(folder / f"{name}{suffix}.csv", list(rows), zip(*rows.values(), strict=True))
                if kind == "label":
                    self.confusion = confusion(seen, self._classes(newest.seen))
                if kind == "label" and self.confusion is not None:
                    names = [self._name(label) for label in self.confusion.labels]
                    lines = ([label, *counts] for label, counts in zip(names, self.confusion.counts.tolist(), strict=True))
                    write_table(folder / f"confusion{suffix}.csv", ["right label", *names], lines)
        except OSError as error:
            self._warn(folder, error)

    def _draw(self) -> None:
        """Draw the confusion matrix of the newest evaluation."""
        if self.confusion is not None and len(self.confusion.labels):
            names = [self._name(label) for label in self.confusion.labels]
            figure = confusion_matrix(self.confusion.counts, names, self.title)
            try:
                write_atomically(self.folder / PICTURE, lambda out: figure.savefig(out, format="png", dpi=120))
            except OSError as error:
                self._warn(self.folder / PICTURE, error)

    def _warn(self, place: Path, error: OSError) -> None:
        text = f"details can't be written to {place} ({error.strerror or error}): the run goes on without"
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _save(self, out: IO[bytes], part: Part) -> None:
        """Write answers as arrays that need no pickle."""
        assert self.stream is not None
        arrays: dict[str, Any] = {name: as_array(tensor) for name, tensor in part._asdict().items()}
        arrays |= {"test_sets": np.array(list(self.number)), "class_names": np.array(self.stream.class_names, dtype=np.str_)}
        np.savez(out, **arrays)

    def _seen(self, part: Part, seen: Tensor) -> Tensor:
        """Return which answers are of test samples of the tasks seen, each sample once: (n,), bool."""
        tasks = len(seen)
        own = part.test_set < tasks
        chosen = own & seen[part.test_set.clamp(max=tasks - 1)]
        if self.repeated is not None and self.stream is not None:
            sizes = torch.tensor([len(task.test) for task in self.stream.tasks])
            starts = sizes.cumsum(0) - sizes
            rows = chosen.nonzero().flatten()
            same = self.repeated.cpu()[starts[part.test_set[rows]] + part.row[rows]]
            first = torch.full((int(self.repeated.max()) + 1,), len(chosen)).scatter_reduce(0, same, rows, "amin")
            chosen = torch.zeros_like(chosen).index_fill_(0, first[same], True)
        return chosen

    def _classes(self, seen: Tensor) -> list[int]:
        """Return the classes of the tasks seen."""
        assert self.stream is not None
        return sorted({label for task in self.stream.tasks if bool(seen[task.id]) for label in task.classes})

    def _name(self, label: int) -> str:
        """Return what a label is called; an answer may be one that the stream hasn't."""
        assert self.stream is not None
        return self.stream.class_name(label) if 0 <= label < self.stream.classes else str(label)

    def _rows(self, kind: str, part: Part, seen: Tensor) -> Columns:
        if kind == "value":
            return output_rows(part)
        classes = self._classes(seen)
        names = [self._name(label) for label in classes]
        if kind == "label":
            return {"class": classes, "name": names, **label_rows(part, classes)}
        return {"class": classes, "name": names, **multilabel_rows(part, classes)}


def in_order(parts: Sequence[Part]) -> Part:
    """Return answers together, by test set and row, in whatever order they were asked for."""
    whole = Part(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return whole.take((whole.test_set * (int(whole.row.max()) + 1) + whole.row).argsort())


def confusion(part: Part, classes: Sequence[int]) -> Confusion | None:
    """Return the confusion matrix over some classes, and all labels that were answered or right; None if these are too many."""
    labels = torch.cat([part.y, part.prediction, torch.tensor(classes, dtype=torch.int64)]).unique()
    size = len(labels)
    if size > MOST_CLASSES:
        return None
    cells = torch.searchsorted(labels, part.y) * size + torch.searchsorted(labels, part.prediction)
    return Confusion(cells.bincount(minlength=size * size).view(size, size), labels.tolist())


def label_rows(part: Part, classes: Sequence[int]) -> Columns:
    """Return for each class its test samples, recall (the accuracy on them), precision and F1."""
    labels = torch.tensor(classes, dtype=torch.int64)
    size = len(labels)

    def count(of: Tensor) -> Tensor:
        place = torch.searchsorted(labels, of).clamp(max=size - 1)
        return place[labels[place] == of].bincount(minlength=size) if size else labels

    samples, answered, hits = count(part.y), count(part.prediction), count(part.y[part.y == part.prediction])
    return {"samples": samples.tolist(), "answered": answered.tolist(), **_shares(hits, samples, answered)}


def multilabel_rows(part: Part, classes: Sequence[int]) -> Columns:
    """Return for each class the test samples, its positives, average precision, and recall, precision and F1 of the predictions."""
    own = list(classes)
    y, prediction = part.y[:, own].bool(), part.prediction[:, own].bool()
    positives, answered, hits = y.sum(0), prediction.sum(0), (y & prediction).sum(0)
    precision = torch.full((len(own),), math.nan)
    some = positives.nonzero().flatten()
    if len(some):
        precision[some] = average_precisions(part.scores[:, own][:, some], part.y[:, own][:, some]).float()
    return {
        "samples": [len(y)] * len(own),
        "positives": positives.tolist(),
        "answered": answered.tolist(),
        "average_precision": precision.tolist(),
        **_shares(hits, positives, answered),
    }


def output_rows(part: Part) -> Columns:
    """Return for each output of values the test samples, the mean squared error, and r2."""
    outputs = range(part.y.shape[1])
    error = (part.prediction.double() - part.y.double()).square().mean(0)
    r2 = [float(R2().value(part.prediction[:, [output]], part.y[:, [output]])) for output in outputs]
    return {"output": list(outputs), "samples": [len(part.y)] * len(outputs), "mse": error.tolist(), "r2": r2}


def _shares(hits: Tensor, samples: Tensor, answered: Tensor) -> Columns:
    """Return recall, precision and F1; NaN where there is nothing to divide by."""
    right = hits.double()
    return {
        "recall": (right / samples).tolist(),
        "precision": (right / answered).tolist(),
        "f1": (2 * right / (samples + answered)).tolist(),
    }


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as numpy has it, where numpy has its type."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV, with all digits; nan where a value is not defined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(file, lambda out: out.write(text.getvalue().encode()))
