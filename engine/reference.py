"""The op table in NumPy float32: what each kernel means, exactly, and the `cpu` lane that runs where there is no GPU.

Every op writes into arrays it is given. Long elementwise chains run over blocks of rows that stay in cache.
"""

from functools import lru_cache

import numpy as np

ROWS = 16           # rows of an elementwise chain that share the L2 cache
QUERIES = 128       # queries of one attention block: bounds the score matrix


def embed(table, token_ids, scale, out):
    """out[t] = table[token_ids[t]] * scale. table [vocab, hidden], token_ids [n_tokens] int32, out [n_tokens, hidden]."""
    np.multiply(table[token_ids], np.float32(scale), out=out)


def linear(x, weight, out):
    """out = x @ weight.T. x [n, in], weight [out, in], out [n, out]."""
    np.matmul(x, weight.T, out=out)


def rms_norm(x, weight, eps, weight_offset, out):
    """out = x / sqrt(mean(x²) + eps) * (weight + weight_offset), over the last axis; weight None multiplies by nothing.

    x [..., n], weight [n], out like x, may be x. Source: arXiv:1910.07467; the offset: HF modeling_gemma3.
    """
    mean_square = np.einsum("...i,...i->...", x, x)
    mean_square /= np.float32(x.shape[-1])
    mean_square += np.float32(eps)
    np.sqrt(mean_square, out=mean_square)
    np.divide(x, mean_square[..., None], out=out)
    if weight is not None:
        out *= weight + np.float32(weight_offset) if weight_offset else weight


def add_norm(residual, branch, post_weight, next_weight, eps, weight_offset, layer_scalar, out):
    """residual = (residual + rms_norm(branch, post_weight)) * layer_scalar; out = rms_norm(residual, next_weight).

    The seam between two half-blocks. residual, branch, out [n_tokens, hidden]; branch is overwritten;
    layer_scalar [1] or None.
    """
    rms_norm(branch, post_weight, eps, weight_offset, branch)
    residual += branch
    if layer_scalar is not None:
        residual *= layer_scalar
    rms_norm(residual, next_weight, eps, weight_offset, out)


def rope_angles(positions, inv_freq):
    """(cos, sin) of positions * inv_freq, each float32 [n_tokens, 1, n_pairs]; the product is rounded to float32."""
    angles = positions.astype(np.float32)[:, None, None] * inv_freq
    return np.cos(angles), np.sin(angles)


def qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, k_pages, v_pages, *, n_heads, v_norm, v_is_k, eps,
                       weight_offset):
    """Per-head RMSNorm of q and k, RoPE on both, v normalised without a weight if v_norm; k and v go into their pages.

    qkv             [n_tokens, (n_heads + n_kv_heads * (1 if v_is_k else 2)) * head_dim], q is changed in place
    q_norm, k_norm  [head_dim]
    angles          (cos, sin) from rope_angles, for the first n_pairs of the split-half pairs (j, j + head_dim/2)
    slots           [n_tokens] int32: page * page_size + offset, where each token's k and v go
    k_pages, v_pages [n_pages, page_size, n_kv_heads, head_dim]
    Returns q [n_tokens, n_heads, head_dim], a view of qkv.
    """
    n_kv_heads, head_dim = k_pages.shape[2:]
    heads = qkv.reshape(len(qkv), -1, head_dim)
    q, k = heads[:, :n_heads], heads[:, n_heads:n_heads + n_kv_heads]
    v = k if v_is_k else heads[:, n_heads + n_kv_heads:]
    if v_norm:
        normed = np.empty_like(v)
        rms_norm(v, None, eps, 0.0, normed)
        v = normed
    v_pages.reshape(-1, n_kv_heads, head_dim)[slots] = v
    qk = heads[:, :n_heads + n_kv_heads]
    rms_norm(qk, None, eps, 0.0, qk)
    q *= q_norm + np.float32(weight_offset) if weight_offset else q_norm
    k *= k_norm + np.float32(weight_offset) if weight_offset else k_norm
    cos, sin = angles
    n_pairs = cos.shape[-1]
    first, second = qk[..., :n_pairs], qk[..., head_dim // 2:head_dim // 2 + n_pairs]
    crossed = first * sin
    first *= cos
    first -= second * sin
    second *= cos
    second += crossed
    k_pages.reshape(-1, n_kv_heads, head_dim)[slots] = k
    return q


def attention(q, k_pages, v_pages, paged, *, scale, window, out):
    """softmax(scale * q·k) · v of each token over the earlier positions of its sequence, itself included, read through
    the page table; with a window, over the last `window` of them.

    q         [n_tokens, n_heads, head_dim]
    k_pages, v_pages  [n_pages, page_size, n_kv_heads, head_dim]
    paged     PagedBatch: page tables, query offsets and context lengths
    out       [n_tokens, n_heads * head_dim]
    """
    n_kv_heads, head_dim = k_pages.shape[2:]
    k_slots, v_slots = (pages.reshape(-1, n_kv_heads, head_dim) for pages in (k_pages, v_pages))
    out = out.reshape(len(out), n_kv_heads, -1, head_dim)
    q = q.reshape(len(q), n_kv_heads, -1, head_dim)
    for i, (begin, end, context) in enumerate(paged.rows):
        for at in range(begin, end, QUERIES):
            stop = min(at + QUERIES, end)
            position = context - (end - at)                     # of the block's first query
            oldest = 0 if window is None else max(0, position - window + 1)
            runs = paged.runs(i, oldest, context - (end - stop))
            _attend(q[at:stop], k_slots, v_slots, runs, position - oldest, scale, window, out[at:stop])


def _attend(q, k_slots, v_slots, runs, n_before, scale, window, out):
    """One block of consecutive queries against the keys in `runs`, [(first slot, n)]: the `n_before` keys that precede
    the first query, then the block's own. q, out [n, n_kv_heads, group, head_dim]."""
    n, n_kv_heads, group, head_dim = q.shape
    n_keys = n_before + n
    q = (q * np.float32(scale)).transpose(1, 2, 0, 3).reshape(n_kv_heads, group * n, head_dim)
    scores = np.empty((n_kv_heads, group * n, n_keys), np.float32)
    at = 0
    for slot, size in runs:
        k = k_slots[slot:slot + size]
        np.matmul(q, k.transpose(1, 2, 0), out=scores[:, :, at:at + size])
        at += size
    if n > 1:
        by_query = scores.reshape(n_kv_heads, group, n, n_keys)
        np.copyto(by_query[..., n_before + 1:], -np.inf, where=_later(n))
        if window is not None and n_keys > window:
            n_behind = n_keys - window                          # columns out of the last query's sight
            np.copyto(by_query[..., :n_behind], -np.inf, where=_behind(n, n_behind))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    mixed, at = 0, 0
    for slot, size in runs:
        v = v_slots[slot:slot + size]
        mixed += np.matmul(scores[:, :, at:at + size], v.transpose(1, 0, 2))
        at += size
    mixed /= total
    out[...] = mixed.reshape(n_kv_heads, group, n, head_dim).transpose(2, 0, 1, 3)


@lru_cache(maxsize=256)
def _later(n):
    """[n, n - 1] bool: column c is the key after query c, so row r may not see columns from r on."""
    return np.arange(n - 1) >= np.arange(n)[:, None]


@lru_cache(maxsize=256)
def _behind(n, n_behind):
    """[n, n_behind] bool: the last row sees none of the columns, each row before it one more from the right."""
    return np.arange(n_behind) < np.arange(n_behind - n + 1, n_behind + 1)[:, None]


def gated_gelu(gate_up, out):
    """out = gelu_tanh(gate) * up, gelu_tanh(z) = z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z³))).

    gate_up [n_tokens, 2 * intermediate], the gate first; out [n_tokens, intermediate].
    """
    width = out.shape[1]
    for at in range(0, len(out), ROWS):
        gate, up, y = gate_up[at:at + ROWS, :width], gate_up[at:at + ROWS, width:], out[at:at + ROWS]
        np.multiply(gate, gate, out=y)
        y *= np.float32(0.044715 * (2 / np.pi) ** 0.5)
        y += np.float32((2 / np.pi) ** 0.5)
        y *= gate
        np.tanh(y, out=y)
        y += np.float32(1)
        y *= gate
        y *= up
        y *= np.float32(0.5)


def logit_softcap(logits, cap):
    """logits = cap * tanh(logits / cap), in place."""
    logits /= np.float32(cap)
    np.tanh(logits, out=logits)
    logits *= np.float32(cap)
