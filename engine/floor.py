"""The least that a step of a model costs, whoever computes it: from a ModelSpec, that runs or is only described."""

from functools import lru_cache

import numpy as np

from engine.kernels.paged import NO_LIMIT
from engine.models.spec import DenseSpec, MoeSpec
from engine.roofline import Cost


def floor(spec, rows, weight_bytes=2, kv_bytes=2, latent=False, drops=False):
    """The least a step of `spec` costs, whoever computes it (of a prompt, with `drops`): the sum of floor_parts()."""
    return sum(floor_parts(spec, rows, weight_bytes, kv_bytes, latent, drops).values(), Cost())


def floor_parts(spec, rows, weight_bytes=2, kv_bytes=2, latent=False, drops=False):
    """{"linear" | "experts" | "attention" | "head": Cost} of a step.

    rows          [(n_seqs, n_query, context)], or with a fourth, the logits wanted of each sequence (1, of its last
                  token): n_seqs sequences compute n_query tokens each, and then have `context` positions in the cache
    weight_bytes  of one weight: 4, 2, 1 or 0.5
    kv_bytes      of one element of K or V
    latent        layers whose v is k cache it once, and of k beside it only what RoPE turns: a what-if
    drops         from layer spec.drops_at on only the tokens whose logits are wanted count, and of the others what
                  their K and V take there: our steps leave the rest out. Else every layer counts for every token, as
                  tables of floors do
    Raises ValueError for rows that cannot be.

    Counted: each matrix that the tokens touch, once, with the experts that uniform routing is expected to hit; the rows
    of the embedding tables; K and V of each position that a sequence's tokens see, once a layer, read or, where it is
    new, written. Layers with the K and V of another layer read them too. Not counted: norms' weights, activations,
    logits, and arithmetic outside of matrix products and attention.
    """
    rows = [(*row, 1)[:4] for row in rows]
    for n_seqs, n_query, context, n_logits in rows:
        if n_seqs < 1 or not 1 <= n_query <= context or not 0 <= n_logits <= n_query:
            raise ValueError(f"a row is {n_seqs} sequences of {n_query} new tokens at context {context} with "
                             f"{n_logits} logits each, expected at least 1 sequence of 1 token, and neither more new "
                             "tokens than context nor more logits than new tokens")
    n_tokens = sum(n_seqs * n_query for n_seqs, n_query, _, _ in rows)
    n_logits = sum(n_seqs * n_logits for n_seqs, _, _, n_logits in rows)
    linear, routed, attended = Cost(weight_bytes * n_tokens * spec.hidden), Cost(), Cost()
    for i, layer in enumerate(spec.layers):
        a, is_dropping = layer.attention, drops and i >= spec.drops_at
        n, n_weights = n_logits if is_dropping else n_tokens, _n_linear_of(layer, spec)
        n_kv = spec.hidden * (a.qkv_width - a.q_width) if layer.kv_from is None else 0      # weights of k and v
        linear += Cost(weight_bytes * ((n_weights if n else n_kv) + n * spec.per_layer_input),
                       flops=2 * (n * n_weights + (n_tokens - n) * n_kv))
        routed += experts(layer.mlp, spec.hidden, n, weight_bytes)
        kept = 1 + a.rope.partial if latent and a.v_is_k else 2
        for n_seqs, n_query, context, n_wanted in rows:
            n_keys, n_pairs = visible(n_wanted if is_dropping else n_query, context, a.window, a.chunk)
            n_keys = max(n_keys, n_query) if layer.kv_from is None else n_keys
            attended += Cost(n_seqs * n_keys * kept * a.kv_width * kv_bytes, flops=4 * n_seqs * n_pairs * a.q_width)
    n_head = spec.vocab * spec.hidden if n_logits else 0
    return {"linear": linear, "experts": routed, "attention": attended,
            "head": Cost(weight_bytes * n_head, flops=2 * n_logits * n_head)}


