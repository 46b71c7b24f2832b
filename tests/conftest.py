"""Data for the tests: MNIST if ``MNIST_DIR`` is set, and always digits28."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import model.cli
from model.data import Dataset, load_digits28, load_mnist
from tests.support.datasets import DATASET


def pytest_configure(config):
    """Warnings are errors in our tests, but not in users' benchmarks."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(scope="session")
def mnist():
    """MNIST; without MNIST_DIR, skips the test, or fails if REQUIRE_MNIST is set."""
    if not os.environ.get("MNIST_DIR"):
        if os.environ.get("REQUIRE_MNIST"):
            pytest.fail("REQUIRE_MNIST is set, but MNIST_DIR does not name the folder with the four MNIST files")
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


NAIVE_RUN = "test_mini_batches_reach_92_percent[naive]"


def pytest_collection_modifyitems(items):
    """The test that waits for `naive_run` comes last."""
    items.sort(key=lambda item: item.name == NAIVE_RUN)


@pytest.fixture(scope="session", autouse=True)
def naive_run(request):
    """Pure Python trains for minutes, so it starts before the first test, in another process: a future."""
    if all(item.name != NAIVE_RUN for item in request.session.items):
        yield None
        return
    from tests.model.test_published import mini_batch_run

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process.submit(mini_batch_run, "naive", DATASET)


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "MNIST_DIR" in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} checks against MNIST skipped: set MNIST_DIR to the folder with its four files to run them"
        )
