"""SciPy's compressed sparse rows (CSR)."""

from scipy.sparse import csr_array

from kernels.numpy_backend import NumpyBackend


class SciPyCSR(NumpyBackend):
    """The NumPy backend on SciPy's CSR matrices, run in our shards, as SciPy itself is single-threaded.

    For a shard, the transposed view (compressed columns) is as fast as a transpose converted to CSR.
    """

    images_at_once = 2048  # as on the sparse backend: on Zen 5, up to 6 % faster than 1,024 for C CSR

    def _prepare(self, images, dtype):
        return csr_array(super()._prepare(images, dtype))
