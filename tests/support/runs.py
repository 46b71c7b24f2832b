"""Runs of the command line and of the mini-batch schedule, and a comparison of their results."""

import functools
import os
import subprocess
import sys
import time

import numpy as np

from kernels import get_backend
from kernels.numpy_backend import NumpyBackend
from model.data import load_dataset
from model.extras.checkpoint import Checkpoint
from model.published import MINI_BATCH, run

# A run on few images, in six steps per epoch.
TRAIN = ("train", "--dataset", "digits28", "--limit", 300, "--hidden", 8, "--batch-size", 50, "--eval-every", 3)


def run_model(*arguments, **options):
    command = [sys.executable, "-m", "model", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, **options)


def start(*arguments):
    """A process of the command line, with pipes for what it prints."""
    command = [sys.executable, "-m", "model", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(file, process):
    """Wait until a running process has written a file."""
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)


def progress(state):
    """Epochs and steps that are done."""
    return len(state.history.epochs), state.steps


@functools.cache
def mini_batch_run(backend_name, dataset_name):
    """Test accuracy and predictions after the mini-batch schedule, without a test pass in pure Python."""
    dataset = load_dataset(dataset_name)
    unseen = dataset._replace(test_images=dataset.test_images[:1], test_labels=dataset.test_labels[:1])
    mlp, _ = run(MINI_BATCH, get_backend(backend_name), unseen)
    predictions = mlp.predict(NumpyBackend(), dataset.test_images)
    return np.mean(predictions == dataset.test_labels), predictions


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Check for equal bits in everything except measured times."""
    assert [one.tobytes() for one in ours.mlp.parameters] == [other.tobytes() for other in theirs.mlp.parameters]
    first, second = ([epoch._replace(seconds=0) for epoch in run.state.history.epochs] for run in (ours, theirs))
    assert first == second
    assert (ours.state.rng, ours.state.steps, ours.config) == (theirs.state.rng, theirs.state.steps, theirs.config)
