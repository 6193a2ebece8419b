"""Elementwise ops (cuda/activation.cu). Activations of a decoder's MLP are part of its products, in gemm.cu."""

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel

LOGIT_SOFTCAP, GATE_PER_LAYER, CLAMP, ADD_BIAS = (
    Kernel("activation.cu", entry) for entry in ("logit_softcap", "gate_per_layer", "clamp", "add_bias"))
THREADS = 256
MULTIPLE = 4                    # of every width


def _grid(n, *multiples):
    """Blocks for n values in accesses of 16 bytes, or of 8 where a row's width or place is no multiple of 16."""
    per_thread = 8 if all(size % 8 == 0 for size in multiples) else 4
    return (-(-n // (per_thread * THREADS)),)


def _check_multiple(op, dims):
    if dims.width % MULTIPLE or not dims.width:
        raise ShapeError(f"{op}: width is {dims.width}, expected a multiple of {MULTIPLE}")


def logit_softcap(logits, cap):
    """logits = cap * tanh(logits / cap), in place.

    logits  [n_rows, vocab] float32
    cap     float32 above 0
    Raises ShapeError. Source: HF modeling_gemma2, final_logit_softcapping.
    """
    dims = match("logit_softcap", logits=(logits, "n_rows vocab", "float32"))
    n = dims.n_rows * dims.vocab
    LOGIT_SOFTCAP(THREADS=THREADS).launch((-(-n // (4 * THREADS)),), (THREADS,), (logits, n, cap))


def gate_per_layer(gate, inputs, layer, out):
    """out = gelu_tanh(gate) * inputs[:, layer * width:(layer + 1) * width], rounded once.

    gate    [n_tokens, width] bf16; width a multiple of 4
    inputs  [n_tokens, n_layers * width] bf16
    layer   number of the layer
    out     like the gate, may be the gate
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4TextDecoderLayer (which rounds after the activation too).
    """
    dims = match("gate_per_layer", gate=(gate, "n_tokens width", BF16), inputs=(inputs, "n_tokens widths", BF16),
                 out=(out, "n_tokens width", BF16))
    _check_multiple("gate_per_layer", dims)
    if dims.widths % dims.width or not 0 <= layer < dims.widths // dims.width:
        raise ShapeError(f"gate_per_layer: layer {layer} of inputs {dims.widths} wide, expected {dims.width} for each "
                         "layer")
    GATE_PER_LAYER(THREADS=THREADS).launch(
        _grid(dims.n_tokens * dims.width, dims.width), (THREADS,),
        (gate, inputs, out, dims.n_tokens, dims.width, dims.widths, layer * dims.width))


def clamp(x, bounds, out, first=0):
    """out[:, first:first + width] = min(max(x, bounds[0]), bounds[1]); NaN stays, other columns of out stay.

    x       [n, width] bf16; width a multiple of 4
    bounds  [2] bf16, the least value and the most
    out     [n, at least first + width] bf16, rows of a multiple of 4, as first; may be x
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4ClippableLinear.
    """
    dims = match("clamp", x=(x, "n width", BF16), bounds=(bounds, "2", BF16), out=(out, "n n_columns", BF16))
    _check_multiple("clamp", dims)
    if dims.n_columns % MULTIPLE or first % MULTIPLE or not 0 <= first <= dims.n_columns - dims.width:
        raise ShapeError(f"clamp: columns from {first} on of {dims.n_columns}, expected multiples of {MULTIPLE} that "
                         f"leave {dims.width} columns")
    CLAMP(THREADS=THREADS).launch(_grid(dims.n * dims.width, dims.width, dims.n_columns, first), (THREADS,),
                                  (x, bounds, out, dims.n, dims.width, dims.n_columns, first))


def add_bias(x, bias, out, activation=None, residual=None):
    """out = activation(x + bias) + residual, computed in float32, rounded once.

    x           [n, width] bf16; width a multiple of 4
    bias        [width] bf16
    out         like x, may be x or the residual
    activation  None or "gelu_tanh"
    residual    like x, or None
    Raises ShapeError. Source: HF modeling_siglip, SiglipMLP (which rounds after the activation too).
    """
    dims = match("add_bias", x=(x, "n width", BF16), bias=(bias, "width", BF16), residual=(residual, "n width", BF16),
                 out=(out, "n width", BF16))
    _check_multiple("add_bias", dims)
    if activation not in (None, "gelu_tanh"):
        raise ShapeError(f"add_bias: activation is {activation!r}, expected None or 'gelu_tanh'")
    ADD_BIAS(THREADS=THREADS).launch(_grid(dims.n * dims.width, dims.width), (THREADS,),
                                     (x, bias, residual, out, dims.n, dims.width, activation is not None))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    if spec.logit_softcap is not None:
        yield LOGIT_SOFTCAP(THREADS=THREADS), THREADS, 0
    if spec.per_layer_input:
        yield GATE_PER_LAYER(THREADS=THREADS), THREADS, 0
    if spec.media:
        for kernel in (GATE_PER_LAYER, CLAMP, ADD_BIAS):
            yield kernel(THREADS=THREADS), THREADS, 0
