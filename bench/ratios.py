"""Who is faster, by how much: competitors in turn, round by round, so that a drifting machine hits all alike.

``python -m bench.ratios`` prints the table and writes ``ratios.json`` into the folder of ``--output``. The benchmarks
of pytest-benchmark run each test as a block, which is good for tables and no basis for ratios.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap
from threadpoolctl import threadpool_limits

from kernels import backend_names, get_backend
from model.data import Dataset, load_dataset
from model.mlp import MLP
from model.report import environment, write_json
from model.trainer import Shards, available_cores, descend, thread_pool

# Left operand, right operand; the big ones are x W1 and x.T dz over all images, and the same over one chunk.
PRODUCTS = {
    "(60000×784)(784×128)": ((60_000, 784), (784, 128), False),
    "(784×60000)(60000×128)": ((60_000, 784), (60_000, 128), True),
    "(512×784)(784×128)": ((512, 784), (784, 128), False),
    "(784×512)(512×128)": ((512, 784), (512, 128), True),
    "1024³": ((1024, 1024), (1024, 1024), False),
}


class Ratio(NamedTuple):
    """How the time of a competitor relates to that of the base, with a 95 % confidence interval."""

    what: str
    competitor: str
    base: str
    seconds: float
    base_seconds: float
    ratio: float
    low: float
    high: float


def interleave(competitors: dict[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Seconds of each competitor in each round; a round runs every one of them once, in random order.

    Parameters
    ----------
    competitors
        By name, functions without arguments.
    rounds
        Number of rounds; two more, before them, fill caches and compile.
    seed
        Seed of the order.

    Returns
    -------
    dict[str, ndarray]
        By name, (rounds,) seconds; entries of one round belong together.
    """
    rng = np.random.default_rng(seed)
    seconds = {name: np.empty(rounds) for name in competitors}
    for round_ in range(-2, rounds):
        for name in rng.permutation(list(competitors)):
            start = time.perf_counter()
            competitors[name]()
            if round_ >= 0:
                seconds[name][round_] = time.perf_counter() - start
    return seconds


def ratios(what: str, seconds: dict[str, NDArray[np.float64]], base: str) -> list[Ratio]:
    """Ratios of the median seconds of each competitor to those of `base`; rounds are resampled as wholes."""

    def ratio_of_medians(ours: NDArray, theirs: NDArray, axis: int = -1) -> NDArray:
        return np.median(ours, axis=axis) / np.median(theirs, axis=axis)

    found = []
    for name in seconds:
        if name != base:
            interval = bootstrap(
                (seconds[name], seconds[base]),
                ratio_of_medians,
                paired=True,
                n_resamples=2000,
                method="percentile",
                rng=0,
            ).confidence_interval
            medians = float(np.median(seconds[name])), float(np.median(seconds[base]))
            found.append(Ratio(what, name, base, *medians, medians[0] / medians[1], interval.low, interval.high))
    return found


def product_ratios(rounds: int) -> list[Ratio]:
    """The numba backend's products against OpenBLAS's, on one thread and, rows split over plain threads, on all."""
    found = []
    for shape, (left, right, transposed) in track(PRODUCTS.items(), "products", transient=True):
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal(left, np.float32), rng.standard_normal(right, np.float32)
        a = a.T if transposed else a
        for threads in sorted({1, available_cores()}):
            with ThreadPoolExecutor(threads) as pool, threadpool_limits(threads, user_api="blas"):
                ours = _split_product(a, b, threads, pool)
                np.testing.assert_allclose(np.concatenate(ours()), a @ b, rtol=0, atol=1e-5 * a.shape[1])
                competitors: dict[str, Callable[[], Any]] = {"numba": ours, "OpenBLAS": partial(np.matmul, a, b)}
                seconds = interleave(competitors, rounds if a.size > 1e7 else 20 * rounds)
                found += ratios(f"{shape}, {threads} thread{'s' * (threads > 1)}", seconds, "OpenBLAS")
    return found


def _split_product(a: NDArray, b: NDArray, threads: int, pool: ThreadPoolExecutor) -> Callable[[], list[NDArray]]:
    """A function that computes A B by the numba backend, the rows of A split over the caller and the `pool`."""
    numba = get_backend("numba")
    first, *others = np.array_split(a, threads)

    def product() -> list[NDArray]:
        futures = [pool.submit(numba.matmul, part, b) for part in others]
        return [numba.matmul(first, b), *(future.result() for future in futures)]

    return product


def epoch_ratios(dataset: Dataset, rounds: int) -> list[Ratio]:
    """An epoch on every compiled backend against NumPy's, and the two big products alone on OpenBLAS."""
    threads = available_cores()
    with thread_pool(threads) as run:
        mlps: dict[str, MLP] = {}
        competitors: dict[str, Callable[[], Any]] = {}
        for name in [name for name in backend_names() if name != "naive"]:
            mlp = mlps[name] = MLP()
            shards = Shards(run, get_backend(name), dataset.train_images, dataset.train_labels, mlp.dtype)
            competitors[name] = partial(descend, mlp, shards, 0.3)
        x = get_backend("numpy").prepare(dataset.train_images)
        weights, upstream = mlps["numpy"].layers[0][0].copy(), np.ones((len(x), 128), np.float32)

        def big_products() -> None:
            with threadpool_limits(threads, user_api="blas"):
                x @ weights
                x.T @ upstream

        seconds = interleave({**competitors, "big products, OpenBLAS": big_products}, rounds)
    for mlp in mlps.values():
        for ours, theirs in zip(mlp.parameters, mlps["numpy"].parameters):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    return ratios("epoch", seconds, "numpy") + [
        ratio for ratio in ratios("epoch", seconds, "big products, OpenBLAS") if ratio.competitor != "numpy"
    ]


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the long measurements; short ones get more.")] = 30,
    dataset: Annotated[str, typer.Option(help="mnist, digits28 or auto.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for ratios.json.")] = Path("bench/output"),
) -> None:
    """Measure the published ratios."""
    output.mkdir(parents=True, exist_ok=True)
    images = load_dataset(dataset)
    found = epoch_ratios(images, rounds) + product_ratios(rounds)
    table = Table(
        "what", "competitor", "base", "seconds", "base seconds", "ratio of times", "95 % interval", box=SIMPLE
    )
    for row in found:
        interval = f"{row.low:.3f} to {row.high:.3f}"
        times = f"{row.seconds:.5f}", f"{row.base_seconds:.5f}", f"{row.ratio:.3f}"
        table.add_row(row.what, row.competitor, row.base, *times, interval)
    Console().print(table)
    content = {"environment": environment(), "dataset": images.name, "ratios": [row._asdict() for row in found]}
    write_json(output / "ratios.json", content)


if __name__ == "__main__":
    typer.run(main)
