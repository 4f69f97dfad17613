"""processes: several processes on this machine, each with models of its own and one thread.

Small convolutions keep one core busy and no more, so two processes of one thread draw faster than one of two threads.
Workers are started when there is something to do, are given one item at a time, and keep what they have loaded until
the engine is closed. They do not outlive the process that started them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Self

from dagkit.engines import Build, Item, Work
from dagkit.errors import DagkitError, EngineError
from dagkit.system import hush

_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE_S: Final = 5.0
_AHEAD: Final = 2
"""Items a worker that may be begun before the first of them is finished: their results are kept until then."""


class Processes:
    """Works in several processes.

    Args:
        num_workers: how many, >= 1.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._workers: list[_Worker] = []
        self._num_jobs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers, whatever they do."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.end()

    def results(
        self, items: Iterable[Item], work: Work, build: Build | None
    ) -> Generator[tuple[Item, Any], None, None]:
        """As `dagkit.engines.Engine.results`."""
        if build is None:
            raise EngineError("this work uses what only this process has, and cannot be done in others. Use 1 worker.")
        self._num_jobs += 1
        source, is_exhausted, num_begun, num_given = iter(items), False, 0, 0
        busy: dict[_Worker, tuple[int, Item]] = {}
        finished: dict[int, tuple[Item, Any]] = {}
        failed: dict[int, Exception] = {}
        try:
            while True:
                while not failed and len(busy) < self.num_workers and num_begun < num_given + _AHEAD * self.num_workers:
                    if is_exhausted := (item := next(source, None)) is None:
                        break
                    worker = self._idle(busy)
                    busy[worker] = num_begun, item
                    num_begun += 1
                    worker.give(self._num_jobs, build, item)
                while num_given in finished:
                    yield finished.pop(num_given)
                    num_given += 1
                if num_given in failed:
                    raise failed[num_given]
                if not busy:
                    if is_exhausted:
                        return
                    continue
                ready = wait([worker.connection for worker in busy])
                for worker in [one for one in busy if one.connection in ready]:
                    number, item = busy.pop(worker)
                    try:
                        finished[number] = item, worker.result(item)
                    except Exception as error:  # noqa: BLE001  # it is raised when what comes before it was given
                        failed[number] = error
                        if isinstance(error, EngineError):
                            self._workers.remove(worker)
                            worker.end()
        finally:
            if busy:
                self.close()

    def _idle(self, busy: Iterable[_Worker]) -> _Worker:
        """A worker that has nothing to do, started where there is none."""
        for worker in self._workers:
            if worker not in busy:
                return worker
        self._workers.append(_Worker(f"worker {len(self._workers) + 1} of {self.num_workers}"))
        return self._workers[-1]


class _Worker:
    """One process, seen from the one that started it.

    Args:
        name: for messages.
    """

    def __init__(self, name: str) -> None:
        self.name, self._job = name, 0
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name=name, daemon=True)
        with _no_interrupts():
            self._process.start()
        theirs.close()

    def give(self, job: int, build: Build, item: Item) -> None:
        """Sends an item; how the work is made goes with the first one of a job."""
        with suppress(OSError):  # it has ended, which shows when its result is asked for
            self.connection.send((build if job != self._job else None, item))
        self._job = job

    def result(self, item: Item) -> Any:
        """What came of the item that was given last.

        Raises:
            EngineError: the process has ended.
            DagkitError: as the work raised it.
            RuntimeError: anything else that the work raised, with its traceback.
        """
        try:
            result, error, said = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(_PATIENCE_S)
            raise EngineError(
                f"{self.name} {_how_it_ended(self._process.exitcode)} while it worked on {item.key}. What was finished "
                "before is kept: run the same command again, with fewer workers where memory is short."
            ) from None
        for text, category in said:
            warnings.warn(text, category, stacklevel=2)
        if isinstance(error, DagkitError):
            raise error
        if error is not None:
            raise RuntimeError(f"{self.name} failed at {item.key}:\n{error}")
        return result

    def end(self) -> None:
        """Ends the process, in the middle of its work if it must be."""
        self._process.terminate()
        self.connection.close()
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "stopped answering"
    if code < 0:
        return f"was killed (signal {-code}; the system does that where memory runs out)"
    return f"ended with status {code} (a script that uses workers must call dagkit below: if __name__ == '__main__')"


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Lets a process that is started here ignore Ctrl-C from its first moment: the one that started it ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection) -> None:
    """What a worker process does: item after item, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it tidies up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    hush()
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read when torch and numpy are imported
    if torch := sys.modules.get("torch"):  # the user's own script has done that
        torch.set_num_threads(1)
    work: Work | None = None
    while True:
        result: Any = None
        error: DagkitError | str | None = None
        with warnings.catch_warnings(record=True) as said:
            try:
                build, item = connection.recv()
                if build is not None:
                    work = build()
                assert work is not None
                result = work(item.payload)
            except EOFError:
                return
            except DagkitError as its_own:
                error = its_own
            except Exception:  # noqa: BLE001  # it is a bug, and shown where the work was asked for
                error = traceback.format_exc()
        try:
            connection.send((result, error, [(str(one.message), one.category) for one in said]))
        except OSError:  # nobody waits for it
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_S)
    os._exit(1)
