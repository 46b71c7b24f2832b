"""Gradient descent on shards of the data: the same bits on any number of threads.

A batch is cut into at most 32 **shards**, contiguous ranges that depend on its size alone, and these into **chunks** of
as many images as the backend says, whose activations stay in a core's cache. A shard adds the gradients of its chunks
in order, and the shards are added in a fixed binary tree, so threads change who computes a sum, never the order of its
additions.
"""

import contextlib
import ctypes
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from kernels.backend import CHUNK, Backend
from model.data import Dataset
from model.mlp import MLP

SHARDS = 32


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to try."""


class Epoch(NamedTuple):
    """One line of the history."""

    epoch: int
    loss: float
    """Mean cross-entropy over the training images, from the forward passes of the epoch: before its updates."""
    train_accuracy: float
    """From the same forward passes, 0 to 1."""
    test_accuracy: float | None
    """After the epoch's last update; None where not evaluated."""
    seconds: float
    """Forward, backward and update (with mini-batches, also shuffling and preparing); no evaluation."""


@dataclass
class History:
    """What a training run recorded."""

    prepare_seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)

    def accuracies(self, kind: str) -> NDArray[np.float64]:
        """One per epoch, "train" or "test"; NaN where the epoch was not evaluated."""
        return np.array([getattr(epoch, f"{kind}_accuracy") for epoch in self.epochs], np.float64)


@dataclass
class State:
    """Where a run stands between two steps: together with the parameters, all that it takes to go on bitwise."""

    rng: Mapping[str, Any]
    """State of the bit generator at the start of the running epoch, before the images are shuffled."""
    history: History = field(default_factory=History)
    steps: int = 0
    """Steps done in the running epoch; the next three are sums over them."""
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, seed: int) -> "State":
        """Before the first step of a new run."""
        return cls(np.random.default_rng(seed).bit_generator.state)


class Sums(NamedTuple):
    """Loss, correct count and gradient, summed over some images."""

    loss: float
    correct: int
    gradient: list[NDArray]


class Memory:
    """How much of its prepared images a process keeps.

    Parameters
    ----------
    limit
        In bytes; None is no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._lock = RLock()  # while it is held, garbage collection may give something back

    def take(self, x: Any) -> bool:
        """Whether some prepared images fit, and if so, count them as kept."""
        if self.limit is None:
            return True
        if not hasattr(x, "nbytes"):
            raise ValueError(f"a memory limit needs nbytes of prepared images, which {type(x).__name__} lacks")
        with self._lock:
            fits = self.used + x.nbytes <= self.limit
            self.used += x.nbytes if fits else 0
        return fits

    def give_back(self, kept: Iterable[Any]) -> None:
        """Count these as kept no longer."""
        if self.limit is not None:
            with self._lock:
                self.used -= sum(x.nbytes for x in kept)


class Shard:
    """Images and labels, prepared for a backend in chunks.

    Chunks that fit into `memory` are kept, the others are prepared again whenever they are needed. None makes room for
    another: every epoch takes all in the same order, so the one that was not used for longest is the next to be used.

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

    def __len__(self) -> int:
        return len(self.labels)

    def __del__(self) -> None:
        self.memory.give_back(self.kept.values())

    def prepare(self) -> None:
        """Prepare as many chunks as are kept."""
        for count, _ in enumerate(self._chunks(), start=1):
            if len(self.kept) < count:
                break

    def gradient(self, mlp: MLP) -> Sums:
        """Sums over all images, chunk by chunk."""
        with np.errstate(all="ignore"):  # a diverging run ends with one clear error instead of warnings
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
        for chunk in even_parts(len(self), math.ceil(len(self) / self.backend.chunk)):
            x = self.kept.get(chunk.start)
            if x is None:
                x = self.backend.prepare(self.images[chunk], self.dtype)
                if self.memory.take(x):
                    self.kept[chunk.start] = x
            yield x, self.labels[chunk]


class Batch(Protocol):
    """What a step of gradient descent needs of its images, wherever they are."""

    count: int
    """Of the images."""

    def gradient(self, mlp: MLP, on_images: Callable[[int], None]) -> Sums:
        """Sums over all images; calls `on_images` with numbers of images that are done."""

    def evaluate(self, mlp: MLP) -> tuple[float, float]:
        """Mean loss and accuracy over all images."""


