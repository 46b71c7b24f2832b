"""Tiny files in MNIST's format."""

import gzip
import hashlib
import struct

import numpy as np

from model import data
from model.data import Dataset

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = (file.name for file in data.FILES)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, dataset):
    """Write images and labels as four plain files."""
    for name, array in zip((TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS), dataset[1:], strict=True):
        (folder / name).write_bytes(idx(array.reshape(-1, 28, 28) if array.ndim == 2 else array))


def sha256(content):
    return hashlib.sha256(content).hexdigest()


rng = np.random.default_rng(0)

ARRAYS = {
    TRAIN_IMAGES: rng.integers(0, 256, (5, 28, 28), np.uint8),
    TRAIN_LABELS: np.array([3, 1, 4, 1, 9], np.uint8),
    TEST_IMAGES: rng.integers(0, 256, (3, 28, 28), np.uint8),
    TEST_LABELS: np.array([2, 7, 1], np.uint8),
}

PLAIN = {name: idx(array) for name, array in ARRAYS.items()}

GZIP = {f"{name}.gz": gzip.compress(payload, mtime=0) for name, payload in PLAIN.items()}

TINY_FILES = [
    data.File(name, array.shape, hashlib.md5(GZIP[f"{name}.gz"]).hexdigest(), sha256(PLAIN[name]))
    for name, array in ARRAYS.items()
]

TINY = Dataset("tiny", *(array.reshape(len(array), -1).squeeze() for array in ARRAYS.values()))


def write(directory, contents):
    directory.mkdir(exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)


def assert_tiny(dataset):
    assert dataset.name == "MNIST"
    for actual, expected in zip(dataset[1:], TINY[1:], strict=True):
        np.testing.assert_array_equal(actual, expected)
