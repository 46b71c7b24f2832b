"""Files that are written whole or not at all."""

import contextlib
import glob
import json
import os
from pathlib import Path
from typing import Any


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
