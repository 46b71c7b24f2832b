"""Seconds per epoch of full-batch training on every backend, on all threads, and the bound that BLAS sets."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from kernels import get_backend
from model.data import limited
from model.mlp import MLP
from model.shards import Shards
from model.threads import thread_pool
from model.training import descend

LEARNING_RATE = 0.3
SIZE = 2048

# Per image, in a step's dense form: the two big products, and all five; what is not a product is under one percent.
FLOP_OF_BIG_PRODUCTS = 2 * 2 * 784 * 128
FLOP_OF_PRODUCTS = FLOP_OF_BIG_PRODUCTS + 3 * 2 * 128 * 10


@pytest.mark.parametrize("which", ["one thread", "all threads"])
def test_dense_peak(benchmark, which, threads, quick):
    """NumPy's BLAS at its best: the rate behind the dense floor."""
    threads = 1 if which == "one thread" else threads
    a = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    np.testing.assert_allclose((a @ a)[:4], a[:4].astype(np.float64) @ a, rtol=0, atol=SIZE * np.finfo(np.float32).eps)
    benchmark.group = f"BLAS at {SIZE}³"
    benchmark.name = f"BLAS, {which}"
    benchmark.extra_info.update(shape=f"{SIZE}³", threads=threads, flop=2 * SIZE**3)
    with threadpool_limits(threads, user_api="blas"):
        benchmark.pedantic(np.matmul, (a, a), rounds=5 if quick else 20, warmup_rounds=1)


def test_epoch(benchmark, backend, dataset, threads, quick):
    """One step over all images. Pure Python takes 256 of them, and its time is scaled up."""
    measured = dataset
    if backend.too_slow_for_full_batches:
        measured = limited(dataset, 16 if quick else 256)
    mlp, reference = MLP(), MLP()
    with thread_pool(threads) as run:
        start = limited(measured, min(len(measured.train_images), 256))
        for network, kernels in ((mlp, backend), (reference, get_backend("numpy"))):
            descend(network, Shards(run, kernels, start.train_images, start.train_labels, mlp.dtype), LEARNING_RATE)
        for ours, theirs in zip(mlp.parameters, reference.parameters):
            # A step moves a parameter by 0.03 at most, with the rounding errors of sums over 784 products.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.03 * 784 * np.finfo(np.float32).eps)

        batch = Shards(run, backend, measured.train_images, measured.train_labels, mlp.dtype)
        benchmark.group = "one epoch, all threads"
        benchmark.name = f"{backend.name}, {batch.count} images"
        benchmark.extra_info.update(
            backend=backend.name,
            shape=f"{batch.count} images",
            images=batch.count,
            extrapolated_to=len(dataset.train_images) if backend.too_slow_for_full_batches else None,
            threads=threads,
            flop=FLOP_OF_PRODUCTS * batch.count,
            flop_of_big_products=FLOP_OF_BIG_PRODUCTS * len(dataset.train_images),
            dataset=dataset.name,
        )
        rounds = 1 if backend.too_slow_for_full_batches else (3 if quick else 25)
        warmup_rounds = 0 if backend.too_slow_for_full_batches else 2
        benchmark.pedantic(descend, (mlp, batch, LEARNING_RATE), rounds=rounds, warmup_rounds=warmup_rounds)
