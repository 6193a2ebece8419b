"""rms_norm and add_norm against their twins in float64."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.rmsnorm import add_norm, geometry, rms_norm
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

EPS = 1e-6
# Tails of every kind, Gemma 3 270M, 1B and 27B, and the widest; 2052 and 16380 have 8-byte accesses.
HIDDEN = [4, 12, 16, 20, 24, 40, 48, 72, 640, 1152, 2052, 5376, 16380, 16384]


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


def run_rms_norm(lane, x, weight, offset=0.0, eps=EPS):
    out = lane.empty(x.shape, BF16)
    rms_norm(lane.put(x), None if weight is None else lane.put(weight), eps, offset, out)
    return lane.to_host(out)


def twin_rms_norm(x, weight, offset=0.0, eps=EPS):
    out = np.empty(x.shape)
    reference.rms_norm(f64(x), None if weight is None else f64(weight), eps, offset, out)
    return out


# --- rms_norm

@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("offset", [0.0, 1.0, None])
def test_rms_norm_rounds_once(lane, n_rows, hidden, offset):
    rng = np.random.default_rng([n_rows, hidden])
    x, weight = normals(rng, n_rows, hidden), None if offset is None else normals(rng, hidden)
    assert_ulps(run_rms_norm(lane, x, weight, offset or 0.0), twin_rms_norm(x, weight, offset or 0.0))


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e15])
def test_rms_norm_of_small_and_large_rows(lane, size):
    """eps decides where the row is small, and squares of large values do not overflow."""
    x = bf16(size * np.random.default_rng(1).standard_normal((2, 640)))
    assert_ulps(run_rms_norm(lane, x, None), twin_rms_norm(x, None))


def test_rms_norm_of_zeros(lane):
    assert (run_rms_norm(lane, np.zeros((1, 48), BF16), None) == 0).all()


@pytest.mark.parametrize("hidden", [24, 1152, 5376])
def test_a_row_has_the_same_bits_in_any_batch(lane, hidden):
    """Alone, in any place, beside rows of NaN."""
    rng = np.random.default_rng(hidden)
    x, weight = normals(rng, 9, hidden), normals(rng, hidden)
    x[4] = np.nan
    together = run_rms_norm(lane, x, weight)
    assert np.isnan(f64(together[4])).all()
    for i in (0, 3, 5, 8):
        alone = run_rms_norm(lane, x[i:i + 1], weight)
        np.testing.assert_array_equal(alone[0].view(np.uint16), together[i].view(np.uint16))
    backwards = run_rms_norm(lane, x[::-1], weight)[::-1]
    np.testing.assert_array_equal(backwards.view(np.uint16), together.view(np.uint16))


@pytest.mark.parametrize("hidden", [16, 288])
def test_many_rows(lane, hidden):
    x = normals(np.random.default_rng(hidden), 1000, hidden)
    assert_ulps(run_rms_norm(lane, x, None), twin_rms_norm(x, None))


def test_rms_norm_in_place(lane):
    rng = np.random.default_rng(2)
    x, weight = normals(rng, 5, 72), normals(rng, 72)
    expected, there = run_rms_norm(lane, x, weight), lane.put(x)
    rms_norm(there, lane.put(weight), EPS, 0.0, there)
    np.testing.assert_array_equal(lane.to_host(there), expected)


def test_no_rows(lane):
    assert run_rms_norm(lane, np.zeros((0, 72), BF16), None).shape == (0, 72)


@pytest.mark.parametrize("x, weight, message", [
    (np.zeros((2, 16), np.float32), None, r"x is \[2, 16\] float32, expected \[n_rows, hidden\] bfloat16"),
    (np.zeros(16, BF16), None, r"x is \[16\] bfloat16, expected \[n_rows, hidden\]"),
    (np.zeros((2, 16), BF16), np.zeros(24, BF16), r"weight is \[24\] bfloat16, expected \[hidden=16\] bfloat16"),
    (np.zeros((2, 6), BF16), None, "hidden is 6, expected a multiple of 4 up to 16384"),
    (np.zeros((2, 16388), BF16), None, "hidden is 16388"),
    (np.zeros((2, 0), BF16), None, "hidden is 0"),
])
def test_what_does_not_fit_is_refused(lane, x, weight, message):
    with pytest.raises(ShapeError, match=message):
        run_rms_norm(lane, x, weight)


def test_strides_are_refused(lane):
    x = lane.zeros((4, 32), BF16)[:, ::2]
    with pytest.raises(ShapeError, match="C-contiguous"):
        rms_norm(x, None, EPS, 0.0, lane.empty((4, 16), BF16))


def test_blocks_cover_every_row():
    for hidden in range(4, 16385, 4):
        width, chunks, n_threads = geometry(hidden)
        assert hidden % width == 0 and width * chunks * n_threads >= hidden and n_threads % 32 == 0
        assert width * chunks * (n_threads - 32) < hidden
        assert n_threads <= (256 if width * chunks == 8 else -(-16384 // (width * chunks * 32)) * 32)


@pytest.mark.parametrize("hidden", [1152, 2052, 5376])
@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm_moves_the_least(lane, hidden, has_weight):
    rng = np.random.default_rng(3)
    x, weight = normals(rng, 20, hidden), normals(rng, hidden) if has_weight else None
    run_rms_norm(lane, x, weight)
    least = least_bytes("rmsnorm.cu", "rms_norm", n_rows=20, hidden=hidden, has_weight=has_weight)
    assert_least_traffic(lane.traffic(), least, cost.rms_norm(x, weight, EPS, 0.0, x))


# --- add_norm

def run_add_norm(lane, residual, branch, post, following, offset=0.0, scalar=None, in_branch=False):
    there, added = lane.put(residual), lane.put(branch)
    out = added if in_branch else lane.empty(residual.shape, BF16)
    post, following, scalar = (None if x is None else lane.put(x) for x in (post, following, scalar))
    add_norm(there, added, post, following, EPS, offset, scalar, out)
    return lane.to_host(there), lane.to_host(out)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("offset, scalar, has_post", [(0.0, None, True), (1.0, None, True), (0.0, 0.07, True),
                                                      (0.0, None, False), (0.0, 1.5, False)])
def test_add_norm_norms_what_it_stores(lane, hidden, offset, scalar, has_post):
    """The residual is rounded once; the next norm is of the rounded one."""
    rng = np.random.default_rng(hidden)
    residual, branch, following = normals(rng, 3, hidden), normals(rng, 3, hidden), normals(rng, hidden)
    post, scalar = normals(rng, hidden) if has_post else None, None if scalar is None else bf16([scalar])
    stream, out = run_add_norm(lane, residual, branch, post, following, offset, scalar)
    added = twin_rms_norm(branch, post, offset) if has_post else f64(branch)
    factor = 1.0 if scalar is None else f64(scalar)
    assert_ulps(stream, (f64(residual) + added) * factor, terms=(f64(residual) * factor, added * factor))
    assert_ulps(out, twin_rms_norm(stream, following, offset))


def test_add_norm_is_its_twin(lane):
    rng = np.random.default_rng(4)
    arrays = [normals(rng, 6, 40), normals(rng, 6, 40), normals(rng, 40), normals(rng, 40)]
    stream, out = run_add_norm(lane, *arrays, 1.0, bf16([0.5]))
    residual, branch, post, following = map(f64, arrays)
    twin_out = np.empty(residual.shape)
    reference.add_norm(residual, branch, post, following, EPS, 1.0, np.array([0.5]), twin_out)
    assert_ulps(stream, residual, terms=(4 * np.ones(residual.shape),))
    np.testing.assert_allclose(f64(out), twin_out, rtol=0.02, atol=0.02)        # of a residual that was not rounded


@pytest.mark.parametrize("hidden", [24, 2052, 5376])
def test_add_norm_has_the_same_bits_in_any_batch(lane, hidden):
    rng = np.random.default_rng(hidden)
    residual, branch = normals(rng, 7, hidden), normals(rng, 7, hidden)
    post, following = normals(rng, hidden), normals(rng, hidden)
    together = run_add_norm(lane, residual, branch, post, following)
    for i in range(7):
        alone = run_add_norm(lane, residual[i:i + 1], branch[i:i + 1], post, following)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0].view(np.uint16), b[i].view(np.uint16))


def test_add_norm_into_the_branch(lane):
    rng = np.random.default_rng(5)
    arrays = normals(rng, 5, 72), normals(rng, 5, 72), normals(rng, 72), normals(rng, 72)
    for a, b in zip(run_add_norm(lane, *arrays), run_add_norm(lane, *arrays, in_branch=True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_add_norm_of_no_rows(lane):
    run_add_norm(lane, *np.zeros((2, 0, 16), BF16), None, np.zeros(16, BF16))


@pytest.mark.parametrize("changed", [{"branch": (3, 16)}, {"post": (20,)}, {"following": (1, 16)}, {"scalar": (2,)}])
def test_add_norm_refuses_what_does_not_fit(lane, changed):
    shapes = {"residual": (2, 16), "branch": (2, 16), "post": (16,), "following": (16,), "scalar": (1,), **changed}
    residual, branch, post, following, scalar = (np.zeros(shape, BF16) for shape in shapes.values())
    with pytest.raises(ShapeError, match=r"^add_norm: "):
        run_add_norm(lane, residual, branch, post, following, 0.0, scalar)


@pytest.mark.parametrize("hidden", [1152, 5376])
@pytest.mark.parametrize("has_post, has_scalar", [(True, True), (False, False)])
def test_add_norm_moves_the_least(lane, hidden, has_post, has_scalar):
    rng = np.random.default_rng(6)
    x, weight = normals(rng, 20, hidden), normals(rng, hidden)
    post, scalar = weight if has_post else None, bf16([2]) if has_scalar else None
    run_add_norm(lane, x, x, post, weight, 0.0, scalar)
    least = least_bytes("rmsnorm.cu", "add_norm", n_rows=20, hidden=hidden, has_post_weight=has_post,
                        has_layer_scalar=has_scalar)
    assert_least_traffic(lane.traffic(), least, cost.add_norm(x, x, post, weight, EPS, 0.0, scalar, x))


@pytest.mark.parametrize("hidden", [20, 40, 2052, 5376])
@pytest.mark.parametrize("scalar, has_post", [(None, True), (0.07, True), (1.5, False)])
def test_add_norm_without_a_next_norm(lane, hidden, scalar, has_post):
    """The residual has the bits it has with one, and the branch keeps its own."""
    rng = np.random.default_rng(hidden)
    residual, branch, weight = normals(rng, 3, hidden), normals(rng, 3, hidden), normals(rng, hidden)
    post, scalar = weight if has_post else None, None if scalar is None else bf16([scalar])
    expected, _ = run_add_norm(lane, residual, branch, post, weight, 0.0, scalar)
    there, added = lane.put(residual), lane.put(branch)
    post, scalar = (None if x is None else lane.put(x) for x in (post, scalar))
    add_norm(there, added, post, None, EPS, 0.0, scalar, None)
    np.testing.assert_array_equal(lane.to_host(there).view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(lane.to_host(added).view(np.uint16), branch.view(np.uint16))


def test_a_next_norm_has_somewhere_to_go(lane):
    x, weight = lane.zeros((2, 16), BF16), lane.zeros((16,), BF16)
    for following, out in ((weight, None), (None, x)):
        with pytest.raises(ShapeError, match="add_norm: next_weight and out come together"):
            add_norm(x, lane.zeros((2, 16), BF16), None, following, EPS, 0.0, None, out)


@pytest.mark.parametrize("has_post, has_scalar", [(True, True), (False, False)])
def test_adding_a_residual_moves_the_least(lane, has_post, has_scalar):
    rng = np.random.default_rng(7)
    x, weight = normals(rng, 20, 5376), normals(rng, 5376)
    post, scalar = weight if has_post else None, bf16([2]) if has_scalar else None
    add_norm(lane.put(x), lane.put(x), *(None if a is None else lane.put(a) for a in (post, None)), EPS, 0.0,
             None if scalar is None else lane.put(scalar), None)
    least = least_bytes("rmsnorm.cu", "add_residual", n_rows=20, hidden=5376, has_post_weight=has_post,
                        has_layer_scalar=has_scalar)
    assert_least_traffic(lane.traffic(), least, cost.add_norm(x, x, post, None, EPS, 0.0, scalar, None))


# --- rounding before the weight, as Llama 4 does

@pytest.mark.parametrize("hidden", [20, 640, 5120])
def test_rms_norm_that_rounds_before_the_weight(lane, hidden):
    """Bit for bit: the norm without a weight, then a product of two bfloat16, which fits float32. The first rounding is
    off by at most 2^-8 of a value, an ulp of the result, the second by half an ulp."""
    rng = np.random.default_rng(hidden)
    x, weight, out = normals(rng, 5, hidden), normals(rng, hidden), lane.empty((5, hidden), BF16)
    rms_norm(lane.put(x), lane.put(weight), EPS, 0.0, out, round_first=True)
    normed = run_rms_norm(lane, x, None)
    np.testing.assert_array_equal(lane.to_host(out).view(np.uint16), bf16(f64(normed) * f64(weight)).view(np.uint16))
    once = run_rms_norm(lane, x, weight)
    assert (once.view(np.uint16) != lane.to_host(out).view(np.uint16)).mean() > 0.05    # it is another function
    assert_ulps(lane.to_host(out), twin_rms_norm(x, weight), 1.51)


@pytest.mark.parametrize("hidden", [20, 640, 5120])
def test_add_norm_that_rounds_before_the_weight(lane, hidden):
    rng = np.random.default_rng(hidden)
    residual, branch, weight = normals(rng, 3, hidden), normals(rng, 3, hidden), normals(rng, hidden)
    there, out = lane.put(residual), lane.empty((3, hidden), BF16)
    add_norm(there, lane.put(branch), None, lane.put(weight), EPS, 0.0, None, out, round_first=True)
    stream = lane.to_host(there)
    np.testing.assert_array_equal(stream.view(np.uint16), bf16(f64(residual) + f64(branch)).view(np.uint16))
    want = bf16(f64(run_rms_norm(lane, stream, None)) * f64(weight))
    np.testing.assert_array_equal(lane.to_host(out).view(np.uint16), want.view(np.uint16))
