"""The published experiment, its accuracies, and how they are reproduced here."""

from collections.abc import Callable
from typing import NamedTuple

from kernels.backend import Backend
from model.data import Dataset, limited
from model.mlp import INITIAL_STD, MLP
from model.trainer import History, State, train

# Accuracy in percent by epoch: (train, from the epoch's forward pass; test, after its update).
PUBLISHED = {
    1: (12.48, 35.24),
    50: (85.34, 86.15),
    100: (89.30, 89.81),
    150: (90.43, 90.95),
    200: (91.22, 91.65),
    250: (91.79, 92.21),
}

FITTED = (
    "The published experiment does not give its learning rate and initialisation: "
    f"0.3 and N(0, {INITIAL_STD}²) were fitted to its accuracies. Epoch 1 is noise of the random start."
)


class Protocol(NamedTuple):
    """How to train: over which images, for how long, in which steps."""

    images: int | None
    """The first so many training images; None for all."""
    epochs: int
    learning_rate: float
    batch_size: int | None
    """Images per step; None for all at once."""

    def images_seen(self, dataset: Dataset) -> int:
        """Images that pass through the network, each epoch's counted."""
        return self.epochs * (self.images or len(dataset.train_images))


FULL_BATCH = Protocol(images=None, epochs=250, learning_rate=0.3, batch_size=None)
"""The published experiment: 250 epochs of gradient descent, one step each over all training images."""

MINI_BATCH = Protocol(images=15_000, epochs=1, learning_rate=0.1, batch_size=8)
"""One pass that even pure Python finishes in minutes, to the same accuracy."""


def run(
    protocol: Protocol,
    backend: Backend,
    dataset: Dataset,
    seed: int = 0,
    threads: int | None = None,
    on_images: Callable[[int], None] = lambda images: None,
    on_step: Callable[[State], None] = lambda state: None,
) -> tuple[MLP, History]:
    """Train a new network by `protocol`, from the random start and with the shuffling of `seed`."""
    mlp = MLP(seed=seed)
    history = train(
        mlp,
        backend,
        limited(dataset, protocol.images),
        epochs=protocol.epochs,
        learning_rate=protocol.learning_rate,
        batch_size=protocol.batch_size,
        seed=seed,
        threads=threads,
        on_images=on_images,
        on_step=on_step,
    )
    return mlp, history
