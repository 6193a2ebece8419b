"""Every activation buffer of a step, sized once from the largest batch; a step allocates none of its own."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.routes import Routes
from engine.vision.runs import run_patches

MOST_TOP = 1024             # likeliest tokens a row that the lane finds; more are found on the host


class Scratch(NamedTuple):
    """Memory an op may use while it runs: a flat float32 array, and flat int32 counters that are zero between ops."""

    floats: object
    counters: object

    @classmethod
    def of(cls, size, lane):
        """One of (floats, counters) on a lane."""
        return cls(lane.empty((size[0],), np.float32), lane.zeros((size[1],), np.int32))


def scratch_size(spec, max_tokens, max_logit_rows, ops, others=()):
    """(floats, counters) that the ops of a model's steps want, those of its vision encoder, and `others`: they take
    turns."""
    sizes = [ops.scratch_size(spec, max_tokens, max_logit_rows), *others]
    if spec.media:
        sizes.append(ops.vision_scratch_size(spec.media.tower, spec.hidden, run_patches(spec.media.tower)))
    return tuple(map(max, zip(*sizes, strict=True)))


def ropes(spec):
    """The (RopeSpec, head_dim) pairs of a ModelSpec, each once, in order of first use."""
    return list(dict.fromkeys((layer.attention.rope, layer.attention.head_dim) for layer in spec.layers
                              if layer.attention.rope is not None))


def temperatures(spec):
    """The TemperatureSpecs of a ModelSpec, each once, in order of first use."""
    return list(dict.fromkeys(layer.attention.temperature for layer in spec.layers
                              if layer.attention.temperature is not None))


class Buffers:
    """Flat buffers by name; `rows(name, n, width)` is n rows of one, contiguous, `flat(name, n)` its first n values.

    shapes   {name: (rows, widest row, dtype)}; dtype None is the lane's
    scratch  a Scratch as large as the lane's ops want
    """

    def __init__(self, shapes, scratch, lane):
        self.scratch = scratch
        self._buffers = {name: lane.empty((rows * width,), dtype) for name, (rows, width, dtype) in shapes.items()}
        self.rows = lru_cache(maxsize=1024)(self._rows)     # decode asks for the same views at every step

    @staticmethod
    def n_bytes_of(shapes, itemsize):
        """What Buffers take beside their scratch, with activations of `itemsize` bytes."""
        return sum(rows * width * (itemsize if dtype is None else 4) for rows, width, dtype in shapes.values())

    def flat(self, name, n):
        """[n] view of buffer `name`."""
        return self._buffers[name][:n]

    def _rows(self, name, n, width):
        """[n, width] view of buffer `name`."""
        return self._buffers[name][:n * width].reshape(n, width)


class Workspace(Buffers):
    """The Buffers of a model's steps.

    In the lane's dtype:
    residual, normed, branch   [max_tokens, hidden]
    qkv, q, mixed              [max_tokens, widest fused projection], 2 x [max_tokens, widest n_heads * head_dim]
    act                        [max_tokens, widest intermediate of a dense MLP]
    kept_residual, kept_q, kept_normed     as the ones without kept_, once rows are dropped
    router_logits              [max_tokens, n_experts]
    expert_act, expert_in      [max_pairs, intermediate of an expert], [max_pairs, hidden]: max_pairs is max_tokens *
                               experts_per_token
    per_layer, per_layer_tokens            [max_tokens, n_layers * per_layer_input]
    per_layer_gate, per_layer_act          [max_tokens, per_layer_input]
    logit_states               [max_logit_rows, hidden]
    In float32 or int32:
    angles0, angles1, ...      [max_tokens, 2 * n_pairs], one for each of ropes(spec); kept_angles0, ... once dropped
    temperature0, ...          [max_tokens], one for each of temperatures(spec); kept_temperature0, ...
    expert_out                 [max_pairs, hidden]
    route_*                    the arrays of Routes, for `routes`
    logits                     [max_logit_rows, vocab]
    tokens, own_logprob        [max_logit_rows]
    top_ids, top_logprobs      [max_logit_rows, MOST_TOP]

    scratch                    a Scratch as large as the lane's ops want, those of the vision encoder among them, and as
                               `others` do who take turns with the steps
    """

    def __init__(self, spec, max_tokens, max_logit_rows, lane, others=()):
        self.max_logit_rows = min(max_logit_rows, max_tokens)
        self._lane = lane
        size = scratch_size(spec, max_tokens, self.max_logit_rows, lane.ops, others)
        super().__init__(self.shapes(spec, max_tokens, self.max_logit_rows), Scratch.of(size, lane), lane)
        self.routes = lru_cache(maxsize=64)(self._routes)

    @staticmethod
    def shapes(spec, max_tokens, max_logit_rows):
        """{name: (rows, widest row, dtype)} of every buffer; dtype None is the lane's."""
        attentions = [layer.attention for layer in spec.layers]
        q_width, n_logits = max(a.q_width for a in attentions), min(max_logit_rows, max_tokens)
        widths = {**dict.fromkeys(("residual", "normed", "branch", "kept_residual"), spec.hidden),
                  "qkv": max(layer.qkv_width for layer in spec.layers),
                  **dict.fromkeys(("q", "kept_q", "mixed"), q_width), "act": spec.widest_dense}
        floats = {f"angles{i}": 2 * rope.n_pairs(head_dim) for i, (rope, head_dim) in enumerate(ropes(spec))}
        floats |= {f"temperature{i}": 1 for i in range(len(temperatures(spec)))}
        if spec.first_shared is not None:                   # rows are dropped before a projection
            widths["kept_normed"] = spec.hidden
            floats |= {"kept_" + name: width for name, width in floats.items()}
        if spec.per_layer_input:
            widths |= dict.fromkeys(("per_layer", "per_layer_tokens"), spec.per_layer_width)
            widths |= dict.fromkeys(("per_layer_gate", "per_layer_act"), spec.per_layer_input)
        return {**{name: (max_tokens, width, None) for name, width in widths.items()},
                **{name: (max_tokens, width, np.float32) for name, width in floats.items()},
                **_expert_shapes(spec, max_tokens),
                "logit_states": (n_logits, spec.hidden, None), "logits": (n_logits, spec.vocab, np.float32),
                "tokens": (n_logits, 1, np.int32), "own_logprob": (n_logits, 1, np.float32),
                "top_ids": (n_logits, MOST_TOP, np.int32), "top_logprobs": (n_logits, MOST_TOP, np.float32)}

    @classmethod
    def n_bytes(cls, spec, max_tokens, max_logit_rows, itemsize, ops, others=()):
        """What a Workspace takes: activations of `itemsize` bytes, and the scratch that `ops` and `others` want."""
        max_logit_rows = min(max_logit_rows, max_tokens)
        return cls.n_bytes_of(cls.shapes(spec, max_tokens, max_logit_rows), itemsize) \
            + 4 * sum(scratch_size(spec, max_tokens, max_logit_rows, ops, others))

    def clear_counters(self):
        """Makes the scratch's counters zero, after an op that did not end."""
        self._lane.clear(self.scratch.counters)

    def _routes(self, n, moe):
        """The Routes of n tokens through the experts of a MoeSpec."""
        k = moe.experts_per_token
        return Routes(self._rows("route_experts", n, k), self._rows("route_weights", n, k),
                      self.flat("route_order", n * k), self.flat("route_begins", moe.n_experts + 1))


def _expert_shapes(spec, max_tokens):
    """What layers with experts want beside the buffers of every model."""
    moes = {layer.moe for layer in spec.layers if layer.moe}
    if not moes:
        return {}
    n_pairs, n_experts = max_tokens * max(moe.experts_per_token for moe in moes), max(moe.n_experts for moe in moes)
    shapes = {"router_logits": (max_tokens, n_experts, None),
              "expert_act": (n_pairs, max(moe.intermediate for moe in moes), None),
              "expert_out": (n_pairs, spec.hidden, np.float32), "route_experts": (n_pairs, 1, np.int32),
              "route_weights": (n_pairs, 1, np.float32), "route_order": (n_pairs, 1, np.int32),
              "route_begins": (n_experts + 1, 1, np.int32)}
    if any(moe.routing == "sigmoid" for moe in moes):
        shapes["expert_in"] = (n_pairs, spec.hidden, None)
    return shapes
