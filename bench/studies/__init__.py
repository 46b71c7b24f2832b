"""Studies: measurements that need more than a pytest-benchmark test, one module each.

A study has a dataclass `Result` whose ``kind`` is the study's name (built from `bench.measure.records`), a function
``measure(dataset, quick)`` that returns one, and usually a function ``draw(result, small_print, file)``. The
``draw`` of a study in `EVERY_RUN` takes the list of the runs' results instead of one.
``python -m bench run`` runs studies, ``python -m bench draw`` redraws their results.
"""

import importlib
from types import ModuleType

from kernels import backend_names, get_backend

DATASETS = ("mnist", "digits28", "auto")
"""Data sets with as many images as the studies need, of MNIST's size."""

STUDIES = (
    "epochs",
    "kernels",
    "ladder",
    "roofline",
    "head_to_head",
    "mini_batches",
    "products",
    "time_to_accuracy",
    "memory",
    "ablation",
    "density",
    "scaling",
    "break_even",
    "workers",
    "pictures",
    "reproduction",
)

EVERY_RUN = ("epochs", "ladder", "head_to_head", "mini_batches", "products")
"""Studies that ``results`` repeats in every run. Others are deterministic or slow, so only the last run has them."""


def study(name: str) -> ModuleType:
    """The module of a study."""
    return importlib.import_module(f"bench.studies.{name}")


def full_batch_backends() -> list[str]:
    """Names of the backends that are fast enough for full batches."""
    return [name for name in backend_names() if not get_backend(name).too_slow_for_full_batches]


def product_flop(m: int, k: int, n: int) -> int:
    """FLOP of an (m, k) matrix times a (k, n) one, counting multiplications by zero."""
    return 2 * m * k * n


def result_class(name: str) -> type:
    """The record class of a study.

    Raises
    ------
    KeyError
        If there is no such study.
    """
    if name not in STUDIES:
        raise KeyError(f"there is no study {name}")
    return study(name).Result
