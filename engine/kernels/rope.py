"""Rotary embedding, fused with the norms of q, k and v and the write to the KV cache; the temperature of queries
(cuda/rope.cu)."""

from typing import NamedTuple

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel
from engine.models.vision_spec import Gemma4TowerSpec, SiglipSpec

ROPE_ANGLES, ATTENTION_TEMPERATURE, QK_NORM_ROPE_CACHE = (
    Kernel("rope.cu", entry) for entry in ("rope_angles", "attention_temperature", "qk_norm_rope_cache"))
ANGLE_THREADS = 256
ANY = {"WIDTH": 4, "CHUNKS": 1, "VARIED": 0}    # of rope.cu, for the kernels that need none of them
THREADS = 128
MULTIPLE, MOST_HEAD_DIM = 4, 512
QK_NORMS = ("weighted", "plain", None)
ENOUGH_BLOCKS = 132 * 16        # fill an H200; a token's heads share a block from that many tokens on


class Geometry(NamedTuple):
    """width: bf16 of one access; chunks: accesses of a lane in each half of a head; n_lanes: that have a head."""

    width: int
    chunks: int
    n_lanes: int


def geometry(head_dim):
    """The Geometry of a head: of nothing else, as the order of its sum follows from it."""
    half = head_dim // 2
    width, chunks = (2, 4) if half % 4 else (4, 1 if half <= 128 else 2)
    n_lanes = 1
    while width * chunks * n_lanes < half:
        n_lanes *= 2
    return Geometry(width, chunks, n_lanes)


