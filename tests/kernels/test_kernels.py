"""Every backend on every kernel and the update: nasty inputs against an independent float64 reference."""

import copy
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import Backend, backend_names, get_backend
from kernels.numpy_backend import NumpyBackend
from model.mlp import MLP
from tests.support.reference import DTYPES, assert_product, assert_shape, assert_softmax_grad
from tests.support.systems import needs_long_double

LAYOUTS = ("contiguous", "transposed", "every second", "reversed", "read-only", "misaligned")
SCALES = (1.0, 1e-40, 1e30)  # float32 denormals, and large values whose products still fit

property_test = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(0, 20) | st.sampled_from([31, 33, 65])
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
writable_layouts = st.sampled_from([layout for layout in LAYOUTS if layout != "read-only"])
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.01, 0.1, 0.5])


def laid_out(array, layout):
    """A view equal to `array`, with a different memory layout."""
    if layout == "transposed":
        return np.ascontiguousarray(array.T).T
    if layout == "every second":
        wide = np.ones([2 * size for size in array.shape], array.dtype)
        wide[tuple(slice(None, None, 2) for _ in array.shape)] = array
        return wide[tuple(slice(None, None, 2) for _ in array.shape)]
    if layout == "reversed":
        backwards = tuple(slice(None, None, -1) for _ in array.shape)
        return np.ascontiguousarray(array[backwards])[backwards]
    if layout == "misaligned":
        raw = np.frombuffer(bytearray(b"\0" + array.tobytes() + b"\0"), np.uint8)[1 : 1 + array.nbytes]
        return raw.view(array.dtype).reshape(array.shape) if array.size else array
    view = array.copy()
    view.flags.writeable = layout != "read-only"
    return view


