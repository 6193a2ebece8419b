"""Elementwise ops on logits (cuda/activation.cu). Activations of an MLP are part of its products, in gemm.cu."""

from engine.kernels.match import match
from engine.kernels.source import Kernel

LOGIT_SOFTCAP = Kernel("activation.cu", "logit_softcap")
THREADS = 256


def logit_softcap(logits, cap):
    """logits = cap * tanh(logits / cap), in place.

    logits  [n_rows, vocab] float32
    cap     float32 above 0
    Raises ShapeError. Source: HF modeling_gemma2, final_logit_softcapping.
    """
    dims = match("logit_softcap", logits=(logits, "n_rows vocab", "float32"))
    n = dims.n_rows * dims.vocab
    LOGIT_SOFTCAP(THREADS=THREADS).launch((-(-n // (4 * THREADS)),), (THREADS,), (logits, n, cap))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    if spec.logit_softcap is not None:
        yield LOGIT_SOFTCAP(THREADS=THREADS), THREADS, 0
