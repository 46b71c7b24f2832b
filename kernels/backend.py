"""The contract: what every backend computes, and the one place where arguments are checked.

The public methods check shapes, dtypes and labels once. Then they call the backend's ``_matmul``, ``_relu`` and so on,
which may trust their arguments. The four kernels keep the dtype of their arguments (float32, or float64 for gradient
checks). They are thread-safe. They return new, writable, row-major arrays and leave their arguments alone, with one
exception: `relu` and `relu_grad` may overwrite their first argument and return it, since the network does not use it
again. The update works in place.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class Matrix(Protocol):
    """The left operand of `Backend.matmul`: an array, or images in the backend's own format."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def T(self) -> "Matrix": ...
    def __len__(self) -> int: ...


class Backend(ABC):
    """The four kernels of the network, the conversion of its images, and the update of its parameters.

    Attributes
    ----------
    too_slow_for_full_batches : bool
        Whether an epoch over all images takes many minutes, as it does in pure Python.
    images_at_once : int
        Maximum number of images that a caller with many thousands should pass in one call: few enough that a layer's
        results stay in L2, enough to amortize the calls from Python.
    """

    too_slow_for_full_batches = False
    images_at_once = 1024

    def __repr__(self) -> str:
        return f"get_backend({self.name!r})"

    @property
    def name(self) -> str:
        """The name that :func:`kernels.get_backend` takes."""
        module, _, file = type(self).__module__.rpartition(".")
        if module == "kernels":
            return file.removesuffix("_backend")
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @property
    def compile_seconds(self) -> float:
        """Seconds that this process has spent compiling kernels so far."""
        return 0.0

    def prepare(self, images: NDArray[np.uint8], dtype: DTypeLike = np.float32) -> Any:
        """Convert images to the backend's preferred left operand of `matmul`.

        Parameters
        ----------
        images
            (n, pixels) uint8, one image per row, 0 to 255.
        dtype
            float32 or float64: the type of the pixels after the division by 255.

        Returns
        -------
        Matrix
            (n, pixels): the images / 255, with ``len``, ``shape``, ``dtype``, ``.T``, and ``nbytes`` for the memory
            limit.

        Raises
        ------
        ValueError
            If `images` is not a two-dimensional uint8 array, or `dtype` is neither float32 nor float64.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
            raise ValueError(f"images must be a uint8 array of shape (n, pixels), not {_describe(images)}")
        if np.dtype(dtype) not in FLOATS:
            raise ValueError(f"dtype must be float32 or float64, not {np.dtype(dtype)}")
        return self._prepare(images, np.dtype(dtype))

    def matmul(self, a: Matrix, b: NDArray, bias: NDArray | None = None) -> NDArray:
        """A B, plus `bias` on each row.

        Parameters
        ----------
        a
            (n, k): an array, prepared images, or the ``.T`` of either.
        b
            (k, m) array of the same dtype; any strides.
        bias
            (m,) array of the same dtype, or None.

        Returns
        -------
        ndarray
            (n, m), new, writable and row-major, in the dtype of `a`.

        Raises
        ------
        ValueError
            If shapes or dtypes do not match, or a dtype is not native float32 or float64.
        """
        if not _is_product(a, b, bias):
            _check_product(a, b, bias)
        return self._matmul(a, b, bias)

    def relu(self, z: NDArray) -> NDArray:
        """max(z, 0), element by element.

        Parameters
        ----------
        z
            (n, m), float32 or float64, writable. Its content is undefined afterwards.

        Returns
        -------
        ndarray
            (n, m), row-major, in the dtype of `z`; NaN where `z` is NaN. It may be `z` itself.

        Raises
        ------
        ValueError
            If `z` is not a writable, two-dimensional array of native float32 or float64.
        """
        if not (_is_matrix(z) and z.flags.writeable):
            _check_matrix(z, "z")
            _check_writable("relu", z=z)
        return self._relu(z)

    def relu_grad(self, upstream: NDArray, activations: NDArray) -> NDArray:
        """`upstream` where the activation is positive, else 0.

        A ReLU's activation is positive exactly where its input is, so the input need not be kept.

        Parameters
        ----------
        upstream
            (n, m), float32 or float64, writable: gradient of the loss with respect to the activations. Its content is
            undefined afterwards.
        activations
            (n, m), same dtype, in other memory: the output of `relu`.

        Returns
        -------
        ndarray
            (n, m), row-major: gradient of the loss with respect to the input of `relu`. It may be `upstream` itself.

        Raises
        ------
        ValueError
            If shapes or dtypes differ, an argument is not a two-dimensional array of native float32 or float64, or
            `upstream` is not writable.
        """
        if not (_is_matrix(upstream) and upstream.flags.writeable and _is_like(activations, upstream)):
            _check_pair(upstream, activations)
        return self._relu_grad(upstream, activations)

    def softmax_grad(self, logits: NDArray, labels: NDArray[np.integer]) -> tuple[float, int, NDArray]:
        """Cross-entropy of softmax(logits) against integer labels, and its gradient with respect to the logits.

        With p = softmax(logits), row by row, the loss is the sum of -log p[label] and its gradient p - onehot(label)
        (Bishop, Pattern Recognition and Machine Learning, eq. 4.109). Each row's maximum is subtracted
        before exponentiation, so finite logits never overflow.

        Parameters
        ----------
        logits
            (n, classes), float32 or float64.
        labels
            (n,), any native integer dtype, from 0 to classes - 1.

        Returns
        -------
        tuple[float, int, ndarray]
            The loss in nats, summed over the rows; how many rows have their largest logit at the label (the first one
            wins a tie); softmax(logits) - onehot(labels), (n, classes), not divided by n.

        Raises
        ------
        ValueError
            If shapes or dtypes do not match, or a label is out of range.
        """
        if not _is_labelled(logits, labels):
            _check_labelled(logits, labels)
        loss, correct, gradient = self._softmax_grad(logits, labels)
        return float(loss), int(correct), gradient

    def update(self, parameter: NDArray, gradient: NDArray, factor: float) -> None:
        """Subtract `factor` times the gradient from the parameter, in place.

        Parameters
        ----------
        parameter
            Any shape, float32 or float64: written.
        gradient
            Same shape and dtype, writable, in other memory than the parameter; its content is undefined afterwards.
        factor
            Rounded to that dtype, as is the product, so every backend gives the same bits.

        Raises
        ------
        ValueError
            If shapes or dtypes differ, an argument is not an array of native float32 or float64, or one is read-only.
        """
        is_valid = type(parameter) is np.ndarray and parameter.dtype in FLOATS and _is_like(gradient, parameter)
        if not (is_valid and parameter.flags.writeable and gradient.flags.writeable):
            _check_update(parameter, gradient)
        self._update(parameter, gradient, float(factor))  # NumPy would compute in the type of a float64 scalar

    def _prepare(self, images: NDArray[np.uint8], dtype: np.dtype) -> Any:
        return np.divide(images, 255, dtype=dtype)

    def _update(self, parameter: NDArray, gradient: NDArray, factor: float) -> None:
        with np.errstate(all="ignore"):  # an overflow shows in the loss
            gradient *= factor  # in place: a temporary would double the time
            parameter -= gradient

    @abstractmethod
    def _matmul(self, a: Any, b: NDArray, bias: NDArray | None) -> NDArray: ...

    @abstractmethod
    def _relu(self, z: NDArray) -> NDArray: ...

    @abstractmethod
    def _relu_grad(self, upstream: NDArray, activations: NDArray) -> NDArray: ...

    @abstractmethod
    def _softmax_grad(self, logits: NDArray, labels: NDArray[np.integer]) -> tuple[float, int, NDArray]: ...


# The fast path ----------------------------------------------------------------------------------------------
#
# Nearly all arguments are valid. The full checks below would take 15 to 20 µs of each training step, a tenth of a step
# on a small batch; these take a third of that. False means only that the full checks must decide.


def _is_matrix(value: Any) -> bool:
    return type(value) is np.ndarray and value.ndim == 2 and value.dtype in FLOATS


def _is_like(value: Any, other: NDArray) -> bool:
    return type(value) is np.ndarray and value.dtype is other.dtype and value.shape == other.shape


def _is_product(a: Any, b: Any, bias: Any) -> bool:
    try:
        (_, columns), (rows, width), dtype = a.shape, b.shape, b.dtype
        return (
            columns == rows
            and a.dtype is dtype
            and type(b) is np.ndarray
            and dtype in FLOATS
            and (bias is None or (type(bias) is np.ndarray and bias.dtype is dtype and bias.shape == (width,)))
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _is_labelled(logits: Any, labels: Any) -> bool:
    if not (_is_matrix(logits) and type(labels) is np.ndarray and labels.dtype.kind in "iu" and labels.dtype.isnative):
        return False
    rows, classes = logits.shape
    # Calling argmax takes a third as long as calling max.
    return labels.shape == (rows,) and rows > 0 and labels[labels.argmin()] >= 0 and labels[labels.argmax()] < classes


# The full checks --------------------------------------------------------------------------------------------


def _check_product(a: Any, b: Any, bias: Any) -> None:
    _check_matrix(b, "b")
    if isinstance(a, np.ndarray) or not getattr(a, "shape", ()):  # NumPy scalars also have a shape
        _check_matrix(a, "a")
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"cannot multiply a {a.shape} by b {b.shape}: {a.shape[1]} columns, {b.shape[0]} rows")
    _check_same_dtype(a=a, b=b)
    if bias is not None:
        _check_float(bias, "bias")
        if bias.shape != (b.shape[1],):
            raise ValueError(f"bias must have shape ({b.shape[1]},), one for each column of b, not {bias.shape}")
        _check_same_dtype(b=b, bias=bias)


def _check_pair(upstream: Any, activations: Any) -> None:
    _check_matrix(upstream, "upstream")
    _check_writable("relu_grad", upstream=upstream)
    _check_matrix(activations, "activations")
    _check_same_shape(upstream=upstream, activations=activations)
    _check_same_dtype(upstream=upstream, activations=activations)


def _check_update(parameter: Any, gradient: Any) -> None:
    _check_float(parameter, "parameter")
    _check_float(gradient, "gradient")
    _check_same_shape(parameter=parameter, gradient=gradient)
    _check_same_dtype(parameter=parameter, gradient=gradient)
    _check_writable("update", parameter=parameter, gradient=gradient)


def _check_labelled(logits: Any, labels: Any) -> None:
    _check_matrix(logits, "logits")
    rows, classes = logits.shape
    if classes == 0:
        raise ValueError(f"logits {logits.shape} must have at least one class")
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or not labels.dtype.isnative:
        raise ValueError(f"labels must be an array of native integers, not {_describe(labels)}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must have shape ({rows},), one for each row of logits, not {labels.shape}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(f"labels must be from 0 to {classes - 1}, but labels[{wrong[0]}] is {labels[wrong[0]]}")


def _check_float(value: Any, name: str) -> None:
    if not isinstance(value, np.ndarray) or value.dtype not in FLOATS:  # FLOATS are native, and equal no others
        raise ValueError(f"{name} must be an array of native float32 or float64, not {_describe(value)}")


def _check_matrix(value: Any, name: str) -> None:
    _check_float(value, name)
    if value.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, not shape {value.shape}")


def _check_writable(kernel: str, **arrays: Any) -> None:
    for name, value in arrays.items():
        if not value.flags.writeable:
            raise ValueError(f"{name} is read-only, but {kernel} may overwrite it: pass a writable array")


def _check_same_shape(**arrays: Any) -> None:
    (first, a), (second, b) = arrays.items()
    if a.shape != b.shape:
        raise ValueError(f"{first} {a.shape} and {second} {b.shape} must have the same shape")


def _check_same_dtype(**arrays: Any) -> None:
    (first, a), (second, b) = arrays.items()
    if a.dtype != b.dtype:
        raise ValueError(f"{first} is {a.dtype} but {second} is {b.dtype}: convert one of them")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{type(value).__name__} (make it an array with numpy.asarray)"
