"""Study: what it costs to train on Dask workers, on the same cores, and how much memory a limit saves.

Workers and scheduler are processes on this machine, which talk over its loopback interface. An epoch is a step over
all images, which are read through a memory map, as in `bench.studies.scaling`: the images again and again, shifted.

``python -m bench.studies.workers [--quick]`` measures what grows with the number of workers and of images, and
calculates from that what a billion images would take.
"""

import hashlib
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster

from bench.measure.interleave import interleave, summary
from bench.studies.scaling import LEARNING_RATE, shifted
from kernels import get_backend
from model.data import FILES, Dataset, limited, load_dataset, load_idx
from model.extras.dask_workers import FAN_IN, Cluster, connect
from model.mlp import MLP
from model.shards import Batch, Memory, Shards, shard_ranges
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
MANY_WORKERS = (1, 2, 4, 8, 16)
FEW_EACH = 32_768
"""Sixteen shards, one for each of as many workers."""
GROWTH = (60_000, 480_000, 4_800_000)
QUICK_GROWTH = (60_000, 240_000)
GROWTH_LIMIT = 3_000_000
"""So little that even of the fewest images a tenth at most is kept, and all cost the same."""
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


def measure(dataset: Dataset, quick: bool) -> dict[str, Any]:
    """Seconds per epoch in one process and on workers, bytes sent, and peak memory with and without a limit."""
    cores, counts = available_cores(), [times * len(dataset.train_images) for times in TIMES]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        write(shifted(dataset, counts[-1]), folder)
        images = load_idx(folder)
        found = {
            "threads": cores,
            "parameter_bytes": sum(parameter.nbytes for parameter in network(images).parameters),
            "hash_bytes_per_second": hash_rate(folder / FILES[0].name),
            "memory": [memory(folder, limit) for limit in (None, MEMORY_LIMIT)],
        }
        places: dict[str, Place] = {PROCESS: partial(Shards, stack.enter_context(thread_pool(cores)))}
        for workers in WORKERS:
            places[_name(workers)] = stack.enter_context(connect(None, workers, cores)).batch
        sizes = {"numpy": counts, "numba": counts[:1], "sparse": [FEW, *counts]}
        return {
            **found,
            "seconds": [
                {"backend": name, "images": count, "places": seconds(places, name, limited(images, count), quick)}
                for name in sizes
                for count in sizes[name]
            ],
            "bytes": {
                _name(workers): bytes_sent(places[_name(workers)], limited(images, counts[0])) for workers in WORKERS
            },
        }


def seconds(places: dict[str, Place], name: str, images: Dataset, quick: bool) -> dict[str, Any]:
    """Seconds per epoch in each place, in turn; all end with the same bits."""
    networks = {place: network(images) for place in places}
    steps = {place: step(places[place], name, images, networks[place]) for place in places}
    found = interleave(steps, 2 if quick else 7)
    alike = {b"".join(parameter.tobytes() for parameter in mlp.parameters) for mlp in networks.values()}
    if len(alike) > 1:
        raise AssertionError(f"{name} on {len(images.train_images)} images: workers and one process differ")
    return {place: summary(times) for place, times in found.items()}


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


def memory(folder: Path, limit: int | None) -> dict[str, Any]:
    """The command line in a process of its own on all images: its peak memory in bytes, and seconds per epoch."""
    options = ["--dataset", "idx", "--data", folder, "--backend", "numpy", "--epochs", EPOCHS, "--eval-every", EPOCHS]
    options += ["--json", folder / "history.json", *(["--memory-limit", limit] if limit is not None else [])]
    command = [sys.executable, "-c", PROGRAM, "train", *map(str, options)]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    times = [epoch["seconds"] for epoch in json.loads((folder / "history.json").read_text())["history"]]
    return {"limit": limit, "peak_bytes": 1024 * int(kilobytes), "seconds": summary(np.array(times[1:]))}


def write(dataset: Dataset, folder: Path) -> None:
    """Four IDX files, as MNIST's are."""
    for file, array in zip(FILES, dataset[1:]):
        shape = (len(array), *file.shape[1:])
        header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
        with (folder / file.name).open("wb") as stream:
            stream.write(header)
            array.tofile(stream)


def traffic(images: Dataset, workers: Iterable[int], epochs: int = 5) -> list[dict[str, float]]:
    """Of an epoch on so many workers: bytes through the client's sockets, tasks, and seconds more than in one process.

    Scheduler and workers are processes of their own, of which more than there are cores share these: their seconds are
    an upper bound.
    """
    found = []
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
            for _ in range(epochs):
                train()
            seconds = (time.perf_counter() - start) / epochs
            client.submit = original  # type: ignore[method-assign]
            sent = (_socket_bytes() - before) / epochs
            found.append(
                {
                    "workers": count,
                    "client_bytes": sent,
                    "tasks": len(submitted) / epochs,
                    "seconds": max(0.0, seconds - alone(images, count)),
                }
            )
    return found