class Shards:
    """A `Batch` in the memory of this process, in shards.

    Parameters
    ----------
    run
        Applies a function to each item of a list on some threads and yields the results in order.
    backend
        The kernels to use.
    images, labels
        uint8 (n, pixels) and integers (n,).
    dtype
        float32 or float64.
    memory
        Limits what is kept prepared; None is no limit.
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
        list(run(Shard.prepare, self.shards))

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


def train(
    mlp: MLP,
    backend: Backend,
    dataset: Dataset,
    *,
    epochs: int = 250,
    learning_rate: float = 0.3,
    batch_size: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory_limit: int | None = None,
    batches: Callable[[Backend, NDArray, NDArray, np.dtype, Memory], Batch] | None = None,
    eval_every: int = 1,
    state: State | None = None,
    on_images: Callable[[int], None] = lambda images: None,
    on_step: Callable[[State], None] = lambda state: None,
) -> History:
    """Train `mlp` in place by gradient descent.

    Parameters
    ----------
    mlp, backend, dataset
        The network, the kernels, the images.
    epochs
        Passes over the training images.
    learning_rate
        Length of a step as a multiple of the mean gradient.
    batch_size
        Images per step, reshuffled each epoch; None takes all at once, in their own order.
    seed
        Seed of the shuffling, unless a `state` is given.
    threads
        Threads that share the shards; None takes one per available core. Changes the time, not one bit of the result.
    memory_limit
        Bytes of prepared images that are kept at most; those beyond are prepared again whenever they are needed. None
        keeps all. Changes the time, not one bit of the result.
    batches
        Makes the `Batch` of some images, elsewhere: `model.distributed.Cluster.batch`. None makes `Shards`.
    eval_every
        Measure the test accuracy after every so many epochs, and after the last.
    state
        Where to go on, with the parameters that `mlp` had there; it is updated in place. With the same settings but
        for `epochs` the run ends bitwise where it would have ended without the break. None starts a new run.
    on_images
        Called in the caller's thread with the number of images that have passed since its last call.
    on_step
        Called in the caller's thread with where the run stands: before the first step, after every step, and once more
        after every epoch. It may raise to stop the run.

    Returns
    -------
    History
        One entry per epoch, those before `state` included, and the seconds that preparing the images took.

    Raises
    ------
    ValueError
        If an option is out of range or `state` is not one of such a run.
    TrainingError
        If the loss is not finite.
    """
    images, labels = dataset.train_images, dataset.train_labels
    _check_options(len(images), epochs, learning_rate, batch_size, threads, eval_every)
    if batches and batch_size:
        raise ValueError("mini-batches would travel longer than they train: leave out batch_size, or the workers")
    state = state or State.start(seed)
    _check_state(state, len(images), epochs, batch_size)
    rng = np.random.default_rng()
    rng.bit_generator.state = state.rng
    history = state.history
    memory = Memory(memory_limit)
    with thread_pool(threads or available_cores()) as run:

        def place(images: NDArray, labels: NDArray) -> Batch:
            return (batches or partial(Shards, run))(backend, images, labels, mlp.dtype, memory)

        start = time.perf_counter()
        test = place(dataset.test_images, dataset.test_labels)
        full_batch = [] if batch_size else [place(images, labels)]
        history.prepare_seconds += time.perf_counter() - start

        def evaluated(epoch: Epoch) -> Epoch:
            """With a test accuracy if these settings ask for one, else without."""
            if epoch.epoch % eval_every and epoch.epoch != epochs:
                return epoch._replace(test_accuracy=None)
            if epoch.test_accuracy is None:
                test_loss, test_accuracy = test.evaluate(mlp)
                _check_loss(test_loss, epoch.epoch, learning_rate)
                epoch = epoch._replace(test_accuracy=test_accuracy)
            return epoch

        if history.epochs and not state.steps:  # it may have been meant as the last, or is only now
            history.epochs[-1] = evaluated(history.epochs[-1])
        on_step(state)
        for epoch in range(len(history.epochs) + 1, epochs + 1):
            start = time.perf_counter()
            steps: Iterable[Batch] = full_batch[state.steps :]
            if batch_size:
                steps = _mini_batches(place, images, labels, batch_size, rng, state.steps)
            for batch in steps:
                sums = descend(mlp, batch, learning_rate, on_images)
                state.steps += 1
                state.loss += sums.loss
                state.correct += sums.correct
                state.seconds += time.perf_counter() - start
                on_step(state)
                start = time.perf_counter()
            _check_loss(state.loss, epoch, learning_rate)
            loss, accuracy = state.loss / len(images), state.correct / len(images)
            history.epochs.append(evaluated(Epoch(epoch, loss, accuracy, None, state.seconds)))
            state.rng, state.steps, state.loss, state.correct, state.seconds = rng.bit_generator.state, 0, 0.0, 0, 0.0
            on_step(state)
    return history


def descend(
    mlp: MLP, batch: Batch, learning_rate: float, on_images: Callable[[int], None] = lambda images: None
) -> Sums:
    """One step of gradient descent on the mean loss over `batch`; returns its sums from before the step."""
    sums = batch.gradient(mlp, on_images)
    for parameter, gradient in zip(mlp.parameters, sums.gradient):
        parameter -= gradient * (learning_rate / batch.count)
    return sums


@contextmanager
def thread_pool(threads: int) -> Iterator[Callable]:
    """A function that maps another over a list on so many threads, in order, each with its BLAS held to one thread.

    The calling thread is one of them: if it only waited for the others, they would have to make room for it whenever
    there is a result. When an exception, such as Ctrl-C, leaves a thread, the work not yet begun is dropped.
    """
    _keep_freed_memory()
    with threadpool_limits(1, user_api="blas"):
        pool = ThreadPoolExecutor(threads)
        try:
            yield partial(_map, pool.submit, threads)
        finally:
            pool.shutdown(wait=False)


def _map(submit: Callable, threads: int, function: Callable, items: Sequence) -> Iterator:
    """Results in the order of the items, each as soon as this thread is free and those before it are there."""
    numbered = enumerate(items)  # each thread takes the next, which is a single step of the interpreter
    finished: dict[int, Any] = {}

    def work() -> Iterator[None]:
        try:
            for number, item in numbered:
                finished[number] = function(item)
                yield
        finally:
            exhaust(numbered)

    others = [submit(exhaust, work()) for _ in range(min(threads, len(items)) - 1)]
    expected = 0
    for _ in work():
        while expected in finished:
            yield finished.pop(expected)
            expected += 1
    for other in others:
        other.result()
    yield from map(finished.pop, sorted(finished))


def exhaust(iterator: Iterator) -> None:
    """Run it to its end."""
    deque(iterator, maxlen=0)


def _keep_freed_memory() -> None:
    """Have glibc, where it is, keep what kernels free for the results of the next ones.

    Left to itself, it gives memory back to the system whenever a little is free at the end of the heap, and each page
    costs a page fault when it is taken again: a tenth of an epoch of the fastest backend, and half of it in a worker of
    Dask, which sets MALLOC_TRIM_THRESHOLD_. These are the highest values that glibc would find by itself (mallopt(3)).
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 32 << 20)
        ctypes.CDLL(None).mallopt(trim_threshold, 64 << 20)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard_ranges(count: int) -> list[slice]:
    """Where each shard of `count` images is: at most 32, and as even as can be."""
    return even_parts(count, min(SHARDS, math.ceil(count / CHUNK)))


