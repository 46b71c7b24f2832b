"""Figures in the project's style, and the accuracy curves over the published points."""

import io
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

# A notebook's MPLBACKEND may name a module that is not installed here, in which case importing Matplotlib fails.
with mock.patch.dict(os.environ):
    os.environ.pop("MPLBACKEND", None)
    import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.files import write_atomically
from model.published import PUBLISHED, Reproduction, full_batch_histories

# Okabe and Ito's palette, which is safe for colour-blind readers. A backend has the same colour in every figure.
COLOURS = {
    "naive": "#CC79A7",
    "numpy": "#0072B2",
    "numba": "#E69F00",
    "sparse": "#009E73",
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
    """The colour of a backend; others get one of a few spare colours, chosen by name."""
    return COLOURS.get(name) or OTHER_COLOURS[sum(name.encode()) % len(OTHER_COLOURS)]


@contextmanager
def figure_file(file: Path, **size: Any) -> Iterator[Figure]:
    """A new figure in the common style, written to `file` (PNG, atomically) if the block raises no exception.

    It ignores the user's matplotlibrc and MPLBACKEND, and needs no GUI. Warnings, such as missing glyphs, are silenced:
    they must not end a run.
    """
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(layout="constrained", **size)
        canvas = FigureCanvasAgg(figure)
        yield figure
        png = io.BytesIO()
        canvas.print_png(png, metadata={"Software": None})
        write_atomically(file, png.getvalue())


def title(figure: Figure, text: str) -> None:
    figure.suptitle("\n".join(textwrap.wrap(text, 88)), x=0.01, ha="left", fontsize=10, fontweight="bold")


def print_small(figure: Figure, text: str) -> None:
    """Add a footer in small print: where the results come from."""
    figure.supxlabel(text, fontsize=6.5, color=BOUND_COLOUR, x=0.01, ha="left")


def draw_curves(file: Path, reproduction: Reproduction, small_print: str = "") -> None:
    """Draw train and test accuracy of each backend, a band over random seeds, and the published points.

    Parameters
    ----------
    file
        Where to write the PNG.
    reproduction
        With full-batch runs.
    small_print
        Where the results come from.
    """
    histories, starts = full_batch_histories(reproduction), reproduction.starts
    assert starts is not None  # as there are full-batch runs
    final = [100 * history.accuracies("test")[-1] for history in histories.values()]
    reached = " to ".join(dict.fromkeys(f"{accuracy:.2f}" for accuracy in (min(final), max(final))))
    panels = {"train": "Training images, before each update", "test": "Test images, after each update"}
    with figure_file(file, figsize=(8, 4)) as figure:
        for index, (axes, kind) in enumerate(zip(figure.subplots(1, 2, sharey=True), panels)):
            band = starts.train if kind == "train" else starts.test
            low, high = 100 * np.array(band.low), 100 * np.array(band.high)
            epochs = np.arange(1, len(low) + 1)
            axes.fill_between(epochs, low, high, color="#BBBBBB", label=f"{starts.count} random seeds")
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
            f"{', '.join(histories)}: {reached} % test accuracy on {reproduction.dataset}; published, on MNIST: "
            f"{PUBLISHED[max(PUBLISHED)][1]} %",
        )
        print_small(figure, small_print)
