"""Memory maps of files, and what happens if a file is truncated meanwhile."""

import ctypes
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def map_bytes(file: Path, offset: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A read-only memory map of a part of a file. If the file is truncated later, the process ends with one line.

    Raises
    ------
    OSError, ValueError
        If the file cannot be mapped, or is too short.
    """
    _end_when_cut_short()
    array = np.memmap(file, np.uint8, "r", offset, shape)
    _mapped[file] = max(offset + array.nbytes, _mapped.get(file, 0))
    return array


_mapped: dict[Path, int] = {}
"""The end of the mapped part of each file."""


@functools.cache
def _end_when_cut_short() -> Any:
    """Handle SIGBUS, where it exists: the system sends it to a thread that reads a page beyond the end of its file.

    Python runs its own handlers later, but the thread cannot continue. So this handler is called by the C library, in
    the reading thread, which is in the middle of a kernel and holds no lock that the handler would need.
    """
    if not hasattr(signal, "SIGBUS"):
        return None
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, type(handler))
    set_handler(signal.SIGBUS, handler)
    return handler  # which the cache keeps alive


def _end(number: int) -> None:
    short = [file for file, end in _mapped.items() if not file.exists() or file.stat().st_size < end]
    line = f"error: {short[0] if short else 'a mapped file'} was cut short while it was read: put back the whole file\n"
    os.write(2, b"\n" * sys.stderr.isatty() + line.encode())
    os._exit(2)