def even_parts(count: int, parts: int) -> list[slice]:
    """Where each of so many parts of `count` things is."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def mean(sums: Iterable[tuple[float, int]], count: int) -> tuple[float, float]:
    """Loss and accuracy of `count` images, from the loss and the correct count of each shard, in order."""
    losses, corrects = zip(*sums)
    return sum(losses) / count, sum(corrects) / count


def _mini_batches(
    place: Callable[[NDArray, NDArray], Batch],
    images: NDArray,
    labels: NDArray,
    batch_size: int,
    rng: np.random.Generator,
    skipped: int,
) -> Iterator[Batch]:
    """The images in random order, `batch_size` at a time but for the first batches; the last takes what is left."""
    order = rng.permutation(len(images))
    for start in range(skipped * batch_size, len(images), batch_size):
        batch = order[start : start + batch_size]
        yield place(images[batch], labels[batch])


def add_in_tree(parts: Iterable[Sums]) -> Sums:
    """Add neighbours, then sums of neighbours, and so on; which additions are made depends on their number alone.

    Sums that wait for their neighbour are of 1, 2, 4, ... parts, like the digits of a binary counter, so that few are
    held at a time, and each is added while the next are still being computed.
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


def _check_options(
    images: int,
    epochs: int,
    learning_rate: float,
    batch_size: int | None,
    threads: int | None,
    eval_every: int,
) -> None:
    if images == 0:
        raise ValueError("there are no training images")
    if epochs < 1 or eval_every < 1:
        raise ValueError(f"epochs and eval_every must be at least 1, not {epochs} and {eval_every}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be positive and finite, not {learning_rate}")
    if batch_size is not None and not 1 <= batch_size <= images:
        raise ValueError(f"batch_size must be from 1 to {images}, the number of training images, not {batch_size}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")


def _check_state(state: State, images: int, epochs: int, batch_size: int | None) -> None:
    begun = len(state.history.epochs) + (state.steps > 0)
    if begun > epochs:
        raise ValueError(f"{begun} epochs are done or begun already: epochs must not be less, not {epochs}")
    steps = math.ceil(images / batch_size) if batch_size else 1
    if state.steps > steps:
        raise ValueError(f"the state is after step {state.steps} of an epoch, which has only {steps}")


def _check_loss(loss: float, epoch: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} in epoch {epoch} with learning rate {learning_rate:g}: try a smaller learning rate"
        )
