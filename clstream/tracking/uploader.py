"""The uploader: sends what a run writes to its tracking server, and how long it waits where that is away."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from clstream.params import reason_of
from clstream.tracking.outbox import FILE, Outbox, Send


class Uploader:
    """Sends what an outbox holds, when it can. A server that doesn't take it costs a warning, and little time.

    Args:
        outbox: what to send.
        send: see `Outbox.flush`; whatever it raises is an outage.
        server: its name in warnings.
        fallback_folder: where the outbox is kept, in a folder of its own, if it has no journal and something can't be sent.

    """

    def __init__(self, outbox: Outbox, send: Send, server: str, fallback_folder: Path) -> None:
        self.outbox, self.send, self.server, self.fallback_folder = outbox, send, server, fallback_folder
        self.offline = False
        self.delay, self.next_try = 0.0, 0.0
        self.next_turn = 0.0

    def upload(self, last: bool = False) -> None:
        """Send what is pending, unless the last try failed a moment ago; warn if it fails, once for each outage.

        The last time, send in any case, warn again, and close the journal.
        """
        try:
            if self.outbox.pending and (last or time.monotonic() >= self.next_try):
                self._try(last)
        finally:
            if last:
                if self.outbox.pending:
                    self._journal_file()
                self.outbox.close()

    def upload_in_turn(self) -> None:
        """Send what is pending, unless the last write was a moment ago: then a later call does, or the last upload.

        So what many short sessions found is one write.
        """
        if time.monotonic() >= self.next_turn:
            begin = time.monotonic()
            self.upload()
            end = time.monotonic()
            self.next_turn = end + min(PAUSE_RATIO * (end - begin), LONGEST_PAUSE)

    def _try(self, last: bool) -> None:
        begin = time.monotonic()
        try:
            try:
                self.outbox.flush(self.send)
            except Exception:  # a server that was restarted drops the connection that was open: once more, at once
                if self.offline or time.monotonic() - begin > SLOW:
                    raise
                self.outbox.flush(self.send)
        except Exception as error:  # noqa: BLE001  # each kind of store has its own, and none of them is the run's fault
            took = time.monotonic() - begin
            self.delay = max(min(2 * self.delay, LONGEST_DELAY), DELAY_RATIO * took, 1)
            self.next_try = time.monotonic() + self.delay
            if last or not self.offline:
                self._warn(error, last)
            self.offline = True
        else:
            self.offline, self.delay, self.next_try = False, 0.0, 0.0

    def _warn(self, error: Exception, last: bool) -> None:
        kept = self._journal_file()
        reason = f"{self.server} doesn't take what the run writes ({reason_of(error)})"
        if kept is None:
            text = f"{reason}, and {self.fallback_folder} can't be written: it is kept in memory, and lost when the process ends"
        elif last:
            text = f"{reason}: {len(self.outbox.pending)} writes wait in {kept}; to send them: clstream sync {kept.parent}"
        else:
            text = f"{reason}: the run goes on, and keeps it in {kept} until it can be sent"
        warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _journal_file(self) -> Path | None:
        """Return the file of the journal, which is made if there is none; None if that can't be."""
        if self.outbox.journal is None:
            try:
                head = self.outbox.head | {"run_id": self.outbox.run_id or ""}
                self.outbox.open_journal(default_journal(self.fallback_folder, head))
            except OSError:
                pass
        return None if self.outbox.journal is None else self.outbox.journal.file


SLOW = 1.0
"""Seconds after which a write that fails is not tried again at once: a server that hangs costs a timeout, not two."""

PAUSE_RATIO = 20
"""The pause after a write, as a multiple of the time it took."""

LONGEST_PAUSE = 2.0
"""The most seconds that what a run found waits for a write."""

LONGEST_DELAY = 60
"""The most seconds between two tries, where a try takes no time: a closed port."""

DELAY_RATIO = 50
"""The delay after a try, at least, as a multiple of the time it took: an outage costs a run 2 % of its time at most."""


def default_journal(folder: Path, head: Mapping[str, str]) -> Path:
    """Return the file of the journal, below `folder`, of a run that was given no folder of its own."""
    name = head.get("run_id") or head["key"]
    if not re.fullmatch(r"[\w-]+", name):  # it may come from a checkpoint, and must not lead elsewhere
        raise ValueError(f"there is no MLflow run {name!r}: its id is letters, digits and -")
    return folder / name / FILE
