"""Study: throughput of every kernel on every backend, at the shapes of a training step on one shard, on one thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.measure.interleave import interleave
from bench.measure.records import Comparison
from bench.publish.style import colour, ordered, plain_ticks, right_labels, short, short_name
from bench.studies import product_flop
from bench.studies.roofline import peak
from kernels import backend_names, get_backend
from kernels.backend import Backend
from model.data import Dataset
from model.extras.figure import BOUND_COLOUR, figure_file, print_small, title
from model.mlp import MLP
from model.shards import SHARD
from model.threads import thread_pool

FEW_IMAGES = 4
"""Number of images for pure Python, which takes milliseconds for each."""


class Step(NamedTuple):
    """The arrays of one training step on n images."""

    x: Any
    hidden: NDArray
    logits: NDArray
    labels: NDArray
    logits_grad: NDArray
    hidden_grad: NDArray
    layers: list[tuple[NDArray, NDArray]]


class Case(NamedTuple):
    """How to call a kernel with a step's arrays, and what it costs per image."""

    call: Callable
    flop: int
    """Floating-point operations per image of the dense form; an exponential counts as one."""
    terms: int
    """Number of terms of the longest sum in the result: its rounding errors bound the error."""
    overwrites: bool = False
    """Whether a backend may overwrite `hidden_grad`. Then each call needs a fresh one: on zeros where negative numbers
    were, a backend with branches would be faster."""


KERNELS = {
    "forward product": Case(lambda b, s: b.matmul(s.x, *s.layers[0]), product_flop(1, 784, 128), 784),
    "backward product": Case(lambda b, s: b.matmul(s.x.T, s.hidden_grad), product_flop(784, 1, 128), SHARD),
    "logits product": Case(lambda b, s: b.matmul(s.hidden, *s.layers[1]), product_flop(1, 128, 10), 128),
    "hidden gradient product": Case(
        lambda b, s: b.matmul(s.logits_grad, s.layers[1][0].T), product_flop(1, 10, 128), 10
    ),
    "output gradient product": Case(lambda b, s: b.matmul(s.hidden.T, s.logits_grad), product_flop(128, 1, 10), SHARD),
    "relu": Case(lambda b, s: b.relu(s.hidden_grad), 128, 1, overwrites=True),
    "relu_grad": Case(lambda b, s: b.relu_grad(s.hidden_grad, s.hidden), 128, 1, overwrites=True),
    "softmax_grad": Case(lambda b, s: b.softmax_grad(s.logits, s.labels)[2], 5 * 10, 10),
}


@dataclass(frozen=True)
class Result:
    """The study's record."""

    per_image: dict[str, Comparison]
    """Seconds per image on each backend, by kernel."""
    flop: dict[str, int]
    """FLOP per image, by kernel, counting multiplications by zero."""
    peak_gflop_per_second: float
    """Of one thread."""
    kind: Literal["kernels"] = "kernels"


def measure(
    dataset: Dataset, quick: bool, names: Sequence[str] | None = None, kernels: Sequence[str] = tuple(KERNELS)
) -> Result:
    """Time kernels on backends, by default all of both; for each kernel, the backends and the peak are interleaved."""
    per_image, peaks = {}, []
    run_peak, peak_flop = peak(1)
    with thread_pool(1):
        for kernel in kernels:
            checked = {name: checked_call(get_backend(name), kernel, dataset) for name in names or backend_names()}
            calls = {name: each.call for name, each in checked.items()} | {"peak": run_peak}
            resets = {name: each.reset for name, each in checked.items()}
            seconds = interleave(calls, 6 if quick else 40, setup=resets)
            peaks.append(peak_flop / seconds["peak"].min() / 1e9)  # a bound, so its best round counts
            times = {name: seconds[name] / each.images for name, each in checked.items()}
            per_image[kernel] = Comparison.of(kernel, times)
    return Result(per_image, {kernel: KERNELS[kernel].flop for kernel in kernels}, float(max(peaks)))


class Checked(NamedTuple):
    """A kernel to time."""

    call: Callable[[], Any]
    reset: Callable[[], None]
    """Restores what the call may have overwritten."""
    images: int


