"""Workers: a function called for each job in processes of one machine, or of a Ray or Dask cluster, whatever becomes of them.

The processes of one machine are loky's, as joblib has them. If one of them dies, all of them are started anew; on a cluster the
others go on. What a worker had under way when it died is submitted again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar

from clstream.params import check_choice, check_integer
from clstream.sweep.clusters import LAST_WORDS, DaskPool, RayPool

ENGINES = ("loky", "ray", "dask")

_AGAIN = "when they are back, the same call goes on"

Job = TypeVar("Job")
Value = TypeVar("Value")


class JobError(Exception):
    """A job failed; the message says why in a sentence.

    Args:
        message: the kind of the exception and its text, or that its workers died.
        trace: where it was raised, as Python prints it; "" if a worker died.

    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class WorkerStoppedError(RuntimeError):
    """A worker was told to end by a signal, within a job."""


class TerminatedError(KeyboardInterrupt):
    """This process got SIGTERM while its workers had jobs."""


class Pool(Protocol):
    """Workers that take jobs.

    Args:
        size: how many jobs they do at a time.
        dies_whole: whether all of them die with one.
        final_errors: exceptions after which a job is not submitted again, since the cluster has done so itself.

    """

    size: int
    dies_whole: bool
    final_errors: tuple[type[BaseException], ...]

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a worker call a function."""

    def stop(self, running: Sequence[Future[Any]]) -> None:
        """Have the jobs under way end soon, with their checkpoints written if that can be."""

    def close(self) -> None:
        """End the workers that were started here."""


def run_jobs(
    function: Callable[[Job], Value],
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    engine: str = "loky",
    address: str | None = None,
    threads: int | None = 1,
    attempts: int = 3,
) -> Generator[tuple[Job, Value | JobError]]:
    """Call a function for each job, and yield each job with its value, or with the error that it raised, as they end.

    A job whose worker died is submitted again, so the function must be one that can be called twice for a job. Nothing is
    started before the first item is asked for. If the iterator is closed, or interrupted, the workers get SIGTERM.

    Args:
        function: found by its name in its module, or picklable by cloudpickle; so are jobs and values.
        jobs: in the order in which they are begun.
        workers: how many jobs are done at a time. None: as many as this machine, or the cluster, has cores for their threads.
            With one worker on one machine all is done in this process, and nothing is submitted again.
        engine: "loky" for processes of this machine, "ray" or "dask" for those of a cluster.
        address: of the cluster, as HOST:PORT. None: one is started on this machine.
        threads: that torch uses in each worker. None: its own choice.
        attempts: how often a job is submitted at most.

    Raises:
        ValueError: for an unknown engine, or numbers below 1.
        ImportError: if Ray or Dask is not installed.
        ConnectionError: if no cluster answers at the address, or it goes away.
        KeyboardInterrupt: if this process is interrupted, `TerminatedError` if that was by SIGTERM; with one worker it is what
            the function makes of it.

    """
    check_choice(ENGINES, engine=engine)
    check_integer(1, none=True, workers=workers)
    check_integer(1, none=True, threads=threads)
    check_integer(1, attempts=attempts)
    if address is not None and engine == "loky":
        raise ValueError("an address is that of a cluster: choose the engine ray or dask with it")
    if engine == "loky":
        workers = min(workers or at_once(threads), max(1, len(jobs)))
        if workers == 1:
            return _in_this_process(function, jobs, threads)
    return _in_workers(function, jobs, lambda: _open(engine, workers, address, threads), threads, attempts)


def at_once(threads: int | None) -> int:
    """Return how many jobs with so many threads each this machine can do at a time; None: as many as it has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (threads or 1))


def _open(engine: str, workers: int | None, address: str | None, threads: int | None) -> Pool:
    if engine == "loky":
        return LokyPool(workers or at_once(threads), threads)
    if engine == "ray":
        return RayPool(workers, address, threads or 1)
    return DaskPool(workers or (at_once(threads) if address is None else None), address)


def _in_this_process(
    function: Callable[[Job], Value], jobs: Sequence[Job], threads: int | None
) -> Generator[tuple[Job, Value | JobError]]:
    import torch

    before = torch.get_num_threads()
    try:
        for job in jobs:
            try:
                if threads is not None:
                    torch.set_num_threads(threads)
                value: Value | JobError = function(job)
            except Exception as error:  # noqa: BLE001  # whatever it is, the other jobs go on
                value = _as_job_error(error)
            finally:
                torch.set_num_threads(before)
            yield job, value
    finally:
        torch.set_num_threads(before)


