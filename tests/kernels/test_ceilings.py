"""The kernels that measure a GPU's ceilings: every word is read once, copied bit for bit, and nothing else moves."""

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.kernels.ceilings import STRETCH_WORDS, copy, n_blocks, nothing, read_sum
from engine.roofline import Cost
from tests.kernels.declared import assert_least_traffic, least_bytes

# No word, single ones, whole accesses and what is left of one, around a block's stretch, several turns of few blocks.
SIZES = [0, 1, 3, 4, 5, 1023, STRETCH_WORDS - 1, STRETCH_WORDS, STRETCH_WORDS + 7, 5 * STRETCH_WORDS + 2]


def words(n):
    return np.random.default_rng(n).integers(0, 2**32, n, np.uint32)


@pytest.mark.parametrize("n_words", SIZES)
@pytest.mark.parametrize("most", [1, 2, 100])
def test_read_sum_adds_every_word_once(lane, n_words, most):
    x = words(n_words)
    out = lane.empty((n_blocks(n_words, most),), np.uint32)
    read_sum(lane.put(x), out)
    assert lane.to_host(out).sum(dtype=np.uint32) == x.sum(dtype=np.uint32)


@pytest.mark.parametrize("n_words", SIZES)
@pytest.mark.parametrize("most", [1, 2, 100])
def test_copy_is_bit_equal(lane, n_words, most):
    x, out = words(n_words), lane.empty((n_words,), np.uint32)
    copy(lane.put(x), out, most)
    np.testing.assert_array_equal(lane.to_host(out), x)


def test_nothing_runs(lane):
    x = lane.put(words(4))
    nothing(x)
    np.testing.assert_array_equal(lane.to_host(x), words(4))


def test_what_does_not_fit_is_refused(lane):
    with pytest.raises(ShapeError, match=r"read_sum: x is \[4\] float32, expected \[n_words\] uint32"):
        read_sum(lane.zeros((4,), np.float32), lane.zeros((1,), np.uint32))
    with pytest.raises(ShapeError, match=r"copy: out is \[5\] uint32, expected \[n_words=4\] uint32"):
        copy(lane.zeros((4,), np.uint32), lane.zeros((5,), np.uint32))


@pytest.mark.parametrize("n_words", [STRETCH_WORDS, 3 * STRETCH_WORDS + 1])
def test_they_move_the_least(lane, n_words):
    x, out, sums = lane.put(words(n_words)), lane.empty((n_words,), np.uint32), lane.empty((2,), np.uint32)
    read_sum(x, sums)
    assert_least_traffic(lane.traffic(), least_bytes("ceilings.cu", "read_sum", n_words=n_words, n_blocks=2),
                         Cost(4 * n_words + 8))
    copy(x, out)
    assert_least_traffic(lane.traffic(), least_bytes("ceilings.cu", "copy", n_words=n_words), Cost(8 * n_words))
    nothing(x)
    assert_least_traffic(lane.traffic(), least_bytes("ceilings.cu", "nothing"), Cost())
