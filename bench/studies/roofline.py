"""Study: the big products in the roofline model (Williams et al. 2009), on one thread.

The bounds are measured as well: FMA throughput on registers, and the bandwidth of caches and memory.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from llvmlite import ir
from matplotlib.axes import Axes
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from rich.progress import track

from bench.measure.interleave import interleave
from bench.measure.records import Rounds
from bench.publish.style import colour, end_labels, note, plain_ticks, short
from bench.studies import full_batch_backends, product_flop
from kernels import get_backend, simd
from kernels.backend import Backend
from kernels.ladder.steps import in_threads
from kernels.simd import Vectors, View, aligned_empty
from model.data import Dataset
from model.extras.figure import BOUND_COLOUR, figure_file, print_small, title
from model.mlp import MLP
from model.shards import shard_ranges
from model.threads import thread_pool

# The machine's bounds ----------------------------------------------------------------------------------------------

# Independent accumulators hide the latency: a multiply-add takes 4 cycles, and two start in each cycle (four on some
# ARM cores). Together with the factor, all must fit in the vector registers: 32 with AVX-512 and on ARM, otherwise 16.
CHAINS = {16: 12, 32: 16}[simd.REGISTERS]
PASSES = 5_000_000


def _chains(advance: Callable[..., ir.Value]) -> Callable:
    """An intrinsic that keeps one accumulator per chain, and advances all of them in each pass."""

    def typed(typing_context, values, passes):
        def emit(context, builder, signature, arguments):
            view = View.of(context, builder, signature.args[0], arguments[0])
            vectors = Vectors(context, builder, signature.args[0].dtype)
            totals = [vectors.variable(vectors.constant(float(chain))) for chain in range(CHAINS)]
            factor = vectors.broadcast(view.at(0))
            with cgutils.for_range(builder, arguments[1]) as loop:
                for chain, total in enumerate(totals):
                    now = builder.load(total)
                    builder.store(advance(vectors, builder, view, now, factor, loop.index, chain), total)
            sums = [builder.load(total) for total in totals]
            vectors.store(functools.reduce(builder.fadd, sums), view.at(0))

        return types.void(values, passes), emit

    return intrinsic(typed)


def _multiply_add(vectors, builder, view, total, factor, index, chain):
    # The accumulator is the operand that the FMA instruction overwrites, so it needs no move.
    return vectors.fma(factor, factor, total)


def _add_loaded(vectors, builder, view, total, factor, index, chain):
    place = builder.add(builder.mul(index, index.type(CHAINS)), index.type(chain))
    return builder.fadd(total, vectors.load(view.at(builder.mul(place, index.type(vectors.lanes)))))


multiply_add_chains, load_chains = _chains(_multiply_add), _chains(_add_loaded)


@njit(nogil=True)
def run_chains(values, passes):
    multiply_add_chains(values, passes)


@njit(nogil=True)
def add_up(values, passes, again):
    for _ in range(again):
        load_chains(values, passes)


def peak(threads: int) -> tuple[Callable[[], None], int]:
    """A function that does multiply-adds on registers in `threads` threads, and its number of operations."""
    lanes = simd.REGISTER_BYTES // 4
    values = np.full((threads, 1, lanes), 2.0**-12, np.float32)  # a row for each thread; sums stay small
    run_chains(values[0, 0].copy(), 1)  # compiles

    def run() -> None:
        values.fill(2.0**-12)
        in_threads(lambda rows, _, out: run_chains(out[0, 0], PASSES), values, None, values, threads)

    return run, 2 * threads * CHAINS * lanes * PASSES


# Bytes to read: half of a usual L1 cache; more than any L1, but less than a usual L2; many times the L3.
MEMORY = {"L1": 16 * 1024, "L2": 192 * 1024, "DRAM": 384 * 1024**2}


def reader(level: str) -> tuple[Callable[[], None], int]:
    """A function that sums an array that fits in `level` but in no nearer cache, and the bytes it reads."""
    pass_bytes = CHAINS * simd.REGISTER_BYTES
    passes = MEMORY[level] // pass_bytes
    values = aligned_empty(1, passes * pass_bytes // 4, np.float32(0))[0]
    values.fill(0)  # untouched pages would all map to the zero page, which is in the cache
    again = max(1, 2**27 // values.nbytes)
    add_up(values[: pass_bytes // 4], 1, 1)  # compiles
    return partial(add_up, values, passes, again), again * values.nbytes


# The products ------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One of the big products over all images, shard by shard."""

    run: Callable[[], None]
    flop: int
    """Floating-point operations actually done."""
    intensity: float
    """Arithmetic intensity: these operations per byte of compulsory traffic. For each shard, operands are read once, in
    the form in which they are stored, and the result is written once."""


