"""SciPy's compressed sparse rows."""

from scipy.sparse import csr_array

from kernels.numpy_backend import NumpyBackend


class SciPyCSR(NumpyBackend):
    """The NumPy backend on SciPy's compressed sparse rows, in our shards: SciPy itself has no threads.

    For a chunk of images, the transposed view (columns instead of rows) is as fast as rows made of the transpose.
    """

    def _prepare(self, images, dtype):
        return csr_array(super()._prepare(images, dtype))
