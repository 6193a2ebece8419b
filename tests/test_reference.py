"""engine/reference.py, op by op, against the formula written plainly in float64.

The goldens hold all ops together on one geometry each; here each op meets odd sizes, scattered pages and the edges of
its blocks alone.
"""

import math

import numpy as np
import pytest

from engine import reference, reference_products
from engine.batch import PagedBatch
from engine.kv_cache import PageList
from engine.workspace import Scratch

EPS = 1e-6
ROUNDED_ONCE = 5e-7             # of the largest value: a few float32 roundings of 6e-8
SUMMED = 4e-6                   # sums of up to a few hundred products


def f32(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def close(got, expected, most):
    """Within `most` of the largest |expected| of the same row (last axis)."""
    assert got.dtype in (np.float32, np.float64) and got.shape == expected.shape
    error = np.abs(got - expected) / np.abs(expected).max(axis=-1, keepdims=True).clip(1e-30)
    assert error.max(initial=0) <= most, f"off by {error.max():.1e} of the row's largest value, {most:.0e} allowed"


def rms_norm_f64(x, weight, offset):
    x = x.astype(np.float64)
    normed = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    return normed if weight is None else normed * (weight.astype(np.float64) + offset)


# --- embedding, products

def test_embed_scales_rows():
    rng = np.random.default_rng(5)
    table, ids = f32(rng, 11, 6), np.array([10, 0, 3, 3], np.int32)
    out = np.empty((4, 6), np.float32)
    reference.embed(table, ids, 6**0.5, out)
    close(out, table[ids].astype(np.float64) * 6**0.5, ROUNDED_ONCE)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 4, 5, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("n_in, n_out", [(1, 1), (24, 40), (129, 7), (300, 1000)])
def test_linear_whatever_the_number_of_rows(n_tokens, n_in, n_out, monkeypatch):
    """Also where the weights do not fit the block of one go, and where `out` is the front of a larger buffer."""
    rng = np.random.default_rng([n_tokens, n_in])
    x, weight = f32(rng, n_tokens, n_in), f32(rng, n_out, n_in)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    monkeypatch.setattr(reference_products, "CACHED_FLOATS", 1000)
    out = np.full(n_tokens * n_out + 5, np.nan, np.float32)
    rows = out[:n_tokens * n_out].reshape(n_tokens, n_out)
    reference.linear(x, weight, rows)
    if n_tokens:
        assert np.abs(rows - expected).max() <= SUMMED * np.abs(expected).max()
    assert np.isnan(out[n_tokens * n_out:]).all()


@pytest.mark.parametrize("n_tokens", [0, 1, 3, 20, 50])
def test_linear_adds_a_residual(n_tokens):
    """Also where the sum replaces it."""
    rng = np.random.default_rng(n_tokens)
    x, weight, residual = f32(rng, n_tokens, 24), f32(rng, 40, 24), f32(rng, n_tokens, 40)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + residual
    out = np.empty_like(residual)
    reference.linear(x, weight, out, None, residual)
    close(out, expected, SUMMED)
    reference.linear(x, weight, residual, None, residual)
    np.testing.assert_array_equal(residual, out)


# --- activations

def gated(gate_up, activation="gelu_tanh", dtype=np.float32, scratch=None):
    """gated_linear of a product that is `gate_up` itself."""
    x = np.asarray(gate_up, dtype)
    out = np.empty((len(x), x.shape[1] // 2), dtype)
    reference.gated_linear(x, np.eye(x.shape[1], dtype=dtype), out, scratch, activation)
    return out


def test_gelu_is_the_tanh_approximation():
    """gelu_tanh(1) = 0.841192, where the exact one, with erf, has 0.841345."""
    values = {1.0: 0.841192, -1.0: -0.158808, 0.0: 0.0, 3.0: 2.996363, -10.0: 0.0, 10.0: 10.0}
    out = gated([[z, 2.0] for z in values])
    np.testing.assert_allclose(out[:, 0], [2 * y for y in values.values()], atol=2e-6)


@pytest.mark.parametrize("n_tokens", [1, 16, 33, 70])
def test_gated_gelu(n_tokens):
    rng = np.random.default_rng(n_tokens)
    gate_up = 3 * f32(rng, n_tokens, 2 * 9)
    z, up = gate_up[:, :9].astype(np.float64), gate_up[:, 9:].astype(np.float64)
    expected = z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) * up
    assert (np.abs(gated(gate_up) - expected) <= ROUNDED_ONCE * np.abs(z * up)).all()   # of the terms: 1 + tanh cancels


@pytest.mark.parametrize("dtype, most", [(np.float32, ROUNDED_ONCE), (np.float64, 1e-15)])
def test_gated_silu(dtype, most):
    """Relatively right however negative the gate, with no overflow on the way."""
    z = np.array([-1e4, -80.0, -30.0, -1.5, -1e-6, 0.0, 0.25, 40.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        out = gated(np.stack([z, np.full(len(z), -3.0)], axis=1), "silu", dtype)[:, 0]
    expected = [-3.0 * x * math.exp(min(x, 0.0)) / (1 + math.exp(-abs(x))) for x in z.astype(dtype).tolist()]
    assert (np.abs(out - expected) <= most * np.abs(expected)).all()


@pytest.mark.parametrize("n_tokens", [0, 1, 4, 33])
@pytest.mark.parametrize("n_floats", [None, 0, 2 * 33 * 40])
def test_gated_linear_multiplies_gate_and_up(n_tokens, n_floats):
    """Gate's rows come first in the weight; the product is held in scratch, which may be missing or too small."""
    rng = np.random.default_rng(n_tokens)
    x, weight = f32(rng, n_tokens, 24), f32(rng, 80, 24)
    scratch = n_floats if n_floats is None else Scratch(np.empty(n_floats, np.float32), np.zeros(0, np.int32))
    out = np.empty((n_tokens, 40), np.float32)
    reference.gated_linear(x, weight, out, scratch, "silu")
    z, up = (x.astype(np.float64) @ w.T.astype(np.float64) for w in (weight[:40], weight[40:]))
    close(out, z / (1 + np.exp(-z)) * up, SUMMED)


def test_logit_softcap():
    rng = np.random.default_rng(6)
    logits = 40 * f32(rng, 3, 50)
    expected = 30.0 * np.tanh(logits.astype(np.float64) / 30.0)
    reference.logit_softcap(logits, 30.0)
    close(logits, expected, ROUNDED_ONCE)
    assert np.abs(logits).max() <= 30


# --- attention

def attention_f64(q, k, v, n_before, scale, window, chunk=None, softcap=None, last_visible=None,
                  first_visible=None):
    """Of the last positions of one sequence; q [n, n_heads, head_dim], k and v [n_before + n, n_kv_heads, head_dim]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.empty(q.shape)
    for i in range(len(q)):
        begin, end = 0, n_before + i + 1
        if window is not None:
            begin = max(begin, end - window)
        if chunk is not None:
            begin = max(begin, (end - 1) // chunk * chunk)
        if first_visible is not None:
            begin = min(begin, first_visible[i])
        if last_visible is not None:
            end = last_visible[i] + 1
        for head in range(q.shape[1]):
            scores = k[begin:end, head // group] @ q[i, head] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v[begin:end, head // group] / weights.sum()
    return out.reshape(len(q), -1)


def run_attention(rng, rows, n_heads, n_kv_heads, head_dim, page_size, window, order="scattered", spread=1.0,
                  chunk=None, softcap=None, images=None, dtype=np.float32, is_whole=False):
    """rows [(positions cached before, new ones)]; returns (out, expected). Pages hold NaN where no position lies, and
    those that a sliding pool would have freed are not there. images {row: [(first, last)]}: positions that see later
    ones of these too, and with is_whole all of each other."""
    kept_from = [0 if window is None else max(0, n_before - 1 - window) // page_size for n_before, _ in rows]
    n_pages = [-(-(n_before + n) // page_size) - first for (n_before, n), first in zip(rows, kept_from, strict=True)]
    ids = np.arange(sum(n_pages) + 3)
    ids = {"scattered": rng.permutation(ids), "one run": ids, "backwards": ids[::-1]}[order].tolist()
    k_pages, v_pages = (np.full((len(ids), page_size, n_kv_heads, head_dim), np.nan, dtype) for _ in range(2))
    scale, lists, slots, flat_rows, qs, expected, lasts, firsts = head_dim**-0.5, [], [], [], [], [], [], []
    for i, ((n_before, n), first, n_held) in enumerate(zip(rows, kept_from, n_pages, strict=True)):
        pages, ids = ids[:n_held], ids[n_held:]
        q, k, v = (f32(rng, size, heads, head_dim) for size, heads in
                   ((n, n_heads), (n_before + n, n_kv_heads), (n_before + n, n_kv_heads)))
        q *= spread
        for position in range(first * page_size, n_before + n):
            at = pages[position // page_size - first], position % page_size
            k_pages[at], v_pages[at] = k[position], v[position]
        lists.append(PageList(pages, first))
        slots += [pages[p // page_size - first] * page_size + p % page_size for p in range(n_before, n_before + n)]
        flat_rows.append((sum(map(len, qs)), sum(map(len, qs)) + n, n_before + n))
        qs.append(q)
        last_seen, first_seen = np.arange(n_before, n_before + n, dtype=np.int32)[None].repeat(2, axis=0)
        for begin, last in (images or {}).get(i, ()):
            last_seen[begin - n_before:last + 1 - n_before] = last
            first_seen[begin - n_before:last + 1 - n_before] = begin
        lasts.append(last_seen)
        firsts.append(first_seen)
        expected.append(attention_f64(q, k, v, n_before, scale, window, chunk, softcap, last_seen,
                                      first_seen if is_whole else None))
    q = np.concatenate(qs).reshape(-1, n_heads * head_dim).astype(dtype)
    out = np.full(q.shape, np.nan, dtype)
    paged = PagedBatch(lists, np.array(slots, np.int32), flat_rows, page_size,
                       None if images is None else np.concatenate(lasts),
                       np.concatenate(firsts) if is_whole else None)
    reference.attention(q, k_pages, v_pages, paged, scale=scale, out=out, window=window, chunk=chunk, softcap=softcap)
    return out, np.concatenate(expected)


RAGGED = [(0, 1), (0, 5), (7, 1), (20, 1), (3, 9), (31, 2), (0, 1)]


@pytest.mark.parametrize("order", ["scattered", "one run", "backwards"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 17, 1000])
def test_attention_of_a_ragged_batch(window, page_size, order):
    """Prefill, chunks and decodes side by side; windows below a page, across pages, above every prompt."""
    rng = np.random.default_rng([page_size, window or 0])
    out, expected = run_attention(rng, RAGGED, 4, 2, 10, page_size, window, order)
    close(out, expected, SUMMED)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (2, 1), (3, 1), (8, 1), (8, 2), (8, 4), (8, 8), (5, 5)])
@pytest.mark.parametrize("head_dim", [1, 2, 7, 33])
def test_attention_heads(n_heads, n_kv_heads, head_dim):
    """Query head h reads KV head h // group, for groups of 1 to 8 and odd head sizes."""
    rng = np.random.default_rng([n_heads, n_kv_heads, head_dim])
    out, expected = run_attention(rng, RAGGED[2:5], n_heads, n_kv_heads, head_dim, 4, 6)
    close(out, expected, SUMMED)


@pytest.mark.parametrize("window", [None, 3, 40, 300])
@pytest.mark.parametrize("n_before, n", [(0, 200), (50, 129), (0, 64), (0, 65), (1, 63), (130, 1), (300, 2)])
def test_attention_over_several_query_blocks(n_before, n, window):
    rng = np.random.default_rng([n_before, n])
    out, expected = run_attention(rng, [(0, 3), (n_before, n)], 2, 1, 6, 16, window)
    close(out, expected, SUMMED)


def test_attention_of_sharp_scores():
    """Scores of several hundred neither overflow nor lose the largest."""
    rng = np.random.default_rng(8)
    out, expected = run_attention(rng, RAGGED, 4, 2, 16, 4, None, spread=200.0)
    assert np.isfinite(out).all()
    close(out, expected, 1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64, 1000])
@pytest.mark.parametrize("rows", [RAGGED, [(50, 129)], [(0, 200), (63, 1), (64, 1)]])
def test_attention_within_chunks(chunk, rows):
    """A token sees the keys of its own chunk only, wherever blocks of queries and steps begin."""
    rng = np.random.default_rng(chunk)
    out, expected = run_attention(rng, rows, 4, 2, 10, 3, None, chunk=chunk)
    close(out, expected, SUMMED)


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("window", [None, 4, 30])
@pytest.mark.parametrize("page_size", [1, 16])
def test_attention_over_images(window, page_size, is_whole):
    """Image tokens see their image, back to where a causal window ends or all of it; other tokens no later one. Images
    larger than the window, across blocks of queries, at both ends of a step, one token long."""
    rng = np.random.default_rng(page_size)
    rows = [(0, 12), (5, 130), (7, 1), (20, 30), (3, 1)]
    images = {0: [(0, 11)], 1: [(5, 9), (60, 99), (134, 134)], 3: [(22, 29), (40, 49)]}
    out, expected = run_attention(rng, rows, 4, 2, 10, page_size, window, images=images, is_whole=is_whole)
    close(out, expected, SUMMED)


def test_kept_tokens_see_what_they_saw():
    """PagedBatch.keep takes the last so many tokens of each row, and what these may see."""
    paged = PagedBatch([None] * 3, np.zeros(9, np.int32), [(0, 4, 10), (4, 6, 2), (6, 9, 3)], 16,
                       np.arange(9, dtype=np.int32))
    kept = paged.keep([(0, 1, 10), (1, 1, 2), (1, 3, 3)])
    np.testing.assert_array_equal(kept.last_visible, [3, 7, 8])


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_attention_with_a_softcap(softcap):
    rng = np.random.default_rng(10)
    out, expected = run_attention(rng, RAGGED, 4, 2, 10, 4, 5, spread=4.0, softcap=softcap)
    close(out, expected, SUMMED)


def test_attention_in_float64():
    """The twin of kernels is exact to its last bits: nothing in it is rounded to float32."""
    rng = np.random.default_rng(11)
    out, expected = run_attention(rng, RAGGED, 4, 2, 10, 4, 5, dtype=np.float64)
    close(out, expected, 1e-14)
