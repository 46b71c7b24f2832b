"""Compiled with Numba for images that are mostly zero: only the non-zeros are multiplied.

81 % of MNIST's pixels are zero. Both products with the images, x W and x.T dhidden, are sums over non-zero pixels. Each
row of the result is a weighted sum of rows of B, one for each non-zero element of its row of A:

    out[i] = bias + A[i, k] B[k] + A[i, k'] B[k'] + ...

So every vector multiply-add needs its own vector of B. The CPU can load that many, but only from L1, which is too small
for B. Hence these techniques, on top of skipping zeros:

- *Blocks* (cache blocking). A is cut into blocks of 64 columns. B is cut into blocks of 64 rows, and those into
  *panels* of `PANEL_VECTORS` vectors, which stay in L1. A block is used for all rows of the result before the next one.
  The first block lists all rows, and starts them from the bias.
- *Masks.* The non-zeros of a row within a block are a 64-bit mask. The next column is its lowest set bit, one
  instruction away. Column numbers in memory would be slower: each must be loaded before the address in B is known.
- *Order.* The rows of a block are visited from the most non-zeros to the fewest, whatever their order in A. The trip
  count of the innermost loop repeats, so its exit branch predicts well. The hardware prefetcher cannot predict which
  row of the result is next, so software prefetches it.
- *Bytes.* Pixels stay bytes in memory. A row's pixels within a block are converted to floats just before they are used.

Both x and x.T are encoded like this, so the same code computes both products.

A zero pixel adds nothing to a sum, whatever its factor: zero times infinity or NaN is skipped, too.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kernels.compiling import flat_in, kernel, matrix_out, row_major_in
from kernels.numba_backend import NumbaBackend, emit_packing
from kernels.simd import (
    CACHE_LINE,
    HAS_COMPRESS,
    REGISTER_BYTES,
    REGISTERS,
    Vectors,
    View,
    aligned_empty,
    compiler_barrier,
    compress_bytes,
    emitter,
    opaque,
)

# Vectors in a row of a panel, and of the narrower panels for the last columns. 8 independent accumulators hide the
# latency of the multiply-adds, and each non-zero takes 9 loads for 8 of them: the pixel and 8 vectors of B.
WIDTHS = (8, 4, 2, 1)
PANEL_VECTORS = WIDTHS[0]
PANEL_BYTES = PANEL_VECTORS * REGISTER_BYTES

# Rows of a block that are visited together, by the number of vector registers. Their accumulators must leave registers
# for pixels. With 16 registers, two rows need panels half as wide, 5 loads for 4 multiply-adds: 1.1 to 1.25 times the
# time with AVX2 on Zen 3, 1.2 times with SSE.
GROUP = {16: 1, 32: 2}[REGISTERS]

# Columns of a block: the bits of a mask. With AVX-512, 64 rows of a panel fill an L1 cache of 32 KB.
BLOCK = 64

# Prefetch distance: a row of the result is prefetched into L1 this many groups ahead. They come from L2, or from
# L3 where 2,048 images' results fill L2, in an order that the hardware prefetcher cannot predict.
AHEAD = 2

# Above a share of DENSE non-zero pixels, dense products are faster. With fewer than MANY_PIXELS, a warning is not worth
# it.
DENSE = 0.85
MANY_PIXELS = 100_000


_MASK, _ROW, _GREY = ir.IntType(BLOCK), ir.IntType(32), ir.IntType(8)
_BYTES = ir.VectorType(_GREY, BLOCK)
_TILE = ir.VectorType(_MASK, BLOCK)


# The encoding of the images ----------------------------------------------------------------------------------------


class NonZeros(NamedTuple):
    """The non-zero elements of a matrix of bytes, one block of columns after the other.

    The first block lists all rows; later blocks leave out rows that are all zero. Rows are sorted from the most
    non-zeros to the fewest, in groups of `GROUP`. The last group is padded with the row number one past the last.
    """

    groups: NDArray[np.int64]
    """(blocks,): groups in each block. There is one block even if there are no columns."""
    rows: NDArray[np.uint32]
    """(groups of all blocks * GROUP,): row numbers."""
    masks: NDArray[np.uint64]
    """Same shape as `rows`: bit c is set where column c of the block is not zero."""
    values: NDArray[np.uint8]
    """The non-zero pixels, row by row in that order, then `BLOCK` bytes of padding that may be read, but are unused."""


def pixels_in(_: types.Type) -> types.Array:
    """(n, k) array of bytes to read, with any strides."""
    return types.Array(types.uint8, 2, "A", readonly=True, aligned=False)


def row_major_pixels_in(_: types.Type) -> types.Array:
    """(n, k) array of bytes to read, row-major."""
    return types.Array(types.uint8, 2, "C", readonly=True, aligned=False)


def masks_in(_: types.Type) -> types.Array:
    """(blocks, strips, BLOCK) masks to read, with any strides."""
    return types.Array(types.uint64, 3, "A", readonly=True)


def masks_out(_: types.Type) -> types.Array:
    """(strips, blocks, BLOCK) masks to write."""
    return types.Array(types.uint64, 3, "C")


def encoding_in(dtype: types.Type) -> Callable[[types.Type], types.Array]:
    """One of the arrays of `NonZeros`, to read."""
    return lambda _: types.Array(dtype, 1, "C", readonly=True)


def encoding_out(dtype: types.Type) -> Callable[[types.Type], types.Array]:
    """One of the arrays of `NonZeros`, to write."""
    return lambda _: types.Array(dtype, 1, "C")


GROUPS, ROWS, MASKS, VALUES = types.int64, types.uint32, types.uint64, types.uint8


def encode(images: NDArray[np.uint8]) -> tuple[NonZeros, NonZeros]:
    """The non-zeros of a matrix of bytes (n, k), and those of its transpose.

    NumPy allocates the arrays, as returning one from Numba takes a microsecond.
    """
    images = np.ascontiguousarray(images)
    n, k = images.shape
    strips, blocks = -(-n // BLOCK) or 1, -(-k // BLOCK) or 1
    masks = np.empty((strips, blocks, BLOCK), np.uint64)
    transposed_masks = np.empty((strips, blocks, BLOCK), np.uint64)
    groups, transposed_groups = np.empty(blocks, np.int64), np.empty(strips, np.int64)
    number, listed, transposed_listed = find_nonzeros[images.dtype](
        images, masks, transposed_masks, groups, transposed_groups
    )

    def encoding(matrix, masks, groups, listed):
        arrays = np.empty(listed, np.uint32), np.empty(listed, np.uint64), np.empty(number + BLOCK, np.uint8)
        fill_encoding[matrix.dtype](matrix, masks, groups, *arrays)
        return NonZeros(groups, *arrays)

    return (
        encoding(images, masks.swapaxes(0, 1), groups, listed),
        encoding(images.T, transposed_masks, transposed_groups, transposed_listed),
    )


@kernel(
    row_major_pixels_in,
    *(masks_out, masks_out, encoding_out(GROUPS), encoding_out(GROUPS)),
    returns=types.UniTuple(types.int64, 3),
)
def find_nonzeros(pixels, masks, transposed_masks, groups, transposed_groups):
    """Set the masks of a matrix and of its transpose, and count their groups.

    Both have the shape (strips of 64 rows, blocks of 64 columns, 64). The masks of the transpose are the matrix's masks
    with their bits transposed, 64 x 64 at a time.

    Returns
    -------
    tuple[int, int, int]
        The number of non-zeros; the rows in all groups, and in all groups of the transpose, with padding.
    """
    n, k = pixels.shape
    strips, blocks, _ = masks.shape
    number = 0
    for i in range(n):
        strip, r = i // BLOCK, np.uint64(i % BLOCK)
        for block in range(k // BLOCK):
            mask = nonzero_bytes(pixels, i * k + block * BLOCK)
            masks[strip, np.uint64(block), r] = mask
            number += popcount(mask)
        if k % BLOCK:
            mask = last_mask(pixels, i, k % BLOCK)
            masks[strip, blocks - 1, r] = mask
            number += popcount(mask)
    masks[strips - 1, :, n - (strips - 1) * BLOCK :] = 0
    if k == 0:
        masks[:] = 0
    groups[:] = 0
    transposed_groups[:] = 0
    for strip in range(strips):
        for block in range(blocks):
            transpose_bits(masks, transposed_masks, strip, block)
            groups[block] += count_nonzero(masks[strip, block])
            transposed_groups[strip] += count_nonzero(transposed_masks[strip, block])
    groups[0], transposed_groups[0] = n, k
    return number, round_up(groups), round_up(transposed_groups)


@njit
def count_nonzero(masks):
    """Like NumPy's, but vectorized by LLVM."""
    count = 0
    for mask in masks:
        count += mask != 0
    return count


