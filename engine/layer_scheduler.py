"""The model's forward pass: walks the LayerSpecs and launches ops in written order, into the workspace."""

from engine.attention_block import AttentionBlock
from engine.feed_forward import FeedForward
from engine.models.spec import AttentionSpec, DenseSpec, MoeSpec
from engine.norms import Norms
from engine.per_layer_inputs import PerLayerInputs
from engine.positions import Positions


class LayerScheduler:
    """Runs batches through one model. Allocates nothing of its own in a step, reads nothing back.

    drops_at  the layer from which on only the rows are computed whose final states somebody wants: spec.drops_at, or
              any layer behind it
    embed_scale  multiplies embedding rows, in the lane's dtype
    soft         [n_rows, hidden], where the soft tokens of pictures lie; None for a model of text
    """

    def __init__(self, spec, weights, kv_cache, workspace, lane, soft=None):
        _refuse_unknown(spec)
        self.soft = soft
        self.spec, self.weights, self.kv_cache, self.workspace = spec, weights, kv_cache, workspace
        self.drops_at = spec.drops_at
        self.embed_scale = float(lane.dtype.type(spec.embed_scale))
        self._positions = Positions(spec, workspace, lane)
        self._attention = AttentionBlock(spec, weights.norm_offset, workspace, lane.ops)
        self._norms = Norms(spec, weights.norm_offset, lane.ops)
        self._feed_forward = FeedForward(self._norms, workspace, lane.ops)
        self._per_layer = PerLayerInputs(spec, weights, self._norms, workspace, lane) if spec.per_layer_input else None
        self.use(lane.ops)

    def use(self, ops):
        """Launches the ops of that table from now on: the lane's, or one that watches them."""
        parts = self, self._positions, self._attention, self._norms, self._feed_forward, self._per_layer
        for part in filter(None, parts):
            part.ops = ops

    def run(self, batch, observe=None):
        """Computes `batch`, leaving its K and V in the cache. Returns the states after the final norm,
        [n_kept, hidden], a workspace buffer that the next run overwrites.

        observe(j, residual)  called with the residual stream [n_tokens, hidden] before layer j and once after the last
        """
        spec, weights, norms, kept, rows = self.spec, self.weights, self._norms, batch.kept, self.workspace.rows
        residual, normed, branch = (rows(name, batch.n_tokens, spec.hidden)
                                    for name in ("residual", "normed", "branch"))
        self.ops.embed(weights.embed, batch.token_ids, self.embed_scale, residual)
        if batch.media_rows is not None:
            self.ops.place_rows(self.soft, batch.media_source, batch.media_rows, residual)
        self._positions.compute(batch.positions)
        inputs = self._per_layer.compute(batch, residual) if self._per_layer else None
        if observe:
            observe(0, residual)
        norms.norm(residual, weights.layers[0].input_norm, normed)
        pools = batch.pools
        for i, (layer, w) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            pool, slot = self.kv_cache.layer_slot[i]
            pages = self.kv_cache.k[pool][slot], self.kv_cache.v[pool][slot]
            drops, owns = kept is not None and i == self.drops_at, layer.kv_from is None
            if drops and not owns:                              # nothing of the other rows is needed any more
                if not len(kept):
                    return normed[:0]
                self._positions.keep(kept)
                normed = self._kept("normed", normed, kept)
            q = self._attention.project(layer, w, normed, self._positions, pools[pool].slots, pages)
            if drops and owns:                                  # their k and v are in the cache
                if not len(kept):
                    return normed[:0]
                q = self._kept("q", q, kept)
            if drops:
                pools, residual = batch.kept_pools, self._kept("residual", residual, kept)
                inputs = self._per_layer.keep(inputs, kept) if self._per_layer else None
                normed, branch = (rows(name, len(kept), spec.hidden) for name in ("normed", "branch"))
            self._attention.attend(layer, w, q, pages, pools[pool], branch)
            norms.add(residual, branch, w.post_attention_norm, w.pre_mlp_norm, None, normed)
            self._feed_forward(layer, w, residual, normed, branch)
            next_norm = weights.norm if i + 1 == len(spec.layers) else weights.layers[i + 1].input_norm
            if inputs is None:
                norms.add(residual, branch, w.post_mlp_norm, next_norm, w.layer_scalar, normed)
            else:
                norms.add(residual, branch, w.post_mlp_norm, None, None, None)
                self._per_layer.add(i, w, inputs, residual, next_norm, branch, normed)
            if observe:
                observe(i + 1, residual)
        return normed

    def logits(self, states):
        """Logits of final-norm states [n, hidden], n <= workspace.max_logit_rows: float32 [n, vocab], a buffer."""
        out = self.workspace.rows("logits", len(states), self.spec.vocab)
        self.ops.linear(states, self.weights.head, out, self.workspace.scratch)
        if self.spec.logit_softcap is not None:
            self.ops.logit_softcap(out, self.spec.logit_softcap)
        return out

    def _kept(self, name, x, kept):
        """The rows `kept` of x, a buffer of that name."""
        return self.ops.select_rows(x, kept, self.workspace.rows("kept_" + name, len(kept), x.shape[1]))


def _refuse_unknown(spec):
    """Raises TypeError for what a ModelSpec can say and no branch here does."""
    for i, layer in enumerate(spec.layers):
        attention, mlp = layer.attention, layer.mlp
        if type(attention) is not AttentionSpec or type(mlp) not in (DenseSpec, MoeSpec):
            raise TypeError(f"layer {i}: no branch for {type(attention).__name__} and {type(mlp).__name__}")
        if type(mlp) is MoeSpec and (mlp.dense is None or mlp.routing not in ("softmax", "sigmoid")):
            raise TypeError(f"layer {i}: no branch for experts by {mlp.routing!r} routing "
                            f"{'beside' if mlp.dense else 'without'} a dense MLP")
        if attention.sees_blocks and attention.chunk is not None:
            raise TypeError(f"layer {i}: no branch for chunked attention that sees all of a picture")
        is_shared = layer.kv_from is not None
        if is_shared and not (layer.kv_from < i and spec.layers[layer.kv_from].kv_from is None):
            raise TypeError(f"layer {i}: no branch for reading the K and V of layer {layer.kv_from}, which has none of "
                            "its own before it")
        if is_shared != (spec.first_shared is not None and i >= spec.first_shared):
            raise TypeError(f"layer {i}: no branch for K and V of its own behind layers that read another's")
