"""Compiled by Numba for images that are mostly zero: only what is not zero is multiplied.

81 % of MNIST's pixels are zero. Both products with the images, x W and x.T dhidden, are sums over non-zero pixels: each
row of the result is a sum of rows of B, one for each non-zero element of its row of A, times that element:

    out[i] = bias + A[i, k] B[k] + A[i, k'] B[k'] + ...

Each multiply-add of vectors then needs a vector of B of its own. The CPU can load one for each multiply-add, but only
from the L1 cache, which is too small for B. Hence these ideas, on top of skipping zeros:

- *Blocks.* A is cut into blocks of 64 columns, and B into blocks of 64 rows, which are cut into *panels* of
  `PANEL_VECTORS` vectors and fill the L1 cache. A block is used for all rows of the result before the next one.
- *Masks.* Where a row of a block is not zero is a mask of 64 bits; the next column is its lowest bit, one instruction
  away. Reading column numbers from memory would be slower, as each would have to arrive before B can be loaded.
- *Order.* The rows of a block are visited from the most non-zeros to the fewest, whatever their order in A, so the
  innermost loop is as long as the last time, and the CPU rightly foresees its end. Two rows are visited at a time, as
  sums of one row alone would wait for each other.
- *Bytes.* Grey values are kept as bytes, and become floats, 16 at a time, just before they are needed.

x and x.T are both stored in that form, so the same code computes both products.

A pixel of zero adds nothing to a sum, whatever it is multiplied with: zero times infinity or NaN is skipped here too.
"""

import functools
import threading
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kernels.backend import CHUNK
from kernels.numba_backend import NumbaBackend, emit_packing
from kernels.simd import REGISTER_BYTES, Vectors, View, flat_in, kernel, matrix_out, row_major_in

# Vectors in a row of a panel, and of the narrower panels for the last columns. Two rows of the result and their grey
# values fit the 16 registers of SSE and AVX2, or the 32 of AVX-512.
WIDTHS = {16: (4, 2, 1), 32: (4, 2, 1), 64: (8, 4, 2, 1)}[REGISTER_BYTES]
PANEL_VECTORS = WIDTHS[0]
PANEL_BYTES = PANEL_VECTORS * REGISTER_BYTES

# Columns of a block: the bits of a mask. With AVX-512, so many rows of a panel fill an L1 cache of 32 KB.
BLOCK = 64

# Rows of a block that are visited together.
GROUP = 2

# What a grey value is stored as.
GREY: Any = types.uint8

CACHE_LINE = 64

# From this share of non-zero pixels on, dense products are faster; fewer pixels than these are not worth a warning.
DENSE = 0.85
MANY_PIXELS = 100_000


# The form of the images --------------------------------------------------------------------------------------------


class NonZeros(NamedTuple):
    """The non-zero elements of a matrix of bytes, block of columns by block of columns.

    Rows that are all zero in a block are left out. The others come from the most non-zeros to the fewest, in groups of
    `GROUP`; a row number one past the last fills the last group.
    """

    groups: NDArray[np.int64]
    """(blocks,): how many groups there are."""
    rows: NDArray[np.uint32]
    """(groups of all blocks * GROUP,): which row it is."""
    masks: NDArray[np.uint64]
    """The same shape: bit c is set where column c of the block is not zero."""
    values: NDArray[np.uint8]
    """Group by group: the first grey value of each row, the second of each row, ...; a row that has fewer than the
    first of its group goes on with zeros. At the end are zeros, as whole vectors are read."""


def pixels_in(_: types.Type) -> types.Array:
    """(n, k) array of bytes to read, with any strides."""
    return types.Array(types.uint8, 2, "A", readonly=True, aligned=False)


def form_types(readonly: bool) -> list[types.Array]:
    """Types of the arrays of `NonZeros`."""
    return [types.Array(dtype, 1, "C", readonly) for dtype in (types.int64, types.uint32, types.uint64, GREY)]


