"""The same step of gradient descent in other packages, each in its fastest form here, one file per package.

All start from the same weights, on the same threads, over all images at once, in float32 unless the category says
otherwise. A step is the forward pass, the mean loss (which any training loop reports), the backward pass and the
update. Ours also counts the correctly classified images. The images are prepared once, before the steps: as float32,
divided by 255, or as the non-zeros of these.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bench.measure.interleave import interleave
from bench.peers.c_csr import CCSR
from bench.peers.jax_jit import JAX, JAXScan
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
    PyTorchOneDNN,
)
from bench.peers.scikit_learn import ScikitLearn
from bench.peers.scipy_csr import SciPyCSR
from bench.peers.task import Competitor, Learner, Task, UnavailableError, tolerance
from kernels import get_backend

VERIFIED_STEPS = 3

# After their work, the idle threads of PyTorch spin for 9 ms and those of JAX for 6. To forbid PyTorch's
# (OMP_WAIT_POLICY=passive) would slow its own steps.
REST = 0.03


def _in_our_shards(backend: Callable) -> Callable[[Task], Competitor]:
    return lambda task: Ours(backend(), task)


PEERS: dict[str, dict[str, Callable[[Task], Competitor]]] = {
    "PyTorch": {"MKL": PyTorch, "oneDNN": PyTorchOneDNN},
    "PyTorch by hand": {"all at once": PyTorchByHand},
    "torch.compile": {"loss": CompiledPyTorch, "whole step": CompiledStep, "parts of 2,000": CompiledParts},
    "JAX": {"one call": JAX, "scan over parts of 1,000": JAXScan},
    "scikit-learn": {"partial_fit": ScikitLearn},
    "SciPy CSR": {"in our shards": _in_our_shards(SciPyCSR)},
    "PyTorch CSR": {"parts of 2,048": PyTorchCSR},
    "MKL CSR": {"in our shards": _in_our_shards(MKLCSR)},
    "C CSR": {"in our shards": _in_our_shards(CCSR)},
    "PyTorch bfloat16": {"autocast": PyTorchBFloat16},
}
"""Every form of every peer that was worth trying; the fastest on the machine at hand is the peer. The first one also
learns from mini-batches."""


COMPETITORS = {
    "dense": ("numpy", "numba", "PyTorch", "PyTorch by hand", "torch.compile", "JAX", "scikit-learn"),
    "sparse": ("sparse", "SciPy CSR", "PyTorch CSR", "MKL CSR", "C CSR"),
    "bfloat16": ("PyTorch bfloat16",),
}
"""Backends and peers by whether they multiply with zeros, and by type where that is not float32; pure Python would need
a quarter of an hour for a step."""


@dataclass(frozen=True)
class Form:
    """How a form of a competitor did."""

    error: float | None = None
    """Of the update after three steps, relative to its norm."""
    compile_seconds: float | None = None
    """What the first step took longer than the last, if it compiles."""
    seconds: float | None = None
    """Of a step, where several forms were interleaved."""
    skipped: str | None = None


def competitor(name: str, task: Task, form: str | None = None) -> Competitor:
    """A peer or backend, in its first form unless another is named, its images prepared.

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
    name: str, task: Task, expected: list[NDArray], rounds: int = 3
) -> tuple[Competitor, str, dict[str, Form]]:
    """A competitor in its fastest form, of those that are verified; the form's name; and how every form did.

    Raises
    ------
    UnavailableError
        If no form can run here.
    AssertionError
        If a form does not lead to `expected`.
    """
    ready: dict[str, Competitor] = {}
    forms: dict[str, Form] = {}
    for form in PEERS.get(name, {"ours": None}):
        try:
            ready[form], forms[form] = verified(name, task, expected, form)
        except UnavailableError as reason:
            forms[form] = Form(skipped=str(reason))
    if not ready:
        raise UnavailableError(next(filter(None, (form.skipped for form in forms.values()))))
    if len(ready) > 1:
        seconds = interleave({form: each.step for form, each in ready.items()}, rounds, rest=REST, steps=2, warmup=0)
        forms |= {form: replace(forms[form], seconds=float(np.median(seconds[form]))) for form in ready}
    fastest = min(ready, key=lambda form: forms[form].seconds or 0)
    return ready[fastest], fastest, forms


def verified(
    name: str,
    task: Task,
    expected: list[NDArray],
    form: str | None = None,
    batches: Sequence[NDArray[np.integer]] | None = None,
) -> tuple[Competitor, Form]:
    """A competitor whose first three steps match `expected`, with its error and its seconds of compilation.

    Parameters
    ----------
    name, task, form
        As for `competitor`.
    expected
        What `expected_parameters` returned.
    batches
        Rows of the images for each of the three steps, of a competitor that learns from mini-batches; None takes all.

    Raises
    ------
    UnavailableError
        If a package is missing or cannot compile.
    AssertionError
        If an update differs by more than its rounding errors may be.
    """
    started = competitor(name, task, form)
    seconds = _first_steps(started, batches)
    error = update_error(started.parameters(), task.mlp.parameters, expected)
    allowed = started.tolerance or tolerance(len(task.images if batches is None else batches[0]))
    if not error <= allowed:  # nor NaN
        raise AssertionError(f"{name}: its update differs by {error:.1e} of its norm, where {allowed:.1e} is allowed")
    return started, Form(error, seconds[0] - seconds[-1] if started.compiles else None)


def _first_steps(started: Competitor, batches: Sequence[NDArray] | None) -> list[float]:
    """The seconds of each."""
    seconds = []
    for step in range(VERIFIED_STEPS):
        start = time.perf_counter()
        if batches is None:
            started.step()
        else:
            assert isinstance(started, Learner)
            started.learn_rows(batches[step])
        seconds.append(time.perf_counter() - start)
    return seconds


def update_error(parameters: list[NDArray], start: list[NDArray], expected: list[NDArray]) -> float:
    """The largest error of a parameter's update, relative to the norm of the update to `expected`.

    It is the error of the update, not of the parameter: weights hardly move in three steps, so a relative error of
    theirs would hide even a missing image.
    """
    return max(
        float(np.linalg.norm(theirs.astype(np.float64) - exact) / np.linalg.norm(exact - before))
        for theirs, before, exact in zip(parameters, start, expected, strict=True)
    )


def expected_parameters(task: Task, batches: Sequence[NDArray[np.integer]] | None = None) -> list[NDArray]:
    """Parameters after three steps of our NumPy backend in float64, over all images or the rows of `batches`."""
    mlp = copy.deepcopy(task.mlp)
    mlp.layers = [(weights.astype(np.float64), bias.astype(np.float64)) for weights, bias in mlp.layers]
    exact = Ours(get_backend("numpy"), task._replace(mlp=mlp))
    _first_steps(exact, batches)
    return exact.parameters()
