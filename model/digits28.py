"""The generator of digits28, a stand-in for MNIST made of the digits that come with scikit-learn."""

import numpy as np
from numpy.typing import NDArray


def build_digits28() -> tuple[NDArray[np.uint8], ...]:
    """Prepare scikit-learn's digits as MNIST's were, split them, and augment each part.

    Returns
    -------
    tuple[ndarray, ...]
        uint8: training images (60000, 784), training labels (60000,), test images (10000, 784), test labels (10000,).
    """
    from scipy import ndimage  # both here, as MNIST does not need them
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.images))
    originals = np.empty((len(order), 28, 28), np.float32)
    for original, digit in zip(originals, digits.images[order], strict=True):
        step = 8 / 20  # pixels of the 8 x 8 digit per pixel of its 20 x 20 box
        offset = np.array(ndimage.center_of_mass(digit)) - 13.5 * step
        ndimage.affine_transform(digit, np.diag([step, step]), offset, output=original, output_shape=(28, 28))
    originals = np.clip(originals * (255 / 16), 0, 255)  # the cubic spline overshoots
    labels = digits.target[order].astype(np.uint8)
    train = len(originals) * 6 // 7  # MNIST's ratio
    return (
        *vary(originals[:train], labels[:train], 60_000, rng),
        *vary(originals[train:], labels[train:], 10_000, rng),
    )


def vary(
    images: NDArray[np.float32], labels: NDArray[np.uint8], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return `count` copies in random order, each shifted, rotated and scaled at random, as rows of pixels."""
    from scipy import ndimage

    picks = rng.permutation(count) % len(images)  # every original equally often
    shifts = rng.uniform(-0.75, 0.75, (count, 2))
    angles = np.radians(rng.uniform(-5, 5, count))
    scales = rng.uniform(0.95, 1.05, count)
    # Affine maps from the copy's coordinates to the original's, about the centre of the image.
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]]) / scales
    turns = turns.transpose(2, 0, 1)
    offsets = 13.5 - (turns @ (13.5 + shifts)[:, :, None])[:, :, 0]
    copies = np.empty((count, 28, 28), np.uint8)
    for copy, pick, turn, offset in zip(copies, picks, turns, offsets, strict=True):
        ndimage.affine_transform(images[pick], turn, offset, output=copy, order=1)
    # MNIST's strokes are saturated and its background is black, but interpolation blurs both to grey.
    contrast = np.clip((np.arange(256) - 64) * 2, 0, 255).astype(np.uint8)
    return contrast[copies].reshape(count, -1), labels[picks]
