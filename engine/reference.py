"""The op table in NumPy: what each kernel means, exactly, and the `cpu` lane that runs where there is no GPU.

Every op writes into arrays it is given, and computes in their dtype: float32 on the cpu lane, float64 where a test asks
what a kernel should have found. Long elementwise chains run over blocks of rows that stay in cache. `scratch` is a
Scratch of engine/workspace.py, or None. Ops whose rows know nothing of each other stand in engine/reference_rows.py,
matrix products in engine/reference_products.py, those of experts in engine/reference_moe.py, the
rules for drafts in engine/reference_drafts.py, the head of a draft model in engine/reference_centroids.py.
"""

from functools import lru_cache

import numpy as np

from engine import sampler
from engine.models.vision_spec import Gemma4TowerSpec
from engine.reference_centroids import (  # noqa: F401  part of the op table
    candidate_argmax,
    candidate_logits,
    pick_centroids,
)
from engine.reference_drafts import (  # noqa: F401  part of the op table
    accept_drafts,
    relax_drafts,
    sample_drafts,
    sample_with_drafts,
)
from engine.reference_moe import moe_combine, moe_gated_linear, moe_linear, moe_route  # noqa: F401  part of the op table
from engine.reference_products import gated_linear, linear  # noqa: F401  part of the op table
from engine.reference_rows import (  # noqa: F401  part of the op table
    ACTIVATIONS,
    ROWS,
    add_norm,
    add_norms,
    attention_temperature,
    gate_per_layer,
    mix_per_layer,
    rms_norm,
    router_norm,
    scale_rows,
)
from engine.reference_vision import (  # noqa: F401  part of the op table
    add_bias,
    add_rows,
    clamp,
    layer_norm,
    place_rows,
    pool_rows,
)
from engine.sampler import apply_edits  # noqa: F401  part of the op table, in place as it stands

QUERIES = 64        # queries of one attention block: bounds the score matrix


def scratch_size(spec, max_tokens, max_logit_rows):
    """(floats, counters) that the ops of a ModelSpec or AssistantSpec want: room for gate and up of gated_linear."""
    return max_tokens * 2 * spec.widest_dense, 0


def vision_scratch_size(tower, hidden, max_patches):
    """The same of a vision tower's ops, for pictures of up to max_patches patches together."""
    is_gated = isinstance(tower, Gemma4TowerSpec) and not tower.clipped
    return max_patches * 2 * tower.intermediate if is_gated else 0, 0


# --- embedding

def embed(table, token_ids, scale, out):
    """out[t] = table[token_ids[t]] * scale. table [vocab, hidden], token_ids [n] int32, out [n, hidden]."""
    np.multiply(table[token_ids], scale, out=out)


def select_rows(x, rows, out):
    """out[i] = x[rows[i]]; returns out. x [n, ...], rows [n_kept] int32, out [n_kept, ...]."""
    return np.take(x, rows, axis=0, out=out)


# --- q, k and v

