"""How kernels are compiled and cached, and the types of their parameters.

Decorate a function with :func:`kernel` to call it from Python.
"""

import errno
import functools
import hashlib
import os
import pickle
import secrets
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import types
from numba.core import event, serialize
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target

# The target of code generation: LLVM's triple, CPU name and CPU features, including overrides by Numba's settings. LLVM
# aborts on Snapdragon X, which it calls oryon-1 (numba issue 10388): set NUMBA_CPU_NAME=generic there.
TARGET: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()

# Types of a kernel's parameters. Each type covers all layouts that the kernel accepts, so that transposed, read-only or
# misaligned arrays need no other version.


def matrix_in(dtype: types.Float) -> types.Array:
    """(n, m) array to read, with any strides."""
    return types.Array(dtype, 2, "A", readonly=True, aligned=False)


def row_major_in(dtype: types.Float) -> types.Array:
    """(n, m) array to read, row-major."""
    return types.Array(dtype, 2, "C", readonly=True, aligned=False)


def row_major_inout(dtype: types.Float) -> types.Array:
    """(n, m) array to read and write, row-major."""
    return types.Array(dtype, 2, "C", aligned=False)


def matrix_out(dtype: types.Float) -> types.Array:
    """(n, m) array to write, row-major."""
    return types.Array(dtype, 2, "C")


def flat_in(dtype: types.Float) -> types.Array:
    """(n,) array to read, contiguous."""
    return types.Array(dtype, 1, "C", readonly=True, aligned=False)


def flat_inout(dtype: types.Float) -> types.Array:
    """(n,) array to read and write, contiguous."""
    return types.Array(dtype, 1, "C", aligned=False)


def integers_in(dtype: types.Float) -> types.Array:
    """(n,) array of int64 to read, with any stride."""
    return types.Array(types.int64, 1, "A", readonly=True, aligned=False)


class Kernel(dict[np.dtype, Callable]):
    """A function that is compiled, or loaded from the cache on disk, once for each float type.

    It releases the GIL, and is thread-safe.

    ``kernel[dtype]`` is the machine code, and is called like the function. Numba's dispatch on the types of four arrays
    takes longer than all the rest of a call. So only the size of array elements is checked. Arrays must have the
    dimensions, layout and dtype that `parameters` say.

    Raises
    ------
    ValueError
        If ``NUMBA_DISABLE_JIT`` is set: explicit vectors do not run in plain Python.
    """

    def __init__(
        self, function: Callable, parameters: Sequence[Callable], returns: types.Type, options: dict[str, Any]
    ):
        super().__init__()
        _require_compiler()
        functools.update_wrapper(self, function)
        self.function = function
        self._parameters = parameters
        self._returns = returns
        self._options: dict[str, Any] = {"nogil": True, "error_model": "numpy"} | options
        self._source = _read(function)
        self._dispatchers: list[Any] = []  # they own the machine code

    def __call__(self, array: np.ndarray, *arguments: Any) -> Any:
        """Call the version for the dtype of the first argument: on Zen 5, 0.2 µs more than ``kernel[dtype]``."""
        return self[array.dtype](array, *arguments)

    def __missing__(self, dtype: np.dtype) -> Callable:
        with _COMPILING, event.install_timer("numba:compile", _SECONDS.append):
            if dtype not in self:
                dispatcher = self._dispatcher(dtype, is_cached=True)
                (version,) = dispatcher.overloads.values()
                self._dispatchers.append(dispatcher)
                self[dtype] = version.entry_point
        return self[dtype]

    def assembly(self, dtype: np.dtype) -> str:
        """Assembly for a float type. This compiles again, as Numba has no assembly of cached code."""
        return next(iter(self._dispatcher(dtype, is_cached=False).inspect_asm().values()))

    def ir(self, dtype: np.dtype) -> str:
        """LLVM IR for a float type, optimized as Numba's settings say."""
        return next(iter(self._dispatcher(dtype, is_cached=False).inspect_llvm().values()))

    def _dispatcher(self, dtype: np.dtype, is_cached: bool) -> Any:
        # Numba re-reads the environment only inside compile(): too late for the check and the cache key.
        numba.core.config.reload_config()
        _require_compiler()
        dispatcher: Any = numba.njit(**self._options)(self.function)
        if is_cached and (cache := self._cache(dtype)):
            dispatcher._cache = cache
        dispatcher.compile(self._returns(*(parameter(numba.from_dtype(dtype)) for parameter in self._parameters)))
        dispatcher.disable_compile()
        return dispatcher

    def _cache(self, dtype: np.dtype) -> "_Cache | None":
        """The cache file for these sources, compiler versions and settings; None without sources.

        Numba's cache is keyed only by the function's file and the CPU. It would run stale code after an edit of this
        file, and slow code after a run with ``NUMBA_OPT=0``. With one file per dtype, processes that start at the same
        time write the same files.
        """
        if self._source is None:
            return None
        state = hashlib.sha256(_SOURCES + self._source + repr((_VERSIONS, TARGET, _settings(), dtype.str)).encode())
        folder = Path(_config.CACHE_DIR or _FOLDER / "__pycache__") / f"kernels-{state.hexdigest()[:16]}"
        return _Cache(folder / f"{self.function.__module__}.{self.function.__qualname__}.nbc")


