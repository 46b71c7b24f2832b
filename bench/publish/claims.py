"""What the study claims, and on which machines each claim holds: the only place where "faster" is decided."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.measure.records import Comparison, Ratio, Run, Section
from bench.publish.folder import Folder
from bench.publish.style import in_seconds, low_to_high, short
from bench.studies import product_flop, products
from bench.studies.epochs import BIG_PRODUCTS
from bench.studies.mini_batches import PACKAGES
from bench.studies.products import MKL, ONEDNN, OPENBLAS
from model.extras.figure import BOUND_COLOUR, OTHER_COLOURS, figure_file, print_small, title

FRAMEWORKS = (*PACKAGES, "scikit-learn")
FASTEST = "the fastest framework"

MAIN, BATCHES, PRODUCTS = "claims", "batch-claims", "product-claims"
"""The tables that claims stand in."""

Measured = tuple[Section, Comparison]
Pick = Callable[[Run], Measured | None]
Bound = Callable[[Folder], float | None]
"""Seconds at a machine's peak FMA throughput; None if that was not measured."""


@dataclass(frozen=True)
class Claim:
    """That a competitor takes less time than its base."""

    key: str
    competitor: str
    base: str
    """A competitor, or `FASTEST`: the framework that is the fastest on the machine."""
    what: str
    pick: Pick
    """Selects the comparison in a run that decides the claim, with its section."""
    at_peak: Bound = lambda folder: None
    """Lower bound of the competitor's seconds: its multiply-adds at peak throughput."""
    table: str = MAIN
    ranges: bool = False
    """Whether the ranges of the two decide instead of their medians: if they overlap, neither wins."""

    def ratio(self, run: Run) -> Ratio | None:
        """The ratio that a run measured; None if it did not."""
        measured = self.pick(run)
        if measured is None or self.competitor not in measured[1]:
            return None
        comparison, base = measured[1], self.base
        if base == FASTEST:
            base = min((name for name in FRAMEWORKS if name in comparison), key=comparison.median, default=base)
        if base not in comparison:
            return None
        ratio = comparison.ratio(self.competitor, base)
        if not self.ranges:
            return ratio
        ours, theirs = comparison.seconds[self.competitor], comparison.seconds[base]
        return replace(ratio, interval=(min(ours) / max(theirs), max(ours) / min(theirs)))

    def busy(self, run: Run) -> bool:
        """Whether the machine was busy with something else during the measurement."""
        measured = self.pick(run)
        return bool(measured and measured[0].conditions.busy)


@dataclass(frozen=True)
class Cell:
    """The evidence of a machine's runs for a claim."""

    ratios: list[Ratio]
    busy: int
    """The number of runs during which the machine was busy with something else."""

    @property
    def low(self) -> float:
        """The smallest ratio."""
        return min(row.ratio for row in self.ratios)

    @property
    def high(self) -> float:
        """The largest."""
        return max(row.ratio for row in self.ratios)

    @property
    def span(self) -> str:
        """The smallest and the largest ratio, in words."""
        return low_to_high(two_digits(self.low), two_digits(self.high))

    @property
    def base_seconds(self) -> float:
        """Seconds of the base, the median of the runs."""
        return float(np.median([row.base_seconds for row in self.ratios]))

    @property
    def bases(self) -> str:
        """The base, which may differ from run to run."""
        return ", ".join(dict.fromkeys(row.base for row in self.ratios))

    @property
    def verdict(self) -> str:
        """The verdict of all runs; "undecided" if they disagree or an interval includes 1."""
        verdicts = {row.verdict for row in self.ratios}
        return verdicts.pop() if len(verdicts) == 1 and "equal" not in verdicts else "undecided"

    @property
    def holds(self) -> bool:
        """Whether every run says that the competitor takes less time."""
        return self.verdict == "faster"


def _found(run: Run, study: str, pick: Callable[[Any], Comparison | None]) -> Measured | None:
    """A comparison from a study's result, with its section; None if the run lacks one of them."""
    section = run.sections.get(study)
    comparison = pick(section.result) if section else None
    return (section, comparison) if section and comparison else None


def _epoch(run: Run) -> Measured | None:
    return _found(run, "epochs", lambda result: result.epochs)


