"""Explicit SIMD vectors.

Numba leaves vectorization to LLVM, and LLVM's vectorizer does not keep a tile of accumulators in registers. So the
kernels that need such tiles use explicit vectors. Decorate a function with :func:`emitter`, and it generates the code
that compiled functions call by its name: :class:`View` computes addresses in arrays, and :class:`Vectors` loads,
broadcasts, multiplies and adds. A Python loop in the generator becomes unrolled machine code. All of it is generic LLVM
IR, so one source serves SSE, AVX2, AVX-512 and NEON, in float32 and float64.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiling import TARGET

# LLVM's name for the CPU.
CPU = TARGET[1]

# Width of a vector register.
REGISTER_BYTES = 64 if "+avx512f" in TARGET[2] else 32 if "+avx" in TARGET[2] else 16

# Vector registers: x86 has more than 16 only with AVX-512; other CPUs have at least 32.
REGISTERS = 16 if TARGET[0].startswith(("x86_64", "i686")) and REGISTER_BYTES < 64 else 32

# Whether the CPU can compress bytes: pack the selected ones at the start of a vector (VPCOMPRESSB). Without it, LLVM
# stores them one by one.
HAS_COMPRESS = "+avx512vbmi2" in TARGET[2]


CACHE_LINE = 64  # bytes


def aligned_empty(n, m, like):
    """Uninitialised (n, m) array in the dtype of `like`, aligned to a cache line.

    A vector that straddles two lines takes two accesses.
    """
    memory = np.empty(n * m + CACHE_LINE // like.itemsize, like.dtype)
    start = -memory.ctypes.data % CACHE_LINE // like.itemsize
    return memory[start : start + n * m].reshape(n, m)


# Emitting vectors -------------------------------------------------------------------------------------------

_BYTE = ir.IntType(8)
_INT32 = ir.IntType(32)


class View:
    """A strided array, as generated code addresses it.

    Parameters
    ----------
    builder
        Where to emit the code.
    data
        Pointer to the first element.
    shape, strides
        Elements along each axis, and bytes between them; strides may be zero or negative.
    """

    def __init__(self, builder: ir.IRBuilder, data: ir.Value, shape: Sequence[ir.Value], strides: Sequence[ir.Value]):
        self._builder = builder
        self._data = builder.bitcast(data, _BYTE.as_pointer())
        self.shape = shape
        self.strides = strides

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value) -> "View":
        """View an array that is an argument of an intrinsic.

        The pointer is taken inside the compiled code, which holds a reference, so the array cannot be freed too early.
        """
        fields = context.make_array(array_type)(context, builder, array)
        shape, strides = (cgutils.unpack_tuple(builder, field) for field in (fields.shape, fields.strides))
        return cls(builder, fields.data, shape, strides)

    def at(self, *index: ir.Value | int) -> ir.Value:
        """Pointer to the element at `index`; missing trailing indices are 0."""
        pointer = self._data
        for position, stride in zip(index, self.strides, strict=False):
            steps = stride.type(position) if isinstance(position, int) else position
            distance = self._builder.mul(steps, stride)
            pointer = self._builder.gep(pointer, [distance])
        return pointer

    def part(self, *index: ir.Value | int, drop: int = 0) -> "View":
        """The array from `index` on, without its first `drop` axes. The other axes keep their lengths."""
        return View(self._builder, self.at(*index), self.shape[drop:], self.strides[drop:])


def opaque(builder: ir.IRBuilder, view: View) -> View:
    """The same array, at an address that is opaque to LLVM: the pointer passes through empty inline assembly."""
    pointer = view.at()
    kept = builder.asm(ir.FunctionType(pointer.type, [pointer.type]), "", "=r,0", [pointer], side_effect=False)
    return View(builder, kept, view.shape, view.strides)


def compiler_barrier(builder: ir.IRBuilder, *attributes: str) -> None:
    """Keep LLVM from moving loads across this point, by empty inline assembly: hoisted ones would spill registers.

    With the attribute ``convergent``, LLVM must not make it conditional either, so it cannot unroll the loop around it.
    """
    nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
    builder.call(nothing, [], attrs=attributes)


def compress_bytes(builder: ir.IRBuilder, source: ir.Value, mask: ir.Value, target: ir.Value) -> None:
    """Compress 64 bytes: store those whose mask bit is set side by side, followed by zeros up to 64 bytes.

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
    """The parameters of a float type for the exponential function."""

    fraction_bits: int
    exponent_bias: int
    lowest: float  # e^x rounds to 0 for this x and below
    terms: int  # degree of the polynomial for e^r: the error is below half a unit in the last place


_FORMATS = {32: _FloatFormat(23, 127, -104.0, 7), 64: _FloatFormat(52, 1023, -746.0, 13)}

# ln 2 in two parts (Cody and Waite 1980). The first has few enough bits that its product with an exponent is exact.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = 1.42860682030941723212e-6


