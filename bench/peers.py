"""The same step of gradient descent in other packages, each in the form that is fastest here.

All are in float32, on the same threads, over all images at once, and start from the same weights. A step is the forward
pass, the mean loss (which any training loop reports), the backward pass and the update; ours also counts the images
that are classified correctly. The images are prepared once, before the steps: as float32, divided by 255, or as what is
not zero of these.
"""

import copy
import functools
import importlib
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.neural_network import MLPClassifier
from threadpoolctl import ThreadpoolController

from kernels import get_backend
from kernels.backend import Backend
from kernels.numpy_backend import NumpyBackend
from model.mlp import MLP
from model.trainer import Shards, descend

VERIFIED_STEPS = 3


class UnavailableError(Exception):
    """A peer cannot run here; the message says why."""


class Task(NamedTuple):
    """What every competitor does: gradient descent from the weights of `mlp`, which it copies."""

    mlp: MLP
    images: NDArray[np.uint8]
    labels: NDArray[np.integer]
    learning_rate: float
    threads: int
    run: Callable
    """What `model.trainer.thread_pool` yields."""


class Competitor(ABC):
    """A network, and images to train it on."""

    compiles = False
    """Whether the first step compiles."""

    @abstractmethod
    def step(self) -> float:
        """One step over all images; returns the mean loss from before it."""

    @abstractmethod
    def parameters(self) -> list[NDArray]:
        """Weights (inputs, outputs) and biases, in the order of `MLP.parameters`."""


