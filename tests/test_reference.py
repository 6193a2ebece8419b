"""engine/reference.py, op by op, against the formula written plainly in float64.

The goldens hold all ops together on one geometry each; here each op meets odd sizes, scattered pages and the edges of
its blocks alone.
"""

import math

import numpy as np
import pytest

from engine import reference
from engine.batch import PagedBatch
from engine.kv_cache import PageList
from engine.models.spec import RopeSpec

EPS = 1e-6
ROUNDED_ONCE = 5e-7             # of the largest value: a few float32 roundings of 6e-8
SUMMED = 4e-6                   # sums of up to a few hundred products


def f32(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def close(got, expected, most):
    """Within `most` of the largest |expected| of the same row (last axis)."""
    assert got.dtype == np.float32 and got.shape == expected.shape
    error = np.abs(got - expected) / np.abs(expected).max(axis=-1, keepdims=True).clip(1e-30)
    assert error.max(initial=0) <= most, f"off by {error.max():.1e} of the row's largest value, {most:.0e} allowed"


def rms_norm_f64(x, weight, offset):
    x = x.astype(np.float64)
    normed = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    return normed if weight is None else normed * (weight.astype(np.float64) + offset)


# --- norms, embedding, products

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


@pytest.mark.parametrize("scalar", [None, 0.25])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_norm(scalar, offset):
    rng = np.random.default_rng(4)
    residual, branch, post, following = f32(rng, 37, 24), f32(rng, 37, 24), f32(rng, 24), f32(rng, 24)
    after = residual + rms_norm_f64(branch, post, offset)
    after *= 1 if scalar is None else scalar
    out = np.empty_like(residual)
    reference.add_norm(residual, branch, post, following, EPS, offset,
                       None if scalar is None else np.array([scalar], np.float32), out)
    close(residual, after, ROUNDED_ONCE)
    close(out, rms_norm_f64(after, following, offset), 2 * ROUNDED_ONCE)


def test_embed_scales_rows():
    rng = np.random.default_rng(5)
    table, ids = f32(rng, 11, 6), np.array([10, 0, 3, 3], np.int32)
    out = np.empty((4, 6), np.float32)
    reference.embed(table, ids, 6**0.5, out)
    close(out, table[ids].astype(np.float64) * 6**0.5, ROUNDED_ONCE)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 4, 5, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("n_in, n_out", [(1, 1), (24, 40), (129, 7), (300, 1000)])
def test_linear_whatever_the_number_of_rows(n_tokens, n_in, n_out, monkeypatch):
    """Also where the weights do not fit the block of one go, and where `out` is the front of a larger buffer."""
    rng = np.random.default_rng([n_tokens, n_in])
    x, weight = f32(rng, n_tokens, n_in), f32(rng, n_out, n_in)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    monkeypatch.setattr(reference, "CACHED_FLOATS", 1000)
    out = np.full(n_tokens * n_out + 5, np.nan, np.float32)
    rows = out[:n_tokens * n_out].reshape(n_tokens, n_out)
    reference.linear(x, weight, rows)
    if n_tokens:
        assert np.abs(rows - expected).max() <= SUMMED * np.abs(expected).max()
    assert np.isnan(out[n_tokens * n_out:]).all()


# --- activations

def test_gelu_is_the_tanh_approximation():
    """gelu_tanh(1) = 0.841192, where the exact one, with erf, has 0.841345."""
    values = {1.0: 0.841192, -1.0: -0.158808, 0.0: 0.0, 3.0: 2.996363, -10.0: 0.0, 10.0: 10.0}
    gate_up = np.array([[z, 2.0] for z in values], np.float32)
    out = np.empty((len(values), 1), np.float32)
    reference.gated_gelu(gate_up, out)
    np.testing.assert_allclose(out[:, 0], [2 * y for y in values.values()], atol=2e-6)


@pytest.mark.parametrize("n_tokens", [1, 16, 33, 70])
def test_gated_gelu(n_tokens):
    rng = np.random.default_rng(n_tokens)
    gate_up = 3 * f32(rng, n_tokens, 2 * 9)
    out = np.empty((n_tokens, 9), np.float32)
    before = gate_up.copy()
    reference.gated_gelu(gate_up, out)
    z, up = before[:, :9].astype(np.float64), before[:, 9:].astype(np.float64)
    expected = z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) * up
    assert (np.abs(out - expected) <= ROUNDED_ONCE * np.abs(z * up)).all()      # of the terms: 1 + tanh cancels
    np.testing.assert_array_equal(gate_up, before)


