"""The generator of digits28."""

import numpy as np

from model import digits28


def test_it_is_deterministic_and_shares_no_original_between_training_and_test(monkeypatch):
    vary, parts = digits28.vary, []

    def vary_a_few(images, labels, count, rng):
        parts.append({image.tobytes() for image in images})
        return vary(images, labels, count // 100, rng)

    monkeypatch.setattr(digits28, "vary", vary_a_few)
    for first, second in zip(digits28.build_digits28(), digits28.build_digits28(), strict=True):
        np.testing.assert_array_equal(first, second)
    train, test = parts[:2]
    assert train.isdisjoint(test)
    assert len(train) + len(test) == 1797
