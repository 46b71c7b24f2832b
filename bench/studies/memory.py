"""Study: the memory that training takes, each competitor in a fresh process.

It is the peak of two full-batch steps and of preparing their images, above what is resident before: the interpreter,
the packages, the images as bytes, and what an earlier network and its steps have left behind, such as compiled code. It
comes from the system's high-water mark, which only Linux has.

In the fresh process, all threads allocate from one arena of glibc's malloc. Only the first arena can return all its
free memory. What others keep would count as resident before, and then be reused without being counted.
"""

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from numpy.typing import NDArray

from bench.measure.processes import in_fresh_process
from bench.peers import COMPETITORS, competitor
from bench.peers.task import Competitor, Task, UnavailableError
from model.data import Dataset
from model.mlp import MLP
from model.threads import available_cores, thread_pool

PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Result:
    """The study's record."""

    peak_bytes: dict[str, int]
    """By competitor."""
    skipped: dict[str, str]
    """Why a competitor was not measured."""
    kind: Literal["memory"] = "memory"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Peak bytes of each competitor; who was skipped and why."""
    peaks, skipped = {}, {}
    for name in [name for names in COMPETITORS.values() for name in names]:
        try:
            peaks[name] = in_fresh_process(
                peak_of_competitor, name, dataset.train_images, dataset.train_labels, MALLOC_ARENA_MAX="1"
            )
        except UnavailableError as reason:
            skipped[name] = str(reason)
    return Result(peaks, skipped)


def peak_of_competitor(name: str, images: NDArray, labels: NDArray) -> int:
    """Peak bytes of one of `bench.peers`, which raises an UnavailableError if it cannot run here."""
    with thread_pool(available_cores()) as run:
        return peak_bytes(partial(competitor, name, Task(MLP(), images, labels, 0.3, available_cores(), run)))


def peak_bytes(make: Callable[[], Competitor]) -> int:
    """Peak bytes of creating a competitor and two of its steps, above what is resident after an earlier one's steps.

    Raises
    ------
    UnavailableError
        If the system does not tell.
    """
    make().step()
    before = _reset_high_water_mark()
    competing = make()
    for _ in range(2):
        competing.step()
    return _status("VmHWM") - before


def _reset_high_water_mark() -> int:
    """Give freed memory back to the system and let its mark start from what is left; returns that in bytes."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError) as error:  # TypeError: CDLL(None) on Windows
        raise UnavailableError(f"the system does not tell the peak memory of a part of a process: {error}") from error
    return _status("VmRSS")


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    return 1024 * int(kilobytes)
