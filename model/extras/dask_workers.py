"""The trainer's shards on the workers of a Dask cluster: the same bits, on however many, whichever of them die.

A worker gets a contiguous range of the shards. In an epoch it gets the network and returns sums of its shards: those
subtrees of the fixed tree of sums that lie within its range. The client adds them along the rest of the tree.

Everything is a task that depends on its arguments alone, so Dask may run it anywhere, and again when a worker dies: the
images of a shard, where the client sends them; a worker's `Part`, which keeps its shards prepared; the sums of a part.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import logging
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, WorkerPlugin, get_worker, wait
from distributed import TimeoutError as NotYet
from distributed.comm import CommClosedError, get_address_host_port
from llvmlite import binding
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from kernels import get_backend
from kernels.backend import Backend
from model.cli.signals import SIGNALS
from model.mlp import MLP
from model.shards import Memory, Shard, Sums, add, add_in_tree, mean, shard_ranges
from model.threads import thread_pool
from model.training import TrainingError

PATIENCE = 60.0
"""Seconds to wait for a first worker, and for another one when all are gone."""
LOOK = 1.0
"""Seconds between looks at whether there are workers."""
ALLOWED_FAILURES = 3
"""How often all workers may die in one step, as in Dask's setting for a single task."""

PACKAGES = ("distributed", "numpy", "numba", "llvmlite")
DEADLY = "worker after worker dies of the same work, of too little memory perhaps (--memory-limit helps)"
ADVICE = "scheduler and workers need the client's environment, and the workers one kind of processor"

Node = tuple[int, int]
"""A subtree of the tree of sums: of the shards from the first number up to the second, exclusive."""


class ClusterError(TrainingError):
    """The cluster cannot be used, or not any longer; the message says why."""


# The tree of sums ----------------------------------------------------------------------------------------------------


def middle(node: Node) -> int:
    """Where `add_in_tree` divides a sum of two or more: the first part has the largest power of two that leaves one."""
    start, stop = node
    return start + 2 ** ((stop - start - 1).bit_length() - 1)


def subtrees(first: int, last: int, node: Node) -> list[Node]:
    """The largest subtrees of a node that lie within the shards from `first` up to `last`, in order."""
    start, stop = node
    if last <= start or stop <= first:
        return []
    if first <= start and stop <= last:
        return [node]
    half = middle(node)
    return [*subtrees(first, last, (start, half)), *subtrees(first, last, (half, stop))]


def add_subtrees(sums: dict[Node, Sums], node: Node) -> Sums:
    """What `add_in_tree` makes of the shards of a node, from the sums of its subtrees, which it uses up."""
    if node in sums:
        return sums.pop(node)
    half = middle(node)
    return add(add_subtrees(sums, (node[0], half)), add_subtrees(sums, (half, node[1])))


# On the workers ------------------------------------------------------------------------------------------------------


def send(images: NDArray, labels: NDArray) -> tuple[NDArray, NDArray]:
    """A shard from the client. As a task, Dask can do it again, while scattered data die with their worker."""
    return images, labels


class Mapped(NamedTuple):
    """A range of a file that a worker reads through a memory map of its own."""

    file: str
    offset: int
    shape: tuple[int, ...]
    sha256: str

    def read(self) -> NDArray:
        """The bytes, once they are found to be those that the client has."""
        try:
            array = np.memmap(self.file, np.uint8, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"worker {get_worker().address} cannot read {self.file} ({error}): "
                "put the files where all workers find them under the same name"
            ) from error
        if _sha256(array) != self.sha256:
            raise ClusterError(f"{self.file} of worker {get_worker().address} is not the file that the client has")
        return array


