"""Paths, atomic writes and locks: a file is written completely or not at all, by one process at a time."""

import contextlib
import glob
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:  # not filelock, which takes a twentieth of a second to import and leaves lock files behind
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_TIMEOUT = 5.0  # seconds to wait for another writer, which takes a few milliseconds
MAX_REPORT_BYTES = 2**28

_held = threading.local()  # the locks that each thread holds, which makes them reentrant


def parse_path(text: str) -> Path:
    """A path; `~` is the user's home folder even if the shell does not expand it, e.g. in ``--data=~/mnist``."""
    return Path(os.path.expanduser(text))


def make_folder(folder: Path) -> None:
    """Make a folder for results; raise an OSError, before any work is done, if they could not be written there."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise OSError(f"{place} is not a folder: choose a folder for the results")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
    except OSError as error:
        raise OSError(f"cannot write in {folder}: {error.strerror}; choose another folder for the results") from error


def check_writable(file: Path) -> None:
    """Raise an OSError, before any work is lost, if `file` cannot be written."""
    folder = resolved(file).parent
    if not folder.is_dir():
        raise OSError(f"cannot write {file}: there is no folder {folder}; create it first")
    if os.path.exists(file) and not os.path.isfile(file):
        raise OSError(f"cannot write {file}: it is a folder or a device; choose a file")
    try:
        for place in file, _part(resolved(file)):  # the second name is longer
            with contextlib.suppress(FileNotFoundError):
                place.stat()
    except OSError as error:  # a name that is too long, or a symbolic-link loop
        raise OSError(f"cannot write {file}: {error.strerror}; choose another file") from error
    try:
        _probe(folder)
    except OSError as error:
        raise OSError(f"cannot write {file}: {error.strerror} in {folder}; choose another folder") from error


def check_replaceable(file: Path, key: str) -> None:
    """Raise an OSError, before any work is lost, if `file` exists and is not a report, a JSON object with `key`."""
    if not file.exists():
        return
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size <= MAX_REPORT_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not (isinstance(content, dict) and key in content):
        raise OSError(
            f"{file} exists and is not an earlier report (JSON with {key!r}): choose another file, or move it away"
        )


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths are the same file, existing or not, even if spelled differently or through links."""
    with contextlib.suppress(OSError):
        if os.path.samefile(one, other):
            return True
    return resolved(one) == resolved(other)


def resolved(file: Path) -> Path:
    """The absolute path, with symbolic links resolved; a loop of links is left unresolved."""
    return Path(os.path.realpath(file))


@contextmanager
def locked(file: Path, timeout: float = 0.0) -> Iterator[None]:
    """Within the block, only this thread writes `file`.

    The lock is an flock on a file beside it. The system releases it when the process ends, for whatever reason, and the
    next owner reuses the lock file. Without system or file system support for locks, there is no lock.

    Parameters
    ----------
    file
        Need not exist, but its folder must.
    timeout
        Seconds to wait while another owner holds the lock.

    Raises
    ------
    OSError
        If another process or thread holds the lock, or no file can be created beside `file`.
    """
    lock = _beside(resolved(file), "lock")
    held: dict[Path, bool] = _held.__dict__.setdefault("locks", {})
    if lock in held:
        yield
        return
    stream, exclusive = _acquired(lock, file, timeout)
    held[lock] = exclusive
    try:
        yield
    finally:
        del held[lock]
        lock.unlink(missing_ok=True)  # before closing, while the lock is still ours
        stream.close()


def write_atomically(file: Path, content: bytes) -> None:
    """Write atomically, by renaming a temporary file: a killed process leaves either the old file or the new one.

    Temporary files of killed processes are removed. Symbolic links are followed.

    Raises
    ------
    OSError
        If it cannot be written. `file` is then unchanged, and no temporary file is left.
    """
    file = resolved(file)
    part = _part(file)
    with locked(file, LOCK_TIMEOUT):
        alone = _held.locks[_beside(file, "lock")]  # if so, all other temporary files are of dead writers
        for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.part") if alone else [part]:
            leftover.unlink(missing_ok=True)
        try:
            with part.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())  # before renaming, as some file systems reorder the two
            part.replace(file)
        except OSError as error:
            raise OSError(f"cannot write {file}: {error.strerror}; the previous content is untouched") from error
        finally:
            part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can sync directories
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(file: Path, content: Any) -> None:
    """Write `content` to `file` as JSON, atomically."""
    write_atomically(file, json.dumps(content, indent=1).encode() + b"\n")


def _probe(folder: Path) -> None:
    """Raise an OSError if no file of a page can be written in `folder`: on a full disk, an empty one still can."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as probe:
        probe.write(bytes(4096))
        probe.flush()


def _part(file: Path) -> Path:
    """The temporary file that this process writes before it renames it to `file`."""
    return _beside(file, f"{os.getpid()}.part")


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(f".{file.name}.{ending}")


def _acquired(lock: Path, file: Path, timeout: float) -> tuple[IO[bytes], bool]:
    """The open lock file, and whether it is locked: False where the system has no locks."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            stream = lock.open("a+b", buffering=0)
        except OSError as error:
            raise OSError(f"cannot write {file}: {error.strerror} ({lock})") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
                with contextlib.suppress(OSError):  # on a full disk, others' error messages lack the process ID
                    stream.truncate(0)
                    stream.write(b"%d" % os.getpid())
                return stream, True
        except FileNotFoundError:
            pass  # its owner removed it after we opened it: try again
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() >= deadline:
                with stream:
                    stream.seek(0)
                    owner = stream.read(20).decode("ascii", "replace") or "another"
                raise OSError(
                    f"{file} is in use by process {owner}: wait until it has ended, or choose another file"
                ) from error
            time.sleep(0.01)
        except (AttributeError, OSError):
            return stream, False
        stream.close()
