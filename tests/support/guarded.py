"""Arrays next to guard pages: reading or writing past their ends crashes the process."""

import ctypes
import functools
import mmap
import os

import numpy as np
import pytest

DTYPES = [np.float32, np.float64]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)

every_place = pytest.mark.parametrize("place", ["start", "end"])

needs_mprotect = pytest.mark.skipif(os.name != "posix", reason="guard pages are made with mprotect")


class Guarded:
    """An array at the start or end of memory between guard pages; touching these crashes the process.

    Bytes of that memory that belong to no element are canaries, which read as NaN.
    """

    def __init__(self, values, layout="row-major", place="end"):
        shape = values.shape
        if layout == "transposed":
            shape = shape[::-1]
        if layout == "strided":
            shape = tuple(max(0, 2 * size - 1) for size in shape)
        size = int(np.prod(shape)) * values.itemsize
        shift = layout == "misaligned"
        room = -(-max(1, size + shift) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
        self._memory = np.frombuffer(pages, np.uint8)[mmap.PAGESIZE : -mmap.PAGESIZE]
        self._memory[:] = 0xFF
        start = shift if place == "start" else room - size - shift
        array = self._memory[start : start + size].view(values.dtype).reshape(shape)
        if layout == "transposed":
            array = array.T
        if layout == "reversed":
            array = array[(slice(None, None, -1),) * array.ndim]
        if layout == "strided":
            array = array[(slice(None, None, 2),) * array.ndim]
        array[...] = 0
        self._canaries = self._memory != 0
        array[...] = values
        self._values = values
        self.array = array
        forbid(self._memory.ctypes.data - mmap.PAGESIZE)
        forbid(self._memory.ctypes.data + room)

    def read_only(self):
        self.array.flags.writeable = False
        return self.array

    def assert_canaries_live(self):
        np.testing.assert_array_equal(self._memory[self._canaries], 0xFF)

    def assert_unchanged(self):
        self.assert_canaries_live()
        np.testing.assert_array_equal(self.array, self._values)


@functools.cache
def libc():
    return ctypes.CDLL(None, use_errno=True)


def forbid(address):
    page = ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE)
    if libc().mprotect(*page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


def integers(shape, dtype, seed=0):
    """Small integers, whose products and sums are exact in any order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)
