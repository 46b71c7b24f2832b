"""The sparse encoding of images and its products: lossless, in bounds, equal to dense products."""

import itertools
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from kernels import get_backend, sparse_backend
from kernels.sparse_backend import BLOCK, GROUP, MANY_PIXELS
from tests.support.guarded import Guarded, every_dtype, every_place, integers, needs_mprotect
from tests.support.reference import assert_product
from tests.support.targets import compiled_for

SHAPES = [(1, 1), (1, 784), (2, 64), (3, 30 * 20), (5, BLOCK), (6, BLOCK + 1), (7, 2 * BLOCK - 1), (130, 2)]
DENSITIES = [0.0, 0.2, 1.0]
HIDDEN = [1, 10, 100, 128, 129, 512]


@pytest.fixture(scope="module")
def sparse():
    return get_backend("sparse")


def random_images(shape, density, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, shape, np.uint8) * (rng.random(shape) < density).astype(np.uint8)


def decode(nonzeros, shape, group=GROUP):
    """The matrix of bytes, decoded by its documentation alone."""
    n, k = shape
    matrix = np.zeros((n + 1, k), np.uint8)
    values = iter(nonzeros.values.tolist())
    listed = zip(nonzeros.rows.tolist(), nonzeros.masks.tolist(), strict=True)
    for block, groups in enumerate(nonzeros.groups.tolist()):
        rows = list(itertools.islice(listed, groups * group))
        real = [row for row, _ in rows if row != n]
        assert len(real) == len(set(real)) > len(rows) - group
        for row, mask in rows:
            columns = [block * BLOCK + c for c in range(BLOCK) if mask >> c & 1]
            matrix[row, columns] = list(itertools.islice(values, len(columns)))
            assert (mask != 0 or block == 0) if row != n else mask == 0
        assert block > 0 or sorted(real) == list(range(n))
    assert not list(listed)
    assert len(list(values)) == BLOCK
    assert not matrix[-1].any()
    return matrix[:-1]


# The encoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (4, 0)])
def test_images_are_kept_exactly(sparse, shape, density):
    images = random_images(shape, density)
    x = sparse.prepare(images)
    np.testing.assert_array_equal(decode(x.nonzeros, shape), images)
    np.testing.assert_array_equal(decode(x.transposed, shape[::-1]), images.T)


def test_real_images_are_kept_exactly(sparse, digits28):
    images = digits28.train_images[:301]
    x = sparse.prepare(images)
    np.testing.assert_array_equal(decode(x.nonzeros, x.shape), images)
    np.testing.assert_array_equal(decode(x.T.nonzeros, x.T.shape), images.T)


def test_layout_of_the_images_does_not_matter(sparse):
    images = random_images((9, 70), 0.3)
    for view in (np.asfortranarray(images), np.repeat(images, 2, axis=1)[:, ::2], images[::-1].copy()[::-1]):
        np.testing.assert_array_equal(decode(sparse.prepare(view).nonzeros, images.shape), images)


def test_transpose(sparse):
    x = sparse.prepare(random_images((3, 20), 0.5), np.float64)
    assert (len(x), x.shape, x.dtype) == (3, (3, 20), np.float64)
    assert (len(x.T), x.T.shape, x.T.dtype) == (20, (20, 3), np.float64)
    assert x.T.nonzeros is x.transposed
    assert x.T.T.nonzeros is x.nonzeros


def test_repr_is_one_line(sparse):
    x = sparse.prepare(random_images((300, 784), 0.2))
    assert repr(x) == f"<SparseMatrix (300, 784), float32: {x.nbytes:,} bytes>"
    assert repr(x.T) == f"<SparseMatrix (784, 300), float32: {x.nbytes:,} bytes>"


def test_only_non_zeros_take_memory(sparse):
    """A byte per non-zero, and 12 bytes per row in each block where it has any, and in the first block."""
    images = random_images((512, 784), 0.19)
    x = sparse.prepare(images)
    for encoding in x.nonzeros, x.transposed:
        assert encoding.values.nbytes <= 1.05 * np.count_nonzero(images)
        assert encoding.rows.nbytes + encoding.masks.nbytes <= 12 * len(images) * 784 / BLOCK * 1.1
    assert sparse.prepare(np.zeros_like(images)).nbytes <= 12 * sum(images.shape) + 1000


