"""Run a function in a fresh process."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any, cores: int | None = None, **environment: str
) -> Any:
    """Call a function in a fresh process, which inherits only the arguments, and return its result.

    Parameters
    ----------
    function, arguments
        A function at module level, and arguments that can be pickled.
    cores
        Number of cores that the process may use, where the system supports affinity; None for all.
    environment
        Additional environment variables.
    """
    pin: dict[str, Any] = {}
    if cores and hasattr(os, "sched_setaffinity"):
        pin = {"initializer": os.sched_setaffinity, "initargs": (0, sorted(os.sched_getaffinity(0))[-cores:])}
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), **pin) as pool,
    ):
        return pool.submit(function, *arguments).result()