def checked_call(backend: Backend, name: str, dataset: Dataset) -> Checked:
    """A kernel on the arrays of a step, after a call whose result was checked.

    Raises
    ------
    AssertionError
        If its result differs in shape or dtype from NumPy's, or from float64's by more than rounding errors explain.
    """
    kernel = KERNELS[name]
    count = FEW_IMAGES if backend.too_slow_for_full_batches else SHARD
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    step = training_step(images, labels)
    expected = kernel.call(get_backend("numpy"), Step(*in_float64(step)))
    step = step._replace(x=backend.prepare(images))
    fresh = step.hidden_grad.copy()
    result = np.asarray(kernel.call(backend, step))
    if (result.shape, result.dtype) != (expected.shape, np.float32):
        raise AssertionError(f"{backend.name}, {name}: {result.dtype} {result.shape}, not float32 {expected.shape}")
    error = np.abs(result - expected).max() / np.abs(expected).max()
    if not error <= (kernel.terms + 10) * np.finfo(np.float32).eps:
        raise AssertionError(f"{backend.name}, {name}: a relative error of {error:.2g}")
    reset = partial(np.copyto, step.hidden_grad, fresh) if kernel.overwrites else lambda: None
    return Checked(partial(kernel.call, backend, step), reset, len(images))


def training_step(images: NDArray, labels: NDArray) -> Step:
    """The arrays of a step in float32, from the default random start."""
    numpy = get_backend("numpy")
    mlp = MLP()
    x = numpy.prepare(images)
    (_, hidden), logits = mlp.forward(numpy, x)
    _, _, logits_grad = numpy.softmax_grad(logits, labels)
    hidden_grad = numpy.relu_grad(numpy.matmul(logits_grad, mlp.layers[1][0].T), hidden)
    return Step(x, hidden, logits, labels, logits_grad, hidden_grad, mlp.layers)


def in_float64(value: Any) -> Any:
    """The same values in float64; other things as they are."""
    if isinstance(value, list | tuple):
        return [in_float64(item) for item in value]
    return value.astype(np.float64) if getattr(value, "dtype", None) == np.float32 else value


def draw(result: Result, small_print: str, file: Path) -> None:
    """The rate of each kernel on each backend, counting multiplications by zero."""
    names = ordered({name for comparison in result.per_image.values() for name in comparison.seconds})
    height = 0.8 / len(names)
    labels: list[tuple[float, str]] = []
    with figure_file(file, figsize=(8, 1.6 + 0.16 * len(names) * len(result.per_image))) as figure:
        axes = figure.subplots()
        for row, (kernel, comparison) in enumerate(result.per_image.items()):
            for order, name in enumerate(names):
                if name not in comparison:
                    continue
                times, y = comparison.rounds[name], row + (order - (len(names) - 1) / 2) * height
                low, rate, high = (
                    result.flop[kernel] / seconds / 1e9 for seconds in (times.high, times.median, times.low)
                )
                axes.barh(y, rate, height, color=colour(name), label=short_name(name) if row == 0 else None)
                axes.plot([low, high], [y, y], color="black", linewidth=1)
                labels.append((y, short(rate)))
        axes.set(xscale="log", xlabel="GFLOP/s, counting multiplications by zero (log scale)")
        axes.set(yticks=range(len(result.per_image)), ylim=(len(result.per_image) - 0.4, -0.6))
        axes.set_yticklabels(result.per_image)
        peak = result.peak_gflop_per_second
        axes.axvline(peak, color=BOUND_COLOUR, linestyle="--", linewidth=1)
        text, place = f"peak FMA throughput, {short(peak)}", ("data", "axes fraction")
        axes.annotate(text, (peak, 1.005), xycoords=place, ha="center", fontsize=7.5, color=BOUND_COLOUR)
        plain_ticks(axes.xaxis)
        right_labels(axes, [text for _, text in labels], fontsize=6.5, places=[y for y, _ in labels])
        axes.legend(loc="lower right", bbox_to_anchor=(0.8, 0), frameon=False, fontsize=8)
        title(figure, _title(result))
        print_small(figure, small_print)


def _title(result: Result) -> str:
    """The share of the peak at which each backend multiplies, for the first of the kernels."""
    kernel, comparison = next(iter(result.per_image.items()))
    at_peak = result.flop[kernel] / 1e9 / result.peak_gflop_per_second
    shares = [
        f"{short_name(name)} {short(100 * at_peak / comparison.median(name))} %" for name in ordered(comparison.seconds)
    ]
    return f"The {kernel} relative to the peak, zeros counted: {', '.join(shares)}"
