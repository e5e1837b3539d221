"""Units of work run by processes that die with their parent and report as they go."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from casallm.errors import CasallmError, DataError

U = TypeVar("U")
R = TypeVar("R")

_POLL_SECONDS = 1.0
_DONE = "done"


def run_units(work: Callable[[U], Iterator[R]], units: Sequence[U], *, workers: int) -> Iterator[R]:
    """What `work` yields for each of `units`, as it comes, from up to `workers` processes.

    One worker is this process itself. With more, units are taken in order and reports arrive
    mixed; `work` and the units are pickled. The first CasallmError or OSError of a worker is
    raised here and ends the others; so does a worker's death.
    """
    if min(workers, len(units)) <= 1:
        for unit in units:
            yield from work(unit)
        return
    context = multiprocessing.get_context("spawn")
    todo, reports = context.Queue(), context.Queue()
    for unit in units:
        todo.put(unit)
    processes = [
        context.Process(target=_work, args=(work, todo, reports), daemon=True)
        for _ in range(min(workers, len(units)))
    ]
    for process in processes:
        todo.put(None)
        process.start()
    try:
        yield from _collect(reports, processes)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for channel in (todo, reports):
            channel.cancel_join_thread()
            channel.close()


def _work(work: Callable[[U], Iterator[R]], todo: Any, reports: Any) -> None:
    """The body of a worker: units until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        while (unit := todo.get()) is not None:
            for report in work(unit):
                reports.put((None, report))
        reports.put((_DONE, None))
    except CasallmError as error:
        reports.put((DataError(str(error)), None))
    except OSError as error:
        reports.put((error, None))


def _collect(reports: Any, processes: Sequence[SpawnProcess]) -> Iterator[Any]:
    n_working = len(processes)
    while n_working:
        try:
            event, report = reports.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            codes = [process.exitcode for process in processes if process.exitcode]
            if codes:
                raise DataError(
                    f"a worker process died (exit code {codes[0]}), perhaps for lack of memory:"
                    " run the same again with fewer workers; finished units are kept"
                ) from None
            continue
        if isinstance(event, BaseException):
            raise event
        if event == _DONE:
            n_working -= 1
        else:
            yield report


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
