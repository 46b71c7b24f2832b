"""Vector building blocks, and how kernels are compiled and cached.

Numba leaves it to LLVM to find vectors in loops, and LLVM does not find a tile of results to be held in
registers. So the kernels that live by such tiles spell their vectors out. A :func:`numba.extending.intrinsic`
is a function whose code Python writes: with :class:`View` to find its way in arrays and :class:`Vectors` to
load, broadcast, multiply and add. A Python loop in there is an unrolled loop of machine code. All of it is
generic LLVM, so one source serves SSE, AVX2, AVX-512 and NEON, in float32 and float64.

Functions to be called from Python are decorated with :func:`kernel`.
"""

import errno
import functools
import hashlib
import math
import os
import pickle
import secrets
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, event, serialize
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target

# What code is generated for: LLVM's triple, the name of the CPU and its features, all as Numba was told to
# see them. LLVM aborts on Snapdragon X, which it calls oryon-1 (numba issue 10388): set NUMBA_CPU_NAME=generic there.
_TARGET: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()

# LLVM's name of the CPU.
CPU = _TARGET[1]

# Width of a vector register.
REGISTER_BYTES = 64 if "+avx512f" in _TARGET[2] else 32 if "+avx" in _TARGET[2] else 16

# Vector registers: x86 has more than 16 only with AVX-512, all other CPUs have 32 at least.
REGISTERS = 16 if _TARGET[0].startswith(("x86_64", "i686")) and REGISTER_BYTES < 64 else 32

# Whether there is an instruction that moves the chosen bytes of a vector together. Without it LLVM goes through them
# one by one.
HAS_COMPRESS = "+avx512vbmi2" in _TARGET[2]


CACHE_LINE = 64  # bytes


def aligned_empty(n, m, like):
    """(n, m) array from a cache line's start, as vectors that lie in two lines take two accesses."""
    memory = np.empty(n * m + CACHE_LINE // like.itemsize, like.dtype)
    start = -memory.ctypes.data % CACHE_LINE // like.itemsize
    return memory[start : start + n * m].reshape(n, m)


# Emitting vectors -------------------------------------------------------------------------------------------

_BYTE = ir.IntType(8)
_INT32 = ir.IntType(32)


class View:
    """A strided array in memory, as generated code sees it.

    Parameters
    ----------
    builder
        Writes the code.
    data
        Pointer to the first element.
    shape, strides
        Elements along each axis, and bytes between them: any number, also a negative one.
    """

    def __init__(self, builder: ir.IRBuilder, data: ir.Value, shape: Sequence[ir.Value], strides: Sequence[ir.Value]):
        self._builder = builder
        self._data = builder.bitcast(data, _BYTE.as_pointer())
        self.shape = shape
        self.strides = strides

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value) -> "View":
        """View an array that is an argument of an intrinsic.

        Its pointer is taken inside the compiled code, which holds the array, so it cannot be freed too early.
        """
        fields = context.make_array(array_type)(context, builder, array)
        shape, strides = (cgutils.unpack_tuple(builder, field) for field in (fields.shape, fields.strides))
        return cls(builder, fields.data, shape, strides)

    def at(self, *index: ir.Value | int) -> ir.Value:
        """Pointer to the element at `index`; indices left out at its end are 0."""
        pointer = self._data
        for position, stride in zip(index, self.strides, strict=False):
            steps = stride.type(position) if isinstance(position, int) else position
            distance = self._builder.mul(steps, stride)
            pointer = self._builder.gep(pointer, [distance])
        return pointer

    def part(self, *index: ir.Value | int, drop: int = 0) -> "View":
        """The array from `index` on, without its first `drop` axes. Its shape remains that of the whole."""
        return View(self._builder, self.at(*index), self.shape[drop:], self.strides[drop:])


def opaque(builder: ir.IRBuilder, view: View) -> View:
    """The same array, but LLVM does not know where it came from: an instruction without effect may have changed it."""
    pointer = view.at()
    kept = builder.asm(ir.FunctionType(pointer.type, [pointer.type]), "", "=r,0", [pointer], side_effect=False)
    return View(builder, kept, view.shape, view.strides)


