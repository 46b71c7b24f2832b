"""Studies: measurements that take more than a benchmark, one module each.

A study has ``measure(dataset, quick)``, which returns plain data, and perhaps ``draw(found, small_print, file)``.
``python -m bench run`` makes them, ``python -m bench draw`` draws them again.
"""

import importlib
from types import ModuleType

STUDIES = (
    "head_to_head",
    "time_to_accuracy",
    "memory",
    "products",
    "ablation",
    "density",
    "scaling",
    "roofline",
    "break_even",
    "workers",
    "reproduction",
)


def study(name: str) -> ModuleType:
    """The module of a study."""
    return importlib.import_module(f"bench.studies.{name}")
