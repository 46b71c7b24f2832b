"""The trainer's shards on the workers of a Dask cluster: the same bits on any number of workers, even if some die.

A worker gets a contiguous range of the shards. In each epoch it receives the network and sums its shards, up to the
largest subtrees of the fixed tree of sums within its range. Workers send these sums to each other and add neighbours,
until one of them holds the root. The client sends the network once and receives one sum, regardless of the number of
workers.

Every task is pure: it depends only on its arguments and never writes to them. So Dask may run it anywhere, and again
when a worker dies. The tasks are: the images of a shard, if the client sends them; a worker's `Part`, which keeps its
shards prepared; the sums of a part; the sums of several parts.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import logging
import math
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, WorkerPlugin, get_worker, wait
from distributed import TimeoutError as DaskTimeout
from distributed.comm import CommClosedError, get_address_host_port
from llvmlite import binding
from numpy.typing import NDArray

from kernels import get_backend
from kernels.backend import Backend
from model.data import DIGEST, digests, shard_digest
from model.environment import numpy_blas
from model.mapping import map_bytes
from model.mlp import MLP
from model.shards import Memory, Shard, Sums, add, add_in_tree, mean, shard_ranges
from model.signals import SIGNALS
from model.threads import thread_pool
from model.training import TrainingError

WORKER_TIMEOUT = 60.0
"""Seconds to wait for the first worker, and for a new one when all are gone."""
POLL_SECONDS = 1.0
"""Seconds between checks for workers."""
ALLOWED_FAILURES = 3
"""How often all workers may die within a step, like Dask's setting for a single task."""
FAN_IN = 8
"""Sums added in one task. A higher fan-in means fewer tasks; the scheduler handles a few thousand per second."""
SPOT_CHECKS = 16
"""Shards of a file that the client hashes itself, to check that the workers have the same file."""

PACKAGES = ("distributed", "numpy", "numba", "llvmlite")
DEADLY = "one worker after another died on the same task, perhaps out of memory (--memory-limit helps)"
ADVICE = "scheduler and workers need the client's environment, and the workers the same kind of CPU"

Node = tuple[int, int]
"""A subtree of the tree of sums: shards from the first number up to the second, which is excluded."""


class ClusterError(TrainingError):
    """The cluster is unusable, or has become so; the message says why."""


# The tree of sums ----------------------------------------------------------------------------------------------------


def subtrees(first: int, last: int, node: Node) -> list[Node]:
    """The largest subtrees of a node within the shards from `first` up to `last` (excluded), in order."""
    start, stop = node
    if last <= start or stop <= first:
        return []
    if first <= start and stop <= last:
        return [node]
    half = (start + stop) // 2  # the number of shards is a power of two
    return [*subtrees(first, last, (start, half)), *subtrees(first, last, (half, stop))]


def add_subtrees(sums: dict[Node, Sums], node: Node) -> Sums:
    """The same sum as `add_in_tree` over the shards of a node, from the sums of its subtrees, which are consumed."""
    if node in sums:
        return sums.pop(node)
    half = sum(node) // 2
    return add(add_subtrees(sums, (node[0], half)), add_subtrees(sums, (half, node[1])))


# On the workers ------------------------------------------------------------------------------------------------------


def send(value: Any) -> Any:
    """Return the client's data. Dask can repeat this task, whereas scattered data is lost with its worker."""
    return value


class Mapped(NamedTuple):
    """Rows of a file that each worker maps into memory."""

    file: str
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def rows(cls, array: Any, rows: slice) -> "Mapped":
        """Rows of a memory map."""
        return cls(str(array.filename), array.offset + rows.start * array.strides[0], array[rows].shape)

    def read(self) -> NDArray:
        """Map the rows, without reading them."""
        try:
            return map_bytes(Path(self.file), self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"worker {get_worker().address} cannot read {self.file} ({error}): "
                "put the files where all workers find them under the same path"
            ) from error


def hash_shards(mapped: Mapped, ranges: list[slice]) -> bytes:
    """The concatenated digests of ranges of rows."""
    array = mapped.read()
    return b"".join(_parallel_map()(lambda rows: shard_digest(array[rows]), ranges))


