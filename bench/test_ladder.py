"""Throughput of each step of the ladder, beside OpenBLAS and what the machine could do at most."""

import ast
import functools
import inspect
import time

import numpy as np
import pytest
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from threadpoolctl import threadpool_limits

from kernels import matmul_ladder, naive_backend, numba_backend, simd
from kernels.matmul_ladder import STEPS, in_threads, operands
from kernels.simd import Vectors, View

SHAPES = {"MLP": (60_000, 784, 128), "1024³": (1024, 1024, 1024)}
QUICK_ROWS = {"MLP": 2048, "1024³": 512}

# That a step may take, in 5 to 50 rounds: the system spreads threads over the cores in the first milliseconds only.
SECONDS = 0.5

# The last step has threads of its own; the others get them from here.
MEASURED = [(step, which) for step in STEPS for which in ("one thread", "all threads")]
MEASURED.remove(("threads", "one thread"))


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    """The name of a product."""
    return request.param


@pytest.fixture(scope="module")
def matrices(shape, quick):
    """Its operands, and BLAS's result."""
    m, k, n = SHAPES[shape]
    rng = np.random.default_rng(0)
    a = rng.standard_normal((QUICK_ROWS[shape] if quick else m, k), np.float32)
    b = rng.standard_normal((k, n), np.float32)
    return a, b, a @ b


@pytest.mark.parametrize(("step", "which"), MEASURED)
def test_step(benchmark, step, which, shape, matrices, threads, quick):
    """Each round takes the time of BLAS first, so that both meet the same weather."""
    threads = 1 if which == "one thread" else threads
    a, b, product = matrices
    arguments = operands(step, a, b)
    rows = len(arguments[0])
    blas_seconds = []

    def run_blas():
        start = time.perf_counter()
        np.matmul(a, b, product)
        blas_seconds.append(time.perf_counter() - start)

    def run_step():
        if threads == 1 or step == "threads":
            STEPS[step](*arguments)
        else:
            in_threads(STEPS[step], *arguments, threads)

    run_step()  # compiles
    start = time.perf_counter()
    run_step()
    rounds = 1 if quick else int(np.clip(SECONDS / (time.perf_counter() - start), 5, 50))
    tolerance = 10 * len(b) * np.finfo(np.float32).eps
    np.testing.assert_allclose(arguments[2], product[:rows], rtol=0, atol=tolerance)

    benchmark.group = f"{shape}, {which}"
    benchmark.name = f"{step}, {rows} rows"
    with threadpool_limits(threads, user_api="blas"):
        benchmark.pedantic(run_step, setup=run_blas, rounds=rounds)
    benchmark.extra_info.update(
        step=step,
        product=shape,
        shape=f"({rows}×{a.shape[1]})({b.shape[0]}×{b.shape[1]})",
        threads=threads,
        flop=2 * rows * b.size,
        blas_seconds=blas_seconds,
        blas_flop=2 * len(a) * b.size,
        lines=lines_of_code(step),
    )


# The peak ----------------------------------------------------------------------------------------------------------

CHAINS = 12  # independent of each other: a multiply-add takes 4 cycles, and two can start in each
PASSES = 5_000_000


@intrinsic
def multiply_add_chains(typing_context, values, passes):
    """Multiply-adds on as many registers as there are chains, and nothing else; one number of the result is kept."""

    def emit(context, builder, signature, arguments):
        pointer = View.of(context, builder, signature.args[0], arguments[0]).at(0)
        vectors = Vectors(context, builder, signature.args[0].dtype)
        factor = vectors.broadcast(pointer)
        totals = [vectors.variable(vectors.constant(float(chain))) for chain in range(CHAINS)]
        with cgutils.for_range(builder, arguments[1]):
            for total in totals:
                builder.store(vectors.fma(builder.load(total), factor, factor), total)
        sums = [builder.load(total) for total in totals]
        vectors.store(functools.reduce(builder.fadd, sums), pointer)

    return types.void(values, passes), emit


@njit(nogil=True)
def run_chains(values, passes):
    multiply_add_chains(values, passes)


@pytest.mark.parametrize("which", ["one thread", "all threads"])
def test_peak(benchmark, which, threads, quick):
    """What the multiply-add units can do when nothing has to be loaded."""
    threads = 1 if which == "one thread" else threads
    passes = PASSES // 10 if quick else PASSES
    lanes = simd.REGISTER_BYTES // 4
    # One row for each thread; the fixed point of x = x / 2 + 1 / 2 keeps the numbers finite.
    values = np.full((threads, 1, lanes), 0.5, np.float32)

    def run():
        in_threads(lambda rows, _, out: run_chains(out[0, 0], passes), values, None, values, threads)

    run_chains(values[0, 0].copy(), 1)
    benchmark.group = "multiply-adds in registers"
    benchmark.name = which
    flop = 2 * threads * CHAINS * lanes * passes
    benchmark.extra_info.update(peak=True, shape=f"{CHAINS} registers", threads=threads, flop=flop)
    benchmark.pedantic(run, rounds=5 if quick else 20, warmup_rounds=1)


# Lines of code -----------------------------------------------------------------------------------------------------

Place = tuple[str, str]


def lines_of_code(step: str) -> int:
    """Lines of all that a step is made of in kernels/, without comments, docstrings and blank lines."""
    code = {place: ast.unparse(node) for place, node in _reached((matmul_ladder.__name__, step), {}).items()}
    return sum(bool(line.strip()) for text in code.values() for line in text.splitlines())


def _reached(place: Place, seen: dict[Place, ast.AST]) -> dict[Place, ast.AST]:
    """What is defined at `place`, and what it names, and so on. Decorators do not count: they are the compiler."""
    found = _definitions().get(place)
    if isinstance(found, tuple):
        _reached(found, seen)
    elif found and place not in seen:
        seen[place] = found
        for part in getattr(found, "body", [found]):
            for node in ast.walk(part):
                if isinstance(node, ast.Name):
                    _reached((place[0], node.id), seen)
                elif isinstance(node, ast.Attribute):
                    _reached((simd.__name__, node.attr), seen)  # its classes' methods are all that is called this way
    return seen


@functools.cache
def _definitions() -> dict[Place, ast.AST | Place]:
    """Functions, methods and constants by module and name; where imported names come from."""
    found: dict[Place, ast.AST | Place] = {}
    for module in (matmul_ladder, naive_backend, numba_backend, simd):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if isinstance(node, ast.Module | ast.ClassDef):
                for statement in node.body:
                    if isinstance(statement, ast.FunctionDef):
                        name = node.name if statement.name == "__init__" else statement.name  # type: ignore[union-attr]
                        found[module.__name__, name] = statement
                    elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                        found[module.__name__, statement.targets[0].id] = statement
                    elif isinstance(statement, ast.ImportFrom):
                        for alias in statement.names:
                            found[module.__name__, alias.asname or alias.name] = (str(statement.module), alias.name)
    return found