def test_rows_are_sorted_by_non_zeros(sparse):
    """So the trip count of the innermost loop repeats, and its exit branch predicts well."""
    nonzeros = sparse.prepare(random_images((130, 3 * BLOCK), 0.3)).nonzeros
    for masks in np.split(nonzeros.masks, np.cumsum(nonzeros.groups)[:-1] * GROUP):
        numbers = [mask.bit_count() for mask in masks.tolist()]
        assert numbers == sorted(numbers, reverse=True)


def test_mnist_takes_40_mb_at_most(sparse, mnist):
    shards = np.array_split(mnist.train_images, 64)  # as training does
    assert sum(sparse.prepare(shard).nbytes for shard in shards) <= 40e6


# The products ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("hidden", HIDDEN)
def test_products_of_every_size(sparse, hidden, dtype):
    check_products_of_every_size(sparse, hidden, dtype)


def check_products_of_every_size(sparse, hidden, dtype):
    rng = np.random.default_rng(hidden)
    for (n, pixels), density in itertools.product(SHAPES, DENSITIES):
        images = random_images((n, pixels), density)
        exact = np.divide(images, 255, dtype=dtype)
        x = sparse.prepare(images, dtype)
        weights, bias, upstream = (
            rng.standard_normal(shape).astype(dtype) for shape in ((pixels, hidden), hidden, (n, hidden))
        )
        assert_product(sparse.matmul(x, weights, bias), exact, weights, bias)
        assert_product(sparse.matmul(x.T, upstream), exact.T, upstream)
        assert_product(sparse.matmul(x.T.T, weights), exact, weights)
        assert_product(sparse.matmul(x.T, upstream, bias), exact.T, upstream, bias)


@every_dtype
def test_strided_arguments(sparse, dtype):
    rng = np.random.default_rng(0)
    images = random_images((11, 90), 0.3)
    x, exact = sparse.prepare(images, dtype), np.divide(images, 255, dtype=dtype)
    weights, bias = (
        rng.standard_normal((90, 2 * 70)).astype(dtype)[:, ::2],
        rng.standard_normal(140).astype(dtype)[::-2],
    )
    assert_product(sparse.matmul(x, weights, bias), exact, weights, bias)
    assert_product(sparse.matmul(x, np.asfortranarray(weights), bias), exact, weights, bias)
    assert_product(sparse.matmul(x.T, weights[::-1][:11]), exact.T, weights[::-1][:11])


def test_more_pixels_than_16_bits_can_count(sparse):
    images = random_images((3, 70_000), 0.01)
    x, exact = sparse.prepare(images), np.divide(images, 255, dtype=np.float32)
    weights, upstream = (np.random.default_rng(0).standard_normal((n, 5)).astype(np.float32) for n in (70_000, 3))
    assert_product(sparse.matmul(x, weights), exact, weights)
    assert_product(sparse.matmul(x.T, upstream), exact.T, upstream)


@pytest.mark.parametrize(("n", "pixels", "hidden"), [(0, 5, 3), (3, 5, 0), (3, 0, 4), (0, 0, 0)])
def test_empty_products(sparse, n, pixels, hidden):
    x = sparse.prepare(np.ones((n, pixels), np.uint8))
    bias = np.arange(hidden, dtype=np.float32)
    result = sparse.matmul(x, np.ones((pixels, hidden), np.float32), bias)
    np.testing.assert_allclose(result, np.full((n, hidden), pixels / 255, np.float32) + bias, rtol=1e-6)
    assert sparse.matmul(x.T, np.ones((n, hidden), np.float32)).shape == (pixels, hidden)


def test_results_stay_with_their_images(sparse):
    """In any order of the images, each row of the result and each label belong to the same image."""
    rng = np.random.default_rng(0)
    images = random_images((65, 100), 0.3)
    weights, upstream = (rng.integers(-4, 5, shape).astype(np.float64) for shape in ((100, 20), (65, 20)))
    forward = sparse.matmul(sparse.prepare(images, np.float64), weights)
    backward = sparse.matmul(sparse.prepare(images, np.float64).T, upstream)
    order = rng.permutation(65)
    shuffled = sparse.prepare(images[order], np.float64)
    np.testing.assert_allclose(sparse.matmul(shuffled, weights), forward[order], rtol=0, atol=1e-12)
    np.testing.assert_allclose(sparse.matmul(shuffled.T, upstream[order]), backward, rtol=0, atol=1e-12)


