"""Rows by number in vision towers against their twins: place_rows, add_rows, pool_rows."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.embedding import add_rows, place_rows, pool_rows
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

HIDDEN = [4, 12, 24, 72, 640, 1152]         # accesses of 8 and of 16 bytes, one block of a row and several


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


def ids(*values):
    return np.array(values, np.int32)


def bits(array):
    return array.view(np.uint8)


# --- place_rows

@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("width", [2, *HIDDEN])
def test_placed_rows_are_bit_for_bit_and_others_stay(lane, width, dtype):
    rng, source, rows = np.random.default_rng(width), ids(5, 0, 5), ids(6, 2, 0)
    x = rng.integers(0, 256, (6, width * dtype.itemsize), np.uint8).view(dtype)
    before = rng.integers(0, 256, (7, width * dtype.itemsize), np.uint8).view(dtype)
    out, want = lane.put(before), before.copy()
    place_rows(lane.put(x), lane.put(source), lane.put(rows), out)
    reference.place_rows(x, source, rows, want)
    np.testing.assert_array_equal(bits(lane.to_host(out)), bits(want))
    assert (bits(want)[[1, 3, 4, 5]] == bits(before)[[1, 3, 4, 5]]).all()


def test_a_row_from_outside_is_nan_and_one_to_outside_is_placed_nowhere(lane):
    x, before = normals(np.random.default_rng(1), 4, 20), normals(np.random.default_rng(2), 5, 20)
    out = lane.put(before)
    place_rows(lane.put(x), lane.put(ids(4, -1, 3, 2, 1)), lane.put(ids(1, 2, 5, -1, 0)), out)
    got = lane.to_host(out)
    assert np.isnan(f64(got[[1, 2]])).all()
    np.testing.assert_array_equal(got[[0, 3, 4]], [x[1], *before[3:]])


def test_no_rows_are_placed(lane):
    before = normals(np.random.default_rng(3), 3, 16)
    out = lane.put(before)
    place_rows(lane.zeros((0, 16), BF16), lane.put(ids()), lane.put(ids()), out)
    np.testing.assert_array_equal(lane.to_host(out), before)


@pytest.mark.parametrize("x, rows, out, message", [
    (np.zeros((3, 16), BF16), ids(0, 1), np.zeros((4, 16), BF16), r"rows is \[2\] int32, expected \[n_placed=1\]"),
    (np.zeros((3, 16), BF16), ids(0), np.zeros((4, 16), np.float32), r"out is \[4, 16\] float32, expected .* bfloat16"),
    (np.zeros((3, 3), BF16), ids(0), np.zeros((4, 3), BF16), "rows of x are 6 bytes, expected a multiple of 4"),
])
def test_place_rows_refuses_what_does_not_fit(lane, x, rows, out, message):
    with pytest.raises(ShapeError, match="place_rows: " + message):
        place_rows(lane.put(x), lane.put(ids(0)), lane.put(rows), lane.put(out))


def test_placed_rows_move_the_least(lane):
    arrays = (lane.zeros((40, 1152), BF16), lane.put(ids(*range(20))), lane.put(ids(*range(20, 40))),
              lane.zeros((60, 1152), BF16))
    place_rows(*arrays)
    least = least_bytes("embedding.cu", "place_rows", n_placed=20, n_distinct=20, row_words=576)
    assert_least_traffic(lane.traffic(), least, cost.place_rows(*arrays))


# --- add_rows

def added(lane, x, table, rows, in_place=False):
    x = lane.put(x)
    out = x if in_place else lane.empty(x.shape, BF16)
    add_rows(x, lane.put(table), lane.put(rows), out)
    return lane.to_host(out)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("n_axes", [1, 2])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_added_rows_round_each_sum(lane, hidden, n_axes, in_place):
    """A sum of two bfloat16 within 2^16 of each other fits float32, so the result is known bit for bit."""
    rng = np.random.default_rng([hidden, n_axes])
    x, table = normals(rng, 9, hidden), normals(rng, 30, hidden)
    rows = rng.integers(0, 30, (9, n_axes)).astype(np.int32)
    places = bf16(f64(table[rows]).sum(1))
    want = np.empty((9, hidden))
    reference.add_rows(f64(x), f64(places), np.arange(9, dtype=np.int32)[:, None], want)
    np.testing.assert_array_equal(added(lane, x, table, rows, in_place), bf16(want))


def test_the_two_sums_round_apart(lane):
    """256 + (1 + 2^-8) is 257 with the inner sum rounded to 1, and 258 with one rounding of 257.004 upwards: the ulp of
    256 is 2, so 257 goes to the even 256."""
    x, table = bf16([[256.0] * 4]), bf16([[1.0] * 4, [2.0**-8] * 4])
    np.testing.assert_array_equal(added(lane, x, table, ids([0, 1])), bf16([[256.0] * 4]))
    assert bf16(256 + (1 + 2.0**-8))[()] == 258


def test_a_twin_of_many_rows_and_a_kernel_agree(lane):
    """More rows than a block of the twin."""
    rng = np.random.default_rng(4)
    x, table, rows = normals(rng, 600, 8), normals(rng, 50, 8), rng.integers(0, 50, (600, 2)).astype(np.int32)
    want = np.empty((600, 8))
    reference.add_rows(f64(x), f64(table), rows, want)
    got = added(lane, x, table, rows)
    assert_ulps(got, want, most=1.01, terms=(f64(x), f64(table)[rows].sum(1)))


def test_a_place_outside_the_table_is_nan(lane):
    x, table = normals(np.random.default_rng(5), 4, 24), normals(np.random.default_rng(6), 3, 24)
    out = added(lane, x, table, ids([0, 2], [3, 0], [0, -1], [2**31 - 1, -2**31]))
    assert np.isnan(f64(out[1:])).all() and np.isfinite(f64(out[0])).all()


def test_nothing_is_added_to_no_rows(lane):
    assert added(lane, np.zeros((0, 16), BF16), np.zeros((3, 16), BF16), np.zeros((0, 2), np.int32)).shape == (0, 16)


@pytest.mark.parametrize("x, table, rows, message", [
    ((3, 16), (5, 24), (3, 2), r"table is \[5, 24\] bfloat16, expected \[n_places, hidden=16\]"),
    ((3, 16), (5, 16), (2, 2), r"rows is \[2, 2\] int32, expected \[n=3, n_axes\]"),
    ((3, 16), (5, 16), (3, 3), "rows has 3 columns, expected 1 or 2"),
    ((3, 6), (5, 6), (3, 2), "hidden is 6, expected a multiple of 4"),
])
def test_add_rows_refuses_what_does_not_fit(lane, x, table, rows, message):
    with pytest.raises(ShapeError, match="add_rows: " + message):
        added(lane, np.zeros(x, BF16), np.zeros(table, BF16), np.zeros(rows, np.int32))


@pytest.mark.parametrize("n_axes", [1, 2])
def test_added_rows_move_the_least(lane, n_axes):
    """A picture of 9 x 9 patches, whose columns and rows have 18 places; as many as patches with one number each."""
    y, x = np.divmod(np.arange(81), 9)
    rows = np.stack([x, 9 + y], axis=1) if n_axes == 2 else np.arange(81)[:, None]
    states, table = np.zeros((81, 1152), BF16), np.zeros((100, 1152), BF16)
    out = added(lane, states, table, rows.astype(np.int32))
    traffic, n_distinct = lane.traffic(), 18 if n_axes == 2 else 81
    least = least_bytes("embedding.cu", "add_rows", n=81, n_axes=n_axes, hidden=1152, n_distinct=n_distinct)
    assert traffic.distinct_bytes == least == cost.add_rows(states, table, rows, out).traffic_bytes
    reread = 2 * 1152 * (n_axes * 81 - n_distinct)          # each place by every patch that has it; the cache has them
    assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * least + reread
    assert traffic.bank_conflicts == 0


# --- pool_rows

def pooled(lane, x, groups, factor, bias=None, scale=None):
    out = lane.empty((len(groups), x.shape[1]), BF16)
    pool_rows(lane.put(x), lane.put(groups), factor, *(None if w is None else lane.put(w) for w in (bias, scale)), out)
    return lane.to_host(out)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("k", [1, 4, 9, 16])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_pooled_rows_round_the_mean_and_the_result(lane, hidden, k, standardize):
    rng = np.random.default_rng([hidden, k])
    x, groups = normals(rng, 5 * k, hidden), rng.permutation(5 * k).reshape(5, k).astype(np.int32)
    bias, scale = (normals(rng, hidden), normals(rng, hidden)) if standardize else (None, None)
    factor = float(np.float32(hidden**0.5))
    means = bf16(np.sum([f64(x)[groups[:, j]] for j in range(k)], axis=0) / k)
    want = np.empty((5, hidden))
    reference.pool_rows(f64(means), np.arange(5, dtype=np.int32)[:, None], factor,
                        *(None if w is None else f64(w) for w in (bias, scale)), want)
    terms = (f64(means) * factor * f64(scale), f64(bias) * f64(scale)) if standardize else ()
    assert_ulps(pooled(lane, x, groups, factor, bias, scale), want, terms=terms)


def test_the_mean_is_rounded_before_the_factor(lane):
    """Trap 25: the mean 1 + 2^-9 goes to 1; times 3 that is 3, not bf16(3 + 3 * 2^-9) = 3 + 2^-6."""
    x = bf16([[1.0] * 8, [1 + 2.0**-7] * 8, [1.0] * 8, [1.0] * 8])
    np.testing.assert_array_equal(pooled(lane, x, ids([0, 1, 2, 3]).reshape(1, 4), 3.0), bf16([[3.0] * 8]))
    rounded_late = bf16(3.0 * (1 + 2.0**-9) - 3.0)[()]
    assert rounded_late != 0
    got = pooled(lane, x, ids([0, 1, 2, 3]).reshape(1, 4), 3.0, bf16([3.0] * 8), bf16([1.0] * 8))
    np.testing.assert_array_equal(got, np.zeros((1, 8), BF16))


def test_what_follows_the_mean_is_not_rounded_before_the_end(lane):
    """sqrt(1152) is no bfloat16: its product with 1 less 34 keeps what rounding it would lose."""
    factor = float(np.float32(1152**0.5))
    got = pooled(lane, bf16([[1.0] * 8]), ids([0]).reshape(1, 1), factor, bf16([34.0] * 8), bf16([1.0] * 8))
    np.testing.assert_array_equal(got, bf16([[factor - 34.0] * 8]))
    assert bf16(factor)[()] - 34.0 != bf16(factor - 34.0)[()]


def test_the_twin_pools_as_the_formula_says():
    """In float64, without a kernel: more groups than a block of it."""
    rng = np.random.default_rng(7)
    x, groups = rng.standard_normal((900, 3)), rng.integers(0, 900, (300, 9)).astype(np.int32)
    bias, scale, out = rng.standard_normal(3), rng.standard_normal(3), np.empty((300, 3))
    reference.pool_rows(x, groups, 2.0, bias, scale, out)
    np.testing.assert_allclose(out, [(sum(x[j] for j in g) / 9 * 2 - bias) * scale for g in groups], rtol=1e-12,
                               atol=1e-12)


def test_a_group_with_a_row_outside_is_nan(lane):
    x = normals(np.random.default_rng(8), 6, 24)
    out = pooled(lane, x, ids([0, 1], [2, 6], [-1, 3], [4, 5]).reshape(4, 2), 1.0)
    assert np.isnan(f64(out[1:3])).all() and np.isfinite(f64(out[[0, 3]])).all()


def test_no_groups(lane):
    assert pooled(lane, np.zeros((3, 16), BF16), np.zeros((0, 9), np.int32), 1.0).shape == (0, 16)


@pytest.mark.parametrize("x, groups, bias, message", [
    ((9, 16), (1, 9), (24,), r"bias is \[24\] bfloat16, expected \[hidden=16\]"),
    ((9, 16), (1, 0), None, "groups are of no rows, expected at least 1"),
    ((9, 6), (1, 9), None, "hidden is 6, expected a multiple of 4"),
])
def test_pool_rows_refuses_what_does_not_fit(lane, x, groups, bias, message):
    with pytest.raises(ShapeError, match="pool_rows: " + message):
        pooled(lane, np.zeros(x, BF16), np.zeros(groups, np.int32), 1.0, None if bias is None else np.zeros(bias, BF16))


@pytest.mark.parametrize("standardize", [False, True])
def test_pooled_rows_move_the_least(lane, standardize):
    rng = np.random.default_rng(9)
    x, groups = normals(rng, 90, 1152), rng.permutation(90).reshape(10, 9).astype(np.int32)
    weights = (normals(rng, 1152),) * 2 if standardize else (None, None)
    out = pooled(lane, x, groups, 1.0, *weights)
    least = least_bytes("embedding.cu", "pool_rows", n_out=10, k=9, n_distinct=90, hidden=1152, has_bias=standardize,
                        has_scale=standardize)
    assert_least_traffic(lane.traffic(), least, cost.pool_rows(x, groups, 1.0, *weights, out))
