"""Assistant: drafts the next tokens of sequences with a draft model that reads the target's KV cache."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from engine.attention_block import AttentionBlock
from engine.errors import ConfigError
from engine.feed_forward import FeedForward
from engine.norms import Norms
from engine.positions import Positions
from engine.sampler import LogitEdits, SamplingBatch
from engine.sampling_params import SamplingParams
from engine.step_inputs import StagedEdits
from engine.text_edits import TextEdits
from engine.workspace import Buffers, Scratch, ropes


@dataclass
class DraftInputs:
    """Where the sequences of a drafting round are; P is the last position of a sequence that is in the cache for good.

    positions     [n_seqs] int32: P
    context_lens  [n_seqs] int32: P + 1
    pools         {number of a KV pool: PagedBatch or PagedInputs} for each of Assistant.attentions. Where a lane stages
                  its inputs, PagedInputs of one query a sequence: these context_lens, cu_seqlens counting up by one,
                  work lists of plan_drafts(). Else PagedBatch, of which page lists and page size alone are read
    """

    positions: object
    context_lens: object
    pools: dict


class Assistant:
    """One draft model beside its target. Allocates nothing in a round, reads nothing back.

    spec, weights  AssistantSpec, AssistantWeights
    target         the target's LayerScheduler, whose embedding and KV cache are read
    samples        drafts are drawn from logits, not only the likeliest found
    scratch        of the target's Workspace, as the two take turns; None takes one of its own
    attentions     {number of a KV pool: the AttentionSpec of the layers that read it}, window as they see it
    workspace      Buffers, in the lane's dtype where nothing else is said:
                   embedded, state            [max_seqs, backbone]; `state` is free between rounds
                   residual, normed, branch   [max_seqs, hidden]
                   q, qkv, mixed, act         [max_seqs, the widest of the layers]
                   angles0, ...               as the target's
                   centroid_scores            [max_seqs, n_centroids] float32
                   chosen                     [max_seqs, centroids_per_token] int32
                   logits                     [max_seqs, vocab] float32, where the head has no centroids, or `samples`
    Raises ConfigError where a layer does not fit the pool that it would read.
    """

    def __init__(self, spec, weights, target, max_seqs, lane, samples=False, scratch=None):
        assert 0 <= spec.extra_keys <= 1, "pages are kept for one position beyond the window"
        self.spec, self.weights, self.target, self.ops = spec, weights, target, lane.ops
        self._stages = lane.stages
        if scratch is None:
            scratch = Scratch.of(self.scratch_size(spec, max_seqs, lane.ops), lane)
        self.workspace = Buffers(_shapes(spec, max_seqs, samples), scratch, lane)
        self._positions = Positions(spec, self.workspace, lane)
        self._attention = AttentionBlock(spec, 0.0, self.workspace, lane.ops)
        self._norms = Norms(spec, 0.0, lane.ops)
        self._feed_forward = FeedForward(self._norms, self.workspace, lane.ops)
        self._layers = list(_with_pages(spec, weights, target.kv_cache))
        self.attentions = {pool: layer.attention for layer, _, pool, _ in self._layers}
        self._rules = _on_lane(SamplingBatch.build([(SamplingParams(temperature=0), 0, 0)] * max_seqs), lane)
        self._bans = _bans(spec, max_seqs, lane) if spec.suppressed and not spec.n_centroids else None
        self._greedy, self._banned = lru_cache(self._greedy), lru_cache(self._banned)

    @staticmethod
    def n_bytes(spec, max_seqs, itemsize, samples=False):
        """What its workspace takes beside its scratch, with activations of `itemsize` bytes."""
        return Buffers.n_bytes_of(_shapes(spec, max_seqs, samples), itemsize)

    @staticmethod
    def scratch_size(spec, max_seqs, ops):
        """(floats, counters) that the ops of its rounds want."""
        return ops.scratch_size(spec, max_seqs, max_seqs)

    def use(self, ops):
        """Launches the ops of that table from now on: the lane's, or one that watches them."""
        for part in (self, self._positions, self._attention, self._norms, self._feed_forward):
            part.ops = ops

    def draft(self, next_token, states, inputs, n_steps, out, choose=None):
        """out[s, b] = the draft of sequence b behind next_token[b] and the drafts out[:s, b].

        next_token  [n_seqs] int32: the token at position P + 1, whose K and V are not in the cache
        states      [n_seqs, backbone]: the target's states at P after its final norm
        inputs      DraftInputs
        out         [n_steps, n_seqs] int32
        choose      choose(s, logits [n_seqs, vocab], out[s]) writes the drafts of step s; None takes the likeliest,
                    of equal ones the lowest id
        A sequence's drafts depend on nothing of the others. Every step has the same position and sees the same keys.
        """
        n = len(next_token)
        pools = inputs.pools if self._stages else _placed(inputs)
        self._positions.compute(inputs.context_lens if self.spec.pos_offset else inputs.positions)
        token, state = next_token, states
        for s in range(n_steps):
            g = self.run(token, state, pools)
            token = out[s]
            if choose is None:
                self.likeliest(g, token)
            else:
                choose(s, self.logits(g), token)
            if s + 1 < n_steps:
                state = self.project(g, self.workspace.rows("state", n, self.spec.backbone))

    def run(self, token, state, pools):
        """The states [n_seqs, hidden] after the final norm, of one step: a buffer. Positions are computed before."""
        rows, spec, weights, norms = self.workspace.rows, self.spec, self.weights, self._norms
        scratch, n = self.workspace.scratch, len(token)
        residual, normed, branch = (rows(name, n, spec.hidden) for name in ("residual", "normed", "branch"))
        embedded = rows("embedded", n, spec.backbone)
        self.ops.embed(self.target.weights.embed, token, self.target.embed_scale, embedded)
        self.ops.linear(embedded, weights.pre_embed, residual, scratch)
        self.ops.linear(state, weights.pre_state, residual, scratch, residual)
        norms.norm(residual, weights.layers[0].input_norm, normed)
        next_norms = [w.input_norm for w in weights.layers[1:]] + [weights.norm]
        for (layer, w, pool, pages), next_norm in zip(self._layers, next_norms, strict=True):
            q = self._attention.project(layer, w, normed, self._positions, None, None)
            self._attention.attend(layer, w, q, pages, pools[pool], branch)
            norms.add(residual, branch, w.post_attention_norm, w.pre_mlp_norm, None, normed)
            self._feed_forward(layer, w, residual, normed, branch)
            norms.add(residual, branch, w.post_mlp_norm, next_norm, w.layer_scalar, normed)
        return normed

    def project(self, g, out):
        """out [n_seqs, backbone] = what the next step takes for the target's states."""
        self.ops.linear(g, self.weights.post, out, self.workspace.scratch)
        return out

    def logits(self, g):
        """Logits of states [n_seqs, hidden]: float32 [n_seqs, vocab], a buffer. -inf for what is never drafted, and
        where there are centroids for all tokens of others than the row's."""
        out = self.workspace.rows("logits", len(g), self.spec.vocab)
        if self.spec.n_centroids:
            self.ops.candidate_logits(g, self.weights.head, self.weights.ordering, self._centroids(g), out)
            return out
        self.ops.linear(g, self.weights.head, out, self.workspace.scratch)
        if self._bans:
            self.ops.apply_edits(out, self._banned(len(g)))
        return out

    def likeliest(self, g, out):
        """out [n_seqs] int32 = the argmax of each row's logits, the lowest id on ties; with centroids the logits of all
        tokens are never made."""
        if self.spec.n_centroids:
            self.ops.candidate_argmax(g, self.weights.head, self.weights.ordering, self._centroids(g), out,
                                      self.workspace.scratch)
        else:
            self.ops.sample(self.logits(g), self._greedy(len(g)), out, self.workspace.scratch)

    def _centroids(self, g):
        """[n_seqs, centroids_per_token]: the centroids of each row, a buffer."""
        scores = self.workspace.rows("centroid_scores", len(g), self.spec.n_centroids)
        chosen = self.workspace.rows("chosen", len(g), self.spec.centroids_per_token)
        self.ops.linear(g, self.weights.centroids, scores, self.workspace.scratch)
        self.ops.pick_centroids(scores, chosen)
        return chosen

    def _greedy(self, n):
        """The SamplingBatch of n greedy rows."""
        return SamplingBatch(*(column[:n] for column in vars(self._rules).values()))

    def _banned(self, n):
        """The LogitEdits that ban the suppressed ids in n rows."""
        edits, counts = self._bans
        of_rows = ("repetition", "presence", "frequency")
        columns = {name: column[:n if name in of_rows else n * len(self.spec.suppressed)]
                   for name, column in vars(edits).items()}
        return LogitEdits(**columns) if counts is None else StagedEdits(**columns, n_edits=counts[n:n + 1])


