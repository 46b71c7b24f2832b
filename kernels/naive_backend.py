"""Plain Python loops: the specification that every other backend is tested against.

The kernels index ``a[i][k]``. So the same source works on lists, which plain Python indexes fastest, and on arrays,
when `numba.njit` compiles it. Nothing is vectorized and nothing is clever. Read this file to learn what is computed,
and the others to learn how to compute it fast.
"""

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.backend import Backend


def matmul(a, b, bias, out):
    """out = A B + bias: one multiplication and one addition for every i, j and k."""
    for i in range(len(out)):
        for j in range(len(bias)):
            total = bias[j]
            for k in range(len(b)):
                total += a[i][k] * b[k][j]
            out[i][j] = total


def relu(z, out):
    """out = max(z, 0); NaN stays NaN."""
    for i in range(len(z)):
        for j in range(len(z[i])):
            out[i][j] = 0.0 if z[i][j] <= 0.0 else z[i][j]


def relu_grad(upstream, activations, out):
    """out = upstream where the activation is positive, else 0."""
    for i in range(len(upstream)):
        for j in range(len(upstream[i])):
            out[i][j] = upstream[i][j] if activations[i][j] > 0.0 else 0.0


def softmax_grad(logits, labels, out):
    """out = softmax(logits) - onehot(labels); returns the summed cross-entropy and the count of correct rows."""
    loss = 0.0
    correct = 0
    for i in range(len(logits)):
        row, label = logits[i], labels[i]
        largest = 0
        for j in range(1, len(row)):
            if row[j] > row[largest] or (row[j] != row[j] and row[largest] == row[largest]):  # the first NaN wins
                largest = j
        total = 0.0
        for j in range(len(row)):
            out[i][j] = math.exp(row[j] - row[largest])
            total += out[i][j]
        for j in range(len(row)):
            out[i][j] /= total
        out[i][label] -= 1.0
        loss += math.log(total) - (row[label] - row[largest])
        correct += largest == label
    return loss, correct


class NaiveBackend(Backend):
    """The loops above, on lists of Python floats. They compute in float64, and round to the dtype at the end."""

    too_slow_for_full_batches = True

    def _prepare(self, images: NDArray[np.uint8], dtype: np.dtype) -> NDArray:
        return np.array([[pixel / 255 for pixel in image] for image in images.tolist()], dtype).reshape(images.shape)

    def _matmul(self, a: NDArray, b: NDArray, bias: NDArray | None) -> NDArray:
        out = _zeros(len(a), b.shape[1])
        matmul(a.tolist(), b.tolist(), [0.0] * b.shape[1] if bias is None else bias.tolist(), out)
        return _array(out, (len(a), b.shape[1]), a.dtype)

    def _relu(self, z: NDArray) -> NDArray:
        out = _zeros(*z.shape)
        relu(z.tolist(), out)
        return _array(out, z.shape, z.dtype)

    def _relu_grad(self, upstream: NDArray, activations: NDArray) -> NDArray:
        out = _zeros(*upstream.shape)
        relu_grad(upstream.tolist(), activations.tolist(), out)
        return _array(out, upstream.shape, upstream.dtype)

    def _softmax_grad(self, logits: NDArray, labels: NDArray[np.integer]) -> tuple[float, int, NDArray]:
        out = _zeros(*logits.shape)
        loss, correct = softmax_grad(logits.tolist(), labels.tolist(), out)
        return loss, correct, _array(out, logits.shape, logits.dtype)


def _zeros(rows: int, columns: int) -> list[list[float]]:
    return [[0.0] * columns for _ in range(rows)]


def _array(lists: list[list[float]], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
    return np.array(lists, dtype).reshape(shape)  # with no rows, NumPy cannot infer the columns