class Hashed(NamedTuple):
    """Rows that are verified when they are read."""

    mapped: Mapped
    digests: bytes
    """The digests of the shards."""

    def read(self, ranges: list[slice]) -> list[NDArray]:
        """The shards, after their hashes have been verified."""
        if hash_shards(self.mapped, ranges) != self.digests:
            raise ClusterError(
                f"{self.mapped.file} of worker {get_worker().address} differs from that of other workers: copy it again"
            )
        array = self.mapped.read()
        return [array[rows] for rows in ranges]


class Part:
    """The shards of a worker. Pickling leaves out the prepared images; the receiver prepares them again.

    Parameters
    ----------
    images, labels
        Those of each shard, or one `Hashed` for all.
    shards
        The range of shard numbers, with the end excluded.
    count
        The number of images in all parts.
    backend, dtype
        The backend's name, and float32 or float64.
    memory_limit
        Maximum bytes of prepared images in the worker's process; None means no limit.
    expected
        The `fingerprint` that the worker must have for bitwise equal results.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        shards: Node,
        count: int,
        backend: str,
        dtype: np.dtype,
        memory_limit: int | None,
        expected: dict[str, str],
    ) -> None:
        self.images, self.labels = images, labels
        self.ranges = shard_ranges(count, get_backend(backend).images_at_once)
        self.nodes = subtrees(*shards, (0, len(self.ranges)))
        self.numbers = shards
        self.backend = backend
        self.dtype = dtype
        self.memory_limit = memory_limit
        self.expected = expected

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def __sizeof__(self) -> int:
        """Bytes of prepared images, by which Dask decides whether to move a part or give the worker more."""
        return sum(getattr(shard.kept, "nbytes", 0) for shard in vars(self).get("shards", ()))

    @functools.cached_property
    def shards(self) -> list[Shard]:
        """The shards, prepared."""
        check_same(get_worker().address, fingerprint(), self.expected)
        backend, memory = get_backend(self.backend), _memory(self.memory_limit)
        sources = self.images, self.labels
        if isinstance(self.images, Hashed):
            ranges = relative(self.ranges[slice(*self.numbers)])
            sources = self.images.read(ranges), self.labels.read(ranges)
        shards = [Shard(backend, images, labels, self.dtype, memory) for images, labels in zip(*sources)]
        list(_parallel_map()(Shard.prepare, shards))
        return shards

    def wait_until_prepared(self, _: None) -> list:
        """Return an empty list, which `chain` can add, once the part is prepared."""
        return self.shards[:0]

    def gradient(self, mlp: MLP) -> dict[Node, Sums]:
        """The sums of each subtree."""
        shards = iter(_parallel_map()(lambda shard: shard.gradient(mlp), self.shards))
        return {(start, stop): add_in_tree(next(shards) for _ in range(start, stop)) for start, stop in self.nodes}

    def losses(self, mlp: MLP) -> list[tuple[float, int]]:
        """Loss and correct count of each shard."""
        return list(_parallel_map()(lambda shard: shard.loss(mlp), self.shards))


def prepare(*arguments: Any) -> Part:
    """Make a `Part` and prepare its shards."""
    part = Part(*arguments)
    _ = part.shards
    return part


def merge(shards: int, *parts: dict[Node, Sums]) -> dict[Node, Sums]:
    """The sums of neighbouring parts, added where two subtrees form a larger one, in a tree of `shards` shards."""
    sums = {node: _copy(sums) for part in parts for node, sums in part.items()}
    first, last = min(start for start, _ in sums), max(stop for _, stop in sums)
    return {node: add_subtrees(sums, node) for node in subtrees(first, last, (0, shards))}


def _copy(sums: Sums) -> Sums:
    """A copy for `add`, which works in place: Dask may need the task's arguments again."""
    return sums._replace(gradient=[part.copy() for part in sums.gradient])


def chain(*parts: list) -> list:
    """The items of all parts."""
    return [*itertools.chain(*parts)]


def relative(ranges: list[slice]) -> list[slice]:
    """Ranges relative to the start of the first."""
    start = ranges[0].start
    return [slice(rows.start - start, rows.stop - start) for rows in ranges]


