"""Study: what it costs to train on Dask workers, on the same cores, and how much memory a limit saves.

Workers and scheduler are processes on this machine, which talk over its loopback interface. An epoch is a step over
all images, which are read through a memory map, as in `bench.studies.scaling`: the images again and again, shifted.
"""

import hashlib
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil

from bench.measure.interleave import interleave
from bench.measure.records import Comparison, Rounds, rounded
from bench.studies.scaling import LEARNING_RATE, shifted
from kernels import get_backend
from model.data import FILES, Dataset, limited, load_idx
from model.extras.dask_workers import connect
from model.mlp import MLP
from model.shards import SHARDS, Batch, Memory, Shards
from model.threads import available_cores, thread_pool
from model.training import descend

PROCESS = "one process"
WORKERS = (1, 2)
TIMES = (1, 2, 4, 8)
"""As many images as there are."""

FEW = 1_024
"""Two shards, which take less time than sending."""

MEMORY_LIMIT = 200_000_000
EPOCHS = 8
BANDWIDTH = 10e9 / 8
"""Bytes per second of the network in the calculation: 10 Gbit/s."""

PROGRAM = """
import atexit
from pathlib import Path
from model.__main__ import main
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
main()
"""

Place = Callable[..., Batch]
"""Makes the batch of some images for a backend, as `Shards` does."""


@dataclass(frozen=True)
class Epoch:
    """Seconds per epoch in each place."""

    backend: str
    images: int
    places: Comparison


@dataclass(frozen=True)
class Peak:
    """What a process of its own took."""

    limit: int | None
    """Bytes, as for ``--memory-limit``."""
    peak_bytes: int
    epochs: Rounds


@dataclass(frozen=True)
class Found:
    """What the study found."""

    threads: int
    parameter_bytes: int
    hash_bytes_per_second: float
    memory: list[Peak]
    epochs: list[Epoch]
    bytes_sent: dict[str, float]
    """Per epoch over loopback, by place."""
    kind: Literal["workers"] = "workers"


def measure(dataset: Dataset, quick: bool) -> Found:
    """Seconds per epoch in one process and on workers, bytes sent, and peak memory with and without a limit."""
    cores, counts = available_cores(), [times * len(dataset.train_images) for times in TIMES]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        write(shifted(dataset, counts[-1]), folder)
        images = load_idx(folder)
        hashed = hash_rate(folder / FILES[0].name)
        peaks = [memory(folder, limit) for limit in (None, MEMORY_LIMIT)]
        places: dict[str, Place] = {PROCESS: partial(Shards, stack.enter_context(thread_pool(cores)))}
        for workers in WORKERS:
            places[_name(workers)] = stack.enter_context(connect(None, workers, cores)).batch
        sizes = {"numpy": counts, "numba": counts[:1], "sparse": [FEW, *counts]}
        return Found(
            threads=cores,
            parameter_bytes=sum(parameter.nbytes for parameter in network(images).parameters),
            hash_bytes_per_second=hashed,
            memory=peaks,
            epochs=[
                Epoch(name, count, seconds(places, name, limited(images, count), quick))
                for name in sizes
                for count in sizes[name]
            ],
            bytes_sent={
                _name(workers): bytes_sent(places[_name(workers)], limited(images, counts[0])) for workers in WORKERS
            },
        )


def seconds(places: dict[str, Place], name: str, images: Dataset, quick: bool) -> Comparison:
    """Seconds per epoch in each place, in turn; all end with the same bits."""
    networks = {place: network(images) for place in places}
    steps = {place: step(places[place], name, images, networks[place]) for place in places}
    found = interleave(steps, 2 if quick else 6)
    alike = {b"".join(parameter.tobytes() for parameter in mlp.parameters) for mlp in networks.values()}
    if len(alike) > 1:
        raise AssertionError(f"{name} on {len(images.train_images)} images: workers and one process differ")
    return Comparison.of("an epoch", found)


def step(place: Place, name: str, images: Dataset, mlp: MLP) -> Callable[[], Any]:
    """A function that takes one step over all images."""
    batch = place(get_backend(name), images.train_images, images.train_labels, mlp.dtype, Memory())
    return partial(descend, mlp, batch, LEARNING_RATE)


def network(images: Dataset) -> MLP:
    return MLP((images.train_images.shape[1], 128, 10))


def bytes_sent(place: Place, images: Dataset, epochs: int = 20) -> float:
    """Bytes per epoch over loopback: between client, scheduler and workers, in both directions."""
    train = step(place, "sparse", images, network(images))
    train()
    before = _loopback_bytes()
    for _ in range(epochs):
        train()
    return (_loopback_bytes() - before) / epochs


def hash_rate(file: Path) -> float:
    """Bytes per second of SHA-256, which the client takes of all images."""
    content = file.read_bytes()[:100_000_000]
    start = time.perf_counter()
    hashlib.sha256(content)
    return len(content) / (time.perf_counter() - start)


def memory(folder: Path, limit: int | None) -> Peak:
    """The command line in a process of its own on all images: its peak memory in bytes, and seconds per epoch."""
    options = ["--dataset", "idx", "--data", folder, "--backend", "numpy", "--epochs", EPOCHS, "--eval-every", EPOCHS]
    options += ["--json", folder / "history.json", *(["--memory-limit", limit] if limit is not None else [])]
    command = [sys.executable, "-c", PROGRAM, "train", *map(str, options)]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    times = [epoch["seconds"] for epoch in json.loads((folder / "history.json").read_text())["history"]]
    return Peak(limit, 1024 * int(kilobytes), Rounds(rounded(times[1:])))


def write(dataset: Dataset, folder: Path) -> None:
    """Four IDX files, as MNIST's are."""
    for file, array in zip(FILES, dataset[1:]):
        shape = (len(array), *file.shape[1:])
        header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
        with (folder / file.name).open("wb") as stream:
            stream.write(header)
            array.tofile(stream)


def calculation(found: Found, workers: int, images: float) -> dict[str, float]:
    """What training on workers like this machine would take: computed, not measured.

    The images are dealt in 32 shards, so no more than 32 threads have work. The parameters for each worker and its sums
    pass through the scheduler, in and out. That and a fixed delay do not depend on how many images there are.

    Returns
    -------
    dict[str, float]
        Seconds of arithmetic in an epoch; seconds of delay and network in it; seconds of hashing, before the first; the
        number of images with which arithmetic takes nine tenths of an epoch.
    """
    few, *_, many = [row for row in found.epochs if row.backend == "sparse"]
    threads = min(SHARDS, workers * found.threads)
    per_image = many.places.median(PROCESS) / many.images * found.threads / threads
    delay = few.places.median(_name(WORKERS[-1])) - few.places.median(PROCESS)
    sending = delay + 4 * workers * found.parameter_bytes / BANDWIDTH
    return {
        "arithmetic": images * per_image,
        "sending": sending,
        "hashing": 2 * images * 784 / found.hash_bytes_per_second,  # as a whole, and each shard
        "worth it": 9 * sending / per_image,
    }


def _name(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def _loopback_bytes() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent
