"""The published experiment, its accuracies, and how to reproduce them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE, Box
from rich.table import Table

from kernels.backend import Backend
from model.data import Dataset, limited
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


class Protocol(NamedTuple):
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


FULL_BATCH = Protocol(images=None, epochs=250, learning_rate=0.3, batch_size=None)
"""The published experiment: 250 epochs of gradient descent, each one step over all training images."""

MINI_BATCH = Protocol(images=15_000, epochs=1, learning_rate=0.1, batch_size=8)
"""One epoch that even pure Python finishes in minutes, and that reaches the same accuracy."""


def run(
    protocol: Protocol,
    backend: Backend,
    dataset: Dataset,
    seed: int = 0,
    threads: int | None = None,
    on_images: Callable[[int], None] = lambda images: None,
    on_step: Callable[[State], None] = lambda state: None,
) -> tuple[MLP, History]:
    """Train a new network by `protocol`; `seed` determines the initial weights and the shuffling."""
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


Run = Callable[[str, int], AbstractContextManager[tuple[Callable[[int], None], Callable[[State], None]]]]
"""Makes the context of a run from its name and its number of images; the context yields `on_images` and `on_step`."""


def reproduce(
    backends: dict[str, Backend], dataset: Dataset, starts: int, threads: int | None, accompany: Run
) -> dict[str, Any]:
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
    accompany
        Shows the progress of each run, and may stop it.

    Returns
    -------
    dict[str, Any]
        Ready for JSON: the name of the data set; the protocol, seconds and history of each run; and, if there are
        full-batch runs, the lowest and highest accuracy by epoch over all seeds.

    Raises
    ------
    DataError
        If the data set has too few images for a protocol.
    TrainingError
        If a loss is not finite.
    """

    def run_with_progress(protocol: Protocol, name: str, seed: int = 0) -> History:
        kind = "full batch" if protocol is FULL_BATCH else "mini-batches"
        with accompany(f"{name}, {kind}, start {seed}", protocol.images_seen(dataset)) as (on_images, on_step):
            return run(protocol, backends[name], dataset, seed, threads, on_images, on_step)[1]

    slow_last = sorted(backends, key=lambda name: backends[name].too_slow_for_full_batches)
    protocols = {name: MINI_BATCH if backends[name].too_slow_for_full_batches else FULL_BATCH for name in slow_last}
    runs = {name: run_with_progress(protocol, name) for name, protocol in protocols.items()}
    report: dict[str, Any] = {"dataset": dataset.name, "runs": {}}
    for name, history in runs.items():
        report["runs"][name] = {
            "protocol": protocols[name]._asdict(),
            "prepare_seconds": history.prepare_seconds,
            "compile_seconds": backends[name].compile_seconds,
            "history": [epoch._asdict() for epoch in history.epochs],
        }
    full_batch = {name: history for name, history in runs.items() if protocols[name] is FULL_BATCH}
    if full_batch:
        fastest = min(full_batch, key=lambda name: median(epoch.seconds for epoch in full_batch[name].epochs))
        others = [run_with_progress(FULL_BATCH, fastest, seed) for seed in range(1, starts)]
        report["starts"] = {"count": starts}
        for kind in ("train", "test"):
            curves = np.array([history.accuracies(kind) for history in (full_batch[fastest], *others)])
            report["starts"][kind] = {"low": curves.min(axis=0).tolist(), "high": curves.max(axis=0).tolist()}
    return report


def full_batch_histories(report: dict[str, Any]) -> dict[str, History]:
    """The histories of the published experiment by backend, from a report of :func:`reproduce`."""
    return {name: history(run) for name, run in report["runs"].items() if not run["protocol"]["batch_size"]}


def mini_batch_line(name: str, report: dict[str, Any]) -> str:
    """One line on a backend that is too slow for full batches, from a report of `reproduce`."""
    protocol, last = Protocol(**report["runs"][name]["protocol"]), history(report["runs"][name]).epochs[-1]
    return (
        f"{name}, one epoch over {protocol.images:,} images, batch size {protocol.batch_size}, learning "
        f"rate {protocol.learning_rate}: {last.test_accuracy:.2%} test accuracy in {last.seconds:.0f} s"
    )


def history(run: dict[str, Any]) -> History:
    """The history of one run in a report of `reproduce`."""
    return History(run["prepare_seconds"], [Epoch(**epoch) for epoch in run["history"]])


def comparison_table(histories: dict[str, History], dataset_name: str, box: Box = SIMPLE) -> Table:
    """The published accuracies beside those of each backend, in percent, with differences in percentage points."""
    table = Table("epoch", *map(str, PUBLISHED), title=f"Accuracy on {dataset_name} (%)", box=box)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, kind in enumerate(("train", "test")):
        published = [accuracies[index] for accuracies in PUBLISHED.values()]
        table.add_row(f"{kind}, published", *(f"{accuracy:.2f}" for accuracy in published))
        for name, history in histories.items():
            ours = 100 * history.accuracies(kind)[[epoch - 1 for epoch in PUBLISHED]]
            last = box is SIMPLE and name == list(histories)[-1]  # Markdown knows no sections
            table.add_row(f"  {name}", *(f"{accuracy:.2f}" for accuracy in ours))
            table.add_row("    difference", *(f"{x - y:+.2f}" for x, y in zip(ours, published)), end_section=last)
    return table
