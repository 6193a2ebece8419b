"""pick_centroids, candidate_argmax and candidate_logits against their twins."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ConfigError, ShapeError
from engine.kernels import centroids
from engine.kernels.centroids import (
    COUNTERS,
    MOST_CENTROIDS,
    candidate_argmax,
    candidate_logits,
    pick_centroids,
)
from engine.kernels.source import Build
from engine.workspace import Scratch
from tests.kernels.closeness import bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

FLOAT32_SUM = 1e-6              # of the sum of |terms|: a few dozen roundings of 2^-24, and lanes join in a tree


# --- pick_centroids

def run_pick(lane, scores, k):
    out = lane.empty((len(scores), k), np.int32)
    pick_centroids(lane.put(scores.astype(np.float32)), out)
    return lane.to_host(out)


@pytest.mark.parametrize("n_rows", [0, 1, 3])
@pytest.mark.parametrize("n_centroids, k", [(4, 1), (4, 4), (32, 6), (300, 300), (2048, 32)])
def test_the_largest_scores_are_picked(lane, n_rows, n_centroids, k):
    scores = np.random.default_rng([n_rows, k]).standard_normal((n_rows, n_centroids)).astype(np.float32)
    want = np.empty((n_rows, k), np.int32)
    reference.pick_centroids(scores, want)
    np.testing.assert_array_equal(run_pick(lane, scores, k), want)
    assert all(sorted(row[chosen].tolist(), reverse=True) == row[chosen].tolist() and
               row[chosen].min() >= np.delete(row, chosen).max(initial=-np.inf)
               for row, chosen in zip(scores, want, strict=True))


def test_of_equal_scores_the_lowest_number_is_picked_and_nan_is_last(lane):
    inf, nan = np.inf, np.nan
    scores = np.array([[0.0, -0.0, 1.0, 1.0, -1.0, 1.0, 0.0, 5e-42], [nan, -inf, 2.0, inf, nan, -3.0, inf, -inf],
                       [7.0] * 8, [nan] * 8], np.float32)
    wanted = [[2, 3, 5, 7, 0, 1, 6, 4], [3, 6, 2, 5, 1, 7, 0, 4], [*range(8)], [*range(8)]]
    for k in (1, 3, 8):
        out = np.empty((4, k), np.int32)
        reference.pick_centroids(scores, out)
        assert out.tolist() == run_pick(lane, scores, k).tolist() == [row[:k] for row in wanted]


def test_many_centroids_of_few_values(lane):
    """Ties across blocks."""
    scores = np.random.default_rng(1).integers(0, 4, (2, 1024)).astype(np.float32)
    want = np.empty((2, 400), np.int32)
    reference.pick_centroids(scores, want)
    np.testing.assert_array_equal(run_pick(lane, scores, 400), want)


def test_pick_refuses_what_does_not_fit(lane):
    def refused(n_centroids, k, message):
        with pytest.raises(ShapeError, match=message):
            pick_centroids(lane.zeros((1, n_centroids), np.float32), lane.zeros((1, k), np.int32))
    refused(6, 2, "6 centroids, expected a multiple of 4 up to 8192")
    refused(MOST_CENTROIDS + 4, 2, "8196 centroids")
    refused(8, 9, "9 of 8 centroids, expected 1 to all of them")
    refused(8, 0, "0 of 8 centroids")
    with pytest.raises(ShapeError, match=r"out is \[2, 3\] int32, expected \[n_rows=1, n_chosen\]"):
        pick_centroids(lane.zeros((1, 8), np.float32), lane.zeros((2, 3), np.int32))
    with pytest.raises(ConfigError, match="num_centroids is 30: the kernels take multiples of 4 up to 8192"):
        centroids.check(30)
    centroids.check(0)


def test_pick_touches_the_least(lane):
    scores = np.random.default_rng(2).standard_normal((3, 256)).astype(np.float32)
    out = run_pick(lane, scores, 32)
    traffic, cost_of = lane.traffic(), cost.pick_centroids(scores, out)
    least = least_bytes("centroids.cu", "pick_centroids", n_rows=3, n_centroids=256, n_chosen=32)
    assert traffic.distinct_bytes == least == cost_of.traffic_bytes
    assert traffic.bank_conflicts == 0


# --- candidates

class Head:
    """A random head, its ordering with some tokens left out, and rows with centroids of theirs."""

    def __init__(self, seed, n_rows, n_centroids, size, k, hidden, n_suppressed=0):
        rng, vocab = np.random.default_rng(seed), n_centroids * size
        self.g, self.head = bf16(rng.standard_normal((n_rows, hidden))), bf16(rng.standard_normal((vocab, hidden)))
        self.ordering = rng.permutation(vocab).astype(np.int32).reshape(n_centroids, size)
        self.ordering[np.isin(self.ordering, rng.permutation(vocab)[:n_suppressed])] = -1
        self.chosen = np.array([rng.permutation(n_centroids)[:k] for _ in range(n_rows)], np.int32).reshape(n_rows, k)

    @property
    def arrays(self):
        return self.g, self.head, self.ordering, self.chosen

    def argmax(self, lane):
        out = lane.empty((len(self.g),), np.int32)
        scratch = Scratch(lane.zeros((0,), np.float32), lane.zeros((COUNTERS * len(self.g),), np.int32))
        candidate_argmax(*map(lane.put, self.arrays), out, scratch)
        assert not lane.to_host(scratch.counters).any()
        return lane.to_host(out)

    def logits(self, lane):
        out = lane.empty((len(self.g), len(self.head)), np.float32)
        candidate_logits(*map(lane.put, self.arrays), out)
        return lane.to_host(out)

    def twin_logits(self):
        out = np.empty((len(self.g), len(self.head)))
        reference.candidate_logits(f64(self.g), f64(self.head), self.ordering, self.chosen, out)
        return out


SHAPES = [(1, 4, 1, 1, 4), (3, 8, 5, 3, 12), (2, 32, 12, 6, 32), (2, 6, 33, 2, 36), (1, 16, 128, 4, 256),
          (2, 4, 9, 4, 1024)]


@pytest.mark.parametrize("n_suppressed", [0, 3])
@pytest.mark.parametrize("n_rows, n_centroids, size, k, hidden", SHAPES)
def test_candidates(lane, n_rows, n_centroids, size, k, hidden, n_suppressed):
    at = Head([hidden, size], n_rows, n_centroids, size, k, hidden, n_suppressed)
    got, want = at.logits(lane), at.twin_logits()
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    seen = np.isfinite(want)
    terms = np.abs(f64(at.g)) @ np.abs(f64(at.head)).T
    assert (np.abs(got[seen] - want[seen]) <= FLOAT32_SUM * terms[seen]).all()
    tokens, twin = at.argmax(lane), np.empty(n_rows, np.int32)
    np.testing.assert_array_equal(tokens, got.argmax(axis=1))           # the values that are compared are the logits
    reference.candidate_argmax(f64(at.g), f64(at.head), at.ordering, at.chosen, twin)
    np.testing.assert_array_equal(tokens, twin)


def test_no_rows(lane):
    at = Head(3, 0, 4, 4, 2, 8)
    assert at.argmax(lane).shape == (0,) and at.logits(lane).shape == (0, 16)


def test_of_equal_logits_the_lowest_id_wins(lane):
    """Of two rows of the head, each is there many times: whichever block, warp and lane has one."""
    at = Head(4, 8, 16, 16, 12, 32)
    at.head[2:] = at.head[np.random.default_rng(5).integers(0, 2, len(at.head) - 2)]
    at.g[0] = 0
    at.chosen[0] = [c for c in range(16) if 0 not in at.ordering[c]][:12]
    twin = np.empty(8, np.int32)
    reference.candidate_argmax(f64(at.g), f64(at.head), at.ordering, at.chosen, twin)
    np.testing.assert_array_equal(at.argmax(lane), twin)
    assert twin[0] == at.ordering[at.chosen[0]].min() > 0


def test_a_row_without_candidates_is_token_0_and_a_nan_is_the_largest(lane):
    at = Head(6, 3, 4, 8, 1, 16)
    at.chosen[:] = [[0], [1], [2]]
    at.ordering[0] = -1
    bad = at.ordering[1, 3]
    at.head[bad] = np.nan
    tokens, logits = at.argmax(lane), at.logits(lane)
    twin = np.empty(3, np.int32)
    reference.candidate_argmax(f64(at.g), f64(at.head), at.ordering, at.chosen, twin)
    assert tokens.tolist() == twin.tolist() and tokens[0] == 0 and tokens[1] == bad
    assert np.isneginf(logits[0]).all() and np.isnan(logits[1, bad])


def test_a_row_has_the_same_bits_in_any_batch(lane):
    at = Head(7, 5, 8, 40, 3, 64)
    tokens, logits = at.argmax(lane), at.logits(lane)
    g, chosen = at.g, at.chosen
    for rows in ([2], [4, 0], [3, 3, 1, 2]):
        at.g, at.chosen = g[rows], chosen[rows]
        np.testing.assert_array_equal(at.logits(lane).view(np.uint32), logits[rows].view(np.uint32))
        np.testing.assert_array_equal(at.argmax(lane), tokens[rows])


def test_candidates_refuse_what_does_not_fit(lane):
    def refused(message, **changed):
        at = Head(8, 2, 4, 4, 2, changed.pop("hidden", 8))
        arrays = dict(zip(("g", "head", "ordering", "chosen"), map(lane.put, at.arrays), strict=True)) | changed
        with pytest.raises(ShapeError, match=message):
            candidate_argmax(*arrays.values(), lane.zeros((2,), np.int32),
                             Scratch(lane.zeros((0,), np.float32), lane.zeros((7,), np.int32)))
    refused("rows of 6 values, expected a multiple of 4 up to 16384", hidden=6)
    refused("scratch.counters holds 7, expected at least 8, 4 a row")
    refused(r"chosen is \[3, 2\] int32, expected \[n_rows=2, n_chosen\]", chosen=lane.zeros((3, 2), np.int32))
    with pytest.raises(ShapeError, match=r"out is \[2, 15\] float32, expected \[n_rows=2, vocab=16\]"):
        candidate_logits(*map(lane.put, Head(8, 2, 4, 4, 2, 8).arrays), lane.zeros((2, 15), np.float32))


def test_candidates_move_the_least(lane):
    """Rows that share no centroid; a row of the head is two sectors or more."""
    at = Head(9, 2, 8, 32, 4, 64)
    at.chosen[:] = np.random.default_rng(0).permutation(8).reshape(2, 4)
    out = at.argmax(lane)
    least = least_bytes("centroids.cu", "candidate_argmax", n_rows=2, n_chosen=4, n_distinct=256, hidden=64)
    assert_least_traffic(lane.traffic(), least, cost.candidate_argmax(*at.arrays, out))


def test_logits_of_candidates_touch_the_least(lane, monkeypatch):
    """No bank meets twice; each logit is a sector of its own."""
    at, seen, launch = Head(9, 2, 8, 32, 4, 64), {}, Build.launch
    at.chosen[:] = np.random.default_rng(0).permutation(8).reshape(2, 4)

    def watched(build, *args, **named):
        launch(build, *args, **named)
        seen[build.entry] = lane.traffic()

    monkeypatch.setattr(Build, "launch", watched)
    op = cost.candidate_logits(*at.arrays, at.logits(lane))
    sizes = {"n": 2 * 256, "n_rows": 2, "n_chosen": 4, "n_distinct": 256, "hidden": 64, "n_logits": 2 * 4 * 32}
    least = {entry: least_bytes("centroids.cu", entry, **sizes) for entry in ("no_logits", "candidate_logits")}
    assert {entry: traffic.distinct_bytes for entry, traffic in seen.items()} == least
    assert sum(least.values()) == op.traffic_bytes
    assert seen["no_logits"].moved_bytes == least["no_logits"]
    assert seen["candidate_logits"].moved_bytes - seen["candidate_logits"].small_reread_bytes <= (
        1.1 * least["candidate_logits"] + (32 - 4) * sizes["n_logits"])
    assert not any(traffic.bank_conflicts for traffic in seen.values())