def test_logit_softcap():
    rng = np.random.default_rng(6)
    logits = 40 * f32(rng, 3, 50)
    expected = 30.0 * np.tanh(logits.astype(np.float64) / 30.0)
    reference.logit_softcap(logits, 30.0)
    close(logits, expected, ROUNDED_ONCE)
    assert np.abs(logits).max() <= 30


# --- q, k and v: norms, rotation, pages

def rotate_f64(x, positions, rope, head_dim):
    """Split-half rotation of [n_tokens, heads, head_dim]: pairs (j, j + head_dim/2), the first n_pairs of them."""
    y = x.copy()
    for j in range(rope.n_pairs(head_dim)):
        angle = positions * (rope.theta ** (-2 * j / head_dim) / rope.factor)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., j], x[..., j + head_dim // 2]
        y[..., j], y[..., j + head_dim // 2] = a * cos - b * sin, b * cos + a * sin
    return y


ROPES = {"full": RopeSpec(10_000.0), "linear": RopeSpec(1e6, factor=8.0), "quarter": RopeSpec(1e6, partial=0.25),
         "none": RopeSpec(1e4, partial=0.0)}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(1, 1, 2), (4, 2, 16), (6, 1, 24), (3, 3, 6)])
@pytest.mark.parametrize("v", ["projected", "normed", "is k"])
def test_qk_norm_rope_cache(rope, n_heads, n_kv_heads, head_dim, v):
    """q comes back normed and rotated; k and v land in their slots, v unrotated and without k's weight."""
    rope, offset = ROPES[rope], 1.0 if v == "projected" else 0.0
    rng = np.random.default_rng([n_heads, head_dim])
    n_tokens, page_size = 37, 4
    positions = rng.integers(0, 500, n_tokens).astype(np.int32)
    slots = rng.permutation(12 * page_size)[:n_tokens].astype(np.int32)
    n_in = n_heads + n_kv_heads * (1 if v == "is k" else 2)
    qkv, q_norm, k_norm = f32(rng, n_tokens, n_in * head_dim), f32(rng, head_dim), f32(rng, head_dim)
    heads = qkv.reshape(n_tokens, n_in, head_dim).astype(np.float64)
    k_pages, v_pages = (np.full((12, page_size, n_kv_heads, head_dim), np.nan, np.float32) for _ in range(2))
    angles = reference.rope_angles(positions, rope.inv_freq(head_dim))
    got = reference.qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, k_pages, v_pages, n_heads=n_heads,
                                       v_norm=v != "projected", v_is_k=v == "is k", eps=EPS, weight_offset=offset)
    q, k = heads[:, :n_heads], heads[:, n_heads:n_heads + n_kv_heads]
    v = k if v == "is k" else heads[:, n_heads + n_kv_heads:]
    v = v if offset else rms_norm_f64(v, None, 0.0)
    def rotated(x, weight):
        return rotate_f64(rms_norm_f64(x, weight, offset), positions.astype(np.float64), rope, head_dim)
    most = 1e-4                                 # position · frequency is rounded to float32, at up to 500 radians
    close(got, rotated(q, q_norm), most)
    close(k_pages.reshape(-1, n_kv_heads, head_dim)[slots], rotated(k, k_norm), most)
    close(v_pages.reshape(-1, n_kv_heads, head_dim)[slots], v, ROUNDED_ONCE)
    untouched = np.setdiff1d(np.arange(12 * page_size), slots)
    assert np.isnan(k_pages.reshape(-1, n_kv_heads, head_dim)[untouched]).all()
    assert np.isnan(v_pages.reshape(-1, n_kv_heads, head_dim)[untouched]).all()


def test_rotation_keeps_relative_positions():
    """q · k depends on the distance alone, and no rotation happens at position 0."""
    rng = np.random.default_rng(7)
    q, k = f32(rng, 1, 16), f32(rng, 1, 16)
    def product(at_q, at_k):
        qkv = np.concatenate([q, k, k], axis=1)
        k_pages, v_pages = np.zeros((2, 1, 1, 1, 16), np.float32)
        rotated_k = []
        for position in (at_q, at_k):
            angles = reference.rope_angles(np.array([position], np.int32), RopeSpec(100.0).inv_freq(16))
            out = reference.qk_norm_rope_cache(
                qkv.copy(), np.ones(16, np.float32), np.ones(16, np.float32), angles, np.array([0], np.int32), k_pages,
                v_pages, n_heads=1, v_norm=False, v_is_k=False, eps=EPS, weight_offset=0.0)
            rotated_k.append((out[0, 0].copy(), k_pages[0, 0, 0].copy()))
        return rotated_k[0][0] @ rotated_k[1][1]
    assert product(5, 3) == pytest.approx(product(9, 7), abs=1e-5) == pytest.approx(product(2, 0), abs=1e-5)
    assert abs(product(5, 3) - product(5, 5)) > 1e-2