class Vectors:
    """Emits code for vectors of floats, one register wide each.

    Parameters
    ----------
    context, builder
        Those that Numba passes to an intrinsic's code generator.
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
        self._in_16_bytes = 128 // dtype.bitwidth

    def variable(self, value: ir.Value) -> ir.Value:
        """A vector that ``builder.load`` reads and ``builder.store`` assigns; LLVM keeps it in a register."""
        return cgutils.alloca_once_value(self._builder, value)

    def load(self, pointer: ir.Value, mask: ir.Value | None = None, *, column: int = 0) -> ir.Value:
        """The vector `column` vectors after `pointer`.

        Lanes that are off in `mask` become 0, and their memory is not accessed.
        """
        pointer = self._vector_pointer(pointer, column)
        if mask is None:
            return self._builder.load(pointer, align=1)
        arguments = [pointer, _INT32(1), mask, self.constant(0)]
        return self._call("masked.load", self.type, arguments, suffix=".p0")

    def load_bytes(self, pointer: ir.Value) -> ir.Value:
        """The vector of as many unsigned bytes from `pointer` on, as floats."""
        bytes_pointer = self._builder.bitcast(pointer, ir.VectorType(_BYTE, self.lanes).as_pointer())
        integers = ir.VectorType(ir.IntType(self._bits), self.lanes)
        return self._builder.uitofp(self._builder.zext(self._builder.load(bytes_pointer, align=1), integers), self.type)

    def store(self, vector: ir.Value, pointer: ir.Value, mask: ir.Value | None = None, *, column: int = 0) -> None:
        """Write `vector` where :meth:`load` would read it; lanes that are off in `mask` are not accessed."""
        pointer = self._vector_pointer(pointer, column)
        if mask is None:
            self._builder.store(vector, pointer, align=1)
        else:
            self._call("masked.store", ir.VoidType(), [vector, pointer, _INT32(1), mask], suffix=".p0")

    def prefetch(self, pointer: ir.Value, level: int) -> None:
        """Prefetch a cache line into L1 or L2 (`level`); an invalid address is harmless."""
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(self._builder.module, signature, "llvm.prefetch.p0")
        read, locality, data = _INT32(0), _INT32(4 - level), _INT32(1)
        self._builder.call(function, [pointer, read, locality, data])

    def broadcast(self, pointer: ir.Value) -> ir.Value:
        """The float at `pointer`, in every lane."""
        pointer = self._builder.bitcast(pointer, self._float.as_pointer())
        return self._splat(self._builder.load(pointer, align=1))

    def constant(self, value: float) -> ir.Value:
        """The constant `value`, in every lane."""
        return ir.Constant(self.type, [ir.Constant(self._float, value)] * self.lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a b + c``: a fused multiply-add, or two instructions on a CPU without one."""
        return self._call("fmuladd", self.type, [a, b, c])

    def first(self, count: ir.Value) -> ir.Value:
        """Mask of the first `count` lanes, or of all if there are fewer."""
        return self._builder.icmp_signed("<", self._numbers(count.type), self._splat(count))

    def only(self, lane: ir.Value) -> ir.Value:
        """Mask of one lane; all off if there is no such lane."""
        return self._builder.icmp_signed("==", self._numbers(lane.type), self._splat(lane))

    def first_on(self, mask: ir.Value, otherwise: ir.Value) -> ir.Value:
        """Index of the first lane that is on in `mask`, or `otherwise` if none is."""
        bits = self._builder.bitcast(mask, ir.IntType(self.lanes))
        is_none = self._builder.icmp_unsigned("==", bits, bits.type(0))
        number = self._builder.cttz(self._builder.zext(bits, otherwise.type), ir.IntType(1)(0))
        return self._builder.select(is_none, otherwise, number)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Lane-wise maximum; takes the lane of `b` if either is NaN."""
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def across(self, operation: Callable[[ir.Value, ir.Value], ir.Value], vector: ir.Value) -> ir.Value:
        """Reduce across all lanes with a commutative operation; every lane of the result holds the total."""
        distance = self.lanes // 2
        while distance:
            partners = ir.VectorType(_INT32, self.lanes)([lane ^ distance for lane in range(self.lanes)])
            vector = operation(vector, self._builder.shuffle_vector(vector, vector, partners))
            distance //= 2
        return vector

    def transposed(self, block: View) -> Iterator[ir.Value]:
        """The rows of a square block, whose columns are contiguous. Code is emitted as the rows are asked for.

        A shuffle that moves data between 16-byte lanes takes AVX2 several instructions or a slow one. So half a vector
        of each column is loaded into the half where it belongs, then 16-byte lanes are transposed by perfect shuffles
        (Stone 1971). With AVX-512, half a vector has two lanes: a last shuffle separates their rows.
        """
        size, half = self._in_16_bytes, max(self._in_16_bytes, self.lanes // 2)
        columns = []
        for start in range(0, self.lanes, size):
            # x86 adds one, two or four strides within an address. More columns would each need a pointer of its own.
            base = opaque(self._builder, block.part(0, start))
            columns += [base.part(0, c) for c in range(size)]
        for start in range(0, self.lanes, half):
            pointers = [column.at(start) for column in columns]
            if half == size:
                yield from self._unpacked(pointers, half)
            else:
                first, second = (self._unpacked(part, half) for part in (pointers[:half], pointers[half:]))
                for parity in 0, 1:
                    for pair in zip(first, second, strict=True):
                        yield self._every_other_lane(*pair, parity)

    def _unpacked(self, pointers: Sequence[ir.Value], size: int) -> list[ir.Value]:
        """Load `size` floats from each pointer, and transpose each 16-byte lane of the vectors."""
        count = self._in_16_bytes
        vectors = [self._side_by_side(pointers[r::count], size) for r in range(count)]
        for _ in range(count.bit_length() - 1):
            pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
            vectors = [self._interleave(*pair, half) for pair in pairs for half in (0, count // 2)]
        return vectors

    def _side_by_side(self, pointers: Sequence[ir.Value], size: int) -> ir.Value:
        """A vector of `size` floats from each pointer."""
        kind = ir.VectorType(self._float, size)
        pieces = [
            self._builder.load(self._builder.bitcast(pointer, kind.as_pointer()), align=1) for pointer in pointers
        ]
        if len(pieces) == 1:
            return pieces[0]
        return self._builder.shuffle_vector(*pieces, ir.VectorType(_INT32, self.lanes)(list(range(self.lanes))))

    def _every_other_lane(self, a: ir.Value, b: ir.Value, first: int) -> ir.Value:
        """The 16-byte lanes `first`, `first` + 2, ... of `a`, then those of `b`."""
        size = self._in_16_bytes
        numbers = [n for n in range(2 * self.lanes) if n // size % 2 == first]
        return self._builder.shuffle_vector(a, b, ir.VectorType(_INT32, self.lanes)(numbers))

    def _interleave(self, a: ir.Value, b: ir.Value, start: int) -> ir.Value:
        """Alternate floats of `a` and `b`, from `start` on, separately in each 16-byte lane."""
        size = self._in_16_bytes
        first = [lane - lane % size + start + lane % size // 2 for lane in range(self.lanes)]
        numbers = [n + self.lanes * (lane % 2) for lane, n in enumerate(first)]
        return self._builder.shuffle_vector(a, b, ir.VectorType(_INT32, self.lanes)(numbers))

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x for x <= 0 or NaN, within 2 units in the last place.

        Write x = n ln 2 + r with an integer n. Then e^x = 2^n e^r, where n becomes the exponent bits of a float, and
        the Taylor series of e^r is short because |r| is at most ln 2 / 2.
        """
        builder, form, constant = self._builder, _FORMATS[self._bits], self.constant
        lowest = constant(form.lowest)
        x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)  # keeps NaN
        # The ulp of a float this large is 1: adding it rounds to an integer, and leaves n in the lowest bits.
        rounder = constant(1.5 * 2**form.fraction_bits)
        rounded = self.fma(x, constant(1 / math.log(2)), rounder)
        n = builder.fsub(rounded, rounder)
        r = self.fma(n, constant(-_LN2_LOW), self.fma(n, constant(-_LN2_HIGH), x))
        result = constant(1 / math.factorial(form.terms))
        for power in reversed(range(form.terms)):
            result = self.fma(result, r, constant(1 / math.factorial(power)))
        # In two factors: where e^x is denormal, 2^n may be too small for a normal float.
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
        """Call an LLVM intrinsic on vectors; llvmlite's ``declare_intrinsic`` supports only scalars."""
        full_name = f"llvm.{name}.v{self.lanes}f{self._bits}{suffix}"
        function_type = ir.FunctionType(returns, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self._builder.module, function_type, full_name)
        return self._builder.call(function, arguments)


def emitter(emit: Callable) -> Callable:
    """Make a generator of code a :func:`numba.extending.intrinsic`: what calls it gets the code inlined.

    The generator gets the `Vectors` of the first argument's dtype, the builder, and the arguments, arrays as `View`.
    The code returns nothing.
    """

    def typed(typing_context, *kinds):
        def generate(context, builder, signature, arguments):
            values = [
                View.of(context, builder, kind, value) if isinstance(kind, types.Array) else value
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            emit(Vectors(context, builder, signature.args[0].dtype), builder, *values)

        return types.void(*kinds), generate

    wrapped: Any = functools.update_wrapper(typed, emit)
    _, *parameters = inspect.signature(emit).parameters.values()
    wrapped.__signature__ = inspect.Signature(parameters)  # Numba leaves out the first, its typing context
    return intrinsic(wrapped)
