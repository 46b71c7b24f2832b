"""Compiled with Numba: a micro-kernel that keeps its accumulators in vector registers, and cache blocking around it.

The product follows Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), in the terms of
BLIS (Van Zee and van de Geijn, 2015). The *micro-kernel* keeps a *tile* of the result, `MR` rows by `TILE_VECTORS`
vectors, in registers for the whole loop over k. Each step loads one row of the panel, broadcasts one element of A for
each row of the tile, and multiplies and adds: 28 multiply-adds for 16 loads on Zen 5 with AVX-512. Around it, B is cut
into blocks that stay in the L2 or L3 cache. *Packing* copies a block into contiguous *panels*, each as wide as a tile.

Goto packs A as well. Here its elements are only ever broadcast, so A can be read in place, with any strides. The hard
case is the transpose of a row-major A, where each step of k is on a different page and needs its own TLB entry. Only
such an A is packed, or prefetched a block ahead, and only on the kinds of CPU where `TUNING` says so.

However the product is blocked, each element of the result is one chain of multiply-adds, which starts from the bias and
runs along k. So its bits depend only on its row of A and its column of B.
"""

import functools
import itertools
import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kernels.backend import Backend
from kernels.compiling import (
    compile_seconds,
    flat_in,
    flat_inout,
    integers_in,
    kernel,
    matrix_in,
    matrix_out,
    row_major_in,
    row_major_inout,
)
from kernels.simd import CACHE_LINE, CPU, REGISTER_BYTES, REGISTERS, Vectors, View, compiler_barrier, emitter, opaque


class Tuning(NamedTuple):
    """How the product is cut for a kind of CPU."""

    rows: int
    """Rows of a tile. The tile, a row of the panel and an element of A must fit in the registers."""
    vectors: int
    """Vectors in a row of a tile."""
    edge_vectors: int
    """Vectors in a row of the narrower tile for the last columns."""
    chain: int
    """Rows of A addressed from one pointer, each by an addition: the length of the dependency chain. A long one takes
    longer than the multiply-adds."""
    row_bytes: int
    """Bytes in a row of a block of B. A wider block needs fewer passes over A, and packs it less often."""
    shallow_depth: int
    """Steps of k in a block for fewer than PACK_ROWS rows. Their results are small: reading and writing them again is
    cheaper than a panel that does not fit in L1, or a B that fills L2."""
    transposed_depth: int
    """Steps of k in a block, where k runs down the columns of a row-major array: x.T dz, for example."""
    few_block_bytes: int
    """Bytes in a block of B for few rows of A, if the rows of B are shorter than a page. A small block stays in L1 for
    all tiles, a large one writes and reads results less often."""
    one_set_rows: int
    """Most rows of A for which B stays in place, if the rows of B are a multiple of 4 KB apart."""
    one_rows: int
    """Rows of B that a single row of A takes at a time. Each is a stream for the hardware prefetcher; more of them load
    and store the result less often."""
    one_vectors: int
    """Vectors of the result that a single row of A has in registers at a time."""
    packs_a: bool = False
    """Whether the transpose of a row-major A (x.T, for example) is packed, one row of tiles at a time. In place, each
    step of k is on a different page, and if the steps are a multiple of 4 KB apart, all map to the same L1 set. If A
    is prefetched as well, it is packed only in that case."""
    prefetches_a: bool = False
    """Whether the next block of such a transpose is prefetched, one line at each step of k, evenly over the tiles."""
    prefetches_results: bool = False
    """Whether the results of the next tile are prefetched."""


# AVX2 on Zen 3: 12 accumulators, two vectors of B and two elements of A.
# - Packing A takes x.T dz from 1.2 times the time of OpenBLAS to 0.95 to 1.0; prefetching it instead did nothing.
# - The wide block takes x y from 1.05 to 1.0 times at 1024 x 1024 x 1024, and x.T y from 1.02 to 0.96 times.
# - Shallow blocks take 32 x 784 times 784 x 128 from 1.2 to 1.0 times.
# - A single row takes 1 x 784 times 784 x 128 and 1 x 2000 times 2000 x 2000 in 0.95 to 1.0 times (without the checks
#   of `Backend.matmul`).
ZEN_3 = Tuning(
    rows=6,
    vectors=2,
    edge_vectors=2,
    chain=1,
    row_bytes=4096,
    shallow_depth=512,
    transposed_depth=512,
    few_block_bytes=32 * 1024,
    one_set_rows=16,
    one_rows=8,
    one_vectors=4,
    packs_a=True,
    prefetches_results=True,
)

# SSE and AVX2 elsewhere. On Zen 5, restricted to AVX2, prefetching A instead of packing it takes x.T dz from 1.03 times
# the time of OpenBLAS to 0.97, and over 60,000 images from 0.99 to 0.94. On an Emerald Rapids, restricted as well, a
# prototype went from 1.17 to 0.97. Leaving B in place for up to 32 rows takes 32 x 1024 times 1024 x 1024 from 1.17 to
# 1.0 times on Zen 5.
AVX2 = ZEN_3._replace(transposed_depth=256, one_set_rows=32, prefetches_a=True)

# NEON: 24 accumulators. Longer chains make LLVM use post-indexed loads (LD1R), which take a multiply-add unit. Judged
# by llvm-mca only; never timed on ARM.
NEON = ZEN_3._replace(vectors=4, prefetches_results=False)