def kernel(*parameters: Callable, returns: types.Type = types.void, **options: Any) -> Callable[[Callable], Kernel]:
    """Decorate a function to become a :class:`Kernel`.

    Parameters
    ----------
    parameters
        For each argument, a function from the float type to the argument's type, like `matrix_in`. The first argument
        is an array of that float type.
    returns
        Type of the result.
    options
        More options for :func:`numba.njit`.
    """
    return lambda function: Kernel(function, parameters, returns, options)


def compile_seconds() -> float:
    """Seconds that this process has spent compiling kernels; 0 if all came from the cache on disk."""
    return sum(_SECONDS)


_config: Any = numba.config  # its attributes are created at run time
_COMPILING = threading.Lock()
if hasattr(os, "register_at_fork"):  # never fork while another thread compiles and holds the lock
    os.register_at_fork(
        before=_COMPILING.acquire, after_in_parent=_COMPILING.release, after_in_child=_COMPILING.release
    )
_SECONDS: list[float] = []


def _require_compiler() -> None:
    if _config.DISABLE_JIT:
        raise ValueError("NUMBA_DISABLE_JIT is set, and compiled kernels do not run without Numba's compiler: unset it")


def _read(function: Callable) -> bytes | None:
    """The source file of a function, or None if it was typed at a prompt."""
    try:
        return Path(function.__code__.co_filename).read_bytes()
    except OSError:
        return None


# Read at import, while the files are still the ones being imported; a kernel may be compiled much later.
_FOLDER = Path(__file__).parent
_SOURCES = b"".join(path.read_bytes() for path in sorted(_FOLDER.rglob("*.py")))

_VERSIONS = sys.version, np.__version__, numba.__version__, llvmlite.__version__

# Settings that do not affect the generated code, and differ between runs on one machine. All others are part of the
# cache key. Most do not affect it either, but a list of those that do would go stale with the next version of Numba.
_IRRELEVANT = {"CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_DEFAULT_NUM_THREADS"}


def _settings() -> list[tuple[str, str]]:
    """Numba's settings, whether from the environment, its config file or a program."""
    names = sorted(name for name in dir(_config) if name.isupper() and name not in _IRRELEVANT)
    return [(name, repr(getattr(_config, name))) for name in names]


class _Cache:
    """Machine code of one kernel in one file, in place of Numba's cache.

    The file starts with a hash of the rest, so an empty, truncated or damaged one is detected, and compiled again.
    """

    def __init__(self, path: Path):
        self._path = path

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() != digest:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(code))

    def save_overload(self, signature: Any, result: Any) -> None:
        if result.library.has_dynamic_globals:  # it contains addresses of this process
            return
        code = serialize.dumps(result._reduce())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(self._path, hashlib.sha256(code).digest() + code)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                _warn_of_no_cache(self._path.parent.parent, error.strerror)


_DIGEST_BYTES = hashlib.sha256().digest_size

# Read-only installations are common, and no reason to warn.
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@functools.cache  # warns once
def _warn_of_no_cache(folder: Path, reason: str) -> None:
    """Warn in one line, with the folder in place of a source file."""
    message = f"compiled kernels cannot be cached here ({reason}): the next run compiles them again"
    warnings.warn_explicit(message, RuntimeWarning, str(folder), 0)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
