"""The machine code of a step, and its innermost loop."""

import re

import numpy as np
from numba import types

from kernels import numba_backend
from kernels.compiling import flat_in, kernel, matrix_out, row_major_in
from kernels.ladder.steps import STEPS, three_loops


def panels_in(dtype: types.Float) -> types.Array:
    """(panels, k, columns) array, row-major."""
    return types.Array(dtype, 3, "C", readonly=True, aligned=False)


@kernel(row_major_in, panels_in, flat_in, matrix_out)
def micro_kernel(a, panels, bias, out):
    """Full tiles of step 8, side by side."""
    numba_backend.tiles(a, 0, numba_backend.MR, a, False, panels, bias, out, 0, True)


@kernel(row_major_in, row_major_in, matrix_out)
def few_rows_kernel(a, b, out):
    """The product with few rows."""
    numba_backend.few_tiles(a, b, 0, len(b), out)


def machine_code(name: str) -> str:
    """Assembly of the compiled step called `name`, for float32."""
    others = {"compiled": three_loops, "vectors": micro_kernel, "threads": micro_kernel}
    return others.get(name, STEPS[name]).assembly(np.dtype(np.float32))


def hottest_block(assembly: str) -> list[str]:
    """The basic block (straight-line code) that multiplies the most floats: the body of the inner loop.

    If LLVM knows that the loop has few iterations, it unrolls it, and the block holds one or two of them.
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
