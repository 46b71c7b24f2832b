"""Study: steps over mini-batches, head to head, on one thread and on all.

Every step takes different images, as in training: repeated ones would stay in the caches, and the branch predictor
would learn them. Other packages take the form that is fastest over such batches. They keep all images as floats and
gather rows of them, which is faster than preparing each batch. Ours prepare each batch from bytes, as the trainer does.
For one thread the process is pinned to one core, which is where JAX gets its number of threads from.

On one thread, our steps are also timed part by part. The whole step is timed without a stopwatch, in separate turns.
Reading the clock twice adds 0.1 µs to each call of a part. What else the stopwatch takes is measured, and charged to no
part. Even so, the parts add up to more than the whole, by up to a fifth.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.progress import track

from bench.measure.interleave import interleave
from bench.measure.processes import in_fresh_process
from bench.measure.records import Comparison
from bench.peers import REST, Form, best_form, expected_parameters, turn
from bench.peers.ours import Ours
from bench.peers.task import Task, UnavailableError, batches, steps_in_a_turn, take_steps
from bench.publish.style import Span, beside_numpy, colour, end_labels, over_runs, plain_ticks
from kernels import backend as contract
from kernels import get_backend
from kernels.backend import Backend
from model.cli.console import counted
from model.data import Dataset
from model.extras.figure import figure_file, print_small, title
from model.mlp import MLP
from model.threads import available_cores, thread_pool
from model.training import descend

SIZES = (1, 8, 32, 128, 512, 2_048)
PACKAGES = ("PyTorch", "PyTorch by hand", "torch.compile", "JAX")
BACKENDS = ("numpy", "numba", "sparse")
NAMES = (*BACKENDS, *PACKAGES)
TITLE_SIZE = 128  # a common batch size, and the one in the claims
LEARNING_RATE = 0.1
IMAGES = 20_000  # to draw batches from: 63 MB of floats, more than most caches; to copy all takes frameworks a second

SIZES_IN_PARTS = (32, 512)
PRODUCTS = ("matmul, images", "matmul, small", "matmul, column sums")
RELU = "relu, relu_grad"
KERNELS = {"prepare": "prepare", "relu": RELU, "relu_grad": RELU, "softmax_grad": "softmax_grad", "update": "update"}
BETWEEN = "Python between kernels"
PARTS = ("take", "shards", "prepare", *PRODUCTS, RELU, "softmax_grad", "checks", BETWEEN, "update")
"""Copying the images and labels of a batch; making `Shards` of it; the kernels; the checks of their arguments; what
else happens in `Shards.gradient`; and what else happens in `descend`."""
CHECKS = ("_is_product", "_is_labelled", "_is_matrix", "_is_like")
WHOLE = "whole step"


@dataclass(frozen=True)
class Result:
    """The study's record."""

    steps: dict[int, dict[int, Comparison]]
    """Seconds per step by number of threads and batch size."""
    skipped: dict[str, str]
    """Why a competitor was not timed."""
    parts: dict[int, dict[str, Comparison]]
    """Seconds per step of each of `PARTS` and of the `WHOLE`, on one thread, by batch size and backend."""
    tried: dict[int, dict[int, dict[str, dict[str, Form]]]]
    """Measurements of each form of a competitor, by number of threads and batch size; the fastest was timed."""
    kind: Literal["mini_batches"] = "mini_batches"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Verify the first steps of every competitor, then time steps, interleaved; two to three minutes.

    Half of that is for the compilations of torch.compile and JAX, which a quick run needs, too.
    """
    counts = sorted({1, available_cores()})
    measured = {threads: in_fresh_process(_on_threads, dataset, threads, quick, cores=threads) for threads in counts}
    return Result(
        steps={threads: steps for threads, (steps, _, _) in measured.items()},
        skipped={name: reason for _, _, skipped in measured.values() for name, reason in skipped.items()},
        parts=in_fresh_process(_in_parts, dataset, quick, cores=1),
        tried={threads: tried for threads, (_, tried, _) in measured.items()},
    )


def _on_threads(
    dataset: Dataset, threads: int, quick: bool
) -> tuple[dict[int, Comparison], dict[int, dict[str, dict[str, Form]]], dict[str, str]]:
    """The steps, the forms tried, and what was skipped, on one number of threads."""
    steps: dict[int, Comparison] = {}
    tried: dict[int, dict[str, dict[str, Form]]] = {}
    skipped: dict[str, str] = {}
    words = counted(threads, "thread")
    with thread_pool(threads) as parallel_map:
        images, labels = dataset.train_images[:IMAGES], dataset.train_labels[:IMAGES]
        task = Task(MLP(), images, labels, LEARNING_RATE, threads, parallel_map)
        for size in track([size for size in SIZES if size < len(task.images)], words, transient=True):
            turns: dict[str, Callable[[], Any]] = {}
            tried[size] = {}
            expected = expected_parameters(task, size)
            for name in NAMES:
                try:
                    if name == "JAX" and available_cores() != threads:
                        raise UnavailableError("JAX counts threads by CPU affinity, which is unsupported here")
                    learner, _, tried[size][name] = best_form(name, task, expected, size)
                    turns[name] = turn(learner, task, size)
                except UnavailableError as reason:
                    skipped[name] = str(reason)
            rest = REST if threads > 1 else 0  # one thread leaves no idle ones that busy-wait
            seconds = interleave(turns, 2 if quick else 6, rest=rest, warmup=0, steps=2)
            per_step = {name: times / steps_in_a_turn(size) for name, times in seconds.items()}
            steps[size] = Comparison.of(f"a step over {size:,} images, {words}", per_step)
    return steps, tried, skipped


class InParts(Ours):
    """Our training loop with a stopwatch around each part of a step."""

    def __init__(self, backend: Backend, task: Task) -> None:
        timed = copy.copy(backend)
        super().__init__(timed, task)
        self.turns: list[dict[str, float]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.within = self.overhead = 0.0
        pixels = len(self.mlp.layers[0][0])

        def matmul(a: Any, *others: Any) -> NDArray:
            images, small, sums = PRODUCTS
            part = images if pixels in a.shape else sums if len(a) == 1 else small
            return self.timed(part, backend.matmul, a, *others)

        others = {name: partial(self.timed, part, getattr(backend, name)) for name, part in KERNELS.items()}
        vars(timed).update(others, matmul=matmul)
        self.checks: dict[str, Any] = {name: partial(self.timed, "checks", getattr(contract, name)) for name in CHECKS}

    def timed(self, part: str, function: Callable, *arguments: Any, **named: Any) -> Any:
        """Call a function, and add its seconds to those of `part`, without the parts that it calls."""
        outer, self.within = self.within, 0.0
        start = time.perf_counter()
        result = function(*arguments, **named)
        seconds = time.perf_counter() - start
        self.seconds[part] += seconds - self.within
        self.within = outer + seconds + self.overhead
        return result

    def turn(self, batches: Iterator[NDArray[np.integer]], count: int) -> None:
        """Take `count` steps, and add the seconds of each part of a step to `turns`."""
        self.overhead = self.seconds_of_stopwatch()
        self.seconds.clear()
        with mock.patch.multiple(contract, **self.checks):
            take_steps(self, batches, count)
        self.turns.append({part: self.seconds[part] / count for part in PARTS})

    def seconds_of_stopwatch(self) -> float:
        """Seconds that timing an empty call costs its caller; the median, as other processes may interrupt some."""
        self.overhead, seconds = 0.0, []
        for _ in range(100):
            self.seconds.clear()
            self.timed("caller", self.timed, "nothing", int)
            seconds.append(self.seconds["caller"])
        return float(np.median(seconds))

    def learn(self, images, labels):
        batch = self.timed("shards", self.prepare, images=images, labels=labels)
        batch.gradient = partial(self.timed, BETWEEN, batch.gradient)
        return self.timed("update", descend, self.mlp, self.backend, batch, self.learning_rate).loss / len(images)

    def learn_rows(self, rows):
        take = partial(self.timed, "take", np.take)
        return self.learn(take(self.images, rows, axis=0), take(self.labels, rows))


def _in_parts(dataset: Dataset, quick: bool) -> dict[int, dict[str, Comparison]]:
    with thread_pool(1) as parallel_map:
        images, labels = dataset.train_images[:IMAGES], dataset.train_labels[:IMAGES]
        task = Task(MLP(), images, labels, LEARNING_RATE, 1, parallel_map)
        sizes = [size for size in SIZES_IN_PARTS if size < len(images)]
        return {size: steps_in_parts(task, size, 2 if quick else 12) for size in sizes}


def steps_in_parts(task: Task, size: int, rounds: int) -> dict[str, Comparison]:
    """Seconds per step of each of `PARTS` and of the `WHOLE`, by backend, all interleaved."""
    turns: dict[str, Callable[[], Any]] = {}
    learners = {name: InParts(get_backend(name), task) for name in BACKENDS}
    count = steps_in_a_turn(size)
    for name, learner in learners.items():
        following = batches(len(task.images), size)
        turns[name] = partial(take_steps, Ours(get_backend(name), task), following, count)
        turns[f"{name}, in parts"] = partial(learner.turn, following, count)
    whole = interleave(turns, rounds, warmup=0, steps=2)
    steps = {}
    for name, learner in learners.items():
        measured = learner.turns[1::2]  # without the warm-ups
        seconds = {part: np.array([turn[part] for turn in measured]) for part in PARTS} | {WHOLE: whole[name] / count}
        steps[name] = Comparison.of(f"a step over {size} images on {name}, 1 thread", seconds)
    return steps


def draw(runs: list[Result], small_print: str, file: Path) -> None:
    """Microseconds per step against batch size, a panel for each number of threads."""
    every = {
        threads: {size: _over_runs([run.steps[threads][size] for run in runs]) for size in steps}
        for threads, steps in runs[-1].steps.items()
    }
    with figure_file(file, figsize=(8, 5)) as figure:
        panels = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
        drawn = [times for steps in every.values() for each in steps.values() for times in each.values()]
        lowest, highest = min(times.low for times in drawn), max(times.high for times in drawn)
        panels[0].set(yscale="log", ylim=(1e6 * lowest / 1.3, 2.5e6 * highest))
        for axes, (threads, steps) in zip(panels, every.items()):
            _draw_panel(axes, steps)
            axes.set_title(counted(threads, "thread"), fontsize=9, fontweight="normal")
        panels[0].set_ylabel("microseconds per step")
        title(figure, _title(runs))
        print_small(figure, small_print)


def _title(runs: list[Result]) -> str:
    """The range over the runs of the backends' times and of the fastest package's, relative to NumPy's, at one size."""
    threads, sizes = next(iter(runs[-1].steps.items()))
    size = TITLE_SIZE if TITLE_SIZE in sizes else max(sizes)
    steps = [run.steps[threads][size] for run in runs]
    ours, packages = ([name for name in names if name in steps[-1]] for names in (BACKENDS, PACKAGES))
    words = f"A step over {size} images on {counted(threads, 'thread')}"
    return f"{words}, {beside_numpy(steps, ours, packages)}"


def _over_runs(runs: list[Comparison]) -> dict[str, Span]:
    return {name: over_runs(runs, name) for name in runs[-1].seconds if name in NAMES}


def _draw_panel(axes: Axes, steps: dict[int, dict[str, Span]]) -> None:
    sizes = list(steps)
    right = 1.3 * sizes[-1]
    axes.set(xscale="log", xlabel="batch size (images)", xlim=(sizes[0] / 1.3, right))
    ends: list[tuple[str, float, float, str]] = []
    for name in [name for name in NAMES if name in steps[sizes[0]]]:
        rounds = [steps[size][name] for size in sizes]
        medians = [1e6 * each.median for each in rounds]
        axes.plot(sizes, medians, "o-", color=colour(name), markersize=3, linewidth=1.4)
        axes.vlines(
            sizes, [1e6 * each.low for each in rounds], [1e6 * each.high for each in rounds], color=colour(name)
        )
        ends.append((name, right, medians[-1], colour(name)))
    end_labels(axes, ends)
    plain_ticks(axes.xaxis, axes.yaxis)