def fingerprint() -> dict[str, str]:
    """Everything about this process, besides data and settings, that determines the bits of a result."""
    root = Path(__file__).parents[2]
    files = sorted(file for folder in ("kernels", "model") for file in (root / folder).rglob("*.py"))
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    blas = numpy_blas()
    cpu = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    return {
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "source of this project": source.hexdigest()[:12],
        "processor": f"{cpu}, BLAS for {blas[0].get('architecture') if blas else 'any'}",
    }


def check_same(worker: str, ours: dict[str, str], expected: dict[str, str]) -> None:
    """Raise a ClusterError that lists the differences."""
    if differences := [f"{name} {ours[name]}, not {value}" for name, value in expected.items() if ours[name] != value]:
        raise ClusterError(f"worker {worker} would compute different bits: {'; '.join(differences)}: {ADVICE}")


_forever = ExitStack()


def _parallel_map() -> Callable:
    """A map over the worker's threads."""
    return _thread_pool(get_worker().state.nthreads)


@functools.cache
def _thread_pool(threads: int) -> Callable:
    """A pool for the lifetime of the process: tasks may overlap, and all need BLAS limited to one thread."""
    return _forever.enter_context(thread_pool(threads))


@functools.cache
def _memory(limit: int | None) -> Memory:
    """The budget that all parts in the process share."""
    return Memory(limit)


# On the client -------------------------------------------------------------------------------------------------------


