"""The data set that tests of accuracy run on: MNIST, or where it is not digits28, which stands in for it."""

import os

DATASET = "mnist" if os.environ.get("MNIST_DIR") or os.environ.get("REQUIRE_MNIST") else "digits28"