def _step(run: Run) -> Measured | None:
    """A full-batch step, interleaved with the peers if the run has them, otherwise with the backends alone."""
    return _found(run, "head_to_head", lambda result: result.steps) or _epoch(run)


def _time_to(run: Run) -> Measured | None:
    return _found(run, "time_to_accuracy", lambda result: result.times)


def _command(run: Run) -> Measured | None:
    return _found(run, "break_even", lambda result: result.command)


def _product(start: str, one: bool) -> Pick:
    def pick(result: Any) -> Comparison | None:
        fits = (each for each in result.products if each.what.startswith(start))
        return next((each for each in fits if each.what.endswith(", 1 thread") == one), None)

    return lambda run: _found(run, "products", pick)


def _small_step(size: int) -> Pick:
    return lambda run: _found(run, "mini_batches", lambda result: result.steps.get(1, {}).get(size))


def _find_climb(result: Any, product: str, one: bool) -> Any:
    """The ladder's climb of a product on one thread or on all; None if it was not measured."""
    climbs = (climb for climb in result.climbs if (climb.product, climb.threads == 1) == (product, one))
    return next(climbs, None)


def _climb(product: str, one: bool = True) -> Pick:
    def pick(result: Any) -> Comparison | None:
        climb = _find_climb(result, product, one)
        return climb.seconds_per_gflop if climb else None

    return lambda run: _found(run, "ladder", pick)


def _peak(folder: Folder, one: bool) -> float | None:
    """Peak FLOP per second of one thread or of all."""
    if result := folder.result("roofline" if one else "scaling"):
        peak = result.peak_gflop_per_second
        return 1e9 * (peak if one else peak[result.threads])
    return None


def _product_bound(flop: float, one: bool) -> Bound:
    def seconds(folder: Folder) -> float | None:
        peak = _peak(folder, one)
        return flop / peak if peak else None

    return seconds


def _step_bound(backend: str, images: int | None = None) -> Bound:
    """Of the big products over all images on all threads, or over `images` on one; for sparse, of non-zeros only."""

    def seconds(folder: Folder) -> float | None:
        peak, result = _peak(folder, one=images is not None), folder.result("roofline")
        if not peak or not result:
            return None
        share = images * FLOP_OF_IMAGE / result.dense_flop if images else 1
        return share * sum(product.flop for product in result.products if product.backend == backend) / peak

    return seconds


def _climb_bound(product: str, one: bool) -> Bound:
    def seconds(folder: Folder) -> float | None:
        result = folder.result("ladder")
        climb = _find_climb(result, product, one) if result else None
        return 1 / climb.peak_gflop_per_second if climb else None

    return seconds


FLOP_OF_IMAGE = product_flop(1, 784, 128)
"""FLOP per image in one of the big products."""

PRODUCT_KEYS = ("forward", "backward", "shard-forward", "shard-backward", "1024")
"""Short names of the products in `bench.studies.products.PRODUCTS`, in order."""

