"""Backends compiled for vector registers that this CPU lacks."""

import importlib.util
from contextlib import contextmanager

import numba
import pytest

from kernels import simd


@contextmanager
def compiled_for(module, cache, **target):
    """The module, loaded anew while `target` replaces constants of kernels.simd; LLVM emulates missing instructions.

    Its cache is separate, as the cache key does not cover these constants.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "CACHE_DIR", str(cache))
        for name, value in target.items():
            patch.setattr(simd, name, value)
        spec = importlib.util.spec_from_file_location(f"{module.__name__}_elsewhere", module.__file__)
        elsewhere = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(elsewhere)
        yield elsewhere
