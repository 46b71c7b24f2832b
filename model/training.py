"""The training loop: gradient descent on a backend's kernels, full-batch (one step per epoch) or in mini-batches."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.backend import Backend
from model.data import Dataset
from model.mlp import MLP
from model.shards import Batch, Memory, Shards, Sums
from model.threads import available_cores, thread_pool


class TrainingError(Exception):
    """Training cannot continue; the message says why and what to try."""


class Epoch(NamedTuple):
    """Results of one epoch."""

    epoch: int
    loss: float
    """Mean cross-entropy over the training images, in nats, from the forward passes before each update."""
    train_accuracy: float
    """Accuracy in the same forward passes, 0 to 1."""
    test_accuracy: float | None
    """Accuracy after the epoch's last update, 0 to 1; None if not evaluated."""
    seconds: float
    """Forward pass, backward pass and update (with mini-batches, also shuffling and preparing); no evaluation."""


@dataclass(repr=False)
class History:
    """The results of a training run: an `Epoch` for each epoch, and the seconds that preparing the images took."""

    prepare_seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)

    def accuracies(self, kind: str) -> NDArray[np.float64]:
        """(epochs,) accuracies of `kind` "train" or "test", 0 to 1; NaN where the epoch was not evaluated."""
        return np.array([getattr(epoch, f"{kind}_accuracy") for epoch in self.epochs], np.float64)

    def selected(self) -> list[Epoch]:
        """About ten of the evaluated epochs: the first, evenly spaced ones, and the last."""
        evaluated = [epoch for epoch in self.epochs if epoch.test_accuracy is not None]
        return list(dict.fromkeys(evaluated[:1] + evaluated[::-1][:: -(-len(evaluated) // 10) or 1][::-1]))

    def __repr__(self) -> str:
        lines = [f"<History of {len(self.epochs)} epochs>"]
        if self.epochs:
            lines.append("epoch    loss   train    test  seconds")
        for epoch, loss, train, test, seconds in self.selected() or self.epochs[-1:]:
            tested = f"{test:7.2%}" if test is not None else f"{'-':>7}"
            lines.append(f"{epoch:5} {loss:7.4f} {train:7.2%} {tested} {seconds:8.3f}")
        return "\n".join(lines)


@dataclass
class State:
    """The state of a run between two steps. Together with the parameters, it suffices to resume with the same bits."""

    rng: Mapping[str, Any]
    """State of the bit generator at the start of the current epoch, before shuffling."""
    history: History = field(default_factory=History)
    steps: int = 0
    """Steps completed in the current epoch; the next three fields are sums over them."""
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, seed: int) -> "State":
        """The state before the first step of a new run."""
        return cls(np.random.default_rng(seed).bit_generator.state)


def train(
    mlp: MLP,
    backend: Backend,
    dataset: Dataset,
    *,
    epochs: int = 250,
    learning_rate: float = 0.3,
    batch_size: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory_limit: int | None = None,
    batches: Callable[[Backend, NDArray, NDArray, np.dtype, Memory], Batch] | None = None,
    eval_every: int = 1,
    state: State | None = None,
    on_images: Callable[[int], None] = lambda images: None,
    on_step: Callable[[State], None] = lambda state: None,
) -> History:
    """Train `mlp` in place by gradient descent.

    Parameters
    ----------
    mlp, backend, dataset
        The network, the kernels, the images.
    epochs
        Passes over the training images.
    learning_rate
        Each step subtracts this times the mean gradient from the parameters.
    batch_size
        Images per step, reshuffled each epoch; None takes all at once, unshuffled.
    seed
        Seed of the shuffling, unless a `state` is given.
    threads
        Number of threads; None takes one per available core. Changes the time, but no bit of the result.
    memory_limit
        Maximum bytes of prepared images to keep; the rest are prepared again whenever they are needed. None keeps
        all. Changes the time, but no bit of the result.
    batches
        Makes a `Batch` outside this process, as `model.extras.dask_workers.Cluster.batch` does. None makes `Shards`.
    eval_every
        Measure the test accuracy every `eval_every` epochs, and after the last.
    state
        The state to resume from, with `mlp` as it was then; it is updated in place. With the same settings, or more
        `epochs`, the run ends with the same bits as without the interruption. None starts a new run.
    on_images
        Called in the caller's thread with the number of images processed since its last call.
    on_step
        Called in the caller's thread with the state of the run: before the first step, after every step, and again
        after every epoch. It may raise an exception to stop the run.

    Returns
    -------
    History
        One entry per epoch, including those before `state`, and the seconds that preparing the images took.

    Raises
    ------
    ValueError
        If an option is out of range, `state` does not fit the run, or images, labels and network do not match.
    TrainingError
        If the loss is not finite.
    """
    if not isinstance(backend, Backend):
        raise ValueError(f"backend must be a Backend, such as get_backend('numpy'), not {backend!r}")
    images, labels = dataset.train_images, dataset.train_labels
    _check_dataset(dataset, mlp)
    _check_options(len(images), epochs, batch_size, seed, threads, memory_limit, eval_every)
    _check_learning_rate(learning_rate, batch_size or len(images), mlp.dtype)
    if batches and batch_size:
        raise ValueError("mini-batches take longer to send than to compute: leave out batch_size, or the workers")
    state = state or State.start(seed)
    _check_state(state, len(images), epochs, batch_size)
    rng = np.random.default_rng()
    rng.bit_generator.state = state.rng
    history = state.history
    memory = Memory(memory_limit)
    with thread_pool(threads or available_cores()) as parallel_map:

        def make_batch(images: NDArray, labels: NDArray) -> Batch:
            return (batches or partial(Shards, parallel_map))(backend, images, labels, mlp.dtype, memory)

        start = time.perf_counter()
        test = make_batch(dataset.test_images, dataset.test_labels)
        full_batch = [] if batch_size else [make_batch(images, labels)]
        history.prepare_seconds += time.perf_counter() - start

        def evaluated(epoch: Epoch) -> Epoch:
            """The epoch, with a test accuracy if `eval_every` asks for one, else without."""
            if epoch.epoch % eval_every and epoch.epoch != epochs:
                return epoch._replace(test_accuracy=None)
            if epoch.test_accuracy is None:
                test_loss, test_accuracy = test.evaluate(mlp)
                _check_loss(test_loss, epoch.epoch, learning_rate)
                epoch = epoch._replace(test_accuracy=test_accuracy)
            return epoch

        if history.epochs and not state.steps:  # whether it is evaluated depends on `epochs`, which may have changed
            history.epochs[-1] = evaluated(history.epochs[-1])
        on_step(state)
        for epoch in range(len(history.epochs) + 1, epochs + 1):
            start = time.perf_counter()
            steps: Iterable[Batch] = full_batch[state.steps :]
            if batch_size:
                steps = _mini_batches(make_batch, images, labels, batch_size, rng, state.steps)
            for batch in steps:
                sums = descend(mlp, backend, batch, learning_rate, on_images)
                state.steps += 1
                state.loss += sums.loss
                state.correct += sums.correct
                state.seconds += time.perf_counter() - start
                on_step(state)
                start = time.perf_counter()
            _check_loss(state.loss, epoch, learning_rate)
            loss, accuracy = state.loss / len(images), state.correct / len(images)
            history.epochs.append(evaluated(Epoch(epoch, loss, accuracy, None, state.seconds)))
            state.rng, state.steps, state.loss, state.correct, state.seconds = rng.bit_generator.state, 0, 0.0, 0, 0.0
            on_step(state)
    return history


def descend(
    mlp: MLP,
    backend: Backend,
    batch: Batch,
    learning_rate: float,
    on_images: Callable[[int], None] = lambda images: None,
) -> Sums:
    """One step of gradient descent on the mean loss over `batch`; returns the sums before the update."""
    sums = batch.gradient(mlp, on_images)
    for parameter, gradient in zip(mlp.parameters, sums.gradient):
        backend.update(parameter, gradient, learning_rate / batch.count)
    return sums


def _mini_batches(
    make_batch: Callable[[NDArray, NDArray], Batch],
    images: NDArray,
    labels: NDArray,
    batch_size: int,
    rng: np.random.Generator,
    skipped: int,
) -> Iterator[Batch]:
    """Batches of shuffled images, without the first `skipped` batches; the last may be smaller."""
    order = rng.permutation(len(images))
    for start in range(skipped * batch_size, len(images), batch_size):
        batch = order[start : start + batch_size]
        yield make_batch(images.take(batch, axis=0), labels.take(batch))  # faster than images[batch] on short rows


def _check_dataset(dataset: Dataset, mlp: MLP) -> None:
    """Raise a ValueError unless there are training and test images of the network's size, with a label for each."""
    pixels, classes = len(mlp.layers[0][0]), len(mlp.layers[-1][1])
    for kind in ("training", "test"):
        images, labels = dataset[1:3] if kind == "training" else dataset[3:5]
        for name, array, ndim in (("images", images, 2), ("labels", labels, 1)):
            if not isinstance(array, np.ndarray) or array.ndim != ndim:
                shape = "(n, pixels)" if ndim == 2 else "(n,)"
                raise ValueError(f"the {kind} {name} must be an array of shape {shape}: make it one with numpy.asarray")
        if len(images) == 0:
            raise ValueError(f"there are no {kind} images")
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} {kind} images but {len(labels)} labels: each image needs one")
        if images.shape[1] != pixels:
            raise ValueError(f"{kind} images have {images.shape[1]} pixels, but the network takes {pixels}")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"the {kind} labels must be integers, not {labels.dtype}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"the {kind} labels must be from 0 to {classes - 1}, not {labels.min()} to {labels.max()}")


def _check_options(
    images: int,
    epochs: int,
    batch_size: int | None,
    seed: int,
    threads: int | None,
    memory_limit: int | None,
    eval_every: int,
) -> None:
    counts = {
        "epochs": epochs,
        "eval_every": eval_every,
        "batch_size": batch_size or 1,
        "seed": seed,
        "threads": threads or 1,
    }
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise ValueError(f"{name} must be a whole number, not {count!r}")
    if epochs < 1 or eval_every < 1:
        raise ValueError(f"epochs and eval_every must be at least 1, not {epochs} and {eval_every}")
    if batch_size is not None and not 1 <= batch_size <= images:
        raise ValueError(f"batch_size must be from 1 to {images}, the number of training images, not {batch_size}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    if memory_limit is not None and not (isinstance(memory_limit, Real) and memory_limit >= 0):
        raise ValueError(f"memory_limit must be a number of bytes, 0 or more, not {memory_limit!r}")


def _check_learning_rate(learning_rate: float, images: int, dtype: np.dtype) -> None:
    """Raise a ValueError if it is out of range, or so small that a step over these images would change nothing."""
    if not (isinstance(learning_rate, Real) and math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be positive and finite, not {learning_rate!r}")
    with np.errstate(over="ignore"):
        factor = np.array(learning_rate / images).astype(dtype)
    if factor == 0:
        raise ValueError(
            f"learning_rate {learning_rate:g}, divided by {images} images per step, is 0 in {dtype}: raise it"
        )


def _check_state(state: State, images: int, epochs: int, batch_size: int | None) -> None:
    begun = len(state.history.epochs) + (state.steps > 0)
    if begun > epochs:
        raise ValueError(f"{begun} epochs have been started: epochs must be at least {begun}, not {epochs}")
    steps = math.ceil(images / batch_size) if batch_size else 1
    if state.steps > steps:
        raise ValueError(
            f"the state has done {state.steps} steps, but an epoch here has only {steps}: "
            "resume with the same data and batch size"
        )


def _check_loss(loss: float, epoch: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} in epoch {epoch} with learning rate {learning_rate:g}: try a smaller learning rate"
        )
