"""The steps of the ladder: one matrix product, from three Python loops to BLAS speed, one idea per step.

``python -m kernels.ladder`` runs them, and ``--asm`` shows the machine code. README.md beside this file explains each
step. All of them compute ``out = a @ b`` for row-major arrays of any shape and one dtype, float32 or float64.

Numba compiles a function to LLVM IR, and LLVM vectorizes the loops. Two things limit it. Floating-point addition is not
associative, so LLVM must round exactly as the source says. ``contract`` relaxes one rule: a product and a sum may be
fused into one instruction that rounds once. And in Python a negative index counts from the end, so Numba checks for it,
unless the index is unsigned or starts at 0.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import config, njit

from kernels.compiling import flat_in, kernel, matrix_out, row_major_in
from kernels.naive_backend import matmul as naive_matmul
from kernels.numba_backend import matmul as numba_matmul
from kernels.simd import aligned_empty

# Shape of a tile of the result: 8 KB, a quarter of the smallest L1 caches.
TILE_ROWS = 16
TILE_COLUMNS = 128

# The cores that this process may run on.
CORES: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

FUSED: dict[str, Any] = {"fastmath": {"contract"}}
product = kernel(row_major_in, row_major_in, matrix_out, **FUSED)
jit = njit(nogil=True, **FUSED)  # for the functions that a step calls
aligned = jit(aligned_empty)


def loops(a, b, out):
    """Step 1: three Python loops, on lists, which Python indexes faster than arrays.

    Limited by the interpreter. For each multiply-add it looks up names, follows pointers, checks types and creates two
    float objects.
    """
    naive_matmul(a, b, [0.0] * len(b[0]), out)


three_loops = kernel(row_major_in, row_major_in, flat_in, matrix_out)(naive_matmul)


def compiled(a, b, out):
    """Step 2: the same source, compiled. The types are known, so a multiply-add is one multiplication and one addition.

    Limited by latency. With a single accumulator, each addition waits 3 or 4 cycles for the one before, and LLVM must
    not reorder them. Many columns make it worse: `b` is read down a column, a new cache line for each element.
    If its rows are a power of two apart, these lines share a few sets of the cache, and evict each other.
    """
    three_loops(a, b, np.zeros(b.shape[1], b.dtype), out)


@product
def reordered(a, b, out):
    """Step 3: loop interchange, k before j. The inner loop runs along rows, and its additions are independent.

    So LLVM vectorizes it. Limited by loads and stores: each multiply-add loads `b` and `out`, and stores `out`.
    """
    m, n = out.shape
    out[:] = 0
    for i in range(m):
        for k in range(len(b)):
            for j in range(n):
                out[i, j] += a[i, k] * b[k, j]


@product
def unrolled(a, b, out):
    """Step 4: loop unrolling, four steps of k at once. `out` is loaded and stored once per four multiply-adds.

    Limited by the loads of `b`, one per multiply-add. All come from L2: between two uses of a row of `b`, all its other
    rows stream through L1 and evict it.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    out[:] = 0
    for i in range(m):
        for k in range(0, whole, 4):
            x = four_across(a, i, k)
            for j in range(n):
                out[i, j] = add_products(out[i, j], x, four_down(b, k, j))
        for k in range(whole, len(b)):
            for j in range(n):
                out[i, j] += a[i, k] * b[k, j]


@jit
def four_across(a, i, k):
    return a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]


@jit
def four_down(b, k, j):
    return b[k, j], b[k + 1, j], b[k + 2, j], b[k + 3, j]


@jit
def add_products(total, x, y):
    return total + x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]


