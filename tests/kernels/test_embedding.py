"""embed and select_rows against their twins."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.embedding import embed, select_rows
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
