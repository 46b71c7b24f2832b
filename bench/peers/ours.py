"""Our training loop as a competitor."""

import copy
import functools

from bench.peers.task import Learner, Task
from kernels.backend import Backend
from model.shards import Shards
from model.training import descend


class Ours(Learner):
    """Our training loop on the kernels of a backend."""

    def __init__(self, backend: Backend, task: Task) -> None:
        self.mlp = copy.deepcopy(task.mlp)
        self.learning_rate = task.learning_rate
        self.prepare = functools.partial(Shards, task.run, backend, dtype=self.mlp.dtype)
        self.all = self.prepare(images=task.images, labels=task.labels)

    def step(self):
        return descend(self.mlp, self.all, self.learning_rate).loss / self.all.count

    def learn(self, images, labels):
        return descend(self.mlp, self.prepare(images=images, labels=labels), self.learning_rate).loss / len(images)

    def accuracy(self):
        return self.all.evaluate(self.mlp)[1]

    def parameters(self):
        return self.mlp.parameters
