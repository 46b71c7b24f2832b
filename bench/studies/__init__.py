"""Studies: measurements that take more than a benchmark, one module each.

A study has a dataclass `Found` whose ``kind`` is the study's name (`bench.measure.records` says what it is made of),
``measure(dataset, quick)``, which returns one, and perhaps ``draw(found, small_print, file)``. ``python -m bench run``
makes them, ``python -m bench draw`` draws them again.
"""

import importlib
from types import ModuleType

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


def study(name: str) -> ModuleType:
    """The module of a study."""
    return importlib.import_module(f"bench.studies.{name}")


def found_class(name: str) -> type:
    """The class of what a study finds.

    Raises
    ------
    KeyError
        If there is no such study.
    """
    if name not in STUDIES:
        raise KeyError(f"there is no study {name}")
    return study(name).Found