# AVX-512 on Zen 4, judged on Zen 5. A block of 400 KB leaves room in an L2 cache of 1 MB. On Zen 5,
# - prefetching x.T takes x.T dz, over 60,000 images, from 0.92 times the time of OpenBLAS to 0.81;
# - large blocks take 2 x 784 times 784 x 128 from 0.72 to 0.68 times, compared with the choice for AVX2;
# - more rows and vectors at a time take 1 x 784 times 784 x 128 from 0.9 to 0.8 times, 1 x 2000 times 2000 x 2000 from
#   1.3 to 1.1 (without the checks of `Backend.matmul`);
# - leaving B in place for 32 rows, as with AVX2, would take 32 x 2048 times 2048 x 2048 from 0.7 to 1.1 times.
ZEN_4 = Tuning(
    rows=6,
    vectors=4,
    edge_vectors=1,
    chain=6,
    row_bytes=512,
    shallow_depth=800,
    transposed_depth=512,
    few_block_bytes=512 * 1024,
    one_set_rows=16,
    one_rows=16,
    one_vectors=8,
    prefetches_a=True,
)

# AVX-512 on Zen 5. Compared with Zen 4's tiles, each page of x.T serves more multiply-adds: x.T y takes 1.0 instead of
# 1.2 times the time of OpenBLAS at 2048 x 2048 x 2048, and 0.94 instead of 0.98 at 1024 x 1024 x 1024.
ZEN_5 = ZEN_4._replace(rows=14, vectors=2, transposed_depth=400)

# AVX-512 on Intel. The numbers come from a prototype of the 14-row tile on an Emerald Rapids; this code itself has yet
# to run there. x W1 took 0.80 times the time of OpenBLAS, against 0.88 with 6 x 4 tiles. x.T dz took 0.82, against 1.2
# without prefetching and 1.4 in deep blocks. On older cores, such as Skylake and Ice Lake, LLVM hoists the loads of A
# so early that 14 rows spill registers, at half the speed by llvm-mca.
RAPIDS = ZEN_5._replace(transposed_depth=64)
SKYLAKE = RAPIDS._replace(rows=12, chain=4)


def _tuning() -> Tuning:
    """Not tuned at run time: good choices differ by less than the noise. Only the CPU's name tells Intel from Zen."""
    if REGISTER_BYTES < 64:
        return NEON if REGISTERS > 16 else ZEN_3 if CPU in ("znver1", "znver2", "znver3") else AVX2
    if CPU.startswith("znver"):
        return ZEN_4 if CPU == "znver4" else ZEN_5
    return RAPIDS if "rapids" in CPU else SKYLAKE


TUNING = _tuning()
MR = TUNING.rows
TILE_VECTORS, EDGE_VECTORS = TUNING.vectors, TUNING.edge_vectors
TILE_BYTES = TILE_VECTORS * REGISTER_BYTES
EDGE_BYTES = EDGE_VECTORS * REGISTER_BYTES

# Rows of a tile where the rows of A are a multiple of 4 KB apart. All of them map to the same L1 set, which has 12 ways
# on Zen 5 and recent Intel CPUs: 14 rows take 1024 x 1024 x 1024 from 0.94 times the time of OpenBLAS to 1.0.
MR_ON_ONE_SET = min(MR, 12)

# Rows of the narrower tile: at least as many accumulators as multiply-adds can be in flight.
EDGE_MR = 12 // EDGE_VECTORS

# Largest block of B: KC rows of NC_BYTES.
KC = 800
KC_SHALLOW = TUNING.shallow_depth
KC_TRANSPOSED = TUNING.transposed_depth
NC_BYTES = TUNING.row_bytes
PACKS_A, PREFETCHES_A = TUNING.packs_a, TUNING.prefetches_a

# B is packed if at least this many rows of A amortize it, or if each row of B is on its own page: in place, a panel
# would need more dTLB entries than there are. On Zen 3, this takes 32 x 1024 times 1024 x 1024 from 1.8 to 1.2 times
# the time of OpenBLAS.
PACK_ROWS = 16 * MR
PAGE = 4096  # bytes

# Rows of B that are read from left to right at a time: as many streams as the hardware prefetcher can track. Where each
# row is on its own page, packing one panel after the other would read a single line of each page. Software prefetches
# the next rows, which are on other pages. Both were measured by packing B for 16 and 32 rows of A. On Zen 3, whole
# panels took 10 to 20 % longer for 32 x 2000 times 2000 x 2000. On Zen 5, prefetching took 16 x 2000 times 2000 x 2000
# from 1.04 to 0.92 times the time of OpenBLAS with AVX2, and from 0.90 to 0.83 with AVX-512.
STREAMS = 8

# Rows of tiles that A is packed for at a time if its columns are a multiple of 4 KB apart. All of them map to the same
# L1 set. A cache line holds elements of several tiles, and would be evicted before the next one is packed. On Zen 3,
# this takes 1024 x 784, transposed, times 784 x 128 from 1.1 to 1.0 times the time of OpenBLAS.
PACKED_TILES = 8

# With at most FEW_ROWS rows of A, the product is bound by reading B. So B stays in place, and is read from left to
# right; if one tile has all rows of A, only once. If each row of B is on its own page, packing takes so long that up to
# FAR_ROWS rows do the same, or ONE_SET_ROWS if all rows of B map to the same L1 set. A block then has FAR_DEPTH rows of
# B, no more than the dTLB has entries for, or STREAMS rows. On Zen 5, compared with packing, this takes 32 x 2000 times
# 2000 x 2000 from 1.1 to 0.9 times the time of OpenBLAS with AVX2, and from 0.93 to 0.61 with AVX-512.
FEW_ROWS = 8
FAR_ROWS, ONE_SET_ROWS = 128, TUNING.one_set_rows
FAR_DEPTH = 64
FEW_BLOCK_BYTES = TUNING.few_block_bytes