@njit
def last_mask(pixels, i, rest):
    """Mask of the non-zeros among the last bytes of a row, fewer than 64."""
    end = (i + 1) * pixels.shape[1]
    if end >= BLOCK:  # load the 64 bytes before the end, and shift out the first of them
        return nonzero_bytes(pixels, end - BLOCK) >> np.uint64(BLOCK - rest)
    mask = np.uint64(0)
    for c in range(rest):
        mask |= np.uint64(pixels[i, c] != 0) << np.uint64(c)
    return mask


@njit
def round_up(groups):
    """Turn counts of rows into counts of groups, in place; returns the rows in all groups, padding included."""
    listed = 0
    for block in range(len(groups)):
        groups[block] = (groups[block] + GROUP - 1) // GROUP
        listed += GROUP * groups[block]
    return listed


@kernel(pixels_in, masks_in, encoding_in(GROUPS), encoding_out(ROWS), encoding_out(MASKS), encoding_out(VALUES))
def fill_encoding(matrix, masks, groups, rows, sorted_masks, values):
    """Fill the arrays of `NonZeros` of a matrix of bytes (n, k) from its masks, (blocks, strips, 64)."""
    n = len(matrix)
    counters = np.empty((2, BLOCK + 1), np.int64)
    start = end = 0
    for block in range(len(groups)):
        stop = start + GROUP * groups[block]
        filled = sort_rows(masks[block], n, block == 0, rows[start:], sorted_masks[start:], counters)
        for position in range(start + filled, stop):
            rows[position], sorted_masks[position] = n, 0
        for position in range(start, start + filled):
            mask = sorted_masks[position]
            copy_nonzeros(matrix, rows[position], block * BLOCK, mask, values, end)
            end += popcount(mask)
        start = stop


