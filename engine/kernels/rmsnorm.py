"""RMSNorm, the seam between two half-blocks, and the other chains of a row with a norm in it; LayerNorm
(cuda/rmsnorm.cu)."""

from typing import NamedTuple

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel
from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec

RMS_NORM, ADD_NORM, ADD_RESIDUAL, ADD_NORMS, ROUTER_NORM, MIX_PER_LAYER, LAYER_NORM = (
    Kernel("rmsnorm.cu", entry)
    for entry in ("rms_norm", "add_norm", "add_residual", "add_norms", "router_norm", "mix_per_layer", "layer_norm"))
MULTIPLE = 4                    # of every hidden: 8 bytes are the least that a thread reads at once
# bf16 values of a thread. Rows of up to 2048 are spread thin, for the latency of one token; wider ones keep blocks of
# moderate size, 224 threads for 5376, so that others load while one adds up.
NARROW, THIN, THICK = 2048, 8, {8: 24, 4: 32}       # by width: 8-byte accesses take more registers
MOST_HIDDEN = 16384             # for so many rmsnorm.cu has registers


class Geometry(NamedTuple):
    """width: values of one access; chunks: accesses of a thread; n_threads: of a block, which has one row."""

    width: int
    chunks: int
    n_threads: int


def geometry(hidden):
    """The Geometry for rows of `hidden`: of nothing else, as the order of the sums follows from it."""
    width = 8 if hidden % 8 == 0 else 4
    values = THIN if hidden <= NARROW else THICK[width]
    return Geometry(width, values // width, -(-hidden // (32 * values)) * 32)


def rms_norm(x, weight, eps, weight_offset, out, round_first=False):
    """out = x / sqrt(mean(x²) + eps) * (weight + weight_offset), summed in float32, rounded once.

    x            [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384
    weight       [hidden] bf16, or None to multiply by nothing
    out          like x, may be x
    round_first  rounds the normed x too, before the weight
    Raises ShapeError. Source: arXiv:1910.07467; the offset, 1 for Gemma 3: HF modeling_gemma3, Gemma3RMSNorm;
    round_first: HF modeling_llama4, Llama4TextRMSNorm.
    """
    dims = match("rms_norm", x=(x, "n_rows hidden", BF16), weight=(weight, "hidden", BF16),
                 out=(out, "n_rows hidden", BF16))
    _launch(RMS_NORM, dims, (x, weight, out), eps, weight_offset, round_first=round_first)


def add_norm(residual, branch, post_weight, next_weight, eps, weight_offset, layer_scalar, out, round_first=False):
    """residual = (residual + rms_norm(branch, post_weight)) * layer_scalar; out = rms_norm(residual, next_weight).

    residual, branch  [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384. The residual is rounded once, and
                      what is stored is what is normed
    post_weight       [hidden] bf16, or None: the branch is added as it is
    next_weight       [hidden] bf16; None, with out None: only the residual is computed
    layer_scalar      [1] bf16, or None
    out               like the branch, may be the branch
    round_first       as for rms_norm, of both norms
    Raises ShapeError. Source: HF modeling_gemma3, Gemma3DecoderLayer; the scalar: HF modeling_gemma4.
    """
    if (next_weight is None) != (out is None):
        raise ShapeError("add_norm: next_weight and out come together; one is None, the other is not")
    dims = match("add_norm", residual=(residual, "n_rows hidden", BF16), branch=(branch, "n_rows hidden", BF16),
                 post_weight=(post_weight, "hidden", BF16), next_weight=(next_weight, "hidden", BF16),
                 layer_scalar=(layer_scalar, "1", BF16), out=(out, "n_rows hidden", BF16))
    if out is None:
        arrays = residual, branch, post_weight, layer_scalar
        _launch(ADD_RESIDUAL, dims, arrays, eps, weight_offset, round_first=round_first)
        return
    arrays = residual, branch, post_weight, next_weight, layer_scalar, out
    _launch(ADD_NORM, dims, arrays, eps, weight_offset, round_first=round_first)


def add_norms(a, a_weight, b, b_weight, eps, weight_offset, out):
    """out = rms_norm(a, a_weight) + rms_norm(b, b_weight), computed in float32, rounded once.

    a, b                [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384
    a_weight, b_weight  [hidden] bf16
    out                 like a, may be a or b
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4TextDecoderLayer (which rounds each norm, then the sum).
    """
    dims = match("add_norms", a=(a, "n_rows hidden", BF16), a_weight=(a_weight, "hidden", BF16),
                 b=(b, "n_rows hidden", BF16), b_weight=(b_weight, "hidden", BF16), out=(out, "n_rows hidden", BF16))
    _launch(ADD_NORMS, dims, (a, a_weight, b, b_weight, out), eps, weight_offset)


def router_norm(x, scale, factor, eps, out):
    """out = x / sqrt(mean(x²) + eps) * scale * factor, rounded after each of the three steps.

    x       [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384
    scale   [hidden] bf16
    factor  float32: 1 / sqrt(hidden)
    out     like x, may be x
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4TextRouter, whose roundings decide between experts whose scores
    are close.
    """
    dims = match("router_norm", x=(x, "n_rows hidden", BF16), scale=(scale, "hidden", BF16),
                 out=(out, "n_rows hidden", BF16))
    _launch(ROUTER_NORM, dims, (x, scale, out), factor, eps)


def mix_per_layer(context, tokens, weight, factor, eps, out):
    """out = (rms_norm(context * factor, weight) + tokens) / sqrt(2), norms over each layer's part; rounded after the
    factor, the weight, the sum and the root.

    context, tokens  [n_tokens, n_layers * width] bf16
    weight           [width] bf16; a multiple of 4, at most 16384
    factor           float32: 1 / sqrt(hidden)
    out              like the context, may be the context or the tokens
    Raises ShapeError. Source: HF modeling_gemma4, project_per_layer_inputs.
    """
    dims = match("mix_per_layer", weight=(weight, "hidden", BF16), context=(context, "n_tokens widths", BF16),
                 tokens=(tokens, "n_tokens widths", BF16), out=(out, "n_tokens widths", BF16))
    if dims.hidden and dims.widths % dims.hidden:
        raise ShapeError(f"mix_per_layer: rows of context are {dims.widths} wide, expected a multiple of "
                         f"{dims.hidden}, the length of weight")
    dims.n_rows = dims.n_tokens * dims.widths // max(dims.hidden, 1)
    _launch(MIX_PER_LAYER, dims, (context, tokens, weight, out), factor, eps)


def layer_norm(x, weight, bias, eps, out):
    """out = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * weight + bias, summed in float32, rounded once.

    x             [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384
    weight, bias  [hidden] bf16
    out           like x, may be x
    Raises ShapeError. Source: arXiv:1607.06450.
    """
    dims = match("layer_norm", x=(x, "n_rows hidden", BF16), weight=(weight, "hidden", BF16),
                 bias=(bias, "hidden", BF16), out=(out, "n_rows hidden", BF16))
    _launch(LAYER_NORM, dims, (x, weight, bias, out), eps)


def _launch(kernel, dims, arrays, *numbers, round_first=False):
    hidden = dims.hidden
    if hidden % MULTIPLE or not 0 < hidden <= MOST_HIDDEN:
        raise ShapeError(f"{kernel.entry}: hidden is {hidden}, expected a multiple of {MULTIPLE} up to {MOST_HIDDEN}")
    build, n_threads = _build(kernel, hidden, round_first)
    build.launch((dims.n_rows,), (n_threads,), (*arrays, hidden, *numbers))


def _build(kernel, hidden, round_first=False):
    """(Build, threads of a block) for rows of `hidden`."""
    width, chunks, n_threads = geometry(hidden)
    return kernel(WIDTH=width, CHUNKS=chunks, ROUND_FIRST=int(round_first)), n_threads


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    for kernel in (RMS_NORM, ADD_NORM):
        yield *_build(kernel, spec.hidden, spec.norm_rounds_first), 0
    if any(layer.moe and layer.moe.routing == "softmax" for layer in spec.layers):
        for kernel in (ADD_NORMS, ROUTER_NORM):
            yield *_build(kernel, spec.hidden), 0
    if spec.per_layer_input:
        yield *_build(ADD_RESIDUAL, spec.hidden, spec.norm_rounds_first), 0
        yield *_build(MIX_PER_LAYER, spec.per_layer_input), 0
    if spec.media:
        for kernel, hidden in _of_tower(spec.media.tower):
            yield *_build(kernel, hidden), 0


def _of_tower(tower):
    """(kernel, width of a row) of all that a vision tower launches."""
    yield RMS_NORM, tower.hidden
    if isinstance(tower, Gemma4TowerSpec):
        yield from ((ADD_NORM, tower.hidden), (ADD_RESIDUAL, tower.hidden))
    else:
        yield LAYER_NORM, tower.hidden
    if isinstance(tower, BlockEmbedderSpec):
        yield LAYER_NORM, tower.patch_width