def alone(images: Dataset, threads: int) -> float:
    """Median seconds of an epoch in this process, on no more threads than there are cores."""
    with thread_pool(min(threads, available_cores())) as run:
        train = step(partial(Shards, run), "sparse", images, network(images))
        return float(np.median(interleave({PROCESS: train}, 3)[PROCESS]))


def growth(dataset: Dataset, folder: Path, counts: Iterable[int]) -> list[dict[str, float]]:
    """Microseconds for an image and peak of the process's own memory, through memory maps and with a limit.

    Files of any size are the images again and again. Pages of the mapped files are not counted: the system takes them
    back when it needs them.
    """
    found = []
    for count in counts:
        repeat(dataset, folder, count)
        images = load_idx(folder)
        with thread_pool(available_cores()) as run:
            mlp, memory = network(images), Memory(GROWTH_LIMIT)
            batch = Shards(run, get_backend("sparse"), images.train_images, images.train_labels, mlp.dtype, memory)
            times, own = [], []
            for _ in range(2 if count > 10**6 else 5):
                start = time.perf_counter()
                descend(mlp, batch, LEARNING_RATE, lambda images: own.append(_own_bytes()))  # noqa: B023
                times.append(time.perf_counter() - start)
        del batch
        found.append({"images": count, "microseconds": 1e6 * float(np.median(times)) / count, "own_bytes": max(own)})
    return found


def repeat(dataset: Dataset, folder: Path, count: int) -> None:
    """Write so many training images, those of the data set again and again."""
    write(dataset, folder)
    for file, array in zip(FILES[:2], dataset[1:3]):
        shape = (count, *file.shape[1:])
        with (folder / file.name).open("wb") as stream:
            stream.write(bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape))
            for start in range(0, count, len(array)):
                array[: count - start].tofile(stream)


def calculation(found: dict[str, Any], workers: int, images: float) -> dict[str, float]:
    """What training on workers like this machine would take: computed, not measured.

    Assumed: the cost of an image is that of the largest number measured here, and shared by all threads; the scheduler
    takes as long for each task as here, one after the other; sums travel up the tree, `FAN_IN` to a worker, and the
    parameters down as many levels, at `BANDWIDTH`; hashing keeps all threads busy, twice, and disks keep up.

    Returns
    -------
    dict[str, float]
        Seconds of arithmetic in an epoch; seconds of tasks and of network in it; seconds of hashing, before the first.
    """
    few, many = found["traffic"][0], found["traffic"][-1]
    task = max(0.0, many["seconds"] - few["seconds"]) / (many["tasks"] - few["tasks"])
    threads = min(len(shard_ranges(int(images))), workers * found["threads"])
    levels = math.ceil(math.log(workers, FAN_IN)) if workers > 1 else 0
    per_image = 1e-6 * found["growth"][-1]["microseconds"] * found["threads"]
    return {
        "arithmetic": images * per_image / threads,
        "tasks": few["seconds"] + task * (many["tasks"] / many["workers"]) * workers,
        "network": (2 + 2 * levels * FAN_IN) * found["parameter_bytes"] / BANDWIDTH,
        "hashing": 2 * images * 784 / found["hash_bytes_per_second"] / threads,
    }


def _name(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def _loopback_bytes() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def _own_bytes() -> int:
    """Memory of this process that no file backs."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def _socket_bytes() -> int:
    """Bytes that have passed through this process's TCP connections, in both directions: tcp_info of linux/tcp.h."""
    total = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            with socket.socket(fileno=os.dup(connection.fd)) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            total += sum(struct.unpack_from("QQ", info, 120))  # acknowledged by the other side, received
    return total


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    digits, (threads, start) = load_dataset(), (available_cores(), time.perf_counter())
    with TemporaryDirectory() as folder:
        found = {
            "threads": threads,
            "parameter_bytes": sum(parameter.nbytes for parameter in network(digits).parameters),
            "growth": growth(digits, Path(folder), QUICK_GROWTH if quick else GROWTH),
            "hash_bytes_per_second": hash_rate(Path(folder) / FILES[0].name),
        }
    found["traffic"] = traffic(limited(digits, FEW_EACH), (1, 2) if quick else MANY_WORKERS)
    found["calculated"] = {workers: calculation(found, workers, 1e9) for workers in (16, 128, 1024)}
    found["seconds"] = time.perf_counter() - start
    print(json.dumps(found, indent=1))
