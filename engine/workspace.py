"""Every activation buffer of a step, sized once from the largest batch; a step allocates none of its own."""

from functools import lru_cache
from math import prod
from typing import NamedTuple


class Scratch(NamedTuple):
    """Memory an op may use while it runs: a flat float32 array, and flat int32 counters that are zero between ops."""

    floats: object
    counters: object


class Workspace:
    """Flat buffers by name; `rows(name, n, width)` is n rows of one, contiguous.

    residual, normed, branch, kept   [max_tokens, hidden]
    qkv, kept_q, mixed         [max_tokens, widest fused projection], 2 x [max_tokens, widest n_heads * head_dim]
    gate_up, act               [max_tokens, 2 * intermediate], [max_tokens, intermediate]
    logits                     [max_logit_rows, vocab]
    """

    def __init__(self, spec, max_tokens, max_logit_rows, lane):
        self.max_logit_rows = min(max_logit_rows, max_tokens)
        self._buffers = {name: lane.empty((prod(shape),))
                         for name, shape in self.shapes(spec, max_tokens, self.max_logit_rows).items()}
        self.rows = lru_cache(maxsize=1024)(self._rows)     # decode asks for the same views at every step

    @staticmethod
    def shapes(spec, max_tokens, max_logit_rows):
        """{name: (rows, widest row)} of every buffer."""
        attentions = [layer.attention for layer in spec.layers]
        wide = max(layer.mlp.intermediate for layer in spec.layers)
        widths = {"residual": spec.hidden, "normed": spec.hidden, "branch": spec.hidden,
                  "kept": spec.hidden, "qkv": max(a.qkv_width for a in attentions),
                  "kept_q": max(a.q_width for a in attentions), "mixed": max(a.q_width for a in attentions),
                  "gate_up": 2 * wide, "act": wide}
        return {**{name: (max_tokens, width) for name, width in widths.items()},
                "logits": (min(max_logit_rows, max_tokens), spec.vocab)}

    def _rows(self, name, n, width):
        """[n, width] view of buffer `name`."""
        return self._buffers[name][:n * width].reshape(n, width)
