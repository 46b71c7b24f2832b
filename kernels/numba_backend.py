"""Compiled by Numba: a micro-kernel that holds its results in vector registers, and the loops around it.

The product follows Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), in the
terms of BLIS (Van Zee and van de Geijn, 2015). The *micro-kernel* keeps a *tile* of the result, `MR` rows by
`TILE_VECTORS` vectors, in registers while it walks along k. At each step it loads one row of B, broadcasts
one element of A for each row of the tile, and multiplies and adds: 24 multiply-adds for 10 loads with
AVX-512. Around it, B is cut into blocks that stay in the L2 cache, and those into *panels* as wide as a tile,
which lie one row after the other in memory.

Goto packs A as well. Here A is read in place: its elements are only ever broadcast, so any strides do, and x
and x.T are served alike by the same code.
"""

import functools
import math
from contextlib import contextmanager

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided

from kernels.backend import Backend
from kernels.simd import (
    REGISTER_BYTES,
    Vectors,
    View,
    compile_seconds,
    flat_in,
    flat_out,
    integers_in,
    kernel,
    matrix_in,
    matrix_out,
    opaque,
    row_major_in,
)

# Rows of a tile. Not 8: the rows of A are read side by side, and if their distance is a power of two they
# compete for the 8 lines of one set of the L1 cache.
MR = 6

# Vectors in a row of a tile, and in a row of the narrower tile for the last columns, by the bytes of a
# register. With a row of B and a broadcast element of A they fill the 16 registers of SSE and AVX2, or most
# of the 32 of AVX-512.
TILE_VECTORS, EDGE_VECTORS = {16: (2, 2), 32: (2, 2), 64: (4, 1)}[REGISTER_BYTES]
TILE_BYTES = TILE_VECTORS * REGISTER_BYTES
EDGE_BYTES = EDGE_VECTORS * REGISTER_BYTES

# Rows of the narrower tile: as many sums at least as multiply-adds can be under way.
EDGE_MR = 12 // EDGE_VECTORS

# Largest block of B: KC rows of NC_BYTES are 400 KB and stay in an L2 cache of 512 KB.
KC = 800
NC_BYTES = 512

# B is packed if at least this many rows of A share the work.
PACK_ROWS = 16 * MR


# Micro-kernels ----------------------------------------------------------------------------------------------


@intrinsic
def tile(typing_context, a, i, rows, panels, p, bias, out, j, first):
    """Add the product of A and panel `p` of B to a tile of the result.

    Parameters
    ----------
    a
        (m, k) array, of which `rows` rows from `i` on count, 1 to MR of them (EDGE_MR in `edge_tile`).
    panels
        (panels, k, columns) array, each row of a panel contiguous and TILE_VECTORS vectors long.
    bias
        (n,) array: what the tile starts from if `first`. Otherwise it starts from what is in `out`.
    out
        (m, n) row-major array, whose element (i, j) is the tile's upper left.
    """
    signature = types.void(a, i, rows, panels, p, bias, out, j, first)
    return signature, functools.partial(_emit_tile, most=MR, width=TILE_VECTORS, ragged=False)


@intrinsic
def edge_tile(typing_context, a, i, rows, panels, p, bias, out, j, first):
    """Do what `tile` does, for panels of EDGE_VECTORS vectors whose last columns may lie outside of `out`."""
    signature = types.void(a, i, rows, panels, p, bias, out, j, first)
    return signature, functools.partial(_emit_tile, most=EDGE_MR, width=EDGE_VECTORS, ragged=True)


def _emit_tile(context, builder, signature, arguments, most, width, ragged):
    """Write a micro-kernel for each number of rows from 1 to `most`, and the choice between them."""
    _, i, rows, _, p, _, _, j, first = arguments
    a, panels, bias, out = (View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 3, 5, 6))
    vectors = Vectors(context, builder, signature.args[0].dtype)
    columns = builder.sub(out.shape[1], j)
    starts = [j.type(c * vectors.lanes) for c in range(width)]
    masks = [vectors.first(builder.sub(columns, start)) if ragged else None for start in starts]
    # The bias is a matrix whose rows are 0 bytes apart, so one load serves it and the result so far.
    start = View(
        builder,
        builder.select(first, bias.at(j), out.at(i, j)),
        out.shape,
        [builder.select(first, j.type(0), out.strides[0])],
    )
    a, panel, out = a.part(i), panels.part(p, drop=1), out.part(i, j)
    for count in range(1, most + 1):
        with builder.if_then(builder.icmp_signed("==", rows, j.type(count))):
            _emit_micro_kernel(builder, vectors, a, panel, start, out, count, masks)


