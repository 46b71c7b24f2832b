"""Vectorized NumPy at its best: every loop over elements runs in compiled code.

Products go to the BLAS that NumPy was built with. The other kernels are passes over arrays that fit in a core's cache.
Each works in place, as far as it can, on the buffer that it returns.
"""

import numpy as np
from numpy.typing import NDArray

from kernels.backend import Backend


class NumpyBackend(Backend):
    """The four kernels as whole-array expressions.

    `asarray` turns subclasses into plain arrays. With an `np.matrix`, the same expressions have other results.
    """

    def _matmul(self, a: NDArray, b: NDArray, bias: NDArray | None) -> NDArray:
        # NumPy's matmul computes an outer product, as in a batch of one image, without BLAS: ten times slower.
        out = np.asarray(a @ b if a.shape[1] != 1 else a.dot(b))
        if bias is not None:
            out += bias
        return out

    def _relu(self, z: NDArray) -> NDArray:
        z = np.ascontiguousarray(z)
        # A row of zeros instead of the scalar 0: NumPy's maximum is vectorized only for two arrays.
        return np.maximum(z, np.zeros(z.shape[1], z.dtype), out=z)

    def _relu_grad(self, upstream: NDArray, activations: NDArray) -> NDArray:
        # An AND with a mask of all ones or all zeros selects like np.where, NaN included, and is much faster.
        bits = np.dtype(f"i{upstream.itemsize}")
        mask = np.greater(np.asarray(activations), 0, order="C").astype(bits)
        np.negative(mask, out=mask)
        mask &= upstream.view(bits)
        return mask.view(upstream.dtype)

    def _softmax_grad(self, logits: NDArray, labels: NDArray[np.integer]) -> tuple[float, int, NDArray]:
        logits, rows = np.asarray(logits), np.arange(len(logits))
        predictions = logits.argmax(axis=1)
        out = np.subtract(logits, logits[rows, predictions, None], order="C")
        loss = -out[rows, labels].sum(dtype=np.float64)
        np.exp(out, out=out)
        total = out.sum(axis=1, keepdims=True)
        out /= total
        out[rows, labels] -= 1
        loss += np.log(total, dtype=np.float64).sum()
        return float(loss), int(np.count_nonzero(predictions == labels)), out