def compress_bytes(builder: ir.IRBuilder, source: ir.Value, mask: ir.Value, target: ir.Value) -> None:
    """Write those of 64 bytes whose bit is set in the mask side by side, and then zeros, 64 bytes in all.

    Bytes whose bit is not set are not read.
    """
    vector, bits = ir.VectorType(_BYTE, 64), builder.bitcast(mask, ir.VectorType(ir.IntType(1), 64))
    source, target = (builder.bitcast(pointer, vector.as_pointer()) for pointer in (source, target))
    zeros = vector([0] * 64)
    load_type = ir.FunctionType(vector, [source.type, _INT32, bits.type, vector])
    load = cgutils.get_or_insert_function(builder.module, load_type, "llvm.masked.load.v64i8.p0")
    compress_type = ir.FunctionType(vector, [vector, bits.type, vector])
    name = "llvm.experimental.vector.compress.v64i8"
    compress = cgutils.get_or_insert_function(builder.module, compress_type, name)
    chosen = builder.call(load, [source, _INT32(1), bits, zeros])
    builder.store(builder.call(compress, [chosen, bits, zeros]), target, align=1)


class _FloatFormat(NamedTuple):
    """What the exponential function needs to know of a float type."""

    fraction_bits: int
    exponent_bias: int
    lowest: float  # e to the power of this, or of less, rounds to 0
    terms: int  # of the series for e^r that leave out less than half a unit in the last place


_FORMATS = {32: _FloatFormat(23, 127, -104.0, 7), 64: _FloatFormat(52, 1023, -746.0, 13)}

# ln 2 in two parts (Cody and Waite 1980). The first has so few digits that its product with an exponent is
# exact.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = 1.42860682030941723212e-6


