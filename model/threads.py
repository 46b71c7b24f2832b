"""What the machine lends to a training run: threads, BLAS held to one thread each, memory that is kept, cores."""

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from threadpoolctl import threadpool_limits


@contextmanager
def thread_pool(threads: int) -> Iterator[Callable]:
    """A function that maps another over a list on so many threads, in order, each with its BLAS held to one thread.

    The calling thread is one of them: if it only waited for the others, they would have to make room for it whenever
    there is a result. When an exception, such as Ctrl-C, leaves a thread, the work not yet begun is dropped.
    """
    _keep_freed_memory()
    with threadpool_limits(1, user_api="blas"):
        pool = ThreadPoolExecutor(threads)
        try:
            yield partial(_map, pool.submit, threads)
        finally:
            pool.shutdown(wait=False)


def _map(submit: Callable, threads: int, function: Callable, items: Sequence) -> Iterator:
    """Results in the order of the items, each as soon as this thread is free and those before it are there."""
    numbered = enumerate(items)  # each thread takes the next, which is a single step of the interpreter
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


def exhaust(iterator: Iterator) -> None:
    """Run it to its end."""
    deque(iterator, maxlen=0)


def _keep_freed_memory() -> None:
    """Have glibc, where it is, keep what kernels free for the results of the next ones.

    Left to itself, it gives memory back to the system whenever a little is free at the end of the heap, and each page
    costs a page fault when it is taken again: a tenth of an epoch of the fastest backend, and half of it in a worker of
    Dask, which sets MALLOC_TRIM_THRESHOLD_. These are the highest values that glibc would find by itself (mallopt(3)).
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 32 << 20)
        ctypes.CDLL(None).mallopt(trim_threshold, 64 << 20)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
