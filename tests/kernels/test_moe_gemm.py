"""Products of routed tokens with their experts, against float64 twins; the same bits in any company and any tile."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels import moe
from engine.kernels.gemm import ACTIVATIONS
from engine.kernels.moe import LINES, NARROW, WIDE, moe_gated_linear, moe_linear, plan, plan_with, tile_for
from engine.models.presets import preset
from engine.models.spec import MoeSpec
from engine.routes import Routes
from tests.kernels.closeness import BF16, assert_as_good, assert_ulps, bf16, f64
from tests.kernels.declared import least_bytes

KINDS = ["plain", "gated by token", "gated by pair"]
TILES = [*NARROW, WIDE, LINES]
# n_out, n_in: below, at and above 8 and 16, no multiple of 8, Gemma 4's 704.
SIZES = [(12, 4), (16, 12), (20, 40), (40, 72), (72, 24), (136, 100), (704, 40)]


def routes_of(experts, n_experts):
    """Routes by definition, of experts [n_tokens, k]."""
    experts = np.asarray(experts, np.int32)
    begins = np.searchsorted(np.sort(experts.reshape(-1)), np.arange(n_experts + 1)).astype(np.int32)
    return Routes(experts, np.ones(experts.shape, np.float32),
                  np.argsort(experts.reshape(-1), kind="stable").astype(np.int32), begins)


def spread(rng, n_tokens, n_experts, n_chosen):
    return routes_of([rng.permutation(n_experts)[:n_chosen] for _ in range(n_tokens)], n_experts)


def inputs(rng, kind, in_out, n_out, n_in, n_tokens, n_experts, n_chosen):
    """x and weight, host bfloat16."""
    n_rows = n_out * (1 + (kind != "plain"))
    weight = rng.standard_normal((n_experts, n_rows, n_in)) * n_in**-0.5
    n_x = n_tokens if kind == "gated by token" else n_tokens * n_chosen
    return bf16(rng.standard_normal((n_x, n_in))), bf16(weight.swapaxes(1, 2) if in_out else weight)


def call(table, kind, x, weight, routes, out, in_out, activation):
    if kind == "plain":
        table.moe_linear(x, weight, routes, out, in_out)
    else:
        table.moe_gated_linear(x, weight, routes, out, kind == "gated by pair", activation, in_out)


def n_out_of(kind, weight, in_out):
    return weight.shape[2 if in_out else 1] // (1 + (kind != "plain"))


def product(lane, kind, x, weight, routes, in_out, activation="gelu_tanh", how=None):
    """What the lane makes of host arrays; with a Plan, that launch in the place of the launcher's choice."""
    out = lane.empty((len(routes.order), n_out_of(kind, weight, in_out)), np.float32 if kind == "plain" else BF16)
    device = lane.put(x), lane.put(weight), Routes(*map(lane.put, routes)), out
    if how:
        divisor = {"plain": 0, "gated by pair": 1}.get(kind, routes.experts.shape[1])
        moe.launch(how, *device, in_out, divisor, ACTIVATIONS[activation] if kind != "plain" else 0)
    else:
        call(moe, kind, *device, in_out, activation)
    return lane.to_host(out)


def twin(kind, x, weight, routes, in_out, activation="gelu_tanh", dtype=np.float64):
    """The op by engine/reference.py in float32 or float64."""
    out = np.empty((len(routes.order), n_out_of(kind, weight, in_out)), dtype)
    call(reference, kind, x.astype(dtype), weight.astype(dtype), routes, out, in_out, activation)
    return out