class _Ended(NamedTuple):
    """What a worker answers: the value of a job, or the error that it raised."""

    value: Any = None
    error: str = ""
    trace: str = ""


def _as_job_error(error: Exception) -> JobError:
    return JobError(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def _call(function: Callable[[Job], Value], job: Job, threads: int | None) -> _Ended:
    """Do a job in a worker. Its exceptions are returned as text: not each can be pickled, and those raised are the worker's own."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    try:
        return _Ended(function(job))
    except KeyboardInterrupt as stop:
        raise WorkerStoppedError(f"the worker was stopped: {stop}") from None
    except Exception as error:  # noqa: BLE001  # see above
        failed = _as_job_error(error)
        return _Ended(error=str(failed), trace=failed.trace)


def _in_workers(
    function: Callable[[Job], Value], jobs: Sequence[Job], make_pool: Callable[[], Pool], threads: int | None, attempts: int
) -> Generator[tuple[Job, Value | JobError]]:
    with _raising_sigterm():
        yield from _dispatched(function, jobs, make_pool(), threads, attempts)


def _dispatched(
    function: Callable[[Job], Value], jobs: Sequence[Job], pool: Pool, threads: int | None, attempts: int
) -> Generator[tuple[Job, Value | JobError]]:
    waiting, running, deaths = deque(range(len(jobs))), dict[Future[_Ended], int](), Counter[int]()
    alone = False
    try:
        while waiting or running:
            while waiting and len(running) < pool.size and not alone:
                # on its last attempt a job is the only one, if all workers die with one: then it alone is to blame
                alone = pool.dies_whole and deaths[waiting[0]] == attempts - 1 > 0
                if alone and running:
                    alone = False
                    break
                place = waiting.popleft()
                try:
                    future = pool.submit(_call, function, jobs[place], threads)
                except Exception as refusal:
                    raise ConnectionError(f"the workers take no further jobs ({_sentence(refusal)}): {_AGAIN}") from refusal
                running[future] = place
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                place, alone = running.pop(future), False
                error = CancelledError("the cluster gave it up") if future.cancelled() else future.exception()
                if error is None:
                    answer = future.result()
                    yield jobs[place], JobError(answer.error, answer.trace) if answer.error else answer.value
                    continue
                deaths[place] += 1
                if deaths[place] < attempts and not isinstance(error, pool.final_errors):
                    waiting.append(place)
                else:
                    tried = f", in {attempts} attempts" if deaths[place] == attempts > 1 else ""
                    yield jobs[place], JobError(f"no worker could end it{tried}: {_sentence(error)}")
    except BaseException:
        with suppress(Exception):
            pool.stop(list(running))
        raise
    finally:
        pool.close()


@contextmanager
def _raising_sigterm() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does, so that its workers are told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sentence(error: BaseException) -> str:
    """Return the first sentence of an error's text, or its kind."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.partition(". ")[0].rstrip(".")


class LokyPool:
    """Processes of this machine. Those that died take the others along, and the next job finds new ones.

    Args:
        size: how many.
        threads: that libraries which ask the environment use in each; None: their own choice.

    """

    dies_whole = True
    final_errors: tuple[type[BaseException], ...] = ()

    def __init__(self, size: int, threads: int | None) -> None:
        self.size, self.threads = size, threads
        self.executor = self._start()

    def _start(self) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        names = ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR") if self.threads is not None else ()
        env = {f"{name}_NUM_THREADS": str(self.threads) for name in names}
        return ProcessPoolExecutor(self.size, env=env, initializer=_begin_worker, initargs=(os.getpid(),))

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a process call a function, a new one if the others died."""
        from joblib.externals.loky import BrokenProcessPool

        try:
            return self.executor.submit(call, *arguments)  # type: ignore[no-any-return]  # joblib says nothing of its types
        except BrokenProcessPool:
            self.executor.shutdown(wait=True, kill_workers=True)
            self.executor = self._start()
            return self.executor.submit(call, *arguments)  # type: ignore[no-any-return]

    def stop(self, running: Sequence[Future[Any]]) -> None:
        """Send SIGTERM to the processes, at which a run writes its checkpoint, and wait for a while."""
        for process in list((self.executor._processes or {}).values()):
            with suppress(OSError):
                os.kill(process.pid, signal.SIGTERM)
        wait(running, timeout=LAST_WORDS)

    def close(self) -> None:
        """End the processes."""
        self.executor.shutdown(wait=True, kill_workers=True)


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that started the workers, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process once its parent has, even if that was killed; a run has time for its checkpoint."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS)
    os._exit(1)