def _shapes(spec, max_seqs, samples):
    """{name: (rows, widest row, dtype)} of the workspace."""
    q_width = max(layer.attention.q_width for layer in spec.layers)
    widths = {**dict.fromkeys(("embedded", "state"), spec.backbone),
              **dict.fromkeys(("residual", "normed", "branch"), spec.hidden),
              **dict.fromkeys(("q", "qkv", "mixed"), q_width), "act": spec.widest_dense}
    floats = {f"angles{i}": 2 * rope.n_pairs(head_dim) for i, (rope, head_dim) in enumerate(ropes(spec))}
    if spec.n_centroids:
        floats["centroid_scores"] = spec.n_centroids
    if samples or not spec.n_centroids:
        floats["logits"] = spec.vocab
    return {**{name: (max_seqs, width, None) for name, width in widths.items()},
            **{name: (max_seqs, width, np.float32) for name, width in floats.items()},
            "chosen": (max_seqs, spec.centroids_per_token, np.int32)}


def _with_pages(spec, weights, kv_cache):
    """(LayerSpec, LayerWeights, number of the KV pool, its (k_pages, v_pages)) of each layer."""
    for i, (layer, seen, w) in enumerate(zip(spec.layers, spec.seen_layers, weights.layers, strict=True)):
        pool, slot = kv_cache.layer_slot[layer.kv_from]
        of, attention = kv_cache.specs[pool], layer.attention
        if (of.window, of.n_kv_heads, of.head_dim) != (attention.window, attention.n_kv_heads, attention.head_dim):
            raise ConfigError(f"layer {i} of the draft is {attention.kind} with {attention.n_kv_heads} KV heads of "
                              f"{attention.head_dim}, the cache of layer {layer.kv_from} of the target is {of.kind} "
                              f"with {of.n_kv_heads} of {of.head_dim}")
        yield seen, w, pool, (kv_cache.k[pool][slot], kv_cache.v[pool][slot])


def _placed(inputs):
    """The pools of a lane that reads lengths on the host, one query at P for each sequence."""
    rows = [(i, i + 1, context) for i, context in enumerate(inputs.context_lens.tolist())]
    return {pool: replace(paged, rows=rows) for pool, paged in inputs.pools.items()}


def _bans(spec, max_seqs, lane):
    """(LogitEdits that ban the suppressed ids in max_seqs rows, on the lane; how many of them are in the first n rows
    [max_seqs + 1], or None where the lane counts them by shape)."""
    params = SamplingParams(temperature=0)
    edits = _on_lane(LogitEdits.build(TextEdits(params, banned=spec.suppressed).rows(n_banned=1) * max_seqs), lane)
    counts = np.arange(max_seqs + 1, dtype=np.int32) * len(spec.suppressed)
    return edits, lane.to_device(counts) if lane.stages else None


def _on_lane(columns, lane):
    """A dataclass of host arrays as one of arrays on the lane."""
    return type(columns)(*(lane.to_device(getattr(columns, field.name)) for field in fields(columns)))
