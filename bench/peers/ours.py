"""Our training loop as a competitor."""

import copy
import time
from functools import cached_property, partial
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from bench.measure.processes import in_fresh_process
from bench.peers.task import Learner, Task
from kernels import get_backend
from kernels.backend import Backend
from model.mlp import MLP
from model.shards import SHARD, Shards
from model.threads import thread_pool
from model.training import descend


class Ours(Learner):
    """Our training loop on the kernels of a backend."""

    def __init__(self, backend: Backend, task: Task) -> None:
        self.mlp = copy.deepcopy(task.mlp)
        self.learning_rate = task.learning_rate
        self.images, self.labels = task.images, task.labels
        self.backend = backend
        self.prepare = partial(Shards, task.parallel_map, backend, dtype=self.mlp.dtype)

    @cached_property
    def all(self) -> Shards:
        """All images, prepared when first needed, as mini-batches never do."""
        return self.prepare(images=self.images, labels=self.labels)

    def step(self):
        return descend(self.mlp, self.backend, self.all, self.learning_rate).loss / self.all.count

    def learn(self, images, labels):
        batch = self.prepare(images=images, labels=labels)
        return descend(self.mlp, self.backend, batch, self.learning_rate).loss / len(images)

    def learn_rows(self, rows):
        return self.learn(np.take(self.images, rows, axis=0), np.take(self.labels, rows))

    def accuracy(self):
        return self.all.evaluate(self.mlp)[1]

    def parameters(self):
        return self.mlp.parameters


def compile_seconds(name: str, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> float:
    """Seconds of a backend's first step minus those of its third, with an empty cache of compiled kernels."""
    few = slice(2 * SHARD)
    with TemporaryDirectory() as folder:
        return in_fresh_process(_first_step, name, images[few], labels[few], NUMBA_CACHE_DIR=folder)


def _first_step(name: str, images: NDArray, labels: NDArray) -> float:
    with thread_pool(1) as parallel_map:
        ours = Ours(get_backend(name), Task(MLP(), images, labels, 0.3, 1, parallel_map))
        times = [time.perf_counter()]
        for _ in range(3):
            ours.step()
            times.append(time.perf_counter())
    first, _, last = np.diff(times)
    return float(first - last)
