"""A double of engine/vision/encoder.py without a model: soft token j of a picture is (the hash of its key, j)."""

from types import SimpleNamespace
from zlib import crc32

import numpy as np


def picture(name, n_tokens):
    """What the scheduler and the caches know of a Picture."""
    return SimpleNamespace(n_tokens=n_tokens, key=(name, n_tokens))


def soft_tokens(key, n_tokens):
    """float64 [n_tokens, 2]."""
    return np.array([(crc32(repr(key).encode()), j) for j in range(n_tokens)], np.float64).reshape(n_tokens, 2)


class FakeEncoder:
    """encode(pictures, soft, rows); `calls` are the keys of each call."""

    def __init__(self):
        self.calls = []

    def encode(self, pictures, soft, rows):
        self.calls.append([one.key for one in pictures])
        for one, to in zip(pictures, rows, strict=True):
            assert len(to) == one.n_tokens
            soft[to] = soft_tokens(one.key, one.n_tokens)


def assert_soft_tokens(cache, media):
    """The rows that the cache gives for Batch.media hold the soft tokens of its pictures."""
    expected = np.concatenate([soft_tokens(one.key, one.n_tokens)[first:end] for _, one, first, end in media])
    np.testing.assert_array_equal(cache.soft[cache.source_of(media)], expected)
