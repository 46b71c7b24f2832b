"""The loops of the naive backend, compiled: ``--backend bench.peers.compiled_naive:CompiledNaiveBackend``.

It is not a named backend: it shows what compilation alone gains, and how to write a custom backend.
"""

import numpy as np
from numba import njit

from kernels import Backend, naive_backend

matmul = njit(nogil=True)(naive_backend.matmul)
relu = njit(nogil=True)(naive_backend.relu)
relu_grad = njit(nogil=True)(naive_backend.relu_grad)
softmax_grad = njit(nogil=True)(naive_backend.softmax_grad)


class CompiledNaiveBackend(Backend):
    """The naive kernels under `numba.njit`, on arrays instead of lists."""

    def _matmul(self, a, b, bias):
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)
        matmul(a, b, np.zeros(b.shape[1], a.dtype) if bias is None else bias, out)
        return out

    def _relu(self, z):
        out = np.empty(z.shape, z.dtype)
        relu(z, out)
        return out

    def _relu_grad(self, upstream, activations):
        out = np.empty(upstream.shape, upstream.dtype)
        relu_grad(upstream, activations, out)
        return out

    def _softmax_grad(self, logits, labels):
        out = np.empty(logits.shape, logits.dtype)
        loss, correct = softmax_grad(logits, labels, out)
        return loss, correct, out
