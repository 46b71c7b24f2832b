"""Throughput of every kernel on every backend, on one thread, at the shapes of a training step on one chunk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import get_backend
from kernels.backend import CHUNK
from model.mlp import MLP

NAIVE_CHUNK = 4  # images; pure Python takes milliseconds for each


class Step(NamedTuple):
    """The arrays of one training step on n images."""

    x: Any
    hidden: NDArray
    logits: NDArray
    labels: NDArray
    logits_grad: NDArray
    hidden_grad: NDArray
    layers: list[tuple[NDArray, NDArray]]


class Kernel(NamedTuple):
    """How to call a kernel within a step, and what that costs per image."""

    call: Callable
    flop: int
    """Floating-point operations per image of the dense form; an exponential counts as one."""
    terms: int
    """Longest sum behind an entry of the result: its rounding errors bound the error."""


KERNELS = {
    "forward product": Kernel(lambda b, s: b.matmul(s.x, *s.layers[0]), 2 * 784 * 128, 784),
    "backward product": Kernel(lambda b, s: b.matmul(s.x.T, s.hidden_grad), 2 * 784 * 128, CHUNK),
    "logits product": Kernel(lambda b, s: b.matmul(s.hidden, *s.layers[1]), 2 * 128 * 10, 128),
    "hidden gradient product": Kernel(lambda b, s: b.matmul(s.logits_grad, s.layers[1][0].T), 2 * 10 * 128, 10),
    "output gradient product": Kernel(lambda b, s: b.matmul(s.hidden.T, s.logits_grad), 2 * 128 * 10, CHUNK),
    "relu": Kernel(lambda b, s: b.relu(s.hidden_grad), 128, 1),
    "relu_grad": Kernel(lambda b, s: b.relu_grad(s.hidden_grad, s.hidden), 128, 1),
    "softmax_grad": Kernel(lambda b, s: b.softmax_grad(s.logits, s.labels)[2], 5 * 10, 10),
}


def training_step(images, labels):
    """The arrays of a step, in float32, from the first random start."""
    numpy = get_backend("numpy")
    mlp = MLP()
    x = numpy.prepare(images)
    (_, hidden), logits = mlp.forward(numpy, x)
    _, _, logits_grad = numpy.softmax_grad(logits, labels)
    hidden_grad = numpy.relu_grad(numpy.matmul(logits_grad, mlp.layers[1][0].T), hidden)
    return Step(x, hidden, logits, labels, logits_grad, hidden_grad, mlp.layers)


def in_float64(value):
    """The same values in float64; other things as they are."""
    if isinstance(value, list | tuple):
        return [in_float64(item) for item in value]
    return value.astype(np.float64) if getattr(value, "dtype", None) == np.float32 else value


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(benchmark, backend, name, dataset, quick, one_thread):
    kernel = KERNELS[name]
    count = NAIVE_CHUNK if backend.too_slow_for_full_batches else CHUNK
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    step = training_step(images, labels)
    expected = kernel.call(get_backend("numpy"), Step(*in_float64(step)))
    step = step._replace(x=backend.prepare(images))
    scale = np.abs(expected).max()
    error = np.abs(kernel.call(backend, step) - expected).max() / scale
    assert error <= (kernel.terms + 10) * np.finfo(np.float32).eps, "wrong results are not worth timing"

    benchmark.group = f"{name}, one thread"
    benchmark.name = f"{backend.name}, {count} images"
    benchmark.extra_info.update(
        kernel=name,
        backend=backend.name,
        shape=f"{count} images",
        threads=1,
        flop=kernel.flop * count,
        relative_error=float(error),
        dataset=dataset.name,
    )
    rounds = (3 if quick else 10) if backend.too_slow_for_full_batches else (20 if quick else 300)
    benchmark.pedantic(kernel.call, (backend, step), rounds=rounds, warmup_rounds=min(rounds, 10))
