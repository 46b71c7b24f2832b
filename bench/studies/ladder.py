"""Study: each step of the ladder beside OpenBLAS, interleaved, on one thread and on all."""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from threadpoolctl import threadpool_limits

from bench.measure.interleave import interleave
from bench.measure.machine import blas_threads
from bench.measure.records import Comparison
from bench.publish.style import Span, over_runs, plain_ticks, right_labels, short
from bench.studies import product_flop
from bench.studies.roofline import peak
from kernels import naive_backend, numba_backend, simd
from kernels.ladder import steps
from kernels.ladder.steps import STEPS, in_threads
from kernels.ladder.timing import operands
from kernels.simd import aligned_empty
from model.data import Dataset
from model.extras.figure import OTHER_COLOURS, figure_file, print_small, title

SHAPES = {"MLP": (12_000, 784, 128), "1024³": (1024, 1024, 1024)}
QUICK_ROWS = {"MLP": 2048, "1024³": 512}
BLAS = "OpenBLAS"


@dataclass(frozen=True)
class Climb:
    """The steps on one product, with a number of threads."""

    product: str
    threads: int
    seconds_per_gflop: Comparison
    """Of each step and of OpenBLAS. Slow steps compute only part of the rows."""
    peak_gflop_per_second: float
    """Peak FMA throughput with the same number of threads: the bound."""

    @property
    def steps(self) -> list[str]:
        """Names, from the first step to the last."""
        return [name for name in self.seconds_per_gflop.seconds if name != BLAS]

    def rate(self, step: str) -> float:
        """GFLOP/s."""
        return 1 / self.seconds_per_gflop.median(step)

    def percent_of_blas(self, step: str) -> float:
        """Its speed relative to OpenBLAS's."""
        return 100 / self.seconds_per_gflop.ratio(step, BLAS).ratio


@dataclass(frozen=True)
class Result:
    """The study's record."""

    climbs: list[Climb]
    lines: dict[str, int]
    """Lines of code, by step."""
    kind: Literal["ladder"] = "ladder"

    def climb(self, product: str, threads: int) -> Climb:
        """The steps on `product` with `threads` threads."""
        return next(climb for climb in self.climbs if (climb.product, climb.threads) == (product, threads))


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time all steps on both products."""
    counts = blas_threads()
    climbs = [climb for threads in track(counts, "ladder", transient=True) for climb in climbs_on(threads, quick)]
    by_product = [climb for product in SHAPES for climb in climbs if climb.product == product]
    return Result(by_product, {step: lines_of_code(step) for step in STEPS})


Timed = tuple[Callable[[], Any], int]
"""A function, and the operations that it does."""


def climbs_on(threads: int, quick: bool) -> list[Climb]:
    """Time the steps on both products, all interleaved, as a step's rates on the two are compared as well."""
    timed = {product: verified_steps(product, threads, quick) for product in SHAPES}
    every: dict[str, Timed] = {"peak": peak(threads)}
    every |= {f"{product}, {name}": each for product, steps in timed.items() for name, each in steps.items()}
    with threadpool_limits(threads, user_api="blas"):
        seconds = interleave({name: run for name, (run, _) in every.items()}, 2 if quick else 6)
    per_gflop = {name: 1e9 * seconds[name] / flop for name, (_, flop) in every.items()}
    best = float(1 / per_gflop["peak"].min())  # a bound
    return [
        Climb(product, threads, Comparison.of("10⁹ operations", {n: per_gflop[f"{product}, {n}"] for n in steps}), best)
        for product, steps in timed.items()
    ]


def verified_steps(product: str, threads: int, quick: bool) -> dict[str, Timed]:
    """OpenBLAS and the steps on one product. Operands start on a cache line: alignment is not left to chance."""
    m, k, n = SHAPES[product]
    rng = np.random.default_rng(0)
    a, b = (aligned(rng.standard_normal(shape, np.float32)) for shape in ((m, k), (k, n)))
    a = a[: QUICK_ROWS[product]] if quick else a
    expected = a @ b
    blas = partial(np.matmul, a, b, np.empty_like(expected))
    timed: dict[str, Timed] = {BLAS: (blas, product_flop(len(a), *b.shape))}
    for step in STEPS:
        if (step == "threads") if threads == 1 else (step == "loops"):
            continue  # the last step starts threads itself; the GIL serializes Python loops
        arguments = operands(step, a, b)
        rows = len(arguments[0])
        on_all = threads > 1 and step != "threads"
        run = partial(in_threads, STEPS[step], *arguments, threads) if on_all else partial(STEPS[step], *arguments)
        run()
        tolerance = 10 * len(b) * float(np.finfo(np.float32).eps)
        np.testing.assert_allclose(arguments[2], expected[:rows], rtol=0, atol=tolerance)
        timed[step] = run, product_flop(rows, *b.shape)
    return timed


def aligned(values: NDArray) -> NDArray:
    """A copy that starts on a cache line."""
    rows, columns = values.shape
    out = aligned_empty(rows, columns, values.dtype.type(0))
    out[:] = values
    return out