# --- attention

def attention_f64(q, k, v, n_before, scale, window):
    """Of the last positions of one sequence; q [n, n_heads, head_dim], k and v [n_before + n, n_kv_heads, head_dim]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.empty(q.shape)
    for i in range(len(q)):
        end = n_before + i + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(q.shape[1]):
            scores = k[begin:end, head // group] @ q[i, head] * scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v[begin:end, head // group] / weights.sum()
    return out.reshape(len(q), -1)


def run_attention(rng, rows, n_heads, n_kv_heads, head_dim, page_size, window, order="scattered", spread=1.0):
    """rows [(positions cached before, new ones)]; returns (out, expected). Pages hold NaN where no position lies, and
    those that a sliding pool would have freed are not there."""
    kept_from = [0 if window is None else max(0, n_before - 1 - window) // page_size for n_before, _ in rows]
    n_pages = [-(-(n_before + n) // page_size) - first for (n_before, n), first in zip(rows, kept_from, strict=True)]
    ids = np.arange(sum(n_pages) + 3)
    ids = {"scattered": rng.permutation(ids), "one run": ids, "backwards": ids[::-1]}[order].tolist()
    k_pages, v_pages = (np.full((len(ids), page_size, n_kv_heads, head_dim), np.nan, np.float32) for _ in range(2))
    scale, lists, slots, flat_rows, qs, expected = head_dim**-0.5, [], [], [], [], []
    for (n_before, n), first, n_held in zip(rows, kept_from, n_pages, strict=True):
        pages, ids = ids[:n_held], ids[n_held:]
        q, k, v = (f32(rng, size, heads, head_dim) for size, heads in
                   ((n, n_heads), (n_before + n, n_kv_heads), (n_before + n, n_kv_heads)))
        q *= spread
        for position in range(first * page_size, n_before + n):
            at = pages[position // page_size - first], position % page_size
            k_pages[at], v_pages[at] = k[position], v[position]
        lists.append(PageList(pages, first))
        slots += [pages[p // page_size - first] * page_size + p % page_size for p in range(n_before, n_before + n)]
        flat_rows.append((sum(map(len, qs)), sum(map(len, qs)) + n, n_before + n))
        qs.append(q)
        expected.append(attention_f64(q, k, v, n_before, scale, window))
    q = np.concatenate(qs)
    out = np.full((len(q), n_heads * head_dim), np.nan, np.float32)
    paged = PagedBatch(lists, np.array(slots, np.int32), flat_rows, page_size)
    reference.attention(q, k_pages, v_pages, paged, scale=scale, window=window, out=out)
    return out, np.concatenate(expected)


RAGGED = [(0, 1), (0, 5), (7, 1), (20, 1), (3, 9), (31, 2), (0, 1)]


@pytest.mark.parametrize("order", ["scattered", "one run", "backwards"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 17, 1000])
def test_attention_of_a_ragged_batch(window, page_size, order):
    """Prefill, chunks and decodes side by side; windows below a page, across pages, above every prompt."""
    rng = np.random.default_rng([page_size, window or 0])
    out, expected = run_attention(rng, RAGGED, 4, 2, 10, page_size, window, order)
    close(out, expected, SUMMED)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (2, 1), (3, 1), (8, 1), (8, 2), (8, 4), (8, 8), (5, 5)])
@pytest.mark.parametrize("head_dim", [1, 2, 7, 33])
def test_attention_heads(n_heads, n_kv_heads, head_dim):
    """Query head h reads KV head h // group, for groups of 1 to 8 and odd head sizes."""
    rng = np.random.default_rng([n_heads, n_kv_heads, head_dim])
    out, expected = run_attention(rng, RAGGED[2:5], n_heads, n_kv_heads, head_dim, 4, 6)
    close(out, expected, SUMMED)


@pytest.mark.parametrize("window", [None, 3, 40, 300])
@pytest.mark.parametrize("n_before, n", [(0, 200), (50, 129), (0, 64), (0, 65), (1, 63), (130, 1), (300, 2)])
def test_attention_over_several_query_blocks(n_before, n, window):
    rng = np.random.default_rng([n_before, n])
    out, expected = run_attention(rng, [(0, 3), (n_before, n)], 2, 1, 6, 16, window)
    close(out, expected, SUMMED)


def test_attention_of_sharp_scores():
    """Scores of several hundred neither overflow nor lose the largest."""
    rng = np.random.default_rng(8)
    out, expected = run_attention(rng, RAGGED, 4, 2, 16, 4, None, spread=200.0)
    assert np.isfinite(out).all()
    close(out, expected, 1e-4)
