"""Sums over images in a fixed order: the same bits on any number of threads.

A batch is cut into **shards**, contiguous ranges of images that depend only on its size and the backend. Each goes
through the network as a whole, and their sums are added in a fixed binary tree. Floating-point addition is not
associative, but this way threads only change who computes a sum, never the order of its additions.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from threading import RLock
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.backend import Backend
from model.mlp import MLP
from model.threads import exhaust

SHARD = Backend.images_at_once
"""Maximum number of images in a shard, unless a backend prefers another: few enough that a layer's result fits in L2,
and that a second thread helps in batches of little more than a thousand images."""

ENOUGH_SHARDS = 32
"""Only batches of at least this many shards have larger ones, where the backend prefers them."""


class Sums(NamedTuple):
    """Loss, number of correct predictions and gradient, summed over images."""

    loss: float
    correct: int
    gradient: list[NDArray]


class Memory:
    """The budget for the prepared images that a process keeps.

    Parameters
    ----------
    limit
        Bytes; None means no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._lock = RLock()  # reentrant, as garbage collection may call `give_back` while it is held

    def take(self, x: Any) -> bool:
        """Whether prepared images fit in the budget; if so, they are charged to it.

        Raises
        ------
        ValueError
            If there is a limit, but `x` has no `nbytes`.
        """
        if self.limit is None:
            return True
        if not hasattr(x, "nbytes"):
            raise ValueError(f"a memory limit needs nbytes of prepared images, which {type(x).__name__} lacks")
        with self._lock:
            fits = self.used + x.nbytes <= self.limit
            self.used += x.nbytes if fits else 0
        return fits

    def give_back(self, x: Any) -> None:
        """Return prepared images to the budget."""
        if self.limit is not None:
            with self._lock:
                self.used -= x.nbytes


class Shard:
    """Images and labels, prepared for a backend.

    Prepared images that fit in `memory` are kept; the rest are prepared again whenever they are needed. Nothing is
    evicted: every epoch takes all shards in the same order, so LRU would always evict the one that is needed next.

    Parameters
    ----------
    backend, images, labels, dtype
        As for `Shards`.
    memory
        Shared by all shards of the process.
    """

    def __init__(self, backend: Backend, images: NDArray, labels: NDArray, dtype: np.dtype, memory: Memory) -> None:
        self.backend = backend
        self.images = images
        self.labels = labels
        self.dtype = dtype
        self.memory = memory
        self.kept: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __del__(self) -> None:
        if self.kept is not None:
            self.memory.give_back(self.kept)

    def prepare(self) -> None:
        """Prepare the images, and keep them if they fit."""
        self._prepared()

    def gradient(self, mlp: MLP) -> Sums:
        """Sums over all images."""
        with np.errstate(all="ignore"):  # a diverging run ends in one clear error, not in warnings
            return Sums(*mlp.gradients(self.backend, self._prepared(), self.labels))

    def loss(self, mlp: MLP) -> tuple[float, int]:
        """Loss and correct count, summed over all images."""
        with np.errstate(all="ignore"):
            _, logits = mlp.forward(self.backend, self._prepared())
            return self.backend.softmax_grad(logits, self.labels)[:2]

    def _prepared(self) -> Any:
        if self.kept is not None:
            return self.kept
        x = self.backend.prepare(self.images, self.dtype)
        if self.memory.take(x):
            self.kept = x
        return x


class Batch(Protocol):
    """The images of a step of gradient descent, in this process or elsewhere."""

    count: int
    """The number of images."""

    def gradient(self, mlp: MLP, on_images: Callable[[int], None]) -> Sums:
        """Sums over all images; calls `on_images` with a number of images whenever some are done."""

    def evaluate(self, mlp: MLP) -> tuple[float, float]:
        """Mean loss and accuracy over all images."""


class Shards:
    """A `Batch` in the memory of this process, in shards.

    Parameters
    ----------
    parallel_map
        Maps a function over a list on several threads, and yields the results in order.
    backend
        The kernels to use.
    images, labels
        (n, pixels) uint8, and (n,) integers.
    dtype
        float32 or float64.
    memory
        The budget for prepared images; None means no limit.
    """

    def __init__(
        self,
        parallel_map: Callable,
        backend: Backend,
        images: NDArray,
        labels: NDArray,
        dtype: np.dtype,
        memory: Memory | None = None,
    ) -> None:
        self.parallel_map = parallel_map
        self.count = len(images)
        memory = memory or Memory()
        ranges = shard_ranges(self.count, backend.images_at_once)
        self.shards = [Shard(backend, images[part], labels[part], dtype, memory) for part in ranges]
        exhaust(parallel_map(Shard.prepare, self.shards))

    def gradient(self, mlp: MLP, on_images: Callable[[int], None] = lambda images: None) -> Sums:
        """Sums over all images; calls `on_images` with the size of each finished shard."""

        def finished() -> Iterator[Sums]:
            for shard, sums in zip(self.shards, self.parallel_map(lambda shard: shard.gradient(mlp), self.shards)):
                on_images(len(shard))
                yield sums

        return add_in_tree(finished())

    def evaluate(self, mlp: MLP) -> tuple[float, float]:
        """Mean loss and accuracy over all images."""
        return mean(self.parallel_map(lambda shard: shard.loss(mlp), self.shards), self.count)


def shard_ranges(count: int, most: int = SHARD) -> list[slice]:
    """The range of each shard of `count` images.

    The number of shards is the smallest power of two for which each has at most `most` images. Where those would be
    fewer than ENOUGH_SHARDS, shards of more than SHARD images are halved until there are that many, to occupy more
    threads. With SHARD in each, 60,000 images make 64 shards, and a million make 1,024: enough for every core of a
    large machine. Shards are as equal as possible, so a power of two of threads or workers gets equal shares.
    """
    shards = max(_shards(count, most), min(_shards(count, SHARD), ENOUGH_SHARDS))
    bounds = [count * shard // shards for shard in range(shards + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _shards(count: int, most: int) -> int:
    """The smallest power of two of shards that holds `count` images, at most `most` in each."""
    return 2 ** (math.ceil(count / most) - 1).bit_length()


def mean(sums: Iterable[tuple[float, int]], count: int) -> tuple[float, float]:
    """Mean loss and accuracy of `count` images, from the loss and the correct count of each shard, in order."""
    losses, corrects = zip(*sums)
    return sum(losses) / count, sum(corrects) / count


def add_in_tree(parts: Iterable[Sums]) -> Sums:
    """Pairwise summation: add neighbours, then sums of neighbours, and so on, in an order that depends on their number.

    Sums that wait for their neighbour cover 1, 2, 4, ... parts, like the digits of a binary counter. So only a few are
    held at a time, and each is added while the next ones are still being computed.
    """
    waiting: list[Sums] = []
    for count, sums in enumerate(parts, start=1):
        while count % 2 == 0:
            sums = add(waiting.pop(), sums)
            count //= 2
        waiting.append(sums)
    total = waiting.pop()
    while waiting:
        total = add(waiting.pop(), total)
    return total


def add(first: Sums, second: Sums) -> Sums:
    """The sum of both, in the buffers of the first."""
    for total, part in zip(first.gradient, second.gradient):
        total += part
    return Sums(first.loss + second.loss, first.correct + second.correct, first.gradient)
