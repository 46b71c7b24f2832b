"""The look that all figures share, and the accuracy curves over the published points."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kernels import backend_names
from model.reproduction import PUBLISHED, full_batch_histories

# Okabe and Ito's palette, which the colour-blind can tell apart: one colour for a backend, in every figure.
COLOURS = {
    "naive": "#CC79A7",
    "numpy": "#0072B2",
    "numba": "#E69F00",
    "sparse": "#009E73",
    "PyTorch": "#D55E00",
    "torch.compile": "#56B4E9",
    "JAX": "#F0E442",
    "scikit-learn": "#999999",
    "SciPy CSR": "#999999",
    "PyTorch CSR": "#D55E00",
}
OTHER_COLOURS = ("#D55E00", "#56B4E9", "#F0E442")
BOUND_COLOUR = "#444444"

_STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def colour(name: str) -> str:
    """The colour of a backend; those unknown here share a few more, by name."""
    return COLOURS.get(name) or OTHER_COLOURS[sum(name.encode()) % len(OTHER_COLOURS)]


@contextmanager
def figure_file(file: Path, **size: Any) -> Iterator[Figure]:
    """A new figure in the common look, written to `file` (PNG) when the block ends well."""
    with plt.rc_context(_STYLE):
        figure = plt.figure(layout="constrained", **size)
        try:
            yield figure
            figure.savefig(file, metadata={"Software": None})
        finally:
            plt.close(figure)


def title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold")


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
    """`text` right of a bar's end, or left of it if `side` is -1, readable over the line of a bound."""
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
    """Small `text`, so many points above a place on a line."""
    look = {"fontsize": 8, "color": BOUND_COLOUR, **look}
    axes.annotate(text, place, (0, above), textcoords="offset points", annotation_clip=True, **look)


def bound(axes: Axes, x: float, text: str, y: float) -> None:
    """A vertical line that no dense code passes by much, with its name."""
    axes.axvline(x, color=BOUND_COLOUR, linestyle="--", linewidth=1)
    axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=BOUND_COLOUR
    )


def short(value: float) -> str:
    """At least two digits, at most three, and no more than matter."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:#.2g}"


def plain_ticks(*axis: Axis) -> None:
    """Numbers like 0.01 and 1,000 on log axes, in place of powers of ten."""
    for each in axis:
        low, high = each.get_view_interval()
        each.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        each.set_minor_formatter(NullFormatter())


def end_labels(axes: Axes, ends: list[tuple[str, float, float, str]], fontsize: float = 8, side: int = 1) -> None:
    """Names right of points, or left of them if `side` is -1, moved apart where they would overlap.

    Parameters
    ----------
    axes
        With its limits and scales set.
    ends
        Text, x, y and colour of each.
    fontsize
        In points.
    side
        1 or -1.
    """
    to_points = 72 / axes.figure.dpi
    lowest = -np.inf
    for text, x, y, shade in sorted(ends, key=lambda end: end[2]):
        height = axes.transData.transform((x, y))[1] * to_points
        lowest = max(height, lowest + 1.2 * fontsize)
        label(axes, text, x, y, fontsize, side, lowest - height, shade)


def ordered(names: Any) -> list[str]:
    """Backends in the order of the study, foreign ones last."""
    known = backend_names()
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def in_seconds(seconds: float) -> str:
    return f"{short(seconds)} s"


def print_small(figure: Figure, text: str) -> None:
    """Write where the results come from below everything."""
    figure.supxlabel(text, fontsize=6.5, color=BOUND_COLOUR, x=0.01, ha="left")


def small_print(environment: dict[str, Any], date: str, dataset: str, quick: bool) -> str:
    """Where results come from, in two lines: what `environment` of `model.report` found, day, images."""
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("numpy", "numba", "llvmlite") if name in packages)
    return (
        f"{'QUICK RUN, not for quoting. ' if quick else ''}{f'{dataset}; ' if dataset else ''}"
        f"{environment['cpu']}, {environment['cores']} threads; float32; medians with 95 % intervals\n"
        f"Python {environment['python']}, {versions}, {', '.join(environment['blas'])}; {date[:10]}"
    )


def draw_curves(file: Path, found: dict[str, Any], small_print: str = "") -> None:
    """Train and test accuracy of each backend, a band over random starts, and the published points.

    Parameters
    ----------
    file
        Where to write the PNG.
    found
        What `model.reproduction.reproduce` returned, with full-batch runs.
    small_print
        Where it comes from.
    """
    histories, starts = full_batch_histories(found), found["starts"]
    final = [100 * history.accuracies("test")[-1] for history in histories.values()]
    reached = " to ".join(dict.fromkeys(f"{accuracy:.2f}" for accuracy in (min(final), max(final))))
    panels = {"train": "Training images, before each update", "test": "Test images, after each update"}
    with figure_file(file, figsize=(8, 4)) as figure:
        for index, (axes, kind) in enumerate(zip(figure.subplots(1, 2, sharey=True), panels)):
            band = {key: 100 * np.array(starts[kind][key]) for key in ("low", "high")}
            epochs = np.arange(1, len(band["low"]) + 1)
            axes.fill_between(epochs, *band.values(), color="#BBBBBB", label=f"{starts['count']} random starts")
            for order, (name, history) in enumerate(histories.items()):
                axes.plot(
                    epochs,
                    100 * history.accuracies(kind),
                    color=colour(name),
                    linewidth=3 - 2 * order / len(histories),
                    linestyle=("solid", (0, (4, 4)), (0, (1, 3)))[order % 3],
                    label=name,
                )
            published = [points[index] for points in PUBLISHED.values()]
            axes.plot(list(PUBLISHED), published, "ko", fillstyle="none", label="published")
            axes.set(xlabel="epoch", ylim=(0, 100))
            axes.set_title(panels[kind], fontsize=9, fontweight="normal")
            axes.grid(alpha=0.3)
        axes.legend(loc="lower right", frameon=False)
        figure.axes[0].set_ylabel("accuracy (%)")
        title(
            figure,
            f"{', '.join(histories)}: {reached} % test accuracy on {found['dataset']}; published, on MNIST: "
            f"{PUBLISHED[max(PUBLISHED)][1]} %",
        )
        print_small(figure, small_print)
