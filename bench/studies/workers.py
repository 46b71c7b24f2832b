"""Study: the cost of training on Dask workers as workers and images grow, and an estimate for a billion images.

Workers and scheduler are processes on this machine and communicate over the loopback interface. An epoch is a step over
all images. Larger files repeat the images, and are memory-mapped. Dask is imported only where it is used, as stored
results are drawn without it.
"""

import hashlib
import importlib.util
import math
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from bench.measure.interleave import interleave
from bench.studies.memory import status_bytes
from bench.studies.scaling import LEARNING_RATE
from kernels import get_backend
from model.data import FILES, Dataset, limited, load_idx
from model.mlp import MLP
from model.shards import SHARD, Batch, Memory, Shards, shard_ranges
from model.threads import available_cores, thread_pool
from model.training import descend

MEMORY_LIMIT = 200_000_000
MEMORY_IMAGES = 480_000
EPOCHS = 4
STEPS = 5
"""Timed for each number of workers."""
WORKERS = (1, 2, 4, 8, 16)
FEW_EACH = 16 * SHARD
"""A shard for each of sixteen workers."""
GROWTH = (60_000, 480_000, 4_800_000)
QUICK_GROWTH = (60_000, 240_000)
GROWTH_LIMIT = 3_000_000
"""Bytes, so few that at most a tenth of the images is kept even at the smallest size: the cost per image is equal."""
BANDWIDTH = 10e9 / 8
"""Bytes per second of the network in the estimate: 10 Gbit/s."""

PROGRAM = """
import atexit
from pathlib import Path
from model.cli import main
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
main()
"""

Place = Callable[..., Batch]
"""Makes a batch of images for a backend, like `Shards`."""


@dataclass(frozen=True)
class Traffic:
    """An epoch on a number of workers."""

    workers: int
    client_bytes: float
    """Through the client's sockets, both directions added up."""
    tasks: float
    """Submitted by the client."""
    overhead: float
    """Extra seconds over one process. The workers share the cores, so this is an upper bound."""


@dataclass(frozen=True)
class Growth:
    """An epoch over a number of images, through memory maps and with a memory limit."""

    images: int
    microseconds: float
    """Per image."""
    own_bytes: int
    """Peak anonymous memory of the process, without mapped files."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of training from the command line, in a fresh process."""

    limit: int | None
    """Bytes, for ``--memory-limit``."""
    peak_bytes: int


@dataclass(frozen=True)
class Result:
    """The study's record."""

    threads: int
    parameter_bytes: int
    hash_bytes_per_second: float
    traffic: list[Traffic]
    growth: list[Growth]
    memory: list[Peak]
    kind: Literal["workers"] = "workers"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Measure traffic by workers, cost per image by images, and memory with and without a limit; only on Linux."""
    if not Path("/proc/self/status").exists():
        raise OSError("the workers study reads memory and traffic from /proc, which only Linux has")
    if not importlib.util.find_spec("distributed"):
        raise OSError("the workers study needs Dask: install it with: pip install -e '.[distributed]'")
    with TemporaryDirectory() as name:
        folder = Path(name)
        grown = growth(dataset, folder, QUICK_GROWTH if quick else GROWTH)
        write(dataset, folder, QUICK_GROWTH[0] if quick else MEMORY_IMAGES)
        hashed = hash_rate(folder / FILES[0].name)
        peaks = [memory(folder, limit) for limit in (None, MEMORY_LIMIT)]
    few = limited(dataset, min(FEW_EACH, len(dataset.train_images)))
    return Result(
        threads=available_cores(),
        parameter_bytes=sum(parameter.nbytes for parameter in network(dataset).parameters),
        hash_bytes_per_second=hashed,
        traffic=traffic(few, WORKERS[:2] if quick else WORKERS),
        growth=grown,
        memory=peaks,
    )


def step(place: Place, name: str, images: Dataset, mlp: MLP) -> Callable[[], Any]:
    """A function that takes one step over all images."""
    backend = get_backend(name)
    batch = place(backend, images.train_images, images.train_labels, mlp.dtype, Memory())
    return partial(descend, mlp, backend, batch, LEARNING_RATE)


def network(images: Dataset) -> MLP:
    return MLP((images.train_images.shape[1], 128, 10))


def hash_rate(file: Path) -> float:
    """Bytes per second of SHA-256, with which images are hashed."""
    content = file.read_bytes()[:100_000_000]
    start = time.perf_counter()
    hashlib.sha256(content)
    return len(content) / (time.perf_counter() - start)


def memory(folder: Path, limit: int | None) -> Peak:
    """Peak memory of training from the command line on all images, in a fresh process."""
    options = ["--dataset", "idx", "--data", folder, "--backend", "numpy", "--epochs", EPOCHS, "--eval-every", EPOCHS]
    options += ["--memory-limit", limit] if limit is not None else []
    command = [sys.executable, "-c", PROGRAM, "train", *map(str, options)]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return Peak(limit, 1024 * int(kilobytes))


def write(dataset: Dataset, folder: Path, count: int) -> None:
    """Write four IDX files like MNIST's, with `count` training images: those of the data set, repeated."""
    tests = len(dataset.test_images)
    for file, array, length in zip(FILES, dataset[1:], (count, count, tests, tests)):
        shape = (length, *file.shape[1:])
        with (folder / file.name).open("wb") as stream:
            stream.write(bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape))
            for start in range(0, length, len(array)):
                array[: length - start].tofile(stream)


