"""The task of every competitor, and its interface."""

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.mlp import MLP


def tolerance(images: int) -> float:
    """The allowed error of an update in float32 over this many images, against float64, relative to its norm.

    By the share of two images. An average image makes up at least 1/n of the update over n. On MNIST rounding errors
    come to a tenth of such a share, and to 0.8 where the input of a unit, for one image, rounds to the other side of
    zero. An image left out makes at least 7 in each parameter, as images pull in different directions, and 50 in the
    last bias. Over few images, rounding needs no more than a hundredth.
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
    run: Callable
    """What `model.threads.thread_pool` yields."""


class Competitor(ABC):
    """A network, and images to train it on."""

    compiles = False
    """Whether the first step compiles."""

    tolerance: float | None = None
    """Largest error of an update relative to its norm, where it is not float32's."""

    @abstractmethod
    def step(self) -> float:
        """One step over all images; returns the mean loss from before it."""

    @abstractmethod
    def parameters(self) -> list[NDArray]:
        """Weights (inputs, outputs) and biases, in the order of `MLP.parameters`."""


class Learner(Competitor):
    """A competitor that also takes steps over other images than its own, as in mini-batches."""

    @abstractmethod
    def learn(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> float:
        """Prepare the images and make one step over them; returns the mean loss from before it."""

    @abstractmethod
    def learn_rows(self, rows: NDArray[np.integer]) -> float:
        """One step over some of its images, which a peer keeps as floats; returns the loss as `learn` does."""

    @abstractmethod
    def accuracy(self) -> float:
        """Share of its images that are classified correctly."""


def package(name: str, how: str = "make bench-peers installs it") -> ModuleType:
    # torch warns about deprecated parts of torch, and that its sparse tensors are new.
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: {how}") from error
