"""The environment of a run: CPU, versions, commit, and environment variables that affect timings."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np
from threadpoolctl import threadpool_info

from model.threads import available_cores

PACKAGES = ("numpy", "scipy", "numba", "llvmlite", "scikit-learn", "torch", "jax", "distributed")

ROOT = Path(__file__).parents[1]

VARIABLES = ("OPENBLAS_", "MKL_", "OMP_", "GOMP_", "NUMBA_", "VECLIB_", "XLA_", "TORCH")


@dataclass(frozen=True)
class Environment:
    """What a result may depend on besides the code."""

    cpu: str
    """The model name that the CPU reports."""
    cores: int
    """Logical CPUs that this process may use."""
    system: str
    """Operating system and architecture."""
    python: str
    blas: list[str]
    """NumPy's BLAS: name, version, and the CPU kernel that it selected."""
    llvm: str
    packages: dict[str, str]
    """Versions of those that are installed."""
    variables: dict[str, str]
    """Environment variables that affect timings."""
    commit: str | None
    """Of the project, with "-dirty" if a file has uncommitted changes; None where git cannot tell."""


def environment() -> Environment:
    """The environment of this process."""
    from llvmlite import binding  # imported here, as training on NumPy does not need it

    cpu = cpuinfo.get_cpu_info()
    return Environment(
        cpu=cpu.get("brand_raw", platform.processor()),
        cores=available_cores(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        blas=[
            f"{library['internal_api']} {library['version']} {library.get('architecture', '')}".strip()
            for library in numpy_blas()
        ],
        llvm=".".join(map(str, binding.llvm_version_info)),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        variables={name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        commit=_commit(),
    )


def numpy_blas() -> list[dict[str, Any]]:
    """NumPy's BLAS, as threadpoolctl describes it, if possible without those that SciPy and others have loaded.

    threadpoolctl does not see Accelerate, Apple's BLAS.
    """
    if np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"] == "accelerate":
        return [{"internal_api": "Accelerate", "version": platform.mac_ver()[0]}]
    every_blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return [library for library in every_blas if "numpy" in library["filepath"]] or every_blas


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the project's files, with "-dirty" if a file has changed since; None where git cannot tell.

    A repository that merely contains the project's folder, as after unpacking an archive inside it, does not count.
    Neither do changed results, as measuring writes them.
    """
    try:
        if not os.path.samefile(git("rev-parse", "--show-toplevel"), ROOT):
            return None
        commit = git("describe", "--always", "--exclude=*")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments: str) -> str:
    """The output of git in the project's folder, ignoring a repository set in the environment, e.g. in a git hook."""
    command = ["git", "-C", str(ROOT), *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.strip()