def pair_by_pair(kind, x, weight, routes, in_out):
    """The same, one pair and one product at a time; and how large the terms are of which it is the sum."""
    n_out, n_chosen, x, weight = n_out_of(kind, weight, in_out), routes.experts.shape[1], f64(x), f64(weight)
    out = np.empty((len(routes.order), n_out))
    terms = np.empty(out.shape)
    for i, pair in enumerate(routes.order):
        matrix = weight[routes.experts.reshape(-1)[pair]]
        row = x[{"plain": i, "gated by token": pair // n_chosen, "gated by pair": pair}[kind]]
        y = row @ matrix if in_out else matrix @ row
        if kind == "plain":
            out[pair] = terms[pair] = y
        else:                                           # gelu_tanh is gate / 2 + gate / 2 * tanh(..)
            gate, up = y[:n_out], y[n_out:]
            out[i] = gate / 2 * (1 + np.tanh((2 / np.pi)**0.5 * (gate + 0.044715 * gate**3))) * up
            terms[i] = gate / 2 * up
    return out, terms


# Values

@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens, n_chosen", [(1, 1), (1, 3), (20, 2), (40, 1), (200, 2)])
def test_the_twin_is_one_product_a_pair(kind, in_out, n_tokens, n_chosen):
    rng = np.random.default_rng(n_tokens)
    routes = spread(rng, n_tokens, 6, n_chosen)
    x, weight = inputs(rng, kind, in_out, 12, 8, n_tokens, 6, n_chosen)
    want, _ = pair_by_pair(kind, x, weight, routes, in_out)
    np.testing.assert_allclose(twin(kind, x, weight, routes, in_out), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(twin(kind, x, weight, routes, in_out, dtype=np.float32), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_out, n_in", SIZES)
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_as_good_as_plain_bfloat16_math(lane, kind, in_out, n_out, n_in):
    """Random routing over 9 experts; one token; 1, 2 and 8 experts a token."""
    rng = np.random.default_rng([n_out, n_in])
    for n_tokens, n_chosen, activation in ((1, 8, "gelu_tanh"), (7, 2, "silu"), (33, 1, "gelu_tanh")):
        x, weight = inputs(rng, kind, in_out, n_out, n_in, n_tokens, 9, n_chosen)
        routes = spread(rng, n_tokens, 9, n_chosen)
        got = product(lane, kind, x, weight, routes, in_out, activation)
        plain = twin(kind, x, weight, routes, in_out, activation, np.float32)
        assert_as_good(f64(got), twin(kind, x, weight, routes, in_out, activation),
                       f64(plain if kind == "plain" else bf16(plain)))


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [
    np.full((40, 1), 3), np.full((40, 1), 8), np.tile([4, 0], (40, 1)), np.arange(40)[:, None] % 3 * 4],
    ids=["all to one", "all to the last", "all to two", "to 0, 4 and 8"])
def test_empty_experts_and_full_ones(lane, kind, in_out, experts):
    """Products of small integers have exact sums, so only the end of the kernel rounds."""
    (n_tokens, n_chosen), rng, n_out, n_in = experts.shape, np.random.default_rng(1), 24, 40
    x, weight = inputs(rng, kind, in_out, n_out, n_in, n_tokens, 9, n_chosen)
    x, weight, routes = bf16(np.rint(4 * f64(x))), bf16(np.rint(16 * f64(weight)) / 16), routes_of(experts, 9)
    got, (want, terms) = product(lane, kind, x, weight, routes, in_out), pair_by_pair(kind, x, weight, routes, in_out)
    if kind == "plain":
        assert (got == want).all()
    else:
        assert_ulps(got, want, terms=(terms,))


@pytest.mark.parametrize("n_experts", [1, 31, 32, 33, 100, 255, 256])
def test_any_number_of_experts(lane, n_experts):
    rng = np.random.default_rng(n_experts)
    routes = spread(rng, 40, n_experts, min(n_experts, 8))
    x, weight = inputs(rng, "plain", False, 8, 4, 40, n_experts, min(n_experts, 8))
    got = product(lane, "plain", x, weight, routes, False)
    np.testing.assert_allclose(got, pair_by_pair("plain", x, weight, routes, False)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.tokens}")
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_writes_all_of_out_from_all_of_k(lane, tile, in_out, kind):
    """Ones count what was added, at sizes around the tile's edges; experts have all but one, all, and one more row than
    a tile, and none."""
    width = tile.rows // (1 + (kind != "plain"))
    counts = [tile.tokens - 1, 0, tile.tokens, tile.tokens + 1]
    routes = routes_of(np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))[:, None], 4)
    for n_out, n_in in ((width - 4, 4), (width + 4, tile.depth + 12)):
        n_rows = n_out * (1 + (kind != "plain"))
        x, weight = np.ones((sum(counts), n_in)), np.ones((4, n_in, n_rows) if in_out else (4, n_rows, n_in))
        x, weight = bf16(x), bf16(weight)
        got = product(lane, kind, x, weight, routes, in_out, how=plan_with(tile, n_rows, 4, sum(counts)))
        assert_ulps(bf16(got), twin(kind, x, weight, routes, in_out))


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_with_its_token_and_its_expert(lane, kind, in_out):
    rng = np.random.default_rng(2)
    routes = spread(rng, 9, 4, 2)
    x, weight = inputs(rng, kind, in_out, 24, 40, 9, 4, 2)
    clean = product(lane, kind, x, weight, routes, in_out)
    of_row = {"plain": np.arange(18), "gated by pair": routes.order, "gated by token": routes.order // 2}[kind]
    x[4], weight[2] = np.nan, np.nan
    is_bad = (of_row == 4) | (routes.experts.reshape(-1)[routes.order] == 2)            # of rows by expert
    if kind == "plain":
        is_bad[routes.order] = is_bad.copy()
    dirty = product(lane, kind, x, weight, routes, in_out)
    assert np.isnan(f64(dirty[is_bad])).all() and (dirty[~is_bad] == clean[~is_bad]).all()


# Same bits

@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_has_the_same_bits_in_any_company_and_any_tile(lane, kind, in_out):
    """Alone, in batches, with other tokens at its experts, and in every tile."""
    n, n_chosen, n_out, n_in, rng = 90, 2, 72, 108, np.random.default_rng(3)
    x, weight = inputs(rng, kind, in_out, n_out, n_in, n, 5, n_chosen)
    experts = spread(rng, n, 5, n_chosen).experts

    def by_pair(tokens, how=None):
        """[tokens, choices, n_out]"""
        routes = routes_of(experts[tokens], 5)
        if kind == "gated by token":
            rows = x[tokens]
        else:
            rows = x.reshape(n, n_chosen, n_in)[tokens].reshape(-1, n_in)
            rows = rows[routes.order] if kind == "plain" else rows
        got = product(lane, kind, rows, weight, routes, in_out, how=how)
        if kind != "plain":
            got[routes.order] = got.copy()
        return got.reshape(len(tokens), n_chosen, n_out)

    whole, n_rows = by_pair(np.arange(n)), n_out * (1 + (kind != "plain"))
    for n_tokens in (1, 2, 7, 9, 33):
        tokens = rng.permutation(n)[:n_tokens]
        assert (by_pair(tokens) == whole[tokens]).all()
    for tile in TILES:
        assert (by_pair(np.arange(n), plan_with(tile, n_rows, 5, n * n_chosen)) == whole).all()


def test_a_block_that_walks_several_tiles_has_the_same_bits(lane, monkeypatch):
    rng = np.random.default_rng(4)
    x, weight = inputs(rng, "plain", False, 300, 72, 20, 6, 2)
    routes = spread(rng, 20, 6, 2)
    how = plan_with(NARROW[0], 300, 6, 40)
    each = product(lane, "plain", x, weight, routes, False, how=how)
    assert how.n_blocks > 40
    assert (product(lane, "plain", x, weight, routes, False, how=how._replace(n_blocks=3)) == each).all()


# Launches: n_rows, n_experts, experts per token, has_lines; of Gemma 4 26B-A4B, Scout and Maverick.
MODELS = [(1408, 128, 8, False), (2816, 128, 8, False), (16384, 16, 1, True), (5120, 16, 1, False),
          (16384, 128, 1, True), (5120, 128, 1, False)]


@pytest.mark.parametrize("n_rows, n_experts, n_chosen, has_lines", MODELS)
def test_decode_keeps_the_memory_busy(n_rows, n_experts, n_chosen, has_lines):
    """4.3 TB/s * 0.8 us is 3.4 MB that must be on its way at any time."""
    for n_tokens in (1, 2, 8, 16, 64):
        tile, n_blocks = plan(n_rows, n_experts, n_tokens, n_chosen, has_lines)
        in_flight = (tile.stages - 1) * tile.rows * tile.depth * 2
        assert in_flight >= 48 << 10 and n_blocks * in_flight >= 3.4e6
        assert tile.tokens >= min(n_tokens, 2 * n_tokens * n_chosen / n_experts)


def test_tiles_grow_with_the_rows_of_an_expert():
    def tokens(n_tokens, *model):
        return tile_for(n_tokens, *model).tokens
    assert [tokens(n, 8, 128, False) for n in (1, 8, 16, 64, 128, 512, 3071, 3072, 8192)] == [
        8, 8, 8, 16, 64, 64, 64, 128, 128]
    assert [tokens(n, 1, 16, False) for n in (1, 8, 32, 128, 3071, 3072)] == [8, 8, 8, 64, 64, 128]
    assert tile_for(1, 1, 16, True) is LINES and tile_for(3072, 1, 16, True) is WIDE


def test_the_grid_has_a_block_for_every_tile_or_all_that_run_at_once():
    for n_pairs, n_experts in ((1, 128), (8, 128), (64, 16), (64, 2), (500, 7)):
        for tile in TILES:
            how = plan_with(tile, 130, n_experts, n_pairs)
            row_tiles, rng = -(-130 // tile.rows), np.random.default_rng(n_pairs)
            for _ in range(20):
                counts = rng.multinomial(n_pairs, rng.dirichlet(np.ones(n_experts) * 10.0**rng.uniform(-2, 2)))
                n_tiles = row_tiles * int((-(-counts // tile.tokens)).sum())
                assert how.n_blocks >= min(n_tiles, moe.N_RESIDENT)
            assert how.n_blocks <= min(moe.N_RESIDENT, row_tiles * n_pairs)


def test_tiles_fit_the_smallest_gpu_twice_where_few_rows_wait_for_memory():
    for tile in TILES:
        assert tile.smem_bytes <= 163 << 10 and tile.n_threads <= 256
    for tile in (*NARROW[:2], LINES):
        assert 2 * (tile.smem_bytes + 4096) <= 164 << 10


def test_variants_are_the_tiles_of_a_model():
    for mlp, entry, tiles in ((MoeSpec(128, 8, 704), "moe_gemm", [8, 16, 64, 128]),
                              (MoeSpec(16, 1, 8192, in_out=True), "moe_gemm_in_out", [8, 16, 16, 64, 128])):
        spec = SimpleNamespace(layers=[SimpleNamespace(mlp=mlp)] * 2)
        builds = [build for build, _, _ in moe.variants(spec, 8192)]
        assert [build.entry for build in builds] == ["moe_pick", "moe_order", "moe_combine", *[entry] * len(tiles)]
        assert sorted(build.constants["TOKENS"] for build in builds[3:]) == tiles
    assert not list(moe.variants(preset("gemma-3-1b"), 8192))


# 64 bits

@pytest.mark.parametrize("kind, n_out, in_out", [("plain", 2064, False), ("gated by token", 1032, True)])
def test_the_last_of_more_experts_than_32_bits_count(lane, tmp_path, kind, n_out, in_out):
    """A sparse file of 8.7 GB, with numbers in its last expert alone."""
    if lane.is_checked or lane.name != "emulated":
        pytest.skip("the checker holds 4 GB; a GPU would be sent the file")
    rng, n_experts, n_in = np.random.default_rng(5), 256, 8192
    n_rows = n_out * (1 + (kind != "plain"))
    last = bf16(rng.integers(-4, 5, (n_in, n_rows) if in_out else (n_rows, n_in)) / 64)
    path = tmp_path / "experts"
    with path.open("wb") as file:
        file.truncate(last.nbytes * n_experts)
        file.seek(last.nbytes * (n_experts - 1))
        file.write(last.view(np.uint16).data)
    weight = np.asarray(np.memmap(path, np.uint16, "r", shape=(n_experts, *last.shape))).view(BF16)
    assert weight.size > 2**32
    x, routes = bf16(rng.integers(-4, 5, (1, n_in))), routes_of([[n_experts - 1]], n_experts)
    out = lane.empty((1, n_out), np.float32 if kind == "plain" else BF16)
    call(moe, kind, x, weight, routes, out, in_out, "silu")
    want = np.empty((1, n_out))
    call(reference, kind, f64(x), f64(last)[None], routes_of([[0]], 1), want, in_out, "silu")
    assert np.abs(want).max() > 1
    if kind == "plain":
        assert (out == want).all()
    else:
        assert_ulps(out, want)


# Edges

def test_no_tokens_launch_nothing(lane):
    rng = np.random.default_rng(6)
    for kind in KINDS:
        x, weight = inputs(rng, kind, False, 12, 8, 0, 4, 2)
        assert product(lane, kind, x, weight, routes_of(np.empty((0, 2)), 4), False).shape == (0, 12)


def test_what_does_not_fit_is_refused(lane):
    routes, x = Routes(*map(lane.put, routes_of([[0, 2], [1, 3], [0, 1]], 4))), lane.zeros((3, 16), BF16)
    pairs, gated, plain = lane.zeros((6, 16), BF16), lane.zeros((6, 12), BF16), lane.zeros((6, 12), np.float32)
    weight, gate_up = lane.zeros((4, 12, 16), BF16), lane.zeros((4, 24, 16), BF16)

    def act(x=x, weight=gate_up, out=gated, by_pair=False, activation="silu", in_out=False):
        moe_gated_linear(x, weight, routes, out, by_pair, activation, in_out)

    def down(x=pairs, weight=weight, out=plain, in_out=False, routes=routes):
        moe_linear(x, weight, routes, out, in_out)
    act()
    down()
    for message, bad in {
        "'relu', expected one of gelu_tanh, silu": lambda: act(activation="relu"),
        r"moe_gated_linear: x is \[3, 16\].*n_pairs=6": lambda: act(by_pair=True),
        r"weight is \[4, 24, 16\].*n_in=16, two_n_out=24": lambda: act(in_out=True),
        r"weight is \[4, 12, 16\].*two_n_out=24": lambda: act(weight=weight),
        r"out is \[6, 12\] float32": lambda: act(out=plain),
        r"moe_linear: x is \[3, 16\].*n_pairs=6": lambda: down(x=x),
        r"out is \[6, 12\] bfloat16, expected .* float32": lambda: down(out=gated),
        r"weight is \[4, 12, 16\].*expected \[n_experts, n_in=16, n_out": lambda: down(in_out=True),
        r"begins is \[5\] int32, expected \[n_experts_and_1=4\]": lambda: down(weight=lane.zeros((3, 12, 16), BF16)),
        "multiples of 4": lambda: down(lane.zeros((6, 18), BF16), lane.zeros((4, 12, 18), BF16)),
        "257 experts": lambda: down(weight=lane.zeros((257, 12, 16), BF16),
                                    routes=routes._replace(begins=lane.zeros((258,), np.int32))),
    }.items():
        with pytest.raises(ShapeError, match=message):
            bad()


# Traffic

def skip_unless_checked(lane):
    if not lane.is_checked:
        pytest.skip("traffic is counted under --check")


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_out, n_in, n_tokens, n_experts, n_chosen", [
    (128, 2816, 1, 32, 8), (128, 2048, 4, 64, 2), (64, 5120, 1, 4, 1), (64, 704, 16, 64, 4), (132, 72, 20, 6, 2)])
def test_a_launch_moves_what_its_header_says(lane, kind, in_out, n_out, n_in, n_tokens, n_experts, n_chosen):
    """Decode moves at most a tenth more than the weights of the experts in use: none has more than 8 rows there."""
    skip_unless_checked(lane)
    rng = np.random.default_rng(7)
    routes = spread(rng, n_tokens, n_experts, n_chosen)
    x, weight = inputs(rng, kind, in_out, n_out, n_in, n_tokens, n_experts, n_chosen)
    out = product(lane, kind, x, weight, routes, in_out)
    is_gated, n_pairs = kind != "plain", n_tokens * n_chosen
    n_active = len(np.unique(routes.experts))
    least = least_bytes("moe_gemm.cu", "moe_gemm_in_out" if in_out else "moe_gemm", n_in=n_in, n_active=n_active,
                        n_rows=n_out * (1 + is_gated), n_x_rows=len(x), n_out=n_out, n_pairs=n_pairs,
                        n_experts=n_experts, out_bytes=2 if is_gated else 4)
    traffic = lane.traffic()
    assert traffic.distinct_bytes == least
    ours = (cost.moe_gated_linear(x, weight, routes, out, kind == "gated by pair", "gelu_tanh", in_out) if is_gated
            else cost.moe_linear(x, weight, routes, out, in_out))
    assert ours.traffic_bytes == least and ours.flops == 2 * n_pairs * n_in * n_out * (1 + is_gated)
    assert traffic.bank_conflicts == 0 or n_out % 8
    if n_in > 100:
        assert np.diff(routes.begins).max() <= 8
        n_weight_bytes = 2 * n_active * n_out * (1 + is_gated) * n_in
        assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * n_weight_bytes


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.tokens}")
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_memory_has_no_bank_conflicts(lane, tile, in_out, kind):
    skip_unless_checked(lane)
    rng, n_in, n_tokens = np.random.default_rng(8), 2 * tile.depth, tile.tokens
    n_out = tile.rows // (1 + (kind != "plain"))
    x, weight = inputs(rng, kind, in_out, n_out, n_in, n_tokens, 2, 2)
    routes = spread(rng, n_tokens, 2, 2)
    product(lane, kind, x, weight, routes, in_out, how=plan_with(tile, tile.rows, 2, 2 * n_tokens))
    assert lane.traffic().bank_conflicts == 0
