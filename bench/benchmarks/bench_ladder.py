"""Throughput of each step of the ladder on one thread, for the table; the study ``ladder`` interleaves them."""

import numpy as np
import pytest

from bench.studies.ladder import QUICK_ROWS, SHAPES, aligned
from kernels.ladder.steps import STEPS
from kernels.ladder.timing import operands


@pytest.fixture(scope="module", params=SHAPES)
def matrices(request, quick):
    """The name of a product, and its operands."""
    m, k, n = SHAPES[request.param]
    rng = np.random.default_rng(0)
    a, b = (aligned(rng.standard_normal(shape, np.float32)) for shape in ((m, k), (k, n)))
    return request.param, a[: QUICK_ROWS[request.param]] if quick else a, b


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize("step", [step for step in STEPS if step != "threads"])
def test_step(benchmark, step, matrices, quick, one_thread):
    product, a, b = matrices
    arguments = operands(step, a, b)
    rows = len(arguments[0])
    benchmark.group = f"{product}, one thread"
    benchmark.name = f"{step}, {rows} rows"
    benchmark.pedantic(STEPS[step], arguments, rounds=1 if quick else 3, warmup_rounds=1)