def _emit_micro_kernel(builder, vectors, a, panel, start, out, rows, masks):
    """Write the loop along k for a tile of `rows` rows and a vector for each of `masks`."""
    grid = [(r, c) for r in range(rows) for c in range(len(masks))]
    totals = {(r, c): vectors.variable(vectors.load(start.at(r), masks[c], column=c)) for r, c in grid}
    # LLVM finds each row of A from the one before. Twelve such additions would take longer than twelve multiply-adds.
    parts = [a if r == 0 else opaque(builder, a.part(r)) for r in range(0, rows, MR)]
    with cgutils.for_range(builder, panel.shape[0]) as loop:
        b = [vectors.load(panel.at(loop.index), column=c) for c in range(len(masks))]
        x = [vectors.broadcast(parts[r // MR].at(r % MR, loop.index)) for r in range(rows)]
        for r, c in grid:
            builder.store(vectors.fma(x[r], b[c], builder.load(totals[r, c])), totals[r, c])
    for r, c in grid:
        vectors.store(builder.load(totals[r, c]), out.at(r), masks[c], column=c)


@intrinsic
def pack(typing_context, b, j, panel):
    """Fill a panel from column `j` of `b` on, whose rows are contiguous; columns that it does not have become zeros."""
    return types.void(b, j, panel), functools.partial(emit_packing, width=TILE_VECTORS)


@intrinsic
def pack_edge(typing_context, b, j, panel):
    """Do what `pack` does, for a panel of EDGE_VECTORS vectors."""
    return types.void(b, j, panel), functools.partial(emit_packing, width=EDGE_VECTORS)


def emit_packing(context, builder, signature, arguments, width):
    """Write the loop over the rows of B, each `width` vectors in the panel."""
    b, panel = (View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 2))
    j = arguments[1]
    vectors = Vectors(context, builder, signature.args[0].dtype)
    columns = builder.sub(b.shape[1], j)
    masks = [vectors.first(builder.sub(columns, j.type(c * vectors.lanes))) for c in range(width)]
    with cgutils.for_range(builder, b.shape[0]) as loop:
        for c, mask in enumerate(masks):
            vectors.store(vectors.load(b.at(loop.index, j), mask, column=c), panel.at(loop.index), column=c)


# The product around them ------------------------------------------------------------------------------------


@kernel(matrix_in, matrix_in, flat_in, matrix_out)
def matmul(a, b, bias, out):
    """out = A B + bias, block by block of B.

    The order in which the terms of a sum are added depends on their number alone.
    """
    m, n = out.shape
    # A narrow result has no full panel. Its transpose has, and can read the rows of A.T in place.
    swap = n * b.itemsize < TILE_BYTES <= m * a.itemsize and a.strides[0] == a.itemsize
    if swap:
        left, right, result = b.T, a.T, np.empty((n, m), out.dtype)
        for j in range(n):
            result[j].fill(bias[j])
    else:
        left, right, result = a, b, out
    k, columns = right.shape
    kc = max(1, -(-k // -(-max(k, 1) // KC)))  # blocks of equal size, give or take a row
    nc = NC_BYTES // b.itemsize
    for j in range(0, columns, nc):
        for p in range(0, max(k, 1), kc):  # once even for k = 0, which leaves the bias
            block = right[p : p + kc, j : j + nc]
            add_block(left[:, p : p + kc], block, bias[j:], result[:, j : j + nc], p == 0 and not swap)
    if swap:
        for i in range(m):
            for j in range(n):
                out[i, j] = result[j, i]


@njit
def add_block(a, b, bias, out, first):
    """Add A B, B being a block that fits the cache, to the bias if it is the `first` in k, else to `out`."""
    m, n = out.shape
    width = TILE_BYTES // b.itemsize
    edge_width = EDGE_BYTES // b.itemsize
    edge = n - n % width
    panels = panels_of(b[:, :edge], width, m)
    edge_panels = panels_of(b[:, edge:], edge_width, m)
    for i in range(0, m, MR):
        rows = min(MR, m - i)
        for p in range(len(panels)):
            tile(a, i, rows, panels, p, bias, out, p * width, first)
    for i in range(0, m, EDGE_MR):
        rows = min(EDGE_MR, m - i)
        for p in range(len(edge_panels)):
            edge_tile(a, i, rows, edge_panels, p, bias, out, edge + p * edge_width, first)


@njit
def panels_of(b, width, m):
    """Panels of so many columns for `m` rows of A, (panel, k, column): in place, or packed and filled up with zeros."""
    k, n = b.shape
    contiguous = b.strides[1] == b.itemsize
    if contiguous and m < PACK_ROWS and n % width == 0:
        return as_strided(b, (n // width, k, width), (width * b.itemsize, b.strides[0], b.itemsize))
    panels = np.empty((-(-n // width), k, width), b.dtype)
    for p in range(len(panels)):
        if contiguous and width == TILE_BYTES // b.itemsize:
            pack(b, p * width, panels[p])
        elif contiguous:
            pack_edge(b, p * width, panels[p])
        else:
            panels[p] = 0
            for j in range(p * width, min(n, (p + 1) * width)):
                for row in range(k):
                    panels[p, row, j - p * width] = b[row, j]
    return panels


# Element by element -----------------------------------------------------------------------------------------


@kernel(flat_in, flat_out)
def relu(z, out):
    """out = max(z, 0); NaN stays NaN."""
    for i in range(len(z)):
        out[i] = 0 if z[i] <= 0 else z[i]


@kernel(flat_in, flat_in, flat_out)
def relu_grad(upstream, activations, out):
    """out = upstream where the activation is positive, else 0."""
    for i in range(len(upstream)):
        out[i] = upstream[i] if activations[i] > 0 else 0


@kernel(row_major_in, integers_in, matrix_out, returns=types.Tuple((types.float64, types.int64)))
def softmax_grad(logits, labels, out):
    """out = softmax(logits) - onehot(labels); returns the summed cross-entropy and the number correct."""
    loss = 0.0
    correct = 0
    product = 1.0
    for i in range(len(logits)):
        below_top, is_first, total = softmax_grad_row(logits, i, labels[i], out)
        loss += below_top
        correct += is_first
        # One logarithm for many rows: theirs is the sum of the logarithms.
        product *= total
        if not product < 1e200:
            loss += math.log(product)
            product = 1.0
    return loss + math.log(product), correct


@intrinsic
def softmax_grad_row(typing_context, logits, i, label, out):
    """Set row `i` of `out` as above, vector by vector; the last is filled up with what changes nothing.

    Returns
    -------
    tuple[float, bool, float]
        How far the label's logit is below the largest; whether it is the first of the largest, which NaN is if there is
        one; the sum of the exponentials.
    """
    dtype = logits.dtype

    def emit(context, builder, signature, arguments):
        _, i, label, _ = arguments
        logits, out = (View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 3))
        vectors = Vectors(context, builder, dtype)
        classes = logits.shape[1]
        logits, out = logits.part(i, drop=1), out.part(i, drop=1)
        lowest, zeros, ones = (vectors.constant(value) for value in (-math.inf, 0, 1))

        @contextmanager
        def each_vector():
            with cgutils.for_range_slice(builder, i.type(0), classes, i.type(vectors.lanes), i.type) as (j, _):
                yield j, vectors.first(builder.sub(classes, j))

        largest = vectors.variable(lowest)
        with each_vector() as (j, mask):
            x = builder.select(mask, vectors.load(logits.at(j), mask), lowest)
            builder.store(vectors.maximum(x, builder.load(largest)), largest)
        largest = vectors.across(vectors.maximum, builder.load(largest))

        total = vectors.variable(zeros)
        first_nan, first_largest = (cgutils.alloca_once_value(builder, classes) for _ in range(2))
        with each_vector() as (j, mask):
            x = vectors.load(logits.at(j), mask)
            exponentials = builder.select(mask, vectors.exp(builder.fsub(x, largest)), zeros)
            vectors.store(exponentials, out.at(j), mask)
            builder.store(builder.fadd(builder.load(total), exponentials), total)
            is_nan, is_largest = builder.fcmp_unordered("uno", x, x), builder.fcmp_ordered("==", x, largest)
            for is_such, first in (is_nan, first_nan), (is_largest, first_largest):
                found = builder.add(j, vectors.first_on(builder.and_(is_such, mask), classes))
                before = builder.load(first)
                builder.store(builder.select(builder.icmp_signed("<", found, before), found, before), first)
        total = vectors.across(builder.fadd, builder.load(total))

        with each_vector() as (j, mask):
            softmax = builder.fdiv(vectors.load(out.at(j), mask), total)
            onehot = builder.select(vectors.only(builder.sub(label, j)), ones, zeros)
            vectors.store(builder.fsub(softmax, onehot), out.at(j), mask)

        first_nan, first_largest = builder.load(first_nan), builder.load(first_largest)
        first = builder.select(builder.icmp_signed("<", first_nan, classes), first_nan, first_largest)
        below = builder.fsub(largest, vectors.broadcast(logits.at(label)))
        below, total = (builder.extract_element(vector, i.type(0)) for vector in (below, total))
        results = below, builder.icmp_signed("==", first, label), total
        return context.make_tuple(builder, signature.return_type, results)

    return types.Tuple((dtype, types.boolean, dtype))(logits, i, label, out), emit


class NumbaBackend(Backend):
    """The compiled functions above."""

    @property
    def compile_seconds(self):
        return compile_seconds()

    def _matmul(self, a, b, bias):
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)
        bias = np.zeros(b.shape[1], b.dtype) if bias is None else np.ascontiguousarray(bias)
        matmul(a, b, bias, out)
        return out

    def _relu(self, z):
        out = np.empty(z.shape, z.dtype)
        relu(z.ravel(), out.ravel())
        return out

    def _relu_grad(self, upstream, activations):
        out = np.empty(upstream.shape, upstream.dtype)
        relu_grad(upstream.ravel(), activations.ravel(), out.ravel())
        return out

    def _softmax_grad(self, logits, labels):
        out = np.empty(logits.shape, logits.dtype)
        loss, correct = softmax_grad(np.ascontiguousarray(logits), labels.astype(np.int64, copy=False), out)
        return loss, correct, out
