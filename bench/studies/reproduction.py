"""Study: the published experiment on every backend, as in ``python -m model reproduce``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.progress import Progress

from bench.studies import full_batch_backends
from kernels import backend_names, get_backend
from model.data import Dataset
from model.extras.figure import draw_curves
from model.published import Reproduction, reproduce
from model.training import State


@dataclass(frozen=True)
class Result:
    """The study's record."""

    reproduced: Reproduction
    kind: Literal["reproduction"] = "reproduction"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Run the published experiment; `quick` leaves out pure Python, which takes minutes."""
    backends = {name: get_backend(name) for name in (full_batch_backends() if quick else backend_names())}
    return Result(reproduce(backends, dataset, 2 if quick else 3, None, with_bar))


@contextmanager
def with_bar(title: str, images: int) -> Iterator[tuple[Callable[[int], None], Callable[[State], None]]]:
    """A progress bar for one run within `reproduce`."""
    with Progress(transient=True) as bar:
        task = bar.add_task(title, total=images)
        yield lambda passed: bar.advance(task, passed), lambda state: None


def draw(result: Result, small_print: str, file: Path) -> None:
    """The accuracy curves over the published points."""
    draw_curves(file, result.reproduced, small_print)
