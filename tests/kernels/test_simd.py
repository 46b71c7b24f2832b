"""The compiled kernels stay inside their arrays, and are correct at every edge and for other CPUs."""

import itertools

import numba
import numpy as np
import pytest

from kernels import get_backend, numba_backend, simd
from kernels.numba_backend import (
    DOT_MR,
    DOT_VECTORS,
    FAR_ROWS,
    FEW_ROWS,
    KC,
    MR,
    NC_BYTES,
    ONE_VECTORS,
    PACK_ROWS,
    PAGE,
    TILE_BYTES,
)
from tests.support.guarded import Guarded, every_dtype, every_place, integers, needs_mprotect
from tests.support.systems import needs_long_double
from tests.support.targets import compiled_for

LAYOUTS = ["row-major", "transposed", "reversed", "strided", "misaligned"]


# Inside their arrays ----------------------------------------------------------------------------------------


def shapes(module, dtype):
    """(m, k, n) with 0, 1, and one more or less than a multiple of the block, in each dimension."""
    mr, few, streams = module.MR, module.FEW_ROWS, module.STREAMS
    one_vectors = 2 * module.ONE_VECTORS + 1
    width, edge, page = (size // dtype().itemsize for size in (module.TILE_BYTES, module.EDGE_BYTES, module.PAGE))
    columns = [0, 1, edge + 1, width, 2 * width - 1]
    yield from itertools.product([0, 1, mr - 1, mr, 2 * mr + 1], [0, 1, 5], columns)
    yield from [(module.PACK_ROWS + 1, 33, width + 3), (2 * width + 1, 7, 10), (10, module.KC + 1, 10)]
    # Three panels share the packed A, in whole tiles and in lower ones of equal height.
    yield from [(m, module.KC_TRANSPOSED + 1, 3 * width + edge + 1) for m in (2 * mr, 2 * mr + 1)]
    yield from [(rows, 2 * module.KC, 16 * edge + 1) for rows in range(1, few + 1)]
    # B's rows are on pages of their own, and a multiple of 4 KB apart or not.
    yield from [(rows, module.FAR_DEPTH + 3, page + width + 1) for rows in (few + 1, 31, module.FAR_ROWS)]
    yield from [(rows, 2 * streams + 3, page) for rows in (few, 2 * few, 2 * few + 1)]
    yield from [(rows, page, width + 1) for rows in (1, few)]
    yield (1, 2 * module.ONE_ROWS + 3, one_vectors * module.REGISTER_BYTES // dtype().itemsize + edge + 1)
    yield from [(page, streams + 3, 3 * width + 1), (few + 1, 2 * streams + 3, page + 1), (2 * mr, page, width + 1)]


def assert_matmul_stays_inside(module, layout_a, layout_b, place, dtype):
    for m, k, n in shapes(module, dtype):
        a = Guarded(integers((m, k), dtype, 1), layout_a, place)
        b = Guarded(integers((k, n), dtype, 2), layout_b, place)
        layout_bias = "misaligned" if layout_b == "misaligned" else "row-major"
        bias = Guarded(integers(n, dtype, 3), layout_bias, place)
        out = Guarded(np.full((m, n), np.nan, dtype), place=place)
        module.matmul(a.read_only(), b.read_only(), bias.read_only(), out.array)
        for argument in a, b, bias:
            argument.assert_unchanged()
        out.assert_canaries_live()
        product = a.array.astype(int) @ b.array.astype(int)  # integers, so not by BLAS
        np.testing.assert_array_equal(out.array, product + bias.array)


@needs_mprotect
@every_dtype
@every_place
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_matmul_stays_inside_its_arrays(layout_a, layout_b, place, dtype):
    assert_matmul_stays_inside(numba_backend, layout_a, layout_b, place, dtype)


@needs_mprotect
@every_dtype
@every_place
@pytest.mark.parametrize("layout", ["row-major", "misaligned"])
@pytest.mark.parametrize(
    ("kernel", "inputs", "expected"),
    [
        (numba_backend.relu, 1, lambda z: np.maximum(z, 0)),
        (numba_backend.relu_grad, 2, lambda upstream, activations: np.where(activations > 0, upstream, 0)),
    ],
    ids=["relu", "relu_grad"],
)
def test_relu_and_its_gradient_stay_inside_their_arrays(kernel, inputs, expected, layout, place, dtype):
    for size in range(70):
        values, *others = (Guarded(integers((1, size), dtype, seed), layout, place) for seed in range(inputs))
        result = expected(values.array, *(other.array for other in others))
        kernel(values.array, *(other.read_only() for other in others))
        for other in others:
            other.assert_unchanged()
        values.assert_canaries_live()
        np.testing.assert_array_equal(values.array, result)


@needs_mprotect
@every_dtype
@every_place
@pytest.mark.parametrize("layout", ["row-major", "misaligned"])
def test_subtract_stays_inside_its_arrays(layout, place, dtype):
    for size in range(70):
        gradient = Guarded(integers(size, dtype, 1), layout, place)
        parameter = Guarded(integers(size, dtype, 2), place=place)
        before = parameter.array.copy()
        numba_backend.subtract(parameter.array, gradient.read_only(), 0.5)
        gradient.assert_unchanged()
        parameter.assert_canaries_live()
        np.testing.assert_array_equal(parameter.array, before - gradient.array / 2)


def assert_softmax_grad_stays_inside(module, layout, place, dtype):
    for rows, classes in itertools.product([0, 1, 2, 7], [1, 2, 9, 10, 17, 100]):
        logits = Guarded(integers((rows, classes), dtype), layout, place)
        labels = Guarded(np.arange(rows) % classes, "strided" if layout == "strided" else "row-major", place)
        out = Guarded(np.full((rows, classes), np.nan, dtype), place=place)
        expected = get_backend("numpy").softmax_grad(logits.array, labels.array)
        if logits.array.flags.c_contiguous:  # what the kernel takes; the backend copies others
            loss, correct = module.softmax_grad(logits.read_only(), labels.read_only(), out.array)
            np.testing.assert_allclose(out.array, expected[2], rtol=1e-5, atol=1e-6)
        else:
            loss, correct, gradient = module.NumbaBackend().softmax_grad(logits.read_only(), labels.read_only())
            np.testing.assert_allclose(gradient, expected[2], rtol=1e-5, atol=1e-6)
        logits.assert_unchanged()
        labels.assert_unchanged()
        out.assert_canaries_live()
        np.testing.assert_allclose(loss, expected[0], rtol=1e-5, atol=1e-6)
        assert correct == expected[1]


@needs_mprotect
@every_dtype
@every_place
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_grad_stays_inside_its_arrays(layout, place, dtype):
    assert_softmax_grad_stays_inside(numba_backend, layout, place, dtype)


def test_non_arrays_are_refused():
    with pytest.raises(TypeError):
        get_backend("numba").matmul(get_backend("sparse").prepare(np.ones((2, 3), np.uint8)), np.ones((3, 2), "f4"))


# Right at every edge ----------------------------------------------------------------------------------------


def assert_product(m, k, n, dtype, layout="C"):
    a, b, bias = integers((m, k), dtype, 1), integers((k, n), dtype, 2), integers(n, dtype, 3)
    product = get_backend("numba").matmul(np.asarray(a, order=layout), b, bias)
    np.testing.assert_array_equal(product, a @ b + bias, err_msg=f"{m} x {k} x {n}")
    assert product.flags.c_contiguous
    assert product.dtype == dtype


@every_dtype
def test_products_are_right_for_every_remainder_of_a_tile(dtype):
    width = TILE_BYTES // dtype().itemsize
    for m, n in itertools.product(range(1, 2 * MR + 2), range(1, 2 * width + 2)):
        assert_product(m, 3, n, dtype)


@every_dtype
@pytest.mark.parametrize("layout", ["C", "F"])
def test_products_are_right_around_the_ends_of_blocks(layout, dtype):
    nc, width = NC_BYTES // dtype().itemsize, TILE_BYTES // dtype().itemsize
    for k in [0, 1, KC - 1, KC, KC + 1, 2 * KC + 1]:
        assert_product(MR + 1, k, width + 1, dtype, layout)
    for n in [nc - 1, nc, nc + 1, 2 * nc + 1]:
        assert_product(MR + 1, 3, n, dtype, layout)
    for m in [PACK_ROWS - 1, PACK_ROWS, PACK_ROWS + 1, width - 1, width, width + 1]:
        for n in [width - 1, width, width + 1]:
            assert_product(m, 3, n, dtype, layout)
    for m in [1, FEW_ROWS, FEW_ROWS + 1]:
        for size in [ONE_VECTORS * simd.REGISTER_BYTES, PAGE]:
            for n in range(size // dtype().itemsize - 1, size // dtype().itemsize + 2):
                assert_product(m, 5, n, dtype, layout)


@every_dtype
@pytest.mark.parametrize("rows", [1, 2, DOT_MR, DOT_MR + 1, FEW_ROWS])
def test_few_rows_times_contiguous_columns(rows, dtype):
    lanes = simd.REGISTER_BYTES // dtype().itemsize
    width = DOT_VECTORS * lanes
    page = PAGE // dtype().itemsize
    depths = [lanes - 1, lanes, 3 * lanes + 1, KC + 1, page, page + lanes]
    for k, n in itertools.product(depths, [width - 1, width, 3 * width + 1]):
        a, b, bias = integers((rows, k), dtype, 1), integers((k, n), dtype, 2), integers(n, dtype, 3)
        product = get_backend("numba").matmul(a, np.asfortranarray(b), bias)
        np.testing.assert_array_equal(product, a @ b + bias, err_msg=f"{k} x {n}")


@every_dtype
def test_rounding_errors_are_those_of_fused_multiply_adds(dtype):
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape).astype(dtype) for shape in [(70, 1000), (1000, 70)])
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
    scale = np.abs(a) @ np.abs(b)
    error = np.abs(get_backend("numba").matmul(a, b) - exact) / scale
    assert error.max() < 16 * np.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("columns", [10, 200])
@pytest.mark.parametrize("layout_b", ["C", "F"])
@pytest.mark.parametrize("layout_a", ["C", "F"])
def test_bits_of_a_row_do_not_depend_on_other_rows(layout_a, layout_b, columns, dtype):
    generator = np.random.default_rng(0)
    shapes = (150, 900), (900, columns), columns
    a, b, bias = (generator.standard_normal(shape).astype(dtype) for shape in shapes)
    b = np.asarray(b, order=layout_b)
    whole = get_backend("numba").matmul(np.asarray(a, order=layout_a), b, bias)
    for start, stop in [(0, 1), (1, 8), (3, 80), (20, 150)]:
        part = get_backend("numba").matmul(np.asarray(a[start:stop], order=layout_a), b, bias)
        np.testing.assert_array_equal(part, whole[start:stop])


@every_dtype
@pytest.mark.parametrize("row_bytes", [4 * TILE_BYTES + 40, PAGE, PAGE + 40])
@pytest.mark.parametrize("layout_b", ["C", "F"])
@pytest.mark.parametrize("layout_a", ["C", "F"])
def test_bits_do_not_depend_on_blocking(layout_a, layout_b, row_bytes, dtype):
    """Few rows, and a packed A or B, give the same bits as the rows in a larger product, or one by one."""
    generator = np.random.default_rng(0)
    k, n = 2 * KC + 3, row_bytes // dtype().itemsize
    a, b, bias = (generator.standard_normal(shape).astype(dtype) for shape in [(PACK_ROWS + 9, k), (k, n), n])
    b = np.asarray(b, order=layout_b)
    whole = get_backend("numba").matmul(a, np.ascontiguousarray(b), bias)
    for start, stop in [(0, 1), (1, 3), (5, 5 + FEW_ROWS), (7, 8 + FEW_ROWS), (20, 80), (0, FAR_ROWS), (0, len(a))]:
        part = get_backend("numba").matmul(np.asarray(a[start:stop], order=layout_a), b, bias)
        np.testing.assert_array_equal(part, whole[start:stop])


@every_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row_and_column(value, dtype):
    a, b = np.ones((2 * MR + 1, 9), dtype), np.ones((9, 10), dtype)
    a[3, 4] = value
    product = get_backend("numba").matmul(a, b)
    np.testing.assert_array_equal(product[3], np.full(10, value, dtype))
    np.testing.assert_array_equal(np.delete(product, 3, axis=0), 9)
    b[4, 7] = 0
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(get_backend("numba").matmul(a, b), a @ b)


@simd.emitter
def exp_vector(vectors, builder, x, i):
    mask = vectors.first(builder.sub(x.shape[0], i))
    vectors.store(vectors.exp(vectors.load(x.at(i), mask)), x.at(i), mask)


@numba.njit
def exp_all(x):
    for i in range(0, len(x), simd.REGISTER_BYTES // x.itemsize):
        exp_vector(x, i)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=needs_long_double)])