STEP, TO_ACCURACY = "a full-batch step", "mini-batches to the published accuracy"
CLAIMS = (
    Claim("numpy-naive", "numpy", "naive", STEP, _epoch),
    Claim("numba-numpy", "numba", "numpy", STEP, _step, _step_bound("numba")),
    Claim("numba-big", "numba", BIG_PRODUCTS, "a step", _step, _step_bound("numba")),
    Claim("numba-framework", "numba", FASTEST, STEP, _step, _step_bound("numba")),
    Claim("sparse-numpy", "sparse", "numpy", STEP, _step, _step_bound("sparse")),
    Claim("sparse-numba", "sparse", "numba", STEP, _step, _step_bound("sparse")),
    Claim("sparse-big", "sparse", BIG_PRODUCTS, "a step", _step, _step_bound("sparse")),
    Claim("sparse-framework", "sparse", FASTEST, STEP, _step, _step_bound("sparse")),
    Claim("sparse-scipy", "sparse", "SciPy CSR", STEP, _step, _step_bound("sparse")),
    Claim("sparse-torch-csr", "sparse", "PyTorch CSR", STEP, _step, _step_bound("sparse")),
    Claim("sparse-mkl-csr", "sparse", "MKL CSR", STEP, _step, _step_bound("sparse")),
    Claim("sparse-c-csr", "sparse", "C CSR", STEP, _step, _step_bound("sparse")),
    *(
        Claim(
            f"batch-{ours}-{key}-{size}",
            ours,
            base,
            f"a step over {size} images, 1 thread",
            _small_step(size),
            _step_bound(ours, size),
            MAIN if size == 128 else BATCHES,
        )
        for size in (32, 128, 512)
        for ours in ("numba", "sparse")
        for key, base in (("torch", "PyTorch"), ("framework", FASTEST))
    ),
    Claim("time-numba", "numba", "numpy", TO_ACCURACY, _time_to, ranges=True),
    Claim("time-sparse", "sparse", "numpy", TO_ACCURACY, _time_to, ranges=True),
    Claim("command", "sparse", "numpy", "250 epochs with start-up, kernels cached", _command),
    *(
        Claim(
            f"product-{key}-{base.lower()}-{'1' if one else 'all'}",
            "numba",
            base,
            f"{shape}, {'1 thread' if one else 'all threads'}",
            _product(shape, one),
            _product_bound(product_flop(*left, right[1]), one),
            PRODUCTS,
        )
        for key, (shape, (left, right, _)) in zip(PRODUCT_KEYS, products.PRODUCTS.items(), strict=True)
        for base, one in ((OPENBLAS, True), (OPENBLAS, False), (MKL, True), (ONEDNN, True))
    ),
    Claim("ladder-compiled", "compiled", "loops", "ladder, MLP product, 1 thread", _climb("MLP")),
    *(
        Claim(
            f"ladder-{key}-{'1' if one else 'all'}",
            "vectors" if one else "threads",
            OPENBLAS,
            f"ladder, {words}, {'1 thread' if one else 'all threads'}",
            _climb(product, one),
            _climb_bound(product, one),
        )
        for key, product, words in (("mlp", "MLP", "MLP product"), ("1024", "1024³", "1024³"))
        for one in (True, False)
    ),
)
OFF_SCALE = ("numpy-naive", "ladder-compiled")
"""Claims with ratios of hundreds or thousands to one, which would squeeze all others in the figure."""

BY_KEY = {claim.key: claim for claim in CLAIMS}


def cell(claim: Claim, folder: Folder) -> Cell | None:
    """The evidence of a machine; None if the claim was not measured there."""
    ratios = [(row, claim.busy(run)) for run in folder.runs if (row := claim.ratio(run))]
    return Cell([row for row, _ in ratios], sum(busy for _, busy in ratios)) if ratios else None


def cells(claim: Claim, folders: Iterable[Folder]) -> dict[str, Cell]:
    """The evidence by machine, for machines on which the claim was measured."""
    return {folder.label: evidence for folder in folders if (evidence := cell(claim, folder))}


def cell_text(evidence: Cell | None, what_base: str) -> str:
    """The smallest and largest ratio, the base's seconds, whether the claim holds, and what weakens the evidence."""
    if not evidence:
        return ""
    name = f" ({evidence.bases})" if what_base == FASTEST else ""
    mark = {"faster": "✓", "slower": "✗", "undecided": "≈"}[evidence.verdict]
    runs = len(evidence.ratios)
    notes = [
        "1 run" if runs == 1 else "",
        "no interval" if all(row.interval is None for row in evidence.ratios) else "",
        ("busy" if runs == 1 else f"{evidence.busy} of {runs} busy") if evidence.busy else "",
    ]
    return ", ".join([f"{mark} {evidence.span} × {in_seconds(evidence.base_seconds)}{name}", *filter(None, notes)])


