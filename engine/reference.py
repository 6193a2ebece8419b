"""The op table in NumPy float32: what each kernel means, exactly, and the `cpu` lane that runs where there is no GPU.

Every op writes into arrays it is given. Long elementwise chains run over blocks of rows that stay in cache.
"""

from functools import lru_cache

import numpy as np

ROWS = 32           # rows of an elementwise chain that share the L2 cache
QUERIES = 64        # queries of one attention block: bounds the score matrix
# linear(): where each way was the fastest with OpenBLAS on [65536, 640] and [4096, 640] weights; at 8 rows the weights
# on the left took 0.57 to 0.78 of the plain product's time, at 2 rows the cached blocks 0.2 to 0.4.
FEW_ROWS, SOME_ROWS = 4, 32
CACHED_FLOATS = 2**18       # 1 MiB of weights
SQRT_2_OVER_PI = (2 / np.pi) ** 0.5


def embed(table, token_ids, scale, out):
    """out[t] = table[token_ids[t]] * scale. table [vocab, hidden], token_ids [n] int32, out [n, hidden]."""
    np.multiply(table[token_ids], scale, out=out)


def select_rows(x, rows, out):
    """out[i] = x[rows[i]]; returns out. x [n, ...], rows [n_kept] int32, out [n_kept, ...]."""
    return np.take(x, rows, axis=0, out=out)