@product
def tiled(a, b, out):
    """Step 5: cache blocking, one tile of the result at a time. Its accumulators are a small array that stays in L1.

    Four rows of `b`, once in L1, serve all rows of the tile. With many columns it is limited by access to `b`: each row
    segment that a tile needs is on a different page, and there are more pages than the TLB has entries.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    tile = aligned(TILE_ROWS, TILE_COLUMNS, out)
    for left in range(0, n, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n - left)
        first = np.uint64(left)
        for top in range(0, m, TILE_ROWS):
            rows = min(TILE_ROWS, m - top)
            tile[:] = 0
            for k in range(0, whole, 4):
                for i in range(rows):
                    x = four_across(a, top + i, k)
                    for j in range(np.uint64(columns)):
                        tile[i, j] = add_products(tile[i, j], x, four_down(b, k, first + j))
            for k in range(whole, len(b)):
                for i in range(rows):
                    for j in range(np.uint64(columns)):
                        tile[i, j] += a[top + i, k] * b[k, first + j]
            store(tile, out, top, left)


@jit
def store(tile, out, top, left):
    for i in range(min(len(tile), len(out) - top)):
        for j in range(np.uint64(min(TILE_COLUMNS, out.shape[1] - left))):
            out[top + i, np.uint64(left) + j] = tile[i, j]


@product
def packed(a, b, out):
    """Step 6: packing. The columns of `b` that a tile needs are first copied into a contiguous panel.

    All tiles in those columns share the panel. Limited by loads again, now from L1: four multiply-adds load four
    vectors of `b` and one of the tile, and store one.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    tile = aligned(TILE_ROWS, TILE_COLUMNS, out)
    panel = aligned(len(b), TILE_COLUMNS, b)
    for left in range(0, n, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n - left)
        fill_panel(b, left, panel)
        for top in range(0, m, TILE_ROWS):
            rows = min(TILE_ROWS, m - top)
            tile[:] = 0
            for k in range(0, whole, 4):
                for i in range(rows):
                    x = four_across(a, top + i, k)
                    for j in range(columns):
                        tile[i, j] = add_products(tile[i, j], x, four_down(panel, k, j))
            for k in range(whole, len(b)):
                for i in range(rows):
                    for j in range(columns):
                        tile[i, j] += a[top + i, k] * panel[k, j]
            store(tile, out, top, left)


@jit
def fill_panel(b, left, panel):
    for k in range(len(b)):
        for j in range(np.uint64(min(TILE_COLUMNS, b.shape[1] - left))):
            panel[k, j] = b[k, np.uint64(left) + j]


@product
def shared(a, b, out):
    """Step 7: register blocking. Four rows of the tile at once use each vector of `b` while it is in a register.

    The tile is those four rows. Limited by registers: 16 multiply-adds need 16 elements of `a`, each broadcast to all
    lanes of a register, and still load and store the tile. AVX2 has only 16 registers.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    tile = aligned(4, TILE_COLUMNS, out)
    panel = aligned(len(b), TILE_COLUMNS, b)
    for left in range(0, n, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n - left)
        fill_panel(b, left, panel)
        for top in range(0, m, 4):
            rows = min(4, m - top)
            row1, row2, row3 = min(top + 1, m - 1), min(top + 2, m - 1), min(top + 3, m - 1)  # never past the last row
            tile[:] = 0
            for k in range(0, whole, 4):
                x0, x1 = four_across(a, top, k), four_across(a, row1, k)
                x2, x3 = four_across(a, row2, k), four_across(a, row3, k)
                for j in range(columns):
                    y = four_down(panel, k, j)
                    tile[0, j] = add_products(tile[0, j], x0, y)
                    tile[1, j] = add_products(tile[1, j], x1, y)
                    tile[2, j] = add_products(tile[2, j], x2, y)
                    tile[3, j] = add_products(tile[3, j], x3, y)
            for k in range(whole, len(b)):
                for i in range(rows):
                    for j in range(columns):
                        tile[i, j] += a[top + i, k] * panel[k, j]
            store(tile, out, top, left)


def vectors(a, b, out):
    """Step 8: the micro-kernel of numba_backend.py, in explicit vectors. The tile stays in registers for all of k.

    LLVM does not get there by itself: it sends the tile to L1 and back. Now the inner loop only loads `a` and `b`, and
    stores nothing. Limited by the FMA units, of which a core has one or two.
    """
    numba_matmul(a, b, np.zeros(b.shape[1], b.dtype), out)


def threads(a, b, out):
    """Step 9: a share of the rows for each core. The compiled code releases the GIL while it runs.

    Limited by the number of cores, and by what they share: L3 cache, memory bandwidth and the power budget.
    """
    in_threads(vectors, a, b, out, CORES)


STEPS: dict[str, Any] = {
    step.__name__: step  # type: ignore[union-attr]
    for step in (loops, compiled, reordered, unrolled, tiled, packed, shared, vectors, threads)
}


def in_threads(step: Callable, a: Any, b: Any, out: Any, count: int) -> None:
    """Run a step on `count` Python threads, the caller included, each on its own rows of the result."""
    bounds = [len(out) * thread // count for thread in range(count + 1)]
    mine, *others = [slice(*pair) for pair in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(count) as pool:
        results = pool.map(lambda rows: step(a[rows], b, out[rows]), others)
        step(a[mine], b, out[mine])
        list(results)