class Part:
    """The shards of a worker. It travels unprepared: whoever receives it prepares it anew.

    Parameters
    ----------
    shards
        Of each the images and the labels: arrays, or where they are `Mapped`.
    nodes
        The subtrees that are to be summed: neighbours that cover the shards.
    backend, dtype
        The kernels' name, and float32 or float64.
    memory_limit
        Of the worker's process, in bytes.
    expected
        The `surroundings` in which bits agree.
    """

    def __init__(
        self,
        shards: list[tuple[Any, Any]],
        nodes: list[Node],
        backend: str,
        dtype: np.dtype,
        memory_limit: int | None,
        expected: dict[str, str],
    ) -> None:
        self.sources = shards
        self.nodes = nodes
        self.backend = backend
        self.dtype = dtype
        self.memory_limit = memory_limit
        self.expected = expected

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def __sizeof__(self) -> int:
        """What Dask takes into account before it moves a part or gives a worker more."""
        prepared = itertools.chain(*(shard.kept.values() for shard in vars(self).get("shards", ())))
        return sum(getattr(x, "nbytes", 0) for x in prepared)

    @functools.cached_property
    def shards(self) -> list[Shard]:
        """The shards, prepared."""
        check_same(get_worker().address, surroundings(), self.expected)
        backend, memory = get_backend(self.backend), _memory(self.memory_limit)
        shards = []
        for images, labels in self.sources:
            if isinstance(images, Mapped):
                images, labels = images.read(), labels.read()
            shards.append(Shard(backend, images, labels, self.dtype, memory))
        list(_run()(Shard.prepare, shards))
        return shards

    def is_prepared(self) -> bool:
        """Whether it is; waits until so."""
        return len(self.shards) > 0

    def gradient(self, mlp: MLP) -> dict[Node, Sums]:
        """The sums of each node."""
        shards = iter(_run()(lambda shard: shard.gradient(mlp), self.shards))
        return {(start, stop): add_in_tree(next(shards) for _ in range(start, stop)) for start, stop in self.nodes}

    def losses(self, mlp: MLP) -> list[tuple[float, int]]:
        """Loss and correct count of each shard."""
        return list(_run()(lambda shard: shard.loss(mlp), self.shards))


def prepare(*arguments: Any) -> Part:
    """A `Part` whose shards are prepared."""
    part = Part(*arguments)
    _ = part.shards
    return part


def surroundings() -> dict[str, str]:
    """What bits depend on besides data and settings, of this process."""
    root = Path(__file__).parents[2]
    files = sorted(file for folder in ("kernels", "model") for file in (root / folder).rglob("*.py"))
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    every_blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    blas = [library for library in every_blas if "numpy" in library["filepath"]] or every_blas  # SciPy has its own
    cpu = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    return {
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "source of this project": source.hexdigest()[:12],
        "processor": f"{cpu}, BLAS for {blas[0].get('architecture') if blas else 'any'}",
    }


def check_same(worker: str, ours: dict[str, str], expected: dict[str, str]) -> None:
    """Raise a ClusterError that lists what differs."""
    if differences := [f"{name} {ours[name]}, not {value}" for name, value in expected.items() if ours[name] != value]:
        raise ClusterError(f"worker {worker} would compute other bits: {'; '.join(differences)}: {ADVICE}")


_forever = ExitStack()


def _run() -> Callable:
    """Maps on as many threads as the worker has."""
    return _thread_pool(get_worker().state.nthreads)


@functools.cache
def _thread_pool(threads: int) -> Callable:
    """For as long as the process lives, as tasks may overlap and all need their BLAS held to one thread."""
    return _forever.enter_context(thread_pool(threads))


@functools.cache
def _memory(limit: int | None) -> Memory:
    """Shared by all parts of the process."""
    return Memory(limit)


# On the client -------------------------------------------------------------------------------------------------------


