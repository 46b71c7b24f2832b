"""The network: its parameters, the forward pass and the gradients, in terms of the four kernels.

The README derives the gradients, with the same notation.
"""

import itertools
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.backend import FLOATS, Backend

# The published experiment does not state its initialisation. This standard deviation was fitted to its accuracies.
INITIAL_STD = 0.017


class MLP:
    """A multilayer perceptron: ReLU between its layers, softmax and cross-entropy at the end.

    Weights start normally distributed with a standard deviation of 0.017, biases at zero.

    Parameters
    ----------
    layer_sizes
        Number of pixels, units of each hidden layer, number of classes.
    seed
        Seed of the initial weights.
    dtype
        float32, or float64 for gradient checks.

    Attributes
    ----------
    layers : list[tuple[ndarray, ndarray]]
        For each layer the weights (inputs, outputs) and the bias (outputs,).

    Raises
    ------
    ValueError
        If there are fewer than two layer sizes, one is not a positive whole number, or `dtype` is neither float32 nor
        float64.
    """

    def __init__(
        self, layer_sizes: Sequence[int] = (784, 128, 10), seed: int = 0, dtype: DTypeLike = np.float32
    ) -> None:
        sizes = list(layer_sizes) if isinstance(layer_sizes, Iterable) else []
        if len(sizes) < 2 or not all(isinstance(size, Integral) and size > 0 for size in sizes):
            raise ValueError(f"layer_sizes must be two or more positive whole numbers, not {layer_sizes!r}")
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float32 or float64, not {dtype!r}")
        rng = np.random.default_rng(seed)
        self.layers: list[tuple[NDArray, NDArray]] = [
            (rng.normal(0, INITIAL_STD, (inputs, outputs)).astype(dtype), np.zeros(outputs, dtype))
            for inputs, outputs in itertools.pairwise(sizes)
        ]

    def __repr__(self) -> str:
        sizes = [len(self.layers[0][0]), *(len(bias) for _, bias in self.layers)]
        count = sum(parameter.size for parameter in self.parameters)
        return f"<MLP {'-'.join(map(str, sizes))}: {count:,} parameters, {self.dtype}>"

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""
        return self.layers[0][0].dtype

    @property
    def parameters(self) -> list[NDArray]:
        """All weights and biases, layer by layer: the arrays themselves, so updates happen in place."""
        return [parameter for layer in self.layers for parameter in layer]

    def forward(self, backend: Backend, x: Any) -> tuple[list[Any], NDArray]:
        """The input of every layer, starting with `x`, and the logits.

        Parameters
        ----------
        backend
            The kernels to use.
        x
            (n, pixels): the result of ``backend.prepare``, or an array of the network's dtype.

        Returns
        -------
        tuple[list, ndarray]
            ``[x, hidden, ...]``, each (n, units), and the logits, (n, classes).
        """
        *hidden_layers, (weights, bias) = self.layers
        activations = [x]
        for hidden_weights, hidden_bias in hidden_layers:
            activations.append(backend.relu(backend.matmul(activations[-1], hidden_weights, hidden_bias)))
        return activations, backend.matmul(activations[-1], weights, bias)

    def gradients(self, backend: Backend, x: Any, labels: NDArray[np.integer]) -> tuple[float, int, list[NDArray]]:
        """The summed loss, the number of correctly classified images, and the gradient of the loss.

        Parameters
        ----------
        backend
            The kernels to use.
        x
            (n, pixels): the result of ``backend.prepare``, or an array of the network's dtype.
        labels
            (n,) integers from 0 to classes - 1.

        Returns
        -------
        tuple[float, int, list[ndarray]]
            Loss and gradient are sums over the n images, not means. The gradient has the order and the shapes of
            `parameters`.

        Raises
        ------
        ValueError
            If shapes or dtypes do not match, or a label is out of range.
        """
        activations, logits = self.forward(backend, x)
        loss, correct, upstream = backend.softmax_grad(logits, labels)
        ones = np.ones((1, len(labels)), upstream.dtype)  # ones times a matrix: its column sums
        gradient: list[NDArray] = []
        for (weights, _), activation in zip(reversed(self.layers), reversed(activations)):
            gradient = [backend.matmul(activation.T, upstream), backend.matmul(ones, upstream)[0], *gradient]
            if activation is not x:
                upstream = backend.relu_grad(backend.matmul(upstream, weights.T), activation)
        return loss, correct, gradient

    def predict(self, backend: Backend, images: NDArray[np.uint8]) -> NDArray[np.intp]:
        """The predicted class of each image.

        Parameters
        ----------
        backend
            The kernels to use.
        images
            (n, pixels) uint8.

        Returns
        -------
        ndarray
            (n,) integers, from 0 to classes - 1.

        Raises
        ------
        ValueError
            If `images` is not a uint8 array of (n, pixels), with the network's number of pixels, or a logit is NaN:
            parameters are NaN, or so large that they overflow.
        """
        _, logits = self.forward(backend, backend.prepare(images, self.dtype))
        if np.isnan(logits).any():  # argmax would take it for the largest
            raise ValueError("cannot predict a class: the logits are NaN, as parameters are NaN or too large")
        return logits.argmax(axis=1)

    def probabilities(self, backend: Backend, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The probability of each class for each image, (n, classes) float64; arguments as for `predict`.

        Each row is the softmax of the logits, or NaN where parameters are NaN or so large that the logits overflow.
        Unsuitable images are errors as for `predict`.
        """
        from scipy.special import softmax  # takes a sixth of a second to import; training does not need it

        with np.errstate(over="ignore", invalid="ignore"):
            _, logits = self.forward(backend, backend.prepare(images, self.dtype))
            return softmax(logits.astype(np.float64), axis=1)
