"""The gradients, against finite differences and independent automatic differentiation."""

import functools
import importlib.util
import re

import numpy as np
import pytest

from kernels import get_backend
from model.mlp import MLP

LAYER_SIZES = (20, 7, 6, 5)


@pytest.fixture
def problem():
    """A small network in float64 with parameters of ordinary size, and a batch with the zeros that images have."""
    rng = np.random.default_rng(0)
    mlp = MLP(LAYER_SIZES, dtype=np.float64)
    for parameter in mlp.parameters:
        parameter += rng.standard_normal(parameter.shape)
    x = rng.random((9, 20)) * (rng.random((9, 20)) < 0.4)
    return mlp, x, rng.integers(0, 5, 9)


def network_loss(xp, parameters, x, labels, log_sum_exp):
    """The same network, written again from its definition for the array library `xp`."""
    for weights, bias in zip(parameters[:-2:2], parameters[1:-2:2]):
        x = xp.maximum(x @ weights + bias, xp.zeros_like(bias))
    logits = x @ parameters[-2] + parameters[-1]
    return (log_sum_exp(logits) - logits[np.arange(len(labels)), labels]).sum()


def autograd_gradients(parameters, x, labels):
    import autograd
    from autograd import numpy as xp
    from autograd.scipy.special import logsumexp

    return autograd.value_and_grad(network_loss, 1)(xp, parameters, x, labels, lambda z: logsumexp(z, axis=1))


def torch_gradients(parameters, x, labels):
    import torch

    leaves = [torch.tensor(parameter, requires_grad=True) for parameter in parameters]
    loss = network_loss(torch, leaves, torch.tensor(x), labels, lambda z: z.logsumexp(dim=1))
    loss.backward()
    return loss.item(), [leaf.grad.numpy() for leaf in leaves]


def jax_gradients(parameters, x, labels):
    import jax

    with jax.enable_x64(True):
        loss = functools.partial(network_loss, jax.numpy)
        return jax.value_and_grad(loss)(parameters, x, labels, lambda z: jax.nn.logsumexp(z, axis=1))


FRAMEWORKS = {"autograd": autograd_gradients, "torch": torch_gradients, "jax": jax_gradients}
INSTALLED = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]


def test_gradients_match_finite_differences(backend, problem):
    """Central differences with a step of 1e-6: off by 1e-12 in truncation and by u·loss/1e-6 ≈ 5e-9 in rounding."""
    mlp, x, labels = problem
    loss, _, gradient = mlp.gradients(backend, x, labels)
    step = 1e-6
    for parameter, slope in zip(mlp.parameters, gradient):
        for index in np.ndindex(parameter.shape):
            center = parameter[index]
            parameter[index] = center + step
            above = mlp.gradients(backend, x, labels)[0]
            parameter[index] = center - step
            below = mlp.gradients(backend, x, labels)[0]
            parameter[index] = center
            assert slope[index] == pytest.approx((above - below) / (2 * step), abs=1e-16 * loss / step * 10)


@pytest.mark.parametrize("framework", INSTALLED)
def test_gradients_match_automatic_differentiation(backend, problem, framework):
    """Sums of at most 20 terms, four layers deep: a hundred roundings of the largest entry are ample."""
    mlp, x, labels = problem
    loss, _, gradient = mlp.gradients(backend, x, labels)
    expected_loss, expected = FRAMEWORKS[framework](mlp.parameters, x, labels)
    assert loss == pytest.approx(float(expected_loss), rel=1e-14)
    for ours, theirs in zip(gradient, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14 * np.abs(theirs).max())


def test_random_start():
    mlp = MLP(seed=1)
    assert [parameter.shape for parameter in mlp.parameters] == [(784, 128), (128,), (128, 10), (10,)]
    assert {parameter.dtype for parameter in mlp.parameters} == {np.dtype(np.float32)}
    weights, bias = mlp.layers[0]
    assert weights.std() == pytest.approx(0.017, rel=0.01)
    assert not bias.any()
    np.testing.assert_array_equal(weights, MLP(seed=1).layers[0][0])
    assert not np.array_equal(weights, MLP(seed=2).layers[0][0])


@pytest.mark.parametrize("layer_sizes", [(784,), (784, 0, 10), (), (784, 12.5, 10), (784, None), "784", 784, None])
def test_wrong_layer_sizes(layer_sizes):
    message = f"layer_sizes must be two or more positive whole numbers, not {layer_sizes!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        MLP(layer_sizes)


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.longdouble, ">f4", "number"])
def test_wrong_dtype(dtype):
    """Integers would start as a network of zeros."""
    with pytest.raises(ValueError, match=re.escape(f"dtype must be float32 or float64, not {dtype!r}")):
        MLP((3, 2), dtype=dtype)


def test_one_layer_is_logistic_regression(backend):
    mlp = MLP((20, 5))
    x = np.ones((3, 20), np.float32)
    activations, logits = mlp.forward(backend, x)
    assert len(activations) == 1
    np.testing.assert_allclose(logits, x @ mlp.layers[0][0], rtol=1e-6)
    assert [part.shape for part in mlp.gradients(backend, x, np.arange(3))[2]] == [(20, 5), (5,)]


def test_repr():
    assert repr(MLP()) == "<MLP 784-128-10: 101,770 parameters, float32>"
    assert repr(MLP((3, 2), dtype=np.float64)) == "<MLP 3-2: 8 parameters, float64>"


def test_predict(backend):
    images = np.eye(10, 784, dtype=np.uint8) * 255
    mlp = MLP((784, 10))
    assert mlp.predict(backend, images).tolist() == mlp.layers[0][0][:10].argmax(axis=1).tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_parameters_that_are_not_finite_predict_nothing(backend, wrong):
    images = np.zeros((2, 784), np.uint8)
    images[0, :2] = 255  # a backend may skip pixels of 0
    mlp = MLP((784, 10))
    mlp.layers[0][0][:2] = [[wrong], [-wrong]]  # their sum is NaN
    with pytest.raises(ValueError, match="cannot predict a class: the logits are NaN"), np.errstate(all="ignore"):
        mlp.predict(backend, images)


def test_a_shard_of_the_published_network(full_batch_backend):
    """At the trainer's sizes, beyond every block and tile, in float64: two backends differ by rounding alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (937, 784), np.uint8) * (rng.random((937, 784)) < 0.2).astype(np.uint8)
    labels = rng.integers(0, 10, 937)
    results = []
    for backend in full_batch_backend, get_backend("numpy"):
        mlp = MLP(dtype=np.float64)
        loss, correct, gradient = mlp.gradients(backend, backend.prepare(images, mlp.dtype), labels)
        for parameter, change in zip(mlp.parameters, gradient):
            backend.update(parameter, change.copy(), 0.1)
        results.append((loss, correct, [*gradient, *mlp.parameters]))
    (loss, correct, arrays), (expected_loss, expected_correct, expected_arrays) = results
    assert loss == pytest.approx(expected_loss, rel=1e-13)
    assert correct == expected_correct
    for actual, expected in zip(arrays, expected_arrays, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
