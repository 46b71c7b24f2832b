"""Operands for the steps, and their timing for ``python -m kernels.ladder``, interleaved with BLAS.

The published figures come from the study, bench/studies/ladder.py.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from kernels.ladder.steps import CORES, STEPS
from kernels.simd import aligned_empty

# Floating-point operations for slow steps, which get fewer rows of `a`.
ENOUGH_FLOP = {"loops": 2e6, "compiled": 1e8, "reordered": 4e9}

# Seconds of rest, and then of warm-up, before a product on several threads is timed. On Zen 5, OpenBLAS's idle threads
# busy-wait for 0.1 s, on cores that the step needs. After a rest, the scheduler takes as long to spread threads over
# the cores.
SETTLE = 0.15


def operands(name: str, a: NDArray, b: NDArray) -> tuple[Any, Any, Any]:
    """Arguments for a step: as many rows of `a` as it can multiply by `b` in reasonable time.

    Parameters
    ----------
    name
        Name of the step in `STEPS`.
    a, b
        (m, k) and (k, n), row-major.

    Returns
    -------
    tuple
        `a`, `b` and an uninitialised result: lists for step 1, otherwise arrays.
    """
    rows = max(2, round(ENOUGH_FLOP[name] / (2 * b.size))) if name in ENOUGH_FLOP else len(a)
    a = a[:rows]
    out = aligned_empty(len(a), b.shape[1], b)
    return (a.tolist(), b.tolist(), out.tolist()) if name == "loops" else (a, b, out)


def measure(names: list[str], size: int, rounds: int = 6) -> dict[str, tuple[int, float, float]]:
    """Time the steps on square matrices, interleaved with BLAS round by round. All operands start on a cache line.

    Parameters
    ----------
    names
        Names of steps in `STEPS`.
    size
        Rows and columns of the matrices.
    rounds
        Rounds to time, after one to warm up.

    Returns
    -------
    dict
        For each step: the rows of the result that it computed, its GFLOP/s, and the ratio to BLAS on the same number of
        threads. Speeds are medians over the rounds, and the ratio is that of the medians.
    """
    rng = np.random.default_rng(0)
    like = np.empty(0, np.float32)
    a, b, product = (aligned_empty(size, size, like) for _ in range(3))
    for operand in (a, b):
        operand[...] = rng.standard_normal((size, size), np.float32)
    measured = {}
    for name in names:
        arguments = operands(name, a, b)
        rows = len(arguments[0])
        turns = {"blas": (np.matmul, a, b, product), name: (STEPS[name], *arguments)}
        settle = SETTLE if name == "threads" else 0
        seconds: dict[str, list[float]] = {turn: [] for turn in turns}
        with threadpool_limits(CORES if name == "threads" else 1, user_api="blas"):
            for round_ in range(-1, rounds):
                for turn in sorted(turns, reverse=round_ % 2 == 0):  # each goes first in every other round
                    taken = _seconds(settle, *turns[turn])
                    if round_ >= 0:  # round -1 warms up: it compiles and fills the caches
                        seconds[turn].append(taken)
        speed = rows / statistics.median(seconds[name])
        measured[name] = rows, 2e-9 * size**2 * speed, speed * statistics.median(seconds["blas"]) / size
    return measured


def _seconds(settle: float, function: Callable, *arguments: Any) -> float:
    time.sleep(settle)
    start = time.perf_counter()
    while time.perf_counter() < start + settle:
        function(*arguments)
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
