"""Data for the tests: MNIST if ``MNIST_DIR`` is set, and always digits28."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import model.cli
from kernels import get_backend
from model.data import Dataset, load_digits28, load_mnist
from tests.support.datasets import DATASET
from tests.support.runs import mini_batch_run


def pytest_configure(config):
    """Warnings are errors in our tests, but not in users' benchmarks; Ctrl-C works."""
    config.addinivalue_line("filterwarnings", "error")
    # A shell's background job ignores Ctrl-C, and so would the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "darwin":  # NumPy before 2.3 on Accelerate warns of overflow in products that have none
        config.addinivalue_line("filterwarnings", "ignore:.*encountered in matmul:RuntimeWarning")


@pytest.fixture(scope="session")
def mnist():
    """MNIST; without MNIST_DIR, skips the test, or fails if REQUIRE_MNIST is set."""
    if not os.environ.get("MNIST_DIR"):
        if os.environ.get("REQUIRE_MNIST"):
            pytest.fail("REQUIRE_MNIST is set, but MNIST_DIR is not set to the folder with the four MNIST files")
        pytest.skip("MNIST_DIR is not set")
    return load_mnist()


@pytest.fixture
def main(monkeypatch, capsys):
    """The command line in this process: from arguments to exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["model", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            model.cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def digits28():
    """The offline stand-in."""
    return load_digits28()


@pytest.fixture(scope="session")
def tiny():
    """Separable images of 5 × 5 pixels, 2,600 to train on: four shards."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 25)) * (rng.random((10, 25)) < 0.5)
    labels = rng.integers(0, 10, 2700).astype(np.uint8)
    images = np.clip(patterns[labels] * rng.uniform(0.7, 1.0, (2700, 25)), 0, 255).astype(np.uint8)
    return Dataset("tiny", images[:2600], labels[:2600], images[2600:], labels[2600:])


def waits_for_slow_run(item):
    """Whether a test waits for one of `slow_runs`."""
    if getattr(item, "originalname", None) != "test_mini_batches_reach_92_percent":
        return False
    return get_backend(item.callspec.params["backend"]).too_slow_for_full_batches


def pytest_collection_modifyitems(items):
    """Tests that wait for `slow_runs` come last."""
    items.sort(key=waits_for_slow_run)


@pytest.fixture(scope="session", autouse=True)
def slow_runs(request):
    """Futures by backend. Pure Python trains for minutes, so it starts before the first test, in another process."""
    names = [item.callspec.params["backend"] for item in request.session.items if waits_for_slow_run(item)]
    if not names:
        yield {}
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield {name: process.submit(mini_batch_run, name, DATASET) for name in names}


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "MNIST_DIR" in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} checks against MNIST skipped: set MNIST_DIR to the folder with its four files to run them"
        )
