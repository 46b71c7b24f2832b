"""Seconds per call of every kernel on every backend, for the table; the study ``kernels`` interleaves them."""

import pytest

from bench.studies.kernels import KERNELS, checked_call


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(benchmark, backend, name, dataset, quick, one_thread):
    call, reset, count = checked_call(backend, name, dataset)
    benchmark.group = f"{name}, one thread"
    benchmark.name = f"{backend.name}, {count} images"
    rounds = (3 if quick else 10) if backend.too_slow_for_full_batches else (20 if quick else 100)
    benchmark.pedantic(call, setup=reset, rounds=rounds, warmup_rounds=min(rounds, 10))
