"""The product of compressed sparse rows (CSR) and a dense matrix in a few lines of C, compiled on first use."""

import ctypes
import functools
import shlex
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from bench.peers.scipy_csr import SciPyCSR
from bench.peers.task import UnavailableError

# No -ffast-math: GCC then links start-up code that sets flush-to-zero, so every other kernel would lose its denormals.
COMMAND = "cc -O3 -march=native -ffp-contract=fast -shared -fPIC"

# Eight vector accumulators stay in registers. In a plain loop, GCC 12 spills them, which is five times as slow.
SOURCE = """
#ifdef __AVX512F__
enum {WIDE = 16};
#else
enum {WIDE = 8};
#endif
typedef float vector __attribute__((vector_size(4 * WIDE), aligned(4)));

void rows_times(int rows, long width, const int *ends, const int *columns, const float *values,
                const float *b, float *c) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < width; j += 8 * WIDE) {
      vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0}, s5 = {0}, s6 = {0}, s7 = {0};
      for (int p = ends[i]; p < ends[i + 1]; p++) {
        const vector *v = (const vector *)(b + width * columns[p] + j);
        const float x = values[p];
        s0 += x * v[0]; s1 += x * v[1]; s2 += x * v[2]; s3 += x * v[3];
        s4 += x * v[4]; s5 += x * v[5]; s6 += x * v[6]; s7 += x * v[7];
      }
      vector *sums = (vector *)(c + width * i + j);
      sums[0] = s0; sums[1] = s1; sums[2] = s2; sums[3] = s3; sums[4] = s4; sums[5] = s5; sums[6] = s6; sums[7] = s7;
    }
}
"""
PANEL = 128
"""Columns are zero-padded to a multiple of this."""


class Rows:
    """The CSR forms of a matrix and of its transpose."""

    def __init__(self, matrix: csr_array, transposed: "Rows | None" = None) -> None:
        self.matrix = matrix
        self.shape, self.dtype = matrix.shape, matrix.dtype
        self.T = transposed or Rows(csr_array(matrix.T), self)

    def __len__(self) -> int:
        return self.shape[0]


class CCSR(SciPyCSR):
    """The NumPy backend with image products in C, run in our shards.

    Raises
    ------
    UnavailableError
        If there is no C compiler.
    """

    def __init__(self) -> None:
        if not shutil.which("cc"):
            raise UnavailableError("there is no C compiler named cc")

    def _prepare(self, images, dtype):
        return Rows(super()._prepare(images, dtype))

    def _matmul(self, a, b, bias):
        if not isinstance(a, Rows):
            return super()._matmul(a, b, bias)
        columns = b.shape[1]
        filled = np.ascontiguousarray(np.pad(b, [(0, 0), (0, -columns % PANEL)]) if columns % PANEL else b)
        out = np.empty((len(a), filled.shape[1]), np.float32)
        arrays = (a.matrix.indptr, a.matrix.indices, a.matrix.data, filled, out)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
        _rows_times()(len(a), ctypes.c_long(filled.shape[1]), *pointers)
        out = np.ascontiguousarray(out[:, :columns])
        if bias is not None:
            out += bias
        return out


@functools.cache
def _rows_times() -> Any:
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "rows.c"), Path(folder, "rows.so")
        source.write_text(SOURCE)
        command = [*shlex.split(COMMAND), "-o", str(library), str(source)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise UnavailableError(f"{COMMAND} failed: {built.stderr.strip().splitlines()[0]}")
        return ctypes.CDLL(str(library)).rows_times