class Cluster:
    """Workers to train on.

    Parameters
    ----------
    client
        Connected to their scheduler.
    timeout
        Seconds to wait for the first worker, and for a new one when all are gone.

    Raises
    ------
    ClusterError
        If no worker appears in time, or one would compute different bits.
    """

    def __init__(self, client: Client, timeout: float = WORKER_TIMEOUT) -> None:
        self.client = client
        self.timeout = timeout
        self.address = client.scheduler.address
        with self.explained():
            versions: Any = client.get_versions()
            self.threads()
            try:
                processor = client.submit(fingerprint, pure=False).result(timeout=timeout)["processor"]
            except RuntimeError as error:  # the scheduler could not deserialize it
                raise ClusterError(f"the scheduler cannot import this project: {ADVICE}") from error
        ours, version = fingerprint(), versions["scheduler"]["packages"]["distributed"]
        if version != ours["distributed"]:
            raise ClusterError(f"the scheduler has distributed {version}, not {ours['distributed']}: {ADVICE}")
        self.expected = ours | {"processor": processor}

    def batch(self, backend: Backend, images: NDArray, labels: NDArray, dtype: np.dtype, memory: Memory) -> "Parts":
        """A `Batch` on the workers for `train`; each worker process has this memory budget."""
        return Parts(self, backend, images, labels, dtype, memory)

    def digests(self, array: NDArray, ranges: list[slice] | None = None) -> bytes:
        """The digests of ranges of rows, or of those of `model.data.sha256`. Workers hash memory-mapped files.

        A worker hashes the shards that its neighbour will read and hash again, which detects copies that differ. The
        client also hashes a few shards, in case the workers share a file that differs from its own.
        """
        if not isinstance(array, np.memmap):
            return digests(array)
        ranges = ranges or shard_ranges(len(array))
        dealt = deal(len(ranges), self.threads())
        workers = list(dealt)
        futures = []
        with self.explained():
            for worker, (first, last) in zip([*workers[1:], *workers], dealt.values()):
                part = ranges[first:last]
                if part:
                    mapped = Mapped.rows(array, slice(part[0].start, part[-1].stop))
                    place = {"workers": [worker], "allow_other_workers": True, "pure": False}
                    futures.append(self.client.submit(hash_shards, mapped, relative(part), **place))
            hashes = b"".join(self.client.gather(futures))
        for shard in range(0, len(ranges), math.ceil(len(ranges) / SPOT_CHECKS)):
            if shard_digest(array[ranges[shard]]) != hashes[DIGEST * shard : DIGEST * (shard + 1)]:
                raise ClusterError(f"{array.filename} of a worker differs from the client's: copy it again")
        return hashes

    def threads(self) -> dict[str, int]:
        """The number of threads of each worker, by address; waits until there is a worker."""
        end = time.monotonic() + self.timeout
        while not (threads := self.client.nthreads()):
            if time.monotonic() > end:
                raise ClusterError(
                    f"no worker for {self.timeout:g} seconds: start one with: dask worker {self.address}"
                )
            time.sleep(POLL_SECONDS / 10)
        return dict(sorted(threads.items()))

    def computes(self, futures: Iterable[Future]) -> bool:
        """Whether any of these is being computed."""
        computed = set(itertools.chain(*self.client.processing().values()))
        return any(future.key in computed for future in futures)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn failures between processes into a `ClusterError`."""
        try:
            yield
        except KilledWorker as error:
            raise ClusterError(f"{DEADLY}: {error}") from error
        except DaskTimeout as error:
            raise ClusterError(f"no worker answers for {self.timeout:g} seconds: {ADVICE}") from error
        except ModuleNotFoundError as error:
            raise ClusterError(f"the cluster lacks a package ({error}): {ADVICE}") from error
        except (CancelledError, CommClosedError, OSError) as error:
            raise ClusterError(f"the scheduler at {self.address} is gone ({type(error).__name__})") from error


def deal(shards: int, threads: dict[str, int]) -> dict[str, Node]:
    """The shards of each worker, in proportion to its threads."""
    total = sum(threads.values())
    bounds = [shards * before // total for before in itertools.accumulate(threads.values(), initial=0)]
    return dict(zip(threads, itertools.pairwise(bounds)))


class Parts:
    """A `Batch` on the workers of a cluster: each keeps a number of shards in proportion to its threads."""

    def __init__(
        self, cluster: Cluster, backend: Backend, images: NDArray, labels: NDArray, dtype: np.dtype, memory: Memory
    ) -> None:
        self.cluster = cluster
        self.count = len(images)
        self.ranges = shard_ranges(self.count, backend.images_at_once)
        self.form = backend.name, dtype, memory.limit, cluster.expected
        self.sent: list[Future] = []
        self.sources = [self._source(array) for array in (images, labels)]
        self.parts: dict[Node, tuple[str, Future]] = {}
        self._reduce(Part.wait_until_prepared, chain)

    def gradient(self, mlp: MLP, on_images: Callable[[int], None] = lambda images: None) -> Sums:
        """Sums over all images; calls `on_images` with the images of each finished worker."""
        (sums,) = self._reduce(Part.gradient, functools.partial(merge, len(self.ranges)), mlp, on_images).values()
        return sums

    def evaluate(self, mlp: MLP) -> tuple[float, float]:
        """Mean loss and accuracy over all images."""
        return mean(self._reduce(Part.losses, chain, mlp), self.count)

    def _reduce(
        self,
        method: Callable,
        combine: Callable,
        mlp: MLP | None = None,
        on_images: Callable[[int], None] = lambda images: None,
    ) -> Any:
        """The results of `method` on each part, combined in order on the workers."""
        finished = failures = 0
        with self.cluster.explained(), self.cluster.client.as_current():
            while True:
                self._deal()
                network = self._submit(send, mlp)
                shards = sorted(self.parts)
                leaves = [self._submit(method, self.parts[part][1], network) for part in shards]
                pending = {leaf: self._images(part) for leaf, part in zip(leaves, shards)}
                tree = [leaves]
                while len(tree[-1]) > 1:
                    groups = [tree[-1][first : first + FAN_IN] for first in range(0, len(tree[-1]), FAN_IN)]
                    tree.append([self._submit(combine, *group) for group in groups])
                (root,) = tree[-1]
                submitted = [network, *itertools.chain(*tree)]
                while self._makes_progress(submitted):
                    for leaf in [leaf for leaf in pending if leaf.done()]:
                        del pending[leaf]
                    passed = self.count - sum(pending.values())
                    if passed > finished:  # do not count those of a second attempt
                        on_images(passed - finished)
                        finished = passed
                    if root.done():
                        with suppress(DaskTimeout):  # its worker has died in the meantime
                            return root.result(timeout=self.cluster.timeout)
                failures += 1
                if failures > ALLOWED_FAILURES:
                    raise ClusterError(f"{DEADLY}: all workers died {failures} times in one step")
                self.parts.clear()

    def _makes_progress(self, submitted: list[Future]) -> bool:
        """Wait a moment; return whether a task is done or being computed. If all workers have died, Dask may hang.

        When the last worker dies, some tasks stay assigned to it, even after new workers join.
        """
        unfinished = [future for future in submitted if not future.done()]
        if not unfinished:
            return True
        try:
            wait(unfinished, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
        except DaskTimeout:
            self.cluster.threads()
            return self.cluster.computes([*unfinished, *self._held()])
        return True

    def _submit(self, function: Callable, *arguments: Any, **options: Any) -> Future:
        return self.cluster.client.submit(function, *arguments, pure=False, **options)

    def _images(self, shards: Node) -> int:
        first, last = shards
        return self.ranges[last - 1].stop - self.ranges[first].start

    def _deal(self) -> None:
        """Assign the shards to the workers; parts that have not changed are kept."""
        dealt = deal(len(self.ranges), self.cluster.threads())
        workers = {shards: worker for worker, shards in dealt.items() if shards[0] < shards[1]}
        for shards in [shards for shards, (worker, _) in self.parts.items() if workers.get(shards) != worker]:
            del self.parts[shards]
        for shards in workers.keys() - self.parts.keys():
            self._place(workers[shards], shards)

    def _place(self, worker: str, shards: Node) -> None:
        """Submit the preparation of shards to a worker, or to another one if it dies."""
        sources = [source(*shards) for source in self.sources]
        place = {"workers": [worker], "allow_other_workers": True}
        self.parts[shards] = worker, self._submit(prepare, *sources, shards, self.count, *self.form, **place)

    def _source(self, array: NDArray) -> Callable[[int, int], Any]:
        """A function from a range of shards to a worker's share of an array."""
        if isinstance(array, np.memmap):
            hashes = self.cluster.digests(array, self.ranges)

            def hashed(first: int, last: int) -> Hashed:
                rows = slice(self.ranges[first].start, self.ranges[last - 1].stop)
                return Hashed(Mapped.rows(array, rows), hashes[DIGEST * first : DIGEST * last])

            return hashed
        self.sent += (futures := [self._submit(send, array[rows]) for rows in self.ranges])
        return lambda first, last: futures[first:last]

    def _held(self) -> Iterator[Future]:
        """All tasks that the workers hold."""
        yield from (part for _, part in self.parts.values())
        yield from self.sent


