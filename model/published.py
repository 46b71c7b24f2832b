"""The published experiment, its accuracies, and how to reproduce them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from kernels.backend import Backend
from model.data import DataError, Dataset, limited
from model.mlp import INITIAL_STD, MLP
from model.training import Epoch, History, State, train

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
    "The published experiment does not state its learning rate and initialisation: "
    f"0.3 and N(0, {INITIAL_STD}²) were fitted to its accuracies. Epoch 1 only reflects the random initialisation."
)


@dataclass(frozen=True)
class Schedule:
    """How to train: number of images, epochs, learning rate and batch size."""

    images: int | None
    """Use only the first images, this many; None for all."""
    epochs: int
    learning_rate: float
    batch_size: int | None
    """Images per step; None for all at once."""

    def images_seen(self, dataset: Dataset) -> int:
        """Images that pass through the network over all epochs."""
        return self.epochs * (self.images or len(dataset.train_images))


FULL_BATCH = Schedule(images=None, epochs=250, learning_rate=0.3, batch_size=None)
"""The published experiment: 250 epochs of gradient descent, each one step over all training images."""

MINI_BATCH = Schedule(images=15_000, epochs=1, learning_rate=0.1, batch_size=8)
"""One epoch that even pure Python finishes in minutes, and that reaches the same accuracy."""


@dataclass(frozen=True)
class ReproducedRun:
    """A run of :func:`reproduce`."""

    protocol: Schedule
    prepare_seconds: float
    compile_seconds: float
    history: list[dict[str, Any]]
    """The fields of each `Epoch`, by name."""

    def result(self) -> History:
        """The history as `train` returned it."""
        return History(self.prepare_seconds, [Epoch(**epoch) for epoch in self.history])


@dataclass(frozen=True)
class Band:
    """The lowest and the highest accuracy over all seeds, 0 to 1, by epoch."""

    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Starts:
    """The full-batch runs of one backend from several seeds."""

    count: int
    train: Band
    test: Band


@dataclass(frozen=True)
class Reproduction:
    """The result of :func:`reproduce`; `dataclasses.asdict` makes it ready for JSON."""

    dataset: str
    runs: dict[str, ReproducedRun]
    """By backend."""
    starts: Starts | None = None
    """None without full-batch runs."""


def run(
    schedule: Schedule,
    backend: Backend,
    dataset: Dataset,
    seed: int = 0,
    threads: int | None = None,
    on_images: Callable[[int], None] = lambda images: None,
    on_step: Callable[[State], None] = lambda state: None,
) -> tuple[MLP, History]:
    """Train a new network by `schedule`; `seed` determines the initial weights and the shuffling."""
    mlp = MLP(seed=seed)
    history = train(
        mlp,
        backend,
        limited(dataset, schedule.images),
        epochs=schedule.epochs,
        learning_rate=schedule.learning_rate,
        batch_size=schedule.batch_size,
        seed=seed,
        threads=threads,
        on_images=on_images,
        on_step=on_step,
    )
    return mlp, history


ProgressContext = Callable[[str, int], AbstractContextManager[tuple[Callable[[int], None], Callable[[State], None]]]]
"""Makes the context of a run from its name and its number of images; the context yields `on_images` and `on_step`."""


def reproduce(
    backends: dict[str, Backend],
    dataset: Dataset,
    starts: int,
    threads: int | None,
    progress: ProgressContext,
    on_run: Callable[[Reproduction], None] = lambda so_far: None,
) -> Reproduction:
    """Run the published experiment on every backend; pure Python trains in mini-batches.

    Parameters
    ----------
    backends
        By name. Those fast enough for full batches run the published experiment from the same initial weights, and the
        fastest repeats it with other seeds. The others train in mini-batches.
    dataset
        The images.
    starts
        Number of seeds, including the common one.
    threads
        Number of threads; None takes one per available core.
    progress
        Shows the progress of each run, and may stop it.
    on_run
        Called after every run with the result so far, so that an error in a later run need not lose it.

    Returns
    -------
    Reproduction

    Raises
    ------
    DataError
        If a run could not use the data set, before the first one: it has too few images, or other numbers of pixels or
        classes.
    TrainingError
        If a loss is not finite.
    """

    def run_with_progress(schedule: Schedule, name: str, seed: int = 0) -> History:
        kind = "full batch" if schedule is FULL_BATCH else "mini-batches"
        with progress(f"{name}, {kind}, start {seed}", schedule.images_seen(dataset)) as (on_images, on_step):
            return run(schedule, backends[name], dataset, seed, threads, on_images, on_step)[1]

    slow_last = sorted(backends, key=lambda name: backends[name].too_slow_for_full_batches)
    schedules = {name: MINI_BATCH if backends[name].too_slow_for_full_batches else FULL_BATCH for name in slow_last}
    check_fits(dataset, schedules)
    runs: dict[str, ReproducedRun] = {}
    for name, schedule in schedules.items():
        history = run_with_progress(schedule, name)
        runs[name] = ReproducedRun(
            protocol=schedule,
            prepare_seconds=history.prepare_seconds,
            compile_seconds=backends[name].compile_seconds,
            history=[epoch._asdict() for epoch in history.epochs],
        )
        on_run(Reproduction(dataset.name, runs))
    full_batch = {name: runs[name].result() for name, schedule in schedules.items() if schedule is FULL_BATCH}
    if not full_batch:
        return Reproduction(dataset.name, runs)
    fastest = min(full_batch, key=lambda name: median(epoch.seconds for epoch in full_batch[name].epochs))
    seeds = [full_batch[fastest], *(run_with_progress(FULL_BATCH, fastest, seed) for seed in range(1, starts))]
    return Reproduction(dataset.name, runs, Starts(starts, band(seeds, "train"), band(seeds, "test")))


def check_fits(dataset: Dataset, schedules: dict[str, Schedule]) -> None:
    """Raise a DataError if a backend's run could not use the data set."""
    network = MLP()
    takes = len(network.layers[0][0]), len(network.layers[-1][1])
    count, pixels = dataset.train_images.shape
    if pixels != takes[0] or dataset.classes > takes[1]:
        raise DataError(
            f"{dataset.name} has {pixels} pixels per image and {dataset.classes} classes, but the published network "
            f"takes {takes[0]} pixels and at most {takes[1]} classes: use python -m model train"
        )
    for name, schedule in schedules.items():
        if schedule.images and schedule.images > count:
            raise DataError(
                f"{name} trains on {schedule.images:,} images, but {dataset.name} has only {count:,}: "
                "choose other backends with --backend, or a larger data set"
            )


def band(histories: list[History], kind: str) -> Band:
    """The band of accuracies of `kind` "train" or "test"."""
    curves = np.array([history.accuracies(kind) for history in histories])
    return Band(curves.min(axis=0).tolist(), curves.max(axis=0).tolist())


def full_batch_histories(reproduction: Reproduction) -> dict[str, History]:
    """The histories of the published experiment by backend."""
    return {name: run.result() for name, run in reproduction.runs.items() if not run.protocol.batch_size}
