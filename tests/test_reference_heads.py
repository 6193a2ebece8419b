"""rope_angles and qk_norm_rope_cache of engine/reference.py against their formulas written plainly in float64."""

import math

import numpy as np
import pytest

from engine import reference
from engine.models.spec import Llama3Scaling, RopeSpec
from tests.test_reference import EPS, ROUNDED_ONCE, close, f32, rms_norm_f64


def rotate_f64(x, positions, rope, head_dim):
    """Rotation of [n_tokens, heads, head_dim]: the first n_pairs of the pairs (j, j + head_dim/2), or (2j, 2j + 1)."""
    y = x.copy()
    for j in range(rope.n_pairs(head_dim)):
        angle = positions * (rope.theta ** (-2 * j / head_dim) / rope.factor)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = (2 * j, 2 * j + 1) if rope.interleaved else (j, j + head_dim // 2)
        a, b = x[..., first], x[..., second]
        y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y


def angles_of(rope, positions, head_dim, dtype=np.float32):
    out = np.empty((len(positions), 2, rope.n_pairs(head_dim)), dtype)
    reference.rope_angles(positions, rope.inv_freq(head_dim), out)
    return out


ROPES = {"full": RopeSpec(10_000.0), "linear": RopeSpec(1e6, factor=8.0), "quarter": RopeSpec(1e6, partial=0.25),
         "none": RopeSpec(1e4, partial=0.0), "interleaved": RopeSpec(1e4, interleaved=True)}


def test_llama3_scaling_of_scout():
    """Llama 4 Scout: 35 of 64 pairs keep their frequency, the others have a 16th of it, none is blended."""
    plain, scaled = (RopeSpec(5e5, factor, llama3=llama3).inv_freq(128) for factor, llama3 in
                     ((1.0, None), (16.0, Llama3Scaling(1.0, 1.0, 8192))))
    np.testing.assert_array_equal(scaled[:35], plain[:35])
    np.testing.assert_array_equal(scaled[35:], plain[35:] / 16)


def test_llama3_scaling_that_blends():
    """29 pairs untouched, 6 blended, 29 divided by 8; by the formula with wavelengths."""
    theta, factor, low, high, original = 5e5, 8.0, 1.0, 4.0, 8192
    scaled = RopeSpec(theta, factor, llama3=Llama3Scaling(low, high, original)).inv_freq(128)
    expected, n_blended = [], 0
    for j in range(64):
        inv = theta ** (-2 * j / 128)
        wavelength = 2 * math.pi / inv
        if wavelength < original / high:
            expected.append(inv)
        elif wavelength > original / low:
            expected.append(inv / factor)
        else:
            share = (original / wavelength - low) / (high - low)
            expected.append((1 - share) * inv / factor + share * inv)
            n_blended += 1
    assert n_blended == 6
    np.testing.assert_allclose(scaled, expected, rtol=1.2e-7)


def test_rope_angles_are_of_the_rounded_product():
    """In float64 too: what a kernel is compared with has the kernel's angle."""
    positions, inv_freq = np.array([0, 1, 77777], np.int32), np.array([1.0, 0.1, 1e-5], np.float32)
    out = np.empty((3, 2, 3))
    reference.rope_angles(positions, inv_freq, out)
    angle = np.array([[np.float32(p) * f for f in inv_freq] for p in positions], np.float32).astype(np.float64)
    np.testing.assert_array_equal(out, np.stack([np.cos(angle), np.sin(angle)], axis=1))


@pytest.mark.parametrize("head_dim", [4, 12, 72])
def test_two_columns_of_positions_turn_like_axial_rope(head_dim):
    """Axial RoPE turns the first half of a head by the column and the second by the row, each in pairs of its own
    halves. With the dims reordered, [2 axes, 2 halves, n] to [2 halves, 2 axes, n], that is the usual rotation by
    angles of two columns. Source: HF modeling_gemma4, apply_multidimensional_rope."""
    rng, n = np.random.default_rng(head_dim), head_dim // 4
    x, positions = rng.standard_normal((5, 3, head_dim)), rng.integers(0, 90, (5, 2)).astype(np.int32)
    inv_freq = (100.0 ** (-2 * np.arange(n) / (head_dim // 2))).astype(np.float32)
    want = np.empty_like(x)
    for axis in range(2):
        angle = (positions[:, axis, None].astype(np.float32) * inv_freq).astype(np.float64)[:, None]
        cos, sin, at = np.cos(angle), np.sin(angle), axis * head_dim // 2
        a, b = x[..., at:at + n], x[..., at + n:at + 2 * n]
        want[..., at:at + n], want[..., at + n:at + 2 * n] = a * cos - b * sin, b * cos + a * sin
    order = np.arange(head_dim).reshape(2, 2, n).transpose(1, 0, 2).ravel()
    angles, out = np.empty((5, 2, 2 * n)), np.empty((5, 3 * head_dim))
    reference.rope_angles(positions, np.tile(inv_freq, 2), angles)
    reference.qk_norm_rope_cache(x[..., order].reshape(5, -1), None, None, angles, None, None, None, n_heads=3,
                                 v_norm=False, v_is_k=False, eps=1e-6, weight_offset=0.0, qk_norm=None, out=out)
    np.testing.assert_allclose(out.reshape(x.shape), want[..., order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(1, 1, 2), (4, 2, 16), (6, 1, 24), (3, 3, 6)])
@pytest.mark.parametrize("v", ["projected", "normed", "is k"])
def test_qk_norm_rope_cache(rope, n_heads, n_kv_heads, head_dim, v):
    """q comes out normed and rotated; k and v land in their slots, v unrotated and without k's weight. A token with
    slot -1 leaves nothing there, and qkv keeps its values."""
    rope, offset = ROPES[rope], 1.0 if v == "projected" else 0.0
    rng = np.random.default_rng([n_heads, head_dim])
    n_tokens, page_size = 37, 4
    positions = rng.integers(0, 500, n_tokens).astype(np.int32)
    slots = rng.permutation(12 * page_size)[:n_tokens].astype(np.int32)
    slots[[0, 5, 36]] = -1
    n_in = n_heads + n_kv_heads * (1 if v == "is k" else 2)
    qkv, q_norm, k_norm = f32(rng, n_tokens, n_in * head_dim), f32(rng, head_dim), f32(rng, head_dim)
    heads = qkv.reshape(n_tokens, n_in, head_dim).astype(np.float64)
    k_pages, v_pages = (np.full((12, page_size, n_kv_heads, head_dim), np.nan, np.float32) for _ in range(2))
    before, q_out = qkv.copy(), np.empty((n_tokens, n_heads * head_dim), np.float32)
    reference.qk_norm_rope_cache(qkv, q_norm, k_norm, angles_of(rope, positions, head_dim), slots, k_pages, v_pages,
                                 n_heads=n_heads, v_norm=v != "projected", v_is_k=v == "is k", eps=EPS,
                                 weight_offset=offset, interleaved=rope.interleaved, out=q_out)
    np.testing.assert_array_equal(qkv, before)
    q, k = heads[:, :n_heads], heads[:, n_heads:n_heads + n_kv_heads]
    v = k if v == "is k" else heads[:, n_heads + n_kv_heads:]
    v = v if offset else rms_norm_f64(v, None, 0.0)
    def rotated(x, weight):
        return rotate_f64(rms_norm_f64(x, weight, offset), positions.astype(np.float64), rope, head_dim)
    most = 1e-4                                 # position · frequency is rounded to float32, at up to 500 radians
    close(q_out.reshape(q.shape), rotated(q, q_norm), most)
    kept = slots >= 0
    close(k_pages.reshape(-1, n_kv_heads, head_dim)[slots[kept]], rotated(k, k_norm)[kept], most)
    close(v_pages.reshape(-1, n_kv_heads, head_dim)[slots[kept]], v[kept], ROUNDED_ONCE)
    untouched = np.setdiff1d(np.arange(12 * page_size), slots)
    assert np.isnan(k_pages.reshape(-1, n_kv_heads, head_dim)[untouched]).all()
    assert np.isnan(v_pages.reshape(-1, n_kv_heads, head_dim)[untouched]).all()


def test_heads_without_norm_weights():
    """None multiplies by nothing, as a weight of ones does."""
    rng = np.random.default_rng(9)
    qkv, angles = f32(rng, 3, 4 * 8), angles_of(RopeSpec(100.0), np.arange(3, dtype=np.int32), 8)
    results = []
    for weight in (None, np.ones(8, np.float32)):
        pages, out = np.zeros((2, 1, 3, 1, 8), np.float32), np.empty((3, 16), np.float32)
        reference.qk_norm_rope_cache(qkv, weight, weight, angles, np.arange(3, dtype=np.int32), *pages, n_heads=2,
                                     v_norm=False, v_is_k=False, eps=EPS, weight_offset=0.0, out=out)
        results.append((out, pages))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rotation_keeps_relative_positions():
    """q · k depends on the distance alone, and no rotation happens at position 0."""
    rng = np.random.default_rng(7)
    q, k = f32(rng, 1, 16), f32(rng, 1, 16)
    def product(at_q, at_k):
        qkv = np.concatenate([q, k, k], axis=1)
        k_pages, v_pages = np.zeros((2, 1, 1, 1, 16), np.float32)
        rotated_k = []
        for position in (at_q, at_k):
            angles, out = angles_of(RopeSpec(100.0), np.array([position], np.int32), 16), np.empty((1, 16), np.float32)
            reference.qk_norm_rope_cache(
                qkv, np.ones(16, np.float32), np.ones(16, np.float32), angles, np.array([0], np.int32), k_pages,
                v_pages, n_heads=1, v_norm=False, v_is_k=False, eps=EPS, weight_offset=0.0, out=out)
            rotated_k.append((out[0], k_pages[0, 0, 0].copy()))
        return rotated_k[0][0] @ rotated_k[1][1]
    assert product(5, 3) == pytest.approx(product(9, 7), abs=1e-5) == pytest.approx(product(2, 0), abs=1e-5)
    assert abs(product(5, 3) - product(5, 5)) > 1e-2


# Scout's layers with positions and without, Maverick's with, and what no model has
FORMS = [("plain", "interleaved", False), (None, None, True), (None, "interleaved", False), (None, None, False),
         ("plain", None, False), ("weighted", None, True), ("weighted", "quarter", True)]


@pytest.mark.parametrize("qk_norm, rope, has_temperature", FORMS)
def test_heads_normed_and_rotated_or_not(qk_norm, rope, has_temperature):
    """In the order of the words: norm and weights, rotation, plain norm, temperature of q alone. K and V of each form
    go to their pages, and q alone is as q beside them."""
    rng = np.random.default_rng(7)
    n_tokens, n_heads, head_dim = 37, 3, 16
    rotation, positions = ROPES[rope or "none"], rng.integers(0, 500, n_tokens).astype(np.int32)
    qkv, q_norm, k_norm = f32(rng, n_tokens, 5 * head_dim), f32(rng, head_dim), f32(rng, head_dim)
    temperature = rng.uniform(1, 2, n_tokens).astype(np.float32) if has_temperature else None
    angles = angles_of(rotation, positions, head_dim) if rope else None
    slots = rng.permutation(40)[:n_tokens].astype(np.int32)
    pages, q_out = np.empty((2, 10, 4, 1, head_dim), np.float32), np.empty((n_tokens, 48), np.float32)
    options = {"n_heads": n_heads, "v_norm": False, "v_is_k": False, "eps": EPS, "weight_offset": 1.0,
               "interleaved": rotation.interleaved, "qk_norm": qk_norm, "temperature": temperature}
    reference.qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, *pages, **options, out=q_out)

    def expected(x, weight, factor):
        if qk_norm == "weighted":
            x = rms_norm_f64(x, weight, 1.0)
        if rope:
            x = rotate_f64(x, positions.astype(np.float64), rotation, head_dim)
        if qk_norm == "plain":
            x = rms_norm_f64(x, None, 0.0)
        return x if factor is None else x * factor[:, None, None]
    heads = qkv.reshape(n_tokens, 5, head_dim).astype(np.float64)
    most = 1e-4 if rope else 2 * ROUNDED_ONCE
    close(q_out.reshape(n_tokens, n_heads, head_dim), expected(heads[:, :3], q_norm, temperature), most)
    k_slots, v_slots = pages.reshape(2, 40, 1, head_dim)[:, slots]
    close(k_slots, expected(heads[:, 3:4], k_norm, None), most)
    np.testing.assert_array_equal(v_slots, heads[:, 4:].astype(np.float32))
    alone = np.empty_like(q_out)
    reference.qk_norm_rope_cache(np.ascontiguousarray(qkv[:, :48]), q_norm, None, angles, None, None, None, **options,
                                 out=alone)
    np.testing.assert_array_equal(alone, q_out)


def test_a_plain_norm_may_go_before_the_rotation():
    """Where kernels have it: a rotation keeps the mean of squares."""
    rng, positions = np.random.default_rng(8), np.arange(37, dtype=np.int32)
    qkv, angles = rng.standard_normal((37, 3 * 16)), angles_of(ROPES["interleaved"], positions, 16, np.float64)
    results = []
    for qk_norm in ("plain", "weighted"):
        pages, out = np.empty((2, 37, 1, 1, 16)), np.empty((37, 16))
        reference.qk_norm_rope_cache(qkv, None, None, angles, positions, *pages, n_heads=1, v_norm=False, v_is_k=False,
                                     eps=EPS, weight_offset=0.0, interleaved=True, qk_norm=qk_norm, out=out)
        results.append(np.stack([out, pages[0].reshape(37, 16)]))
    close(*results, 1e-14)
