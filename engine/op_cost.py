"""What each op of the op table costs: the names and arguments of engine/kernels/ops.py, a Cost for an answer.

Only shapes and dtypes are read, so arguments may be NumPy arrays, CuPy arrays or anything that has both. Attention also
reads where its sequences begin and end. On the `cpu` lane, where arrays are float32, nothing extra is counted for
matrix products and attention.
"""

from math import ceil

import numpy as np

from engine.floor import visible
from engine.kernel_cost import (
    accept_drafts_cost,
    add_bias_cost,
    add_norm_cost,
    add_norms_cost,
    add_residual_cost,
    add_rows_cost,
    apply_edits_cost,
    attention_cost,
    attention_temperature_cost,
    candidate_argmax_cost,
    candidate_logits_cost,
    clamp_cost,
    count_weights_cost,
    draw_cost,
    draw_draft_cost,
    draw_with_draft_cost,
    embed_cost,
    find_kept_cost,
    gate_per_layer_cost,
    gemm_cost,
    largest_logit_cost,
    layer_norm_cost,
    list_likeliest_cost,
    logit_softcap_cost,
    mix_per_layer_cost,
    moe_combine_cost,
    moe_gemm_cost,
    moe_order_cost,
    moe_pick_cost,
    no_logits_cost,
    pick_centroids_cost,
    place_rows_cost,
    pool_rows_cost,
    qk_norm_rope_cache_cost,
    relax_drafts_cost,
    rms_norm_cost,
    rope_angles_cost,
    router_norm_cost,
    scale_rows_cost,
    select_rows_cost,
    sum_weights_cost,
)
from engine.kernels import gemm
from engine.kernels import paged as planning
from engine.kernels.sampling import N_BINS
from engine.roofline import Cost

KERNEL_ITEMSIZE = 2         # of bfloat16, which the kernels take


def embed(table, token_ids, scale, out):
    """No token is taken to occur twice."""
    n_tokens, (vocab, hidden) = token_ids.shape[0], table.shape
    return embed_cost(n_tokens, min(n_tokens, vocab), hidden, table.dtype.itemsize)


