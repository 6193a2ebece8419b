"""Mixture of experts: who goes where, matrix products by expert, and the sum (cuda/moe_route.cu, cuda/moe_gemm.cu)."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.errors import ShapeError
from engine.kernels.gemm import ACTIVATIONS, N_RESIDENT, Tile
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel
from engine.models.spec import MoeSpec

PICK = Kernel("moe_route.cu", "moe_pick")
ORDER = Kernel("moe_route.cu", "moe_order")
COMBINE = Kernel("moe_route.cu", "moe_combine")
GEMM = Kernel("moe_gemm.cu", "moe_gemm")
GEMM_IN_OUT = Kernel("moe_gemm.cu", "moe_gemm_in_out")
ROUTINGS = ("softmax", "sigmoid")
MOST_EXPERTS, MOST_CHOSEN = 256, 16                 # as moe_route.cu has them
PICK_THREADS, PICK_TOKENS = 128, 4                  # of a block: a warp a token
ORDER_THREADS = 1024                                # at most: fewer pairs take fewer warps
COMBINE_THREADS = 128
COLUMNS = 4                                         # that one thread of moe_combine adds up

# As in gemm.py: few rows keep 56 KB of weights in flight a block, many give a warp 64 x 64.
NARROW = (Tile(64, 8, 16, 8, 64, 8), Tile(64, 16, 16, 16, 64, 7), Tile(128, 64, 32, 32, 64, 4))
WIDE = Tile(128, 128, 64, 64, 32, 4)
# Where memory has gate and up side by side in rows of n_in: 64 columns of each are whole lines of 128 bytes.
LINES = Tile(128, 16, 32, 16, 32, 8)
WIDE_ROWS = 192                                     # rows an expert from which on WIDE pads less than it saves


class Plan(NamedTuple):
    """One launch: blocks take tiles in turns."""

    tile: Tile
    n_blocks: int


def tile_for(n_tokens, experts_per_token, n_experts, has_lines):
    """The Tile for uniform routing: the narrowest that holds an expert's rows, with three standard deviations to spare;
    has_lines: gate and up lie side by side. Other routings give the same bits."""
    mean = n_tokens * experts_per_token / n_experts
    if mean >= WIDE_ROWS:
        return WIDE
    wanted = min(n_tokens, mean + 3 * mean**0.5)
    if has_lines and wanted <= LINES.tokens:
        return LINES
    return next((tile for tile in NARROW if wanted <= tile.tokens), NARROW[-1])


def plan_with(tile, n_rows, n_experts, n_pairs):
    """The Plan of a tile: as many blocks as any routing can use, up to what runs at once."""
    most_used = min(n_experts, n_pairs)             # each has a row at least; TOKENS others make one more stretch
    n_tiles = -(-n_rows // tile.rows) * (most_used + (n_pairs - most_used) // tile.tokens)
    return Plan(tile, min(n_tiles, N_RESIDENT))


@lru_cache(maxsize=4096)
def plan(n_rows, n_experts, n_tokens, experts_per_token, has_lines=False):
    """The Plan for weights of n_rows outputs an expert (gated: 2 * intermediate) and n_tokens >= 1."""
    tile = tile_for(n_tokens, experts_per_token, n_experts, has_lines)
    return plan_with(tile, n_rows, n_experts, n_tokens * experts_per_token)


def moe_route(logits, per_expert_scale, routing, routes, scratch=None):
    """Picks the experts of each token, those with the largest logits, and sorts the pairs by expert.

    logits            [n_tokens, n_experts] bf16; of equal ones the lowest number goes first, and a NaN counts as -inf
    per_expert_scale  [n_experts] bf16 or None; softmax alone
    routing           "softmax": over all experts, renormalised over the chosen ones, times per_expert_scale, all in
                      float32; "sigmoid": of each chosen logit, rounded to bfloat16
    routes            Routes, written
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4TextRouter; HF modeling_llama4, Llama4Router.
    """
    if routing not in ROUTINGS or (routing == "sigmoid" and per_expert_scale is not None):
        raise ShapeError(f"moe_route: routing is {routing!r} with per_expert_scale {type(per_expert_scale).__name__}, "
                         "expected softmax, or sigmoid with None")
    dims = match("moe_route", logits=(logits, "n_tokens n_experts", BF16),
                 per_expert_scale=(per_expert_scale, "n_experts", BF16),
                 experts=(routes.experts, "n_tokens experts_per_token", np.int32),
                 weights=(routes.weights, "n_tokens experts_per_token", np.float32))
    _check_routes("moe_route", routes, dims)
    n_tokens, n_chosen = dims.n_tokens, dims.experts_per_token
    if not 1 <= n_chosen <= min(MOST_CHOSEN, dims.n_experts):
        raise ShapeError(f"moe_route: {n_chosen} of {dims.n_experts} experts a token, expected 1..{MOST_CHOSEN}, and "
                         "no more than there are")
    PICK().launch((-(-n_tokens // PICK_TOKENS),), (PICK_THREADS,),
                  (logits, per_expert_scale, routes.experts, routes.weights, n_tokens, dims.n_experts, n_chosen,
                   routing == "sigmoid"))
    n_pairs = n_tokens * n_chosen
    ORDER().launch((dims.n_experts,), (min(ORDER_THREADS, max(32, -(-n_pairs // 32) * 32)),),
                   (routes.experts, routes.order, routes.begins, n_pairs))


def moe_gated_linear(x, weight, routes, out, by_pair, activation, in_out, scratch=None):
    """out[i] = act(x[r] @ gate_e.T) * (x[r] @ up_e.T) for pair p = order[i] of expert e: float32 sums, rounded once.

    x           [n_tokens, n_in] bf16, r = p // experts_per_token; by_pair [n_tokens * experts_per_token, n_in], r = p
    weight      [n_experts, 2 * intermediate, n_in] bf16: gate's rows, then up's; in_out [n_experts, n_in,
                2 * intermediate]: columns alike. n_in and intermediate are multiples of 4
    routes      Routes of moe_route
    out         [n_tokens * experts_per_token, intermediate] bf16, by expert as order has them
    activation  "gelu_tanh" or "silu"
    Raises ShapeError. A row's bits depend on that row of x and on the expert's weight, on nothing else.
    """
    if activation not in ACTIVATIONS:
        raise ShapeError(f"moe_gated_linear: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    n_tokens, experts_per_token = routes.experts.shape
    known = {"n_pairs": n_tokens * experts_per_token, "n_tokens": n_tokens}
    known["two_n_out"] = 2 * out.shape[-1]
    dims = match("moe_gated_linear", dims=known, x=(x, "n_pairs n_in" if by_pair else "n_tokens n_in", BF16),
                 weight=(weight, "n_experts n_in two_n_out" if in_out else "n_experts two_n_out n_in", BF16),
                 out=(out, "n_pairs n_out", BF16))
    _check("moe_gated_linear", routes, dims)
    if n_tokens and dims.n_out:
        how = plan(2 * dims.n_out, dims.n_experts, n_tokens, experts_per_token, in_out)
        launch(how, x, weight, routes, out, in_out, 1 if by_pair else experts_per_token, ACTIVATIONS[activation])


def moe_linear(x, weight, routes, out, in_out, scratch=None):
    """out[order[i]] = x[i] @ weight_e.T, e the expert of pair order[i]; not rounded.

    x       [n_tokens * experts_per_token, n_in] bf16, by expert as moe_gated_linear leaves them
    weight  [n_experts, n_out, n_in] bf16; in_out [n_experts, n_in, n_out]; n_in and n_out are multiples of 4
    routes  Routes of moe_route
    out     [n_tokens * experts_per_token, n_out] float32, by pair
    Raises ShapeError. A row's bits depend on that row of x and on the expert's weight, on nothing else.
    """
    n_tokens, experts_per_token = routes.experts.shape
    dims = match("moe_linear", dims={"n_pairs": n_tokens * experts_per_token}, x=(x, "n_pairs n_in", BF16),
                 weight=(weight, "n_experts n_in n_out" if in_out else "n_experts n_out n_in", BF16),
                 out=(out, "n_pairs n_out", np.float32))
    _check("moe_linear", routes, dims)
    if n_tokens and dims.n_out:
        launch(plan(dims.n_out, dims.n_experts, n_tokens, experts_per_token), x, weight, routes, out, in_out, 0, 0)


def moe_combine(y, weights, out):
    """out[t] = the sum over s of weights[t, s] * y[t * experts_per_token + s], ascending, in float32, rounded once.

    y        [n_tokens * experts_per_token, hidden] float32, hidden a multiple of 4
    weights  [n_tokens, experts_per_token] float32, or None for ones
    out      [n_tokens, hidden] bf16
    Raises ShapeError.
    """
    dims = match("moe_combine", out=(out, "n_tokens hidden", BF16),
                 weights=(weights, "n_tokens experts_per_token", np.float32), y=(y, "n_pairs hidden", np.float32))
    n_chosen = dims.n_pairs // max(dims.n_tokens, 1) if weights is None else dims.experts_per_token
    if n_chosen * dims.n_tokens != dims.n_pairs:
        raise ShapeError(f"moe_combine: y has {dims.n_pairs} rows, expected {dims.n_tokens} tokens times "
                         f"{'a whole number' if weights is None else n_chosen} of experts")
    if dims.hidden % COLUMNS:
        raise ShapeError(f"moe_combine: rows are {dims.hidden} long, expected a multiple of {COLUMNS}")
    COMBINE().launch((dims.n_tokens, -(-dims.hidden // (COLUMNS * COMBINE_THREADS))), (COMBINE_THREADS,),
                     (y, weights, out, n_chosen, dims.hidden))


def _check_routes(op, routes, dims):
    n_tokens, experts_per_token = routes.experts.shape
    match(op, dims={"n_pairs": n_tokens * experts_per_token, "n_experts_and_1": dims.n_experts + 1},
          order=(routes.order, "n_pairs", np.int32), begins=(routes.begins, "n_experts_and_1", np.int32))
    if dims.n_experts > MOST_EXPERTS:
        raise ShapeError(f"{op}: {dims.n_experts} experts, expected at most {MOST_EXPERTS}")


def _check(op, routes, dims):
    _check_routes(op, routes, dims)
    if dims.n_in % 4 or dims.n_out % 4 or not dims.n_in:
        raise ShapeError(f"{op}: {dims.n_in} inputs and {dims.n_out} outputs, expected multiples of 4: rows are copied "
                         "8 bytes at a time")


def launch(how, x, weight, routes, out, in_out, divisor, activation):
    """Runs a Plan; divisor: what makes a row of x of a pair, 0 where x has the order of the pairs."""
    is_f32 = out.dtype == np.float32
    how.tile.build(GEMM_IN_OUT if in_out else GEMM).launch(
        grid=(how.n_blocks,), block=(how.tile.n_threads,), smem=how.tile.smem_bytes,
        args=(x, weight, routes.order, routes.begins, None if is_f32 else out, out if is_f32 else None, len(weight),
              out.shape[1], x.shape[1], divisor, activation))


def experts(spec):
    """The MoeSpecs of a ModelSpec, each once."""
    return list(dict.fromkeys(layer.mlp for layer in spec.layers if type(layer.mlp) is MoeSpec))


def variants(spec, max_tokens):
    """(Build, n_threads, smem_bytes) of everything that a ModelSpec launches with up to max_tokens in a step."""
    for kernel, n_threads in ((PICK, PICK_THREADS), (ORDER, ORDER_THREADS), (COMBINE, COMBINE_THREADS)):
        if experts(spec):
            yield kernel(), n_threads, 0
    counts = [*(2**i for i in range(max_tokens.bit_length())), max_tokens]
    found = {(mlp.in_out, tile_for(n, mlp.experts_per_token, mlp.n_experts, has_lines))
             for mlp in experts(spec) for n in counts for has_lines in {False, mlp.in_out}}
    for in_out, tile in sorted(found):
        yield tile.build(GEMM_IN_OUT if in_out else GEMM), tile.n_threads, tile.smem_bytes
