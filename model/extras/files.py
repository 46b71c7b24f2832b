"""Files that are written whole or not at all, and files that are mapped into memory."""

import contextlib
import ctypes
import functools
import glob
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_writable(file: Path) -> None:
    """Raise an OSError, before any work is done, if `file` could not be written at its end."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise OSError(f"cannot write {file}: there is no folder {folder}; create it first")
    if file.exists() and not file.is_file():
        raise OSError(f"cannot write {file}: it is a folder or a device; name a file")
    if not os.access(folder, os.W_OK):
        raise OSError(f"cannot write {file}: no permission to write in {folder}")


def write_whole(file: Path, content: bytes) -> None:
    """Write `content` beside `file` and rename it: whenever the process is killed, `file` is the old or the new one.

    What a killed process has left beside it is removed. A link is followed.

    Raises
    ------
    OSError
        If it cannot be written; then `file` is as it was, and nothing is left beside it.
    """
    file = file.resolve()
    for left_over in file.parent.glob(f".{glob.escape(file.name)}.*.part"):
        left_over.unlink(missing_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with beside.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # before the new name: some file systems would rename first and write later
        beside.replace(file)
    except OSError as error:
        raise OSError(f"cannot write {file}: {error.strerror}; what was there before is untouched") from error
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can do this to folders
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(file: Path, content: Any) -> None:
    """Write `content` to `file`, whole or not at all."""
    write_whole(file, json.dumps(content, indent=1).encode() + b"\n")


def map_bytes(file: Path, offset: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A read-only memory map of a part of a file. If the file is cut short meanwhile, the process ends with one line.

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
"""The end of what is mapped of each file."""


@functools.cache
def _end_when_cut_short() -> Any:
    """Handle SIGBUS, where there is such a thing: what the system sends to who reads a page that its file has no more.

    Python's own handlers would run later, but the thread cannot go on: this one is called by the C library, in the
    thread that reads, which is in the middle of a kernel and holds no lock that this would need.
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
