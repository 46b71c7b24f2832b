"""Sums over images in a fixed order: the same bits on any number of threads.

A batch is cut into **shards**, contiguous ranges of about two thousand images that depend only on its size. Shards are
cut into **chunks**, whose size the backend chooses so that activations stay in a core's cache. A shard adds the
gradients of its chunks in order, and the shards are added in a fixed binary tree. Floating-point addition is not
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

SHARD = 2048
"""Maximum number of images in a shard. A batch of this size or less trains no faster on two threads than on one."""


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

    def give_back(self, kept: Iterable[Any]) -> None:
        """Return these to the budget."""
        if self.limit is not None:
            with self._lock:
                self.used -= sum(x.nbytes for x in kept)


class Shard:
    """Images and labels, prepared for a backend in chunks.

    Chunks that fit in `memory` are kept; the others are prepared again whenever they are needed. Nothing is evicted:
    every epoch takes all chunks in the same order, so LRU would always evict the chunk that is needed next.

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
        self.kept: dict[int, Any] = {}
        self.chunks = even_parts(len(labels), math.ceil(len(labels) / backend.chunk))

    def __len__(self) -> int:
        return len(self.labels)

    def __del__(self) -> None:
        self.memory.give_back(self.kept.values())

    def prepare(self) -> None:
        """Prepare and keep chunks until one does not fit."""
        for count, _ in enumerate(self._chunks(), start=1):
            if len(self.kept) < count:
                break

    def gradient(self, mlp: MLP) -> Sums:
        """Sums over all images, chunk by chunk."""
        with np.errstate(all="ignore"):  # a diverging run ends in one clear error, not in warnings
            parts = (Sums(*mlp.gradients(self.backend, x, labels)) for x, labels in self._chunks())
            total = next(parts)
            for part in parts:
                total = add(total, part)
        return total

    def loss(self, mlp: MLP) -> tuple[float, int]:
        """Loss and correct count, summed over all images."""
        loss, correct = 0.0, 0
        with np.errstate(all="ignore"):
            for x, labels in self._chunks():
                _, logits = mlp.forward(self.backend, x)
                chunk_loss, chunk_correct, _ = self.backend.softmax_grad(logits, labels)
                loss, correct = loss + chunk_loss, correct + chunk_correct
        return loss, correct

    def _chunks(self) -> Iterator[tuple[Any, NDArray]]:
        for chunk in self.chunks:
            x = self.kept.get(chunk.start)
            if x is None:
                x = self.backend.prepare(self.images[chunk], self.dtype)
                if self.memory.take(x):
                    self.kept[chunk.start] = x
            yield x, self.labels[chunk]


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
    run
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
        run: Callable,
        backend: Backend,
        images: NDArray,
        labels: NDArray,
        dtype: np.dtype,
        memory: Memory | None = None,
    ) -> None:
        self.run = run
        self.count = len(images)
        memory = memory or Memory()
        self.shards = [Shard(backend, images[part], labels[part], dtype, memory) for part in shard_ranges(self.count)]
        exhaust(run(Shard.prepare, self.shards))

    def gradient(self, mlp: MLP, on_images: Callable[[int], None] = lambda images: None) -> Sums:
        """Sums over all images; calls `on_images` with the size of each finished shard."""

        def finished() -> Iterator[Sums]:
            for shard, sums in zip(self.shards, self.run(lambda shard: shard.gradient(mlp), self.shards)):
                on_images(len(shard))
                yield sums

        return add_in_tree(finished())

    def evaluate(self, mlp: MLP) -> tuple[float, float]:
        """Mean loss and accuracy over all images."""
        return mean(self.run(lambda shard: shard.loss(mlp), self.shards), self.count)


def shard_ranges(count: int) -> list[slice]:
    """The range of each shard of `count` images. The number of shards is the smallest power of two that suffices.

    60,000 images make 32 shards, a million make 512: enough for every core of a large machine. Shards are as equal as
    possible, so a power of two of threads or workers gets equal shares.
    """
    return even_parts(count, 2 ** (math.ceil(count / SHARD) - 1).bit_length())


def even_parts(count: int, parts: int) -> list[slice]:
    """The ranges of `parts` nearly equal parts of `count` items."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


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