@every_dtype
def test_bits_of_a_row_do_not_depend_on_other_rows(sparse, dtype):
    check_bits_of_rows(sparse, dtype)


def check_bits_of_rows(sparse, dtype):
    """Bit for bit, including the sign of zeros, for any other rows in its group and any position among them."""
    rng = np.random.default_rng(0)
    images = np.concatenate([random_images((40, 150), density, seed) for seed, density in enumerate([0, 0.1, 0.3, 1])])
    staircase = 9 * np.tri(40, 150, -1, dtype=np.uint8)  # no two rows visited together have as many non-zeros
    images = np.concatenate([staircase, images])
    weights = rng.standard_normal((150, 37)).astype(dtype)
    weights[:, ::2] = -np.finfo(dtype).smallest_subnormal  # its products with dark pixels are -0.0
    bias = np.where(np.arange(37) % 4 < 2, -0.0, rng.standard_normal(37)).astype(dtype)
    expected = sparse.matmul(sparse.prepare(images, dtype), weights, bias).tobytes()
    alone = [sparse.matmul(sparse.prepare(images[i : i + 1], dtype), weights, bias) for i in range(len(images))]
    assert b"".join(row.tobytes() for row in alone) == expected
    order = rng.permutation(len(images))
    shuffled = sparse.matmul(sparse.prepare(images[order], dtype), weights, bias)
    assert shuffled[np.argsort(order)].tobytes() == expected


