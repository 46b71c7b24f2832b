"""Seconds per epoch in other packages, beside those of the backends; only with ``--peers``."""

import pytest

from bench.peers import PEERS, Task, UnavailableError, expected_parameters, verified
from bench.test_training import FLOP_OF_BIG_PRODUCTS, FLOP_OF_PRODUCTS, LEARNING_RATE
from model.mlp import MLP
from model.trainer import thread_pool


@pytest.fixture(scope="module")
def task(dataset, threads):
    """A step over all images."""
    with thread_pool(threads) as run:
        yield Task(MLP(), dataset.train_images, dataset.train_labels, LEARNING_RATE, threads, run)


@pytest.fixture(scope="module")
def expected(task):
    """Where three steps lead."""
    return expected_parameters(task)


@pytest.mark.parametrize("name", PEERS)
def test_peer_epoch(benchmark, name, task, expected, dataset, quick):
    """One step over all images, which the first steps have been compared by."""
    try:
        peer, compile_seconds = verified(name, task, expected)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    count = len(task.images)
    benchmark.group = "one epoch, all threads"
    benchmark.name = f"{name}, {count} images"
    benchmark.extra_info.update(
        backend=name,
        shape=f"{count} images",
        images=count,
        extrapolated_to=None,
        threads=task.threads,
        flop=FLOP_OF_PRODUCTS * count,
        flop_of_big_products=FLOP_OF_BIG_PRODUCTS * count,
        compile_seconds=compile_seconds,
        dataset=dataset.name,
    )
    benchmark.pedantic(peer.step, rounds=3 if quick else 25, warmup_rounds=1)