def products(backend: Backend, images: NDArray[np.uint8]) -> dict[str, Product]:
    """The forward product, x W1 + b1, and the backward product, x.T dz, of a backend."""
    rng = np.random.default_rng(0)
    weights, bias = MLP().layers[0]
    shards = [backend.prepare(images[rows]) for rows in shard_ranges(len(images), backend.images_at_once)]
    upstream = rng.standard_normal((max(map(len, shards)), len(bias)), np.float32)

    def forward() -> None:
        for x in shards:
            backend.matmul(x, weights, bias)

    def backward() -> None:
        for x in shards:
            backend.matmul(x.T, upstream[: len(x)])

    forward_bytes = backward_bytes = 0
    for x in shards:
        results = 4 * len(x) * len(bias)  # of the forward product; dz is as large
        forward_bytes += stored_bytes(x) + weights.nbytes + bias.nbytes + results
        backward_bytes += stored_bytes(x.T) + weights.nbytes + results
    multiplied = images.size if isinstance(shards[0], np.ndarray) else np.count_nonzero(images)
    flop = 2 * len(bias) * int(multiplied)
    return {
        "forward": Product(forward, flop, flop / forward_bytes),
        "backward": Product(backward, flop, flop / backward_bytes),
    }


def stored_bytes(x: Any) -> int:
    """Bytes of prepared images, or of their transpose, that a product reads."""
    return x.nbytes if isinstance(x, np.ndarray) else sum(array.nbytes for array in x.nonzeros)


@dataclass(frozen=True)
class Placed:
    """A product of a backend, over all images."""

    backend: str
    product: str
    flop: int
    intensity: float
    rounds: Rounds

    @property
    def rate(self) -> float:
        """GFLOP/s, counting the operations actually done."""
        return self.flop / self.rounds.median / 1e9


@dataclass(frozen=True)
class Result:
    """The study's record."""

    peak_gflop_per_second: float
    bandwidth_gb_per_second: dict[str, float]
    """By memory level."""
    dense_flop: int
    """FLOP of a product that skips nothing."""
    products: list[Placed]
    kind: Literal["roofline"] = "roofline"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time the peak, the bandwidths and each backend's big products, interleaved on one thread."""
    run_peak, peak_flop = peak(1)
    readers = {level: reader(level) for level in MEMORY}
    measured = {
        (name, which): product
        for name in track(full_batch_backends(), "preparing", transient=True)
        for which, product in products(get_backend(name), dataset.train_images).items()
    }
    competitors = {
        "peak": run_peak,
        **{level: run for level, (run, _) in readers.items()},
        **{f"{name}, {which}": product.run for (name, which), product in measured.items()},
    }
    count, pixels = dataset.train_images.shape
    with thread_pool(1):
        seconds = interleave(competitors, 3 if quick else 10)
    return Result(
        # These are bounds, so the best round counts.
        peak_gflop_per_second=float(peak_flop / seconds["peak"].min() / 1e9),
        bandwidth_gb_per_second={
            level: float(size / seconds[level].min() / 1e9) for level, (_, size) in readers.items()
        },
        dense_flop=product_flop(count, pixels, 128),
        products=[
            Placed(name, which, product.flop, product.intensity, Rounds.of(seconds[f"{name}, {which}"]))
            for (name, which), product in measured.items()
        ],
    )


APART = 1.15
"""Factor between marks of the same intensity, so that they do not hide each other."""


