"""Study: the number of epochs after which a backend has made up for its start-up cost. Each run is a fresh process."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal

import numpy as np

from bench.measure.interleave import interleave
from bench.measure.records import Comparison, Ratio, Rounds
from bench.publish.style import colour, end_labels
from model.data import Dataset
from model.extras.figure import figure_file, print_small, title

EPOCHS = 5
MOST = 250
LONG = ("--epochs", MOST, "--eval-every", 25)
FIRST_RUN = ", first run"  # the cache of compiled kernels is empty
STARTS = ("numpy", f"numba{FIRST_RUN}", "numba", f"sparse{FIRST_RUN}", "sparse")


@dataclass(frozen=True)
class Start:
    """A backend with a warm or an empty cache, and what it costs."""

    total: Rounds
    """Seconds of a short run, from the start of the process to its end."""
    epoch: float
    """Seconds per epoch, the median of all runs."""
    epochs: int
    """Number of epochs in a short run."""

    @property
    def fixed(self) -> float:
        """Seconds before and after the epochs."""
        return self.total.median - self.epochs * self.epoch


@dataclass(frozen=True)
class Result:
    """The study's record."""

    starts: dict[str, Start]
    command: Comparison
    """Seconds of all 250 epochs with their evaluations."""
    kind: Literal["break_even"] = "break_even"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time short runs and their epochs, and 250 epochs.

    Runs are timed from the start of the process to its end. That includes loading, preparing, compiling if nothing is
    cached, and evaluating the test images, once in a short run and ten times in a long one.
    """
    seconds: dict[str, list[float]] = {start: [] for start in STARTS}
    data = ["--dataset", dataset.name.lower(), *(["--limit", len(dataset.train_images)] if quick else [])]
    with TemporaryDirectory() as folder:

        def train(start: str, *options: Any) -> None:
            cache = Path(mkdtemp(dir=folder)) if start.endswith(FIRST_RUN) else Path(folder, "warm")
            backend = start.removesuffix(FIRST_RUN)
            seconds[backend] += train_in_process("--backend", backend, *data, *options, cache=cache)

        for start in ("numba", "sparse"):
            train(start, "--epochs", 1)  # fills the cache
        short = {start: partial(train, start, "--epochs", EPOCHS, "--eval-every", EPOCHS) for start in STARTS}
        totals = interleave(short, 1 if quick else 3, warmup=0)
        long = {start: partial(train, start, *LONG) for start in ("numpy", "sparse")}
        long_totals = interleave(long, 1, warmup=0)
    epochs = {start: float(np.median(seconds[start.removesuffix(FIRST_RUN)])) for start in STARTS}
    return Result(
        starts={start: Start(Rounds.of(totals[start]), epochs[start], EPOCHS) for start in STARTS},
        command=Comparison.of("250 epochs, from the start of the process", long_totals),
    )


def train_in_process(*options: Any, cache: Path) -> list[float]:
    """Run ``python -m model train`` with compiled kernels cached in a folder; returns the seconds of each epoch."""
    cache.mkdir(exist_ok=True)
    history = cache / "history.json"
    command = [sys.executable, "-m", "model", "train", *map(str, options), "--json", str(history)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "NUMBA_CACHE_DIR": str(cache)})
    return [epoch["seconds"] for epoch in json.loads(history.read_text())["history"]]


def break_even(ours: Start, theirs: Start) -> float:
    """The number of epochs after which both have taken equally long; infinite if ours never catches up."""
    late, gain = ours.fixed - theirs.fixed, theirs.epoch - ours.epoch
    return max(0.0, late / gain) if gain > 0 else 0.0 if late <= 0 else math.inf


def draw(result: Result, small_print: str, file: Path) -> None:
    """Total seconds against epochs, with the points where lines cross NumPy's."""
    starts = result.starts
    points = {start: break_even(starts[start], starts["numpy"]) for start in starts if start != "numpy"}
    with figure_file(file, figsize=(8, 4.2)) as figure:
        axes = figure.subplots()
        longest = max(line.fixed + MOST * line.epoch for line in starts.values())
        axes.set(xlim=(0, MOST), ylim=(0, 1.02 * longest))
        axes.set(xlabel="epochs", ylabel="seconds since the start of the process")
        ends: list[tuple[str, float, float, str]] = []
        for order, (start, line) in enumerate(starts.items()):
            end = line.fixed + MOST * line.epoch
            shade, style = colour(start.removesuffix(FIRST_RUN)), "--" if start.endswith(FIRST_RUN) else "-"
            axes.plot([0, MOST], [line.fixed, end], style, color=shade, linewidth=1.8)
            beside = line.epochs + 0.006 * MOST * order  # offset, so that intervals do not overlap
            axes.plot([beside] * 2, [line.total.low, line.total.high], color=shade, linewidth=1.2)
            epochs = points.get(start, math.inf)
            if 0 < epochs < MOST:
                total = line.fixed + epochs * line.epoch
                axes.plot(epochs, total, "o", color="black", markersize=5, markerfacecolor="white", zorder=6)
            ends.append((start if start == "numpy" else f"{start}: {crossing(epochs)}", MOST, end, shade))
        end_labels(axes, ends)
        title(figure, _title(points, result.command.ratio("sparse", "numpy")))
        marks = "Circles: where a line crosses numpy's, from medians. Dashed: no compiled kernels are cached yet."
        print_small(figure, f"{marks}\n{small_print}")


def _title(points: dict[str, float], command: Ratio) -> str:
    warm, first = (crossing(points[start]) for start in ("sparse", f"sparse{FIRST_RUN}"))
    took = f"{MOST} epochs took {command.ratio:.2f} × numpy's time"
    return f"sparse {warm}; if it must compile first, it {first}; {took} once compiled"


def crossing(epochs: float) -> str:
    """Where a line crosses NumPy's, in words: near there, medians do not tell which takes less time."""
    if epochs in (0, math.inf):
        return "never overtakes numpy" if epochs else "is always ahead of numpy"
    return f"overtakes numpy after {'' if epochs <= MOST else 'more than '}{min(math.ceil(epochs), MOST)} epochs"
