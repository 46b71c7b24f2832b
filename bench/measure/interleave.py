"""Interleaved timing: competitors alternate round by round, so that all see the same machine state.

Every published ratio comes from here. pytest-benchmark runs each test as a block. That is fine for tables, but no basis
for ratios: the machine drifts between blocks.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap


class Ratio(TypedDict):
    """How the time of a competitor relates to that of the base, with a 95 % confidence interval."""

    what: str
    competitor: str
    base: str
    seconds: float
    base_seconds: float
    ratio: float
    low: float
    high: float


class Summary(TypedDict):
    """The median seconds of some rounds, with a 95 % confidence interval."""

    median: float
    low: float
    high: float


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


def summary(seconds: NDArray[np.float64]) -> Summary:
    """The median of (rounds,) seconds; of a single round, that alone."""
    middle = float(np.median(seconds))
    if len(seconds) == 1:
        return Summary(median=middle, low=middle, high=middle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal rounds have no distribution to resample
        interval = bootstrap((seconds,), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Summary(median=middle, low=float(interval.low), high=float(interval.high))


def ratios(what: str, seconds: dict[str, NDArray[np.float64]], base: str) -> list[Ratio]:
    """The `ratio` of each competitor to `base`."""
    return [ratio(what, seconds, name, base) for name in seconds if name != base]


def ratio(what: str, seconds: dict[str, NDArray[np.float64]], competitor: str, base: str) -> Ratio:
    """Ratio of the median seconds of `competitor` to those of `base`; rounds are resampled as wholes."""

    def ratio_of_medians(ours: NDArray, theirs: NDArray, axis: int = -1) -> NDArray:
        return np.median(ours, axis=axis) / np.median(theirs, axis=axis)

    interval = bootstrap(
        (seconds[competitor], seconds[base]),
        ratio_of_medians,
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=0,
    ).confidence_interval
    median, base_median = float(np.median(seconds[competitor])), float(np.median(seconds[base]))
    return Ratio(
        what=what,
        competitor=competitor,
        base=base,
        seconds=median,
        base_seconds=base_median,
        ratio=median / base_median,
        low=float(interval.low),
        high=float(interval.high),
    )


def verdict(found: Ratio) -> str:
    """Whether the competitor is "faster" or "slower" than its base, or "equal" as far as the interval can tell."""
    return "faster" if found["high"] < 1 else "slower" if found["low"] > 1 else "equal"