def two_digits(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.095 <= ratio < 100 else short(ratio)


def where(claim: Claim, folders: Iterable[Folder]) -> str:
    """The quantifier: on how many machines a claim holds, and on which."""
    evidence = cells(claim, folders)
    holding = [name for name, each in evidence.items() if each.holds]
    if len(evidence) == 1:
        return f"on {next(iter(evidence))}" if holding else f"not on {next(iter(evidence))}"
    if len(holding) == len(evidence):
        return "on both machines" if len(evidence) == 2 else f"on all {len(evidence)} machines"
    if not holding:
        return "on neither machine" if len(evidence) == 2 else f"on none of {len(evidence)} machines"
    return f"on {len(holding)} of {len(evidence)} machines ({', '.join(holding)})"


def sentence(claim: Claim, folders: Iterable[Folder]) -> str:
    """The claim in words, with the machines on which it holds and the range of ratios on each."""
    folders = list(folders)
    spans = [f"{evidence.span} on {name}" for name, evidence in cells(claim, folders).items()]
    if not spans:
        return f"How `{claim.competitor}` compares with `{claim.base}` has not been measured yet."
    place = where(claim, folders)
    verb = "is not" if place.startswith("not ") else "is"
    return (
        f"`{claim.competitor}` {verb} faster than {claim.base if claim.base == FASTEST else f'`{claim.base}`'} "
        f"{place.removeprefix('not ')}. Relative time: {', '.join(spans)}."
    )


def draw(folders: Sequence[Folder], file: Path) -> None:
    """A dot for each claim of the main table and machine at the median of its runs, with their range.

    A line marks 1. A faint tick is the ratio at the machine's peak FMA throughput, if that was measured. Without any
    such claim, nothing is drawn.
    """
    rows = [claim for claim in CLAIMS if claim.table == MAIN and any(cell(claim, folder) for folder in folders)]
    rows = [claim for claim in rows if claim.key not in OFF_SCALE]
    if not rows:
        return
    off = [f"{BY_KEY[key].competitor} / {BY_KEY[key].base}" for key in OFF_SCALE]
    shades = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", *OTHER_COLOURS]
    with figure_file(file, figsize=(8, 1.6 + 0.27 * len(rows))) as figure:
        axes = figure.subplots()
        axes.axvline(1, color="black", linewidth=1)
        for order, folder in enumerate(folders):
            shift = (order - (len(folders) - 1) / 2) * 0.6 / max(len(folders), 3)
            _draw_machine(axes, rows, folder, shift, shades[order % len(shades)])
        axes.set(xscale="log", xlabel="time relative to the base (log scale)")
        ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3]
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
        axes.set_xticklabels([f"{tick:g}" for tick in ticks if low <= tick <= high])
        axes.set_xticks([], minor=True)
        axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticklabels([f"{claim.competitor} / {claim.base}: {claim.what}" for claim in rows], fontsize=7)
        axes.grid(axis="y", color="#EEEEEE")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.2, -0.55 / (0.27 * len(rows))), ncols=3, frameon=False, fontsize=7
        )
        everywhere = sum(all(each.holds for each in cells(claim, folders).values()) for claim in rows)
        title(figure, f"{everywhere} of these {len(rows)} claims hold on every machine where they were measured")
        print_small(
            figure,
            "Ratios of medians over interleaved rounds. Dot: median of the runs; hollow where undecided. Bar: their "
            "range. Faint tick: the competitor's\nbig products at peak FMA throughput; for sparse, on non-zero pixels "
            f"only. Not shown: {' and '.join(off)}, far off this scale;\n"
            "single products and other batch sizes, which have their own tables and figures.",
        )
        axes.spines["left"].set_color(BOUND_COLOUR)


def _draw_machine(axes: Axes, rows: list[Claim], folder: Folder, shift: float, shade: str) -> None:
    """A machine's dots, ranges and bounds, `shift` below the middle of each row, and its name in the legend."""
    commit = ", ".join(folder.commits[:1])
    axes.plot([], [], "o", color=shade, markersize=5, label=f"{folder.label} (commit {commit})")
    for row, claim in enumerate(rows):
        y = row + shift
        if each := cell(claim, folder):
            face = "white" if each.verdict == "undecided" else shade
            middle = float(np.median([ratio.ratio for ratio in each.ratios]))
            axes.plot([each.low, each.high], [y, y], color=shade, linewidth=2)
            axes.plot(middle, y, "o", color=shade, markersize=4.5, markerfacecolor=face)
            if seconds := claim.at_peak(folder):
                axes.plot(seconds / each.base_seconds, y, "|", color=shade, alpha=0.5, markersize=8)
