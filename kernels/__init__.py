"""Interchangeable backends for a small neural network: its four kernels, and the update of its parameters.

A backend is imported only on request, so the ``numpy`` backend needs neither Numba nor a compiler. To add one, put a
file ``<name>_backend.py`` beside this one, with one subclass of :class:`~kernels.backend.Backend` that implements the
four kernels. Or keep your class anywhere on the import path: ``get_backend("package.module:Class")``.
"""

import importlib
import inspect
import operator
import re
from numbers import Integral
from pathlib import Path
from types import ModuleType

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
        If there is no such backend (the message lists those that exist), or its class cannot be loaded or created, is
        not a subclass of `Backend` with all its kernels, or has no valid `images_at_once`.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of a backend must be a string, not {name!r}")
    if ":" in name:
        return _created(name, _load_class(name))
    if name not in backend_names():
        raise ValueError(
            f"unknown backend {name!r}: choose one of {', '.join(backend_names())}, "
            "or pass a class of your own as package.module:Class"
        )
    module = _imported(f"kernels.{name}_backend", name)
    classes = {
        member.__qualname__: member
        for member in vars(module).values()
        if inspect.isclass(member) and member.__module__ == module.__name__ and issubclass(member, Backend)
    }
    if len(classes) != 1:
        found = " and ".join(classes) or "none"
        raise ValueError(f"{name}_backend.py must define exactly one subclass of Backend; it has {found}")
    return _created(name, *classes.values())


def _load_class(path: str) -> type[Backend]:
    """The Backend subclass at ``package.module:Class``."""
    module_name, _, class_name = path.partition(":")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", module_name):
        raise ValueError(f"cannot load backend {path!r}: name it as package.module:Class, without folders")
    module = _imported(module_name, path)
    try:
        backend_class = operator.attrgetter(class_name)(module)
    except AttributeError as error:
        raise ValueError(f"cannot load backend {path!r}: {error}") from error
    if not (inspect.isclass(backend_class) and issubclass(backend_class, Backend)):
        raise ValueError(f"cannot use {path!r} as a backend: it is not a subclass of kernels.Backend")
    return backend_class


def _imported(module: str, backend: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # it may be anyone's code
        if isinstance(error, ValueError) and backend in _ORDER:  # ours, and clear, as when Numba's compiler is disabled
            raise
        raise ValueError(f"cannot load backend {backend!r}: {type(error).__name__}: {error}") from error


def _created(name: str, backend_class: type[Backend]) -> Backend:
    if missing := sorted(backend_class.__abstractmethods__):
        raise ValueError(f"cannot use backend {name!r}: {backend_class.__qualname__} lacks {', '.join(missing)}")
    try:
        backend = backend_class()
    except Exception as error:
        raise ValueError(f"cannot create backend {name!r}: {type(error).__name__}: {error}") from error
    count = backend.images_at_once
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"cannot use backend {name!r}: images_at_once must be a positive integer, not {count!r}")
    return backend
