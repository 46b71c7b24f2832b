"""One matrix product, from three Python loops to the speed of BLAS, one idea per step.

``python -m kernels.matmul_ladder`` runs the steps and ``--asm`` shows what the machine executes; README.md beside this
file tells the story. All steps compute ``out = a @ b`` for arrays of any shapes, row-major and of one dtype.

Numba translates a function to LLVM's language, and LLVM finds the vectors. Two things help it see them. Floats are not
associative, and LLVM may round only as the source says; ``contract`` allows it to fuse a product and a sum into one
instruction that rounds once, and nothing else. And an index that may be negative counts from the end in Python, so
Numba checks for that, unless the index is unsigned or starts at 0.
"""

import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import typer
from numba import config, float32, njit
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from kernels import numba_backend
from kernels.naive_backend import matmul as naive_matmul
from kernels.numba_backend import matmul as numba_matmul

# Rows and columns of a tile of the result: 8 KB, a quarter of the smallest L1 caches.
TILE_ROWS = 16
TILE_COLUMNS = 128

# Those that this process may run on.
CORES: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

# Everything that the functions below use is in this file, which is all that Numba's cache watches.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
jit = njit(cache=True, **OPTIONS)


# The steps ---------------------------------------------------------------------------------------------------------


def loops(a, b, out):
    """Step 1: three loops in Python, on lists, which it indexes faster than arrays.

    Limited by the interpreter: for each multiply-add it looks up names, follows pointers, checks types, and makes two
    float objects.
    """
    naive_matmul(a, b, [0.0] * len(b[0]), out)


three_loops = njit(nogil=True, cache=True)(naive_matmul)


def compiled(a, b, out):
    """Step 2: the same source, compiled. The types are known, so a multiply-add is one multiplication and one addition.

    Limited by the chain of additions: each waits 3 or 4 cycles for the one before, and LLVM must not change their
    order. With many columns it is worse: `b` is read down a column, which takes a new cache line for each element.
    """
    three_loops(a, b, np.zeros(b.shape[1], b.dtype), out)


@jit
def reordered(a, b, out):
    """Step 3: k before j. The inner loop walks along rows, and its additions are independent of each other.

    So LLVM turns it into vectors. Limited by loads and stores: each multiply-add loads from `b` and `out`, and stores.
    """
    m, n = out.shape
    out[:] = 0
    for i in range(m):
        for k in range(len(b)):
            for j in range(n):
                out[i, j] += a[i, k] * b[k, j]


@jit
def unrolled(a, b, out):
    """Step 4: four steps of k at once, so that `out` is loaded and stored once for four multiply-adds.

    Limited by the loads of `b`, one for each multiply-add, all from the L2 cache: between two uses of a row of `b`, all
    its other rows pass.
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


@jit
def tiled(a, b, out):
    """Step 5: one tile of the result at a time, added up in a small array that stays in the L1 cache.

    Four rows of `b`, once in L1, serve all rows of the tile. Limited, where `b` has many columns, by the way to it: the
    parts of its rows that a tile needs lie far apart, each on a page of memory of its own.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), out.dtype)
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


