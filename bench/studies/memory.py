"""Study: peak memory of training, each competitor in a fresh process.

It is the peak of two full-batch steps and of preparing their images, above what was already resident: the interpreter,
the packages, the images as bytes, and what an earlier network and its steps have left behind, such as compiled code. It
comes from the kernel's high-water mark of resident memory (VmHWM), which only Linux has.

In the fresh process, all threads allocate from one arena of glibc's malloc, because only the first arena can return all
its free memory. What other arenas keep would count as already resident, and then be reused without being counted.
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
    """Measure the peak memory of each competitor."""
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
    """Peak bytes of a competitor; raises an UnavailableError if it cannot run here."""
    with thread_pool(available_cores()) as parallel_map:
        return peak_bytes(partial(competitor, name, Task(MLP(), images, labels, 0.3, available_cores(), parallel_map)))


def peak_bytes(make: Callable[[], Competitor]) -> int:
    """Peak bytes of creating a competitor and of two steps, above what is resident after an earlier one's step.

    Raises
    ------
    UnavailableError
        If the system does not report it.
    """
    make().step()
    before = _reset_high_water_mark()
    competing = make()
    for _ in range(2):
        competing.step()
    return status_bytes("VmHWM") - before


def _reset_high_water_mark() -> int:
    """Return freed memory to the system and reset its high-water mark; returns the resident bytes."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError) as error:  # TypeError: CDLL(None) on Windows
        raise UnavailableError(f"this system cannot measure the peak memory of part of a run: {error}") from error
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    """A size of this process, as Linux reports it."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    return 1024 * int(kilobytes)