def random_matrix(rng, shape, dtype, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(dtype)


def random_images(rng, shape, density):
    return rng.integers(0, 256, shape, np.uint8) * (rng.random(shape) < density).astype(np.uint8)


def with_special_values(rng, shape, dtype, share):
    """Ordinary numbers mixed with zeros of both signs, denormals, infinities and NaN."""
    tiny = np.finfo(dtype).smallest_subnormal
    special = rng.choice(np.array([0.0, -0.0, 3 * tiny, -tiny, np.inf, -np.inf, np.nan], dtype), shape)
    return np.where(rng.random(shape) < share, special, random_matrix(rng, shape, dtype))


@property_test
@given(
    n=sizes,
    k=sizes,
    m=sizes,
    dtype=dtypes,
    layout_a=layouts,
    layout_b=layouts,
    seed=seeds,
    bias=st.booleans(),
)
def test_matmul(backend, n, k, m, dtype, layout_a, layout_b, seed, bias):
    rng = np.random.default_rng(seed)
    scale_a, scale_b = rng.permutation(SCALES)[:2]
    a, b = random_matrix(rng, (n, k), dtype, scale_a), random_matrix(rng, (k, m), dtype, scale_b)
    bias = laid_out(random_matrix(rng, m, dtype), layout_b) if bias else None
    result = backend.matmul(laid_out(a, layout_a), laid_out(b, layout_b), bias)
    assert_product(result, a, b, bias)


@property_test
@given(
    n=st.integers(0, 40),
    pixels=st.integers(1, 70),
    m=st.integers(1, 20),
    density=st.floats(0, 1),
    dtype=dtypes,
    layout=layouts,
    seed=seeds,
)
def test_products_of_prepared_images(backend, n, pixels, m, density, dtype, layout, seed):
    rng = np.random.default_rng(seed)
    images = random_images(rng, (n, pixels), density)
    x = backend.prepare(laid_out(images, layout), dtype)
    exact = np.divide(images, 255, dtype=dtype)
    assert (len(x), x.shape, x.T.shape, x.dtype) == (n, (n, pixels), (pixels, n), dtype)
    weights, bias, upstream = (random_matrix(rng, shape, dtype) for shape in ((pixels, m), m, (n, m)))
    assert_product(backend.matmul(x, weights, bias), exact, weights, bias)
    assert_product(backend.matmul(x.T, upstream), exact.T, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_at_the_networks_shapes(backend, dtype, record_property):
    """The shapes of a step, with 30 images so that pure Python can keep up; the largest errors are recorded."""
    rng = np.random.default_rng(0)
    x = rng.random((30, 784)).astype(dtype) * (rng.random((30, 784)) < 0.2)
    weights_1, weights_2 = random_matrix(rng, (784, 128), dtype), random_matrix(rng, (128, 10), dtype)
    hidden, upstream = random_matrix(rng, (30, 128), dtype), random_matrix(rng, (30, 10), dtype)
    for name, a, b in (
        ("forward", x.astype(dtype), weights_1),
        ("backward", x.astype(dtype).T, hidden),
        ("logits", hidden, weights_2),
        ("hidden gradient", upstream, weights_2.T),
        ("weight gradient", hidden.T, upstream),
    ):
        record_property(f"largest error, {name}", assert_product(backend.matmul(a, b), a, b))


def test_prepare_keeps_every_grey_value(backend):
    """Division by 255, rounded once; a multiplication by the rounded 1/255 may be off by one unit in the last place."""
    images = np.arange(256, dtype=np.uint8)[None]
    for dtype in DTYPES:
        identity = np.eye(256, dtype=dtype)
        values = backend.matmul(backend.prepare(images, dtype), identity)
        np.testing.assert_array_equal(values, np.divide(images, 255, dtype=dtype))


@property_test
@given(
    n=sizes,
    m=sizes,
    dtype=dtypes,
    layout_z=writable_layouts,
    layout_upstream=writable_layouts,
    layout=layouts,
    seed=seeds,
)
def test_relu_and_its_gradient(backend, n, m, dtype, layout_z, layout_upstream, layout, seed):
    rng = np.random.default_rng(seed)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.0, -1.0]
    z, upstream = (rng.choice(special, (n, m)).astype(dtype) for _ in range(2))
    activations = backend.relu(laid_out(z, layout_z))
    assert_shape(activations, z.shape, dtype)
    np.testing.assert_array_equal(activations, np.where(z <= 0, 0, z))
    gradient = backend.relu_grad(laid_out(upstream, layout_upstream), laid_out(activations, layout))
    assert_shape(gradient, z.shape, dtype)
    np.testing.assert_array_equal(gradient, np.where(z > 0, upstream, 0))


@property_test
@given(n=sizes, classes=st.integers(1, 20), dtype=dtypes, layout=layouts, seed=seeds)
def test_softmax_grad(backend, n, classes, dtype, layout, seed):
    """Rows of very different magnitude in one batch: subtracting another row's maximum would underflow or overflow."""
    rng = np.random.default_rng(seed)
    row_scales = rng.choice([0.0, 1e-40, 1.0, 30.0, 1e4], (n, 1))
    offsets = rng.choice([0.0, 1e4, -1e4], (n, 1))
    logits = np.clip(rng.uniform(-1, 1, (n, classes)) * row_scales + offsets, -1e4, 1e4).astype(dtype)
    labels = rng.integers(0, classes, n).astype(rng.choice(["u1", "i4", "i8"]))
    assert_softmax_grad(backend.softmax_grad(laid_out(logits, layout), laid_out(labels, layout)), logits, labels)


def test_softmax_grad_of_ties(backend):
    logits = np.zeros((3, 4), np.float32)
    loss, correct, gradient = backend.softmax_grad(logits, np.array([0, 1, 3]))
    assert correct == 1  # the lowest index wins
    assert loss == pytest.approx(3 * np.log(4), rel=1e-6)
    np.testing.assert_allclose(gradient, 0.25 - np.eye(4)[[0, 1, 3]], atol=1e-7)


@property_test
@given(n=sizes, k=sizes, m=sizes, dtype=dtypes, layout=layouts, share=shares, seed=seeds, bias=st.booleans())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_matmul_of_special_values(backend, n, k, m, dtype, layout, share, seed, bias):
    """As IEEE 754 has it: 0 × ∞ and ∞ - ∞ are NaN, and denormals are not flushed to zero."""
    rng = np.random.default_rng(seed)
    a, b, row = (with_special_values(rng, shape, dtype, share) for shape in ((n, k), (k, m), m))
    bias = row if bias else None
    assert_product(backend.matmul(laid_out(a, layout), laid_out(b, layout), bias), a, b, bias)


@property_test
@given(n=sizes, pixels=sizes, m=sizes, density=st.floats(0, 1), dtype=dtypes, share=shares, seed=seeds)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_products_of_prepared_images_with_special_values(backend, n, pixels, m, density, dtype, share, seed):
    """A backend may skip pixels of 0: then they add nothing to a sum, whatever their factor."""
    rng = np.random.default_rng(seed)
    images = random_images(rng, (n, pixels), density)
    exact, x = np.divide(images, 255, dtype=dtype), backend.prepare(images, dtype)
    weights, bias, upstream = (with_special_values(rng, shape, dtype, share) for shape in ((pixels, m), m, (n, m)))
    black, infinity = np.zeros((1, 1), np.uint8), np.full((1, 1), np.inf, dtype)
    zeros_skipped = backend.matmul(backend.prepare(black, dtype), infinity) == 0
    assert_product(backend.matmul(x, weights, bias), exact, weights, bias, zeros_skipped)
    assert_product(backend.matmul(x.T, upstream), exact.T, upstream, None, zeros_skipped)


@property_test
@given(n=sizes, classes=st.integers(1, 20), dtype=dtypes, layout=layouts, share=shares, seed=seeds)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_softmax_grad_of_special_values(backend, n, classes, dtype, layout, share, seed):
    rng = np.random.default_rng(seed)
    logits, labels = with_special_values(rng, (n, classes), dtype, share), rng.integers(0, classes, n)
    assert_softmax_grad(backend.softmax_grad(laid_out(logits, layout), labels), logits, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_rows(backend, dtype):
    """Views with a row stride of 0."""
    row, labels = np.linspace(-1, 1, 40, dtype=dtype), np.broadcast_to(np.int64(3), 9)
    rows = np.broadcast_to(row, (9, 40))
    assert_product(backend.matmul(rows, rows.T), rows, rows.T)
    assert_softmax_grad(backend.softmax_grad(rows, labels), rows, labels)
    for kernel, *activations in (backend.relu,), (backend.relu_grad, rows):
        overwritten = np.lib.stride_tricks.as_strided(row.copy(), rows.shape, rows.strides)
        np.testing.assert_array_equal(kernel(overwritten, *activations), np.maximum(rows, 0))
    images = np.broadcast_to(np.arange(40, dtype=np.uint8), (9, 40))
    exact, weights = np.divide(images, 255, dtype=dtype), np.ones((40, 3), dtype)
    assert_product(backend.matmul(backend.prepare(images, dtype), weights), exact, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [np.matrix, np.memmap])
def test_array_subclasses_are_read_as_plain_arrays(backend, kind, dtype):
    plain = random_matrix(np.random.default_rng(0), (5, 5), dtype)
    array, labels = plain.view(kind), np.arange(5)
    for mine, other in (
        (backend.relu(array.copy()), backend.relu(plain.copy())),
        (backend.relu_grad(array.copy(), array), backend.relu_grad(plain.copy(), plain)),
        (backend.matmul(array, array, plain[0]), backend.matmul(plain, plain, plain[0])),
        (backend.softmax_grad(array, labels)[2], backend.softmax_grad(plain, labels)[2]),
    ):
        assert type(mine) is np.ndarray
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("images", [0, 1])
def test_empty_batch_and_single_image(backend, images):
    rng = np.random.default_rng(0)
    mlp = MLP((30, 20, 10), dtype=np.float64)
    pixels, labels = random_images(rng, (images, 30), 0.5), rng.integers(0, 10, images)
    loss, correct, gradient = mlp.gradients(backend, backend.prepare(pixels, mlp.dtype), labels)
    expected_loss, expected_correct, expected = mlp.gradients(NumpyBackend(), pixels / 255, labels)
    assert (loss, correct) == (pytest.approx(expected_loss, rel=1e-14), expected_correct)
    for ours, theirs in zip(gradient, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-16)  # sums of up to 20 terms of size 0.01
    assert loss > 0 if images else loss == correct == 0


def test_other_arguments_are_not_modified(backend):
    """Only `relu` and `relu_grad` may overwrite an argument, their first."""
    rng = np.random.default_rng(0)
    z, upstream = random_matrix(rng, (6, 7), np.float32), random_matrix(rng, (6, 7), np.float32)
    labels = np.arange(6)
    before = z.copy(), upstream.copy()
    backend.relu_grad(upstream.copy(), z)
    backend.softmax_grad(z, labels)
    backend.matmul(z, upstream.T, z[:, 0].copy())
    np.testing.assert_array_equal(z, before[0])
    np.testing.assert_array_equal(upstream, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second", "reversed", "misaligned"])
@pytest.mark.parametrize("shape", [(0,), (1,), (37,), (5, 0), (13, 67)])
@pytest.mark.parametrize("factor", [0.1 / 3, np.float64(0.1 / 3)])
def test_update_rounds_the_product_and_the_difference(backend, factor, shape, layout, dtype):
    """For any type of factor, and even if NumPy raises errors on overflow and underflow."""
    rng = np.random.default_rng(0)
    start, gradient = with_special_values(rng, shape, dtype, 0.1), with_special_values(rng, shape, dtype, 0.1)
    parameter = laid_out(start, layout)
    with np.errstate(all="ignore"):
        expected = start - gradient * np.array(0.1 / 3, dtype)
    with np.errstate(all="raise"):
        backend.update(parameter, laid_out(gradient, layout), factor)
    np.testing.assert_array_equal(parameter, expected)


@pytest.mark.parametrize(("which", "name"), [(0, "parameter"), (1, "gradient")])
def test_update_refuses_read_only_arrays(backend, which, name):
    arrays = [floats(3), floats(3)]
    arrays[which].flags.writeable = False
    with pytest.raises(ValueError, match=f"{name} is read-only, but update may overwrite it"):
        backend.update(*arrays, 0.1)
    np.testing.assert_array_equal(arrays[0], 1)


def floats(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.matmul(floats(2, 3), floats(4, 5)), r"a \(2, 3\) by b \(4, 5\)"),
        (lambda b: b.matmul(floats(3), floats(3, 1)), r"two dimensions, not shape \(3,\)"),
        (lambda b: b.matmul(floats(2, 3), floats(3, 4).astype(float)), "a is float32 but b is float64"),
        (lambda b: b.matmul(floats(2, 3), floats(3, 4).astype(int)), "b must be .* not int64"),
        (lambda b: b.matmul(floats(2, 3), floats(3, 4).astype(">f4")), "native float32 or float64, not >f4"),
        (lambda b: b.matmul(floats(2, 3), floats(3, 4).astype(object)), "b must be .* not object"),
        (lambda b: b.matmul([[1.0]], floats(1, 1)), "a must be .* not list"),
        (lambda b: b.matmul(floats(2, 3), floats(3, 4), floats(3)), r"shape \(4,\).* not \(3,\)"),
        (lambda b: b.matmul(floats(2, 3), floats(3, 4), np.ones(4)), "b is float32 but bias is float64"),
        (lambda b: b.prepare(floats(2, 3)), r"uint8 array of shape \(n, pixels\), not float32 \(2, 3\)"),
        (lambda b: b.prepare(np.ones(3, np.uint8)), r"not uint8 \(3,\)"),
        (lambda b: b.prepare(np.ones((2, 3), np.uint8), np.int32), "float32 or float64, not int32"),
        (lambda b: b.relu(np.ones((2, 2), np.int8)), "not int8"),
        (lambda b: b.relu(floats(2, 3, 4)), "two dimensions"),
        (lambda b: b.relu(np.broadcast_to(np.float32(1), (2, 3))), "z is read-only, but relu may overwrite it"),
        (lambda b: b.relu_grad(np.broadcast_to(np.float32(1), (2, 3)), floats(2, 3)), "upstream is read-only"),
        (lambda b: b.relu_grad(floats(2, 3), floats(3, 2)), r"\(2, 3\) and activations \(3, 2\)"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([0, 3])), r"from 0 to 2, but labels\[1\] is 3"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([-1, 0])), r"labels\[0\] is -1"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([-128, 0], np.int8)), r"labels\[0\] is -128"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([0, 2**63 - 1])), rf"labels\[1\] is {2**63 - 1}"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([2, 2**64 - 1], np.uint64)), rf"labels\[1\] is {2**64 - 1}"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([2, 9, 9])[::2]), r"labels\[1\] is 9"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([0, 1, 2])), r"shape \(2,\).* not \(3,\)"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([0.0, 1.0])), "native integers, not float64"),
        (lambda b: b.softmax_grad(floats(2, 3), np.array([0, 1], ">i4")), "native integers, not >i4"),
        (lambda b: b.softmax_grad(floats(2, 0), np.array([0, 1])), "at least one class"),
        (lambda b: b.update(floats(2, 3), floats(3, 2), 0.1), r"parameter \(2, 3\) and gradient \(3, 2\) must"),
        (lambda b: b.update(floats(3), np.ones(3), 0.1), "parameter is float32 but gradient is float64"),
        (lambda b: b.update([1.0], np.ones(1), 0.1), "parameter must be .* not list"),
    ],
)
def test_wrong_arguments(call, message):
    """The checks belong to the base class, so one backend is enough."""
    with pytest.raises(ValueError, match=message):
        call(NumpyBackend())


