"""Interchangeable backends for a small neural network: its four kernels, and the update of its parameters.

A backend is imported only on request, so the ``numpy`` backend needs neither Numba nor a compiler. To add one, put a
file ``<name>_backend.py`` beside this one, with one subclass of :class:`~kernels.backend.Backend` that implements the
four kernels. Or keep your class anywhere on the import path: ``get_backend("package.module:Class")``.
"""

import importlib
import inspect
from pathlib import Path

from kernels.backend import Backend

__all__ = ["Backend", "backend_names", "get_backend"]

# From the simplest to the most specialised: the order in tables, plots and parametrized tests.
_ORDER = ["naive", "numpy", "numba", "sparse"]


def backend_names() -> list[str]:
    """Names of the backends in this folder, from the simplest to the most specialised."""
    files = [file for folder in __path__ for file in Path(folder).glob("*_backend.py")]
    names = sorted(file.stem.removesuffix("_backend") for file in files)
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def get_backend(name: str) -> Backend:
    """Import and create the backend called `name`.

    Parameters
    ----------
    name
        One of :func:`backend_names`, or ``package.module:Class`` for a :class:`Backend` subclass of your own.

    Raises
    ------
    ValueError
        If there is no such backend (the message lists those that exist), or the class cannot be loaded or is not a
        subclass of `Backend`.
    """
    if ":" in name:
        return _load_class(name)()
    if name not in backend_names():
        raise ValueError(
            f"unknown backend {name!r}: choose one of {', '.join(backend_names())}, "
            "or pass a class of your own as package.module:Class"
        )
    module = importlib.import_module(f"kernels.{name}_backend")
    (backend_class,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and issubclass(member, Backend)
    )
    return backend_class()


def _load_class(path: str) -> type[Backend]:
    """The Backend subclass at ``package.module:Class``."""
    module_name, _, class_name = path.partition(":")
    try:
        backend_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot load backend {path!r}: {error}") from error
    if not (inspect.isclass(backend_class) and issubclass(backend_class, Backend)):
        raise ValueError(f"cannot use {path!r} as a backend: it is not a subclass of kernels.Backend")
    return backend_class
