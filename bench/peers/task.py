"""The task that every competitor gets, and a competitor's interface."""

import importlib
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.mlp import MLP

IMAGES_IN_A_TURN = 2_048
MOST_STEPS_IN_A_TURN = 16


def tolerance(images: int) -> float:
    """The allowed error of a float32 update over this many images, against float64, relative to the update's norm.

    It is the share of two images: an average image contributes at least 1/n of the update over n images. On MNIST,
    rounding errors amount to a tenth of such a share, and to 0.8 of it where one image's input to a unit rounds to the
    other side of zero. A missing image amounts to at least 7 shares in each parameter, because the gradients of images
    partly cancel, and to 50 in the last bias. Over few images, rounding errors stay below a hundredth of the norm.
    """
    return min(2 / images, 0.01)


class UnavailableError(Exception):
    """A peer cannot run here; the message says why."""


class Task(NamedTuple):
    """What every competitor does: gradient descent from the weights of `mlp`, which it copies."""

    mlp: MLP
    images: NDArray[np.uint8]
    labels: NDArray[np.integer]
    learning_rate: float
    threads: int
    parallel_map: Callable
    """From `model.threads.thread_pool`."""


class Competitor(ABC):
    """A network, and images to train it on."""

    compiles = False
    """Whether the first step compiles."""

    tolerance: float | None = None
    """Largest allowed error of an update, relative to its norm; None takes the function `tolerance`."""

    @abstractmethod
    def step(self) -> float:
        """Take one step over all images; returns the mean loss before the update."""

    @abstractmethod
    def parameters(self) -> list[NDArray]:
        """Weights (inputs, outputs) and biases, in the order of `MLP.parameters`."""


class Learner(Competitor):
    """A competitor that can also train on mini-batches."""

    @abstractmethod
    def learn(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> float:
        """Prepare these images and take one step over them; returns the mean loss before the update."""

    @abstractmethod
    def learn_rows(self, rows: NDArray[np.integer]) -> float:
        """Take one step over some of its images, which a peer keeps as floats; returns the loss like `learn`."""

    def learn_all(self, batches: Sequence[tuple[NDArray[np.uint8], NDArray[np.integer]]]) -> None:
        """Prepare each of these batches of images and labels, and take a step over it."""
        for images, labels in batches:
            self.learn(images, labels)

    def learn_rows_all(self, batches: Sequence[NDArray[np.integer]]) -> None:
        """Take a step over each of these batches of its images."""
        for rows in batches:
            self.learn_rows(rows)

    @abstractmethod
    def accuracy(self) -> float:
        """Share of its images that are classified correctly."""


def shuffled_batches(count: int, size: int, seed: int = 0) -> Iterator[NDArray[np.integer]]:
    """Row indices of one batch after another, in random order; `count` images are reshuffled after every pass.

    The last batch of a pass may be smaller. Batches keep changing, as in training: repeated ones would stay in the
    caches.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count, size))


def batches(count: int, size: int) -> Iterator[NDArray[np.integer]]:
    """Batches of exactly `size` images: the smaller one at the end of a pass is left out."""
    return (rows for rows in shuffled_batches(count, size) if len(rows) == size)


def steps_in_a_turn(size: int) -> int:
    """Enough steps over mini-batches for a turn to take milliseconds."""
    return min(MOST_STEPS_IN_A_TURN, max(2, IMAGES_IN_A_TURN // size))


def take_steps(learner: Learner, batches: Iterator[NDArray[np.integer]], count: int) -> None:
    """Take `count` steps, over the next batches."""
    learner.learn_rows_all(list(itertools.islice(batches, count)))


def package(name: str, how: str = "make bench-peers installs it") -> ModuleType:
    # torch warns about deprecated code of itself, and that its sparse tensors are in beta.
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: {how}") from error