@kernel(pixels_in, returns=types.Tuple(form_types(readonly=False)))
def encode(matrix):
    """`NonZeros` of a matrix of bytes (n, k)."""
    n, k = matrix.shape
    groups = np.zeros((k + BLOCK - 1) // BLOCK, np.int64)
    room = len(groups) * (n + GROUP)
    rows, masks = np.empty(room, np.uint32), np.zeros(room, np.uint64)
    values = np.zeros(room * BLOCK + GROUP * REGISTER_BYTES, GREY)
    mask, number, order = np.empty(n, np.uint64), np.empty(n, np.int64), np.empty(n, np.int64)
    start = end = 0
    for block in range(len(groups)):
        part = matrix[:, block * BLOCK : (block + 1) * BLOCK]
        for i in range(n):
            mask[i] = number[i] = 0
            for c in range(part.shape[1]):
                mask[i] |= np.uint64(part[i, c] != 0) << np.uint64(c)
                number[i] += part[i, c] != 0
        filled = sort_descending(number, order)
        groups[block] = (filled + GROUP - 1) // GROUP
        for position in range(groups[block] * GROUP):
            rows[start + position] = n
            if position < filled:
                i = order[position]
                rows[start + position], masks[start + position] = i, mask[i]
                # Write each value, and keep it by moving on: a branch on what is zero could not be foreseen.
                at = end + position % GROUP
                for c in range(part.shape[1]):
                    values[at] = part[i, c]
                    at += GROUP * (part[i, c] != 0)
            if position % GROUP == GROUP - 1:
                end += GROUP * number[order[position - GROUP + 1]]
        start += groups[block] * GROUP
    return groups, rows[:start].copy(), masks[:start].copy(), values[: end + GROUP * REGISTER_BYTES].copy()


@njit
def sort_descending(number, order):
    """Set `order` to the indices of the numbers, from 0 to `BLOCK`, that sort them; returns how many are not 0."""
    begin = np.zeros(BLOCK + 2, np.int64)
    for i in range(len(number)):
        begin[BLOCK - number[i] + 1] += 1
    begin = begin.cumsum()
    filled = begin[BLOCK]
    for i in range(len(number)):
        place = BLOCK - number[i]
        order[begin[place]] = i
        begin[place] += 1
    return filled


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
def pack_panel(typing_context, b, j, panel):
    """Copy B's columns from `j` on to the panel, with zeros for columns that B does not have."""
    return types.void(b, j, panel), functools.partial(emit_packing, width=PANEL_VECTORS)


@intrinsic
def add_block(typing_context, groups, rows, masks, values, start, end, panel, out, j, width):
    """Add the products of a block of A with a panel of B to `width` vectors of the rows of the result.

    Parameters
    ----------
    groups, rows, masks, values
        How many groups the block has, and all arrays of `NonZeros` but the first.
    start, end
        Where the block's `rows` and `masks` start, and where its `values`.
    panel
        The block of B, and a row of zeros after its `BLOCK` rows.
    out, j
        The result, with a row more than A, and the first of the columns.
    width
        One of `WIDTHS`. Only a single vector may be wider than what is left of the result.

    Returns
    -------
    int
        Where the values of the next block start.
    """

    def emit(context, builder, signature, arguments):
        groups, _, _, _, start, end, _, _, j, chosen = arguments
        rows, masks, values, panel, out = (
            View.of(context, builder, signature.args[n], arguments[n]) for n in (1, 2, 3, 6, 7)
        )
        vectors = Vectors(context, builder, signature.args[7].dtype)
        integer = j.type
        # Strides that are known here, which spare the innermost loop its multiplications.
        rows, masks = rows.part(start), masks.part(start)
        values = View(builder, values.at(), (), [integer(GREY.bitwidth // 8)])
        panel = View(builder, panel.at(), (), [integer(PANEL_BYTES)])
        end = cgutils.alloca_once_value(builder, end)
        floats = ir.ArrayType(vectors.type, GROUP * BLOCK // vectors.lanes)
        scratch = cgutils.alloca_once(builder, floats)
        for width in WIDTHS:
            tail = vectors.first(builder.sub(out.shape[1], j)) if width == 1 else None
            is_chosen = builder.icmp_signed("==", chosen, chosen.type(width))
            with builder.if_then(is_chosen), cgutils.for_range(builder, groups) as loop:
                members = [builder.add(builder.mul(loop.index, integer(GROUP)), integer(r)) for r in range(GROUP)]
                bits = [_load(builder, masks.at(member), _MASK) for member in members]
                numbers = [builder.zext(_load(builder, rows.at(member), _ROW), integer) for member in members]
                size = builder.mul(builder.ctpop(bits[0]), integer(GROUP))
                grey = _emit_floats(builder, vectors, values.part(builder.load(end)), size, scratch)
                results = [out.part(number, j) for number in numbers]
                _emit_micro_kernel(builder, vectors, bits, grey, panel, results, width, tail)
                builder.store(builder.add(builder.load(end), size), end)
        return builder.load(end)

    return types.intp(groups, rows, masks, values, start, end, panel, out, j, width), emit


_MASK, _ROW, _GREY = ir.IntType(BLOCK), ir.IntType(32), ir.IntType(GREY.bitwidth)


def _load(builder, pointer, what):
    return builder.load(builder.bitcast(pointer, what.as_pointer()), align=1)


def _emit_floats(builder, vectors, values, size, scratch):
    """Divide so many grey values by 255, a vector at a time; returns a view of the floats in `scratch`."""
    integer = size.type
    floats = View(builder, scratch, (), [integer(REGISTER_BYTES // vectors.lanes)])
    with cgutils.for_range_slice(builder, integer(0), size, integer(vectors.lanes), integer) as (position, _):
        grey = _load(builder, values.at(position), ir.VectorType(_GREY, vectors.lanes))
        vectors.store(builder.fdiv(builder.uitofp(grey, vectors.type), vectors.constant(255)), floats.at(position))
    return floats


def _emit_micro_kernel(builder, vectors, bits, grey, panel, results, width, tail):
    """Add to rows of the result, held in registers, for the set bits of their masks; the first has the most."""
    tile = [(r, c) for r in range(GROUP) for c in range(width)]
    totals = {(r, c): vectors.variable(vectors.constant(0)) for r, c in tile}
    masks = [cgutils.alloca_once_value(builder, mask) for mask in bits]
    with cgutils.for_range(builder, builder.ctpop(bits[0])) as loop:
        _keep_rolled(builder)
        for r in range(GROUP):
            mask = builder.load(masks[r])
            builder.store(builder.and_(mask, builder.sub(mask, _MASK(1))), masks[r])
            column = builder.cttz(mask, ir.IntType(1)(0))  # 64 when the mask has run out: a row of zeros
            x = vectors.broadcast(grey.at(builder.add(builder.mul(loop.index, _MASK(GROUP)), _MASK(r))))
            for c in range(width):
                total = totals[r, c]
                b = vectors.load(panel.at(column), column=c)
                builder.store(vectors.fma(x, b, builder.load(total)), total)
    for r, c in tile:
        result = vectors.load(results[r].at(), tail, column=c)
        vectors.store(builder.fadd(result, builder.load(totals[r, c])), results[r].at(), tail, column=c)


def _keep_rolled(builder):
    """Keep LLVM from unrolling a loop, by an instruction without effect that it may not copy past a condition.

    Most rows of a block have fewer than twenty non-zeros, and would end up in the loop for the remainder.
    """
    nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
    builder.call(nothing, [], attrs=("convergent",))


def aligned_empty(n, m, like):
    """(n, m) array from a cache line's start, as vectors that lie in two lines take two accesses."""
    memory = np.empty(n * m + CACHE_LINE // like.itemsize, like.dtype)
    start = -memory.ctypes.data % CACHE_LINE // like.itemsize
    return memory[start : start + n * m].reshape(n, m)


empty_panel = njit(aligned_empty)


@kernel(row_major_in, flat_in, *(lambda _, form=form: form for form in form_types(readonly=True)), matrix_out)
def product(b, bias, groups, rows, masks, values, out):
    """out = A B + bias, added to each row, where A is what `NonZeros` says, divided by 255.

    `out` has a row more than A, which is left in any state. The terms of a sum are added block by block, each from left
    to right.
    """
    m = b.shape[1]
    panel = empty_panel(BLOCK + 1, PANEL_BYTES // b.itemsize, b)
    panel[BLOCK] = 0
    for i in range(len(out)):
        for j in range(m):
            out[i, j] = bias[j]
    j = 0
    for width in WIDTHS:
        columns = width * REGISTER_BYTES // b.itemsize
        while j + columns <= m or (width == 1 and j < m):
            start = end = 0
            for block in range(len(groups)):
                pack_panel(b[block * BLOCK : (block + 1) * BLOCK], j, panel)
                end = add_block(groups[block], rows, masks, values, start, end, panel, out, j, width)
                start += groups[block] * GROUP
            j += columns


class SparseBackend(NumbaBackend):
    """Products with images as above; everything else is the numba backend's."""

    # Of images in this form, which is a sixth as large, twice as many leave enough of the cache to the activations.
    chunk = 2 * CHUNK

    def _prepare(self, images, dtype):
        if images.size >= MANY_PIXELS and np.count_nonzero(images) > DENSE * images.size:
            _warn_of_dense_images()
        return SparseMatrix(images.shape, dtype, NonZeros(*encode(images)), NonZeros(*encode(images.T)))

    def _matmul(self, a, b, bias):
        if not isinstance(a, SparseMatrix):
            return super()._matmul(a, b, bias)
        n, m = len(a), b.shape[1]
        out = aligned_empty(n + 1, m, b)
        bias = np.zeros(m, a.dtype) if bias is None else np.ascontiguousarray(bias)
        product(np.ascontiguousarray(b), bias, *a.nonzeros, out)
        return out[:n]


_FIRST_WARNING = threading.Lock()  # taken, and never given back


def _warn_of_dense_images() -> None:
    if _FIRST_WARNING.acquire(blocking=False):
        warnings.warn("most pixels of these images are not zero: the numba backend is faster on them", stacklevel=4)
