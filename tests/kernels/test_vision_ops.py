"""The bounds, biases and LayerNorms of vision towers against their twins: clamp, add_bias, layer_norm."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.activation import add_bias, clamp
from engine.kernels.rmsnorm import layer_norm
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


# --- clamp

@pytest.mark.parametrize("width, n_columns, first", [(4, 4, 0), (12, 36, 12), (8, 24, 16), (72, 216, 72), (24, 28, 4),
                                                     (1152, 1152, 0), (64, 192, 0)])
def test_clamped_columns_and_no_others(lane, width, n_columns, first):
    rng = np.random.default_rng([width, first])
    x, before, bounds = normals(rng, 7, width), normals(rng, 7, n_columns), bf16([-0.5, 0.75])
    out, want = lane.put(before), f64(before)
    clamp(lane.put(x), lane.put(bounds), out, first)
    reference.clamp(f64(x), f64(bounds), want, first)
    np.testing.assert_array_equal(lane.to_host(out), bf16(want))


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-1.0, np.inf), (0.0, 0.0), (1.0, -1.0)])
def test_bounds_of_any_kind_in_place(lane, bounds):
    """NaN stays; infinities go to the bounds; the upper one wins where they cross."""
    x = bf16([[np.nan, np.inf, -np.inf, -0.25, 3.0, -3.0, 1.0, -1.0]])
    there, want = lane.put(x), f64(x)
    clamp(there, lane.put(bf16(bounds)), there)
    reference.clamp(want, np.array(bounds), want)
    np.testing.assert_array_equal(f64(lane.to_host(there)), want)
    assert np.isnan(want[0, 0])


def test_nothing_to_clamp(lane):
    clamp(lane.zeros((0, 16), BF16), lane.zeros((2,), BF16), lane.zeros((0, 16), BF16))


@pytest.mark.parametrize("x, bounds, out, first, message", [
    ((3, 16), (2,), (3, 16), 4, "columns from 4 on of 16, expected multiples of 4 that leave 16 columns"),
    ((3, 16), (2,), (3, 32), -4, "columns from -4 on of 32"),
    ((3, 16), (2,), (3, 32), 2, "columns from 2 on of 32"),
    ((3, 16), (4,), (3, 16), 0, r"bounds is \[4\] bfloat16, expected \[2\]"),
    ((3, 16), (2,), (2, 16), 0, r"out is \[2, 16\] bfloat16, expected \[n=3, n_columns\]"),
    ((3, 6), (2,), (3, 8), 0, "width is 6, expected a multiple of 4"),
])
def test_clamp_refuses_what_does_not_fit(lane, x, bounds, out, first, message):
    with pytest.raises(ShapeError, match="clamp: " + message):
        clamp(lane.zeros(x, BF16), lane.zeros(bounds, BF16), lane.zeros(out, BF16), first)


@pytest.mark.parametrize("n_columns, first", [(1152, 0), (3456, 1152)])
def test_clamped_rows_move_the_least(lane, n_columns, first):
    arrays = lane.zeros((20, 1152), BF16), lane.zeros((2,), BF16), lane.zeros((20, n_columns), BF16)
    clamp(*arrays, first)
    least = least_bytes("activation.cu", "clamp", n_rows=20, width=1152)
    assert_least_traffic(lane.traffic(), least, cost.clamp(*arrays, first))


# --- add_bias

@pytest.mark.parametrize("out_is", [None, "x", "residual"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("width", [4, 12, 24, 1152])
def test_biases_round_once(lane, width, activation, out_is):
    rng = np.random.default_rng([width, activation is None])
    x, bias, residual = normals(rng, 7, width), normals(rng, width), normals(rng, 7, width)
    arrays = {"x": lane.put(x), "residual": lane.put(residual), None: lane.empty((7, width), BF16)}
    add_bias(arrays["x"], lane.put(bias), arrays[out_is], activation, arrays["residual"])
    want, activated = np.empty((7, width)), np.empty((7, width))
    reference.add_bias(f64(x), f64(bias), want, activation, f64(residual))
    reference.add_bias(f64(x), f64(bias), activated, activation)
    terms = (f64(x), f64(residual), activated)
    assert_ulps(lane.to_host(arrays[out_is]), want, terms=terms)


def test_a_bias_alone(lane):
    """What an attention's projections have: no activation, nothing added, in place. Sums fit float32 bit for bit."""
    rng = np.random.default_rng(10)
    x, bias = normals(rng, 40, 216), normals(rng, 216)
    there = lane.put(x)
    add_bias(there, lane.put(bias), there)
    np.testing.assert_array_equal(lane.to_host(there), bf16(f64(x) + f64(bias)))


def test_the_twin_of_a_bias_keeps_its_input():
    rng = np.random.default_rng(11)
    x, bias = rng.standard_normal((70, 4)), rng.standard_normal(4)
    before, out = x.copy(), np.empty((70, 4))
    reference.add_bias(x, bias, out, "gelu_tanh", x)
    z = before + bias
    want = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) + before
    np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(x, before)


def test_no_rows_with_a_bias(lane):
    add_bias(lane.zeros((0, 16), BF16), lane.zeros((16,), BF16), lane.zeros((0, 16), BF16))


