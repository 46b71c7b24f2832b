"""The claim itself: every backend learns what the published experiment learned."""

import functools

import numpy as np
import pytest

from kernels import get_backend
from kernels.numpy_backend import NumpyBackend
from model.data import load_dataset
from model.mlp import MLP
from model.published import FULL_BATCH, MINI_BATCH, PUBLISHED, run
from tests.support.datasets import DATASET
from tests.support.runs import mini_batch_run

pytestmark = pytest.mark.slow


@functools.cache
def full_batch_history(backend, dataset_name):
    return run(FULL_BATCH, backend, load_dataset(dataset_name))[1]


def test_full_batches_reach_the_published_accuracy(full_batch_backend, record_property):
    """The published run reached 92.21 %; random starts differ by about 0.1."""
    accuracy = full_batch_history(full_batch_backend, DATASET).epochs[-1].test_accuracy
    record_property("test accuracy", accuracy)
    assert accuracy >= (0.919 if DATASET == "mnist" else 0.92)


def test_full_batches_follow_the_published_curve(full_batch_backend, mnist):
    """Every published accuracy, except epoch 1, which is noise; at epoch 50 the curve is steep."""
    history = full_batch_history(full_batch_backend, DATASET)
    for epoch, published in PUBLISHED.items():
        if epoch > 1:
            record = history.epochs[epoch - 1]
            ours = 100 * record.train_accuracy, 100 * record.test_accuracy
            assert ours == pytest.approx(published, abs=1.5 if epoch == 50 else 0.7), f"epoch {epoch}"


def test_mini_batches_reach_92_percent(backend, slow_runs, record_property):
    """Including pure Python. Runs that differ only in rounding disagree on few images."""
    started = slow_runs.get(backend.name)
    accuracy, predictions = started.result() if started else mini_batch_run(backend.name, DATASET)
    record_property("test accuracy", accuracy)
    assert accuracy >= 0.92
    _, expected = mini_batch_run("numpy", DATASET)
    assert np.mean(predictions == expected) >= 0.99


def test_backends_also_learn_digits28():
    """On the fastest backend; without MNIST, the tests above cover all."""
    assert full_batch_history(get_backend("sparse"), "digits28").epochs[-1].test_accuracy >= 0.92
    assert mini_batch_run("sparse", "digits28")[0] >= 0.92


def test_nine_of_ten_starts_pass_the_mini_batch_schedule(mnist, record_property):
    accuracies = []
    for seed in range(10):
        _, history = run(MINI_BATCH, NumpyBackend(), mnist, seed)
        accuracies.append(history.epochs[-1].test_accuracy)
    record_property("test accuracies", accuracies)
    assert sum(accuracy >= 0.92 for accuracy in accuracies) >= 9


def test_an_untrained_network_guesses(digits28):
    """A network that has not learned is far below the thresholds above."""
    predictions = MLP().predict(NumpyBackend(), digits28.test_images)
    assert np.mean(predictions == digits28.test_labels) < 0.5