def traffic(images: Dataset, workers: Iterable[int]) -> list[Traffic]:
    """An epoch by number of workers: bytes through the client's sockets, tasks, and the overhead over one process.

    There are more processes than cores, and they share them, so the overhead is an upper bound.
    """
    from distributed import Client
    from distributed.deploy.subprocess import SubprocessCluster

    from model.extras.dask_workers import Cluster

    rows = []
    with (
        SubprocessCluster(
            n_workers=0, threads_per_worker=1, worker_class="distributed.Worker", dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        for count in workers:
            cluster.scale(count)
            client.wait_for_workers(count)
            train = step(Cluster(client).batch, "sparse", images, network(images))
            train()
            before, start = _socket_bytes(), time.perf_counter()
            submitted: list[str] = []
            original = client.submit

            def counted(*arguments: Any, original: Any = original, submitted: Any = submitted, **options: Any) -> Any:
                submitted.append("")
                return original(*arguments, **options)

            client.submit = counted  # type: ignore[method-assign]
            for _ in range(STEPS):
                train()
            seconds = (time.perf_counter() - start) / STEPS
            client.submit = original  # type: ignore[method-assign]
            sent = (_socket_bytes() - before) / STEPS
            overhead = max(0.0, seconds - alone(images, count))
            rows.append(Traffic(count, sent, len(submitted) / STEPS, overhead))
    return rows


def alone(images: Dataset, threads: int) -> float:
    """Median seconds of an epoch in this process, on at most one thread per core."""
    with thread_pool(min(threads, available_cores())) as parallel_map:
        train = step(partial(Shards, parallel_map), "sparse", images, network(images))
        return float(np.median(interleave({"alone": train}, 3)["alone"]))


def growth(dataset: Dataset, folder: Path, counts: Iterable[int]) -> list[Growth]:
    """Microseconds per image and peak anonymous memory, with memory-mapped files and a memory limit.

    Larger files repeat the images. Pages of mapped files are not counted: the system reclaims them when it needs to.
    """
    rows = []
    for count in counts:
        write(dataset, folder, count)
        images = load_idx(folder)
        with thread_pool(available_cores()) as parallel_map:
            mlp, memory = network(images), Memory(GROWTH_LIMIT)
            sparse = get_backend("sparse")
            batch = Shards(parallel_map, sparse, images.train_images, images.train_labels, mlp.dtype, memory)
            times, own = [], []
            for _ in range(2 if count > 10**6 else 5):
                start = time.perf_counter()
                descend(mlp, sparse, batch, LEARNING_RATE, lambda images: own.append(status_bytes("RssAnon")))  # noqa: B023
                times.append(time.perf_counter() - start)
        del batch
        rows.append(Growth(count, 1e6 * float(np.median(times)) / count, max(own)))
    return rows


def calculation(result: Result, workers: int, images: float) -> dict[str, float]:
    """The cost of training on workers like this machine: calculated, not measured.

    Assumptions: an image costs as much as at the largest number measured here, and the work divides evenly over all
    threads. The scheduler handles tasks one at a time, each in the time measured here. Sums travel up the tree,
    `FAN_IN` to a worker, and the parameters travel down as many levels, at `BANDWIDTH`. All images are hashed twice, on
    all threads, and the disks keep up.

    Returns
    -------
    dict[str, float]
        Seconds of arithmetic, tasks and network in an epoch, and of hashing before the first epoch.
    """
    from model.extras.dask_workers import FAN_IN

    few, many = result.traffic[0], result.traffic[-1]
    task = max(0.0, many.overhead - few.overhead) / (many.tasks - few.tasks)
    shards = shard_ranges(int(images), get_backend("sparse").images_at_once)
    threads = min(len(shards), workers * result.threads)
    levels = math.ceil(math.log(workers, FAN_IN)) if workers > 1 else 0
    per_image = 1e-6 * result.growth[-1].microseconds * result.threads
    return {
        "arithmetic": images * per_image / threads,
        "tasks": few.overhead + task * (many.tasks / many.workers) * workers,
        "network": (2 + 2 * levels * FAN_IN) * result.parameter_bytes / BANDWIDTH,
        "hashing": 2 * images * 784 / result.hash_bytes_per_second / threads,
    }


def _socket_bytes() -> int:
    """Bytes through this process's open TCP connections, both directions added up: tcp_info of linux/tcp.h."""
    import psutil

    total = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            with socket.socket(fileno=os.dup(connection.fd)) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            total += sum(struct.unpack_from("QQ", info, 120))  # acknowledged by the other side, received
    return total
