"""Study: the share of non-zero pixels above which dense products are faster. Both products run on one thread."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.measure.interleave import interleave
from bench.measure.records import Rounds
from bench.publish.style import colour, end_labels
from bench.studies.ablation import prepared, products_of
from kernels import get_backend
from model.data import Dataset
from model.extras.figure import BOUND_COLOUR, figure_file, print_small, title
from model.shards import SHARD
from model.threads import thread_pool

RIGHT = 110
"""End of the figure's axis."""
PERCENT = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100)
SHARDS = 4


@dataclass(frozen=True)
class Result:
    """Seconds per image; all points are interleaved."""

    percent: list[int]
    """Percentages of non-zero pixels in random images."""
    sparse: list[Rounds]
    """The sparse backend on images of each percentage."""
    dense: dict[str, Rounds]
    """The dense backends, whose time does not depend on the pixels."""
    dataset: str
    dataset_percent: float
    dataset_rounds: Rounds
    """The sparse backend on images of the data set."""
    kind: Literal["density"] = "density"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time both products per image on each backend, and on sparse for each percentage of non-zero pixels."""
    rng = np.random.default_rng(0)
    pixels = dataset.train_images.shape[1]

    def random_shards(percent: float) -> list[np.ndarray]:
        values = rng.integers(1, 256, (SHARDS, SHARD, pixels), np.uint8)
        return list(values * (rng.random(values.shape) < percent / 100))

    forms = {f"sparse {percent}": prepared(get_backend("sparse"), random_shards(percent)) for percent in PERCENT}
    forms |= {name: prepared(get_backend(name), random_shards(50)) for name in ("numpy", "numba")}
    images = dataset.train_images[: SHARDS * SHARD]
    forms["images"] = prepared(get_backend("sparse"), np.array_split(images, SHARDS))
    ways = {name: [products_of(*form, transposed) for transposed in (False, True)] for name, form in forms.items()}
    with thread_pool(1):
        seconds = interleave(
            {name: partial(call_all, both) for name, both in ways.items()},
            5 if quick else 40,
        )
    per_image = {name: Rounds.of(times / (SHARDS * SHARD)) for name, times in seconds.items()}
    return Result(
        percent=list(PERCENT),
        sparse=[per_image[f"sparse {percent}"] for percent in PERCENT],
        dense={name: per_image[name] for name in ("numpy", "numba")},
        dataset=dataset.name,
        dataset_percent=100 * float(np.count_nonzero(images) / images.size),
        dataset_rounds=per_image["images"],
    )


def call_all(functions: list[Callable[[], Any]]) -> None:
    """Call each function once, in order."""
    for function in functions:
        function()


def break_even(result: Result, backend: str) -> float:
    """Percent of non-zero pixels at which sparse takes as long as `backend`, linearly interpolated; 100 if none."""
    difference = np.array([timing.median for timing in result.sparse]) - result.dense[backend].median
    if not (difference > 0).any():
        return 100.0
    after = int(np.argmax(difference > 0))
    return float(np.interp(0, difference[after - 1 : after + 1], result.percent[after - 1 : after + 1]))


def draw(result: Result, small_print: str, file: Path) -> None:
    """Microseconds per image against the share of non-zero pixels."""
    percent = np.array(result.percent)
    median, low, high = 1e6 * np.array([(times.median, times.low, times.high) for times in result.sparse]).T
    with figure_file(file, figsize=(8, 4)) as figure:
        axes = figure.subplots()
        axes.fill_between(percent, low, high, color=colour("sparse"), alpha=0.3, linewidth=0)
        axes.plot(percent, median, "o-", color=colour("sparse"), markersize=3)
        axes.text(percent[4], 1.5 * median[4], "sparse, random images  ", color=colour("sparse"), ha="right")
        ends: list[tuple[str, float, float, str]] = []
        for name, times in result.dense.items():
            seconds, crossing = 1e6 * times.median, break_even(result, name)
            axes.axhspan(1e6 * times.low, 1e6 * times.high, color=colour(name), alpha=0.3, linewidth=0)
            axes.axhline(seconds, color=colour(name))
            if crossing < 100:
                axes.plot(crossing, seconds, "o", color="black", fillstyle="none", markersize=8)
            words = f"{name}: equal at {crossing:.0f} %" if crossing < 100 else name
            ends.append((words, RIGHT, seconds, colour(name)))
        place_of_images = (result.dataset_percent, 1e6 * result.dataset_rounds.median)
        axes.plot(*place_of_images, "D", color=colour("sparse"), markersize=7)
        axes.annotate(
            f"{result.dataset}, {result.dataset_percent:.0f} %",
            place_of_images,
            xytext=(9, -5),
            textcoords="offset points",
            color=BOUND_COLOUR,
        )
        axes.set(xscale="log", yscale="log", xlabel="non-zero pixels (%)", xlim=(percent[0] / 1.1, RIGHT))
        axes.set(ylabel="µs per image, both products, one thread")
        ticks = [1, 2, 5, 10, 20, 50, 100]
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.set_xticks([], minor=True)
        heights = [height for height in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low.min() / 2 < height < 2 * high.max()]
        axes.set_yticks(heights, map(str, heights))
        axes.set_yticks([], minor=True)
        axes.set_ylim(low.min() / 1.3, 1.3 * max(high.max(), *(1e6 * times.high for times in result.dense.values())))
        end_labels(axes, ends)
        title(figure, _title(result))
        print_small(figure, small_print)


def _title(result: Result) -> str:
    """How sparse compares with the fastest dense backend on the data set, and where it takes as long."""
    fastest = min(result.dense, key=lambda name: result.dense[name].median)
    ratio, crossing = result.dataset_rounds.median / result.dense[fastest].median, break_even(result, fastest)
    words = f"; at {crossing:.0f} %, the same" if crossing < 100 else ""
    pixels = f"{result.dataset}, {result.dataset_percent:.0f} % non-zero"
    return f"{pixels}: sparse takes {ratio:.2f} × the time of {fastest}{words}"
