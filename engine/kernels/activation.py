"""Elementwise ops (cuda/activation.cu). Activations of an MLP are part of its products, in gemm.cu."""

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel

LOGIT_SOFTCAP, GATE_PER_LAYER = Kernel("activation.cu", "logit_softcap"), Kernel("activation.cu", "gate_per_layer")
THREADS = 256
MULTIPLE = 4                    # of the width of per-layer inputs


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
    if dims.width % MULTIPLE or not dims.width:
        raise ShapeError(f"gate_per_layer: width is {dims.width}, expected a multiple of {MULTIPLE}")
    if dims.widths % dims.width or not 0 <= layer < dims.widths // dims.width:
        raise ShapeError(f"gate_per_layer: layer {layer} of inputs {dims.widths} wide, expected {dims.width} for each "
                         "layer")
    n_bytes = 16 if dims.width % 8 == 0 else 8
    n_blocks = -(-2 * dims.n_tokens * dims.width // (n_bytes * THREADS))
    GATE_PER_LAYER(THREADS=THREADS).launch(
        (n_blocks,), (THREADS,), (gate, inputs, out, dims.n_tokens, dims.width, dims.widths, layer * dims.width))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    if spec.logit_softcap is not None:
        yield LOGIT_SOFTCAP(THREADS=THREADS), THREADS, 0
    if spec.per_layer_input:
        yield GATE_PER_LAYER(THREADS=THREADS), THREADS, 0
