"""The same step of gradient descent in other packages, each in its fastest form here, one file per package.

All start from the same weights, use the same number of threads, and compute in float32 unless their category says
otherwise. A step takes all images or a mini-batch. It is the forward pass, the mean loss (which any training loop
reports), the backward pass and the update. Ours also counts the correctly classified images. The images are prepared
once, before the steps: as float32, divided by 255, or as the non-zeros of that. Only our mini-batches are prepared from
bytes within the step, as in the trainer.
"""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.measure.interleave import interleave
from bench.peers.c_csr import CCSR
from bench.peers.jax_jit import JAX, JAXScan, JAXSteps
from bench.peers.mkl_sparse import MKLCSR
from bench.peers.ours import Ours
from bench.peers.pytorch import (
    CompiledParts,
    CompiledPyTorch,
    CompiledStep,
    PyTorch,
    PyTorchBFloat16,
    PyTorchByHand,
    PyTorchCSR,
    PyTorchMediumPrecision,
    PyTorchOneDNN,
    PyTorchOneDNNByHand,
)
from bench.peers.pytorch_shards import PyTorchInShards
from bench.peers.scikit_learn import ScikitLearn
from bench.peers.scipy_csr import SciPyCSR
from bench.peers.task import (
    Competitor,
    Learner,
    Task,
    UnavailableError,
    batches,
    steps_in_a_turn,
    take_steps,
    tolerance,
)
from kernels import get_backend

VERIFIED_STEPS = 3

# PyTorch's idle threads busy-wait for 9 ms, JAX's for 6. Turning that off in PyTorch (OMP_WAIT_POLICY=passive) would
# slow down its steps.
REST = 0.03


def _in_our_shards(backend: Callable) -> Callable[[Task], Competitor]:
    return lambda task: Ours(backend(), task)


PEERS: dict[str, dict[str, Callable[[Task], Competitor]]] = {
    "PyTorch": {"MKL": PyTorch, "oneDNN": PyTorchOneDNN},
    "PyTorch by hand": {
        "all at once": PyTorchByHand,
        "in our shards": PyTorchInShards,
        "oneDNN, parts of 2,000": PyTorchOneDNNByHand,
    },
    "torch.compile": {"loss": CompiledPyTorch, "whole step": CompiledStep, "parts of 2,000": CompiledParts},
    "JAX": {"one call": JAX, "scan over parts of 1,000": JAXScan, "scan over steps": JAXSteps},
    "scikit-learn": {"partial_fit": ScikitLearn},
    "SciPy CSR": {"in our shards": _in_our_shards(SciPyCSR)},
    "PyTorch CSR": {"parts of 2,048": PyTorchCSR},
    "MKL CSR": {"in our shards": _in_our_shards(MKLCSR)},
    "C CSR": {"in our shards": _in_our_shards(CCSR)},
    "PyTorch bfloat16": {"autocast": PyTorchBFloat16, "medium precision": PyTorchMediumPrecision},
}
"""Every form of each peer that was worth trying. The fastest one on this machine represents the peer."""


COMPETITORS = {
    "dense": ("numpy", "numba", "PyTorch", "PyTorch by hand", "torch.compile", "JAX", "scikit-learn"),
    "sparse": ("sparse", "SciPy CSR", "PyTorch CSR", "MKL CSR", "C CSR"),
    "bfloat16": ("PyTorch bfloat16",),
}
"""Backends and peers by category: whether they multiply by zeros, and the type if it is not float32. `naive` is left
out: a step in pure Python takes a quarter of an hour."""


@dataclass(frozen=True)
class Form:
    """Measurements of one form of a competitor."""

    error: float | None = None
    """Of the update after three steps, relative to its norm."""
    compile_seconds: float | None = None
    """Seconds of the first step minus those of the last, if the first one compiles."""
    seconds: float | None = None
    """Of a step, if several forms were interleaved."""
    skipped: str | None = None


def competitor(name: str, task: Task, form: str | None = None) -> Competitor:
    """A peer or backend with its images prepared, in its first form unless `form` names another.

    Raises
    ------
    UnavailableError
        If a package is missing.
    """
    if name not in PEERS:
        return Ours(get_backend(name), task)
    forms = PEERS[name]
    return forms[form or next(iter(forms))](task)


