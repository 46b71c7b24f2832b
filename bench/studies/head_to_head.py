"""Study: a full-batch step on every compiled backend and in other packages, and its big products on OpenBLAS."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.measure.interleave import interleave
from bench.measure.records import Comparison
from bench.peers import COMPETITORS, REST, Form, best_form, expected_parameters
from bench.peers.c_csr import COMMAND
from bench.peers.ours import compile_seconds
from bench.peers.task import Competitor, Task, UnavailableError
from bench.publish.style import beside_numpy, colour, in_seconds, label, over_runs, right_labels
from bench.studies.epochs import BIG_PRODUCTS, big_products
from kernels import backend_names
from model.data import Dataset
from model.extras.figure import BOUND_COLOUR, figure_file, print_small, title
from model.mlp import MLP
from model.threads import available_cores, thread_pool

LEARNING_RATE = 0.3


@dataclass(frozen=True)
class Result:
    """The study's record."""

    categories: dict[str, list[str]]
    """Competitors that were timed, by category: dense, sparse, bfloat16."""
    steps: Comparison
    """Seconds of a step of each, in its fastest form, and of the big products alone."""
    tried: dict[str, dict[str, Form]] = field(default_factory=dict)
    """Measurements of each form of a competitor."""
    chosen: dict[str, str] = field(default_factory=dict)
    """The form that was timed, by competitor."""
    compile_seconds: dict[str, float | None] = field(default_factory=dict)
    """By competitor; None if it compiles nothing."""
    c_command: str = ""
    """How the C code was compiled."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a competitor was not timed."""
    kind: Literal["head_to_head"] = "head_to_head"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Verify every form of every competitor, then time steps of the fastest forms, interleaved.

    This takes two to three minutes, half of them for torch.compile's compilations.
    """
    threads = available_cores()
    competitors: dict[str, Competitor] = {}
    tried: dict[str, dict[str, Form]] = {}
    chosen, skipped = {}, {}
    with thread_pool(threads) as parallel_map:
        task = Task(MLP(), dataset.train_images, dataset.train_labels, LEARNING_RATE, threads, parallel_map)
        expected = expected_parameters(task)
        for name in [name for names in COMPETITORS.values() for name in names]:
            try:
                competitors[name], chosen[name], tried[name] = best_form(name, task, expected)
            except UnavailableError as reason:
                skipped[name] = str(reason)
        steps: dict[str, Callable[[], Any]] = {name: competitor.step for name, competitor in competitors.items()}
        competing = {**steps, BIG_PRODUCTS: big_products(dataset, threads)}
        seconds = interleave(competing, 2 if quick else 12, rest=REST, warmup=0, steps=2)
    ours = {name: compile_seconds(name, dataset.train_images, dataset.train_labels) for name in ("numba", "sparse")}
    return Result(
        categories={category: [name for name in names if name in seconds] for category, names in COMPETITORS.items()},
        steps=Comparison.of("a full-batch step", seconds),
        tried=tried,
        chosen=chosen,
        compile_seconds={**{name: tried[name][form].compile_seconds for name, form in chosen.items()}, **ours},
        c_command=COMMAND,
        skipped=skipped,
    )


def draw(runs: list[Result], small_print: str, file: Path) -> None:
    """Seconds per step of each competitor, dense ones above sparse ones, and of the big products."""
    result = runs[-1]
    words = {
        "dense": "dense: every pixel is multiplied",
        "sparse": "sparse: only non-zero pixels are multiplied",
        "bfloat16": f"dense in bfloat16: another category, {_inexact(result)}",
    }
    rows: dict[str, float] = {}
    every = {name: over_runs([run.steps for run in runs], name) for name in result.steps.seconds}
    products = every[BIG_PRODUCTS].median
    y = 0.0
    with figure_file(file, figsize=(8, 5)) as figure:
        axes = figure.subplots()
        for category in [category for category, names in result.categories.items() if names]:
            label(axes, words[category], 0, y)
            first = y + 0.5
            for name in sorted(result.categories[category], key=lambda name: every[name].median, reverse=True):
                y += 1
                rows[name] = y
                times = every[name]
                axes.barh(y, times.median, color=colour(name), height=0.75)
                axes.plot([times.low, times.high], [y, y], color="black", linewidth=1.5)
            if category == "dense":
                axes.vlines(products, first, y + 0.5, color=BOUND_COLOUR, linestyle="--", linewidth=1)
                text = f"dashed: the two big products alone, on OpenBLAS, {in_seconds(products)}"
                axes.text(products, y + 0.8, text, va="center", fontsize=7.5, color=BOUND_COLOUR)
            y += 1.6
        axes.set(yticks=list(rows.values()), ylim=(y - 0.9, -0.6), xlabel="seconds per step over all images")
        for name, tick in zip(rows, axes.set_yticklabels(rows)):
            tick.set_fontweight("bold" if name in backend_names() else "normal")
        axes.set_xlim(0, 1.05 * max(times.high for times in every.values()))
        right_labels(axes, [in_seconds(every[name].median) for name in rows], places=list(rows.values()))
        title(figure, _title(runs))
        print_small(figure, small_print)


def _title(runs: list[Result]) -> str:
    """The range over the runs of the backends' times and of the fastest dense package's, relative to NumPy's."""
    steps = [run.steps for run in runs]
    ours = [name for name in backend_names() if name in steps[-1]]
    packages = [name for name in runs[-1].categories["dense"] if name not in ours]
    return f"A full-batch step, {beside_numpy(steps, ours, packages)}"


def _inexact(result: Result) -> str:
    """The error of the updates in bfloat16 against float64, in words."""
    names = result.categories.get("bfloat16", ())
    errors = [form.error for name in names for form in result.tried.get(name, {}).values()]
    return f"updates off by {max(filter(None, errors)):.1e} of their norm" if any(errors) else "less exact"