@jit
def packed(a, b, out):
    """Step 6: the columns of `b` that a tile needs are first copied side by side, to be read in the order they lie.

    The copy serves all tiles below each other. Limited by loads again: for four multiply-adds four vectors of `b` and
    one of the tile are loaded, and one is stored, all in L1 now.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), out.dtype)
    panel = np.empty((len(b), TILE_COLUMNS), b.dtype)
    for left in range(0, n, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n - left)
        pack(b, left, panel)
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
def pack(b, left, panel):
    for k in range(len(b)):
        for j in range(np.uint64(min(TILE_COLUMNS, b.shape[1] - left))):
            panel[k, j] = b[k, np.uint64(left) + j]


@jit
def shared(a, b, out):
    """Step 7: four rows of the tile at once, so that each vector loaded from `b` is used four times.

    A tile is these four rows. Limited by registers: 16 multiply-adds need 16 elements of `a`, each in all lanes of a
    register, and still load and store the tile. AVX2 has just 16 registers.
    """
    m, n = out.shape
    whole = len(b) - len(b) % 4
    tile = np.empty((4, TILE_COLUMNS), out.dtype)
    panel = np.empty((len(b), TILE_COLUMNS), b.dtype)
    for left in range(0, n, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n - left)
        pack(b, left, panel)
        for top in range(0, m, 4):
            rows = min(4, m - top)
            row1, row2, row3 = min(top + 1, m - 1), min(top + 2, m - 1), min(top + 3, m - 1)  # not below the last row
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
    """Step 8: vectors spelled out, in the kernel of numba_backend.py. The tile stays in registers all along k.

    LLVM does not find this form by itself: in its place the tile goes to L1 and back. Now only `a` and `b` are loaded,
    and nothing is stored. Limited by the units that multiply and add: there are two, or as many lanes in one.
    """
    numba_matmul(a, b, np.zeros(b.shape[1], b.dtype), out)


def threads(a, b, out):
    """Step 9: a share of the rows for each core. The compiled code lets go of Python's lock while it runs.

    Limited by the number of cores, and by what they share: the clock, the L3 cache and the memory.
    """
    in_threads(vectors, a, b, out, CORES)


STEPS: dict[str, Any] = {
    step.__name__: step for step in (loops, compiled, reordered, unrolled, tiled, packed, shared, vectors, threads)
}


def in_threads(step: Callable, a: Any, b: Any, out: Any, count: int) -> None:
    """Run a step in `count` threads of Python, this one among them, each on its own rows of the result."""
    bounds = [len(out) * thread // count for thread in range(count + 1)]
    mine, *others = [slice(*pair) for pair in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(count) as pool:
        results = pool.map(lambda rows: step(a[rows], b, out[rows]), others)
        step(a[mine], b, out[mine])
        list(results)


# Measuring ---------------------------------------------------------------------------------------------------------

# Floating-point operations that a slow step is given to do, by leaving out rows of `a`.
ENOUGH_FLOP = {"loops": 2e6, "compiled": 1e8, "reordered": 4e9}


def operands(name: str, a: NDArray, b: NDArray) -> tuple[Any, Any, Any]:
    """What to call a step with, to multiply as many rows of `a` with `b` as the step can do in reasonable time.

    Parameters
    ----------
    name
        Of the step, in `STEPS`.

    Returns
    -------
    tuple
        `a`, `b` and an empty result: lists for step 1, arrays for the others.
    """
    rows = max(2, round(ENOUGH_FLOP[name] / (2 * b.size))) if name in ENOUGH_FLOP else len(a)
    a = a[:rows]
    out = np.empty((len(a), b.shape[1]), b.dtype)
    return (a.tolist(), b.tolist(), out.tolist()) if name == "loops" else (a, b, out)


def measure(names: list[str], size: int, rounds: int = 5) -> dict[str, tuple[int, float, float]]:
    """Run steps and OpenBLAS in turn, for as many rounds.

    Returns
    -------
    dict
        For each step the rows of the result that it computed, its GFLOP/s, and their ratio to those of OpenBLAS on as
        many threads: medians over the rounds.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    product = np.empty_like(a)
    measured = {}
    for name in names:
        arguments = operands(name, a, b)
        rows = len(arguments[0])
        speeds, ratios = [], []
        with threadpool_limits(CORES if name == "threads" else 1, user_api="blas"):
            for round_ in range(-1, rounds):
                blas = size / _seconds(np.matmul, a, b, product)
                speed = rows / _seconds(STEPS[name], *arguments)
                if round_ >= 0:  # the one before compiles, and fills the caches
                    speeds.append(2e-9 * size**2 * speed)
                    ratios.append(speed / blas)
        measured[name] = rows, statistics.median(speeds), statistics.median(ratios)
    return measured