def best_form(
    name: str, task: Task, expected: list[NDArray], size: int | None = None
) -> tuple[Competitor, str, dict[str, Form]]:
    """A competitor in its fastest verified form, the form's name, and the measurements of every form.

    Parameters
    ----------
    name, task, expected, size
        As for `verified`. The forms are compared over such batches, too.

    Raises
    ------
    UnavailableError
        If no form can run here.
    AssertionError
        If the parameters of a form differ from `expected`.
    """
    ready: dict[str, Competitor] = {}
    forms: dict[str, Form] = {}
    for form in PEERS.get(name, {"ours": None}):
        try:
            ready[form], forms[form] = verified(name, task, expected, form, size)
        except UnavailableError as reason:
            forms[form] = Form(skipped=str(reason))
    if not ready:
        raise UnavailableError(next(filter(None, (form.skipped for form in forms.values()))))
    if len(ready) > 1:
        turns = {form: turn(each, task, size) for form, each in ready.items()}
        seconds = interleave(turns, 3, rest=REST, steps=2, warmup=0)
        count = steps_in_a_turn(size) if size else 1
        forms |= {form: replace(forms[form], seconds=float(np.median(seconds[form])) / count) for form in ready}
    fastest = min(ready, key=lambda form: forms[form].seconds or 0)
    return ready[fastest], fastest, forms


def turn(started: Competitor, task: Task, size: int | None) -> Callable[[], Any]:
    """A function that takes a step over all images, or steps over the next mini-batches of `size` images."""
    if size is None:
        return started.step
    assert isinstance(started, Learner)
    return partial(take_steps, started, batches(len(task.images), size), steps_in_a_turn(size))


def verified(
    name: str, task: Task, expected: list[NDArray], form: str | None = None, size: int | None = None
) -> tuple[Competitor, Form]:
    """A competitor whose first three steps match `expected`, with its error and compile time.

    Parameters
    ----------
    name, task, form
        As for `competitor`.
    expected
        From `expected_parameters`.
    size
        Images in each mini-batch; None takes all images in each step.

    Raises
    ------
    UnavailableError
        If a package is missing or cannot compile, or if a form takes no mini-batches.
    AssertionError
        If an update differs by more than rounding errors explain.
    """
    started = competitor(name, task, form)
    seconds = _first_steps(started, task, size)
    error = update_error(started.parameters(), task.mlp.parameters, expected)
    allowed = started.tolerance or tolerance(size or len(task.images))
    if not error <= allowed:  # also if it is NaN
        raise AssertionError(f"{name}: its update differs by {error:.1e} of its norm; {allowed:.1e} is allowed")
    return started, Form(error, seconds[0] - seconds[-1] if started.compiles else None)


def _first_steps(started: Competitor, task: Task, size: int | None) -> list[float]:
    """Take the steps to verify; returns the seconds of each."""
    if size is None:
        steps: list[Callable[[], Any]] = [started.step] * VERIFIED_STEPS
    elif isinstance(started, Learner):
        first = itertools.islice(batches(len(task.images), size), VERIFIED_STEPS)
        steps = [partial(started.learn_rows_all, [rows]) for rows in first]
    else:
        raise UnavailableError("this form takes no mini-batches")
    seconds = []
    for step in steps:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def update_error(parameters: list[NDArray], start: list[NDArray], expected: list[NDArray]) -> float:
    """The largest error of a parameter's update, relative to the norm of the update to `expected`.

    An error relative to the parameter itself would hide even a missing image, as weights hardly move in three steps.
    """
    return max(
        float(np.linalg.norm(theirs.astype(np.float64) - exact) / np.linalg.norm(exact - before))
        for theirs, before, exact in zip(parameters, start, expected, strict=True)
    )


def expected_parameters(task: Task, size: int | None = None) -> list[NDArray]:
    """Parameters after three steps of our NumPy backend in float64, over all images or mini-batches of `size`."""
    mlp = copy.deepcopy(task.mlp)
    mlp.layers = [(weights.astype(np.float64), bias.astype(np.float64)) for weights, bias in mlp.layers]
    exact = Ours(get_backend("numpy"), task._replace(mlp=mlp))
    _first_steps(exact, task, size)
    return exact.parameters()
