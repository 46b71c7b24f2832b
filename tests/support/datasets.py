"""The data set for tests of accuracy: MNIST if it is available, else digits28."""

import os

DATASET = "mnist" if os.environ.get("MNIST_DIR") or os.environ.get("REQUIRE_MNIST") else "digits28"
