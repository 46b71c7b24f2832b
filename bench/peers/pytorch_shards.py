"""PyTorch's kernels in our training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from bench.peers.ours import Ours
from bench.peers.pytorch import relu_backward_, softmax_grad
from bench.peers.task import Task, package
from kernels.backend import Backend


class PyTorchInShards(Ours):
    """Our training loop on PyTorch's kernels, which run on one thread in each of ours."""

    def __init__(self, task: Task) -> None:
        self.torch = package("torch")
        super().__init__(PyTorchBackend(self.torch), task)

    def step(self):
        with _one_thread(self.torch):
            return super().step()

    def learn(self, images, labels):
        with _one_thread(self.torch):
            return super().learn(images, labels)


@contextmanager
def _one_thread(torch: ModuleType) -> Iterator[None]:
    """Other competitors in this process may use more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PyTorchBackend(Backend):
    """The four kernels as calls of PyTorch on tensors that share memory with the arrays."""

    def __init__(self, torch: ModuleType) -> None:
        self.torch = torch

    def _matmul(self, a, b, bias):
        a, b = self.torch.from_numpy(a), self.torch.from_numpy(b)
        return (a @ b if bias is None else self.torch.addmm(self.torch.from_numpy(bias), a, b)).numpy()

    def _relu(self, z):
        return self.torch.from_numpy(z).relu_().numpy()

    def _relu_grad(self, upstream, activations):
        tensors = self.torch.from_numpy(upstream), self.torch.from_numpy(activations)
        return relu_backward_(self.torch, *tensors).numpy()

    def _softmax_grad(self, logits, labels):
        labels = self.torch.from_numpy(labels.astype(np.int64))
        logits = self.torch.from_numpy(logits)
        correct = int((logits.argmax(1) == labels).sum())
        loss, upstream = softmax_grad(self.torch, logits, labels)
        return float(loss), correct, upstream.numpy()
