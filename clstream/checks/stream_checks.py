"""The contract of streams: small checks that every stream must pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clstream.checks.check import Check
from clstream.stream import MixedSchedule, Samples, Stream, Subset


class StreamChecks:
    """The contract of streams: a method for each check, which raises AssertionError if the stream doesn't meet it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def is_repeatable(self) -> None:
        """Iterating it twice gives the same batches, bit for bit."""
        for batch, again in zip(batch_hashes(self.stream), batch_hashes(self.stream), strict=True):
            assert batch == again, f"the batch (session, epoch, batch) {batch[:3]} differs from one iteration to the next"

    def delivers_every_sample_once(self) -> None:
        """A pass over a session has each of its samples once, in batches of the stream's size."""
        for session in self.stream:
            for epoch in session:
                order = epoch.order()
                assert torch.equal(order.sort().values, torch.arange(len(session.samples))), (
                    f"{epoch} is not one pass over its session"
                )
                sizes = [len(batch.samples) for batch in epoch]
                dropped = len(session.samples) % self.stream.batch_size if self.stream.drop_last else 0
                assert sum(sizes) == len(session.samples) - dropped and len(sizes) == len(epoch), (
                    f"the batches of session {session.index} are {sizes}"
                )
                assert set(sizes[:-1]) <= {self.stream.batch_size}, f"the batches of session {session.index} are {sizes}"

    def deals_tasks_out(self) -> None:
        """No sample comes in two sessions, unless the schedule says so."""
        stream = self.stream
        if isinstance(stream.schedule, MixedSchedule):
            drawn = [stream.schedule.draw(index) for index in range(len(stream))]
            assert sum(map(len, drawn)) == sum(int(stream.mix(index).sum()) for index in range(len(stream))), "mixes don't add up"
            counts = torch.cat(drawn).bincount(minlength=sum(len(task.train) for task in stream.tasks))
            assert not stream.schedule.once or int(counts.max()) == 1, "a sample comes twice"
            return
        for number, task in enumerate(stream.tasks):
            parts = [stream.session(index).samples for index in range(len(stream)) if stream.task_of(index) == number]
            assert sum(map(len, parts)) <= len(task.train), f"the sessions of task {number} deliver more than it has"
            rows = [part.index for part in parts if isinstance(part, Subset)]
            if rows:
                joined = torch.cat(rows)
                assert len(joined.unique()) == len(joined), f"a sample of task {number} comes in two sessions"

    def keeps_labels_within_tasks(self) -> None:
        """A session has labels of its tasks only."""
        stream = self.stream
        for session in stream:
            tasks = [stream.tasks[number] for number in stream.mix(session.index).nonzero().flatten().tolist()]
            assert stream.tasks[stream.task_of(session.index)] in tasks, f"session {session.index} has nothing of its task"
            allowed = {label for task in tasks for label in task.classes}
            assert set(session.classes) <= allowed, f"session {session.index} has labels outside of {tasks}"

    def reaches_any_batch(self) -> None:
        """An epoch can be begun at any batch."""
        epoch = next(iter(self.stream.session(len(self.stream) - 1)))
        whole = [batch.samples.x for batch in epoch]
        for first in {0, len(whole) // 2, len(whole) - 1}:
            rest = [batch.samples.x for batch in epoch.batches(first)]
            assert len(rest) == len(whole) - first, f"starting at batch {first} gives {len(rest)} batches of {len(whole)}"
            assert all(torch.equal(x, same) for x, same in zip(rest, whole[first:], strict=True)), (
                f"starting at batch {first} gives other batches"
            )

    def reseeds(self) -> None:
        """Another seed gives another order, unless nothing is shuffled; seed 0 gives the stream's own."""
        stream = self.stream
        epoch, other = (next(iter(variant.session(0))) for variant in (stream, stream.reseeded(1)))
        assert torch.equal(next(iter(stream.reseeded(0).session(0))).order(), epoch.order()), "seed 0 changes the order"
        same = torch.equal(other.order(), epoch.order())
        assert len(epoch.order()) < 5 or same != stream.shuffle, "another seed must change the order, unless nothing is shuffled"

    def hides_what_it_hides(self) -> None:
        """Sessions and batches tell their task exactly if the stream shows its boundaries."""
        for session in self.stream:
            batch = next(iter(next(iter(session))))
            assert session.task_hidden == batch.task_hidden == (not self.stream.boundaries), "task and boundaries disagree"
            assert self.stream.boundaries or isinstance(session.samples, Samples), "a session leads to the data that it hides"

    def describes_itself(self) -> None:
        """Its card tells its name, fingerprint, tasks and classes."""
        stream = self.stream
        card = str(stream)
        for fact in (
            stream.name,
            stream.fingerprint,
            f"tasks        {len(stream.tasks)}",
            f"classes      {stream.classes}",
        ):
            assert fact in card, f"its card does not say {fact!r}"


def check_stream(stream: Stream) -> Iterator[Check]:
    """Yield the checks of a stream."""
    checks = StreamChecks(stream)
    yield from (Check(name, getattr(checks, name)) for name in vars(StreamChecks) if name[0] != "_")


def batch_hashes(stream: Stream) -> list[tuple[int, int, int, int, int]]:
    """Return (session, epoch, batch, hash of the inputs, hash of the labels) of all batches."""
    return [
        (
            session.index,
            batch.epoch,
            batch.index,
            hash(batch.samples.x.cpu().numpy().tobytes()),
            hash(batch.samples.y.cpu().numpy().tobytes()),
        )
        for session in stream
        for epoch in session
        for batch in epoch
    ]
