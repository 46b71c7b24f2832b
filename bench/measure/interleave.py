"""Interleaved timing: competitors alternate round by round, so that all see the same machine state.

Every published ratio comes from here. pytest-benchmark runs each test as a block. That is fine for tables, but no basis
for ratios: the machine drifts between blocks.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def interleave(
    competitors: Mapping[str, Callable[[], Any]],
    rounds: int,
    seed: int = 0,
    warmup: int = 2,
    rest: float = 0,
    steps: int = 1,
) -> dict[str, NDArray[np.float64]]:
    """Seconds of each competitor in each round; a round runs each of them once, in random order.

    Parameters
    ----------
    competitors
        Functions without arguments, by name.
    rounds
        Number of rounds.
    seed
        Seed of the order.
    warmup
        Extra rounds at the start, which compile and fill caches and are not counted.
    rest
        Seconds of sleep before each competitor. Idle threads of the one before may spin for a while; they leave the
        cores meanwhile.
    steps
        Calls of a competitor in each round. Of several, the first is not counted: after a rest, all threads may wake on
        one core, and the scheduler takes tens of milliseconds to spread them. In training, step follows step.

    Returns
    -------
    dict[str, ndarray]
        By name, (rounds,) seconds per call, the mean of the counted ones; entries of one round belong together.
    """
    rng = np.random.default_rng(seed)
    seconds = {name: np.empty(rounds) for name in competitors}
    counted = max(steps - 1, 1)
    for round_ in range(-warmup, rounds):
        for name in rng.permutation(list(competitors)):
            time.sleep(rest)
            if steps > 1:
                competitors[name]()
            start = time.perf_counter()
            for _ in range(counted):
                competitors[name]()
            if round_ >= 0:
                seconds[name][round_] = (time.perf_counter() - start) / counted
    return seconds
