"""The same step of gradient descent in other packages, each in the form that is fastest here, one file for a package.

All are in float32, on the same threads, over all images at once, and start from the same weights. A step is the forward
pass, the mean loss (which any training loop reports), the backward pass and the update; ours also counts the images
that are classified correctly. The images are prepared once, before the steps: as float32, divided by 255, or as what is
not zero of these.
"""

import copy
import functools
import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bench.peers.jax_jit import JAX
from bench.peers.ours import Ours
from bench.peers.pytorch import CompiledPyTorch, PyTorch, PyTorchCSR
from bench.peers.scikit_learn import ScikitLearn
from bench.peers.scipy_csr import SciPyCSR
from bench.peers.task import Competitor, Task
from kernels import get_backend

VERIFIED_STEPS = 3


PEERS: dict[str, Callable[[Task], Competitor]] = {
    "PyTorch": PyTorch,
    "torch.compile": CompiledPyTorch,
    "JAX": JAX,
    "scikit-learn": ScikitLearn,
    "SciPy CSR": functools.partial(Ours, SciPyCSR()),
    "PyTorch CSR": PyTorchCSR,
}


COMPETITORS = {
    "dense": ("numpy", "numba", "PyTorch", "torch.compile", "JAX", "scikit-learn"),
    "sparse": ("sparse", "SciPy CSR", "PyTorch CSR"),
}
"""Backends and peers by whether they multiply with zeros; pure Python would need a quarter of an hour for a step."""


def competitor(name: str, task: Task) -> Competitor:
    """A peer or backend, its images prepared.

    Raises
    ------
    UnavailableError
        If a package is missing.
    """
    return PEERS[name](task) if name in PEERS else Ours(get_backend(name), task)


def verified(name: str, task: Task, expected: list[NDArray]) -> tuple[Competitor, float | None]:
    """A competitor whose first three steps led to `expected`, and its seconds of compilation, if it compiles.

    Compilation is what the first step took longer than the last.

    The sums behind a gradient have a term for each of n images, at most 1 in size; rounding errors of n terms add up
    to √n units (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019).

    Raises
    ------
    UnavailableError
        If a package is missing or cannot compile.
    AssertionError
        If the parameters differ by more than these rounding errors.
    """
    seconds = []
    started = competitor(name, task)
    for _ in range(VERIFIED_STEPS):
        start = time.perf_counter()
        started.step()
        seconds.append(time.perf_counter() - start)
    roundoff = float(np.finfo(np.float32).eps) / 2
    tolerance = VERIFIED_STEPS * task.learning_rate * math.sqrt(len(task.images)) * roundoff
    for theirs, exact in zip(started.parameters(), expected, strict=True):
        np.testing.assert_allclose(theirs, exact, rtol=0, atol=tolerance, err_msg=name)
    return started, seconds[0] - seconds[-1] if started.compiles else None


def expected_parameters(task: Task) -> list[NDArray]:
    """Parameters after three steps of our NumPy backend in float64."""
    mlp = copy.deepcopy(task.mlp)
    mlp.layers = [(weights.astype(np.float64), bias.astype(np.float64)) for weights, bias in mlp.layers]
    exact = Ours(get_backend("numpy"), task._replace(mlp=mlp))
    for _ in range(VERIFIED_STEPS):
        exact.step()
    return exact.parameters()
