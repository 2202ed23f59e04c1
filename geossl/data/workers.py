"""Work spread over processes, whose results come back in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any

from geossl.errors import DataError


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that is killed; a worker would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def worker_map(workers: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]]:
    """Give a function like ``map``, which works in this process (``workers`` 1) or in several, and yields in order.

    Raises:
        DataError: a process was killed.
    """
    if workers == 1:
        yield map
        return
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        yield executor.map
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, probably for want of memory; run the command again with fewer workers") from error
    finally:
        executor.shutdown(cancel_futures=True)
