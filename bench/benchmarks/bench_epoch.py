"""Seconds per epoch of full-batch training on every backend, on all threads; the study ``epochs`` interleaves them."""

import pytest

from bench.studies.epochs import LEARNING_RATE, few
from model.mlp import MLP
from model.shards import Shards
from model.threads import available_cores, thread_pool
from model.training import descend


@pytest.mark.usefixtures("epochs")
def test_epoch(benchmark, backend, dataset, quick):
    """One step over all images, or over a few in pure Python."""
    measured, mlp = few(dataset, backend), MLP()
    with thread_pool(available_cores()) as parallel_map:
        batch = Shards(parallel_map, backend, measured.train_images, measured.train_labels, mlp.dtype)
        benchmark.group = "one epoch, all threads"
        benchmark.name = f"{backend.name}, {batch.count} images"
        rounds = 1 if backend.too_slow_for_full_batches or quick else 10
        step = (mlp, backend, batch, LEARNING_RATE)
        benchmark.pedantic(descend, step, rounds=rounds, warmup_rounds=0 if rounds == 1 else 2)
