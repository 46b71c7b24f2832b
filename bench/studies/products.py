"""Study: products of the numba backend against OpenBLAS's: the big ones of a step, and a sweep over many shapes.

The sweep times every shape on one thread in all four combinations of transposes, so that no weak one stays hidden.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from rich.progress import track
from threadpoolctl import threadpool_limits

from bench.measure.interleave import interleave
from bench.measure.machine import blas_threads
from bench.measure.records import Comparison
from bench.peers.task import UnavailableError, package
from bench.publish.style import over_runs, ratio_over_runs, short
from kernels import get_backend
from model.cli.console import counted
from model.data import Dataset
from model.extras.figure import figure_file, print_small, title
from model.threads import thread_pool

# Shapes of the operands, and whether the left one is transposed: x W1 and x.T dz over all images, and over one shard.
PRODUCTS = {
    "(60000×784)(784×128)": ((60_000, 784), (784, 128), False),
    "(784×60000)(60000×128)": ((60_000, 784), (60_000, 128), True),
    "(1024×784)(784×128)": ((1024, 784), (784, 128), False),
    "(784×1024)(1024×128)": ((1024, 784), (1024, 128), True),
    "1024³": ((1024, 1024), (1024, 1024), False),
}

# (m, k, n) of the sweep: an (m, k) matrix times a (k, n) one.
SHAPES = {
    "the step's": [(1024, 784, 128), (784, 1024, 128), (1024, 128, 10), (1024, 10, 128), (128, 1024, 10)],
    "small batches'": [(784, 128, 128), (784, 32, 128)],
    "squares": [(size, size, size) for size in (256, 512, 1024)],
    "few rows": [
        *((rows, 784, 128) for rows in (1, 2, 4, 8, 32)),
        *((rows, 2000, 2000) for rows in (1, 2, 4, 8, 32)),
        *((rows, 1024, 1024) for rows in (1, 8, 32)),  # rows and columns a multiple of 4 KB apart, on one L1 set
        (8, 30_000, 2000),  # the first layer of NPBench's mlp
    ],
}
TRANSPOSES = {"AB": (False, False), "AᵀB": (True, False), "ABᵀ": (False, True), "AᵀBᵀ": (True, True)}
"""Whether the first and the second operand are transposed views."""

NUMBA, OPENBLAS, MKL, ONEDNN = "numba", "OpenBLAS", "MKL", "oneDNN"
SECONDS_IN_A_TURN = 0.002


@dataclass(frozen=True)
class Swept:
    """A shape with one of the four combinations of transposes, on one thread."""

    shape: tuple[int, int, int]
    transposes: str
    seconds: Comparison


@dataclass(frozen=True)
class Result:
    """The study's record."""

    products: list[Comparison]
    """One for each shape and number of threads."""
    sweep: list[Swept] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a library is not in the sweep."""
    kind: Literal["products"] = "products"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time the big products on one thread and, with rows split over threads, on all; then the sweep.

    On one thread MKL and oneDNN take part, too, if PyTorch brings them. On several, their idle threads would disturb
    the next timing.
    """
    libraries, skipped = torch_libraries()
    rounds = 3 if quick else 8
    comparisons = []
    for shape, (left, right, transposed) in track(PRODUCTS.items(), "products", transient=True):
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal(left, np.float32), rng.standard_normal(right, np.float32)
        a = a.T if transposed else a
        for threads in blas_threads():
            with ThreadPoolExecutor(threads) as pool, threadpool_limits(threads, user_api="blas"):
                ours = _split_product(a, b, threads, pool)
                competitors: dict[str, Callable[[], Any]] = {NUMBA: ours, OPENBLAS: partial(np.matmul, a, b)}
                if threads == 1:
                    competitors |= {name: library(a, b) for name, library in libraries.items()}
                expected = a @ b
                for name, run in competitors.items():
                    result = np.concatenate(run()) if name == NUMBA else np.asarray(run())
                    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * a.shape[1], err_msg=name)
                seconds = interleave(competitors, rounds if a.size > 1e7 else 10 * rounds)
                comparisons.append(Comparison.of(f"{shape}, {counted(threads, 'thread')}", seconds))
    every = [(shape, transposes) for shapes in SHAPES.values() for shape in shapes for transposes in TRANSPOSES]
    with thread_pool(1):  # as training calls them
        sweep = [swept(*place, libraries, 2 if quick else 7) for place in track(every, "sweep", transient=True)]
    return Result(comparisons, sweep, skipped)


Library = Callable[[NDArray, NDArray], Callable[[], Any]]
"""Takes the operands, and returns a function that multiplies them."""


def torch_libraries() -> tuple[dict[str, Library], dict[str, str]]:
    """The BLAS libraries behind PyTorch, set to one thread, and why one is missing."""
    try:
        torch = package("torch")
    except UnavailableError as reason:
        return {}, {MKL: str(reason), ONEDNN: str(reason)}
    torch.set_num_threads(1)

    def mkl(a: NDArray, b: NDArray) -> Callable[[], Any]:
        return partial(torch.mm, torch.from_numpy(a), torch.from_numpy(b))

    def onednn(a: NDArray, b: NDArray) -> Callable[[], Any]:
        # What torch.compile calls for a layer, x Wᵀ
        layer = torch.ops.mkldnn._linear_pointwise
        return partial(layer, torch.from_numpy(a), torch.from_numpy(b.T), None, "none", [], "")

    there: dict[str, Library] = {}
    if torch.backends.mkl.is_available():
        there[MKL] = mkl
    if torch.backends.mkldnn.is_available():
        there[ONEDNN] = onednn
    return there, {name: "this PyTorch is built without it" for name in (MKL, ONEDNN) if name not in there}


