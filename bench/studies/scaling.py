"""Study: how an epoch's time grows with images, batch size, hidden units and threads."""

import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.progress import track

from bench.measure.interleave import interleave
from bench.measure.records import Rounds, rounded
from bench.peers import REST, best_form, competitor, expected_parameters
from bench.peers.task import Learner, Task, UnavailableError, shuffled_batches, take_steps
from bench.publish.style import colour, end_labels, label, low_to_high, plain_ticks, points_up
from bench.studies import full_batch_backends, product_flop
from bench.studies.mini_batches import PACKAGES
from bench.studies.roofline import peak
from kernels import backend_names
from model.data import Dataset, limited
from model.extras.figure import BOUND_COLOUR, figure_file, print_small, title
from model.mlp import MLP
from model.threads import available_cores, thread_pool

LEARNING_RATE = 0.3
HIDDEN = 128

IMAGES = (1_000, 4_000, 15_000, 60_000, 180_000)
FEW_IMAGES = 15_000  # to choose the forms of peers
BATCH_SIZES = (1, 8, 64, 512, 4_096)
HIDDEN_UNITS = (16, 64, 128, 512, 2_048)

STEPS = 100  # at most, of an epoch in mini-batches
HIDDEN_IMAGES = 6_000  # 2,048 units take seconds for all images
SLOW_IMAGES = 16  # take pure Python a quarter of a second

# How seconds ideally grow with the number on each axis: the exponent, and what it means.
LAWS = {
    "images": (1, "equal cost per image"),
    "batch size": (-1, "equal cost per step"),
    "hidden units": (1, "equal cost per unit"),
    "threads": (-1, "perfect speed-up"),
}


class Point(NamedTuple):
    """A point on an axis: what to time, how many times back to back, and its share of an epoch's images."""

    train: Callable[[], Any]
    share: float = 1.0
    repeats: int = 1


Points = dict[tuple[str, int], Point]
"""By backend and number on the axis."""


@dataclass(frozen=True)
class Measured(Rounds):
    """Seconds per epoch at a point on an axis."""

    at: int = 0
    share: float = 1.0
    """The share of an epoch's images that was measured; below 1, seconds are scaled up."""


Axis = dict[str, list[Measured]]
"""By competitor."""


@dataclass(frozen=True)
class Result:
    """The study's record."""

    axes: dict[str, Axis]
    """By quantity. All points of an axis were interleaved, so competitors at the same number can be compared."""
    images: int
    pixels: int
    threads: int
    peak_gflop_per_second: dict[int, float]
    """By number of threads."""
    forms: dict[str, str]
    """The form in which each peer was timed, the fastest over a full batch of at most 15,000 images. Only evidence."""
    forms_in_batches: dict[int, dict[str, str]]
    """The form of each peer that was fastest over mini-batches, by their size. Only evidence."""
    skipped: dict[str, str]
    """Why a peer was not timed."""
    kind: Literal["scaling"] = "scaling"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time epochs along each axis, with competitors and points interleaved."""
    rounds = 2 if quick else 6
    check(dataset)
    with ExitStack() as stack:
        maps = {threads: stack.enter_context(thread_pool(threads)) for threads in thread_counts()}
        parallel_map = maps[available_cores()]
        forms, skipped = peers(parallel_map, dataset)
        sizes = [size for size in BATCH_SIZES if size < min(FEW_IMAGES, len(dataset.train_images))]
        in_batches = {size: peers(parallel_map, dataset, size)[0] for size in sizes}
        axes = {
            "images": lambda: image_points(parallel_map, dataset, forms, 2 if quick else 3),
            "batch size": lambda: batch_points(parallel_map, dataset, forms, in_batches, 20 if quick else STEPS),
            "hidden units": lambda: hidden_points(parallel_map, dataset, forms),
            "threads": lambda: thread_points(maps, dataset),
        }
        measured = {axis: timed(axes[axis](), rounds) for axis in track(axes, "scaling", transient=True)}
    peaks = {threads: peak(threads) for threads in thread_counts()}
    seconds = interleave({str(threads): run_peak for threads, (run_peak, _) in peaks.items()}, 4 * rounds)
    return Result(
        axes=measured,
        images=len(dataset.train_images),
        pixels=dataset.train_images.shape[1],
        threads=available_cores(),
        # These are bounds, so the best round counts.
        peak_gflop_per_second={n: float(flop / seconds[str(n)].min() / 1e9) for n, (_, flop) in peaks.items()},
        forms=forms,
        forms_in_batches=in_batches,
        skipped=skipped,
    )


def peers(parallel_map: Callable, dataset: Dataset, size: int | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Verify the peers over a full batch, or mini-batches of `size`.

    Returns
    -------
    tuple[dict[str, str], dict[str, str]]
        The fastest form of each peer, and why others are skipped.
    """
    forms, skipped = {}, {}
    task = task_of(parallel_map, limited(dataset, min(FEW_IMAGES, len(dataset.train_images))))
    expected = expected_parameters(task, size)
    for name in PACKAGES:
        try:
            _, forms[name], _ = best_form(name, task, expected, size)
        except UnavailableError as reason:
            skipped[name] = str(reason)
    return forms, skipped