@every_dtype
@pytest.mark.parametrize("nasty", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_reach_only_images_with_ink_there(sparse, dtype, nasty):
    check_non_finite_weights(sparse, dtype, nasty)


def check_non_finite_weights(sparse, dtype, nasty):
    images = random_images((65, 200), 0.3)
    images[::7] = 0
    images[3] = 0
    images[3, 130] = 9
    weights, bias = integers((200, 21), dtype), integers(21, dtype, 1)
    hit = [0, 63, 64, 130, 199]
    weights[hit] = nasty
    result = sparse.matmul(sparse.prepare(images, dtype), weights, bias)
    touched = images[:, hit].any(axis=1)
    assert touched[3]
    assert not touched[::7].any()
    assert not np.isfinite(result[touched]).any()
    untouched = images[~touched]
    assert_product(
        result[~touched], np.divide(untouched, 255, dtype=dtype), np.where(np.isfinite(weights), weights, 0), bias
    )
    np.testing.assert_array_equal(result[::7], np.broadcast_to(bias, (len(result[::7]), 21)))


# Inside their arrays -----------------------------------------------------------------------------------------------


@needs_mprotect
@every_place
@every_dtype
@pytest.mark.parametrize("layout", ["row-major", "misaligned"])
def test_product_stays_inside_its_arrays(layout, dtype, place):
    check_product_inside(sparse_backend, layout, dtype, place)


def check_product_inside(module, layout, dtype, place):
    lanes = module.REGISTER_BYTES // dtype().itemsize
    for (n, k), columns in itertools.product(
        [(1, 1), (2, BLOCK), (3, BLOCK + 1), (5, 7)], [1, lanes - 1, lanes, 7 * lanes + 1, 17 * lanes - 1]
    ):
        images = 255 * (random_images((n, k), 0.4) > 0).astype(np.uint8)  # ones, whose sums are exact
        encoding = [Guarded(array, place=place) for array in module.encode(images)[0]]
        b, bias = (
            Guarded(integers((k, columns), dtype, 1), layout, place),
            Guarded(integers(columns, dtype), layout, place),
        )
        out = Guarded(np.full((n + 1, columns), np.nan, dtype), place=place)
        arguments = b, bias, *encoding
        module.product(*(argument.read_only() for argument in arguments), out.array)
        for argument in arguments:
            argument.assert_unchanged()
        out.assert_canaries_live()
        np.testing.assert_array_equal(out.array[:n], images.astype(dtype) / 255 @ b.array + bias.array)


@needs_mprotect
@every_place
@pytest.mark.parametrize("layout", ["row-major", "transposed", "strided", "reversed"])
def test_encode_stays_inside_its_arrays(layout, place, monkeypatch):
    check_encode_inside(sparse_backend, layout, place, monkeypatch)


def check_encode_inside(module, layout, place, monkeypatch):
    module.encode(np.ones((1, 1), np.uint8))  # compiled, so that only `encode` itself finds this other NumPy
    made = []

    def guarded_empty(shape, dtype):
        made.append(Guarded(np.zeros(shape, dtype), place=place))
        return made[-1].array

    monkeypatch.setattr(module, "np", SimpleNamespace(**{**vars(np), "empty": guarded_empty}))
    for shape, density in itertools.product([(1, 1), (3, BLOCK), (4, BLOCK + 1), (65, 130), (0, 3)], DENSITIES):
        images = Guarded(random_images(shape, density), layout, place)
        nonzeros, transposed = module.encode(images.read_only())
        images.assert_unchanged()
        for array in made:
            array.assert_canaries_live()
        np.testing.assert_array_equal(decode(nonzeros, shape, module.GROUP), images.array)
        np.testing.assert_array_equal(decode(transposed, shape[::-1], module.GROUP), images.array.T)
    assert made


# Other CPUs --------------------------------------------------------------------------------------------------------


OTHERS = {
    "SSE": {"REGISTER_BYTES": 16, "REGISTERS": 16, "HAS_COMPRESS": False},
    "NEON": {"REGISTER_BYTES": 16, "REGISTERS": 32, "HAS_COMPRESS": False},
    "AVX-512": {"REGISTER_BYTES": 64, "REGISTERS": 32, "HAS_COMPRESS": True},
}


@pytest.fixture(scope="module", params=OTHERS.values(), ids=OTHERS)
def elsewhere(request, tmp_path_factory):
    """The backend's module, compiled for other vector registers."""
    with compiled_for(sparse_backend, tmp_path_factory.mktemp("cache"), **request.param) as module:
        yield module


@pytest.mark.slow
def test_images_are_kept_exactly_on_other_cpus(elsewhere, digits28):
    other = elsewhere.SparseBackend()
    for images in (
        digits28.train_images[:301],
        *(random_images(*case) for case in itertools.product(SHAPES, DENSITIES)),
    ):
        x = other.prepare(images)
        np.testing.assert_array_equal(decode(x.nonzeros, x.shape, elsewhere.GROUP), images)
        np.testing.assert_array_equal(decode(x.transposed, x.T.shape, elsewhere.GROUP), images.T)


@pytest.mark.slow
@every_dtype
def test_products_on_other_cpus(elsewhere, dtype):
    other = elsewhere.SparseBackend()
    for hidden in HIDDEN:
        check_products_of_every_size(other, hidden, dtype)
    check_bits_of_rows(other, dtype)
    check_non_finite_weights(other, dtype, np.nan)


@pytest.mark.slow
@needs_mprotect
@every_place
def test_nothing_outside_the_arrays_is_touched_on_other_cpus(elsewhere, place, monkeypatch):
    check_encode_inside(elsewhere, "row-major", place, monkeypatch)
    check_encode_inside(elsewhere, "transposed", place, monkeypatch)
    check_product_inside(elsewhere, "row-major", np.float32, place)


# Dense images ------------------------------------------------------------------------------------------------------


def test_dense_images_give_one_warning():
    """In a new process, as it appears only once; fewer than 85 % of non-zeros, or few dense images, give none."""
    program = textwrap.dedent("""
        import warnings
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np
        from kernels import get_backend
        from kernels.sparse_backend import MANY_PIXELS

        sparse, dense = get_backend("sparse"), np.full((MANY_PIXELS // 784 + 1, 784), 9, np.uint8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for share in 0.19, 0.84:
                sparse.prepare(np.where(np.arange(784) < share * 784, dense, 0).astype(np.uint8))
            sparse.prepare(dense[:4, :64])
            print(len(caught))
            dense[:, :112] = 0  # a seventh
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(sparse.prepare, [dense] * 8))
        for warning in caught:
            print(warning.message)
    """)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    before, warning = result.stdout.splitlines()
    assert before == "0"
    assert warning == "more than 85% of these pixels are not zero: use the numba backend"


@pytest.mark.filterwarnings("ignore:more than 85% of these pixels are not zero")
def test_products_of_dense_images(sparse):
    dense = random_images((MANY_PIXELS // 784 + 1, 784), 0.95)
    exact, weights = np.divide(dense, 255, dtype=np.float32), integers((784, 10), np.float32)
    assert_product(sparse.matmul(sparse.prepare(dense), weights), exact, weights)


@every_dtype
def test_every_grey_value_is_divided_exactly(sparse, dtype):
    images = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(
        sparse.matmul(sparse.prepare(images, dtype), np.ones((1, 1), dtype)), np.divide(images, 255, dtype=dtype)
    )