def select_rows(x, rows, out):
    """No row is taken to occur twice."""
    n_kept, (n, width) = rows.shape[0], x.shape
    return select_rows_cost(n_kept, min(n_kept, n), width * x.dtype.itemsize // 4)


def place_rows(x, source, rows, out):
    """No row is taken to be placed twice."""
    n_placed, (n, width) = rows.shape[0], x.shape
    return place_rows_cost(n_placed, min(n_placed, n), width * x.dtype.itemsize // 4)


def add_rows(x, table, rows, out):
    """One number a row: none is taken to occur twice. Two: those of a square picture, a row and a column at a time."""
    n, n_axes = rows.shape
    n_used = n if n_axes == 1 else ceil(2 * n**0.5)
    return add_rows_cost(n, n_axes, x.shape[1], min(n_used, table.shape[0]), x.dtype.itemsize)


def pool_rows(x, groups, factor, bias, scale, out):
    """No row is taken to be in two groups."""
    n_out, k = groups.shape
    return pool_rows_cost(n_out, k, min(n_out * k, x.shape[0]), x.shape[1], bias is not None, scale is not None,
                          x.dtype.itemsize)


def clamp(x, bounds, out, first=0):
    return clamp_cost(*x.shape, x.dtype.itemsize)


def add_bias(x, bias, out, activation=None, residual=None):
    return add_bias_cost(*x.shape, residual is not None, x.dtype.itemsize)


def layer_norm(x, weight, bias, eps, out):
    return layer_norm_cost(*x.shape, x.dtype.itemsize)


def scale_rows(x, weights, out):
    return scale_rows_cost(*weights.shape, x.shape[1], x.dtype.itemsize)


def gate_per_layer(gate, inputs, layer, out):
    return gate_per_layer_cost(*gate.shape, gate.dtype.itemsize)


def mix_per_layer(context, tokens, weight, factor, eps, out):
    (n_tokens, widths), width = context.shape, weight.shape[0]
    return mix_per_layer_cost(n_tokens * widths // width, width, context.dtype.itemsize)


def rms_norm(x, weight, eps, weight_offset, out, round_first=False):
    return rms_norm_cost(*x.shape, weight is not None, x.dtype.itemsize)


def add_norm(residual, branch, post_weight, next_weight, eps, weight_offset, layer_scalar, out, round_first=False):
    cost = add_residual_cost if out is None else add_norm_cost
    return cost(*branch.shape, post_weight is not None, layer_scalar is not None, branch.dtype.itemsize)


def add_norms(a, a_weight, b, b_weight, eps, weight_offset, out):
    return add_norms_cost(*a.shape, a.dtype.itemsize)


def router_norm(x, scale, factor, eps, out):
    return router_norm_cost(*x.shape, x.dtype.itemsize)


def rope_angles(positions, inv_freq, out):
    return rope_angles_cost(positions.shape[0], inv_freq.shape[0], len(positions.shape))


def attention_temperature(positions, scale, floor, out):
    return attention_temperature_cost(positions.shape[0])


def qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, k_pages, v_pages, *, n_heads, v_norm, v_is_k, eps,
                       weight_offset, interleaved=False, qk_norm="weighted", temperature=None, out):
    """Every token is taken to have a slot."""
    n_kv_heads, head_dim = (0, out.shape[1] // n_heads) if k_pages is None else k_pages.shape[2:]
    weights = [q_norm, k_norm if n_kv_heads else None] if qk_norm == "weighted" else []
    return qk_norm_rope_cache_cost(qkv.shape[0], qkv.shape[1] // head_dim, n_heads, n_kv_heads, head_dim,
                                   0 if angles is None else angles.shape[2], qkv.dtype.itemsize,
                                   sum(w is not None for w in weights), slots is not None, temperature is not None)


def linear(x, weight, out, scratch=None, residual=None):
    residual_bytes = 0 if residual is None else residual.dtype.itemsize
    return _product(x, weight, out, residual_bytes)


def gated_linear(x, weight, out, scratch=None, activation="gelu_tanh"):
    return _product(x, weight, out, 0)


def _product(x, weight, out, residual_bytes):
    (n_tokens, n_in), n_rows, itemsize = x.shape, weight.shape[0], x.dtype.itemsize
    if not n_tokens or not n_rows:
        return Cost()
    has_partials = itemsize == KERNEL_ITEMSIZE
    partials = gemm.plan(n_rows, n_in, n_tokens).scratch_size if has_partials else (0, 0)
    return gemm_cost(n_tokens, n_in, n_rows, out.shape[1], out.dtype.itemsize, residual_bytes, *partials, itemsize)


def moe_route(logits, per_expert_scale, routing, routes, scratch=None):
    """As many different experts are taken to be chosen as there can be."""
    n_tokens, n_experts, n_chosen = *logits.shape, routes.experts.shape[1]
    n_pairs = n_tokens * n_chosen
    n_scales = 0 if per_expert_scale is None else min(n_experts, n_pairs)
    pick = moe_pick_cost(n_tokens, n_experts, n_chosen, n_scales, logits.dtype.itemsize)
    return pick + moe_order_cost(n_pairs, n_experts)


def moe_gated_linear(x, weight, routes, out, by_pair, activation, in_out, scratch=None):
    return _experts(x, weight, routes, out, 2 * out.shape[1])


def moe_linear(x, weight, routes, out, in_out, scratch=None):
    return _experts(x, weight, routes, out, out.shape[1])


def _experts(x, weight, routes, out, n_rows):
    """The experts in use are read from routes where that is on the host; else uniform routing is expected."""
    n_tokens, n_chosen = routes.experts.shape
    if type(routes.begins) is np.ndarray:
        n_active = int(np.count_nonzero(np.diff(routes.begins)))
    else:
        n_active = round(len(weight) * (1 - (1 - n_chosen / len(weight)) ** n_tokens))
    return moe_gemm_cost(x.shape[1], n_active, n_rows, x.shape[0], out.shape[1], n_tokens * n_chosen, len(weight),
                         out.dtype.itemsize, x.dtype.itemsize)


def moe_combine(y, weights, out):
    n_tokens, hidden = out.shape
    return moe_combine_cost(n_tokens, y.shape[0] // max(n_tokens, 1), hidden, weights is not None, out.dtype.itemsize)


def attention(q, k_pages, v_pages, paged, *, scale, out, scratch=None, window=None, chunk=None, softcap=None):
    """paged: its cu_seqlens, context_lens and, where it has them, last_visible and first_visible are host arrays.

    Sums that a block carries from split to split are not counted, as in the header: they stay in the L2 cache.
    """
    itemsize, (page_size, n_kv_heads, head_dim) = q.dtype.itemsize, k_pages.shape[1:]
    cu_seqlens, limits = np.asarray(paged.cu_seqlens, np.int64), (paged.last_visible, paged.first_visible)
    begin, end, context = cu_seqlens[:-1], cu_seqlens[1:], np.asarray(paged.context_lens, np.int64)
    dims = {"n_heads": q.shape[1] // head_dim, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    seen = [visible(*row, window, chunk) for row in zip((end - begin).tolist(), context.tolist(), strict=True)]
    n_keys, n_pairs = sum(keys for keys, _ in seen), sum(pairs for _, pairs in seen)
    if limits[0] is not None:
        position = np.arange(cu_seqlens[0], cu_seqlens[-1]) - np.repeat(end - context, end - begin)
        last = np.minimum(np.asarray(limits[0], np.int64), np.repeat(context, end - begin) - 1)
        n_pairs += int((last - position).sum())
    if limits[1] is not None and window is not None:
        n_pairs += int(np.maximum(0, position - window + 1 - np.asarray(limits[1], np.int64)).sum())
    extra = (0, 0)
    if itemsize == KERNEL_ITEMSIZE:
        rows = tuple(zip(begin.tolist(), end.tolist(), context.tolist(), strict=True))
        n_part_rows, n_work_bytes = _work(rows, limits, window, chunk, **dims)
        n_entries = sum((last - 1) // page_size - (last - keys) // page_size + 1
                        for (keys, _), last in zip(seen, context.tolist(), strict=True) if keys)
        n_index = n_entries + 3 * len(context) + 1                  # page_begin, context_lens, cu_seqlens
        extra = n_part_rows, n_work_bytes + 4 * (n_index + sum(q.shape[0] for limit in limits if limit is not None))
    return attention_cost(n_keys, q.shape[0], **dims, n_part_rows=extra[0], n_index_bytes=extra[1], n_pairs=n_pairs,
                          itemsize=itemsize)


def _work(rows, limits, window, chunk, *, n_heads, n_kv_heads, head_dim):
    """(rows of partial sums, bytes of work lists and counters) of a step, rows as planning.plan() takes them."""
    lists = planning.plan(rows, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, window=window, chunk=chunk,
                          last_visible=limits[0], first_visible=limits[1])
    n_rows = np.array([end - begin for begin, end, _ in rows], np.int64) * (n_heads // n_kv_heads)
    n_part_rows = n_bytes = 0
    for work, is_decode in ((lists.decode, True), (lists.prefill, False)):
        if not len(work):
            continue
        in_parts = work[work[:, 5] > 1]
        left = n_rows[in_parts[:, 0]] - in_parts[:, 1]
        n_part_rows += int(np.minimum(left, planning.geometry(head_dim, is_decode).rows).sum()) * n_kv_heads
        n_tiles = int((in_parts[:, 4] == 0).sum())
        n_bytes += 4 * (work.size + 1 + 2 * n_tiles * n_kv_heads)   # a counter of each tile is read and written
    return n_part_rows, n_bytes


def logit_softcap(logits, cap):
    return logit_softcap_cost(logits.shape[0] * logits.shape[1])


def apply_edits(logits, edits):
    """Every entry there is room for is taken to count, and every row to have one."""
    n_edits = edits.row.shape[0]
    return apply_edits_cost(n_edits, min(n_edits, logits.shape[0]))


def sample(logits, batch, out, scratch=None, domain=0):
    """Every row is taken to have a top-k or top-p and a token in every bin; those that are sorted out are not counted,
    16 bytes each: they are few. A greedy row passes over its logits once, not three times."""
    return _draws(logits, batch, 0, draw_cost(logits.shape[1], 0))


def sample_drafts(logits, batch, out, probs, scratch=None, positions=None, ahead=0):
    """As sample, and probs is written."""
    vocab = logits.shape[1]
    return _draws(logits, batch, 4 * vocab + 4 * (positions is not None),
                  find_kept_cost(vocab, 0) + draw_draft_cost(vocab))


def sample_with_drafts(logits, batch, drafts, draft_probs, out, scratch=None, prob_rows=None):
    """As sample; every draft is taken to be rejected, which costs one more pass over the logits, and no token to be
    filtered, so that all of draft_probs is read."""
    vocab = logits.shape[1]
    return _draws(logits, batch, 4 * vocab + 4 + 4 * (prob_rows is not None),
                  find_kept_cost(vocab, 0) + draw_with_draft_cost(vocab, vocab))


def _draws(logits, batch, more_bytes, kernels):
    """more_bytes: of a row, that an op has to move beside its logits, its rule and its token; kernels: their cost for
    a row, after count_weights."""
    n_rows, vocab = logits.shape
    fields = (batch.is_greedy, batch.inverse_temperature, batch.top_k, batch.top_p, batch.least_weight, batch.seed,
              batch.position)
    n_bytes = n_rows * (4 * vocab + 4 + sum(field.dtype.itemsize for field in fields) + more_bytes)
    row = count_weights_cost(vocab, N_BINS) + kernels
    moved = largest_logit_cost(n_rows, vocab).traffic_bytes + n_rows * row.traffic_bytes
    return Cost(n_bytes, moved - n_bytes)


def relax_drafts(logits, drafts, is_relaxed, top_k, delta, tokens, scratch=None):
    """Every row is taken to be relaxed and to have a draft."""
    n_rows, vocab = logits.shape
    n_bytes = n_rows * (4 * vocab + 9)
    moved = largest_logit_cost(n_rows, vocab, has_out=False).traffic_bytes \
        + n_rows * relax_drafts_cost(vocab).traffic_bytes
    return Cost(n_bytes, moved - n_bytes)


def accept_drafts(tokens, drafts, slot_begin, slot_rows, positions, out):
    """Every draft is taken to be compared."""
    n_slots, n_seqs = tokens.shape[0], positions.shape[0]
    return accept_drafts_cost(n_slots, n_slots - n_seqs, n_seqs)


def pick_centroids(scores, out):
    return pick_centroids_cost(*scores.shape, out.shape[1])


def candidate_argmax(g, head, ordering, chosen, out, scratch=None):
    """No two rows are taken to share a candidate, as far as there are tokens, and none to be left out."""
    (n_rows, n_chosen), n_distinct = chosen.shape, _n_candidates(head, ordering, chosen)
    cost = candidate_argmax_cost(n_rows, n_chosen, n_distinct, g.shape[1], n_rows * n_chosen * ordering.shape[1],
                                 g.dtype.itemsize)
    return cost if g.dtype.itemsize == KERNEL_ITEMSIZE else Cost(cost.bytes, flops=cost.flops)


def candidate_logits(g, head, ordering, chosen, out):
    """As candidate_argmax. Logits of candidates are written twice."""
    n_rows, n_chosen = chosen.shape
    n_logits = n_rows * n_chosen * ordering.shape[1]
    cost = candidate_logits_cost(n_rows, n_chosen, _n_candidates(head, ordering, chosen), n_logits, g.shape[1],
                                 g.dtype.itemsize)
    return no_logits_cost(out.shape[0] * out.shape[1]) + Cost(cost.bytes - 4 * n_logits, 4 * n_logits, cost.flops)


def _n_candidates(head, ordering, chosen):
    return min(chosen.shape[0] * chosen.shape[1] * ordering.shape[1], head.shape[0])


def top_logprobs(logits, chosen, n, out_chosen, out_ids, out_logprobs, scratch=None):
    """Every bin is taken to have a token; those among which the n largest are found are not counted, 16 bytes each."""
    n_rows, vocab = logits.shape
    n_bytes = n_rows * (4 * vocab + 8 + 8 * n)
    row = sum_weights_cost(vocab, N_BINS) + (list_likeliest_cost(vocab, 0, n) if n else Cost())
    moved = largest_logit_cost(n_rows, vocab, has_out=False).traffic_bytes + n_rows * row.traffic_bytes
    return Cost(n_bytes, moved - n_bytes)

