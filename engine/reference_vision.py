"""The op table in NumPy, the ops of the vision towers: rows placed, added, clamped, normed with a mean, and pooled.

As engine/reference.py says: every op writes into arrays it is given and computes in their dtype, so where a kernel
rounds to bfloat16 in between, a twin rounds to the dtype it computes in.
"""

import numpy as np

from engine.reference_rows import ACTIVATIONS, ROWS

BLOCK = 256         # rows of out that pool_rows and add_rows gather for at once


def place_rows(x, source, rows, out):
    """out[rows[i]] = x[source[i]]. x [n, hidden], source, rows [n_placed] int32, rows all different, out [m, hidden].

    Rows that are not named stay as they are.
    """
    out[rows] = x[source]


def add_rows(x, table, rows, out):
    """out[i] = x[i] + (table[rows[i, 0]] + table[rows[i, 1]]): the places of patches on two axes, or on one.

    x, out [n, hidden], out may be x; table [n_places, hidden], rows [n, 1 or 2] int32. Kernels round the sum in
    brackets, then the sum. Source: HF modeling_gemma4, Gemma4VisionPatchEmbedder.
    """
    for at in range(0, len(x), BLOCK):
        some = slice(at, at + BLOCK)
        places = table[rows[some, 0]]
        if rows.shape[1] == 2:
            places += table[rows[some, 1]]
        np.add(x[some], places, out=out[some])


def clamp(x, bounds, out, first=0):
    """out[:, first:first + width] = min(max(x, bounds[0]), bounds[1]); NaN stays.

    x [n, width], bounds [2], out [n, at least first + width], may be x. Source: HF modeling_gemma4,
    Gemma4ClippableLinear.
    """
    clamped = out[:, first:first + x.shape[1]]
    np.maximum(x, bounds[0], out=clamped)
    np.minimum(clamped, bounds[1], out=clamped)


def layer_norm(x, weight, bias, eps, out):
    """out = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * weight + bias, over the last axis.

    x [n, hidden], weight, bias [hidden], out like x, may be x. Source: arXiv:1607.06450.
    """
    for at in range(0, len(x), ROWS):
        some = slice(at, at + ROWS)
        centred = x[some] - x[some].mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        variance += eps
        centred /= np.sqrt(variance, out=variance)
        centred *= weight
        np.add(centred, bias, out=out[some])


def add_bias(x, bias, out, activation=None, residual=None):
    """out = activation(x + bias) + residual: what follows the matrix product of a layer with biases.

    x, out [n, width], out may be x or the residual; bias [width]; activation None or a name of ACTIVATIONS;
    residual like x, or None. Source: HF modeling_siglip, SiglipMLP.
    """
    for at in range(0, len(x), ROWS):
        some = slice(at, at + ROWS)
        result = x[some] + bias
        if activation is not None:
            z, result = result, np.empty_like(result)
            ACTIVATIONS[activation](z, result)
        if residual is not None:
            result += residual[some]
        out[some] = result


def pool_rows(x, groups, factor, bias, scale, out):
    """out[b] = (mean of the rows x[groups[b]] * factor - bias) * scale: patches become a soft token.

    x [n, hidden], groups [n_out, k] int32, factor a float32, bias, scale [hidden] or None, out [n_out, hidden], another
    array. Kernels round the mean, go on in float32 and round the result. Source: HF modeling_gemma4,
    Gemma4VisionPooler.
    """
    for at in range(0, len(groups), BLOCK):
        some = slice(at, at + BLOCK)
        mean = x[groups[some]].mean(axis=1)
        mean *= factor
        if bias is not None:
            mean -= bias
        if scale is not None:
            mean *= scale
        out[some] = mean
