"""The resources of a training run: a thread pool, BLAS limited to one thread, malloc settings, available cores."""

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from threadpoolctl import ThreadpoolController


@contextmanager
def thread_pool(threads: int) -> Iterator[Callable]:
    """A function that maps another over a list on `threads` threads, in order, with BLAS limited to one thread.

    The calling thread is one of them: if it only waited, each result would wake it and preempt a worker. If a thread
    raises an exception, Ctrl-C included, work that has not started is dropped.
    """
    _keep_freed_memory()
    with blas_on_one_thread():
        pool = ThreadPoolExecutor(threads)
        try:
            yield partial(_map, pool.submit, threads)
        finally:
            pool.shutdown(wait=False)


def _map(submit: Callable, threads: int, function: Callable, items: Sequence) -> Iterator:
    """Results in the order of the items, each as soon as this thread is free and all earlier results are available."""
    if len(items) == 1:  # a small batch: wake no other thread
        yield function(items[0])
        return
    numbered = enumerate(items)  # shared by all threads: next() is atomic under the GIL
    finished: dict[int, Any] = {}

    def work() -> Iterator[None]:
        try:
            for number, item in numbered:
                finished[number] = function(item)
                yield
        finally:
            exhaust(numbered)

    others = [submit(exhaust, work()) for _ in range(min(threads, len(items)) - 1)]
    expected = 0
    for _ in work():
        while expected in finished:
            yield finished.pop(expected)
            expected += 1
    for other in others:
        other.result()
    yield from map(finished.pop, sorted(finished))


_blas_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a lock held by another thread would stay locked in the child
    os.register_at_fork(
        before=_blas_lock.acquire, after_in_parent=_blas_lock.release, after_in_child=_blas_lock.release
    )
_blas_users = 0
_blas_before: list[tuple[Any, int]] = []


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Limit BLAS to one thread in the whole process, until the last of overlapping blocks ends.

    The number of BLAS threads is global to the process. If each block set and restored it, the first to end would lift
    the limit for the others, and the last would restore the limit itself.
    """
    global _blas_users
    with _blas_lock:
        _blas_users += 1
        if _blas_users == 1:
            libraries = ThreadpoolController().select(user_api="blas").lib_controllers
            _blas_before[:] = [(library, library.num_threads) for library in libraries]
            for library in libraries:
                _set_threads(library, 1)
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                for library, count in _blas_before:
                    _set_threads(library, count)


def _set_threads(library: Any, count: int) -> None:
    """Set the number of threads of a BLAS, from any thread.

    From version 3.8 on, threadpoolctl obeys only the thread that first set the number.
    """
    forget_owner = getattr(library, "clear_controlling_thread", lambda force: None)
    forget_owner(force=True)
    library.set_num_threads(count)
    forget_owner(force=True)


def exhaust(iterator: Iterator) -> None:
    """Consume an iterator."""
    deque(iterator, maxlen=0)


def _keep_freed_memory() -> None:
    """Have glibc's malloc, on systems that use it, reuse freed memory instead of returning it to the system.

    By default it trims the heap as soon as a little is free at the top, and every page costs a page fault when it is
    allocated again. That takes a tenth of an epoch on the fastest backend, and half of one in a Dask worker, since Dask
    sets MALLOC_TRIM_THRESHOLD_. These are the highest values that glibc's dynamic adjustment would reach (mallopt(3)).
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 32 << 20)
        ctypes.CDLL(None).mallopt(trim_threshold, 64 << 20)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
