"""Throughput of each step of the ladder, beside OpenBLAS and what the machine could do at most."""

import ast
import functools
import inspect
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from bench.studies.roofline import CHAINS, peak
from kernels import naive_backend, numba_backend, simd
from kernels.ladder import steps
from kernels.ladder.steps import STEPS, in_threads
from kernels.ladder.timing import operands

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


@pytest.mark.parametrize("which", ["one thread", "all threads"])
def test_peak(benchmark, which, threads, quick):
    """What the multiply-add units can do when nothing has to be loaded."""
    threads = 1 if which == "one thread" else threads
    run, flop = peak(threads)
    benchmark.group = "multiply-adds in registers"
    benchmark.name = which
    benchmark.extra_info.update(peak=True, shape=f"{CHAINS} registers", threads=threads, flop=flop)
    benchmark.pedantic(run, rounds=5 if quick else 20, warmup_rounds=1)


# Lines of code -----------------------------------------------------------------------------------------------------

Place = tuple[str, str]


def lines_of_code(step: str) -> int:
    """Lines of all that a step is made of in kernels/, without comments, docstrings and blank lines."""
    code = {place: ast.unparse(node) for place, node in _reached((steps.__name__, step), {}).items()}
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
    for module in (steps, naive_backend, numba_backend, simd):
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
