"""Paged attention: decode, verify and prefill in one arithmetic (cuda/attention.cu)."""

from math import e, log2

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.paged import NO_LIMIT, geometry, scratch_size, split_keys
from engine.kernels.source import BF16, Kernel

ATTENTION = Kernel("attention.cu", "attention")
MULTIPLE, MOST_HEAD_DIM, MOST_GROUP = 4, 512, 16    # of head_dim, and query heads of a KV head

__all__ = ["attention", "scratch_size", "variants"]


def attention(q, k_pages, v_pages, paged, *, scale, out, scratch, window=None, chunk=None, softcap=None):
    """out[t, h] = softmax(scale * q[t, h]·K) V over the positions that token t sees, summed in float32; P and out round
    to bf16 once.

    q, out            [n_tokens, n_heads * head_dim] bf16; query head h reads KV head h // (n_heads / n_kv_heads)
    k_pages, v_pages  [n_pages, page_size, n_kv_heads, head_dim] bf16, head_dim a multiple of 4 up to 512
    paged             PagedInputs, planned for the same heads, window and chunk
    scratch           Scratch of at least scratch_size(); the counters are zero before and after
    window            positions a token sees, itself included; chunk: only those of its own chunk of so many positions
    softcap           c: scores become c * tanh(score / c)
    Raises ShapeError. Source: arXiv:2205.14135 (online softmax), 2311.01282 (splits), logits' cap: Gemma 2 report §2.
    """
    dims = match("attention", k_pages=(k_pages, "n_pages page_size n_kv_heads head_dim", BF16),
                 v_pages=(v_pages, "n_pages page_size n_kv_heads head_dim", BF16), q=(q, "n_tokens q_width", BF16),
                 out=(out, "n_tokens q_width", BF16))
    head_dim, n_kv_heads = dims.head_dim, dims.n_kv_heads
    n_heads = dims.q_width // head_dim
    if head_dim % MULTIPLE or head_dim > MOST_HEAD_DIM:
        raise ShapeError(f"attention: head_dim is {head_dim}, expected a multiple of {MULTIPLE} up to {MOST_HEAD_DIM}")
    if n_heads * head_dim != dims.q_width or n_heads % n_kv_heads or not 1 <= n_heads // n_kv_heads <= MOST_GROUP:
        raise ShapeError(f"attention: q is {dims.q_width} wide, expected 1 to {MOST_GROUP} times the "
                         f"{n_kv_heads * head_dim} of {n_kv_heads} KV heads of {head_dim}")
    if paged.page_size != dims.page_size:
        raise ShapeError(f"attention: planned for pages of {paged.page_size} positions, k_pages has {dims.page_size}")
    least = scratch_size(n_kv_heads, head_dim)
    if scratch.floats.size < least[0] or scratch.counters.size < least[1]:
        raise ShapeError(f"attention: scratch is {scratch.floats.size} floats and {scratch.counters.size} counters, "
                         f"expected at least {least[0]} and {least[1]}: see scratch_size()")
    factor = (scale * log2(e), 0.0) if softcap is None else (scale / softcap, softcap * log2(e))
    for is_decode, work, n_work, n_blocks in (
            (True, paged.decode_work, paged.n_decode_work, paged.n_decode_blocks),
            (False, paged.prefill_work, paged.n_prefill_work, paged.n_prefill_blocks)):
        shape = geometry(head_dim, is_decode)
        if n_blocks:
            ATTENTION(**shape.constants).launch(
                (n_blocks,), (shape.n_threads,),
                (q, k_pages, v_pages, paged.page_table, paged.page_begin, paged.context_lens, paged.cu_seqlens,
                 paged.first_visible, paged.last_visible, work, n_work, out, scratch.floats, scratch.counters, n_heads,
                 n_kv_heads, head_dim, dims.page_size, window or NO_LIMIT, chunk or NO_LIMIT,
                 split_keys(n_kv_heads, window, chunk), *factor),
                smem=shape.smem_bytes)


def variants(spec, max_tokens):
    """(Build, threads, dynamic shared memory bytes) of everything that `spec` makes attention launch."""
    head_dims = [layer.attention.head_dim for layer in spec.layers]
    if spec.media and hasattr(spec.media.tower, "head_dim"):
        head_dims.append(spec.media.tower.head_dim)
    for head_dim in dict.fromkeys(head_dims):
        for is_decode in (True, False):
            shape = geometry(head_dim, is_decode)
            yield ATTENTION(**shape.constants), shape.n_threads, shape.smem_bytes
