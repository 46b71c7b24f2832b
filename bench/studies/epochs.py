"""Study: a full-batch step on every backend, and the two big products on OpenBLAS, interleaved on all threads.

Pure Python takes only a few images, and its time is scaled up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from bench.measure.interleave import interleave
from bench.measure.records import Comparison
from bench.publish.style import (
    beside_numpy,
    bound,
    colour,
    in_seconds,
    ordered,
    over_runs,
    plain_ticks,
    right_labels,
    short_name,
)
from kernels import backend_names, get_backend
from kernels.backend import Backend
from model.data import Dataset, limited
from model.extras.figure import figure_file, print_small, title
from model.mlp import MLP
from model.shards import Shards
from model.threads import available_cores, thread_pool
from model.training import descend

LEARNING_RATE = 0.3
FEW_IMAGES = 32
"""Number of images that pure Python gets in a round."""

BIG_PRODUCTS = "big products, OpenBLAS"


@dataclass(frozen=True)
class Result:
    """The study's record."""

    epochs: Comparison
    """Seconds per epoch of each backend, and of the big products if they were measured."""
    images: int
    extrapolated: dict[str, int]
    """Number of images from which a backend's seconds were scaled up; other backends took all images."""
    threads: int
    kind: Literal["epochs"] = "epochs"


def measure(dataset: Dataset, quick: bool, names: Sequence[str] | None = None) -> Result:
    """Time steps on the backends `names`, by default all."""
    threads, whole = available_cores(), len(dataset.train_images)
    chosen = {name: get_backend(name) for name in names or backend_names()}
    parts = {name: few(dataset, backend) for name, backend in chosen.items()}
    with thread_pool(threads) as parallel_map:
        for backend in chosen.values():
            check(parallel_map, backend, dataset)
        steps: dict[str, Callable[[], Any]] = {}
        for name, backend in chosen.items():
            part, mlp = parts[name], MLP()
            shards = Shards(parallel_map, backend, part.train_images, part.train_labels, mlp.dtype)
            steps[name] = partial(descend, mlp, backend, shards, LEARNING_RATE)
        steps[BIG_PRODUCTS] = big_products(dataset, threads)
        seconds = interleave(steps, 3 if quick else 12, rest=0.03)
    scales = {name: whole / len(part.train_images) for name, part in parts.items()}
    return Result(
        epochs=Comparison.of("an epoch", {name: times * scales.get(name, 1) for name, times in seconds.items()}),
        images=whole,
        extrapolated={name: len(parts[name].train_images) for name in parts if scales[name] > 1},
        threads=threads,
    )


def few(dataset: Dataset, backend: Backend) -> Dataset:
    """The images for a backend's step: a few for pure Python, all for the others."""
    return limited(dataset, FEW_IMAGES) if backend.too_slow_for_full_batches else dataset


def check(parallel_map: Callable, backend: Backend, dataset: Dataset) -> None:
    """Raise an AssertionError unless a step over a few images gives the parameters that the NumPy backend does."""
    start, networks = limited(dataset, FEW_IMAGES), [MLP(), MLP()]
    for mlp, kernels in zip(networks, (backend, get_backend("numpy"))):
        descend(
            mlp,
            kernels,
            Shards(parallel_map, kernels, start.train_images, start.train_labels, mlp.dtype),
            LEARNING_RATE,
        )
    for ours, theirs in zip(*(mlp.parameters for mlp in networks)):
        # A step changes a parameter by at most 0.03, with the rounding errors of sums over 784 products.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.03 * 784 * float(np.finfo(np.float32).eps))


def big_products(dataset: Dataset, threads: int) -> Callable[[], None]:
    """The two products with the images, on BLAS's own threads: a reference, but not a bound."""
    x = get_backend("numpy").prepare(dataset.train_images)
    weights, _ = MLP().layers[0]
    upstream = np.ones((len(x), weights.shape[1]), np.float32)
    blas = ThreadpoolController()

    def products() -> None:
        with blas.limit(limits=threads, user_api="blas"):
            x @ weights
            x.T @ upstream

    return products


IDEAS = {
    "naive": "Python loops",
    "numpy": "whole arrays, products by BLAS",
    "numba": "tiles in vector registers",
    "sparse": "the same, skipping zeros",
}


def draw(runs: list[Result], small_print: str, file: Path) -> None:
    """Seconds per epoch, one bar per backend in the study's order, with the idea behind each."""
    result, epochs = runs[-1], [run.epochs for run in runs]
    times = {name: over_runs(epochs, name) for name in result.epochs.seconds}
    names = ordered(name for name in times if name != BIG_PRODUCTS)
    with figure_file(file, figsize=(8, 1.9 + 0.45 * len(names))) as figure:
        axes = figure.subplots()
        texts = []
        for row, name in enumerate(names):
            hatch = "//" if name in result.extrapolated else None
            axes.barh(row, times[name].median, color=colour(name), hatch=hatch, edgecolor="white")
            axes.plot([times[name].low, times[name].high], [row, row], color="black", linewidth=1.5)
            notes = [IDEAS.get(name)]
            if name in result.extrapolated:
                notes.append(f"scaled up from {result.extrapolated[name]} images")
            texts.append(f"{in_seconds(times[name].median)}   {', '.join(filter(None, notes))}")
        medians = [times[name].median for name in names]
        references = [times[BIG_PRODUCTS].median] if BIG_PRODUCTS in times else []
        axes.set(xscale="log", xlabel="seconds per epoch (log scale)", yticks=range(len(names)))
        axes.set(ylim=(len(names) - 0.4, -1.3), yticklabels=[short_name(name) for name in names])
        axes.set_xlim(min([*medians, *references]) / 3, max([*medians, *references]) * 3)
        plain_ticks(axes.xaxis)
        right_labels(axes, texts)
        for reference in references:
            bound(axes, reference, f"the two big products alone, on OpenBLAS: {in_seconds(reference)}", -0.95)
        title(figure, _title(runs, names))
        print_small(figure, small_print)


def _title(runs: list[Result], names: list[str]) -> str:
    """The range over the runs of each backend's time relative to NumPy's."""
    what = f"An epoch of {runs[-1].images:,} images"
    return f"{what}, {beside_numpy([run.epochs for run in runs], names)}" if len(names) > 1 else what
