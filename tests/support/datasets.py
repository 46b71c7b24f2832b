"""The data sets that tests of accuracy run on: MNIST only where it is."""

import os

DATASETS = ["digits28"]
if os.environ.get("MNIST_DIR") or os.environ.get("REQUIRE_MNIST"):
    DATASETS.append("mnist")
