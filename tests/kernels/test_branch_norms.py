"""add_norms and router_norm, the norms of a layer with two branches, against their twins in float64."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.rmsnorm import add_norms, rms_norm, router_norm
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

EPS = 1e-6
HIDDEN = [4, 12, 20, 24, 72, 640, 2052, 2816, 16384]       # tails of every kind; Gemma 4 26B; the widest


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


def same_bits(got, want):
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


# --- add_norms

def run_add_norms(lane, a, a_weight, b, b_weight, offset=0.0, into=None):
    arrays = [lane.put(x) for x in (a, a_weight, b, b_weight)]
    out = lane.empty(a.shape, BF16) if into is None else arrays[into]
    add_norms(*arrays, EPS, offset, out)
    return lane.to_host(out)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_norms_rounds_once(lane, hidden, offset):
    rng = np.random.default_rng(hidden)
    arrays = normals(rng, 5, hidden), normals(rng, hidden), bf16(100 * rng.standard_normal((5, hidden))), \
        normals(rng, hidden)
    want, (a, b) = np.empty((5, hidden)), np.empty((2, 5, hidden))
    reference.add_norms(*map(f64, arrays), EPS, offset, want)
    for x, weight, out in ((*arrays[:2], a), (*arrays[2:], b)):
        reference.rms_norm(f64(x), f64(weight), EPS, offset, out)
    assert_ulps(run_add_norms(lane, *arrays, offset), want, terms=(a, b))


@pytest.mark.parametrize("hidden", [24, 2816])
def test_add_norms_has_the_same_bits_in_any_batch_and_place(lane, hidden):
    rng = np.random.default_rng(hidden)
    a, b, a_weight, b_weight = normals(rng, 7, hidden), normals(rng, 7, hidden), *normals(rng, 2, hidden)
    together = run_add_norms(lane, a, a_weight, b, b_weight)
    for i in range(7):
        same_bits(run_add_norms(lane, a[i:i + 1], a_weight, b[i:i + 1], b_weight)[0], together[i])
    for into in (0, 2):
        same_bits(run_add_norms(lane, a, a_weight, b, b_weight, into=into), together)


@pytest.mark.parametrize("changed", [{"b": (3, 16)}, {"a_weight": (20,)}, {"b_weight": (1, 16)}])
def test_add_norms_refuses_what_does_not_fit(lane, changed):
    assert run_add_norms(lane, *(np.zeros(s, BF16) for s in ((0, 16), 16, (0, 16), 16))).shape == (0, 16)
    shapes = {"a": (2, 16), "a_weight": (16,), "b": (2, 16), "b_weight": (16,), **changed}
    with pytest.raises(ShapeError, match=rf"^add_norms: {next(iter(changed))} is"):
        run_add_norms(lane, *(np.zeros(shape, BF16) for shape in shapes.values()))


def test_add_norms_moves_the_least(lane):
    rng = np.random.default_rng(1)
    arrays = normals(rng, 20, 2816), normals(rng, 2816), normals(rng, 20, 2816), normals(rng, 2816)
    out = run_add_norms(lane, *arrays)
    assert_least_traffic(lane.traffic(), least_bytes("rmsnorm.cu", "add_norms", n_rows=20, hidden=2816),
                         cost.add_norms(*arrays, EPS, 0.0, out))


# --- router_norm

def run_router_norm(lane, x, scale, factor, in_place=False):
    there = lane.put(x)
    out = there if in_place else lane.empty(x.shape, BF16)
    router_norm(there, lane.put(scale), factor, EPS, out)
    return lane.to_host(out)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_router_norm_rounds_three_times(lane, hidden):
    """Bit for bit what three steps in bfloat16 make. Of the twin, which does not round, the first two are off by an ulp
    each at most (2^-8 of a value), the third by half an ulp."""
    rng = np.random.default_rng(hidden)
    x, scale, factor = normals(rng, 5, hidden), normals(rng, hidden), np.float32(hidden**-0.5)
    got, normed, want = run_router_norm(lane, x, scale, factor), lane.empty(x.shape, BF16), np.empty(x.shape)
    rms_norm(lane.put(x), None, EPS, 0.0, normed)
    scaled = bf16(f64(lane.to_host(normed)) * f64(scale))
    same_bits(got, bf16(scaled.astype(np.float32) * factor))
    reference.router_norm(f64(x), f64(scale), float(factor), EPS, want)
    assert_ulps(got, want, 2.51)


@pytest.mark.parametrize("hidden", [24, 2816])
def test_router_norm_has_the_same_bits_in_any_batch_and_place(lane, hidden):
    rng = np.random.default_rng(hidden)
    x, scale = normals(rng, 7, hidden), normals(rng, hidden)
    together = run_router_norm(lane, x, scale, 0.02)
    for i in range(7):
        same_bits(run_router_norm(lane, x[i:i + 1], scale, 0.02)[0], together[i])
    same_bits(run_router_norm(lane, x, scale, 0.02, in_place=True), together)


def test_router_norm_refuses_what_does_not_fit(lane):
    assert run_router_norm(lane, np.zeros((0, 16), BF16), np.zeros(16, BF16), 1.0).shape == (0, 16)
    with pytest.raises(ShapeError, match=r"router_norm: scale is \[20\] bfloat16, expected \[hidden=16\]"):
        run_router_norm(lane, np.zeros((2, 16), BF16), np.zeros(20, BF16), 1.0)
    with pytest.raises(ShapeError, match="router_norm: hidden is 6, expected a multiple of 4 up to 16384"):
        run_router_norm(lane, np.zeros((2, 6), BF16), np.zeros(6, BF16), 1.0)


def test_router_norm_moves_the_least(lane):
    rng = np.random.default_rng(2)
    x, scale = normals(rng, 20, 2816), normals(rng, 2816)
    out = run_router_norm(lane, x, scale, 0.02)
    assert_least_traffic(lane.traffic(), least_bytes("rmsnorm.cu", "router_norm", n_rows=20, hidden=2816),
                         cost.router_norm(x, scale, 0.02, EPS, out))
