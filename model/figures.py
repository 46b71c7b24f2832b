"""The look that all figures share, and the accuracy curves over the published points."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from model.reproduction import PUBLISHED
from model.trainer import History

# Okabe and Ito's palette, which the colour-blind can tell apart: one colour for a backend, in every figure.
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


def draw_curves(file: Path, histories: dict[str, History], starts: list[History], dataset_name: str) -> None:
    """Train and test accuracy of each backend, a band over random starts, and the published points.

    Parameters
    ----------
    file
        Where to write the PNG.
    histories
        By backend, all from the same start.
    starts
        Runs from different random starts.
    dataset_name
        What they were trained on.
    """
    final = {name: 100 * history.accuracies("test")[-1] for name, history in histories.items()}
    low, high = min(final.values()), max(final.values())
    reached = f"{high:.2f} %" if high - low < 0.005 else f"{low:.2f} to {high:.2f} %"
    with figure_file(file, figsize=(8, 4)) as figure:
        figure.suptitle(
            f"{', '.join(histories)}: {reached} test accuracy on {dataset_name} (published on MNIST: 92.21 %)",
            fontsize=11,
            fontweight="bold",
        )
        for axes, kind, title, index in zip(
            figure.subplots(1, 2, sharey=True),
            ("train", "test"),
            ("Training images, before each update", "Test images, after each update"),
            (0, 1),
        ):
            curves = 100 * np.array([start.accuracies(kind) for start in starts])
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.fill_between(
                epochs,
                curves.min(axis=0),
                curves.max(axis=0),
                color="#BBBBBB",
                label=f"{len(starts)} random starts",
            )
            for order, (name, history) in enumerate(histories.items()):
                axes.plot(
                    epochs,
                    100 * history.accuracies(kind),
                    color=colour(name),
                    linewidth=3 - 2 * order / len(histories),
                    linestyle=("solid", (0, (4, 4)), (0, (1, 3)))[order % 3],
                    label=name,
                )
            axes.plot(
                list(PUBLISHED),
                [points[index] for points in PUBLISHED.values()],
                "ko",
                fillstyle="none",
                label="published",
            )
            axes.set(title=title, xlabel="epoch", ylim=(0, 100))
            axes.grid(alpha=0.3)
        axes.legend(loc="lower right", frameon=False)
        figure.axes[0].set_ylabel("accuracy (%)")