class Learner(Competitor):
    """A competitor that also takes steps over other images than its own, as in mini-batches."""

    @abstractmethod
    def learn(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> float:
        """Prepare the images and make one step over them; returns the mean loss from before it."""

    @abstractmethod
    def accuracy(self) -> float:
        """Share of its own images that are classified correctly."""


class Kernels(Learner):
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


class SciPyCSR(NumpyBackend):
    """The NumPy backend on SciPy's compressed sparse rows, in our shards: SciPy itself has no threads.

    For a chunk of images, the transposed view (columns instead of rows) is as fast as rows made of the transpose.
    """

    def _prepare(self, images, dtype):
        return csr_array(super()._prepare(images, dtype))


class PyTorch(Learner):
    """PyTorch, eager: layers, loss and optimizer from its library, over all images at once.

    Parts of 1,024 or 4,096 images with added gradients were not faster.
    """

    def __init__(self, task: Task) -> None:
        self.torch = torch = _package("torch")
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
    return _package("torch").compile(_torch_loss)


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
        self.torch = torch = _package("torch")
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


class JAX(Competitor):
    """JAX: loss, gradients and update in one compiled function, which reuses the memory of the old parameters.

    XLA's CPU client makes as many threads as the process may use cores, and takes no other number.
    """

    compiles = True

    def __init__(self, task: Task) -> None:
        jax = _package("jax")
        jax.config.update("jax_platforms", "cpu")
        self.jax = jax
        self.update = jax.jit(functools.partial(_jax_update, jax, task.learning_rate), donate_argnums=0)
        self.arrays = [jax.numpy.array(parameter) for parameter in task.mlp.parameters]
        self.images = jax.numpy.asarray(np.divide(task.images, 255, dtype=np.float32))
        self.labels = jax.numpy.asarray(task.labels, dtype=np.int32)

    def step(self):
        self.arrays, loss = self.jax.block_until_ready(self.update(self.arrays, self.images, self.labels))
        return float(loss)

    def parameters(self):
        return [np.asarray(array) for array in self.arrays]


def _jax_update(jax: ModuleType, learning_rate: float, parameters: list, images: Any, labels: Any) -> tuple[list, Any]:
    def mean_loss(parameters: list) -> Any:
        *hidden_layers, (weights, bias) = zip(parameters[::2], parameters[1::2])
        x = images
        for hidden_weights, hidden_bias in hidden_layers:
            x = jax.nn.relu(x @ hidden_weights + hidden_bias)
        log_probabilities = jax.nn.log_softmax(x @ weights + bias)
        return -jax.numpy.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()

    loss, gradient = jax.value_and_grad(mean_loss)(parameters)
    return [parameter - learning_rate * change for parameter, change in zip(parameters, gradient)], loss


class ScikitLearn(Competitor):
    """scikit-learn's `MLPClassifier`: gradient descent without momentum or penalty, in one batch, on BLAS's threads.

    A step is a call of `partial_fit`, which checks its arguments each time. The first call, on one image of each class,
    makes the arrays of the network; our weights are then written into them.
    """

    def __init__(self, task: Task) -> None:
        self.images = np.divide(task.images, 255, dtype=np.float32)
        self.labels = task.labels
        self.threads = task.threads
        self.blas = ThreadpoolController()
        hidden = [weights.shape[1] for weights, _ in task.mlp.layers[:-1]]
        self.network = MLPClassifier(
            hidden,
            solver="sgd",
            alpha=0,
            batch_size=1,
            learning_rate_init=task.learning_rate,
            shuffle=False,
            momentum=0,
            nesterovs_momentum=False,
        )
        classes = np.arange(task.mlp.layers[-1][0].shape[1])
        self.network.partial_fit(self.images[:1], self.labels[:1], classes=classes)
        for array, parameter in zip(self.parameters(), task.mlp.parameters):
            array[...] = parameter
        self.network.set_params(batch_size=len(self.images))

    def step(self):
        with self.blas.limit(limits=self.threads, user_api="blas"):
            self.network.partial_fit(self.images, self.labels)
        return self.network.loss_

    def parameters(self):
        return [array for layer in zip(self.network.coefs_, self.network.intercepts_) for array in layer]


PEERS: dict[str, Callable[[Task], Competitor]] = {
    "PyTorch": PyTorch,
    "torch.compile": CompiledPyTorch,
    "JAX": JAX,
    "scikit-learn": ScikitLearn,
    "SciPy CSR": functools.partial(Kernels, SciPyCSR()),
    "PyTorch CSR": PyTorchCSR,
}

COMPETITORS = {
    "dense": ("numpy", "numba", "PyTorch", "torch.compile", "JAX", "scikit-learn"),
    "sparse": ("sparse", "SciPy CSR", "PyTorch CSR"),
}
"""Backends and peers by whether they multiply with zeros; pure Python would need a quarter of an hour for a step."""


def competitor(name: str, task: Task) -> Competitor:
    """A peer or backend, its images prepared.

    Raises
    ------
    UnavailableError
        If a package is missing.
    """
    return PEERS[name](task) if name in PEERS else Kernels(get_backend(name), task)


def verified(name: str, task: Task, expected: list[NDArray]) -> tuple[Competitor, float | None]:
    """A competitor whose first three steps led to `expected`, and its seconds of compilation, if it compiles.

    Compilation is what the first step took longer than the last.

    The sums behind a gradient have a term for each of n images, at most 1 in size; rounding errors of n terms add up
    to √n units (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019).

    Raises
    ------
    UnavailableError
        If a package is missing or cannot compile.
    AssertionError
        If the parameters differ by more than these rounding errors.
    """
    seconds = []
    started = competitor(name, task)
    for _ in range(VERIFIED_STEPS):
        start = time.perf_counter()
        started.step()
        seconds.append(time.perf_counter() - start)
    roundoff = float(np.finfo(np.float32).eps) / 2
    tolerance = VERIFIED_STEPS * task.learning_rate * math.sqrt(len(task.images)) * roundoff
    for theirs, exact in zip(started.parameters(), expected, strict=True):
        np.testing.assert_allclose(theirs, exact, rtol=0, atol=tolerance, err_msg=name)
    return started, seconds[0] - seconds[-1] if started.compiles else None


def expected_parameters(task: Task) -> list[NDArray]:
    """Parameters after three steps of our NumPy backend in float64."""
    mlp = copy.deepcopy(task.mlp)
    mlp.layers = [(weights.astype(np.float64), bias.astype(np.float64)) for weights, bias in mlp.layers]
    exact = Kernels(get_backend("numpy"), task._replace(mlp=mlp))
    for _ in range(VERIFIED_STEPS):
        exact.step()
    return exact.parameters()


def _package(name: str) -> ModuleType:
    # torch warns of its own deprecated parts, and that its sparse tensors are new.
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: make bench-peers installs it") from error