def timed(points: Points, rounds: int) -> Axis:
    """Time all points of an axis, interleaved, and scale the seconds up to an epoch."""

    def repeat(point: Point) -> None:
        for _ in range(point.repeats):
            point.train()

    competitors = {f"{name} {at}": partial(repeat, point) for (name, at), point in points.items()}
    seconds = interleave(competitors, rounds, warmup=0, rest=REST, steps=2)
    axis: Axis = {}
    for (name, at), point in points.items():
        per_epoch = seconds[f"{name} {at}"] / (point.repeats * point.share)
        axis.setdefault(name, []).append(Measured(rounded(per_epoch), at=at, share=point.share))
    return axis


# The axes ----------------------------------------------------------------------------------------------------------


def image_points(parallel_map: Callable, dataset: Dataset, forms: dict[str, str], most: int) -> Points:
    """Full-batch steps over 1,000 images up to `most` times the data set; those over few images are repeated."""
    counts = [count for count in IMAGES if count <= most * len(dataset.train_images)]
    large = shifted(dataset, counts[-1])
    few = task_of(parallel_map, limited(dataset, SLOW_IMAGES))
    points = {
        (name, counts[0]): Point(competitor(name, few).step, SLOW_IMAGES / counts[0])
        for name in filter(is_slow, backend_names())
    }
    for name, form in (dict.fromkeys(full_batch_backends()) | forms).items():
        for count in counts:
            started = competitor(name, task_of(parallel_map, limited(large, count)), form)
            points[name, count] = Point(started.step, repeats=-(-15_000 // count))
    return points


def batch_points(
    parallel_map: Callable,
    dataset: Dataset,
    forms: dict[str, str],
    in_batches: dict[int, dict[str, str]],
    steps: int,
) -> Points:
    """Epochs in shuffled mini-batches of all images; if they have more than `steps` batches, the next `steps` of them.

    Ours prepare every batch; peers keep floats, and take the form that is fastest at each size. Over all images, peers
    take steps without copying rows.
    """
    whole = len(dataset.train_images)
    started = functools.cache(lambda name, form: competitor(name, task_of(parallel_map, dataset), form))
    points: Points = {(name, whole): Point(started(name, form).step) for name, form in forms.items()}
    for size in [*in_batches, whole]:
        for name, form in (in_batches.get(size, {}) | dict.fromkeys(backend_names())).items():
            slow = is_slow(name)
            if slow and size > SLOW_IMAGES:
                continue
            count = min(-(-8 // size) if slow else steps, -(-whole // size))
            learner = started(name, form)
            assert isinstance(learner, Learner)
            train = take_batches(learner, whole, size, count)
            points[name, size] = Point(train, min(1, count * size / whole))
    return points


def hidden_points(parallel_map: Callable, dataset: Dataset, forms: dict[str, str]) -> Points:
    """Full-batch steps over a tenth of the images; for pure Python, the more units there are, the fewer images."""
    whole = len(dataset.train_images)
    points: Points = {}
    for name, form in (forms | dict.fromkeys(backend_names())).items():
        slow = is_slow(name)
        for hidden in HIDDEN_UNITS:
            count = max(1, SLOW_IMAGES * HIDDEN // hidden // 4) if slow else min(whole, HIDDEN_IMAGES)
            started = competitor(name, task_of(parallel_map, limited(dataset, count), hidden), form)
            points[name, hidden] = Point(started.step, count / whole)
    return points


def thread_points(maps: dict[int, Callable], dataset: Dataset) -> Points:
    """Full-batch steps by number of threads, without pure Python, which the GIL serializes."""
    return {
        (name, threads): Point(competitor(name, task_of(parallel_map, dataset)).step)
        for name in full_batch_backends()
        for threads, parallel_map in maps.items()
    }


def is_slow(name: str) -> bool:
    """Whether this is a backend that takes minutes for all images."""
    return name in backend_names() and name not in full_batch_backends()


def take_batches(learner: Learner, images: int, size: int, count: int) -> Callable[[], None]:
    """A function that takes steps over the next `count` batches, in random order."""
    return partial(take_steps, learner, shuffled_batches(images, size), count)


def task_of(parallel_map: Callable, dataset: Dataset, hidden: int = HIDDEN) -> Task:
    images, labels = dataset.train_images, dataset.train_labels
    mlp = MLP((images.shape[1], hidden, 10))
    return Task(mlp, images, labels, LEARNING_RATE, available_cores(), parallel_map)


def thread_counts() -> list[int]:
    """Powers of two, and the number of cores."""
    cores = available_cores()
    return sorted({cores, *itertools.takewhile(lambda count: count < cores, (2**n for n in itertools.count()))})


def shifted(dataset: Dataset, count: int) -> Dataset:
    """`dataset` with `count` training images: the originals, then copies shifted by up to two pixels each way.

    Shifts wrap around, so each copy keeps its number of non-zero pixels.
    """
    whole = len(dataset.train_images)
    edge = int(dataset.train_images.shape[1] ** 0.5)
    pictures = dataset.train_images.reshape(whole, edge, -1)
    nearest = sorted(itertools.product(range(-2, 3), repeat=2), key=lambda shift: abs(shift[0]) + abs(shift[1]))
    images = np.empty((count, edge, pictures.shape[2]), np.uint8)
    for start, shift in zip(range(0, count, whole), nearest):
        part = images[start : start + whole]
        part[:] = np.roll(pictures[: len(part)], shift, axis=(1, 2))
    labels: NDArray = np.resize(dataset.train_labels, count)
    return dataset._replace(train_images=images.reshape(count, -1), train_labels=labels)


def check(dataset: Dataset) -> None:
    """Assert that a step gives the same parameters on every backend, and the same bits on any number of threads."""
    for hidden in HIDDEN_UNITS:
        expected = stepped("numpy", dataset, hidden, 1, 4)
        for name in backend_names():
            for ours, theirs in zip(stepped(name, dataset, hidden, 1, 4), expected):
                # A step changes a parameter by at most 0.3, with the rounding errors of sums over 784 products.
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.3 * 784 * float(np.finfo(np.float32).eps))
    for name in full_batch_backends():
        expected = stepped(name, dataset, HIDDEN, 1)
        for threads in thread_counts():
            for ours, theirs in zip(stepped(name, dataset, HIDDEN, threads), expected):
                np.testing.assert_array_equal(ours, theirs)


def stepped(name: str, dataset: Dataset, hidden: int, threads: int, images: int | None = None) -> list[NDArray]:
    """The parameters after a step over the first `images`."""
    with thread_pool(threads) as parallel_map:
        started = competitor(name, task_of(parallel_map, limited(dataset, images), hidden))
        started.step()
        return started.parameters()


# The figure --------------------------------------------------------------------------------------------------------


def flop(result: Result, axis: str, at: int) -> int:
    """FLOP of a dense epoch: the two products with the pixels, and the three with the 10 classes."""
    images = at if axis == "images" else result.images
    hidden = at if axis == "hidden units" else HIDDEN
    return 2 * product_flop(images, result.pixels, hidden) + 3 * product_flop(images, hidden, 10)


def draw(result: Result, small_print: str, file: Path) -> None:
    """Seconds per epoch along each axis; grey lines are constant rates of arithmetic."""
    with figure_file(file, figsize=(8, 7.6)) as figure:
        for axes, (axis, backends) in zip(figure.subplots(2, 2).flat, result.axes.items()):
            draw_axis(axes, result, axis, backends)
        title(figure, _title(result))
        print_small(figure, f"Hollow marks: measured on part of an epoch and scaled up.\n{small_print}")


def draw_axis(axes: Axes, result: Result, axis: str, backends: Axis) -> None:
    """One panel: the competitors, the peak, and the scaling law that they should follow."""
    points = [point for name in backends for point in backends[name]]
    first, last = min(point.at for point in points), max(point.at for point in points)
    x, width = np.array([first, last]), last / first
    dense = np.array([flop(result, axis, at) for at in x]) / 1e9
    peaks = result.peak_gflop_per_second
    floor = dense / [peaks[int(at) if axis == "threads" else result.threads] for at in x]
    exponent, law = LAWS[axis]
    longest = max(point.high for point in points) * (width if axis == "images" else 1)
    units = " (images)" if axis == "batch size" else ""
    axes.set(xscale="log", yscale="log", xlabel=f"{axis}{units}", ylabel="seconds per epoch")
    right = last * width**0.06  # names are outside
    axes.set(xlim=(first / width**0.06, right), ylim=(floor.min() / 3, 2 * longest))
    rates = 10.0 ** np.arange(-3, 4)
    for rate in rates:
        axes.plot(x, dense / rate, color="#CCCCCC", linewidth=0.6, zorder=0)
    axes.plot(x, floor, color=BOUND_COLOUR, linestyle="--", linewidth=1)
    ends: list[tuple[str, float, float, str]] = [("peak", right, floor[-1], BOUND_COLOUR)]
    for name, unordered in backends.items():
        row = sorted(unordered, key=lambda point: point.at)
        at, seconds, low, high = np.array([(point.at, point.median, point.low, point.high) for point in row]).T
        if at[-1] == last or len(row) == 1:
            anchor = -1 if exponent == 1 else 0
            axes.plot(x, seconds[anchor] * (x / at[anchor]) ** exponent, ":", color=colour(name), linewidth=1)
        axes.plot(at, seconds, color=colour(name), linewidth=1.4)
        axes.vlines(at, low, high, color=colour(name), linewidth=1.4)
        for point in row:
            fill = colour(name) if point.share == 1 else "white"
            axes.plot(point.at, point.median, "o", color=colour(name), markerfacecolor=fill, markersize=4)
        alone = len(row) == 1
        end = right if alone or at[-1] == last else at[-1]
        ends.append((name, end, seconds[-1] * (width if alone else 1), colour(name)))
    names = end_labels(axes, ends)
    for rate in rates:
        y = dense[1] / rate
        height = points_up(axes, right, y)
        if floor.min() / 2 < y < 1.5 * longest and all(abs(height - name) > 9 for name in names):
            label(axes, f"{rate:,g} GFLOP/s", right, y, 6.5, shade="#777777")
    plain_ticks(axes.xaxis, axes.yaxis)
    axes.set_title(f"dotted: {law}", fontsize=8, fontweight="normal")


def _title(result: Result) -> str:
    rows = {name: row for name, row in result.axes["images"].items() if len(row) > 1}
    base = next(iter(rows.values()))
    whole = max(n for n, point in enumerate(base) if point.at <= result.images)
    times = [row[-1].median / row[whole].median for row in rows.values()]
    more = base[-1].at / base[whole].at
    gains = [row[-1].median / row[0].median for row in result.axes["threads"].values()]
    on_threads = f"{result.threads} threads take {_range(gains)} × the time of one"
    return f"{more:g} × the images take {_range(times)} × the time; {on_threads}" if more > 1 else on_threads


def _range(values: list[float]) -> str:
    return low_to_high(f"{min(values):.2g}", f"{max(values):.2g}")
