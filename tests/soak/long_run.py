"""Train for thousands of epochs in one process: memory stays flat, and the backends do not diverge.

``python -m tests.soak.long_run`` trains every backend except pure Python for 2,000 epochs on 2,000 images, in float32
and in float64 (Linux only; a few minutes).

Later steps amplify the rounding errors of earlier ones, so the unit roundoff u gives no bound on how far the backends
drift apart. The measured difference was 39,000 u in float32 and 100 u in float64, and 7,400 to 26,000 u and up to 220 u
with other summation orders. The limit is 100,000 u, which is 0.006 in float32 and 1.1e-11 in float64, for parameters of
up to 1.0. One more epoch changes them by 0.0001. Between a tenth of the epochs and the end, memory grew by at most
2.5 MiB, history included, and by no more over 8,000 epochs.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels import backend_names, get_backend
from model.data import limited, load_digits28
from model.mlp import MLP
from model.training import State, train
from tests.support.reference import DTYPES, unit_roundoff

MAX_APART = 100_000  # unit roundoffs
MAX_GROWTH = 4.0  # MiB


class LongRun(NamedTuple):
    """Results of a run."""

    mlp: MLP
    loss: float
    memory: list[float]
    """Resident memory, MiB, after a tenth of the epochs and at the end."""


def long_run(backend: str, dtype: type, epochs: int, images: int, hidden: int) -> LongRun:
    """Train on the first images of digits28."""
    mlp, memory = MLP((784, hidden, 10), dtype=dtype), []

    def on_step(state: State) -> None:
        if state.steps == 0 and len(state.history.epochs) in (epochs // 10, epochs):
            memory.append(resident_mib())

    dataset = limited(load_digits28(), images)
    history = train(mlp, get_backend(backend), dataset, epochs=epochs, eval_every=epochs, on_step=on_step)
    return LongRun(mlp, history.epochs[-1].loss, memory)


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def apart(ours: MLP, theirs: MLP) -> float:
    """The largest difference between two parameters."""
    return max(float(np.abs(one - other).max()) for one, other in zip(ours.parameters, theirs.parameters))


def compare(epochs: int, images: int, hidden: int) -> None:
    """Train with each backend, report, and raise an AssertionError if a bound does not hold."""
    backends = [name for name in backend_names() if not get_backend(name).too_slow_for_full_batches]
    for dtype in DTYPES:
        runs: dict[str, LongRun] = {}
        for name in backends:
            runs[name] = run = long_run(name, dtype, epochs, images, hidden)
            start, end = run.memory
            distance = apart(run.mlp, runs[backends[0]].mlp) / unit_roundoff(dtype)
            print(
                f"{dtype.__name__} {name:8} {start:6.1f} MiB after {epochs // 10} epochs, {end:6.1f} after {epochs}; "
                f"loss {run.loss:.7f}, parameters {distance:,.0f} u from {backends[0]}'s",
                flush=True,
            )
            assert end - start <= MAX_GROWTH, f"{name}: memory grew"
            assert distance <= MAX_APART, f"{name}: its parameters have drifted away"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("epochs", 2000), ("images", 2000), ("hidden", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    compare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
