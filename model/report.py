"""What a run leaves behind: tables on the terminal, JSON files, and the environment it ran in."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.box import SIMPLE, Box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_info

from kernels.backend import Backend
from model.files import write_whole
from model.reproduction import PUBLISHED
from model.trainer import History, available_cores

PACKAGES = ("numpy", "scipy", "numba", "llvmlite", "scikit-learn", "torch", "jax", "distributed")
VARIABLES = ("OPENBLAS_", "MKL_", "OMP_", "GOMP_", "NUMBA_", "XLA_", "TORCH")
TABLE_ROWS = 10
BAR_WIDTH = 40


def history_table(history: History, title: str) -> Table:
    """The history in about ten rows: the first epoch, evenly spaced ones, the last."""
    table = Table("epoch", "loss", "train accuracy", "test accuracy", "seconds", title=title, box=SIMPLE)
    for column in table.columns:
        column.justify = "right"
    evaluated = [epoch for epoch in history.epochs if epoch.test_accuracy is not None]
    shown = evaluated[:1] + evaluated[::-1][:: -(-len(evaluated) // TABLE_ROWS)][::-1]
    for epoch in dict.fromkeys(shown):
        table.add_row(
            f"{epoch.epoch}",
            f"{epoch.loss:.4f}",
            f"{epoch.train_accuracy:.2%}",
            f"{epoch.test_accuracy:.2%}",
            f"{epoch.seconds:.3f}",
        )
    return table


def comparison_table(histories: dict[str, History], dataset_name: str, box: Box = SIMPLE) -> Table:
    """The published accuracies beside those of each backend, in percent, with differences in points."""
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


def probability_bars(probabilities: NDArray[np.floating]) -> Table:
    """A bar for the probability of each digit, (10,), from nothing to certainty."""
    table = Table.grid(padding=(0, 2))
    for digit, probability in enumerate(probabilities):
        table.add_row(f"{digit}", f"{probability:6.1%}", ProbabilityBar(1, 0, probability, width=BAR_WIDTH))
    return table


class ProbabilityBar(Bar):
    """A bar that needs no block characters where the terminal's encoding may lack them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.ascii_only:
            return iter([Text("#" * round(BAR_WIDTH * self.end / self.size))])
        return super().__rich_console__(console, options)


def run_report(history: History, backend: Backend, config: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run as plain data, for `write_json`."""
    return {
        "config": config,
        "environment": environment(),
        "prepare_seconds": history.prepare_seconds,
        "compile_seconds": backend.compile_seconds,
        "history": [epoch._asdict() for epoch in history.epochs],
    }


def environment() -> dict[str, Any]:
    """CPU, cores, caches in bytes, versions of Python and packages, git commit, and variables that tune these."""
    from llvmlite import binding  # only here, as training on NumPy does without

    cpu = cpuinfo.get_cpu_info()
    every_blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    blas = [library for library in every_blas if "numpy" in library["filepath"]] or every_blas
    return {
        "cpu": cpu.get("brand_raw", platform.processor()),
        "cores": available_cores(),
        "l2_cache_bytes": cpu.get("l2_cache_size"),
        "l3_cache_bytes": cpu.get("l3_cache_size"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "blas": [
            f"{library['internal_api']} {library['version']} {library.get('architecture', '')}" for library in blas
        ],
        "llvm": ".".join(map(str, binding.llvm_version_info)),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "commit": _commit(),
    }


def write_json(file: Path, content: Any) -> None:
    """Write `content` to `file`, whole or not at all."""
    write_whole(file, json.dumps(content, indent=1).encode() + b"\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the project's files, with "-dirty" if one was changed since; None where git cannot tell.

    Results do not count: the first of several measurements changes those of the last time.
    """
    try:
        commit = _git("describe", "--always", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
