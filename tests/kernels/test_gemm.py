"""Dense matrix products against their float64 twins; the same bits whatever the number of tokens and the tile."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels import gemm
from engine.kernels.gemm import ACTIVATIONS, NARROW, WIDE, gated_linear, linear, plan, plan_with, scratch_size, splits
from engine.models.presets import PRESETS, preset
from engine.workspace import Scratch
from tests.kernels.closeness import BF16, assert_as_good, assert_ulps, bf16, f64
from tests.kernels.declared import least_bytes

KINDS = ["plain", "residual", "float32", *ACTIVATIONS]
TILES = [*((tile, "split") for tile in NARROW), (WIDE, "walk"), (NARROW[1], "walk")]
ODD = [(12, 4), (16, 12), (20, 16), (24, 20), (40, 72), (48, 40), (72, 24), (136, 100)]         # n_out, n_in
SPLIT_IN = 3084                 # three splits; no multiple of 8


def scratch_of(lane, size):
    """NaN floats, so that a sum which nobody left is seen, and zero counters."""
    return Scratch(lane.empty(size[0], np.float32), lane.zeros(size[1], np.int32))


def weights(kind, n_out, n_in, rng):
    return bf16(rng.standard_normal((n_out * (1 + (kind in ACTIVATIONS)), n_in)) * n_in**-0.5)


def product(lane, kind, x, weight, residual=None, how=None):
    """What the lane makes of host arrays; with a Plan, that launch in the place of the launcher's choice."""
    n_tokens, n_in = x.shape
    n_out = len(weight) // (1 + (kind in ACTIVATIONS))
    out = lane.empty((n_tokens, n_out), np.float32 if kind == "float32" else BF16)
    scratch = scratch_of(lane, how.scratch_size if how else scratch_size(len(weight), n_in, n_tokens))
    device = lane.put(x), lane.put(weight), out, scratch
    residual = lane.put(residual) if kind == "residual" else None
    if how:
        gemm.launch(how, *device, residual=residual, activation=ACTIVATIONS.get(kind, 0))
    elif kind in ACTIVATIONS:
        gated_linear(*device, activation=kind)
    else:
        linear(*device, residual=residual)
    assert not lane.to_host(scratch.counters).any()
    return lane.to_host(out)