def test_prepared_images_of_a_wrong_shape(backend):
    """Each backend has its own format."""
    x = backend.prepare(np.ones((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a \(2, 3\) by b \(4, 5\)"):
        backend.matmul(x, floats(4, 5))
    with pytest.raises(ValueError, match="a is float32 but b is float64"):
        backend.matmul(x, floats(3, 5).astype(float))


VALID = {
    "prepare": (np.ones((2, 3), np.uint8),),
    "matmul": (floats(2, 3), floats(3, 4), floats(4)),
    "relu": (floats(2, 3),),
    "relu_grad": (floats(2, 3), floats(2, 3)),
    "softmax_grad": (floats(2, 3), np.array([0, 2])),
    "update": (floats(2, 3), floats(2, 3), 0.1),
}

WRONG = {
    "object": lambda array: array.astype(object),
    "foreign byte order": lambda array: array.astype(np.dtype(f"{array.dtype.kind}8").newbyteorder()),
    "float16": lambda array: array.astype(np.float16),
    "longdouble": lambda array: array.astype(np.longdouble),
    "complex": lambda array: array.astype(np.complex64),
    "bool": lambda array: array.astype(bool),
    "text": lambda array: array.astype(str),
    "time": lambda array: array.astype(np.int64).view("m8[s]"),
    "record": lambda array: array.astype([("value", array.dtype)]),
    "list": lambda array: array.tolist(),
    "scalar": lambda array: array.flat[0],
    "number": lambda array: 1.0,
    "no dimension": lambda array: array.flat[:1].reshape(()),
    "another dimension": lambda array: array[None],
}


@pytest.mark.parametrize("method", VALID)
def test_every_backend_leaves_the_checks_to_the_base_class(backend, method):
    assert getattr(type(backend), method) is getattr(Backend, method)
    getattr(backend, method)(*copy.deepcopy(VALID[method]))


@pytest.mark.parametrize(
    "wrong", [pytest.param(name, marks=needs_long_double if name == "longdouble" else ()) for name in WRONG]
)
@pytest.mark.parametrize(
    ("method", "position"),
    [
        (method, position)
        for method, arguments in VALID.items()
        for position, argument in enumerate(arguments)
        if isinstance(argument, np.ndarray)
    ],
)
def test_wrong_types_in_every_place(method, position, wrong):
    arguments = list(VALID[method])
    arguments[position] = WRONG[wrong](arguments[position])
    with pytest.raises(ValueError, match="must"):
        getattr(NumpyBackend(), method)(*arguments)


class Custom(NumpyBackend):
    """A custom backend."""

    class Inner(NumpyBackend):
        """Named by its qualified name."""


class Empty(NumpyBackend):
    """No call could have any images."""

    images_at_once = 0


class Yes(NumpyBackend):
    images_at_once = True


class Sized(NumpyBackend):
    """No backend can have parameters."""

    def __init__(self, size):
        self.size = size


class Scalars(NumpyBackend):
    def _softmax_grad(self, logits, labels):
        loss, correct, gradient = super()._softmax_grad(logits, labels)
        return np.float32(loss), np.int64(correct), gradient


def test_loss_and_count_are_plain_numbers():
    """NumPy's scalars would fail at the end of a run, when they are written as JSON."""
    loss, correct, _ = Scalars().softmax_grad(floats(2, 3), np.array([0, 1]))
    assert (type(loss), type(correct)) == (float, int)


OURS = ("naive", "numpy", "numba", "sparse")


def test_backends_are_found_by_name():
    assert backend_names()[:2] == ["naive", "numpy"]
    for name in backend_names():
        assert get_backend(name).name == name
        assert repr(get_backend(name)) == f"get_backend('{name}')"
    assert [name for name in OURS if get_backend(name).too_slow_for_full_batches] == ["naive"]
    for custom in ("tests.kernels.test_kernels:Custom", "tests.kernels.test_kernels:Custom.Inner"):
        assert get_backend(custom).name == custom


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cupy", "unknown backend 'cupy': choose one of naive, numpy"),
        ("no.such.module:Class", "No module named 'no'"),
        ("tests.kernels.test_kernels:Nothing", "no attribute 'Nothing'"),
        ("kernels:backend_names", "not a subclass of kernels.Backend"),
        ("kernels.backend:Backend", "Backend lacks _matmul, _relu, _relu_grad, _softmax_grad"),
        ("tests.kernels.test_kernels:Sized", r"cannot create backend .*missing 1 required .*'size'"),
        ("tests.kernels.test_kernels:Empty", "images_at_once must be a positive integer, not 0"),
        ("tests.kernels.test_kernels:Yes", "images_at_once must be a positive integer, not True"),
        (".relative:Class", "name it as package.module:Class, without folders"),
        ("../folder/module:Class", "name it as package.module:Class, without folders"),
        (":Class", "name it as package.module:Class, without folders"),
        (None, "the name of a backend must be a string, not None"),
    ],
)
def test_unknown_backend(name, message):
    with pytest.raises(ValueError, match=message):
        get_backend(name)


def test_a_new_file_is_a_new_backend(tmp_path, monkeypatch):
    source = "from kernels.numpy_backend import NumpyBackend\nclass Mine(NumpyBackend): pass\n"
    (tmp_path / "mine_backend.py").write_text(source)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    assert "mine" in backend_names()
    assert isinstance(get_backend("mine"), Backend)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Mine(NumpyBackend): pass\nclass Faster(Mine): pass", "exactly one .*; it has Mine and Faster"),
        ("", "broken_backend.py must define exactly one subclass of Backend; it has none"),
        ("class Mine(Backend): pass", "'broken': Mine lacks _matmul, _relu, _relu_grad, _softmax_grad"),
        ("class Mine(NumpyBackend:", r"cannot load backend 'broken': SyntaxError: .*broken_backend.py, line 3"),
        ("1 / 0", "cannot load backend 'broken': ZeroDivisionError: division by zero"),
        ("int('x')", "cannot load backend 'broken': ValueError: invalid literal"),
    ],
)
def test_a_broken_file_is_named(tmp_path, monkeypatch, body, message):
    """Whether it is asked for by its own name or by that of a module."""
    imports = "from kernels import Backend\nfrom kernels.numpy_backend import NumpyBackend\n"
    (tmp_path / "broken_backend.py").write_text(imports + body)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "kernels.broken_backend", raising=False)
    with pytest.raises(ValueError, match=message) as raised:
        get_backend("broken")
    assert "\n" not in str(raised.value)
    if "cannot load" in message:
        with pytest.raises(ValueError, match=message.replace("'broken'", "'kernels.broken_backend:Mine'")):
            get_backend("kernels.broken_backend:Mine")
