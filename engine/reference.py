"""The op table in NumPy: what each kernel means, exactly, and the `cpu` lane that runs where there is no GPU.

Every op writes into arrays it is given, and computes in their dtype: float32 on the cpu lane, float64 where a test asks
what a kernel should have found. Long elementwise chains run over blocks of rows that stay in cache. `scratch` is a
Scratch of engine/workspace.py, or None.
"""

from functools import lru_cache

import numpy as np

from engine import sampler
from engine.sampler import apply_edits  # noqa: F401  part of the op table, in place as it stands

ROWS = 32           # rows of an elementwise chain that share the L2 cache
QUERIES = 64        # queries of one attention block: bounds the score matrix
# linear(): where each way was the fastest with OpenBLAS on [65536, 640] and [4096, 640] weights; at 8 rows the weights
# on the left took 0.57 to 0.78 of the plain product's time, at 2 rows the cached blocks 0.2 to 0.4.
FEW_ROWS, SOME_ROWS = 4, 32
CACHED_FLOATS = 2**18       # 1 MiB of weights
SQRT_2_OVER_PI = (2 / np.pi) ** 0.5


def scratch_size(spec, max_tokens, max_logit_rows):
    """(floats, counters) that the ops of a ModelSpec want: room for gate and up of gated_linear."""
    return max_tokens * 2 * max(layer.mlp.intermediate for layer in spec.layers), 0


# --- embedding

def embed(table, token_ids, scale, out):
    """out[t] = table[token_ids[t]] * scale. table [vocab, hidden], token_ids [n] int32, out [n, hidden]."""
    np.multiply(table[token_ids], scale, out=out)


def select_rows(x, rows, out):
    """out[i] = x[rows[i]]; returns out. x [n, ...], rows [n_kept] int32, out [n_kept, ...]."""
    return np.take(x, rows, axis=0, out=out)


# --- matrix products

def linear(x, weight, out, scratch=None, residual=None):
    """out = x @ weight.T, + residual where there is one. x [n, in], weight [out, in], out and residual [n, out], which
    may be one array."""
    if residual is None:
        _product(x, weight, out)
    else:
        product = np.empty_like(out)
        _product(x, weight, product)
        np.add(product, residual, out=out)


def _product(x, weight, out):
    """A few rows are bound by reading the weights, and a BLAS matrix product copies them first: so up to FEW_ROWS rows
    go one by one against blocks of the weights that stay in cache, and up to SOME_ROWS the weights stand on the
    left."""
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


def gated_linear(x, weight, out, scratch=None, activation="gelu_tanh"):
    """out = activation(x @ gate.T) * (x @ up.T). x [n, in], weight [2 * intermediate, in]: gate's rows, then up's;
    out [n, intermediate].

    activation  gelu_tanh(z) = z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z³))), or silu(z) = z / (1 + e^-z)
    """
    n, width = out.shape
    size = 2 * n * width
    fits = scratch is not None and len(scratch.floats) >= size and scratch.floats.dtype == out.dtype
    gate_up = (scratch.floats[:size] if fits else np.empty(size, out.dtype)).reshape(n, 2 * width)
    _product(x, weight, gate_up)
    activate = ACTIVATIONS[activation]
    for at in range(0, n, ROWS):
        gate, up, y = gate_up[at:at + ROWS, :width], gate_up[at:at + ROWS, width:], out[at:at + ROWS]
        activate(gate, y)
        y *= up


def _gelu_tanh(z, out):
    np.multiply(z, z, out=out)
    out *= 0.044715 * SQRT_2_OVER_PI
    out += SQRT_2_OVER_PI
    out *= z
    np.tanh(out, out=out)
    out += 1
    out *= z
    out *= 0.5


def _silu(z, out):
    """z / (1 + e^-z) = min(1, e^z) * z / (1 + e^-|z|): no power overflows, no difference cancels."""
    np.abs(z, out=out)
    np.negative(out, out=out)
    np.exp(out, out=out)
    out += 1
    np.divide(z, out, out=out)
    out *= np.exp(np.minimum(z, 0))


ACTIVATIONS = {"gelu_tanh": _gelu_tanh, "silu": _silu}