def draft_step(spec, n_seqs, context, weight_bytes=2, kv_bytes=2):
    """The least that drafting one token each costs for n_seqs sequences of `context` positions in the cache, as
    floor_parts() counts. spec: an AssistantSpec."""
    n_linear = _n_linear(spec) + sum(rows * n_in for rows, n_in in spec.projections) + spec.hidden * spec.backbone
    chosen = spec.centroids_per_token / spec.n_centroids if spec.n_centroids else 1
    n_head = spec.vocab * chosen * spec.hidden      # rows of its head that a sequence's logits take
    n_read = spec.hidden * spec.vocab * (1 - (1 - chosen) ** n_seqs)
    least = Cost(weight_bytes * (n_linear + n_read + n_seqs * spec.backbone), flops=2 * n_seqs * (n_linear + n_head))
    for a in (layer.attention for layer in spec.layers):
        n_keys, n_pairs = visible(1, context, a.window, a.chunk)
        least += Cost(n_seqs * n_keys * 2 * a.kv_width * kv_bytes, flops=4 * n_seqs * n_pairs * a.q_width)
    return least


@lru_cache(maxsize=4096)
def visible(n_query, context, window=None, chunk=None):
    """(positions that the last n_query tokens of `context` see between them, pairs of a token and one it sees)."""
    if not n_query:
        return 0, 0
    position = np.arange(context - n_query, context, dtype=np.int64)
    before = np.minimum(position % (chunk or NO_LIMIT), (window or NO_LIMIT) - 1)
    return int(context - (position - before)[0]), int(before.sum()) + n_query


def experts(mlp, hidden, n_tokens, weight_bytes=2):
    """The Cost of a layer's routed experts for so many tokens: nothing but for a MoeSpec. Each expert in use is read
    once; uniform routing is expected to use E (1 - (1 - k / E)^n_tokens) of E, where each token takes k."""
    if type(mlp) is not MoeSpec:
        return Cost()
    n_one = 3 * hidden * mlp.intermediate
    n_used = mlp.n_experts * (1 - (1 - mlp.experts_per_token / mlp.n_experts) ** n_tokens)
    return Cost(weight_bytes * n_used * n_one, flops=2 * n_tokens * mlp.experts_per_token * n_one)


def n_matrix_weights(spec):
    """Elements of all matrices that tokens of a ModelSpec may be multiplied by, but for the head."""
    return _n_linear(spec) + sum(3 * spec.hidden * layer.mlp.intermediate * layer.mlp.n_experts
                                 for layer in spec.layers if type(layer.mlp) is MoeSpec)


def _n_linear(spec):
    """Elements of the matrices that every token is multiplied by, but for the head."""
    return sum(_n_linear_of(layer, spec) for layer in spec.layers)


def _n_linear_of(layer, spec):
    """Those of one layer, with its share of the projection to per-layer inputs."""
    attention, mlp = layer.attention, layer.mlp
    projected = attention.qkv_width if layer.kv_from is None else attention.q_width
    n_columns = projected + attention.q_width + 3 * spec.per_layer_input
    if type(mlp) is MoeSpec:
        n_columns += mlp.n_experts                      # the router
        mlp = mlp.dense or DenseSpec(0)
    return spec.hidden * (n_columns + 3 * mlp.intermediate)


def launch_share(floor_s, n_launches, gap_s):
    """The share of a step that is its floor, where each of its launches adds gap_s to it: 0..1."""
    return floor_s / (floor_s + n_launches * gap_s)


def speculation_ceiling(acceptance, step_s, verify_s, draft_s):
    """How many times faster than one token a step speculation is at best.

    acceptance  the chance that the first, the second, ... drafted token is kept: so many are drafted
    step_s      of a step of one token; verify_s: of the step that checks all drafted tokens; draft_s: of drafting one
    """
    return (1 + sum(acceptance)) * step_s / (verify_s + len(acceptance) * draft_s)


def break_even(n_drafts, slowdown):
    """The chance that a drafted token holds where those before it do, 0..1, at which drafting n_drafts of them gains
    nothing; None where it loses even if all hold.

    slowdown  how many times as long as a step of one token the step takes that checks and drafts so many
    """
    if slowdown > n_drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):                                 # halves
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle ** i for i in range(n_drafts + 1)) < slowdown else (low, middle)
    return high
