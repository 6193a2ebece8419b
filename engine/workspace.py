"""Every activation buffer of a step, sized once from the largest batch; a step allocates none of its own."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

MOST_TOP = 1024             # likeliest tokens a row that the lane finds; more are found on the host


class Scratch(NamedTuple):
    """Memory an op may use while it runs: a flat float32 array, and flat int32 counters that are zero between ops."""

    floats: object
    counters: object


def ropes(spec):
    """The (RopeSpec, head_dim) pairs of a ModelSpec, each once, in order of first use."""
    return list(dict.fromkeys((layer.attention.rope, layer.attention.head_dim) for layer in spec.layers))


class Workspace:
    """Flat buffers by name; `rows(name, n, width)` is n rows of one, contiguous, `flat(name, n)` its first n values.

    In the lane's dtype:
    residual, normed, branch, kept   [max_tokens, hidden]
    qkv, q, kept_q, mixed      [max_tokens, widest fused projection], 3 x [max_tokens, widest n_heads * head_dim]
    act                        [max_tokens, intermediate]
    logit_states               [max_logit_rows, hidden]
    In float32 or int32:
    angles0, angles1, ...      [max_tokens, 2 * n_pairs], one for each of ropes(spec)
    logits                     [max_logit_rows, vocab]
    tokens, own_logprob        [max_logit_rows]
    top_ids, top_logprobs      [max_logit_rows, MOST_TOP]

    scratch                    a Scratch as large as the lane's ops want
    """

    def __init__(self, spec, max_tokens, max_logit_rows, lane):
        self.max_logit_rows = min(max_logit_rows, max_tokens)
        self._lane = lane
        self._buffers = {name: lane.empty((rows * width,), dtype)
                         for name, (rows, width, dtype) in self.shapes(spec, max_tokens, self.max_logit_rows).items()}
        n_floats, n_counters = lane.ops.scratch_size(spec, max_tokens, self.max_logit_rows)
        self.scratch = Scratch(lane.empty((n_floats,), np.float32), lane.zeros((n_counters,), np.int32))
        self.rows = lru_cache(maxsize=1024)(self._rows)     # decode asks for the same views at every step

    @staticmethod
    def shapes(spec, max_tokens, max_logit_rows):
        """{name: (rows, widest row, dtype)} of every buffer; dtype None is the lane's."""
        attentions = [layer.attention for layer in spec.layers]
        q_width, n_logits = max(a.q_width for a in attentions), min(max_logit_rows, max_tokens)
        widths = {**dict.fromkeys(("residual", "normed", "branch", "kept"), spec.hidden),
                  "qkv": max(a.qkv_width for a in attentions), **dict.fromkeys(("q", "kept_q", "mixed"), q_width),
                  "act": max(layer.mlp.intermediate for layer in spec.layers)}
        angles = {f"angles{i}": 2 * rope.n_pairs(head_dim) for i, (rope, head_dim) in enumerate(ropes(spec))}
        return {**{name: (max_tokens, width, None) for name, width in widths.items()},
                **{name: (max_tokens, width, np.float32) for name, width in angles.items()},
                "logit_states": (n_logits, spec.hidden, None), "logits": (n_logits, spec.vocab, np.float32),
                "tokens": (n_logits, 1, np.int32), "own_logprob": (n_logits, 1, np.float32),
                "top_ids": (n_logits, MOST_TOP, np.int32), "top_logprobs": (n_logits, MOST_TOP, np.float32)}

    @classmethod
    def n_bytes(cls, spec, max_tokens, max_logit_rows, itemsize, ops):
        """What a Workspace takes: activations of `itemsize` bytes, and the scratch that `ops` want."""
        max_logit_rows = min(max_logit_rows, max_tokens)
        shapes = cls.shapes(spec, max_tokens, max_logit_rows).values()
        return sum(rows * width * (itemsize if dtype is None else 4) for rows, width, dtype in shapes) \
            + 4 * sum(ops.scratch_size(spec, max_tokens, max_logit_rows))

    def flat(self, name, n):
        """[n] view of buffer `name`."""
        return self._buffers[name][:n]

    def _rows(self, name, n, width):
        """[n, width] view of buffer `name`."""
        return self._buffers[name][:n * width].reshape(n, width)

    def clear_counters(self):
        """Makes the scratch's counters zero, after an op that did not end."""
        self._lane.clear(self.scratch.counters)
