"""Features that some operating systems lack: tests that need them are skipped, with the reason."""

import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest

needs_posix = pytest.mark.skipif(
    os.name != "posix", reason="Windows has no POSIX signals, pseudo-terminals, named pipes or limits of a process"
)

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")

needs_long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="longdouble is no wider than float64 here"
)


def forks(test):
    """From Python 3.12 on, a fork warns in a process with threads, if only those of a BLAS that sleep, and JAX does
    too, where it is installed. What they warn of is either what is tested, that nothing of ours which was used before
    the fork keeps the child from using it again, or harmless, as the child only starts another program.
    """
    cannot = "fork" not in multiprocessing.get_all_start_methods()
    for mark in (
        pytest.mark.filterwarnings("ignore:.*JAX is multithreaded:RuntimeWarning"),
        pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
        pytest.mark.skipif(cannot, reason="this system cannot fork"),
    ):
        test = mark(test)
    return test


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 where the system does not report it."""
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # getrusage(2) of macOS counts in bytes