def draw(runs: list[Result], small_print: str, file: Path) -> None:
    """The rate of each step on one thread and on all, with OpenBLAS's and the peak."""
    result = runs[-1]
    products = list(dict.fromkeys(climb.product for climb in result.climbs))
    looks = {False: (OTHER_COLOURS[1], "o", "1 thread"), True: (OTHER_COLOURS[0], "D", "all threads")}
    steps = list(result.lines)
    with figure_file(file, figsize=(8, 4.6)) as figure:
        panels = figure.subplots(1, len(products), sharex=True, sharey=True, squeeze=False)[0]
        for climb in result.climbs:
            axes = panels[products.index(climb.product)]
            shade, marker, words = looks[climb.threads > 1]
            times = _over_runs(runs, climb)
            for step in climb.steps:
                row = steps.index(step)
                axes.plot([1 / times[step].high, 1 / times[step].low], [row, row], color="black", linewidth=1, zorder=6)
                axes.plot(1 / times[step].median, row, marker, color=shade, markersize=5, zorder=4)
            axes.plot([], [], marker, color=shade, label=f"step, {words}")
            axes.axvline(1 / times[BLAS].median, color=shade, linestyle="--", linewidth=1, label=f"OpenBLAS, {words}")
            peak = max(run.climb(climb.product, climb.threads).peak_gflop_per_second for run in runs)  # a bound
            axes.axvline(peak, color=shade, linewidth=1, label=f"peak, {words}")
        for axes, product in zip(panels, products):
            here = [_over_runs(runs, climb) for climb in result.climbs if climb.product == product]
            rates = {step: [1 / times[step].median for times in here if step in times] for step in steps}
            axes.set(xscale="log", xlabel=f"GFLOP/s at {product} (log scale)")
            axes.set(yticks=range(len(steps)), ylim=(len(steps) - 0.5, -0.5), yticklabels=steps)
            plain_ticks(axes.xaxis)
            right_labels(axes, [" / ".join(map(short, rates[step])) for step in steps], fontsize=7)
        panels[0].legend(loc="lower left", frameon=False, fontsize=7)
        title(figure, _title(runs))
        print_small(figure, f"Right of each panel: GFLOP/s on one thread / on all.\n{small_print}")


def _title(runs: list[Result]) -> str:
    """The rates of the first and the last step on one thread, and OpenBLAS's, at the first product."""
    climb = runs[-1].climbs[0]
    times = _over_runs(runs, climb)
    first, last, blas = (short(1 / times[name].median) for name in (climb.steps[0], climb.steps[-1], BLAS))
    words = "on one thread" if climb.threads == 1 else f"on {climb.threads} threads"
    bounds = f"{first} GFLOP/s in {climb.steps[0]}, {last} in {climb.steps[-1]}, {blas} in {BLAS}"
    return f"{climb.product} product {words}: {bounds}"


def _over_runs(runs: list[Result], climb: Climb) -> dict[str, Span]:
    """Seconds per 10⁹ operations of each step of a climb and of OpenBLAS, over the runs."""
    every = [run.climb(climb.product, climb.threads).seconds_per_gflop for run in runs]
    return {name: over_runs(every, name) for name in climb.seconds_per_gflop.seconds}


# Lines of code -----------------------------------------------------------------------------------------------------

Place = tuple[str, str]


def lines_of_code(step: str) -> int:
    """Lines of code in kernels/ that a step runs, not counting comments, docstrings and blank lines."""
    code = map(ast.unparse, set(reached((steps.__name__, step), {}).values()))
    return sum(bool(line.strip()) for text in code for line in text.splitlines())


def reached(place: Place, seen: dict[Place, ast.AST]) -> dict[Place, ast.AST]:
    """The definition at `place`, and those that it uses, recursively, but not those of the compiler."""
    definition = _definitions().get(place)
    if isinstance(definition, tuple):
        reached(definition, seen)
    elif definition and place not in seen:
        seen[place] = definition
        for node in ast.walk(definition):
            if isinstance(node, ast.Name):
                reached((place[0], node.id), seen)
            elif isinstance(node, ast.Attribute):
                reached((simd.__name__, f".{node.attr}"), seen)  # only methods of its classes are called this way
    return seen


@functools.cache
def _definitions() -> dict[Place, ast.AST | Place]:
    """Functions, constants and methods (``.name``) by module and name; for imported names, where they come from."""
    defined: dict[Place, ast.AST | Place] = {}
    for module in (steps, naive_backend, numba_backend, simd):
        for scope in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(scope, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(scope) is not None:
                scope.body = scope.body[1:]
            if isinstance(scope, ast.Module | ast.ClassDef):
                for statement in scope.body:
                    defined |= {(module.__name__, name): each for name, each in _named(scope, statement).items()}
    return defined


def _named(scope: ast.Module | ast.ClassDef, statement: ast.stmt) -> Mapping[str, ast.AST | Place]:
    """The names that a statement of a module or class defines; ``__init__`` goes by the name of its class."""
    if isinstance(statement, ast.FunctionDef):
        if isinstance(scope, ast.Module):
            return {statement.name: statement}
        return {scope.name if statement.name == "__init__" else f".{statement.name}": statement}
    if isinstance(statement, ast.Assign):
        return {node.id: statement for node in ast.walk(statement.targets[0]) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name: (str(statement.module), alias.name) for alias in statement.names}
    return {}
