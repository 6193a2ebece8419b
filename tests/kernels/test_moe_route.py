"""Routing: which experts, by which weights, in which order; and the sum of what comes back."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ConfigError, ShapeError
from engine.kernels import ops
from engine.kernels.moe import (
    MOST_CHOSEN,
    MOST_EXPERTS,
    PICK,
    PICK_THREADS,
    PICK_TOKENS,
    moe_combine,
    moe_route,
)
from engine.models import describe
from engine.routes import Routes
from loaders.config import Config
from tests import tiny
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

SIZES = [(1, 1), (4, 2), (16, 1), (33, 8), (128, 8), (256, 16)]                     # experts, of a token


def routed(lane, logits, scale, routing, n_chosen):
    routes = Routes.empty(len(logits), n_chosen, logits.shape[1], lane.empty)
    moe_route(lane.put(logits), None if scale is None else lane.put(scale), routing, routes)
    return Routes(*map(lane.to_host, routes))


def twin(logits, scale, routing, n_chosen):
    """By engine/reference.py, in float64."""
    routes = Routes.empty(len(logits), n_chosen, logits.shape[1], np.empty)._replace(
        weights=np.empty((len(logits), n_chosen)))
    with np.errstate(invalid="ignore"):
        reference.moe_route(f64(logits), None if scale is None else f64(scale), routing, routes)
    return routes


def by_hand(logits, n_chosen):
    """Experts, order and begins as their docstring says, in plain Python."""
    scores = np.where(np.isnan(f64(logits)), -np.inf, f64(logits)).tolist()
    experts = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:n_chosen] for row in scores]
    pairs = [expert for row in experts for expert in row]
    order = sorted(range(len(pairs)), key=lambda pair: (pairs[pair], pair))
    begins = [sum(expert < e for expert in pairs) for e in range(logits.shape[1] + 1)]
    return np.array(experts).reshape(len(logits), n_chosen), np.array(order), np.array(begins)


def assert_routes(routes, logits, n_chosen):
    for got, want in zip((routes.experts, routes.order, routes.begins), by_hand(logits, n_chosen), strict=True):
        np.testing.assert_array_equal(got, want)


# Which experts

@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n_experts, n_chosen", SIZES)
@pytest.mark.parametrize("n_tokens", [1, 7, 33])
def test_every_lane_takes_the_same_experts_in_the_same_order(lane, n_tokens, n_experts, n_chosen, routing):
    logits = bf16(np.random.default_rng([n_tokens, n_experts]).standard_normal((n_tokens, n_experts)))
    assert_routes(routed(lane, logits, None, routing, n_chosen), logits, n_chosen)
    assert_routes(twin(logits, None, routing, n_chosen), logits, n_chosen)


@pytest.mark.parametrize("n_experts, n_chosen", SIZES)
def test_of_equal_logits_the_lowest_number_goes_first(lane, n_experts, n_chosen):
    """Few values, both zeros among them; all equal; what softmax in float32 could not tell apart."""
    rng = np.random.default_rng(n_experts)
    few = bf16(rng.choice([-1.0, -0.0, 0.0, 2.0], (20, n_experts)))
    tiny = bf16(np.concatenate([[40.0], rng.permutation(n_experts - 1) * 1e-12])[None])
    for logits in (few, bf16(np.zeros((3, n_experts))), tiny):
        assert_routes(routed(lane, logits, None, "softmax", n_chosen), logits, n_chosen)
        assert_routes(twin(logits, None, "softmax", n_chosen), logits, n_chosen)


def test_what_is_no_number_goes_last_and_stays_in_its_row(lane):
    """A row of NaN takes the first experts, with weights that nothing plausible comes of."""
    logits = bf16(np.random.default_rng(0).standard_normal((4, 9)))
    logits[1, :7] = np.nan
    logits[2], logits[3, ::2] = np.nan, -np.inf
    got, want = routed(lane, logits, None, "softmax", 3), twin(logits, None, "softmax", 3)
    assert_routes(got, logits, 3)
    assert_routes(want, logits, 3)
    assert np.isnan(got.weights[2]).all() and np.isnan(want.weights[2]).all()
    rows = [0, 1, 3]
    np.testing.assert_allclose(got.weights[rows], want.weights[rows], rtol=1e-6)
    assert got.weights[1, 2] == 0


@pytest.mark.parametrize("n_tokens, n_chosen", [(1, 8), (40, 2), (131, 8), (700, 1), (300, 8)])
def test_order_is_stable_for_any_number_of_pairs(lane, n_tokens, n_chosen):
    """Up to several rounds of all warps; experts that nobody takes, and one that everybody takes."""
    rng = np.random.default_rng(n_tokens)
    logits = rng.standard_normal((n_tokens, 17))
    logits[:, 5:9] -= 100
    logits[:, 12] += 100
    logits = bf16(logits)
    routes = routed(lane, logits, None, "softmax", n_chosen)
    assert_routes(routes, logits, n_chosen)
    assert (np.diff(routes.begins)[5:9] == 0).all() and np.diff(routes.begins)[12] == n_tokens


# Weights

@pytest.mark.parametrize("n_experts, n_chosen", SIZES)
@pytest.mark.parametrize("has_scale", [False, True])
def test_softmax_weights_are_renormalised_and_scaled(lane, n_experts, n_chosen, has_scale):
    rng = np.random.default_rng([n_experts, has_scale])
    logits = bf16(rng.standard_normal((21, n_experts)) * 6)
    scale = bf16(rng.uniform(0.5, 2, n_experts)) if has_scale else None
    got = routed(lane, logits, scale, "softmax", n_chosen)
    share = np.exp(f64(logits) - f64(logits).max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)                       # over all experts, as the model has it
    want = np.take_along_axis(share, got.experts.astype(np.int64), axis=1)
    want /= want.sum(axis=1, keepdims=True)
    if has_scale:
        want *= f64(scale)[got.experts]
    np.testing.assert_allclose(twin(logits, scale, "softmax", n_chosen).weights, want, rtol=1e-12)
    # e^x is 2 ulp off, of which there are two, and 40 * 2^-24 for an exponent of up to 40; sums and quotients 4 more.
    np.testing.assert_allclose(got.weights, want, rtol=50 * 2.0**-24)


@pytest.mark.parametrize("n_experts, n_chosen", SIZES)
def test_sigmoid_weights_are_rounded_to_bfloat16(lane, n_experts, n_chosen):
    logits = bf16(np.random.default_rng(n_experts).standard_normal((21, n_experts)) * 6)
    got, want = (way(logits, None, "sigmoid", n_chosen)
                 for way in (lambda *a: routed(lane, *a), twin))
    scores = np.take_along_axis(f64(logits), got.experts.astype(np.int64), axis=1)
    np.testing.assert_allclose(want.weights, 1 / (1 + np.exp(-scores)), rtol=1e-12)
    assert (got.weights == bf16(got.weights)).all()
    assert_ulps(bf16(got.weights), want.weights)


# The sum

@pytest.mark.parametrize("n_chosen", [1, 2, 8, 16])
@pytest.mark.parametrize("n_tokens, hidden", [(1, 2816), (5, 12), (33, 520)])
@pytest.mark.parametrize("has_weights", [False, True])
def test_combine_rounds_once(lane, n_tokens, hidden, n_chosen, has_weights):
    rng = np.random.default_rng([n_tokens, n_chosen])
    y = rng.standard_normal((n_tokens * n_chosen, hidden)).astype(np.float32)
    weights = rng.uniform(0, 1, (n_tokens, n_chosen)).astype(np.float32) if has_weights else None
    out, want = lane.empty((n_tokens, hidden), BF16), np.empty((n_tokens, hidden))
    moe_combine(lane.put(y), lane.put(weights) if has_weights else None, out)
    reference.moe_combine(f64(y), f64(weights) if has_weights else None, want)
    each = y.reshape(n_tokens, n_chosen, hidden) * (weights[..., None] if has_weights else np.float32(1))
    assert_ulps(lane.to_host(out), want, terms=(np.abs(f64(each)).sum(axis=1) / 8,))
    np.testing.assert_allclose(want, f64(each).sum(axis=1), rtol=1e-5, atol=1e-5)


def test_a_token_has_the_same_bits_in_any_batch(lane):
    rng = np.random.default_rng(3)
    logits, y = bf16(rng.standard_normal((50, 40))), rng.standard_normal((400, 24)).astype(np.float32)
    scale = bf16(rng.uniform(0.5, 2, 40))
    whole = routed(lane, logits, scale, "softmax", 8)
    out = lane.empty((50, 24), BF16)
    moe_combine(lane.put(y), lane.put(whole.weights), out)
    rows = rng.permutation(50)[:9]
    part = routed(lane, logits[rows], scale, "softmax", 8)
    assert (part.weights == whole.weights[rows]).all() and (part.experts == whole.experts[rows]).all()
    few = lane.empty((9, 24), BF16)
    moe_combine(lane.put(y.reshape(50, 8, 24)[rows].reshape(72, 24)), lane.put(part.weights), few)
    assert (lane.to_host(few) == lane.to_host(out)[rows]).all()


# Edges

def test_no_tokens_have_no_pairs(lane):
    routes = routed(lane, bf16(np.empty((0, 5))), None, "softmax", 2)
    assert (routes.begins == 0).all() and routes.experts.shape == (0, 2)
    out = lane.empty((0, 8), BF16)
    moe_combine(lane.empty((0, 8), np.float32), lane.empty((0, 2), np.float32), out)
    for way in (routed, lambda lane, *a: twin(*a)):
        assert (way(lane, bf16(np.empty((0, 5))), None, "sigmoid", 1).begins == 0).all()
    reference.moe_combine(np.empty((0, 8)), np.empty((0, 2)), np.empty((0, 8)))


def test_what_does_not_fit_is_refused(lane):
    def call(n_experts, n_chosen, scale=None, routing="softmax", **other):
        routes = Routes.empty(3, n_chosen, n_experts, lane.zeros)._replace(**other)
        moe_route(lane.zeros((3, n_experts), BF16), scale, routing, routes)
    y, out = lane.zeros((6, 8), np.float32), lane.zeros((3, 8), BF16)
    for message, bad in {
        "'topk' with": lambda: call(8, 2, routing="topk"),
        "'sigmoid' with per_expert_scale": lambda: call(8, 2, lane.zeros((8,), BF16), "sigmoid"),
        r"per_expert_scale is \[7\]": lambda: call(8, 2, lane.zeros((7,), BF16)),
        f"{MOST_EXPERTS + 1} experts, expected at most": lambda: call(MOST_EXPERTS + 1, 2),
        f"17 of 32 experts a token, expected 1..{MOST_CHOSEN}": lambda: call(32, 17),
        "3 of 2 experts a token": lambda: call(2, 3),
        r"begins is \[8\]": lambda: call(8, 2, begins=lane.zeros((8,), np.int32)),
        r"weights is \[3, 3\]": lambda: call(8, 2, weights=lane.zeros((3, 3), np.float32)),
        "y has 6 rows, expected 3 tokens times 1": lambda: moe_combine(y, lane.zeros((3, 1), np.float32), out),
        "y has 6 rows, expected 4 tokens times a whole": lambda: moe_combine(y, None, lane.zeros((4, 8), BF16)),
        "rows are 6 long": lambda: moe_combine(lane.zeros((6, 6), np.float32), None, lane.zeros((3, 6), BF16)),
    }.items():
        with pytest.raises(ShapeError, match=message):
            bad()


@pytest.mark.parametrize("fields", [{"num_experts": 264}, {"num_experts": 32, "top_k_experts": 20}])
def test_models_with_more_experts_are_refused_by_name(fields):
    spec = describe(Config(tiny.flat("gemma4-moe", **fields)))
    with pytest.raises(ConfigError, match=r"experts a token: the kernels take up to 16 of 256; device='cpu' takes any"):
        ops.check(spec)


# Traffic

@pytest.mark.parametrize("n_tokens, n_experts, n_chosen", [(1, 128, 8), (16, 16, 1), (64, 128, 8)])
def test_launches_move_what_their_headers_say(lane, n_tokens, n_experts, n_chosen):
    rng = np.random.default_rng(n_tokens)
    logits, scale = bf16(rng.standard_normal((n_tokens, n_experts))), bf16(np.ones(n_experts))
    routes, n_pairs = routed(lane, logits, scale, "softmax", n_chosen), n_tokens * n_chosen
    order = least_bytes("moe_route.cu", "moe_order", n_pairs=n_pairs, n_experts=n_experts)
    assert lane.traffic().distinct_bytes == order and lane.traffic().bank_conflicts == 0

    experts, weights = lane.empty(routes.experts.shape, np.int32), lane.empty(routes.weights.shape, np.float32)
    PICK().launch((-(-n_tokens // PICK_TOKENS),), (PICK_THREADS,),
                  (logits, scale, experts, weights, n_tokens, n_experts, n_chosen, False))
    sizes = {"n_tokens": n_tokens, "n_experts": n_experts, "n_chosen": n_chosen}
    pick = least_bytes("moe_route.cu", "moe_pick", **sizes, n_scales=len(np.unique(routes.experts)))
    assert lane.traffic().distinct_bytes == pick and lane.traffic().bank_conflicts == 0
    most = least_bytes("moe_route.cu", "moe_pick", **sizes, n_scales=min(n_experts, n_pairs))
    assert cost.moe_route(logits, scale, "softmax", routes).traffic_bytes == most + order

    y, out = np.ones((n_pairs, 2816), np.float32), lane.empty((n_tokens, 2816), BF16)
    moe_combine(y, routes.weights, out)
    combine = least_bytes("moe_route.cu", "moe_combine", n_tokens=n_tokens, n_chosen=n_chosen, hidden=2816,
                          has_weights=True)
    assert_least_traffic(lane.traffic(), combine, cost.moe_combine(y, routes.weights, out))
