"""engine/reference_rows.py, op by op, against the formula written plainly in float64."""

import math

import numpy as np
import pytest

from engine import reference
from tests.test_reference import EPS, ROUNDED_ONCE, close, f32, rms_norm_f64

# --- norms

@pytest.mark.parametrize("shape", [(1, 8), (7, 1), (33, 65), (3, 5, 24), (0, 16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm(shape, offset, has_weight):
    rng = np.random.default_rng(shape)
    x, weight = 30 * f32(rng, *shape), f32(rng, shape[-1]) if has_weight else None
    out = np.empty_like(x)
    reference.rms_norm(x, weight, EPS, offset, out)
    expected = rms_norm_f64(x, weight, offset)
    close(out, expected, ROUNDED_ONCE)
    reference.rms_norm(x, weight, EPS, offset, x)                       # in place
    np.testing.assert_array_equal(x, out)


def test_rms_norm_of_zeros_and_of_large_rows():
    x = np.zeros((2, 8), np.float32)
    x[1] = 1e15
    reference.rms_norm(x, None, EPS, 0.0, x)
    assert (x[0] == 0).all() and x[1] == pytest.approx(1.0)


@pytest.mark.parametrize("n_tokens", [0, 1, 37])
@pytest.mark.parametrize("has_post_weight", [True, False])
@pytest.mark.parametrize("scalar", [None, 0.25])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_norm(scalar, offset, has_post_weight, n_tokens):
    """The branch keeps its values, unless the result is to go there."""
    rng = np.random.default_rng(4)
    residual, branch, post, following = f32(rng, n_tokens, 24), f32(rng, n_tokens, 24), f32(rng, 24), f32(rng, 24)
    after = residual + (rms_norm_f64(branch, post, offset) if has_post_weight else branch)
    after *= 1 if scalar is None else scalar
    out, before, again = np.empty_like(residual), branch.copy(), residual.copy()
    rest = (post if has_post_weight else None, following, EPS, offset,
            None if scalar is None else np.array([scalar], np.float32))
    reference.add_norm(residual, branch, *rest, out)
    close(residual, after, ROUNDED_ONCE)
    close(out, rms_norm_f64(after, following, offset), 2 * ROUNDED_ONCE)
    np.testing.assert_array_equal(branch, before)
    reference.add_norm(again, branch, *rest, branch)
    np.testing.assert_array_equal(branch, out)


@pytest.mark.parametrize("has_post_weight", [True, False])
def test_add_norm_without_a_next_norm(has_post_weight):
    """The residual has the bits it has with one, and the branch keeps its values."""
    rng = np.random.default_rng(5)
    residual, branch, post, following = f32(rng, 37, 24), f32(rng, 37, 24), f32(rng, 24), f32(rng, 24)
    post, scalar = post if has_post_weight else None, np.array([0.25], np.float32)
    expected, before = residual.copy(), branch.copy()
    reference.add_norm(expected, branch, post, following, EPS, 1.0, scalar, np.empty_like(branch))
    reference.add_norm(residual, branch, post, None, EPS, 1.0, scalar, None)
    np.testing.assert_array_equal(residual, expected)
    np.testing.assert_array_equal(branch, before)


@pytest.mark.parametrize("n_tokens", [0, 1, 37])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_norms(n_tokens, offset):
    """Also into one of its arguments."""
    rng = np.random.default_rng(n_tokens)
    a, b, a_weight, b_weight = f32(rng, n_tokens, 24), f32(rng, n_tokens, 24), f32(rng, 24), f32(rng, 24)
    terms, out = [rms_norm_f64(a, a_weight, offset), rms_norm_f64(b, b_weight, offset)], np.empty_like(a)
    reference.add_norms(a, a_weight, b, b_weight, EPS, offset, out)
    largest = np.abs(terms).max(axis=(0, 2), initial=0)[:, None]
    assert (np.abs(out - sum(terms)) <= 2 * ROUNDED_ONCE * largest).all()
    for i in range(2):
        copies = a.copy(), b.copy()
        reference.add_norms(copies[0], a_weight, copies[1], b_weight, EPS, offset, copies[i])
        np.testing.assert_array_equal(copies[i], out)


@pytest.mark.parametrize("n_tokens", [0, 1, 37])
def test_router_norm(n_tokens):
    rng = np.random.default_rng(n_tokens)
    x, scale = 30 * f32(rng, n_tokens, 24), f32(rng, 24)
    out = np.empty_like(x)
    reference.router_norm(x, scale, 24**-0.5, EPS, out)
    close(out, rms_norm_f64(x, scale, 0.0) / math.sqrt(24), 2 * ROUNDED_ONCE)
    reference.router_norm(x, scale, 24**-0.5, EPS, x)                   # in place
    np.testing.assert_array_equal(x, out)


# --- temperatures, weights and gates of rows

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_temperature(dtype):
    """The figures of Llama 4, and steps of another floor: whole numbers of floor decide, not of float32 quotients."""
    figures = {0: 1.0, 8190: 1.0, 8191: 1.0693, 16383: 1.1099, 131071: 1.2833, 1048575: 1.4860, 10485759: 1.7155}
    out = np.empty(len(figures), dtype)
    reference.attention_temperature(np.array(list(figures), np.int32), 0.1, 8192, out)
    np.testing.assert_allclose(out, list(figures.values()), atol=5e-5)
    positions = np.array([*range(40), 2**24 - 2, 2**24 - 1], np.int32)
    out = np.empty(len(positions), dtype)
    reference.attention_temperature(positions, 0.5, 7, out)
    np.testing.assert_allclose(out, [1 + 0.5 * math.log(1 + (p + 1) // 7) for p in positions.tolist()], rtol=2e-7)


@pytest.mark.parametrize("n_tokens, k", [(0, 1), (1, 1), (5, 3)])
def test_scale_rows(n_tokens, k):
    rng = np.random.default_rng(k)
    x, weights, out = f32(rng, n_tokens, 6), f32(rng, n_tokens, k), np.empty((n_tokens * k, 6), np.float32)
    reference.scale_rows(x, weights, out)
    for t in range(n_tokens):
        for s in range(k):
            np.testing.assert_array_equal(out[t * k + s], x[t] * weights[t, s])


@pytest.mark.parametrize("n_tokens", [0, 1, 70])
@pytest.mark.parametrize("n_layers, width", [(1, 8), (3, 5)])
def test_mix_per_layer(n_tokens, n_layers, width):
    """Each layer's part has a norm of its own, of the scaled context: eps counts where that is small."""
    rng = np.random.default_rng([n_tokens, width])
    context, tokens, weight = 1e-2 * f32(rng, n_tokens, n_layers * width), f32(rng, n_tokens, n_layers * width), \
        f32(rng, width)
    out, factor = np.empty_like(context), 1 / math.sqrt(50)
    reference.mix_per_layer(context, tokens, weight, factor, EPS, out)
    for i in range(n_layers):
        part = slice(i * width, (i + 1) * width)
        normed = rms_norm_f64(context[:, part] * np.float64(factor), weight, 0.0)
        expected = (normed + tokens[:, part]) / math.sqrt(2)
        largest = np.maximum(np.abs(normed), np.abs(tokens[:, part])).max(axis=1, initial=0, keepdims=True)
        assert (np.abs(out[:, part] - expected) <= 2 * ROUNDED_ONCE * largest).all()
    reference.mix_per_layer(context, tokens, weight, factor, EPS, context)
    np.testing.assert_array_equal(context, out)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gate_per_layer(layer):
    rng = np.random.default_rng(layer)
    gate, inputs = 3 * f32(rng, 9, 6), f32(rng, 9, 4 * 6)
    out, z, up = np.empty_like(gate), gate.astype(np.float64), inputs[:, layer * 6:(layer + 1) * 6].astype(np.float64)
    reference.gate_per_layer(gate, inputs, layer, out)
    expected = z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) * up
    assert (np.abs(out - expected) <= ROUNDED_ONCE * np.abs(z * up)).all()          # of the terms: 1 + tanh cancels