def test_exp_is_within_two_units_in_the_last_place(dtype):
    x = -np.abs(np.random.default_rng(0).standard_cauchy(100_001)).astype(dtype)
    x[:6] = [0, -0.0, -1e-30, -np.inf, np.nan, np.log(np.finfo(dtype).tiny)]
    with np.errstate(under="ignore"):
        expected = np.exp(x.astype(np.longdouble))
        ulp = np.spacing(expected.astype(dtype)).astype(np.longdouble)
    exp_all(x)
    assert np.isnan(x[4])
    assert x[3] == 0
    assert np.nanmax(np.abs(x - expected) / ulp) <= 2


# Other CPUs -------------------------------------------------------------------------------------------------

OTHERS = {
    "SSE": {"REGISTER_BYTES": 16, "REGISTERS": 16, "CPU": "generic"},
    "NEON": {"REGISTER_BYTES": 16, "REGISTERS": 32, "CPU": "generic"},
    "AVX2 on Zen 3": {"REGISTER_BYTES": 32, "REGISTERS": 16, "CPU": "znver3"},
    "AVX-512 on Intel": {"REGISTER_BYTES": 64, "REGISTERS": 32, "CPU": "skylake-avx512"},
    "AVX-512 on newer Intel": {"REGISTER_BYTES": 64, "REGISTERS": 32, "CPU": "sapphirerapids"},
    "AVX-512 on Zen 4": {"REGISTER_BYTES": 64, "REGISTERS": 32, "CPU": "znver4"},
    "AVX-512 on Zen 5": {"REGISTER_BYTES": 64, "REGISTERS": 32, "CPU": "znver5"},
}


