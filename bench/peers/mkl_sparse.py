"""MKL's sparse product, through sparse_dot_mkl."""

import os
import sys
from pathlib import Path

from scipy.sparse import csr_array

from bench.peers.c_csr import Rows
from bench.peers.task import package
from kernels.numpy_backend import NumpyBackend


class MKLCSR(NumpyBackend):
    """The NumPy backend with image products by single-threaded MKL, run in our shards.

    Raises
    ------
    UnavailableError
        If sparse_dot_mkl or MKL is missing.
    """

    images_at_once = 2048  # as many as the sparse backend takes

    def __init__(self) -> None:
        for library in Path(sys.prefix, "lib").glob("libmkl_rt.so*"):  # where pip installs it, off the search path
            os.environ.setdefault("MKL_RT", str(library))
        self.mkl = package("sparse_dot_mkl", "pip install mkl sparse_dot_mkl")
        self.mkl.mkl_set_num_threads(1)

    def _prepare(self, images, dtype):
        return Rows(csr_array(super()._prepare(images, dtype)))

    def _matmul(self, a, b, bias):
        if not isinstance(a, Rows):
            return super()._matmul(a, b, bias)
        out = self.mkl.dot_product_mkl(a.matrix, b)
        if bias is not None:
            out += bias
        return out
