"""A function in a process of its own."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any, cores: int | None = None, **environment: str
) -> Any:
    """What the function returns in a process of its own, which inherits nothing but the arguments.

    Parameters
    ----------
    function, arguments
        Of a module, and what can be pickled.
    cores
        How many of the available cores the process may use, where the system can tell it; None is all.
    environment
        Variables that are set in it besides.
    """
    pin: dict[str, Any] = {}
    if cores and hasattr(os, "sched_setaffinity"):
        pin = {"initializer": os.sched_setaffinity, "initargs": (0, sorted(os.sched_getaffinity(0))[-cores:])}
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), **pin) as pool,
    ):
        return pool.submit(function, *arguments).result()
