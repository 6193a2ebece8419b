"""The op table in NumPy, matrix products: as engine/reference.py says, in the dtype of their arrays, into `out`."""

import numpy as np

from engine.reference_rows import ACTIVATIONS, ROWS

# product(): where each way was the fastest with OpenBLAS on [65536, 640] and [4096, 640] weights; at 8 rows the weights
# on the left took 0.57 to 0.78 of the plain product's time, at 2 rows the cached blocks 0.2 to 0.4. On experts of
# [512, 512] to [1024, 256] the weights on the left took 0.77 to 0.97 at 64 rows, and up to 1.05 at 96. Of [in, out]
# weights, as Llama 4's experts have them, the plain product took 0.65 to 1.0 of that at 8 to 64 rows.
FEW_ROWS, SOME_ROWS = 4, 64
CACHED_FLOATS = 2**18       # 1 MiB of weights


def linear(x, weight, out, scratch=None, residual=None):
    """out = x @ weight.T, + residual where there is one. x [n, in], weight [out, in], out and residual [n, out], which
    may be one array."""
    if residual is None:
        product(x, weight, out)
    else:
        alone = np.empty_like(out)
        product(x, weight, alone)
        np.add(alone, residual, out=out)


def gated_linear(x, weight, out, scratch=None, activation="gelu_tanh"):
    """out = activation(x @ gate.T) * (x @ up.T). x [n, in], weight [2 * intermediate, in]: gate's rows, then up's;
    out [n, intermediate].

    activation  gelu_tanh(z) = z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z³))), or silu(z) = z / (1 + e^-z)
    """
    n, width = out.shape
    gate_up = room(scratch, n, 2 * width, out.dtype)
    product(x, weight, gate_up)
    gate(gate_up, activation, out)


def product(x, weight, out):
    """out = x @ weight.T. A few rows are bound by reading the weights, and a BLAS matrix product copies them first: so
    up to FEW_ROWS rows go one by one against blocks of the weights that stay in cache, and up to SOME_ROWS the weights
    stand on the left, where they are not the transposed view of an [in, out] array."""
    n = len(x)
    if 1 < n <= FEW_ROWS:
        step = max(1, CACHED_FLOATS // weight.shape[1])
        for at in range(0, len(weight), step):
            block, to = weight[at:at + step], out[:, at:at + step]
            for i in range(n):
                np.matmul(block, x[i], out=to[i])
    elif 1 < n <= SOME_ROWS and weight.flags.c_contiguous:
        out[...] = np.matmul(weight, x.T).T
    else:
        np.matmul(x, weight.T, out=out)


def gate(gate_up, activation, out):
    """out = activation(gate_up[:, :width]) * gate_up[:, width:], where out is [n, width]."""
    activate, width = ACTIVATIONS[activation], out.shape[1]
    for at in range(0, len(out), ROWS):
        y = out[at:at + ROWS]
        activate(gate_up[at:at + ROWS, :width], y)
        y *= gate_up[at:at + ROWS, width:]


def room(scratch, n, width, dtype):
    """[n, width] of a Scratch, or of its own where there is none or it is too small."""
    fits = scratch is not None and len(scratch.floats) >= n * width and scratch.floats.dtype == dtype
    return (scratch.floats[:n * width] if fits else np.empty(n * width, dtype)).reshape(n, width)