def twin(kind, x, weight, residual, dtype):
    """The op by engine/reference.py in float32 or float64."""
    x, weight = x.astype(dtype), weight.astype(dtype)
    out = np.empty((len(x), len(weight) // (1 + (kind in ACTIVATIONS))), dtype)
    if kind in ACTIVATIONS:
        reference.gated_linear(x, weight, out, activation=kind)
    else:
        reference.linear(x, weight, out, residual=residual.astype(dtype) if kind == "residual" else None)
    return out


# Values

@pytest.mark.parametrize("n_out, n_in", [*ODD, (1152, 1024), (256, 1152), (24, 6912)])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_as_good_as_plain_bfloat16_math(lane, kind, n_out, n_in):
    rng = np.random.default_rng([n_out, n_in])
    weight = weights(kind, n_out, n_in, rng)
    for n_tokens in (1, 7, 33) if n_out < 200 else (9,):
        x, residual = bf16(rng.standard_normal((n_tokens, n_in))), bf16(rng.standard_normal((n_tokens, n_out)))
        got = product(lane, kind, x, weight, residual)
        plain = twin(kind, x, weight, residual, np.float32)
        plain = plain if kind == "float32" else bf16(plain)
        assert_as_good(f64(got), twin(kind, x, weight, residual, np.float64), f64(plain))


@pytest.mark.parametrize("n_out, n_in", [(24, 20), (72, 40), (20, SPLIT_IN)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_rounded_once(lane, kind, n_out, n_in):
    """Products of small integers have exact sums, so only the end of the kernel rounds."""
    rng = np.random.default_rng(n_in)
    x = bf16(rng.integers(-4, 5, (19, n_in)))
    weight = bf16(rng.integers(-4, 5, (n_out * (1 + (kind in ACTIVATIONS)), n_in)) / 2**(4 + 3 * (n_in > 1000)))
    residual = bf16(rng.standard_normal((19, n_out)) * 20)
    got, want = product(lane, kind, x, weight, residual), twin(kind, x, weight, residual, np.float64)
    if kind == "float32":
        assert (got == want).all()
    elif kind in ACTIVATIONS:
        gate, up = f64(x) @ f64(weight[:n_out]).T, f64(x) @ f64(weight[n_out:]).T
        assert_ulps(got, want, terms=(gate / 2 * up,))          # gelu_tanh is gate / 2 + gate / 2 * tanh(..)
    else:
        assert_ulps(got, want, most=0.5)


@pytest.mark.parametrize("tile, walks", TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_writes_all_of_out_from_all_of_k(lane, tile, walks, kind):
    """Ones count what was added, at sizes around the tile's edges."""
    width = tile.rows // (1 + (kind in ACTIVATIONS))
    for n_out, n_tokens, n_in in ((width - 4, tile.tokens - 1, 4), (width + 4, tile.tokens + 1, tile.depth + 12)):
        x, weight = bf16(np.ones((n_tokens, n_in))), bf16(np.ones((n_out * (1 + (kind in ACTIVATIONS)), n_in)))
        residual = bf16(np.zeros((n_tokens, n_out)))
        got = product(lane, kind, x, weight, residual, plan_with(tile, walks, len(weight), n_in, n_tokens))
        assert_ulps(bf16(got), twin(kind, x, weight, residual, np.float64))


def test_a_row_of_nan_stays_in_its_row(lane):
    rng = np.random.default_rng(0)
    x, weight = bf16(rng.standard_normal((9, 40))), bf16(rng.standard_normal((24, 40)))
    clean = product(lane, "plain", x, weight)
    x[4] = np.nan
    dirty = product(lane, "plain", x, weight)
    assert np.isnan(dirty[4]).all() and (np.delete(dirty, 4, 0) == np.delete(clean, 4, 0)).all()


# Same bits

@pytest.mark.parametrize("n_in", [72, 4 * SPLIT_IN // 6, SPLIT_IN])         # one, two and three splits
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place(lane, kind, n_in):
    n_out, rng = 136, np.random.default_rng(n_in)
    x, residual = bf16(rng.standard_normal((200, n_in))), bf16(rng.standard_normal((200, n_out)))
    weight = weights(kind, n_out, n_in, rng)
    whole = product(lane, kind, x, weight, residual)
    for n_tokens in (1, 2, 7, 8, 9, 16, 33, 64, 65):
        rows = rng.permutation(200)[:n_tokens]
        assert (product(lane, kind, x[rows], weight, residual[rows]) == whole[rows]).all()


@pytest.mark.parametrize("n_in", [100, SPLIT_IN])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_has_the_same_bits(lane, kind, n_in):
    n_out, rng = 72, np.random.default_rng(n_in)
    x, residual = bf16(rng.standard_normal((37, n_in))), bf16(rng.standard_normal((37, n_out)))
    weight = weights(kind, n_out, n_in, rng)
    first, *others = (product(lane, kind, x, weight, residual, plan_with(tile, walks, len(weight), n_in, 37))
                      for tile, walks in TILES)
    for other in others:
        assert (other == first).all()


def test_a_block_that_walks_several_tiles_has_the_same_bits(lane, monkeypatch):
    rng = np.random.default_rng(1)
    x, weight = bf16(rng.standard_normal((20, 2 * SPLIT_IN // 3))), bf16(rng.standard_normal((300, 2 * SPLIT_IN // 3)))
    how = plan_with(NARROW[0], "walk", 300, x.shape[1], 20)
    each = product(lane, "plain", x, weight, how=how)
    monkeypatch.setattr(gemm, "N_RESIDENT", 4)
    assert how.n_blocks == 4 < how.n_tiles
    assert (product(lane, "plain", x, weight, how=how) == each).all()


def test_residual_may_be_out(lane):
    rng = np.random.default_rng(2)
    x, weight, residual = (bf16(rng.standard_normal(shape)) for shape in ((9, 40), (24, 40), (9, 24)))
    want = product(lane, "residual", x, weight, residual)
    out = lane.put(residual)
    linear(lane.put(x), lane.put(weight), out, None, residual=out)
    assert (lane.to_host(out) == want).all()


# Launches

SPECS = [preset(name) for name in PRESETS]
SHAPES = sorted({shape for spec in SPECS for shape in gemm.shapes(spec)} | set(ODD) | {(24, SPLIT_IN)}
                | {shape for spec in SPECS if spec.media for shape in gemm.tower_shapes(spec.media.tower, spec.hidden)})


def test_splits_cover_k_and_follow_the_weight_alone():
    for n_rows, n_in in SHAPES:
        n_splits, length = splits(n_rows, n_in)
        assert length % 64 == 0 and (n_splits - 1) * length < n_in <= n_splits * length
        assert n_splits == 1 or length >= gemm.MIN_SPLIT
        for n_tokens in (1, 33, 64, 65, 300, 2048):
            assert plan(n_rows, n_in, n_tokens)[1:3] == (n_splits, length)


@pytest.mark.parametrize("n_rows, n_in, n_splits, least", [
    (43008, 5376, 1, 3.4e6), (5376, 21504, 3, 3.4e6), (16384, 5376, 1, 3.4e6), (5376, 8192, 3, 3.4e6),
    (262144, 5376, 1, 3.4e6), (13824, 1152, 1, 3.4e6), (262144, 1152, 1, 3.4e6), (1152, 6912, 6, 2.6e6)])
def test_decode_at_preset_shapes_keeps_the_memory_busy(n_rows, n_in, n_splits, least):
    """4.3 TB/s * 0.8 us is 3.4 MB that must be on its way at any time; the 1B's down projection has 54 blocks above 16
    tokens."""
    assert splits(n_rows, n_in)[0] == n_splits
    for n_tokens in (1, 8, 16, 32, 64):
        how = plan(n_rows, n_in, n_tokens)
        in_flight = (how.tile.stages - 1) * how.tile.rows * how.tile.depth * 2
        assert in_flight >= 48 << 10 and how.n_blocks * in_flight >= least and how.tile.tokens >= n_tokens


def test_prefill_takes_the_wide_tile_where_it_fills_the_gpu():
    for n_rows, n_in in SHAPES:
        for n_tokens in (65, 128, 512, 2048, 8192):
            how = plan(n_rows, n_in, n_tokens)
            assert (how.tile is WIDE) or -(-n_rows // 128) * -(-n_tokens // 128) < 132
    assert plan(43008, 5376, 2048) == (WIDE, 1, 5376, 1, 336 * 16)
    assert plan(5376, 21504, 2048).n_blocks == gemm.N_RESIDENT


def test_tiles_fit_the_smallest_gpu():
    for tile in (*NARROW, WIDE):
        assert tile.smem_bytes <= 163 << 10 and tile.n_threads <= 256


def test_scratch_holds_every_plan():
    for n_rows, n_in in SHAPES:
        floats, counters = scratch_size(n_rows, n_in, 700)
        assert floats <= gemm.MOST_PARTIALS
        for n_tokens in range(1, 701):
            used = plan(n_rows, n_in, n_tokens).scratch_size
            assert used[0] <= floats and used[1] <= counters


def test_variants_are_the_tiles_of_a_model():
    variants = list(gemm.variants(preset("gemma-3-1b"), 2048))
    assert [build.constants["TOKENS"] for build, _, _ in variants] == [8, 16, 32, 64, 128]
    assert len(list(gemm.variants(preset("gemma-3-1b"), 8))) == 1


def test_no_tokens_launch_nothing(lane):
    for kind in KINDS:
        assert product(lane, kind, bf16(np.empty((0, 8))), weights(kind, 12, 8, np.random.default_rng(0)),
                       bf16(np.empty((0, 12)))).shape == (0, 12)


def test_what_does_not_fit_is_refused(lane):
    x, weight, out = (lane.zeros(shape, BF16) for shape in ((3, 16), (24, 16), (3, 24)))
    for message, call in {
        r"weight is \[24, 12\]": lambda: linear(x, lane.zeros((24, 12), BF16), out, None),
        r"out is \[3, 20\]": lambda: linear(x, weight, lane.zeros((3, 20), BF16), None),
        r"x is \[3, 16\] float32": lambda: linear(lane.zeros((3, 16), np.float32), weight, out, None),
        r"out is \[3, 24\] float32": lambda: linear(x, weight, lane.zeros((3, 24), np.float32), None, residual=out),
        r"out is \[3, 12\] float32": lambda: gated_linear(x, weight, lane.zeros((3, 12), np.float32), None),
        r"weight is \[24, 16\].*two_n_out=48": lambda: gated_linear(x, weight, out, None),
        "'relu'": lambda: gated_linear(x, weight, lane.zeros((3, 12), BF16), None, "relu"),
        "multiples of 4": lambda: linear(lane.zeros((3, 6), BF16), lane.zeros((24, 6), BF16), out, None),
        "strides": lambda: linear(lane.zeros((3, 32), BF16)[:, ::2], weight, out, None),
        "scratch is None, expected at least": lambda: linear(lane.zeros((3, SPLIT_IN), BF16),
                                                             lane.zeros((24, SPLIT_IN), BF16), out, None),
        "scratch is .5, 0., expected": lambda: linear(lane.zeros((3, SPLIT_IN), BF16), lane.zeros((24, SPLIT_IN), BF16),
                                                      out, Scratch(lane.zeros(5, np.float32), lane.zeros(0, np.int32))),
    }.items():
        with pytest.raises(ShapeError, match=message):
            call()


# Traffic

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_out, n_in, n_tokens", [(128, 5376, 1), (128, 5376, 4), (128, 21504, 1), (256, 1152, 8),
                                                   (132, 72, 20), (40, 68, 9), (40, SPLIT_IN, 70)])
def test_a_launch_moves_what_its_header_says(lane, kind, n_out, n_in, n_tokens):
    rng = np.random.default_rng(0)
    x, residual = bf16(rng.standard_normal((n_tokens, n_in))), bf16(rng.standard_normal((n_tokens, n_out)))
    weight = weights(kind, n_out, n_in, rng)
    for how in (plan(len(weight), n_in, n_tokens), plan_with(WIDE, "walk", len(weight), n_in, n_tokens)):
        out = product(lane, kind, x, weight, residual, how)
        n_partials, n_counters = how.scratch_size
        least = least_bytes("gemm.cu", "gemm", n_in=n_in, n_rows=len(weight), n_tokens=n_tokens, n_out=n_out,
                            out_bytes=4 if kind == "float32" else 2, residual_bytes=2 * (kind == "residual"),
                            n_partials=n_partials, n_counters=n_counters)
        traffic = lane.traffic()
        assert traffic.distinct_bytes == least
        if how == plan(len(weight), n_in, n_tokens):    # the launcher's choice
            extra = {"residual": residual} if kind == "residual" else {}
            op = cost.gated_linear if kind in ACTIVATIONS else cost.linear
            assert op(x, weight, out, None, **extra).traffic_bytes == least
        if how.tile.tokens == 8 and n_in > 1000:        # bound by memory
            assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * least


@pytest.mark.parametrize("tile, walks", TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_shared_memory_has_no_bank_conflicts(lane, tile, walks, kind):
    rng, n_in = np.random.default_rng(0), 2 * tile.depth
    n_out, n_tokens = tile.rows // (1 + (kind in ACTIVATIONS)), tile.tokens
    x, residual = bf16(rng.standard_normal((n_tokens, n_in))), bf16(rng.standard_normal((n_tokens, n_out)))
    weight = weights(kind, n_out, n_in, rng)
    product(lane, kind, x, weight, residual, plan_with(tile, walks, tile.rows, n_in, n_tokens))
    assert lane.traffic().bank_conflicts == 0
