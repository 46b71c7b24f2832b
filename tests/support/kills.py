"""Kill training runs with SIGKILL at random moments, resume them, and compare how they end.

A case trains with one backend, full batch or mini-batch, and saves after every epoch. A run is killed during start-up,
training or a write. After each kill its checkpoint must be complete, and no older than after the previous kill. A run
that finishes must have the same bits, in parameters and history, as one that was never killed. Then another run begins,
until all kills are used and the last run has finished.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kernels import get_backend
from model.extras.checkpoint import load
from model.threads import available_cores
from tests.support.runs import assert_same


class Case(NamedTuple):
    """What is trained."""

    backend: str
    batch_size: int | None

    def command(self, *options: object) -> list[str]:
        """A run of a second, mostly spent on writing checkpoints."""
        slow = get_backend(self.backend).too_slow_for_full_batches
        limit, hidden, epochs = (16, 4, 100) if slow else (300, 16, 100)
        settings = ["--backend", self.backend, "--limit", limit, "--hidden", hidden, "--epochs", epochs]
        settings += ["--dataset", "digits28", "--eval-every", epochs, "--learning-rate", 0.1, "--threads", 2]
        if self.batch_size:
            settings += ["--batch-size", self.batch_size]
        return [sys.executable, "-m", "model", "train", *map(str, settings), *map(str, options)]


def kill_and_resume(case: Case, kills: int, seed: int) -> Counter:
    """Count the kills and the runs that ended with the right bits; an AssertionError if one did not."""
    counts: Counter = Counter()
    rng = random.Random(f"{case} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        expected, file = Path(folder, "uninterrupted"), Path(folder, "run")
        subprocess.run(case.command("--checkpoint", expected), check=True, stdout=subprocess.DEVNULL)
        while counts["kills"] < kills or file.exists() or not counts["runs compared"]:
            done = load(file).state if file.exists() else None
            option = "--resume" if done else "--checkpoint"
            process = subprocess.Popen(
                case.command(option, file, "--checkpoint-every", 1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            if counts["kills"] < kills:
                wait_for_moment(file, process, rng)
                process.kill()
            _, errors = process.communicate()
            assert process.returncode in (0, -9), errors.decode()
            if process.returncode == 0:
                assert_same(load(file), load(expected))
                counts["runs compared"] += 1
                file.unlink()
            else:
                counts["kills"] += 1
                counts["inside a write"] += any(path.suffix == ".part" for path in file.parent.iterdir())
                counts["before the first save"] += not file.exists()
                assert not done or len(load(file).state.history.epochs) >= len(done.history.epochs)
    return counts


def wait_for_moment(file: Path, process: subprocess.Popen, rng: random.Random) -> None:
    """Return at a random moment: one in five while the process starts, two while it trains, two while it writes."""
    kind = rng.choice(["start", "train", "train", "write", "write"])
    if kind == "start":
        time.sleep(rng.uniform(0, 1))
        return
    before = changed(file)
    wait_until(lambda: changed(file) != before, process)
    time.sleep(rng.uniform(0, 0.4))
    if kind == "write":
        wait_until(lambda: any(path.suffix == ".part" for path in file.parent.iterdir()), process)
        time.sleep(rng.uniform(0, 0.001))


def wait_until(condition, process: subprocess.Popen) -> None:
    """Return when the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        pass


def changed(file: Path) -> int:
    """When the file was last written, in nanoseconds; 0 if it is not there."""
    return file.stat().st_mtime_ns if file.exists() else 0


def run(cases: list[Case], kills: int, seed: int) -> Counter:
    """Divide the kills among the cases, and run one case per core at a time."""
    shares = [kills * (index + 1) // len(cases) - kills * index // len(cases) for index in range(len(cases))]
    total: Counter = Counter()
    with ThreadPoolExecutor(available_cores()) as pool:
        results = pool.map(lambda case, share: kill_and_resume(case, share, seed), cases, shares)
        for case, counts in zip(cases, results):
            print(case, dict(counts), flush=True)
            total += counts
    return total
