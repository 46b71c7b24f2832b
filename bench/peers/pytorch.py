"""PyTorch: eager, compiled, and on compressed sparse rows."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from bench.peers.task import Competitor, Learner, Task, UnavailableError, package


class PyTorch(Learner):
    """PyTorch, eager: layers, loss and optimizer from its library, over all images at once.

    Parts of 1,024 or 4,096 images with added gradients were not faster.
    """

    def __init__(self, task: Task) -> None:
        self.torch = torch = package("torch")
        torch.set_num_threads(task.threads)
        layers: list[Any] = []
        for weights, bias in task.mlp.layers:
            layer = torch.nn.Linear(*weights.shape)
            layer.load_state_dict({"weight": torch.tensor(weights.T), "bias": torch.tensor(bias)})
            layers += [torch.nn.ReLU(), layer]
        self.network = torch.nn.Sequential(*layers[1:])
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=task.learning_rate)
        self.loss = _torch_loss
        self.all = self._prepare(task.images, task.labels)

    def step(self):
        return self._descend(*self.all)

    def learn(self, images, labels):
        return self._descend(*self._prepare(images, labels))

    def accuracy(self):
        images, labels = self.all
        with self.torch.no_grad():
            return (self.network(images).argmax(1) == labels).float().mean().item()

    def parameters(self):
        return [parameter.detach().numpy().T for parameter in self.network.parameters()]

    def _prepare(self, images, labels):
        return self.torch.from_numpy(np.divide(images, 255, dtype=np.float32)), self.torch.tensor(labels).long()

    def _descend(self, images, labels):
        self.optimizer.zero_grad()
        loss = self.loss(self.torch, self.network, images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def _torch_loss(torch: ModuleType, network: Any, images: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(network(images), labels)


@functools.cache
def _compiled_torch_loss() -> Callable:
    """Made once, so that a second network of the same shape needs no compilation."""
    return package("torch").compile(_torch_loss)


class CompiledPyTorch(PyTorch):
    """PyTorch with forward pass, loss and backward pass compiled; other modes of torch.compile were not faster."""

    compiles = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.torch.compiler.config.force_disable_caches = True  # or its seconds depend on what the disk holds
        self.loss = _compiled_torch_loss()

    def _descend(self, images, labels):
        try:
            return super()._descend(images, labels)
        except self.torch._dynamo.exc.TorchDynamoException as error:  # first of all: no C++ compiler
            raise UnavailableError(f"torch.compile failed: {str(error).splitlines()[0]}") from error


class PyTorchCSR(Competitor):
    """PyTorch on its compressed sparse rows, with the transposed rows made once.

    Its automatic differentiation converts the transpose anew in each step, which takes three times as long: so the
    first layer's gradient is written out, and the rest is left to it. In parts of 2,048 images a step takes a third of
    its time over all at once, because the gradient's rows stay in the cache.
    """

    PART = 2048

    def __init__(self, task: Task) -> None:
        self.torch = torch = package("torch")
        torch.set_num_threads(task.threads)
        self.count = len(task.images)
        self.tensors = [torch.tensor(parameter, requires_grad=True) for parameter in task.mlp.parameters]
        for tensor in self.tensors:
            tensor.grad = torch.zeros_like(tensor)
        self.optimizer = torch.optim.SGD(self.tensors, lr=task.learning_rate)
        labels = torch.tensor(task.labels).long().split(self.PART)
        self.parts = [
            (self._rows(part), self._rows(part.T), part_labels)
            for part_labels, start in zip(labels, range(0, self.count, self.PART))
            for part in [csr_array(np.divide(task.images[start : start + self.PART], 255, dtype=np.float32))]
        ]

    def step(self):
        weights, bias, last_weights, last_bias = self.tensors
        self.optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for images, transposed, labels in self.parts:
            with self.torch.no_grad():
                z = self.torch.addmm(bias, images, weights)
            logits = self.torch.addmm(last_bias, z.requires_grad_().relu(), last_weights)
            loss = self.torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / self.count
            loss.backward()
            weights.grad += transposed @ z.grad
            bias.grad += z.grad.sum(0)
            total += loss.item()
        self.optimizer.step()
        return total

    def parameters(self):
        return [tensor.detach().numpy() for tensor in self.tensors]

    def _rows(self, matrix):
        rows = csr_array(matrix)
        parts = (self.torch.from_numpy(array) for array in (rows.indptr, rows.indices, rows.data))
        return self.torch.sparse_csr_tensor(*parts, rows.shape, check_invariants=False)
