"""The data sets for tests of accuracy: MNIST only if it is available."""

import os

DATASETS = ["digits28"]
if os.environ.get("MNIST_DIR") or os.environ.get("REQUIRE_MNIST"):
    DATASETS.append("mnist")