class LeaveSignalsToClient(WorkerPlugin):
    """Ctrl-C reaches all processes in a terminal, but only the client should handle it."""

    def setup(self, worker: Any) -> None:
        """Ignore them."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def connect(scheduler: str | None, workers: int | None, threads: int) -> Iterator[Cluster]:
    """A cluster for the duration of the block.

    Parameters
    ----------
    scheduler
        Address of a running scheduler, e.g. ``tcp://HOST:8786``; None starts a cluster on this machine.
    workers, threads
        Number of worker processes in the new cluster, and of threads that they share.

    Raises
    ------
    ClusterError
        If there is no scheduler, or no usable worker (see `Cluster`).
    """
    with ExitStack() as stack:
        logging.disable(logging.CRITICAL)  # Dask logs tracebacks of errors that `explained` turns into one line
        stack.callback(logging.disable, logging.NOTSET)
        address: Any = scheduler
        if scheduler is None:
            share = max(1, threads // (workers or 1))
            with warnings.catch_warnings():  # the dashboard then uses another port, shown in its link
                warnings.filterwarnings("ignore", "Port .* is already in use")
                address = stack.enter_context(LocalCluster(n_workers=workers, threads_per_worker=share))
        try:
            if scheduler is not None:
                get_address_host_port(scheduler)  # with a malformed address, the client would hang at exit
            client = stack.enter_context(Client(address, set_as_default=False))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no scheduler answers at {scheduler} ({error}): start one with: dask scheduler"
            ) from error
        if scheduler is None:
            client.register_plugin(LeaveSignalsToClient())
        yield Cluster(client)
