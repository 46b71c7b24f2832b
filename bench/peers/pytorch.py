"""PyTorch: eager, with a hand-written step, compiled, in bfloat16, and on compressed sparse rows (CSR)."""

import functools
import os
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from cpuinfo import get_cpu_info
from scipy.sparse import csr_array

from bench.peers.task import Competitor, Learner, Task, UnavailableError, package

# PyTorch reads this once. NumPy asks the kernel for huge pages for its large arrays, and PyTorch only then: on Zen 5, a
# full-batch step takes four fifths of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _OnTensors(Learner):
    """Steps over all images, kept as a tensor of floats, over rows of it, or over other images."""

    torch: ModuleType
    all: tuple[Any, Any]
    """Images and labels."""

    def step(self):
        return self._descend(*self.all)

    def learn(self, images, labels):
        return self._descend(*_tensors(self.torch, images, labels))

    def learn_rows(self, rows):
        rows = self.torch.from_numpy(rows)
        return self._descend(*(tensor[rows] for tensor in self.all))

    @abstractmethod
    def _descend(self, images: Any, labels: Any) -> float: ...


class PyTorch(_OnTensors):
    """Eager PyTorch with its own layers, loss and optimizer, over all images at once.

    Accumulating gradients over parts of 1,024 or 4,096 images was not faster.
    """

    def __init__(self, task: Task) -> None:
        self.torch, tensors = _start(task)
        torch = self.torch
        layers: list[Any] = []
        for weights, bias in zip(tensors[::2], tensors[1::2]):
            layer = torch.nn.Linear(*weights.shape)
            layer.load_state_dict({"weight": weights.T, "bias": bias})
            layers += [torch.nn.ReLU(), layer]
        self.network = torch.nn.Sequential(*layers[1:])
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=task.learning_rate)
        self.loss = _torch_loss
        self.all = _tensors(torch, task.images, task.labels)

    def accuracy(self):
        images, labels = self.all
        with self.torch.no_grad():
            return (self.network(images).argmax(1) == labels).float().mean().item()

    def parameters(self):
        return [parameter.detach().numpy().T for parameter in self.network.parameters()]

    def _descend(self, images, labels):
        self.optimizer.zero_grad()
        loss = self.loss(self.torch, self.network, images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def _start(task: Task) -> tuple[ModuleType, list[Any]]:
    """PyTorch, set to the task's number of threads, and copies of the network's parameters."""
    torch = package("torch")
    torch.set_num_threads(task.threads)
    return torch, [torch.tensor(parameter) for parameter in task.mlp.parameters]


def _tensors(torch: ModuleType, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    return torch.from_numpy(np.divide(images, 255, dtype=np.float32)), torch.tensor(labels).long()


def _torch_loss(torch: ModuleType, network: Any, images: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(network(images), labels)


class PyTorchOneDNN(PyTorch):
    """The same, with the first layer's products dispatched to oneDNN, because the images are in its layout.

    PyTorch otherwise calls MKL, which chooses its code path by the CPU's vendor; oneDNN goes by instruction set.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if not self.torch.backends.mkldnn.is_available():
            raise UnavailableError("this PyTorch is built without oneDNN")
        images, labels = self.all
        self.converted = images.to_mkldnn(), labels
        self.loss = _onednn_loss

    def step(self):
        return super()._descend(*self.converted)

    def _descend(self, images, labels):
        return super()._descend(images.to_mkldnn(), labels)


def _onednn_loss(torch: ModuleType, network: Any, images: Any, labels: Any) -> Any:
    first, *others = network
    x = first(images).to_dense()
    for layer in others:
        x = layer(x)
    return torch.nn.functional.cross_entropy(x, labels)


class PyTorchBFloat16(PyTorch):
    """PyTorch with products in bfloat16 (8 bits of precision), accumulated in float32: another category, less exact."""

    tolerance = 2.0**-6
    """Four times bfloat16's unit roundoff: once each for pixels, weights, activations and their gradients.

    Measured: 1e-3 to 4e-3 on MNIST, 9e-3 on synthetic patterns. That is far too much to notice a missing image.
    """

    def __init__(self, task: Task) -> None:
        if not {"avx512_bf16", "amx_bf16", "bf16"}.intersection(get_cpu_info().get("flags", ())):
            raise UnavailableError("this CPU has no instructions for bfloat16")
        super().__init__(task)
        self.loss = _bfloat16_loss


def _bfloat16_loss(torch: ModuleType, network: Any, images: Any, labels: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return _torch_loss(torch, network, images, labels)


FLOAT32_DIFFERENCE = 2.0**-16
"""Two products in float32 differ by less, relative to the largest element: between the unit roundoffs of float32,
2^-24, and of bfloat16, 2^-9."""


class PyTorchMediumPrecision(PyTorchBFloat16):
    """PyTorch in float32, but allowed to round the operands of products to bfloat16: the precision "medium".

    It is skipped where PyTorch multiplies in float32 all the same, if perhaps by another library.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.loss = _torch_loss
        images, layer = self.all[0], self.network[0]
        with self.torch.no_grad():
            exact = layer(images)
            with _medium_precision(self.torch):
                difference = (layer(images) - exact).abs().max() / exact.abs().max()
        if difference < FLOAT32_DIFFERENCE:
            raise UnavailableError("PyTorch multiplies in float32 here, even at medium precision")

    def _descend(self, images, labels):
        with _medium_precision(self.torch):
            return super()._descend(images, labels)


@contextmanager
def _medium_precision(torch: ModuleType) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class PyTorchByHand(_OnTensors):
    """A hand-written step on PyTorch's kernels: no autograd, no optimizer, and updates fused into the products.

    Parts of 2,048 images were not faster.
    """

    WITHIN_PRODUCT = 4096
    """Up to this many images, updates are fused into products. Over more, the product's blocks would be added to the
    weights one by one, each time rounded to the weights' precision, which costs a digit."""

    def __init__(self, task: Task) -> None:
        self.torch, self.tensors = _start(task)
        self.learning_rate = task.learning_rate
        self.all = _tensors(self.torch, task.images, task.labels)

    def accuracy(self):
        images, labels = self.all
        with self.torch.inference_mode():
            weights, bias, last_weights, last_bias = self.tensors
            hidden = self.torch.addmm(bias, images, weights).relu_()
            predicted = self.torch.addmm(last_bias, hidden, last_weights).argmax(1)
            return (predicted == labels).float().mean().item()

    def parameters(self):
        return [tensor.numpy() for tensor in self.tensors]

    def _descend(self, images, labels):
        torch = self.torch
        with torch.inference_mode():
            weights, bias, last_weights, last_bias = self.tensors
            hidden = torch.addmm(bias, images, weights).relu_()
            loss, upstream = softmax_grad(torch, torch.addmm(last_bias, hidden, last_weights), labels)
            hidden_upstream = relu_backward_(torch, upstream @ last_weights.T, hidden)
            rate = -self.learning_rate / len(labels)
            self._move(last_weights, hidden.T, upstream, rate)
            last_bias.add_(upstream.sum(0), alpha=rate)
            self._move(weights, images.T, hidden_upstream, rate)
            bias.add_(hidden_upstream.sum(0), alpha=rate)
            return loss.item() / len(labels)

    def _move(self, weights, left, right, rate):
        if len(right) <= self.WITHIN_PRODUCT:
            weights.addmm_(left, right, alpha=rate)
        else:
            weights.add_(left @ right, alpha=rate)


class PyTorchOneDNNByHand(_OnTensors):
    """A hand-written step on oneDNN's linear layer, an operator without a public name.

    In parts of 2,000 images, activations stay in the cache. On Zen 5, a full-batch step takes half the time of one over
    all images at once.
    """

    PART = 2000

    def __init__(self, task: Task) -> None:
        self.torch, tensors = _start(task)
        if not self.torch.backends.mkldnn.is_available():
            raise UnavailableError("this PyTorch is built without oneDNN")
        self.linear = functools.partial(_linear, self.torch)
        self.tensors = [tensor.T.contiguous() if tensor.ndim == 2 else tensor for tensor in tensors]
        self.learning_rate = task.learning_rate
        self.all = _tensors(self.torch, task.images, task.labels)

    def accuracy(self):
        images, labels = self.all
        with self.torch.inference_mode():
            _, logits = self._forward(images)
            return (logits.argmax(1) == labels).float().mean().item()

    def parameters(self):
        return [tensor.numpy().T for tensor in self.tensors]

    def _forward(self, images):
        weights, bias, last_weights, last_bias = self.tensors
        hidden = self.linear(images, weights, bias, "relu")
        return hidden, self.linear(hidden, last_weights, last_bias)

    def _descend(self, images, labels):
        with self.torch.inference_mode():
            parts = zip(images.split(self.PART), labels.split(self.PART))
            loss, *total = _added(self._gradients(*part) for part in parts)
            for tensor, gradient in zip(self.tensors, total):
                tensor.add_(gradient, alpha=-self.learning_rate / len(labels))
            return loss.item() / len(labels)

    def _gradients(self, images, labels):
        """Loss and gradients, summed over the images; those of weights are transposed, as PyTorch's layers are."""
        hidden, logits = self._forward(images)
        loss, upstream = softmax_grad(self.torch, logits, labels)
        hidden_upstream = relu_backward_(self.torch, self.linear(upstream, self.tensors[2].T), hidden)
        first, last = self.linear(hidden_upstream.T, images.T), self.linear(upstream.T, hidden.T)
        return loss, first, hidden_upstream.sum(0), last, upstream.sum(0)


def _linear(torch: ModuleType, x: Any, weights: Any, bias: Any = None, activation: str = "none") -> Any:
    """x times the transpose of the weights, plus the bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weights, bias, activation, [], "")


def _added(parts: Iterator[tuple]) -> tuple:
    """Sums of tensors over the parts, in the buffers of the first part."""
    total = next(parts)
    for part in parts:
        for tensor, more in zip(total, part):
            tensor += more
    return total


def softmax_grad(torch: ModuleType, logits: Any, labels: Any) -> tuple[Any, Any]:
    """The summed loss, and its gradient with respect to the logits."""
    log_probabilities = logits.log_softmax(1)
    loss = torch.nn.functional.nll_loss(log_probabilities, labels, reduction="sum")
    upstream = log_probabilities.exp_()
    upstream[torch.arange(len(labels)), labels] -= 1
    return loss, upstream


def relu_backward_(torch: ModuleType, upstream: Any, activations: Any) -> Any:
    """`upstream`, set to 0 in place where the activation is not positive."""
    return torch.ops.aten.threshold_backward.grad_input(upstream, activations, 0, grad_input=upstream)


class CompiledPyTorch(PyTorch):
    """PyTorch with forward pass, loss and backward pass compiled; other modes of torch.compile were not faster."""

    compiles = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.loss = _compiled(_torch_loss)

    def _descend(self, images, labels):
        with _compiler_errors(self.torch):
            return super()._descend(images, labels)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """Compiled once, so that a second network of the same shape needs no compilation."""
    torch = package("torch")
    torch.compiler.config.force_disable_caches = True  # otherwise, compile time depends on the disk cache
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise, it would silently run uncompiled
    return torch.compile(function)


@contextmanager
def _compiler_errors(torch: ModuleType) -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:  # above all, if there is no C++ compiler
        raise UnavailableError(f"torch.compile failed: {str(error).splitlines()[0]}") from error


class CompiledStep(PyTorch):
    """The whole step compiled, including the update."""

    compiles = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.rate = self.torch.tensor(task.learning_rate)  # a number would be compiled into the code
        self.tensors = {name: tensor.detach().clone() for name, tensor in self.network.named_parameters()}

    def accuracy(self):
        self.network.load_state_dict(self.tensors)
        return super().accuracy()

    def parameters(self):
        return [tensor.numpy().T for tensor in self.tensors.values()]

    def _descend(self, images, labels):
        with _compiler_errors(self.torch), self.torch.no_grad():
            update = _compiled(_torch_update)
            return update(self.torch, self.network, self.tensors, self.rate, images, labels).item()


def _torch_update(torch: ModuleType, network: Any, tensors: dict, rate: Any, images: Any, labels: Any) -> Any:
    def loss(tensors: dict) -> Any:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(network, tensors, (images,)), labels)

    gradient, mean_loss = torch.func.grad_and_value(loss)(tensors)
    for name, tensor in tensors.items():
        tensor.sub_(gradient[name] * rate)
    return mean_loss


class CompiledParts(Competitor):
    """Hand-written gradients, compiled, over parts of 2,000 images, whose activations stay in the cache."""

    compiles = True
    PART = 2000

    def __init__(self, task: Task) -> None:
        self.torch, self.tensors = _start(task)
        torch = self.torch
        self.count, self.rate = len(task.images), task.learning_rate / len(task.images)
        images, labels = _tensors(torch, task.images, task.labels)
        classes = len(task.mlp.parameters[-1])
        onehot = torch.nn.functional.one_hot(labels, classes).float()
        self.parts = list(zip(images.split(self.PART), onehot.split(self.PART)))

    def step(self):
        gradients = _compiled(_torch_gradients)
        with _compiler_errors(self.torch), self.torch.no_grad():
            loss, *total = _added(gradients(self.torch, *self.tensors, *part) for part in self.parts)
            for tensor, gradient in zip(self.tensors, total):
                tensor.sub_(gradient, alpha=self.rate)
        return loss.item() / self.count

    def parameters(self):
        return [tensor.numpy() for tensor in self.tensors]


def _torch_gradients(
    torch: ModuleType, weights: Any, bias: Any, last_weights: Any, last_bias: Any, images: Any, onehot: Any
) -> tuple:
    hidden = torch.relu(torch.addmm(bias, images, weights))
    log_probabilities = torch.log_softmax(torch.addmm(last_bias, hidden, last_weights), 1)
    upstream = log_probabilities.exp() - onehot
    hidden_upstream = torch.where(hidden > 0, upstream @ last_weights.T, 0.0)
    loss = -(log_probabilities * onehot).sum()
    return loss, images.T @ hidden_upstream, hidden_upstream.sum(0), hidden.T @ upstream, upstream.sum(0)


class PyTorchCSR(Competitor):
    """PyTorch on its CSR tensors, with the transpose converted only once.

    Autograd converts the transpose again in each step, which takes three times as long. So the first layer's gradient
    is hand-written, and autograd does the rest. In parts of 2,048 images, a step takes a third of the time of one over
    all images at once, because the gradient's rows stay in the cache.
    """

    PART = 2048

    def __init__(self, task: Task) -> None:
        self.torch, self.tensors = _start(task)
        torch = self.torch
        self.count = len(task.images)
        for tensor in self.tensors:
            tensor.requires_grad_().grad = torch.zeros_like(tensor)
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


@functools.cache
def mkl_code_path() -> str | None:
    """MKL's version and the code path it chose, as ``MKL_VERBOSE`` prints them; None without PyTorch or its MKL."""
    code = "import torch; a = torch.ones(64, 64); a @ a"
    output = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MKL_VERBOSE": "1"}, capture_output=True, text=True
    ).stdout
    lines = (line for line in output.splitlines() if line.startswith("MKL_VERBOSE oneMKL"))
    return next(lines, "").removeprefix("MKL_VERBOSE ") or None