@pytest.mark.parametrize("x, bias, activation, message", [
    ((3, 16), (24,), None, r"bias is \[24\] bfloat16, expected \[width=16\]"),
    ((3, 16), (16,), "silu", "activation is 'silu', expected None or 'gelu_tanh'"),
    ((3, 6), (6,), None, "width is 6, expected a multiple of 4"),
])
def test_add_bias_refuses_what_does_not_fit(lane, x, bias, activation, message):
    with pytest.raises(ShapeError, match="add_bias: " + message):
        add_bias(lane.zeros(x, BF16), lane.zeros(bias, BF16), lane.zeros(x, BF16), activation)


@pytest.mark.parametrize("has_residual", [False, True])
def test_biases_move_the_least(lane, has_residual):
    x, bias, out = (lane.zeros(shape, BF16) for shape in ((20, 4304), (4304,), (20, 4304)))
    residual = lane.zeros((20, 4304), BF16) if has_residual else None
    add_bias(x, bias, out, "gelu_tanh", residual)
    least = least_bytes("activation.cu", "add_bias", n_rows=20, width=4304, has_residual=has_residual)
    assert_least_traffic(lane.traffic(), least, cost.add_bias(x, bias, out, "gelu_tanh", residual))


# --- layer_norm

def normed(lane, x, weight, bias, eps, in_place=False):
    x = lane.put(x)
    out = x if in_place else lane.empty(x.shape, BF16)
    layer_norm(x, lane.put(weight), lane.put(bias), eps, out)
    return lane.to_host(out)


def assert_normed(lane, x, rng, eps=1e-6, in_place=False):
    weight, bias = normals(rng, x.shape[1]), normals(rng, x.shape[1])
    want, scaled = np.empty(x.shape), np.empty(x.shape)
    reference.layer_norm(f64(x), f64(weight), f64(bias), eps, want)
    reference.layer_norm(f64(x), f64(weight), 0.0, eps, scaled)
    assert_ulps(normed(lane, x, weight, bias, eps, in_place), want, terms=(scaled, f64(bias)))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("hidden", [4, 12, 24, 640, 1152, 2056, 6912])     # one warp and several, the widest patch
def test_layer_norm_rounds_once(lane, hidden, in_place):
    rng = np.random.default_rng(hidden)
    assert_normed(lane, normals(rng, 5, hidden), rng, in_place=in_place)


def test_a_mean_far_from_zero_leaves_the_variance(lane):
    """The mean of the squares less the square of the mean would lose it: 300 is 300 times the deviation."""
    rng = np.random.default_rng(12)
    assert_normed(lane, bf16(300 + 4 * rng.standard_normal((5, 1152))), rng, eps=1e-5)


def test_rows_of_one_value_are_the_bias(lane):
    bias = normals(np.random.default_rng(13), 640)
    got = normed(lane, bf16(np.full((2, 640), 0.5)), bf16(np.ones(640)), bias, 1e-6)
    np.testing.assert_array_equal(got, np.stack([bias, bias]))


def test_eps_counts_where_the_variance_is_small(lane):
    rng = np.random.default_rng(14)
    assert_normed(lane, bf16(1e-3 * rng.standard_normal((3, 640))), rng, eps=1e-5)


def test_a_row_has_the_same_bits_among_others(lane):
    rng = np.random.default_rng(15)
    x, weight, bias = normals(rng, 9, 640), normals(rng, 640), normals(rng, 640)
    whole = normed(lane, x, weight, bias, 1e-6)
    for i in range(9):
        np.testing.assert_array_equal(normed(lane, x[i:i + 1], weight, bias, 1e-6).view(np.uint16),
                                      whole[i:i + 1].view(np.uint16))


def test_no_rows_to_norm(lane):
    assert normed(lane, np.zeros((0, 640), BF16), np.zeros(640, BF16), np.zeros(640, BF16), 1e-6).shape == (0, 640)


@pytest.mark.parametrize("x, weight, message", [
    ((3, 640), (64,), r"weight is \[64\] bfloat16, expected \[hidden=640\]"),
    ((3, 6), (6,), "hidden is 6, expected a multiple of 4 up to 16384"),
    ((1, 16388), (16388,), "hidden is 16388, expected a multiple of 4 up to 16384"),
])
def test_layer_norm_refuses_what_does_not_fit(lane, x, weight, message):
    with pytest.raises(ShapeError, match="layer_norm: " + message):
        normed(lane, np.zeros(x, BF16), np.zeros(weight, BF16), np.zeros(weight, BF16), 1e-6)


@pytest.mark.parametrize("hidden", [1152, 6912])
def test_normed_rows_move_the_least(lane, hidden):
    x, weight = np.ones((20, hidden), BF16), np.ones(hidden, BF16)
    out = normed(lane, x, weight, weight.copy(), 1e-6)
    least = least_bytes("rmsnorm.cu", "layer_norm", n_rows=20, hidden=hidden)
    assert_least_traffic(lane.traffic(), least, cost.layer_norm(x, weight, weight, 1e-6, out))