class Cluster:
    """Workers to train on.

    Parameters
    ----------
    client
        Connected to their scheduler.
    patience
        Seconds to wait for a first worker, and for another one when all are gone.

    Raises
    ------
    ClusterError
        If there is no worker in time, or one would compute other bits.
    """

    def __init__(self, client: Client, patience: float = PATIENCE) -> None:
        self.client = client
        self.patience = patience
        self.address = client.scheduler.address
        with self.explained():
            versions: Any = client.get_versions()
            self.threads()
            try:
                processor = client.submit(surroundings, pure=False).result(timeout=patience)["processor"]
            except RuntimeError as error:  # the scheduler says so of what it cannot deserialize
                raise ClusterError(f"the scheduler does not know this project: {ADVICE}") from error
        ours, version = surroundings(), versions["scheduler"]["packages"]["distributed"]
        if version != ours["distributed"]:
            raise ClusterError(f"the scheduler has distributed {version}, not {ours['distributed']}: {ADVICE}")
        self.expected = ours | {"processor": processor}

    def batch(self, backend: Backend, images: NDArray, labels: NDArray, dtype: np.dtype, memory: Memory) -> "Parts":
        """For `train`: images on the workers, each of which has so much memory."""
        return Parts(self, backend, images, labels, dtype, memory)

    def threads(self) -> dict[str, int]:
        """The threads of each worker, by address; waits until there is one."""
        end = time.monotonic() + self.patience
        while not (threads := self.client.nthreads()):
            if time.monotonic() > end:
                raise ClusterError(
                    f"no worker for {self.patience:g} seconds: start some, as in: dask worker {self.address}"
                )
            time.sleep(LOOK / 10)
        return dict(sorted(threads.items()))

    def computes(self, futures: Iterable[Future]) -> bool:
        """Whether one of these is being computed."""
        computed = set(itertools.chain(*self.client.processing().values()))
        return any(future.key in computed for future in futures)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what goes wrong between processes into a `ClusterError`."""
        try:
            yield
        except KilledWorker as error:
            raise ClusterError(f"{DEADLY}: {error}") from error
        except NotYet as error:
            raise ClusterError(f"no worker answers for {self.patience:g} seconds: {ADVICE}") from error
        except ModuleNotFoundError as error:
            raise ClusterError(f"the cluster lacks a package ({error}): {ADVICE}") from error
        except (CancelledError, CommClosedError, OSError) as error:
            raise ClusterError(f"the scheduler at {self.address} is gone ({type(error).__name__})") from error


class Parts:
    """A `Batch` on the workers of a cluster: each has shards in proportion to its threads, and keeps them."""

    def __init__(
        self, cluster: Cluster, backend: Backend, images: NDArray, labels: NDArray, dtype: np.dtype, memory: Memory
    ) -> None:
        self.cluster = cluster
        self.count = len(images)
        self.images, self.labels = images, labels
        self.ranges = shard_ranges(self.count)
        self.form = backend.name, dtype, memory.limit, cluster.expected
        self.sources = [self._source(rows) for rows in self.ranges]
        self.parts: dict[Node, tuple[str, Future]] = {}
        for _ in self._each(Part.is_prepared):
            pass

    def gradient(self, mlp: MLP, on_images: Callable[[int], None] = lambda images: None) -> Sums:
        """Sums over all images; calls `on_images` with the images of each finished worker."""
        sums: dict[Node, Sums] = {}
        for (first, last), found in self._each(Part.gradient, mlp):
            on_images(self.ranges[last - 1].stop - self.ranges[first].start)
            sums.update(found)
        return add_subtrees(sums, (0, len(self.ranges)))

    def evaluate(self, mlp: MLP) -> tuple[float, float]:
        """Mean loss and accuracy over all images."""
        found = dict(self._each(Part.losses, mlp))
        return mean(itertools.chain(*(found[shards] for shards in sorted(found))), self.count)

    def _each(self, method: Callable, *arguments: Any) -> Iterator[tuple[Node, Any]]:
        """What `method` returns of each part, as it finishes, with the numbers of its shards."""
        submit = functools.partial(self.cluster.client.submit, method, pure=False)
        failures = 0
        with self.cluster.explained():
            self._deal()
            pending = {submit(part, *arguments): shards for shards, (_, part) in self.parts.items()}
            while pending:
                try:
                    with self.cluster.client.as_current():
                        done = wait(list(pending), timeout=LOOK, return_when="FIRST_COMPLETED").done
                    for future in done:
                        yield pending[future], future.result(timeout=self.cluster.patience)
                        del pending[future]
                except NotYet:
                    workers = itertools.cycle(self.cluster.threads())
                    # When the last worker dies, Dask leaves tasks that are for it alone, even when others come.
                    if not self.cluster.computes([*pending, *self._held()]):
                        failures += 1
                        if failures > ALLOWED_FAILURES:
                            raise ClusterError(f"{DEADLY}: all workers died {failures} times in one step") from None
                        for shards in pending.values():
                            self._place(next(workers), shards)
                        pending = {submit(self.parts[shards][1], *arguments): shards for shards in pending.values()}

    def _deal(self) -> None:
        """Give each worker its shards; if they are the same as before, they keep what they have."""
        threads = self.cluster.threads()
        total = sum(threads.values())
        bounds = [len(self.ranges) * before // total for before in itertools.accumulate(threads.values(), initial=0)]
        dealt = {shards: worker for worker, shards in zip(threads, itertools.pairwise(bounds)) if shards[0] < shards[1]}
        for shards in [shards for shards, (worker, _) in self.parts.items() if dealt.get(shards) != worker]:
            del self.parts[shards]
        for shards in dealt.keys() - self.parts.keys():
            self._place(dealt[shards], shards)

    def _place(self, worker: str, shards: Node) -> None:
        """Have shards prepared by a worker, or by another if it dies."""
        sources, nodes = self.sources[slice(*shards)], subtrees(*shards, (0, len(self.ranges)))
        place = {"workers": [worker], "allow_other_workers": True, "pure": False}
        self.parts[shards] = worker, self.cluster.client.submit(prepare, sources, nodes, *self.form, **place)

    def _source(self, rows: slice) -> Any:
        """A shard's images and labels, for a worker."""
        if isinstance(self.images, np.memmap):
            return _mapped(self.images, rows), _mapped(self.labels, rows)
        return self.cluster.client.submit(send, self.images[rows], self.labels[rows], pure=False)

    def _held(self) -> Iterator[Future]:
        """All that the workers hold."""
        yield from (part for _, part in self.parts.values())
        yield from (source for source in self.sources if isinstance(source, Future))


