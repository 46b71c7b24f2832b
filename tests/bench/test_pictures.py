"""Every kind of simulated picture is read like a clean one; blank pages are refused."""

import pytest

from bench.studies import pictures


@pytest.fixture(scope="module")
def kinds(mnist):
    """What the study finds on a few pictures."""
    return pictures.measure(mnist, quick=True)


@pytest.mark.slow
def test_digits_are_recognised_in_every_kind_of_picture(kinds):
    """Of 20 pictures of each kind, at most one more may be wrong than of clean ones."""
    right = kinds.right
    for name, accuracy in right.items():
        assert accuracy >= right[pictures.CLEAN] - 5, name
    assert kinds.pairs_refused == 100


@pytest.mark.slow
def test_no_blank_page_is_a_digit(kinds):
    assert kinds.blank_refused == dict.fromkeys(pictures.BLANK, 100)
