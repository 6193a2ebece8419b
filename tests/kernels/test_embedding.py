"""embed, select_rows and scale_rows against their twins."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.embedding import embed, scale_rows, select_rows
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

HIDDEN = [4, 12, 16, 20, 24, 40, 48, 72, 640, 1152, 5376]


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


def ids(*values):
    return np.array(values, np.int32)


def run_embed(lane, table, token_ids, scale):
    out = lane.empty((len(token_ids), table.shape[1]), BF16)
    embed(lane.put(table), lane.put(token_ids), scale, out)
    return lane.to_host(out)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_embed_rounds_once(lane, hidden):
    table, token_ids = normals(np.random.default_rng(hidden), 11, hidden), ids(10, 0, 3, 3, 7)
    out, scale = np.empty((5, hidden)), float(np.float32(hidden**0.5))
    reference.embed(f64(table), token_ids, scale, out)
    assert_ulps(run_embed(lane, table, token_ids, scale), out)


def test_embed_with_a_scale_of_one_copies(lane):
    table = normals(np.random.default_rng(1), 300, 48)
    token_ids = np.random.default_rng(2).integers(0, 300, 1000).astype(np.int32)
    np.testing.assert_array_equal(run_embed(lane, table, token_ids, 1.0), table[token_ids])


def test_a_token_outside_the_vocabulary_is_nan(lane):
    """And what lies around the table is not read; other tokens are not concerned."""
    table = normals(np.random.default_rng(3), 11, 24)
    out = run_embed(lane, table, ids(11, 3, -1, 2**31 - 1, -2**31), 1.0)
    assert np.isnan(f64(out[[0, 2, 3, 4]])).all()
    np.testing.assert_array_equal(out[1], table[3])


def test_no_tokens(lane):
    assert run_embed(lane, np.zeros((3, 16), BF16), ids(), 1.0).shape == (0, 16)


@pytest.mark.parametrize("table, token_ids, message", [
    (np.zeros((3, 16), np.float32), ids(0), r"table is \[3, 16\] float32, expected \[vocab, hidden\] bfloat16"),
    (np.zeros((3, 16), BF16), np.zeros(2, np.int64), r"token_ids is \[2\] int64, expected \[n_tokens\] int32"),
    (np.zeros((3, 6), BF16), ids(0), "hidden is 6, expected a multiple of 4"),
])
def test_embed_refuses_what_does_not_fit(lane, table, token_ids, message):
    with pytest.raises(ShapeError, match=message):
        run_embed(lane, table, token_ids, 1.0)


@pytest.mark.parametrize("hidden", [1152, 5376])
def test_embed_moves_the_least(lane, hidden):
    table, token_ids = normals(np.random.default_rng(4), 40, hidden), ids(*range(0, 40, 2))
    out = run_embed(lane, table, token_ids, 34.0)
    least = least_bytes("embedding.cu", "embed", n_tokens=20, n_distinct=20, hidden=hidden)
    assert_least_traffic(lane.traffic(), least, cost.embed(table, token_ids, 34.0, out))


# --- select_rows

@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("width", [2, *HIDDEN])
def test_selected_rows_are_bit_for_bit(lane, width, dtype):
    """Whatever the bits mean: NaNs keep theirs."""
    rng, rows = np.random.default_rng(width), ids(8, 0, 8, 5)
    x = rng.integers(0, 256, (9, width * dtype.itemsize), np.uint8).view(dtype)
    out = lane.empty((4, width), dtype)
    got = select_rows(lane.put(x), lane.put(rows), out)
    assert got is out
    np.testing.assert_array_equal(lane.to_host(got).view(np.uint8), x[rows].view(np.uint8))
    twin = reference.select_rows(x, rows, np.empty((4, width), dtype))
    np.testing.assert_array_equal(lane.to_host(got).view(np.uint8), twin.view(np.uint8))


def test_a_row_outside_is_nan(lane):
    x, out = normals(np.random.default_rng(5), 4, 20), lane.empty((3, 20), BF16)
    select_rows(lane.put(x), lane.put(ids(-1, 2, 4)), out)
    assert np.isnan(f64(lane.to_host(out)[[0, 2]])).all()
    np.testing.assert_array_equal(lane.to_host(out)[1], x[2])


def test_no_rows(lane):
    assert select_rows(lane.zeros((3, 16), BF16), lane.put(ids()), lane.empty((0, 16), BF16)).shape == (0, 16)


@pytest.mark.parametrize("x, out, message", [
    (np.zeros((3, 16), BF16), np.zeros((1, 16), np.float32), r"out is \[1, 16\] float32, expected .* bfloat16"),
    (np.zeros((3, 16), BF16), np.zeros((1, 24), BF16), r"out is \[1, 24\] bfloat16"),
    (np.zeros((3, 3), BF16), np.zeros((1, 3), BF16), "rows of x are 6 bytes, expected a multiple of 4"),
])
def test_select_rows_refuses_what_does_not_fit(lane, x, out, message):
    with pytest.raises(ShapeError, match=message):
        select_rows(lane.put(x), lane.put(ids(0)), lane.put(out))


def test_select_rows_refuses_strides(lane):
    with pytest.raises(ShapeError, match="C-contiguous"):
        select_rows(lane.zeros((3, 32), BF16)[:, ::2], lane.put(ids(0)), lane.empty((1, 16), BF16))


@pytest.mark.parametrize("width, dtype", [(5376, BF16), (1152, np.float32)])
def test_select_rows_moves_the_least(lane, width, dtype):
    arrays = lane.zeros((40, width), dtype), lane.put(ids(*range(0, 40, 2))), lane.empty((20, width), dtype)
    select_rows(*arrays)
    least = least_bytes("embedding.cu", "select_rows", n_kept=20, n_distinct=20,
                        row_words=width * np.dtype(dtype).itemsize // 4)
    assert_least_traffic(lane.traffic(), least, cost.select_rows(*arrays))


# --- scale_rows

def run_scale_rows(lane, x, weights):
    out = lane.empty((weights.size, x.shape[1]), BF16)
    scale_rows(lane.put(x), lane.put(weights), out)
    return lane.to_host(out)


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("hidden", [4, 12, 24, 1152, 5120])
def test_scaled_rows_round_the_weight_and_the_product(lane, hidden, k):
    """A product of two bfloat16 fits float32, so the result is known bit for bit."""
    rng = np.random.default_rng([hidden, k])
    x, weights = normals(rng, 5, hidden), rng.uniform(0, 1, (5, k)).astype(np.float32)
    got, want = run_scale_rows(lane, x, weights), np.empty((5 * k, hidden))
    reference.scale_rows(f64(x), f64(bf16(weights)), want)
    np.testing.assert_array_equal(got.view(np.uint16), bf16(want).view(np.uint16))


def test_no_scaled_rows(lane):
    assert run_scale_rows(lane, np.zeros((0, 16), BF16), np.zeros((0, 2), np.float32)).shape == (0, 16)


@pytest.mark.parametrize("x, weights, out, message", [
    ((3, 16), (2, 2), (4, 16), r"weights is \[2, 2\] float32, expected \[n_tokens=3, k\]"),
    ((3, 16), (3, 2), (3, 16), r"out is \[3, 16\] bfloat16, expected \[pairs=6, hidden=16\]"),
    ((3, 6), (3, 2), (6, 6), "hidden is 6, expected a multiple of 4"),
])
def test_scale_rows_refuses_what_does_not_fit(lane, x, weights, out, message):
    with pytest.raises(ShapeError, match=message):
        scale_rows(lane.zeros(x, BF16), lane.zeros(weights, np.float32), lane.zeros(out, BF16))


@pytest.mark.parametrize("k", [1, 8])
def test_scaled_rows_move_the_least(lane, k):
    rng = np.random.default_rng(6)
    x, weights = normals(rng, 20, 5120), rng.uniform(0, 1, (20, k)).astype(np.float32)
    out = run_scale_rows(lane, x, weights)
    least = least_bytes("embedding.cu", "scale_rows", n_tokens=20, k=k, hidden=5120)
    assert_least_traffic(lane.traffic(), least, cost.scale_rows(x, weights, out))