def rope_angles(positions, inv_freq, out):
    """out[t] = cos, sin of positions[t] * inv_freq, a product that is rounded to float32.

    positions  [n_tokens] int32; or [n_tokens, 2]: the first half of the pairs turns by column 0, the second by column 1
    inv_freq   [n_pairs] float32
    out        [n_tokens, 2, n_pairs]
    """
    by_pair = positions.astype(np.float32)[:, None]
    if positions.ndim == 2:
        by_pair = np.repeat(by_pair[:, 0], len(inv_freq) // 2, axis=1)
    angles = by_pair * inv_freq
    np.cos(angles, out=out[:, 0], dtype=out.dtype)
    np.sin(angles, out=out[:, 1], dtype=out.dtype)


def qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, k_pages, v_pages, *, n_heads, v_norm, v_is_k, eps,
                       weight_offset, interleaved=False, qk_norm="weighted", temperature=None, out):
    """Per-head RMSNorm of q and k, RoPE on both, v normalised without a weight if v_norm; q goes to out, k and v go
    into their pages.

    qkv             [n_tokens, (n_heads + n_kv_heads * (1 if v_is_k else 2)) * head_dim]
    q_norm, k_norm  [head_dim], or None to multiply by nothing
    angles          [n_tokens, 2, n_pairs] from rope_angles, for the first n_pairs of the pairs (j, j + head_dim/2), or
                    of the pairs (2j, 2j + 1) if interleaved; None rotates nothing
    slots           [n_tokens] int32: page * page_size + offset, where each token's k and v go; -1 is nowhere
    k_pages, v_pages [n_pages, page_size, n_kv_heads, head_dim]; None, as slots, where qkv is q alone
    qk_norm         "weighted": q and k are normed before RoPE, times the weights; "plain": after RoPE, the weights are
                    not used; None: not at all
    temperature     [n_tokens] multiplies q, last, or None
    out             [n_tokens, n_heads * head_dim]
    """
    n_kv_heads, head_dim = (0, out.shape[1] // n_heads) if k_pages is None else k_pages.shape[2:]
    n_qk = n_heads + n_kv_heads
    heads, q_out = qkv.reshape(len(qkv), -1, head_dim), out.reshape(len(qkv), n_heads, head_dim)
    if weight_offset:
        q_norm, k_norm = (w if w is None else w + weight_offset for w in (q_norm, k_norm))
    for at in range(0, len(qkv), ROWS):
        rows = slice(at, at + ROWS)
        source = heads[rows]
        qk = np.empty((len(source), n_qk, head_dim), qkv.dtype)
        q, k = qk[:, :n_heads], qk[:, n_heads:]
        if qk_norm == "weighted":
            rms_norm(source[:, :n_qk], None, eps, 0.0, qk)
            if q_norm is not None:
                q *= q_norm
            if k_norm is not None:
                k *= k_norm
        else:
            qk[...] = source[:, :n_qk]
        if angles is not None:
            _rotate(qk, angles[rows], interleaved)
        if qk_norm == "plain":
            rms_norm(qk, None, eps, 0.0, qk)
        if temperature is not None:
            q *= temperature[rows, None, None]
        q_out[rows] = q
        if k_pages is None:
            continue
        v = source[:, n_heads:n_qk] if v_is_k else source[:, n_qk:]
        if v_norm:
            normed = np.empty(v.shape, v.dtype)
            rms_norm(v, None, eps, 0.0, normed)
            v = normed
        to = slots[rows]
        if np.minimum.reduce(to) < 0:
            k, v, to = k[to >= 0], v[to >= 0], to[to >= 0]
        k_pages.reshape(-1, n_kv_heads, head_dim)[to] = k
        v_pages.reshape(-1, n_kv_heads, head_dim)[to] = v


def _rotate(x, angles, interleaved):
    """The pairs of x [n, n_heads, head_dim] turn by angles [n, 2, n_pairs], in place."""
    n_pairs, half = angles.shape[-1], x.shape[-1] // 2
    firsts, seconds = slice(n_pairs), slice(half, half + n_pairs)
    if interleaved:
        firsts, seconds = slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    cos, sin = angles[:, :1], angles[:, 1:]                     # [n, 1, n_pairs]
    first, second = x[..., firsts], x[..., seconds]
    crossed = first * sin
    first *= cos
    first -= second * sin
    second *= cos
    second += crossed


# --- attention

def attention(q, k_pages, v_pages, paged, *, scale, out, scratch=None, window=None, chunk=None, softcap=None):
    """softmax(scale * q·k) · v of each token over positions of its own sequence, read through the page table.

    q, out    [n_tokens, n_heads * head_dim]
    k_pages, v_pages  [n_pages, page_size, n_kv_heads, head_dim]
    paged     PagedBatch: page tables, query offsets, context lengths; last_visible where a token sees later ones,
              first_visible where it sees earlier ones than its window shows
    window    a token sees no earlier positions than the last `window`, itself included
    chunk     a token at position p sees no earlier positions than p // chunk * chunk
    softcap   scores become softcap * tanh(score / softcap)
    """
    n_kv_heads, head_dim = k_pages.shape[2:]
    k_slots, v_slots = k_pages.reshape(-1, n_kv_heads, head_dim), v_pages.reshape(-1, n_kv_heads, head_dim)
    out = out.reshape(len(q), n_kv_heads, q.shape[1] // (n_kv_heads * head_dim), head_dim)
    q = (q * scale).reshape(out.shape)
    for i, (begin, end, context) in enumerate(paged.rows):
        at = begin
        while at < end:
            position, stop = context - (end - at), min(at + QUERIES, end)       # of the block's first query
            oldest = 0 if window is None else max(0, position - window + 1)
            if chunk is not None:                               # a block of queries lies within one chunk
                stop = min(stop, at + chunk - position % chunk)
                oldest = max(oldest, position // chunk * chunk)
            last = None if paged.last_visible is None else np.minimum(paged.last_visible[at:stop], context - 1)
            first = None if paged.first_visible is None else paged.first_visible[at:stop]
            oldest = oldest if first is None else min(oldest, int(first[0]))
            newest = context - (end - stop) - 1 if last is None else int(last.max())
            hidden = _hidden(stop - at, position, oldest, newest, window, last, first)
            out[at:stop] = _attend(q[at:stop], k_slots, v_slots, paged.runs(i, oldest, newest + 1), hidden, softcap)
            at = stop


def _attend(q, k_slots, v_slots, runs, hidden, softcap):
    """One block of consecutive queries against the keys in `runs`, [(first slot, n)].

    q       [n, n_kv_heads, group, head_dim], like the result
    hidden  [(first key, bool [n, some keys])]: where a query may not see a key
    """
    n, n_kv_heads, group, head_dim = q.shape
    q = q.transpose(1, 2, 0, 3).reshape(n_kv_heads, group * n, head_dim)
    scores = [np.matmul(q, k_slots[slot:slot + size].transpose(1, 2, 0)) for slot, size in runs]
    scores = scores[0] if len(scores) == 1 else np.concatenate(scores, axis=-1)
    if softcap is not None:
        logit_softcap(scores, softcap)
    for first, where in hidden:
        columns = scores.reshape(n_kv_heads, group, n, -1)[..., first:first + where.shape[1]]
        np.copyto(columns, -np.inf, where=where)
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = np.matmul(scores, _ones(scores.shape[-1], scores.dtype))    # BLAS adds up rows faster than sum() does
    mixed, at = None, 0
    for slot, size in runs:
        part = np.matmul(scores[..., at:at + size], v_slots[slot:slot + size].transpose(1, 0, 2))
        mixed = part if mixed is None else mixed + part
        at += size
    mixed /= total
    return mixed.reshape(n_kv_heads, group, n, head_dim).transpose(2, 0, 1, 3)


def _hidden(n, position, oldest, newest, window, last_visible, first_visible):
    """[(first key, bool [n, some keys])]: which of the keys oldest..newest the queries at position, position + 1, ...
    may not see, because they are later than what the query may see, or because its window has passed them."""
    if last_visible is not None:
        keys, queries = np.arange(oldest, newest + 1), np.arange(position, position + n)[:, None]
        where = keys > last_visible[:, None]
        if window is not None:
            behind = queries - window
            where |= keys <= (behind if first_visible is None else np.minimum(behind, first_visible[:, None] - 1))
        return [(0, where)]
    hidden = [(position + 1 - oldest, _later(n))] if n > 1 else []
    if window is not None and (n_behind := newest - window - oldest + 1) > 0:   # keys out of the last query's sight
        hidden.append((0, _behind(n, n_behind)))
    return hidden


@lru_cache(maxsize=256)
def _later(n):
    """[n, n - 1] bool: column c is the key after query c, so row r may not see columns from r on."""
    return np.arange(n - 1) >= np.arange(n)[:, None]


@lru_cache(maxsize=256)
def _behind(n, n_behind):
    """[n, n_behind] bool: the last row sees none of the columns, each row before it one more from the right."""
    return np.arange(n_behind) < np.arange(n_behind - n + 1, n_behind + 1)[:, None]


@lru_cache(maxsize=256)
def _ones(n, dtype):
    return np.ones((n, 1), dtype)


# --- logits

def logit_softcap(logits, cap):
    """logits = cap * tanh(logits / cap), in place."""
    logits /= cap
    np.tanh(logits, out=logits)
    logits *= cap


def sample(logits, batch, out, scratch=None, domain=0):
    """out[i] = the next token of row i. logits [n_rows, vocab] float32, batch a SamplingBatch, out [n_rows] int32."""
    out[...] = sampler.sample(logits, batch, domain)


def top_logprobs(logits, chosen, n, out_chosen, out_ids, out_logprobs, scratch=None):
    """Log-softmax of raw logits [n_rows, vocab] at `chosen` [n_rows] int32, into out_chosen [n_rows], and the n
    largest, likeliest first, into out_ids [n_rows, n] int32 and out_logprobs [n_rows, n]."""
    out_chosen[...], out_ids[...], out_logprobs[...] = sampler.top_logprobs(logits, chosen, n)