def _seconds(function: Callable, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# Looking at the machine code ---------------------------------------------------------------------------------------


def micro_kernel(a, panels, bias, out):
    """One whole tile of step 8."""
    numba_backend.tile(a, 0, numba_backend.MR, a, False, panels, 0, bias, out, 0, True)


def machine_code(name: str) -> str:
    """Assembly of a compiled step for float32.

    It is compiled again for that, as Numba shows no code that comes from its cache.
    """
    matrix, vector = float32[:, ::1], float32[::1]
    if name == "compiled":
        function = njit((matrix, matrix, vector, matrix), nogil=True)(naive_matmul)
    elif name in ("vectors", "threads"):
        function = njit((matrix, float32[:, :, ::1], vector, matrix), **OPTIONS)(micro_kernel)
    else:
        function = njit((matrix, matrix, matrix), **OPTIONS)(STEPS[name].py_func)
    (assembly,) = function.inspect_asm().values()
    return assembly


def hottest_block(assembly: str) -> list[str]:
    """The stretch without a jump that multiplies the most floats: the body of the inner loop.

    If LLVM knows that the loop takes few passes it writes them one after the other, and this is one or two of them.
    """
    blocks: list[list[str]] = [[]]
    for line in assembly.splitlines():
        if re.match(r"\.?LBB\w+:", line):
            blocks.append([])
        if not re.match(r"\s*(\.|#|//)", line.removeprefix(".LBB")):
            blocks[-1].append(line.expandtabs(8))
        if re.match(r"\s+(j|b\.|cbn?z|tbn?z)\w*\s", line):
            blocks.append([])
    return max(blocks, key=lambda block: sum(map(_floats_multiplied, block)))


def _floats_multiplied(instruction: str) -> int:
    if not re.search(r"\s(v?mul|vf\w*madd|fmul|fmla|fmadd)\w*", instruction):
        return 0
    if "zmm" in instruction:
        return 16
    if "ymm" in instruction:
        return 8
    return 4 if re.search(r"ps\s|\.4s", instruction) else 1


# The command line --------------------------------------------------------------------------------------------------

console = Console()
errors = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    step: Annotated[str | None, typer.Argument(help=f"One of {', '.join(STEPS)}. [default: all of them]")] = None,
    size: Annotated[int, typer.Option(min=1, help="Multiply square matrices with so many rows and columns.")] = 1024,
    asm: Annotated[bool, typer.Option("--asm", help="Show the inner loop that the machine executes, too.")] = False,
) -> None:
    """Climb the ladder: one matrix product, from three Python loops to the speed of BLAS.

    Each step is a short function in kernels/matmul_ladder.py with one new idea, explained in kernels/README.md. Shown
    are the billions of floating-point operations per second (GFLOP/s), and how many percent that is of what NumPy's
    BLAS reaches on as many threads. Slow steps compute some rows of the result only.
    """
    if step is not None and step not in STEPS:
        raise typer.BadParameter(f"there is no step {step!r}: choose one of {', '.join(STEPS)}")
    names = list(STEPS) if step is None else [step]
    title = f"{size} × {size} × {size}, float32; one thread, {CORES} for the step called threads"
    table = Table("step", "rows", "GFLOP/s", "% of BLAS", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (rows, speed, ratio) in measure(names, size).items():
        table.add_row(name, f"{rows:,}", f"{speed:.3g}", f"{100 * ratio:.3g}")
    console.print(title)
    console.print(table)
    for name in names if asm else ():
        console.print(f"{name}: {(STEPS[name].__doc__ or '').splitlines()[0]}\n", soft_wrap=True, markup=False)
        code = ["        run by Python's interpreter"] if name == "loops" else hottest_block(machine_code(name))
        console.print("\n".join(code) + "\n", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Run the command line; a wrong option is one line on stderr and exit code 2."""
    usage_error: Any = typer.BadParameter.__base__  # the class of all wrong options; its module has changed name
    try:
        sys.exit(app(standalone_mode=False))
    except usage_error as error:
        errors.print(f"error: {error.format_message()}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
