"""Interleaved timing: competitors alternate round by round, so that all see the same machine state.

Every published ratio comes from here. pytest-benchmark runs each test as a block. That is fine for tables, but not for
ratios: the machine's speed drifts between blocks.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def interleave(
    competitors: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    rest: float = 0,
    steps: int = 1,
    setup: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Time competitors round by round. A round runs each of them once, in random order.

    Parameters
    ----------
    competitors
        Functions without arguments, by name.
    rounds
        Number of rounds.
    warmup
        Extra rounds at the start that are not counted: they trigger compilation and warm the caches.
    rest
        Seconds of sleep before each competitor, until the idle threads of the previous one have stopped busy-waiting.
    steps
        Calls of a competitor in each round. If there are several, the first is a warm-up and not counted: after a rest,
        all threads may wake on one core, and the scheduler takes tens of milliseconds to spread them. In training,
        steps run back to back.
    setup
        Functions by name of competitor, each called before that competitor's turn, and not timed.

    Returns
    -------
    dict[str, ndarray]
        By name, (rounds,) seconds per call, the mean of the counted calls; entry i of each is from round i.
    """
    rng = np.random.default_rng(0)
    seconds = {name: np.empty(rounds) for name in competitors}
    counted = max(steps - 1, 1)
    for round_ in range(-warmup, rounds):
        for name in rng.permutation(list(competitors)):
            time.sleep(rest)
            if setup and name in setup:
                setup[name]()
            if steps > 1:
                competitors[name]()
            start = time.perf_counter()
            for _ in range(counted):
                competitors[name]()
            if round_ >= 0:
                seconds[name][round_] = (time.perf_counter() - start) / counted
    return seconds