def linear(x, weight, out):
    """out = x @ weight.T. x [n, in], weight [out, in], out [n, out].

    A few rows are bound by reading the weights, and a BLAS matrix product copies them first: so up to FEW_ROWS rows go
    one by one against blocks of the weights that stay in cache, and up to SOME_ROWS the weights stand on the left.
    """
    n = len(x)
    if 1 < n <= FEW_ROWS:
        step = max(1, CACHED_FLOATS // weight.shape[1])
        for at in range(0, len(weight), step):
            block, to = weight[at:at + step], out[:, at:at + step]
            for i in range(n):
                np.matmul(block, x[i], out=to[i])
    elif 1 < n <= SOME_ROWS:
        out[...] = np.matmul(weight, x.T).T
    else:
        np.matmul(x, weight.T, out=out)


def rms_norm(x, weight, eps, weight_offset, out):
    """out = x / sqrt(mean(x²) + eps) * (weight + weight_offset), over the last axis; weight None multiplies by nothing.

    x [..., n], weight [n], out like x, may be x. Source: arXiv:1910.07467; the offset: HF modeling_gemma3.
    """
    mean_square = _sum_of_squares(x)
    mean_square *= 1 / x.shape[-1]
    mean_square += eps
    np.sqrt(mean_square, out=mean_square)
    np.divide(x, mean_square[..., None], out=out)
    if weight is not None:
        out *= weight + weight_offset if weight_offset else weight


def _sum_of_squares(x):
    """Over the last axis. NumPy has a ufunc for it since 2.0."""
    return np.vecdot(x, x) if hasattr(np, "vecdot") else np.einsum("...i,...i->...", x, x)


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
    n_pairs = angles[0].shape[-1]
    k_slots, v_slots = (pages.reshape(-1, n_kv_heads, head_dim) for pages in (k_pages, v_pages))
    heads = qkv.reshape(len(qkv), -1, head_dim)
    if weight_offset:
        q_norm, k_norm = q_norm + weight_offset, k_norm + weight_offset
    for at in range(0, len(qkv), ROWS):
        rows = slice(at, at + ROWS)
        qk, k = heads[rows, :n_heads + n_kv_heads], heads[rows, n_heads:n_heads + n_kv_heads]
        v = k if v_is_k else heads[rows, n_heads + n_kv_heads:]
        if v_norm:
            normed = np.empty(v.shape, np.float32)
            rms_norm(v, None, eps, 0.0, normed)
            v = normed
        v_slots[slots[rows]] = v
        rms_norm(qk, None, eps, 0.0, qk)
        heads[rows, :n_heads] *= q_norm
        k *= k_norm
        cos, sin = angles[0][rows], angles[1][rows]
        first, second = qk[..., :n_pairs], qk[..., head_dim // 2:head_dim // 2 + n_pairs]
        crossed = first * sin
        first *= cos
        first -= second * sin
        second *= cos
        second += crossed
        k_slots[slots[rows]] = k
    return heads[:, :n_heads]


def attention(q, k_pages, v_pages, paged, *, scale, window, out):
    """softmax(scale * q·k) · v of each token over the earlier positions of its sequence, itself included, read through
    the page table; with a window, over the last `window` of them.

    q         [n_tokens, n_heads, head_dim]
    k_pages, v_pages  [n_pages, page_size, n_kv_heads, head_dim]
    paged     PagedBatch: page tables, query offsets and context lengths
    out       [n_tokens, n_heads * head_dim]
    """
    n_kv_heads, head_dim = k_pages.shape[2:]
    k_slots, v_slots = k_pages.reshape(-1, n_kv_heads, head_dim), v_pages.reshape(-1, n_kv_heads, head_dim)
    out = out.reshape(len(q), n_kv_heads, q.shape[1] // n_kv_heads, head_dim)
    q = (q * scale).reshape(out.shape)
    for i, (begin, end, context) in enumerate(paged.rows):
        for at in range(begin, end, QUERIES):
            stop = min(at + QUERIES, end)
            position = context - (end - at)                     # of the block's first query
            oldest = 0 if window is None else max(0, position - window + 1)
            runs = paged.runs(i, oldest, context - (end - stop))
            out[at:stop] = _attend(q[at:stop], k_slots, v_slots, runs, position - oldest, window)


def _attend(q, k_slots, v_slots, runs, n_before, window):
    """One block of consecutive queries against the keys in `runs`, [(first slot, n)]: the `n_before` keys that precede
    the first query, then the block's own. q and the result [n, n_kv_heads, group, head_dim]."""
    n, n_kv_heads, group, head_dim = q.shape
    q = q.transpose(1, 2, 0, 3).reshape(n_kv_heads, group * n, head_dim)
    scores = [np.matmul(q, k_slots[slot:slot + size].transpose(1, 2, 0)) for slot, size in runs]
    scores = scores[0] if len(scores) == 1 else np.concatenate(scores, axis=-1)
    if n > 1:
        _hide(scores.reshape(n_kv_heads, group, n, n_before + n), n_before, window)
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = np.matmul(scores, _ones(n_before + n))              # BLAS adds up rows faster than sum() does
    mixed, at = None, 0
    for slot, size in runs:
        part = np.matmul(scores[..., at:at + size], v_slots[slot:slot + size].transpose(1, 0, 2))
        mixed = part if mixed is None else mixed + part
        at += size
    mixed /= total
    return mixed.reshape(n_kv_heads, group, n, head_dim).transpose(2, 0, 1, 3)


def _hide(scores, n_before, window):
    """Sets to -inf what a query may not see: keys later than itself, and keys its window has passed.
    scores [n_kv_heads, group, n, n_before + n]."""
    n, n_keys = scores.shape[2:]
    np.copyto(scores[..., n_before + 1:], -np.inf, where=_later(n))
    if window is not None and n_keys > window:
        n_behind = n_keys - window                              # columns out of the last query's sight
        np.copyto(scores[..., :n_behind], -np.inf, where=_behind(n, n_behind))


@lru_cache(maxsize=256)
def _later(n):
    """[n, n - 1] bool: column c is the key after query c, so row r may not see columns from r on."""
    return np.arange(n - 1) >= np.arange(n)[:, None]


@lru_cache(maxsize=256)
def _behind(n, n_behind):
    """[n, n_behind] bool: the last row sees none of the columns, each row before it one more from the right."""
    return np.arange(n_behind) < np.arange(n_behind - n + 1, n_behind + 1)[:, None]


@lru_cache(maxsize=256)
def _ones(n):
    return np.ones((n, 1), np.float32)


def gated_gelu(gate_up, out):
    """out = gelu_tanh(gate) * up, gelu_tanh(z) = z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z³))).

    gate_up [n_tokens, 2 * intermediate], the gate first; out [n_tokens, intermediate].
    """
    width = out.shape[1]
    for at in range(0, len(out), ROWS):
        gate, up, y = gate_up[at:at + ROWS, :width], gate_up[at:at + ROWS, width:], out[at:at + ROWS]
        np.multiply(gate, gate, out=y)
        y *= 0.044715 * SQRT_2_OVER_PI
        y += SQRT_2_OVER_PI
        y *= gate
        np.tanh(y, out=y)
        y += 1
        y *= gate
        y *= up
        y *= 0.5


def logit_softcap(logits, cap):
    """logits = cap * tanh(logits / cap), in place."""
    logits /= cap
    np.tanh(logits, out=logits)
    logits *= cap
