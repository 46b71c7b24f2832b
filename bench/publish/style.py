"""Labels, reference lines, ticks and number formats that the figures share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.measure.machine import cpu_unit
from bench.measure.records import FEWEST_ROUNDS, Comparison, Machine, Section
from kernels import backend_names
from model.extras.figure import BOUND_COLOUR
from model.extras.figure import colour as backend_colour

PEER_COLOURS = {
    "PyTorch": "#D55E00",
    "torch.compile": "#56B4E9",
    "PyTorch by hand": "#882255",
    "JAX": "#7A7A1F",
    "scikit-learn": "#999999",
    "SciPy CSR": "#999999",
    "PyTorch CSR": "#D55E00",
}


def colour(name: str) -> str:
    """The colour of a peer or a backend, the same in every figure."""
    return PEER_COLOURS.get(name) or backend_colour(name)


INTERVALS = f"medians with 95 % intervals, from {FEWEST_ROUNDS} rounds up"
RANGES = "medians of {} runs with their range"


class Span(NamedTuple):
    """The median over runs of a value, and how far it varies."""

    median: float
    low: float
    high: float


def over_runs(runs: Sequence[Comparison], name: str) -> Span:
    """Seconds of a competitor: the median and range of the runs' medians; of one run, its median and interval."""
    rounds = [run.rounds[name] for run in runs if name in run]
    if len(rounds) == 1:
        return Span(rounds[0].median, rounds[0].low, rounds[0].high)
    return span([each.median for each in rounds])


def span(values: Sequence[float]) -> Span:
    """The median and range of one value for each run."""
    return Span(float(np.median(values)), min(values), max(values))


def ratio_over_runs(runs: Sequence[Comparison], name: str, base: str) -> Span:
    """The median and range of the ratios that runs measured."""
    return span([run.median(name) / run.median(base) for run in runs if name in run and base in run])


def beside_numpy(runs: Sequence[Comparison], names: Sequence[str], packages: Sequence[str] = ()) -> str:
    """The range over the runs of times relative to NumPy's, in words: of `names`, and of the fastest of `packages`.

    Without NumPy, they are relative to the time of the first name.
    """
    fastest = sorted(packages, key=lambda name: over_runs(runs, name).median)[:1]
    base, *others = sorted([*names, *fastest], key=lambda name: name != "numpy")
    words = []
    for name in others:
        ratio = ratio_over_runs(runs, name, base)
        low, high = (f"{end:.2f}" if end < 100 else short(end) for end in (ratio.low, ratio.high))
        words.append(f"{short_name(name)} {low_to_high(low, high, '–')}")
    return f"time relative to {short_name(base)}: {', '.join(words)}"


def low_to_high(low: str, high: str, between: str = " to ") -> str:
    """Both ends of a range, or one number if they read the same."""
    return low if low == high else f"{low}{between}{high}"


def short_name(name: str) -> str:
    """A name, shortened to fit beside an axis."""
    return name if len(name) <= 28 else f"{name[:27]}…"


def label(
    axes: Axes,
    text: str,
    x: float,
    y: float,
    fontsize: float = 9,
    side: int = 1,
    above: float = 0,
    shade: str = "black",
) -> None:
    """Write `text` right of a point, or left of it if `side` is -1, on a white background that hides lines."""
    axes.annotate(
        text,
        (x, y),
        xytext=(5 * side, above),
        textcoords="offset points",
        ha="left" if side == 1 else "right",
        va="center",
        color=shade,
        fontsize=fontsize,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        zorder=5,
    )


def note(axes: Axes, text: str, place: tuple[float, float], above: float, **look: Any) -> None:
    """Write small `text` over a place on a line, `above` typographic points higher."""
    look = {"fontsize": 8, "color": BOUND_COLOUR, **look}
    axes.annotate(text, place, (0, above), textcoords="offset points", annotation_clip=True, **look)


def bound(axes: Axes, x: float, text: str, y: float) -> None:
    """Draw a labelled vertical line at a reference time."""
    axes.axvline(x, color=BOUND_COLOUR, linestyle="--", linewidth=1)
    axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=BOUND_COLOUR
    )


def short(value: float) -> str:
    """A number with two or three significant digits."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:#.2g}"


def plain_ticks(*axis: Axis) -> None:
    """Label log axes with numbers like 0.01 and 1,000 instead of powers of ten."""
    for each in axis:
        low, high = each.get_view_interval()
        each.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=5))
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        each.set_minor_formatter(NullFormatter())


def end_labels(axes: Axes, ends: list[tuple[str, float, float, str]]) -> list[float]:
    """Write names right of points, moved apart if they would overlap; returns their heights in typographic points.

    Parameters
    ----------
    axes
        With its limits and scales set.
    ends
        Text, x, y and colour of each.
    """
    fontsize = 8
    heights = [-np.inf]
    anchor = 0.0  # y of the lowest in a stack of names: later layout moves data coordinates, but not offsets in points
    for text, x, y, shade in sorted(ends, key=lambda end: end[2]):
        height, lowest = points_up(axes, x, y), heights[-1] + 1.35 * fontsize
        heights.append(max(height, lowest))
        anchor = y if height >= lowest else anchor
        label(axes, text, x, anchor, fontsize, above=heights[-1] - points_up(axes, x, anchor), shade=shade)
    return heights[1:]


def points_up(axes: Axes, x: float, y: float) -> float:
    """The height of a place in typographic points."""
    return axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi


def right_labels(
    axes: Axes, texts: Sequence[str], fontsize: float = 8.5, places: Sequence[float] | None = None
) -> None:
    """Write a text for each row, or at each place, in a column right of the axes, where no line crosses it."""
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(texts)) if places is None else places, texts, fontsize=fontsize)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def ordered(names: Any) -> list[str]:
    """Sort names: backends in the study's order, others last."""
    known = backend_names()
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def in_seconds(seconds: float) -> str:
    """A duration in seconds, milliseconds or microseconds, whichever gives a number of at least 1."""
    unit, scale = next((unit, scale) for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * scale >= 1)
    return f"{short(seconds * scale)} {unit}"


def small_print(section: Section, machine: Machine, medians: str = "", timed: bool = True) -> str:
    """Conditions and versions of a measurement, in two lines.

    `medians` says what a value and its interval are. What concerns only timings is left out if not `timed`.
    """
    conditions = section.conditions
    environment = conditions.environment
    threads = f"{environment.cores} {cpu_unit(machine)}"
    packages = environment.packages
    versions = ", ".join(f"{name} {packages[name]}" for name in ("numpy", "numba", "llvmlite") if name in packages)
    first = [
        "QUICK RUN, not for quoting" * conditions.quick,
        f"busy machine: {conditions.busy}" if conditions.busy and timed else "",
        conditions.note or "",
        f"{conditions.dataset}; {machine.name} ({machine.cpu}), {threads}; float32",
        medians,
    ]
    return (
        f"{'; '.join(filter(None, first))}\n"
        f"Python {environment.python}, {versions}, {', '.join(environment.blas)}; "
        f"commit {conditions.commit or 'unknown'}, {conditions.date[:10]}"
    )
