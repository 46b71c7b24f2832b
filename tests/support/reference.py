"""Independent answers in extended precision (float64 where the platform has no wider type), and how far a backend may
be from them.

Tolerances are bounds from rounding-error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.),
not values that happened to pass: u is the unit roundoff of the dtype under test.
"""

import numpy as np
from scipy.special import log_softmax, softmax

DTYPES = (np.float32, np.float64)


def unit_roundoff(dtype):
    return np.finfo(dtype).eps / 2


def assert_product(actual, a, b, bias=None, zeros_skipped=False):
    """A computed inner product of k terms is off by at most k u |a|ᵀ|b| to first order, whatever the summation order
    (Higham, eq. 3.5); the bias and the reference's own rounding add three more. Denormals are rounded absolutely. A sum
    with terms that are infinite or NaN is exactly what it has to be.
    """
    wide_a, wide_b = a.astype(np.longdouble), b.astype(np.longdouble)
    exact, scale = wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)
    if zeros_skipped:
        products = np.where(a[:, :, None] == 0, 0, wide_a[:, :, None] * wide_b)
        exact, scale = products.sum(axis=1), np.abs(products).sum(axis=1)
    if bias is not None:
        exact, scale = exact + bias, scale + np.abs(bias)
    terms = a.shape[1] + 3
    tiny = terms * np.finfo(actual.dtype).smallest_subnormal
    assert_shape(actual, exact.shape, a.dtype)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(actual[~finite], exact[~finite])
    errors = np.abs(actual[finite] - exact[finite])
    assert np.all(errors <= terms * unit_roundoff(a.dtype) * scale[finite] + tiny)
    return float(np.max(errors, initial=0))


def assert_softmax_grad(result, logits, labels):
    """A difference d to the row's largest logit is rounded by u|d|, so exp(d) is off by u|d|exp(d) < u, absolutely; the
    exponential itself, the sum of c classes, the division and the subtraction add c + 4 roundings of values up to 1.
    The loss of a row, log(sum) - d, is off by u(|d| + log c + c + 4); n rows are added in float64. Where the largest
    logit is not finite, the row's gradient and the loss are NaN; a label at -∞ alone makes the loss infinite.
    """
    loss, correct, gradient = result
    exact = logits.astype(np.longdouble)
    rows, classes = logits.shape
    onehot = np.arange(classes) == labels[:, None]
    u = unit_roundoff(logits.dtype)
    assert_shape(gradient, logits.shape, logits.dtype)
    finite = np.isfinite(exact.max(axis=1))
    assert np.all(np.isnan(gradient[~finite]))
    errors = np.abs(gradient[finite] - (softmax(exact[finite], axis=1) - onehot[finite]))
    assert np.all(errors <= (classes + 5) * u)
    assert correct == np.sum(exact.argmax(axis=1) == labels)
    if not finite.all():
        assert np.isnan(loss)
    elif np.any(np.isneginf(exact[onehot])):
        assert loss == np.inf
    else:
        distances = (exact.max(axis=1, keepdims=True) - exact)[onehot]
        exact_loss = -log_softmax(exact, axis=1)[onehot].sum()
        row_errors = u * np.sum(distances + np.log(classes) + classes + 4)
        assert abs(loss - exact_loss) <= row_errors + rows * unit_roundoff(np.float64) * exact_loss
    return float(np.max(errors, initial=0))


def assert_shape(actual, shape, dtype):
    assert (actual.shape, actual.dtype) == (shape, dtype)
    assert actual.flags.c_contiguous
    assert actual.flags.writeable
