"""Worker processes for a stream of jobs: quick to start, in order, in bounded memory, and gone when we are.

Why not `multiprocessing`: a forked child of a process with threads can hang; a spawned one runs the caller's main
module again; and the workers of a pool whose parent is killed wait for ever. Here a worker is a fresh Python at the
other end of a socket: when either side dies, the other reads the end of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

# Each worker is one thread's worth of work: the processes are the parallelism.
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# How many jobs may be begun beyond the oldest unfinished one, per worker: what bounds the memory.
_AHEAD = 4


class WorkerDied(Exception):
    """A worker process ended by itself, or was killed; the text says how."""


class WorkerPool(AbstractContextManager["WorkerPool", None]):
    """`count` processes, each of which calls `make()` once and then the function that it gave, for each job.

    `make`, jobs and results travel pickled. Use it in a `with` statement: at its end the workers are gone.
    """

    def __init__(self, count: int, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._workers: dict[Connection, subprocess.Popen[bytes]] = {}
        for _ in range(count):
            ours, theirs = Pipe()
            code = f"import sys; sys.path[:] = {sys.path!r}; from dsllama.data.workers import _serve; _serve()"
            # A session of its own: Ctrl-C in the terminal is for the parent, who ends the workers.
            self._workers[ours] = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | _ONE_THREAD,
            )
            theirs.close()
        for connection in self._workers:
            self._send(connection, make)

    def __exit__(self, *_: object) -> None:
        for connection, process in self._workers.items():
            connection.close()
            process.kill()
            process.wait()

    def in_order(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """The results of the jobs, in the order of the jobs, which are drawn as workers become free.

        Raises WorkerDied, and RuntimeError with the worker's own traceback where its function raised.
        """
        source = iter(jobs)
        idle = list(self._workers)
        busy: dict[Connection, int] = {}
        results: dict[int, Any] = {}
        begun = finished = 0
        while True:
            for job in islice(source, min(len(idle), _AHEAD * len(self._workers) - begun + finished)):
                busy[idle[-1]] = begun
                self._send(idle.pop(), job)
                begun += 1
            if finished in results:
                yield results.pop(finished)
                finished += 1
            elif not busy:
                return
            else:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    results[busy.pop(connection)] = self._receive(connection)
                    idle.append(connection)

    def _send(self, connection: Connection, thing: Any) -> None:
        try:
            connection.send(thing)
        except OSError:
            raise self._death(connection) from None

    def _receive(self, connection: Connection) -> Any:
        try:
            succeeded, result = connection.recv()
        except (EOFError, OSError):
            raise self._death(connection) from None
        if not succeeded:
            raise RuntimeError(f"in a worker process:\n{result}")
        return result

    def _death(self, connection: Connection) -> WorkerDied:
        try:
            code = self._workers[connection].wait(timeout=10)
        except subprocess.TimeoutExpired:
            return WorkerDied("a worker process closed its connection")
        if code == -signal.SIGKILL:
            return WorkerDied("a worker process was killed (SIGKILL), most likely because the memory ran out")
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return WorkerDied(f"a worker process ended {how}")


def _serve() -> None:
    """What a worker process runs until its parent hangs up."""
    connection = Connection(int(sys.argv[1]))
    try:
        work = connection.recv()()
        while True:
            job = connection.recv()
            try:
                answer = (True, work(job))
            except Exception:
                answer = (False, traceback.format_exc())
            connection.send(answer)
    except (EOFError, ConnectionError):
        return
