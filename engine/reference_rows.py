"""The op table in NumPy, row by row: activations, norms, temperatures, gates and weights of rows.

As engine/reference.py says: every op writes into arrays it is given and computes in their dtype, so where a kernel
rounds to bfloat16 in between, a twin rounds to the dtype it computes in.
"""

import numpy as np

ROWS = 32           # rows of an elementwise chain that share the L2 cache
SQRT_2_OVER_PI = (2 / np.pi) ** 0.5


# --- activations

def _gelu_tanh(z, out):
    np.multiply(z, z, out=out)
    out *= 0.044715 * SQRT_2_OVER_PI
    out += SQRT_2_OVER_PI
    out *= z
    np.tanh(out, out=out)
    out += 1
    out *= z
    out *= 0.5


def _silu(z, out):
    """z / (1 + e^-z) = min(1, e^z) * z / (1 + e^-|z|): no power overflows, no difference cancels."""
    np.abs(z, out=out)
    np.negative(out, out=out)
    np.exp(out, out=out)
    out += 1
    np.divide(z, out, out=out)
    out *= np.exp(np.minimum(z, 0))


ACTIVATIONS = {"gelu_tanh": _gelu_tanh, "silu": _silu}      # activate(z, out); out is not z


# --- norms

def rms_norm(x, weight, eps, weight_offset, out, round_first=False):
    """out = x / sqrt(mean(x²) + eps) * (weight + weight_offset), over the last axis; weight None multiplies by nothing.

    x [..., n], weight [n], out like x, may be x
    round_first  kernels round the normed x to bfloat16, then its product with the weight (Llama 4); else once
    Source: arXiv:1910.07467; the offset: HF modeling_gemma3; round_first: HF modeling_llama4, Llama4TextRMSNorm.
    """
    np.divide(x, _rms(x, eps), out=out)
    if weight is not None:
        out *= weight + weight_offset if weight_offset else weight


def _rms(x, eps):
    """sqrt(mean(x²) + eps) over the last axis, which stays, of length 1."""
    mean_square = _sum_of_squares(x)
    mean_square *= 1 / x.shape[-1]
    mean_square += eps
    return np.sqrt(mean_square, out=mean_square)[..., None]


def _sum_of_squares(x):
    """Over the last axis. NumPy has a ufunc for it since 2.0."""
    return np.vecdot(x, x) if hasattr(np, "vecdot") else np.einsum("...i,...i->...", x, x)


def add_norm(residual, branch, post_weight, next_weight, eps, weight_offset, layer_scalar, out, round_first=False):
    """residual = (residual + rms_norm(branch, post_weight)) * layer_scalar; out = rms_norm(residual, next_weight).

    The seam between two half-blocks. residual, branch, out [n_tokens, hidden]; out may be the branch.
    post_weight   None adds the branch as it is
    next_weight   None, with out None, leaves the residual alone to be computed
    layer_scalar  [1] or None
    round_first   as for rms_norm, of both norms
    """
    if post_weight is not None:
        normed = np.empty_like(branch) if out is None else out
        rms_norm(branch, post_weight, eps, weight_offset, normed)
        branch = normed
    residual += branch
    if layer_scalar is not None:
        residual *= layer_scalar
    if out is not None:
        rms_norm(residual, next_weight, eps, weight_offset, out)


def add_norms(a, a_weight, b, b_weight, eps, weight_offset, out):
    """out = rms_norm(a, a_weight) + rms_norm(b, b_weight): the two branches of a Gemma 4 MoE layer.

    a, b [n_tokens, hidden], weights [hidden], out like a, may be a or b. Kernels round once, to bfloat16, at the end.
    Source: HF modeling_gemma4, Gemma4TextDecoderLayer.
    """
    for at in range(0, len(a), ROWS):
        rows = slice(at, at + ROWS)
        normed = np.empty_like(a[rows])
        rms_norm(a[rows], a_weight, eps, weight_offset, normed)
        rms_norm(b[rows], b_weight, eps, weight_offset, out[rows])
        out[rows] += normed


def router_norm(x, scale, factor, eps, out):
    """out = x / sqrt(mean(x²) + eps) * scale * factor: what the router of Gemma 4 projects.

    x [n_tokens, hidden], scale [hidden], factor a float32, 1 / sqrt(hidden), out like x, may be x. Kernels round to
    bfloat16 after each of the three steps: that decides between experts whose scores are close.
    Source: HF modeling_gemma4, Gemma4TextRouter.
    """
    rms_norm(x, scale, eps, 0.0, out)
    out *= factor


# --- temperatures, weights and gates of rows

def attention_temperature(positions, scale, floor, out):
    """out[t] = 1 + scale * ln(1 + floor((positions[t] + 1) / floor)): what multiplies the query of a token.

    positions [n_tokens] int32, floor an int above 0, out [n_tokens]. Source: HF modeling_llama4, Llama4TextAttention.
    """
    np.log1p((positions + 1) // floor, out=out, dtype=out.dtype)
    out *= scale
    out += 1


def scale_rows(x, weights, out):
    """out[t * k + s] = x[t] * weights[t, s]: what the s-th expert of token t reads (Llama 4).

    x [n, hidden], weights [n, k], out [n * k, hidden]. Kernels round the weight to bfloat16, then the product.
    Source: HF modeling_llama4, Llama4TextMoe.
    """
    np.multiply(x[:, None], weights[..., None], out=out.reshape(*weights.shape, x.shape[1]))


def mix_per_layer(context, tokens, weight, factor, eps, out):
    """out = (rms_norm(context * factor, weight) + tokens) / sqrt(2), norms over each layer's part: the inputs that a
    token brings to every layer (Gemma 4, E-series).

    context, tokens, out  [n, n_layers * P]: the projected embedding and the rows of the second table; out may be
                          context
    weight                [P]
    factor                a float32, 1 / sqrt(hidden)
    Kernels round to bfloat16 after the factor, the weight, the sum and the root.
    Source: HF modeling_gemma4, project_per_layer_inputs.
    """
    for at in range(0, len(context), ROWS):
        rows = slice(at, at + ROWS)
        mixed = out[rows].reshape(-1, len(weight))
        np.multiply(context[rows].reshape(mixed.shape), factor, out=mixed)
        rms_norm(mixed, weight, eps, 0.0, mixed)
        mixed += tokens[rows].reshape(mixed.shape)
        mixed *= 0.5**0.5


def gate_per_layer(gate, inputs, layer, out):
    """out = gelu_tanh(gate) * the part of `inputs` that is of a layer, by its number.

    gate, out [n, P], two arrays; inputs [n, n_layers * P] from mix_per_layer. Source: HF modeling_gemma4,
    Gemma4TextDecoderLayer.
    """
    width = gate.shape[1]
    _gelu_tanh(gate, out)
    out *= inputs[:, layer * width:(layer + 1) * width]