# --- norms

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

    The seam between two half-blocks. residual, branch, out [n_tokens, hidden]; out may be the branch.
    post_weight   None adds the branch as it is
    layer_scalar  [1] or None
    """
    if post_weight is not None:
        rms_norm(branch, post_weight, eps, weight_offset, out)
        branch = out
    residual += branch
    if layer_scalar is not None:
        residual *= layer_scalar
    rms_norm(residual, next_weight, eps, weight_offset, out)


# --- q, k and v

def rope_angles(positions, inv_freq, out):
    """out[t] = cos, sin of positions[t] * inv_freq, a product that is rounded to float32.

    positions [n_tokens] int32, inv_freq [n_pairs] float32, out [n_tokens, 2, n_pairs].
    """
    angles = positions.astype(np.float32)[:, None] * inv_freq
    np.cos(angles, out=out[:, 0], dtype=out.dtype)
    np.sin(angles, out=out[:, 1], dtype=out.dtype)


def qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, k_pages, v_pages, *, n_heads, v_norm, v_is_k, eps,
                       weight_offset, interleaved=False, out):
    """Per-head RMSNorm of q and k, RoPE on both, v normalised without a weight if v_norm; q goes to out, k and v go
    into their pages.

    qkv             [n_tokens, (n_heads + n_kv_heads * (1 if v_is_k else 2)) * head_dim]
    q_norm, k_norm  [head_dim], or None to multiply by nothing
    angles          [n_tokens, 2, n_pairs] from rope_angles, for the first n_pairs of the pairs (j, j + head_dim/2), or
                    of the pairs (2j, 2j + 1) if interleaved
    slots           [n_tokens] int32: page * page_size + offset, where each token's k and v go; -1 is nowhere
    k_pages, v_pages [n_pages, page_size, n_kv_heads, head_dim]
    out             [n_tokens, n_heads * head_dim]
    """
    n_kv_heads, head_dim = k_pages.shape[2:]
    n_qk, n_pairs = n_heads + n_kv_heads, angles.shape[-1]
    k_slots, v_slots = (pages.reshape(-1, n_kv_heads, head_dim) for pages in (k_pages, v_pages))
    heads, q_out = qkv.reshape(len(qkv), -1, head_dim), out.reshape(len(qkv), n_heads, head_dim)
    firsts, seconds = slice(n_pairs), slice(head_dim // 2, head_dim // 2 + n_pairs)
    if interleaved:
        firsts, seconds = slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    if weight_offset:
        q_norm, k_norm = (w if w is None else w + weight_offset for w in (q_norm, k_norm))
    for at in range(0, len(qkv), ROWS):
        rows = slice(at, at + ROWS)
        source, to = heads[rows], slots[rows]
        v = source[:, n_heads:n_qk] if v_is_k else source[:, n_qk:]
        if v_norm:
            normed = np.empty(v.shape, v.dtype)
            rms_norm(v, None, eps, 0.0, normed)
            v = normed
        qk = np.empty((len(source), n_qk, head_dim), qkv.dtype)
        rms_norm(source[:, :n_qk], None, eps, 0.0, qk)
        q, k = qk[:, :n_heads], qk[:, n_heads:]
        if q_norm is not None:
            q *= q_norm
        if k_norm is not None:
            k *= k_norm
        cos, sin = angles[rows, :1], angles[rows, 1:]           # [n, 1, n_pairs]
        first, second = qk[..., firsts], qk[..., seconds]
        crossed = first * sin
        first *= cos
        first -= second * sin
        second *= cos
        second += crossed
        q_out[rows] = q
        if np.minimum.reduce(to) < 0:
            k, v, to = k[to >= 0], v[to >= 0], to[to >= 0]
        k_slots[to] = k
        v_slots[to] = v


# --- attention

def attention(q, k_pages, v_pages, paged, *, scale, out, scratch=None, window=None, chunk=None, softcap=None):
    """softmax(scale * q·k) · v of each token over positions of its own sequence, read through the page table.

    q, out    [n_tokens, n_heads * head_dim]
    k_pages, v_pages  [n_pages, page_size, n_kv_heads, head_dim]
    paged     PagedBatch: page tables, query offsets, context lengths; last_visible where a token sees later ones
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
            newest = context - (end - stop) - 1 if last is None else int(last.max())
            hidden = _hidden(stop - at, position, oldest, newest, window, last)
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


def _hidden(n, position, oldest, newest, window, last_visible):
    """[(first key, bool [n, some keys])]: which of the keys oldest..newest the queries at position, position + 1, ...
    may not see, because they are later than what the query may see, or because its window has passed them."""
    if last_visible is not None:
        keys, queries = np.arange(oldest, newest + 1), np.arange(position, position + n)[:, None]
        where = keys > last_visible[:, None]
        return [(0, where if window is None else where | (keys <= queries - window))]
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