def _mapped(array: Any, rows: slice) -> Mapped:
    """Some rows of a memory map."""
    part = array[rows]
    return Mapped(str(array.filename), array.offset + rows.start * array.strides[0], part.shape, _sha256(part))


def _sha256(array: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


class LeaveSignalsToClient(WorkerPlugin):
    """Ctrl-C reaches all processes of a terminal, but is for the client to handle."""

    def setup(self, worker: Any) -> None:
        """Ignore them."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def connect(scheduler: str | None, workers: int | None = None, threads: int = 1) -> Iterator[Cluster]:
    """A cluster for the duration of the block.

    Parameters
    ----------
    scheduler
        Address of one that runs, as in ``tcp://HOST:8786``; None starts a cluster on this machine.
    workers, threads
        How many processes that one gets, and how many threads these share.

    Raises
    ------
    ClusterError
        If there is no scheduler, or `Cluster` raises it.
    """
    with ExitStack() as stack:
        logging.disable(logging.CRITICAL)  # Dask logs the tracebacks of what `explained` says in a line
        stack.callback(logging.disable, logging.NOTSET)
        address: Any = scheduler
        if scheduler is None:
            share = max(1, threads // (workers or 1))
            with warnings.catch_warnings():  # the dashboard then takes another port, which its link says
                warnings.filterwarnings("ignore", "Port .* is already in use")
                address = stack.enter_context(LocalCluster(n_workers=workers, threads_per_worker=share))
        try:
            if scheduler is not None:
                get_address_host_port(scheduler)  # with a wrong one, a client would hang at its end
            client = stack.enter_context(Client(address, set_as_default=False))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no scheduler answers at {scheduler} ({error}): start one, as in: dask scheduler"
            ) from error
        if scheduler is None:
            client.register_plugin(LeaveSignalsToClient())
        yield Cluster(client)
