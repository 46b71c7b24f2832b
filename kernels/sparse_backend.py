"""Compiled by Numba for images that are mostly zero: only what is not zero is multiplied.

81 % of MNIST's pixels are zero. Both products with the images, x W and x.T dhidden, are sums over non-zero pixels: each
row of the result is a sum of rows of B, one for each non-zero element of its row of A, times that element:

    out[i] = bias + A[i, k] B[k] + A[i, k'] B[k'] + ...

Each multiply-add of vectors then needs a vector of B of its own. The CPU can load one for each multiply-add, but only
from the L1 cache, which is too small for B. Hence three ideas, on top of skipping zeros:

- *Blocks.* B is cut into *panels* of `PANEL_VECTORS` vectors and those into blocks of `BLOCK` rows, which fill the L1
  cache. A block is used for all rows of the result before the next one.
- *Pairs.* Two neighbouring rows of the result are in registers at a time. Where both rows of A are non-zero, a row of B
  is loaded once for both. In MNIST that holds for 83 % of the non-zeros of neighbouring pixels and 47 % of those of
  neighbouring images, in whatever order the images come.
- *Bytes.* A non-zero element of A is stored as its column in the block and its grey value, one byte each. Its float is
  looked up in a table of 256, as fast as it could be converted, and exactly what division by 255 gives.

x and x.T are both stored in that form, so the same code computes both products.

The parameters are taken to be finite: zero times infinity or NaN would be NaN, and is skipped here.
"""

import functools
import threading
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kernels.numba_backend import NumbaBackend
from kernels.simd import REGISTER_BYTES, Vectors, View, flat_in, kernel, matrix_out

# Vectors in a row of a panel, and of the narrower panels for the last columns. Two rows of the result, a row of B and
# two grey values fit the 16 registers of SSE and AVX2, or the 32 of AVX-512.
WIDTHS = {16: (4, 2, 1), 32: (4, 2, 1), 64: (8, 4, 2, 1)}[REGISTER_BYTES]
PANEL_VECTORS = WIDTHS[0]
PANEL_BYTES = PANEL_VECTORS * REGISTER_BYTES