# Such tiles are at least two vectors wide. Their accumulators leave room for a row of the panel and an element of A.
FEW_TOTALS = REGISTERS * 3 // 4
FEW_MR = min(FEW_ROWS, FEW_TOTALS // 2)

# A single row of A needs no tiles. Its result stays in L1, and B is read from left to right. On Zen 3, tiles of
# 8 vectors took 1.2 times as long.
ONE_ROWS = TUNING.one_rows
ONE_VECTORS = TUNING.one_vectors

# Few rows do not amortize packing a B whose columns are contiguous: with one row on Zen 3, that would take 2.8 times
# the time of OpenBLAS. So a few vectors of columns at a time are transposed in registers. Up to DOT_MR rows take two
# vectors: each broadcast serves both. Four took longer, also with AVX2, which then reads B from 32 places at once. More
# rows have registers for one vector only: with two, on Zen 5, 8 x 784 times 784 x 128 would take 1.5 times as long with
# AVX2; with AVX-512 it would gain a tenth, but 8 x 2000 times 2000 x 500 would lose a fifth. If the columns are a
# multiple of 4 KB apart, all of them map to the same L1 set. More than 16 evict each other: one vector then takes
# 1 x 1024 times 1024 x 1024 from 4.7 to 1.8 times the time of OpenBLAS on Zen 5 with AVX-512. If each column is on its
# own page, software prefetches it, DOT_AHEAD blocks ahead: this takes 2 x 2000 times 2000 x 2000 from 0.25 to 0.17
# times.
DOT_VECTORS = 2
DOT_MR = 6
DOT_AHEAD = 4
DOT_ON_ONE_SET = 16


# Micro-kernels ----------------------------------------------------------------------------------------------


@emitter
def tiles(vectors, builder, a, i, rows, packed, is_packed, panels, bias, out, j, first):
    """Add the product of A and panels of B to tiles of the result, side by side.

    Parameters
    ----------
    a
        (m, k) array, of which the tiles use `rows` rows from `i` on: 1 to MR (EDGE_MR in `edge_tiles`).
    packed, is_packed
        (k, MR) array, and whether these rows are packed there.
    panels
        (panels, k, columns) array; rows of a panel are contiguous and TILE_VECTORS vectors long.
    bias
        (n,) array: the initial value of each row if `first`. Otherwise the tiles start from the content of `out`.
    out
        (m, n) row-major array; element (i, j) is the upper left corner of panel 0's tile.
    """
    _emit_tiles(vectors, builder, a, i, rows, panels, bias, out, j, first, MR, TILE_VECTORS, (packed, is_packed))


@emitter
def edge_tiles(vectors, builder, a, i, rows, panels, bias, out, j, first):
    """Like `tiles`, for panels of EDGE_VECTORS vectors whose last columns may be outside `out`."""
    _emit_tiles(vectors, builder, a, i, rows, panels, bias, out, j, first, EDGE_MR, EDGE_VECTORS)


@emitter
def few_tiles(vectors, builder, a, b, start, stop, out):
    """Add the product of A's columns and B's rows, from `start` to `stop` - 1, to the result.

    A has at most FEW_MR rows. The rows of all three arrays are contiguous.
    """
    columns, depth = out.shape[1], builder.sub(stop, start)
    a = a.part(0, start)
    for count in range(1, FEW_MR + 1):
        most = 2 ** int(math.log2(FEW_TOTALS / max(count, 2)))
        whole = builder.and_(columns, start.type(-most * vectors.lanes))
        with builder.if_then(builder.icmp_signed("==", a.shape[0], start.type(count))):
            for left, right, width in (start.type(0), whole, most), (whole, columns, 1):
                step = start.type(width * vectors.lanes)
                with cgutils.for_range_slice(builder, left, right, step, start.type) as (j, _):
                    masks = [vectors.first(builder.sub(columns, j))] if width == 1 else [None] * width
                    panel = View(builder, b.at(start, j), [depth], b.strides)
                    target = out.part(0, j)
                    prefetch = _later_panel(builder, vectors, panel, width)
                    totals = _emit_sums(builder, vectors, a, panel, target, count, masks, prefetch, True)
                    _emit_stores(builder, vectors, totals, target, masks, None)


@emitter
def add_rows(vectors, builder, a, b, p, rows, out):
    """Add the product of a single row of A and `rows` rows of B, from row `p` on, to the result.

    There are ONE_ROWS rows, or one, each contiguous. ONE_VECTORS vectors of the result are in registers at a time.
    """
    columns = out.shape[1]
    whole = builder.and_(columns, p.type(-ONE_VECTORS * vectors.lanes))
    for count in ONE_ROWS, 1:
        with builder.if_then(builder.icmp_signed("==", rows, p.type(count))):
            x = [vectors.broadcast(a.at(0, builder.add(p, p.type(r)))) for r in range(count)]
            for start, stop, width in (p.type(0), whole, ONE_VECTORS), (whole, columns, 1):
                step = p.type(width * vectors.lanes)
                with cgutils.for_range_slice(builder, start, stop, step, p.type) as (j, _):
                    mask = vectors.first(builder.sub(columns, j)) if width == 1 else None
                    totals = [vectors.load(out.at(0, j), mask, column=c) for c in range(width)]
                    for r in range(count):
                        row = b.at(builder.add(p, p.type(r)), j)
                        for c in range(width):
                            totals[c] = vectors.fma(x[r], vectors.load(row, mask, column=c), totals[c])
                    for c in range(width):
                        vectors.store(totals[c], out.at(0, j), mask, column=c)


@emitter
def dot_tile(vectors, builder, a, b, out, j, chosen):
    """Add the product of A and `chosen` vectors of columns of B to the result: one, or DOT_VECTORS.

    The first column is `j`. There are at most FEW_ROWS rows, and DOT_MR for more than one vector. Each is contiguous,
    and so are the columns of `b`, as long as a multiple of a vector. Square blocks are transposed in registers.
    """
    size = j.type(REGISTER_BYTES // vectors.lanes)  # strides known at compile time need no multiplication
    a = View(builder, a.at(), a.shape, [a.strides[0], size])
    b = View(builder, b.at(0, j), b.shape, [size, b.strides[1]])
    out = View(builder, out.at(0, j), (), out.strides)
    for count in range(1, FEW_ROWS + 1):
        for width in {dot_vectors(count, vectors.lanes, stride) for stride in (1, PAGE)}:
            is_height = builder.icmp_signed("==", a.shape[0], j.type(count))
            is_width = builder.icmp_signed("==", chosen, chosen.type(width))
            with builder.if_then(builder.and_(is_height, is_width)):
                _emit_dots(builder, vectors, a, b, out, count, width)


def _emit_dots(builder, vectors, a, b, out, rows, width):
    """Emit the loop over k for a tile of `rows` rows and `width` vectors, one square block after the other."""
    lanes, integer = vectors.lanes, b.strides[1].type
    is_far = builder.icmp_signed(">=", b.strides[1], integer(PAGE))
    grid = list(itertools.product(range(rows), range(width)))
    totals = {(r, c): vectors.variable(vectors.load(out.at(r), column=c)) for r, c in grid}
    with cgutils.for_range_slice(builder, integer(0), b.shape[0], integer(lanes), integer) as (k, _):
        with builder.if_then(is_far):
            later = b.part(builder.add(k, integer(DOT_AHEAD * lanes)))
            for c in range(width * lanes):
                vectors.prefetch(later.at(0, c), level=1)
        columns = zip(*(vectors.transposed(b.part(k, c * lanes)) for c in range(width)), strict=True)
        for step, row in enumerate(columns):
            for r in range(rows):
                x = vectors.broadcast(a.at(r, builder.add(k, integer(step))))
                for c in range(width):
                    builder.store(vectors.fma(x, row[c], builder.load(totals[r, c])), totals[r, c])
    for (r, c), total in totals.items():
        vectors.store(builder.load(total), out.at(r), column=c)


def _emit_tiles(vectors, builder, a, i, rows, panels, bias, out, j, first, most, width, packing=None):
    """Emit a loop over the panels for each number of rows from 1 to `most`, and the branch that selects one.

    Without `packing`, the last columns may be outside the result.
    """
    size = j.type(REGISTER_BYTES // vectors.lanes)
    here = a.part(i)
    if packing and PACKS_A:
        packed, is_packed = packing
        strides = [builder.select(is_packed, *pair) for pair in zip(reversed(packed.strides), a.strides, strict=True)]
        here = View(builder, builder.select(is_packed, packed.at(), here.at()), a.shape, strides)
    for count in range(1, most + 1):
        with builder.if_then(builder.icmp_signed("==", rows, j.type(count))):
            for is_chosen, view in _layouts(builder, here, size, count == MR):
                with builder.if_then(is_chosen), cgutils.for_range(builder, panels.shape[0]) as panel_loop:
                    p = panel_loop.index
                    column = builder.add(j, builder.mul(p, j.type(width * vectors.lanes)))
                    # The bias is a matrix with a row stride of 0: the same load serves it and the result so far.
                    before = View(
                        builder,
                        builder.select(first, bias.at(column), out.at(i, column)),
                        (),
                        [builder.select(first, j.type(0), out.strides[0])],
                    )
                    target, prefetch, masks, has_room = out.part(i, column), None, [None] * width, None
                    if packing and PREFETCHES_A and view.strides[1] is not size:
                        prefetch = _next_block(builder, vectors, a, i, rows, panels, p)
                    if packing and TUNING.prefetches_results:
                        for r, byte in itertools.product(range(MR), range(0, TILE_BYTES, CACHE_LINE)):
                            vectors.prefetch(builder.gep(target.at(r), [j.type(TILE_BYTES + byte)]), level=1)
                    if not packing:
                        prefetch = _next_rows(builder, vectors, a, i)
                        columns = builder.sub(out.shape[1], column)
                        masks = [vectors.first(builder.sub(columns, j.type(c * vectors.lanes))) for c in range(width)]
                        rest = builder.mul(builder.sub(out.shape[0], builder.add(i, rows)), out.strides[0])
                        rest = builder.add(rest, builder.mul(columns, size))
                        has_room = builder.icmp_signed(">=", rest, j.type(width * REGISTER_BYTES))
                    totals = _emit_sums(builder, vectors, view, panels.part(p, drop=1), before, count, masks, prefetch)
                    _emit_stores(builder, vectors, totals, target, masks, has_room)


def _layouts(builder, a, size, is_versioned):
    """Loop versioning: views of A with strides that LLVM knows, each with its condition; an element takes `size` bytes.

    With them, the addresses of a tile need no additions. On Zen 3, those took up to 7 % of the time. Only tiles of MR
    rows get versions: MR_ON_ONE_SET rows, versioned, took twice as long on Zen 5, and EDGE_MR rows gained nothing. On
    NEON, a row-major A would make LLVM use post-indexed loads (LD1R).
    """
    if not is_versioned:
        return [(ir.Constant(ir.IntType(1), 1), a)]
    known = [] if TUNING == NEON else [(a.strides[0], size)]
    if PACKS_A:
        known.append((size, builder.mul(size, size.type(MR))))
    layouts, is_other = [], ir.Constant(ir.IntType(1), 1)
    for strides in known:
        pairs = zip(strides, a.strides, strict=True)
        matches = functools.reduce(builder.and_, (builder.icmp_signed("==", *pair) for pair in pairs))
        layouts.append((matches, View(builder, a.at(), a.shape, strides)))
        is_other = builder.and_(is_other, builder.not_(matches))
    return [*layouts, (is_other, a)]


# Each of these returns a function that emits prefetches for one step of the loop over k.


def _next_block(builder, vectors, a, i, rows, panels, p):
    """Prefetch the tile's share of the next block of A.

    If A is row-major, all addresses are the same: the hardware prefetcher does the job.
    """
    count, k = panels.shape[:2]
    shares = builder.mul(a.shape[0], count)  # a tile has one for each of its rows
    before = builder.add(builder.mul(i, count), builder.mul(p, rows))
    piece = builder.sdiv(builder.mul(a.strides[1], rows), shares)  # bytes
    start = builder.sdiv(builder.mul(builder.mul(a.strides[1], k), before), shares)
    share = View(builder, builder.gep(a.at(0, k), [start]), (k,), (piece,))
    return lambda step: vectors.prefetch(share.at(step), level=2)


def _next_rows(builder, vectors, a, i):
    """Prefetch the rows of A after the next EDGE_MR, spread evenly.

    On Zen 3 this takes 938 x 128 times 128 x 10 from 70 to 60 µs, if A is not in L2.
    """
    k = builder.select(builder.icmp_signed(">", a.shape[1], i.type(0)), a.shape[1], i.type(1))
    piece = builder.sdiv(builder.mul(i.type(EDGE_MR), a.strides[0]), k)  # bytes; zero in most transposed arrays
    rows = View(builder, a.at(builder.add(i, i.type(EDGE_MR))), (), [piece])
    return lambda step: vectors.prefetch(rows.at(step), level=2)


def _later_panel(builder, vectors, panel, width):
    """Prefetch the panel after the next, if each row of B is on its own page. Otherwise, the hardware prefetcher does.

    On Zen 5, this takes 8 x 2000 times 2000 x 2000 from 0.65 to 0.3 times the time of OpenBLAS.
    """

    def prefetch(step):
        with builder.if_then(builder.icmp_signed(">=", panel.strides[0], step.type(PAGE))):
            for byte in range(0, width * REGISTER_BYTES, CACHE_LINE):
                later = builder.gep(panel.at(step), [step.type(2 * width * REGISTER_BYTES + byte)])
                vectors.prefetch(later, level=1)

    return prefetch


def _emit_sums(builder, vectors, a, panel, before, rows, masks, prefetch=None, is_ragged=False):
    """Emit the loop over k for a tile of `rows` rows, with one vector for each of `masks`; returns the accumulators.

    Vectors of the panel are loaded as a whole, unless it `is_ragged`.
    """
    b_masks = masks if is_ragged else [None] * len(masks)
    grid = [(r, c) for r in range(rows) for c in range(len(masks))]
    totals = {(r, c): vectors.variable(vectors.load(before.at(r), masks[c], column=c)) for r, c in grid}
    parts = [a if r == 0 else opaque(builder, a.part(r)) for r in range(0, rows, TUNING.chain)]
    with cgutils.for_range(builder, panel.shape[0]) as loop:
        if prefetch:
            prefetch(loop.index)
            compiler_barrier(builder, "convergent")  # unrolled twice, it would spill registers
        a_at = [parts[r // TUNING.chain].at(r % TUNING.chain, loop.index) for r in range(rows)]
        b_at = panel.at(loop.index)
        if rows <= len(masks):  # wide and low: keep A in registers, and load one vector of B at a time
            x = [vectors.broadcast(pointer) for pointer in a_at]
            for c in range(len(masks)):
                compiler_barrier(builder)
                b = vectors.load(b_at, b_masks[c], column=c)
                for r in range(rows):
                    builder.store(vectors.fma(x[r], b, builder.load(totals[r, c])), totals[r, c])
        else:
            b = [vectors.load(b_at, b_masks[c], column=c) for c in range(len(masks))]
            for r in range(rows):
                x = vectors.broadcast(a_at[r])
                for c in range(len(masks)):
                    builder.store(vectors.fma(x, b[c], builder.load(totals[r, c])), totals[r, c])
    return {position: builder.load(total) for position, total in totals.items()}


def _emit_stores(builder, vectors, totals, out, masks, has_room):
    """Emit the stores of a tile, masked or not.

    If whole vectors stay within the array (`has_room`), lanes past the last column are loaded and stored again: they
    belong to the next rows. On Zen 3, 938 x 128 times 128 x 10 takes 0.9 of the time that it takes with masked stores.
    """

    def store(vectors_at, masks):
        for (r, c), vector in vectors_at.items():
            vectors.store(vector, out.at(r), masks[c], column=c)

    if has_room is None:
        store(totals, masks)
        return
    with builder.if_else(has_room) as (whole, near_end):
        with whole:  # all loads come before the stores, so that no load waits for a store that it overlaps
            blended = {
                (r, c): builder.select(masks[c], total, vectors.load(out.at(r), column=c))
                for (r, c), total in totals.items()
            }
            store(blended, [None] * len(masks))
        with near_end:
            store(totals, masks)


@emitter
def pack(vectors, builder, b, j, panel):
    """Pack a panel from column `j` of `b` on, whose rows are contiguous; missing columns become zeros."""
    emit_packing(vectors, builder, b, j, panel, TILE_VECTORS, STREAMS)


@emitter
def pack_edge(vectors, builder, b, j, panel):
    """Like `pack`, for a panel of EDGE_VECTORS vectors."""
    emit_packing(vectors, builder, b, j, panel, EDGE_VECTORS)


def emit_packing(vectors, builder, b, j, panel, width, ahead=0):
    """Emit the loop over the rows of B, each `width` vectors in the panel; prefetch the row `ahead` of each."""
    columns = builder.sub(b.shape[1], j)
    masks = [vectors.first(builder.sub(columns, j.type(c * vectors.lanes))) for c in range(width)]
    # On NEON, a masked load compiles to a branch per lane.
    with builder.if_else(builder.icmp_signed(">=", columns, j.type(width * vectors.lanes))) as (whole, ragged):
        for branch, chosen in (whole, [None] * width), (ragged, masks):
            with branch, cgutils.for_range(builder, b.shape[0]) as loop:
                for byte in range(0, width * REGISTER_BYTES if ahead else 0, CACHE_LINE):
                    later = b.at(builder.add(loop.index, j.type(ahead)), j)
                    vectors.prefetch(builder.gep(later, [j.type(byte)]), level=1)
                for c, mask in enumerate(chosen):
                    vectors.store(vectors.load(b.at(loop.index, j), mask, column=c), panel.at(loop.index), column=c)


@emitter
def pack_transposed(vectors, builder, b, rows, j, panel, column):
    """Pack `rows` rows of one vector of columns, from column `j` of `b` on, whose columns are contiguous.

    The rows are a multiple of a vector's lanes: square blocks are transposed in registers.
    """
    size = j.type(REGISTER_BYTES // vectors.lanes)  # strides known at compile time need no multiplication
    source = View(builder, b.at(0, j), (), (size, b.strides[1]))
    with cgutils.for_range_slice(builder, j.type(0), rows, j.type(vectors.lanes), j.type) as (row, _):
        target = panel.part(row, column)
        for r, vector in enumerate(vectors.transposed(source.part(row))):
            vectors.store(vector, target.at(r))


@emitter
def pack_a(vectors, builder, a, i, packed):
    """Set row k of `packed`, (k, MR), to elements i to i + MR of column k of `a`, whose columns are contiguous.

    It stores whole vectors, so `packed` needs room for one more vector at its end.
    """
    starts = range(0, MR, vectors.lanes)
    rest = builder.sub(a.shape[0], i)
    masks = [vectors.first(builder.sub(rest, i.type(start))) for start in starts]
    is_whole = builder.icmp_signed(">=", rest, i.type(len(starts) * vectors.lanes))
    with builder.if_else(is_whole) as (whole, ragged):
        for branch, chosen in (whole, [None] * len(starts)), (ragged, masks):
            with branch, cgutils.for_range(builder, a.shape[1]) as loop:
                for c, mask in enumerate(chosen):
                    vector = vectors.load(a.at(i, loop.index), mask, column=c)
                    vectors.store(vector, packed.at(loop.index), column=c)


# Cache blocking ---------------------------------------------------------------------------------------------


@kernel(matrix_in, matrix_in, flat_in, matrix_out)
def matmul(a, b, bias, out):
    """out = A B + bias, block by block of B."""
    m, n = out.shape
    # A narrow result has no full panel. Its transpose does, and can read the rows of A.T in place.
    swap = n * b.itemsize < TILE_BYTES <= m * a.itemsize and a.strides[0] == a.itemsize
    if swap:
        left, right, result = b.T, a.T, np.empty((n, m), out.dtype)
        for j in range(n):
            result[j].fill(bias[j])
    else:
        left, right, result = a, b, out
    columns_are_contiguous = right.strides[0] == right.itemsize != right.strides[1]
    most, _ = limits_in_place(right)
    if len(left) <= most:
        if not swap:
            result[:] = bias
        if columns_are_contiguous:
            add_contiguous_columns(left, right, result)
        else:
            add_contiguous_rows(left, right if right.strides[1] == right.itemsize else right.copy(), result)
    else:
        add_blocks(left, right, bias, result, not swap)
    if swap:
        for i in range(m):
            for j in range(n):
                out[i, j] = result[j, i]


@njit
def add_blocks(a, b, bias, out, from_bias):
    """Add A B, block by block of B, to `out`, which starts from the bias if `from_bias`."""
    rows, k = a.shape
    columns = b.shape[1]
    is_transposed = a.strides[0] == a.itemsize != a.strides[1]
    most = KC_TRANSPOSED if is_transposed else KC_SHALLOW if rows < PACK_ROWS else KC
    nc = NC_BYTES // b.itemsize
    kc = max(1, -(-k // -(-max(k, 1) // most)))  # blocks of equal size, give or take a row
    for j in range(0, columns, nc):
        for p in range(0, max(k, 1), kc):  # at least once: with k = 0 the result is the bias
            block, part = b[p : p + kc, j : j + nc], out[:, j : j + nc]
            add_block(a[:, p : p + kc], block, bias[j:], part, p == 0 and from_bias)


@njit
def add_block(a, b, bias, out, first):
    """Add A B, where B is a block that fits in cache, to the bias if it is the `first` block in k, else to `out`."""
    m, n = out.shape
    width = TILE_BYTES // b.itemsize
    edge = n - n % width
    panels = panels_of(b[:, :edge], width, m)
    on_one_set = a.strides[1] % PAGE == 0
    is_packed = PACKS_A and (on_one_set or not PREFETCHES_A)
    is_packed = is_packed and len(panels) > 2 and a.strides[0] == a.itemsize != a.strides[1]
    ahead, depth = (PACKED_TILES, STREAMS) if on_one_set else (1, max(len(b), 1))
    packed = np.empty((ahead, len(b) + REGISTER_BYTES if is_packed else 0, MR), b.dtype)
    step = tile_rows(m, MR if a.strides[0] % PAGE else MR_ON_ONE_SET)
    for i in range(0, m, step):
        t = i // step % ahead
        if is_packed and t == 0:
            for start in range(0, len(b), depth):
                for row in range(i, min(i + ahead * step, m), step):
                    pack_a(a[:, start : start + depth], row, packed[(row - i) // step, start:])
        tiles(a, i, min(step, m - i), packed[t], is_packed, panels, bias, out, 0, first)
    add_edge(a, b, bias, out, edge, first)


@njit
def tile_rows(m, most):
    """Rows of a tile if A has `m` and a tile at most `most`: tiles of equal height, give or take a row."""
    return -(-m // -(-m // most)) if m else 1


@njit
def limits_in_place(b):
    """The most rows of A for which B stays in place, and the rows of B in a block."""
    if b.strides[1] != b.itemsize or b.strides[0] < PAGE:
        return FEW_ROWS, max(STREAMS, FEW_BLOCK_BYTES // max(b.strides[0], 1))
    return (FAR_ROWS, FAR_DEPTH) if b.strides[0] % PAGE else (ONE_SET_ROWS, STREAMS)


@njit
def add_contiguous_rows(a, b, out):
    """Add A B to `out`, for few rows of A. The rows of B are contiguous."""
    if len(a) == 1:
        add_to_one_row(a, b, out)
        return
    a = a if a.strides[1] == a.itemsize else a.copy()
    m, k = a.shape
    _, depth = limits_in_place(b)
    step = tile_rows(m, FEW_MR)
    for start in range(0, k, depth):
        for i in range(0, m, step):
            few_tiles(a[i : i + step], b, start, min(start + depth, k), out[i : i + step])


@njit
def add_to_one_row(a, b, out):
    """Like `add_contiguous_rows`, for a single row of A."""
    whole = len(b) - len(b) % ONE_ROWS
    for p in range(0, whole, ONE_ROWS):
        add_rows(a, b, p, ONE_ROWS, out)
    for p in range(whole, len(b)):
        add_rows(a, b, p, 1, out)


@njit
def add_contiguous_columns(a, b, out):
    """Add A B to `out`, for at most FEW_ROWS rows of A. The columns of B are contiguous."""
    a = a if a.strides[1] == a.itemsize else a.copy()
    m, (k, n) = len(a), b.shape
    lanes = REGISTER_BYTES // b.itemsize
    width = dot_vectors(m, lanes, b.strides[1])
    deep, edge = k - k % lanes, n - n % (width * lanes)
    for j in range(0, edge, width * lanes):
        dot_tile(a, b[:deep], out, j, width)
    add_copied(a[:, deep:], b[deep:, :edge], out[:, :edge])
    add_copied(a, b[:, edge:], out[:, edge:])


@register_jitable
def dot_vectors(rows, lanes, stride):
    """Vectors of columns that `dot_tile` takes at a time, by the rows of A and the bytes between columns of B."""
    is_on_one_set = stride % PAGE == 0 and DOT_VECTORS * lanes > DOT_ON_ONE_SET
    return 1 if rows > DOT_MR or is_on_one_set else DOT_VECTORS


@njit
def add_copied(a, b, out):
    """Add A B to `out`, for few rows of A and a small B, which is copied to have contiguous rows."""
    if b.size:
        add_contiguous_rows(a, b.copy(), out)


@njit
def add_edge(a, b, bias, out, edge, first):
    """Like `add_block`, for the columns from `edge` on."""
    m = len(out)
    width = EDGE_BYTES // b.itemsize
    panels = panels_of(b[:, edge:], width, m)
    for i in range(0, m, EDGE_MR):
        edge_tiles(a, i, min(EDGE_MR, m - i), panels, bias, out, edge, first)


@njit
def panels_of(b, width, m):
    """Panels of `width` columns for `m` rows of A, (panel, k, column): in place, or packed and zero-padded."""
    k, n = b.shape
    contiguous = b.strides[1] == b.itemsize
    if contiguous and m < PACK_ROWS and b.strides[0] < PAGE and n % width == 0:
        return as_strided(b, (n // width, k, width), (width * b.itemsize, b.strides[0], b.itemsize))
    panels = np.empty((-(-n // width), k, width), b.dtype)
    step = STREAMS if contiguous and b.strides[0] >= PAGE else max(k, 1)
    for row in range(0, k, step):
        rows = b[row : row + step]
        for p in range(len(panels)):
            panel = panels[p, row : row + step]
            if contiguous and width == TILE_BYTES // b.itemsize:
                pack(rows, p * width, panel)
            elif contiguous:
                pack_edge(rows, p * width, panel)
            else:
                pack_columns(rows, p * width, panel)
    return panels


@njit
def pack_columns(b, j, panel):
    """Like `pack`, for rows that are not contiguous: in square blocks if the columns are, else element by element."""
    k, n = b.shape
    lanes = REGISTER_BYTES // b.itemsize
    for column in range(0, panel.shape[1], lanes):
        whole = 0
        if b.strides[0] == b.itemsize and j + column + lanes <= n:
            whole = k - k % lanes
            pack_transposed(b, whole, j + column, panel, column)
        for c in range(column, column + lanes):
            for row in range(whole, k):
                panel[row, c] = b[row, j + c] if j + c < n else 0


# The other kernels, and the update ---------------------------------------------------------------------------


@kernel(row_major_inout)
def relu(z):
    """z = max(z, 0); NaN stays NaN."""
    zero_negative(z.ravel())


@kernel(row_major_inout, row_major_in)
def relu_grad(upstream, activations):
    """Set `upstream` to 0 where the activation is not positive."""
    zero_inactive(upstream.ravel(), activations.ravel())


@emitter
def zero_negative(vectors, builder, z):
    """Set elements to 0, unless they are positive or NaN."""
    _emit_zeroing(vectors, builder, z, z, builder.fcmp_unordered)


@emitter
def zero_inactive(vectors, builder, upstream, activations):
    """Set elements of `upstream` to 0, unless the activation is positive."""
    _emit_zeroing(vectors, builder, upstream, activations, builder.fcmp_ordered)


def _emit_zeroing(vectors, builder, values, others, is_greater):
    """Emit a loop that sets elements of `values` to 0, unless those of `others` are greater than 0.

    Without the barrier, LLVM turns load, select and store into a masked store. With AVX2, that is slow: on Zen 3,
    `relu` took 2.5 times as long.
    """
    (size,), zeros = values.shape, vectors.constant(0)
    whole = builder.and_(size, size.type(-vectors.lanes))
    for start, stop in (size.type(0), whole), (whole, size):
        with cgutils.for_range_slice(builder, start, stop, size.type(vectors.lanes), size.type) as (i, _):
            mask = vectors.first(builder.sub(size, i)) if start is whole else None
            value, other = (vectors.load(view.at(i), mask) for view in (values, others))
            compiler_barrier(builder)
            vectors.store(builder.select(is_greater(">", other, zeros), value, zeros), values.at(i), mask)


@kernel(flat_inout, flat_in, lambda dtype: dtype)
def subtract(parameter, gradient, factor):
    """Subtract `factor` times the gradient, in one pass.

    Not contracted to an FMA: the product is rounded first, as in NumPy's two passes.
    """
    for i in range(len(parameter)):
        parameter[i] -= factor * gradient[i]


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
        # One logarithm for many rows: the log of a product is the sum of the logs.
        product *= total
        if not product < 1e200:
            loss += math.log(product)
            product = 1.0
    return loss + math.log(product), correct


@intrinsic
def softmax_grad_row(typing_context, logits, i, label, out):
    """Set row `i` of `out` to softmax - onehot, vector by vector.

    Lanes past the end hold the identity of each reduction.

    Returns
    -------
    tuple[float, bool, float]
        How far the label's logit is below the largest; whether the label is the first largest (NaN counts as the
        largest); the sum of the exponentials.
    """
    dtype = logits.dtype

    def emit(context, builder, signature, arguments):
        _, i, label, _ = arguments
        logits, out = (View.of(context, builder, signature.args[n], arguments[n]) for n in (0, 3))
        vectors = Vectors(context, builder, dtype)
        rows, classes = logits.shape
        rest = builder.mul(builder.sub(rows, i), classes)
        logits, out = logits.part(i, drop=1), out.part(i, drop=1)
        lowest, zeros, ones = (vectors.constant(value) for value in (-math.inf, 0, 1))

        @contextmanager
        def each_vector():
            with cgutils.for_range_slice(builder, i.type(0), classes, i.type(vectors.lanes), i.type) as (j, _):
                yield j, vectors.first(builder.sub(classes, j))

        def either(j, whole, masked):
            """Use whole vectors, which may reach into the next rows (written later), except at the end of the array.

            On Zen 3, rows of 10 classes take two thirds of the time of masked stores.
            """
            results = []
            is_whole = builder.icmp_signed("<=", builder.add(j, j.type(vectors.lanes)), rest)
            with builder.if_else(is_whole) as branches:
                for branch, emit_branch in zip(branches, (whole, masked), strict=True):
                    with branch:
                        results.append((emit_branch(), builder.block))
            return results

        def load(view, j, mask):
            results = either(j, lambda: vectors.load(view.at(j)), lambda: vectors.load(view.at(j), mask))
            vector = builder.phi(vectors.type)
            for result in results:
                vector.add_incoming(*result)
            return vector

        def store(vector, view, j, mask):
            either(j, lambda: vectors.store(vector, view.at(j)), lambda: vectors.store(vector, view.at(j), mask))

        largest = vectors.variable(lowest)
        with each_vector() as (j, mask):
            x = builder.select(mask, load(logits, j, mask), lowest)
            builder.store(vectors.maximum(x, builder.load(largest)), largest)
        largest = vectors.across(vectors.maximum, builder.load(largest))

        total = vectors.variable(zeros)
        first_nan, first_largest = (cgutils.alloca_once_value(builder, classes) for _ in range(2))
        with each_vector() as (j, mask):
            x = load(logits, j, mask)
            exponentials = builder.select(mask, vectors.exp(builder.fsub(x, largest)), zeros)
            store(exponentials, out, j, mask)
            builder.store(builder.fadd(builder.load(total), exponentials), total)
            is_nan, is_largest = builder.fcmp_unordered("uno", x, x), builder.fcmp_ordered("==", x, largest)
            for matches, first in (is_nan, first_nan), (is_largest, first_largest):
                index = builder.add(j, vectors.first_on(builder.and_(matches, mask), classes))
                before = builder.load(first)
                builder.store(builder.select(builder.icmp_signed("<", index, before), index, before), first)
        total = vectors.across(builder.fadd, builder.load(total))

        with each_vector() as (j, mask):
            softmax = builder.fdiv(load(out, j, mask), total)
            onehot = builder.select(vectors.only(builder.sub(label, j)), ones, zeros)
            store(builder.fsub(softmax, onehot), out, j, mask)

        first_nan, first_largest = builder.load(first_nan), builder.load(first_largest)
        first = builder.select(builder.icmp_signed("<", first_nan, classes), first_nan, first_largest)
        below = builder.fsub(largest, vectors.broadcast(logits.at(label)))
        below, total = (builder.extract_element(vector, i.type(0)) for vector in (below, total))
        results = below, builder.icmp_signed("==", first, label), total
        return context.make_tuple(builder, signature.return_type, results)

    return types.Tuple((dtype, types.boolean, dtype))(logits, i, label, out), emit


class NumbaBackend(Backend):
    """The compiled functions above."""

    # Machine code does not check dimensions; the base class has. `ascontiguousarray` also turns subclasses into plain
    # arrays of as many dimensions, where `ravel` of an np.matrix still has two.

    @property
    def compile_seconds(self) -> float:
        return compile_seconds()

    def _matmul(self, a: Any, b: NDArray, bias: NDArray | None) -> NDArray:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)
        bias = np.zeros(b.shape[1], b.dtype) if bias is None else np.ascontiguousarray(bias)
        matmul[b.dtype](a, b, bias, out)
        return out

    def _relu(self, z: NDArray) -> NDArray:
        z = np.ascontiguousarray(z)
        relu[z.dtype](z)
        return z

    def _relu_grad(self, upstream: NDArray, activations: NDArray) -> NDArray:
        upstream = np.ascontiguousarray(upstream)
        relu_grad[upstream.dtype](upstream, np.ascontiguousarray(activations))
        return upstream

    def _softmax_grad(self, logits: NDArray, labels: NDArray[np.integer]) -> tuple[float, int, NDArray]:
        out = np.empty(logits.shape, logits.dtype)
        logits, labels = np.ascontiguousarray(logits), np.ascontiguousarray(labels, np.int64)
        loss, correct = softmax_grad[logits.dtype](logits, labels, out)
        return loss, correct, out

    def _update(self, parameter: NDArray, gradient: NDArray, factor: float) -> None:
        if parameter.flags.carray and gradient.flags.carray:
            subtract[parameter.dtype](np.asarray(parameter).reshape(-1), np.asarray(gradient).reshape(-1), factor)
        else:
            super()._update(parameter, gradient, factor)
