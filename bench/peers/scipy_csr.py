"""SciPy's compressed sparse rows (CSR)."""

import numpy as np
from scipy.sparse import csr_array

from kernels.numpy_backend import NumpyBackend


class SciPyCSR(NumpyBackend):
    """The NumPy backend on SciPy's CSR matrices, run in our shards, as SciPy itself is single-threaded.

    For a shard, the transposed view (compressed columns) is as fast as a transpose converted to CSR.
    """

    def _prepare(self, images, dtype):
        return csr_array(super()._prepare(images, dtype))

    def _matmul(self, a, b, bias):
        if isinstance(a, np.ndarray):
            return super()._matmul(a, b, bias)
        out = a @ b  # NumPy's functions do not take sparse matrices
        if bias is not None:
            out += bias
        return out
