"""Data for the tests: MNIST if ``MNIST_DIR`` is set, and always digits28."""

import os

import numpy as np
import pytest

from model.data import Dataset, load_digits28, load_mnist


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


@pytest.fixture(scope="session")
def digits28():
    """The offline stand-in."""
    return load_digits28()


@pytest.fixture(scope="session")
def tiny():
    """Separable images of 5 × 5 pixels, 5,200 to train on: four shards of two chunks."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 25)) * (rng.random((10, 25)) < 0.5)
    labels = rng.integers(0, 10, 5300).astype(np.uint8)
    images = np.clip(patterns[labels] * rng.uniform(0.7, 1.0, (5300, 25)), 0, 255).astype(np.uint8)
    return Dataset("tiny", images[:5200], labels[:5200], images[5200:], labels[5200:])


def pytest_collection_modifyitems(items):
    """Run the tests last that wait for pure Python, which trains in a separate process meanwhile."""
    items.sort(key=lambda item: "test_mini_batch_accuracy[naive" in item.name)


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "MNIST_DIR" in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} checks against MNIST skipped: set MNIST_DIR to the folder with its four files to run them"
        )