def draw(result: Result, small_print: str, file: Path) -> None:
    """GFLOP/s against arithmetic intensity, below the machine's roof."""
    top, bandwidths = result.peak_gflop_per_second, result.bandwidth_gb_per_second
    # Start far enough left for the L1 cache's roof to show its slope, too.
    x = np.geomspace(0.06 * top / max(bandwidths.values()), 3 * max(row.intensity for row in result.products), 200)
    with figure_file(file, figsize=(8, 4.6)) as figure:
        axes = figure.subplots()
        lowest = 0.5 * x[0] * max(bandwidths.values())
        axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(lowest, 12 * top))
        axes.set(xlabel="arithmetic intensity (FLOP per byte of compulsory traffic)", ylabel="GFLOP/s, one thread")
        plain_ticks(axes.xaxis, axes.yaxis)
        for level, bandwidth in bandwidths.items():
            axes.plot(x, np.minimum(top, bandwidth * x), color=BOUND_COLOUR, linewidth=1.2)
            along: Any = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
            start = max(1.3 * x[0], 1.6 * lowest / bandwidth)
            if level == "L2":  # L1's roof is close above
                note(axes, f"L2: {short(bandwidth)} GB/s", (start, start * bandwidth), -7, va="top", **along)
            else:
                note(axes, f"{level}: {short(bandwidth)} GB/s", (start, start * bandwidth), 3, **along)
        beside = 1.2 * top / max(bandwidths.values())  # left of the products
        note(axes, f"peak FMA throughput: {short(top)}", (beside, top), 5)
        ends: list[tuple[str, float, float, str]] = []
        for product in result.products:
            alike = [each for each in result.products if each.flop == product.flop]
            shift = APART ** (alike.index(product) - (len(alike) - 1) / 2)
            _draw_product(axes, product, shift * product.intensity, result.dense_flop, ends)
        end_labels(axes, [(text, x[-1], rate, shade) for text, _, rate, shade in ends])
        title(figure, _title(result))
        marks = "Circles: forward products. Squares: backward. Moved sideways where they would overlap. "
        print_small(figure, f"{marks}Arrows: to the rate if zeros are counted.\n{small_print}")


def _draw_product(axes: Axes, product: Placed, x: float, dense_flop: int, ends: list) -> None:
    """A point at intensity `x`; its label goes right of the axes, where no line runs.

    If zeros were skipped, an arrow leads to the rate at which dense arithmetic would have to run to take as long.
    """
    shade = colour(product.backend)
    rate, rounds = product.rate, product.rounds
    low, high = (product.flop / seconds / 1e9 for seconds in (rounds.high, rounds.low))
    axes.plot([x, x], [low, high], color="black", linewidth=1.2)
    axes.plot(x, rate, "o" if product.product == "forward" else "s", color=shade, markersize=5, markerfacecolor="white")
    sparse = product.flop < dense_flop
    ends.append((f"{product.backend} {product.product}: {short(rate)}", x, rate, shade))
    if sparse:
        equivalent = dense_flop / rounds.median / 1e9
        arrow = {"arrowstyle": "->", "color": shade, "linewidth": 1.2, "shrinkA": 5, "shrinkB": 0}
        axes.annotate("", (x, equivalent), (x, rate), arrowprops=arrow)
        ends.append((f"{product.product}, zeros counted: {short(equivalent)}", x, equivalent, shade))


def _title(result: Result) -> str:
    words = []
    for name in dict.fromkeys(product.backend for product in result.products):
        both = [product for product in result.products if product.backend == name]
        seconds, flop = sum(product.rounds.median for product in both), sum(product.flop for product in both)
        share = 100 * flop / seconds / 1e9 / result.peak_gflop_per_second
        on_non_zeros = " on non-zeros" if flop < 2 * result.dense_flop else ""
        words.append(f"{name} {share:.0f}\N{NO-BREAK SPACE}%{on_non_zeros}")
    peak = f"{result.peak_gflop_per_second:.0f} GFLOP/s"
    return f"Both products on one thread, relative to the peak of {peak}: {', '.join(words)}"
