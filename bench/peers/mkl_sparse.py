"""MKL's sparse product, through sparse_dot_mkl."""

import os
import sys
from pathlib import Path

from bench.peers.c_csr import Rows
from bench.peers.scipy_csr import SciPyCSR
from bench.peers.task import package


class MKLCSR(SciPyCSR):
    """The NumPy backend with image products by single-threaded MKL, run in our shards.

    Raises
    ------
    UnavailableError
        If sparse_dot_mkl or MKL is missing.
    """

    def __init__(self) -> None:
        for library in Path(sys.prefix, "lib").glob("libmkl_rt.so*"):  # where pip installs it, off the search path
            os.environ.setdefault("MKL_RT", str(library))
        self.mkl = package("sparse_dot_mkl", "pip install mkl sparse_dot_mkl")
        self.mkl.mkl_set_num_threads(1)

    def _prepare(self, images, dtype):
        return Rows(super()._prepare(images, dtype))

    def _matmul(self, a, b, bias):
        if not isinstance(a, Rows):
            return super()._matmul(a, b, bias)
        out = self.mkl.dot_product_mkl(a.matrix, b)
        if bias is not None:
            out += bias
        return out
