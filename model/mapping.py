"""Memory maps of files, and a clear error if a mapped file is truncated."""

import ctypes
import functools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def map_bytes(file: Path, offset: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A read-only memory map of part of a file. If the file is truncated later, the process ends with a one-line error.

    Parameters
    ----------
    file
        The file to map.
    offset
        Bytes to skip at the start of the file.
    shape
        Shape of the array.

    Returns
    -------
    ndarray
        uint8, read-only.

    Raises
    ------
    OSError, ValueError
        If the file cannot be mapped, or is too short.
    """
    _end_when_truncated()
    array = np.memmap(file, np.uint8, "r", offset, shape)
    _mapped[file] = max(offset + array.nbytes, _mapped.get(file, 0))
    return array


_mapped: dict[Path, int] = {}
"""The end of the mapped part of each file."""


@functools.cache
def _end_when_truncated() -> Any:
    """Handle SIGBUS, where it exists: the system sends it to a thread that reads a page beyond the end of its file.

    Python defers its handlers, but the thread cannot continue. So this one is installed in the C library and runs in
    the reading thread, which is in the middle of a kernel and holds no lock that the handler would need.
    """
    if not hasattr(signal, "SIGBUS"):
        return None
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, type(handler))
    set_handler(signal.SIGBUS, handler)
    return handler  # the cache keeps it alive


_ENDING = threading.Lock()  # acquired once, and never released


def _end(number: int) -> None:
    _ENDING.acquire()  # another thread that reads the file waits here until the process has ended
    try:
        # Of a copy, as another thread may be mapping a file.
        short = [file for file, end in list(_mapped.items()) if _bytes(file) < end]
        file = short[0] if short else "a mapped file"
        line = f"error: {file} was truncated while in use: restore the complete file\n"
        os.write(2, b"\n" * os.isatty(2) + line.encode(errors="surrogateescape"))
    finally:
        os._exit(2)  # returning would repeat the read


def _bytes(file: Path) -> int:
    """The size of a file; 0 if it is gone or inaccessible."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
