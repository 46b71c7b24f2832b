"""Study: the memory that training takes, each competitor in a process of its own.

That is the most that two full-batch steps hold, with what preparing the images for them takes, above what is resident
before: the interpreter, the packages, the images as bytes, and what an earlier network and its steps have left behind,
such as compiled code. The system's own high-water mark is read, so only Linux tells.
"""

import ctypes
import gc
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bench.peers import COMPETITORS, Task, UnavailableError, competitor
from model.data import Dataset
from model.mlp import MLP
from model.trainer import available_cores, thread_pool

PROCESS = Path("/proc/self")


def measure(dataset: Dataset, quick: bool) -> dict[str, Any]:
    """Peak bytes of each competitor; who was skipped and why."""
    peaks, skipped = {}, {}
    for name in [name for names in COMPETITORS.values() for name in names]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                peaks[name] = pool.submit(peak_bytes, name, dataset.train_images, dataset.train_labels).result()
            except UnavailableError as reason:
                skipped[name] = str(reason)
    return {"peak_bytes": peaks, "skipped": skipped}


def peak_bytes(name: str, images: NDArray, labels: NDArray) -> int:
    """What two steps of this process take at most, above what is resident before.

    Raises
    ------
    UnavailableError
        If the competitor cannot run here, or the system does not tell.
    """
    with thread_pool(available_cores()) as run:
        task = Task(MLP(), images, labels, 0.3, available_cores(), run)
        competitor(name, task).step()
        before = _reset_high_water_mark()
        competing = competitor(name, task)
        for _ in range(2):
            competing.step()
        return _status("VmHWM") - before


def _reset_high_water_mark() -> int:
    """Give freed memory back to the system and let its mark start from what is left; returns that in bytes."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"the system does not tell the peak memory of a part of a process: {error}") from error
    return _status("VmRSS")


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    return 1024 * int(kilobytes)