# Rows of a panel that fill an L1 cache of 32 KB, and whose numbers and count fit a byte.
BLOCK = min(192, 32 * 1024 // PANEL_BYTES)

CACHE_LINE = 64

# The kinds of entries by the rows of their pair that are non-zero, in the order in which they are stored.
BOTH, FIRST, SECOND = range(3)
ROWS = {BOTH: (0, 1), FIRST: (0,), SECOND: (1,)}

# The float of each byte.
GREY = {np.dtype(dtype): np.divide(np.arange(256), 255, dtype=dtype) for dtype in (np.float32, np.float64)}

# From this share of non-zero pixels on, dense products are faster; fewer pixels than these are not worth a warning.
DENSE = 0.85
MANY_PIXELS = 100_000


# The form of the images --------------------------------------------------------------------------------------------


class NonZeros(NamedTuple):
    """The non-zero elements of a matrix of bytes, in blocks of `BLOCK` columns and pairs of rows."""

    counts: NDArray[np.uint8]
    """(blocks, pairs, 3): how many entries there are of each kind, in this order."""
    entries: NDArray[np.uint8]
    """Entry after entry. One has a column, counted from the start of its block, and one value, or two for `BOTH`."""


def pixels_in(_: types.Type) -> types.Array:
    """(n, k) array of bytes to read, with any strides."""
    return types.Array(types.uint8, 2, "A", readonly=True, aligned=False)


@kernel(pixels_in, returns=types.Tuple((types.Array(types.uint8, 3, "C"), types.Array(types.uint8, 1, "C"))))
def encode(matrix):
    """Counts and entries of a matrix of bytes (n, k)."""
    n, k = matrix.shape
    pairs = (n + 1) // 2
    counts = np.empty(((k + BLOCK - 1) // BLOCK, pairs, 3), np.uint8)
    entries = np.empty(3 * pairs * k + 3, np.uint8)  # all that there can be, and room to write one too many
    no_row = np.zeros(BLOCK, np.uint8)
    end = 0
    for block in range(len(counts)):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        for pair in range(pairs):
            first = matrix[2 * pair, columns]
            second = matrix[2 * pair + 1, columns] if 2 * pair + 1 < n else no_row
            # Write each entry, and keep it by moving on: a branch on what is zero could not be predicted.
            start = end
            for c in range(len(first)):
                entries[end], entries[end + 1], entries[end + 2] = c, first[c], second[c]
                end += 3 * ((first[c] != 0) & (second[c] != 0))
            counts[block, pair, BOTH] = (end - start) // 3
            start = end
            for c in range(len(first)):
                entries[end], entries[end + 1] = c, first[c]
                end += 2 * ((first[c] != 0) & (second[c] == 0))
            counts[block, pair, FIRST] = (end - start) // 2
            start = end
            for c in range(len(first)):
                entries[end], entries[end + 1] = c, second[c]
                end += 2 * ((first[c] == 0) & (second[c] != 0))
            counts[block, pair, SECOND] = (end - start) // 2
    return counts, entries[:end].copy()


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """Images divided by 255, or their transpose.

    Attributes
    ----------
    shape, dtype
        Of the array that it stands for.
    nonzeros, transposed
        The bytes of that array, and those of its transpose.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    nonzeros: NonZeros
    transposed: NonZeros

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> "SparseMatrix":
        """The transpose, without a copy."""
        return SparseMatrix(self.shape[::-1], self.dtype, self.transposed, self.nonzeros)

    @property
    def nbytes(self) -> int:
        """Bytes that both forms take."""
        return sum(array.nbytes for array in (*self.nonzeros, *self.transposed))


# The product -------------------------------------------------------------------------------------------------------


@intrinsic
def pack_row(typing_context, b, k, j, panel, row):
    """Copy row `k` of B, from column `j`, to a row of the panel; zeros stand in for columns that B does not have."""

    def emit(context, builder, signature, arguments):
        _, k, j, _, row = arguments
        b, panel = (View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 3))
        vectors = Vectors(context, builder, signature.args[0].dtype)
        columns = builder.sub(b.shape[1], j)
        for c in range(PANEL_VECTORS):
            mask = vectors.first(builder.sub(columns, j.type(c * vectors.lanes)))
            vectors.store(vectors.load(b.at(k, j), mask, column=c), panel.at(row), column=c)

    return types.void(b, k, j, panel, row), emit


@intrinsic
def add_block(typing_context, counts, block, entries, position, grey, panel, out, j, width):
    """Add the products of a block's entries with rows of the panel to `width` vectors of each row of the result.

    Parameters
    ----------
    counts, block
        How many entries there are in each block, and which block it is.
    entries, position
        The entries, and where those of the block start.
    grey
        (256,) floats of the bytes.
    panel
        The block of B.
    out, j
        The result, with an even number of rows, and the first of the columns.
    width
        One of `WIDTHS`. Only a single vector may be wider than what is left of the result.

    Returns
    -------
    int
        Where the entries of the next block start.
    """

    def emit(context, builder, signature, arguments):
        _, block, _, position, _, _, _, j, chosen = arguments
        counts, entries, grey, panel, out = (
            View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 2, 4, 5, 6)
        )
        vectors = Vectors(context, builder, signature.args[6].dtype)
        pairs = counts.shape[1]
        counts = counts.part(block, drop=1)
        # Strides that are known here, which spare the innermost loops their multiplications.
        entries = View(builder, entries.at(), (), [j.type(1)])
        grey = View(builder, grey.at(), (), [j.type(REGISTER_BYTES // vectors.lanes)])
        panel = View(builder, panel.at(), (), [j.type(PANEL_BYTES)])
        end = cgutils.alloca_once_value(builder, position)
        for width in WIDTHS:
            mask = vectors.first(builder.sub(out.shape[1], j)) if width == 1 else None
            is_chosen = builder.icmp_signed("==", chosen, chosen.type(width))
            with builder.if_then(is_chosen), cgutils.for_range(builder, pairs) as pair:
                numbers = [builder.zext(builder.load(counts.at(pair.index, kind)), j.type) for kind in ROWS]
                total = functools.reduce(builder.add, numbers)
                with builder.if_then(builder.icmp_signed(">", total, j.type(0))):
                    first = entries.part(builder.load(end))
                    rows = out.part(builder.mul(pair.index, j.type(len(ROWS[BOTH]))), j)
                    size = _emit_micro_kernel(builder, vectors, numbers, first, grey, panel, rows, width, mask)
                    builder.store(builder.add(builder.load(end), size), end)
        return builder.load(end)

    return types.intp(counts, block, entries, position, grey, panel, out, j, width), emit


def _emit_micro_kernel(builder, vectors, numbers, entries, grey, panel, out, width, mask):
    """Loops over the entries of a pair, with its two rows of the result in registers; returns the bytes read."""
    start = entries.at()
    tile = [(row, c) for row in ROWS[BOTH] for c in range(width)]
    totals = {(row, c): vectors.variable(vectors.load(out.at(row), mask, column=c)) for row, c in tile}
    for rows, number in zip(ROWS.values(), numbers):
        size = number.type(1 + len(rows))
        with cgutils.for_range(builder, number) as loop:
            _keep_rolled(builder)
            entry = entries.part(builder.mul(loop.index, size))
            column, *values = (builder.zext(builder.load(entry.at(n)), number.type) for n in range(1 + len(rows)))
            b = [vectors.load(panel.at(column), column=c) for c in range(width)]
            for row, value in zip(rows, values):
                x = vectors.broadcast(grey.at(value))
                for c in range(width):
                    total = totals[row, c]
                    builder.store(vectors.fma(x, b[c], builder.load(total)), total)
        entries = entries.part(builder.mul(number, size))
    for row, c in tile:
        vectors.store(builder.load(totals[row, c]), out.at(row), mask, column=c)
    integer = numbers[0].type
    return builder.sub(builder.ptrtoint(entries.at(), integer), builder.ptrtoint(start, integer))


def _keep_rolled(builder):
    """Keep LLVM from unrolling a loop, by an instruction without effect that it may not copy past a condition.

    Most of the lists have fewer than ten entries, and would end up in the loop for the remainder.
    """
    nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
    builder.call(nothing, [], attrs=("convergent",))


def row_major_in(dtype: types.Float) -> types.Array:
    """(n, m) array to read, row-major."""
    return types.Array(dtype, 2, "C", readonly=True, aligned=False)


def counts_in(_: types.Float) -> types.Array:
    """`NonZeros.counts`."""
    return types.Array(types.uint8, 3, "C", readonly=True)


def entries_in(_: types.Float) -> types.Array:
    """`NonZeros.entries`."""
    return types.Array(types.uint8, 1, "C", readonly=True)


@kernel(row_major_in, flat_in, flat_in, counts_in, entries_in, matrix_out, matrix_out)
def product(b, bias, grey, counts, entries, panel, out):
    """out = A B + bias, added to each row, where the non-zeros of A are the floats in `grey` of its bytes.

    `panel` is memory for a block of B. `out` has two rows for each pair of rows of A. The order in which the terms of a
    sum are added depends on where the zeros of the pair are, and on nothing else.
    """
    k, m = b.shape
    for i in range(len(out)):
        for j in range(m):
            out[i, j] = bias[j]
    j = 0
    for width in WIDTHS:
        columns = width * REGISTER_BYTES // b.itemsize
        while j + columns <= m or (width == 1 and j < m):
            position = 0
            for block in range(len(counts)):
                for row in range(min(BLOCK, k - block * BLOCK)):
                    pack_row(b, block * BLOCK + row, j, panel, row)
                position = add_block(counts, block, entries, position, grey, panel, out, j, width)
            j += columns


class SparseBackend(NumbaBackend):
    """Products with images as above; everything else is the numba backend's."""

    def _prepare(self, images, dtype):
        if images.size >= MANY_PIXELS and np.count_nonzero(images) > DENSE * images.size:
            _warn_of_dense_images()
        return SparseMatrix(images.shape, dtype, NonZeros(*encode(images)), NonZeros(*encode(images.T)))

    def _matmul(self, a, b, bias):
        if not isinstance(a, SparseMatrix):
            return super()._matmul(a, b, bias)
        n, m = len(a), b.shape[1]
        out = empty(n + n % 2, m, a.dtype)
        panel = empty(BLOCK, PANEL_BYTES // a.dtype.itemsize, a.dtype)
        bias = np.zeros(m, a.dtype) if bias is None else np.ascontiguousarray(bias)
        product(np.ascontiguousarray(b), bias, GREY[a.dtype], *a.nonzeros, panel, out)
        return out[:n]


def empty(n: int, m: int, dtype: np.dtype) -> NDArray:
    """(n, m) array from a cache line's start, as vectors that lie in two lines take two accesses."""
    memory = np.empty(n * m + CACHE_LINE // dtype.itemsize, dtype)
    start = -memory.ctypes.data % CACHE_LINE // dtype.itemsize
    return memory[start : start + n * m].reshape(n, m)


_FIRST_WARNING = threading.Lock()  # taken, and never given back


def _warn_of_dense_images() -> None:
    if _FIRST_WARNING.acquire(blocking=False):
        warnings.warn("most pixels of these images are not zero: the numba backend is faster on them", stacklevel=4)