def swept(shape: tuple[int, int, int], transposes: str, libraries: dict[str, Library], rounds: int) -> Swept:
    """Verify every library on a shape with one of the four combinations of transposes, then time it.

    Operands are small integers. Their sums are exact in float32 in any order, so all results must be equal.
    """
    a, b = operands(shape, transposes)
    competitors: dict[str, Callable[[], Any]] = {
        NUMBA: partial(get_backend("numba").matmul, a, b),
        OPENBLAS: partial(np.matmul, a, b),
        **{name: library(a, b) for name, library in libraries.items()},
    }
    expected = competitors[OPENBLAS]()
    for name, run in competitors.items():
        np.testing.assert_array_equal(np.asarray(run()), expected, err_msg=f"{name}, {transposes} at {shape}")
    once = interleave({OPENBLAS: competitors[OPENBLAS]}, 3, warmup=0)[OPENBLAS].min()
    steps = 1 + max(1, round(SECONDS_IN_A_TURN / once))
    return Swept(shape, transposes, Comparison.of("a product", interleave(competitors, rounds, warmup=1, steps=steps)))


def operands(shape: tuple[int, int, int], transposes: str) -> tuple[NDArray, NDArray]:
    """An (m, k) and a (k, n) matrix of small integers in float32, transposed views where `transposes` says so."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    flip_a, flip_b = TRANSPOSES[transposes]
    a = rng.integers(-8, 8, (k, m) if flip_a else (m, k), np.int8).astype(np.float32)
    b = rng.integers(-8, 8, (n, k) if flip_b else (k, n), np.int8).astype(np.float32)
    return a.T if flip_a else a, b.T if flip_b else b


def _split_product(a: NDArray, b: NDArray, threads: int, pool: ThreadPoolExecutor) -> Callable[[], list[NDArray]]:
    """A function that computes A B on the numba backend, with the rows of A split over the caller and the `pool`."""
    numba = get_backend("numba")
    first, *others = np.array_split(a, threads)

    def product() -> list[NDArray]:
        futures = [pool.submit(numba.matmul, part, b) for part in others]
        return [numba.matmul(first, b), *(future.result() for future in futures)]

    return product


# The figure --------------------------------------------------------------------------------------------------------


Sweep = dict[tuple[tuple[int, int, int], str], list[Comparison]]
"""What every run measured, by shape and transposes."""


def draw(runs: list[Result], small_print: str, file: Path) -> None:
    """A panel for each library: its time relative to OpenBLAS's, with shapes as rows and transposes as columns."""
    sweep: Sweep = {}
    for each in (each for run in runs for each in run.sweep):
        sweep.setdefault((each.shape, each.transposes), []).append(each.seconds)
    if not sweep:
        return
    libraries = [name for name in next(iter(sweep.values()))[0].seconds if name != OPENBLAS]
    shapes = list(dict.fromkeys(shape for shape, _ in sweep))
    with figure_file(file, figsize=(8, 1.7 + 0.25 * len(shapes))) as figure:
        panels = figure.subplots(1, len(libraries), sharey=True, squeeze=False)[0]
        for axes, library in zip(panels, libraries):
            _draw_panel(axes, sweep, library, shapes)
        panels[0].set_yticks(range(len(shapes)), [_words(sweep, shape) for shape in shapes], fontsize=7.5)
        title(figure, _title(sweep))
        count = f"One thread, median of {len(runs)} runs." if len(runs) > 1 else "One thread, 1 run."
        print_small(figure, f"{count} ms: OpenBLAS's time for AB, with A of m × k and B of k × n.\n{small_print}")


def _draw_panel(axes: Axes, sweep: Sweep, library: str, shapes: list[tuple[int, int, int]]) -> None:
    ratios = np.full((len(shapes), len(TRANSPOSES)), np.nan)
    for (shape, transposes), seconds in sweep.items():
        place = shapes.index(shape), list(TRANSPOSES).index(transposes)
        ratios[place] = ratio_over_runs(seconds, library, OPENBLAS).median
    axes.imshow(ratios, cmap="PuOr_r", norm=LogNorm(1 / 3, 3, clip=True), aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        shade = "white" if abs(np.log(ratio)) > 0.75 else "black"
        axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=7.5, color=shade)
    axes.set_xticks(range(len(TRANSPOSES)), TRANSPOSES)
    axes.set_title(f"{library} / OpenBLAS", fontsize=9, fontweight="normal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _words(sweep: Sweep, shape: tuple[int, int, int]) -> str:
    milliseconds = 1e3 * over_runs(sweep[shape, "AB"], OPENBLAS).median
    return f"{' × '.join(f'{size:,}' for size in shape)}  ({short(milliseconds)} ms)"


def _title(sweep: Sweep) -> str:
    largest = max(ratio_over_runs(seconds, NUMBA, OPENBLAS).median for seconds in sweep.values())
    return f"Time relative to OpenBLAS's, by shape and transposes; numba's largest: {largest:.2f}"