@njit
def sort_rows(masks, n, is_first, rows, sorted_masks, counters):
    """List the rows of a block from the most non-zeros to the fewest; returns how many.

    A counting sort. Even and odd rows have separate counters, because reading a counter right after it was written
    costs several cycles (store-to-load forwarding). Indices are unsigned, which avoids Numba's check for negative ones.
    """
    size = np.uint64(BLOCK)
    counters[:] = 0
    for i in range(np.uint64(n)):
        counters[i & np.uint64(1), bucket_of(masks[i // size, i % size])] += 1
    listed = 0
    for bucket in range(BLOCK + is_first):
        for parity in range(2):
            counters[parity, bucket], listed = listed, listed + counters[parity, bucket]
    for i in range(np.uint64(n)):
        mask = masks[i // size, i % size]
        if is_first or mask != 0:
            parity, bucket = i & np.uint64(1), bucket_of(mask)
            position = counters[parity, bucket]
            rows[np.uint64(position)], sorted_masks[np.uint64(position)] = i, mask
            counters[parity, bucket] = position + 1
    return listed


@njit
def bucket_of(mask):
    """0 for the rows with the most non-zeros, `BLOCK` for those without any."""
    return np.uint64(BLOCK - popcount(mask))


@intrinsic
def nonzero_bytes(typing_context, pixels, start):
    """Mask of the non-zeros among the 64 bytes that start at the `start`-th of an array."""

    def emit(context, builder, signature, arguments):
        first = View.of(context, builder, signature.args[0], arguments[0]).at()
        block = _load(builder, builder.gep(first, [arguments[1]]), _BYTES)
        return builder.bitcast(builder.icmp_unsigned("!=", block, _BYTES([0] * BLOCK)), _MASK)

    return types.uint64(pixels, start), emit


@intrinsic
def transpose_bits(typing_context, masks, transposed, strip, block):
    """Transpose 64 x 64 bits of `masks[strip, block]`.

    Swap the off-diagonal quarters, then those of each quarter, and so on (Warren, Hacker's Delight, section 7-3), in
    all rows at once.
    """

    def emit(context, builder, signature, arguments):
        source, target = (
            builder.bitcast(
                View.of(context, builder, signature.args[n], arguments[n]).at(*arguments[2:]), _TILE.as_pointer()
            )
            for n in (0, 1)
        )
        rows = builder.load(source, align=8)
        for size in (32, 16, 8, 4, 2, 1):
            low = sum(1 << c for c in range(BLOCK) if not c & size)
            is_upper = ir.VectorType(ir.IntType(1), BLOCK)([not r & size for r in range(BLOCK)])
            kept = _TILE([low << (size if r & size else 0) for r in range(BLOCK)])
            moved = _TILE([low << (0 if r & size else size) for r in range(BLOCK)])
            partners = ir.VectorType(ir.IntType(32), BLOCK)([r ^ size for r in range(BLOCK)])
            others = builder.shuffle_vector(rows, rows, partners)
            distance = _TILE([size] * BLOCK)
            others = builder.select(is_upper, builder.shl(others, distance), builder.lshr(others, distance))
            rows = builder.or_(builder.and_(rows, kept), builder.and_(others, moved))
        builder.store(rows, target, align=8)
        return context.get_dummy_value()

    return types.void(masks, transposed, strip, block), emit


@intrinsic
def popcount(typing_context, mask):
    """The number of set bits."""
    return types.int64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def copy_nonzeros(typing_context, matrix, i, j, mask, values, end):
    """Copy the bytes of row `i`, from column `j` on, that `mask` selects to `values[end:]`; may write up to 64."""

    def emit(context, builder, signature, arguments):
        _, i, j, mask, _, end = arguments
        matrix, values = (View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 4))
        row, values, one = matrix.at(builder.zext(i, j.type), j), values.at(end), j.type(1)
        stride = matrix.strides[1]
        with builder.if_else(builder.icmp_signed("==", stride, one)) as (then, otherwise):
            with then:
                if HAS_COMPRESS:
                    compress_bytes(builder, row, mask, values)
                else:
                    _emit_copy(builder, row, one, mask, values)
            with otherwise:
                _emit_copy(builder, row, stride, mask, values)
        return context.get_dummy_value()

    return types.void(matrix, i, j, mask, values, end), emit


def _emit_copy(builder, row, stride, mask, values):
    """Copy byte by byte. A stride known at compile time needs no multiplication."""
    rest = cgutils.alloca_once_value(builder, mask)
    with cgutils.for_range(builder, builder.ctpop(mask)) as loop:
        bits = builder.load(rest)
        builder.store(builder.and_(bits, builder.sub(bits, _MASK(1))), rest)
        column = builder.cttz(bits, ir.IntType(1)(1))
        byte = builder.load(builder.gep(row, [builder.mul(column, stride)]))
        builder.store(byte, builder.gep(values, [loop.index]))


@dataclass(frozen=True, eq=False, repr=False)
class SparseMatrix:
    """Images divided by 255, or their transpose.

    Attributes
    ----------
    shape, dtype
        Those of the equivalent dense array.
    nonzeros, transposed
        The non-zeros of that array and of its transpose.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    nonzeros: NonZeros
    transposed: NonZeros

    def __repr__(self) -> str:
        return f"<SparseMatrix {self.shape}, {self.dtype}: {self.nbytes:,} bytes>"

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> "SparseMatrix":
        """The transpose, without a copy."""
        return SparseMatrix(self.shape[::-1], self.dtype, self.transposed, self.nonzeros)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that both take, the non-zeros and their transpose."""
        return sum(array.nbytes for array in (*self.nonzeros, *self.transposed))


# The product -------------------------------------------------------------------------------------------------------


@emitter
def pack_panel(vectors, builder, b, j, panel):
    """Pack B's columns from `j` on into the panel; missing columns become zeros."""
    emit_packing(vectors, builder, b, j, panel, PANEL_VECTORS)


@intrinsic
def add_nonzeros(typing_context, groups, rows, masks, values, start, end, panel, bias, is_first, out, j, width):
    """Add the products of a block of A with a panel of B to `width` vectors of the rows of the result.

    Parameters
    ----------
    groups, rows, masks, values
        How many groups the block has, and the other arrays of `NonZeros`.
    start, end
        Where the block starts in `rows` and `masks`, and where it starts in `values`.
    panel
        The block of B: `BLOCK` rows, followed by a row of negative zeros.
    bias, is_first
        Initial value of every row of the result, used by the first block. The other blocks add to `out`.
    out, j
        The result, with one more row than A, and the first column to add to.
    width
        One of `WIDTHS`. Only a width of 1 may extend past the last column of the result.

    Returns
    -------
    int
        Where the next block starts in `values`.
    """

    def emit(context, builder, signature, arguments):
        groups, _, _, _, start, end, _, _, is_first, _, j, chosen = arguments
        rows, masks, values, panel, bias, out = (
            View.of(context, builder, signature.args[n], arguments[n]) for n in (1, 2, 3, 6, 7, 9)
        )
        vectors = Vectors(context, builder, signature.args[9].dtype)
        integer = j.type
        # Strides known at compile time need no multiplication.
        rows = View(builder, rows.at(start), (), [integer(ROWS.bitwidth // 8)])
        masks = View(builder, masks.at(start), (), [integer(MASKS.bitwidth // 8)])
        values = View(builder, values.at(), (), [integer(1)])
        panel = View(builder, panel.at(), (), [integer(PANEL_BYTES)])
        # The bias is a matrix with a row stride of 0.
        before = View(
            builder,
            builder.select(is_first, bias.at(j), out.at(integer(0), j)),
            out.shape,
            [builder.select(is_first, integer(0), out.strides[0])],
        )
        end = cgutils.alloca_once_value(builder, end)
        for width in WIDTHS:
            tail = vectors.first(builder.sub(out.shape[1], j)) if width == 1 else None
            is_chosen = builder.icmp_signed("==", chosen, chosen.type(width))
            with builder.if_then(is_chosen), cgutils.for_range(builder, groups) as loop:
                ahead = builder.add(loop.index, integer(AHEAD))
                ahead = builder.select(builder.icmp_signed("<", ahead, groups), ahead, loop.index)
                for r in range(GROUP):
                    member = builder.add(builder.mul(ahead, integer(GROUP)), integer(r))
                    row = builder.zext(_load(builder, rows.at(member), _ROW), integer)
                    for byte in range(0, width * REGISTER_BYTES, CACHE_LINE):
                        vectors.prefetch(builder.gep(out.at(row, j), [integer(byte)]), level=1)
                members = []
                for r in range(GROUP):
                    member = builder.add(builder.mul(loop.index, integer(GROUP)), integer(r))
                    mask = _load(builder, masks.at(member), _MASK)
                    row = builder.zext(_load(builder, rows.at(member), _ROW), integer)
                    grey = values.part(builder.load(end))
                    builder.store(builder.add(builder.load(end), builder.ctpop(mask)), end)
                    members.append(_Member(mask, grey, before.part(row), out.part(row, j)))
                _emit_sums(builder, vectors, members, panel, width, tail)
        return builder.load(end)

    return types.intp(groups, rows, masks, values, start, end, panel, bias, is_first, out, j, width), emit


class _Member(NamedTuple):
    """A row of a group, in generated code."""

    mask: ir.Value
    grey: View
    before: View
    after: View


def _load(builder, pointer, kind):
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


def _emit_sums(builder, vectors, members, panel, width, tail):
    """Emit the loop over the set bits of a group's masks, accumulating in registers; the first row has the most."""
    tile = [(r, c) for r in range(GROUP) for c in range(width)]
    totals = {(r, c): vectors.variable(vectors.constant(0)) for r, c in tile}
    masks = [cgutils.alloca_once_value(builder, member.mask) for member in members]
    count = builder.ctpop(members[0].mask)
    floats = _emit_conversion(builder, vectors, [member.grey for member in members], count)
    with cgutils.for_range(builder, count) as loop:
        # Keep the loop rolled. Most rows of a block have fewer than twenty non-zeros, which would mostly run in the
        # remainder loop.
        compiler_barrier(builder, "convergent")
        for r in range(GROUP):
            mask = builder.load(masks[r])
            builder.store(builder.and_(mask, builder.sub(mask, _MASK(1))), masks[r])
            # 64 once the mask is empty: the row of negative zeros, which times any pixel leaves a sum unchanged.
            column = builder.cttz(mask, ir.IntType(1)(0))
            x = vectors.broadcast(floats[r].at(loop.index))
            # In one register: on Intel, an FMA with an indexed memory operand does not stay micro-fused
            # (un-lamination).
            row = opaque(builder, panel.part(column))
            for c in range(width):
                total = totals[r, c]
                b = vectors.load(row.at(), column=c)
                builder.store(vectors.fma(x, b, builder.load(total)), total)
    for r, c in tile:
        sums = builder.fadd(vectors.load(members[r].before.at(), tail, column=c), builder.load(totals[r, c]))
        vectors.store(sums, members[r].after.at(), tail, column=c)


def _emit_conversion(builder, vectors, greys, count):
    """Emit the loop that divides the first `count` bytes of each array by 255, whole vectors at a time.

    The floats go to the stack. A table of 256 floats would take two loads for each pixel in the innermost loop instead
    of one: on Zen 5 with AVX-512, both products took 1.1 times as long; with AVX2, the same.
    """
    size = _MASK(REGISTER_BYTES // vectors.lanes)
    space = _MASK(BLOCK // vectors.lanes)
    floats = [View(builder, cgutils.alloca_once(builder, vectors.type, space), (), (size,)) for _ in greys]
    with cgutils.for_range_slice(builder, _MASK(0), count, _MASK(vectors.lanes), _MASK) as (start, _):
        for grey, converted in zip(greys, floats, strict=True):
            quotients = builder.fdiv(vectors.load_bytes(grey.at(start)), vectors.constant(255))
            vectors.store(quotients, converted.at(start))
    return floats


empty_panel = njit(aligned_empty)


@kernel(row_major_in, flat_in, *(encoding_in(dtype) for dtype in (GROUPS, ROWS, MASKS, VALUES)), matrix_out)
def product(b, bias, groups, rows, masks, values, out):
    """out = A B + bias, where A is given by its `NonZeros`.

    `out` has one more row than A, a dummy for padding. The terms of a sum are added block by block, and within a block
    from left to right.
    """
    m = b.shape[1]
    panel = empty_panel(BLOCK + 1, PANEL_BYTES // b.itemsize, b)
    panel[BLOCK] = -0.0
    j = 0
    for width in WIDTHS:
        columns = width * REGISTER_BYTES // b.itemsize
        while j + columns <= m or (width == 1 and j < m):
            start = end = 0
            for block in range(len(groups)):
                pack_panel(b[block * BLOCK : (block + 1) * BLOCK], j, panel)
                end = add_nonzeros(
                    groups[block], rows, masks, values, start, end, panel, bias, block == 0, out, j, width
                )
                start += groups[block] * GROUP
            j += columns


@kernel(flat_in, returns=types.intp)
def line_start(memory):
    """Elements before the first whole cache line of an array. Asking NumPy for the address takes 2 µs."""
    return -memory.ctypes.data % CACHE_LINE // memory.itemsize


class SparseBackend(NumbaBackend):
    """Products with images as above; everything else comes from the numba backend."""

    # Next to products without zeros, Python and the sums of gradients weigh more. On Zen 5, full batches take 0.93 to
    # 0.97 times the time that they take with 1,024 at once; on the dense backends, 1.00 to 1.03 times.
    images_at_once = 2048

    def _prepare(self, images: NDArray[np.uint8], dtype: np.dtype) -> SparseMatrix:
        nonzeros, transposed = encode(images)
        if images.size >= MANY_PIXELS and len(nonzeros.values) > DENSE * images.size:
            _warn_of_dense_images()
        return SparseMatrix(images.shape, dtype, nonzeros, transposed)

    def _matmul(self, a: Any, b: NDArray, bias: NDArray | None) -> NDArray:
        if not isinstance(a, SparseMatrix):
            return super()._matmul(a, b, bias)
        n, m = len(a), b.shape[1]
        memory = np.empty((n + 1) * m + CACHE_LINE // b.itemsize, b.dtype)
        start = line_start[b.dtype](memory)
        out = memory[start : start + (n + 1) * m].reshape(n + 1, m)
        bias = np.zeros(m, b.dtype) if bias is None else np.ascontiguousarray(bias)
        product[b.dtype](np.ascontiguousarray(b), bias, *a.nonzeros, out)
        return out[:n]


_FIRST_WARNING = threading.Lock()  # acquired once, and never released


def _warn_of_dense_images() -> None:
    if _FIRST_WARNING.acquire(blocking=False):
        warnings.warn(f"more than {DENSE:.0%} of these pixels are not zero: use the numba backend", stacklevel=4)