class Vectors:
    """Writes code for vectors of floats that fill a register each.

    Parameters
    ----------
    context, builder
        What Numba hands to the code generator of an intrinsic.
    dtype
        ``numba.float32`` or ``numba.float64``.

    Attributes
    ----------
    lanes
        Floats in a vector.
    type
        LLVM's type of a vector.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, dtype: types.Float):
        self._builder = builder
        self._bits = dtype.bitwidth
        self._float = context.get_data_type(dtype)
        self.lanes = REGISTER_BYTES * 8 // dtype.bitwidth
        self.type = ir.VectorType(self._float, self.lanes)

    def variable(self, value: ir.Value) -> ir.Value:
        """A vector that ``builder.load`` reads and ``builder.store`` assigns; LLVM keeps it in a register."""
        return cgutils.alloca_once_value(self._builder, value)

    def load(self, pointer: ir.Value, mask: ir.Value | None = None, *, column: int = 0) -> ir.Value:
        """The vector at `pointer`, or `column` vectors after it.

        Lanes that are off in `mask` are 0, and their memory is not touched.
        """
        pointer = self._vector_pointer(pointer, column)
        if mask is None:
            return self._builder.load(pointer, align=1)
        arguments = [pointer, _INT32(1), mask, self.constant(0)]
        return self._call("masked.load", self.type, arguments, suffix=".p0")

    def store(self, vector: ir.Value, pointer: ir.Value, mask: ir.Value | None = None, *, column: int = 0) -> None:
        """Write `vector` where :meth:`load` would read it; memory of lanes off in `mask` is not touched."""
        pointer = self._vector_pointer(pointer, column)
        if mask is None:
            self._builder.store(vector, pointer, align=1)
        else:
            self._call("masked.store", ir.VoidType(), [vector, pointer, _INT32(1), mask], suffix=".p0")

    def prefetch(self, pointer: ir.Value, level: int) -> None:
        """Have the CPU fetch a cache line into its L1 cache, or L2; no address is wrong."""
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(self._builder.module, signature, "llvm.prefetch.p0")
        read, locality, data = _INT32(0), _INT32(4 - level), _INT32(1)
        self._builder.call(function, [pointer, read, locality, data])

    def broadcast(self, pointer: ir.Value) -> ir.Value:
        """The float at `pointer`, in every lane."""
        pointer = self._builder.bitcast(pointer, self._float.as_pointer())
        return self._splat(self._builder.load(pointer, align=1))

    def constant(self, value: float) -> ir.Value:
        """The number `value`, in every lane."""
        return ir.Constant(self.type, [ir.Constant(self._float, value)] * self.lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """A b + c, in one instruction, or in two on a CPU that has no such instruction."""
        return self._call("fmuladd", self.type, [a, b, c])

    def first(self, count: ir.Value) -> ir.Value:
        """Mask of the first `count` lanes, or of all if there are not as many."""
        return self._builder.icmp_signed("<", self._numbers(count.type), self._splat(count))

    def only(self, lane: ir.Value) -> ir.Value:
        """Mask of one lane, or of none if there is no such lane."""
        return self._builder.icmp_signed("==", self._numbers(lane.type), self._splat(lane))

    def first_on(self, mask: ir.Value, otherwise: ir.Value) -> ir.Value:
        """Number of the first lane that is on in `mask`, or `otherwise` if none is."""
        bits = self._builder.bitcast(mask, ir.IntType(self.lanes))
        is_none = self._builder.icmp_unsigned("==", bits, bits.type(0))
        number = self._builder.cttz(self._builder.zext(bits, otherwise.type), ir.IntType(1)(0))
        return self._builder.select(is_none, otherwise, number)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of each two lanes, or that of `b` if one is NaN."""
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def across(self, operation: Callable[[ir.Value, ir.Value], ir.Value], vector: ir.Value) -> ir.Value:
        """All lanes combined by a commutative operation, in every lane of the result."""
        distance = self.lanes // 2
        while distance:
            partners = ir.VectorType(_INT32, self.lanes)([lane ^ distance for lane in range(self.lanes)])
            vector = operation(vector, self._builder.shuffle_vector(vector, vector, partners))
            distance //= 2
        return vector

    def transpose(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """The columns of a square whose rows are as many vectors as each has lanes.

        Quarters change places, then quarters of the quarters, and so on (Eklundh 1972).
        """
        rows, lanes = list(rows), range(self.lanes)
        distance = self.lanes // 2
        while distance:
            upper = [lane if not lane & distance else self.lanes + lane - distance for lane in lanes]
            lower = [lane + distance if not lane & distance else self.lanes + lane for lane in lanes]
            for r in (r for r in lanes if not r & distance):
                pair = rows[r], rows[r + distance]
                for row, numbers in (r, upper), (r + distance, lower):
                    rows[row] = self._builder.shuffle_vector(*pair, ir.VectorType(_INT32, self.lanes)(numbers))
            distance //= 2
        return rows

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x for x <= 0 or NaN, within 2 units in the last place.

        Write x = n ln 2 + r with n integral. Then e^x = 2^n e^r, where n becomes the exponent bits of a
        float, and the Taylor series of e^r is short because r is within ln 2 / 2 of 0.
        """
        builder, form, constant = self._builder, _FORMATS[self._bits], self.constant
        lowest = constant(form.lowest)
        x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)  # keeps NaN
        # A float this large has no bits for fractions: adding it rounds, and leaves n in the lowest bits.
        rounder = constant(1.5 * 2**form.fraction_bits)
        rounded = self.fma(x, constant(1 / math.log(2)), rounder)
        n = builder.fsub(rounded, rounder)
        r = self.fma(n, constant(-_LN2_LOW), self.fma(n, constant(-_LN2_HIGH), x))
        result = constant(1 / math.factorial(form.terms))
        for power in reversed(range(form.terms)):
            result = self.fma(result, r, constant(1 / math.factorial(power)))
        # In two factors, as 2^n may be too small for a normal float where e^x is just large enough for a
        # denormal one.
        bits = ir.VectorType(ir.IntType(self._bits), self.lanes)
        exponent = builder.sub(builder.bitcast(rounded, bits), builder.bitcast(rounder, bits))
        half = builder.ashr(exponent, bits([1] * self.lanes))
        for power in half, builder.sub(exponent, half):
            biased = builder.add(power, bits([form.exponent_bias] * self.lanes))
            factor = builder.shl(biased, bits([form.fraction_bits] * self.lanes))
            result = builder.fmul(result, builder.bitcast(factor, self.type))
        return result

    def _numbers(self, integer: ir.IntType) -> ir.Constant:
        return ir.Constant(ir.VectorType(integer, self.lanes), list(range(self.lanes)))

    def _vector_pointer(self, pointer: ir.Value, column: int) -> ir.Value:
        return self._builder.gep(self._builder.bitcast(pointer, self.type.as_pointer()), [_INT32(column)])

    def _splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        one_lane = self._builder.insert_element(undefined, scalar, _INT32(0))
        first_lane = ir.VectorType(_INT32, self.lanes)([0] * self.lanes)
        return self._builder.shuffle_vector(one_lane, undefined, first_lane)

    def _call(self, name: str, returns: ir.Type, arguments: list[ir.Value], suffix: str = "") -> ir.Value:
        """Call an intrinsic of LLVM on vectors; llvmlite's ``declare_intrinsic`` knows scalars only."""
        full_name = f"llvm.{name}.v{self.lanes}f{self._bits}{suffix}"
        function_type = ir.FunctionType(returns, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self._builder.module, function_type, full_name)
        return self._builder.call(function, arguments)


# Compiling --------------------------------------------------------------------------------------------------

# Types of a kernel's parameters. Each is one type for all layouts that the kernel can take, so that nothing
# is compiled again for a transposed, read-only or misaligned array.


def matrix_in(dtype: types.Float) -> types.Array:
    """(n, m) array to read, with any strides."""
    return types.Array(dtype, 2, "A", readonly=True, aligned=False)


def row_major_in(dtype: types.Float) -> types.Array:
    """(n, m) array to read, row-major."""
    return types.Array(dtype, 2, "C", readonly=True, aligned=False)


def matrix_out(dtype: types.Float) -> types.Array:
    """(n, m) array to write, row-major."""
    return types.Array(dtype, 2, "C")


def flat_in(dtype: types.Float) -> types.Array:
    """(n,) array to read, contiguous."""
    return types.Array(dtype, 1, "C", readonly=True, aligned=False)


def integers_in(dtype: types.Float) -> types.Array:
    """(n,) array of int64 to read, with any stride."""
    return types.Array(types.int64, 1, "A", readonly=True, aligned=False)


class Kernel:
    """A function that is compiled, or loaded from the cache on disk, once for each type of float.

    It runs without the GIL, and can be called from several threads at once.

    A call goes straight to the machine code, as Numba takes longer to look at the types of four arrays than for all
    else. So nothing but the size of their elements is checked: arrays must have the dimensions, the layout and the
    dtype that `parameters` say.

    Raises
    ------
    ValueError
        If ``NUMBA_DISABLE_JIT`` is set: vectors that are spelled out do not run in Python.
    """

    def __init__(
        self, function: Callable, parameters: Sequence[Callable], returns: types.Type, options: dict[str, Any]
    ):
        _require_compiler()
        functools.update_wrapper(self, function)
        self.function = function
        self._parameters = parameters
        self._returns = returns
        self._options: dict[str, Any] = {"nogil": True, "error_model": "numpy"} | options
        self._source = _read(function)
        self._compiled: dict[np.dtype, Callable] = {}
        self._dispatchers: list[Any] = []  # which own the machine code

    def __call__(self, array: np.ndarray, *arguments: Any) -> Any:
        """Call the version for the dtype of the first argument."""
        compiled = self._compiled.get(array.dtype)
        if compiled is None:
            compiled = self._compile(array.dtype)
        return compiled(array, *arguments)

    def assembly(self, dtype: np.dtype) -> str:
        """Machine code for a type of float. It is compiled again for that, as Numba shows no code from a cache."""
        return next(iter(self._dispatcher(dtype, cache=None).inspect_asm().values()))

    def _compile(self, dtype: np.dtype) -> Callable:
        with _COMPILING, event.install_timer("numba:compile", _SECONDS.append):
            if dtype not in self._compiled:
                dispatcher = self._dispatcher(dtype, self._cache(dtype))
                (version,) = dispatcher.overloads.values()
                self._dispatchers.append(dispatcher)
                self._compiled[dtype] = version.entry_point
        return self._compiled[dtype]

    def _dispatcher(self, dtype: np.dtype, cache: "_Cache | None") -> Any:
        numba.core.config.reload_config()  # which compiling does too late for the two lines that ask for settings
        _require_compiler()
        dispatcher: Any = numba.njit(**self._options)(self.function)
        if cache:
            dispatcher._cache = cache
        dispatcher.compile(self._returns(*(parameter(numba.from_dtype(dtype)) for parameter in self._parameters)))
        dispatcher.disable_compile()
        return dispatcher

    def _cache(self, dtype: np.dtype) -> "_Cache | None":
        """A file for this state of the sources, of all that compiles them, and of its settings; None without sources.

        Numba's own cache looks at the file of the function and at the CPU only. It would run stale code after an edit
        of this file, and slow code after a run with ``NUMBA_OPT=0``. One file for each dtype lets processes that start
        at once write the same files and no others.
        """
        if self._source is None:
            return None
        state = hashlib.sha256(_SOURCES + self._source + repr((_VERSIONS, _TARGET, _settings(), dtype.str)).encode())
        folder = Path(_config.CACHE_DIR or _FOLDER / "__pycache__") / f"kernels-{state.hexdigest()[:16]}"
        return _Cache(folder / f"{self.function.__module__}.{self.function.__qualname__}.nbc")


def kernel(*parameters: Callable, returns: types.Type = types.void, **options: Any) -> Callable[[Callable], Kernel]:
    """Decorate a function to become a :class:`Kernel`.

    Parameters
    ----------
    parameters
        For each argument a function that gives its type for a type of float, like `matrix_in`. The first
        argument is an array of that type of float.
    returns
        Type of the result.
    options
        More options of :func:`numba.njit`.
    """
    return lambda function: Kernel(function, parameters, returns, options)


def compile_seconds() -> float:
    """Seconds that this process has spent compiling kernels: 0 if all of them came from the cache on disk."""
    return sum(_SECONDS)


_config: Any = numba.config  # its attributes are made at run time
_COMPILING = threading.Lock()
if hasattr(os, "register_at_fork"):  # the child of a fork has no other thread, which could be compiling
    os.register_at_fork(
        before=_COMPILING.acquire, after_in_parent=_COMPILING.release, after_in_child=_COMPILING.release
    )
_SECONDS: list[float] = []


def _require_compiler() -> None:
    if _config.DISABLE_JIT:
        raise ValueError("NUMBA_DISABLE_JIT is set, and compiled kernels do not run without Numba's compiler: unset it")


def _read(function: Callable) -> bytes | None:
    """The file that a function stands in, or None if it was typed in."""
    try:
        return Path(function.__code__.co_filename).read_bytes()
    except OSError:
        return None


# Read now, while they are what is being imported, and not when a kernel is compiled.
_FOLDER = Path(__file__).parent
_SOURCES = b"".join(path.read_bytes() for path in sorted(_FOLDER.rglob("*.py")))

_VERSIONS = sys.version, np.__version__, numba.__version__, llvmlite.__version__

# Settings that do not change the code, and differ between runs on one machine. All others belong to what is cached:
# most change nothing either, but a list of those that do would be out of date with the next version of Numba.
_NO_MATTER = {"CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_DEFAULT_NUM_THREADS"}


def _settings() -> list[tuple[str, str]]:
    """Numba's settings, from the environment, its file or a program."""
    names = sorted(name for name in dir(_config) if name.isupper() and name not in _NO_MATTER)
    return [(name, repr(getattr(_config, name))) for name in names]


class _Cache:
    """Machine code of one kernel in one file, in the place of Numba's own cache of a function.

    The file starts with the hash of what follows, so one that is empty, cut short or damaged is compiled anew.
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
        if result.library.has_dynamic_globals:  # addresses in this process
            return
        code = serialize.dumps(result._reduce())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(self._path, hashlib.sha256(code).digest() + code)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                _warn_of_no_cache(self._path.parent.parent, error.strerror)


_DIGEST_BYTES = hashlib.sha256().digest_size

# A folder that nobody may write to is how some install a program, so it is no reason to complain.
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@functools.cache  # so once
def _warn_of_no_cache(folder: Path, reason: str) -> None:
    """In one line: it names the folder in place of a line of source that would be shown below it."""
    message = f"compiled kernels cannot be kept here ({reason}): the next run compiles them again"
    warnings.warn_explicit(message, RuntimeWarning, str(folder), 0)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
