"""RMSNorm, and the seam between two half-blocks: residual add between two norms (cuda/rmsnorm.cu)."""

from typing import NamedTuple

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel

RMS_NORM, ADD_NORM = Kernel("rmsnorm.cu", "rms_norm"), Kernel("rmsnorm.cu", "add_norm")
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


def rms_norm(x, weight, eps, weight_offset, out):
    """out = x / sqrt(mean(x²) + eps) * (weight + weight_offset), summed in float32, rounded once.

    x       [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384
    weight  [hidden] bf16, or None to multiply by nothing
    out     like x, may be x
    Raises ShapeError. Source: arXiv:1910.07467; the offset, 1 for Gemma 3: HF modeling_gemma3, Gemma3RMSNorm.
    """
    dims = match("rms_norm", x=(x, "n_rows hidden", BF16), weight=(weight, "hidden", BF16),
                 out=(out, "n_rows hidden", BF16))
    _launch(RMS_NORM, dims, (x, weight, out), eps, weight_offset)


def add_norm(residual, branch, post_weight, next_weight, eps, weight_offset, layer_scalar, out):
    """residual = (residual + rms_norm(branch, post_weight)) * layer_scalar; out = rms_norm(residual, next_weight).

    residual, branch  [n_rows, hidden] bf16; hidden a multiple of 4, at most 16384. The residual is rounded once, and
                      what is stored is what is normed
    post_weight       [hidden] bf16, or None: the branch is added as it is
    next_weight       [hidden] bf16
    layer_scalar      [1] bf16, or None
    out               like the branch, may be the branch
    Raises ShapeError. Source: HF modeling_gemma3, Gemma3DecoderLayer; the scalar: HF modeling_gemma4.
    """
    dims = match("add_norm", residual=(residual, "n_rows hidden", BF16), branch=(branch, "n_rows hidden", BF16),
                 post_weight=(post_weight, "hidden", BF16), next_weight=(next_weight, "hidden", BF16),
                 layer_scalar=(layer_scalar, "1", BF16), out=(out, "n_rows hidden", BF16))
    _launch(ADD_NORM, dims, (residual, branch, post_weight, next_weight, layer_scalar, out), eps, weight_offset)


def _launch(kernel, dims, arrays, eps, weight_offset):
    hidden = dims.hidden
    if hidden % MULTIPLE or not 0 < hidden <= MOST_HIDDEN:
        raise ShapeError(f"{kernel.entry}: hidden is {hidden}, expected a multiple of {MULTIPLE} up to {MOST_HIDDEN}")
    width, chunks, n_threads = geometry(hidden)
    kernel(WIDTH=width, CHUNKS=chunks).launch((dims.n_rows,), (n_threads,), (*arrays, hidden, eps, weight_offset))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    width, chunks, n_threads = geometry(spec.hidden)
    for kernel in (RMS_NORM, ADD_NORM):
        yield kernel(WIDTH=width, CHUNKS=chunks), n_threads, 0
