"""Study: steps over mini-batches, head to head, on one thread and on all.

Every step takes different images, as in training: repeated ones would stay in the caches, and the branch predictor
would learn them. The frameworks keep all images as floats and take rows of them, which is faster than preparing them
anew. Ours prepare each batch from bytes, as the trainer does. On one thread the process is pinned to one core, as JAX
takes the number of its threads from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.progress import track

from bench.measure.interleave import interleave
from bench.measure.processes import in_fresh_process
from bench.measure.records import Comparison
from bench.peers import REST, VERIFIED_STEPS, competitor, expected_parameters, verified
from bench.peers.task import Learner, Task, UnavailableError
from bench.publish.style import end_labels, plain_ticks
from model.data import Dataset
from model.extras.figure import colour, figure_file, print_small, title
from model.mlp import MLP
from model.threads import available_cores, thread_pool

SIZES = (1, 8, 32, 128, 512, 2_048)
NAMES = ("numpy", "numba", "sparse", "PyTorch", "PyTorch by hand", "JAX")
LEARNING_RATE = 0.1
IMAGES = 20_000  # batches are of these, as frameworks take a second to copy all; 63 MB of floats, more than most caches
IMAGES_IN_A_TURN = 2_048
MOST_STEPS_IN_A_TURN = 16
FULL_BATCH = "sparse, all images"


@dataclass(frozen=True)
class Result:
    """The study's record."""

    steps: dict[int, dict[int, Comparison]]
    """Seconds of a step by number of threads and images, and of a step of sparse over all images beside the largest."""
    images: int
    """All."""
    skipped: dict[str, str]
    """Why a competitor was not timed."""
    kind: Literal["mini_batches"] = "mini_batches"

    def per_image(self, threads: int, size: int) -> float:
        """What an image costs `sparse` in batches of `size`, relative to what it costs among all."""
        whole = self.steps[threads][max(self.steps[threads])].median(FULL_BATCH) / self.images
        return self.steps[threads][size].median("sparse") / size / whole


def measure(dataset: Dataset, quick: bool) -> Result:
    """Every competitor's steps, interleaved, once its first ones have been verified; takes about 50 seconds, or 25."""
    counts = sorted({1, available_cores()})
    measured = {threads: in_fresh_process(_on_threads, dataset, threads, quick, cores=threads) for threads in counts}
    return Result(
        steps={threads: steps for threads, (steps, _) in measured.items()},
        images=len(dataset.train_images),
        skipped={name: reason for _, skipped in measured.values() for name, reason in skipped.items()},
    )


def _on_threads(dataset: Dataset, threads: int, quick: bool) -> tuple[dict[int, Comparison], dict[str, str]]:
    steps, skipped = {}, {}
    with thread_pool(threads) as run:
        every = Task(MLP(), dataset.train_images, dataset.train_labels, LEARNING_RATE, threads, run)
        task = every._replace(images=every.images[:IMAGES], labels=every.labels[:IMAGES])
        for size in track([size for size in SIZES if size < len(task.images)], f"{threads} threads", transient=True):
            turns: dict[str, Callable[[], Any]] = {}
            rows = batches(len(task.images), size)
            first = [next(rows) for _ in range(VERIFIED_STEPS)]
            expected = expected_parameters(task, first)
            for name in NAMES:
                try:
                    if name == "JAX" and available_cores() != threads:
                        raise UnavailableError("JAX takes no number of threads, and this system no number of cores")
                    learner, _ = verified(name, task, expected, batches=first)
                    assert isinstance(learner, Learner)
                    turns[name] = partial(turn, learner, batches(len(task.images), size), steps_in_a_turn(size))
                except UnavailableError as reason:
                    skipped[name] = str(reason)
            if size == SIZES[-1]:
                turns[FULL_BATCH] = competitor("sparse", every).step
            rest = REST if threads > 1 else 0  # on one thread, none spins on
            seconds = interleave(turns, 2 if quick else 6, rest=rest, warmup=0, steps=2)
            for name in turns.keys() - {FULL_BATCH}:
                seconds[name] /= steps_in_a_turn(size)
            steps[size] = Comparison.of(f"a step over {size:,} images, {threads} threads", seconds)
    return steps, skipped


def batches(count: int, size: int) -> Iterator[NDArray[np.integer]]:
    """Rows of one batch after the other, of `count` images in random order, shuffled anew each time they run out."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def turn(learner: Learner, rows: Iterator[NDArray[np.integer]], steps: int) -> None:
    """Take some steps over the next batches."""
    for _ in range(steps):
        learner.learn_rows(next(rows))


def steps_in_a_turn(size: int) -> int:
    """Enough to take milliseconds."""
    return min(MOST_STEPS_IN_A_TURN, max(2, IMAGES_IN_A_TURN // size))


def draw(result: Result, small_print: str, file: Path) -> None:
    """Microseconds of a step against the batch size, a panel for each number of threads."""
    with figure_file(file, figsize=(8, 4)) as figure:
        panels = figure.subplots(1, len(result.steps), sharey=True, squeeze=False)[0]
        for axes, (threads, steps) in zip(panels, result.steps.items()):
            _draw_panel(axes, steps)
            axes.set_title(f"{threads} thread{'s' * (threads > 1)}", fontsize=9, fontweight="normal")
        panels[0].set_ylabel("microseconds per step")
        title(figure, _title(result))
        print_small(figure, small_print)


def _draw_panel(axes: Axes, steps: dict[int, Comparison]) -> None:
    sizes = list(steps)
    axes.set(xscale="log", yscale="log", xlabel="images in a batch", xlim=(sizes[0] / 1.5, 12 * sizes[-1]))
    ends: list[tuple[str, float, float, str]] = []
    for name in [name for name in NAMES if name in steps[sizes[0]]]:
        rounds = [steps[size].rounds[name] for size in sizes]
        medians = [1e6 * each.median for each in rounds]
        axes.plot(sizes, medians, "o-", color=colour(name), markersize=3, linewidth=1.4)
        axes.vlines(
            sizes, [1e6 * each.low for each in rounds], [1e6 * each.high for each in rounds], color=colour(name)
        )
        ends.append((name, sizes[-1], medians[-1], colour(name)))
    end_labels(axes, ends)
    plain_ticks(axes.xaxis, axes.yaxis)


def _title(result: Result) -> str:
    """What this run shows of sparse against PyTorch, or numpy where there is none."""
    steps = result.steps[1]
    base = "PyTorch" if "PyTorch" in next(iter(steps.values())) else "numpy"
    sizes = [size for size in (32, 128, 512) if size in steps]
    ratios = ", ".join(f"{steps[size].ratio('sparse', base).ratio:.2f}" for size in sizes)
    return f"In batches of {', '.join(map(str, sizes))}, sparse takes {ratios} × the time of {base}, on one thread"