@pytest.fixture(scope="module", params=OTHERS.values(), ids=OTHERS)
def other(request, tmp_path_factory):
    """The module compiled for other vector registers."""
    for dtype in np.float32, np.float64:  # compile for this CPU what results are compared with
        one = np.ones((1, 1), dtype)
        get_backend("numba").softmax_grad(get_backend("numba").matmul(one, one), np.zeros(1, int))
    with compiled_for(numba_backend, tmp_path_factory.mktemp("cache"), **request.param) as module:
        yield module


@pytest.mark.slow
@every_dtype
def test_products_for_other_cpus_have_the_same_bits(other, dtype):
    """An element is the same chain of multiply-adds for any vector width and tile size."""
    generator = np.random.default_rng(0)
    mr, deep = other.MR, max(other.KC_TRANSPOSED, other.STREAMS)
    width, edge = (size // dtype().itemsize for size in (other.TILE_BYTES, other.EDGE_BYTES))
    sizes = [
        *itertools.product([1, mr - 1, mr, 2 * mr + 1], [0, 5], [1, edge + 1, 2 * width - 1]),
        *((m, deep + 1, 3 * width + edge + 1) for m in (2 * mr, 2 * mr + 1)),
        (other.PACK_ROWS + 1, 2 * deep + 3, width + 3),
        (2 * width + 1, deep + 1, 10),
        *((rows, other.FAR_DEPTH + 3, other.PAGE // dtype().itemsize + edge + 1) for rows in range(1, 32)),
        (2 * other.FEW_ROWS, 2 * other.STREAMS + 3, other.PAGE // dtype().itemsize),
        *((rows, 37, 3 * width + edge + 1) for rows in range(1, other.FEW_ROWS + 1)),
        (other.PAGE // dtype().itemsize, other.STREAMS + 3, 3 * width + 1),
        (2 * mr, other.PAGE // dtype().itemsize, width + 1),
    ]
    for m, k, n in sizes:
        a, b, bias = (generator.standard_normal(shape).astype(dtype) for shape in [(m, k), (k, n), n])
        expected = get_backend("numba").matmul(a, b, bias)
        for layout_a, layout_b in itertools.product("CF", "CF"):
            product = other.NumbaBackend().matmul(np.asarray(a, order=layout_a), np.asarray(b, order=layout_b), bias)
            np.testing.assert_array_equal(product, expected, err_msg=f"{m} x {k} x {n}, {layout_a}{layout_b}")


@pytest.mark.slow
@needs_mprotect
@every_dtype
@every_place
@pytest.mark.parametrize("layout_b", ["row-major", "transposed"])
@pytest.mark.parametrize("layout_a", ["row-major", "transposed"])
def test_matmul_for_other_cpus_stays_inside_its_arrays(other, layout_a, layout_b, place, dtype):
    """Rows or columns are contiguous: other strides take one of these paths."""
    assert_matmul_stays_inside(other, layout_a, layout_b, place, dtype)


@pytest.mark.slow
@needs_mprotect
@every_dtype
@every_place
def test_softmax_grad_for_other_cpus_stays_inside_its_arrays(other, place, dtype):
    assert_softmax_grad_stays_inside(other, "row-major", place, dtype)


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("classes", [1, 2, 9, 10, 33])
def test_softmax_for_other_cpus_agrees_within_rounding(other, classes, dtype):
    """Its sums are added in another order, so they may differ by the rounding of as many terms."""
    logits = np.random.default_rng(0).standard_normal((7, classes)).astype(dtype)
    labels = np.arange(7) % classes
    loss, correct, gradient = other.NumbaBackend().softmax_grad(logits, labels)
    expected = get_backend("numba").softmax_grad(logits, labels)
    tolerance = (classes + 4) * np.finfo(dtype).eps
    np.testing.assert_allclose(loss, expected[0], rtol=tolerance, atol=7 * tolerance)
    assert correct == expected[1]
    np.testing.assert_allclose(gradient, expected[2], rtol=0, atol=tolerance)
