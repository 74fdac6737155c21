"""Work on a stream in several processes, with the results in the stream's order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rlhfkit.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any]  # in a worker: what it does


def in_order(work: Callable[[T], R], stream: Iterable[T], *, alone: int) -> Iterator[R]:
    """``work`` of every item, in order. Faults rise in order, too: those of earlier items before the stream's own.

    Args:
        work: needs no pickling, since the processes are forked; items and results are pickled.
        stream: read in this process, only a little ahead of the work.
        alone: so many items are done in this process; only if more come, it is worth having others.
    """
    processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere forking is not safe
    items = iter(stream)
    for done, item in enumerate(items, start=1):
        yield work(item)
        if processes > 1 and done == alone:
            break
    if processes == 1:
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,))
    pending: deque[Future[R]] = deque()
    fault: Exception | None = None
    try:
        while True:
            try:
                item = next(items)
            except StopIteration:
                break
            except DataError as error:
                fault = error
                break
            with _interrupt_held():  # the first of these starts the processes
                pending.append(pool.submit(_do, item))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that made tokens of rows was killed, most likely for want of memory",
            hint="free some memory, or cut up very long rows; what is done already is not kept",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    if fault is not None:
        raise fault


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C waits until the end of this, and in processes that are started here for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Ctrl-C reaches all processes of a terminal. The first one answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not come along, and it would say so
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A first process that is killed tells nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
