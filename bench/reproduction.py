"""Study: the published experiment on every backend, as ``python -m model reproduce`` makes it."""

from pathlib import Path
from typing import Any

from kernels import backend_names, get_backend
from model.__main__ import stoppable_run
from model.data import Dataset
from model.figures import draw_curves
from model.reproduction import reproduce


def measure(dataset: Dataset, quick: bool) -> dict[str, Any]:
    """Accuracies by epoch; pure Python's minutes are left out if `quick`."""
    names = [name for name in backend_names() if not (quick and name == "naive")]
    return reproduce({name: get_backend(name) for name in names}, dataset, 2 if quick else 10, None, stoppable_run)


def draw(found: dict[str, Any], small_print: str, file: Path) -> None:
    """The accuracy curves over the published points."""
    draw_curves(file, found, small_print)