def rope_angles(positions, inv_freq, out):
    """out[t] = cos, sin of positions[t] * inv_freq, a product that is rounded to float32; within 1.5e-7.

    positions  [n_tokens] int32, below 2**24; or [n_tokens, 2]: the first half of the pairs turns by column 0, the
               second by column 1
    inv_freq   [n_pairs] float32
    out        [n_tokens, 2, n_pairs] float32
    Raises ShapeError. Source: arXiv:2104.09864; two columns: HF modeling_gemma4, Gemma4VisionRotaryEmbedding.
    """
    n_axes = positions.ndim
    dims = match("rope_angles", positions=(positions, "n_tokens 2" if n_axes == 2 else "n_tokens", "int32"),
                 inv_freq=(inv_freq, "n_pairs", "float32"), out=(out, "n_tokens 2 n_pairs", "float32"))
    if dims.n_pairs % n_axes:
        raise ShapeError(f"rope_angles: {dims.n_pairs} pairs turn by two columns of positions, expected an even number")
    n_threads = min(ANGLE_THREADS, -(-dims.n_pairs // 32) * 32)
    n_parts = -(-dims.n_pairs // ANGLE_THREADS)
    ROPE_ANGLES(**ANY).launch((dims.n_tokens, n_parts), (n_threads,),
                              (positions, inv_freq, out, dims.n_pairs, n_axes))


def attention_temperature(positions, scale, floor, out):
    """out[t] = 1 + scale * ln(1 + floor((positions[t] + 1) / floor)), within 1e-7 of itself.

    positions  [n_tokens] int32
    scale      float32
    floor      int above 0
    out        [n_tokens] float32
    Raises ShapeError. Source: HF modeling_llama4, Llama4TextAttention.
    """
    dims = match("attention_temperature", positions=(positions, "n_tokens", "int32"), out=(out, "n_tokens", "float32"))
    if floor < 1:
        raise ShapeError(f"attention_temperature: floor is {floor}, expected an int above 0")
    n_threads = min(ANGLE_THREADS, -(-dims.n_tokens // 32) * 32)
    ATTENTION_TEMPERATURE(**ANY).launch((-(-dims.n_tokens // ANGLE_THREADS),), (n_threads,),
                                        (positions, out, dims.n_tokens, scale, floor))


def qk_norm_rope_cache(qkv, q_norm, k_norm, angles, slots, k_pages, v_pages, *, n_heads, v_norm, v_is_k, eps,
                       weight_offset, interleaved=False, qk_norm="weighted", temperature=None, out):
    """Per-head RMSNorm of q and k, RoPE on both, v normalised without a weight if v_norm; q goes to out, k and v go
    into their pages. Computed in float32, rounded once.

    qkv             [n_tokens, (n_heads + n_kv_heads * (1 if v_is_k else 2)) * head_dim] bf16; head_dim a multiple of 4,
                    at most 512
    q_norm, k_norm  [head_dim] bf16, or None to multiply by nothing
    angles          [n_tokens, 2, n_pairs] float32 from rope_angles, for the first n_pairs of the pairs
                    (j, j + head_dim/2), or of the pairs (2j, 2j + 1) if interleaved; None rotates nothing
    slots           [n_tokens] int32: page * page_size + offset, where each token's k and v go; -1 is nowhere
    k_pages, v_pages [n_pages, page_size, n_kv_heads, head_dim] bf16; None, as slots, where qkv is q alone
    qk_norm         "weighted": q and k are normed before RoPE, times the weights; "plain": after RoPE (the same as
                    before it), q_norm and k_norm are not read; None: not at all
    temperature     [n_tokens] float32 multiplies q, last, or None
    out             [n_tokens, n_heads * head_dim] bf16
    Raises ShapeError. Source: HF modeling_gemma3, Gemma3Attention; v_norm, v_is_k: HF modeling_gemma4; plain norms,
    temperature: HF modeling_llama4, Llama4TextAttention.
    """
    op = "qk_norm_rope_cache"
    n_kv_heads, head_dim = _heads(op, slots, k_pages, v_pages, out, n_heads)
    if qk_norm not in QK_NORMS:
        raise ShapeError(f"{op}: qk_norm is {qk_norm!r}, expected one of {', '.join(map(repr, QK_NORMS))}")
    if qk_norm != "weighted":
        q_norm = k_norm = None
    if head_dim % MULTIPLE or not 0 < head_dim <= MOST_HEAD_DIM:
        raise ShapeError(f"{op}: head_dim is {head_dim}, expected a multiple of {MULTIPLE} up to {MOST_HEAD_DIM}")
    n_in = n_heads + n_kv_heads * (1 if v_is_k else 2)
    dims = match(op, dims={"head_dim": head_dim, "qkv_width": n_in * head_dim, "q_width": n_heads * head_dim},
                 qkv=(qkv, "n_tokens qkv_width", BF16), q_norm=(q_norm, "head_dim", BF16),
                 k_norm=(k_norm, "head_dim", BF16), angles=(angles, "n_tokens 2 n_pairs", "float32"),
                 slots=(slots, "n_tokens", "int32"), temperature=(temperature, "n_tokens", "float32"),
                 out=(out, "n_tokens q_width", BF16))
    n_pairs = 0 if angles is None else dims.n_pairs
    if n_pairs > head_dim // 2:
        raise ShapeError(f"{op}: angles are of {n_pairs} pairs, head_dim {head_dim} has {head_dim // 2}")
    if not dims.n_tokens:
        return
    n_lanes = geometry(head_dim).n_lanes
    n_groups = -(-n_in * n_lanes // THREADS)
    _build(head_dim, qk_norm, angles, temperature).launch(
        (dims.n_tokens, min(n_groups, -(-ENOUGH_BLOCKS // dims.n_tokens))), (THREADS,),
        (qkv, q_norm, k_norm, angles, slots, temperature, k_pages, v_pages, out, n_heads, n_kv_heads, head_dim, n_pairs,
         n_lanes, qk_norm is not None, v_norm, v_is_k, interleaved, eps, weight_offset))


def _build(head_dim, qk_norm, rotation, temperature):
    """The Build for heads of a size that are normed and rotated or not; rotation, temperature: None or anything."""
    width, chunks, _ = geometry(head_dim)
    is_varied = qk_norm is None or rotation is None or temperature is not None
    return QK_NORM_ROPE_CACHE(WIDTH=width, CHUNKS=chunks, VARIED=int(is_varied))


def _heads(op, slots, k_pages, v_pages, out, n_heads):
    """(n_kv_heads, head_dim), of the pages where there are some."""
    if k_pages is None and v_pages is None and slots is None:
        return 0, match(op, out=(out, "n_tokens q_width", BF16)).q_width // n_heads
    if k_pages is None or v_pages is None or slots is None:
        raise ShapeError(f"{op}: slots, k_pages and v_pages come together, or none of them where qkv is q alone")
    pages = match(op, k_pages=(k_pages, "n_pages page_size n_kv_heads head_dim", BF16),
                  v_pages=(v_pages, "n_pages page_size n_kv_heads head_dim", BF16))
    return pages.n_kv_heads, pages.head_dim


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    yield ROPE_ANGLES(**ANY), ANGLE_THREADS, 0
    if any(layer.attention.temperature for layer in spec.layers):
        yield ATTENTION_TEMPERATURE(**ANY), ANGLE_THREADS, 0
    attentions = dict.fromkeys(layer.attention for layer in spec.layers)
    heads = [(a.head_dim, a.qk_norm, a.rope, a.temperature) for a in attentions]
    if spec.media and isinstance(spec.media.tower, Gemma4TowerSpec):
        heads.append((spec.media.tower.head_dim, "weighted", spec.media.tower.rope_theta, None))
    if spec.media and isinstance(spec.media.tower, SiglipSpec):
        heads.append((spec.media.tower.head_dim, None, None, None))
    for build in dict.fromkeys(_build(*of) for of in heads):
        yield build, THREADS, 0
