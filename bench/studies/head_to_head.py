"""Study: the same full-batch step on every compiled backend, in other packages, and its big products on OpenBLAS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from bench.measure.interleave import Ratio, interleave, ratio, summary
from bench.peers import COMPETITORS, REST, Form, best_form, expected_parameters
from bench.peers.c_csr import COMMAND
from bench.peers.ours import compile_seconds
from bench.peers.pytorch import mkl_code_path
from bench.peers.task import Competitor, Task, UnavailableError
from bench.publish.style import bound, in_seconds, label
from kernels import backend_names, get_backend
from model.data import Dataset
from model.extras.figure import colour, figure_file, print_small, title
from model.mlp import MLP
from model.threads import available_cores, thread_pool

LEARNING_RATE = 0.3
BIG_PRODUCTS = "big products, OpenBLAS"
FRAMEWORKS = ("PyTorch", "PyTorch by hand", "torch.compile", "JAX", "scikit-learn")


def measure(dataset: Dataset, quick: bool) -> dict[str, Any]:
    """Seconds of a step, by category and competitor; ratios; forms tried and chosen; who was skipped and why.

    About 100 seconds, half of them torch.compile's compilations; quick: 45.
    """
    threads = available_cores()
    competitors: dict[str, Competitor] = {}
    forms: dict[str, dict[str, Form]] = {}
    chosen, skipped = {}, {}
    with thread_pool(threads) as run:
        task = Task(MLP(), dataset.train_images, dataset.train_labels, LEARNING_RATE, threads, run)
        expected = expected_parameters(task)
        for name in [name for names in COMPETITORS.values() for name in names]:
            try:
                competitors[name], chosen[name], forms[name] = best_form(name, task, expected)
            except UnavailableError as reason:
                skipped[name] = str(reason)
        steps: dict[str, Callable[[], Any]] = {name: competitor.step for name, competitor in competitors.items()}
        competing = {**steps, BIG_PRODUCTS: _big_products(task)}
        seconds = interleave(competing, 2 if quick else 8, rest=REST, warmup=0, steps=2)
    categories = {form: [name for name in names if name in seconds] for form, names in COMPETITORS.items()}
    dense = [*categories["dense"], BIG_PRODUCTS]
    return {
        "seconds": {
            form: {name: list(summary(seconds[name]).values()) for name in names}
            for form, names in {**categories, "bound": [BIG_PRODUCTS]}.items()
        },
        "compile_seconds": {
            **{name: forms[name][form].compile_seconds for name, form in chosen.items()},
            **{name: compile_seconds(name, dataset.train_images, dataset.train_labels) for name in ("numba", "sparse")},
        },
        "forms": {name: {form: tried._asdict() for form, tried in forms[name].items()} for name in forms},
        "chosen": chosen,
        "mkl": mkl_code_path(),
        "c_compiler": COMMAND,
        "ratios": [
            *_ratios("dense against dense", seconds, "numba", dense),
            *_ratios("sparse against sparse", seconds, "sparse", categories["sparse"]),
            *_ratios("sparse against dense", seconds, "sparse", dense),
            *_ratios("sparse against bfloat16", seconds, "sparse", categories["bfloat16"]),
        ],
        "skipped": skipped,
    }


def _big_products(task: Task) -> Callable[[], None]:
    """The two products with the images, on BLAS's own threads: what no dense step can undercut by much."""
    x = get_backend("numpy").prepare(task.images)
    weights, _ = task.mlp.layers[0]
    upstream = np.ones((len(x), weights.shape[1]), np.float32)
    blas = ThreadpoolController()

    def products() -> None:
        with blas.limit(limits=task.threads, user_api="blas"):
            x @ weights
            x.T @ upstream

    return products


def _ratios(what: str, seconds: dict[str, np.ndarray], name: str, others: list[str]) -> list[Ratio]:
    return [ratio(what, seconds, name, other) for other in others if other != name]


def against_fastest_framework(found: dict[str, Any]) -> Ratio | None:
    """The ratio of sparse to the fastest of `FRAMEWORKS`; None where none of them is installed."""
    rows = [row for row in found["ratios"] if row["competitor"] == "sparse" and row["base"] in FRAMEWORKS]
    return min(rows, key=lambda row: row["base_seconds"], default=None)


def draw(found: dict[str, Any], small_print: str, file: Path) -> None:
    """Seconds of a step of each competitor, the dense ones above the sparse ones, and the bound of dense ones."""
    words = {
        "dense": "dense: every pixel is multiplied",
        "sparse": "sparse: only what is not zero is multiplied",
        "bfloat16": "dense in bfloat16: less exact",
    }
    rows: dict[str, float] = {}
    y = 0.0
    with figure_file(file, figsize=(8, 5)) as figure:
        axes = figure.subplots()
        for form in [form for form in COMPETITORS if found["seconds"].get(form)]:
            label(axes, words[form], 0, y)
            for name, (median, low, high) in sorted(found["seconds"][form].items(), key=lambda item: -item[1][0]):
                y += 1
                rows[name] = y
                axes.barh(y, median, color=colour(name), height=0.75)
                axes.plot([low, high], [y, y], color="black", linewidth=1.5)
                label(axes, in_seconds(median), high, y)
            y += 1.3
        axes.set(yticks=list(rows.values()), ylim=(y - 0.7, -1.2), xlabel="seconds per step over all images")
        for name, tick in zip(rows, axes.set_yticklabels(rows)):
            tick.set_fontweight("bold" if name in backend_names() else "normal")
        axes.set_xlim(0, 1.15 * max(high for times in found["seconds"].values() for _, _, high in times.values()))
        products, *_ = found["seconds"]["bound"][BIG_PRODUCTS]
        bound(axes, products, f"the two big products alone, on OpenBLAS: {in_seconds(products)}", -0.8)
        title(figure, _title(found))
        print_small(figure, small_print)


def _title(found: dict[str, Any]) -> str:
    fastest = against_fastest_framework(found)
    against = fastest or next(
        row for row in found["ratios"] if row["competitor"] == "sparse" and row["base"] == "numpy"
    )
    name = f"the fastest framework, {against['base']}" if fastest else "numpy"
    interval = f"{against['low']:.2f} to {against['high']:.2f}"
    return f"A step of sparse takes {against['ratio']:.2f} of the time of {name} ({interval})"
