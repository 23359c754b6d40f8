"""Workers on a cluster: those of Ray and of Dask. What dies there takes nothing else along."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

ANSWERS = 5.0
"""Seconds within which a cluster must answer."""

LAST_WORDS = 20.0
"""Seconds that workers have to write their checkpoints when all is stopped."""


def check_answers(engine: str, address: str, hint: str) -> None:
    """Raise ConnectionError, in a sentence, if nobody answers at the address of a cluster; ValueError if it is none."""
    match = re.fullmatch(r"(?:\w+://)?(?:\[([0-9a-fA-F:]+)\]|([^:/\s]+)):(\d{1,5})/?", address)
    if match is None:
        raise ValueError(f"the address of a cluster is HOST:PORT, as 10.0.0.1:6379, not {address[:100]!r}")
    try:
        socket.create_connection((match[1] or match[2], int(match[3])), timeout=ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no {engine} cluster answers at {address} ({error}): start one, as by `{hint}`, or choose another --address"
        ) from None


class RayPool:
    """Workers of a Ray cluster, each a process that does one job at a time.

    Args:
        size: how many jobs are done at a time. None: as many as the cluster has cores for.
        address: HOST:PORT of its head. None: a cluster of this machine alone is started, and ends with the pool.
        cores: that a job takes.

    """

    dies_whole = False

    def __init__(self, size: int | None, address: str | None, cores: int = 1) -> None:
        try:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else no job sees a GPU
            import ray
        except ImportError:
            raise ImportError("the engine ray needs Ray, which is not installed: pip install 'clstream[ray]'") from None
        self.ray = ray
        self.final_errors: tuple[type[BaseException], ...] = ()
        self.ours = not ray.is_initialized()
        if address is not None:
            check_answers("Ray", address, "ray start --head")
        if self.ours:
            options: dict[str, Any] = (
                {"address": address} if address is not None else {"address": "local", "num_cpus": size and size * cores}
            )
            try:
                ray.init(**options, include_dashboard=False, log_to_driver=False, logging_level="ERROR", configure_logging=False)
            except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
                text = " ".join(str(error).split())[:300]
                raise ConnectionError(f"the Ray cluster at {address or 'this machine'} can't be used: {text}") from None
        of_nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.cores = max(1, min(cores, max(of_nodes, default=1)))  # what no node has would be waited for in vain
        self.size = size or max(1, sum(number // self.cores for number in of_nodes))
        self.references: dict[Future[Any], Any] = {}

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a worker call a function; if it dies, the future says so, and Ray itself does not try again."""
        reference = self.ray.remote(call).options(max_retries=0, num_cpus=self.cores).remote(*arguments)
        future: Future[Any] = reference.future()
        self.references[future] = reference
        future.add_done_callback(lambda done: self.references.pop(done, None))
        return future

    def stop(self, running: Sequence[Future[Any]]) -> None:
        """Interrupt the jobs under way, at which a run writes its checkpoint, and wait for a while."""
        for future in running:
            if (reference := self.references.get(future)) is not None:
                with suppress(Exception):
                    self.ray.cancel(reference, force=False)
        wait(running, timeout=LAST_WORDS)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.ours:
            self.ray.shutdown()


class DaskPool:
    """Workers of a Dask cluster.

    Args:
        size: how many jobs are done at a time. None: as many as there are workers.
        address: HOST:PORT of its scheduler. None: a cluster of this machine alone is started, and ends with the pool.

    """

    dies_whole = False

    def __init__(self, size: int | None, address: str | None) -> None:
        try:
            import dask
            from distributed import Client, KilledWorker, LocalCluster
        except ImportError:
            raise ImportError("the engine dask needs Dask, which is not installed: pip install 'clstream[dask]'") from None

        self.final_errors: tuple[type[BaseException], ...] = (KilledWorker,)  # the scheduler has tried often enough
        self.cluster: Any = None
        if address is not None:
            check_answers("Dask", address, "dask scheduler")
            where: Any = address if "://" in address else f"tcp://{address}"
        else:
            with dask.config.set({"distributed.worker.daemon": False, "distributed.scheduler.allowed-failures": 2}):
                self.cluster = where = LocalCluster(n_workers=size, threads_per_worker=1, dashboard_address=None)
        try:
            self.client = Client(where, timeout=ANSWERS * 2, set_as_default=False)
            threads = self._threads(size or 1)
        except OSError as error:
            raise ConnectionError(f"the Dask cluster at {address} can't be used: {' '.join(str(error).split())[:300]}") from None
        if threads and max(threads) > 1:
            self.close()
            raise ValueError("a Dask worker with several threads would mix up its runs: start workers with --nthreads 1")
        self.size = size or max(1, len(threads))
        self.executor = self.client.get_executor(pure=False, retries=0)

    def _threads(self, least: int) -> list[int]:
        """Return the threads of each worker, once there is one: they may be starting."""
        self.client.wait_for_workers(1, timeout=60)
        end = time.monotonic() + ANSWERS * (self.cluster is not None)
        while True:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            if len(workers) >= least or time.monotonic() > end:
                return [int(worker["nthreads"]) for worker in workers.values()]
            time.sleep(0.1)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a worker call a function; if it dies, the scheduler has another one do it, some times."""
        future: Future[Any] = self.executor.submit(call, *arguments)
        return future

    def stop(self, running: Sequence[Future[Any]]) -> None:
        """Have the workers that are at it begin anew: a job in a thread can't be told to write its checkpoint."""
        ours = {str(key) for key in self.client.futures}
        busy = [worker for worker, keys in self.client.processing().items() if ours & {str(key) for key in keys}]
        for future in running:
            future.cancel()
        if busy:
            self.client.restart_workers(busy, timeout=LAST_WORDS, raise_for_error=False)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.client.close()
        if self.cluster is not None:
            self.cluster.close()
