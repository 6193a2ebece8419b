"""The op table in NumPy, mixture of experts: as engine/reference.py says, in the dtype of their arrays, into `out`.

What Routes are stands in engine/routes.py. Experts are taken one by one, each with all its tokens: one matrix product
an expert in use.
"""

import numpy as np

from engine.reference_products import SOME_ROWS, gate, product, room


def moe_route(logits, per_expert_scale, routing, routes, scratch=None):
    """Picks the experts of each token, those with the largest logits, and sorts the pairs by expert.

    logits            [n_tokens, n_experts]; of equal ones the lowest number goes first, and a NaN counts as -inf
    per_expert_scale  [n_experts] or None
    routing           "softmax": over all experts, renormalised over the chosen ones, times per_expert_scale; the sum
                      over all of them cancels. "sigmoid": of each chosen logit (kernels round it to bfloat16)
    """
    n_chosen = routes.experts.shape[1]
    scores = np.fmax(logits, -np.inf)
    if n_chosen == 1:
        experts = np.argmax(scores, axis=1)[:, None]
    else:
        experts = np.argsort(-scores, axis=1, kind="stable")[:, :n_chosen]
    chosen = np.take_along_axis(scores, experts, axis=1)
    if routing == "softmax":
        weights = np.exp(chosen - chosen[:, :1])
        weights /= weights.sum(axis=1, keepdims=True)
        if per_expert_scale is not None:
            weights *= per_expert_scale[experts]
    else:
        half = np.exp(-np.abs(chosen))                              # no power overflows
        weights = np.where(chosen < 0, half, 1) / (1 + half)
    routes.experts[...], routes.weights[...] = experts, weights
    pairs = experts.astype(np.uint16).reshape(-1)                   # of which NumPy has a radix sort
    routes.order[...] = np.argsort(pairs, kind="stable")
    routes.begins[0] = 0
    np.cumsum(np.bincount(pairs, minlength=logits.shape[1]), out=routes.begins[1:])


def moe_gated_linear(x, weight, routes, out, by_pair, activation, in_out, scratch=None):
    """out[i] = activation(x[r] @ gate_e.T) * (x[r] @ up_e.T) for pair p = order[i] of expert e.

    x        [n_tokens, n_in], r = p // experts_per_token; by_pair [n_tokens * experts_per_token, n_in], r = p
    weight   [n_experts, 2 * intermediate, n_in]: gate's rows, then up's; in_out [n_experts, n_in, 2 * intermediate]
    out      [n_tokens * experts_per_token, intermediate], by expert as order has them
    """
    rows, width = (routes.order if by_pair else routes.order // routes.experts.shape[1]), out.shape[1]
    if len(rows) <= SOME_ROWS:                                      # few: all are gated at once
        gate_up = room(scratch, len(rows), 2 * width, out.dtype)
        for expert, begin, end in _in_use(routes):
            product(x[rows[begin:end]], _matrix(weight, expert, in_out), gate_up[begin:end])
        gate(gate_up, activation, out)
        return
    for expert, begin, end in _in_use(routes):
        gate_up = room(scratch, end - begin, 2 * width, out.dtype)
        product(x[rows[begin:end]], _matrix(weight, expert, in_out), gate_up)
        gate(gate_up, activation, out[begin:end])


def moe_linear(x, weight, routes, out, in_out, scratch=None):
    """out[order[i]] = x[i] @ weight_e.T, e the expert of pair order[i].

    x        [n_tokens * experts_per_token, n_in], by expert as moe_gated_linear leaves them
    weight   [n_experts, n_out, n_in]; in_out [n_experts, n_in, n_out]
    out      [n_tokens * experts_per_token, n_out] float32, by pair
    """
    for expert, begin, end in _in_use(routes):
        matrix, pairs = _matrix(weight, expert, in_out), routes.order[begin:end]
        if end - begin == 1:
            pair = int(pairs[0])
            product(x[begin:end], matrix, out[pair:pair + 1])
        else:
            alone = room(scratch, end - begin, out.shape[1], out.dtype)
            product(x[begin:end], matrix, alone)
            out[pairs] = alone


def moe_combine(y, weights, out):
    """out[t] = the sum over s of weights[t, s] * y[t * experts_per_token + s].

    y        [n_tokens * experts_per_token, hidden] float32
    weights  [n_tokens, experts_per_token] float32, or None for ones
    out      [n_tokens, hidden]
    """
    n_chosen = len(y) // max(len(out), 1) if weights is None else weights.shape[1]
    y = y.reshape(len(out), n_chosen, out.shape[1])
    if weights is None:
        np.add.reduce(y, axis=1, out=out)
    else:
        np.matmul(weights[:, None], y, out=out[:, None])


def _in_use(routes):
    """[(expert, where its pairs begin in order, where they end)] of the experts that have any."""
    begins = routes.begins
    experts = np.flatnonzero(begins[1:] > begins[:-1])
    return zip(experts.tolist(), begins[experts].tolist(), begins[experts + 1].tolist(), strict=True)


def _matrix(weight, expert, in_out):
    """[n_out, n_in] of one expert."""
    return weight[expert].T if in_out else weight[expert]
